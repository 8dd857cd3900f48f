"""Execute: reads the values of a plan, and assigns them.

read    only the values that this process's devices need; each array once per dtype and placement
assign  in place if an object is mutable, else by rebuilding it
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ckpt_jax.errors import ProcessError, RegistrationError, RestoreMismatchError
from ckpt_jax.graph.dtypes import LossyConversionError, dtype_of
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.matching.assign import assign, note_changed
from ckpt_jax.matching.plan import ReadPlan, SaverCall, ValueRead
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects import registry
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.progress import Advance, progress
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.values import host
from ckpt_jax.values.leaves import decode
from ckpt_jax.values.replicas import gather, parted

_ADVICE = "Nothing was changed. Pass a target that can hold this value."


def _read(
    plan: ReadPlan, reader: DerivedReader, options: CheckpointOptions, meeting: Meeting | None
) -> list[Any]:
    """Reads the value of each `ValueRead` of a plan."""
    total = nbytes_to_read(plan, reader) if options.progress else 0
    with progress(options.progress, f"restoring {reader.path}", total) as advance:
        return _read_once(plan, reader, options, meeting, advance)


def _read_once(
    plan: ReadPlan,
    reader: DerivedReader,
    options: CheckpointOptions,
    meeting: Meeting | None,
    advance: Advance,
) -> list[Any]:
    """Reads each array once per dtype and placement, and gives it to all reads that want it."""
    requests: dict[tuple[str, Any, Any], int] = {}
    order = [requests.setdefault(_identity(r), len(requests)) for r in plan.reads]
    first: dict[int, ValueRead] = {}
    for number, r in zip(order, plan.reads, strict=True):
        first.setdefault(number, r)
    found: list[Any] = [None] * len(first)
    shared = _shared(first) if meeting is not None else {}
    # One pass serves each key once; a key that is wanted in several ways takes further passes.
    todo = dict(first)
    while todo:
        batch: dict[str, int] = {}
        for number, r in todo.items():
            batch.setdefault(r.key, number)
        asked = {key: _request(first[number], shared.get(number)) for key, number in batch.items()}
        try:
            arrived = reader.read(asked, options, advance)
        except LossyConversionError as error:
            raise _unfit(first[batch[error.key]], error, reader.path) from error
        for key, data in arrived.items():
            r = first[batch[key]]
            try:
                found[batch[key]] = decode(data, r.saved, r.target, r.value)
            except (OverflowError, ValueError) as error:
                raise _unfit(r, error, reader.path) from error
        for number in batch.values():
            del todo[number]
    if meeting is not None:
        _hand_over(found, {number: first[number] for number in shared}, meeting)
    return [found[number] for number in order]


def _unfit(read: ValueRead, error: Exception, path: str) -> RestoreMismatchError:
    """The error for a value that turned out, when it was read, not to fit its target."""
    entry = ReportEntry(path_of(object_key_of(read.key)), str(read.target), str(read.saved))
    problem = replace(entry, what=str(error))
    report = RestoreReport(path, mismatched=(problem,))
    return RestoreMismatchError(describe_problems(report, _ADVICE), report)


def _shared(reads: Mapping[int, ValueRead]) -> dict[int, jax.sharding.Sharding]:
    """The layouts in which all processes together read a value once, if several need its bytes."""
    shared: dict[int, jax.sharding.Sharding] = {}
    for number, r in reads.items():
        if r.target.is_jax_array and r.saved.is_array:
            sharding = host.placement(r.value)
            layout = sharding and parted(sharding, r.saved.shape, dtype_of(r.target.dtype))
            if layout is not None:
                shared[number] = layout
    return shared


def _hand_over(found: list[Any], reads: Mapping[int, ValueRead], meeting: Meeting) -> None:
    """Gathers the values that were read in parts.

    Devices wait for each other without a deadline. So all processes first report that they have
    read their parts, and of which values, so that no process is missing.
    """
    shardings = [host.placement(r.value) for r in reads.values()]
    names = [f"{r.key} {r.target} {to}" for r, to in zip(reads.values(), shardings, strict=True)]
    meeting.conclude(hashlib.sha256("\n".join(names).encode()).hexdigest(), _check_same_reads)
    if not reads:
        return
    arrays = gather([found[number] for number in reads], [to for to in shardings if to is not None])
    for number, array in zip(reads, arrays, strict=True):
        found[number] = array


def _check_same_reads(digests: list[str]) -> None:
    others = tuple(k for k, digest in enumerate(digests) if digest != digests[0])
    if others:
        raise ProcessError(
            f"the targets of processes {', '.join(map(str, others))} differ from the target of "
            "process 0; with options.broadcast=True all processes restore the same",
            others,
        )


def _identity(read: ValueRead) -> tuple[str, Any, Any]:
    return read.key, read.target, host.placement(read.value)


def _request(
    read: ValueRead, layout: jax.sharding.Sharding | None = None
) -> jax.ShapeDtypeStruct | None:
    if not read.target.is_placed:
        return None
    if read.target.is_jax_array and not (read.saved.is_array or read.saved.is_key):
        return None  # a Python number: its range is checked before it becomes an array
    return jax.ShapeDtypeStruct(
        read.saved.shape,
        dtype_of(read.target.dtype),
        sharding=layout or host.placement(read.value),
    )


def nbytes_to_read(plan: ReadPlan, reader: DerivedReader) -> int:
    """Bytes of values that this process needs for a plan, each once."""
    nbytes: dict[str, int] = {}
    for r in plan.reads:
        sharding = host.placement(r.value) if r.target.is_placed else None
        size = reader.stored_nbytes(r.key)
        if sharding is not None:
            size = size * host.wanted_size(sharding, r.saved.shape) // max(prod(r.saved.shape), 1)
        nbytes[r.key] = max(size, nbytes.get(r.key, 0))
    return sum(nbytes.values())


@host.transfers_allowed()
def execute(
    plan: ReadPlan,
    live: LiveGraph,
    reader: DerivedReader,
    options: CheckpointOptions,
    meeting: Meeting | None,
) -> tuple[Any, frozenset[int]]:
    """Reads the values of a plan and puts them into the live objects.

    Args:
      plan: says what to read.
      live: the graph of the objects.
      reader: of the checkpoint.
      options: how to read.
      meeting: the processes that hand values to each other. Without it, each process reads all
        that it needs.

    Returns:
      The root, and the nodes that were really given values.
    """
    calls = [_accepted(call, live) for call in plan.calls]
    values: dict[int, dict[str, Any]] = {}
    taken: dict[int, Any] = {}  # what the program has where an array of numpy went, by its id
    found = _read(plan, reader, options, meeting)
    found = host.in_formats(found, [r.value for r in plan.reads])
    for r, value in zip(plan.reads, found, strict=True):
        if r.target.is_jax_array and not isinstance(value, jax.Array):
            value = host.put([np.asarray(value)], host.placement(r.value))[0]
        if r.target.weak_type:  # else the program is compiled again, and promotes differently
            value = host.weakly_typed(value)
        if isinstance(value, np.ndarray) and taken.setdefault(id(value), r.value) is not r.value:
            value = value.copy()  # the program has two arrays there, of which each can be changed
        values.setdefault(r.node, {})[r.name] = value
    replaced: dict[int, Any] = {}
    called: list[int] = []  # nodes with objects that savers have changed in place
    calling: list[int] = []  # the same for a saver that is at work, and may raise before it does
    try:
        for saver, nodes in calls:
            calling = [node for node in nodes.values() if live.views[node].mutable]
            new = _called(saver, nodes, live, reader.path)
            called, calling = [*called, *calling], []
            replaced.update({nodes[name]: value for name, value in new.items()})
        given = frozenset([*values, *(node for _, nodes in calls for node in nodes.values())])
        return assign(live, values, replaced), given
    except BaseException as error:
        note_changed(error, [live.graph.paths[node] for node in called])
        note_changed(error, [live.graph.paths[node] for node in calling], "Perhaps changed")
        raise


def _called(
    saver: registry.RegisteredSaver, nodes: Mapping[str, int], live: LiveGraph, path: str
) -> Mapping[str, Any]:
    """The objects that a saver puts in the place of immutable ones, by name."""
    objects = {name: live.objects[node] for name, node in nodes.items()}
    new = _restored(saver, objects, path)
    if lost := [name for name, obj in objects.items() if name not in new and is_abstract(obj)]:
        raise RegistrationError(
            f"restore_fn of the checkpoint saver {saver.name!r} returned no values for "
            f"{', '.join(lost)}, and there are none in the target that could stay"
        )
    return new


def _accepted(call: SaverCall, live: LiveGraph) -> tuple[registry.RegisteredSaver, dict[str, int]]:
    """The saver that a checkpoint names, and the nodes that it accepts."""
    saver = registry.get_saver(call.saver)
    nodes = {name: n for name, n in call.nodes.items() if saver.predicate(live.objects[n])}
    if saver.strict_predicate_restore and len(nodes) < len(call.nodes):
        refused = [live.graph.paths[n] for name, n in call.nodes.items() if name not in nodes]
        raise RegistrationError(
            f"the checkpoint saver {call.saver!r} cannot be used to restore {', '.join(refused)}: "
            "its predicate refuses the objects there"
        )
    return saver, nodes


def _restored(
    saver: registry.RegisteredSaver, objects: dict[str, Any], path: str
) -> Mapping[str, Any]:
    """Lets a saver restore objects; returns the ones that take the place of immutable objects."""
    if not objects:
        return {}
    result = saver.restore_fn(dict(objects), path)
    if result is None:
        return {}
    if not isinstance(result, Mapping):
        raise RegistrationError(
            f"restore_fn of the checkpoint saver {saver.name!r} must return None or a dict of new "
            f"values by name, got {type(result).__name__}"
        )
    if unknown := [name for name in result if name not in objects]:
        raise RegistrationError(
            f"restore_fn of the checkpoint saver {saver.name!r} returned values for {unknown}, "
            f"but was given {list(objects)}"
        )
    return result


def is_abstract(value: Any) -> bool:
    """Whether a target only describes an array, or holds one that was deleted or donated."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    return isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted()
