"""Arrays in portions: parts of large arrays, and many small ones together, within little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from ckpt_jax.graph.boxes import Box, size_of, whole
from ckpt_jax.graph.specs import LeafSpec

MAX_ELEMENTS = 2 << 20  # in a portion; as float64, this is 16 MiB

Portion = list[tuple[str, Box]]


def portions(values: Iterable[tuple[str, LeafSpec]]) -> Iterator[Portion]:
    """Boxes of values that cover all of them, in portions of bounded size. A byte string counts as
    one element, and its box is `()`.

    >>> [*portions([("a", LeafSpec("", "int8", (2,))), ("b", LeafSpec("", "int8", ()))])]
    [[('a', ((0, 2),)), ('b', ())]]
    """
    found: Portion = []
    elements = 0
    for name, spec in values:
        for box in boxes_of(() if spec.is_bytes else spec.shape):
            if found and elements + size_of(box) > MAX_ELEMENTS:
                yield found
                found, elements = [], 0
            found.append((name, box))
            elements += size_of(box)
    if found:
        yield found


def boxes_of(shape: Sequence[int], limit: int = MAX_ELEMENTS) -> Iterator[Box]:
    """Boxes of at most `limit` elements that tile an array, each contiguous in C order.

    >>> [*boxes_of((3, 4), 5)]
    [((0, 1), (0, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 4))]
    """
    if math.prod(shape) <= limit:
        yield whole(shape)
        return
    row = math.prod(shape[1:])
    step = max(1, limit // max(row, 1))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        if row <= limit:
            yield ((start, stop), *whole(shape[1:]))
        else:
            for rest in boxes_of(shape[1:], limit):
                yield ((start, stop), *rest)
