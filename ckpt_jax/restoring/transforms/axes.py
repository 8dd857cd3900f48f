"""Transforms of axes: other orders and other shapes for the same elements."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of, size_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.transforms.kinds import (
    Each,
    Parts,
    Specs,
    only,
    rank_of,
    require_array,
    reshaped,
)


@dataclass(frozen=True, slots=True)
class Transpose(Each):
    """Permutes the axes of the values that a rename rule moves.

    Args:
      axes: for each axis of the target, the axis of the saved value. By default the order of the
        axes is reversed.

    Source: `numpy.transpose`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"weight": np.arange(6).reshape(2, 3)})
      ...     rules = [("weight", "kernel", ckpt.Transpose())]
      ...     ckpt.restore(path, {"kernel": np.zeros((3, 2), int)}, rename=rules)
      {'kernel': array([[0, 3], [1, 4], [2, 5]])}
    """

    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(self.axes))

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        require_array(spec, self)
        order = self._order(spec)
        if sorted(order) != [*range(len(spec.shape))]:
            raise ValueError(f"{self} does not permute the axes of {spec}")
        return replace(spec, shape=tuple([spec.shape[axis] for axis in order]), weak_type=False)

    def _order(self, spec: LeafSpec) -> list[int]:
        """The axes, and the further axis at the end that the data of a PRNG key has."""
        rank = rank_of(spec)
        axes = reversed(range(rank)) if self.axes is None else self.axes
        inner = [axis + rank if -rank <= axis < 0 else axis for axis in axes]
        return [*inner, *range(rank, len(spec.shape))]

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        order = self._order(specs[0])
        return [tuple([box[order.index(axis)] for axis in range(len(box))])]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        return only(parts).transpose(self._order(specs[0]))

    def inverse(self) -> Transpose:
        if self.axes is None:
            return self
        if sorted(self.axes) != [*range(len(self.axes))]:
            raise ValueError(f"{self}: to have an inverse, count the axes from the front")
        return Transpose(tuple([self.axes.index(axis) for axis in range(len(self.axes))]))


@dataclass(frozen=True, slots=True)
class Reshape(Each):
    """Gives the values that a rename rule moves another shape; the order of elements stays.

    A device that needs some heads of (embed, heads * size) -> (embed, heads, size) reads no others.

    Args:
      shape: the new shape; one axis may be -1 and takes what is left.
      saved: the shape before, which is only needed for the inverse of the rule. One axis may be -1.

    Source: `numpy.reshape`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.arange(6)})
      ...     rules = [("w", "w", ckpt.Reshape((2, -1)))]
      ...     ckpt.restore(path, {"w": np.zeros((2, 3), int)}, rename=rules)
      {'w': array([[0, 1, 2], [3, 4, 5]])}
    """

    shape: tuple[int, ...]
    saved: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _lengths(self.shape, self))
        if self.saved is not None:
            object.__setattr__(self, "saved", _lengths(self.saved, self))

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        require_array(spec, self)
        rank = rank_of(spec)
        if self.saved is not None and not _fits(self.saved, spec.shape[:rank]):
            raise ValueError(f"{self}: {spec} does not have the shape {self.saved}")
        shape = self._shape(spec)
        if math.prod(shape) != math.prod(spec.shape[:rank]):
            raise ValueError(f"{self}: {spec} does not have as many elements")
        return reshaped(spec, (*shape, *spec.shape[rank:]))

    def _shape(self, spec: LeafSpec) -> tuple[int, ...]:
        if -1 not in self.shape:
            return self.shape
        total = math.prod(spec.shape[: rank_of(spec)])
        others = math.prod([n for n in self.shape if n != -1])
        return tuple([total // others if n == -1 and others else n for n in self.shape])

    def _groups(self, spec: LeafSpec) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The lengths of neighbouring axes, before and after, that hold the same elements."""
        rank = rank_of(spec)
        after = (*self._shape(spec), *spec.shape[rank:])
        return _factors(spec.shape, after)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        (spec,) = specs
        if not size_of(box):
            return [((0, 0),) * len(spec.shape)]
        found: list[tuple[int, int]] = []
        at = 0
        for before, after in self._groups(spec):
            found += _covering(box[at : at + len(after)], after, before)[0]
            at += len(after)
        return [tuple(found)]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        part = only(parts)
        if not size_of(box):
            return np.empty(shape_of(box), part.dtype)
        if part.size == size_of(box):  # then the elements are the same, in the same order
            return part.reshape(shape_of(box))
        lengths: list[int] = []
        chosen: list[np.ndarray] = []
        at = 0
        for before, after in self._groups(specs[0]):
            wanted = box[at : at + len(after)]
            covering, first = _covering(wanted, after, before)
            lengths.append(size_of(tuple(covering)))
            chosen.append(_numbers(wanted, after) - first)
            at += len(after)
        return part.reshape(lengths)[np.ix_(*chosen)].reshape(shape_of(box))

    def inverse(self) -> Reshape:
        if self.saved is None:
            raise ValueError(
                f"{self} has an inverse only if it says the shape before: Reshape(shape, saved=...)"
            )
        return Reshape(self.saved, self.shape)


def _lengths(given: Sequence[int] | int, transform: object) -> tuple[int, ...]:
    try:
        found = (given,) if isinstance(given, int) else tuple(map(operator.index, given))
    except TypeError:
        found = (-2,)
    if any(n < -1 for n in found) or found.count(-1) > 1:
        what = f"expected lengths, of which one may be -1, got {given!r}"
        raise ValueError(f"{type(transform).__name__}: {what}")
    return found


def _fits(wanted: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a shape is the wanted one, in which -1 stands for any length."""
    return len(wanted) == len(shape) and all(
        w in (-1, n) for w, n in zip(wanted, shape, strict=True)
    )


def _factors(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The lengths of neighbouring axes of two shapes that hold the same elements.

    >>> _factors((4, 6, 5), (2, 2, 6, 5))
    [((4,), (2, 2)), ((6,), (6,)), ((5,), (5,))]
    >>> _factors((4, 6), (24, 1))
    [((4, 6), (24,)), ((), (1,))]
    """
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (a := math.prod(before[first:i])) != (b := math.prod(after[second:j])):
            if a < b:
                i += 1
            else:
                j += 1
        found.append((tuple(before[first:i]), tuple(after[second:j])))
    return found


def _covering(
    box: Box, shape: Sequence[int], other: Sequence[int]
) -> tuple[list[tuple[int, int]], int]:
    """The smallest box of an array of shape `other` that holds consecutive elements, among them
    those of a box of the same array as `shape`; and the number of its first element.

    >>> _covering(((2, 6),), (12,), (3, 4))
    ([(0, 2), (0, 4)], 0)
    >>> _covering(((5, 7),), (12,), (3, 4))
    ([(1, 2), (1, 3)], 5)
    """
    first = _number([start for start, _ in box], shape)
    last = _number([stop - 1 for _, stop in box], shape)
    starts, stops = _position(first, other), _position(last, other)
    at = next((i for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if a != b), len(other))
    found = [(a, a + 1) for a in starts[:at]]
    if at < len(other):
        found += [(starts[at], stops[at] + 1), *[(0, n) for n in other[at + 1 :]]]
    return found, _number([start for start, _ in found], other)


def _number(position: Sequence[int], shape: Sequence[int]) -> int:
    """The number of an element, in the order in which they lie."""
    number = 0
    for i, n in zip(position, shape, strict=True):
        number = number * n + i
    return number


def _position(number: int, shape: Sequence[int]) -> list[int]:
    """The position of an element with a number."""
    found = []
    for n in reversed(shape):
        number, i = divmod(number, n)
        found.append(i)
    return found[::-1]


def _numbers(box: Box, shape: Sequence[int]) -> np.ndarray:
    """The numbers of the elements of a box, in the order in which they lie."""
    found = np.zeros(1, np.int64)
    for (start, stop), n in zip(box, shape, strict=True):
        found = (found[:, None] * n + np.arange(start, stop)).reshape(-1)
    return found
