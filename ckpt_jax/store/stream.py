"""Streams: how the bytes of a shard lie in files. The one module that knows TensorStore.

The *stream* of a shard is a sequence of bytes: its slices, one after the other. It is stored as a
one-dimensional zarr3 array of bytes with the sharding codec. A *chunk* is the unit that can be
compressed. A *block* is a number of chunks that have one checksum. A *file* holds a number of
blocks and, after them, the place of each chunk. Without compression the chunks lie in a file one
after the other, so any range of the stream is the same range of its files.

In an object store, a file is one value.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import numpy as np
import tensorstore as ts
from crc32c import crc32c

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store import objects
from ckpt_jax.store.forks import use_tensorstore
from ckpt_jax.store.index import Shard
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, require_addressable
from ckpt_jax.store.workers import cores

BLOCK_NBYTES = 1 << 20  # about the size of blocks: small reads read few bytes in vain
CHUNKS = 4  # in a block: chunks that lie within one slice are written without a copy
FILE_NBYTES = 64 << 20  # about the size of files: large enough to be written and read quickly
ALIGNMENT = 64  # of slices in streams and of results in memory; JAX uses such memory without a copy
DATA = "c"  # the directory of a stream's files in the directory of its shard

_PLACE_NBYTES = 16  # of a chunk, at the end of a file: offset and size
_PLACES_CHECKSUM_NBYTES = 4
_MAX_EXPANSION = 1 << 15  # by zstd: a block of 128 KiB takes at least 4 bytes
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


@cache
def _threads() -> ts.Context:
    # This package flushes the files itself, see `durable`.
    limit = {"limit": max(4, cores())}
    return ts.Context(
        {
            "file_io_sync": False,
            "file_io_concurrency": limit,
            "data_copy_concurrency": limit,
        }
    )


def new_context() -> ts.Context:
    """A context for one reader or writer. All contexts share threads, and none shares a cache.

    A shared cache would be wrong after a directory was removed and its name was used again.

    Raises:
      RuntimeError: the parent of this process has used TensorStore before it was forked.
    """
    use_tensorstore()
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}}, _threads())


def memory_context() -> ts.Context:
    """A context whose stores in memory are its own."""
    use_tensorstore()
    return ts.Context({"memory_key_value_store": {}}, _threads())


def checksum_of(data: np.ndarray, before: int = 0) -> int:
    """The CRC-32C of bytes that follow bytes with the CRC-32C `before`."""
    buffer: Any = data  # numpy's stubs say that arrays are buffers from Python 3.12 on
    return crc32c(buffer, before)


def round_up(n: int, unit: int = ALIGNMENT) -> int:
    return -(-n // unit) * unit


def block_nbytes(nbytes: int) -> int:
    """The size of the blocks of a stream, near `BLOCK_NBYTES`. The last is little smaller."""
    count = max(1, round(nbytes / BLOCK_NBYTES))
    return max(CHUNKS * ALIGNMENT, round_up(-(-nbytes // count), CHUNKS * ALIGNMENT))


def file_nbytes(nbytes: int, block: int, limit: int = FILE_NBYTES) -> int:
    """How many bytes of a stream are in a file: about `limit`, in whole blocks. The places of all
    chunks that a file could hold are stored in it, so it is no larger than its stream."""
    return max(1, min(round_up(nbytes, block), FILE_NBYTES, limit) // block) * block


def file_path(directory: str, number: int) -> str:
    """The path of a file of the stream of the shard in `directory`."""
    return os.path.join(directory, DATA, str(number))


def file_size(shard: Shard, number: int) -> int:
    """The size of a file of a stream. If it is compressed, the size that it has at least."""
    held = min(shard.file_nbytes, shard.nbytes - number * shard.file_nbytes)
    places = shard.file_nbytes // shard.chunk_nbytes * _PLACE_NBYTES + _PLACES_CHECKSUM_NBYTES
    if shard.compression:
        return held // _MAX_EXPANSION + places
    return round_up(held, shard.chunk_nbytes) + places


def file_end(shard: Shard, number: int) -> bytes:
    """The end of a file of a stream that is not compressed: what follows the bytes of the stream.

    These are zeros up to the end of the last chunk, and the places of the chunks for other readers
    of zarr3: offset and size of each, all bits set if there is no such chunk; then a CRC-32C.
    """
    held = min(shard.file_nbytes, shard.nbytes - number * shard.file_nbytes)
    chunk = shard.chunk_nbytes
    places = np.full((shard.file_nbytes // chunk, 2), -1, "<i8")
    count = -(-held // chunk)
    places[:count, 0] = np.arange(count) * chunk
    places[:count, 1] = chunk
    data = places.tobytes()
    return bytes(count * chunk - held) + data + crc32c(data).to_bytes(4, "little")


def files_nbytes(directory: str) -> int:
    """The size of all files of the stream of the shard in `directory`; 0 if there are none."""
    try:
        with os.scandir(os.path.join(directory, DATA)) as files:
            return sum(file.stat().st_size for file in files)
    except (FileNotFoundError, NotADirectoryError):  # also if they are being removed
        return 0


def open_stream(directory: str, shard: Shard, context: ts.Context) -> ts.TensorStore:
    """The stream of the shard in `directory`, as an array of bytes. Nothing is read or written."""
    path = absolute(directory)
    require_addressable(path)
    if is_url(path):
        kvstore, context = objects.opened_below(path)
        return _opened(kvstore, shard, context)
    # A path, not a URL: directories may be called "a?b" or "a%20b".
    return _opened({"driver": "file", "path": f"{path}/"}, shard, context)


def open_in_memory(shard: Shard, context: ts.Context) -> ts.TensorStore:
    """A stream whose files are values in the memory store of `context`."""
    return _opened({"driver": "memory"}, shard, context)


def _opened(kvstore: dict[str, Any], shard: Shard, context: ts.Context) -> ts.TensorStore:
    codecs: list[object] = [{"name": "bytes"}]
    if shard.compression:
        # Its level is the writer's choice. The checksums of chunks are in the index.
        codecs.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    places = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    sharding = {"chunk_shape": [shard.chunk_nbytes], "codecs": codecs, "index_codecs": places}
    grid = {"chunk_shape": [shard.file_nbytes]}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [shard.nbytes],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # A chunk of zeros is written like any other, so an absent chunk means damage.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(ts.Spec(spec), context=context, open=True, assume_metadata=True).result()


def storage_error(error: Exception, directory: str) -> Exception:
    """Translates an error of TensorStore: an OSError if it came from the system."""
    code = _OS_ERROR.search(str(error))
    if code is not None:
        return OSError(int(code[1]), os.strerror(int(code[1])), directory)
    return CheckpointError(f"{directory}: {error}")
