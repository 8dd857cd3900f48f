"""Stacks as TensorStore sees them: the one place that knows how bytes are addressed.

A database is an OCDBT key-value store in a directory. A stack is a zarr3 array of bytes in it,
[rows, row_nbytes] in chunks of [1, chunk_nbytes], each chunk a zstd frame with a checksum of what
is in it. At the level for uncompressed values a frame is, but for runs of one byte, the bytes
themselves: zstd is there for its checksum, which TensorStore computes and verifies several times
faster than its CRC-32C.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import tensorstore as ts

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store.forks import use_tensorstore
from ckpt_jax.store.index import Stack
from ckpt_jax.store.paths import absolute, require_addressable

CHUNK_NBYTES = 1 << 20  # what chunks come close to: small reads stay small, overhead too
ALIGNMENT = 64  # of slices in rows and of results in memory; what JAX aliases without a copy
MANIFEST = "manifest.ocdbt"  # the file whose presence makes a directory a database
SHARDS = "shards"  # the directory of a checkpoint's shards
DATA = "d"  # the directory of a database's data files
LEVELS = {None: -131072, "zstd": 1}  # of zstd, by `compression`; readers need not know
MAX_EXPANSION = 1 << 15  # of zstd: a block of 128 KiB takes 4 bytes or more

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


@cache
def _threads() -> ts.Context:
    # Files are flushed by us, all at once, see `durable`.
    return ts.Context({"file_io_sync": False, "file_io_concurrency": {"limit": 4}})


def new_context() -> ts.Context:
    """A context for one reader or writer: threads are shared by all, caches by none.

    A cache outlives what it describes when a directory is removed and its name is used again.

    Raises:
      RuntimeError: the parent of this process has used TensorStore before it was forked.
    """
    use_tensorstore()
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}}, _threads())


def round_up(n: int, unit: int = ALIGNMENT) -> int:
    return -(-n // unit) * unit


def chunk_nbytes(row_nbytes: int) -> int:
    """Size of the chunks of a row: equal up to a few bytes, near `CHUNK_NBYTES`."""
    pieces = max(1, round(row_nbytes / CHUNK_NBYTES))
    return -(-row_nbytes // pieces)


def files_nbytes(directory: str) -> int:
    """Size of the data files of the database in `directory`; 0 where there are none."""
    data = os.path.join(directory, DATA)
    try:
        with os.scandir(data) as files:
            return sum(file.stat().st_size for file in files)
    except (FileNotFoundError, NotADirectoryError):  # also where they go in this moment
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
    stack: Stack,
    *,
    create: bool = False,
    level: int = LEVELS[None],
    transaction: ts.Transaction | None = None,
) -> ts.TensorStore:
    """Stack `number` of a shard; unless it is created, `stack` is believed unseen."""
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
        # A chunk of zeros is data like any other, and an absent chunk is damage.
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
    """What TensorStore's `error` on `directory` is called here: an OSError where it was one."""
    code = _OS_ERROR.search(str(error))
    if code is not None:
        return OSError(int(code[1]), os.strerror(int(code[1])), directory)
    return CheckpointError(f"{directory}: {error}")
