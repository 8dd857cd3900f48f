"""Where arrays go: shardings that overrule the target, and devices that are other ones."""

import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

W = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)


def options(shardings):
    return ckpt.CheckpointOptions(shardings=shardings)


@pytest.fixture
def tree():
    return {
        "params": {"dense": {"kernel": jnp.array(W), "bias": jnp.array(W[0])}, "scale": [W, 2.0]},
        "moments": (jnp.array(W + 1), jnp.array(W[0] + 1)),
        "step": 7,
    }


@pytest.fixture
def path(tree, tmp_path):
    return ckpt.save(tmp_path / "tree", tree)


def check(found, tree):
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)


# --- three spellings -------------------------------------------------------------------


def test_one_sharding_places_all_jax_arrays_and_nothing_else(tree, path, mesh42):
    rows = NamedSharding(mesh42, P("data"))
    found = ckpt.restore(path, tree, options=options(rows))
    check(found, tree)
    dense = found["params"]["dense"]
    arrays = (dense["kernel"], dense["bias"], *found["moments"])
    assert {array.sharding for array in arrays} == {rows}
    assert isinstance(found["params"]["scale"][0], np.ndarray) and found["step"] == 7


def test_a_function_chooses_by_path_and_spec(tree, path, mesh42):
    columns = NamedSharding(mesh42, P(None, "model"))
    asked = {}

    def choose(where, struct):
        asked[where] = struct
        return columns if struct.ndim == 2 and where.startswith("params") else None

    found = ckpt.restore(path, tree, options=options(choose))
    check(found, tree)
    assert found["params"]["dense"]["kernel"].sharding == columns
    assert found["moments"][0].sharding == tree["moments"][0].sharding
    assert set(asked) == {"params/dense/kernel", "params/dense/bias", "moments/0", "moments/1"}
    assert asked["params/dense/bias"] == jax.ShapeDtypeStruct((16,), np.float32)


def test_a_tree_may_be_a_prefix_of_the_target(tree, path, mesh42):
    rows, columns = NamedSharding(mesh42, P("data")), NamedSharding(mesh42, P(None, "model"))
    shardings = {"params": rows, "moments": (columns, None)}
    found = ckpt.restore(path, tree, options=options(shardings))
    check(found, tree)
    assert {array.sharding for array in found["params"]["dense"].values()} == {rows}
    assert found["moments"][0].sharding == columns
    assert found["moments"][1].sharding == tree["moments"][1].sharding


def test_the_tree_may_be_of_the_classes_of_the_target(tmp_path, mesh42):
    @flax.struct.dataclass
    class State:
        params: dict
        step: int

    state = State({"w": jnp.array(W)}, 3)
    path = ckpt.save(tmp_path / "a", state)
    rows = NamedSharding(mesh42, P("data"))
    shardings = jax.tree.map(lambda x: rows if isinstance(x, jax.Array) else None, state)
    found = ckpt.restore(path, state, options=options(shardings))
    assert found.params["w"].sharding == rows and found.step == 3


def test_shardings_of_a_module_come_from_its_state(tmp_path, mesh42):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    path = ckpt.save(tmp_path / "a", model)
    target = nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    rows, all_over = NamedSharding(mesh42, P("data")), NamedSharding(mesh42, P())
    shardings = jax.tree.map(lambda x: rows if x.ndim == 2 else all_over, nnx.state(target))
    ckpt.restore(path, target, options=options(shardings))
    assert target.kernel[...].sharding == rows and target.bias[...].sharding == all_over
    np.testing.assert_array_equal(target.kernel[...], model.kernel[...])


def test_shardings_win_over_those_of_the_target(path, mesh42, mesh8):
    here = NamedSharding(mesh8, P("data"))
    there = NamedSharding(mesh42, P(("data", "model")))
    target = {"moments": (jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=here),)}
    found = ckpt.restore(path, target, strict=False, options=options(there))
    assert found["moments"][0].sharding == there


def test_typed_keys_are_placed(tmp_path, mesh8):
    keys = jax.random.split(jax.random.key(0), 8)
    path = ckpt.save(tmp_path / "a", keys)
    rows = NamedSharding(mesh8, P("data"))
    found = ckpt.restore(path, keys, options=options(rows))
    assert found.sharding.is_equivalent_to(rows, 1) and jnp.array_equal(found, keys)


def test_what_rename_rules_make_is_placed(tmp_path, mesh42):
    path = ckpt.save(tmp_path / "a", {f"h_{i}": W + i for i in range(4)})
    wanted = NamedSharding(mesh42, P("data", None, "model"))
    found = ckpt.restore(
        path,
        {"h": jax.ShapeDtypeStruct((4, 8, 16), W.dtype)},
        rename=[("h_*", "h", ckpt.Stack())],
        options=options({"h": wanted}),
    )
    assert found["h"].sharding == wanted
    np.testing.assert_array_equal(found["h"], np.stack([W + i for i in range(4)]))


# --- objects ---------------------------------------------------------------------------


class Net(ckpt.AutoTrackable):
    pass


def test_shardings_hold_for_objects_and_for_those_that_appear_later(tmp_path, mesh8):
    saved = Net()
    saved.w, saved.inner = ckpt.Variable(jnp.array(W)), Net()
    saved.inner.w, saved.inner.v = ckpt.Variable(jnp.array(W)), ckpt.Variable(jnp.array(W))
    path = ckpt.Checkpoint(net=saved).write(tmp_path / "a")
    rows, columns = NamedSharding(mesh8, P("data")), NamedSharding(mesh8, P(None, "data"))
    net = Net()
    net.w = ckpt.Variable(jnp.zeros_like(W))
    shardings = {"net": {"w": rows, "inner": {"w": columns}}}
    status = ckpt.Checkpoint(net=net).read(path, options(shardings))
    assert net.w.value.sharding == rows
    net.inner = Net()
    net.inner.w = ckpt.Variable(jnp.zeros_like(W))
    net.inner.v = ckpt.Variable(jnp.zeros_like(W))
    assert net.inner.w.value.sharding == columns
    assert net.inner.v.value.sharding != columns
    np.testing.assert_array_equal(net.inner.w.value, W)
    status.assert_consumed()


def test_one_sharding_holds_for_what_appears_later(tmp_path, mesh8):
    saved = Net()
    saved.w = ckpt.Variable(jnp.array(W))
    path = ckpt.Checkpoint(net=saved).write(tmp_path / "a")
    rows = NamedSharding(mesh8, P("data"))
    net = Net()
    checkpoint = ckpt.Checkpoint(net=net)
    checkpoint.read(path, options(rows))
    net.w = ckpt.Variable(jnp.zeros_like(W))
    assert net.w.value.sharding == rows


# --- problems --------------------------------------------------------------------------


def test_axes_that_do_not_divide_and_places_that_do_not_exist_are_all_reported(path, mesh42, tree):
    three = NamedSharding(mesh42, P("data", "model", None))
    wrong = {
        "params": {"dense": {"bias": three, "kernle": three}},
        "moments": (NamedSharding(mesh42, P("data")), P("data")),
        "stpe": three,
    }
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, tree, options=options(wrong))
    problems = {entry.path: entry.what for entry in failure.value.report.mismatched}
    assert set(problems) == {"params/dense/bias", "params/dense/kernle", "moments/1", "stpe"}
    assert "shape (16,) cannot be placed" in problems["params/dense/bias"]
    assert "whose spec is for 3 axes" in problems["params/dense/bias"]
    assert "nearest: params/dense/kernel" in problems["params/dense/kernle"]
    assert "needs a mesh: restore under jax.set_mesh(mesh), or give jax" in problems["moments/1"]
    report = ckpt.plan_restore(path, tree, options=options(wrong))
    assert {entry.path for entry in report.mismatched} == set(problems)


def test_an_axis_that_does_not_divide_stops_the_restore_of_objects(tmp_path, mesh8):
    path = ckpt.Checkpoint(w=jnp.zeros(9)).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint(w=jnp.ones(9))
    with pytest.raises(ckpt.RestoreMismatchError, match=r"w: shape \(9,\) cannot be placed"):
        checkpoint.read(path, options({"w": NamedSharding(mesh8, P("data"))}))
    assert checkpoint.w.tolist() == [1] * 9


def test_what_is_no_sharding_is_reported(tree, path):
    for wrong in ({"params": "data"}, lambda *_: "data"):
        with pytest.raises(ckpt.RestoreMismatchError, match=r"expected a jax.sharding.*got str"):
            ckpt.restore(path, tree, options=options(wrong))


# --- load ------------------------------------------------------------------------------


def test_load_places_by_a_tree_of_what_was_saved(tree, path, mesh42):
    rows = NamedSharding(mesh42, P("data"))
    found = ckpt.load(path, sharding={"params": {"dense": rows}, "moments": [rows]})
    assert found["params"]["dense"]["kernel"].sharding == rows
    assert found["moments"][0].sharding == rows
    assert isinstance(found["moments"][1], np.ndarray)
    check(found, tree)


def test_load_places_the_data_of_keys(tmp_path, mesh8):
    keys = jax.random.split(jax.random.key(0), 8)
    path = ckpt.save(tmp_path / "a", {"keys": keys})
    rows = NamedSharding(mesh8, P("data"))
    found = ckpt.load(path, sharding=rows)["keys"]
    assert found.sharding == rows and jnp.array_equal(found, jax.random.key_data(keys))


def test_load_reports_all_that_cannot_be_placed(path, mesh8):
    columns = NamedSharding(mesh8, P(None, "data"))
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.load(path, sharding=columns)
    assert {entry.path for entry in failure.value.report.mismatched} == {
        "params/dense/bias",
        "moments/1",
    }
    found = ckpt.load(path, only="**/kernel", sharding=columns)
    assert found["params"]["dense"]["kernel"].sharding == columns


# --- other devices ---------------------------------------------------------------------


def on_devices(count, program):
    """Runs a program in a process that has that many CPU devices."""
    text = f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={count}"
        import jax, numpy as np
        import jax.numpy as jnp
        import ckpt_jax as ckpt
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
    """
    program = textwrap.dedent(text) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_eight_devices_saved_restores_on_one(tmp_path, mesh42):
    w = jax.device_put(W, NamedSharding(mesh42, P("data", "model")))
    path = ckpt.save(tmp_path / "a", {"w": w, "keys": jax.random.split(jax.random.key(0), 8)})
    on_devices(
        1,
        f"""
        expected = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
        np.testing.assert_array_equal(ckpt.load({path!r})["w"], expected)
        (device,) = jax.devices()
        target = dict(w=jnp.zeros((8, 16)), keys=jax.random.split(jax.random.key(1), 8))
        found = ckpt.restore({path!r}, target)
        np.testing.assert_array_equal(found["w"], expected)
        assert found["w"].sharding == SingleDeviceSharding(device)
        assert jnp.array_equal(found["keys"], jax.random.split(jax.random.key(0), 8))
        """,
    )


def test_what_one_device_saved_restores_on_eight(tmp_path, mesh24):
    path = str(tmp_path / "a")
    on_devices(
        1,
        f"""
        expected = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16)
        ckpt.save({path!r}, dict(w=expected))
        """,
    )
    wanted = NamedSharding(mesh24, P("model", "data"))
    found = ckpt.restore(path, {"w": jnp.zeros(W.shape)}, options=options(wanted))["w"]
    assert found.sharding == wanted and len(found.addressable_shards) == 8
    np.testing.assert_array_equal(found, W)


def test_slices_of_uneven_size_restore_onto_any_grid(tmp_path, mesh42):
    w = np.arange(24 * 10, dtype=np.float32).reshape(24, 10)
    uneven = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(7 * 10 * 4))
    path = ckpt.save(tmp_path / "a", {"w": jnp.array(w)}, options=uneven)
    device = SingleDeviceSharding(jax.devices()[3])
    for wanted in (NamedSharding(mesh42, P("data", "model")), NamedSharding(mesh42, P()), device):
        target = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}
        found = ckpt.restore(path, target, options=options(wanted))["w"]
        assert found.sharding == wanted
        np.testing.assert_array_equal(found, w)


def test_looking_and_planning_start_no_device(tmp_path, mesh42):
    w = jax.device_put(W, NamedSharding(mesh42, P("data", "model")))
    layers = {f"h_{i}": w for i in range(2)}
    path = ckpt.save(tmp_path / "a", {"w": w, "step": 3, "layers": layers})
    on_devices(
        1,
        f"""
        from jax._src import xla_bridge

        target = dict(
            w=jax.ShapeDtypeStruct((8, 16), np.float32),
            h=jax.ShapeDtypeStruct((2, 8, 16), np.float32),
            step=0,
        )
        rules = [("layers/h_*", "h", ckpt.Stack())]
        report = ckpt.plan_restore({path!r}, target, rename=rules)
        assert report.exact and len(report.restored) == 3, report
        str(report), report._repr_html_()
        ckpt.object_metadata({path!r}), ckpt.list_variables({path!r}), ckpt.CheckpointView({path!r})
        assert ckpt.load({path!r}, only=["w", "step"])["step"] == 3
        assert ckpt.verify({path!r}).ok
        assert not xla_bridge.backends_are_initialized()
        """,
    )
