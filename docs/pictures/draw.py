"""Draws the pictures of the pages, as SVG: `python docs/pictures/draw.py`; `--check` compares.

Each picture is a function that returns its elements. The colours are readable on a card of their
own, so that pictures look the same on light and on dark pages.
"""

import math
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
INK, DIM, LINE, CARD = "#1d2733", "#5d6875", "#c3cad3", "#fbfcfe"
BLUE, GREEN, ORANGE, VIOLET, YELLOW = "#2a6fd0", "#128a66", "#d9480f", "#7458cf", "#b97f00"
TINTS = {BLUE: "#e3edfb", GREEN: "#dff4ec", ORANGE: "#fde8de", VIOLET: "#ece7fa", YELLOW: "#fbf0d4"}
HUES = ["#b5d3f7", "#c9bdf2", "#f4b7d6", "#f6c3ad", "#f3dca0", "#d6e9a6", "#b1e3c4", "#aee0e8"]
SANS = "system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif"
MONO = "ui-monospace,'DejaVu Sans Mono',monospace"


def text(x, y, words, size=14, color=INK, anchor="middle", mono=False, bold=False):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    font = f' font-family="{MONO}"' if mono else ""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}"'
        f"{font}{weight}>{words}</text>"
    )


def box(x, y, width, height, fill="#fff", line=LINE, dashed=False, radius=8):
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>'
    )


def node(x, y, name, kind, color=BLUE, dashed=False, width=132):
    """A node around a point: what it is called, and what it is."""
    fill = "#fff" if dashed else TINTS[color]
    return [
        box(x - width / 2, y - 22, width, 44, fill, color, dashed),
        text(x, y - 3, name, 13.5, mono=True, bold=True),
        text(x, y + 14, kind, 11.5, DIM),
    ]


def line(points, color=DIM, dashed=False, arrow=True, width=1.6):
    """A line through points; four points are a curve."""
    (x, y), *rest = points
    if len(points) == 4:
        (a, b), (c, d), (e, f) = rest
        path = f"M{x:g},{y:g} C{a:g},{b:g} {c:g},{d:g} {e:g},{f:g}"
    else:
        path = f"M{x:g},{y:g} " + " ".join(f"L{a:g},{b:g}" for a, b in rest)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    found = [f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash}/>']
    if arrow:
        (a, b), (c, d) = points[-2:]
        angle = math.atan2(d - b, c - a)
        ends = [(c - 9 * math.cos(angle + t), d - 9 * math.sin(angle + t)) for t in (0.42, -0.42)]
        shape = " ".join(f"{p:.1f},{q:.1f}" for p, q in [ends[0], (c, d), ends[1]])
        found.append(f'<polygon points="{shape}" fill="{color}"/>')
    return found


def edge(start, end, name, color=DIM, at=0.5, dx=0, dy=-4, **settings):
    (x, y), (u, v) = start, end
    label = text(x + at * (u - x) + dx, y + at * (v - y) + dy, name, 12, color, mono=True)
    return [*line([start, end], color, **settings), label]


# --- the pictures --------------------------------------------------------------------------------


def graph():
    """An object graph: children, a shared object, slots."""
    return 760, 372, [
        node(380, 44, "(root)", "Checkpoint", VIOLET),
        edge((340, 66), (190, 118), "model", dx=-26),
        edge((420, 66), (570, 118), "optimizer", dx=42),
        node(180, 140, "model", "nnx.Module"),
        node(580, 140, "optimizer", "nnx.Optimizer"),
        edge((150, 162), (90, 218), "embed", dx=-30),
        edge((210, 162), (270, 218), "head", dx=26),
        node(84, 240, "embed", "nnx.Embed"),
        node(276, 240, "head", "nnx.Linear"),
        edge((100, 262), (142, 308), "embedding", dx=-52, dy=4),
        line([(262, 262), (252, 286), (226, 296), (198, 307)], ORANGE),
        text(282, 290, "kernel", 12, ORANGE, mono=True),
        text(282, 305, "shared", 11.5, ORANGE),
        node(150, 330, "(32000, 512)", "one array", GREEN),
        node(494, 240, "mu", "one moment for each", GREEN, width=150),
        node(666, 240, "step", "uint32", GREEN),
        edge((560, 162), (510, 218), "slot mu", GREEN, dx=-38, dashed=True),
        edge((604, 162), (652, 218), "step", dx=26),
        line([(450, 262), (400, 322), (330, 332), (220, 332)], GREEN, dashed=True),
        text(384, 350, "belongs to this variable, wherever it moves", 12, GREEN),
    ]  # fmt: skip


def match():
    """The saved and the live graph side by side, with what waits."""
    left, right = 150, 500
    found = [
        text(left, 30, "saved", 15, bold=True),
        text(right, 30, "live", 15, bold=True),
    ]
    for x, names in ((left, "saved"), (right, "live")):
        is_live = names == "live"
        found += [
            node(x, 66, "(root)", "Checkpoint", VIOLET, width=120),
            edge((x, 88), (x, 128), "model", dx=28, dy=6),
            node(x, 150, "model", "nnx.Module", width=120),
            edge((x - 24, 172), (x - 66, 216), "dense", dx=-30, dy=2),
            edge((x + 24, 172), (x + 66, 216), "head", DIM if not is_live else ORANGE, dx=28, dy=2,
                 dashed=is_live),
            node(x - 72, 238, "dense", "kernel, bias", GREEN, width=118),
            node(x + 72, 238, "head", "not built yet" if is_live else "kernel, bias",
                 ORANGE if is_live else GREEN, dashed=is_live, width=118),
        ]  # fmt: skip
    for y, start, stop in ((66, 60, 60), (150, 60, 60)):
        found += line([(left + start, y), (right - stop, y)], BLUE, dashed=True, arrow=False)
    found += line([(left - 40, 260), (left, 306), (right - 120, 306), (right - 92, 262)], BLUE,
                  dashed=True)  # fmt: skip
    found += [
        text(325, 60, "the roots are bound", 12, BLUE),
        text(325, 144, "equal names are followed", 12, BLUE),
        text(325, 318, "the value is read, and assigned", 12, BLUE),
        text(638, 142, "deferred:", 12.5, ORANGE, "start", bold=True),
        text(638, 160, "the value waits on this edge", 12.5, ORANGE, "start"),
        text(638, 178, "until the program assigns", 12.5, ORANGE, "start"),
        text(638, 196, "model.head", 12.5, ORANGE, "start", mono=True),
    ]
    return 850, 340, found


def shards():
    """An array on one mesh, its shards, and on another mesh."""
    found, top, side = [], 64, 168
    for column in range(2):
        for row in range(4):
            n = 2 * row + column
            x, y, w, h = 24 + column * side / 2, top + row * side / 4, side / 2, side / 4
            found += [box(x, y, w, h, HUES[n], CARD, radius=5)]
            found += [text(x + w / 2, y + h / 2 + 5, f"device {n}", 12)]
    found += [
        text(108, 34, "saved on a mesh of 4 x 2", 13.5, bold=True),
        text(108, 52, "(data, model)", 12, DIM, mono=True),
        text(377, 34, "the checkpoint", 13.5, bold=True),
        text(377, 52, "one shard for each device", 12, DIM),
        text(644, 34, "restored on a mesh of 2 x 4", 13.5, bold=True),
        text(644, 52, "(-, model)", 12, DIM, mono=True),
        *line([(200, 148), (268, 148)], DIM),
        *line([(486, 148), (552, 148)], DIM),
        text(234, 138, "save", 12.5, DIM),
        text(519, 138, "restore", 12.5, DIM),
        box(280, top - 4, 194, side + 8, "#fff", LINE),
    ]
    for n in range(8):
        y = top + 4 + n * 20.5
        found += [
            box(290, y, 62, 16, HUES[n], CARD, radius=4),
            text(321, y + 12, f"shard {n}", 10.5),
        ]
        rows, columns = n // 2, n % 2
        what = f"[{4 * rows}:{4 * rows + 4}, {4 * columns}:{4 * columns + 4}]"
        found += [text(362, y + 12, what, 11, DIM, "start", mono=True)]
    for column in range(4):
        x, w = 560 + column * side / 4, side / 4
        for row in range(4):
            y = top + row * side / 4
            found += [box(x, y, w, side / 4, HUES[2 * row + column // 2], CARD, radius=2)]
        found += [box(x + 1, top + 1, w - 2, side - 2, "none", BLUE, radius=4)]
        found += [text(x + w / 2, top + side + 20, f"{column}, {column + 4}", 12)]
    found += [
        text(644, top + side + 38, "devices; each reads from four shards", 12, DIM),
        text(108, top + side + 20, "each device writes its own box", 12, DIM),
        text(377, top + side + 20, "and the index says which box is where", 12, DIM),
    ]
    return 790, 292, found


def save():
    """The parts of a save in time."""
    found = []
    parts = (("trace", 20, 70, VIOLET), ("snapshot", 92, 130, BLUE), ("write", 224, 300, GREEN),
             ("commit", 526, 90, GREEN))  # fmt: skip
    for name, x, width, color in parts:
        found += [
            box(x, 62, width, 40, TINTS[color], color),
            text(x + width / 2, 87, name, 13.5, mono=True),
        ]
    found += [
        text(120, 46, "the program waits", 12.5, BLUE, bold=True),
        *line([(20, 52), (222, 52)], BLUE, arrow=False),
        text(420, 46, "in the background, on other threads", 12.5, GREEN, bold=True),
        *line([(224, 52), (616, 52)], GREEN, arrow=False),
        box(224, 130, 496, 40, "#fff", LINE),
        text(472, 155, "the training goes on", 13.5),
        text(120, 155, "save() is called", 12.5, DIM),
        *line([(60, 160), (30, 160), (24, 140), (22, 108)], DIM),
        *line([(223, 62), (223, 176)], INK, arrow=False),
        text(223, 196, "save() returns: nothing that the program does", 12, DIM),
        text(223, 212, "now can change what is written", 12, DIM),
        *line([(616, 62), (616, 124)], INK, arrow=False),
        text(628, 78, "one rename:", 12, DIM, "start"),
        text(628, 94, "before it there is", 12, DIM, "start"),
        text(628, 110, "nothing, after it all", 12, DIM, "start"),
    ]  # fmt: skip
    return 760, 228, found


PICTURES = {"graph": graph, "match": match, "shards": shards, "save": save}


def flat(found):
    for each in found:
        if isinstance(each, str):
            yield each
        else:
            yield from flat(each)


def drawing(picture):
    width, height, found = picture()
    body = "\n".join(flat(found))
    title = (picture.__doc__ or "").rstrip(".")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="{SANS}" role="img"><title>{title}</title>\n'
        f'<rect width="{width}" height="{height}" rx="12" fill="{CARD}"/>\n{body}\n</svg>\n'
    )


def main():
    stale = []
    for name, picture in PICTURES.items():
        file = FOLDER / f"{name}.svg"
        if "--check" in sys.argv:
            stale += [name] * (not file.exists() or file.read_text() != drawing(picture))
        else:
            file.write_text(drawing(picture))
    if stale:
        sys.exit(f"run docs/pictures/draw.py: {', '.join(stale)} changed")


if __name__ == "__main__":
    main()
