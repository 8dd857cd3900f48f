"""What holds for every format: reading parts, onto shardings, with rules, casts and reports."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt

LAYERS = {
    f"layers_{i}": {
        "weight": (np.arange(32, dtype=np.float32) + 100 * i).reshape(8, 4),
        "bias": np.full(8, i, np.float32),
    }
    for i in range(3)
}
TREE = {"model": LAYERS, "count": np.asarray(7, np.int32)}


def flat(separator):
    pairs = {"model": LAYERS}
    return {
        "count": TREE["count"],
        **{
            separator.join(["model", layer, name]): array
            for layer, parts in pairs["model"].items()
            for name, array in parts.items()
        },
    }


def msgpack(path):
    path.write_bytes(serialization.msgpack_serialize(TREE))


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, **flat("/"))


def equinox(path):
    with open(path, "wb") as file:
        eqx.tree_serialise_leaves(file, TREE)


WRITERS = {
    "ours": lambda path: ckpt.save(path, TREE),
    "safetensors": lambda path: ckpt.export(TREE, path, format="safetensors"),
    "npz": npz,
    "orbax": lambda path: ckpt.export(TREE, path, format="orbax"),
    "msgpack": msgpack,
    "torch": lambda path: torch_files.saved(path, flat(".")),
    "equinox": equinox,
}
NAMED = [name for name in WRITERS if name != "equinox"]


@pytest.fixture
def written(tmp_path, request):
    WRITERS[request.param](tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


every = pytest.mark.parametrize("written", WRITERS, indirect=True)
named = pytest.mark.parametrize("written", NAMED, indirect=True)


def target_on(sharding, tree=TREE):
    def struct(array):
        spec = sharding.spec[: array.ndim] if array.ndim == 2 else ()
        placed = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)

    return jax.tree.map(struct, tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@every
@pytest.mark.parametrize("spec", [("data", "model"), ("data",), (None, "model"), ()])
def test_arrays_land_on_the_shardings_of_the_target(written, mesh42, spec):
    target = target_on(NamedSharding(mesh42, PartitionSpec(*spec)))
    restored = ckpt.restore(written, target)
    assert_equal(restored, TREE)
    assert restored["model"]["layers_0"]["weight"].sharding.spec == PartitionSpec(*spec)


@named
def test_parts_are_loaded_by_their_names(written):
    loaded = ckpt.load(written, only="model/layers_1/**")
    assert_equal(loaded, {"model": {"layers_1": LAYERS["layers_1"]}})
    with pytest.raises(KeyError, match="layers_1/weight"):
        ckpt.load(written, only="model/layers_1/wieght")
    weight = ckpt.load_variable(written, "model/layers_2/weight")
    np.testing.assert_array_equal(weight, LAYERS["layers_2"]["weight"])
    with ckpt.load_checkpoint(written) as reader:
        part = reader.get_tensor("model/layers_2/weight", ((2, 4), (1, 3)))
        np.testing.assert_array_equal(part, LAYERS["layers_2"]["weight"][2:4, 1:3])


@named
def test_layers_are_stacked_and_transposed_onto_a_mesh(written, mesh42):
    rules = [
        ("model/layers_*/weight", "blocks/kernel", ckpt.Transpose(), ckpt.Stack()),
        ("model/layers_*/bias", "blocks/bias", ckpt.Stack()),
    ]
    sharding = NamedSharding(mesh42, PartitionSpec(None, "data", "model"))
    target = {
        "blocks": {
            "kernel": jax.ShapeDtypeStruct((3, 4, 8), "float32", sharding=sharding),
            "bias": jnp.zeros((3, 8)),
        },
        "count": jnp.int32(0),
    }
    assert ckpt.plan_restore(written, target, rename=rules).exact
    restored = ckpt.restore(written, target, rename=rules)
    expected = np.stack([layer["weight"].T for layer in LAYERS.values()])
    np.testing.assert_array_equal(restored["blocks"]["kernel"], expected)
    assert restored["blocks"]["kernel"].sharding == sharding


@every
def test_dtypes_change_only_if_that_is_asked_for(written):
    target = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.bfloat16), TREE)
    with pytest.raises(ckpt.RestoreMismatchError, match="expected dtype bfloat16, got float32"):
        ckpt.restore(written, target)
    restored = ckpt.restore(written, target, options=ckpt.CheckpointOptions(cast=True))
    assert restored["model"]["layers_1"]["bias"].dtype == jnp.bfloat16
    assert restored["count"] == 7


@named
def test_a_dry_run_reads_nothing_and_names_what_is_near(written):
    target = {"model": {"layers_0": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(9)}}}
    report = ckpt.plan_restore(written, target)
    assert [entry.path for entry in report.missing] == ["model/layers_0/kernel"]
    assert [entry.path for entry in report.mismatched] == ["model/layers_0/bias"]
    assert len(report.unexpected) == 6
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(written, target)
    assert raised.value.report.missing == report.missing


@named
def test_values_wait_for_their_objects(written):
    model = ckpt.AutoTrackable()
    status = ckpt.Checkpoint(model=model, count=jnp.int32(0)).read(written)
    for name, layer in LAYERS.items():
        part = ckpt.AutoTrackable()
        setattr(model, name, part)
        part.weight = ckpt.Variable(jnp.zeros((8, 4)))
        part.bias = ckpt.Variable(jnp.zeros(8))
        np.testing.assert_array_equal(part.weight.value, layer["weight"])
    status.assert_consumed()


@every
def test_everything_is_verified_and_listed(written):
    report = ckpt.verify(written)
    assert report.ok and report.keys == 7
    assert sorted(shape for _, shape in ckpt.list_variables(written)) == sorted(
        array.shape for array in jax.tree.leaves(TREE)
    )


@every
def test_a_conversion_and_an_export_hold_the_same(written, tmp_path):
    path = ckpt.convert(written, tmp_path / "converted")
    assert_equal(ckpt.load(path), ckpt.load(written))
    path = ckpt.export(written, tmp_path / "out.npz", format="npz")
    with np.load(path) as file:
        found = sorted(file[name].tobytes() for name in file)
    assert found == sorted(array.tobytes() for array in jax.tree.leaves(TREE))


@every
def test_the_program_may_change_its_working_directory(written, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with ckpt.load_checkpoint("checkpoint") as reader:
        monkeypatch.chdir("/")
        assert len(reader.read(dict.fromkeys(reader.get_variable_to_shape_map()))) == 7
