"""HTML for notebooks: a tree that unfolds, a map of sizes, and differences.

It needs no script and nothing from the network. Texts have the colours of the page around, so that
it is readable on light and on dark pages.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from ckpt_jax.showing import rows, treemap
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
.ckpt svg{display:block;width:100%;max-width:900px;height:auto;margin:6px 0}
.ckpt svg text{font-size:14px;fill:currentColor;pointer-events:none}
.ckpt svg .area{fill:none;stroke:#98a2b3;stroke-opacity:.5}.ckpt svg .group{opacity:.7}
.ckpt svg .value rect{fill-opacity:.45}.ckpt svg .value:hover rect{fill-opacity:.85}
"""
_UNFOLDED = 40  # rows that a tree shows at first, at most; it unfolds level by level
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
    depth = _depth([path for path, _ in entries])
    more = len(contents.by_path) - len(entries)
    left = f'<div class="dim">... and {more:,} more values</div>' if more else ""
    body = "".join(_branches(contents, root, depth))
    head = f"<div><b>{html.escape(rows.heading(contents))}</b></div>"
    return _within(f"{head}{_metadata(contents)}{body}{left}{_by_dtype(contents)}")


def _metadata(contents: Contents) -> str:
    """What the program said about the checkpoint, folded away if it is much."""
    found = [*rows.flat(contents.metadata)]
    if not found:
        return ""
    cells = "".join(
        [
            f"<tr><td><code>{html.escape(rows.printable(path))}</code></td>"
            f"<td>{html.escape(text)}</td></tr>"
            for path, text in found[:_MAX_ROWS]
        ]
    )
    opened = " open" * (len(found) <= _UNFOLDED // 4)
    return f"<details{opened}><summary>metadata</summary><table>{cells}</table></details>"


def _depth(paths: Sequence[str]) -> int:
    """How many levels of subtrees are unfolded at first."""
    names = [path.split("/") for path in paths]
    deepest = max(map(len, names), default=1)
    for depth in range(1, deepest):
        shown = {tuple(each[:length]) for each in names for length in range(1, depth + 2)}
        if len(shown) > _UNFOLDED:
            return depth - 1
    return deepest


def _branches(contents: Contents, root: dict[str, object], depth: int) -> Iterator[str]:
    """The lines of a tree, which may be deeper than functions can call each other."""
    stack = [("", iter(root.items()))]
    while stack:
        above, rest = stack[-1]
        for name, inside in rest:
            if isinstance(inside, tuple):
                yield _leaf(name, *inside)
            elif isinstance(inside, dict):
                path = f"{above}{name}"
                number, nbytes = contents.subtrees[path[:-1]]
                about = f"{rows.count(number, 'value')}, {rows.size(nbytes)}"
                yield (
                    f"<details{' open' * (len(stack) <= depth)}><summary>"
                    f'<code>{html.escape(name)}</code> <span class="dim">{about}</span>'
                    '</summary><div class="in">'
                )
                stack.append((path, iter(inside.items())))
                break
        else:
            stack.pop()
            if stack:
                yield "</div></details>"


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
    return _within("".join([*parts, _by_change(found)]))


_COLORS = ("#3d87e0", "#1fae7c", "#dc9a1a", "#8669d8", "#e05655", "#e27fa6", "#169fb4")
_OTHER = "#8a93a0"
_OF_CHANGE = {
    "added": "#2f9e62",
    "reshaped": "#9a6bd6",
    "retyped": "#e27fa6",
    "changed": "#dc9a1a",
    "the same": _OTHER,
}


def _by_dtype(contents: Contents) -> str:
    """A map of sizes, coloured by dtype."""
    nbytes = Counter[str]()
    for entry in contents.entries:
        nbytes[entry.spec.dtype] += entry.nbytes
    order = [dtype for dtype, _ in nbytes.most_common() if nbytes[dtype]]
    colors = dict(zip(order, _COLORS, strict=False))
    return _map(contents, lambda entry: entry.spec.dtype, colors)


def _by_change(found: Differences) -> str:
    """A map of sizes of the second checkpoint, coloured by what has changed."""
    changes = {change.path: change.what for change in found.changes}
    if not changes:
        return ""
    return _map(found.after, lambda entry: changes.get(entry.path, "the same"), _OF_CHANGE)


def _map(contents: Contents, mark: Callable[[Entry], str], colors: Mapping[str, str]) -> str:
    """A map of sizes, folded away; `mark` gives the name of the colour of a value."""
    entries = {entry.path: entry for entry in contents.entries if entry.nbytes}
    if len(entries) < 2:
        return ""
    drawn = treemap.drawn(
        treemap.rectangles({path: entry.nbytes for path, entry in entries.items()}),
        lambda path: f"{path}: {entries[path].kind}, {rows.size(entries[path].nbytes)}",
        lambda path: f'fill="{colors.get(mark(entries[path]), _OTHER)}"',
    )
    present = {mark(entry) for entry in entries.values()}
    legend = " &nbsp; ".join(
        [
            f'<span style="color:{color}">\u25a0</span> {html.escape(name)}'
            for name, color in {**colors, **dict.fromkeys(present - {*colors}, _OTHER)}.items()
            if name in present
        ]
    )
    return (
        f'<details><summary>a map of the sizes</summary>{drawn}<div class="dim">{legend}</div>'
        "</details>"
    )


def _within(body: str) -> str:
    return f'<style>{_STYLE}</style><div class="ckpt">{body}</div>'
