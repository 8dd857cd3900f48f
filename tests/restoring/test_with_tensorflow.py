"""TensorFlow itself reads what is written for it, and writes what is read here.

These tests need TensorFlow (and tf_keras, for the older optimizers); `scripts/interop` has it.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from places import TESTS
from trackables import Model, var

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats.tensorflow.bundle import DTYPES

FILES = TESTS / "foreign" / "tensorflow"


@pytest.fixture(scope="module")
def tf():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip(
        "tensorflow", reason="TensorFlow is not installed. scripts/interop runs this test with it."
    )


@pytest.fixture(scope="module")
def legacy(tf):
    return pytest.importorskip("tf_keras", reason="tf_keras is not installed").optimizers.legacy


def trained(tx, steps=3):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer


def gradients(step):
    kernel = np.cos(np.arange(6, dtype=np.float32) + step).reshape(3, 2)
    return {"kernel": kernel, "bias": np.sin(np.arange(2, dtype=np.float32) - step)}


def update(model, optimizer, step):
    grads = {name: nnx.Param(jnp.asarray(value)) for name, value in gradients(step).items()}
    optimizer.update(model, nnx.State(grads))


def module_of(tf):
    module = tf.Module()
    module.kernel, module.bias = tf.Variable(tf.zeros((3, 2))), tf.Variable(tf.zeros(2))
    return module


def test_the_expected_values_are_what_tensorflow_reads(tf):
    program = f"import runpy, json; m = runpy.run_path({str(FILES / 'describe.py')!r}); "
    program += "print(json.dumps({p: m['described'](p) for p in m['prefixes']()}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == json.loads((FILES / "expected.json").read_text())


def test_tensorflow_reads_every_value(tf, tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "f": rng.normal(size=(3, 4)).astype(np.float32),
        "deep": {"d": rng.normal(size=(2,)), "bf": jnp.ones((2, 2), jnp.bfloat16)},
        "i": np.arange(5, dtype=np.int16),
        "c": np.array([1 + 2j]),
        "on": np.array([True, False]),
        "text": "état",
        "step": 7,
        "empty": np.zeros((0, 3), np.float32),
    }
    path = ckpt.export(tree, tmp_path / "a", format="tensorflow", max_shard_nbytes=64)
    reader = tf.train.load_checkpoint(path)
    assert reader.get_tensor("text/.ATTRIBUTES/VARIABLE_VALUE") == "état".encode()
    flat = {"/".join(k.key for k in keys): v for keys, v in jax.tree.leaves_with_path(tree)}
    for name, expected in flat.items():
        if name != "text":
            found = reader.get_tensor(f"{name}/.ATTRIBUTES/VARIABLE_VALUE")
            np.testing.assert_array_equal(found, expected)
            assert np.asarray(found).dtype == np.asarray(expected).dtype
    shapes = reader.get_variable_to_shape_map()
    assert shapes["f/.ATTRIBUTES/VARIABLE_VALUE"] == [3, 4]
    assert len(tf.train.list_variables(path)) == len(flat) + 1


def test_every_dtype_is_that_of_tensorflow(tf, tmp_path):
    tree = {}
    for number, name in DTYPES.items():
        dtype = np.dtype(name) if name in np.sctypeDict else np.dtype(getattr(ml_dtypes, name))
        tree[str(number)] = np.array([[0, 1], [1, 0]]).astype(dtype)
    reader = tf.train.load_checkpoint(ckpt.export(tree, tmp_path / "a", format="tensorflow"))
    dtypes = reader.get_variable_to_dtype_map()
    for number, array in tree.items():
        key = f"{number}/.ATTRIBUTES/VARIABLE_VALUE"
        assert dtypes[key].as_datatype_enum == int(number)
        assert reader.get_tensor(key).tobytes() == array.tobytes()


def test_tensorflow_restores_objects(tf, tmp_path):
    class State(tf.train.experimental.PythonState):
        text = b""

        def serialize(self):
            return self.text

        def deserialize(self, value):
            self.text = value

    class Text(ckpt.PythonState):
        def serialize(self):
            return "état"

        def deserialize(self, value):
            pass

    w = var(np.arange(3.0))
    saved = Model(w=w, shared=w, layers=[var(1.0), {"k": var(2.0)}])
    own = ckpt.Checkpoint(model=saved, state=Text(), step=3).save(tmp_path / "own")
    path = ckpt.export(own, tmp_path / "a-1", format="tensorflow")
    module, state = tf.Module(), State()
    module.w = module.shared = tf.Variable(tf.zeros(3))
    module.layers = [tf.Variable(0.0), {"k": tf.Variable(0.0)}]
    step = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=module, state=state, step=step)
    checkpoint.restore(path).assert_consumed()
    assert module.w.numpy().tolist() == [0, 1, 2]
    assert module.layers[1]["k"].numpy() == 2
    assert (state.text, step.numpy()) == ("état".encode(), 3)
    assert checkpoint.save_counter.numpy() == 1
    # Objects that appear later, in TensorFlow.
    late = tf.Module()
    status = tf.train.Checkpoint(model=late).restore(path)
    late.w = tf.Variable(tf.zeros(3))
    assert late.w.numpy().tolist() == [0, 1, 2]
    status.expect_partial()


OLDEST = {
    "Adam": (optax.adam(0.1, eps=1e-7), {}),
    "Adagrad": (optax.adagrad(0.1, eps=1e-7), {}),
    "RMSprop": (
        optax.rmsprop(0.1, decay=0.9, eps=1e-7, centered=True, momentum=0.9),
        {"centered": True, "momentum": 0.9},
    ),
    "Adadelta": (optax.adadelta(0.1, rho=0.95, eps=1e-7), {}),
}


@pytest.mark.parametrize("name", OLDEST)
def test_optimizers_of_keras_go_on_with_the_state_of_optax(tf, legacy, tmp_path, name):
    tx, options = OLDEST[name]
    model, optimizer = trained(tx)
    own = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "own")
    path = ckpt.export(own, tmp_path / "a", format="tensorflow")
    module, theirs = module_of(tf), getattr(legacy, name)(0.1, **options)
    status = tf.train.Checkpoint(model=module, optimizer=theirs).read(path)
    for step in (3, 4):
        grads = gradients(step)
        pairs = [(tf.constant(grads["kernel"]), module.kernel)]
        theirs.apply_gradients([*pairs, (tf.constant(grads["bias"]), module.bias)])
        update(model, optimizer, step)
    np.testing.assert_allclose(module.kernel, model.kernel[...], atol=1e-6)
    np.testing.assert_allclose(module.bias, model.bias[...], atol=1e-6)
    assert theirs.iterations.numpy() == 5
    status.expect_partial()


def test_slots_of_tensorflow_1_are_restored(tf, tmp_path):
    model, optimizer = trained(optax.adam(0.1))
    own = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "own")
    path = ckpt.export(own, tmp_path / "a", format="tensorflow")
    module, theirs = module_of(tf), tf.compat.v1.train.AdamOptimizer(0.1)
    theirs._create_slots([module.kernel, module.bias])
    tf.train.Checkpoint(model=module, optimizer=theirs).read(path).expect_partial()
    state = optimizer.opt_state[0]
    for name, moment in (("m", state.mu), ("v", state.nu)):
        for part in ("kernel", "bias"):
            slot = theirs.get_slot(getattr(module, part), name)
            np.testing.assert_array_equal(slot, moment[part][...])


def test_a_keras_model_goes_on_in_flax_and_comes_back(tf, tmp_path):
    """The way in and the way back, by the names of a Keras model."""
    keras = pytest.importorskip("keras")
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(2, name="head")(keras.layers.Dense(4, name="enc")(inputs))
    theirs = keras.Model(inputs, outputs)
    adam = keras.optimizers.Adam(0.01)
    theirs.compile(adam, "mse")
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    theirs.fit(x, np.ones((16, 2)), epochs=2, verbose=0)
    path = tf.train.Checkpoint(model=theirs, optimizer=adam).save(str(tmp_path / "k"))

    class Net(nnx.Module):
        def __init__(self):
            self.enc, self.head = (
                nnx.Linear(*shape, rngs=nnx.Rngs(0)) for shape in ((8, 4), (4, 2))
            )

    model = Net()
    optimizer = nnx.Optimizer(model, optax.adam(0.01, eps=1e-7), wrt=nnx.Param)
    names = {"enc": 1, "head": 2}
    rules = [
        (f"model/_operations/{number}/{theirs_}", f"model/{name}/{ours}")
        for name, number in names.items()
        for theirs_, ours in (("_kernel", "kernel"), ("bias", "bias"))
    ]
    status = ckpt.Checkpoint(model=model, optimizer=optimizer).restore(path, rename=rules)
    status.expect_partial().assert_existing_objects_matched()
    np.testing.assert_array_equal(model.enc.kernel[...], theirs.get_layer("enc").kernel)
    moments = {v.path: np.asarray(v) for v in adam.variables}
    (kernel,) = [v for k, v in moments.items() if k.endswith("enc_kernel_momentum")]
    np.testing.assert_array_equal(optimizer.opt_state[0].mu["enc"]["kernel"][...], kernel)

    def loss(model):
        return jnp.mean((model.head(model.enc(x)) - 1) ** 2)

    optimizer.update(model, nnx.grad(loss)(model))
    theirs.fit(x, np.ones((16, 2)), batch_size=16, verbose=0)
    np.testing.assert_allclose(model.enc.kernel[...], theirs.get_layer("enc").kernel, atol=1e-5)

    back = [(ours, theirs_) for theirs_, ours in rules]
    path = ckpt.export(
        {"model": model}, tmp_path / "back", format="tensorflow", rename=back, only="model/**"
    )
    theirs.get_layer("enc").kernel.assign(np.zeros((8, 4)))
    tf.train.Checkpoint(model=theirs).read(path).expect_partial()
    np.testing.assert_array_equal(theirs.get_layer("enc").kernel, model.enc.kernel[...])


def test_partitioned_variables_that_tensorflow_writes_are_read(tf, tmp_path):
    rng = np.random.default_rng(1)
    full = rng.normal(size=(6, 5)).astype(np.float32)
    prefixes = []
    for number, (rows, cols) in enumerate([((0, 4), (0, 2)), ((0, 4), (2, 3)), ((4, 2), (0, 5))]):
        part = full[rows[0] : sum(rows), cols[0] : sum(cols)]
        text = f"6 5 {rows[0]},{rows[1]}:{cols[0]},{cols[1]}"
        prefixes.append(str(tmp_path / f"part{number}"))
        tf.raw_ops.SaveV2(
            prefix=prefixes[-1], tensor_names=["w"], shape_and_slices=[text], tensors=[part]
        )
    path = str(tmp_path / "merged")
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=prefixes, destination_prefix=path, delete_old_dirs=False
    )
    np.testing.assert_array_equal(ckpt.load(path)["w"], full)
    assert ckpt.verify(path).ok


def test_random_trees_of_tensorflow_are_read(tf, tmp_path):
    """Trackables of TensorFlow of random form, restored into ours of the same form."""
    rng = np.random.default_rng(2)

    def build(depth):
        kind = rng.integers(4) if depth else 0
        if kind == 0:
            array = rng.normal(size=tuple(rng.integers(0, 4, size=rng.integers(0, 3))))
            return tf.Variable(array), ckpt.Variable(jnp.zeros(array.shape)), array
        if kind == 1:
            parts = [build(depth - 1) for _ in range(rng.integers(1, 4))]
            theirs, ours, arrays = map(list, zip(*parts, strict=True))
            return theirs, ours, arrays
        parts = {
            rng.choice(["a", "b/c", "d.e", "é", "x"]): build(depth - 1)
            for _ in range(rng.integers(1, 4))
        }
        theirs, ours, arrays = ({k: part[i] for k, part in parts.items()} for i in range(3))
        return theirs, ours, arrays

    for number in range(10):
        theirs, ours, arrays = build(3)
        path = tf.train.Checkpoint(root_=theirs).write(str(tmp_path / f"c{number}"))
        checkpoint = ckpt.Checkpoint(root_=ours)
        options = ckpt.CheckpointOptions(cast=True)
        checkpoint.read(path, options).assert_existing_objects_matched().expect_partial()
        found = [v.value for v in jax.tree.leaves(ours, is_leaf=is_variable)]
        for mine, array in zip(found, jax.tree.leaves(arrays), strict=True):
            np.testing.assert_allclose(mine, array, rtol=1e-6)
        assert ckpt.verify(path).ok


def is_variable(x):
    return isinstance(x, ckpt.Variable)
