"""Restoring: from a checkpoint and live objects to restored objects.

open    graph and index
match   the saved graph with the live one
plan    every value to read, and every problem; nothing has been read and nothing changed yet
read    only what this process's devices need
assign  in place where objects are mutable, by rebuilding where they are not
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ckpt_jax.errors import ProcessError, RegistrationError, RestoreMismatchError
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.assign import assign
from ckpt_jax.matching.match import Match
from ckpt_jax.matching.plan import ReadPlan, SaverCall, ValueRead, plan_read
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects import registry
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.progress import Advance, progress
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.restoring.derived import FittedReader
from ckpt_jax.restoring.reader import CheckpointReader
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.shardings import placed
from ckpt_jax.values import host
from ckpt_jax.values.leaves import decode, difference
from ckpt_jax.values.replicas import gather, parted

Reader = CheckpointReader | FittedReader

ADVICE = (
    "Nothing was read or changed. Pass objects that fit, or options=CheckpointOptions(cast=True) "
    "to convert dtypes."
)


# --- plan ------------------------------------------------------------------------------


def fits(cast: bool) -> Callable[[LeafSpec, LeafSpec, Any], str | None]:
    """The test whether a saved value can take a live one's place."""

    def why_not(saved: LeafSpec, target: LeafSpec, value: Any) -> str | None:
        problem = difference(saved, target, cast)
        if problem is None and target.is_placed:
            problem = host.placement_problem(value.shape, host.placement(value))
        return problem

    return why_not


def plan_restoring(
    saved: Renamed,
    live: LiveGraph,
    found: Match,
    path: str,
    options: CheckpointOptions,
    *,
    only: frozenset[int] | None = None,
    root_key: str = "",
) -> tuple[ReadPlan, tuple[ReportEntry, ...]]:
    """What to read, and what is wrong with rename rules, adapters and shardings themselves.

    Args:
      saved, live, found: the two graphs and their match.
      path: of the checkpoint.
      options: `cast`, `skip_slot_variables` and `shardings` apply.
      only: live nodes to plan for; all by default.
      root_key: the escaped path of the root of `live`, where that is part of something larger.
    """
    target, wrong = placed(live, options.shardings, root_key=root_key, known=(saved.graph,))
    plan = plan_read(
        saved.graph,
        target,
        found,
        path=path,
        fits=fits(options.cast),
        saved_paths=saved.saved_paths,
        only=only,
        skip_slots=options.skip_slot_variables,
    )
    problems = (*saved.problems, *[ReportEntry(where, what=what) for where, what in wrong])
    return replace(plan, report=_with_changes(plan, saved, live)), problems


def _with_changes(plan: ReadPlan, saved: Renamed, live: LiveGraph) -> RestoreReport:
    """The report of a plan, saying which restored values change in shape or dtype."""
    reshaped: set[str] = set()
    changed: set[str] = set()
    stored: dict[str, str] = {}
    for r in plan.reads:
        derived = saved.derived.get(r.key)
        was = derived.stored if derived else r.saved
        differs = was.dtype != r.target.dtype and was.is_array and r.target.is_array
        if derived or differs:
            path = live.graph.value_path(r.node, r.name)
            if derived:
                stored[path] = str(derived)
            if derived and derived.reshaped:
                reshaped.add(path)
            if differs:
                changed.add(path)
    if not (stored or changed):
        return plan.report
    restored, renamed = (
        tuple([replace(e, found=stored[e.path]) if e.path in stored else e for e in entries])
        for entries in (plan.report.restored, plan.report.renamed)
    )
    return replace(
        plan.report,
        restored=restored,
        renamed=renamed,
        reshaped=tuple([entry for entry in restored if entry.path in reshaped]),
        dtype_changes=tuple([entry for entry in restored if entry.path in changed]),
    )


def abstract_only(entries: tuple[ReportEntry, ...], live: LiveGraph) -> tuple[ReportEntry, ...]:
    """The entries whose value in the program is abstract, or an array that was deleted or donated,
    so that nothing can stand in for it."""
    if not entries:
        return ()
    empty = {
        live.graph.value_path(node, name)
        for node, values in enumerate(live.values)
        for name, value in values.items()
        if _is_empty(value)
    }
    return tuple([entry for entry in entries if entry.path in empty])


def _is_empty(value: Any) -> bool:
    """Whether what describes an array holds none."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    return isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted()


def require_fit(report: RestoreReport, advice: str = ADVICE) -> None:
    """Checks that nothing is mismatched, missing or unexpected.

    Raises:
      RestoreMismatchError: naming all that is.
    """
    if report.mismatched or report.missing or report.unexpected:
        raise RestoreMismatchError(describe_problems(report, advice), report)


# --- read and assign -------------------------------------------------------------------


@contextmanager
def together(path: Any, options: CheckpointOptions) -> Iterator[Meeting | None]:
    """A meeting for a restore in which processes hand values to each other; else None.

    It has to begin before anything that can fail on one process alone, because the others would
    wait for what that process reads.
    """
    processes = current()
    if path is None or not options.broadcast or processes.count == 1:
        yield None
        return
    what = f"restoring {os.fsdecode(path)}"
    with processes.meeting(what, options.timeout_seconds) as meeting:
        yield meeting


def read(
    plan: ReadPlan, reader: Reader, options: CheckpointOptions, meeting: Meeting | None
) -> list[Any]:
    """The value of each `ValueRead` of a plan, each array once per dtype and placement."""
    total = nbytes_to_read(plan, reader) if options.progress else 0
    with progress(options.progress, f"restoring {reader.path}", total) as advance:
        return _read(plan, reader, options, meeting, advance)


def _read(
    plan: ReadPlan,
    reader: Reader,
    options: CheckpointOptions,
    meeting: Meeting | None,
    advance: Advance,
) -> list[Any]:
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
        for key, data in reader.read(asked, options, advance).items():
            r = first[batch[key]]
            try:
                found[batch[key]] = decode(data, r.saved, r.target, r.value)
            except (OverflowError, ValueError) as error:
                entry = ReportEntry(path_of(object_key_of(key)), str(r.target), str(r.saved))
                problem = replace(entry, what=str(error))
                report = RestoreReport(reader.path, mismatched=(problem,))
                raise RestoreMismatchError(describe_problems(report, ADVICE), report) from error
        for number in batch.values():
            del todo[number]
    if meeting is not None:
        _hand_over(found, {number: first[number] for number in shared}, meeting)
    return [found[number] for number in order]


def _shared(reads: Mapping[int, ValueRead]) -> dict[int, jax.sharding.Sharding]:
    """For reads whose bytes several processes need, the layout in which each is read once."""
    shared: dict[int, jax.sharding.Sharding] = {}
    for number, r in reads.items():
        if r.target.is_jax_array and r.saved.is_array:
            sharding = host.placement(r.value)
            layout = sharding and parted(sharding, r.saved.shape, dtype_of(r.target.dtype))
            if layout is not None:
                shared[number] = layout
    return shared


def _hand_over(found: list[Any], reads: Mapping[int, ValueRead], meeting: Meeting) -> None:
    """Gathers what was read in parts.

    Devices wait for each other without a deadline: so that nobody is missing, all processes say
    first that they have read their parts, and of which values.
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
            f"the targets of processes {', '.join(map(str, others))} are not that of process 0; "
            "with options.broadcast=True all processes restore the same",
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


def nbytes_to_read(plan: ReadPlan, reader: Reader) -> int:
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
    reader: Reader,
    options: CheckpointOptions,
    meeting: Meeting | None = None,
) -> tuple[Any, list[Any]]:
    """Reads what a plan says and puts it into the live objects; returns the root and the values.

    `meeting` is that of `together`: without it, each process reads all that it needs.
    """
    calls = [_accepted(call, live) for call in plan.calls]
    values: dict[int, dict[str, Any]] = {}
    for r, value in zip(plan.reads, read(plan, reader, options, meeting), strict=True):
        if r.target.is_jax_array and not isinstance(value, jax.Array):
            value = host.put([np.asarray(value)], host.placement(r.value))[0]
        if r.target.weak_type:  # or the same program would be compiled anew, and promote otherwise
            value = host.weakly_typed(value)
        values.setdefault(r.node, {})[r.name] = value
    replaced: dict[int, Any] = {}
    for saver, nodes in calls:
        objects = {name: live.objects[node] for name, node in nodes.items()}
        new = _restored(saver, objects, reader.path)
        if lost := [name for name, obj in objects.items() if name not in new and _is_empty(obj)]:
            raise RegistrationError(
                f"restore_fn of the checkpoint saver {saver.name!r} returned no values for "
                f"{', '.join(lost)}, and there are none in the target that could stay"
            )
        replaced.update({nodes[name]: value for name, value in new.items()})
    root = assign(live, values, replaced)
    return root, [*replaced.values(), *(v for of_node in values.values() for v in of_node.values())]


def _accepted(call: SaverCall, live: LiveGraph) -> tuple[registry.RegisteredSaver, dict[str, int]]:
    """The saver that a checkpoint names, and the nodes that it takes; others are skipped."""
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
    """What a saver puts in the place of immutable objects, by name."""
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
