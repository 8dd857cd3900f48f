"""Decides when the next checkpoint is due.

Either a policy says so (`manage.due`), or an interval, or every save is due.

The interval is a number of steps. It usually counts from the step of the last save. If the program
restores a checkpoint, it counts from the step where the program is after that. If the step is ever
smaller than before, the program has gone back by other means. Then the interval counts from the
last saved step that is not larger, or from the present step if there is none. A policy is told the
step from which to count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_jax.manage.due import SaveOccasion, SavePolicy
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.store.directory import number_of


@dataclass(frozen=True, slots=True)
class Position:
    """The position of the program in its run, as far as saving is concerned.

    Attributes:
      last: the step of the last save, or of a checkpoint of the directory that was restored after
        it; None if the next save is due in any case.
      origin: the step from which the interval counts; None if the next save is due in any case.
      saved: the steps up to `origin` that are known to be saved.
      path: the checkpoint that was saved or restored at `last`.
      time: when that save began, or when the checkpoint was restored.
      is_due: whether the next save is due in any case, whatever a policy says.
    """

    last: int | None = None
    origin: int | None = None
    saved: tuple[int, ...] = ()
    path: str | None = None
    time: float | None = None
    is_due: bool = False

    def at(self, step: int, path: str | None, time: float | None) -> Position:
        """The position after a save, or after the restore of a checkpoint of the directory."""
        before = [saved for saved in self.saved if saved < step]
        return Position(step, step, (*before, step), path, time)

    def seen_from(self, step: int) -> Position:
        """The position after the program has come to a step."""
        if self.origin is None or step >= self.origin:
            return self
        before = tuple([saved for saved in self.saved if saved <= step])
        return replace(self, origin=max(before, default=step), saved=before)


class Schedule:
    """Says whether a checkpoint is due, given the steps at which the program asks.

    Args:
      step: returns the present step; None if only the numbers of checkpoints say it. It is not
        called if there is neither an interval nor a policy.
      interval: the least number of steps between two saves; None if every save is due.
      last_step: the step of the last save; None if there was none.
      policy: says when a save is due, in place of an interval.
      clock: returns the time in seconds since the epoch.

    Attributes:
      policy: the same.
    """

    def __init__(
        self,
        step: Callable[[], int] | None,
        interval: int | None,
        last_step: int | None,
        policy: SavePolicy | None,
        clock: Callable[[], float],
    ):
        self.policy, self._clock = policy, clock
        self._step = None if interval is None and policy is None else step
        self._interval = interval or 0
        self._position = Position()
        if last_step is not None:
            self._position = self._position.at(last_step, None, None)
        # The positions before saves that failed, while other processes may not know of the failure.
        self._failed: list[Position] = []
        self._lock = threading.RLock()

    def step(self, number: int | None = None) -> int | None:
        """The present step; None if it is not known, or if neither an interval nor a policy asks.

        Args:
          number: of the checkpoint, which says the step if there is a policy and no step counter.

        Raises:
          TypeError: the step counter holds no integer.
        """
        if self._step is not None:
            return self._step()
        return number if self.goes_by_numbers else None

    @property
    def goes_by_numbers(self) -> bool:
        """Whether the numbers of checkpoints are the steps: there is a policy, and no counter."""
        return self.policy is not None and self._step is None

    def is_due(self, step: int | None, check_interval: bool) -> bool | None:
        """Whether to save at a step; None if the policy has to say it, see `occasion`.

        Args:
          step: the present step, as `step` gives it.
          check_interval: whether the interval or the policy counts. No save is due at the step of
            the last save, whether it counts or not.
        """
        if step is None:
            is_asked = self.policy is not None and check_interval and not self._position.is_due
            return None if is_asked else True
        with self._lock:
            position = self._position = self._position.seen_from(step)
        if position.is_due:
            return True
        if step == position.last:
            return False
        if self.policy is not None:
            return None if check_interval else True
        if position.origin is None:
            return True
        return not check_interval or step >= position.origin + self._interval

    def occasion(self, step: int | None, *, is_saving: bool, is_preempted: bool) -> SaveOccasion:
        """The facts by which a policy decides at a step."""
        position = self._position
        return SaveOccasion(
            step, self._clock(), position.origin, position.time, is_saving, is_preempted
        )

    @property
    def position(self) -> Position:
        """The present position, for `undo`."""
        return self._position

    def began(self, step: int | None, path: str) -> None:
        """Notes that a save has begun."""
        self._failed.clear()
        position, now = self._position, self._clock()
        if step is None:
            self._position = replace(position, path=path, time=now, is_due=False)
        else:
            self._position = position.at(step, path, now)

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
        step = self.step(number_of(path or ""))
        with self._lock:
            if self.policy is not None:
                self._position = replace(self._position, time=self._clock())
            if step is None:
                return
            if path is not None:
                self._position = self._position.at(step, path, self._clock())
            elif self._position.last is not None:
                self._position = replace(self._position.seen_from(step), origin=step)

    def make_due(self) -> None:
        """Makes the next save due, whatever the step."""
        self._position = replace(self._position, last=None, origin=None, is_due=True)

    def has_saved(self, latest: str | None, step: int | None = None) -> bool:
        """Whether `latest` is a checkpoint of the step where the program is.

        Args:
          latest: the path of the latest checkpoint.
          step: where the program is, if a policy goes by the numbers of checkpoints.
        """
        position, step = self._position, self.step(step)
        is_latest = position.path is not None and position.path == latest
        return is_latest and step is not None and step == position.last
