"""Assign: puts values into live objects. Mutable objects are changed, immutable ones rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckpt_jax.graph.labels import Label
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import OptimizerView


def assign(
    live: LiveGraph,
    values: Mapping[int, Mapping[str, Any]],
    replaced: Mapping[int, Any] = MappingProxyType({}),
) -> Any:
    """Puts values into the live objects. Returns the root, which may be a new object.

    Args:
      live: the graph to change. Mutable objects are changed in place. Immutable objects are
        rebuilt, and so are their parents, up to the nearest mutable object or the root.
      values: attribute values by node.
      replaced: by node, an object that replaces the whole object of the node.
    """
    new = {node: obj for node, obj in replaced.items() if obj is not live.objects[node]}
    for node, attributes in values.items():
        obj = live.objects[node]
        result = live.views[node].assign(obj, attributes)
        if result is not obj:
            new[node] = result
    # Immutable containers are trees, in which parents have smaller ids than their children;
    # optimizers have smaller ids than their slot variables. So one pass rebuilds them all.
    for node in range(len(live.objects) - 1, -1, -1):
        children = live.graph.nodes[node].children
        if not new or node in replaced or not (children or live.graph.nodes[node].slots):
            continue
        changed: dict[Label, Any] = {label: new[child] for label, child in children if child in new}
        result, view = live.objects[node], live.views[node]
        if changed:
            result = view.rebuild(result, changed)
        slots = {
            (slot.name, live.variables[slot.node]): new[slot.node]
            for slot in live.graph.nodes[node].slots
            if slot.node in new
        }
        if slots and isinstance(view, OptimizerView):
            result = view.with_slots(result, slots)
        if result is not live.objects[node]:
            new[node] = result
    return new.get(0, live.objects[0])
