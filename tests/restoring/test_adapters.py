"""Adapters: a class says how older checkpoints of it are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt

VALUE = ".ATTRIBUTES/VARIABLE_VALUE"


def var(value):
    return ckpt.Variable(jnp.asarray(value, jnp.float32))


class Rename(ckpt.ReshardCallback):
    def __init__(self, name):
        self.name = name

    def object_name(self):
        return self.name


class Transpose(Rename):
    def reshard(self, values, spec):
        (value,) = values
        return value.T


class Stack(Rename):
    """q, k and v used to be three."""

    def update_restore_inputs(self, key, spec):
        names = ("q", "k", "v")
        assert spec.shape[0] == 3
        return [key.replace("q/", f"{name}/", 1) for name in names], [None] * 3

    def reshard(self, values, spec):
        return np.stack(values)


class Adapted(ckpt.AutoTrackable):
    """Reads its children by the callbacks it is given."""

    def __init__(self, callbacks, **attributes):
        self.callbacks = ckpt.NoDependency(callbacks)
        self.paths = ckpt.NoDependency([])
        for name, value in attributes.items():
            setattr(self, name, value)

    def checkpoint_adapter(self, path):
        self.paths.append(path)
        return self

    def get_reshard_callback(self, name):
        return self.callbacks.get(name)


def saved(tmp_path, **tree):
    return ckpt.save(tmp_path / "old", tree)


W = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)


def test_a_present_child_is_restored_from_its_old_name(tmp_path):
    path = saved(tmp_path, weight=W, bias=jnp.ones(3))
    layer = Adapted({"weight": Rename("kernel")}, kernel=var(np.zeros((2, 3))), bias=var([0, 0, 0]))
    status = ckpt.Checkpoint(layer).read(path).assert_consumed()
    np.testing.assert_array_equal(layer.kernel.value, W)
    np.testing.assert_array_equal(layer.bias.value, [1, 1, 1])
    assert layer.paths == [path]
    (entry,) = [entry for entry in status.report.restored if entry.path == "kernel"]
    assert entry.found == "float32[2, 3]"


def test_a_plan_says_what_was_renamed_and_a_function_restores_it(tmp_path):
    path = saved(tmp_path, weight=W)
    layer = Adapted({"weight": Rename("kernel")}, kernel=var(np.zeros((2, 3))))
    report = ckpt.plan_restore(path, layer)
    assert report.exact
    assert [(e.path, e.saved_path) for e in report.renamed] == [("kernel", "weight")]
    assert ckpt.restore(path, layer) is layer
    np.testing.assert_array_equal(layer.kernel.value, W)


def test_a_renamed_value_of_another_shape_is_found_before_anything_is_read(tmp_path):
    path = saved(tmp_path, weight=W)
    layer = Adapted({"weight": Rename("kernel")}, kernel=var(np.zeros((3, 2))))
    with pytest.raises(ckpt.RestoreMismatchError, match="kernel: expected shape"):
        ckpt.Checkpoint(layer).read(path)


def test_a_value_is_resharded_onto_the_sharding_of_the_target(tmp_path, mesh42):
    path = saved(tmp_path, table=jnp.arange(32, dtype=jnp.float32).reshape(4, 8))
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    struct = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
    layer = Adapted({"table": Transpose(None)}, table=ckpt.Variable(struct))
    ckpt.restore(path, layer)
    assert layer.table.value.sharding == sharding
    np.testing.assert_array_equal(layer.table.value, np.arange(32).reshape(4, 8).T)


def test_several_values_become_one_and_count_as_used(tmp_path):
    parts = {name: jnp.full(2, i, jnp.float32) for i, name in enumerate("qkv")}
    path = saved(tmp_path, **parts)
    layer = Adapted({"q": Stack("qkv")}, qkv=var(np.zeros((3, 2))))
    report = ckpt.plan_restore(path, layer)
    assert report.exact
    assert report.nbytes == 3 * 2 * 4
    ckpt.Checkpoint(layer).read(path).assert_consumed()
    np.testing.assert_array_equal(layer.qkv.value, [[0, 0], [1, 1], [2, 2]])


def test_only_the_boxes_that_a_callback_asks_for_are_read(tmp_path):
    class Head(ckpt.ReshardCallback):
        def update_restore_inputs(self, key, spec):
            return [key], [((0, spec.shape[0]),)]

    path = saved(tmp_path, table=jnp.arange(10.0))
    layer = Adapted({"table": Head()}, table=var(np.zeros(4)))
    ckpt.restore(path, layer)
    np.testing.assert_array_equal(layer.table.value, [0, 1, 2, 3])


def test_a_child_that_is_created_later_is_renamed_and_resharded(tmp_path):
    path = saved(tmp_path, weight=W)
    layer = Adapted({"weight": Transpose("kernel")})
    status = ckpt.Checkpoint(layer).read(path)
    called = []
    kernel = layer.add_variable("kernel", (3, 2), initializer=lambda *a: called.append(a))
    np.testing.assert_array_equal(kernel.value, W.T)
    assert not called
    status.assert_consumed()


def test_an_adapted_object_that_comes_later_is_asked_then(tmp_path):
    path = saved(tmp_path, layer={"weight": W}, other=jnp.float32(1))
    root = ckpt.Checkpoint()
    status = root.read(path)
    root.layer = Adapted({"weight": Transpose("kernel")}, kernel=var(np.zeros((3, 2))))
    np.testing.assert_array_equal(root.layer.kernel.value, W.T)
    root.other = var(0)
    assert float(root.other.value) == 1
    status.assert_consumed()


def test_a_callback_is_propagated_to_the_slots_of_its_variable(tmp_path):
    class Optimizer(ckpt.AutoTrackable):
        def __init__(self, variable, value):
            self.state = ckpt.NoDependency({("m", variable): var(value)})

        def slots(self):
            return self.state

    old = ckpt.Checkpoint(weight=ckpt.Variable(W))
    old.optimizer = Optimizer(old.weight, 10 * W)
    path = old.write(tmp_path / "old")

    class Root(Adapted):
        pass

    root = Root({"weight": Transpose("kernel")}, kernel=var(np.zeros((3, 2))))
    root.optimizer = Optimizer(root.kernel, np.zeros((3, 2)))
    ckpt.Checkpoint(root).read(path).assert_consumed()
    np.testing.assert_array_equal(root.kernel.value, W.T)
    np.testing.assert_array_equal(root.optimizer.state["m", root.kernel].value, 10 * W.T)


def test_a_name_that_either_side_still_uses_is_left_alone(tmp_path):
    path = saved(tmp_path, weight=W, kernel=2 * W)
    layer = Adapted({"weight": Rename("kernel")}, kernel=var(np.zeros((2, 3))))
    ckpt.restore(path, layer, strict=False)
    np.testing.assert_array_equal(layer.kernel.value, 2 * W)
    path = ckpt.save(tmp_path / "other", {"weight": W})
    layer = Adapted({"weight": Rename("kernel")}, weight=var(np.zeros((2, 3))))
    ckpt.restore(path, layer)
    np.testing.assert_array_equal(layer.weight.value, W)


def test_a_renamed_container_is_adapted_further_down(tmp_path):
    path = saved(tmp_path, old={"weight": W})
    inner = Adapted({"weight": Transpose("kernel")}, kernel=var(np.zeros((3, 2))))
    outer = Adapted({"old": Rename("new")}, new=inner)
    ckpt.restore(path, outer)
    np.testing.assert_array_equal(inner.kernel.value, W.T)


def test_an_nnx_module_can_have_an_adapter(tmp_path):
    class Dense(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((3, 2)))

        def checkpoint_adapter(self, path):
            return self

        def get_reshard_callback(self, name):
            return Transpose("kernel") if name == "weight" else None

    path = saved(tmp_path, weight=W)
    model = Dense()
    ckpt.restore(path, model)
    np.testing.assert_array_equal(model.kernel[...], W.T)


def test_a_file_of_names_is_adapted_like_any_other(tmp_path):
    np.savez(tmp_path / "old.npz", **{"layer.weight": np.asarray(W)})
    layer = Adapted({"weight": Transpose("kernel")}, kernel=var(np.zeros((3, 2))))
    ckpt.Checkpoint(layer=layer).restore(tmp_path / "old.npz").assert_consumed()
    np.testing.assert_array_equal(layer.kernel.value, W.T)


def test_a_class_without_need_returns_no_adapter(tmp_path):
    class Plain(Adapted):
        def checkpoint_adapter(self, path):
            return None

    path = saved(tmp_path, weight=W)
    layer = Plain({"weight": Rename("kernel")}, kernel=var(np.zeros((2, 3))))
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, layer)
    assert [entry.path for entry in raised.value.report.missing] == ["kernel"]


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ((["nowhere", "table"], [None, None]), "asks for keys that the checkpoint lacks: nowhere"),
        (([f"table/{VALUE}"], []), "gave 1 keys and 0 boxes"),
    ],
)
def test_inputs_that_cannot_be_read_are_problems_of_the_plan(tmp_path, inputs, what):
    class Wrong(ckpt.ReshardCallback):
        def update_restore_inputs(self, key, spec):
            return inputs

    path = saved(tmp_path, table=W)
    layer = Adapted({"table": Wrong()}, table=var(W * 0))
    for restore in (ckpt.restore, lambda path, layer: ckpt.Checkpoint(layer).read(path)):
        with pytest.raises(ckpt.RestoreMismatchError, match=f"table: .*{what}"):
            restore(path, layer)
    (entry,) = ckpt.plan_restore(path, layer).mismatched
    assert what in entry.what


def test_a_result_of_another_shape_or_dtype_changes_nothing(tmp_path):
    class Wrong(ckpt.ReshardCallback):
        def reshard(self, values, spec):
            return values[0].astype(np.float64)

    path = saved(tmp_path, table=W, other=jnp.float32(1))
    layer = Adapted({"table": Wrong()}, table=var(W * 0), other=var(0))
    with pytest.raises(ckpt.RestoreMismatchError, match=r"float32\[2, 3\].*float64\[2, 3\]"):
        ckpt.restore(path, layer)
    assert float(layer.other.value) == 0
    ckpt.restore(path, layer, options=ckpt.CheckpointOptions(cast=True))
    np.testing.assert_array_equal(layer.table.value, W)


def test_several_inputs_need_a_reshard_of_their_own():
    with pytest.raises(ValueError, match="asks for 2 values"):
        ckpt.ReshardCallback().reshard([W, W], jax.ShapeDtypeStruct((2, 3), jnp.float32))
