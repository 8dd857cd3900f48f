"""Work in the background: one piece at a time, errors raised once and never lost.

Terms. The *turn* is the right to save. One thread has it at a time, and gets it when nothing is
running in the background. The thread that has the turn may hand work to the background. The work
runs on a thread of its own, so that the turn can be given back meanwhile.

The next turn or `wait` raises an error of the work, once. A normal exit of the interpreter waits
for the work, as long as its deadline allows, and logs the errors that were not raised. It does so
when the main thread has ended, and again when all other threads have ended. Work that is handed
over after that, or when no thread can be started any more, is done at once by the caller.

The thread is a daemon, so that a callback that hangs cannot hold the program forever. A write
from which the operating system does not return still can.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckpt_jax.errors import AsyncSaveError
from ckpt_jax.store.workers import started

_log = logging.getLogger("ckpt_jax")


class Background:
    """Runs one function at a time on a thread of its own."""

    def __init__(self) -> None:
        self._turn = threading.RLock()  # a write callback in the foreground may save again
        self._home = os.getpid()  # the process with the threads that may hold it
        self._thread: threading.Thread | None = None
        self._is_done = threading.Event()  # an interrupted `Thread.join` counts as the end
        self._pid = 0  # of the process that has the thread; a forked child does not have it
        self._errors: list[AsyncSaveError] = []  # not raised yet
        self._what = ""
        self._is_abandoned = False  # at exit
        self._timeout_seconds = 0.0
        _all.add(self)

    @contextmanager
    def turn(self, when_busy: str = "wait", *, is_refused: bool = True) -> Iterator[bool]:
        """Gives the caller the right to save while the block runs.

        Args:
          when_busy: "wait" until no other thread has the turn and nothing is running, or "skip".
          is_refused: whether an error of earlier work is raised instead of running the block.
            Otherwise it is raised after the block.

        Returns:
          A context manager; its value says whether the caller has the turn.

        Raises:
          AsyncSaveError: earlier work has failed; the cause is chained. It is raised once.
          RuntimeError: the work itself asks for the turn, and would wait for itself.
        """
        if threading.current_thread() is self._thread:
            if when_busy == "skip":
                yield False
                return
            raise RuntimeError(
                f"{self._what} is under way on this thread, and cannot wait for itself: a write "
                "callback of a save in the background must not save, restore or sync its checkpoint"
            )
        turn = self._turn_of_this_process()
        if not turn.acquire(blocking=when_busy != "skip"):
            yield False
            return
        try:
            is_free = when_busy != "skip" or not self._is_running()
            earlier = self._ended() if is_free else None
            if earlier is not None and is_refused:
                raise earlier
            try:
                yield is_free
            except BaseException:
                self._keep(earlier)
                raise
            if earlier is not None:
                raise earlier
        finally:
            turn.release()

    def _turn_of_this_process(self) -> threading.RLock:
        """The lock of the turn. A forked child gets a new one, because the old one may be held by a
        thread that the child does not have."""
        if self._home != os.getpid():
            self._home, self._turn = os.getpid(), threading.RLock()
            self._thread = None
        return self._turn

    def start(self, work: Callable[[], None], what: str, timeout_seconds: float) -> None:
        """Runs `work` in the background, after the work that is running there has ended.

        Args:
          work: called once.
          what: names it in errors.
          timeout_seconds: how long an exit of the interpreter waits for it.

        Raises:
          AsyncSaveError: earlier work has failed; `work` was not started.
        """
        with self.turn():
            self._what, self._timeout_seconds = what, timeout_seconds
            thread = threading.Thread(target=self._run, args=[work], name="ckpt-save", daemon=True)
            if not _is_over:
                self._is_done.clear()
                self._pid = os.getpid()
                self._thread = thread  # before the start, which may be interrupted
                if started(thread):
                    return
                self._thread = None
        work()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by the next turn
            failed = AsyncSaveError(f"{self._what} failed in the background: {error}")
            failed.__cause__ = error
            self._keep(failed)
        finally:
            self._is_done.set()

    @property
    def is_busy(self) -> bool:
        """Whether something is running in the background."""
        return self._is_running()

    def _is_running(self) -> bool:
        return self._thread is not None and not self._is_done.is_set() and self._pid == os.getpid()

    def _keep(self, error: AsyncSaveError | None) -> None:
        if error is not None:
            self._errors.append(error)
            _failed.add(self)

    def wait(self) -> None:
        """Waits until nothing is running.

        Raises:
          AsyncSaveError: the work has failed; the cause is chained. It is raised once.
        """
        with self.turn():
            pass

    def wait_unless_inside(self) -> None:
        """`wait`, except that the work itself does not wait: it has come far enough to ask.

        Raises:
          AsyncSaveError: what ran has failed; the cause is chained. It is raised once.
        """
        if threading.current_thread() is not self._thread:
            self.wait()

    def _ended(self, timeout_seconds: float | None = None) -> AsyncSaveError | None:
        """Waits until nothing is running; returns an error that was not raised yet."""
        if self._is_running():
            bounded = timeout_seconds is not None and timeout_seconds < threading.TIMEOUT_MAX
            if not self._is_done.wait(timeout_seconds if bounded else None):
                self._is_abandoned = True
                return AsyncSaveError(
                    f"{self._what} did not end within {timeout_seconds} s of the program's exit "
                    "(CheckpointOptions.timeout_seconds) and was abandoned; nothing is at its path"
                    ", unless it had been committed"
                )
        self._thread = None
        if not self._errors:
            return None
        error = self._errors.pop(0)
        if not self._errors:
            _failed.discard(self)
        return error

    def _report_at_exit(self) -> None:
        while not self._is_abandoned and (error := self._ended(self._timeout_seconds)) is not None:
            _log.error("%s", error, exc_info=error.__cause__)


_all: weakref.WeakSet[Background] = weakref.WeakSet()
_failed: set[Background] = set()  # kept alive, because their errors are not raised yet
_is_over = False  # whether the program may exit without waiting for work that begins now


def _report_all_at_exit() -> None:
    global _is_over
    _is_over = True
    for background in [*_all]:
        background._report_at_exit()


# Runs first when the main thread has ended and others may go on, then when all have ended.
getattr(threading, "_register_atexit", atexit.register)(_report_all_at_exit)
atexit.register(_report_all_at_exit)
