"""FrozenSaver: saves and restores one fixed object graph, by key.

Tracing walks all objects and names every value. Where a program's objects stay the same for
thousands of saves, that can be done once: a frozen saver keeps the graph and the keys, and each
time only fetches the values. It restores by the keys, too, without matching graphs.

*Fixed* means that every edge leads to the same mutable object, or to an immutable one of the same
type, and that the kind, dtype and shape of every value are as they were; what is attached to a
mutable object later is left out. Each time the edges are compared with that, so that no stale
value is saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import Node, ObjectGraph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import Below, SlotEntry, view_of
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.restoring.execute import opened
from ckpt_jax.restoring.waiting import restore_pairs
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import refuse_async, save_once
from ckpt_jax.values.leaves import describe


class FrozenSaver:
    """Saves and restores the objects that a `Checkpoint` had when it was frozen.

    `Checkpoint.freeze` makes one. What it writes is an ordinary checkpoint.

    Args:
      live: the graph, whose root is mutable.

    Raises:
      ValueError: the root is immutable, so that it could not be restored in place.

    Source: TensorFlow's `TrackableSaver.freeze`.

    Example:
      >>> import ckpt_jax as ckpt, jax.numpy as jnp, tempfile
      >>> step = ckpt.Variable(jnp.zeros(()))
      >>> saver = ckpt.Checkpoint(step=step).freeze()
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = saver.save(f"{directory}/a")
      ...     _ = step.assign(jnp.ones(()))
      ...     saver.restore(path)
      ...     float(step.value)
      0.0
    """

    def __init__(self, live: LiveGraph):
        if not live.views[0].mutable:
            kind = type(live.objects[0]).__qualname__
            raise ValueError(f"a root of type {kind} is immutable; freeze an object that holds it")
        self._live = live

    def save(self, path: Path, options: CheckpointOptions | None = None) -> str:
        """Saves to exactly `path`, where it replaces a checkpoint; no counter is advanced.

        Args:
          path: the directory to create.
          options: how. `enable_async` is refused: this verb saves in the foreground.

        Returns:
          The path.

        Raises:
          ValueError: edges, or the kind, dtype or shape of a value, are not what was frozen.
            All of them are named; nothing was written. Or `options` has `enable_async`.
        """
        options = given(options)
        refuse_async("FrozenSaver.save", options)
        request = SaveRequest(os.fsdecode(path), self._current, options)
        return save_once(request, current_context())

    def restore(self, path: Path, options: CheckpointOptions | None = None) -> None:
        """Restores every value from the key it was saved under; what else is there is ignored.

        Args:
          path: of a checkpoint that this saver wrote, or one of an identical graph.
          options: `cast`, `broadcast` and `max_inflight_bytes` apply.

        Raises:
          RestoreMismatchError: naming all keys that are not there, and values of another kind,
            dtype or shape. Nothing was changed.
          ValueError: the objects are not what was frozen.
          CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.
        """
        options = given(options)
        with opened(path, options, current_context()) as (reader, meeting):
            live = self._current()
            bound = _by_key(reader.object_graph, live.graph)
            restore_pairs(reader, live, bound, options, meeting)

    def _current(self) -> LiveGraph:
        """The frozen graph with the objects and values of this moment."""
        graph, views = self._live.graph, self._live.views
        objects = list(self._live.objects)
        problems: list[str] = []
        seen: dict[int, Any] = {}
        for node, entry in enumerate(graph.nodes):  # parents come before immutable children
            now: dict[Any, Any] = dict(views[node].children(objects[node]))
            edges: list[tuple[Any, int]] = list(entry.children)
            if not views[node].mutable and len(now) > len(edges):
                problems.append(f"{graph.paths[node]}: has {len(now)} children, not {len(edges)}")
            if entry.slots:
                variables = self._live.variables
                slots = views[node].slots(objects[node])
                now |= {_slot_label(slot.name, slot.variable): slot.value for slot in slots}
                edges += [(_slot_label(s.name, variables[s.node]), s.node) for s in entry.slots]
            for label, child in edges:
                if label not in now:
                    why = _absence(label, views[node].slots(objects[node]))
                    problems.append(f"{graph.paths[child]}: {why}")
                elif views[child].mutable:
                    if now[label] is not objects[child]:
                        problems.append(f"{graph.paths[child]}: is another object")
                elif view_of(now[label]) is not views[child]:
                    kind = type(now[label]).__qualname__
                    problems.append(f"{graph.paths[child]}: is of another type now, {kind}")
                elif seen.setdefault(child, now[label]) is not now[label]:
                    problems.append(f"{graph.paths[child]}: is no longer shared with other places")
                else:
                    objects[child] = now[label]
        values: list[Mapping[str, Any]] = []
        for entry, view, obj in zip(graph.nodes, views, objects, strict=True):
            values.append(view.values(obj) if entry.saver is None and not problems else {})
        if not problems:
            problems = _changed(graph, values)
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ValueError(f"the objects are not what was frozen:\n{lines}\nFreeze them again.")
        return LiveGraph(graph, tuple(objects), views, tuple(values), self._live.variables)


def _absence(label: Label, slots: Iterable[SlotEntry]) -> str:
    """Why an object has no child of a label that the frozen graph has."""
    if any(slot.name == label for slot in slots):
        return "is for parameters outside of what is saved; put them into it"
    return "is gone"


def _slot_label(name: str, variable: Any) -> Any:
    return name, variable if isinstance(variable, Below) else id(variable)


def _changed(graph: ObjectGraph, values: list[Mapping[str, Any]]) -> list[str]:
    """What is wrong with values that should be of the specs in `graph`."""
    problems: list[str] = []
    for node, entry in enumerate(graph.nodes):
        if values[node].keys() != {attribute.name for attribute in entry.attributes}:
            problems.append(f"{graph.paths[node]}: has the values {list(values[node])}")
            continue
        for attribute in entry.attributes:
            spec = describe(values[node][attribute.name])[0]
            if replace(spec, weak_type=attribute.spec.weak_type) != attribute.spec:
                path = graph.value_path(node, attribute.name)
                problems.append(f"{path}: was {attribute.spec}, is {spec}")
    return problems


def _by_key(saved: ObjectGraph, live: ObjectGraph) -> dict[int, int]:
    """Saved nodes and live ones whose values have the same keys."""
    node_of = {key: node for node, entry in enumerate(live.nodes) for key in _keys(entry)}
    return {
        node: node_of[key]
        for node, entry in enumerate(saved.nodes)
        for key in _keys(entry)
        if key in node_of
    }


def _keys(node: Node) -> list[str]:
    keys = [attribute.key for attribute in node.attributes]
    return [*keys, node.saver.object_name] if node.saver else keys
