"""Asking process 0 whether a save is due, if that depends on more than the step.

Each answer is one key of the coordination service, which all other processes read. So that short
steps do not ask all the time, an answer also says how many of the next calls need not ask: as many
as fit into about a second, by the pace of those before, and never many more than the last time. All
processes leave out the same calls.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpt_jax.processes.meeting import Processes
from ckpt_jax.processes.patience import Patience

_SECONDS = 1.0  # between two questions
_MOST_CALLS = 20  # between two questions: the next steps may be much longer than those before


class Asking:
    """The questions of one manager.

    Args:
      clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._left_out = 0  # of the calls since the last question
        self._quiet = 0  # how many calls need not ask
        self._asked: float | None = None  # when, on process 0

    def is_due(self, processes: Processes, patience: Patience, answer: Callable[[], bool]) -> bool:
        """Whether a save is due, the same on all processes.

        Args:
          processes: of the program. All of them call this equally often.
          patience: for process 0.
          answer: says whether it is; called on process 0.
        """
        if processes.count == 1:
            return answer()
        if self._left_out < self._quiet:
            self._left_out += 1
            return False
        with processes.meeting("asking whether a save is due", patience) as meeting:
            said = meeting.led([answer(), self._next_quiet()] if meeting.leads else None)
        self._left_out, self._quiet = 0, int(said[1])
        return bool(said[0])

    def _next_quiet(self) -> int:
        now, before, self._asked = self._clock(), self._asked, self._clock()
        if before is None or now <= before:
            return 0
        pace = (now - before) / (self._left_out + 1)
        return min(int(_SECONDS / pace), 2 * self._quiet + 1, _MOST_CALLS)
