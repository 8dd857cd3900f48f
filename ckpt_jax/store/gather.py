"""Gathering: works out which bytes to read for the wanted boxes. Nothing is read here.

Terms. A *request* asks for boxes of one array. A *piece* is the range of bytes of one stored
slice that one wanted box needs. A *run* is a range of a stream; all pieces in it are read together.

1. *Geometry.* Wanted boxes are intersected with stored slices. The result depends only on the
   array's tiling and the boxes, so it is worked out once for all arrays that share these.
2. *Runs.* All pieces are sorted by place and joined to runs of bounded size. A run consists of
   whole blocks, because a block has to be read as a whole to be verified.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt_jax.graph.boxes import Box, Shape, inside, intersect, shape_of, size_of, slices
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.store.index import Index
from ckpt_jax.store.stream import ALIGNMENT
from ckpt_jax.store.tiling import Tiling

RUN_NBYTES = 16 << 20  # runs are joined, and ranges read, up to about this size

Request = tuple[str, Sequence[Box]]


@dataclass(frozen=True, slots=True)
class Use:
    """The part of a wanted box that a piece holds.

    Attributes:
      box: position of the wanted box.
      shape: shape of the part that the piece holds.
      where: the place of that part in the wanted box. None if the part is the whole box and is
        contiguous, so that a view is enough.
      strides: strides of the part inside the stored slice, in bytes.
    """

    box: int
    shape: Shape
    where: tuple[slice, ...] | None
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """How wanted boxes are made of stored slices, for all arrays of one tiling.

    Attributes:
      dtype: the dtype of the arrays.
      shapes: the shapes of the wanted boxes.
      slices: for each piece, the number of its slice in the tiling.
      starts, stops: for each piece, its bytes, counted from the start of its slice.
      uses: for each piece, the part of a wanted box that it holds.
    """

    dtype: np.dtype
    shapes: tuple[Shape, ...]
    slices: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    uses: tuple[Use, ...]


def geometry_of(tiling: Tiling, wanted: Sequence[Box], *, views: bool) -> Geometry:
    """The geometry for an array with this tiling.

    Args:
      tiling: the stored slices.
      wanted: the wanted boxes.
      views: whether results may be views of what is read.

    Raises:
      ValueError: a box does not lie inside the array, or not all of it is stored.
    """
    first = tiling.first
    shape = first.shape
    dtype = np.dtype(np.uint8) if first.is_bytes else dtype_of(first.dtype)
    if first.is_bytes:
        if any(box != () for box in wanted):
            raise ValueError("is a byte string, its only box is ()")
        shape = (first.nbytes,)
        wanted = [((0, first.nbytes),)] * len(wanted)
    pieces: list[tuple[int, int, int, Use]] = []
    viewed: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, box in enumerate(wanted):
        if not inside(box, shape):
            raise ValueError(f"box {box} does not lie inside shape {shape}")
        held = 0
        for i in (0,) if first.is_bytes else tiling.touching(box):
            origin = box if first.is_bytes else tiling.box(i)
            common = intersect(origin, box)
            if common is None:
                continue
            held += size_of(common)
            extent = shape_of(origin)
            strides = tuple(
                [math.prod(extent[axis + 1 :]) * dtype.itemsize for axis in range(len(extent))]
            )
            start, stop = _range(common, origin, strides, dtype.itemsize)
            free = views and all(stop <= a or b <= start for a, b in viewed[i])
            if free and common == box and stop - start == size_of(box) * dtype.itemsize:
                viewed[i].append((start, stop))
                pieces.append((i, start, stop, Use(number, shape_of(box), None, strides)))
                continue
            for part in _bounded_parts(common, strides):
                start, stop = _range(part, origin, strides, dtype.itemsize)
                use = Use(number, shape_of(part), slices(part, box), strides)
                pieces.append((i, start, stop, use))
        if held != size_of(box):
            raise ValueError(f"only {held} of {size_of(box)} elements of box {box} are stored")
    number, start, stop = np.array([p[:3] for p in pieces], np.int64).reshape(-1, 3).T
    uses = tuple([p[3] for p in pieces])
    return Geometry(dtype, tuple(map(shape_of, wanted)), number, start, stop, uses)


def _range(part: Box, origin: Box, strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The bytes from the first element of `part` to its last, in the slice with box `origin`."""
    start = sum((a - o) * n for (a, _), (o, _), n in zip(part, origin, strides, strict=True))
    span = sum((b - a - 1) * n for (a, b), n in zip(part, strides, strict=True))
    return start, start + span + itemsize


def _bounded_parts(part: Box, strides: tuple[int, ...]) -> Iterator[Box]:
    """Cuts `part` into parts that span at most `RUN_NBYTES`, so that scratch memory is bounded."""
    axis = next((i for i, (a, b) in enumerate(part) if b - a > 1), None)
    if axis is None or (part[axis][1] - part[axis][0]) * strides[axis] <= RUN_NBYTES:
        yield part
        return
    first, last = part[axis]
    step = max(1, RUN_NBYTES // strides[axis])
    for a in range(first, last, step):
        smaller = (*part[:axis], (a, min(a + step, last)), *part[axis + 1 :])
        yield from _bounded_parts(smaller, strides) if step == 1 else [smaller]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """All pieces of a call as columns, sorted by place.

    Attributes:
      request, use: position of the request, and of the use in the request's geometry.
      shard, start, stop: the place of the bytes: a range of the stream of a shard.
      view: whether a view is enough.
    """

    request: np.ndarray
    use: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    view: np.ndarray

    @classmethod
    def of(
        cls, index: Index, requests: Sequence[Request], geometries: Sequence[Geometry]
    ) -> Pieces:
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (geometry, (key, _)) in enumerate(zip(geometries, requests, strict=True)):
            alike[id(geometry), index.tiling_number(key)].append(i)
        parts = []
        for (_, number), members in alike.items():
            geometry, tiling = geometries[members[0]], index.tiling(number)
            keys = np.array([index.number[requests[i][0]] for i in members], np.int64)
            offset = _offsets(index, tiling, geometry.slices, keys)
            many = len(members)
            parts.append(
                (
                    np.repeat(np.array(members), len(geometry.uses)),
                    np.tile(np.arange(len(geometry.uses)), many),
                    np.tile(tiling.shard[geometry.slices], many),
                    offset + np.tile(geometry.starts, many),
                    offset + np.tile(geometry.stops, many),
                    np.tile(np.array([u.where is None for u in geometry.uses], bool), many),
                )
            )
        if not parts:
            return cls(*[np.empty(0, np.int64)] * 6)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.lexsort((columns[3], columns[2]))
        return cls(*[column[order] for column in columns])


def _offsets(index: Index, tiling: Tiling, slices: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where these slices of these keys, which share a tiling, begin: key by key."""
    found = np.empty((len(keys), len(slices)), np.int64)
    tables = np.array(index.table, np.int64)[tiling.shard[slices]]
    for number in np.unique(tables).tolist():
        table = index.tables[number]
        first = table.first[np.searchsorted(index.key_numbers[number], keys)]
        here = np.flatnonzero(tables == number)
        found[:, here] = table.offset[first[:, None] + tiling.row[slices[here]]]
    return found.ravel()


@dataclass(slots=True)
class Run:
    """A range of a stream that consists of whole blocks, and the pieces in it.

    Attributes:
      shard: the number of the shard.
      start, stop: the range.
      block_nbytes: the size of a block.
      first, last: the range of its pieces in `Pieces`.
      offset: for each piece, where it starts in the buffer.
      viewed: whether results may be views of the buffer.
      buffer: where it is read to; None until reading begins.
    """

    shard: int
    start: int
    stop: int
    block_nbytes: int
    first: int
    last: int
    offset: list[int]
    viewed: bool
    buffer: np.ndarray | None = field(default=None)

    @property
    def nbytes(self) -> int:
        """The size of the buffer."""
        return self.stop - self.start

    def reads(self) -> Iterator[RangeRead]:
        """This run in one read, or in several if it is too large; each ends where a block ends."""
        step = max(1, RUN_NBYTES // self.block_nbytes) * self.block_nbytes
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            yield RangeRead(self, start, stop, stop == self.stop)


@dataclass(frozen=True, slots=True)
class RangeRead:
    """The range from `start` to `stop` of a run; `last` says that the run ends here."""

    run: Run
    start: int
    stop: int
    last: bool

    @property
    def nbytes(self) -> int:
        """The size of the range."""
        return self.stop - self.start


def runs_of(pieces: Pieces, index: Index) -> list[Run]:
    """Joins pieces to runs. The runs are in the order in which requests need them."""
    count = len(pieces.shard)
    if not count:
        return []
    block = np.array([shard.block_nbytes for shard in index.shards], np.int64)[pieces.shard]
    begin = np.array(_begins(pieces, block), np.int64)
    # From here on, a column has one number for each run.
    end = np.append(begin[1:], count)
    shard, block = pieces.shard[begin], block[begin]
    start = pieces.start[begin] // block * block
    sizes = np.array([shard.nbytes for shard in index.shards], np.int64)[shard]
    stop = np.minimum(-(-np.maximum.reduceat(pieces.stop, begin) // block) * block, sizes)
    offset = pieces.start - np.repeat(start, end - begin)
    # A view keeps the whole buffer, so most of it has to be views.
    views = np.where(pieces.view & (offset % ALIGNMENT == 0), pieces.stop - pieces.start, 0)
    viewed = 2 * np.add.reduceat(views, begin) >= stop - start
    columns = (shard, start, stop, block, begin, end, viewed)
    runs = [
        Run(s, a, b, c, first, last, offset[first:last].tolist(), view)
        for s, a, b, c, first, last, view in zip(*[x.tolist() for x in columns], strict=True)
    ]
    needed = np.minimum.reduceat(pieces.request, begin)
    return [runs[i] for i in np.argsort(needed, kind="stable")]


def _begins(pieces: Pieces, block: np.ndarray) -> list[int]:
    """The pieces that begin a run.

    A run ends where blocks follow that nobody needs. One that is too long ends where at most one
    block, at the seam, is read twice.
    """
    found: list[int] = []
    last, begin, reach = -1, 0, 0
    columns = (pieces.shard, pieces.start, pieces.stop, block)
    for i, (shard, start, stop, size) in enumerate(
        zip(*[c.tolist() for c in columns], strict=True)
    ):
        gap = start // size > -(-reach // size)
        if shard != last or gap or (stop - begin > RUN_NBYTES and reach - start < size):
            found.append(i)
            last, begin, reach = shard, start, stop
        else:
            reach = max(reach, stop)
    return found
