"""Tilings: the slices that an array is stored in, and the shards that have them.

All arrays that are cut alike, and whose slices lie in the same shards, have one tiling. Its boxes
are columns of integers. A tiling that is a regular grid, as shardings make them, is checked with a
few operations on whole columns, even if it has thousands of boxes. Other tilings are swept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_jax.graph.boxes import Box, Shape, overlap, size_of
from ckpt_jax.graph.dtypes import BYTES


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """The properties that slices of different arrays share; see `index.proto`.

    Attributes:
      dtype: name of the dtype; "bytes" for a byte string.
      shape: of the whole array.
      extent: shape of the slice.
      nbytes: size of the slice as it is stored.
    """

    dtype: str
    shape: Shape
    extent: Shape
    nbytes: int

    @property
    def is_bytes(self) -> bool:
        """Whether it is the layout of a byte string."""
        return self.dtype == BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """The slices of an array, sorted by box.

    Attributes:
      layouts: the distinct layouts.
      layout: for each slice, the number of its layout.
      starts, stops: for each slice, the bounds of its box, one column per axis.
      shard: for each slice, the number of its shard.
      row: for each slice, its position among the slices of its key in that shard.
    """

    layouts: tuple[Layout, ...]
    layout: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @property
    def count(self) -> int:
        """The number of slices."""
        return len(self.shard)

    @property
    def first(self) -> Layout:
        """The layout of the first slice, which tells the array's dtype and shape."""
        return self.layouts[self.layout[0]]

    @property
    def nbytes(self) -> int:
        """The size of all slices."""
        sizes = np.array([layout.nbytes for layout in self.layouts], np.int64)
        return int(sizes[self.layout].sum())

    def box(self, number: int) -> Box:
        """The box of a slice."""
        starts, stops = self.starts[number].tolist(), self.stops[number].tolist()
        return tuple(zip(starts, stops, strict=True))

    def boxes(self) -> list[Box]:
        """The boxes of all slices."""
        bounds = zip(self.starts.tolist(), self.stops.tolist(), strict=True)
        return [tuple(zip(start, stop, strict=True)) for start, stop in bounds]

    def touching(self, box: Box) -> list[int]:
        """The numbers of the slices that may have an element in common with a box."""
        bounds = np.array(box, np.int64).reshape(-1, 2)
        hit = (self.starts < bounds[:, 1]) & (self.stops > bounds[:, 0])
        return np.flatnonzero(hit.all(axis=1)).tolist()


@dataclass(frozen=True, slots=True)
class Clash:
    """A problem of a tiling: a text, and the numbers of the slices that it is about."""

    text: str
    slices: tuple[int, ...]


def clashes(tiling: Tiling, *, whole: bool) -> Iterator[Clash]:
    """What is wrong with a tiling.

    Args:
      tiling: the slices of one array.
      whole: whether they have to make up the whole array.
    """
    first = tiling.first
    if tiling.count == 1 and (first.extent == first.shape or not whole):
        return
    agree = True
    for number, layout in enumerate(tiling.layouts):
        if (layout.dtype, layout.shape) != (first.dtype, first.shape):
            agree = False
            i = int(np.flatnonzero(tiling.layout == number)[0])
            found = f"{layout.dtype}{list(layout.shape)}"
            yield Clash(f"{found} disagrees with {first.dtype}{list(first.shape)}", (0, i))
    if not agree or _is_grid(tiling, first.shape):
        return
    yield from _uneven(tiling.boxes(), first.shape, whole=whole)


def _is_grid(tiling: Tiling, shape: Shape) -> bool:
    """Whether the boxes are all cells of a regular grid over an array, each once."""
    cells = np.zeros(tiling.count, np.int64)
    count = 1
    for axis, length in enumerate(shape):
        starts, cell = np.unique(tiling.starts[:, axis], return_inverse=True)
        stops = np.append(starts[1:], length)
        if starts[0] != 0 or np.any(tiling.stops[:, axis] != stops[cell]):
            return False
        cells = cells * len(starts) + cell
        count *= len(starts)
        if count > tiling.count:
            return False
    return count == tiling.count and len(np.unique(cells)) == count


def _uneven(boxes: Sequence[Box], shape: Shape, *, whole: bool) -> Iterator[Clash]:
    pair = overlap(boxes)
    if pair is None and len(set(boxes)) < len(boxes):  # empty slices overlap with no other
        seen: set[Box] = set()
        twice = next(box for box in boxes if box in seen or seen.add(box))
        pair = (twice, twice)
    if pair is not None:
        a = boxes.index(pair[0])
        b = boxes.index(pair[1], a + 1) if pair[0] == pair[1] else boxes.index(pair[1])
        what = "is stored twice" if pair[0] == pair[1] else f"overlaps slice {pair[1]}"
        yield Clash(f"slice {pair[0]} {what}", (a, b))
        return
    held, total = sum(map(size_of, boxes)), math.prod(shape)
    if whole and held != total:
        yield Clash(
            f"{len(boxes)} slices hold {held} of {total} elements, so there is a hole",
            tuple(range(len(boxes))),
        )
