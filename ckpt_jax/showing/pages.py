"""HTML: what notebooks show, and pages of their own. Nothing in it comes from the network.

Colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence

from ckpt_jax.showing import rows
from ckpt_jax.showing.contents import Contents, Entry
from ckpt_jax.showing.differences import WHATS, Differences
from ckpt_jax.showing.findings import detail

# The colours of texts are those of the page around, which may be dark on a light system.
_STYLE = """
.ckpt{font:14px/1.5 system-ui,sans-serif}
.ckpt table{font:inherit;color:inherit;border-collapse:collapse}
.ckpt code{font:12.5px ui-monospace,monospace;color:inherit;background:none}
.ckpt summary{cursor:pointer}
.ckpt .in{margin-left:18px;border-left:1px solid #98a2b380;padding-left:8px}
.ckpt .dim{opacity:.7}
.ckpt td,.ckpt th{text-align:left;padding:1px 14px 1px 0;vertical-align:top}
.ckpt b.added{color:#2f9e62}.ckpt b.removed{color:#d9485f}
.ckpt b.reshaped,.ckpt b.retyped{color:#9a6bd6}.ckpt b.changed{color:#c97a12}
"""
_OPEN = 60  # values in a tree that is unfolded at once
_MAX_ROWS = 5000  # of a tree or a table in a notebook


def tree(contents: Contents) -> str:
    """A tree that unfolds."""
    entries = [*contents.by_path.items()][:_MAX_ROWS]
    root: dict[str, object] = {}
    for path, entry in entries:
        *above, name = path.split("/")
        at = root
        for part in above:
            below = at.setdefault(f"{part}/", {})
            assert isinstance(below, dict)
            at = below
        at[name] = (path, entry)
    is_open = " open" if len(entries) <= _OPEN else ""
    more = len(contents.by_path) - len(entries)
    left = f'<div class="dim">... and {more:,} more values</div>' if more else ""
    body = "".join(_branch(contents, root, "", is_open))
    return _within(f"<div><b>{html.escape(rows.heading(contents))}</b></div>{body}{left}")


def _branch(
    contents: Contents, found: dict[str, object], above: str, is_open: str
) -> Iterator[str]:
    for name, inside in found.items():
        if isinstance(inside, dict):
            path = f"{above}{name}"
            number, nbytes = contents.subtrees[path[:-1]]
            about = f"{rows.count(number, 'value')}, {rows.size(nbytes)}"
            yield (
                f"<details{is_open}><summary><code>{html.escape(name)}</code> "
                f'<span class="dim">{about}</span></summary><div class="in">'
            )
            yield from _branch(contents, inside, path, is_open)
            yield "</div></details>"
        elif isinstance(inside, tuple):
            yield _leaf(name, *inside)


def _leaf(name: str, path: str, entry: Entry) -> str:
    about = [rows.size(entry.nbytes)] if path == entry.path else []
    about += [rows.sharding_text(entry.sharding, len(entry.spec.shape)), rows.remark(entry, path)]
    return (
        f"<div><code>{html.escape(name or '(root)')}</code> {html.escape(entry.kind)} "
        f'<span class="dim">{html.escape(", ".join(filter(None, about)))}</span></div>'
    )


def differences(found: Differences) -> str:
    """A table of differences, by kind."""
    title = f"{found.before.path} -> {found.after.path}"
    parts = [f"<div><b>{html.escape(title)}</b></div>"]
    for what in WHATS:
        changes = [change for change in found.changes if change.what == what]
        if changes:
            cells = "".join(
                [
                    f"<tr><td><code>{html.escape(c.path or '(root)')}</code></td>"
                    f"<td>{html.escape(detail(c))}</td></tr>"
                    for c in changes[:_MAX_ROWS]
                ]
            )
            parts.append(
                f'<details open><summary><b class="{what}">{what}</b> ({len(changes):,})</summary>'
                f"<table>{cells}</table></details>"
            )
    if not found.changes:
        parts.append('<div class="dim">no differences</div>')
    return _within("".join(parts))


def _within(body: str) -> str:
    return f'<style>{_STYLE}</style><div class="ckpt">{body}</div>'


# --- a page of its own ------------------------------------------------------------------

_WIDTH, _HEIGHT = 1000.0, 420.0
_SHOWN = 1500  # arrays in the treemap; smaller ones are left out
_COLORS = {  # by family of dtypes: of medium lightness, for light and dark pages
    "float32": "#4c78a8",
    "bfloat16": "#54a24b",
    "float16": "#72b7b2",
    "float64": "#9d755d",
    "int": "#e4913c",
    "float8": "#b279a2",
}


def page(contents: Contents) -> str:
    """A whole page: a treemap of sizes, and a table to search in. A click shows the shards."""
    table = [
        {
            "path": path,
            "type": entry.kind,
            "size": rows.size(entry.nbytes) if path == entry.path else "",
            "nbytes": entry.nbytes,
            "sharding": rows.sharding_text(entry.sharding, len(entry.spec.shape)),
            "note": rows.remark(entry, path),
            "boxes": _layout(entry),
        }
        for path, entry in contents.by_path.items()
    ]
    # "<" is escaped, so that no path can end the script.
    data = json.dumps(table).replace("<", "\\u003c")
    title = html.escape(rows.heading(contents))
    return _PAGE.format(
        title=title,
        style=_STYLE,
        treemap=_treemap(contents) + _legend(contents),
        data=data,
        script=_SCRIPT,
    )


def _layout(entry: Entry) -> dict[str, object] | None:
    """How the first two axes of an array are split over a mesh; None if it lay in one piece."""
    sharding, shape = entry.sharding, entry.spec.shape
    if sharding is None or not sharding.axis_names or not any(sharding.partitions) or not shape:
        return None
    sizes = dict(zip(sharding.axis_names, sharding.mesh_shape, strict=False))
    splits = []
    for axis in range(len(shape)):
        names = sharding.partitions[axis] if axis < len(sharding.partitions) else ()
        splits.append({"axes": [[name, sizes.get(name, 1)] for name in names]})
    copies = [[n, s] for n, s in sizes.items() if not any(n in p for p in sharding.partitions)]
    return {"shape": list(shape), "splits": splits, "copies": copies}


def _color(dtype: str) -> str:
    for name, color in _COLORS.items():
        if name in dtype:
            return color
    return "#8a8f98"


def _treemap(contents: Contents) -> str:
    """An SVG in which each array has an area in proportion to its size."""
    largest = sorted(contents.entries, key=lambda entry: -entry.nbytes)[:_SHOWN]
    entries = [entry for entry in largest if entry.nbytes]
    boxes = squarified([entry.nbytes for entry in entries], 0, 0, _WIDTH, _HEIGHT)
    drawn = []
    for entry, (x, y, width, height) in zip(entries, boxes, strict=True):
        name = html.escape(entry.path)
        about = html.escape(f"{entry.path}: {entry.kind}, {rows.size(entry.nbytes)}")
        fits = width > 60 and height > 16
        short = html.escape(_ending(entry.path, int(width / 6.8))) if fits else ""
        label = f'<text x="{x + 4:.1f}" y="{y + 13:.1f}">{short}</text>' if fits else ""
        drawn.append(
            f'<g data-path="{name}"><title>{about}</title><rect x="{x:.2f}" y="{y:.2f}" '
            f'width="{max(width - 1, 0.2):.2f}" height="{max(height - 1, 0.2):.2f}" '
            f'fill="{_color(entry.spec.dtype)}"/>{label}</g>'
        )
    return f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" id="map">{"".join(drawn)}</svg>'


def _ending(path: str, length: int) -> str:
    """The end of a path that is too long."""
    return path if len(path) <= length else f"\u2026{path[1 - length :]}"


def _legend(contents: Contents) -> str:
    """The colours of the treemap."""
    dtypes = sorted({entry.spec.dtype for entry in contents.entries if entry.nbytes})
    marks = [
        f'<b style="color:{_color(dtype)}">\u25a0</b> {html.escape(dtype)}' for dtype in dtypes
    ]
    return f'<div class="dim">{" &nbsp; ".join(marks)}</div>'


def squarified(
    sizes: Sequence[int], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) that fill a rectangle, with areas in proportion to sizes.

    Rows are laid along the shorter side; a row takes further sizes as long as its rectangles come
    closer to squares (Bruls, Huizing, van Wijk: Squarified Treemaps).

    Args:
      sizes: positive, the largest first.
      x, y, width, height: the rectangle to fill.

    >>> squarified([2, 1, 1], 0, 0, 4, 2)
    [(0, 0, 2.0, 2.0), (2.0, 0, 2.0, 1.0), (2.0, 1.0, 2.0, 1.0)]
    """
    found: list[tuple[float, float, float, float]] = []
    total = sum(sizes)
    scale = width * height / total if total else 0.0
    at = 0
    while at < len(sizes):
        side = min(width, height)
        stop, area = at + 1, sizes[at] * scale
        worst = _worst(area, area, area, side)
        while stop < len(sizes):
            more = area + sizes[stop] * scale
            now = _worst(sizes[at] * scale, sizes[stop] * scale, more, side)
            if now > worst:
                break
            stop, area, worst = stop + 1, more, now
        thickness = area / side if side else 0.0
        place = y if width >= height else x
        for each in sizes[at:stop]:
            length = each * scale / thickness if thickness else 0.0
            if width >= height:
                found.append((x, place, thickness, length))
            else:
                found.append((place, y, length, thickness))
            place += length
        if width >= height:
            x, width = x + thickness, max(width - thickness, 0.0)
        else:
            y, height = y + thickness, max(height - thickness, 0.0)
        at = stop
    return found


def _worst(largest: float, smallest: float, area: float, side: float) -> float:
    """The largest ratio of the sides of the rectangles in a row."""
    if not (area and side and smallest):
        return float("inf")
    return max(side**2 * largest / area**2, area**2 / (side**2 * smallest))


_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const body = document.getElementById('rows'), search = document.getElementById('search');
const shown = document.getElementById('shown'), detail = document.getElementById('detail');
const LIMIT = 2000;
function fill() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const text = r => (r.path + ' ' + r.type).toLowerCase();
  const hits = data.filter(r => words.every(w => text(r).includes(w)));
  body.replaceChildren(...hits.slice(0, LIMIT).map(r => {
    const tr = document.createElement('tr');
    for (const text of [r.path, r.type, r.size, r.sharding, r.note]) {
      const td = document.createElement('td'); td.textContent = text; tr.append(td);
    }
    tr.onclick = () => layout(r); return tr;
  }));
  shown.textContent = hits.length > LIMIT ? `${LIMIT} of ${hits.length}` : `${hits.length} shown`;
  const paths = new Set(hits.map(r => r.path));
  for (const g of document.querySelectorAll('#map g'))
    g.style.opacity = paths.has(g.dataset.path) ? 1 : 0.15;
}
function parts(split) { return split ? split.axes.reduce((n, a) => n * a[1], 1) : 1; }
function where(split, k) {
  const found = [];
  for (const [name, size] of split.axes.slice().reverse()) {
    found.unshift(`${name}=${k % size}`); k = Math.floor(k / size);
  }
  return found;
}
function layout(r) {
  detail.replaceChildren();
  const head = document.createElement('h3'); head.textContent = `${r.path}: ${r.type}`;
  detail.append(head);
  const note = document.createElement('p');
  detail.append(note);
  if (!r.boxes) { note.textContent = r.sharding || 'It lay in one piece.'; return; }
  const {shape, splits, copies} = r.boxes;
  const axis = splits.map((s, i) => i).filter(i => parts(splits[i]) > 1);
  const [a, b] = axis.length > 1 ? axis : [axis[0], -1];
  const rowsN = a === undefined ? 1 : parts(splits[a]), cols = b < 0 ? 1 : parts(splits[b]);
  note.textContent = `${r.sharding}` +
    (copies.length ? `; copies along ${copies.map(c => c.join('=')).join(', ')}` : '') +
    (axis.length > 2 ? '; the first two axes that are split are drawn' : '');
  const table = document.createElement('table'); table.className = 'mesh';
  const part = (i, k, n) => { const step = Math.ceil(shape[i] / n);
    return `${k * step}:${Math.min((k + 1) * step, shape[i])}`; };
  for (let i = 0; i < Math.min(rowsN, 64); i++) {
    const tr = table.insertRow();
    for (let j = 0; j < Math.min(cols, 64); j++) {
      const names = [...(a === undefined ? [] : where(splits[a], i)),
                     ...(b < 0 ? [] : where(splits[b], j))];
      const box = shape.map((n, k) => k === a ? part(k, i, rowsN) : k === b ? part(k, j, cols)
                                                                             : `0:${n}`);
      tr.insertCell().textContent = `[${box.join(', ')}] on ${names.join(', ')}`;
    }
  }
  detail.append(table);
}
search.oninput = fill;
const byPath = new Map(data.map(r => [r.path, r]));
for (const g of document.querySelectorAll('#map g'))
  g.onclick = () => layout(byPath.get(g.dataset.path));
fill();
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>{style}
body{{margin:24px;max-width:1200px;background:#fff;color:#1d2330}}
@media (prefers-color-scheme:dark){{body{{background:#14171d;color:#e4e7ee}}}}
svg{{width:100%;height:auto}}svg text{{font:11px system-ui;fill:#fff;pointer-events:none}}
svg g:hover rect{{stroke:#d22;stroke-width:2}}svg g,tbody tr{{cursor:pointer}}
table.mesh td{{border:1px solid #98a2b3;padding:6px 10px}}
input{{font:inherit;width:24em;padding:4px 8px;margin:12px 12px 12px 0}}
</style></head><body class="ckpt"><h2>{title}</h2>
{treemap}
<div><input id="search" placeholder="search paths and types" aria-label="search">
<span id="shown" class="dim"></span></div>
<div id="detail"></div>
<table><thead><tr><th>path</th><th>type</th><th>size</th><th>sharding</th><th></th></tr></thead>
<tbody id="rows"></tbody></table>
<script type="application/json" id="data">{data}</script>
<script>{script}</script></body></html>
"""
