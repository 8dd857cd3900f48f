"""What the machine itself takes for the same bytes: nothing can be faster than these.

An operation needs several resources (the disk and the device-to-host copy; the page cache and
the host-to-device copy). Where a resource can be used in several ways, the fastest counts; of
the resources, the slowest does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import workloads
from contenders import fsync
from jax.sharding import Sharding
from measure import Task
from workloads import Host

ALIGNMENT = 64  # bytes: from there a CPU device takes over a host buffer without a copy
MOST_BUFFERS = os.sysconf("SC_IOV_MAX")
MOST_BYTES = 1 << 30  # a call moves less than 2 GiB
THREADS = len(os.sched_getaffinity(0))  # as many as there are cores


def save_limits(host: Host, sharding: Sharding, directory: str) -> dict[str, list[Task]]:
    """For each resource that saving needs, the ways to use it."""
    shards = shard_buffers(host, sharding)
    path = os.path.join(directory, "limit-written")
    files = [f"{path}-{number}" for number in range(THREADS)]
    pool = ThreadPoolExecutor(THREADS)

    def remove() -> None:  # else freeing them is timed
        for file in (path, *files):
            Path(file).unlink(missing_ok=True)

    def write(_: Any) -> None:
        list(pool.map(write_durably, files, dealt(shards, THREADS)))

    return {
        "disk": [
            Task("one writev + fsync", lambda _: write_durably(path, shards), setup=remove),
            Task(f"writev + fsync, {THREADS} threads", write, setup=remove),
        ],
        "devices": [
            Task(
                "device_get of all shards",
                lambda tree: [
                    np.asarray(shard.data)
                    for array in jax.tree.leaves(tree)
                    for shard in array.addressable_shards
                ],
                setup=lambda: workloads.on_devices(host, sharding),
            )
        ],
    }


def dealt(shards: Sequence[np.ndarray], count: int) -> list[list[np.ndarray]]:
    """Buffers in groups of about the same size."""
    total = sum(shard.nbytes for shard in shards)
    groups: list[list[np.ndarray]] = [[] for _ in range(count)]
    done = 0
    for shard in shards:
        groups[min(done * count // max(total, 1), count - 1)].append(shard)
        done += shard.nbytes
    return groups


def restore_limits(host: Host, sharding: Sharding, directory: str) -> dict[str, list[Task]]:
    """For each resource that restoring needs, the ways to use it."""
    shards = shard_buffers(host, sharding)
    path = os.path.join(directory, "limit-read")
    write_durably(path, shards)
    size = os.path.getsize(path)
    warm = np.ones(size, np.uint8)
    pool = ThreadPoolExecutor(THREADS)

    def read(buffer: np.ndarray) -> np.ndarray:
        read_in_parallel(pool, path, buffer)
        return buffer

    def check(_: Any, found: np.ndarray) -> None:
        offset = 0
        for shard in shards:
            part = found[offset : offset + shard.nbytes]
            assert np.array_equal(part, shard.reshape(-1).view(np.uint8))
            offset += shard.nbytes

    def copy(buffer: np.ndarray) -> np.ndarray:
        copy_in_parallel(pool, path, buffer)
        return buffer

    return {
        "page cache": [
            Task(f"preadv, {THREADS} threads, warm buffer", lambda _: read(warm), check=check),
            Task(f"mmap, {THREADS} threads, warm buffer", lambda _: copy(warm), check=check),
            Task(
                f"preadv, {THREADS} threads, fresh buffer",
                lambda _: read(np.empty(size, np.uint8)),
                check=check,
            ),
        ],
        "devices": [
            Task("device_put, shard by shard", lambda _: put_shards(host, shards, sharding)),
            Task(
                "device_put, array by array",
                lambda _: jax.block_until_ready(jax.device_put(list(host.values()), sharding)),
            ),
        ],
    }


def shard_buffers(host: Host, sharding: Sharding) -> list[np.ndarray]:
    """The shards of all arrays, array after array, each in an aligned buffer of its own."""
    shards: list[np.ndarray] = []
    for value in host.values():
        for index in sharding.addressable_devices_indices_map(value.shape).values():
            shard = aligned_empty(value[index].shape, value.dtype)
            shard[...] = value[index]
            shards.append(shard)
    return shards


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def put_shards(host: Host, shards: Sequence[np.ndarray], sharding: Sharding) -> list[jax.Array]:
    devices = list(sharding.addressable_devices_indices_map(next(iter(host.values())).shape))
    parts = iter(jax.device_put(list(shards), devices * len(host)))
    return jax.block_until_ready(
        [
            jax.make_array_from_single_device_arrays(
                value.shape, sharding, [next(parts) for _ in devices]
            )
            for value in host.values()
        ]
    )


def write_durably(path: str, buffers: Sequence[np.ndarray]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for batch in batches(buffers):
            written = os.writev(descriptor, batch)
            assert written == sum(buffer.nbytes for buffer in batch)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fsync(os.path.dirname(path))


def batches(buffers: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """As many buffers at a time as one system call takes."""
    batch: list[np.ndarray] = []
    nbytes = 0
    for buffer in buffers:
        if batch and (len(batch) == MOST_BUFFERS or nbytes + buffer.nbytes > MOST_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(buffer)
        nbytes += buffer.nbytes
    if batch:
        yield batch


def read_in_parallel(pool: ThreadPoolExecutor, path: str, buffer: np.ndarray) -> None:
    """Fills `buffer` from the start of the file with system calls, each thread one part of it."""
    with open(path, "rb", buffering=0) as file:
        list(pool.map(lambda part: read_part(file.fileno(), buffer[part], part.start), cut(buffer)))


def read_part(descriptor: int, part: np.ndarray, offset: int) -> None:
    done = 0
    while done < part.nbytes:
        done += os.preadv(descriptor, [part[done : done + MOST_BYTES]], offset + done)


def copy_in_parallel(pool: ThreadPoolExecutor, path: str, buffer: np.ndarray) -> None:
    """Fills `buffer` from the file's mapping, each thread one part of it."""
    mapped = np.memmap(path, np.uint8, mode="r")
    list(pool.map(lambda part: np.copyto(buffer[part], mapped[part]), cut(buffer)))


def cut(buffer: np.ndarray) -> list[slice]:
    """The buffer in one part for each reader."""
    step = -(-buffer.nbytes // THREADS)
    return [slice(start, start + step) for start in range(0, buffer.nbytes, step)]
