"""Progress: how many bytes of a save or restore are done, for a user's function or a terminal."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_log = logging.getLogger("ckpt_jax")
_BAR_WIDTH = 30

Report = Callable[[int, int], object]
Wanted = bool | Report | None
Advance = Callable[[int], None]


@contextmanager
def progress(wanted: Wanted, what: str, total: int) -> Iterator[Advance]:
    """Reports progress while the block runs.

    Args:
      wanted: a function `(done_bytes, total_bytes)`; True for a line on stderr, if that is a
        terminal; None or False for nothing.
      what: the name of the work on the terminal.
      total: the number of bytes to save or restore.

    Returns:
      A context manager. Its value is a function to call, on any thread, with the bytes done since
      the last call. The reported numbers begin with 0, never decrease, and end with the total if
      the block succeeds. The report is called by one thread at a time.
    """
    if callable(wanted):
        report = wanted
    elif wanted and sys.stderr.isatty():
        report = Line(what, sys.stderr)
    else:
        yield lambda nbytes: None
        return
    tally = _Tally(report, total)
    try:
        tally.advance(0)
        yield tally.advance
        tally.finish()
    finally:
        if isinstance(report, Line):
            report.end()


class _Tally:
    """Adds up the bytes of all threads, and calls the report for one thread at a time."""

    def __init__(self, report: Report, total: int):
        self._report: Report | None = report
        self._total = total
        self._done = 0
        self._last = -1
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done = min(self._done + nbytes, self._total)
            self._tell()

    def finish(self) -> None:
        with self._lock:
            self._done = self._total
            self._tell()

    def _tell(self) -> None:
        if self._report is None or self._done == self._last:
            return
        self._last = self._done
        try:
            self._report(self._done, self._total)
        except Exception:  # an error in showing the progress must not make a save fail
            self._report = None
            _log.exception("the progress function failed, and is not called again")


class Line:
    """One line on a terminal that is redrawn whenever it changes."""

    def __init__(self, what: str, stream: TextIO):
        self._what, self._stream = what, stream
        self._shown = ""

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        bar = "#" * int(share * _BAR_WIDTH)
        text = f"{self._what} [{bar:<{_BAR_WIDTH}}] {share:4.0%} of {total / 1e6:.1f} MB"
        if text != self._shown:
            self._shown = text
            self._stream.write(f"\r{text}")
            self._stream.flush()

    def end(self) -> None:
        """Ends the line, so that the next output begins a new one."""
        self._stream.write("\n")
        self._stream.flush()
