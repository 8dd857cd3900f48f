"""Restore runs: every restore of this library, from a checkpoint and live objects to values.

match     the saved graph with the live one, as rules and adapters want it read
plan      every value to read, and every problem; nothing has been read or changed yet
complete  the report: who restores without deferral calls unexpected what would wait
require   that it fits, as far as the caller demands it
execute   read only what this process's devices need, and assign it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_jax.errors import RestoreMismatchError
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.match import Match, match
from ckpt_jax.matching.plan import ReadPlan, plan_read
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.restoring.adapters import Adapted, adapt
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.restoring.execute import execute, is_abstract, nbytes_to_read
from ckpt_jax.restoring.identity import Places
from ckpt_jax.restoring.moved import suggested_rename
from ckpt_jax.restoring.precedence import Rank
from ckpt_jax.restoring.reader import CheckpointReader
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.shardings import placed
from ckpt_jax.values import host
from ckpt_jax.values.leaves import ARRAY_KINDS, difference


@dataclass(frozen=True, slots=True)
class Demand:
    """What is fatal for a restore. A value that differs, a rule that is wrong, and a value that
    the program holds only abstractly and the checkpoint lacks are fatal for every restore.

    Attributes:
      advice: what the error tells people to do.
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
      saved: the saved graph as the program wants it read.
      found: the match of the two.
      reads: the values to read.
      report: every value on either side.
      callbacks: of adapters, by saved node.
    """

    live: LiveGraph
    saved: Renamed
    found: Match
    reads: ReadPlan
    report: RestoreReport
    callbacks: Mapping[int, Any]
    _reader: CheckpointReader

    def without_deferral(self, is_left_out: Callable[[ReportEntry], bool]) -> PlannedRestore:
        """The same for objects that get no further parts: what would wait is unexpected.

        Args:
          is_left_out: says which values of the checkpoint need no place.
        """
        left_over = (*self.report.unexpected, *self.report.deferred)
        return self.with_unexpected([entry for entry in left_over if not is_left_out(entry)])

    def with_unexpected(self, entries: Iterable[ReportEntry]) -> PlannedRestore:
        """The same with these values, and no others, without a place in the program."""
        report = replace(self.report, unexpected=tuple(entries), deferred=())
        return replace(self, report=report)

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
        abstract = {entry.path for entry in abstract_only(allowed, self.live)}
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
        return replace(self, report=report)

    @property
    def nbytes(self) -> int:
        """Bytes of values that this process needs, each once."""
        return nbytes_to_read(self.reads, self._source)

    @property
    def _source(self) -> DerivedReader:
        return DerivedReader(self._reader, self.saved.derived)

    def require(self, demand: Demand) -> None:
        """Checks that everything fits that has to.

        Raises:
          RestoreMismatchError: naming all that does not. Nothing was read or changed.
        """
        report = self.report
        if not demand.missing:
            report = replace(report, missing=abstract_only(report.missing, self.live))
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
        root_place: tuple[Any, str] = (None, ""),
    ) -> tuple[Any, frozenset[int]]:
        """Reads the values and puts them into the objects.

        Args:
          meeting: that of `together`; without it, each process reads all that it needs.
          rank: of the restore; a new one by default.
          root_place: where the root of the objects lies, if it is a value; see `Places`.

        Returns:
          The root, and the nodes that were really given values.
        """
        root, given = execute(self.reads, self.live, self._source, options, meeting)
        (rank or Rank()).gave(Places(self.live, root_place), given)
        return root, given


def plan_whole(
    reader: CheckpointReader, saved: Renamed, live: LiveGraph, options: CheckpointOptions
) -> PlannedRestore:
    """Plans to restore all of a checkpoint, from the roots of the two graphs on."""
    adapted = adapt(saved, live, lambda graph: match(graph, live.graph), reader)
    return plan(reader, adapted, live, options)


def plan_pairs(
    reader: CheckpointReader,
    live: LiveGraph,
    bound: Mapping[int, int],
    options: CheckpointOptions,
) -> PlannedRestore:
    """Plans to restore live nodes from the saved ones that are bound to them, by whatever edges
    they are reached."""
    return plan(reader, Adapted(Renamed(reader.object_graph), Match(bound, {})), live, options)


def plan(
    reader: CheckpointReader,
    adapted: Adapted,
    live: LiveGraph,
    options: CheckpointOptions,
    *,
    only: frozenset[int] | None = None,
    root_key: str = "",
) -> PlannedRestore:
    """Plans what a match means for values; no value is read.

    Args:
      reader: of the checkpoint.
      adapted: the saved graph and its match with the live one.
      live: the objects.
      options: `cast`, `skip_slot_variables` and `shardings` apply.
      only: live nodes to plan for; all by default.
      root_key: the escaped path of the root of `live`, if that is part of something larger.
    """
    saved, found = adapted.saved, adapted.found
    reads, report = look(saved, found, live, reader.path, options, only=only, root_key=root_key)
    return PlannedRestore(live, saved, found, reads, report, adapted.callbacks, reader)


def look(
    saved: Renamed,
    found: Match,
    live: LiveGraph,
    path: str,
    options: CheckpointOptions,
    *,
    only: frozenset[int] | None = None,
    root_key: str = "",
) -> tuple[ReadPlan, RestoreReport]:
    """What a match means for values, without a reader; see `plan`."""
    target, wrong = placed(live, options.shardings, root_key=root_key, known=(saved.graph,))
    reads = plan_read(
        saved.graph,
        target,
        found,
        path=path,
        fits=_fits(options.cast),
        saved_paths=saved.saved_paths,
        only=only,
        skip_slots=options.skip_slot_variables,
    )
    problems = (*saved.problems, *[ReportEntry(where, what=what) for where, what in wrong])
    report = _with_changes(reads, saved, live)
    report = replace(report, mismatched=(*problems, *report.mismatched))
    return reads, _with_suggestion(report, saved.graph, live.graph)


def _with_suggestion(report: RestoreReport, saved: ObjectGraph, live: ObjectGraph) -> RestoreReport:
    """The report with the rename rule that may have been forgotten. Slots follow their variables,
    so they need none."""
    spare = (*report.unexpected, *report.deferred)
    if not (report.missing and spare):
        return report
    slots = {graph.paths[node] for graph in (saved, live) for node in graph.slot_nodes}
    missing = [entry.path for entry in report.missing if entry.path not in slots]
    unexpected = [entry.saved_path or entry.path for entry in spare if entry.path not in slots]
    kept = [entry.saved_path or entry.path for entry in report.restored if entry.path not in slots]
    rule = suggested_rename(missing, unexpected, kept)
    return report if rule is None else replace(report, suggested_renames=(rule,))


def _fits(cast: bool) -> Callable[[LeafSpec, LeafSpec, Any], str | None]:
    """The test whether a saved value can take a live one's place."""

    def why_not(saved: LeafSpec, target: LeafSpec, value: Any) -> str | None:
        problem = difference(saved, target, cast)
        if problem is None and target.kind in ("array", "prng_key"):
            problem = host.placement_problem(value.shape, host.placement(value))
        return problem

    return why_not


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


def abstract_only(entries: tuple[ReportEntry, ...], live: LiveGraph) -> tuple[ReportEntry, ...]:
    """The entries whose value in the program is abstract, or an array that was deleted or donated,
    so that nothing can stand in for it."""
    if not entries:
        return ()
    empty = {
        live.graph.value_path(node, name)
        for node, values in enumerate(live.values)
        for name, value in values.items()
        if is_abstract(value)
    }
    return tuple([entry for entry in entries if entry.path in empty])


def truly_restored(
    report: RestoreReport, reads: ReadPlan, live: LiveGraph, given: frozenset[int]
) -> RestoreReport:
    """A report in which only the values of some nodes count as restored.

    The others would match, but appeared or replaced an object after the restore: they are missing.
    """
    paths = live.graph.paths
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
