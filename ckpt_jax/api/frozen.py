"""FrozenSaver: saves and restores one fixed object graph, by key.

Each save traces: it walks all objects and names every value. If the objects of a program stay the
same for thousands of saves, it is enough to do this once. A frozen saver keeps the graph and the
keys, and only fetches the values each time. It also restores by the keys, without matching graphs.

*Fixed* means that every edge leads to the same mutable object, or to an immutable object of the
same type, and that the kind, dtype and shape of every value are as they were. Objects that are
attached to a mutable object later are not saved. Each save compares the edges and the values with
the frozen graph, so that it saves no stale value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import Node, ObjectGraph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import ParameterPath, SlotEntry, slots_of, view_of
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.restoring.run import opened, restore_pairs
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import refuse_async, save_once
from ckpt_jax.store.paths import as_path
from ckpt_jax.values.leaves import describe


class FrozenSaver:
    """Saves and restores the objects that a `Checkpoint` had when it was frozen.

    `Checkpoint.freeze` makes one. It writes ordinary checkpoints.

    Args:
      live: the graph, whose root is mutable.

    Raises:
      ValueError: the root is immutable, and cannot be restored in place.

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
        """Saves to exactly `path`, and replaces a checkpoint that is there. Advances no counter.

        Args:
          path: the directory to create.
          options: how. `enable_async` is refused: this verb saves in the foreground.

        Returns:
          The path.

        Raises:
          ValueError: an edge, or the kind, dtype or shape of a value, has changed since the freeze.
            All changes are named; nothing was written. Or `options` has `enable_async`.
        """
        options = given(options)
        refuse_async("FrozenSaver.save", options)
        request = SaveRequest(as_path(path), self._current, options, verb="FrozenSaver.save")
        return save_once(request, current_context())

    def restore(self, path: Path, options: CheckpointOptions | None = None) -> None:
        """Restores every value from its key. Other values of the checkpoint are ignored.

        Args:
          path: of a checkpoint that this saver wrote, or a saver of an identical graph.
          options: `cast`, `broadcast` and `max_inflight_bytes` apply.

        Raises:
          RestoreMismatchError: naming all keys that are not there, and all values of another
            kind, dtype or shape. Nothing was changed.
          ValueError: the objects have changed since the freeze.
          CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.
        """
        options = given(options)
        with opened(path, options, current_context()) as (reader, meeting):
            live = self._current()
            bound = _by_key(reader.object_graph, live.graph)
            restore_pairs(reader, live, bound, options, meeting)

    def _current(self) -> LiveGraph:
        """The frozen graph with the present objects and values."""
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
                slots = slots_of(views[node], objects[node])
                now |= {_slot_label(slot.name, slot.variable): slot.value for slot in slots}
                edges += [(_slot_label(s.name, variables[s.node]), s.node) for s in entry.slots]
            for label, child in edges:
                if label not in now:
                    why = _absence(label, slots_of(views[node], objects[node]))
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
            raise ValueError(
                f"the objects have changed since they were frozen:\n{lines}\nFreeze them again."
            )
        return LiveGraph(graph, tuple(objects), views, tuple(values), self._live.variables)


def _absence(label: Label, slots: Iterable[SlotEntry]) -> str:
    """Why an object has no child for a label of the frozen graph."""
    if any(slot.name == label for slot in slots):
        return "is for parameters that are not among the saved objects; add them to these"
    return "is gone"


def _slot_label(name: str, variable: Any) -> Any:
    return name, variable if isinstance(variable, ParameterPath) else id(variable)


def _changed(graph: ObjectGraph, values: list[Mapping[str, Any]]) -> list[str]:
    """How the values differ from the specs in `graph`."""
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
    """Saved node -> the live node whose values have the same keys."""
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
