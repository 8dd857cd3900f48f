"""Order: values without names, which belong to the leaves of the target in the same order.

Equinox's files hold one array after the other, in the order in which JAX flattens the tree. So the
first value is that of the first leaf. What Equinox does not save is no leaf here: functions, texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ckpt_jax.graph.labels import SAVE_COUNTER, Label, local_name
from ckpt_jax.graph.nodes import Node, ObjectGraph, object_keys
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.pytrees import is_registered, label_of

_SAVED = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, bool, int, float, complex)


def named_by_order(saved: ObjectGraph, live: LiveGraph) -> tuple[ObjectGraph, list[str]]:
    """The graph of an order of values, under the names of the program's leaves.

    Node ids do not change; new nodes come last.

    Args:
      saved: the graph; its root is a list of values, or a value.
      live: the program's objects: a tree, or a `Checkpoint` with one tree.

    Returns:
      The graph, and what keeps values and leaves from belonging to each other.
    """
    root = saved.nodes[0]
    values = [node for _, node in root.children]
    nodes = list(saved.nodes)
    if root.attributes:
        values = [len(nodes)]
        nodes.append(root)
    places = _leaves(live)
    if places is None:
        return saved, [
            "the file has values in an order and no names; restore it into the tree that was "
            "saved, or into a Checkpoint of that tree alone"
        ]
    problems = []
    if len(places) != len(values):
        problems.append(
            f"the file has {len(values)} values in an order and no names, the target has "
            f"{len(places)} leaves; pass a target with the same leaves in the same order"
        )
    edges: list[dict[Label, int]] = [{} for _ in nodes]
    rest = values[len(places) :]
    for place, value in zip(places, values, strict=False):
        if not place:
            return saved, problems  # one value, which is the root of both
        here = 0
        for label in place[:-1]:
            there = edges[here].setdefault(label, len(nodes))
            if there == len(nodes):
                nodes.append(Node("dict"))
                edges.append({})
            here = there
        edges[here][place[-1]] = value
    nodes[0] = Node("dict")
    edges[0].update({f"{number}": node for number, node in enumerate(rest, len(places))})
    nodes = [
        replace(node, children=tuple(children.items()))
        for node, children in zip(nodes, edges, strict=True)
    ]
    return ObjectGraph(tuple(nodes), object_keys(nodes), named=True), problems


def _leaves(live: LiveGraph) -> list[tuple[Label, ...]] | None:
    """The labels on the way to each leaf, in JAX's order; None if there is no one tree."""
    above: tuple[Label, ...] = ()
    tree: Any = live.objects[0]
    if not is_registered(tree) and live.graph.nodes[0].children:
        inner = [
            (label, node)
            for label, node in live.graph.nodes[0].children
            if local_name(label) != SAVE_COUNTER
        ]
        if len(inner) != 1:
            return None
        above, tree = (inner[0][0],), live.objects[inner[0][1]]
    found = [
        (*above, *[label_of(key) for key in keys])
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, _SAVED)
    ]
    return found if all([_is_there(live, place) for place in found]) else None


def _is_there(live: LiveGraph, place: Sequence[Label]) -> bool:
    node = 0
    for step in place:
        names = {local_name(label): child for label, child in live.graph.nodes[node].children}
        if local_name(step) not in names:
            return False
        node = names[local_name(step)]
    return True
