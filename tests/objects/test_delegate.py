"""Delegates: wrappers that the object graph does not see."""

import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.graph.codec import encode


class Model(ckpt.AutoTrackable):
    def __init__(self, fill: float):
        self.w = ckpt.Variable(jnp.full(3, fill))
        self.table = {"x": jnp.full(2, fill)}


class Saved(ckpt.Trackable):
    """An object with a value of its own."""

    def __init__(self, value: int):
        self.value = value

    def serialize_to_arrays(self) -> dict[str, Any]:
        return {"value": self.value}

    def restore_from_arrays(self, arrays: dict[str, Any]) -> None:
        self.value = arrays["value"]


class Momentum(ckpt.Trackable):
    def __init__(self, variable: Any):
        self.variable = variable
        self.moment = ckpt.Variable(jnp.full(3, 7.0))

    def slots(self) -> dict[tuple[str, Any], Any]:
        return {("m", self.variable): self.moment}


Wrapped = ckpt.DelegatingTrackable
MODES = pytest.mark.parametrize(
    "options", [None, ckpt.CheckpointOptions(enable_async=True)], ids=["sync", "async"]
)


@pytest.mark.behaviour(315, 316)
@MODES
def test_a_wrapped_object_restores_without_the_wrapper_and_the_other_way_round(
    tmp_path: Path, options: ckpt.CheckpointOptions | None
):
    inner = [Model(1.0), Saved(5)]
    wrapped = ckpt.Checkpoint(model=Wrapped(inner[0]), saved=Wrapped(inner[1]))
    path = wrapped.save(tmp_path / "wrapped", options)
    wrapped.sync()
    plain = ckpt.Checkpoint(model=Model(0.0), saved=Saved(0))
    plain.restore(path).assert_consumed()
    np.testing.assert_array_equal(plain.model.w.value, np.ones(3))
    np.testing.assert_array_equal(plain.model.table["x"], np.ones(2))
    assert plain.saved.value == 5

    plain.model.w.assign(jnp.full(3, 2.0))
    plain.saved.value = 6
    path = plain.save(tmp_path / "plain", options)
    plain.sync()
    wrapper = wrapped.model
    wrapped.restore(path).assert_consumed()
    assert wrapped.model is wrapper  # the wrapper stays where it is
    np.testing.assert_array_equal(inner[0].w.value, np.full(3, 2.0))
    assert inner[1].value == 6


def test_the_object_graph_is_the_same_byte_for_byte(tmp_path: Path):
    model = Model(1.0)
    one = ckpt.save(tmp_path / "one", {"a": model, "o": Momentum(model.w)})
    two = ckpt.save(
        tmp_path / "two", {"a": Wrapped(Wrapped(model)), "o": Momentum(Wrapped(model.w))}
    )
    assert encode(ckpt.object_metadata(one)) == encode(ckpt.object_metadata(two))


def test_a_wrapper_and_its_object_are_one_node(tmp_path: Path):
    variable = ckpt.Variable(jnp.ones(2))
    path = ckpt.save(tmp_path / "c", [Wrapped(variable), variable])
    assert len(ckpt.object_metadata(path).nodes) == 2
    assert ckpt.list_objects([Wrapped(variable), variable])[1:] == [variable]


def test_a_wrapper_may_be_the_root(tmp_path: Path):
    wrapper = Wrapped(Model(1.0))
    path = ckpt.Checkpoint(wrapper, step=3).save(tmp_path / "c")
    other = Model(0.0)
    ckpt.Checkpoint(other, step=0).restore(path).assert_consumed()
    np.testing.assert_array_equal(other.w.value, np.ones(3))
    other.w.assign(jnp.full(3, 4.0))
    path = ckpt.save(tmp_path / "plain", other)
    assert ckpt.restore(path, wrapper) is wrapper
    np.testing.assert_array_equal(wrapper.w.value, np.full(3, 4.0))


def test_what_waits_for_a_name_is_restored_into_a_wrapped_object(tmp_path: Path):
    path = ckpt.Checkpoint(model=Model(1.0)).save(tmp_path / "c")
    checkpoint = ckpt.Checkpoint()
    status = checkpoint.restore(path)
    wrapper = Wrapped(Model(0.0))
    checkpoint.model = wrapper
    assert checkpoint.model is wrapper
    np.testing.assert_array_equal(wrapper.w.value, np.ones(3))
    status.assert_consumed()


def test_a_child_that_the_inner_object_gets_later_is_restored(tmp_path: Path):
    model = Model(1.0)
    model.late = ckpt.Variable(jnp.full(2, 9.0))
    path = ckpt.Checkpoint(model=model).save(tmp_path / "c")
    fresh = Model(0.0)
    status = ckpt.Checkpoint(model=Wrapped(fresh)).restore(path)
    fresh.late = ckpt.Variable(jnp.zeros(2))
    np.testing.assert_array_equal(fresh.late.value, np.full(2, 9.0))
    status.assert_consumed()


def test_a_registered_saver_gets_the_object_in_the_wrapper(tmp_path: Path):
    seen: list[Any] = []
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Saved",
            predicate=lambda obj: isinstance(obj, Saved),
            save_fn=lambda objects, prefix: seen.extend(objects.values()),
            restore_fn=lambda objects, prefix: seen.extend(objects.values()),
        )
        inner = Saved(1)
        path = ckpt.save(tmp_path / "c", {"a": Wrapped(inner)})
        ckpt.restore(path, {"a": Wrapped(inner)})
    assert seen == [inner, inner]


def test_reading_an_attribute_reads_the_objects_and_assigning_stays_with_the_wrapper():
    class Named(ckpt.DelegatingTrackable):
        name = "own"

    model = Model(1.0)
    wrapper = Named(model)
    assert (wrapper.name, wrapper.w) == ("own", model.w)
    wrapper.note = "here"
    assert wrapper.note == "here" and not hasattr(model, "note")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = wrapper.nothing_like_it
    assert copy.copy(wrapper).w is model.w
    assert copy.deepcopy(wrapper).w is not model.w


@pytest.mark.parametrize("inner", [{"x": 1}, jnp.ones(2), 3, object()])
def test_a_wrapper_of_what_cannot_change_in_place_is_refused(inner: Any):
    with pytest.raises(TypeError, match="a delegate stands for a mutable object"):
        Wrapped(inner)
