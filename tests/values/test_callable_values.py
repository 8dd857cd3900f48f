"""Values that are functions: called once per save, before save returns, and never by a restore."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt


class Made(ckpt.Trackable):
    """An object whose one value is made by a function."""

    def __init__(self, make: Callable[[], Any]):
        self.make = make
        self.got: Any = None

    def serialize_to_arrays(self) -> dict[str, Any]:
        return {"value": self.make}

    def restore_from_arrays(self, arrays: dict[str, Any]) -> None:
        self.got = arrays["value"]


class Counting:
    """A function with a side effect: it counts its calls and returns how many were before."""

    calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls - 1


@pytest.mark.behaviour(318)
def test_a_value_callable_is_evaluated_once_per_save(tmp_path: Path):
    count = Counting()
    checkpoint = ckpt.Checkpoint(made=Made(count))
    first = checkpoint.write(tmp_path / "a")
    assert count.calls == 1
    checkpoint.write(tmp_path / "b")
    assert count.calls == 2
    checkpoint.read(first).assert_consumed()
    assert checkpoint.made.got == 0
    assert count.calls == 2  # a restore has no use for the value that is there


def test_a_save_in_the_background_has_called_it_when_save_returns(tmp_path: Path):
    count = Counting()
    caller: list[int] = []

    def make() -> int:
        caller.append(threading.get_ident())
        return count()

    checkpoint = ckpt.Checkpoint(made=Made(make))
    gate = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(),))
    path = checkpoint.save(tmp_path / "c", options)
    assert (count.calls, caller) == (1, [threading.get_ident()])
    gate.set()
    checkpoint.sync()
    assert count.calls == 1
    assert ckpt.load(path)["made"] == 0


@pytest.mark.parametrize(
    "value", [jnp.arange(3.0), np.arange(3, dtype=np.int16), 2.5, True, "text", b"\0", np.int8(3)]
)
def test_it_may_make_whatever_can_be_a_value(tmp_path: Path, value: Any):
    path = ckpt.Checkpoint(made=Made(lambda: value)).write(tmp_path / "c")
    target = ckpt.Checkpoint(made=Made(lambda: None))
    target.read(path).assert_consumed()
    assert type(target.made.got) is type(value)
    np.testing.assert_array_equal(target.made.got, value)


def test_a_restore_takes_any_shape_and_dtype_where_the_value_is_open(tmp_path: Path):
    """The target's function is not asked what it would make."""

    def never() -> Any:
        raise AssertionError("called by a restore")

    path = ckpt.Checkpoint(made=Made(lambda: jnp.ones((2, 3)))).write(tmp_path / "c")
    target = ckpt.Checkpoint(made=Made(never))
    target.read(path).assert_consumed()
    assert isinstance(target.made.got, jax.Array) and target.made.got.shape == (2, 3)


def test_a_typed_key_comes_back_as_a_key(tmp_path: Path):
    key = jax.random.key(3)
    path = ckpt.Checkpoint(made=Made(lambda: key)).write(tmp_path / "c")
    target = ckpt.Checkpoint(made=Made(lambda: None))
    target.read(path).assert_consumed()
    assert (jax.random.key_data(target.made.got) == jax.random.key_data(key)).all()


def test_an_open_value_that_is_not_saved_is_missing(tmp_path: Path):
    path = ckpt.Checkpoint(other=1).write(tmp_path / "c")
    status = ckpt.Checkpoint(made=Made(lambda: 1)).read(path)
    with pytest.raises(AssertionError, match="made"):
        status.assert_existing_objects_matched()


def test_looking_at_objects_calls_nothing():
    count = Counting()
    root = Made(count)
    assert ckpt.list_objects(root) == [root]
    assert count.calls == 0


def test_what_it_raises_is_named_with_its_path_and_nothing_is_written(tmp_path: Path):
    def fail() -> Any:
        raise RuntimeError("no device")

    checkpoint = ckpt.Checkpoint(layer=Made(fail), other=Made(lambda: fail))
    with pytest.raises(ckpt.UnsaveableError) as raised:
        checkpoint.save(tmp_path / "c")
    text = str(raised.value)
    assert "layer: value: RuntimeError: no device" in text
    assert "other: value: TypeError" in text
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.save_counter == 0


def test_a_python_state_that_can_be_called_is_a_state(tmp_path: Path):
    class State(ckpt.PythonState):
        def __call__(self) -> str:
            raise AssertionError("called")

        def serialize(self) -> str:
            return "kept"

    path = ckpt.Checkpoint(state=State()).write(tmp_path / "c")
    assert ckpt.load(path)["state"] == b"kept"
