"""Boxes: the axis-aligned regions that arrays are cut into.

A box is a tuple of half-open `(start, stop)` pairs, one per axis, inside the shape of the
array that it belongs to. A rank-0 array has exactly one box, `()`. Every function is pure, and
nothing here depends on devices or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
    """The first pair of boxes that share an element, or None.

    Boxes are swept along the axis on which they differ most. For disjoint slices as shardings
    make them, this takes O(n log n).
    """
    todo = [box for box in boxes if size_of(box)]
    if len(todo) < 2 or not todo[0]:
        return (todo[0], todo[1]) if len(todo) > 1 else None
    axis = max(range(len(todo[0])), key=lambda i: len({box[i] for box in todo}))
    todo.sort(key=lambda box: box[axis])
    active: list[Box] = []
    for box in todo:
        active = [other for other in active if other[axis][1] > box[axis][0]]
        for other in active:
            if intersect(box, other) is not None:
                return other, box
        active.append(box)
    return None


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
