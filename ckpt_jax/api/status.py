"""LoadStatus: what a restore did, and assertions about it.

The assertions look at the program as it is now, not as it was when `restore` was called:
values that waited may have found their objects since. They follow TensorFlow's.

A file that has no object graph may hold anything besides, so for it all three assertions mean
the same: every object of the program that has values got them. The save counter need not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_jax.graph.labels import SAVE_COUNTER
from ckpt_jax.graph.nodes import pretty_name
from ckpt_jax.matching.match import Match, match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.report import ReportEntry, RestoreReport, near_miss, nearest, rename_hints
from ckpt_jax.restoring.run import plan_values, truly_restored
from ckpt_jax.restoring.waiting import Restoration

_MAX_LISTED = 10
_NO_CHECKPOINT = (
    "No checkpoint specified; nothing was restored (the path was None, which is what "
    "latest_checkpoint returns where there is none)"
)


class LoadStatus:
    """The outcome of `Checkpoint.restore` or `read`.

    Each assertion returns the status, for chaining. As a context manager it asserts on
    leaving that everything was consumed:

        with checkpoint.restore(path):
            ...  # create what is still missing

    Source: `tf.train.Checkpoint.restore`'s status objects.
    """

    def __init__(self, restoration: Restoration | None, trace: Callable[[], LiveGraph]):
        self._restoration = restoration
        self._trace = trace

    def __repr__(self) -> str:
        restoration = self._restoration
        where = "no checkpoint" if restoration is None else restoration.path
        return f"<LoadStatus of {where}; its .report lists every value>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    @property
    def report(self) -> RestoreReport:
        """Every value on either side, as things stand now."""
        if self._restoration is None:
            return RestoreReport("(no checkpoint)")
        return self._look().report

    def assert_consumed(self, *, limit: int | None = _MAX_LISTED) -> LoadStatus:
        """Every value in the checkpoint has a place in the program, and the other way round.

        Args:
          limit: how many values a failure names; None for all.

        Raises:
          AssertionError: naming the values that have not.
        """
        self._done.left_over.is_expected = True  # whoever asserts has been told
        now, saved = self._look(), self._done.saved
        self._require_existing(now, limit)
        if saved.named:
            return self
        spare = [entry.path for entry in now.report.missing]
        unresolved = [
            _Line(
                f"Unresolved object in checkpoint {pretty_name(saved, node)}: {what}",
                saved.paths[node],
            )
            for node, what in self._unresolved(now)
        ]
        unused = [
            _Line(f"Unused attributes in checkpoint: {entry}", entry.path)
            for entry in now.report.unexpected
        ]
        what = "values of the checkpoint have no place in the program"
        _fail(what, unresolved or unused, limit, spare, now.report)
        return self

    def assert_existing_objects_matched(self, *, limit: int | None = _MAX_LISTED) -> LoadStatus:
        """Every object of the program that has values got them from this checkpoint.

        Args:
          limit: how many objects a failure names; None for all.

        Raises:
          AssertionError: naming the objects that did not.
        """
        self._require_existing(self._look(), limit)
        return self

    def _require_existing(self, now: _Look, limit: int | None) -> None:
        graph = now.live.graph
        skipped = graph.slot_nodes if self._skips_slots() else frozenset()
        if self._done.saved.named:
            skipped |= {n for label, n in graph.nodes[0].children if label == SAVE_COUNTER}
        unmatched = [
            _Line(pretty_name(graph, node) + _why_counter(graph.paths[node]), graph.paths[node])
            for node, entry in enumerate(graph.nodes)
            if (entry.attributes or entry.saver) and node not in (skipped | now.given)
        ]
        report = now.report
        spare = [entry.path for entry in (*report.unexpected, *report.deferred)]
        _fail("objects of the program are not in the checkpoint", unmatched, limit, spare, report)

    def assert_nontrivial_match(self) -> LoadStatus:
        """Something besides the root was matched.

        Raises:
          AssertionError: nothing was.
        """
        if self._done.saved.named:
            return self.assert_consumed()
        now = self._look()
        if len(now.found.bound) <= 1:
            if len(now.live.graph.nodes) <= 1:
                raise AssertionError("Nothing to load: the program tracks no objects")
            raise AssertionError(
                "Nothing but the root was matched with the checkpoint. It holds "
                f"{_listed(list(self._done.saved.paths[1:]))}; the program has "
                f"{_listed(list(now.live.graph.paths[1:]))}"
            )
        return self

    def expect_partial(self) -> LoadStatus:
        """Silences the note about values that were never used; assertions stay as they are."""
        if self._restoration is not None:
            self._restoration.left_over.is_expected = True
        return self

    def initialize_or_restore(self) -> LoadStatus:
        """Nothing to do outside of TensorFlow's graph mode; kept for programs ported from it."""
        return self

    def __enter__(self) -> LoadStatus:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.assert_consumed(limit=None)

    @property
    def _done(self) -> Restoration:
        if self._restoration is None:
            raise AssertionError(_NO_CHECKPOINT)
        return self._restoration

    def _look(self) -> _Look:
        restoration = self._done
        live = self._trace()
        found = match(restoration.saved, live.graph)
        reads = plan_values(restoration.renamed, found, live, restoration.path, restoration.options)
        given = restoration.given_nodes(live)
        report = truly_restored(reads, live, given)
        return _Look(live, found, given, replace(report, nbytes=restoration.nbytes))

    def _skips_slots(self) -> bool:
        return self._done.options.skip_slot_variables

    def _unresolved(self, now: _Look) -> list[tuple[int, str]]:
        """Saved nodes with values that no object of the program has now, and what they hold."""
        saved = self._done.saved
        nodes = now.live.graph.nodes
        taken = {
            saved
            for live, saved in now.found.sources().items()
            # An object that takes no values leaves them unused, which is another complaint.
            if live in now.given or not (nodes[live].attributes or nodes[live].saver)
        }
        taken |= self._done.renamed.consumed
        if self._skips_slots():
            taken |= saved.slot_nodes
        return [
            (node, ", ".join(str(attribute.spec) for attribute in entry.attributes))
            for node, entry in enumerate(saved.nodes)
            if entry.attributes and node not in taken
        ]


@dataclass(frozen=True, slots=True)
class _Look:
    """The program as it is now, beside the checkpoint.

    Attributes:
      live, found: the program's objects, and their match with the saved graph.
      given: the nodes that the restore, or a later one, has really given values.
      report: every value on either side.
    """

    live: LiveGraph
    found: Match
    given: frozenset[int]
    report: RestoreReport


def outcome_of(status: LoadStatus) -> tuple[bool, str | None]:
    """Whether a restore has restored nothing, and in words what it has left out, if anything."""
    now = status._look()
    return _restored_nothing(now), _left_out(now.report)


def _restored_nothing(now: _Look) -> bool:
    """Whether nothing of a checkpoint was restored, although the program has values.

    It is not so if values wait for an object that the program has, but has not built yet.
    """
    report, live = now.report, now.live
    if _without_counter(report.restored) or not _without_counter(report.missing):
        return False
    there = {str(label) for label, _ in live.graph.nodes[0].children}
    unbuilt = there - {entry.path.partition("/")[0] for entry in report.missing}
    return not any(entry.path.partition("/")[0] in unbuilt for entry in report.deferred)


def _left_out(report: RestoreReport) -> str | None:
    kinds = {
        "the checkpoint lacks": report.missing,
        "the program has no place for": report.unexpected,
        "what waits for objects that the program does not have yet is": report.deferred,
    }
    parts = [
        f"{what} {_listed([entry.path for entry in left])}"
        for what, entries in kinds.items()
        if (left := _without_counter(entries))
    ]
    return "; ".join(parts) or None


def _without_counter(entries: tuple[ReportEntry, ...]) -> list[ReportEntry]:
    return [entry for entry in entries if entry.path != SAVE_COUNTER]


def _why_counter(path: str) -> str:
    """Why only `save` gives the counter of `restore` a value."""
    if path != SAVE_COUNTER:
        return ""
    return ": restore() makes it. Use read() for what write() or ckpt.save has written"


def _listed(names: list[str]) -> str:
    shown = ", ".join(name or "(root)" for name in names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"{shown} and {more} more ({len(names)} in all)" if more > 0 else shown or "nothing"


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a failure, and the path that it is about."""

    text: str
    path: str


def _fail(
    what: str, lines: list[_Line], limit: int | None, spare: list[str], report: RestoreReport
) -> None:
    """Raises if there is something to tell; `spare` are the paths that may have been meant."""
    if not lines:
        return
    shown = [
        f"  {line.text}{near_miss(nearest(line.path, spare)) if number < _MAX_LISTED else ''}"
        for number, line in enumerate(lines[:limit])
    ]
    if limit is not None and len(lines) > limit:
        shown.append(f"  ... {len(lines)} in all")
    text = "\n".join([f"{len(lines)} {what}:", *shown, *rename_hints(report)])
    raise AssertionError(text)
