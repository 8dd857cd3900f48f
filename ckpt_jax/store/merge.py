"""Merging shards into a checkpoint, by reference.

No byte of a shard is read or copied, but for its index. The index of the checkpoint names the
directories of the shards relative to its own, so the checkpoint can be moved and copied. The
manifest is written last: with it, the directory is a checkpoint.

In an object store, shards are not moved: those that lie elsewhere are copied.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType

from ckpt_jax.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ShardError,
)
from ckpt_jax.store import objects
from ckpt_jax.store.durable import fsync_directory
from ckpt_jax.store.index import Index, Shard, Table, merge_indexes
from ckpt_jax.store.manifest import (
    INDEX,
    INDEX_KEY,
    MANIFEST,
    META,
    Part,
    manifest_of,
    read_file,
    write_file,
    write_manifest,
    write_parts,
)
from ckpt_jax.store.objects import NoSuchBucketError, is_url
from ckpt_jax.store.paths import absolute, is_within, relative
from ckpt_jax.store.presence import is_directory, is_taken, names_in
from ckpt_jax.store.transfer import transferred

SHARDS = "shards"  # the directory of a checkpoint's shards


def merge_shards(
    directories: Sequence[str],
    destination: str,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    *,
    durable: bool = True,
) -> str:
    """Makes one checkpoint of shards. Shards that lie outside of it are moved into it; from other
    file systems they are copied, and then removed. If that fails, they are where they were.

    Args:
      directories: the shards. They have to make up whole arrays.
      destination: directory of the checkpoint; it may exist, but not be a checkpoint already.
      extra: small values that are committed with the index, for `ShardedReader.extra`.
      durable: return only when the checkpoint would survive a power failure. The contents of the
        shards have been flushed when they were written.

    Returns:
      `destination`.

    Raises:
      ShardError: the shards do not make up whole arrays, or cut them in so many different ways
        that a reader would refuse the index; nothing was changed.
      FileExistsError: `destination` already is a checkpoint.
      CorruptCheckpointError: a shard is damaged or its write was interrupted.
    """
    shards = [read_shard(directory) for directory in directories]
    tables = {table.digest: table for _, table in shards}
    entries = [(shard, table.digest) for shard, table in shards]
    return commit(entries, tables, destination, extra, durable=durable)


def commit(
    shards: Sequence[tuple[Shard, bytes]],
    tables: Mapping[bytes, Table],
    destination: str,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    *,
    durable: bool = True,
) -> str:
    """`merge_shards`, if much is known already: only the tables that are not are read.

    Args:
      shards: the entry of each shard, and the digest of its table.
      tables: some tables, by digest.
      destination, extra, durable: as for `merge_shards`.
    """
    if is_taken(os.path.join(destination, MANIFEST)):
        raise FileExistsError(f"{destination} already is a checkpoint")
    if is_url(destination):
        parts = assemble(shards, tables, destination, extra, mark=secrets.token_hex(8))
        write_file(os.path.join(destination, MANIFEST), manifest_of(parts), durable=durable)
        return destination
    with _all_or_nothing(destination), ExitStack() as moves:
        parts = assemble(shards, tables, destination, extra, durable=durable, moves=moves)
        with _no_manifest_after_failure(destination):
            write_manifest(destination, parts, durable=durable)
            if durable:
                fsync_directory(os.path.dirname(absolute(destination)))
    return destination


@contextmanager
def _all_or_nothing(destination: str) -> Iterator[None]:
    """Removes what the block has made around the shards, if it fails."""
    is_new = not is_taken(destination)
    try:
        yield
    except BaseException:
        shutil.rmtree(os.path.join(destination, META), ignore_errors=True)
        with suppress(OSError):  # there may be shards in it that were there before
            os.rmdir(os.path.join(destination, SHARDS))
            if is_new:
                os.rmdir(destination)
        raise


@contextmanager
def _no_manifest_after_failure(destination: str) -> Iterator[None]:
    """Takes the manifest away before shards are, if the block fails: it needs all of them."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(os.path.join(destination, MANIFEST))
        raise


def read_shard(directory: str) -> tuple[Shard, Table]:
    """The entry of a shard in the index of a checkpoint, with this directory, and its table.

    Raises:
      CheckpointError: it is a checkpoint, and no shard.
      CheckpointNotFoundError: there is no such directory.
      CorruptCheckpointError: it is damaged or its write was interrupted.
    """
    path = os.path.join(directory, INDEX)
    try:
        data = read_file(path)
    except NoSuchBucketError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_taken(os.path.join(directory, MANIFEST)):
            raise CheckpointError(f"{directory} is a checkpoint, not a shard") from None
        if not is_directory(directory):
            raise CheckpointNotFoundError(f"there is no shard at {directory}") from None
        raise CorruptCheckpointError(
            f"{directory}: has no index, because its write was interrupted", file=directory
        ) from error
    try:
        index = Index.from_bytes(data)
        if not index.is_shard:
            raise CorruptCheckpointError("this is not the index of a shard")
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{directory}: {error}", file=path) from error
    (shard,), (table,) = index.shards, index.tables
    digest = hashlib.sha256(data).digest()
    return replace(shard, directory=directory, checksums=b"", digest=digest), table


def assemble(
    shards: Sequence[tuple[Shard, bytes]],
    tables: Mapping[bytes, Table],
    destination: str,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    *,
    durable: bool = True,
    mark: str = "",
    moves: ExitStack | None = None,
) -> dict[str, Part]:
    """Puts all of a checkpoint into its directory but for the manifest, which makes it one.

    Args:
      shards: the entry of each shard, and the digest of its table.
      tables: some tables, by digest. Only those that are not among them are read.
      destination, extra, durable: as for `merge_shards`.
      mark: of the attempt, in an object store.
      moves: shards are moved for as long as its block runs, and moved back if that fails. By
        default, until this function returns.

    Returns:
      The parts for the manifest.
    """
    if INDEX_KEY in extra:
        raise ValueError(f"{INDEX_KEY} is the name of the index")
    known = dict(tables)
    for shard, digest in shards:
        if digest not in known:
            table = read_shard(shard.directory)[1]
            if table.digest != digest:
                what = f"{shard.directory}: is not the shard that its writer has reported"
                raise CorruptCheckpointError(what, file=shard.directory)
            known[digest] = table
    sources = [shard.directory for shard, _ in shards]
    targets = _targets(sources, destination, mark)
    merged = merge_indexes(
        [
            (replace(shard, directory=target), known[digest])
            for (shard, digest), target in zip(shards, targets, strict=True)
        ]
    )
    index = merged.to_bytes()
    if not merged.is_readable(len(index)):
        raise ShardError(
            f"{destination}: {len(merged.keys)} arrays are cut in too many different ways over "
            f"{len(shards)} shards. Cut arrays of one shape alike; nothing was changed."
        )
    paths = [os.path.join(destination, target) for target in targets]
    moved = [(a, b) for a, b in zip(sources, paths, strict=True) if absolute(a) != absolute(b)]
    parents = {os.path.dirname(path) for path in paths}
    with ExitStack() as own:
        if is_url(destination):
            _copy_objects(moved)
        else:
            for _, path in moved:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            (moves or own).enter_context(transferred(moved, durable=durable))
        parts = write_parts(destination, {INDEX_KEY: index, **extra}, durable=durable, mark=mark)
        if durable and not is_url(destination):
            for directory in sorted({*parents, destination}, key=len, reverse=True):
                fsync_directory(directory)
    return parts


def _copy_objects(moves: Sequence[tuple[str, str]]) -> None:
    """Copies shards to where they belong, in an object store."""
    for source, target in moves:
        if not is_url(source):
            raise ShardError(
                f"{source}: expected a shard in the object store of {target}, got one in a file "
                "system. Write the shards below the checkpoint."
            )
        for key in objects.keys_below(source):
            found = objects.read(f"{source}/{key}")
            if found is not None:
                objects.write(f"{target}/{key}", found.value)


def _targets(directories: Sequence[str], destination: str, mark: str) -> list[str]:
    """For each shard, its directory relative to `destination`.

    A shard that lies inside keeps its directory; the others get free names.
    """
    root = absolute(destination)
    paths = [absolute(directory) for directory in directories]
    if len(set(paths)) < len(paths):
        raise ValueError("a shard is listed twice")
    inside = {path for path in paths if is_within(path, root)}
    if len(inside) == len(paths):
        return [relative(path, root) for path in paths]
    taken = {*names_in(os.path.join(root, SHARDS))}
    begin = f"{mark}-" if mark else ""
    names = (f"{begin}{i:05d}" for i in range(1 << 30))
    free = (f"{SHARDS}/{name}" for name in names if name not in taken)
    return [relative(path, root) if path in inside else next(free) for path in paths]
