"""Retention: policies that choose the checkpoints of a directory to keep.

A policy is a frozen value with one pure method. The method takes the records of the checkpoints and
returns the numbers of those to keep. `plan_sweep` then decides what happens to each checkpoint.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from ckpt_jax.manage.ranges import require_kind, require_real, require_whole


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The facts about a checkpoint that a retention policy goes by.

    Attributes:
      number: the number in its name.
      time: when it was recorded, in seconds since the epoch, by the manager's clock.
      metrics: the metrics that were given to `CheckpointManager.save`.
      path: of the checkpoint.
      is_abandoned: whether the program has gone back to an earlier step and has saved from there.
      origin: the number of the checkpoint that the program had saved or restored before; None if
        there is none.

    Example:
      >>> CheckpointRecord(3, metrics={"loss": 0.5}).number
      3
    """

    number: int
    time: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    path: str = ""
    is_abandoned: bool = False
    origin: int | None = None


@runtime_checkable
class RetentionPolicy(Protocol):
    """Chooses the checkpoints that stay.

    If there are several policies, a checkpoint is removed only if none of them keeps it. The latest
    checkpoint stays in any case.

    Example:
      >>> class KeepPrimes:
      ...     def keep(self, records):
      ...         return {r.number for r in records if r.number in (2, 3, 5, 7)}
      >>> isinstance(KeepPrimes(), RetentionPolicy)
      True
    """

    def keep(self, records: tuple[CheckpointRecord, ...]) -> Collection[int]:
        """The numbers to keep.

        Args:
          records: all managed checkpoints: first those on abandoned branches, then the others, both
            in the order of numbers. The latest comes last.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeepLatest:
    """Keeps the last `count` checkpoints.

    Raises:
      ValueError: `count` is not positive.

    Example:
      >>> sorted(KeepLatest(2).keep(tuple(map(CheckpointRecord, [1, 2, 3]))))
      [2, 3]
    """

    count: int

    def __post_init__(self) -> None:
        require_whole(1, count=self.count)

    def keep(self, records: tuple[CheckpointRecord, ...]) -> frozenset[int]:
        """The numbers of the last `count` checkpoints."""
        return frozenset(record.number for record in records[-self.count :])


@dataclass(frozen=True, slots=True)
class KeepEveryNSteps:
    """Keeps one checkpoint for each multiple of `steps`: the first one at or after it.

    That is the multiple itself if it was saved. If the saves miss the multiples (1, 11, 21, ...),
    it is the next number that was saved, as long as it comes before the next multiple. Of the
    numbers below `steps`, only 0 is kept.

    The numbers are those in the names: pass `checkpoint_number=` to `save` to use training steps.

    Raises:
      ValueError: `steps` is not positive.

    Example:
      >>> sorted(KeepEveryNSteps(100).keep(tuple(map(CheckpointRecord, [50, 100, 150, 200]))))
      [100, 200]
      >>> sorted(KeepEveryNSteps(50).keep(tuple(map(CheckpointRecord, range(1, 122, 10)))))
      [51, 101]
    """

    steps: int

    def __post_init__(self) -> None:
        require_whole(1, steps=self.steps)

    def keep(self, records: tuple[CheckpointRecord, ...]) -> frozenset[int]:
        """The first number at or after each multiple."""
        first: dict[int, int] = {}
        for record in records:
            multiple = record.number // self.steps
            first[multiple] = min(record.number, first.get(multiple, record.number))
        return frozenset(number for multiple, number in first.items() if multiple or not number)


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keeps the `count` checkpoints with the best value of a metric.

    Of two equal values, the one with the larger number is better. A checkpoint with NaN is not
    kept.

    Attributes:
      metric: its name in `CheckpointManager.save(metrics=...)` or `record_metrics`.
      count: how many to keep.
      mode: whether "max" or "min" is the best value.
      awaiting: how many of the latest checkpoints that do not have the metric yet are kept, so that
        an evaluator can record it. If it is 0, a save that gives metrics has to give this one.

    Raises:
      ValueError: `count` is not positive, `awaiting` is negative, or the mode is unknown.

    Example:
      >>> records = tuple(CheckpointRecord(n, 0.0, {"loss": 1 / n}) for n in (1, 2, 3))
      >>> sorted(KeepBest("loss", count=2, mode="min").keep(records))
      [2, 3]
      >>> records += (CheckpointRecord(4), CheckpointRecord(5), CheckpointRecord(6))
      >>> sorted(KeepBest("loss", count=1, mode="min", awaiting=2).keep(records))
      [3, 5, 6]
    """

    metric: str
    count: int = 1
    mode: Literal["max", "min"] = "max"
    awaiting: int = 0

    def __post_init__(self) -> None:
        require_kind(str, "the name of a metric", metric=self.metric)
        require_whole(1, count=self.count)
        require_whole(0, awaiting=self.awaiting)
        if self.mode not in ("max", "min"):
            raise ValueError(f"expected mode 'max' or 'min', got {self.mode!r}")

    def keep(self, records: tuple[CheckpointRecord, ...]) -> frozenset[int]:
        """The numbers of the best checkpoints."""
        sign = 1 if self.mode == "max" else -1
        ranked = sorted(
            (sign * value, record.number)
            for record in records
            if not math.isnan(value := record.metrics.get(self.metric, math.nan))
        )
        best = [number for _, number in ranked[-self.count :]]
        if self.awaiting:
            unmeasured = [each.number for each in records if self.metric not in each.metrics]
            best += unmeasured[-self.awaiting :]
        return frozenset(best)


@dataclass(frozen=True, slots=True)
class KeepFor:
    """Keeps each checkpoint for a duration.

    Ages are those at the time of the latest checkpoint. So a program that was stopped for a week
    finds all that it had when it goes on.

    Raises:
      ValueError: `seconds` is not positive.

    Example:
      >>> records = tuple(CheckpointRecord(n, time=100.0 * n) for n in (1, 2, 3))
      >>> sorted(KeepFor(seconds=100).keep(records))
      [2, 3]
    """

    seconds: float

    def __post_init__(self) -> None:
        require_real(is_positive=True, seconds=self.seconds)

    def keep(self, records: tuple[CheckpointRecord, ...]) -> frozenset[int]:
        """The numbers of the checkpoints that are young enough."""
        if not records:
            return frozenset()
        now = records[-1].time
        return frozenset(each.number for each in records if now - each.time <= self.seconds)


@dataclass(frozen=True, slots=True)
class KeepAny:
    """Keeps each checkpoint that at least one of several policies keeps.

    Raises:
      TypeError: one of them is not a policy.

    Example:
      >>> policy = KeepAny((KeepLatest(1), KeepEveryNSteps(2)))
      >>> sorted(policy.keep(tuple(map(CheckpointRecord, [1, 2, 3]))))
      [2, 3]
    """

    policies: tuple[RetentionPolicy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        for policy in self.policies:
            if not isinstance(policy, RetentionPolicy):
                raise TypeError(f"expected a retention policy, got {policy!r}; it has no keep()")

    def keep(self, records: tuple[CheckpointRecord, ...]) -> frozenset[int]:
        """The numbers that at least one policy keeps."""
        return frozenset().union(*(_kept(policy, records) for policy in self.policies))


@dataclass(frozen=True, slots=True)
class Sweep:
    """The managed checkpoints in three groups: to keep, to preserve, or to remove."""

    keep: tuple[CheckpointRecord, ...]
    preserve: tuple[CheckpointRecord, ...]  # kept forever, no longer managed
    remove: tuple[CheckpointRecord, ...]
    last_preserved: float


def plan_sweep(
    records: tuple[CheckpointRecord, ...],
    policy: RetentionPolicy,
    preserve_interval_seconds: float | None,
    last_preserved: float,
) -> Sweep:
    """Decides what happens to each managed checkpoint.

    Args:
      records: the managed checkpoints, the latest last.
      policy: chooses the checkpoints to keep besides the latest.
      preserve_interval_seconds: the least time between two checkpoints that are kept forever; None
        keeps none forever.
      last_preserved: when the newest checkpoint that is kept forever was saved, in seconds since
        the epoch.
    """
    numbers = {*_kept(policy, records), *(record.number for record in records[-1:])}
    preserve: list[CheckpointRecord] = []
    remove: list[CheckpointRecord] = []
    for record in records:
        if record.number in numbers:
            continue
        interval = preserve_interval_seconds
        if interval is not None and record.time - interval >= last_preserved:
            preserve.append(record)
            last_preserved = record.time
        else:
            remove.append(record)
    keep = tuple(record for record in records if record.number in numbers)
    return Sweep(keep, tuple(preserve), tuple(remove), last_preserved)


def _kept(policy: RetentionPolicy, records: tuple[CheckpointRecord, ...]) -> set[int]:
    """The numbers that a policy keeps.

    Raises:
      TypeError: it returned something other than numbers, which would keep nothing.
    """
    kept = policy.keep(records)
    try:
        return {operator.index(number) for number in kept}
    except TypeError as error:
        raise TypeError(
            f"{policy!r}: expected keep() to return numbers of checkpoints, found {kept!r}. Return "
            "record.number of each record that stays."
        ) from error


def metrics_of(policy: RetentionPolicy, *, awaited: bool = True) -> frozenset[str]:
    """The metrics that a policy asks for, as far as that is known.

    Args:
      policy: any.
      awaited: whether those count that may be recorded after the save.

    >>> policy = KeepAny((KeepBest("loss"), KeepBest("accuracy", awaiting=2), KeepLatest(1)))
    >>> sorted(metrics_of(policy)), sorted(metrics_of(policy, awaited=False))
    (['accuracy', 'loss'], ['loss'])
    """
    if isinstance(policy, KeepBest):
        return frozenset([policy.metric] if awaited or not policy.awaiting else [])
    if isinstance(policy, KeepAny):
        return frozenset().union(*[metrics_of(each, awaited=awaited) for each in policy.policies])
    return frozenset()


def counts_steps(policy: RetentionPolicy) -> bool:
    """Whether a policy is known to take numbers for training steps."""
    if isinstance(policy, KeepAny):
        return any(map(counts_steps, policy.policies))
    return isinstance(policy, KeepEveryNSteps)


def can_keep(policy: RetentionPolicy) -> bool:
    """Whether a policy can keep anything."""
    return not isinstance(policy, KeepAny) or any(map(can_keep, policy.policies))
