"""Fetching: reads the boxes that a caller wants, whatever boxes were stored.

`gather` says which runs of bytes to read. This module reads the runs and assembles the boxes.

1. *Reading.* Runs are read in the order in which requests need them, each into a buffer of its
   own. The number of bytes in flight is bounded.
2. *Assembly.* A box that lies contiguously in one stored slice becomes a view of the run's buffer.
   Other boxes are copied together from the runs that hold their parts. A request is yielded as
   soon as its last run has arrived, while later runs are still being read.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.boxes import Box
from ckpt_jax.store.forks import require_not_forked
from ckpt_jax.store.gather import (
    Geometry,
    Pieces,
    RangeRead,
    Request,
    Run,
    StackTable,
    geometry_of,
    runs_of,
)
from ckpt_jax.store.index import INDEX_KEY, Index, Shard
from ckpt_jax.store.stack import (
    ALIGNMENT,
    MANIFEST,
    MAX_EXPANSION,
    files_nbytes,
    new_context,
    open_database,
    open_stack,
    round_up,
    storage_error,
)

_BLOCK_NBYTES = 4 << 20  # from this size on numpy asks for huge pages, which fill 4x faster

Arrays = tuple[np.ndarray, ...]


def read_value(directory: str, name: str) -> bytes | None:
    """The raw value `name` of the database in `directory`; None if there is no such value.

    Raises:
      CheckpointNotFoundError: there is no database.
      CorruptCheckpointError: the database cannot be read.
    """
    if not os.path.exists(os.path.join(directory, MANIFEST)):
        raise CheckpointNotFoundError(f"{directory}: this is no checkpoint, {MANIFEST} is missing")
    try:
        result = open_database(directory, new_context()).read(name).result()
    except ValueError as error:
        raise _damage(error, directory, f"value {name!r}") from error
    return None if result.state == "missing" else result.value


def read_index(directory: str) -> Index:
    """The index of the checkpoint or shard in `directory`.

    Raises:
      CheckpointNotFoundError: there is neither a checkpoint nor a shard.
      CorruptCheckpointError: the index cannot be read, or it contradicts itself.
    """
    data = read_value(directory, INDEX_KEY)
    if data is None:
        raise CorruptCheckpointError(
            f"{directory}: has no index, because its write was interrupted", file=directory
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
      bytes_read: decoded size of all chunks that were requested so far.
    """

    def __init__(self, directory: str):
        self.directory = os.path.abspath(directory)
        self.index = read_index(self.directory)
        self.bytes_read = 0
        self._stacks = StackTable(self.index)
        self._context = new_context()
        self._stores: dict[int, ts.TensorStore] | None = {}
        self._checked: set[int] = set()  # numbers of shards whose files are large enough
        self._geometries: dict[tuple[int, tuple[Box, ...], bool], Geometry] = {}

    @property
    def path(self) -> str:
        """The directory."""
        return self.directory

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the checkpoint; further reads are refused."""
        self._stores = None
        self._geometries = {}

    def extra(self, name: str) -> bytes | None:
        """The small value `name` that was committed with the checkpoint; None if there is none."""
        return read_value(self.directory, name)

    def read_bytes(self, key: str) -> bytes:
        """The byte string under `key`. To read many, ask `read` for the box `()` of each."""
        ((_, (array,)),) = self.read([(key, [()])])
        return array.tobytes()

    def read(
        self, requests: Sequence[Request], *, max_inflight_bytes: int = 64 << 20
    ) -> Iterator[tuple[int, Arrays]]:
        """Reads boxes of arrays.

        Arrays are writable, C-contiguous, aligned to 64 bytes, and share no element. Arrays that
        lie close together on disk share one block of memory of about 16 MiB.

        Args:
          requests: keys, and the boxes wanted of each. The only box of a byte string is `()`;
            it is read as an array of uint8.
          max_inflight_bytes: how many bytes are read ahead of what the caller has taken.

        Returns:
          An iterator over (position in `requests`, one array for each box), in any order.

        Raises:
          KeyError: a key is not in the index.
          RuntimeError: the reader is closed, or this process was forked from the one that opened
            it.
          ValueError: a box does not lie inside its array, or not all of it is stored here.
          CorruptCheckpointError: from the iterator; names the damaged file and the keys in it.
        """
        if self._stores is None:
            raise RuntimeError(f"{self.directory}: the reader is closed")
        require_not_forked()
        geometries = self._geometries_of(requests)
        pieces = Pieces.of(self.index, self._stacks, requests, geometries)
        return self._results(requests, geometries, pieces, max_inflight_bytes)

    def _geometries_of(self, requests: Sequence[Request]) -> list[Geometry]:
        index, cached = self.index, self._geometries
        geometries = []
        seen: set[str] = set()
        for key, wanted in requests:
            number = index.number.get(key)
            if number is None:
                raise KeyError(f"{key}: is not in {self.directory}")
            # If a key is requested twice, only the first request may get views: two views of the
            # same bytes would not be independent arrays.
            what = (index.pattern[number], tuple(wanted), key not in seen)
            seen.add(key)
            geometry = cached.get(what)
            if geometry is None:
                layouts = [index.layouts[i] for i in index.patterns[what[0]]]
                try:
                    geometry = geometry_of(layouts, what[1], views=what[2])
                except ValueError as error:
                    raise ValueError(f"{key}: {error} in {self.directory}") from None
                cached[what] = geometry
            geometries.append(geometry)
        return geometries

    def _results(
        self,
        requests: Sequence[Request],
        geometries: list[Geometry],
        pieces: Pieces,
        max_inflight_bytes: int,
    ) -> Iterator[tuple[int, Arrays]]:
        assembly = _Assembly(geometries, pieces)
        runs = runs_of(pieces, self._stacks)
        memory = _Memory(sum(run.nbytes for run in runs))
        reads = (read for run in runs for read in run.reads(self._stacks))
        in_flight: deque[tuple[RangeRead, ts.WriteFutures]] = deque()
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
            for _, future in in_flight:  # reads that still write into our buffers
                future.commit.exception()

    def _start(self, read: RangeRead, memory: _Memory) -> ts.WriteFutures:
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
            self._check_files(number)
            place = self._stacks.number[stack]
            self._stores[stack] = open_stack(
                self.directory, self._context, shard.id, place, shard.stacks[place]
            )
        return self._stores[stack]

    def check_files(self) -> None:
        """Compares the sizes of all data files with what the index lists; reads no value.

        Raises:
          CorruptCheckpointError: a shard's files are truncated or missing.
        """
        for number, shard in enumerate(self.index.shards):
            try:
                self._check_files(number)
            except (ValueError, OSError) as error:
                path = self._path(shard)
                raise CorruptCheckpointError(f"{path}: {error}", file=path) from error

    def _check_files(self, number: int) -> None:
        """Raises if the files of a shard are too small for what the index lists.

        So no memory is allocated for bytes that do not exist.
        """
        shard = self.index.shards[number]
        if number in self._checked or not shard.stacks:
            return
        declared = sum(s.rows * s.row_nbytes for s in shard.stacks)
        listed = max(shard.files_nbytes, declared // MAX_EXPANSION, 1)
        found = files_nbytes(self._path(shard))
        if found < listed:
            raise ValueError(
                f"its files have {found} bytes, the index lists {listed}: a file is truncated "
                "or missing"
            )
        self._checked.add(number)

    def _path(self, shard: Shard) -> str:
        return os.path.normpath(os.path.join(self.directory, shard.directory))

    def _corrupt(
        self, error: ValueError, read: RangeRead, pieces: Pieces, requests: Sequence[Request]
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
            what += f" and {len(keys) - 8} more keys"
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


class _Memory:
    """Aligned buffers for results, and scratch buffers that are reused.

    Small buffers are cut from blocks that are large enough for huge pages.
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
    """Puts results together from the runs that have arrived."""

    def __init__(self, geometries: list[Geometry], pieces: Pieces):
        self._geometries = geometries
        self._request: list[int] = pieces.request.tolist()
        self._use: list[int] = pieces.use.tolist()
        self._missing = [len(geometry.uses) for geometry in geometries]
        self._boxes: dict[int, list[np.ndarray | None]] = {}
        self._done = [i for i, missing in enumerate(self._missing) if not missing]

    def arrived(self, run: Run, memory: _Memory) -> None:
        """Takes the pieces out of the buffer of a run, which has been filled."""
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
        """The requests that have become complete since the last call, with their arrays."""
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


def _empty(geometry: Geometry, box: int, memory: _Memory) -> np.ndarray:
    shape = geometry.shapes[box]
    nbytes = math.prod(shape) * geometry.dtype.itemsize
    return np.ndarray(shape, geometry.dtype, memory.take(nbytes))
