"""Spreading: which process writes which slice. Each process works it out by itself.

Terms. A *box* is one distinct slice of an array. Its *holders* are the processes that have it on
their devices. A *share* is the part of a box that one process writes.

A sharding is global, so that every process knows all boxes and holders. All processes apply the
same rule to them, and agree without talking to each other:

1. A box with one holder is written by that holder. Only its size matters here.
2. The other boxes are distributed, the largest first, to the holders with the fewest bytes so
   far. A box of at least two `SHARE_NBYTES` is cut along one axis into equal shares of at least
   `SHARE_NBYTES`, for as many of its holders as possible. A smaller box stays whole.

The cost of a box does not depend on the number of its holders.

Law: the shares of all processes contain each element of each box exactly once. If every process
holds every box, no process exceeds the average by more than the largest share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of, size_of

SHARE_NBYTES = 1 << 20  # smaller shares save less time in a save than they cost in a restore


class HeldBox(NamedTuple):
    """A distinct slice of an array.

    Attributes:
      box: (start, stop) per axis.
      nbytes: of the slice.
      holders: indices of the processes that have it, ascending; at least one.
    """

    box: Box
    nbytes: int
    holders: tuple[int, ...]


class Share(NamedTuple):
    """The part of a box that one process writes, in the array's coordinates."""

    source: int  # position of the HeldBox
    box: Box
    process: int


def spread(
    boxes: Sequence[HeldBox], load: Sequence[int], share_nbytes: int = SHARE_NBYTES
) -> list[Share]:
    """Says which process writes which part of which box; see the module.

    Args:
      boxes: slices of arrays, in the same order on all processes.
      load: for each process, the bytes that it has to write in any case.
      share_nbytes: the smallest size of a share, if its box is cut.

    Returns:
      The shares of all processes, in the order of `boxes`.

    >>> held = [HeldBox(((0, 8),), 8, (0, 1)), HeldBox(((0, 4),), 4, (0,))]
    >>> [(share.box, share.process) for share in spread(held, [4, 0])]
    [(((0, 8),), 1), (((0, 4),), 0)]
    >>> [(share.box, share.process) for share in spread(held, [4, 0], share_nbytes=4)]
    [(((0, 4),), 0), (((4, 8),), 1), (((0, 4),), 0)]
    """
    load = list(load)
    least: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # heaps of (load, process)
    found: list[list[Share]] = [[] for _ in boxes]
    for number in sorted(range(len(boxes)), key=lambda number: -boxes[number].nbytes):
        box, nbytes, holders = boxes[number]
        parts = _equal_parts(box, min(len(holders), nbytes // share_nbytes))
        heap = least.setdefault(holders, [])
        if not heap:
            heap += [(load[process], process) for process in holders]
            heapify(heap)
        chosen = sorted(_least_loaded(heap, load, len(parts)))
        size = nbytes // len(parts)
        for part, process in zip(parts, chosen, strict=True):
            load[process] += size
            heappush(heap, (load[process], process))
            found[number].append(Share(number, part, process))
    return [share for shares in found for share in shares]


def _least_loaded(heap: list[tuple[int, int]], load: Sequence[int], count: int) -> list[int]:
    """Takes the processes with the least load off a heap, whose loads may have grown since."""
    found: list[int] = []
    while len(found) < count:
        known, process = heappop(heap)
        if known == load[process]:
            found.append(process)
        else:
            heappush(heap, (load[process], process))
    return found


def _equal_parts(box: Box, wanted: int) -> list[Box]:
    """`box` in `wanted` nearly equal parts along the first axis that is long enough."""
    for axis, length in enumerate(shape_of(box)):
        if 1 < wanted <= length:
            start = box[axis][0]
            bounds = [start + length * i // wanted for i in range(wanted + 1)]
            return [
                (*box[:axis], (bounds[i], bounds[i + 1]), *box[axis + 1 :]) for i in range(wanted)
            ]
    return [box]


@dataclass(frozen=True, slots=True)
class OwnSlice:
    """A slice that this process writes.

    Attributes:
      source: position of the array.
      box: the slice.
      origin: the box that the device holds, in which the slice lies.
      device: id of the device.
      is_shared: whether other processes hold it as well.
    """

    source: int
    box: Box
    origin: Box
    device: int
    is_shared: bool


def own_slices(
    arrays: Sequence[tuple[Holding, int]], process: int, load: Sequence[int]
) -> list[OwnSlice]:
    """The slices of arrays that this process writes.

    Args:
      arrays: for each array who holds its boxes, and the size of an element, in the same order on
        all processes.
      process: index of this process.
      load: for each process, the bytes of other values that it writes.
    """
    total = np.array(load, np.int64)
    own: list[OwnSlice] = []
    held: list[HeldBox] = []  # by several processes
    sources: list[tuple[int, int | None]] = []  # of each of them: array, id of a device that has it
    for number, (holding, itemsize) in enumerate(arrays):
        total += holding.alone * itemsize
        own += [OwnSlice(number, box, box, device, False) for box, device in holding.own]
        for box, holders, device in holding.shared:
            held.append(HeldBox(box, size_of(box) * itemsize, holders))
            sources.append((number, device))
    for share in spread(held, total.tolist()):
        number, device = sources[share.source]
        if share.process == process and device is not None:
            own.append(OwnSlice(number, share.box, held[share.source].box, device, True))
    return own


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """Who holds the boxes of an array.

    Attributes:
      processes: all of them.
      alone: for each process, the number of elements that it alone holds.
      own: (box, device id) of the boxes that this process alone holds.
      shared: (box, processes, id of a device of this process or None) of the others.
    """

    processes: frozenset[int]
    alone: np.ndarray
    own: tuple[tuple[Box, int], ...]
    shared: tuple[tuple[Box, tuple[int, ...], int | None], ...]

    @classmethod
    def of(
        cls,
        boxes: Sequence[tuple[Box, Sequence[tuple[int, int]]]],
        process: int,
        count: int,
    ) -> Holding:
        """Works it out once for all arrays with the same sharding and shape.

        Args:
          boxes: each distinct box with the (process, device id) that hold it, by process.
          process: index of this process.
          count: number of processes.
        """
        alone = np.zeros(count, np.int64)
        own: list[tuple[Box, int]] = []
        shared: list[tuple[Box, tuple[int, ...], int | None]] = []
        for box, holders in boxes:
            if len(holders) > 1:
                numbers = tuple([number for number, _ in holders])
                shared.append((box, numbers, dict(holders).get(process)))
                continue
            ((holder, device),) = holders
            alone[holder] += size_of(box)
            if holder == process:
                own.append((box, device))
        processes = frozenset([number for _, holders in boxes for number, _ in holders])
        return cls(processes, alone, tuple(own), tuple(shared))
