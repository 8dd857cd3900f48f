"""Statistics of arrays: smallest and largest element, mean, norm, and how many are not finite.

Minimum, maximum, mean and norm are those of the finite elements. The elements of an array come in
portions: each portion gets statistics of its own, on any thread, and statistics are merged. So an
array of any size takes little memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.showing.contents import Entry
from ckpt_jax.showing.portions import portions
from ckpt_jax.store.workers import Workers, cores


@dataclass(frozen=True, slots=True)
class Statistics:
    """Facts about the elements of an array.

    Attributes:
      elements: their number.
      nans, infs: how many are NaN, and how many are infinite.
      least, greatest: of the finite ones; None if there are none, or if they are complex.
      mean: of the finite ones; None if there are none.
      norm: the root of the sum of their squares.
    """

    elements: int = 0
    nans: int = 0
    infs: int = 0
    least: Any = None
    greatest: Any = None
    mean: Any = None
    norm: float = 0.0

    @property
    def finite(self) -> int:
        """The number of finite elements."""
        return self.elements - self.nans - self.infs

    def merged(self, other: Statistics) -> Statistics:
        """The statistics of the elements of both."""
        found = [each for each in (self, other) if each.finite]
        total = self.finite + other.finite
        return Statistics(
            self.elements + other.elements,
            self.nans + other.nans,
            self.infs + other.infs,
            min([each.least for each in found if each.least is not None], default=None),
            max([each.greatest for each in found if each.greatest is not None], default=None),
            # Each term is no larger than a mean, so the sum cannot overflow.
            sum([each.mean * (each.finite / total) for each in found]) if found else None,
            math.hypot(self.norm, other.norm),
        )


def statistics_of(array: np.ndarray) -> Statistics:
    """The statistics of an array of numbers.

    >>> found = statistics_of(np.array([3.0, -4.0, np.nan, np.inf]))
    >>> found.least, found.greatest, found.mean, found.norm, found.nans, found.infs
    (-4.0, 3.0, -0.5, 5.0, 1, 1)
    """
    values = wide(array).reshape(-1)
    nans = infs = 0
    if values.dtype.kind in "fc":
        is_finite = np.isfinite(values)
        if not is_finite.all():
            nans = int(np.isnan(values).sum())
            infs = int(values.size - is_finite.sum()) - nans
            values = values[is_finite]
    if not values.size:
        return Statistics(array.size, nans, infs)
    is_complex = values.dtype.kind == "c"
    magnitudes = np.abs(values) if is_complex else values.astype(np.float64, copy=False)
    largest = float(np.max(np.abs(magnitudes)))
    scale = largest if largest > 1e150 or 0 < largest < 1e-150 else 1.0  # squares must not overflow
    return Statistics(
        array.size,
        nans,
        infs,
        None if is_complex else values.min().item(),
        None if is_complex else values.max().item(),
        (np.mean(values / scale) * scale).item(),
        scale * float(np.linalg.norm(magnitudes / scale if scale != 1 else magnitudes)),
    )


def wide(array: np.ndarray) -> np.ndarray:
    """An array with the same values in a dtype that numpy calculates with exactly: integers stay
    integers, and everything else becomes float64 or complex128."""
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "c":
        return array.astype(np.complex128)
    if "int" in array.dtype.name:  # int4 and its like
        return array.astype(np.int64)
    return array.astype(np.float64)


def has_statistics(entry: Entry) -> bool:
    """Whether a value is an array of numbers or a number that can be read."""
    spec = entry.spec
    is_number = spec.is_array or spec.is_number
    return is_number and not spec.is_bytes and not spec.is_unreadable and bool(spec.dtype)


def gather(
    reader: CheckpointReader, entries: Iterable[Entry], advance: Any
) -> Iterator[tuple[Entry, Statistics]]:
    """The statistics of arrays, in order. One thread reads while others calculate.

    Args:
      reader: of the checkpoint.
      entries: values for which `has_statistics` is true.
      advance: called with numbers of bytes as they are done.

    Raises:
      CorruptCheckpointError: a value is damaged.
    """
    entries = [*entries]
    specs = {entry.key: reader.stored_spec(entry.key) for entry in entries}
    found = dict.fromkeys(specs, Statistics())
    waiting: deque[Future[list[tuple[str, Statistics]]]] = deque()

    def take() -> None:
        for key, part in waiting.popleft().result():
            found[key] = found[key].merged(part)

    with Workers(cores() if cores() > 1 else 0, "ckpt-stats") as workers:
        for portion in portions(specs.items()):
            requests: dict[str, list[Any]] = {}
            for key, box in portion:
                requests.setdefault(key, []).append(box)
            parts = reader.read_boxes(requests)
            waiting.append(workers.submit(_statistics, parts))
            advance(sum([part.nbytes for part in parts.values()]))
            if len(waiting) > cores():
                take()
        while waiting:
            take()
    for entry in entries:
        yield entry, found[entry.key]


def _statistics(parts: dict[tuple[str, Any], np.ndarray]) -> list[tuple[str, Statistics]]:
    return [(key, statistics_of(part)) for (key, _), part in parts.items()]
