"""Timing: contenders take turns, and only one step of each turn is on the clock.

Machines drift: a figure of this minute compares with another of this minute only. So every
round runs all contenders once (A B C, A B C, ...), the first round warms up buffers and page
cache and is thrown away, and ratios are taken round by round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Task:
    """Something to time.

    Attributes:
      who: a contender, or a limit.
      action: what is timed; takes what `setup` made.
      setup: makes the argument of `action`.
      check: given the argument and the result; raises AssertionError where that is wrong.
    """

    who: str
    action: Callable[[Any], Any]
    setup: Callable[[], Any] = _nothing
    check: Callable[[Any, Any], None] = _nothing


@dataclass(frozen=True, slots=True)
class Result:
    """Samples of one figure, in the order of the rounds.

    Attributes:
      workload, operation, who: what was measured, of whom.
      unit: of the samples; less is better.
      nbytes: of the arrays that were moved, 0 where that means nothing.
      limit: "" for a contender; for a physical limit the resource that it stands for.
      failure: why there are no samples.
    """

    workload: str
    operation: str
    who: str
    unit: str
    samples: tuple[float, ...]
    nbytes: int = 0
    limit: str = ""
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(slots=True)
class _Turns:
    """One task's rounds so far."""

    task: Task
    samples: list[float] = field(default_factory=list)
    spent_seconds: float = 0.0
    failure: str = ""


def take_turns(
    tasks: Sequence[Task], repeats: int, budget_seconds: float, warm_up: bool = True
) -> list[tuple[Task, tuple[float, ...], str]]:
    """The seconds that each task took in each round, and why a task failed ("": it did not).

    A task that has spent `budget_seconds`, warm-up included, drops out after its third round.
    """
    turns = [_Turns(task) for task in tasks]
    for number in range(-warm_up, repeats):
        for turn in turns:
            exhausted = turn.spent_seconds > budget_seconds and len(turn.samples) >= 3
            if turn.failure or exhausted:
                continue
            try:
                seconds = _timed(turn.task)
            except Exception as error:  # one contender's failure is a line in the table
                turn.failure = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            turn.spent_seconds += seconds
            if number >= 0:
                turn.samples.append(seconds)
    return [(turn.task, tuple(turn.samples), turn.failure) for turn in turns]


def _timed(task: Task) -> float:
    argument = task.setup()
    gc.collect()
    start = time.perf_counter()
    result = task.action(argument)
    seconds = time.perf_counter() - start
    task.check(argument, result)
    return seconds


def touch_memory(nbytes: int) -> None:
    """Uses `nbytes` of memory, so that a virtual machine has it backed before the clock runs."""
    np.zeros(nbytes, np.uint8).fill(1)
