"""Tables for people, as values: `Table` and the functions that make tables of what was found.

A *part* of an output is a text or a table. `plain` makes text of parts; `terminal` draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_jax.graph.labels import local_name
from ckpt_jax.graph.nodes import ObjectGraph, pretty_name
from ckpt_jax.graph.specs import ShardingSpec
from ckpt_jax.report import printable
from ckpt_jax.showing.contents import Contents, Entry, parents

_MAX_WIDTH = 100  # of a column; longer cells move what stands beside them


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
      columns: the headings.
      rows: the cells.
      right: the numbers of the columns that are aligned to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()

    def without_empty_columns(self) -> Table:
        """The table without the columns that have no text but the heading."""
        kept = [n for n in range(len(self.columns)) if any([row[n] for row in self.rows])]
        return Table(
            tuple([self.columns[n] for n in kept]),
            tuple([tuple([row[n] for n in kept]) for row in self.rows]),
            frozenset([at for at, n in enumerate(kept) if n in self.right]),
        )

    def __str__(self) -> str:
        widths = [
            min(max(map(len, cells)), _MAX_WIDTH)
            for cells in zip(self.columns, *self.rows, strict=True)
        ]
        lines = []
        for row in (self.columns, *self.rows):
            cells = [
                f"{cell:>{width}}" if n in self.right else f"{cell:<{width}}"
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


Part = str | Table


def plain(parts: Sequence[Part]) -> str:
    """The text of an output."""
    return "\n".join(map(str, parts))


def size(nbytes: int) -> str:
    """A number of bytes for people.

    >>> size(512), size(3 << 20)
    ('512 B', '3.0 MiB')
    """
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """A number and a noun.

    >>> count(1, "value"), count(2, "value")
    ('1 value', '2 values')
    """
    return f"{number:,} {noun}{'s'[: number != 1]}"


def sharding_text(sharding: ShardingSpec | None, rank: int) -> str:
    """How an array with some axes lay on several devices, in a few words; "" if it lay on one.

    >>> mesh = ShardingSpec("NamedSharding", ("data", "model"), (4, 2), (("data",),), 8)
    >>> sharding_text(mesh, 2)
    '(data, -) of data=4, model=2'
    """
    if sharding is None or sharding.num_devices < 2:
        return ""
    if not sharding.axis_names:
        return sharding.text or f"{sharding.kind} on {sharding.num_devices} devices"
    axes = [" x ".join(names) or "-" for names in sharding.partitions]
    axes += ["-"] * (rank - len(axes))
    mesh = [f"{n}={s}" for n, s in zip(sharding.axis_names, sharding.mesh_shape, strict=False)]
    spread = f"({', '.join(axes)})" if any(sharding.partitions) else "replicated"
    return f"{spread} {'on' if spread == 'replicated' else 'of'} {', '.join(mesh)}"


def heading(contents: Contents) -> str:
    """The line above the table of a checkpoint."""
    found = f"{count(len(contents.entries), 'value')}, {size(contents.nbytes)}"
    return f"{printable(contents.path)}: {found}, format {contents.format}"


def remark(entry: Entry, path: str) -> str:
    """What is special about a value at one of its paths."""
    if entry.spec.is_unreadable:
        return printable(entry.spec.refusal)
    if path != entry.path:
        return f"shared with {printable(entry.path)}"
    if entry.slot is not None:
        return f"slot {printable(entry.slot.name)} of {printable(entry.slot.variable)}"
    return ""


_COLUMNS = ("path", "type", "size", "sharding", "")


def tree(contents: Contents, depth: int | None = None) -> Table:
    """The values as a tree, with totals of the subtrees.

    Args:
      contents: the values.
      depth: how many levels are shown; all by default.
    """
    rows: list[tuple[str, ...]] = []
    begun: set[str] = set()
    for path, entry in contents.by_path.items():
        above = parents(path)
        for level, subtree in enumerate(above[:depth]):
            if subtree not in begun:
                begun.add(subtree)
                number, nbytes = contents.subtrees[subtree]
                values = count(number, "value")
                rows.append((_indented(subtree, level) + "/", "", size(nbytes), "", values))
        if depth is None or len(above) < depth:
            own = _row(_indented(path, len(above)), entry, path)
            rows.append(own)
    return _table(rows)


def by_size(contents: Contents, top: int | None = None) -> Table:
    """The values, the largest first.

    Args:
      contents: the values.
      top: how many are shown; all by default.
    """
    entries = sorted(contents.entries, key=lambda entry: -entry.nbytes)
    return _table([_row(printable(e.path) or "(root)", e, e.path) for e in entries[:top]])


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(_COLUMNS, tuple(rows), frozenset([2])).without_empty_columns()


def _indented(path: str, level: int) -> str:
    return "  " * level + (printable(path.rpartition("/")[2]) or "(root)")


def _row(name: str, entry: Entry, path: str) -> tuple[str, ...]:
    is_first = path == entry.path
    nbytes = size(entry.nbytes) if is_first else ""
    sharding = sharding_text(entry.sharding, len(entry.spec.shape)) if is_first else ""
    return name, entry.kind, nbytes, sharding, remark(entry, path)


def metadata_parts(metadata: Mapping[str, Any]) -> list[Part]:
    """What a program said about a checkpoint, as a table and a line below it; nothing if it said
    nothing."""
    found = [(printable(path), _cut(text)) for path, text in flat(metadata)]
    return [Table(("metadata", ""), tuple(found)), ""] if found else []


def flat(metadata: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of each part of metadata that is no dict.

    >>> [*flat({"config": {"lr": 0.5, "layers": [1, 2]}, "revision": "4f2a"})]
    [('config/lr', '0.5'), ('config/layers', '[1, 2]'), ('revision', '4f2a')]
    """
    if isinstance(metadata, Mapping) and (metadata or not path):
        for name, part in metadata.items():
            yield from flat(part, f"{path}/{name}" if path else name)
    else:
        yield path, metadata_text(metadata)


def metadata_text(value: Any) -> str:
    """One value of metadata, for people: a string as it is, of anything else the JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else f"{text[: _MAX_WIDTH - 4]} ..."


def objects(graph: ObjectGraph) -> Iterator[Part]:
    """The objects of a graph and the edges between them."""
    rows: list[tuple[str, ...]] = []
    seen: set[int] = {0}
    for number, node in enumerate(graph.nodes):
        kind = node.type_name or node.container or "object"
        values = ", ".join([f"{a.name}: {a.spec}" for a in node.attributes])
        saver = f"saver {node.saver.name}" if node.saver is not None else ""
        rows.append((str(number), printable(pretty_name(graph, number)), kind, values or saver))
        for label, child in node.children:
            again = " (shared)" if child in seen else ""
            seen.add(child)
            rows.append(("", f"  {printable(local_name(label))} -> {child}{again}", "", ""))
        for slot in node.slots:
            name = f"  slot {printable(slot.name)} of {slot.variable} -> {slot.node}"
            rows.append(("", name, "", ""))
    yield Table(("object", "name and edges", "kind", "values"), tuple(rows))


def objects_as_json(graph: ObjectGraph) -> list[dict[str, object]]:
    """The objects of a graph as they stand in JSON."""
    return [
        {
            "id": number,
            "path": graph.paths[number],
            "type": node.type_name,
            "container": node.container,
            "children": [
                {"name": local_name(label), "id": child} for label, child in node.children
            ],
            "slots": [{"name": s.name, "variable": s.variable, "id": s.node} for s in node.slots],
            "values": {a.name: a.key for a in node.attributes},
            "saver": node.saver and node.saver.name,
        }
        for number, node in enumerate(graph.nodes)
    ]
