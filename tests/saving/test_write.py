"""Shards: slices are grouped by the policy, cut if it says so, and written by many threads."""

import os
import tempfile
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from boxes import tilings
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import shape_of, size_of, whole
from ckpt_jax.options import PlannedSlice
from ckpt_jax.saving.snapshot import Snapshot, snapshot
from ckpt_jax.saving.write import WritePlan, plan_write, write
from ckpt_jax.store import shard as shard_module
from ckpt_jax.store import stream as stream_module
from ckpt_jax.store.merge import commit

OPTIONS = ckpt.CheckpointOptions(durable=False)


class Arriving:
    """Contents that are on their way until somebody waits for them."""

    def __init__(self, array):
        self._array = array
        self.dtype, self.shape, self.nbytes = array.dtype, array.shape, array.nbytes

    def __getitem__(self, where):
        return Arriving(self._array[where])

    def wait(self):
        return self._array


def snapshot_of(arrays, arriving=False):
    """A snapshot of whole arrays, all of device 0."""
    slices = [
        PlannedSlice(key, whole(array.shape), array.shape, str(array.dtype), array.nbytes, 0, 0)
        for key, array in arrays.items()
    ]
    contents = {
        (piece.key, piece.box): Arriving(arrays[piece.key]) if arriving else arrays[piece.key]
        for piece in slices
    }
    return Snapshot(tuple(slices), contents)


def part_of(piece, box):
    itemsize = piece.nbytes // max(1, size_of(piece.box))
    nbytes = size_of(box) * itemsize
    return PlannedSlice(piece.key, box, piece.shape, piece.dtype, nbytes, 0, piece.device)


def read_back(written, root):
    tables = {table.digest: table for _, table in written}
    path = commit([(shard, table.digest) for shard, table in written], tables, root, durable=False)
    with ckpt.load_checkpoint(path) as reader:
        return reader.read(dict.fromkeys(reader.keys()))


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=40)
@given(shapes=SHAPES, arriving=st.booleans(), data=st.data())
def test_whatever_a_policy_makes_of_the_slices_the_values_come_back(shapes, arriving, data):
    arrays = {
        f"key {i}": np.arange(i, i + np.prod(shape), dtype=np.float32).reshape(shape)
        for i, shape in enumerate(shapes)
    }
    snap = snapshot_of(arrays, arriving)

    def policy(slices):
        """Cuts the slices at random, and deals the parts to shards at random."""
        groups = [[] for _ in range(3)]
        for piece in slices:
            for box in data.draw(tilings(piece.box)):
                groups[data.draw(st.integers(0, 2))].append(part_of(piece, box))
        return groups

    counts = []
    with tempfile.TemporaryDirectory() as root:
        plan = plan_write(snap, policy)
        os.mkdir(f"{root}/shards")
        written = write(plan, f"{root}/shards/00000-", OPTIONS, counts.append)
        assert all(plan.groups) and len(written) == len(plan.groups)
        assert sorted(os.listdir(f"{root}/shards")) == [
            f"00000-{i:05d}" for i in range(len(written))
        ]
        found = read_back(written, root)
    assert sum(counts) == snap.nbytes == sum(array.nbytes for array in arrays.values())
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)


def test_slices_that_are_not_cut_are_written_from_where_they_lie(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4)}
    plan = WritePlan((snapshot_of(arrays).slices,), snapshot_of(arrays))
    taken = []

    def write_shards(shards, **options):
        taken.extend(part for values in shards.values() for (part,) in values.values())
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt_jax.saving.write.write_shards", write_shards)
        write(plan, str(tmp_path / "0-"), OPTIONS, lambda nbytes: None)
    assert all(part.array is array for part, array in zip(taken, arrays.values(), strict=True))
    assert [part.box for part in taken] == [whole(array.shape) for array in arrays.values()]
    assert [part.array.shape for part in taken] == [shape_of(part.box) for part in taken]


@pytest.mark.parametrize("in_background", [False, True])
def test_the_shard_of_one_device_is_written_by_two_threads_for_each_core(
    tmp_path, monkeypatch, in_background
):
    """The threads meet in the middle of writing."""
    count = 4
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 1 << 10)
    monkeypatch.setattr(stream_module, "FILE_NBYTES", 4 << 10)
    monkeypatch.setattr(shard_module, "cores", lambda: count // 2)  # one waits for the disk
    meeting = threading.Barrier(count, timeout=60)
    threads, original = [], shard_module._LocalStream.write

    def write(stream, number, **options):
        threads.append(threading.current_thread())
        if len(threads) <= count:
            meeting.wait()
        original(stream, number, **options)

    monkeypatch.setattr(shard_module._LocalStream, "write", write)
    tree = {f"{i}": jnp.arange(i * 700, dtype=jnp.int32).reshape(i, 700) for i in range(1, 9)}
    checkpoint = ckpt.Checkpoint(tree=tree)
    path = checkpoint.write(tmp_path / "a", ckpt.CheckpointOptions(enable_async=in_background))
    checkpoint.sync()
    assert len(os.listdir(tmp_path / "a" / "shards")) == 1
    assert len({*threads}) == count
    assert {thread.name for thread in threads} == {"ckpt-write"}
    for key, array in ckpt.load(path)["tree"].items():
        np.testing.assert_array_equal(array, tree[key])


def test_a_snapshot_for_the_background_is_a_copy_of_numpy_arrays():
    array = np.zeros(3)
    for in_background in (False, True):
        taken = snapshot({"a": array}, in_background=in_background, process=0, count=1)
        assert np.shares_memory(taken.contents["a", ((0, 3),)], array) != in_background
