"""Restore runs: every restore of this library, from a checkpoint and live objects to values.

open      the processes meet, then the checkpoint is opened
match     the saved graph with the live one, after rules and adapters have changed the saved one
plan      every value to read, and every problem; nothing has been read or changed yet
complete  the report: a restore that lets nothing wait counts as unexpected what would wait
require   that everything fits, as far as the caller demands it
execute   read only what the devices of this process need, and assign it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ckpt_jax.errors import RestoreMismatchError
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.match import Match, match
from ckpt_jax.matching.plan import ReadPlan, plan_read
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.context import Context
from ckpt_jax.processes.meeting import Meeting, Processes
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.restoring.adapters import adapt
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.restoring.execute import execute, is_abstract, nbytes_to_read
from ckpt_jax.restoring.identity import Places
from ckpt_jax.restoring.moved import suggested_rename
from ckpt_jax.restoring.precedence import Rank
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.shardings import placed
from ckpt_jax.store.paths import as_path
from ckpt_jax.values import host
from ckpt_jax.values.leaves import difference


@contextmanager
def broadcast_meeting(
    path: Any, options: CheckpointOptions, processes: Processes
) -> Iterator[Meeting | None]:
    """A meeting for a restore in which processes hand values to each other; None for any other.

    It has to begin before anything that can fail on one process alone, because the others would
    wait for the values that this process reads.
    """
    if path is None or not options.broadcast or processes.count == 1:
        yield None
        return
    what = f"restoring {as_path(path)}"
    with processes.meeting(what, options.timeout_seconds) as meeting:
        yield meeting


@contextmanager
def opened(
    path: Any, options: CheckpointOptions, context: Context
) -> Iterator[tuple[CheckpointReader, Meeting | None]]:
    """Opens a checkpoint for a restore without deferral: its reader and `broadcast_meeting`."""
    with (
        broadcast_meeting(path, options, context.processes) as meeting,
        context.meter.restoring(lambda: CheckpointReader(path, context.storage_of)) as reader,
    ):
        yield reader, meeting


@dataclass(frozen=True, slots=True)
class Demand:
    """The differences that are fatal for a restore.

    Three are fatal for every restore: a value that differs, a wrong rule, and a value that the
    program holds only abstractly and that the checkpoint lacks.

    Attributes:
      advice: the end of the error, which tells people what to do.
      missing: whether the checkpoint has to have every value of the program.
      unexpected: whether the program has to have a place for every value of the checkpoint.
      conflicts: whether the program has to share objects as the checkpoint does.
    """

    advice: str
    missing: bool = True
    unexpected: bool = True
    conflicts: bool = True


_NO_VALUE = ", and the target is abstract, so that it has no value that could stay"
EVERYTHING = Demand(
    "Nothing was read or changed. Pass objects that fit, or options=CheckpointOptions(cast=True) "
    "to convert dtypes."
)


@dataclass(frozen=True, slots=True)
class PlannedRestore:
    """A restore of which every problem is known. Nothing has been read or changed yet.

    Attributes:
      live: the objects to restore into.
      reads: the values to read, and a report on every value of the checkpoint and the program.
      reader: of the checkpoint, and of values that are derived from stored ones.
    """

    live: LiveGraph
    reads: ReadPlan
    reader: DerivedReader

    @property
    def report(self) -> RestoreReport:
        """Accounts for every value of the checkpoint and of the program."""
        return self.reads.report

    @property
    def nbytes(self) -> int:
        """Bytes of values that this process needs, each once."""
        return nbytes_to_read(self.reads, self.reader)

    def without_deferral(self, is_left_out: Callable[[ReportEntry], bool]) -> PlannedRestore:
        """The same restore, if no objects appear later: what would wait for them is unexpected.

        Args:
          is_left_out: says which values of the checkpoint need no place.
        """
        left_over = (*self.report.unexpected, *self.report.deferred)
        return self.with_unexpected([entry for entry in left_over if not is_left_out(entry)])

    def with_unexpected(self, entries: Iterable[ReportEntry]) -> PlannedRestore:
        """The same restore, in which only these values have no place in the program."""
        report = replace(self.report, unexpected=tuple(entries), deferred=())
        return replace(self, reads=replace(self.reads, report=report))

    def allowing(
        self, missing: Callable[[ReportEntry], bool], unexpected: Callable[[ReportEntry], bool]
    ) -> PlannedRestore:
        """The same without the values that only one side may have.

        A missing value that the program holds only abstractly stays: nothing could take its place.

        Args:
          missing: says which values of the program the checkpoint may lack.
          unexpected: says which values of the checkpoint need no place.
        """
        report = self.report
        allowed = tuple([entry for entry in report.missing if missing(entry)])
        abstract = {entry.path for entry in _abstract_only(allowed, self.live)}
        lost = {entry.path for entry in allowed} - abstract
        report = replace(
            report,
            missing=tuple(
                [
                    replace(entry, what=f"{entry.what}{_NO_VALUE}")
                    if entry.path in abstract
                    else entry
                    for entry in report.missing
                    if entry.path not in lost
                ]
            ),
            unexpected=tuple([entry for entry in report.unexpected if not unexpected(entry)]),
        )
        report = _with_suggestion(report, self.live.graph)
        return replace(self, reads=replace(self.reads, report=report))

    def require(self, demand: Demand) -> None:
        """Checks that everything fits, as far as it is demanded.

        Raises:
          RestoreMismatchError: naming all that does not fit. Nothing was read or changed.
        """
        report = self.report
        if not demand.missing:
            report = replace(report, missing=_abstract_only(report.missing, self.live))
        if not demand.unexpected:
            report = replace(report, unexpected=())
        if not demand.conflicts:
            ignored = {*self.reads.conflicting}
            mismatched = tuple([entry for entry in report.mismatched if entry not in ignored])
            report = replace(report, mismatched=mismatched)
        require_fit(report, demand.advice)

    def execute(
        self,
        options: CheckpointOptions,
        meeting: Meeting | None = None,
        *,
        rank: Rank | None = None,
        places: Places | None = None,
    ) -> tuple[Any, frozenset[int]]:
        """Reads the values and puts them into the objects.

        Args:
          options: how to read.
          meeting: of `broadcast_meeting`. Without it, each process reads all that it needs.
          rank: of the restore; by default it is later than all others.
          places: of the live nodes; by default no object outside of `live` owns its root.

        Returns:
          The root, and the nodes that were really given values.
        """
        root, given = execute(self.reads, self.live, self.reader, options, meeting)
        (rank or Rank()).settle(places or Places(self.live), given)
        return root, given


def plan_whole(
    reader: CheckpointReader, saved: Renamed, live: LiveGraph, options: CheckpointOptions
) -> PlannedRestore:
    """Plans to restore all of a checkpoint, from the roots of the two graphs on."""
    adapted = adapt(saved, live, match, reader)
    return plan_matched(reader, adapted.saved, adapted.found, live, options)


def plan_matched(
    reader: CheckpointReader,
    saved: Renamed,
    found: Match,
    live: LiveGraph,
    options: CheckpointOptions,
    *,
    only: frozenset[int] | None = None,
    casts_back: bool = False,
) -> PlannedRestore:
    """Plans a restore whose graphs are matched.

    Args:
      reader: of the checkpoint; no value is read.
      saved, found: the saved graph, and its match with the live one.
      live: the objects.
      options: `cast`, `skip_slot_variables` and `shardings` apply.
      only: live nodes to plan for; all by default.
      casts_back: whether values that the save has cast may become what they were before.
    """
    reads = plan_values(saved, found, live, reader.path, options, only=only, casts_back=casts_back)
    return PlannedRestore(live, reads, DerivedReader(reader, saved.derived))


def restore_pairs(
    reader: CheckpointReader,
    live: LiveGraph,
    bound: Mapping[int, int],
    options: CheckpointOptions,
    meeting: Meeting | None,
) -> None:
    """Restores live nodes from the saved nodes that are bound to them, whatever edges lead there.

    All other values of the checkpoint are ignored.

    Args:
      reader: of the checkpoint.
      live: the graph of the objects.
      bound: saved node -> live node.
      options: how to read.
      meeting: of `broadcast_meeting`.

    Raises:
      RestoreMismatchError: naming all that is missing or differs. Nothing was changed.
    """
    planned = plan_matched(reader, Renamed(reader.object_graph), Match(bound, {}), live, options)
    planned.require(replace(EVERYTHING, unexpected=False))
    planned.execute(options, meeting)


def plan_values(
    saved: Renamed,
    found: Match,
    live: LiveGraph,
    path: str,
    options: CheckpointOptions,
    *,
    only: frozenset[int] | None = None,
    casts_back: bool = False,
) -> ReadPlan:
    """The values to read after a match, and all problems; see `plan_matched`."""
    target, wrong = placed(live, options.shardings, known=(saved.graph,))
    reads = plan_read(
        saved.graph,
        target,
        found,
        path=path,
        fits=_fits(options.cast, casts_back),
        saved_paths=saved.saved_paths,
        only=only,
        skip_slots=options.skip_slot_variables,
        consumed=saved.consumed,
        notes=saved.notes,
    )
    problems = (*saved.problems, *[ReportEntry(where, what=what) for where, what in wrong])
    report = _with_changes(reads, saved, live)
    report = replace(report, mismatched=(*problems, *report.mismatched))
    return replace(reads, report=_with_suggestion(report, saved.graph, live.graph))


def _with_suggestion(report: RestoreReport, *graphs: ObjectGraph) -> RestoreReport:
    """The report with the rename rule that may have been forgotten.

    Args:
      graphs: their slot variables follow the variables, and need no rule.
    """
    report = replace(report, suggested_renames=())
    spare = (*report.unexpected, *report.deferred)
    if not (report.missing and spare):
        return report
    slots = {graph.paths[node] for graph in graphs for node in graph.slot_nodes}
    missing = [entry.path for entry in report.missing if entry.path not in slots]
    unexpected = [entry.saved_path or entry.path for entry in spare if entry.path not in slots]
    kept = [entry.saved_path or entry.path for entry in report.restored if entry.path not in slots]
    shapes = {entry.saved_path or entry.path: _shape(entry.found) for entry in spare}
    wanted = {entry.path: _shape(entry.expected) for entry in report.missing}
    rule = suggested_rename(
        missing, unexpected, kept, lambda saved, target: shapes[saved] == wanted[target]
    )
    return report if rule is None else replace(report, suggested_renames=(rule,))


def _shape(what: str) -> str:
    """The shape in the text of a spec: "[2]" of "float32[2]", and "[]" of "int"."""
    return what[what.index("[") :] if "[" in what else "[]"


def _fits(cast: bool, casts_back: bool) -> Callable[[LeafSpec, LeafSpec, Any], str | None]:
    """The test whether a saved value can become the value of a target."""

    def why_not(saved: LeafSpec, target: LeafSpec, value: Any) -> str | None:
        is_back = casts_back and saved.cast_from == target.dtype
        problem = difference(saved, target, cast or is_back)
        if problem is None and target.is_placed:
            problem = host.placement_problem(value.shape, host.placement(value))
        return problem

    return why_not


def _with_changes(reads: ReadPlan, saved: Renamed, live: LiveGraph) -> RestoreReport:
    """The report of a plan, which also says what restored values change in shape or dtype."""
    reshaped: set[str] = set()
    changed: set[str] = set()
    stored: dict[str, str] = {}
    for r in reads.reads:
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
        return reads.report
    restored, renamed = (
        tuple([replace(e, found=stored[e.path]) if e.path in stored else e for e in entries])
        for entries in (reads.report.restored, reads.report.renamed)
    )
    return replace(
        reads.report,
        restored=restored,
        renamed=renamed,
        reshaped=tuple([entry for entry in restored if entry.path in reshaped]),
        dtype_changes=tuple([entry for entry in restored if entry.path in changed]),
    )


def _abstract_only(entries: tuple[ReportEntry, ...], live: LiveGraph) -> tuple[ReportEntry, ...]:
    """The entries whose values in the program are abstract, or deleted or donated arrays: the
    program has nothing to go on with if the checkpoint lacks them."""
    if not entries:
        return ()
    empty = {
        live.graph.value_path(node, name)
        for node, values in enumerate(live.values)
        for name, value in values.items()
        if is_abstract(value)
    }
    return tuple([entry for entry in entries if entry.path in empty])


def truly_restored(reads: ReadPlan, live: LiveGraph, given: frozenset[int]) -> RestoreReport:
    """The report of a plan, in which only the values of the nodes in `given` are restored.

    The others would match, but appeared or replaced an object after the restore: they are missing.
    """
    report, paths = reads.report, live.graph.paths
    lost = {live.graph.value_path(r.node, r.name) for r in reads.reads if r.node not in given}
    lost |= {paths[n] for call in reads.calls for n in call.nodes.values() if n not in given}
    if not lost:
        return report

    def kept(entries: tuple[ReportEntry, ...]) -> tuple[ReportEntry, ...]:
        return tuple([entry for entry in entries if entry.path not in lost])

    missing = [
        replace(entry, what=f"expected {entry.expected}, {_TOO_LATE}", nearest=())
        for entry in report.restored
        if entry.path in lost
    ]
    return replace(
        report,
        restored=kept(report.restored),
        missing=(*report.missing, *missing),
        renamed=kept(report.renamed),
        reshaped=kept(report.reshaped),
        dtype_changes=kept(report.dtype_changes),
    )


_TOO_LATE = (
    "which the checkpoint has, but it came into this place after the restore and was not "
    "restored; restore again"
)


def require_fit(report: RestoreReport, advice: str) -> None:
    """Checks that nothing is mismatched, missing or unexpected.

    Raises:
      RestoreMismatchError: naming all that is.
    """
    if report.mismatched or report.missing or report.unexpected:
        raise RestoreMismatchError(describe_problems(report, advice), report)
