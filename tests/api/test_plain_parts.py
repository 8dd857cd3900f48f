"""Lists and dicts of trackables that hold plain data come back whole from `load_object`."""

import enum

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.graph import plain


class Color(enum.Enum):
    RED = 1


def model(value):
    root = ckpt.AutoTrackable()
    root.parts = value
    return root


def values(found):
    """Comparable: variables as their arrays."""
    if isinstance(found, ckpt.Variable):
        return float(found.value)
    if isinstance(found, list):
        return [values(part) for part in found]
    if isinstance(found, dict):
        return {key: values(part) for key, part in found.items()}
    return found


CONTAINERS = [
    [1, [2]],
    [1, 2, {"a": 3}],
    ["x", ["y"]],
    [ckpt.Variable(1.0), 7, "x"],
    {"a": 1, "v": ckpt.Variable(2.0), "t": (1, {"q": 2.5}), 3: b"\x00", "n": None},
    [[], {}, (1,), 2j, 10**30, True, float("inf"), np.float16(3)],
]


@pytest.mark.parametrize("value", CONTAINERS, ids=repr)
def test_plain_parts_come_back_in_their_places(tmp_path, value):
    path = ckpt.save_object(model(value), tmp_path / "a")
    assert ckpt.verify(path).ok
    found = ckpt.load_object(path).parts
    assert values(found) == values(value)
    if isinstance(value, dict):
        assert list(found) == list(value)


@pytest.mark.parametrize("value", CONTAINERS, ids=repr)
def test_what_came_back_can_be_saved_and_loaded_again(tmp_path, value):
    first = ckpt.load_object(ckpt.save_object(model(value), tmp_path / "a"))
    second = ckpt.load_object(ckpt.save_object(first, tmp_path / "b"))
    assert values(second.parts) == values(value)


def test_plain_parts_are_no_state_for_a_restore(tmp_path):
    path = ckpt.save_object(model([ckpt.Variable(1.0), 7]), tmp_path / "a")
    target = model([ckpt.Variable(0.0), 8])
    ckpt.restore(path, target)
    assert values(target.parts) == [1.0, 8]


def test_an_enum_member_comes_back_as_its_name(tmp_path):
    path = ckpt.save_object(model([ckpt.Variable(1.0), Color.RED]), tmp_path / "a")
    assert ckpt.load_object(path).parts[1] == "RED"


def test_an_element_that_is_neither_state_nor_plain_data_is_refused_by_name(tmp_path):
    root = model([ckpt.Variable(jnp.zeros(2)), lambda: 0])
    with pytest.raises(ckpt.UnsaveableError, match="parts: its element 1 is of type function"):
        ckpt.save_object(root, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "text",
    [
        "1.5",
        '{"object": 1}',
        '{"float": "x"}',
        '{"tuple": 3, "list": 4}',
        "[" * 100_000,
        "{}",
        '{"dict": [[[], 1]]}',
        '{"numpy": ["float32", "00"]}',
        '{"bytes": 3}',
        "not json",
    ],
)
def test_text_that_is_not_written_as_plain_data_is_refused(text):
    with pytest.raises(ValueError):
        plain.decode(text)
