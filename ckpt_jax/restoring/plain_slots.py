"""Plain slots: optimizer state as a tree, as `ckpt.load` returns it.

A *slot variable* belongs to an optimizer and to a variable. In a tree of plain containers there are
no such edges. There it lies below its optimizer: under the name of the slot, then as its variable
lies below the root (`opt_state/mu/params/w`, which is the path of the slot, too).
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import Node, ObjectGraph


def slots_as_children(saved: ObjectGraph) -> ObjectGraph:
    """The graph with an optimizer's slots as children: by slot name, then as the variables lie."""
    if not saved.slot_nodes:
        return saved
    places: dict[int, tuple[Label, ...]] = {0: ()}
    todo = [0]
    for node in todo:  # grows while it is walked
        for label, child in saved.nodes[node].children:
            if child not in places:
                places[child] = (*places[node], label)
                todo.append(child)
    nodes = list(saved.nodes)
    edges: dict[int, dict[Label, int]] = {}
    for optimizer, slot in saved.slots():
        here, label = optimizer, slot.name
        for step in places.get(slot.variable, ()):
            edges.setdefault(here, {})
            if label not in edges[here]:
                edges[here][label] = len(nodes)
                nodes.append(Node("dict"))
            here, label = edges[here][label], step
        edges.setdefault(here, {})[label] = slot.node
    for node, more in edges.items():
        children = (*nodes[node].children, *more.items())
        nodes[node] = replace(nodes[node], children=children)
    return ObjectGraph(tuple(nodes), saved.object_keys)
