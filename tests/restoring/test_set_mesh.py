"""Meshes that are set with jax.set_mesh, abstract meshes, and memory layouts of targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


class Model(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        self.dense = nnx.Linear(8, 8, rngs=rngs, kernel_init=init)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"))


@pytest.fixture
def saved(tmp_path):
    return ckpt.save(tmp_path / "a", {"w": jnp.arange(64.0).reshape(8, 8)})


def abstract(mesh):
    sharding = NamedSharding(mesh.abstract_mesh, P("data", "model"))
    return {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}


def test_a_model_made_abstractly_under_set_mesh_is_restored_onto_that_mesh(tmp_path, mesh):
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        path = ckpt.Checkpoint(model=model).save(tmp_path / "c")
        target = nnx.eval_shape(lambda: Model(nnx.Rngs(1)))
        ckpt.Checkpoint(model=target).restore(path).assert_consumed()
    kernel = target.dense.kernel.get_value()
    assert kernel.sharding == model.dense.kernel.get_value().sharding
    np.testing.assert_array_equal(kernel, model.dense.kernel.get_value())


def test_an_abstract_sharding_takes_the_mesh_that_is_set(saved, mesh):
    with jax.set_mesh(mesh):
        restored = ckpt.restore(saved, abstract(mesh))["w"]
    assert restored.sharding == NamedSharding(mesh, P("data", "model"))


def test_without_a_mesh_every_verb_names_the_paths_and_says_what_to_do(saved, mesh):
    for verb in (
        lambda: ckpt.restore(saved, abstract(mesh)),
        lambda: ckpt.Checkpoint(abstract(mesh)).read(saved),
        lambda: ckpt.load(saved, sharding=NamedSharding(mesh.abstract_mesh, P("data"))),
    ):
        with pytest.raises(ckpt.RestoreMismatchError) as caught:
            verb()
        assert "w: expected devices" in str(caught.value)
        assert "no mesh is set: restore under jax.set_mesh(mesh)" in str(caught.value)
    report = ckpt.plan_restore(saved, abstract(mesh))
    assert [entry.path for entry in report.mismatched] == ["w"]


def test_another_mesh_than_the_abstract_one_is_named(saved, mesh):
    other = jax.make_mesh((8,), ("data",))
    wanted = pytest.raises(ckpt.RestoreMismatchError, match="data=4, model=2.*'data': 8")
    with jax.set_mesh(other), wanted:
        ckpt.restore(saved, abstract(mesh))


@pytest.mark.parametrize("shardings", [P("data"), {"w": P("data")}, lambda path, struct: P("data")])
def test_bare_specs_take_the_mesh_that_is_set(saved, mesh, shardings):
    options = ckpt.CheckpointOptions(shardings=shardings)
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with jax.set_mesh(mesh):
        assert ckpt.restore(saved, target, options=options)["w"].sharding.spec == P("data")
        assert ckpt.load(saved, sharding=shardings)["w"].sharding.spec == P("data")
    with pytest.raises(ckpt.RestoreMismatchError, match="w: .*needs a mesh: restore under"):
        ckpt.restore(saved, target, options=options)


# --- layouts ---------------------------------------------------------------------------

COLUMNS = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize(
    "target",
    [
        jax.device_put(jnp.zeros((8, 8)), COLUMNS),
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=COLUMNS),
    ],
    ids=["array", "abstract"],
)
def test_a_restored_array_has_the_layout_of_its_target(saved, target):
    restored = ckpt.restore(saved, {"w": target})["w"]
    assert restored.format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(restored, jnp.arange(64.0).reshape(8, 8))


def test_a_layout_that_was_saved_is_no_wish_of_the_target(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jax.device_put(jnp.ones((2, 3)), COLUMNS)})
    restored = ckpt.restore(path, {"w": jnp.zeros((2, 3))})["w"]
    assert restored.format.layout.major_to_minor == (0, 1)
