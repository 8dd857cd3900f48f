"""Checkpoints in object stores: everything that works with paths works with URLs."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(300, 40)),
        "b": jnp.arange(5.0) + seed,
        "n": 3 + seed,
        "s": "text",
        "empty": np.zeros((0, 3)),
    }


def assert_alike(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_saved_comes_back_verified(any_store, compression):
    options = ckpt.CheckpointOptions(compression=compression)
    path = ckpt.save(f"{any_store.url}/a", tree(), options=options)
    assert path == f"{any_store.url}/a"
    assert_alike(ckpt.load(path), tree())
    assert_alike(ckpt.restore(path, tree(1)), tree())
    assert ckpt.verify(path).ok
    with ckpt.load_checkpoint(path) as reader:
        box = ((7, 9), (1, 3))
        np.testing.assert_array_equal(reader.get_tensor("w", box), tree()["w"][7:9, 1:3])
    assert dict(ckpt.list_variables(path))["w"] == (300, 40)


def test_a_checkpoint_is_replaced_only_if_that_is_wanted(any_store):
    path = ckpt.save(f"{any_store.url}/a", tree())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ckpt.save(path, tree(1))
    assert_alike(ckpt.load(path), tree())
    ckpt.save(path, tree(1), overwrite=True)
    assert_alike(ckpt.load(path), tree(1))


def test_sharded_arrays_are_restored_onto_other_meshes(any_store):
    data = np.arange(64, dtype=np.float32).reshape(8, 8)
    meshes = [
        Mesh(np.array(jax.devices()).reshape(shape), ("x", "y")) for shape in [(4, 2), (2, 4)]
    ]
    here, there = (NamedSharding(mesh, P("x", "y")) for mesh in meshes)
    path = ckpt.save(f"{any_store.url}/a", {"w": jax.device_put(data, here)})
    target = {"w": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=there)}
    found = ckpt.restore(path, target)["w"]
    assert found.sharding == there
    np.testing.assert_array_equal(found, data)


def test_numbered_saves_are_found_by_name_and_by_state_file(any_store):
    checkpoint = ckpt.Checkpoint(w=np.zeros(3))
    for _ in range(3):
        path = checkpoint.save(f"{any_store.url}/ckpt")
    assert path == ckpt.latest_checkpoint(any_store.url) == f"{any_store.url}/ckpt-3"
    fresh = ckpt.Checkpoint(w=np.ones(3))
    fresh.restore(path).assert_consumed()
    assert fresh.save_counter == 3 and not fresh.w.any()
    assert [*ckpt.checkpoints_iterator(any_store.url, timeout=0)] == [path]


def test_a_manager_keeps_records_and_removes(any_store):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), any_store.url, max_to_keep=2)
    assert manager.restore_or_initialize() is None
    for step in range(1, 5):
        manager.save(metrics={"loss": 1 / step}, w=np.full(3, float(step)))
    kept = [f"{any_store.url}/ckpt-{step}" for step in (3, 4)]
    assert manager.checkpoints == kept
    assert ckpt.load(kept[0])["w"].tolist() == [3.0] * 3
    for step in (1, 2):
        with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-3, ckpt-4"):
            ckpt.load(f"{any_store.url}/ckpt-{step}")
    again = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), any_store.url, max_to_keep=2)
    assert again.restore_or_initialize() == kept[1]
    assert again.gc() == []
    again.save()
    with pytest.raises(ckpt.SupersededError):
        manager.save()


def test_savers_write_and_merge_shards(any_store):
    shards = [
        ckpt.io.write_shard(
            f"{any_store.url}/a/shards/{k}",
            {"w": ckpt.io.Slice(np.full((2, 3), k), ((2 * k, 2 * k + 2), (0, 3)), (4, 3))},
        )
        for k in range(2)
    ]
    with pytest.raises(FileExistsError):
        ckpt.io.write_shard(shards[0], {"w": np.zeros(3)})
    path = ckpt.io.merge_shards(shards, f"{any_store.url}/a")
    assert ckpt.io.read_slices(path, {"w": ((1, 3), (0, 1))})["w"].tolist() == [[0], [1]]
    with pytest.raises(FileExistsError):
        ckpt.io.merge_shards(shards, f"{any_store.url}/a")


def test_a_save_in_the_background_is_there_after_sync(any_store):
    checkpoint = ckpt.Checkpoint(w=np.arange(1000.0))
    path = checkpoint.save(f"{any_store.url}/ckpt", ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
    assert ckpt.verify(path).ok


def test_a_missing_checkpoint_is_not_found_and_its_neighbours_are_named(any_store):
    ckpt.save(f"{any_store.url}/ckpt-7", tree())
    with pytest.raises(ckpt.CheckpointNotFoundError, match="Checkpoints in .*: ckpt-7"):
        ckpt.load(f"{any_store.url}/ckpt-70")
    assert os.path.basename(ckpt.latest_checkpoint(any_store.url) or "") == "ckpt-7"
