"""Patience: how long a process may wait for others, all waits of one save together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST_SECONDS = 1e9  # no wait is longer: every clock accepts this
_FAREWELL_SECONDS = 5.0  # to tell the others of a failure, if no patience is left


class Patience:
    """Seconds that a process may spend on waiting. What it does in between costs none.

    Args:
      seconds: for all waits together.
      clock: returns seconds.

    Attributes:
      seconds: as given.

    Example:
      >>> now = [0.0]
      >>> patience = Patience(10, clock=lambda: now[0])
      >>> with patience.waiting() as left:
      ...     now[0] += 4
      ...     left()
      6.0
      >>> now[0] += 100
      >>> patience.left
      6.0
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds = min(seconds, _LONGEST_SECONDS)
        self._clock = clock
        self._left = self.seconds

    @property
    def left(self) -> float:
        """Seconds that are left; 0 if none are."""
        return max(self._left, 0.0)

    @property
    def for_farewell(self) -> float:
        """Seconds for an answer of the service that nobody else has to come for. A few of them are
        there even if no patience is left."""
        return max(self.left, min(_FAREWELL_SECONDS, self.seconds / 4))

    @contextmanager
    def waiting(self) -> Iterator[Callable[[], float]]:
        """Counts the time in the block as waiting. Its value says how many seconds are left."""
        started, before = self._clock(), self._left
        try:
            yield lambda: max(before - (self._clock() - started), 0.0)
        finally:
            self._left = before - (self._clock() - started)
