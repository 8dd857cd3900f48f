"""Pieces: which bytes to read for boxes of an array, and what becomes of them.

The rows of an array are cut where one of the boxes begins or ends. Rows that one box needs as a
whole are read straight into their place. All others are read in bands of at most 4 MiB into memory
that each thread keeps, and are cut from there, so that each row is read once. If a row is longer
than a band, or if rows lie far apart, each row is read in the same way, as an array of lower rank.

A plan depends on shapes and boxes alone. A model has many arrays and few shapes, so plans are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ckpt_jax.graph.boxes import Box, Shape, intersect, relative, shape_of
from ckpt_jax.store.extents import c_strides, in_c_order, span_of

_BAND_NBYTES = 4 << 20  # of a read; longer ones are shared by several threads
_WASTE_NBYTES = 64 << 10  # rows that lie this far apart are read one by one
_MAX_KEPT = 256  # plans


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of what was read, and where it is copied to.

    Attributes:
      result: the number of the box.
      where: the part of the box's array.
      axes: the axes of the array in the order of the strides.
      shape: of the part, in that order.
      offset, strides: of the part in what was read, in bytes.
    """

    result: int
    where: tuple[slice, ...]
    axes: tuple[int, ...]
    shape: Shape
    offset: int
    strides: tuple[int, ...]

    def copy(self, buffer: np.ndarray, results: Sequence[np.ndarray]) -> None:
        """Copies the part from what was read."""
        result = results[self.result]
        source = np.ndarray(self.shape, result.dtype, buffer, self.offset, self.strides)
        result[(*self.where, ...)].transpose(self.axes)[...] = source


@dataclass(frozen=True, slots=True)
class Direct:
    """Consecutive elements of a box's array that lie in the file as they are."""

    result: int
    start: int
    stop: int

    def memory(self, results: Sequence[np.ndarray]) -> memoryview:
        """The memory of these elements."""
        return results[self.result].reshape(-1)[self.start : self.stop].view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to read: straight into an array, or into memory that cuts are copied from.

    Attributes:
      offset: from the beginning of the extent, in bytes.
      nbytes: how many.
      direct: where they belong as they are; None if they are cut.
      cuts: what is copied from them.
    """

    offset: int
    nbytes: int
    direct: Direct | None
    cuts: tuple[Cut, ...] = ()


@lru_cache(maxsize=_MAX_KEPT)
def pieces_of(
    extent: Box, steps: tuple[int, ...], boxes: tuple[Box, ...], itemsize: int
) -> tuple[Piece, ...]:
    """The reads that fill arrays from an extent, in the order of the file.

    Args:
      extent: the box of the extent in the array.
      steps: its strides in elements.
      boxes: of the arrays that are filled, as far as they have elements of the extent.
      itemsize: of an element, in bytes.
    """
    # The slowest axis first: a transposed array lies in C order, too.
    axes = tuple(sorted(range(len(steps)), key=lambda axis: -steps[axis]))
    parts = [
        _Part(number, box, common, relative(common, extent))
        for number, box in enumerate(boxes)
        if (common := intersect(box, extent)) is not None
    ]
    plan = _Plan(axes, tuple([steps[axis] for axis in axes]), itemsize)
    return tuple(plan.rows(0, 0, [part.ordered(axes) for part in parts]))


@dataclass(frozen=True, slots=True)
class _Part:
    """What a box takes of an extent, or of some of its rows.

    Attributes:
      result: the number of the box.
      box: the box.
      common: the elements, in the coordinates of the array.
      inner: the same in the coordinates of the extent.
    """

    result: int
    box: Box
    common: Box
    inner: Box

    def ordered(self, axes: tuple[int, ...]) -> _Part:
        """The same with the axes in another order."""
        box, common, inner = (
            tuple([each[axis] for axis in axes]) for each in (self.box, self.common, self.inner)
        )
        return _Part(self.result, box, common, inner)

    def cut(self, axis: int, start: int, stop: int) -> _Part:
        """Only the elements from `start` to `stop` along an axis of the extent."""
        shift = self.common[axis][0] - self.inner[axis][0]
        common = (*self.common[:axis], (start + shift, stop + shift), *self.common[axis + 1 :])
        inner = (*self.inner[:axis], (start, stop), *self.inner[axis + 1 :])
        return _Part(self.result, self.box, common, inner)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Makes pieces. All axes are in the order of the strides, the slowest first."""

    axes: tuple[int, ...]
    steps: tuple[int, ...]
    itemsize: int

    def rows(self, axis: int, offset: int, parts: Sequence[_Part]) -> Iterator[Piece]:
        """The reads for parts that have one index in common on each axis before `axis`."""
        if axis == len(self.steps):
            yield self.piece(offset, self.itemsize, parts, 0, axis)
            return
        bounds = sorted({bound for part in parts for bound in part.inner[axis]})
        for start, stop in itertools.pairwise(bounds):
            wanted = [
                part.cut(axis, start, stop)
                for part in parts
                if part.inner[axis][0] <= start and stop <= part.inner[axis][1]
            ]
            if wanted:
                yield from self.same_rows(axis, offset, (start, stop), wanted)

    def same_rows(
        self, axis: int, offset: int, rows: tuple[int, int], parts: Sequence[_Part]
    ) -> Iterator[Piece]:
        """The reads for parts that each have all of some rows."""
        step, count = self.steps[axis], rows[1] - rows[0]
        offset += rows[0] * step * self.itemsize
        if len(parts) == 1 and (direct := self.direct(axis, parts[0])) is not None:
            yield from self.dense(offset + self.first(axis, parts[0]) * self.itemsize, direct)
            return
        first = min([self.first(axis, part) for part in parts])
        width = max([self.first(axis, part) + self.span(axis, part) for part in parts]) - first
        are_far = count > 1 and (step - width) * self.itemsize >= _WASTE_NBYTES
        is_last = axis == len(self.steps) - 1
        if not is_last and (are_far or width * self.itemsize > _BAND_NBYTES):
            for row in range(*rows):
                there = offset + (row - rows[0]) * step * self.itemsize
                yield from self.rows(
                    axis + 1, there, [part.cut(axis, row, row + 1) for part in parts]
                )
            return
        if step == 0:
            height = count
        else:
            height = 1 if are_far else (_BAND_NBYTES // self.itemsize - width) // step + 1
        for top in range(*rows, max(1, height)):
            end = min(rows[1], top + max(1, height))
            yield self.piece(
                offset + ((top - rows[0]) * step + first) * self.itemsize,
                ((end - top - 1) * step + width) * self.itemsize,
                [part.cut(axis, top, end) for part in parts],
                first,
                axis,
            )

    def piece(
        self, offset: int, nbytes: int, parts: Sequence[_Part], first: int, axis: int
    ) -> Piece:
        """A piece whose cuts begin `first` elements after the beginning of a row."""
        strides = tuple([step * self.itemsize for step in self.steps])
        cuts = [
            Cut(
                part.result,
                self.where(part),
                self.axes,
                shape_of(part.common),
                (self.first(axis, part) - first) * self.itemsize,
                strides,
            )
            for part in parts
        ]
        return Piece(offset, nbytes, None, tuple(cuts))

    def where(self, part: _Part) -> tuple[slice, ...]:
        """The part of the box's array, its axes in their own order."""
        found = dict(zip(self.axes, relative(part.common, part.box), strict=True))
        return tuple([slice(*found[axis]) for axis in range(len(self.axes))])

    def first(self, axis: int, part: _Part) -> int:
        """Where the first element of a row lies, in elements from the beginning of the row."""
        inner = zip(part.inner[axis + 1 :], self.steps[axis + 1 :], strict=True)
        return sum([start * step for (start, _), step in inner])

    def span(self, axis: int, part: _Part) -> int:
        """The number of elements from the first to the last of a row."""
        return span_of(shape_of(part.inner[axis + 1 :]), self.steps[axis + 1 :])

    def direct(self, axis: int, part: _Part) -> Direct | None:
        """The elements of a part in its array, if they are consecutive there and in the file."""
        shape = shape_of(part.common)
        order = [axis for axis, n in zip(self.axes, shape, strict=True) if n > 1]
        if order != sorted(order) or not in_c_order(shape[axis:], self.steps[axis:]):
            return None
        lengths = dict(zip(self.axes, shape_of(part.box), strict=True))
        strides = c_strides([lengths[axis] for axis in range(len(lengths))])
        where = self.where(part)
        size = [part.stop - part.start for part in where]
        if not in_c_order(size, strides):
            return None
        begin = sum([part.start * stride for part, stride in zip(where, strides, strict=True)])
        return Direct(part.result, begin, begin + math.prod(size))

    def dense(self, offset: int, direct: Direct) -> Iterator[Piece]:
        """The reads for consecutive elements."""
        length = max(1, _BAND_NBYTES // self.itemsize)
        for start in range(direct.start, direct.stop, length):
            stop = min(direct.stop, start + length)
            there = offset + (start - direct.start) * self.itemsize
            yield Piece(there, (stop - start) * self.itemsize, Direct(direct.result, start, stop))
