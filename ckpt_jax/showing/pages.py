"""A page for a browser: one file that needs no network.

It is made of the files in `web/`: the markup, the style, and the program that draws the table, the
shards and the object graph from the data in the page. The map of sizes is drawn here.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from typing import Any

from ckpt_jax.graph.labels import local_name
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.report import printable
from ckpt_jax.showing import rows, treemap
from ckpt_jax.showing.contents import Contents, Entry

_COLORS = 8  # in `page.css`; the last one is for all that remains
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page(contents: Contents) -> str:
    """A whole page: a map of sizes, a table to search in, the shards of a chosen array over its
    mesh, and the object graph with its shared and slot edges."""
    by_dtype = _ranks(contents, lambda entry: entry.spec.dtype)
    depth = _common_depth([entry.path for entry in contents.entries if entry.nbytes])
    by_subtree = _ranks(contents, lambda entry: _subtree(entry.path, depth))
    entries = {entry.path: entry for entry in contents.entries}

    def marks(path: str) -> str:
        dtype, subtree = entries[path].spec.dtype, _subtree(path, depth)
        return f'class="cell d{by_dtype[dtype][0]} s{by_subtree[subtree][0]}"'

    drawn = treemap.drawn(
        treemap.rectangles({path: entry.nbytes for path, entry in entries.items()}),
        lambda path: f"{path}: {entries[path].kind}, {rows.size(entries[path].nbytes)}",
        marks,
        'id="map" data-by="dtype"',
    )
    parts = {
        "title": html.escape(rows.heading(contents)),
        "name": html.escape(printable(contents.path)),
        "about": html.escape(_about(contents)),
        "metadata": _metadata(contents),
        "treemap": drawn,
        "legend": _legend(by_dtype, by_subtree, len(entries) - drawn.count('class="value"')),
        "style": _part("page.css"),
        "script": _part("page.js"),
        # "<" is escaped, so that no path can end the script.
        "data": json.dumps(_data(contents), separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: what stands in a part is not looked at again.
    return _PLACE.sub(lambda place: parts[place[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("ckpt_jax.showing").joinpath("web", name).read_text(encoding="utf-8")


def _about(contents: Contents) -> str:
    graph = contents.graph
    found = [rows.count(len(contents.entries), "value"), rows.size(contents.nbytes)]
    found += [rows.count(len(graph.nodes), "object")] if graph is not None else []
    return " \u00b7 ".join([*found, f"format {contents.format}"])


def _metadata(contents: Contents) -> str:
    """A section with what the program said about the checkpoint; nothing if it said nothing."""
    found = [
        f"<dt>{html.escape(rows.printable(path))}</dt><dd>{html.escape(text)}</dd>"
        for path, text in rows.flat(contents.metadata)
    ]
    if not found:
        return ""
    return f'<section id="metadata"><h2>Metadata</h2><dl>{"".join(found)}</dl></section>'


# --- colours ----------------------------------------------------------------------------

Ranks = Mapping[str, tuple[int, int]]  # by name: (number of the colour, size)


def _ranks(contents: Contents, name_of: Callable[[Entry], str]) -> Ranks:
    """The colour of each name: those with the most bytes get one of their own."""
    nbytes = Counter[str]()
    for entry in contents.entries:
        nbytes[name_of(entry)] += entry.nbytes
    return {
        name: (min(rank, _COLORS - 1), total)
        for rank, (name, total) in enumerate(nbytes.most_common())
    }


def _common_depth(paths: Sequence[str]) -> int:
    """How many names all paths have in common at their beginnings."""
    levels = zip(*[path.split("/")[:-1] for path in paths], strict=False)
    return len([*takewhile(lambda names: len({*names}) == 1, levels)])


def _subtree(path: str, depth: int) -> str:
    return "/".join(path.split("/")[: depth + 1])


def _legend(by_dtype: Ranks, by_subtree: Ranks, left_out: int) -> str:
    marks = [*_marks(by_dtype, "d", "by-dtype"), *_marks(by_subtree, "s", "by-subtree")]
    if left_out:
        marks.append(f"<span>{left_out:,} more are empty or too small to be drawn</span>")
    return f'<div id="legend" data-by="dtype">{"".join(marks)}</div>'


def _marks(ranks: Ranks, letter: str, group: str) -> Iterator[str]:
    present = [(name, rank, nbytes) for name, (rank, nbytes) in ranks.items() if nbytes]
    own = [each for each in present if each[1] < _COLORS - 1 or len(present) == _COLORS]
    rest = sum([nbytes for _, _, nbytes in present[len(own) :]])
    for name, rank, nbytes in [*own, *[("others", _COLORS - 1, rest)] * (rest > 0)]:
        about = f"{printable(name) or '(root)'} \u00b7 {rows.size(nbytes)}"
        yield f'<span class="{group}"><i class="{letter}{rank}"></i>{html.escape(about)}</span>'


# --- data -------------------------------------------------------------------------------


def _data(contents: Contents) -> dict[str, Any]:
    """What the program of the page draws."""
    values = [
        {
            "path": path,
            "type": entry.kind,
            "size": rows.size(entry.nbytes) if path == entry.path else "",
            "nbytes": entry.nbytes if path == entry.path else 0,
            "sharding": rows.sharding_text(entry.sharding, len(entry.spec.shape)),
            "note": rows.remark(entry, path),
            "layout": _layout(entry),
        }
        for path, entry in contents.by_path.items()
    ]
    graph = contents.graph
    return {
        "nbytes": contents.nbytes,
        "values": values,
        "graph": None if graph is None or len(graph.nodes) < 2 else _objects(graph),
    }


def _layout(entry: Entry) -> dict[str, Any] | None:
    """How the axes of an array are split over a mesh; None if each device had all of it."""
    sharding, shape = entry.sharding, entry.spec.shape
    if sharding is None or not sharding.axis_names or not any(sharding.partitions) or not shape:
        return None
    mesh = dict(zip(sharding.axis_names, sharding.mesh_shape, strict=False))
    splits = [
        [name for name in names if name in mesh] for names in sharding.partitions[: len(shape)]
    ]
    splits += [[] for _ in shape[len(splits) :]]
    return {"shape": shape, "mesh": [*mesh.items()], "splits": splits}


def _objects(graph: ObjectGraph) -> list[dict[str, Any]]:
    """The objects of a graph, with the edges to their children and slots."""
    return [
        {
            "path": graph.paths[number],
            "kind": node.type_name or ("" if node.attributes else node.container or "object"),
            "values": [
                f"{a.spec}" if node.has_only(a.name) else f"{a.name}: {a.spec}"
                for a in node.attributes
            ],
            "children": [[local_name(label), child] for label, child in node.children],
            "slots": [[slot.name, slot.variable, slot.node] for slot in node.slots],
        }
        for number, node in enumerate(graph.nodes)
    ]
