"""The reader of values that lie as plain bytes in files, with several threads.

A request becomes *pieces* (see there), and pieces become *jobs* of about 1 MiB. Requests are worked
on in their order; one is begun if its arrays and those that the caller has not taken yet fit into
the given memory. In an object store jobs are larger, and what a job will read is asked for ahead.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.boxes import (
    Box,
    Shape,
    inside,
    shape_of,
    tiling_problem,
    whole,
)
from ckpt_jax.graph.dtypes import ANONYMOUS_BYTE, dtype_of
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.store.extents import Extent, Stored
from ckpt_jax.store.memory import Memory
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.pieces import Piece, pieces_of
from ckpt_jax.store.watched import Files, OpenFile, Source
from ckpt_jax.store.workers import Workers, cores

_SCRATCH_NBYTES = 4 << 20
_MAX_OPEN = 64  # files that stay open during a read
_JOB_NBYTES = 1 << 20  # small reads are done together
_REMOTE_JOB_NBYTES = 8 << 20
_REMOTE_THREADS = 8  # each of which waits for several requests


@dataclass(frozen=True)
class StoredValues:
    """The index of a checkpoint: its values by key. See `readers.Contents`."""

    values: Mapping[str, Stored]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    @property
    def specs(self) -> dict[str, LeafSpec]:
        return {key: stored.spec for key, stored in self.values.items()}

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def layout_of(self, key: str) -> LeafSpec:
        return self.values[key].spec

    def nbytes(self, key: str) -> int:
        stored = self.values[key]
        if stored.spec.is_bytes:
            return stored.nbytes
        if not is_readable(stored.spec):
            return 0
        return math.prod(stored.spec.shape) * _dtype_of(stored.spec).itemsize


def is_readable(spec: LeafSpec) -> bool:
    return not spec.is_unreadable or spec.dtype == ANONYMOUS_BYTE


def _dtype_of(spec: LeafSpec) -> np.dtype:
    return np.dtype(ANONYMOUS_BYTE) if spec.dtype == ANONYMOUS_BYTE else dtype_of(spec.dtype)


class ExtentsReader:
    """Reads values that are `Stored`. See `readers.Reader`.

    Args:
      path: of the checkpoint.
      values: by key.
      graph: makes the object graph when it is asked for. By default the keys are names, with "/"
        between their parts.
      files: the files that the headers were read from.
      metadata: what the program said about the checkpoint, if the format can hold it.

    Raises:
      CorruptCheckpointError: a value does not lie inside its file, or its extents do not tile it.
    """

    def __init__(
        self,
        path: str,
        values: Mapping[str, Stored],
        graph: Callable[[], ObjectGraph | None] | None = None,
        files: Files | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        files = files or Files(path)
        self.path = path
        self.index = StoredValues(values)
        self.bytes_read = 0
        self._graph = graph
        self._files = files
        self._closed = False
        self._metadata = metadata or {}
        files.expect(_ends(values))
        for key, stored in values.items():
            problem = _problem(stored, files)
            if problem is not None:
                what, file = problem
                raise files.damage(file or path, what, key)
        files.forget()

    def metadata(self) -> Mapping[str, Any]:
        """What the program said about the checkpoint; empty if it said nothing."""
        return self._metadata

    def graph(self) -> ObjectGraph | None:
        """The object graph.

        Raises:
          CorruptCheckpointError: two names mean one value.
        """
        if self._graph is not None:
            return self._graph()
        try:
            return graph_of(self.index.specs)
        except ValueError as error:
            raise CorruptCheckpointError(f"{self.path}: {error}", file=self.path) from error

    @property
    def unchecked(self) -> frozenset[str]:
        """The keys of values that have no checksum."""
        return frozenset(
            [
                key
                for key, stored in self.index.values.items()
                if any([extent.checksum is None for extent in stored.extents])
            ]
        )

    def identity(self) -> Hashable | None:
        """A value that changes if a file of the checkpoint does; None if one is gone."""
        return self._files.identity()

    def check_files(self) -> None:
        """Nothing to do: opening has compared the sizes of the files."""

    def close(self) -> None:
        """Refuses further reads."""
        self._closed = True

    def read_bytes(self, key: str) -> bytes:
        """A byte string."""
        ((_, (array,)),) = self.read([(key, [()])])
        return array.tobytes()

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int = 64 << 20
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Reads boxes of arrays; see `readers.Reader`."""
        if self._closed:
            raise RuntimeError(f"{self.path}: the reader is closed")
        specs = {key: self.index.values[key].spec for key, _ in requests}
        refused = [f"{key}: {spec.refusal}" for key, spec in specs.items() if not is_readable(spec)]
        if refused:
            raise UnsupportedFormatError("\n  ".join([f"{self.path}: {refused[0]}", *refused[1:]]))
        for key, _ in requests:
            if damage := self.index.values[key].damage:
                raise self._files.damage(self.path, damage, key)
        checked: set[tuple[Shape, tuple[Box, ...]]] = set()  # a model has few shapes
        wanted: list[_Request] = []
        for key, boxes in requests:
            spec, boxes = specs[key], tuple(boxes)
            if (spec.shape, boxes) not in checked:
                for box in boxes:
                    if not inside(box, spec.shape):
                        raise ValueError(f"{key}: the box {box} lies outside of shape {spec.shape}")
                checked.add((spec.shape, boxes))
            stored = self.index.values[key]
            if stored.damage:
                raise self._files.damage(self.path, stored.damage, key)
            wanted.append(_Request(key, stored, boxes, _nbytes_of(stored, boxes)))
        return self._results(wanted, max_inflight_bytes)

    def _results(
        self, requests: Sequence[_Request], max_inflight_bytes: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        waiting = deque(enumerate(requests))
        jobs = _Jobs(self._files)
        memory = Memory(sum([request.nbytes for request in requests]))
        in_flight: deque[tuple[int, _Work]] = deque()
        held = 0
        try:
            while waiting or in_flight:
                while waiting:
                    number, request = waiting[0]
                    if in_flight and held + request.nbytes > max_inflight_bytes:
                        break
                    waiting.popleft()
                    work = _Work.of(request, memory)
                    in_flight.append((number, work))
                    held += request.nbytes
                    jobs.start(work)
                number, work = in_flight.popleft()
                if not work.done.is_set():
                    jobs.flush()
                    work.done.wait()
                if work.error is not None:
                    raise work.error
                held -= work.nbytes
                self.bytes_read += work.nbytes
                yield number, work.results
        finally:
            jobs.cancel()
            for _, work in in_flight:  # threads may still write into its buffers
                work.done.wait()
            jobs.close()


@dataclass(frozen=True, slots=True)
class _Request:
    """Boxes of one value, and their size."""

    key: str
    stored: Stored
    boxes: tuple[Box, ...]
    nbytes: int


def _itemsize(stored: Stored) -> int:
    """The size of an element; a byte string is one element."""
    return stored.nbytes if stored.spec.is_bytes else _dtype_of(stored.spec).itemsize


def _ends(values: Mapping[str, Stored]) -> dict[str, int]:
    """Where the last value ends in each file of an object store."""
    ends: dict[str, int] = {}
    for stored in values.values():
        if stored.contents is not None or stored.damage or not is_readable(stored.spec):
            continue
        for extent in stored.extents:
            if not is_url(extent.file):
                return {}
            end = extent.offset + extent.span * _itemsize(stored)
            ends[extent.file] = max(end, ends.get(extent.file, 0))
    return ends


def _problem(stored: Stored, files: Files) -> tuple[str, str] | None:
    """What is wrong with the extents of a value, and the file of one; None if nothing is."""
    spec, extents = stored.spec, stored.extents
    if not is_readable(spec) or stored.damage:
        return None
    itemsize = _itemsize(stored)
    boxes = [()] if spec.is_bytes else [extent.box for extent in extents]
    if boxes != [whole(spec.shape)] and (problem := tiling_problem(boxes, spec.shape)):
        return problem, extents[0].file if extents else ""
    for extent in extents:
        size = files.size(extent.file) if stored.contents is None else stored.nbytes
        end = extent.offset + extent.span * itemsize
        if extent.offset < 0 or min(extent.steps, default=0) < 0 or end > size:
            what = f"it has {size} bytes, the value lies at {extent.offset} to {end}"
            return what, extent.file
    return None


def _nbytes_of(stored: Stored, boxes: tuple[Box, ...]) -> int:
    if stored.spec.is_bytes:
        return stored.nbytes * len(boxes)
    return sum(map(math.prod, _shapes_of(boxes))) * _dtype_of(stored.spec).itemsize


@lru_cache(maxsize=1024)
def _shapes_of(boxes: tuple[Box, ...]) -> list[Shape]:
    return [*map(shape_of, boxes)]


@dataclass(eq=False)
class _Work:
    """One request: the arrays that are filled for it."""

    key: str
    stored: Stored
    boxes: tuple[Box, ...]
    nbytes: int
    results: tuple[np.ndarray, ...]
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    open_jobs: int = 1  # the planning is one
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, request: _Request, memory: Memory) -> _Work:
        stored, boxes = request.stored, request.boxes
        if stored.spec.is_bytes:
            shapes, dtype = [(stored.nbytes,)] * len(boxes), np.dtype(np.uint8)
        else:
            shapes, dtype = _shapes_of(boxes), _dtype_of(stored.spec)
        results = tuple([memory.take(shape, dtype) for shape in shapes])
        return cls(request.key, stored, boxes, request.nbytes, results)

    def pieces(self, extent: Extent) -> tuple[Piece, ...]:
        """The reads that fill the arrays from an extent; offsets are from its beginning."""
        if self.stored.spec.is_bytes:
            inside = whole((self.stored.nbytes,))
            return pieces_of(inside, (1,), (inside,) * len(self.boxes), 1)
        itemsize = self.results[0].itemsize if self.results else 1
        return pieces_of(extent.box, extent.steps, self.boxes, itemsize)

    def close_job(self) -> None:
        """One of its jobs is done. The last one finishes the arrays."""
        with self.lock:
            self.open_jobs -= 1
            if self.open_jobs:
                return
        if self.error is None and self.stored.finish is not None:
            try:
                for result in self.results:
                    self.stored.finish(result)
            except Exception as error:  # raised where the result is asked for
                self.error = error
        self.done.set()


_Job = tuple[_Work, Extent, Sequence[Piece]]


class _Jobs:
    """Hands reads to threads, small ones together."""

    def __init__(self, files: Files):
        self._files = files
        self._small: list[_Job] = []
        self._small_nbytes = 0
        self._cancelled = False
        self._open: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the files, when no job is left."""
        for source in self._open.values():
            source.close()

    def cancel(self) -> None:
        """Lets everything that has not been read yet end at once."""
        self._cancelled = True
        self.flush()

    def start(self, work: _Work) -> None:
        """Starts all reads for a request."""
        try:
            for extent in work.stored.extents:
                pieces = work.pieces(extent)
                if pieces:
                    self._start(work, extent, pieces)
        except Exception as error:  # raised where the result is asked for
            work.error = error
        work.close_job()

    def _start(self, work: _Work, extent: Extent, pieces: Sequence[Piece]) -> None:
        job_nbytes = _job_nbytes(extent)
        if work.stored.contents is not None or extent.checksum is not None:  # on one thread
            nbytes = sum([piece.nbytes for piece in pieces])
            waits = work.stored.contents is not None and is_url(extent.file)  # for requests
            self._add(work, extent, pieces, job_nbytes if waits else nbytes)
            return
        batch: list[Piece] = []
        nbytes = 0
        for piece in pieces:
            batch.append(piece)
            nbytes += piece.nbytes
            if nbytes >= job_nbytes:
                self._add(work, extent, batch, nbytes)
                batch, nbytes = [], 0
        if batch:
            self._add(work, extent, batch, nbytes)

    def _add(self, work: _Work, extent: Extent, pieces: Sequence[Piece], nbytes: int) -> None:
        with work.lock:
            work.open_jobs += 1
        self._small.append((work, extent, pieces))
        self._small_nbytes += nbytes
        if self._small_nbytes >= _job_nbytes(extent):
            self.flush()

    def flush(self) -> None:
        """Starts what has been held back."""
        jobs, self._small, self._small_nbytes = self._small, [], 0
        if jobs:
            is_remote = any(is_url(extent.file) for _, extent, _ in jobs)
            _pool(is_remote).submit(self._run, jobs, is_remote)

    def _run(self, jobs: Sequence[_Job], is_remote: bool) -> None:
        opened = self._opened
        if is_remote:  # what lies side by side is read in one request
            jobs = sorted(jobs, key=lambda job: (job[1].file, job[1].offset))
            opened = self._ahead(jobs)
        for work, extent, pieces in jobs:
            try:
                if self._cancelled or work.error is not None:
                    continue
                if work.stored.contents is not None:
                    _take_contents(work, extent, pieces, work.stored.contents)
                    continue
                with opened(extent.file) as source:
                    _read(source, work, extent, pieces)
            except CorruptCheckpointError as error:
                work.error = CorruptCheckpointError(
                    f"{work.key}: {error}", file=error.file, key=work.key
                )
            except Exception as error:  # raised where the result is asked for
                work.error = error
            finally:
                work.close_job()

    def _ahead(self, jobs: Sequence[_Job]) -> Callable[[str], AbstractContextManager[Source]]:
        """Begins to read what jobs need from files in an object store, and gives these files."""
        parts = [
            (extent.file, extent.offset + piece.offset, piece.nbytes)
            for work, extent, pieces in jobs
            if work.stored.contents is None and not self._cancelled
            for piece in pieces
        ]
        source_of = self._files.ahead(parts)
        return lambda file: nullcontext(source_of(file))

    @contextmanager
    def _opened(self, file: str) -> Iterator[Source]:
        """A file, which stays open until the end, unless there are too many."""
        with self._lock:
            source = self._open.get(file)
            if source is None and len(self._open) < _MAX_OPEN:
                source = self._open[file] = self._files.opened(file)
        if source is not None:
            yield source
            return
        with self._files.opened(file) as source:
            yield source


def _job_nbytes(extent: Extent) -> int:
    return _REMOTE_JOB_NBYTES if is_url(extent.file) else _JOB_NBYTES


def _take_contents(
    work: _Work,
    extent: Extent,
    pieces: Sequence[Piece],
    contents: bytes | Callable[[memoryview], object],
) -> None:
    """Fills arrays from bytes that do not lie in a file as they are."""
    if isinstance(contents, bytes):
        buffer = np.frombuffer(contents, np.uint8)
    elif len(pieces) == 1 and pieces[0].direct and pieces[0].nbytes == work.stored.nbytes:
        contents(pieces[0].direct.memory(work.results))
        return
    else:
        buffer = np.empty(work.stored.nbytes, np.uint8)
        contents(buffer.data)
    for piece in pieces:
        start = extent.offset + piece.offset
        _distribute(buffer[start : start + piece.nbytes], piece, work.results)


def _read(source: Source, work: _Work, extent: Extent, pieces: Sequence[Piece]) -> None:
    """Reads pieces of an extent, and checks it if these are all of it."""
    itemsize = _itemsize(work.stored)
    checksum, end, crc = extent.checksum, 0, 0
    if checksum is not None:
        crc = checksum.start
    for piece in pieces:
        if piece.direct is not None:
            buffer = piece.direct.memory(work.results)
        else:
            buffer = _scratch(piece.nbytes).data
        source.read_into(buffer, extent.offset + piece.offset)
        if checksum is not None and end == piece.offset:
            crc = checksum.extended(crc, buffer)
            end += piece.nbytes
        for cut in piece.cuts:
            cut.copy(np.frombuffer(buffer, np.uint8), work.results)
    if checksum is not None and crc != checksum.value and end == extent.span * itemsize:
        what = f"its {checksum.kind} is {crc:#010x}, expected {checksum.value:#010x}"
        raise source.damage(what)


def _distribute(buffer: np.ndarray, piece: Piece, results: Sequence[np.ndarray]) -> None:
    """Copies what lies in memory already to where it belongs."""
    if piece.direct is not None:
        piece.direct.memory(results)[:] = buffer.data
    for cut in piece.cuts:
        cut.copy(buffer, results)


_local = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """Memory of this thread, whose pages are already there."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.size < nbytes:
        buffer = _local.buffer = np.empty(max(nbytes, _SCRATCH_NBYTES), np.uint8)
    return buffer[:nbytes]


_workers: dict[bool, tuple[int, Workers]] = {}
_workers_lock = threading.Lock()


def _pool(is_remote: bool) -> Workers:
    """Threads that stay, because new ones have no memory yet. A forked child has its own."""
    with _workers_lock:
        process, workers = _workers.get(is_remote, (None, None))
        if workers is None or process != os.getpid():
            count = _REMOTE_THREADS if is_remote else max(2, min(cores(), 16))
            workers = Workers(count, "ckpt-extents")
            _workers[is_remote] = os.getpid(), workers
        return workers
