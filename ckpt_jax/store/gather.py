"""Gathering: works out which bytes to read for the wanted boxes. Nothing is read here.

Terms. A *request* asks for boxes of one array. A *piece* is the range of bytes of one stored
slice that one wanted box needs. A *run* is a range of consecutive rows of a stack, or of the
bytes of one row; all pieces in it are read together.

1. *Geometry.* Wanted boxes are intersected with stored slices. The result depends only on the
   array's pattern of layouts and the boxes, so it is worked out once for all arrays that share
   these.
2. *Runs.* All pieces are sorted by place and joined to runs of bounded size, by operations on
   whole columns. Pieces in the same chunk go into the same run, because a chunk has to be read as
   a whole to be verified.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt_jax.graph.boxes import Box, Shape, inside, intersect, shape_of, size_of, slices
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.store.index import Index, Layout
from ckpt_jax.store.stack import ALIGNMENT, round_up

RUN_NBYTES = 16 << 20  # runs are joined, and ranges read, up to about this size

Request = tuple[str, Sequence[Box]]


class StackTable:
    """The stacks of all shards, as columns with one row for each stack.

    Attributes:
      base: for each shard, the number of its first stack in this table.
      shard: for each stack, the number of its shard.
      number: for each stack, its number in its shard.
      chunk_nbytes, row_nbytes: for each stack, its sizes.
    """

    def __init__(self, index: Index):
        shards = index.shards
        stacks = [stack for shard in shards for stack in shard.stacks]
        self.base = np.cumsum([0, *[len(shard.stacks) for shard in shards]])
        self.shard = [i for i, shard in enumerate(shards) for _ in shard.stacks]
        self.number = [j for shard in shards for j in range(len(shard.stacks))]
        self.chunk_nbytes = np.array([s.chunk_nbytes for s in stacks], np.int64)
        self.row_nbytes = np.array([s.row_nbytes for s in stacks], np.int64)

    def nbytes_decoded(self, read: RangeRead) -> int:
        """The size of all chunks that a read touches."""
        chunk = int(self.chunk_nbytes[read.run.stack])
        stop = min(round_up(read.stop, chunk), int(self.row_nbytes[read.run.stack]))
        return (stop - read.start // chunk * chunk) * (read.run.nbytes // read.run.pitch)


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
    """How wanted boxes are made of stored slices, for all arrays of one pattern.

    Attributes:
      dtype: the dtype of the arrays.
      shapes: the shapes of the wanted boxes.
      slices: for each piece, the position of its slice among the array's slices.
      starts, stops: for each piece, its bytes, counted from the start of its slice.
      uses: for each piece, the part of a wanted box that it holds.
    """

    dtype: np.dtype
    shapes: tuple[Shape, ...]
    slices: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    uses: tuple[Use, ...]


def geometry_of(layouts: Sequence[Layout], wanted: Sequence[Box], *, views: bool) -> Geometry:
    """The geometry for an array with these layouts.

    Args:
      layouts: of the stored slices.
      wanted: the wanted boxes.
      views: whether results may be views of what is read.

    Raises:
      ValueError: a box does not lie inside the array, or not all of it is stored.
    """
    shape = layouts[0].shape
    dtype = np.dtype(np.uint8) if layouts[0].is_bytes else dtype_of(layouts[0].dtype)
    stored = [layout.box for layout in layouts]
    if layouts[0].is_bytes:
        if any(box != () for box in wanted):
            raise ValueError("is a byte string, its only box is ()")
        shape = (layouts[0].nbytes,)
        stored = [((0, shape[0]),)]
        wanted = stored * len(wanted)
    pieces: list[tuple[int, int, int, Use]] = []
    viewed: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, box in enumerate(wanted):
        if not inside(box, shape):
            raise ValueError(f"box {box} does not lie inside shape {shape}")
        held = 0
        for i, origin in enumerate(stored):
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
      stack, row, start, stop: the place of the bytes; the stack as a row of the `StackTable`.
      view: whether a view is enough.
    """

    request: np.ndarray
    use: np.ndarray
    stack: np.ndarray
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    view: np.ndarray

    @classmethod
    def of(
        cls,
        index: Index,
        stacks: StackTable,
        requests: Sequence[Request],
        geometries: Sequence[Geometry],
    ) -> Pieces:
        number = index.number
        alike: dict[int, list[int]] = defaultdict(list)
        for i, geometry in enumerate(geometries):
            alike[id(geometry)].append(i)
        parts = []
        for members in alike.values():
            geometry = geometries[members[0]]
            keys = [number[requests[i][0]] for i in members]
            rows = (index.starts[keys][:, None] + geometry.slices).ravel()
            many = len(members)
            start = index.offset[rows]
            parts.append(
                (
                    np.repeat(np.array(members), len(geometry.uses)),
                    np.tile(np.arange(len(geometry.uses)), many),
                    stacks.base[index.shard[rows]] + index.stack[rows],
                    index.row[rows],
                    start + np.tile(geometry.starts, many),
                    start + np.tile(geometry.stops, many),
                    np.tile(np.array([u.where is None for u in geometry.uses], bool), many),
                )
            )
        if not parts:
            return cls(*[np.empty(0, np.int64)] * 7)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.lexsort((columns[4], columns[3], columns[2]))
        return cls(*[column[order] for column in columns])


@dataclass(slots=True)
class Run:
    """Rows of a stack from `row` on, or a range of one row, and the pieces in it.

    Attributes:
      stack, row: the stack, as a row of the `StackTable`, and the first row in it.
      start, stop: the range of bytes of each row.
      nbytes: size of the buffer, in which rows lie `pitch` bytes apart.
      first, last: the range of its pieces in `Pieces`.
      offset: for each piece, where it starts in the buffer.
      viewed: whether results will be views of the buffer.
      buffer: where it is read to; None until reading begins.
    """

    stack: int
    row: int
    start: int
    stop: int
    nbytes: int
    pitch: int
    first: int
    last: int
    offset: list[int]
    viewed: bool
    buffer: np.ndarray | None = field(default=None)

    def reads(self, stacks: StackTable) -> Iterator[RangeRead]:
        """This run in one read, or in several if it is too large; each ends where a chunk ends."""
        chunk = int(stacks.chunk_nbytes[self.stack])
        step = max(1, RUN_NBYTES // chunk) * chunk
        start = self.start
        while start < self.stop:
            stop = self.stop
            if stop - start > RUN_NBYTES:
                stop = min(stop, start // chunk * chunk + step)
            nbytes = (stop - start) * (self.nbytes // self.pitch)
            yield RangeRead(self, start, stop, nbytes, stop == self.stop)
            start = stop


@dataclass(frozen=True, slots=True)
class RangeRead:
    """The bytes from `start` to `stop` of the rows of a run; `last` says that the run ends here."""

    run: Run
    start: int
    stop: int
    nbytes: int
    last: bool


def runs_of(pieces: Pieces, stacks: StackTable) -> list[Run]:
    """Joins pieces to runs. The runs are in the order in which requests need them."""
    if not pieces.row.size:
        return []
    chunk = stacks.chunk_nbytes[pieces.stack]
    begin = _first_of_ranges(pieces, chunk)
    # From here on, a column has one number for each range.
    stack, row = pieces.stack[begin], pieces.row[begin]
    start = pieces.start[begin] // ALIGNMENT * ALIGNMENT
    stop = np.maximum.reduceat(pieces.stop, begin)
    pitch = -(-(stop - start) // ALIGNMENT) * ALIGNMENT
    follows = np.zeros(len(begin), bool)
    follows[1:] = (np.diff(stack) == 0) & (np.diff(row) == 1)
    follows[1:] &= (np.diff(start) == 0) & (np.diff(stop) == 0)
    chain = np.flatnonzero(~follows)
    along = np.arange(len(begin)) - np.repeat(chain, np.diff(chain, append=len(begin)))
    begins = np.flatnonzero(along % np.maximum(1, RUN_NBYTES // pitch) == 0)
    # From here on, a column has one number for each run.
    rows = np.diff(begins, append=len(begin))
    piece = np.append(begin[begins], len(pieces.row))
    pieces_in = np.diff(piece)
    offset = (pieces.row - np.repeat(row[begins], pieces_in)) * np.repeat(pitch[begins], pieces_in)
    offset += pieces.start - np.repeat(start[begins], pieces_in)
    viewed = np.logical_or.reduceat(pieces.view & (offset % ALIGNMENT == 0), piece[:-1])
    columns = (
        stack[begins],
        row[begins],
        start[begins],
        stop[begins],
        rows * pitch[begins],
        pitch[begins],
        piece[:-1],
        piece[1:],
        viewed,
    )
    runs = [
        Run(s, r, a, b, nbytes, p, first, last, offset[first:last].tolist(), view)
        for s, r, a, b, nbytes, p, first, last, view in zip(
            *[c.tolist() for c in columns], strict=True
        )
    ]
    needed = np.minimum.reduceat(pieces.request, piece[:-1])
    return [runs[i] for i in np.argsort(needed, kind="stable")]


def _first_of_ranges(pieces: Pieces, chunk: np.ndarray) -> np.ndarray:
    """The pieces that begin a range. Pieces that touch the same chunk are in the same range."""
    same_row = (np.diff(pieces.stack) == 0) & (np.diff(pieces.row) == 0)
    begins = np.ones(len(pieces.row), bool)
    reach = _reach(np.cumsum(~np.append(False, same_row)), pieces.stop)
    begins[1:] = ~same_row | (pieces.start[1:] // chunk[1:] > (reach[:-1] - 1) // chunk[1:])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(begins))
    length = np.maximum.reduceat(pieces.stop, first) - pieces.start[first]
    for i in np.flatnonzero((length > RUN_NBYTES) & (last - first > 1)).tolist():
        # The range is too long. It is cut where at most one chunk, at the seam, is read twice.
        start, stop = pieces.start[first[i]], pieces.stop[first[i]]
        for j in range(first[i] + 1, last[i]):
            if pieces.stop[j] - start > RUN_NBYTES and stop - pieces.start[j] < chunk[j]:
                begins[j] = True
                start, stop = pieces.start[j], pieces.stop[j]
            else:
                stop = max(stop, pieces.stop[j])
    return np.flatnonzero(begins)


def _reach(group: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The running maximum of `stop` inside each group. Group numbers ascend."""
    values, rank = np.unique(stop, return_inverse=True)
    base = group * len(values)
    return values[np.maximum.accumulate(base + rank) - base]
