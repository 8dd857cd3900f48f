"""Assign: puts values into live objects. Mutable objects are changed, immutable ones rebuilt.

Objects with code of their own (a `Trackable` that saves values, a `PythonState`) come first,
because their code may raise. Then the boxes get their values, and then the parents of replaced
objects are changed or rebuilt. If anything raises, what was changed is put back, latest first. The
error names the objects for which that is not possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ckpt_jax.graph.labels import Label
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.python_state import PythonState
from ckpt_jax.objects.trackable import Trackable
from ckpt_jax.objects.views import OptimizerView
from ckpt_jax.values.leaves import kept


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

    Raises:
      Exception: whatever code of the objects raises. All objects are as they were, except for those
        that the notes of the error name.
    """
    assignment = _Assignment(live)
    try:
        return assignment.run(values, replaced)
    except BaseException as error:
        note_changed(error, assignment.put_back())
        raise


def note_changed(error: BaseException, paths: Iterable[str], how: str = "Changed") -> None:
    """Notes in an error which objects a restore has changed although it failed."""
    names = [path or "(root)" for path in dict.fromkeys(paths)]
    if names:
        error.add_note(f"{how} by this restore, and not put back: {', '.join(names)}")


class _Assignment:
    """An assignment under way, which can be taken back."""

    def __init__(self, live: LiveGraph):
        self.live = live
        self.before: dict[int, Mapping[str, Any] | None] = {}  # old values by node; None: unknown
        self.changed: list[int] = []  # nodes in whose objects children were replaced

    def run(self, values: Mapping[int, Mapping[str, Any]], replaced: Mapping[int, Any]) -> Any:
        live = self.live
        new = {node: obj for node, obj in replaced.items() if obj is not live.objects[node]}
        for node in sorted(values, key=lambda node: not self.has_own_code(node)):
            obj = live.objects[node]
            self.before[node] = self.present(node, values[node])
            result = live.views[node].assign(obj, values[node])
            if result is not obj:
                new[node] = result
        # Immutable containers are trees, in which parents have smaller ids than their children;
        # optimizers have smaller ids than their slot variables. So one pass rebuilds them all.
        for node in range(len(live.objects) - 1, -1, -1):
            entry = live.graph.nodes[node]
            if new and node not in replaced and (entry.children or entry.slots):
                result = self.rebuilt(node, new)
                if result is not live.objects[node]:
                    new[node] = result
        return new.get(0, live.objects[0])

    def rebuilt(self, node: int, new: Mapping[int, Any]) -> Any:
        """The object of a node with new children and slot variables."""
        live = self.live
        entry, view, result = live.graph.nodes[node], live.views[node], live.objects[node]
        changed: dict[Label, Any] = {
            label: new[child] for label, child in entry.children if child in new
        }
        slots = {
            (slot.name, live.variables[slot.node]): new[slot.node]
            for slot in entry.slots
            if slot.node in new
        }
        if view.mutable and (changed or slots):
            self.changed.append(node)
        if changed:
            result = view.rebuild(result, changed)
        if slots and isinstance(view, OptimizerView):
            result = view.with_slots(result, slots)
        return result

    def has_own_code(self, node: int) -> bool:
        return isinstance(self.live.objects[node], Trackable | PythonState)

    def present(self, node: int, names: Iterable[str]) -> Mapping[str, Any] | None:
        """The values that an object has now; None if they cannot be known."""
        values = self.live.values[node]
        if not self.has_own_code(node):
            return {name: values[name] for name in names}
        try:
            return {name: kept(values[name]) for name in names}
        except Exception:  # code of the program, which need not work before a restore
            return None

    def put_back(self) -> list[str]:
        """Undoes all changes. Returns the paths of the objects for which that did not work."""
        failed: list[int] = []
        for node in reversed(self.changed):
            try:
                self.rebuilt(node, self.live_children(node))
            except Exception:
                failed.append(node)
        for node, values in reversed(self.before.items()):
            view, obj = self.live.views[node], self.live.objects[node]
            if not view.mutable:
                continue
            try:
                if values is None:
                    raise ValueError("the old values are unknown")
                view.assign(obj, values)
            except Exception:
                failed.append(node)
        return [self.live.graph.paths[node] for node in sorted(failed)]

    def live_children(self, node: int) -> Mapping[int, Any]:
        entry = self.live.graph.nodes[node]
        nodes = [child for _, child in entry.children] + [slot.node for slot in entry.slots]
        return {child: self.live.objects[child] for child in nodes}
