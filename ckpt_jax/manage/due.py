"""When to save: policies that say whether a checkpoint is due.

A policy is a frozen value with one pure method. The program offers to save at each step, with
`CheckpointManager.save(step)`; the method takes the facts of this *occasion* and says whether a
save is due. A step is a number that grows. The program need not offer every step: a policy that
waits for a step takes the first one that is offered at it or after it, so that none is missed.

A condition on the step alone is the same on all processes. For everything else, such as the time,
process 0 answers for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ckpt_jax.manage.ranges import require_real, require_whole


@dataclass(frozen=True, slots=True)
class SaveOccasion:
    """The facts about a moment at which the program offers to save.

    Attributes:
      step: the training step; None if the program does not say it.
      time: the present time, in seconds since the epoch, by the manager's clock.
      last_step: the step from which to count: of the last save, or of the checkpoint that was
        restored after it. If the program has gone back to an earlier step, the largest saved step
        that is not after it. None if there is none.
      last_time: when the last save began, or when a checkpoint was restored after it; None if
        neither has happened.
      is_saving: whether a save in the background is not finished.
      is_preempted: whether a `PreemptionHandler` of this manager has had a notice.

    Example:
      >>> SaveOccasion(7, 1000.0, last_step=5).step
      7
    """

    step: int | None
    time: float = 0.0
    last_step: int | None = None
    last_time: float | None = None
    is_saving: bool = False
    is_preempted: bool = False

    def passes(self, step: int) -> bool:
        """Whether this is the first occasion at `step`, or after it.

        >>> [SaveOccasion(n, last_step=95).passes(100) for n in (99, 100, 104)]
        [False, True, True]
        """
        return (self.last_step is None or self.last_step < step) and step <= self.known_step

    @property
    def known_step(self) -> int:
        """The training step.

        Raises:
          ValueError: the program does not say it.
        """
        if self.step is None:
            raise ValueError(
                "a policy asks for the training step, but the program does not say it. Pass it to "
                "each save: manager.save(step), or give the manager a step_counter."
            )
        return self.step

    @property
    def seconds(self) -> float | None:
        """The time since `last_time`; None if that is not known, or if the clock went back."""
        if self.last_time is None or self.time < self.last_time:
            return None
        return self.time - self.last_time


@runtime_checkable
class SavePolicy(Protocol):
    """Says whether a checkpoint is due. Pass it to a manager: `policies=[...]`.

    If there are several such policies, a save is due if one of them says so.

    Example:
      >>> class SaveOnPrimes:
      ...     def due(self, occasion):
      ...         return occasion.step in (2, 3, 5, 7)
      >>> isinstance(SaveOnPrimes(), SavePolicy)
      True
    """

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether to save on this occasion."""
        ...


@dataclass(frozen=True, slots=True)
class SaveEveryNSteps:
    """Saves once for each multiple of `steps`: at the first step that is offered at or after it.

    `KeepEveryNSteps` chooses the same steps. Before the first save, 0 counts only if it is offered.

    Raises:
      ValueError: `steps` is not positive.

    Example:
      >>> policy = SaveEveryNSteps(100)
      >>> [policy.due(SaveOccasion(step, last_step=90)) for step in (99, 100, 107)]
      [False, True, True]
    """

    steps: int

    def __post_init__(self) -> None:
        require_whole(1, steps=self.steps)

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether a multiple lies between the last step and this one."""
        multiple = occasion.known_step // self.steps * self.steps
        is_there = occasion.passes(multiple)
        return is_there and (multiple > 0 or occasion.known_step == 0)


@dataclass(frozen=True, slots=True)
class SaveAtSteps:
    """Saves once for each of some steps: at the first step that is offered at or after it.

    Raises:
      ValueError: there are no steps.

    Example:
      >>> policy = SaveAtSteps((10, 1000))
      >>> [policy.due(SaveOccasion(step, last_step=9)) for step in (9, 10, 11)]
      [False, True, True]
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        steps = {*self.steps}  # once: it may be an iterator
        for step in steps:
            require_whole(0, steps=step)
        object.__setattr__(self, "steps", tuple(sorted(steps)))
        if not self.steps:
            raise ValueError("expected at least one step, got none")

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether one of the steps lies between the last step and this one."""
        return any(map(occasion.passes, self.steps))


@dataclass(frozen=True, slots=True)
class SaveEveryNSeconds:
    """Saves if the last save began at least `seconds` ago, or if nothing was saved or restored yet.

    Raises:
      ValueError: `seconds` is not positive.

    Example:
      >>> policy = SaveEveryNSeconds(600)
      >>> [policy.due(SaveOccasion(7, time, last_time=1000.0)) for time in (1500.0, 1600.0)]
      [False, True]
    """

    seconds: float

    def __post_init__(self) -> None:
        require_real(is_positive=True, seconds=self.seconds)

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether enough time has passed."""
        return occasion.seconds is None or occasion.seconds >= self.seconds


@dataclass(frozen=True, slots=True)
class SaveContinuously:
    """Saves whenever no save in the background is under way, so that training never waits for one.

    Use it with `CheckpointOptions(enable_async=True)`.

    Attributes:
      min_interval_seconds: the least time between the beginnings of two saves.

    Raises:
      ValueError: `min_interval_seconds` is negative.

    Example:
      >>> policy = SaveContinuously(min_interval_seconds=60)
      >>> policy.due(SaveOccasion(7, 1100.0, last_time=1000.0))
      True
      >>> policy.due(SaveOccasion(7, 1100.0, last_time=1000.0, is_saving=True))
      False
    """

    min_interval_seconds: float = 0.0

    def __post_init__(self) -> None:
        require_real(min_interval_seconds=self.min_interval_seconds)

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether nothing is being saved, and enough time has passed."""
        seconds = occasion.seconds
        return not occasion.is_saving and (seconds is None or seconds >= self.min_interval_seconds)


@dataclass(frozen=True, slots=True)
class SaveOnPreemption:
    """Saves if the program is told to end, as a `PreemptionHandler` of the manager hears it.

    The handler's `reached` saves in any case. With this policy, `manager.save(step)` before it does
    so, with the number, the values and the metrics that the program gives; `reached` then finds the
    step saved. If there are several processes, the notice of process 0 counts.

    Example:
      >>> SaveOnPreemption().due(SaveOccasion(7, is_preempted=True))
      True
    """

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether a notice has come."""
        return occasion.is_preempted


@dataclass(frozen=True, slots=True)
class SaveAny:
    """Saves if at least one of several policies says so.

    Raises:
      TypeError: one of them is no such policy.
      ValueError: there are none.

    Example:
      >>> policy = SaveAny((SaveAtSteps((10,)), SaveEveryNSteps(1000)))
      >>> [policy.due(SaveOccasion(step, last_step=step - 1)) for step in (9, 10, 1000)]
      [False, True, True]
    """

    policies: tuple[SavePolicy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        for policy in self.policies:
            if not isinstance(policy, SavePolicy):
                raise TypeError(f"expected a policy that says when to save, got {policy!r}")
        if not self.policies:
            raise ValueError("expected at least one policy that says when to save, got none")

    def due(self, occasion: SaveOccasion) -> bool:
        """Whether one of them says so."""
        return any([policy.due(occasion) for policy in self.policies])


def parted(policy: SavePolicy) -> tuple[list[SavePolicy], list[SavePolicy]]:
    """The policies of which a policy is made: those that are known to depend on steps alone, so
    that all processes answer alike, and the others.

    >>> parted(SaveAny((SaveAtSteps((1,)), SaveEveryNSeconds(60))))
    ([SaveAtSteps(steps=(1,))], [SaveEveryNSeconds(seconds=60)])
    """
    by_step: list[SavePolicy] = []
    others: list[SavePolicy] = []
    for part in policy.policies if isinstance(policy, SaveAny) else ():
        found = parted(part)
        by_step += found[0]
        others += found[1]
    if not isinstance(policy, SaveAny):
        (by_step if isinstance(policy, SaveEveryNSteps | SaveAtSteps) else others).append(policy)
    return by_step, others
