"""Positions: optimizer state that was saved as the tree that the program keeps.

This library shows an optax state by class and field: `mu` is a slot variable of each parameter,
whatever its place in a chain of transforms. Other libraries save the state as the tree that it is:
`opt_state/1/0/mu/layer/kernel`. The live state has such a tree as well, and its view knows where
each of its parts lies in it (`OptimizerView.positions`). So the saved tree gets the names that the
view gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_jax.graph.labels import Label, local_name
from ckpt_jax.graph.nodes import Node, ObjectGraph, Slot, descendants, object_keys
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import OptimizerView, StatePosition


def by_name(saved: ObjectGraph, live: LiveGraph, bound: Mapping[int, int]) -> ObjectGraph:
    """The saved graph, with the states of optimizers under the names that the program has.

    Node ids do not change; new nodes come last.

    Args:
      saved, live: the graphs.
      bound: saved node -> live node, as far as they match.
    """
    saved_of = {target: source for source, target in bound.items()}
    nodes = list(saved.nodes)
    for source, target in bound.items():
        view = live.views[target] if target >= 0 else None
        entry = saved.nodes[source]
        if not isinstance(view, OptimizerView) or entry.slots or not entry.children:
            continue
        found = {
            position: node
            for position in view.positions(live.objects[target])
            if (node := _at(saved, source, position.steps)) is not None
        }
        if found:
            _rename(nodes, saved, source, found, live, target, saved_of)
    if nodes == list(saved.nodes):
        return saved
    return ObjectGraph(tuple(nodes), object_keys(nodes), saved.named)


def _rename(
    nodes: list[Node],
    saved: ObjectGraph,
    source: int,
    found: Mapping[StatePosition, int],
    live: LiveGraph,
    target: int,
    saved_of: Mapping[int, int],
) -> None:
    """Gives the parts of a saved optimizer state the edges that the live one has."""
    ours = live.graph.nodes[target]
    variable_of = {(slot.name, live.variables[slot.node]): slot.variable for slot in ours.slots}
    slots: list[Slot] = []
    tree: dict[Label, Any] = {}
    taken: set[int] = set()
    for (_, name, parameter), node in found.items():
        variable = variable_of.get((name, parameter))
        if variable is not None and variable in saved_of:
            slots.append(Slot(saved_of[variable], name, node))
        elif variable is None:  # a child, or below one if the program shows no variable
            here, label = tree, name
            for step in parameter.steps if parameter else ():
                here, label = here.setdefault(label, {}), step
            here[label] = node
        else:
            continue
        taken.update(descendants(saved.nodes, [node]))
    rest = [edge for edge in nodes[source].children if not _is_taken(saved, edge[1], taken)]
    more = [(label, _node_of(nodes, part)) for label, part in tree.items()]
    nodes[source] = replace(nodes[source], children=(*rest, *more), slots=tuple(slots))


def _is_taken(saved: ObjectGraph, node: int, taken: set[int]) -> bool:
    """Whether the values below a node, which has some, all have other edges now."""
    valued = [n for n in descendants(saved.nodes, [node]) if saved.nodes[n].attributes]
    return taken.issuperset(valued)


def _node_of(nodes: list[Node], tree: Any) -> int:
    """The node of a tree of new nodes, whose leaves are nodes that are there."""
    if not isinstance(tree, dict):
        return tree
    children = tuple([(label, _node_of(nodes, part)) for label, part in tree.items()])
    nodes.append(Node("dict", children=children))
    return len(nodes) - 1


def _at(graph: ObjectGraph, node: int, steps: Sequence[Label]) -> int | None:
    """The node at a path below another one; None if there is none."""
    for step in steps:
        name = local_name(step)
        found = [child for label, child in graph.nodes[node].children if local_name(label) == name]
        if len(found) != 1:
            return None
        (node,) = found
    return node
