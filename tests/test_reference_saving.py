"""What the reference does when it saves, where no other test shows it (docs/behaviours.md)."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

ASYNC = ckpt.CheckpointOptions(enable_async=True)


class Mirrored(ckpt.Trackable):
    """Two variables that are saved as one value."""

    def __init__(self, start):
        self.copies = [ckpt.Variable(jnp.float32(start)) for _ in range(2)]

    def assign(self, value):
        for variable in self.copies:
            variable.assign(jnp.float32(value))

    def serialize_to_arrays(self):
        return {"value": self.copies[0].value}

    def restore_from_arrays(self, arrays):
        self.assign(arrays["value"])


def shards(path):
    return sorted(os.listdir(os.path.join(path, "shards")))


# --- in the background --------------------------------------------------------------------


@pytest.mark.behaviour(13)
def test_one_value_for_two_variables_is_saved_in_the_background(tmp_path):
    checkpoint = ckpt.Checkpoint(m=Mirrored(2.0))
    path = checkpoint.save(tmp_path / "ckpt", ASYNC)
    checkpoint.m.assign(9.0)
    checkpoint.sync()
    for _ in range(2):
        checkpoint.m.assign(5.0)
        checkpoint.restore(path).assert_consumed()
        assert [float(v.value) for v in checkpoint.m.copies] == [2.0, 2.0]


@pytest.mark.behaviour(16)
def test_a_status_outlives_a_checkpoint_that_was_saved_in_the_background(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.ones(2)))
    status = checkpoint.restore(checkpoint.save(tmp_path / "ckpt", ASYNC))
    del checkpoint
    status.assert_consumed()


@pytest.mark.behaviour(25)
def test_a_write_in_the_background_returns_exactly_its_path(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(0)))
    for step in (0, 2, 4, 6, 8):
        checkpoint.v.assign(jnp.float32(step))
        path = f"{tmp_path}/written-{step}"
        assert checkpoint.write(path, ASYNC) == path
    checkpoint.sync()
    assert [ckpt.load(f"{tmp_path}/written-{step}")["v"] for step in (0, 4, 8)] == [0.0, 4.0, 8.0]


@pytest.mark.behaviour(66)
def test_another_checkpoint_sees_the_file_once_its_writer_has_waited(tmp_path):
    gate = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(),))
    writer = ckpt.Checkpoint(l=[ckpt.Variable(jnp.float32(1))], d={"a": ckpt.Variable(jnp.ones(2))})
    path = writer.save(tmp_path / "ckpt", options)
    assert ckpt.latest_checkpoint(tmp_path) is None
    gate.set()
    writer.sync()
    assert ckpt.latest_checkpoint(tmp_path) == path
    fresh = ckpt.Checkpoint(l=[ckpt.Variable(jnp.float32(0))], d={"a": ckpt.Variable(jnp.zeros(2))})
    fresh.restore(path).assert_consumed()
    assert (float(fresh.l[0].value), fresh.d["a"].value.tolist()) == (1.0, [1.0, 1.0])


@pytest.mark.behaviour(321)
def test_registered_savers_get_the_objects_themselves_while_save_blocks(tmp_path):
    seen = []

    def save(objects, file_prefix):
        seen.append((dict(objects), threading.current_thread()))
        values = {name: table.copies[0].value for name, table in objects.items()}
        return ckpt.io.write_shard(file_prefix, values)

    def restore(objects, merged_prefix):
        for name, table in objects.items():
            table.assign(ckpt.io.read_slices(merged_prefix, {name: None})[name])

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Mirrored",
            predicate=lambda obj: isinstance(obj, Mirrored),
            save_fn=save,
            restore_fn=restore,
        )
        m = Mirrored(2.0)
        checkpoint = ckpt.Checkpoint(m=m, v=ckpt.Variable(jnp.ones(3)))
        path = checkpoint.save(tmp_path / "ckpt", ASYNC)
        assert seen == [({"m": m}, threading.main_thread())]
        m.assign(9.0)
        checkpoint.restore(path).assert_consumed()
        assert [float(v.value) for v in m.copies] == [2.0, 2.0]


# --- options ------------------------------------------------------------------------------


@pytest.mark.behaviour(19, 155)
def test_options_go_with_saves_and_restores_and_none_of_them_names_a_device(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(3)))
    options = ckpt.CheckpointOptions(durable=False)
    path = checkpoint.save(tmp_path / "ckpt", options)
    checkpoint.v.assign(jnp.float32(0))
    checkpoint.restore(path, options).assert_consumed()
    assert float(checkpoint.v.value) == 3.0
    for name in ("experimental_io_device", "io_device"):
        with pytest.raises(TypeError, match=name):
            ckpt.CheckpointOptions(**{name: "localhost"})


# --- files and shards ---------------------------------------------------------------------


@pytest.mark.behaviour(154)
def test_one_value_makes_one_shard_in_a_directory(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(3)))
    path = checkpoint.write(tmp_path / "written")
    assert sorted(os.listdir(path)) == ["d", "manifest.ocdbt", "shards"]
    assert len(shards(path)) == 1
    checkpoint.v.assign(jnp.float32(0))
    other = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(1)))
    for each in (checkpoint, other):
        each.read(path).assert_consumed()
        assert float(each.v.value) == 3.0


@pytest.mark.behaviour(158, 179)
def test_arrays_on_several_devices_share_a_shard_where_the_policy_is_by_process(tmp_path):
    trees = {f"v{i}": jax.device_put(jnp.float32(i), jax.devices()[i]) for i in range(3)}
    by_device = ckpt.Checkpoint(**trees).write(tmp_path / "device")
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.ShardByProcess())
    by_process = ckpt.Checkpoint(**trees).write(tmp_path / "process", options)
    assert (len(shards(by_device)), len(shards(by_process))) == (3, 1)
    for path in (by_device, by_process):
        fresh = ckpt.Checkpoint(**{name: jnp.zeros_like(x) for name, x in trees.items()})
        fresh.read(path).assert_consumed()
        assert [float(fresh.v0), float(fresh.v1), float(fresh.v2)] == [0.0, 1.0, 2.0]


@pytest.mark.behaviour(163, 174)
def test_a_limit_of_ten_bytes_cuts_two_matrices_and_leaves_a_string_alone(tmp_path):
    checkpoint = ckpt.Checkpoint(
        v0=jnp.arange(6).reshape(3, 2), v1=jnp.arange(6.0).reshape(3, 2, 1), v2="test string"
    )
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = checkpoint.write(tmp_path / "written", options)
    assert len(shards(path)) == 3 + 3 + 1
    fresh = ckpt.Checkpoint(v0=jnp.zeros((3, 2), jnp.int32), v1=jnp.zeros((3, 2, 1)), v2="nothing")
    fresh.read(path).assert_consumed()
    np.testing.assert_array_equal(fresh.v0, checkpoint.v0)
    np.testing.assert_array_equal(fresh.v1, checkpoint.v1)
    assert fresh.v2 == "test string"


@pytest.mark.behaviour(172)
def test_strings_are_values_of_their_own_and_none_shares_a_full_shard(tmp_path):
    strings = [f"string {i:03}" for i in range(4)]
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = ckpt.save(tmp_path / "a", {"v0": strings}, options=options)
    assert len(shards(path)) == 4
    assert ckpt.load(path) == {"v0": strings}
    with pytest.raises(ckpt.UnsaveableError, match="v0"):
        ckpt.save(tmp_path / "b", {"v0": np.array(strings)}, options=options)


@pytest.mark.behaviour(184)
def test_a_policy_may_not_give_slices_to_another_process(tmp_path):
    def elsewhere(slices):
        return [[piece._replace(process=1) for piece in slices]]

    options = ckpt.CheckpointOptions(sharding_policy=elsewhere)
    with pytest.raises(ckpt.ShardError, match="process"):
        ckpt.save(tmp_path / "a", {"x": np.ones(3), "y": np.ones(2)}, options=options)
    assert os.listdir(tmp_path) == []


@pytest.mark.behaviour(159)
def test_a_shard_is_written_and_read_back_whatever_device_holds_the_array(tmp_path, mesh8):
    x = jnp.arange(8.0)
    arrays = {
        "host": np.arange(8.0),
        "last": jax.device_put(x, jax.devices()[-1]),
        "all": jax.device_put(x, NamedSharding(mesh8, P("data"))),
    }
    shard = ckpt.io.write_shard(str(tmp_path / "part"), arrays)
    for found in ckpt.io.read_slices(shard, dict.fromkeys(arrays)).values():
        np.testing.assert_array_equal(found, np.arange(8.0))
