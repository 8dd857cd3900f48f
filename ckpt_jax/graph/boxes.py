"""Boxes: the axis-aligned regions that arrays are cut into.

A box is a tuple of half-open `(start, stop)` pairs, one per axis, inside the shape of the
array that it belongs to. A rank-0 array has exactly one box, `()`. Every function is pure, and
nothing here depends on devices or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

_FEW = 1 << 13  # pairs of boxes that are compared at once

Box = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box that covers an array of `shape`.

    >>> whole((4, 3))
    ((0, 4), (0, 3))
    """
    return tuple((0, n) for n in shape)


def from_index(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that a tuple of slices with stride 1 selects, such as `jax.Shard.index`.

    >>> from_index((slice(2, None), slice(None)), (4, 3))
    ((2, 4), (0, 3))
    """
    return tuple(
        (0 if s.start is None else s.start, n if s.stop is None else s.stop)
        for s, n in zip(index, shape, strict=True)
    )


def shape_of(box: Box) -> Shape:
    return tuple([stop - start for start, stop in box])


def size_of(box: Box) -> int:
    """Number of elements in `box`; 1 for the box of a rank-0 array."""
    return math.prod([stop - start for start, stop in box])


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """`box` as an index into an array, or into the part of it that has the box `origin`."""
    if origin is None:
        return tuple([slice(start, stop) for start, stop in box])
    return tuple([slice(a - o, b - o) for (a, b), (o, _) in zip(box, origin, strict=True)])


def relative(box: Box, origin: Box) -> Box:
    """`box` in the coordinates of the box `origin`, which contains it.

    >>> relative(((2, 4),), origin=((1, 9),))
    ((1, 3),)
    """
    return tuple([(a - o, b - o) for (a, b), (o, _) in zip(box, origin, strict=True)])


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes of equal rank, or None if they share no element.

    >>> intersect(((0, 4),), ((2, 9),))
    ((2, 4),)
    """
    common = tuple([(max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True)])
    return None if any(start >= stop for start, stop in common) else common


def inside(box: Box, shape: Sequence[int]) -> bool:
    """Whether `box` has the rank of `shape` and lies inside it."""
    return len(box) == len(shape) and all(
        0 <= start <= stop <= n for (start, stop), n in zip(box, shape, strict=True)
    )


def overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None.

    For n boxes of rank r, this takes O(n log(n)**r) however they lie.

    >>> overlap([((0, 4), (0, 2)), ((0, 4), (2, 4)), ((3, 9), (1, 3))])
    (((0, 4), (0, 2)), ((3, 9), (1, 3)))
    """
    every = [box for box in boxes if size_of(box)]
    if len(every) < 2:
        return None
    cut = [i for i in range(len(every[0])) if any([box[i] != every[0][i] for box in every])]
    if len(cut) < 2:  # as usual; then neighbours tell
        every.sort()
        axis = cut[0] if cut else None
        pairs = pairwise(every)
        return next((p for p in pairs if axis is None or p[0][axis][1] > p[1][axis][0]), None)
    bounds = np.array(every, np.int64)
    starts, stops = bounds[:, cut, 0].T, bounds[:, cut, 1].T
    numbers = np.arange(len(every))
    pair = _pair(starts, stops, numbers, numbers, len(starts) - 1)
    return None if pair is None else (every[min(pair)], every[max(pair)])


def _pair(
    starts: np.ndarray, stops: np.ndarray, a: np.ndarray, b: np.ndarray, axis: int
) -> tuple[int, int] | None:
    """A box of `a` and another one of `b` that share an element, if the start of the second one
    lies in the first one on `axis`; further axes do not count. If two intervals share an element,
    the start of one lies in the other.

    The boxes of `a` in which all starts of `b` lie are looked at on the axes before. For the
    others, `b` is halved. Each box of `a` has two ends, so that it is one of these others in at
    most two parts of `b` of each size.

    Args:
      starts, stops: the bounds of all boxes, by axis and number.
      a, b: numbers of boxes.
    """
    if axis < 0:
        return next(((i, j) for i in a[:2].tolist() for j in b[:2].tolist() if i != j), None)
    if not len(b):
        return None
    at = starts[axis, b]
    first, last = at.min(), at.max()
    a = a[(starts[axis, a] <= last) & (stops[axis, a] > first)]
    if len(a) * len(b) <= _FEW:
        return _pair_of_few(starts[: axis + 1], stops[: axis + 1], a, b)
    is_around = (starts[axis, a] <= first) & (stops[axis, a] > last)
    around, a = a[is_around], a[~is_around]
    found = _pair(starts, stops, around, b, axis - 1) or _pair(starts, stops, b, around, axis - 1)
    if found or not len(a):
        return found
    middle = max(np.partition(at, len(at) // 2)[len(at) // 2], at[at > first].min())
    return _pair(starts, stops, a, b[at < middle], axis) or _pair(
        starts, stops, a, b[at >= middle], axis
    )


def _pair_of_few(
    starts: np.ndarray, stops: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[int, int] | None:
    """A box of `a` and another one of `b` that share an element."""
    share = (starts[:, a, None] < stops[:, None, b]) & (starts[:, None, b] < stops[:, a, None])
    found = np.argwhere(share.all(axis=0) & (a[:, None] != b))
    return None if not len(found) else (int(a[found[0, 0]]), int(b[found[0, 1]]))


def tiling_problem(boxes: Sequence[Box], shape: Sequence[int]) -> str | None:
    """Why `boxes` do not tile an array of `shape`; None if they do.

    >>> tiling_problem([((0, 2),), ((2, 4),)], (4,)) is None
    True
    >>> tiling_problem([((0, 2),), ((3, 4),)], (4,))
    'its 2 slices hold 3 of 4 elements, so there is a hole'
    """
    for box in boxes:
        if not inside(box, shape):
            return f"slice {box} does not lie inside shape {tuple(shape)}"
    clash = overlap(boxes)
    if clash is not None:
        return f"slices {clash[0]} and {clash[1]} overlap"
    held = sum(size_of(box) for box in boxes)
    total = math.prod(shape)
    if not boxes or held != total:
        return f"its {len(boxes)} slices hold {held} of {total} elements, so there is a hole"
    return None
