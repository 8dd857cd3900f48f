"""Plain slots: optimizer state as a tree, as `ckpt.load` returns it.

A *slot variable* belongs to an optimizer and to a variable. In a tree of plain containers there are
no such edges. There it lies below its optimizer: under the name of the slot, then as its variable
lies below the root (`opt_state/mu/params/w`, which is the path of the slot, too).

So a tree that was loaded, edited and saved fits the program that it came from if what lies in these
places counts as slot variables (`as_live`), and a loaded tree fits the checkpoint that it came from
if slot variables count as what lies there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.labels import Label, escaped_names, path_of
from ckpt_jax.graph.nodes import Node, ObjectGraph, Slot, descendants, object_keys

_MAX_NODES = 1_000_000  # of a graph with slots as children, or
_MAX_GROWTH = 10  # times as many as before


def as_live(
    saved: ObjectGraph,
    live: ObjectGraph,
    bound: Mapping[int, int],
    saved_paths: Mapping[int, str] = MappingProxyType({}),
) -> ObjectGraph:
    """The saved graph, with the state of each optimizer in the form that the program has.

    Args:
      saved, live: the graphs.
      bound: saved node -> live node, as far as they match.
      saved_paths: the paths that nodes had before rules gave them others.
    """
    to_slots: dict[int, list[tuple[Label, int]]] = {}
    to_children: set[int] = set()
    for source, target in bound.items():
        entry = saved.nodes[source]
        if target < 0 or not (entry.children or entry.slots):
            continue
        ours = live.nodes[target]
        names = {slot.name for slot in ours.slots}
        if ours.slots and not entry.slots:
            trees = [edge for edge in entry.children if edge[0] in names]
            if trees:
                to_slots[source] = trees
        elif entry.slots and not ours.slots:
            labels = {label for label, _ in ours.children}
            if any(slot.name in labels for slot in entry.slots):
                to_children.add(source)
    if to_slots:
        saved = _children_as_slots(saved, to_slots, saved_paths)
    return slots_as_children(saved, to_children) if to_children else saved


def _children_as_slots(
    saved: ObjectGraph,
    trees: Mapping[int, Sequence[tuple[Label, int]]],
    saved_paths: Mapping[int, str],
) -> ObjectGraph:
    """The graph with some children of optimizers as slots; `trees` has them by optimizer."""
    variables = {path: node for node, path in saved_paths.items()}
    variables.update({path: node for node, path in enumerate(saved.paths)})
    nodes = list(saved.nodes)
    for optimizer, edges in trees.items():
        slots: list[Slot] = []
        taken: set[Label] = set()
        for name, tree in edges:
            leaves = _leaves(saved, tree)
            found = [
                Slot(variable, str(name), leaf)
                for place, leaf in leaves
                if (variable := variables.get(path_of(place))) is not None
                and saved.nodes[variable].attributes
            ]
            if found and len(found) == len(leaves):
                slots += found
                taken.add(name)
        children = tuple([edge for edge in nodes[optimizer].children if edge[0] not in taken])
        nodes[optimizer] = replace(nodes[optimizer], children=children, slots=tuple(slots))
    return ObjectGraph(tuple(nodes), object_keys(nodes), saved.named)


def _leaves(graph: ObjectGraph, root: int) -> list[tuple[str, int]]:
    """The nodes with values in a tree, by their escaped path from its root."""
    found: list[tuple[str, int]] = []
    seen: set[int] = set()
    todo = [("", root)]
    for place, node in todo:  # grows while it is walked
        if node in seen:
            continue
        seen.add(node)
        entry = graph.nodes[node]
        if entry.attributes or entry.saver:
            found.append((place, node))
        names = escaped_names([label for label, _ in entry.children])
        for name, (_, child) in zip(names, entry.children, strict=True):
            todo.append((f"{place}/{name}" if place else name, child))
    return found


def _steps_to(node: int, above: Mapping[int, tuple[int, Label]]) -> list[Label]:
    """The labels on the first path to a node."""
    steps: list[Label] = []
    while node in above:
        node, label = above[node]
        steps.append(label)
    return steps[::-1]


def slots_as_children(saved: ObjectGraph, optimizers: Set[int] | None = None) -> ObjectGraph:
    """The graph with optimizers' slots as children: by slot name, then as the variables lie.

    If an optimizer has a child of the name of a slot, its slots of that name lie below that child.

    Args:
      optimizers: the nodes to change; all by default.

    Raises:
      CorruptCheckpointError: the slots lie so deep that there would be far more nodes than now.
    """
    if not saved.slot_nodes:
        return saved
    above: dict[int, tuple[int, Label]] = {}  # the first edge to each node
    for parent in descendants(saved.nodes):
        for label, child in saved.nodes[parent].children:
            above.setdefault(child, (parent, label))
    above.pop(0, None)
    most = max(_MAX_NODES, _MAX_GROWTH * len(saved.nodes))
    nodes = list(saved.nodes)
    edges: dict[int, dict[Label, int]] = {}
    for optimizer, slot in saved.slots():
        if optimizers is not None and optimizer not in optimizers:
            continue
        here, label = optimizer, slot.name
        for step in _steps_to(slot.variable, above):
            if len(nodes) > most:
                raise CorruptCheckpointError(
                    f"the slots of {saved.paths[optimizer][:100]} lie too deep: expected at most "
                    f"{most} objects, got more"
                )
            edges.setdefault(here, {})
            if label not in edges[here]:
                known = dict(nodes[here].children).get(label)
                edges[here][label] = len(nodes) if known is None else known
                if known is None:
                    nodes.append(Node("dict"))
            here, label = edges[here][label], step
        edges.setdefault(here, {})[label] = slot.node
    for node, more in edges.items():
        children = {**dict(nodes[node].children), **more}
        nodes[node] = replace(nodes[node], children=tuple(children.items()))
    if optimizers is None:
        return ObjectGraph(tuple(nodes), saved.object_keys)
    for node in optimizers:
        nodes[node] = replace(nodes[node], slots=())
    return ObjectGraph(tuple(nodes), object_keys(nodes), saved.named)
