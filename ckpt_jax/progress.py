"""Progress: how many bytes of a piece of work are done, for a user's function or for people.

On a terminal there is a bar for each piece of work that is under way, drawn by `rich`. In a
notebook it is a line that changes. Elsewhere, such as in a log file, nothing is shown.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

_log = logging.getLogger("ckpt_jax")
_BAR_WIDTH = 16
_NUMBERS_WIDTH = 44  # of the columns beside the bar, at most
_REFRESH_SECONDS = 0.1

Report = Callable[[int, int], object]
Wanted = bool | Report | None
Advance = Callable[[int], None]


@contextmanager
def progress(wanted: Wanted, what: str, total: int) -> Iterator[Advance]:
    """Reports progress while the block runs.

    Args:
      wanted: a function `(done_bytes, total_bytes)`; True for a bar on stderr, if that is a
        terminal or a notebook; None or False for nothing.
      what: the name of the work, for people.
      total: the number of bytes to save or restore.

    Returns:
      A context manager. Its value is a function to call, on any thread, with the bytes done since
      the last call. The reported numbers begin with 0, never decrease, and end with the total if
      the block succeeds. The report is called by one thread at a time.
    """
    report = wanted if callable(wanted) else _shown(what, total) if wanted else None
    if report is None:
        yield lambda nbytes: None
        return
    tally = _Tally(report, total)
    try:
        tally.advance(0)
        yield tally.advance
        tally.finish()
    finally:
        if isinstance(report, Bar | Line):
            report.end()


def _shown(what: str, total: int) -> Bar | Line | None:
    """What shows the progress of a piece of work; None if there is nobody who looks."""
    if sys.stderr is not None and sys.stderr.isatty():  # pythonw and daemons have none
        return Bar(what, total)
    # Notebooks redraw a line, as terminals do.
    is_notebook = type(sys.stdout).__module__ == "ipykernel.iostream"
    return Line(what, sys.stdout) if is_notebook else None


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


class Bar:
    """A bar on a terminal, below those of other work that is under way."""

    _lock = threading.Lock()
    _display: Progress | None = None  # of all bars; None if there are none
    _number = 0  # of bars that are under way
    _drawn = 0.0  # when the bars were drawn last

    def __init__(self, what: str, total: int):
        cls = type(self)
        with cls._lock:
            if cls._display is None:
                cls._display = _bars(sys.stderr)
                cls._display.start()
            cls._number += 1
            self._shown = cls._display
            # A file of no bytes is done at once; a bar of no length would never be.
            room = cls._display.console.width - _NUMBERS_WIDTH - _BAR_WIDTH
            self._task = cls._display.add_task(_shortened(what, room), total=max(total, 1))

    def __call__(self, done: int, total: int) -> None:
        cls = type(self)
        with cls._lock:
            self._shown.update(self._task, completed=done if total else 1)
            now = time.monotonic()
            if done >= total or now - cls._drawn >= _REFRESH_SECONDS:
                cls._drawn = now
                self._shown.refresh()

    def end(self) -> None:
        """Leaves the bar as it is. The last one that ends gives the terminal back."""
        cls = type(self)
        with cls._lock:
            cls._number -= 1
            self._shown.stop_task(self._task)
            if not cls._number:
                self._shown.stop()
                cls._display = None


def _shortened(what: str, room: int) -> str:
    """The name of the work, with the end of a long path: the numbers matter more.

    >>> _shortened("saving /home/me/runs/a/ckpt-12", 20)
    'saving …runs/a/ckpt-12'
    """
    verb, _, path = what.partition(" ")
    return what if len(what) <= max(room, 20) else f"{verb} …{path[-max(room - len(verb), 14) :]}"


def _bars(stream: TextIO) -> Progress:
    # Only a terminal needs it, and the import takes a while.
    from rich import console
    from rich import progress as bars  # as above

    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(_BAR_WIDTH),
        bars.TaskProgressColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
        console=console.Console(file=stream),
        auto_refresh=False,  # no thread of its own
        redirect_stdout=False,  # a program's streams stay its own
        redirect_stderr=False,
    )


class Line:
    """One line that is redrawn whenever it changes."""

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
