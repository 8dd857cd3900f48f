"""Reading slices: boxes wanted by the caller, out of the boxes that were stored.

Terms. A *request* asks for boxes of one array. A *piece* is the range of bytes of one stored
slice that one wanted box needs. A *run* is what one read brings: consecutive rows of a stack,
or a range of one row, with all pieces in it.

1. *Geometry.* Wanted boxes are intersected with stored slices. The result depends only on the
   array's pattern of layouts and the boxes, so it is worked out once for all arrays alike.
2. *Runs.* All pieces are sorted by place and joined to runs of bounded size, on whole columns.
   Pieces in one chunk come together, as a chunk has to be read as a whole to be verified.
3. *Reading.* A bounded number of bytes is in flight; each run goes straight into a fresh
   buffer, in the order in which requests need them.
4. *Assembly.* A box that lies contiguously in one stored slice is a view of the run's buffer.
   The others are copied together from the runs that hold their parts. A request is yielded as
   soon as its last run has arrived, while later ones are being read.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.store.box import Box, Shape, inside, intersect, shape_of, size_of, slices
from ckpt_jax.store.index import BYTES, INDEX_KEY, Index, Layout, Shard, dtype_of
from ckpt_jax.store.stack import (
    ALIGNMENT,
    MANIFEST,
    new_context,
    open_database,
    open_stack,
    round_up,
    storage_error,
)

RUN_NBYTES = 16 << 20
_BLOCK_NBYTES = 4 << 20  # from this size on numpy asks for huge pages, which fill 4x faster

Request = tuple[str, Sequence[Box]]
Arrays = tuple[np.ndarray, ...]


def read_value(directory: str, name: str) -> bytes | None:
    """The raw value `name` of the database in `directory`, None where it has no such value.

    Raises:
      CheckpointNotFoundError: there is no database.
      CorruptCheckpointError: it cannot be read.
    """
    if not os.path.exists(os.path.join(directory, MANIFEST)):
        raise CheckpointNotFoundError(f"{directory}: no checkpoint, {MANIFEST} is missing")
    try:
        result = open_database(directory, new_context()).read(name).result()
    except ValueError as error:
        raise _damage(error, directory, f"value {name!r}") from error
    return None if result.state == "missing" else result.value


def read_index(directory: str) -> Index:
    """The index of the checkpoint or shard in `directory`.

    Raises:
      CheckpointNotFoundError: there is neither.
      CorruptCheckpointError: the index cannot be read, or cannot be true.
    """
    data = read_value(directory, INDEX_KEY)
    if data is None:
        raise CorruptCheckpointError(
            f"{directory}: has no index, its write was interrupted", file=directory
        )
    try:
        return Index.from_bytes(data)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{directory}: {error}", file=directory) from error


class ShardedReader:
    """Reads the arrays of a checkpoint or of a single shard.

    Checksums are verified on every read. Files are open only during reads.

    Args:
      directory: of a checkpoint or of a shard.

    Attributes:
      directory: the same.
      index: what is stored.
      bytes_read: bytes of all chunks that were asked for so far, as they are when decoded.
    """

    def __init__(self, directory: str):
        self.directory = os.path.abspath(directory)
        self.index = read_index(self.directory)
        self.bytes_read = 0
        self._stacks = _Stacks(self.index)
        self._context = new_context()
        self._stores: dict[int, ts.TensorStore] | None = {}
        self._sound: set[int] = set()  # shards whose files are as large as they have to be
        self._geometries: dict[tuple[int, tuple[Box, ...], bool], _Geometry] = {}

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the checkpoint; further reads are refused."""
        self._stores = None
        self._geometries = {}

    def extra(self, name: str) -> bytes | None:
        """The small value `name` that was committed with the checkpoint, None if there is none."""
        return read_value(self.directory, name)

    def read_bytes(self, key: str) -> bytes:
        """The byte string under `key`. To read many, ask `read` for the box `()` of each."""
        ((_, (array,)),) = self.read([(key, [()])])
        return array.tobytes()

    def read(
        self, requests: Sequence[Request], *, max_inflight_bytes: int = 64 << 20
    ) -> Iterator[tuple[int, Arrays]]:
        """Reads boxes of arrays.

        Arrays are writable, C-contiguous, aligned to 64 bytes, and share no element. Those that
        lie close together on disk share one block of memory, of about 16 MiB.

        Args:
          requests: keys, and the boxes wanted of each. The only box of a byte string is `()`;
            it is read as an array of uint8.
          max_inflight_bytes: how much is read ahead of what the caller has taken.

        Returns:
          An iterator over (position in `requests`, one array for each box), in any order.

        Raises:
          KeyError: a key is not in the index.
          RuntimeError: the reader is closed.
          ValueError: a box does not lie inside its array, or not all of it is stored here.
          CorruptCheckpointError: from the iterator; names the file and the keys concerned.
        """
        if self._stores is None:
            raise RuntimeError(f"{self.directory}: the reader is closed")
        geometries = self._geometries_of(requests)
        pieces = _Pieces.of(self.index, self._stacks, requests, geometries)
        return self._results(requests, geometries, pieces, max_inflight_bytes)

    def _geometries_of(self, requests: Sequence[Request]) -> list[_Geometry]:
        index, cached = self.index, self._geometries
        geometries = []
        seen: set[str] = set()
        for key, wanted in requests:
            number = index.number.get(key)
            if number is None:
                raise KeyError(f"{key}: is not in {self.directory}")
            # Two views of the same bytes would not be independent arrays.
            what = (index.pattern[number], tuple(wanted), key not in seen)
            seen.add(key)
            geometry = cached.get(what)
            if geometry is None:
                layouts = [index.layouts[i] for i in index.patterns[what[0]]]
                try:
                    geometry = _geometry(layouts, what[1], views=what[2])
                except ValueError as error:
                    raise ValueError(f"{key}: {error} in {self.directory}") from None
                cached[what] = geometry
            geometries.append(geometry)
        return geometries

    def _results(
        self,
        requests: Sequence[Request],
        geometries: list[_Geometry],
        pieces: _Pieces,
        max_inflight_bytes: int,
    ) -> Iterator[tuple[int, Arrays]]:
        assembly = _Assembly(geometries, pieces)
        runs = _runs(pieces, self._stacks)
        memory = _Memory(sum(run.nbytes for run in runs))
        reads = (read for run in runs for read in run.reads(self._stacks))
        in_flight: deque[tuple[_Read, ts.WriteFutures]] = deque()
        held = 0
        waiting = next(reads, None)
        try:
            yield from assembly.finished()
            while waiting is not None or in_flight:
                while waiting is not None and (
                    not in_flight or held + waiting.nbytes <= max_inflight_bytes
                ):
                    try:
                        in_flight.append((waiting, self._start(waiting, memory)))
                    except ValueError as error:
                        raise self._corrupt(error, waiting, pieces, requests) from error
                    held += waiting.nbytes
                    waiting = next(reads, None)
                read, future = in_flight.popleft()
                try:
                    future.result()
                except ValueError as error:
                    raise self._corrupt(error, read, pieces, requests) from error
                held -= read.nbytes
                if read.last:
                    assembly.arrived(read.run, memory)
                    yield from assembly.finished()
        finally:
            for _, future in in_flight:  # they write into our buffers
                future.commit.exception()

    def _start(self, read: _Read, memory: _Memory) -> ts.WriteFutures:
        run = read.run
        store = self._store(run.stack)
        if run.buffer is None:
            run.buffer = memory.take(run.nbytes, scratch=not run.viewed)
        rows = run.buffer[: run.nbytes].reshape(-1, run.pitch)
        self.bytes_read += self._stacks.nbytes_decoded(read)
        target = rows[:, read.start - run.start : read.stop - run.start]
        source = store[run.row : run.row + len(rows), read.start : read.stop]
        return ts.array(target).write(source.translate_to[0])

    def _store(self, stack: int) -> ts.TensorStore:
        if self._stores is None:
            raise RuntimeError(f"{self.directory}: the reader is closed")
        if stack not in self._stores:
            number = self._stacks.shard[stack]
            shard = self.index.shards[number]
            if number not in self._sound:
                self._check_files(shard)
                self._sound.add(number)
            place = self._stacks.number[stack]
            self._stores[stack] = open_stack(
                self.directory, self._context, shard.id, place, shard.stacks[place]
            )
        return self._stores[stack]

    def _check_files(self, shard: Shard) -> None:
        """Refuses to allocate memory for bytes that the files cannot hold."""
        declared = sum(s.rows * s.row_nbytes for s in shard.stacks if not s.compression)
        found = 0
        for path, _, files in os.walk(self._path(shard)):
            found += sum(os.path.getsize(os.path.join(path, file)) for file in files)
        if found < declared:
            raise ValueError(
                f"its files have {found} bytes, the index lists {declared}: a file is truncated "
                "or missing"
            )

    def _path(self, shard: Shard) -> str:
        return os.path.normpath(os.path.join(self.directory, shard.directory))

    def _corrupt(
        self, error: ValueError, read: _Read, pieces: _Pieces, requests: Sequence[Request]
    ) -> Exception:
        run = read.run
        here = range(run.first, run.last)
        chunk = _CHUNK.search(str(error))
        if chunk is not None:
            row, column = int(chunk[1]), int(chunk[2])
            size = self._stacks.chunk_nbytes[run.stack]
            touched = (pieces.row[run.first : run.last] == row) & (
                (pieces.start[run.first : run.last] // size <= column)
                & ((pieces.stop[run.first : run.last] - 1) // size >= column)
            )
            here = [p for p, hit in zip(here, touched, strict=True) if hit] or here
        keys = sorted({requests[pieces.request[p]][0] for p in here})
        shard = self.index.shards[self._stacks.shard[run.stack]]
        what = keys[0] if len(keys) == 1 else f"{', '.join(keys[:8])}"
        if len(keys) > 8:
            what += f" and {len(keys) - 8} others"
        return _damage(error, self._path(shard), what, keys[0])


_CHUNK = re.compile(r"[0-9a-f]{16}/\d+/c/(\d+)/(\d+)")
_FILE = re.compile(r'local file "([^"]+[^"/])"')


def _damage(error: ValueError, directory: str, what: str, key: str | None = None) -> Exception:
    cause = storage_error(error, directory)
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        return cause
    files = _FILE.findall(str(error))
    file = files[-1] if files else directory
    return CorruptCheckpointError(
        f"{what}: {file} is damaged or incomplete: {error}", file=file, key=key
    )


class _Stacks:
    """The stacks of all shards under one numbering, as columns."""

    def __init__(self, index: Index):
        shards = index.shards
        stacks = [stack for shard in shards for stack in shard.stacks]
        self.base = np.cumsum([0, *[len(shard.stacks) for shard in shards]])
        self.shard = [i for i, shard in enumerate(shards) for _ in shard.stacks]
        self.number = [j for shard in shards for j in range(len(shard.stacks))]
        self.chunk_nbytes = np.array([s.chunk_nbytes for s in stacks], np.int64)
        self.row_nbytes = np.array([s.row_nbytes for s in stacks], np.int64)

    def nbytes_decoded(self, read: _Read) -> int:
        chunk = int(self.chunk_nbytes[read.run.stack])
        stop = min(round_up(read.stop, chunk), int(self.row_nbytes[read.run.stack]))
        return (stop - read.start // chunk * chunk) * (read.run.nbytes // read.run.pitch)


@dataclass(frozen=True, slots=True)
class _Use:
    """What a piece is good for.

    Attributes:
      box: position of the wanted box.
      shape: of the part that the piece holds.
      where: the place of that part in the wanted box; None where it is all of it and
        contiguous, so that a view will do.
      strides: of the part inside the stored slice, in bytes.
    """

    box: int
    shape: Shape
    where: tuple[slice, ...] | None
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Geometry:
    """How wanted boxes are made of stored slices, for all arrays of one pattern.

    Attributes:
      dtype: of the arrays.
      shapes: of the wanted boxes.
      slices: for each piece, the position of its slice in the array's entry.
      starts, stops: for each piece, its bytes, counted from the start of its slice.
      uses: for each piece, what it is good for.
    """

    dtype: np.dtype
    shapes: tuple[Shape, ...]
    slices: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    uses: tuple[_Use, ...]


def _geometry(layouts: Sequence[Layout], wanted: Sequence[Box], *, views: bool) -> _Geometry:
    shape = layouts[0].shape
    dtype = np.dtype(np.uint8) if layouts[0].dtype == BYTES else dtype_of(layouts[0].dtype)
    stored = [layout.box for layout in layouts]
    if layouts[0].dtype == BYTES:
        if any(box != () for box in wanted):
            raise ValueError("is a byte string, its only box is ()")
        shape = (layouts[0].nbytes,)
        stored = [((0, shape[0]),)]
        wanted = stored * len(wanted)
    pieces: list[tuple[int, int, int, _Use]] = []
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
                pieces.append((i, start, stop, _Use(number, shape_of(box), None, strides)))
                continue
            for part in _cut(common, strides):
                start, stop = _range(part, origin, strides, dtype.itemsize)
                use = _Use(number, shape_of(part), slices(part, box), strides)
                pieces.append((i, start, stop, use))
        if held != size_of(box):
            raise ValueError(f"only {held} of {size_of(box)} elements of box {box} are stored")
    number, start, stop = np.array([p[:3] for p in pieces], np.int64).reshape(-1, 3).T
    uses = tuple([p[3] for p in pieces])
    return _Geometry(dtype, tuple(map(shape_of, wanted)), number, start, stop, uses)


def _range(part: Box, origin: Box, strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The bytes from the first element of `part` to its last, in the slice with box `origin`."""
    start = sum((a - o) * n for (a, _), (o, _), n in zip(part, origin, strides, strict=True))
    span = sum((b - a - 1) * n for (a, b), n in zip(part, strides, strict=True))
    return start, start + span + itemsize


def _cut(part: Box, strides: tuple[int, ...]) -> Iterator[Box]:
    """`part` in parts that span no more than `RUN_NBYTES`, so that scratch memory is bounded."""
    axis = next((i for i, (a, b) in enumerate(part) if b - a > 1), None)
    if axis is None or (part[axis][1] - part[axis][0]) * strides[axis] <= RUN_NBYTES:
        yield part
        return
    first, last = part[axis]
    step = max(1, RUN_NBYTES // strides[axis])
    for a in range(first, last, step):
        smaller = (*part[:axis], (a, min(a + step, last)), *part[axis + 1 :])
        yield from _cut(smaller, strides) if step == 1 else [smaller]


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """All pieces of a call, as columns, sorted by place.

    Attributes:
      request, use: position of the request, and of the use in its geometry.
      stack, row, start, stop: the place of the bytes; the stack in `_Stacks` numbering.
      view: whether a view would do.
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
        stacks: _Stacks,
        requests: Sequence[Request],
        geometries: Sequence[_Geometry],
    ) -> _Pieces:
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
class _Run:
    """Rows of a stack from `row` on, or a range of one row, and what lies in it.

    Attributes:
      start, stop: bytes of each row.
      nbytes: of the buffer, in which rows lie `pitch` bytes apart.
      first, last: the pieces.
      offset: for each piece, where it starts in the buffer.
      viewed: whether results will be views of the buffer.
      buffer: where it is read to, from the time on when it is.
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

    def reads(self, stacks: _Stacks) -> Iterator[_Read]:
        """This run in one read, or in several that end with a chunk if it is too large."""
        chunk = int(stacks.chunk_nbytes[self.stack])
        step = max(1, RUN_NBYTES // chunk) * chunk
        start = self.start
        while start < self.stop:
            stop = self.stop
            if stop - start > RUN_NBYTES:
                stop = min(stop, start // chunk * chunk + step)
            nbytes = (stop - start) * (self.nbytes // self.pitch)
            yield _Read(self, start, stop, nbytes, stop == self.stop)
            start = stop


@dataclass(frozen=True, slots=True)
class _Read:
    """Bytes `start` to `stop` of the rows of a run."""

    run: _Run
    start: int
    stop: int
    nbytes: int
    last: bool


def _runs(pieces: _Pieces, stacks: _Stacks) -> list[_Run]:
    """Joins pieces to runs, in the order in which requests need them."""
    if not pieces.row.size:
        return []
    chunk = stacks.chunk_nbytes[pieces.stack]
    begin = _first_of_ranges(pieces, chunk)
    # Ranges: from here on a column has one number for each of them.
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
    # Runs: from here on one number for each.
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
        _Run(s, r, a, b, nbytes, p, first, last, offset[first:last].tolist(), view)
        for s, r, a, b, nbytes, p, first, last, view in zip(
            *[c.tolist() for c in columns], strict=True
        )
    ]
    needed = np.minimum.reduceat(pieces.request, piece[:-1])
    return [runs[i] for i in np.argsort(needed, kind="stable")]


def _first_of_ranges(pieces: _Pieces, chunk: np.ndarray) -> np.ndarray:
    """The pieces that begin a range. Pieces that touch one chunk come into one range."""
    same_row = (np.diff(pieces.stack) == 0) & (np.diff(pieces.row) == 0)
    begins = np.ones(len(pieces.row), bool)
    reach = _reach(np.cumsum(~np.append(False, same_row)), pieces.stop)
    begins[1:] = ~same_row | (pieces.start[1:] // chunk[1:] > (reach[:-1] - 1) // chunk[1:])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(begins))
    length = np.maximum.reduceat(pieces.stop, first) - pieces.start[first]
    for i in np.flatnonzero((length > RUN_NBYTES) & (last - first > 1)).tolist():
        # Too long: cut where no more than the chunk at the seam has to be read twice.
        start, stop = pieces.start[first[i]], pieces.stop[first[i]]
        for j in range(first[i] + 1, last[i]):
            if pieces.stop[j] - start > RUN_NBYTES and stop - pieces.start[j] < chunk[j]:
                begins[j] = True
                start, stop = pieces.start[j], pieces.stop[j]
            else:
                stop = max(stop, pieces.stop[j])
    return np.flatnonzero(begins)


def _reach(group: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Running maximum of `stop` inside each group; groups are numbered in ascending order."""
    values, rank = np.unique(stop, return_inverse=True)
    base = group * len(values)
    return values[np.maximum.accumulate(base + rank) - base]


class _Memory:
    """Aligned buffers for results, and scratch buffers that are used again.

    Small buffers are cut from blocks large enough for huge pages.
    """

    def __init__(self, expected_nbytes: int):
        self._block_nbytes = min(_BLOCK_NBYTES, expected_nbytes)
        self._block = np.empty(0, np.uint8)
        self._free: list[np.ndarray] = []

    def take(self, nbytes: int, *, scratch: bool = False) -> np.ndarray:
        """A buffer of at least `nbytes`, uninitialized."""
        if scratch:
            while self._free:
                buffer = self._free.pop()
                if buffer.size >= nbytes:
                    return buffer
            return _aligned(nbytes)
        if nbytes > self._block_nbytes // 2:
            return _aligned(nbytes)
        if nbytes > self._block.size:
            self._block = _aligned(self._block_nbytes)
        buffer, self._block = self._block[:nbytes], self._block[round_up(nbytes) :]
        return buffer

    def give_back(self, buffer: np.ndarray) -> None:
        self._free.append(buffer)


def _aligned(nbytes: int) -> np.ndarray:
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -buffer.__array_interface__["data"][0] % ALIGNMENT
    return buffer[skip : skip + nbytes]


class _Assembly:
    """Results as far as their parts have arrived."""

    def __init__(self, geometries: list[_Geometry], pieces: _Pieces):
        self._geometries = geometries
        self._request: list[int] = pieces.request.tolist()
        self._use: list[int] = pieces.use.tolist()
        self._missing = [len(geometry.uses) for geometry in geometries]
        self._boxes: dict[int, list[np.ndarray | None]] = {}
        self._done = [i for i, missing in enumerate(self._missing) if not missing]

    def arrived(self, run: _Run, memory: _Memory) -> None:
        """Takes the pieces of `run`, whose buffer is filled."""
        buffer = run.buffer
        assert buffer is not None
        use_of, boxes, missing = self._use, self._boxes, self._missing
        for p, offset in enumerate(run.offset, run.first):
            request = self._request[p]
            geometry = self._geometries[request]
            use = geometry.uses[use_of[p]]
            results = boxes.get(request)
            if results is None:
                results = boxes[request] = [None] * len(geometry.shapes)
            if use.where is None and not offset % ALIGNMENT:
                results[use.box] = np.ndarray(use.shape, geometry.dtype, buffer, offset)
            else:
                target = results[use.box]
                if target is None:
                    target = results[use.box] = _empty(geometry, use.box, memory)
                part = np.ndarray(use.shape, geometry.dtype, buffer, offset, use.strides)
                target[... if use.where is None else use.where] = part
            missing[request] -= 1
            if not missing[request]:
                self._done.append(request)
        run.buffer = None
        if not run.viewed:
            memory.give_back(buffer)

    def finished(self) -> Iterator[tuple[int, Arrays]]:
        """The requests of which nothing is missing any more, each once."""
        done, self._done = self._done, []
        for request in done:
            geometry = self._geometries[request]
            results = self._boxes.pop(request, [None] * len(geometry.shapes))
            yield (
                request,
                tuple(
                    [
                        array
                        if array is not None
                        else np.ndarray(shape, geometry.dtype, _aligned(ALIGNMENT))
                        for shape, array in zip(geometry.shapes, results, strict=True)
                    ]
                ),
            )


def _empty(geometry: _Geometry, box: int, memory: _Memory) -> np.ndarray:
    shape = geometry.shapes[box]
    nbytes = math.prod(shape) * geometry.dtype.itemsize
    return np.ndarray(shape, geometry.dtype, memory.take(nbytes))
