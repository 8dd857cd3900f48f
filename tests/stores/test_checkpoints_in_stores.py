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


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_checkpoint_is_copied_there_and_back(any_store, tmp_path, compression):
    options = ckpt.CheckpointOptions(compression=compression)
    here = ckpt.save(tmp_path / "a", tree(), options=options)
    there = ckpt.copy(here, f"{any_store.url}/a")
    assert ckpt.verify(there).ok
    assert_alike(ckpt.load(there), tree())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ckpt.copy(here, there)
    ckpt.copy(ckpt.save(tmp_path / "b", tree(1)), there, overwrite=True)
    back = ckpt.copy(there, tmp_path / "c")
    assert ckpt.verify(back).ok
    assert_alike(ckpt.restore(back, tree()), tree(1))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_copy_that_was_interrupted_goes_on_where_it_was(s3, tmp_path):
    options = ckpt.CheckpointOptions(max_inflight_bytes=1 << 20)
    big = {"w": np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)}
    here = ckpt.save(tmp_path / "a", big, options=options)
    proxy = s3.through_proxy()
    ckpt.use_storage(s3.url, retries=0)
    files = len(os.listdir(tmp_path / "a" / "shards" / "00000-00000" / "c"))
    assert files > 3
    proxy.dies_at(6, acted=False)
    with pytest.raises(OSError):
        ckpt.copy(here, f"{s3.url}/a")
    proxy.heal()
    before = proxy.count("WRITE", "/c/")
    ckpt.copy(here, f"{s3.url}/a")
    assert 0 < proxy.count("WRITE", "/c/") - before < files
    assert_alike(ckpt.load(f"{s3.url}/a"), big)


def test_a_damaged_checkpoint_is_not_copied(any_store, tmp_path):
    here = ckpt.save(tmp_path / "a", tree())
    file = tmp_path / "a" / "shards" / "00000-00000" / "c" / "0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match="block 0"):
        ckpt.copy(here, f"{any_store.url}/a")
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{any_store.url}/a")
