"""PerProcess: state that each process has for itself, such as the position of its data iterator.

The object graph is the same on all processes, so that state that differs between them cannot be in
it. A `PerProcess` is one node of the graph with a saver of its own. Each process writes the value
that it holds as a small object graph with its arrays, under keys that name the process:

    iterator/process-0/.GRAPH
    iterator/process-0/position/.ATTRIBUTES/VARIABLE_VALUE
    iterator/process-1/.GRAPH
    ...

A restore reads the value of the same process. If the number of processes is not the same as in
the save, a merge function has to say which value each process gets.

Objects that give their state themselves, such as data iterators (see `objects.stateful`), are
written by the same saver, in a `PerProcess` or without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ckpt_jax import io
from ckpt_jax.api.tree import built_from
from ckpt_jax.errors import ProcessError, UnsaveableError
from ckpt_jax.graph import codec
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import match
from ckpt_jax.objects.registry import ByType, register_checkpoint_saver
from ckpt_jax.objects.stateful import STATEFUL, give_state, state_of
from ckpt_jax.objects.views import View, add_view, view_of
from ckpt_jax.options import DEFAULT
from ckpt_jax.processes.current import current
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.run import EVERYTHING, plan_matched, require_fit
from ckpt_jax.saving.pipeline import encoded_values
from ckpt_jax.saving.unsaveable import Unsaveable
from ckpt_jax.store.seal import seal, unseal
from ckpt_jax.values.leaves import decode

_NO_STATE = "expected the state that each process gives, but the save has found another value here"

Merge = Callable[[list[Any], int, int], Any]


class PerProcess:
    """A mutable box for state that each process has for itself.

    Args:
      value: Python values, numpy arrays, pytrees, trackables, without arrays that lie on devices
        of several processes. It may differ between processes. Or one object with `get_state` and
        `set_state`, or `state_dict` and `load_state_dict`, such as a data iterator.
      merge: `(values, index, count) -> value`, called if another number of processes wrote the
        checkpoint. It gets the values of all these processes, in their order, as `ckpt.load` gives
        them, and returns the value for process `index` of `count`. For an object that gives its
        state, these are its states.

    If another number of processes wrote the checkpoint and there is no `merge`, the restore fails
    with `ProcessError`.

    Example:
      >>> import tempfile
      >>> from ckpt_jax.api.checkpoint import Checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Checkpoint(data=PerProcess({"position": 7})).save(f"{directory}/ckpt")
      ...     data = PerProcess({"position": 0})
      ...     status = Checkpoint(data=data).restore(path).assert_consumed()
      ...     data.value
      {'position': 7}
    """

    def __init__(self, value: Any, merge: Merge | None = None):
        self.value = value
        self.merge = merge

    def __repr__(self) -> str:
        return f"PerProcess({self.value!r})"


class _PerProcessView(View):
    """A node without children. A registered saver writes and reads its value."""

    identity = True
    mutable = True


def _key(name: str, process: int) -> str:
    return f"{name}/process-{process}" if name else f"process-{process}"


def _save(objects: dict[str, Any], prefix: str) -> str:
    process = current().index
    values: dict[str, Any] = {}
    for name, value in _states(objects).items():
        root = _key(name, process)
        live = live_graph(value, root, for_restore=False)
        refused = [
            (path, f"is taken by the checkpoint saver {node.saver.name}")
            for path, node in zip(live.graph.paths, live.graph.nodes, strict=True)
            if node.saver is not None
        ]
        encoded = encoded_values(live)
        refused += [
            (key, "lies on devices of several processes")
            for key, value in encoded.items()
            if isinstance(value, jax.Array) and not value.is_fully_addressable
        ]
        if refused:
            lines = "\n".join(f"  {path}: {what}" for path, what in refused)
            raise UnsaveableError(
                f"state of one process cannot hold these values:\n{lines}", tuple(refused)
            )
        values |= encoded
        values[f"{root}/.GRAPH"] = seal(codec.encode(live.graph))
    return io.write_shard(prefix, values)


def _states(objects: dict[str, Any]) -> dict[str, Any]:
    """The value that is saved for each object: its own, or the state that it gives.

    Raises:
      UnsaveableError: naming all objects that do not give their state.
    """
    found: dict[str, Any] = {}
    unsaveable = Unsaveable()
    for name, each in objects.items():
        inner = _value_of(each)
        with unsaveable.at(path_of(name) or "(root)"):
            found[name] = state_of(inner) if _gives_state(inner) else inner
    unsaveable.require_none("objects did not give their state")
    return found


def _restore(objects: dict[str, Any], path: str) -> None:
    processes = current()
    with CheckpointReader(path) as reader:
        graphs = {name: _graphs(reader, name) for name in objects}
        _require_states(graphs, path)
        unmerged = [
            f"{path_of(name) or '(root)'}: saved by {len(graphs[name])} processes"
            for name, each in objects.items()
            if len(graphs[name]) != processes.count and getattr(each, "merge", None) is None
        ]
        if unmerged:
            lines = "\n".join(f"  {problem}" for problem in unmerged)
            raise ProcessError(
                f"{path} has state that each process saved for itself, but now there are "
                f"{processes.count} processes:\n{lines}\n"
                "Restore with as many processes as in the save, or pass "
                "ckpt.PerProcess(value, merge=...), which makes the state of each process. The "
                "value may be an iterator itself."
            )
        restored = {}
        for name, each in objects.items():
            if len(graphs[name]) == processes.count:
                saved = graphs[name][processes.index]
                root = _key(name, processes.index)
                inner = _value_of(each)
                restored[name] = (
                    _loaded(reader, saved, on_device=True)
                    if _gives_state(inner)
                    else _own_value(reader, saved, inner, root)
                )
            else:
                values = [_loaded(reader, saved) for saved in graphs[name]]
                restored[name] = each.merge(values, processes.index, processes.count)
    for name, value in restored.items():
        inner = _value_of(objects[name])
        if _gives_state(inner):
            try:
                give_state(inner, value)
            except Exception as error:
                error.add_note(f"{path_of(name) or '(root)'} refused the state from {path}")
                raise
        else:
            objects[name].value = value


def _require_states(graphs: Mapping[str, Sequence[ObjectGraph]], path: str) -> None:
    """Raises RestoreMismatchError for values that were saved in another way."""
    report = RestoreReport(
        path,
        mismatched=tuple(
            [
                ReportEntry(path_of(object_key_of(name)), what=_NO_STATE)
                for name, found in graphs.items()
                if not found
            ]
        ),
    )
    require_fit(report, "Nothing was changed. Pass an object of the kind that was saved.")


def _value_of(each: Any) -> Any:
    return each.value if isinstance(each, PerProcess) else each


def _gives_state(obj: Any) -> bool:
    return view_of(obj) is STATEFUL


def _is_taken(obj: Any) -> bool:
    return type(obj) is PerProcess or _gives_state(obj)


def _graphs(reader: CheckpointReader, name: str) -> list[ObjectGraph]:
    found: list[ObjectGraph] = []
    while reader.has_key(key := f"{_key(name, len(found))}/.GRAPH"):
        found.append(codec.decode(unseal(reader.read({key: None})[key])))
    return found


def _own_value(reader: CheckpointReader, saved: ObjectGraph, target: Any, root: str) -> Any:
    live = live_graph(target, root)
    found = match(saved, live.graph)
    planned = plan_matched(reader, Renamed(saved), found, live, DEFAULT)
    planned.without_deferral(lambda entry: False).require(EVERYTHING)
    return planned.execute(DEFAULT)[0]


def _loaded(reader: CheckpointReader, saved: ObjectGraph, *, on_device: bool = False) -> Any:
    """A saved value as `ckpt.load` gives it; or with arrays of JAX, if they were that."""
    wanted = {(node, attribute.name): attribute for node, attribute in saved.attributes()}
    data = reader.read({attribute.key: None for attribute in wanted.values()})
    for attribute in wanted.values() if on_device else ():
        value, spec = data[attribute.key], attribute.spec
        if spec.is_placed and jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype:
            data[attribute.key] = decode(jax.device_put(value), spec, spec)
    return built_from(reader, saved, wanted, data, everything=True)


add_view(PerProcess, _PerProcessView())
register_checkpoint_saver(
    package="ckpt_jax",
    name="PerProcess",
    predicate=ByType(_is_taken),
    save_fn=_save,
    restore_fn=_restore,
)
