"""Writing shards: the slices of one call, as streams of bytes in directories of their own.

The slices of a shard follow each other in its stream, in the order of their keys. The stream is
written file by file, by as many threads as the machine can use, whether it is the only one or one
of many. Large slices are written straight from the memory that they lie in; small ones are joined.
The thread that writes a file also computes the checksums of its blocks, part by part, while the
disk takes the parts before. At last it flushes the file.

In an object store a file is written in one request, and many requests are under way at once.

The index of a shard is written last. So a directory without an index is the remains of an
interrupted write.
"""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from ckpt_jax.graph.boxes import Box, Shape, inside, shape_of, whole
from ckpt_jax.graph.dtypes import BYTES, dtype_name
from ckpt_jax.store import objects
from ckpt_jax.store.durable import fsync_directory, fsync_file, write_in_parts
from ckpt_jax.store.index import CHECKSUM, Index, Shard, Table
from ckpt_jax.store.manifest import INDEX, write_file
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, require_addressable
from ckpt_jax.store.presence import is_taken
from ckpt_jax.store.room import Room
from ckpt_jax.store.stream import (
    ALIGNMENT,
    BLOCK_NBYTES,
    CHUNKS,
    DATA,
    FILE_NBYTES,
    block_nbytes,
    checksum_of,
    file_end,
    file_nbytes,
    file_path,
    files_nbytes,
    memory_context,
    new_context,
    open_in_memory,
    open_stream,
    round_up,
    storage_error,
)
from ckpt_jax.store.tiling import Layout
from ckpt_jax.store.workers import Workers, cores


class Later(Protocol):
    """An array whose contents are still on their way."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def nbytes(self) -> int: ...
    def wait(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a larger array.

    Attributes:
      array: the contents of the box; it has the shape of the box.
      box: where the contents lie in the whole array: one (start, stop) pair per axis.
      global_shape: shape of the whole array.

    Example:
      >>> Slice(np.zeros((2, 3)), ((0, 2), (0, 3)), (4, 3)).box
      ((0, 2), (0, 3))
    """

    array: Any
    box: Box
    global_shape: Shape


Value = np.ndarray | bytes | Slice | Sequence[Slice]
Source = np.ndarray | bytes | Later


def write_shards(
    shards: Mapping[str, Mapping[str, Value]],
    *,
    compression: str | None = None,
    durable: bool = True,
    max_inflight_bytes: int = FILE_NBYTES,
    written: Callable[[int], object] = lambda nbytes: None,
    is_new: bool = False,
) -> list[tuple[Shard, Table]]:
    """Writes shards and their indexes to new directories.

    Contiguous arrays are not copied, so they must not change until the call returns.

    Args:
      shards: for each directory, which does not exist yet or is empty, its slices: by key, a whole
        array, a byte string, or boxes of an array.
      compression: None or "zstd".
      durable: return only when the shards would survive a power failure.
      max_inflight_bytes: bound on the memory for copies and for compressed bytes.
      written: called with the number of bytes of slices that were written since the last call, on
        several threads. An error that it raises ends the write.
      is_new: whether it is known that nothing is in the directories. An object store is not asked
        then.

    Returns:
      For each shard, its entry in the index of a checkpoint, with the directory as it was given,
      and its table.

    Raises:
      FileExistsError: a directory is not empty.
      OSError: the file system refused, for lack of space or permission for example.
      ValueError: an array has a dtype that cannot be stored, or another shape than its box.
    """
    if compression not in (None, "zstd"):
        raise ValueError(f"compression is {compression!r}, expected None or 'zstd'")
    streams = [
        (_RemoteStream if is_url(directory) else _LocalStream)(
            directory, *plan_shard(slices, compression or "", max_inflight_bytes)
        )
        for directory, slices in shards.items()
    ]
    for stream in streams:
        stream.prepare(is_new)
    room = Room(max_inflight_bytes)
    jobs = [(stream, number) for stream in streams for number in range(stream.shard.files)]
    given_up = threading.Event()

    def write_one(stream: _Stream, number: int) -> None:
        with room.taken(stream.held_nbytes(number)):
            if given_up.is_set():  # another part failed, which is raised, or was interrupted
                return
            try:
                stream.write(number, durable=durable)
                written(stream.payload_nbytes(number))
            except BaseException:
                given_up.set()
                raise

    is_remote = any(map(is_url, shards))
    # While one thread waits for the disk, another fills it.
    most = objects.PARALLEL if is_remote else cores() * (2 if durable and not compression else 1)
    threads = min(most, max(len(jobs), len(streams)))
    with Workers(threads if threads > 1 else 0, "ckpt-write") as workers:
        try:
            writes = [workers.submit(write_one, *job) for job in jobs]
            for write in as_completed(writes):  # wakes for each, and so hears of an interrupt
                write.result()
        except BaseException:
            given_up.set()
            raise
        ends = [workers.submit(stream.finish, durable=durable) for stream in streams]
        finished = [end.result() for end in ends]
    if durable:
        for parent in {os.path.dirname(absolute(each)) for each in shards if not is_url(each)}:
            fsync_directory(parent)
    return finished


def plan_shard(
    slices: Mapping[str, Value], compression: str, max_inflight_bytes: int
) -> tuple[Shard, Table, list[int], list[Source]]:
    """The entry and the table of a shard, and the offsets and contents of its slices."""
    keys = tuple(sorted(slices))
    layouts: list[Layout] = []
    starts: list[tuple[int, ...]] = []  # of the box of each layout
    seen: dict[tuple[object, ...], int] = {}  # -> number of the layout
    rows: list[tuple[int, int, int]] = []  # key, layout, offset
    offsets: list[int] = []
    sources: list[Source] = []
    end = 0
    for number, key in enumerate(keys):
        for part in _parts(slices[key]):
            # The layout is worked out once for all slices that share it.
            if isinstance(part, bytes):
                source, alike = part, (len(part),)
            else:
                source = part.array
                alike = (source.dtype, source.shape, part.box, part.global_shape)
            layout = seen.get(alike)
            if layout is None:
                layout = seen[alike] = len(layouts)
                layouts.append(_layout(key, part))
                box = part.box if isinstance(part, Slice) else ()
                starts.append(tuple([start for start, _ in box]))
            nbytes = layouts[layout].nbytes
            offset = round_up(end) if nbytes else 0
            rows.append((number, layout, offset))
            if nbytes:
                offsets.append(offset)
                sources.append(source)
                end = offset + nbytes
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    table = Table(keys, tuple(layouts), *columns)
    block = block_nbytes(end)
    # Files are small enough that several fit into the memory for copies.
    sizes = (block // CHUNKS, block, file_nbytes(end, block, max_inflight_bytes // 2))
    flat = tuple([start for box in starts for start in box])
    return Shard(".", flat, end, *sizes, compression), table, offsets, sources


def _parts(value: Value) -> Sequence[bytes | Slice]:
    if isinstance(value, np.ndarray):
        return (Slice(value, whole(value.shape), value.shape),)
    if isinstance(value, bytes | Slice):
        return (value,)
    return sorted(value, key=_box)


def _box(part: Slice) -> Box:
    return part.box


def _layout(key: str, part: bytes | Slice) -> Layout:
    if isinstance(part, bytes):
        return Layout(BYTES, (), (), len(part))
    array, box, shape = part.array, part.box, part.global_shape
    if not inside(box, shape) or array.shape != shape_of(box):
        raise ValueError(
            f"{key}: contents of shape {array.shape} for box {box} of an array of shape {shape}"
        )
    try:
        return Layout(dtype_name(array.dtype), shape, array.shape, array.nbytes)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


_PADDING = np.zeros(ALIGNMENT, np.uint8)
_SMALL_NBYTES = 1 << 16  # up to here, copying costs less than a system call
_PART_NBYTES = BLOCK_NBYTES  # of one part of a file


class _Stream(ABC):
    """The stream of a shard while it is written, each file on any thread."""

    def __init__(
        self,
        directory: str,
        shard: Shard,
        table: Table,
        offsets: list[int],
        sources: list[Source],
    ):
        self.directory = directory
        self.shard = shard
        self._table = table
        self._offsets = offsets
        self._sources = [_contents_of(source) for source in sources]
        self._checksums = np.zeros(shard.blocks, CHECKSUM)
        self._sizes = [0] * shard.files

    @abstractmethod
    def prepare(self, is_new: bool) -> None:
        """Makes the directory, unless something is in it. `is_new` says that nothing is."""

    @abstractmethod
    def held_nbytes(self, number: int) -> int:
        """About the memory that writing a file takes, besides the arrays."""

    @abstractmethod
    def write(self, number: int, *, durable: bool) -> None:
        """Writes a file, in one piece."""

    @abstractmethod
    def stored_nbytes(self) -> int:
        """The size of all files."""

    @abstractmethod
    def flush_names(self) -> None:
        """Makes the names of the files durable."""

    def within(self, number: int) -> Iterator[tuple[int, int, int, _Contents | _LaterContents]]:
        """(offset, start, stop, contents) of each slice with bytes in a file: its offset in the
        stream, and the range of its own bytes that lie in the file."""
        begin = number * self.shard.file_nbytes
        end = min(begin + self.shard.file_nbytes, self.shard.nbytes)
        first = max(bisect_right(self._offsets, begin) - 1, 0)
        for i in range(first, len(self._offsets)):
            offset, contents = self._offsets[i], self._sources[i]
            if offset >= end:
                return
            start, stop = max(begin - offset, 0), min(end - offset, contents.nbytes)
            if start < stop:
                yield offset, start, stop, contents

    def payload_nbytes(self, number: int) -> int:
        """The bytes of slices in a file, without padding."""
        return sum(stop - start for _, start, stop, _ in self.within(number))

    def copied_nbytes(self, number: int) -> int:
        """The bytes of slices in a file that do not lie in memory as they are stored."""
        within = self.within(number)
        return sum([stop - start for _, start, stop, each in within if each.is_copied])

    def plain(self, number: int) -> Iterator[np.ndarray]:
        """The bytes of a file as they are in the stream, in parts, which are summed up.

        Large parts are the memory of slices, if it is as they are stored. Small ones are joined.
        """
        begin = position = number * self.shard.file_nbytes
        end = min(begin + self.shard.file_nbytes, self.shard.nbytes)
        waiting: list[np.ndarray] = []  # from `begin` to `position`

        def joined() -> Iterator[np.ndarray]:
            nonlocal begin
            if waiting:
                data = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                waiting.clear()
                self.sum_up(begin, data)
                begin += data.size
                yield data

        for offset, first, last, contents in self.within(number):
            if offset + first > position:
                waiting.append(_PADDING[: offset + first - position])
            for start in range(first, last, _PART_NBYTES):
                data = contents.bytes(start, min(start + _PART_NBYTES, last))
                is_large = data.size > _SMALL_NBYTES
                if is_large:
                    yield from joined()
                waiting.append(data)
                position = offset + start + data.size
                if is_large or position - begin > _PART_NBYTES:
                    yield from joined()
        if position < end:  # the next slice begins in the next file
            waiting.append(_PADDING[: end - position])
        yield from joined()

    def compress(self, stream: ts.TensorStore, number: int) -> None:
        """Writes a compressed file of a stream that TensorStore has opened."""
        begin = number * self.shard.file_nbytes
        data = np.concatenate([*self.plain(number)])
        transaction = ts.Transaction()
        target = stream.with_transaction(transaction)[begin : begin + data.size]
        try:
            target.write(data, can_reference_source_data_indefinitely=True).copy.result()
            transaction.commit_async().result()
        except ValueError as error:
            raise storage_error(error, self.directory) from error

    def sum_up(self, begin: int, data: np.ndarray) -> None:
        """Goes on with the checksums of blocks. A file is summed up from its beginning on."""
        size, done = self.shard.block_nbytes, 0
        while done < data.size:
            number, at = divmod(begin + done, size)
            part = data[done : done + size - at]
            before = int(self._checksums[number]) if at else 0
            self._checksums[number] = checksum_of(part, before)
            done += part.size

    def finish(self, *, durable: bool) -> tuple[Shard, Table]:
        """Writes the index of the shard, after all files."""
        shard = replace(
            self.shard,
            stored_nbytes=self.stored_nbytes(),
            checksums=self._checksums.tobytes(),
        )
        data = Index((self._table,), (shard,), (0,)).to_bytes()
        write_file(os.path.join(self.directory, INDEX), data, durable=durable)
        if durable:
            self.flush_names()
        digest = hashlib.sha256(data).digest()
        return replace(shard, directory=self.directory, checksums=b"", digest=digest), self._table


class _LocalStream(_Stream):
    """A stream in a file system."""

    def prepare(self, is_new: bool) -> None:
        os.makedirs(self.directory, exist_ok=True)
        if os.listdir(self.directory):
            raise _taken(self.directory)
        require_addressable(absolute(self.directory))
        if self.shard.compression:
            self._store = open_stream(self.directory, self.shard, new_context())
        elif self.shard.files:
            os.mkdir(os.path.join(self.directory, DATA))

    def held_nbytes(self, number: int) -> int:
        if self.shard.compression:
            return self.copied_nbytes(number) + 2 * self.shard.file_nbytes
        return 2 * _PART_NBYTES

    def write(self, number: int, *, durable: bool) -> None:
        path = file_path(self.directory, number)
        if not self.shard.compression:
            write_in_parts(path, self._parts(number), durable=durable)
            return
        self.compress(self._store, number)
        if durable:
            fsync_file(path)

    def _parts(self, number: int) -> Iterator[np.ndarray | bytes]:
        yield from self.plain(number)
        yield file_end(self.shard, number)

    def stored_nbytes(self) -> int:
        return files_nbytes(self.directory)

    def flush_names(self) -> None:
        if self.shard.files:
            fsync_directory(os.path.join(self.directory, DATA))
        fsync_directory(self.directory)


class _RemoteStream(_Stream):
    """A stream in an object store. A file is made in memory, and written in one request."""

    def prepare(self, is_new: bool) -> None:
        if not is_new and is_taken(os.path.join(self.directory, INDEX)):
            raise _taken(self.directory)

    def held_nbytes(self, number: int) -> int:
        return self.copied_nbytes(number) + 2 * self.shard.file_nbytes

    def write(self, number: int, *, durable: bool) -> None:
        data = self._compressed(number) if self.shard.compression else self._plain(number)
        self._sizes[number] = len(data)
        objects.write(file_path(self.directory, number), data)

    def _plain(self, number: int) -> bytes:
        # Arrays are buffers; numpy's stubs say so from Python 3.12 on.
        parts: list[Any] = [*self.plain(number), file_end(self.shard, number)]
        return b"".join(parts)

    def _compressed(self, number: int) -> bytes:
        context = memory_context()
        self.compress(open_in_memory(self.shard, context), number)
        store = ts.KvStore.open({"driver": "memory"}, context=context).result()
        return store.read(f"{DATA}/{number}").result().value

    def stored_nbytes(self) -> int:
        return sum(self._sizes)

    def flush_names(self) -> None:
        pass  # what a store has acknowledged is durable


def _taken(directory: str) -> FileExistsError:
    return FileExistsError(f"{directory}: a shard needs a new directory, but this has files")


class _Contents:
    """The bytes of a slice, for several threads."""

    __slots__ = ("_source", "nbytes")

    def __init__(self, source: np.ndarray | bytes):
        self.nbytes = len(source) if isinstance(source, bytes) else source.nbytes
        self._source = source

    @property
    def is_copied(self) -> bool:
        """Whether its bytes do not lie in memory as they are stored."""
        return isinstance(self._source, np.ndarray) and not _is_as_stored(self._source)

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """A range of the bytes as they are stored. No range is asked for twice."""
        if isinstance(self._source, bytes):
            return np.frombuffer(self._source, np.uint8)[start:stop]
        return _bytes_of(self._source, start, stop)


class _LaterContents:
    """The bytes of a slice that is still on its way. It is kept until its last byte is taken."""

    is_copied = False

    def __init__(self, source: Later):
        self.nbytes = self._left = source.nbytes
        self._source: Later | np.ndarray | None = source
        self._lock = threading.Lock()

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """A range of the bytes as they are stored. No range is asked for twice."""
        with self._lock:
            source = self._source
            assert source is not None
            if not isinstance(source, np.ndarray):
                source = self._source = source.wait()
            self._left -= stop - start
            if not self._left:
                self._source = None
        return _bytes_of(source, start, stop)


def _contents_of(source: Source) -> _Contents | _LaterContents:
    is_here = isinstance(source, np.ndarray | bytes)
    return _Contents(source) if is_here else _LaterContents(source)


def _bytes_of(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    if _is_as_stored(array):
        return array.reshape(-1).view(np.uint8)[start:stop]
    copy = np.empty(stop - start, np.uint8)
    _copy(np.atleast_1d(array), start, copy)
    return copy


def _is_as_stored(array: np.ndarray) -> bool:
    return array.flags.c_contiguous and array.dtype.byteorder != ">"


def _copy(array: np.ndarray, start: int, target: np.ndarray) -> None:
    """Fills `target` with the bytes of an array, as they are stored, from byte `start` on."""
    row = array.nbytes // len(array)
    stop = start + target.size
    first, last = -(-start // row), stop // row  # the rows that are copied as a whole
    if first > last:
        _copy_row(array, last, start - last * row, target)
        return
    head, tail = first * row - start, stop - last * row
    if head:
        _copy_row(array, first - 1, row - head, target[:head])
    if first < last:
        rows = target[head : target.size - tail].view(_stored_dtype(array))
        rows.reshape(last - first, *array.shape[1:])[...] = array[first:last]
    if tail:
        _copy_row(array, last, 0, target[target.size - tail :])


def _copy_row(array: np.ndarray, number: int, start: int, target: np.ndarray) -> None:
    if array.ndim > 1:
        _copy(array[number], start, target)
    else:  # a part of an element
        element = array[number : number + 1].astype(_stored_dtype(array)).view(np.uint8)
        target[:] = element[start : start + target.size]


def _stored_dtype(array: np.ndarray) -> np.dtype:
    return array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
