"""Stacks in TensorStore: the one module that knows how bytes are addressed.

A *database* is an OCDBT key-value store in a directory. A *stack* is a zarr3 array of bytes in it,
of shape [rows, row_nbytes], in chunks of [1, chunk_nbytes]. Each chunk is a zstd frame with a
checksum of its contents. At the level for uncompressed values, a frame holds the bytes as they are,
except for runs of one byte. There zstd is used for its checksum only, which TensorStore computes
and verifies several times faster than its CRC-32C.

(The rename transform `ckpt_jax.Stack` is something else: it stacks arrays.)
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import tensorstore as ts

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store.forks import use_tensorstore
from ckpt_jax.store.index import StackShape
from ckpt_jax.store.paths import absolute, require_addressable
from ckpt_jax.store.workers import cores

CHUNK_NBYTES = 1 << 20  # about the size of chunks: keeps both small reads and overhead small
ALIGNMENT = 64  # of slices in rows and of results in memory; JAX uses such memory without a copy
MANIFEST = "manifest.ocdbt"  # the file whose presence makes a directory a database
SHARDS = "shards"  # the directory of a checkpoint's shards
DATA = "d"  # the directory of a database's data files
LEVELS = {None: -131072, "zstd": 1}  # zstd's level by `compression`; readers need not know it
MAX_EXPANSION = 1 << 15  # by zstd: a block of 128 KiB takes at least 4 bytes

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


@cache
def _threads() -> ts.Context:
    # This package flushes the files itself, see `durable`.
    return ts.Context({"file_io_sync": False, "file_io_concurrency": {"limit": max(4, cores())}})


def new_context() -> ts.Context:
    """A context for one reader or writer. All contexts share threads, and none shares a cache.

    A shared cache would be wrong after a directory was removed and its name was used again.

    Raises:
      RuntimeError: the parent of this process has used TensorStore before it was forked.
    """
    use_tensorstore()
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}}, _threads())


def round_up(n: int, unit: int = ALIGNMENT) -> int:
    return -(-n // unit) * unit


def chunk_nbytes(row_nbytes: int) -> int:
    """Size of the chunks of a row, near `CHUNK_NBYTES`. The last may be a few bytes smaller."""
    count = max(1, round(row_nbytes / CHUNK_NBYTES))
    return -(-row_nbytes // count)


def files_nbytes(directory: str) -> int:
    """Size of the data files of the database in `directory`; 0 if there are none."""
    data = os.path.join(directory, DATA)
    try:
        with os.scandir(data) as files:
            return sum(file.stat().st_size for file in files)
    except (FileNotFoundError, NotADirectoryError):  # also if they are being removed
        return 0


def _database(directory: str) -> dict[str, Any]:
    path = absolute(directory)
    require_addressable(path)
    # A path, not a URL: directories may be called "a?b" or "a%20b".
    base = {"driver": "file", "path": f"{path}/"}
    return {"driver": "ocdbt", "base": base}


def open_database(directory: str, context: ts.Context, prefix: str = "") -> ts.KvStore:
    spec = _database(directory) | {"path": prefix}
    return ts.KvStore.open(spec, context=context).result()


def open_stack(
    directory: str,
    context: ts.Context,
    shard_id: str,
    number: int,
    stack: StackShape,
    *,
    create: bool = False,
    level: int = LEVELS[None],
    transaction: ts.Transaction | None = None,
) -> ts.TensorStore:
    """Opens or creates stack `number` of a shard.

    `stack` says its sizes. If the stack exists, they are not compared with its metadata.
    """
    zstd = {"name": "zstd", "configuration": {"level": level, "checksum": True}}
    grid = {"chunk_shape": [1, stack.chunk_nbytes]}
    spec = {
        "driver": "zarr3",
        "kvstore": _database(directory) | {"path": f"{shard_id}/{number}/"},
        "metadata": {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [stack.rows, stack.row_nbytes],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}, zstd],
        },
        # A chunk of zeros is written like any other, so an absent chunk means damage.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(
        ts.Spec(spec),
        context=context,
        transaction=transaction,
        create=create,
        open=not create,
        assume_metadata=not create,
    ).result()


def storage_error(error: Exception, directory: str) -> Exception:
    """Translates an error of TensorStore: an OSError if it came from the system."""
    code = _OS_ERROR.search(str(error))
    if code is not None:
        return OSError(int(code[1]), os.strerror(int(code[1])), directory)
    return CheckpointError(f"{directory}: {error}")
