"""Messages that say of themselves what is not there, or more than anybody can hold."""

import numpy as np

from ckpt_jax.graph._proto import index_pb2

DIGEST = b"d" * 32


def many_slices(keys, shards):
    """An index in which each of many keys has a slice in each of many shards."""
    message = index_pb2.Index(format_version=2)
    table = message.tables.add(keys=[f"{i:05d}" for i in range(keys)])
    table.layouts.add(dtype="int8", shape=[shards], extent=[1], nbytes=1)
    table.key = np.arange(keys, dtype="<u4").tobytes()
    table.layout = bytes(4 * keys)
    table.offset = np.arange(0, 64 * keys, 64, dtype="<u8").tobytes()
    for number in range(shards):
        sizes = dict.fromkeys(["nbytes", "chunk_nbytes", "block_nbytes", "file_nbytes"], 64 * keys)
        message.shards.add(directory=f"shards/x{number}", starts=[number], digest=DIGEST, **sizes)
    return message


def many_tilings(keys, layouts, shards):
    """An index in which each key has half of the slices of each shard, every time another half."""
    message = index_pb2.Index(format_version=2)
    table = message.tables.add(keys=[f"{i:05d}" for i in range(keys)])
    for _ in range(layouts):
        table.layouts.add(dtype="int8", shape=[layouts * shards], extent=[1], nbytes=1)
    chance = np.random.default_rng(0)
    half = layouts // 2
    chosen = [chance.choice(layouts, half, replace=False) for _ in range(keys)]
    table.key = np.repeat(np.arange(keys), half).astype("<u4").tobytes()
    table.layout = np.concatenate(chosen).astype("<u4").tobytes()
    table.offset = np.arange(keys * half, dtype="<u8").tobytes()
    for number in range(shards):
        message.shards.add(
            directory=f"shards/x{number}",
            starts=range(layouts * number, layouts * (number + 1)),
            nbytes=keys * half,
            chunk_nbytes=1 << 20,
            block_nbytes=1 << 20,
            file_nbytes=1 << 20,
            digest=DIGEST,
        )
    return message


def stairs(count):
    """An index of disjoint slices of one array that all overlap each other along one axis."""
    message = index_pb2.Index(format_version=2)
    table = message.tables.add(keys=["x"])
    shape = [2 * count, count]
    for _ in range(count):
        table.layouts.add(dtype="int8", shape=shape, extent=[count, 1], nbytes=count)
    table.key = bytes(4 * count)
    table.layout = np.arange(count, dtype="<u4").tobytes()
    table.offset = np.arange(0, count * count, count, dtype="<u8").tobytes()
    message.shards.add(
        directory="shards/x",
        starts=[start for i in range(count) for start in (i, i)],
        nbytes=count * count,
        chunk_nbytes=1 << 20,
        block_nbytes=1 << 20,
        file_nbytes=1 << 20,
        digest=DIGEST,
    )
    return message


def huge_array(nbytes):
    """An index of one array that is as large as it is said to be."""
    message = index_pb2.Index(format_version=2)
    table = message.tables.add(keys=["x"], key=bytes(4), layout=bytes(4), offset=bytes(8))
    table.layouts.add(dtype="int8", shape=[nbytes], extent=[nbytes], nbytes=nbytes)
    sizes = {
        "nbytes": nbytes,
        "chunk_nbytes": 1 << 26,
        "block_nbytes": 1 << 26,
        "file_nbytes": nbytes,
    }
    message.shards.add(directory="shards/x", starts=[0], digest=DIGEST, **sizes)
    return message
