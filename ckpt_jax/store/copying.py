"""Copying a checkpoint from one storage to any other, verified, and committed as a save is.

Files are copied whole. The bytes of each are compared with the checksums in the source's index
before they are written. The copies of shards have names of their own, so the index of the copy is a
new one, and the rest is the same.

A copy can be *resumed*: its token follows from the source and the destination. So another attempt
finds what an earlier one has written, and goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.store import objects
from ckpt_jax.store.durable import fsync_directory
from ckpt_jax.store.index import CHECKSUM, Index, Shard, own_checksums
from ckpt_jax.store.manifest import (
    INDEX,
    INDEX_KEY,
    MANIFEST,
    parts_in,
    read_digested,
    read_file,
    read_part,
    write_file,
    write_parts,
)
from ckpt_jax.store.merge import SHARDS
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import below
from ckpt_jax.store.room import Room
from ckpt_jax.store.storage import Pinned, Stage, Storage
from ckpt_jax.store.stream import (
    DATA,
    checksum_of,
    file_end,
    file_path,
    memory_context,
    open_in_memory,
)
from ckpt_jax.store.workers import Workers, cores

_PART = ".part"

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def copy_checkpoint(
    source: Pinned,
    destination: str,
    storage: Storage,
    *,
    overwrite: bool,
    durable: bool,
    max_inflight_bytes: int,
    progress: Progress,
) -> None:
    """Copies a checkpoint of this library.

    Args:
      source: the checkpoint.
      destination: its new path.
      storage: where that lies.
      overwrite: whether a checkpoint there is replaced.
      durable: return only when the copy would survive a power failure.
      max_inflight_bytes: bound on the memory for files on their way.
      progress: called with the number of bytes to copy, and entered. Its value is called with the
        numbers of bytes that have been copied since the last call, on several threads.

    Raises:
      CheckpointNotFoundError: the source was replaced or removed meanwhile.
      CorruptCheckpointError: the source is damaged; nothing was committed.
      FileExistsError: there is something at the destination that may not be replaced.
      OSError: a storage refused. Another call goes on from what was copied.
    """
    manifest = read_file(os.path.join(source.location, MANIFEST))
    parts = parts_in(manifest)
    index = Index.from_bytes(read_part(source.location, parts[INDEX_KEY]))
    extras = {name: read_part(source.location, p) for name, p in parts.items() if name != INDEX_KEY}
    token = hashlib.sha256(b"copy\0" + manifest + destination.encode("utf-8", "surrogateescape"))
    stage = storage.stage(destination, token.hexdigest()[:32])
    with stage.claimed(overwrite=overwrite, durable=durable, keeps=True):
        there = stage.written()
        begin = f"{stage.mark}-" if stage.mark else ""
        names = [f"{SHARDS}/{begin}{number:05d}" for number in range(len(index.shards))]
        copies = [
            _ShardCopy(shard, below(source.location, shard.directory), stage, name)
            for shard, name in zip(index.shards, names, strict=True)
        ]
        _run(copies, there, durable, max_inflight_bytes, progress)
        shards = [replace(s, directory=name) for s, name in zip(index.shards, names, strict=True)]
        new = replace(index, shards=tuple(shards)).to_bytes()
        values = {INDEX_KEY: new, **extras}
        written = write_parts(stage.directory, values, durable=durable, mark=stage.mark)
        if durable and not is_url(destination):
            above = [os.path.join(stage.directory, SHARDS)] if copies else []
            for directory in (*above, stage.directory):
                fsync_directory(directory)
        source.check()
        stage.complete(written, durable=durable)
        stage.publish(overwrite=overwrite, durable=durable)


def _run(
    copies: Sequence[_ShardCopy],
    there: frozenset[str],
    durable: bool,
    max_inflight_bytes: int,
    progress: Progress,
) -> None:
    """Copies all files that are not there yet, and flushes their names."""
    jobs = [(each, number) for each in copies for number in range(each.shard.files)]
    missing = [(each, number) for each, number in jobs if each.name_of(number) not in there]
    total = sum(each.nbytes(number) for each, number in missing)
    room, failed = Room(max_inflight_bytes), threading.Event()
    is_remote = any(is_url(each.source) or is_url(each.target) for each in copies)

    def copy_file(each: _ShardCopy, number: int, advance: Callable[[int], object]) -> None:
        with room.taken(3 * each.shard.file_nbytes):
            if failed.is_set():
                return
            try:
                each.copy(number, durable)
                advance(each.nbytes(number))
            except BaseException:
                failed.set()
                raise

    threads = objects.PARALLEL if is_remote else cores()
    with progress(total) as advance, Workers(threads, "ckpt-copy") as workers:
        try:
            list(workers.map(_ShardCopy.open, copies))
            work = [workers.submit(copy_file, *each, advance) for each in missing]
            for job in work:
                job.result()
            for end in [workers.submit(each.finish, there, durable) for each in copies]:
                end.result()
        except BaseException:
            failed.set()
            raise


@dataclass(eq=False)
class _ShardCopy:
    """One shard on its way.

    Attributes:
      shard: its entry in the index of the source.
      source: its directory there.
      stage: where the copy is written.
      name: of the new directory, relative to the copy.
    """

    shard: Shard
    source: str
    stage: Stage
    name: str

    @property
    def target(self) -> str:
        """The new directory."""
        return os.path.join(self.stage.directory, self.name)

    def name_of(self, number: int) -> str:
        """The name of a file of the copy."""
        return f"{self.name}/{DATA}/{number}"

    def nbytes(self, number: int) -> int:
        """The bytes of the stream in a file."""
        return min(self.shard.file_nbytes, self.shard.nbytes - number * self.shard.file_nbytes)

    def open(self) -> None:
        """Reads the checksums, and makes the new directory."""
        self._index = read_digested(os.path.join(self.source, INDEX), self.shard.digest)
        self._checksums = np.frombuffer(own_checksums(self._index), CHECKSUM)
        if not is_url(self.target):
            inner = os.path.join(self.target, DATA) if self.shard.files else self.target
            os.makedirs(inner, exist_ok=True)
            for name in os.listdir(inner):
                if name.endswith(_PART):  # an earlier attempt has not finished it
                    os.unlink(os.path.join(inner, name))

    def copy(self, number: int, durable: bool) -> None:
        """Copies a file."""
        path = file_path(self.source, number)
        try:
            data = read_file(path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{path}: the file is missing", file=path) from error
        self._check(number, data, path)
        _write(file_path(self.target, number), data, durable)

    def finish(self, there: frozenset[str], durable: bool) -> None:
        """Writes the index of the copy, which is that of the source."""
        if f"{self.name}/{INDEX}" not in there:
            _write(os.path.join(self.target, INDEX), self._index, durable)
        if durable and not is_url(self.target):
            if self.shard.files:
                fsync_directory(os.path.join(self.target, DATA))
            fsync_directory(self.target)

    def _check(self, number: int, data: bytes, path: str) -> None:
        """Checks that a file holds the bytes of the source's stream."""
        size, block = self.nbytes(number), self.shard.block_nbytes
        if self.shard.compression:
            stream = self._decoded(number, data, path)
        else:
            stream = np.frombuffer(data, np.uint8)[:size]
            if stream.size < size or data[size:] != file_end(self.shard, number):
                raise CorruptCheckpointError(f"{path}: it is truncated or damaged", file=path)
        first = number * self.shard.file_nbytes // block
        for start in range(0, size, block):
            expected = self._checksums[first + start // block]
            if checksum_of(stream[start : start + block]) != expected:
                what = f"the checksum of block {first + start // block} does not match"
                raise CorruptCheckpointError(f"{path}: {what}", file=path)

    def _decoded(self, number: int, data: bytes, path: str) -> np.ndarray:
        context = memory_context()
        store = ts.KvStore.open({"driver": "memory"}, context=context).result()
        store.write(f"{DATA}/{number}", data).result()
        start = number * self.shard.file_nbytes
        stream = open_in_memory(self.shard, context)[start : start + self.nbytes(number)]
        try:
            return np.asarray(stream.read().result())
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: {error}", file=path) from error


def _write(path: str, data: bytes, durable: bool) -> None:
    """Writes a file, in one step, so that an interrupted copy leaves only whole files."""
    if is_url(path):
        objects.write(path, data)
        return
    new = f"{path}.{secrets.token_hex(8)}{_PART}"
    write_file(new, data, durable=durable)
    os.replace(new, path)
