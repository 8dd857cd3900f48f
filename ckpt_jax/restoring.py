"""Restoring: from a checkpoint and live objects to restored objects.

open    graph and index
match   the saved graph with the live one
plan    every value to read, and every problem; nothing has been read and nothing changed yet
read    only what this process's devices need
assign  in place where objects are mutable, by rebuilding where they are not

A `Restoration` is one such restore. It goes on living while saved values wait for their
objects: `attach` runs the same stages for an object that appeared later.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np

from ckpt_jax import multihost
from ckpt_jax.adapting import ReshardCallback, Settled, ValueReader, settle
from ckpt_jax.arrays import host
from ckpt_jax.arrays.replicas import gather, parted
from ckpt_jax.arrays.values import ARRAY_KINDS, decode, describe, difference, evaluate
from ckpt_jax.derived import DerivedReader
from ckpt_jax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ProcessError,
    RegistrationError,
    RestoreMismatchError,
)
from ckpt_jax.graph.labels import Label, object_key_of, path_of
from ckpt_jax.graph.match import Match, extend, match
from ckpt_jax.graph.model import LeafSpec, ObjectGraph
from ckpt_jax.graph.plan import (
    Read,
    ReadPlan,
    SaverCall,
    assign,
    plan_read,
    pretty_name,
    reachable,
)
from ckpt_jax.graph.trace import LiveGraph, trace
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.placing import placed
from ckpt_jax.progress import Advance, progress
from ckpt_jax.reader import CheckpointReader
from ckpt_jax.renaming import Renamed
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.savers import registry
from ckpt_jax.store.index import dtype_of
from ckpt_jax.trackable.delegate import delegate_of
from ckpt_jax.trackable.pending import await_child
from ckpt_jax.trackable.view import View

ADVICE = (
    "Nothing was read or changed. Pass a target that fits, rename=[(saved, target), ...] for "
    "values that moved, strict=False to keep the target's own values, or "
    "options=CheckpointOptions(cast=True) to convert dtypes."
)


@host.without_gc()
def live_graph(
    root: Any, root_key: str = "", *, for_restore: bool = True, root_view: View | None = None
) -> LiveGraph:
    """The object graph of a program's objects, to be saved or restored; see `trace`."""
    return trace(
        root,
        describe,
        registry.saver_of(),
        root_view=root_view,
        root_key=root_key,
        tie_values=not for_restore,
        evaluate=None if for_restore else evaluate,
    )


# --- plan ------------------------------------------------------------------------------


def fits(cast: bool) -> Callable[[LeafSpec, LeafSpec, Any], str | None]:
    """The test whether a saved value can take a live one's place."""

    def why_not(saved: LeafSpec, target: LeafSpec, value: Any) -> str | None:
        problem = difference(saved, target, cast)
        if problem is None and target.kind in ("array", "prng_key"):
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
    """What to read, and what is wrong with rename rules and shardings themselves.

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
    problems = [ReportEntry(where, what=what) for where, what in (*saved.problems, *wrong)]
    return replace(plan, report=_with_changes(plan, saved, live)), tuple(problems)


def _with_changes(plan: ReadPlan, saved: Renamed, live: LiveGraph) -> RestoreReport:
    """The report of a plan, saying which restored values change in shape or dtype."""
    reshaped: set[str] = set()
    changed: set[str] = set()
    stored: dict[str, str] = {}
    for r in plan.reads:
        derived = saved.derived.get(r.key)
        was = derived.stored if derived else r.saved
        differs = was.dtype != r.target.dtype and {was.kind, r.target.kind} <= ARRAY_KINDS
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


def raise_problems(report: RestoreReport, path: str, cause: Exception | None = None) -> None:
    raise RestoreMismatchError(describe_problems(report, path, ADVICE), report) from cause


# --- read and assign -------------------------------------------------------------------


def adapted(saved: Renamed, settled: Settled) -> Renamed:
    """A renamed graph as adapters want it read."""
    paths = {**settled.saved_paths, **saved.saved_paths}
    return replace(saved, graph=settled.saved, saved_paths=paths)


def value_reader(reader: CheckpointReader, saved: Renamed, settled: Settled) -> ValueReader:
    """What reads the values of a renamed and adapted graph."""
    return ValueReader(DerivedReader(reader, saved.derived), settled.inputs)


def read(plan: ReadPlan, reader: ValueReader, options: CheckpointOptions) -> list[Any]:
    """The value of each `Read` of a plan, each array once per dtype and placement."""
    total = nbytes_to_read(plan, reader) if options.progress else 0
    with progress(options.progress, f"restoring {reader.path}", total) as advance:
        return _read(plan, reader, options, advance)


def _read(
    plan: ReadPlan, reader: ValueReader, options: CheckpointOptions, advance: Advance
) -> list[Any]:
    requests: dict[tuple[str, Any, Any], int] = {}
    order = [requests.setdefault(_identity(r), len(requests)) for r in plan.reads]
    first: dict[int, Read] = {}
    for number, r in zip(order, plan.reads, strict=True):
        first.setdefault(number, r)
    found: list[Any] = [None] * len(first)
    shared = _shared(first, reader, options)
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
                raise_problems(report, reader.path, error)
        for number in batch.values():
            del todo[number]
    if shared:
        _hand_over(found, {number: first[number] for number in shared}, reader, options)
    return [found[number] for number in order]


def _shared(
    reads: Mapping[int, Read], reader: ValueReader, options: CheckpointOptions
) -> dict[int, jax.sharding.Sharding]:
    """For reads whose bytes several processes need, the layout in which each is read once."""
    if not options.broadcast or multihost.current().count == 1:
        return {}
    shared: dict[int, jax.sharding.Sharding] = {}
    for number, r in reads.items():
        if r.target.kind == "array" and r.saved.kind in ARRAY_KINDS:
            sharding = host.placement(r.value)
            layout = sharding and parted(sharding, r.saved.shape, dtype_of(r.target.dtype))
            if layout is not None:
                shared[number] = layout
    return shared


def _hand_over(
    found: list[Any],
    reads: Mapping[int, Read],
    reader: ValueReader,
    options: CheckpointOptions,
) -> None:
    """Gathers what was read in parts.

    Devices wait for each other without a deadline: so that nobody is missing, all processes say
    first that they have read their parts, and of which values.
    """
    shardings = [host.placement(r.value) for r in reads.values()]
    names = [f"{r.key} {r.target} {to}" for r, to in zip(reads.values(), shardings, strict=True)]
    what = f"restoring {reader.path}"
    with multihost.current().meeting(what, options.timeout_seconds) as meeting:
        meeting.conclude(hashlib.sha256("\n".join(names).encode()).hexdigest(), _check_same_reads)
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


def _identity(read: Read) -> tuple[str, Any, Any]:
    return read.key, read.target, host.placement(read.value)


def _request(
    read: Read, layout: jax.sharding.Sharding | None = None
) -> jax.ShapeDtypeStruct | None:
    if read.target.kind not in ("array", "prng_key"):
        return None
    if read.saved.kind not in (*ARRAY_KINDS, "prng_key") and read.target.kind == "array":
        return None  # a Python number: its range is checked before it becomes an array
    return jax.ShapeDtypeStruct(
        read.saved.shape,
        dtype_of(read.target.dtype),
        sharding=layout or host.placement(read.value),
    )


def nbytes_to_read(plan: ReadPlan, reader: ValueReader) -> int:
    """Bytes of values that this process needs for a plan, each once."""
    nbytes: dict[str, int] = {}
    for r in plan.reads:
        sharding = host.placement(r.value) if r.target.kind in ("array", "prng_key") else None
        size = reader.stored_nbytes(r.key)
        if sharding is not None:
            size = size * host.wanted_size(sharding, r.saved.shape) // max(prod(r.saved.shape), 1)
        nbytes[r.key] = max(size, nbytes.get(r.key, 0))
    return sum(nbytes.values())


def execute(
    plan: ReadPlan, live: LiveGraph, reader: ValueReader, options: CheckpointOptions
) -> tuple[Any, list[Any]]:
    """Reads what a plan says and puts it into the live objects; returns the root and the values."""
    calls = [_accepted(call, live) for call in plan.calls]
    values: dict[int, dict[str, Any]] = {}
    for r, value in zip(plan.reads, read(plan, reader, options), strict=True):
        if r.target.kind == "array" and not isinstance(value, jax.Array):
            value = host.put([np.asarray(value)], host.placement(r.value))[0]
        if r.target.weak_type:  # or the same program would be compiled anew, and promote otherwise
            value = host.weakly_typed(value)
        values.setdefault(r.node, {})[r.name] = value
    for saver, nodes in calls:
        objects = {name: live.objects[node] for name, node in nodes.items()}
        for name, value in _restored(saver, objects, reader.path).items():
            values.setdefault(nodes[name], {})[""] = value
    return assign(live, values), [v for of_node in values.values() for v in of_node.values()]


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


# --- one restore -----------------------------------------------------------------------

_log = logging.getLogger("ckpt_jax")
_MAX_LOGGED = 10
_uids = itertools.count(1)
_restored_by: dict[int, tuple[weakref.ref[Any], int]] = {}  # id(object) -> (object, uid)


def _note_restored(obj: Any, uid: int) -> None:
    """Remembers the restore that an object's values come from, as long as it lives."""
    if _has_weakrefs(obj):
        key = id(obj)
        _restored_by[key] = weakref.ref(obj, lambda _: _restored_by.pop(key, None)), uid


def note_restored(objects: Iterable[Any]) -> None:
    """Remembers that objects were restored now, outside of a `Restoration`."""
    uid = next(_uids)
    for obj in objects:
        _note_restored(obj, uid)


def _restored_uid(obj: Any) -> int:
    ref, uid = _restored_by.get(id(obj), (None, 0))
    return uid if ref is not None and ref() is obj else 0


def _has_weakrefs(obj: Any) -> bool:
    """Whether an object can be told from its replacement without keeping it alive."""
    return type(obj).__weakrefoffset__ != 0


def log_conflicts(saved: ObjectGraph, found: Match) -> None:
    """Says that a checkpoint and a program share objects in different ways."""
    if found.conflicts:
        _log.warning(
            "Inconsistent references: the program shares objects in another way than the "
            "checkpoint (%d places, the first is %s); the first binding counts",
            len(found.conflicts),
            pretty_name(saved, found.conflicts[0].saved),
        )


class _LeftOver:
    """The values of a checkpoint that no object has taken yet.

    They are logged, as one record, when the last one who could still take or ask for them is
    gone. It holds no reference to the restoration that it watches.
    """

    def __init__(self, path: str, saved: ObjectGraph):
        self.path = path
        self.saved = saved
        self.nodes = {node for node, _ in saved.attributes()}
        self.is_expected = False

    def log(self) -> None:
        if self.nodes and not self.is_expected:
            names = [pretty_name(self.saved, node) for node in sorted(self.nodes)[:_MAX_LOGGED]]
            more = len(self.nodes) - len(names)
            _log.warning(
                "%d values of %s were never used: %s%s. If that is as it should be, call "
                "expect_partial() on the status that restore() returns.",
                len(self.nodes),
                self.path,
                ", ".join(names),
                f" and {more} more" if more else "",
            )


class Restoration:
    """One restore of a checkpoint into mutable objects, finished or waiting.

    Attributes:
      path: of the checkpoint.
      renamed: its object graph, under the names of the program.
      uid: grows with every restore; the values of a later one win.
      nbytes: how much it has read so far.
    """

    def __init__(
        self,
        path: str,
        renamed: Renamed,
        options: CheckpointOptions,
        trace: Callable[[], LiveGraph],
    ):
        """`trace` is a method of the object that is restored; it is not kept alive."""
        self.path = path
        self.renamed = renamed
        self.options = options
        self.uid = next(_uids)
        self.nbytes = 0
        self.left_over = _LeftOver(path, renamed.graph)
        finalizer = weakref.finalize(self, self.left_over.log)
        finalizer.atexit = False  # at interpreter exit nobody is waiting any more
        self._bound: dict[int, list[weakref.ref[Any]]] = {}  # saved node -> its mutable objects
        self._callbacks: Mapping[int, ReshardCallback] = {}  # by saved node
        self._reader: CheckpointReader | None = None  # for what is attached later
        self._identity: Any = None  # of the checkpoint
        self._trace = weakref.WeakMethod(trace)
        self._met: set[int] = set()  # saved nodes that have been bound, to whatever
        self._open_slots = [
            (optimizer, slot)
            for optimizer, node in enumerate(renamed.graph.nodes)
            for slot in node.slots
            if not options.skip_slot_variables
        ]

    @property
    def saved(self) -> ObjectGraph:
        """The saved object graph."""
        return self.renamed.graph

    def run(self, reader: CheckpointReader) -> Any:
        """Restores what is there and lets the rest wait; returns the root."""
        trace = self._trace()
        assert trace is not None
        self._identity = reader.identity
        live = trace()
        if self._create_slots(live):
            live = trace()
        return self._bind(live, lambda saved: match(saved, live.graph), reader)

    def attach(self, child: Any, saved: int) -> Any:
        """Restores into an object that appeared where `saved` was awaited; returns it."""
        key = self.saved.object_keys[saved]
        live = live_graph(child, key)
        before = Match(self._bound_in(live), {})
        with self._reopened() as reader:
            root = self._bind(
                live,
                lambda graph: extend(before, graph, live.graph, [(saved, 0)]),
                reader,
                root_key=key,
            )
        return child if root is delegate_of(child) else root

    def attached(self) -> None:
        """Restores slots of which one end has just come. Where the other is, only a walk from
        the root can tell."""
        trace = self._trace()
        ends = [slot for slot in self._open_slots if {slot[0], slot[1].variable} <= self._met]
        if not ends or trace is None:
            return
        live = trace()
        if self._create_slots(live):
            live = trace()
        slots = frozenset([slot.node for _, slot in ends])
        with self._reopened() as reader:
            self._bind(live, lambda saved: match(saved, live.graph), reader, slots)

    @contextmanager
    def _reopened(self) -> Iterator[CheckpointReader]:
        """The checkpoint again, if it still is the one that the restore began with. The reader of
        a directory holds no files: it is kept, with its index."""
        reader = self._reader or CheckpointReader(self.path)
        if reader.identity != self._identity:
            raise CheckpointNotFoundError(
                f"{self.path} was replaced since it was restored; what still waits for values of "
                "it cannot have them. Restore it again."
            )
        try:
            yield reader
        except CorruptCheckpointError as error:
            reader.check_not_replaced(error)
            raise
        finally:
            if os.path.isdir(self.path):
                self._reader = reader
            else:
                reader.close()

    def _create_slots(self, live: LiveGraph) -> bool:
        """Asks optimizers that can make slot variables for those that they lack."""
        bound = match(self.saved, live.graph).bound if self._open_slots else {}
        created = False
        for optimizer, slot in self._open_slots:
            if slot.node in bound or not {optimizer, slot.variable} <= bound.keys():
                continue
            create = getattr(live.objects[bound[optimizer]], "create_slot", None)
            if create is not None:
                variable = live.objects[bound[slot.variable]]
                created = create(slot.name, variable) is not None or created
        return created

    def _bound_in(self, live: LiveGraph) -> dict[int, int]:
        """What is bound already, in the node ids of `live`; -1 for objects outside of it."""
        node_of = {id(obj): i for i, obj in enumerate(live.objects)}
        return {
            saved: node_of.get(id(obj), -1)
            for saved, (first, *_) in self._bound.items()
            if (obj := first()) is not None
        }

    @host.without_gc()
    def _bind(
        self,
        live: LiveGraph,
        rematch: Callable[[ObjectGraph], Match],
        reader: CheckpointReader,
        among: frozenset[int] | None = None,
        root_key: str = "",
    ) -> Any:
        """Reads and assigns what a match says; returns the root.

        Args:
          among: saved nodes: nothing else is restored. All by default.
          root_key: the escaped path of the root of `live`.
        """
        settled = settle(self.saved, live, rematch, reader, self._callbacks)
        saved, found = adapted(self.renamed, settled), settled.found
        only = None
        if among is not None:
            new = [found.bound[node] for node in among if node in found.bound]
            only = frozenset(reachable(live.graph, new))
        newer = frozenset(
            i
            for i, obj in enumerate(live.objects)
            if (only is None or i in only) and _restored_uid(obj) < self.uid
        )
        plan, problems = plan_restoring(
            saved, live, found, self.path, self.options, only=newer, root_key=root_key
        )
        fatal = replace(
            plan.report,
            missing=abstract_only(plan.report.missing, live),
            mismatched=(
                *problems,
                *settled.problems,
                *[entry for entry in plan.report.mismatched if entry.expected],
            ),
            unexpected=(),
        )
        if fatal.missing or fatal.mismatched:
            raise_problems(fatal, self.path)
        source = value_reader(reader, saved, settled)
        root, new = execute(plan, live, source, self.options)
        self.nbytes += nbytes_to_read(plan, source)
        self.renamed, self._callbacks = saved, settled.callbacks
        for value in new:
            _note_restored(value, self.uid)
        self.left_over.nodes -= plan.used
        if only is None:
            log_conflicts(saved.graph, found)
        self._remember(live, found, only)
        return root

    def _remember(self, live: LiveGraph, found: Match, only: frozenset[int] | None) -> None:
        self._met.update(found.bound)
        self._open_slots = [slot for slot in self._open_slots if slot[1].node not in self._met]
        for saved, node in [*found.bound.items(), *found.shared]:
            if node >= 0 and (only is None or node in only) and live.views[node].mutable:
                obj = live.objects[node]
                _note_restored(obj, max(self.uid, _restored_uid(obj)))
                if _has_weakrefs(obj):
                    self._bound.setdefault(saved, []).append(weakref.ref(obj))
        for (parent, label), saved in found.frontier.items():
            if (only is None or parent in only) and self.saved.carries_values(saved):
                for trackable in live.awaiting(parent):
                    await_child(trackable, label, _Waiting(self, saved))

    def is_bound(self, saved: int, obj: Any) -> bool:
        """Whether this restore has bound a saved node to this object. An object that cannot be
        referred to weakly (an nnx.Variable) is known by its place."""
        return not _has_weakrefs(obj) or any(ref() is obj for ref in self._bound.get(saved, ()))


def abstract_only(entries: tuple[ReportEntry, ...], live: LiveGraph) -> tuple[ReportEntry, ...]:
    """The entries whose value in the program is abstract, so that nothing can stand in for it."""
    if not entries:
        return ()
    abstract = {
        live.graph.value_path(node, name)
        for node, values in enumerate(live.values)
        for name, value in values.items()
        if isinstance(value, jax.ShapeDtypeStruct)
    }
    return tuple([entry for entry in entries if entry.path in abstract])


class _Waiting:
    """A saved node that waits for its object; see `trackable.base.Pending`."""

    def __init__(self, restoration: Restoration, saved: int):
        self.restoration = restoration
        self.saved = saved

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        return self.restoration.attach(child, self.saved)

    def attached(self) -> None:
        self.restoration.attached()

    def initial_value(self) -> LeafSpec | None:
        node = self.restoration.saved.nodes[self.saved]
        if len(node.attributes) == 1 and not node.children:
            return node.attributes[0].spec
        return None
