"""Merging shards into a checkpoint, by reference.

A checkpoint's database holds no array data. It refers to ranges of the shards' data files by
names relative to the checkpoint's directory, so the directory can be renamed and copied. The
database is written in one transaction, which creates the manifest. So a directory without a
manifest is not a checkpoint yet, and a directory with a manifest is a complete one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import tensorstore as ts

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store.durable import fsync_directory, fsync_file
from ckpt_jax.store.fetch import read_index
from ckpt_jax.store.index import INDEX_KEY, Index, merge_indexes
from ckpt_jax.store.stack import (
    DATA,
    MANIFEST,
    SHARDS,
    files_nbytes,
    new_context,
    open_database,
    storage_error,
)


def merge_shards(
    directories: Sequence[str],
    destination: str,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    *,
    durable: bool = True,
) -> str:
    """Makes one checkpoint of shards. Shards that lie outside of it are moved into it.

    Args:
      directories: the shards. They have to make up whole arrays.
      destination: directory of the checkpoint; it may exist, but not be a checkpoint already.
      extra: small values that are committed with the index, for `ShardedReader.extra`.
      durable: return only when the checkpoint would survive a power failure. The contents of the
        shards have been flushed by `write_shard`.

    Returns:
      `destination`.

    Raises:
      ShardError: the shards do not make up whole arrays; nothing was changed.
      FileExistsError: `destination` already is a checkpoint.
      CorruptCheckpointError: a shard is damaged or its write was interrupted.
    """
    if INDEX_KEY in extra:
        raise ValueError(f"{INDEX_KEY} is the name of the index")
    if os.path.exists(os.path.join(destination, MANIFEST)):
        raise FileExistsError(f"{destination} already is a checkpoint")
    targets = _targets(directories, destination)
    parts = [
        _shard_index(source).moved(target, files_nbytes(source))
        for source, target in zip(directories, targets, strict=True)
    ]
    merged = merge_indexes(parts)
    os.makedirs(os.path.join(destination, SHARDS), exist_ok=True)
    for source, target in zip(directories, targets, strict=True):
        path = os.path.join(destination, target)
        if os.path.abspath(source) != os.path.abspath(path):
            os.rename(source, path)
    try:
        _commit(merged, destination, extra)
    except ValueError as error:
        raise storage_error(error, destination) from error
    if durable:
        _flush(destination, targets)
    return destination


def _targets(directories: Sequence[str], destination: str) -> list[str]:
    """For each shard, its directory relative to `destination`.

    A shard that lies inside keeps its directory; the others get free names.
    """
    root = os.path.abspath(destination)
    paths = [os.path.abspath(directory) for directory in directories]
    inside = {path for path in paths if os.path.commonpath([root, path]) == root != path}
    if len(set(paths)) < len(paths):
        raise ValueError("a shard is listed twice")
    free = (
        name
        for name in (f"{SHARDS}/{i:05d}" for i in range(1 << 30))
        if not os.path.lexists(os.path.join(root, name))
    )
    return [
        os.path.relpath(path, root).replace(os.sep, "/") if path in inside else next(free)
        for path in paths
    ]


def _shard_index(directory: str) -> Index:
    index = read_index(directory)
    if not index.is_shard:
        raise CheckpointError(f"{directory} is a checkpoint, not a shard")
    return index


def _commit(merged: Index, destination: str, extra: Mapping[str, bytes]) -> None:
    transaction = ts.Transaction(atomic=True)
    context = new_context()
    root = open_database(destination, context).with_transaction(transaction)
    writes = []
    for shard in merged.shards:
        if shard.stacks:
            prefix = f"{shard.id}/"
            source = open_database(os.path.join(destination, shard.directory), context, prefix)
            target = open_database(destination, context, prefix).with_transaction(transaction)
            writes.append(source.experimental_copy_range_to(target))
    values = {**extra, INDEX_KEY: merged.to_bytes()}
    writes += [root.write(key, value) for key, value in values.items()]
    for write in writes:
        write.result()
    transaction.commit_async().result()


def _flush(destination: str, targets: Sequence[str]) -> None:
    data = os.path.join(destination, DATA)
    files = [os.path.join(data, name) for name in os.listdir(data)]
    for file in [*files, os.path.join(destination, MANIFEST)]:
        fsync_file(file)
    parents = {os.path.dirname(os.path.join(destination, target)) for target in targets}
    above = os.path.dirname(os.path.abspath(destination))
    for directory in sorted({data, *parents, destination, above}, key=len, reverse=True):
        fsync_directory(directory)
