"""Decides when the next checkpoint is due.

The interval is a number of steps. It usually counts from the step of the last save. If the program
restores a checkpoint, it counts from the step where the program is after that. If the step is ever
smaller than before, the program has gone back by other means. Then the interval counts from the
last saved step that is not larger, or from the present step if there is none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_jax.processes.meeting import Meeting


@dataclass(frozen=True, slots=True)
class Position:
    """The position of the program in its run, as far as saving is concerned.

    Attributes:
      last: the step of the last save, or of a checkpoint of the directory that was restored after
        it; None if the next save is due in any case.
      origin: the step from which the interval counts; None if the next save is due in any case.
      saved: the steps up to `origin` that are known to be saved.
      path: the checkpoint that was saved or restored at `last`.
    """

    last: int | None = None
    origin: int | None = None
    saved: tuple[int, ...] = ()
    path: str | None = None

    def at(self, step: int, path: str | None) -> Position:
        """The position after a save, or after the restore of a checkpoint of the directory."""
        before = [saved for saved in self.saved if saved < step]
        return Position(step, step, (*before, step), path)

    def seen_from(self, step: int) -> Position:
        """The position after the program has come to a step."""
        if self.origin is None or step >= self.origin:
            return self
        before = tuple([saved for saved in self.saved if saved <= step])
        return replace(self, origin=max(before, default=step), saved=before)


class Schedule:
    """Says whether a checkpoint is due, given the steps at which the program asks.

    Args:
      step: returns the present step. It is not called if there is no interval.
      interval: the least number of steps between two saves; None if every save is due.
      last_step: the step of the last save; None if there was none.
    """

    def __init__(self, step: Callable[[], int], interval: int | None, last_step: int | None):
        self._step = step if interval is not None else None
        self._interval = interval or 0
        self._position = Position()
        if last_step is not None:
            self._position = self._position.at(last_step, None)
        # The positions before saves that failed, while other processes may not know of the failure.
        self._failed: list[Position] = []
        self._lock = threading.RLock()

    def step(self) -> int | None:
        """The present step; None if there is no interval.

        Raises:
          TypeError: the step counter holds no integer.
        """
        return None if self._step is None else self._step()

    def is_due(self, step: int | None, check_interval: bool) -> bool:
        """Whether to save at a step.

        Args:
          step: the present step; None if there is no interval.
          check_interval: whether the interval counts. No save is due at the step of the last save,
            whether it counts or not.
        """
        if step is None:
            return True
        with self._lock:
            position = self._position = self._position.seen_from(step)
        if position.origin is None:
            return True
        if step == position.last:
            return False
        return not check_interval or step >= position.origin + self._interval

    @property
    def position(self) -> Position:
        """The present position, for `undo`."""
        return self._position

    def began(self, step: int | None, path: str) -> None:
        """Notes that a save has begun."""
        self._failed.clear()
        position = self._position
        self._position = replace(position, path=path) if step is None else position.at(step, path)

    def undo(self, before: Position, path: str, meeting: Meeting, *, is_async: bool) -> None:
        """Notes that a save to `path` has failed, and goes back to the position before it.

        All processes have to find the same steps due. If other processes may not know of the
        failure yet, the position changes only when they synchronise.
        """
        if self._position.path != path:
            return  # another save has begun since
        if meeting.count == 1 or not (is_async or meeting.is_in_doubt):
            self._position = before
        elif not meeting.is_in_doubt:
            self._failed.append(before)

    def synchronised(self) -> None:
        """Goes back to the position before a failed save: all processes know of the failure now."""
        if self._failed:
            self._position = self._failed.pop()

    def restored(self, path: str | None) -> None:
        """Notes that the program has restored a checkpoint.

        Args:
          path: of the checkpoint, if it is one of the directory; else None.

        Raises:
          TypeError: the step counter holds no integer.
        """
        step = self.step()
        if step is None:
            return
        with self._lock:
            if path is not None:
                self._position = self._position.at(step, path)
            elif self._position.last is not None:
                self._position = replace(self._position.seen_from(step), origin=step)

    def make_due(self) -> None:
        """Makes the next save due, whatever the step."""
        self._position = replace(self._position, last=None, origin=None)

    def has_saved(self, latest: str | None) -> bool:
        """Whether `latest` is a checkpoint of the step where the program is."""
        position, step = self._position, self.step()
        is_latest = position.path is not None and position.path == latest
        return is_latest and step is not None and step == position.last
