"""Values go out as TensorFlow's checkpoints. `test_with_tensorflow.py` reads some by TensorFlow."""

import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from places import TESTS
from trackables import Model, value, var

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats.tensorflow.bundle import DTYPES


class Text(ckpt.PythonState):
    text = "état"

    def serialize(self):
        return self.text

    def deserialize(self, value):
        self.text = value.decode()


def exported(tmp_path, source, **options):
    return ckpt.export(source, tmp_path / "out-1", format="tensorflow", **options)


def keys(path):
    with ckpt.load_checkpoint(path) as reader:
        return reader.keys()


def test_a_tree_comes_back_with_its_names(tmp_path):
    tree = {
        "layers": [{"w": np.arange(6.0).reshape(2, 3)}, {"w": np.ones(1, np.int8)}],
        "a/b": {"c.d": jnp.ones((), jnp.bfloat16)},
        "step": 7,
        "rate": 0.5,
        "on": True,
        "name": "état",
        "raw": b"\0\xff",
        "none": None,
        "empty": np.zeros((0, 4), np.float16),
    }
    path = exported(tmp_path, tree)
    assert path == str(tmp_path / "out-1")
    assert sorted(os.listdir(tmp_path)) == ["out-1.data-00000-of-00001", "out-1.index"]
    assert "a.Sb/c..d/.ATTRIBUTES/VARIABLE_VALUE" in keys(path)
    found = ckpt.load(path)
    np.testing.assert_array_equal(found["layers"][0]["w"], tree["layers"][0]["w"], strict=True)
    assert found["layers"][1]["w"].dtype == np.int8
    assert found["a/b"]["c.d"] == 1 and found["a/b"]["c.d"].dtype == ml_dtypes.bfloat16
    assert (found["step"], found["rate"], found["on"]) == (7, 0.5, True)
    assert (found["name"], found["raw"]) == ("état".encode(), b"\0\xff")
    assert found["empty"].shape == (0, 4)
    assert ckpt.verify(path).ok


def test_every_dtype_of_tensorflow_goes_out_and_comes_back(tmp_path):
    tree = {}
    for number, name in DTYPES.items():
        dtype = np.dtype(name) if name in np.sctypeDict else np.dtype(getattr(ml_dtypes, name))
        tree[f"{name}_{number}"] = np.array([[0, 1], [1, 0]]).astype(dtype)
    found = ckpt.load(exported(tmp_path, tree))
    for name, expected in tree.items():
        assert found[name].dtype == expected.dtype
        assert found[name].tobytes() == expected.tobytes()


def test_values_that_tensorflow_cannot_hold_are_named_together(tmp_path):
    tree = {
        "when": np.array(["2020-01-01"], "datetime64[D]"),
        "scale": np.ones(2, ml_dtypes.float8_e8m0fnu),
        "same": {1: np.zeros(1), "1": np.zeros(1)},
    }
    with pytest.raises(ckpt.UnsaveableError) as raised:
        exported(tmp_path, tree)
    assert {path for path, _ in raised.value.problems} == {"when", "scale", "same"}
    assert os.listdir(tmp_path) == []
    exported(tmp_path, tree, only=["same/1.Tint"], rename=[("same/**", "other/**")])


def test_files_are_cut_by_size_between_values(tmp_path):
    tree = {name: np.full(100, i, np.float32) for i, name in enumerate("abcdef")}
    path = exported(tmp_path, tree, max_shard_nbytes=900)
    files = sorted(file for file in os.listdir(tmp_path) if ".data-" in file)
    assert [file[-14:] for file in files] == [f"00000{i}-of-00003"[-14:] for i in range(3)]
    for name, expected in tree.items():
        np.testing.assert_array_equal(ckpt.load(path)[name], expected)
    whole = ckpt.export(tree, tmp_path / "large", format="tensorflow", max_shard_nbytes=1)
    assert len([file for file in os.listdir(tmp_path) if file.startswith("large.data")]) == 6
    assert ckpt.verify(whole).ok


def test_objects_are_restored_through_the_graph(tmp_path):
    w = var(np.arange(3.0))
    saved = Model(w=w, shared=w, layers=[var(1.0), {"k": var(2.0)}])
    checkpoint = ckpt.Checkpoint(model=saved, state=Text(), step=3)
    path = exported(tmp_path, checkpoint.save(tmp_path / "own"))
    mine = Model(w=(v := var(np.zeros(3))), shared=v, layers=[var(0.0), {"k": var(0.0)}])
    state = Text()
    state.text = ""
    again = ckpt.Checkpoint(model=mine, state=state, step=0)
    again.restore(path).assert_consumed()
    assert value(mine.w) == [0, 1, 2]
    assert (value(mine.layers[1]["k"]), state.text, again.step) == (2, "état", 3)
    assert again.save_counter == 1
    assert len([key for key in keys(path) if "shared" in key or key.startswith("model/w")]) == 1


TRANSFORMS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "rmsprop": optax.rmsprop(0.1),
    "rmsprop_centered": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.1),
    "lion": optax.lion(0.1),
    "scheduled": optax.adam(optax.exponential_decay(0.1, 1, 0.9)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}
SLOTS = {
    "adam": {"m", "v"},
    "adamw": {"m", "v"},
    "rmsprop": {"rms"},
    "rmsprop_centered": {"rms", "mg", "momentum"},
    "adagrad": {"accumulator"},
    "adadelta": {"accum_grad", "accum_var"},
    "momentum": {"TraceState.trace"},  # needs the learning rate, which is not saved
}


def trained(tx, steps=3):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(steps):
        grads = jax.tree.map(lambda x, k=step: jnp.cos(x + k), nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
    return model, optimizer


@pytest.mark.parametrize("name", TRANSFORMS)
def test_optimizers_go_out_and_come_back(tmp_path, name):
    model, optimizer = trained(TRANSFORMS[name])
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    path = exported(tmp_path, checkpoint.write(tmp_path / "own"))
    slots = {slot.name for _, slot in ckpt.object_metadata(path).slots()}
    assert slots == SLOTS.get(name, slots)
    mine, theirs = trained(TRANSFORMS[name], 0)
    ckpt.Checkpoint(model=mine, optimizer=theirs).read(path).assert_consumed()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(nnx.state((model, optimizer))),
        jax.tree.leaves(nnx.state((mine, theirs))),
    )


def test_slots_have_the_keys_of_tensorflow(tmp_path):
    model, optimizer = trained(TRANSFORMS["adam"])
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    path = exported(tmp_path, checkpoint.write(tmp_path / "own"), only=["model/**", "optimizer/**"])
    end = ".ATTRIBUTES/VARIABLE_VALUE"
    assert keys(path) == [
        f"model/bias/{end}",
        f"model/bias/.OPTIMIZER_SLOT/optimizer/m/{end}",
        f"model/bias/.OPTIMIZER_SLOT/optimizer/v/{end}",
        f"model/kernel/{end}",
        f"model/kernel/.OPTIMIZER_SLOT/optimizer/m/{end}",
        f"model/kernel/.OPTIMIZER_SLOT/optimizer/v/{end}",
        f"optimizer/iter/{end}",
        f"optimizer/step/{end}",
    ]
    assert dict(ckpt.list_variables(path))["optimizer/iter"] == ()
    with ckpt.load_checkpoint(path) as reader:
        assert reader.get_variable_to_dtype_map()[f"optimizer/iter/{end}"] == np.int64


def test_rules_give_values_and_their_slots_the_names_and_shapes_of_another_program(tmp_path):
    model, optimizer = trained(TRANSFORMS["adam"])
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    rules = [("model/kernel", "net/dense/_kernel", ckpt.Transpose()), ("model/bias", "net/dense/b")]
    path = exported(
        tmp_path,
        checkpoint.write(tmp_path / "own"),
        rename=rules,
        cast=[("net/**", "float64")],
    )
    with ckpt.load_checkpoint(path) as reader:
        found = reader.get_tensor("net/dense/_kernel")
        np.testing.assert_array_equal(found, np.asarray(model.kernel[...]).T)
        assert found.dtype == np.float64
        moment = reader.get_tensor("optimizer/m/net/dense/_kernel")
        np.testing.assert_array_equal(moment, optimizer.opt_state[0].mu["kernel"][...].T)


def test_a_train_state_goes_out_and_comes_back(tmp_path):
    params = {"kernel": jnp.ones((3, 2))}
    state = TrainState.create(apply_fn=None, params=params, tx=TRANSFORMS["adam"])
    state = state.apply_gradients(grads={"kernel": jnp.full((3, 2), 0.5)})
    path = exported(tmp_path, state)
    assert {slot.name for _, slot in ckpt.object_metadata(path).slots()} == {"m", "v"}
    found = ckpt.restore(path, jax.tree.map(lambda x: x * 0, state))
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_sharded_arrays_go_out_whole(tmp_path, mesh42):
    sharding = jax.sharding.NamedSharding(mesh42, jax.sharding.PartitionSpec("data", "model"))
    array = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)
    path = exported(tmp_path, {"w": array})
    found = ckpt.restore(path, {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)})
    np.testing.assert_array_equal(found["w"], array)
    assert found["w"].sharding == sharding


def test_a_checkpoint_of_tensorflow_goes_out_as_one(tmp_path):
    source = TESTS / "foreign" / "tensorflow" / "keras2_slots" / "ckpt-1"
    path = exported(tmp_path, source)
    assert keys(path) == keys(source)
    with ckpt.load_checkpoint(path) as ours, ckpt.load_checkpoint(source) as theirs:
        assert ours.object_graph.paths == theirs.object_graph.paths
        for key in theirs.keys():  # noqa: SIM118
            np.testing.assert_array_equal(ours.get_tensor(key), theirs.get_tensor(key), strict=True)


def test_a_destination_that_exists_is_left_alone(tmp_path):
    path = exported(tmp_path, {"w": np.ones(1)})
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    with pytest.raises(FileExistsError):
        exported(tmp_path, {"w": np.zeros(1)})
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before
    assert ckpt.load(path) == {"w": [1]}


def test_one_array_is_in_memory_at_a_time(tmp_path):
    tree = {f"w{i}": np.full((256, 1024), i, np.float32) for i in range(24)}  # 1 MiB each
    source = ckpt.save(tmp_path / "own", tree)
    del tree
    tracemalloc.start()
    path = exported(tmp_path, source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert ckpt.load(path, only="w23")["w23"][0, 0] == 23
