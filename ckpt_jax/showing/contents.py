"""The contents of a checkpoint of any format, as plain values. No array is read.

A value has a path for each place at which it can be reached: the first is its *own* path, and a
value with several is *shared*. The state that an optimizer keeps for a variable lies in a *slot*.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.patterns import selects
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.specs import LeafSpec, ShardingSpec
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.store.paths import absolute

OWN_FORMAT = "ckpt_jax"
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class SlotOf:
    """What a slot variable is: the slot `name` of an optimizer, for a variable. Both are paths."""

    name: str
    optimizer: str
    variable: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One value.

    Attributes:
      paths: all its paths, its own first.
      key: its key in the checkpoint.
      spec: what it is.
      nbytes: its size.
      sharding: how it lay on devices, if it did and the checkpoint says so.
      slot: set if it lies in a slot of an optimizer.
    """

    paths: tuple[str, ...]
    key: str
    spec: LeafSpec
    nbytes: int
    sharding: ShardingSpec | None = None
    slot: SlotOf | None = None

    @property
    def path(self) -> str:
        """Its own path."""
        return self.paths[0]

    @property
    def kind(self) -> str:
        """What it is, in a few characters: `float32[8, 16]`, `int`, `str`."""
        return "unreadable" if self.spec.is_unreadable else str(self.spec)

    def as_json(self) -> dict[str, Any]:
        """The entry as it stands in JSON."""
        slot, sharding = self.slot, self.sharding
        return {
            "path": self.path,
            "key": self.key,
            "kind": self.spec.kind,
            "dtype": self.spec.dtype,
            "shape": list(self.spec.shape),
            "nbytes": self.nbytes,
            "sharding": sharding
            and {
                "kind": sharding.kind,
                "mesh": dict(zip(sharding.axis_names, sharding.mesh_shape, strict=False)),
                "partitions": [list(axes) for axes in sharding.partitions],
                "devices": sharding.num_devices,
            },
            "shared": list(self.paths[1:]),
            "slot": slot
            and {"name": slot.name, "optimizer": slot.optimizer, "variable": slot.variable},
        }


@dataclass(frozen=True)
class Contents:
    """Values of a checkpoint.

    Attributes:
      path: of the checkpoint.
      format: the name of its format.
      entries: in the order of their paths; numbers in paths count as numbers.
      graph: the object graph; None if there is none.
      metadata: what the program said about the checkpoint.
    """

    path: str
    format: str
    entries: tuple[Entry, ...]
    graph: ObjectGraph | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of all values, each counted once."""
        return sum([entry.nbytes for entry in self.entries])

    @cached_property
    def by_path(self) -> dict[str, Entry]:
        """Each value by each of its paths, in order."""
        found = {path: entry for entry in self.entries for path in entry.paths}
        return {path: found[path] for path in sorted(found, key=in_order)}

    @cached_property
    def subtrees(self) -> dict[str, tuple[int, int]]:
        """(number of values, their size) of each subtree by its path. Shared values count once."""
        found: dict[str, dict[str, int]] = {}
        for path, entry in self.by_path.items():
            for above in parents(path):
                found.setdefault(above, {})[entry.key] = entry.nbytes
        return {path: (len(sizes), sum(sizes.values())) for path, sizes in found.items()}

    def selected(self, pattern: str | None) -> Contents:
        """The values that a pattern selects. A path selects also everything below it.

        Raises:
          KeyError: it selects nothing; the message names the nearest paths.
        """
        if pattern is None:
            return self
        chosen = selects([pattern, f"{pattern.rstrip('/')}/**"])
        entries = [
            replace(entry, paths=paths)
            for entry in self.entries
            if (paths := tuple([path for path in entry.paths if chosen(path)]))
            or (chosen(entry.key) and (paths := entry.paths))
        ]
        if not entries:
            near = nearest(pattern, [*self.by_path, *self.subtrees])
            raise KeyError(f"{self.path} holds nothing that {pattern!r} selects{near_miss(near)}")
        return replace(self, entries=_sorted(entries))


def contents_of(reader: CheckpointReader) -> Contents:
    """The contents of an open checkpoint.

    Raises:
      CorruptCheckpointError: its object graph is damaged.
    """
    graph = reader.object_graph if reader.has_graph else None
    paths: dict[str, list[str]] = {}
    shardings: dict[str, ShardingSpec | None] = {}
    slots: dict[str, SlotOf] = {}
    if graph is not None:
        for path, key in _paths(graph):
            paths.setdefault(key, []).append(path)
        for node, attribute in graph.attributes():
            paths.setdefault(attribute.key, [graph.value_path(node, attribute.name)])
            shardings[attribute.key] = attribute.sharding
            if node in graph.slot_of:
                optimizer, slot = graph.slot_of[node]
                slots[attribute.key] = SlotOf(
                    slot.name, graph.paths[optimizer], graph.paths[slot.variable]
                )
    specs = graph.by_key if graph is not None else {}
    entries = [
        Entry(
            tuple(dict.fromkeys(paths.get(key, [key]))),
            key,
            specs.get(key) or reader.stored_spec(key),
            reader.stored_nbytes(key),
            shardings.get(key),
            slots.get(key),
        )
        for key in reader.keys()  # noqa: SIM118
    ]
    name = format_name(reader.path)
    return Contents(reader.path, name, _sorted(entries), graph, reader.metadata)


def format_name(path: str) -> str:
    """The name of the format of a checkpoint that can be opened."""
    found = format_of(absolute(path))
    return OWN_FORMAT if found is None else found.name


def _paths(graph: ObjectGraph) -> Iterator[tuple[str, str]]:
    """(path, key) for each place of each value; the shortest paths come first."""
    tree = as_tree(slots_as_children(graph))
    for node, attribute in tree.attributes():
        yield tree.value_path(node, attribute.name), attribute.key


def _sorted(entries: list[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: in_order(entry.path)))


def in_order(path: str) -> list[list[tuple[bool, int, str]]]:
    """A key that sorts paths level by level, and numbers by their value.

    >>> sorted(["b/10", "b/9", "a-1/x", "a/y"], key=in_order)
    ['a/y', 'a-1/x', 'b/9', 'b/10']
    """
    return [
        [
            (part.isdecimal(), int(part) if part.isdecimal() and len(part) < 20 else 0, part)
            for part in _NUMBER.split(segment)
        ]
        for segment in path.split("/")
    ]


def parents(path: str) -> list[str]:
    """The paths of the subtrees in which a path lies, the largest first.

    >>> parents("a/b/c")
    ['a', 'a/b']
    """
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
