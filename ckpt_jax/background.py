"""Work behind the program's back: one piece at a time, errors raised once and never lost.

A thread that is no daemon does the work, so that a normal exit of the interpreter waits for it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable

from ckpt_jax.errors import AsyncSaveError

_log = logging.getLogger("ckpt_jax")


class Background:
    """Runs one function at a time on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._what = ""
        _all.add(self)

    def start(self, work: Callable[[], None], what: str) -> None:
        """Runs `work` in the background, after what is running there has ended.

        Args:
          work: called once.
          what: names it in errors.

        Raises:
          AsyncSaveError: what ran before has failed; `work` was not started.
        """
        self.wait()
        self._what = what
        self._thread = threading.Thread(target=self._run, args=[work], name="ckpt-save")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by the next wait()
            self._error = error

    def wait(self) -> None:
        """Waits until nothing is running.

        Raises:
          AsyncSaveError: what ran has failed; the cause is chained. It is raised once.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise AsyncSaveError(f"{self._what} failed in the background: {error}") from error

    def _report_at_exit(self) -> None:
        try:
            self.wait()
        except AsyncSaveError as error:
            _log.error("%s", error, exc_info=error.__cause__)


_all: weakref.WeakSet[Background] = weakref.WeakSet()


def _report_all_at_exit() -> None:
    for background in list(_all):
        background._report_at_exit()


# Before the thread pools that the work uses are shut down, which is earlier than `atexit`.
getattr(threading, "_register_atexit", atexit.register)(_report_all_at_exit)
