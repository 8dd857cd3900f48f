"""Save runs: one save from the call to the record, in the foreground or in the background.

A run first meets the other processes, before anything can fail in this process alone. Then it waits
for its *turn*, because the saves of one `Checkpoint` come one after the other. Then it stages the
values, and goes on in the background if the options allow it.

The owner of a save keeps the *books*: it counts the save, records it, or takes it back.

A run is *in doubt* if this process has reported its shards but does not know whether process 0 has
committed them. It then counts as failed. If process 0 turns out to have committed it, it is counted
and recorded before the next save, so that all processes go on from the same number. A commit to an
object store may be in doubt, too (`CommitInDoubtError`), also if there is one process.

A run is *overtaken* if another one began later and was recorded first. That can only happen on one
thread: a signal handler or a write callback saves in the middle of a save. The later run then stays
the latest, because it has the newer values. An overtaken run for the same path is dropped.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ckpt_jax.errors import AsyncSaveError, CommitInDoubtError
from ckpt_jax.options import CheckpointOptions, takes_path
from ckpt_jax.processes.context import Context
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.processes.moment import Moment
from ckpt_jax.processes.patience import Patience
from ckpt_jax.saving.background import Background
from ckpt_jax.saving.pipeline import CANCELLED, SaveRequest, StagedSave

_ALIKE = 2  # saves in a row that nothing tells from the one before are no chance

_log = logging.getLogger("ckpt_jax")


class Bookkeeping(Protocol):
    """The books that the owner of a save keeps."""

    @property
    def series(self) -> Hashable:
        """Says which saves are numbered and recorded together, in one order. None if the save is
        not recorded."""
        ...

    def begin(self) -> SaveRequest:
        """Counts the save, and returns what to save. Called again for a save in doubt that turns
        out to be committed."""
        ...

    def record(self, is_overtaken: bool = False) -> None:
        """Records the checkpoint. Process 0 does this before the others know of the commit.

        Args:
          is_overtaken: whether a checkpoint with newer values has been recorded already.
        """
        ...

    def undo(self) -> None:
        """Takes back what `begin` has done, perhaps in part, because the save has failed."""
        ...

    def follow(self, count: int) -> None:
        """Takes over the save counter of process 0, after a save at which the processes were
        apart."""
        ...


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """The bookkeeping of a save that has no number and no record."""

    request: SaveRequest

    @property
    def series(self) -> None:
        return None

    def begin(self) -> SaveRequest:
        return self.request

    def record(self, is_overtaken: bool = False) -> None:
        pass

    def undo(self) -> None:
        pass

    def follow(self, count: int) -> None:
        pass


Open = Callable[[Meeting], Bookkeeping | None]


def save_once(request: SaveRequest, context: Context) -> str:
    """Saves in the foreground, without a turn, a number or a record; returns the path."""
    watch = context.meter.saving()
    what, seconds = f"saving {request.path}", request.options.timeout_seconds
    with (
        context.processes.meeting(what, seconds) as meeting,
        StagedSave(request, context.storage_of(request.path), meeting, watch) as staged,
    ):
        staged.commit(staged.write())
        staged.finish(lambda: _call_back(request.options.write_callbacks, request.path))
    return request.path


def refuse_async(verb: str, options: CheckpointOptions) -> None:
    """Refuses what a verb that always saves in the foreground cannot do.

    Raises:
      ValueError: `enable_async` is set.
    """
    if options.enable_async:
        raise ValueError(
            f"{verb} always saves in the foreground, but got "
            "CheckpointOptions(enable_async=True). Leave that out, or save in the background with "
            "ckpt.save, Checkpoint.save, Checkpoint.write or CheckpointManager.save."
        )


class SaveRuns:
    """The save runs of one owner: which one has the turn, and which ones are in doubt."""

    def __init__(self) -> None:
        self.background = Background()
        self._listeners: list[weakref.WeakMethod[Callable[[str], object]]] = []  # told of restores
        self._doubts: list[SaveRun] = []
        self._in_background: SaveRun | None = None
        self._open: list[SaveRun] = []  # in the order in which they began
        self._calls = 0
        self._evidence: str | None = None  # of the last save that was committed; see `Moment`
        self._alike = 0  # how many saves in a row had the same evidence as the one before

    def save(
        self,
        path: str,
        options: CheckpointOptions,
        patience: Patience,
        context: Context,
        check: Callable[[], object],
        open_books: Open,
    ) -> str | None:
        """Saves once.

        Args:
          path: names the save in errors.
          options: how to save.
          patience: for other processes.
          context: the surroundings of the save.
          check: raises an error if the save cannot begin. The other processes hear of it.
          open_books: called when this save has its turn. Returns None if there is nothing to save.

        Returns:
          The path of the checkpoint. None if there was nothing to save, or if another save was
          in flight and `when_busy="skip"` says not to wait for it.
        """
        watch = context.meter.saving()
        self._calls += 1
        call = self._calls
        with ExitStack() as stack:
            meeting = stack.enter_context(context.processes.meeting(f"saving {path}", patience))
            check()
            with self._turn(options, meeting) as is_mine:
                if not is_mine:
                    return None
                self.settle_doubts(patience)
                books = open_books(meeting)
                if books is None:
                    return None
                run = stack.enter_context(SaveRun(self, books, meeting))
                request = replace(books.begin(), call=call)
                run.path = request.path
                storage = context.storage_of(request.path)
                staged = StagedSave(request, storage, meeting, watch, run.cancelled)
                if not options.enable_async:
                    run.finish(staged, options)
                    return request.path
                watch.unblocked()
                held = stack.pop_all()  # the meeting and the run are left in the background
                self._in_background = run

                def work() -> None:
                    try:
                        with held:
                            run.finish(staged, options)
                    except Exception as error:
                        if not run.was_cancelled:
                            raise
                        error.__traceback__ = None  # its frames hold everything that was saved
                    finally:
                        if self._in_background is run:
                            self._in_background = None  # it has everything that it saves

                self.background.start(work, f"saving {request.path}", options.timeout_seconds)
        return request.path

    def cancel(self) -> bool:
        """Cancels the save in the background, and waits until nothing of it is left.

        Returns:
          Whether there was one that is not committed.

        Raises:
          AsyncSaveError: an earlier save failed; or this one was committed, or may have been, and
            then failed.
        """
        run = self._in_background
        if run is not None:
            run.cancelled.set()
        try:
            self.background.wait()
        except AsyncSaveError as error:
            # Perhaps another process has cancelled it, and this one was about to.
            if CANCELLED not in str(error):
                raise
            return True
        return run is not None and run.was_cancelled

    @contextmanager
    def _turn(self, options: CheckpointOptions, meeting: Meeting) -> Iterator[bool]:
        """The right to save; see `Background.turn`. If there are several processes, process 0
        decides whether the save is skipped."""
        # If one of several processes did not take part, the others would wait for it.
        is_alone = meeting.count == 1
        with self.background.turn(options.when_busy, is_refused=is_alone) as is_mine:
            if options.when_busy == "wait" or meeting.led(is_mine) == is_mine:
                yield is_mine
            elif is_mine:  # process 0 is still busy with a save that has ended here
                yield False
            else:
                with self.background.turn(is_refused=is_alone) as is_mine:
                    yield is_mine

    def settle_doubts(self, patience: Patience) -> None:
        """Counts the saves in doubt that process 0 has committed, and takes back the others."""
        while self._doubts:
            is_done = self._doubts[0].is_done_after_all(patience)
            if is_done is None:
                return
            books = self._doubts.pop(0).books
            if is_done:
                books.begin()
                books.record()
            else:
                books.undo()

    def listen(self, restored: Callable[[str], object]) -> None:
        """Calls a method, as long as its object lives, with the path after each restore."""
        self._listeners = [each for each in self._listeners if each() is not None]
        self._listeners.append(weakref.WeakMethod(restored))

    def tell_restored(self, path: str) -> None:
        """Calls the methods that listen with the path from which the owner was restored."""
        for listener in self._listeners:
            if (restored := listener()) is not None:
                restored(path)

    def opened(self, run: SaveRun) -> None:
        """Notes that a run has begun."""
        self._open.append(run)

    def closed(self, run: SaveRun) -> None:
        """Notes that a run has ended."""
        self._open.remove(run)

    def warn_without_evidence(self, path: str, moment: Moment | None) -> None:
        """Warns once if nothing tells saves that are counted from each other."""
        if moment is None or not moment.is_counted or self._alike == _ALIKE:
            return
        before, self._evidence = self._evidence, moment.evidence_digest
        self._alike = self._alike + 1 if before == self._evidence else 0
        if self._alike == _ALIKE:
            _log.warning(
                "%s: nothing in this checkpoint tells its step from that of the saves before, so "
                "that the processes cannot notice if they save different steps. Keep the step in "
                "the checkpoint, pass it as the number, or give the manager a step_counter. This "
                "is said once.",
                path,
            )

    def overtake(self, run: SaveRun, path: str) -> None:
        """Tells the runs that began before this one that its checkpoint is recorded, at `path`."""
        for other in self._open[: self._open.index(run)]:
            if run.books.series is not None and run.books.series == other.books.series:
                other.overtaken_by = run
            if other.path == path:
                other.is_replaced = True

    def doubt(self, run: SaveRun) -> None:
        """Keeps a run with an unknown outcome, to ask for the outcome before the next save."""
        run.meeting.keep()
        self._doubts.append(run)


class SaveRun:
    """One save that has its turn. At the end of its block, a save that has failed is taken back.

    Attributes:
      path: of its checkpoint, as soon as that is known.
      overtaken_by: the newest later run of the same series that was recorded before this one.
      is_replaced: whether a later run has made the checkpoint at the same path.
      cancelled: set if it is to be given up.
    """

    def __init__(self, runs: SaveRuns, books: Bookkeeping, meeting: Meeting):
        self.books, self.meeting = books, meeting
        self.path: str | None = None
        self.overtaken_by: SaveRun | None = None
        self.is_replaced = False
        self.cancelled = threading.Event()
        self._runs = runs
        self._is_committed = False
        self._doubtful: StagedSave | None = None  # a save of which the storage did not tell

    @property
    def was_cancelled(self) -> bool:
        """Whether it has ended without a checkpoint, after it was cancelled."""
        is_asked = self.cancelled.is_set()
        is_in_doubt = self.meeting.is_in_doubt or self._doubtful is not None
        return is_asked and not self._is_committed and not is_in_doubt

    def __enter__(self) -> SaveRun:
        self._runs.opened(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._runs.closed(self)
        if not self._is_committed:
            self.books.undo()
            if self.meeting.count_of_0 is not None:
                self.books.follow(self.meeting.count_of_0 - 1)
            if self.meeting.is_in_doubt or self._doubtful is not None:
                self._runs.doubt(self)

    def is_done_after_all(self, patience: Patience) -> bool | None:
        """Whether a run in doubt has committed its checkpoint; None if this is still not known."""
        if self._doubtful is None:
            return self.meeting.done_after_all(patience)
        try:
            return self._doubtful.is_committed()
        except OSError:
            return None

    def finish(self, staged: StagedSave, options: CheckpointOptions) -> None:
        """Writes, commits and records the save; runs on any thread."""
        meeting, path = self.meeting, staged.path
        try:
            with staged:
                report = staged.write()
                if self.is_replaced and meeting.count == 1:
                    raise _Replaced
                staged.commit(report)
                self._is_committed = True
                if not meeting.leads:  # even if a callback fails
                    self._record(path)

                def act() -> None:
                    _call_back(options.write_callbacks, path)
                    if meeting.leads:
                        self._record(path)
                        self._runs.warn_without_evidence(path, staged.moment)

                staged.finish(act)
        except CommitInDoubtError:
            self._doubtful = staged
            raise
        except _Replaced:
            self._is_committed = True  # the checkpoint at this path is there, and newer

    def _record(self, path: str) -> None:
        newer = self.overtaken_by
        self.books.record(is_overtaken=newer is not None)
        if self.overtaken_by is not newer and self.overtaken_by is not None:
            # The other run was recorded during this record, and has to be the latest again.
            self.overtaken_by.books.record()
        self._runs.overtake(self, path)


class _Replaced(Exception):
    """A later run has made the checkpoint at the same path."""


def _call_back(callbacks: Iterable[Callable[..., Any]], path: str) -> None:
    for callback in callbacks:
        if takes_path(callback):
            callback(path)
        else:
            callback()
