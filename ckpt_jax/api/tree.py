"""Save and restore in one call each, for pytrees and Flax objects."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, overload

import jax

from ckpt_jax.graph.as_tree import as_tree, is_tree
from ckpt_jax.graph.labels import SAVE_COUNTER, Label, plain_keys
from ckpt_jax.graph.nodes import Attribute, ObjectGraph, has_values
from ckpt_jax.graph.patterns import Selection, selects
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.matching.live import live_graph
from ckpt_jax.metrics import METER
from ckpt_jax.objects.delegate import delegate_of
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.report import ReportEntry, RestoreReport, near_miss, nearest
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import rename as renamed
from ckpt_jax.restoring.rules import Rule
from ckpt_jax.restoring.run import Demand, PlannedRestore, opened, plan_whole, require_fit
from ckpt_jax.restoring.shardings import Structs, ValueId, with_shardings
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import SaveRuns, Unrecorded
from ckpt_jax.store.paths import absolute, as_path
from ckpt_jax.values.host import without_gc
from ckpt_jax.values.leaves import struct_of

T = TypeVar("T")
Allowed = Selection | bool
_FITTING = Demand(
    "Nothing was read or changed. Pass a target that fits, rename=[(saved, target), ...] for "
    "values that moved, allow_missing= or allow_unexpected= (patterns, or True) for values that "
    "only one side has, or options=CheckpointOptions(cast=True) to convert dtypes."
)
_MATCHING = Demand(
    "Nothing in the checkpoint matches the target, so that nothing would be restored, whatever "
    "may be missing. Nothing was read or changed. Pass the checkpoint and the target that belong "
    "together, or rename=[(saved, target), ...] for values that moved; ckpt.plan_restore shows "
    "what rules do."
)


@overload
def save(path: Path, tree: Any, *, options: None = None, overwrite: bool = False) -> str: ...
@overload
def save(
    path: Path, tree: Any, *, options: CheckpointOptions | None, overwrite: bool = False
) -> str | None: ...
def save(
    path: Path, tree: Any, *, options: CheckpointOptions | None = None, overwrite: bool = False
) -> str | None:
    """Saves a pytree, an `nnx.Module` or any other object with a view.

    The saves of a program that this function makes come one after the other, whatever their paths.

    Args:
      path: the directory to create. An empty one is filled; it keeps its owner and its mode.
      tree: what to save.
      options: how; `enable_async=True` returns as soon as the values are safe from changes. Then
        `ckpt.sync` waits, and `ckpt.restore` and `ckpt.load` of the same path wait, too.
      overwrite: whether a checkpoint at `path` may be replaced (atomically).

    Returns:
      `path`. None if another save was in flight and `when_busy="skip"` says not to wait for it.

    Raises:
      FileExistsError: `path` exists.
      UnsaveableError: naming every leaf that cannot be saved; nothing was written.
      AsyncSaveError: an earlier save failed in the background. With one process this one has
        not begun; with several it has, because those that know of no error take part.

    Example:
      >>> import numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", {"w": np.arange(3), "step": 7})
      ...     load(path)
      {'w': array([0, 1, 2]), 'step': 7}
    """
    options, path, context = given(options), as_path(path), current_context()
    request = SaveRequest(
        path,
        lambda: live_graph(tree, for_restore=False),
        options,
        overwrite=overwrite,
        verb="ckpt.save",
    )
    saves = _saves_of(context.processes)
    patience = context.processes.patience(options.timeout_seconds)
    saved = saves.runs.save(
        path, options, patience, context, lambda: None, lambda meeting: Unrecorded(request)
    )
    if saved is not None and options.enable_async:
        saves.left_to_background = absolute(path)
    return saved


def sync() -> None:
    """Waits for a save of `ckpt.save` in the background. A `Checkpoint` has its own `sync`.

    Raises:
      AsyncSaveError: it failed; the cause is chained. An error is raised once: by this function,
        by the next `ckpt.save`, or when its path is read.

    Example:
      >>> import tempfile
      >>> options = CheckpointOptions(enable_async=True)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", {"step": 7}, options=options)
      ...     sync()
      ...     load(path)
      {'step': 7}
    """
    _saves_of(current()).runs.background.wait()


class _Saves:
    """The saves of `save` that this process has made."""

    def __init__(self) -> None:
        self.runs = SaveRuns()
        self.left_to_background = ""  # the absolute path of the last one that was


_saves: weakref.WeakKeyDictionary[Processes, _Saves] = weakref.WeakKeyDictionary()
_saves_lock = threading.Lock()


def _saves_of(processes: Processes) -> _Saves:
    with _saves_lock:
        return _saves.setdefault(processes, _Saves())


def _await_save_to(path: Path) -> None:
    """Waits for a save in the background if it is to a path that is to be read."""
    if not _saves:  # asking for the processes would start the devices
        return
    saves = _saves_of(current())
    if saves.left_to_background and absolute(as_path(path)) == saves.left_to_background:
        saves.runs.background.wait_unless_inside()


@without_gc()
def restore(
    path: Path,
    target: T,
    *,
    strict: bool = True,
    allow_missing: Allowed = (),
    allow_unexpected: Allowed = (),
    rename: Iterable[Rule] = (),
    options: CheckpointOptions | None = None,
) -> T:
    """Restores what `save` saved, into the structure, dtypes, shapes and shardings of a target.

    Args:
      path: of a checkpoint, also of another library; docs/migrating.md lists the formats.
      target: arrays, `jax.ShapeDtypeStruct`s (with shardings), Python values, or an
        `nnx.Module`, which is restored in place.
      strict: False allows everything to be missing and to be unexpected.
      allow_missing: what the checkpoint may lack, so that the target keeps its own value: a
        pattern, a list of patterns or a function of paths, or True for everything. A value that
        the target holds only abstractly must not be missing.
      allow_unexpected: what the target may lack, so that it is not read; the same kinds.
      rename: ordered rules (saved pattern, target pattern, *transforms) for values that moved;
        for each value the first rule that matches counts. In a pattern "*" stands for any text
        without "/", "**" for any text, "?" for one character, and in the target pattern for what
        those of the saved pattern matched, in order; a compiled regular expression works as
        well. Either may be a tuple of patterns, if a transform takes or gives several values.
        Transforms are `Transpose`, `Reshape`, `Pad`, `Slice`, `Cast`, `Map`, `Dequantize`, `Stack`,
        `Concat`, `Unstack` and `Split`:

            rename=[
                ("encoder/**", "backbone/**"),
                ("head/weight", "head/kernel", ckpt.Transpose()),
                ("layers_*/kernel", "layers/kernel", ckpt.Stack(axis=0)),
            ]
      options: how.

    Returns:
      The target with the saved values: the same object where it is mutable.

    Raises:
      RestoreMismatchError: with every missing, unexpected and mismatched value in its
        `.report`, except for those that are allowed. Nothing was read or changed. A restore in
        which nothing matches is always an error.
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.

    Example:
      >>> import jax, tempfile
      >>> state = {"w": jax.numpy.arange(3.0), "step": 7}
      >>> abstract = {"w": jax.ShapeDtypeStruct((3,), "float32"), "step": 0}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     restore(save(f"{directory}/a", state), abstract)
      {'w': Array([0., 1., 2.], dtype=float32), 'step': 7}
    """
    options = given(options)
    may_miss = _is_allowed("allow_missing", allow_missing if strict else True)
    may_exceed = _is_allowed("allow_unexpected", allow_unexpected if strict else True)
    _await_save_to(path)
    with opened(path, options, current_context()) as (reader, meeting):
        planned = _plan(reader, target, rename, options)
        if not (planned.report.restored or planned.report.mismatched):
            planned.require(_MATCHING)
        planned.allowing(may_miss, may_exceed).require(_FITTING)
        root, _ = planned.execute(options, meeting)
    return target if root is delegate_of(target) else root


def _is_allowed(name: str, allowed: Allowed) -> Callable[[ReportEntry], bool]:
    """The test whether a value may be on one side only; its paths on both sides count."""
    if isinstance(allowed, bool):
        return lambda entry: allowed
    try:
        chosen = selects(() if allowed is None else allowed)
    except TypeError:
        raise TypeError(
            f"{name} is True, a pattern, a list of patterns or a function of paths, got {allowed!r}"
        ) from None
    return lambda entry: (
        chosen(entry.path)
        or (entry.saved_path not in ("", entry.path) and chosen(entry.saved_path))
    )


@without_gc()
def plan_restore(
    path: Path,
    target: Any,
    *,
    rename: Iterable[Rule] = (),
    options: CheckpointOptions | None = None,
) -> RestoreReport:
    """A report of what `restore` would do, without reading array bytes.

    Args:
      path, target, rename, options: as for `restore`.

    Returns:
      The report; `print` shows it as a table.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", {"step": 7, "loss": 0.5})
      ...     report = plan_restore(path, {"step": 0})
      >>> [entry.path for entry in report.restored], [entry.path for entry in report.unexpected]
      (['step'], ['loss'])
    """
    _await_save_to(path)
    with CheckpointReader(path) as reader:
        planned = _plan(reader, target, rename, given(options))
        return replace(planned.report, nbytes=planned.nbytes)


def _plan(
    reader: CheckpointReader, target: Any, rules: Iterable[Rule], options: CheckpointOptions
) -> PlannedRestore:
    graph = reader.graph_to_restore
    planned = plan_whole(reader, renamed(graph, rules), live_graph(target), options)
    return planned.without_deferral(lambda entry: _is_bookkeeping(graph, entry))


def _is_bookkeeping(saved: ObjectGraph, entry: ReportEntry) -> bool:
    """Whether an entry is the save counter that a Checkpoint adds to what it was given."""
    path = entry.saved_path or entry.path
    return path == SAVE_COUNTER and saved.nodes[0].container in ("", "list", "dict")


def load(
    path: Path,
    *,
    only: Selection | None = None,
    sharding: Any = None,
) -> Any:
    """Reads a checkpoint without a target.

    Args:
      path: of a checkpoint, also of another library.
      only: a pattern, a list of patterns, or a predicate on paths: what to read. The result
        then holds nothing else; a list with gaps becomes a dict by position.
      sharding: to place arrays on devices: a `jax.sharding.Sharding`, a function
        `(path, jax.ShapeDtypeStruct)` that gives one or None, or a tree of shardings, in which
        one stands for everything below its place. What gets none becomes a numpy array.

    Returns:
      Dicts, lists, tuples and scalars as they were saved; objects of other kinds as dicts. The
      members of enums are members again if the program has imported their class, and otherwise
      their names (dict keys that are numbers or strings as well: those). What a
      registered saver wrote only that saver can read: its object is an empty dict here, and
      `load_checkpoint` has the values by key.

    Raises:
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.
      KeyError: `only` selects nothing.
      RestoreMismatchError: values cannot be placed as `sharding` says; it names all of them.

    Example:
      >>> import numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", {"params": {"w": np.arange(3)}, "step": 7})
      ...     load(path, only="params/**")
      {'params': {'w': array([0, 1, 2])}}
    """
    _await_save_to(path)
    with METER.restoring(lambda: CheckpointReader(path)) as reader:
        saved = reader.object_graph
        if only is not None and not is_tree(saved):
            saved = as_tree(slots_as_children(saved))
        chosen = selects(only)
        wanted = {
            (node, attribute.name): attribute
            for node, attribute in saved.attributes()
            if chosen(saved.value_path(node, attribute.name))
        }
        if only is not None and not wanted:
            paths = [
                saved.value_path(node, attribute.name) for node, attribute in saved.attributes()
            ]
            raise KeyError(f"{reader.path} holds nothing that {only!r} selects{_hint(only, paths)}")
        placements = {} if sharding is None else _placements(saved, wanted, sharding, reader.path)
        requests: dict[str, jax.ShapeDtypeStruct | None] = {}
        for at, attribute in wanted.items():  # at several places, where it is shared
            requests[attribute.key] = requests.get(attribute.key) or placements.get(at)
        data = reader.read(requests)
        return built_from(reader, saved, wanted, data, everything=only is None)


def _hint(only: Selection, paths: list[str]) -> str:
    """Proposes patterns in place of those that select nothing."""
    patterns = [only] if isinstance(only, str) else only if isinstance(only, list | tuple) else []
    subtrees = [
        f"{pattern.rstrip('/')}/**"
        for pattern in patterns
        if isinstance(pattern, str)
        and any([path.startswith(f"{pattern.rstrip('/')}/") for path in paths])
    ]
    if subtrees:
        return f"; for all below it say {', '.join(map(repr, subtrees))}"
    if near := [found for pattern in patterns for found in nearest(str(pattern), paths)]:
        return near_miss(near)
    tops = sorted({path.partition("/")[0] for path in paths})
    listed = tops if len(tops) <= 10 else [*tops[:10], f"{len(tops) - 10} more"]
    return f". It has {', '.join(listed)}; patterns are of whole paths, as params/**"


def _placements(
    saved: ObjectGraph, wanted: Mapping[ValueId, Attribute], sharding: Any, path: str
) -> Structs:
    """The values that `load` places on devices, with shardings; raises naming all that cannot lie
    there."""
    structs = {
        place: struct_of(attribute.spec)
        for place, attribute in wanted.items()
        if attribute.spec.is_placed or attribute.spec.is_numpy_array
    }
    placements, problems = with_shardings(saved, structs, sharding)
    entries = tuple([ReportEntry(where, what=what) for where, what in problems])
    report = RestoreReport(path, mismatched=entries)
    require_fit(report, "Nothing was read. Pass a sharding= that fits.")
    return placements


def built_from(
    reader: CheckpointReader,
    saved: ObjectGraph,
    wanted: Mapping[ValueId, Attribute],
    data: Mapping[str, Any],
    *,
    everything: bool,
) -> Any:
    """Plain containers from a graph, and from what was read of its values, by key. Keys that were
    read as keys of JAX stay that."""
    values: dict[int, dict[str, Any]] = {}
    for (node, name), attribute in wanted.items():
        value = data[attribute.key]
        if not (isinstance(value, jax.Array) and attribute.spec.is_key):
            value = reader.as_saved(attribute.key, value, attribute.spec)
        values.setdefault(node, {})[name] = value
    return _build(saved, values, everything=everything)


def _build(saved: ObjectGraph, values: dict[int, dict[str, Any]], *, everything: bool) -> Any:
    """Plain containers from a graph, leaves first."""
    saved = slots_as_children(saved)
    has_own = [node in values for node in range(len(saved.nodes))]
    keep = has_values(has_own, [entry.children for entry in saved.nodes])
    built: dict[int, Any] = {}
    open_nodes: set[int] = set()
    stack = [0]
    while stack:
        node = stack[-1]
        if node in built:
            stack.pop()
            continue
        children = [
            (label, child)
            for label, child in saved.nodes[node].children
            if everything or keep[child]
        ]
        # An edge back to an object that is being built has no plain form, and is left out.
        waiting = [child for _, child in children if child not in built and child not in open_nodes]
        if waiting:
            open_nodes.add(node)
            stack += waiting
            continue
        here = [(label, child) for label, child in children if child in built]
        keys = plain_keys([label for label, _ in here])
        parts = {key: built[child] for key, (_, child) in zip(keys, here, strict=True)}
        built[node] = _container(saved, node, parts, values.get(node, {}))
        open_nodes.discard(node)
        stack.pop()
    return built[0]


def _container(
    saved: ObjectGraph, node: int, parts: dict[Label, Any], values: dict[str, Any]
) -> Any:
    entry = saved.nodes[node]
    if not parts and len(values) == 1 and len(entry.attributes) == 1:
        (value,) = values.values()
        return value
    if entry.container == "none":
        return None
    if entry.container in ("list", "tuple") and list(parts) == list(range(len(entry.children))):
        return list(parts.values()) if entry.container == "list" else tuple(parts.values())
    return {**parts, **values}
