"""Fetching: reads the boxes that a caller wants, whatever boxes were stored.

`gather` says which runs of bytes to read. This module reads the runs and assembles the boxes.

1. *Reading.* Runs are read in the order in which requests need them, each into a buffer of its
   own, by as many threads as there are cores. The number of bytes in flight is bounded. The thread
   that has read a block verifies it at once, while it is still in the processor's cache.
2. *Assembly.* A box that lies contiguously in one stored slice becomes a view of the run's buffer.
   Other boxes are copied together from the runs that hold their parts. A request is yielded as
   soon as its last run has arrived, while later runs are still being read.

In an object store, a range of a file is read in one request, and many requests are under way at
once. The sizes of files are not asked for: a read beyond the end of a file fails.
"""

from __future__ import annotations

import math
import os
import random
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_jax.graph.boxes import Box
from ckpt_jax.store import objects
from ckpt_jax.store.durable import naming
from ckpt_jax.store.forks import require_not_forked, use_tensorstore
from ckpt_jax.store.gather import (
    RUN_NBYTES,
    Geometry,
    Pieces,
    RangeRead,
    Request,
    Run,
    geometry_of,
    runs_of,
)
from ckpt_jax.store.index import CHECKSUM, Index, Shard, own_checksums
from ckpt_jax.store.manifest import (
    INDEX,
    INDEX_KEY,
    MANIFEST,
    Part,
    part_path,
    read_digested,
    read_file,
    read_manifest,
    read_part,
)
from ckpt_jax.store.objects import NoSuchBucketError, is_url
from ckpt_jax.store.paths import absolute, below
from ckpt_jax.store.stream import (
    ALIGNMENT,
    checksum_of,
    file_end,
    file_path,
    file_size,
    new_context,
    open_stream,
    round_up,
    storage_error,
)
from ckpt_jax.store.workers import Workers, cores

_BLOCK_NBYTES = 4 << 20  # from this size on numpy asks for huge pages, which fill 4x faster

Arrays = tuple[np.ndarray, ...]


class _Damaged(Exception):
    """The bytes from `start` to `stop` of a stream, in `file`, are not those that were written."""

    def __init__(self, file: str, start: int, stop: int, what: str):
        super().__init__(what)
        self.file, self.start, self.stop = file, start, stop


def read_index(directory: str) -> Index:
    """The index of the checkpoint or shard in `directory`.

    Raises:
      CheckpointNotFoundError: there is neither a checkpoint nor a shard.
      CorruptCheckpointError: the index cannot be read, or it contradicts itself.
    """
    return _parts_and_index(directory)[1]


def _parts_and_index(directory: str) -> tuple[dict[str, Part], Index]:
    try:
        parts = read_manifest(directory)
    except CheckpointNotFoundError:
        path = os.path.join(directory, INDEX)
        try:
            return {}, _index(read_file(path), path)  # a shard has no manifest
        except NoSuchBucketError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise
    if INDEX_KEY not in parts:
        raise CorruptCheckpointError(f"{directory}: has no index", file=directory)
    part = parts[INDEX_KEY]
    path = part_path(directory, part)
    index = _index(read_part(directory, part), path)
    if index.is_shard:
        raise CorruptCheckpointError(f"{path}: this is the index of a shard", file=path)
    return parts, index


def _index(data: bytes, path: str) -> Index:
    try:
        return Index.from_bytes(data)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path}: {error}", file=path) from error
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{path}: {error}") from error


class ShardedReader:
    """Reads the arrays of a checkpoint or of a single shard.

    Checksums are verified on every read. Files are open only during reads.

    Args:
      directory: of a checkpoint or of a shard.

    Attributes:
      directory: the same.
      index: what is stored.
      bytes_read: decoded size of all blocks that were requested so far.
    """

    def __init__(self, directory: str):
        use_tensorstore()
        self.directory = absolute(directory)
        self._is_remote = is_url(self.directory)
        self._parts, self.index = _parts_and_index(self.directory)
        self.bytes_read = 0
        self._is_open = True
        self._streams: dict[int, _StreamReader] = {}
        self._checked: set[int] = set()  # the shards whose files have the right sizes
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
        self._is_open = False
        self._streams, self._geometries = {}, {}

    def extra(self, name: str) -> bytes | None:
        """The small value `name` that was committed with the checkpoint; None if there is none."""
        require_not_forked()
        part = self._parts.get(name)
        return None if part is None else read_part(self.directory, part)

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
        if not self._is_open:
            raise RuntimeError(f"{self.directory}: the reader is closed")
        require_not_forked()
        geometries = self._geometries_of(requests)
        return self._results(requests, geometries, max_inflight_bytes)

    def _geometries_of(self, requests: Sequence[Request]) -> list[Geometry]:
        index, cached = self.index, self._geometries
        geometries = []
        seen: set[str] = set()
        for key, wanted in requests:
            if key not in index:
                raise KeyError(f"{key}: is not in {self.directory}")
            # If a key is requested twice, only the first request may get views: two views of the
            # same bytes would not be independent arrays.
            what = (index.tiling_number(key), tuple(wanted), key not in seen)
            seen.add(key)
            geometry = cached.get(what)
            if geometry is None:
                try:
                    geometry = geometry_of(index.tiling(what[0]), what[1], views=what[2])
                except ValueError as error:
                    raise ValueError(f"{key}: {error} in {self.directory}") from None
                cached[what] = geometry
            geometries.append(geometry)
        return geometries

    def _results(
        self,
        requests: Sequence[Request],
        geometries: list[Geometry],
        max_inflight_bytes: int,
    ) -> Iterator[tuple[int, Arrays]]:
        self._check_files(requests, geometries)
        pieces = Pieces.of(self.index, requests, geometries)
        assembly = _Assembly(geometries, pieces)
        runs = runs_of(pieces, self.index)
        memory = _Memory(sum(run.nbytes for run in runs))
        reads = (read for run in runs for read in run.reads())
        in_flight: deque[tuple[RangeRead, Future[None]]] = deque()
        held = 0
        waiting = next(reads, None)
        most = objects.PARALLEL if self._is_remote else cores()
        threads = min(most, len(runs) + sum(run.nbytes // RUN_NBYTES for run in runs))
        with Workers(threads if threads > 1 else 0, "ckpt-read") as workers:
            if self._is_remote:  # their indexes are read, all together
                list(workers.map(self._stream, {run.shard for run in runs}))
            try:
                yield from assembly.finished()
                while waiting is not None or in_flight:
                    while waiting is not None and (
                        not in_flight or held + waiting.nbytes <= max_inflight_bytes
                    ):
                        try:
                            future = self._start(waiting, memory, workers)
                        except CorruptCheckpointError as error:
                            raise _corrupt(error, waiting, pieces, requests) from error
                        in_flight.append((waiting, future))
                        held += waiting.nbytes
                        waiting = next(reads, None)
                    read, future = in_flight.popleft()
                    try:
                        future.result()
                    except _Damaged as damage:
                        raise _corrupt(damage, read, pieces, requests) from damage
                    held -= read.nbytes
                    if read.last:
                        assembly.arrived(read.run, memory)
                        yield from assembly.finished()
            finally:
                wait([future for _, future in in_flight])  # they still write into our buffers

    def _check_files(self, requests: Sequence[Request], geometries: list[Geometry]) -> None:
        """Checks the sizes of the files that are needed, once for each shard."""
        if self._is_remote:
            return
        index = self.index
        alike: dict[tuple[int, int], list[str]] = {}  # the keys whose slices lie in the same shards
        shards: dict[tuple[int, int], set[int]] = {}
        for (key, _), geometry in zip(requests, geometries, strict=True):
            what = (index.tiling_number(key), id(geometry))
            if what not in alike:
                alike[what] = []
                found = index.tiling(what[0]).shard[geometry.slices]
                shards[what] = {*np.unique(found).tolist()}
            alike[what].append(key)
        for number in sorted(set().union(*shards.values()) - self._checked):
            try:
                check_files(self._path(number), index.shards[number])
            except CorruptCheckpointError as error:
                keys = [key for what in alike if number in shards[what] for key in alike[what]]
                raise _concerning(keys, str(error), error.file) from error
            self._checked.add(number)

    def _start(self, read: RangeRead, memory: _Memory, workers: Workers) -> Future[None]:
        run = read.run
        stream = self._stream(run.shard)
        if run.buffer is None:
            run.buffer = memory.take(run.nbytes, scratch=not run.viewed)
        self.bytes_read += read.nbytes
        target = run.buffer[read.start - run.start : read.stop - run.start]
        return workers.submit(stream.read, read.start, target)

    def _stream(self, number: int) -> _StreamReader:
        if not self._is_open:
            raise RuntimeError(f"{self.directory}: the reader is closed")
        found = self._streams.get(number)
        if found is None:
            found = self._streams[number] = _StreamReader(
                self._path(number), self.index.shards[number]
            )
        return found

    def check_files(self) -> None:
        """Compares the sizes of all data files with what the index lists; reads no value.

        Raises:
          CorruptCheckpointError: a shard's files are truncated or missing.
        """
        if self._is_remote:
            self._check_values()
            return
        for number, shard in enumerate(self.index.shards):
            check_files(self._path(number), shard)

    def _check_values(self) -> None:
        """Checks that everything is there in an object store, as far as it tells."""
        found = frozenset(objects.keys_below(self.directory))
        for number, shard in enumerate(self.index.shards):
            check_values(self.directory, self._path(number), shard, found)

    def damage(
        self,
        keys: Collection[str] | None = None,
        sample: float = 1.0,
        read: Callable[[int], object] = lambda nbytes: None,
    ) -> Iterator[tuple[str, list[str], str]]:
        """Reads blocks and compares them with their checksums. No array is assembled, so little
        memory is taken, however large arrays are.

        Args:
          keys: whose blocks are read; by default those of all values.
          sample: the part of the blocks that is read, chosen by chance.
          read: called with numbers of bytes while blocks are read.

        Yields:
          (file, the keys in it that are concerned, what is wrong) for each damaged block, and for
          each shard that cannot be read at all.
        """
        chance = random.Random()
        threads = objects.PARALLEL if self._is_remote else cores()
        with Workers(threads if threads > 1 else 0, "ckpt-verify") as workers:
            for number, shard in enumerate(self.index.shards):
                path = self._path(number)
                try:
                    stream = _StreamReader(path, shard)
                except CorruptCheckpointError as error:
                    yield error.file or path, self._keys_in(number, 0, shard.nbytes), str(error)
                    continue
                blocks = self._blocks(number, keys)
                if sample < 1:
                    blocks = sorted(chance.sample(blocks, round(sample * len(blocks))))
                checks = [
                    workers.submit(stream.damage, start, stop)
                    for start, stop in _ranges(blocks, shard)
                ]
                for check in checks:
                    nbytes, found = check.result()
                    self.bytes_read += nbytes
                    read(nbytes)
                    for each in found:
                        yield each.file, self._keys_in(number, each.start, each.stop), str(each)

    def _blocks(self, number: int, keys: Collection[str] | None) -> list[int]:
        """The blocks of a shard in which values of these keys lie."""
        shard = self.index.shards[number]
        if keys is None:
            return list(range(shard.blocks))
        table = self.index.tables[self.index.table[number]]
        chosen = np.array([key in keys for key in table.keys], bool)[table.key]
        rows = np.flatnonzero(chosen & (table.nbytes > 0))
        first = table.offset[rows] // shard.block_nbytes
        last = (table.offset[rows] + table.nbytes[rows] - 1) // shard.block_nbytes
        return sorted({b for a, z in zip(first, last, strict=True) for b in range(a, z + 1)})

    def _keys_in(self, number: int, start: int, stop: int) -> list[str]:
        """The keys whose values lie in a range of the stream of a shard, at least in part."""
        table = self.index.tables[self.index.table[number]]
        touched = (table.offset < stop) & (table.offset + table.nbytes > start)
        return [table.keys[i] for i in np.unique(table.key[touched]).tolist()]

    def _path(self, number: int) -> str:
        directory = self.index.shards[number].directory
        return below(self.directory, directory)


def _corrupt(
    damage: _Damaged | CorruptCheckpointError,
    read: RangeRead,
    pieces: Pieces,
    requests: Sequence[Request],
) -> CorruptCheckpointError:
    """The error for damage that a read has met; it names the keys that are concerned."""
    here = slice(read.run.first, read.run.last)
    request = pieces.request[here]
    what = str(damage)
    if isinstance(damage, _Damaged):
        touched = (pieces.start[here] < damage.stop) & (pieces.stop[here] > damage.start)
        request = request[touched]
        what = f"{damage.file} is damaged or incomplete: {damage}"
    return _concerning([requests[i][0] for i in request.tolist()], what, damage.file)


def _concerning(keys: Sequence[str], what: str, file: str | None) -> CorruptCheckpointError:
    keys = sorted({*keys})
    names = ", ".join(keys[:8])
    if len(keys) > 8:
        names += f" and {len(keys) - 8} more keys"
    return CorruptCheckpointError(f"{names}: {what}", file=file, key=keys[0] if keys else None)


def _ranges(blocks: Sequence[int], shard: Shard) -> Iterator[tuple[int, int]]:
    """Ranges of a stream that hold these blocks, each of bounded size."""
    size = shard.block_nbytes
    most = max(1, RUN_NBYTES // size)
    begin = 0
    for i, block in enumerate(blocks):
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        if following != block + 1 or i + 1 - begin == most:
            yield blocks[begin] * size, min((block + 1) * size, shard.nbytes)
            begin = i + 1


def check_files(directory: str, shard: Shard) -> None:
    """Checks that the files of a shard have the sizes that they need, and that its index is there.

    So no memory is allocated for bytes that do not exist.

    Raises:
      CorruptCheckpointError: a file is truncated or missing.
    """
    total = 0
    _size_of(os.path.join(directory, INDEX))
    for number in range(shard.files):
        path, expected = file_path(directory, number), file_size(shard, number)
        found = _size_of(path)
        total += found
        if found < expected or (found > expected and not shard.compression):
            what = f"the file has {found} bytes, expected {expected}: it is truncated or replaced"
            raise CorruptCheckpointError(f"{path}: {what}", file=path)
    if total != shard.stored_nbytes:
        what = f"its files have {total} bytes, expected {shard.stored_nbytes}"
        raise CorruptCheckpointError(
            f"{directory}: {what}: one is truncated or replaced", file=directory
        )


def _size_of(path: str) -> int:
    """The size of a file that has to be there."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpointError(f"{path}: the file is missing", file=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpointError(f"{path}: this is not a regular file", file=path)
    return status.st_size


def check_values(checkpoint: str, directory: str, shard: Shard, found: frozenset[str]) -> None:
    """Checks that the files of a shard are among the keys that were found below a checkpoint in an
    object store, which does not list their sizes. If not even the manifest was found, which has
    been read, this program may not list, and nothing is known.

    Raises:
      CorruptCheckpointError: a file is missing.
    """
    if MANIFEST not in found:
        return
    files = [file_path(directory, number) for number in range(shard.files)]
    for file in (*files, os.path.join(directory, INDEX)):
        if file.removeprefix(f"{checkpoint}/") not in found:
            raise CorruptCheckpointError(f"{file}: the file is missing", file=file)


class _StreamReader:
    """Reads ranges of whole blocks of a stream, and verifies them; on any thread."""

    def __init__(self, directory: str, shard: Shard):
        self._directory = directory
        self._shard = shard
        self._checksums = _checksums(directory, shard)
        self._store = open_stream(directory, shard, new_context()) if shard.compression else None
        self._read_part = self._read_value if is_url(directory) else self._read_file

    def read(self, start: int, target: np.ndarray) -> None:
        """Reads the range from `start` on into `target`."""
        if self._store is not None:
            self._read_compressed(self._store, start, target)
            return
        size = self._shard.file_nbytes
        done = 0
        while done < target.size:
            number, offset = divmod(start + done, size)
            part = target[done : done + size - offset]
            self._read_part(number, offset, part)
            done += part.size

    def damage(self, start: int, stop: int) -> tuple[int, list[_Damaged]]:
        """Reads a range; returns the number of bytes, and what is wrong with its blocks."""
        buffer = np.empty(stop - start, np.uint8)
        try:
            self.read(start, buffer)
            return stop - start, []
        except _Damaged:
            pass
        found: list[_Damaged] = []
        size = self._shard.block_nbytes
        for begin in range(start, stop, size):
            try:
                self.read(begin, buffer[: min(size, stop - begin)])
            except _Damaged as damage:
                found.append(damage)
        return stop - start, found

    def _read_file(self, number: int, offset: int, target: np.ndarray) -> None:
        path = file_path(self._directory, number)
        size = self._shard.file_nbytes
        begin = number * size + offset
        try:
            # If it has become a pipe, nobody may ever write into it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            end = begin + target.size
            raise _Damaged(path, begin, end, "the file is missing") from error
        try:
            with naming(path):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise _Damaged(path, begin, begin + target.size, "it is not a regular file")
                block = self._shard.block_nbytes
                for start in range(0, target.size, block):
                    part = target[start : start + block]
                    self._fill(descriptor, offset + start, part, path, begin + start)
                    self._verify(path, begin + start, part)
                if begin + target.size in (size * (number + 1), self._shard.nbytes):
                    self._verify_end(descriptor, number, path, offset + target.size)
        finally:
            os.close(descriptor)

    def _read_value(self, number: int, offset: int, target: np.ndarray) -> None:
        """`_read_file` in an object store: one request."""
        path = file_path(self._directory, number)
        size, block = self._shard.file_nbytes, self._shard.block_nbytes
        begin, stop = number * size + offset, offset + target.size
        ends = begin + target.size in (size * (number + 1), self._shard.nbytes)
        end = file_end(self._shard, number) if ends else b""
        try:
            found = objects.read(path, offset, stop + len(end), is_named=True)
        except EOFError as error:
            raise _Damaged(path, begin, begin + target.size, "the file is truncated") from error
        if found is None:
            raise _Damaged(path, begin, begin + target.size, "the file is missing")
        data = np.frombuffer(found.value, np.uint8)
        for start in range(0, target.size, block):
            part = target[start : start + block]
            part[:] = data[start : start + part.size]
            self._verify(path, begin + start, part)
        if data[target.size :].tobytes() != end:
            what = "its end, after the last block, is not as it was written"
            raise _Damaged(path, begin, begin + target.size, what)

    def _verify_end(self, descriptor: int, number: int, path: str, offset: int) -> None:
        """Verifies the bytes that follow the last block of a file."""
        expected = file_end(self._shard, number)
        found = np.empty(len(expected), np.uint8)
        stop = min((number + 1) * self._shard.file_nbytes, self._shard.nbytes)
        start = (stop - 1) // self._shard.block_nbytes * self._shard.block_nbytes
        self._fill(descriptor, offset, found, path, start)
        if found.tobytes() != expected:
            what = "its end, after the last block, is not as it was written"
            raise _Damaged(path, start, stop, what)

    def _fill(
        self, descriptor: int, offset: int, target: np.ndarray, path: str, begin: int
    ) -> None:
        done = 0
        while done < target.size:
            # Arrays are buffers; numpy's stubs say so from Python 3.12 on.
            rest: Any = target[done:]
            count = os.preadv(descriptor, [rest], offset + done)
            if not count:
                raise _Damaged(path, begin, begin + target.size, "the file is truncated")
            done += count

    def _read_compressed(self, store: ts.TensorStore, start: int, target: np.ndarray) -> None:
        end = start + target.size
        path = file_path(self._directory, start // self._shard.file_nbytes)
        try:
            ts.array(target).write(store[start:end].translate_to[0]).result()
        except ValueError as error:
            trouble = objects.trouble_of(error, path) if is_url(path) else None
            cause = trouble or storage_error(error, self._directory)
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            raise _Damaged(path, start, end, str(error)) from error
        block = self._shard.block_nbytes
        for begin in range(0, target.size, block):
            path = file_path(self._directory, (start + begin) // self._shard.file_nbytes)
            self._verify(path, start + begin, target[begin : begin + block])

    def _verify(self, path: str, start: int, data: np.ndarray) -> None:
        number = start // self._shard.block_nbytes
        found, expected = checksum_of(data), int(self._checksums[number])
        if found != expected:
            what = f"the checksum of block {number} is {found:#010x}, expected {expected:#010x}"
            raise _Damaged(path, start, start + data.size, what)


def _checksums(directory: str, shard: Shard) -> np.ndarray:
    """The checksums of a shard's blocks: from its own index, if this is the entry of a checkpoint.

    Raises:
      CorruptCheckpointError: its index is not the one that was committed.
    """
    checksums = shard.checksums
    if shard.directory != ".":
        path = os.path.join(directory, INDEX)
        data = read_digested(path, shard.digest)
        try:
            checksums = own_checksums(data)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{path}: {error}", file=path) from error
        if len(checksums) != shard.blocks * CHECKSUM.itemsize:
            what = f"{path}: has {len(checksums)} bytes of checksums for {shard.blocks} blocks"
            raise CorruptCheckpointError(what, file=path)
    return np.frombuffer(checksums, CHECKSUM)


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
            if run.viewed and use.where is None and not offset % ALIGNMENT:
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
