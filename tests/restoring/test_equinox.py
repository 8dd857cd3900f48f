"""Equinox's files: an order of arrays without names."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign import FIXTURES, check_hostile

import ckpt_jax as ckpt

FILE, WITH_HEADER = FIXTURES / "mlp_adam.eqx", FIXTURES / "header_line.eqx"


def mlp(seed=1):
    return eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(seed))


def full(seed=1):
    model = mlp(seed)
    state = optax.adam(1e-3).init(eqx.filter(model, eqx.is_inexact_array))
    rest = {
        "step": 0,
        "lr": 0.0,
        "flag": False,
        "c": 0j,
        "np": np.zeros(3, int),
        "bf": jnp.zeros(2, jnp.bfloat16),
        "f8": jnp.zeros(2, jnp.float8_e4m3fn),
        "z": jnp.zeros((0, 2)),
        "nps": np.float32(0),
        "none": None,
    }
    return model, state, rest


def test_values_come_back_in_the_order_of_the_leaves():
    model, state, rest = ckpt.restore(FILE, full())
    assert (rest["step"], rest["lr"], rest["flag"], rest["c"]) == (3, 0.5, True, 1j)
    assert rest["bf"].dtype == jnp.bfloat16 and rest["bf"].tolist() == [1, 1]
    assert rest["f8"].dtype == jnp.float8_e4m3fn and rest["f8"].tolist() == [1, 1]
    assert rest["np"].tolist() == [0, 1, 2] and rest["nps"] == 2 and rest["none"] is None
    with open(FILE, "rb") as file:
        expected = eqx.tree_deserialise_leaves(file, full()[0])
    assert eqx.tree_equal(model, expected)
    assert state[0].count == 0 and state[0].mu.layers[0].weight.shape == (4, 3)


def test_a_line_of_json_may_come_first():
    with open(WITH_HEADER, "rb") as file:
        assert json.loads(file.readline()) == {"size": 4}
        expected = eqx.tree_deserialise_leaves(file, mlp())
    assert eqx.tree_equal(ckpt.restore(WITH_HEADER, mlp(2)), expected)
    checkpoint = ckpt.Checkpoint(model=mlp(2))
    checkpoint.read(WITH_HEADER).assert_consumed()
    assert eqx.tree_equal(checkpoint.model, expected)


@pytest.mark.parametrize(
    "tree",
    [
        {"b": jnp.ones(3), "a": (jnp.zeros(2), [1, 2.5])},
        [jnp.arange(3)],
        jnp.arange(3.0),
        {"x": jnp.float32(2), "f": jnp.ones((2, 3), jnp.int8)},
    ],
)
def test_what_equinox_writes_comes_back(tmp_path, tree):
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", tree)
    target = jax.tree.map(lambda x: x * 0, tree)
    assert eqx.tree_equal(ckpt.restore(tmp_path / "a.eqx", target), tree)
    abstract = eqx.filter_eval_shape(lambda: tree)
    restored = ckpt.restore(tmp_path / "a.eqx", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_without_a_target_there_is_a_list():
    loaded = ckpt.load(WITH_HEADER)
    assert [array.shape for array in loaded] == [(4, 3), (4,), (4, 4), (4,), (2, 4), (2,)]
    assert ckpt.list_variables(WITH_HEADER)[0] == ("0", (4, 3))


def test_a_target_with_other_leaves_is_refused_with_the_reason():
    with pytest.raises(ckpt.RestoreMismatchError, match="6 values in an order and no names, .* 28"):
        ckpt.restore(WITH_HEADER, full())
    other = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))
    with pytest.raises(ckpt.RestoreMismatchError, match=r"expected shape \(5, 3\), got \(4, 3\)"):
        ckpt.restore(WITH_HEADER, other)
    checkpoint = ckpt.Checkpoint(model=mlp(), other=mlp())
    with pytest.raises(ckpt.RestoreMismatchError, match="Checkpoint of that tree alone"):
        checkpoint.read(WITH_HEADER)


def test_objects_and_records_are_refused(tmp_path):
    with open(tmp_path / "a.eqx", "wb") as file:
        np.save(file, np.ones(3))
        np.save(file, np.array([None, 1]), allow_pickle=True)
    with pytest.raises(ckpt.CorruptCheckpointError, match="array 1, at byte .* where it ends"):
        ckpt.load(tmp_path / "a.eqx")


@pytest.mark.parametrize("path", [FILE, WITH_HEADER], ids=["plain", "header"])
def test_hostile_files_are_refused_or_harmless(tmp_path, path):
    found = check_hostile(tmp_path / "a.eqx", path.read_bytes(), 100)
    assert found["refused"] > 10 and not found["none"]


def test_truncations_are_found(tmp_path):
    data = FILE.read_bytes()
    (tmp_path / "a.eqx").write_bytes(data[:-1])
    with pytest.raises(ckpt.CorruptCheckpointError, match="array 27, at byte"):
        ckpt.load(tmp_path / "a.eqx")
