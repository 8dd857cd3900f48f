"""When the next checkpoint is due.

The interval counts from where the program is. It usually counts from the step of the last save. If
the program restores a checkpoint, it counts from the step at which that leaves the program. If a
step comes that is smaller than the one before, the program has gone back by other means; then the
interval counts from the last step up to there that was saved, or from that step if none was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_jax.processes.meeting import Meeting


@dataclass(frozen=True, slots=True)
class Position:
    """Where the program is, as far as saving is concerned.

    Attributes:
      last: the step of the last save, or of the checkpoint of the directory that was restored after
        it; None if there is none, or if the next save is due in any case.
      origin: the step from which the interval counts; None if the next save is due in any case.
      saved: the steps up to there that are known to be saved.
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
        """The position of a program that has come to a step."""
        if self.origin is None or step >= self.origin:
            return self
        before = tuple([saved for saved in self.saved if saved <= step])
        return replace(self, origin=max(before, default=step), saved=before)


class Schedule:
    """Says whether a checkpoint is due, given the steps at which the program asks.

    Args:
      step: the present step; None if there is no interval.
      interval: the least number of steps between two saves; None if every save is due.
      last_step: of the last save; None if there was none.
    """

    def __init__(self, step: Callable[[], int] | None, interval: int | None, last_step: int | None):
        self._step = step if interval is not None else None
        self._interval = interval or 0
        self._position = Position()
        if last_step is not None:
            self._position = self._position.at(last_step, None)
        # Positions before saves that have failed, of which other processes may not know yet.
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
          step: where the program is.
          check_interval: whether the interval counts. The step of the last save is not due in
            any case.
        """
        if step is None:
            return True
        with self._lock:
            position = self._position = self._position.seen_from(step)
        if position.last is None and position.origin is None:
            return True
        if step == position.last:
            return False
        origin = position.origin
        return not check_interval or origin is None or step >= origin + self._interval

    @property
    def position(self) -> Position:
        """Where the program is, for `undo`."""
        return self._position

    def began(self, step: int | None, path: str) -> None:
        """Notes that a save has begun."""
        self._failed.clear()
        position = self._position
        self._position = replace(position, path=path) if step is None else position.at(step, path)

    def undo(self, before: Position, path: str, meeting: Meeting, *, is_async: bool) -> None:
        """Notes that a save to `path` has failed, which has begun at a position.

        Other processes may not know of it yet, and all of them have to find the same steps due;
        then it counts when they synchronise.
        """
        if self._position.path != path:
            return  # another save has begun since
        if meeting.count == 1 or not (is_async or meeting.is_in_doubt):
            self._position = before
        elif not meeting.is_in_doubt:
            self._failed.append(before)

    def synchronised(self) -> None:
        """Lets a save that had failed in the background count: all processes know of it now."""
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
