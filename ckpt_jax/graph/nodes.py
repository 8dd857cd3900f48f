"""The object graph as a value.

A graph is a tuple of nodes; a node's id is its position and node 0 is the root. A node has
labelled edges to its children and values of its own (*attributes*). An optimizer also has *slots*:
edges to the state that it keeps for a variable, labelled with (variable, slot name). The same type
describes the graph in a file and the graph of a program's objects. So restoring begins with the
match of two values of this type.

Nothing here holds arrays, devices or files; a `LeafSpec` and a `ShardingSpec` are plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ckpt_jax.graph.labels import (
    ONLY_VALUE,
    VARIABLE_VALUE,
    Label,
    escaped_names,
    local_name,
    path_of,
    slot_key,
)
from ckpt_jax.graph.specs import OPEN, LeafSpec, ShardingSpec

if TYPE_CHECKING:
    from google.protobuf.message import Message

FORMAT_VERSION = 2
MAX_PATH_NBYTES = 128 << 20  # of all paths of a graph: deep nesting costs the square of its depth


@dataclass(frozen=True, slots=True)
class Attribute:
    """One value of a node: its local name, its checkpoint key, and its spec."""

    name: str
    key: str
    spec: LeafSpec = OPEN
    sharding: ShardingSpec | None = None
    full_name: str = ""


@dataclass(frozen=True, slots=True)
class Slot:
    """An edge of an optimizer: (variable, slot name) -> slot variable, all node ids."""

    variable: int
    name: str
    node: int


@dataclass(frozen=True, slots=True)
class SaverRef:
    """The registered saver that holds a node's values, and the saver's name for the node."""

    name: str
    object_name: str


@dataclass(frozen=True, slots=True)
class Node:
    """One object.

    `container` is what a reader without the program makes of it: "" for an object, "leaf",
    "none", "dict", "list", "tuple", "namedtuple", "dataclass", ...; `type_name` is for people.
    `has_values` is TensorFlow's has_checkpoint_values: whether this node or a descendant
    carries values (None if the file does not say).
    """

    container: str = ""
    type_name: str = ""
    children: tuple[tuple[Label, int], ...] = ()
    attributes: tuple[Attribute, ...] = ()
    slots: tuple[Slot, ...] = ()
    saver: SaverRef | None = None
    has_values: bool | None = None

    def has_only(self, attribute: str) -> bool:
        """Whether the node has one value, and this is a name that objects give their only one."""
        return len(self.attributes) == 1 and attribute in ONLY_VALUE


@dataclass(frozen=True)
class ObjectGraph:
    """Nodes, and the escaped path of each along its first breadth-first discovery.

    `named` says that it was made of global names, for a file that has no object graph, and
    `ordered` that it was made of an order of values, for a file that does not even have names.
    `slot_aliases` has further (optimizer, variable, slot name) of slot variables, for variables
    that may as well be meant; see `matching.trace`.
    """

    nodes: tuple[Node, ...]
    object_keys: tuple[str, ...] = field(repr=False)
    named: bool = False
    ordered: bool = False
    slot_aliases: Mapping[tuple[int, int, str], int] = field(default_factory=dict, repr=False)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The readable path of each node: local names joined with "/"."""
        return tuple([path_of(key) for key in self.object_keys])

    @cached_property
    def by_key(self) -> dict[str, LeafSpec]:
        """The spec of the value under each checkpoint key."""
        return {attribute.key: attribute.spec for _, attribute in self.attributes()}

    @cached_property
    def slots_of_variable(self) -> dict[int, list[tuple[int, Slot]]]:
        """(optimizer, slot) pairs by variable."""
        found: dict[int, list[tuple[int, Slot]]] = {}
        for optimizer, slot in self.slots():
            found.setdefault(slot.variable, []).append((optimizer, slot))
        return found

    def slot(self, optimizer: int, variable: int, name: str) -> int | None:
        """The slot variable of an optimizer for a variable."""
        key = optimizer, variable, name
        return self._slot_nodes.get(key, self.slot_aliases.get(key))

    @cached_property
    def slot_of(self) -> dict[int, tuple[int, Slot]]:
        """(optimizer, slot) by slot variable."""
        return {slot.node: (optimizer, slot) for optimizer, slot in self.slots()}

    @cached_property
    def slot_nodes(self) -> frozenset[int]:
        """Ids of all slot variables."""
        return frozenset(self.slot_of)

    @cached_property
    def _slot_nodes(self) -> dict[tuple[int, int, str], int]:
        return {
            (optimizer, slot.variable, slot.name): slot.node for optimizer, slot in self.slots()
        }

    def carries_values(self, node: int) -> bool:
        """Whether a node or a descendant has values. If the file does not say, the answer is yes,
        unless the node has nothing at all."""
        entry = self.nodes[node]
        if entry.has_values is not None:
            return entry.has_values
        return bool(entry.children or entry.attributes or entry.slots or entry.saver)

    def attributes(self) -> Iterator[tuple[int, Attribute]]:
        for node_id, node in enumerate(self.nodes):
            for attribute in node.attributes:
                yield node_id, attribute

    def slots(self) -> Iterator[tuple[int, Slot]]:
        return slots_in(self.nodes)

    def to_proto(self) -> Message:
        """The graph as a `TrackableObjectGraph`: TensorFlow's message, with further fields."""
        # The codec makes graphs, so it cannot be imported above.
        from ckpt_jax.graph.codec import to_message

        return to_message(self)

    def value_path(self, node: int, attribute: str) -> str:
        """The path of a value: the path of its node if it is the node's only value."""
        path = self.paths[node]
        if self.nodes[node].has_only(attribute):
            return path
        return f"{path}/{attribute}" if path else attribute

    def other_paths(self, changed: ObjectGraph) -> dict[int, str]:
        """The old paths of nodes that have another path in `changed`, a version of this graph.

        A node with values is listed with the path of its one value.
        """
        if changed is self:
            return {}
        return {
            node: self.value_path(node, VARIABLE_VALUE) if entry.attributes else path
            for node, (entry, path) in enumerate(zip(self.nodes, self.paths, strict=True))
            if path != changed.paths[node]
        }


def slots_in(nodes: Sequence[Node]) -> Iterator[tuple[int, Slot]]:
    """(optimizer, slot) pairs."""
    for optimizer, node in enumerate(nodes):
        for slot in node.slots:
            yield optimizer, slot


def descendants(nodes: Sequence[Node], roots: Iterable[int] = (0,)) -> list[int]:
    """The roots and all nodes that child edges lead to from them, breadth first."""
    order = list(dict.fromkeys(roots))
    seen = set(order)
    for node in order:  # grows while it is walked
        for _, child in nodes[node].children:
            if child not in seen:
                seen.add(child)
                order.append(child)
    return order


class PathLengths:
    """The lengths of all paths of a graph that grows, which must not take too much memory.

    A file of a megabyte may hold objects whose paths have gigabytes: the path of each object begins
    with the path of its parent, and the path of each value with the path of its object.
    """

    def __init__(self) -> None:
        self.nbytes = 0

    def add(self, key: str, count: int) -> None:
        """Adds `count` paths that begin with the path of an object.

        Raises:
          ValueError: all paths together are too long.
        """
        self.nbytes += count * (len(key) if key.isascii() else 4 * len(key))
        if self.nbytes > MAX_PATH_NBYTES:
            raise ValueError(
                "objects are nested too deeply, or their names are too long: expected at most "
                f"{MAX_PATH_NBYTES >> 20} MiB for the paths of all of them, got more below "
                f"{path_of(key[:100])}..."
            )


def object_keys(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The escaped path of each node, along its first breadth-first discovery.

    A node that cannot be reached gets a path made of its id, which no escaped name equals.

    Raises:
      ValueError: the paths of all nodes together would take too much memory.
    """
    keys: dict[int, str] = {0: ""}
    lengths = PathLengths()

    def walk(queue: list[int]) -> None:
        for node in queue:  # grows while it is walked
            children = nodes[node].children
            lengths.add(keys[node], len(children) + len(nodes[node].attributes))
            prefix = f"{keys[node]}/" if keys[node] else ""
            names = escaped_names([label for label, _ in children])
            for name, (_, child) in zip(names, children, strict=True):
                if child not in keys:
                    keys[child] = prefix + name
                    queue.append(child)

    walk([0])
    slots: list[int] = []
    for optimizer, slot in slots_in(nodes):
        if slot.node not in keys and slot.variable in keys and optimizer in keys:
            keys[slot.node] = slot_key(keys[slot.variable], keys[optimizer], slot.name)
            lengths.add(keys[slot.node], 1)
            slots.append(slot.node)
    walk(slots)
    return tuple([keys.get(node, f".N{node}") for node in range(len(nodes))])


def local_names(nodes: Sequence[Node], separator: str) -> list[str]:
    """For each node of a tree, the local names on the way to it, joined with a separator. A node
    comes before its children.

    >>> local_names([Node(children=(("a", 1),)), Node(children=((0, 2),)), Node()], ".")
    ['', 'a', 'a.0']
    """
    names = [""] * len(nodes)
    for parent, node in enumerate(nodes):
        for label, child in node.children:
            names[child] = separator.join([*filter(None, [names[parent]]), local_name(label)])
    return names


def reachable(graph: ObjectGraph, roots: list[int]) -> set[int]:
    """Nodes that can be reached from `roots` along child edges and slots."""
    seen = set(roots)
    todo = list(roots)
    while todo:
        node = todo.pop()
        slots = [slot.node for _, slot in graph.slots_of_variable.get(node, ())]
        slots += [slot.node for slot in graph.nodes[node].slots]
        for child in [*(child for _, child in graph.nodes[node].children), *slots]:
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return seen


def pretty_name(graph: ObjectGraph, node: int) -> str:
    """A node's name as TensorFlow prints it: (root).a.b, or an optimizer's state."""
    if node in graph.slot_of:
        optimizer, slot = graph.slot_of[node]
        of, for_ = _dotted(graph, optimizer), _dotted(graph, slot.variable)
        return f"{of}'s state '{slot.name}' for {for_}"
    return _dotted(graph, node)


def _dotted(graph: ObjectGraph, node: int) -> str:
    path = graph.paths[node]
    return ".".join(["(root)", *path.split("/")]) if path else "(root)"


def has_values(
    own: Sequence[bool], children: Sequence[tuple[tuple[Label, int], ...]]
) -> list[bool]:
    """For each node, whether it or a descendant has values. The graph may have cycles.

    Args:
      own: for each node, whether it has values of its own.
      children: the edges of each node.
    """
    parents: dict[int, list[int]] = {}
    for node, edges in enumerate(children):
        for _, child in edges:
            parents.setdefault(child, []).append(node)
    has = list(own)
    todo = [node for node, marked in enumerate(has) if marked]
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if not has[parent]:
                has[parent] = True
                todo.append(parent)
    return has
