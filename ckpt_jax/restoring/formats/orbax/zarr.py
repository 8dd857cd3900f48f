"""Arrays in zarr's format, read through TensorStore.

An array is a grid of *chunks*. A chunk is read and decoded as a whole, however little of it is
wanted. So all boxes that are wanted of one array are read together, and TensorStore decodes each
chunk for all of them. A small array is read as a whole and cut here, because each read has a price
that does not depend on its size.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.boxes import Box, inside, shape_of, size_of, slices, whole
from ckpt_jax.restoring.formats.orbax.ocdbt import Database, database_in, opened_below
from ckpt_jax.restoring.formats.orbax.tree import Place
from ckpt_jax.store.forks import require_not_forked
from ckpt_jax.store.memory import Memory
from ckpt_jax.store.objects import is_url, keys_below, trouble_of
from ckpt_jax.store.stream import storage_error
from ckpt_jax.store.watched import Files

_SMALL_NBYTES = 1 << 20  # of an array that is cut here
_BELIEVED_NBYTES = 64 << 20  # of an array whose size is not compared with that of its files
_MAX_EXPANSION = 1 << 15  # by zstd: a block of 128 KiB takes at least 4 bytes
_TREE_NBYTES = 64 << 20  # of the keys of a database that are kept in memory

_COALESCING = {
    "experimental_read_coalescing_threshold_bytes": 64 << 10,
    "experimental_read_coalescing_merged_bytes": 8 << 20,
    "experimental_read_coalescing_interval": "5ms",
}

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ZarrArray:
    """An open array: its place, and TensorStore's view of it."""

    place: Place
    store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.store.shape) * self.dtype.itemsize

    @property
    def read_chunk(self) -> tuple[int, ...]:
        """The shape of what is decoded as a whole."""
        return self._shape_of(self.store.chunk_layout.read_chunk)

    @property
    def write_chunk(self) -> tuple[int, ...]:
        """The shape of what has a key of its own."""
        return self._shape_of(self.store.chunk_layout.write_chunk)

    def _shape_of(self, grid: ts.ChunkLayout.Grid) -> tuple[int, ...]:
        extents = grid.shape or (None,) * len(self.shape)
        return tuple([max(n or size, 1) for n, size in zip(extents, self.shape, strict=True)])

    @property
    def folder(self) -> str:
        """The directory that has its bytes, and perhaps those of others."""
        place = self.place
        return place.directory if place.is_database else os.path.join(place.directory, place.name)


def open_arrays(places: Sequence[Place]) -> list[ZarrArray]:
    """Opens arrays all at once: reads their descriptions.

    Raises:
      CorruptCheckpointError: the description of an array is damaged or missing.
    """
    opening: list[ts.Future[ts.TensorStore]] = []
    arrays: list[ZarrArray] = []
    folders: dict[tuple[str, bool], tuple[ts.KvStore, ts.Context]] = {}
    try:
        for place in places:
            with _damage(place, place.name):
                # One for all arrays of a database, which then read its tree once.
                folder = place.directory, place.is_database
                if folder not in folders:
                    folders[folder] = _folder(*folder)
                opening.append(_opening(place, *folders[folder]))
        for place, future in zip(places, opening, strict=True):
            with _damage(place, place.name):
                arrays.append(ZarrArray(place, future.result()))
    finally:
        for future in opening[len(arrays) :]:  # after an error
            future.exception()
    return arrays


def _folder(directory: str, is_database: bool) -> tuple[ts.KvStore, ts.Context]:
    """The values in a directory, and the context of the arrays there."""
    spec, context = opened_below(directory)
    if is_database:
        spec = {"driver": "ocdbt", "base": spec, "cache_pool": "cache_pool#tree"}
        if is_url(directory):  # small values lie side by side
            spec |= _COALESCING
        # A cache of its own, because another checkpoint may take the place of this one.
        context = ts.Context({"cache_pool#tree": {"total_bytes_limit": _TREE_NBYTES}}, context)
    return ts.KvStore.open(spec, context=context).result(), context


def _opening(place: Place, folder: ts.KvStore, context: ts.Context) -> ts.Future[ts.TensorStore]:
    """Begins to open an array."""
    spec = {
        "driver": "zarr3" if place.is_zarr3 else "zarr",
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": place.omits_zeros,
    }
    store = folder / f"{place.name}/"
    return ts.open(spec, kvstore=store, open=True, read=True, context=context)


@contextmanager
def _damage(place: Place, key: str) -> Iterator[None]:
    """Raises an error of TensorStore as one that names an array and its directory."""
    try:
        yield
    except ValueError as error:
        if is_url(place.directory):
            cause = trouble_of(error, place.directory)
        else:
            cause = storage_error(error, place.directory)
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from error
        what = str(error).partition(" [tensorstore_spec=")[0]
        raise CorruptCheckpointError(
            f"{key}: {place.directory} is damaged or incomplete: {what}",
            file=place.directory,
            key=key,
        ) from error


class ZarrReader:
    """Reads open arrays.

    Args:
      arrays: by key.

    Attributes:
      bytes_read: decoded size of all chunks that were requested so far.
    """

    def __init__(self, arrays: Mapping[str, ZarrArray]):
        self.bytes_read = 0
        self._arrays = arrays
        self._sizes: dict[str, int] = {}  # of files in folders
        self._closed = False

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def close(self) -> None:
        """Refuses further reads."""
        self._closed = True

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int
    ) -> Iterator[tuple[int, Arrays]]:
        """Reads boxes of arrays; see `readers.Reader`."""
        require_not_forked()
        if self._closed:
            raise RuntimeError("the reader is closed")
        reads = [_Read.of(key, self._arrays[key], boxes) for key, boxes in requests]
        return self._results(reads, max_inflight_bytes)

    def _results(
        self, reads: Sequence[_Read], max_inflight_bytes: int
    ) -> Iterator[tuple[int, Arrays]]:
        memory = Memory(sum([read.nbytes for read in reads]))
        in_flight: deque[tuple[int, Arrays, list[ts.WriteFutures]]] = deque()
        held = 0
        waiting = deque(enumerate(reads))
        try:
            while waiting or in_flight:
                while waiting:
                    number, read = waiting[0]
                    if in_flight and held + read.nbytes_held > max_inflight_bytes:
                        break
                    waiting.popleft()
                    with _damage(read.array.place, read.key):
                        self._check_size(read.array)
                        in_flight.append((number, *read.start(memory)))
                    held += read.nbytes_held
                    self.bytes_read += read.nbytes_decoded
                number, arrays, futures = in_flight[0]
                with _damage(reads[number].array.place, reads[number].key):
                    for future in futures:
                        future.result()
                in_flight.popleft()
                held -= reads[number].nbytes_held
                yield number, reads[number].boxes_of(arrays, memory)
        finally:
            for _, _, futures in in_flight:  # reads that still write into our buffers
                for future in futures:
                    future.commit.exception()

    def check_files(self) -> None:
        """Checks that all chunks are there, and that all files are long enough; reads no value.

        Raises:
          CorruptCheckpointError: a file is truncated, or a chunk or a file is missing.
        """
        databases: dict[str, Database] = {}
        listed: dict[str, Counter[str]] = {}
        for key, array in self._arrays.items():
            place = array.place
            with _damage(place, key):
                if not place.is_database and is_url(place.directory):
                    if place.directory not in listed:
                        keys = keys_below(place.directory)
                        listed[place.directory] = Counter([each.partition("/")[0] for each in keys])
                    found = listed[place.directory][place.name]
                elif not place.is_database:
                    found = len(_files_below(array.folder))
                else:
                    if place.directory not in databases:
                        databases[place.directory] = database_in(place.directory)
                    found = databases[place.directory].count_below(f"{place.name}/")
                wanted = _count_of_chunks(array)
                if found - 1 < wanted and not place.omits_zeros:  # one is the description
                    raise ValueError(f"{max(found - 1, 0)} of {wanted} chunks are there")
        for directory, database in databases.items():
            files = Files(directory)
            files.expect(database.files)
            for file, nbytes in database.files.items():
                size = files.size(file) if is_url(file) or os.path.exists(file) else 0
                if size < nbytes:
                    what = f"{nbytes} bytes were expected, and it has {size}"
                    raise CorruptCheckpointError(f"{file}: {what}", file=file)

    def _check_size(self, array: ZarrArray) -> None:
        """Raises if an array cannot be that large, so that no memory is allocated for nothing."""
        if array.nbytes <= _BELIEVED_NBYTES or array.place.omits_zeros:
            return
        if is_url(array.folder):  # which does not tell how much it holds
            return
        if array.folder not in self._sizes:
            self._sizes[array.folder] = sum(map(os.path.getsize, _files_below(array.folder)))
        found = self._sizes[array.folder]
        if array.nbytes > found * _MAX_EXPANSION:
            raise ValueError(f"{array.nbytes} bytes cannot lie in files of {found} bytes")


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """How boxes of one array are read.

    Attributes:
      key, array: the array.
      boxes: the ones that are wanted.
      is_cut: whether the array is read as a whole, and the boxes are cut from it.
      nbytes: size of the boxes.
      nbytes_decoded: size of the chunks that are decoded for them.
    """

    key: str
    array: ZarrArray
    boxes: tuple[Box, ...]
    is_cut: bool
    nbytes: int
    nbytes_decoded: int

    @property
    def nbytes_held(self) -> int:
        """The memory that it takes until it is finished; parts of chunks take that of chunks."""
        return max(self.nbytes, self.nbytes_decoded)

    @classmethod
    def of(cls, key: str, array: ZarrArray, boxes: Sequence[Box]) -> _Read:
        shape, itemsize = array.shape, array.dtype.itemsize
        for box in boxes:
            if not inside(box, shape):
                raise ValueError(f"{key}: the box {box} lies outside of shape {shape}")
        chunk = array.read_chunk
        everything = _size_in_chunks(whole(shape), chunk) * itemsize
        is_cut = len(boxes) > 1 and array.nbytes <= _SMALL_NBYTES
        touched = sum([_size_in_chunks(box, chunk) for box in boxes]) * itemsize
        nbytes = sum(map(size_of, boxes)) * itemsize
        decoded = everything if is_cut else min(touched, everything)
        return cls(key, array, tuple(boxes), is_cut, nbytes, decoded)

    def start(self, memory: Memory) -> tuple[Arrays, list[ts.WriteFutures]]:
        """Starts to fill arrays: one for each box, or one with the whole array."""
        store, dtype = self.array.store, self.array.dtype
        if self.is_cut:
            everything = np.empty(self.array.shape, dtype)
            return (everything,), [ts.array(everything).write(store)]
        arrays = tuple([memory.take(shape_of(box), dtype) for box in self.boxes])
        pairs = [
            (ts.array(array), store[slices(box)].translate_to[0] if box else store)
            for array, box in zip(arrays, self.boxes, strict=True)
            if array.size
        ]
        return arrays, [target.write(source) for target, source in pairs]

    def boxes_of(self, arrays: Arrays, memory: Memory) -> Arrays:
        """The wanted boxes, once the arrays are filled."""
        if not self.is_cut:
            return arrays
        parts = tuple([memory.take(shape_of(box), arrays[0].dtype) for box in self.boxes])
        for part, box in zip(parts, self.boxes, strict=True):
            part[...] = arrays[0][slices(box)]
        return parts


def _size_in_chunks(box: Box, chunk: Sequence[int]) -> int:
    """The number of elements of the chunks that a box touches.

    >>> _size_in_chunks(((3, 5), (0, 1)), (4, 2))
    16
    """
    return math.prod(
        [
            (-(-stop // n) - start // n) * n if stop > start else 0
            for (start, stop), n in zip(box, chunk, strict=True)
        ]
    )


def _count_of_chunks(array: ZarrArray) -> int:
    extents = zip(array.shape, array.write_chunk, strict=True)
    return math.prod([-(-size // n) for size, n in extents])


def _files_below(folder: str) -> list[str]:
    return [os.path.join(above, name) for above, _, names in os.walk(folder) for name in names]
