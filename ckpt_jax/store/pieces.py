"""Pieces: which bytes to read for boxes of an array, and what becomes of them.

The rows of an array are cut where one of the boxes begins or ends. Rows that one box needs as a
whole are read straight into their place. All others are read in bands of at most 4 MiB into memory
that each thread keeps, and are cut from there, so that each row is read once. If a row is longer
than a band, or if rows lie far apart, each row is read in the same way, as an array of lower rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of
from ckpt_jax.store.extents import Extent, in_c_order, span_of

_BAND_NBYTES = 4 << 20  # of a read; longer ones are shared by several threads
_WASTE_NBYTES = 64 << 10  # rows that lie this far apart are read one by one

Part = tuple[np.ndarray, Box]  # an array to fill, and the elements that it takes


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of what was read, and the memory that it is copied to. Strides are in bytes."""

    target: np.ndarray
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to read: into one array as they are, or into memory that cuts are copied from."""

    offset: int
    nbytes: int
    direct: np.ndarray | None
    cuts: tuple[Cut, ...] = ()


def pieces_of(extent: Extent, parts: Sequence[Part]) -> Iterator[Piece]:
    """The reads that fill some arrays from an extent, in the order of the file."""
    itemsize = parts[0][0].dtype.itemsize
    steps = extent.steps if len(extent.box) == len(parts[0][1]) else (1,)  # a byte string
    # The slowest axis first: a transposed array lies in C order, too.
    axes = sorted(range(len(steps)), key=lambda axis: -steps[axis])
    ordered = [
        (target.transpose(axes), tuple([box[axis] for axis in axes])) for target, box in parts
    ]
    yield from _rows(extent.offset, tuple([steps[axis] for axis in axes]), ordered, itemsize)


def _rows(
    offset: int, steps: tuple[int, ...], parts: Sequence[Part], itemsize: int
) -> Iterator[Piece]:
    """The reads for parts of an array that begins at an offset in bytes."""
    if not steps:
        yield Piece(offset, itemsize, None, tuple([Cut(target, 0, ()) for target, _ in parts]))
        return
    bounds = sorted({bound for _, box in parts for bound in box[0]})
    for start, stop in itertools.pairwise(bounds):
        wanted = [
            (target[start - box[0][0] : stop - box[0][0]], box[1:])
            for target, box in parts
            if box[0][0] <= start and stop <= box[0][1]
        ]
        if wanted:
            first = offset + start * steps[0] * itemsize
            yield from _same_rows(first, stop - start, steps, wanted, itemsize)


def _same_rows(
    offset: int, count: int, steps: tuple[int, ...], parts: Sequence[Part], itemsize: int
) -> Iterator[Piece]:
    """The reads for parts of `count` rows, of which each part has all.

    Args:
      offset: of the first row.
      count: of rows.
      steps: strides of the rows and of their axes.
      parts: arrays, and for each its box without the axis of the rows.
      itemsize: of an element.
    """
    step, inner = steps[0], steps[1:]
    target, box = parts[0]
    is_dense = in_c_order((count, *shape_of(box)), steps)
    if len(parts) == 1 and is_dense and target.flags.c_contiguous:
        yield from _direct(offset + _first(box, inner) * itemsize, target)
        return
    first = min([_first(box, inner) for _, box in parts])
    width = max([_first(box, inner) + span_of(shape_of(box), inner) for _, box in parts]) - first
    are_far = count > 1 and (step - width) * itemsize >= _WASTE_NBYTES
    if inner and (are_far or width * itemsize > _BAND_NBYTES):
        for row in range(count):
            rows = [(target[row, ...], box) for target, box in parts]
            yield from _rows(offset + row * step * itemsize, inner, rows, itemsize)
        return
    if step == 0:
        height = count
    else:
        height = 1 if are_far else max(1, (_BAND_NBYTES // itemsize - width) // step + 1)
    strides = tuple([step * itemsize for step in steps])
    for top in range(0, count, height):
        end = min(count, top + height)
        yield Piece(
            offset + (top * step + first) * itemsize,
            ((end - top - 1) * step + width) * itemsize,
            None,
            tuple(
                [
                    Cut(target[top:end], (_first(box, inner) - first) * itemsize, strides)
                    for target, box in parts
                ]
            ),
        )


def _first(box: Box, steps: Sequence[int]) -> int:
    """Where the first element of a box lies, in elements from the beginning."""
    return sum([start * step for (start, _), step in zip(box, steps, strict=True)])


def _direct(offset: int, target: np.ndarray) -> Iterator[Piece]:
    """The reads that fill an array as it is."""
    flat = target.reshape(-1)
    length = max(1, _BAND_NBYTES // flat.itemsize)
    for start in range(0, flat.size, length):
        part = flat[start : start + length]
        yield Piece(offset + start * flat.itemsize, part.nbytes, part)
