"""Pytrees as state: classes of containers, keys, and what has no name to be saved under."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt

# --- Equinox ----------------------------------------------------------------------------


class Convolutional(eqx.Module):
    """A model as Equinox's users write it: functions lie between the layers."""

    layers: list[Any]
    norm: eqx.nn.BatchNorm

    def __init__(self, key: jax.Array):
        self.layers = [
            eqx.nn.Linear(2, 4, key=key),
            jax.nn.relu,
            lambda x: 2 * x,
            eqx.nn.MLP(4, 2, 8, depth=1, key=key),
            eqx.nn.Lambda(jnp.ravel),
        ]
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")


@pytest.mark.parametrize("abstract", [True, False])
def test_an_equinox_module_keeps_its_functions_and_gets_its_arrays(tmp_path: Path, abstract: bool):
    def make(key: jax.Array) -> tuple[Convolutional, eqx.nn.State]:
        return eqx.nn.make_with_state(Convolutional)(key)

    model, state = make(jax.random.key(0))
    path = ckpt.save(tmp_path / "a", {"model": model, "state": state})
    maker = eqx.filter_eval_shape if abstract else lambda function, key: function(key)
    target, target_state = maker(make, jax.random.key(1))
    restored = ckpt.restore(path, {"model": target, "state": target_state})
    arrays, functions = eqx.partition(restored["model"], eqx.is_array)
    assert eqx.tree_equal(arrays, eqx.filter(model, eqx.is_array))
    assert functions.layers[2] is target.layers[2] and functions.layers[1] is jax.nn.relu
    checkpoint = ckpt.Checkpoint(model=target, state=target_state)
    checkpoint.read(path).assert_consumed()
    assert jnp.array_equal(checkpoint.model.layers[0].weight, model.layers[0].weight)


# --- keys -------------------------------------------------------------------------------


def test_dict_keys_that_are_nan_are_refused_before_anything_is_written(path):
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.Checkpoint(d={float("nan"): 1, float("nan"): 2}).write(path)


class Color(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


@pytest.mark.parametrize(
    "key", [(0, 1), np.int64(1), 1j, Color.RED, Size.SMALL, frozenset()], ids=repr
)
def test_dict_keys_of_other_types_are_saved_or_refused_by_path(path, key):
    try:
        ckpt.Checkpoint(d={key: jnp.ones(1)}).write(path)
    except ckpt.UnsaveableError as error:
        assert "d" in str(error)
    else:
        fresh = ckpt.Checkpoint(d={key: jnp.zeros(1)})
        fresh.read(path).assert_consumed()
        assert fresh.d[key] == 1


class Known(enum.Enum):
    A = 1


@pytest.mark.parametrize("key", [(1, 2), np.int64(3), Known.A, frozenset([1]), 1j])
def test_keys_of_other_types_load_as_they_are_or_are_refused_by_path(tmp_path, key):
    try:
        path = ckpt.save(tmp_path / "a", {"d": {key: 1}})
    except ckpt.UnsaveableError as e:
        assert "d" in str(e)
        assert list(tmp_path.iterdir()) == []
        return
    assert ckpt.load(path) == {"d": {key: 1}}
    assert type(next(iter(ckpt.load(path)["d"]))) is type(key)


def test_two_keys_that_are_nan_are_refused_or_stay_two(tmp_path):
    t = {float("nan"): 1, float("nan"): 2}
    try:
        path = ckpt.save(tmp_path / "a", t)
    except ckpt.UnsaveableError:
        return
    assert sorted(ckpt.load(path).values()) == [1, 2]


def test_keys_may_be_called_like_parts_of_the_format(tmp_path):
    path = ckpt.save(tmp_path / "a", {"VARIABLE_VALUE": 1, ".ATTRIBUTES": {"VARIABLE_VALUE": 2}})
    assert ckpt.load(path) == {"VARIABLE_VALUE": 1, ".ATTRIBUTES": {"VARIABLE_VALUE": 2}}


def test_a_key_that_is_no_unicode_text_is_refused(tmp_path):
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.save(tmp_path / "a", {"\ud800": 1})
    assert list(tmp_path.iterdir()) == []


# --- containers -------------------------------------------------------------------------


@dataclasses.dataclass
class Late:
    x: Any
    y: Any = dataclasses.field(init=False, default=None)


def test_a_dataclass_field_that_its_constructor_does_not_take_comes_back(tmp_path):
    t = Late(1)
    t.y = np.ones(3)
    path = ckpt.save(tmp_path / "a", t)
    b = Late(0)
    b.y = np.zeros(3)
    f = ckpt.restore(path, b)
    assert f.x == 1 and f.y.tolist() == [1, 1, 1]


@dataclasses.dataclass
class Doubling:
    x: Any

    def __post_init__(self):
        self.x = self.x * 2


def test_a_dataclass_is_restored_without_running_post_init(tmp_path):
    t = Doubling(4)
    path = ckpt.save(tmp_path / "a", t)
    assert ckpt.restore(path, Doubling(1)).x == 8


def test_a_container_that_contains_itself_is_refused_by_path(tmp_path):
    tree = {"x": 1}
    tree["a"] = [tree]
    with pytest.raises(ckpt.UnsaveableError, match=r"a/0: the container contains itself"):
        ckpt.save(tmp_path / "a", tree)
    assert not list(tmp_path.iterdir())


def test_a_dict_of_another_constructor_keeps_its_attributes(tmp_path):
    class Config(dict):
        def __init__(self, name, items=()):
            super().__init__(items)
            self.name = name

    path = ckpt.save(tmp_path / "a", Config("n", {"x": 1}))
    f = ckpt.restore(path, Config("m", {"x": 0}))
    assert f == {"x": 1} and f.name == "m"
