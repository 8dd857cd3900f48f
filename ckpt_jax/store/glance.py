"""A glance at a checkpoint: its size, and whether its files are there, without opening it.

Opening a checkpoint checks that its index is consistent. That takes time for each array, too much
for a list of a thousand checkpoints. Here only the digest of the index is compared with the one in
the manifest: if it is the same, the index is the one that was committed. Then all files are looked
at, but not read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph._proto import index_pb2
from ckpt_jax.store import objects
from ckpt_jax.store.fetch import check_files, check_values
from ckpt_jax.store.index import Shard, check_version
from ckpt_jax.store.manifest import INDEX, INDEX_KEY, META, read_manifest, read_part
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.seal import unseal


class Glance(NamedTuple):
    """What a glance finds.

    Attributes:
      nbytes: the number of bytes of all values.
      small: the small entries that were asked for, and are there.
    """

    nbytes: int
    small: Mapping[str, bytes]


def glance(directory: str, small: Collection[str] = ()) -> Glance:
    """Looks at the checkpoint in `directory`.

    Args:
      directory: of the checkpoint.
      small: the names of entries to read that were committed with it.

    Raises:
      CheckpointNotFoundError: there is no checkpoint.
      CorruptCheckpointError: its manifest or index is damaged, or a file is truncated or missing.
      UnsupportedFormatError: another version of this library wrote it.
    """
    parts = read_manifest(directory)
    if INDEX_KEY not in parts:
        raise CorruptCheckpointError(f"{directory}: the manifest names no index", file=directory)
    there = frozenset(objects.keys_below(directory)) if is_url(directory) else None
    for part in () if is_url(directory) else parts.values():
        _check_size(os.path.join(directory, META, part.file), part.nbytes)
    message = index_pb2.Index.FromString(unseal(read_part(directory, parts[INDEX_KEY])))
    check_version(message.format_version, "index")
    nbytes = [_nbytes(table) for table in message.tables]
    for entry in message.shards:
        shard = Shard(
            directory=entry.directory,
            starts=(),
            nbytes=entry.nbytes,
            chunk_nbytes=entry.chunk_nbytes,
            block_nbytes=entry.block_nbytes,
            file_nbytes=entry.file_nbytes,
            compression=entry.compression,
            stored_nbytes=entry.stored_nbytes,
        )
        place = os.path.join(directory, entry.directory)
        if there is None:
            check_files(place, shard)
            _check_size(os.path.join(place, INDEX))
        else:
            check_values(directory, place, shard, there)
    return Glance(
        sum([nbytes[entry.table] for entry in message.shards]),
        {name: read_part(directory, parts[name]) for name in small if name in parts},
    )


def _nbytes(table: index_pb2.Table) -> int:
    """The size of all slices that a table lists."""
    sizes = np.array([layout.nbytes for layout in table.layouts], np.int64)
    return int(sizes[np.frombuffer(table.layout, "<u4")].sum())


def _check_size(path: str, nbytes: int | None = None) -> None:
    """Checks that a file is there, and that it has a size if that is given."""
    try:
        found = os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpointError(f"{path}: the file is missing", file=path) from error
    if nbytes not in (None, found):
        what = f"{path}: the file has {found} bytes, expected {nbytes}"
        raise CorruptCheckpointError(what, file=path)
