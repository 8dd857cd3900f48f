"""Adapting: an object says how to read checkpoints that an earlier version of its class wrote.

A class changes: a child gets another name, three arrays become one, a table is cut differently.
An object that knows how it used to be saved has a method `checkpoint_adapter(path)`. This returns
an adapter, which is asked for a `ReshardCallback` for each child that the checkpoint has. The
callback may give the child another name (`object_name`), read other values for it
(`update_restore_inputs`), and make its value of them (`reshard`).

`adapt` changes the saved graph accordingly before anything is planned. A renamed child becomes an
edge with another label; a resharded value gets the spec of its target. So match, plan, deferral,
report and status see an ordinary graph. When such a value is read, its callback is called
(`derived`).

A *slot variable*, which an optimizer keeps for a variable, has the callback of that variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from ckpt_jax.errors import RestoreMismatchError
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.dtypes import converted
from ckpt_jax.graph.global_names import own_values, with_labels_of
from ckpt_jax.graph.labels import Label, local_name, object_key_of, path_of
from ckpt_jax.graph.nodes import ObjectGraph, object_keys
from ckpt_jax.graph.plain_slots import as_live
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.match import Match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats.tensorflow.optimizers import as_optax
from ckpt_jax.restoring.ordered import named_by_order
from ckpt_jax.restoring.positions import slots_of_positions
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.values import host
from ckpt_jax.values.leaves import struct_of

Matcher = Callable[[ObjectGraph, ObjectGraph], Match]  # of a saved graph and a live one


class ReshardCallback:
    """Says how to read one child from a checkpoint that holds it in another form.

    Each method has a default that changes nothing. Override the ones that you need.

    Source: TensorFlow's `ReshardCallback`.

    Example: a kernel that used to be saved transposed, under the name "weight".
      >>> class Transposed(ReshardCallback):
      ...     def object_name(self): return "kernel"
      ...     def reshard(self, values, spec): return values[0].T
      >>> Transposed().reshard([np.zeros((2, 3))], jax.ShapeDtypeStruct((3, 2), float)).shape
      (3, 2)
    """

    def object_name(self) -> str | None:
        """The child's name in the program; None if it is the name in the checkpoint.

        A child takes its new name only if the program has no child of the old name, and the
        checkpoint has none of the new name.
        """
        return None

    def update_restore_inputs(
        self, key: str, spec: jax.ShapeDtypeStruct
    ) -> tuple[Sequence[str], Sequence[Box | None]]:
        """Says which values to read.

        Args:
          key: the checkpoint key of the value. If a slot variable of the child is restored, this
            is the key of the slot variable.
          spec: the shape, dtype and sharding that the program wants.

        Returns:
          Checkpoint keys, and for each the box to read of it (None for all of it). Values under
          other keys than `key` count as used.
        """
        return [key], [None]

    def reshard(self, values: Sequence[np.ndarray], spec: jax.ShapeDtypeStruct) -> Any:
        """Makes the array that the program wants of the values that `update_restore_inputs` chose.

        Args:
          values: as they are in the checkpoint.
          spec: the shape, dtype and sharding that the program wants. The callback need not place
            its result on the sharding.
        """
        if len(values) != 1:
            raise ValueError(
                f"{type(self).__qualname__} asks for {len(values)} values and does not override "
                "reshard to make one of them"
            )
        return values[0]


@runtime_checkable
class CheckpointAdapter(Protocol):
    """Says how the children of an object are read from an older checkpoint.

    The object's method `checkpoint_adapter(path)` returns it, or None if the checkpoint at `path`
    needs no adapter.

    Source: TensorFlow's `AbstractCheckpointAdapter`.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from ckpt_jax.api.tree import restore, save
      >>> from ckpt_jax.objects.trackable import AutoTrackable, Variable
      >>> class Moved(ReshardCallback):
      ...     def object_name(self): return "kernel"
      >>> class Layer(AutoTrackable):
      ...     def __init__(self): self.kernel = Variable(jnp.zeros(2))
      ...     def checkpoint_adapter(self, path): return self
      ...     def get_reshard_callback(self, name): return Moved() if name == "weight" else None
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", {"weight": jnp.ones(2)})
      ...     restore(path, Layer()).kernel.value
      Array([1., 1.], dtype=float32)
    """

    def get_reshard_callback(self, name: str) -> ReshardCallback | None:
        """Says how to read the child that the checkpoint calls `name`; None if as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Resharded:
    """A value that the callback of an adapter makes of the stored values that it chose.

    Attributes:
      callback: makes the value, all of it at once.
      keys, boxes: of the stored values that the callback chose.
      spec: of the value that the callback has to make.
    """

    callback: ReshardCallback
    keys: tuple[str, ...]
    boxes: tuple[Box | None, ...]
    spec: LeafSpec

    @property
    def stored(self) -> LeafSpec:
        """The report shows the wanted spec: the stored values may have any number and shape."""
        return self.spec

    @property
    def reshaped(self) -> bool:
        return False

    def __str__(self) -> str:
        return str(self.spec)

    def make(
        self, values: Sequence[Any], request: jax.ShapeDtypeStruct | None, *, cast: bool, path: str
    ) -> Any:
        """Makes the value and places it as requested.

        Args:
          values: the stored values, for `keys` and `boxes`.
          request: the shape, dtype and sharding that is wanted; None for a numpy array.
          cast: whether the dtype may change.
          path: of the checkpoint, for the report.

        Raises:
          RestoreMismatchError: the callback gave another shape or dtype.
        """
        struct = request or struct_of(self.spec)
        result = np.asarray(self.callback.reshard(values, struct))
        if cast:
            result = converted(result, np.dtype(struct.dtype))
        if (result.shape, result.dtype) != (struct.shape, struct.dtype):
            what = (
                f"expected {struct.dtype}{list(struct.shape)} from "
                f"{type(self.callback).__qualname__}.reshard, got "
                f"{result.dtype}{list(result.shape)}"
            )
            where = path_of(object_key_of(self.keys[0]))
            report = RestoreReport(path, mismatched=(ReportEntry(where, what=what),))
            raise RestoreMismatchError(f"{where}: {what}. Nothing was changed", report)
        return result if request is None else host.put([result], request.sharding)[0]


@dataclass(frozen=True, slots=True)
class Adapted:
    """A saved graph after adapters have changed it, and its match with the live objects.

    Attributes:
      saved: the graph, with adapted edges and specs. Node ids and keys are as they were. Its
        problems include wrong answers of callbacks.
      found: the match.
      callbacks: by saved node.
    """

    saved: Renamed
    found: Match
    callbacks: Mapping[int, ReshardCallback] = field(default_factory=dict)


def adapt(
    renamed: Renamed,
    live: LiveGraph,
    matcher: Matcher,
    reader: CheckpointReader,
    callbacks: Mapping[int, ReshardCallback] | None = None,
) -> Adapted:
    """Matches two graphs, and lets the live objects change how the saved graph is read.

    Args:
      renamed, live: the graphs.
      matcher: matches a version of the saved graph with the live one.
      reader: of the checkpoint; no value is read.
      callbacks: by saved node, from an earlier part of the same restore.
    """
    saved, known = renamed.graph, dict(callbacks or {})
    ambiguous: list[tuple[str, str]] = []
    if saved.ordered:
        saved, unlike = named_by_order(saved, live)
        ambiguous = [("", what) for what in unlike]
    elif saved.named:
        saved, ambiguous = with_labels_of(saved, live.graph)
    found = matcher(saved, live.graph)
    asked: set[int] = set()
    while True:
        edges: dict[int, tuple[tuple[Label, int], ...]] = {}
        for source, target in found.bound.items():
            if target >= 0 and source not in asked and saved.nodes[source].children:
                asked.add(source)
                adapter = _adapter_of(live.objects[target], reader.path)
                if adapter is not None:
                    here = {local_name(label) for label, _ in live.graph.nodes[target].children}
                    edges[source] = _adapted_edges(saved, source, here, adapter, known)
        if all(saved.nodes[source].children == changed for source, changed in edges.items()):
            break
        nodes = list(saved.nodes)
        for source, changed in edges.items():
            nodes[source] = replace(nodes[source], children=changed)
        saved = ObjectGraph(tuple(nodes), object_keys(nodes), saved.named)
        found = matcher(saved, live.graph)
    changed = as_live(saved, live.graph, found.bound, renamed.saved_paths)
    if changed is not saved:
        saved = changed
        found = matcher(saved, live.graph)
    if saved.named:
        saved, found, renamed = _as_objects(saved, found, renamed, live, matcher, reader)
    else:
        saved, found, renamed = _as_optax(saved, found, renamed, live, matcher, reader)
    paths = {**renamed.graph.other_paths(saved), **renamed.saved_paths}
    saved, resharded, problems = _with_resharded(saved, live, found, reader, known)
    as_wanted = replace(
        renamed,
        graph=saved,
        saved_paths=paths,
        problems=(
            *renamed.problems,
            *[ReportEntry(path, what=what) for path, what in ambiguous],
            *problems,
        ),
        derived={**renamed.derived, **resharded},
    )
    return Adapted(as_wanted, found, known)


def _as_objects(
    saved: ObjectGraph,
    found: Match,
    renamed: Renamed,
    live: LiveGraph,
    matcher: Matcher,
    reader: CheckpointReader,
) -> tuple[ObjectGraph, Match, Renamed]:
    """A graph of names in the form of the program's objects: values that objects own, and slots.

    Returns:
      The graph, its match, and `renamed` with the paths and derivations of new slots.
    """

    def owned() -> tuple[ObjectGraph, Match]:
        changed = own_values(saved, live.graph, found.bound)
        return (saved, found) if changed is saved else (changed, matcher(changed, live.graph))

    saved, found = owned()
    changed = slots_of_positions(
        replace(renamed, graph=saved), live, found.bound, reader.object_graph
    )
    if changed.graph is saved:
        return saved, found, renamed
    saved, found = changed.graph, matcher(changed.graph, live.graph)
    return (*owned(), replace(changed, graph=renamed.graph))


def _as_optax(
    saved: ObjectGraph,
    found: Match,
    renamed: Renamed,
    live: LiveGraph,
    matcher: Matcher,
    reader: CheckpointReader,
) -> tuple[ObjectGraph, Match, Renamed]:
    """A graph with optimizers of other libraries in the form of the program's optax states.

    Returns:
      The graph, its match, and `renamed` with the derivations of values that were converted.
    """

    def number(key: str) -> float:
        return float(reader.read({key: None})[key])

    changed = as_optax(replace(renamed, graph=saved), live.graph, found.bound, number)
    if changed.graph is not saved:
        saved, found = changed.graph, matcher(changed.graph, live.graph)
    return saved, found, replace(changed, graph=renamed.graph)


def _adapter_of(obj: Any, path: str) -> CheckpointAdapter | None:
    method = getattr(type(obj), "checkpoint_adapter", None)
    adapter = method(obj, path) if callable(method) else None
    return adapter if isinstance(adapter, CheckpointAdapter) else None


def _adapted_edges(
    saved: ObjectGraph,
    source: int,
    here: set[str],
    adapter: CheckpointAdapter,
    callbacks: dict[int, ReshardCallback],
) -> tuple[tuple[Label, int], ...]:
    """The edges of a saved node under the names of the program. Adds to the callbacks.

    Args:
      saved, source: the graph and the node.
      here: the names of the live object's children.
      adapter: of the live object.
      callbacks: by saved node. The callbacks of the children are added, and of their slots.
    """
    children = saved.nodes[source].children
    taken = {local_name(label) for label, _ in children}
    edges: list[tuple[Label, int]] = []
    for label, child in children:
        callback = adapter.get_reshard_callback(name := local_name(label))
        new = name if callback is None else callback.object_name() or name
        if callback is None or (new != name and (name in here or new in taken)):
            edges.append((label, child))
            continue
        taken.add(new)
        edges.append((label if new == name else new, child))
        slots = [slot.node for _, slot in saved.slots_of_variable.get(child, ())]
        callbacks.update(dict.fromkeys([child, *slots], callback))
    return tuple(edges)


def _with_resharded(
    saved: ObjectGraph,
    live: LiveGraph,
    found: Match,
    reader: CheckpointReader,
    callbacks: Mapping[int, ReshardCallback],
) -> tuple[ObjectGraph, dict[str, Resharded], tuple[ReportEntry, ...]]:
    """The graph with the specs of resharded values, without other values that callbacks use."""
    resharded: dict[str, Resharded] = {}
    problems: list[ReportEntry] = []
    if not callbacks:
        return saved, resharded, ()
    nodes = list(saved.nodes)
    for source, callback in callbacks.items():
        target = found.bound.get(source, -1)
        if target < 0 or not _reshards(callback):
            continue
        wanted = {
            attribute.name: attribute.spec for attribute in live.graph.nodes[target].attributes
        }
        for number, attribute in enumerate(nodes[source].attributes):
            spec = wanted.get(attribute.name)
            if spec is None or spec.is_bytes or attribute.spec.is_bytes:
                continue
            struct = struct_of(spec, host.placement(live.values[target][attribute.name]))
            keys, boxes = callback.update_restore_inputs(attribute.key, struct)
            if problem := _problem(keys, boxes, reader):
                path = live.graph.value_path(target, attribute.name)
                what = f"{type(callback).__qualname__}.update_restore_inputs {problem}"
                problems.append(ReportEntry(path, str(spec), str(attribute.spec), what))
            there = tuple([key for key in keys if reader.has_key(key)])
            resharded[attribute.key] = Resharded(callback, there, tuple(boxes), spec)
            attributes = list(nodes[source].attributes)
            attributes[number] = replace(attribute, spec=spec)
            nodes[source] = replace(nodes[source], attributes=tuple(attributes))
    used = {key for made in resharded.values() for key in made.keys} - resharded.keys()
    for node, entry in enumerate(nodes):
        if used and node not in found.bound:
            rest = [attribute for attribute in entry.attributes if attribute.key not in used]
            if len(rest) < len(entry.attributes):
                nodes[node] = replace(entry, attributes=tuple(rest))
    changed = replace(saved, nodes=tuple(nodes)) if resharded else saved
    return changed, resharded, tuple(problems)


def _reshards(callback: ReshardCallback) -> bool:
    """Whether a callback does more than rename."""
    kind, default = type(callback), ReshardCallback
    return (kind.reshard, kind.update_restore_inputs) != (
        default.reshard,
        default.update_restore_inputs,
    )


def _problem(
    keys: Sequence[str], boxes: Sequence[Box | None], reader: CheckpointReader
) -> str | None:
    if len(keys) != len(boxes):
        return f"gave {len(keys)} keys and {len(boxes)} boxes"
    unknown = [key for key in keys if not reader.has_key(key)]
    return f"asks for keys that the checkpoint lacks: {', '.join(unknown)}" if unknown else None
