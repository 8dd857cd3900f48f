"""Tilings: the slices that an array is stored in, and the shards that have them.

All arrays that are cut alike, and whose slices lie in the same shards, have one tiling. Its boxes
are columns of integers. A tiling that is a regular grid, as shardings make them, is checked with a
few operations on whole columns, even if it has thousands of boxes. Other tilings are swept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ckpt_jax.graph.boxes import Box, Shape, overlap
from ckpt_jax.graph.dtypes import BYTES

_MAX_CORNERS = 64  # for each slice, while a tiling is checked: enough for six axes in any case
_LEAST_CORNERS = 1 << 16


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
    clash = _repeated_empty(tiling) or (_first_gap(tiling) if whole else _first_overlap(tiling))
    if clash is not None:
        yield clash


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


def _repeated_empty(tiling: Tiling) -> Clash | None:
    """An empty slice that is stored twice; it overlaps with no other."""
    seen: dict[Box, int] = {}
    for i in np.flatnonzero((tiling.starts == tiling.stops).any(axis=1)).tolist():
        before = seen.setdefault(tiling.box(i), i)
        if before != i:
            return Clash(f"slice {tiling.box(i)} is stored twice", (before, i))
    return None


def _first_overlap(tiling: Tiling) -> Clash | None:
    boxes = tiling.boxes()
    pair = overlap(boxes)
    if pair is None:
        return None
    a = boxes.index(pair[0])
    return _overlap(tiling, a, boxes.index(pair[1], a + 1 if pair[0] == pair[1] else 0))


def _overlap(tiling: Tiling, a: int, b: int) -> Clash:
    one, other = tiling.box(a), tiling.box(b)
    what = "is stored twice" if one == other else f"overlaps slice {other}"
    return Clash(f"slice {one} {what}", (a, b))


def _first_gap(tiling: Tiling) -> Clash | None:
    """The first place where an array is not held exactly once; None if its slices make it up.

    Let g(p) be the number of slices with the element p, minus one. g is zero everywhere exactly if
    its differences along all axes are, one axis after the other. A box has such a difference at
    its corners only, and at the corners that slices share, the differences cancel out. So the work
    grows with the number of slices, not with the number of pairs of them. If differences are left,
    there is none before the first of them, so g is there equal to the difference.
    """
    shape = tiling.first.shape
    if 0 in shape:
        return None
    filled = (tiling.starts < tiling.stops).all(axis=1)
    starts, stops = tiling.starts[filled], tiling.stops[filled]
    axes = np.flatnonzero(((starts != 0) | (stops != np.array(shape, np.int64))).any(axis=0))
    whole = np.array([[0] * len(axes) + [shape[axis] for axis in axes]], np.int64)
    boxes = np.concatenate([whole, np.hstack([starts[:, axes], stops[:, axes]])])
    weights = np.array([-1] + [1] * len(starts), np.int64)
    boxes, weights = _summed(boxes, weights)
    most = max(_MAX_CORNERS * len(boxes), _LEAST_CORNERS)
    for axis in range(len(axes)):
        low, high = boxes.copy(), boxes.copy()
        low[:, len(axes) + axis] = low[:, axis]
        high[:, axis] = high[:, len(axes) + axis]
        corners = np.concatenate([low, high])
        boxes, weights = _summed(corners, np.concatenate([weights, -weights]))
        if len(boxes) > most:
            what = f"{tiling.count} slices are too many for an array that is cut as irregularly"
            return Clash(what, tuple(range(tiling.count)))
    if not len(boxes):
        return None
    place = boxes[0, : len(axes)]
    here = ((tiling.starts[:, axes] <= place) & (place < tiling.stops[:, axes])).all(axis=1)
    holders = np.flatnonzero(here & filled).tolist()
    if len(holders) > 1:
        return _overlap(tiling, holders[0], holders[1])
    element = np.zeros(len(shape), np.int64)
    element[axes] = place
    what = f"{tiling.count} slices leave a hole at element {tuple(element.tolist())}"
    return Clash(what, tuple(range(tiling.count)))


def _summed(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, sorted, with the sums of their weights if these are not zero."""
    order = np.lexsort(rows.T[::-1]) if rows.shape[1] else np.arange(len(rows))
    rows, weights = rows[order], weights[order]
    begins = np.append(True, (rows[1:] != rows[:-1]).any(axis=1))
    sums = np.add.reduceat(weights, np.flatnonzero(begins))
    return rows[begins][sums != 0], sums[sums != 0]
