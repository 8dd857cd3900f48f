"""A glance finds what is missing or truncated, and knows the size, without opening a checkpoint."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.store.glance import glance


@pytest.fixture(params=["one", "sharded", "compressed", "empty"])
def checkpoint(request, path, mesh42):
    sharded = NamedSharding(mesh42, PartitionSpec("data", "model"))
    tree = {
        "one": {"a": np.arange(5), "text": "text"},
        "sharded": {"w": jax.device_put(jnp.ones((8, 4)), sharded), "b": np.ones(3), "n": 1},
        "compressed": {"a": np.zeros(10_000)},
        "empty": {},
    }[request.param]
    compression = "zstd" if request.param == "compressed" else None
    return ckpt.save(path, tree, options=ckpt.CheckpointOptions(compression=compression))


def files_of(path):
    return [os.path.join(above, name) for above, _, names in os.walk(path) for name in names]


def test_the_size_is_that_of_the_values(checkpoint):
    with ckpt.load_checkpoint(checkpoint) as reader:
        assert glance(checkpoint).nbytes == sum(map(reader.stored_nbytes, reader.keys()))


def test_each_file_that_is_missing_is_named(checkpoint):
    for file in files_of(checkpoint):
        os.rename(file, f"{checkpoint}.aside")
        with pytest.raises((ckpt.CorruptCheckpointError, ckpt.CheckpointNotFoundError)) as caught:
            glance(checkpoint)
        assert os.path.basename(checkpoint) in str(caught.value)
        os.rename(f"{checkpoint}.aside", file)
    glance(checkpoint)


def test_each_file_of_values_or_messages_that_is_truncated_is_named(checkpoint):
    for file in files_of(checkpoint):
        if os.path.basename(file) == "index" and "/shards/" in file:
            continue  # its size is not noted; its digest is checked when it is read
        whole = Path(file).read_bytes()
        os.truncate(file, len(whole) - 1)
        with pytest.raises(ckpt.CorruptCheckpointError, match=str(checkpoint)):
            glance(checkpoint)
        Path(file).write_bytes(whole)
    glance(checkpoint)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(ckpt.CheckpointNotFoundError):
        glance(str(tmp_path))


def test_a_swapped_index_is_found(path, tmp_path):
    ckpt.save(path, {"a": np.ones(3)})
    other = ckpt.save(tmp_path / "other", {"b": np.ones(3)})
    shutil.copy(f"{other}/meta/index", f"{path}/meta/index")
    with pytest.raises(ckpt.CorruptCheckpointError):
        glance(path)
