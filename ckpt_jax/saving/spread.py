"""Spreading: which process writes which slice, worked out by each process alone.

A *box* is one distinct slice of an array; its *holders* are the processes whose devices have
it. Every process knows all boxes and holders, because a sharding is global, and applies the
same rule to them, so that nobody has to ask:

1. A box with one holder is that holder's.
2. The others go, the largest first, to the holder with the fewest bytes so far. A box of
   several `PART_NBYTES` is cut into equal parts along one axis, for as many of its holders;
   a smaller one stays whole.

Law: the parts of all processes are the boxes, each element once. Where every process holds
every box, no process writes more than one largest part beyond the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_jax.graph.boxes import Box, shape_of

PART_NBYTES = 1 << 20  # smaller parts would cost more in places to read from than they spread


class HeldBox(NamedTuple):
    """A distinct slice of an array.

    Attributes:
      box: (start, stop) per axis.
      nbytes: of the slice.
      holders: indices of the processes that have it; at least one.
    """

    box: Box
    nbytes: int
    holders: tuple[int, ...]


class Part(NamedTuple):
    """What one process writes of a box: a box within it, in the array's coordinates."""

    source: int  # position of the HeldBox
    box: Box
    process: int


def spread(boxes: Sequence[HeldBox], count: int, part_nbytes: int = PART_NBYTES) -> list[Part]:
    """Who writes what; see the module.

    Args:
      boxes: all distinct slices of all arrays, in the same order on all processes.
      count: number of processes.
      part_nbytes: the least size of a part.

    Returns:
      The parts of all processes, in the order of `boxes`.

    >>> held = [HeldBox(((0, 8),), 8, (0, 1)), HeldBox(((0, 4),), 4, (0,))]
    >>> [(part.box, part.process) for part in spread(held, 2)]
    [(((0, 8),), 1), (((0, 4),), 0)]
    >>> [(part.box, part.process) for part in spread(held, 2, part_nbytes=4)]
    [(((0, 4),), 0), (((4, 8),), 1), (((0, 4),), 0)]
    """
    load = [0] * count
    found: list[list[Part]] = [[] for _ in boxes]
    shared: list[int] = []
    for number, (box, nbytes, holders) in enumerate(boxes):
        if len(holders) == 1:
            load[holders[0]] += nbytes
            found[number] = [Part(number, box, holders[0])]
        else:
            shared.append(number)
    shared.sort(key=lambda number: -boxes[number].nbytes)
    for number in shared:
        box, nbytes, holders = boxes[number]
        parts = _cut(box, min(len(holders), nbytes // part_nbytes))
        chosen = sorted(sorted(holders, key=load.__getitem__)[: len(parts)])
        size = nbytes // len(parts)
        for part, process in zip(parts, chosen, strict=True):
            load[process] += size
            found[number].append(Part(number, part, process))
    return [part for parts in found for part in parts]


def _cut(box: Box, wanted: int) -> list[Box]:
    """`box` in `wanted` nearly equal parts along the first axis that is long enough."""
    for axis, length in enumerate(shape_of(box)):
        if 1 < wanted <= length:
            start = box[axis][0]
            bounds = [start + length * i // wanted for i in range(wanted + 1)]
            return [
                (*box[:axis], (bounds[i], bounds[i + 1]), *box[axis + 1 :]) for i in range(wanted)
            ]
    return [box]
