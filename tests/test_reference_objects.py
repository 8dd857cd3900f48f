"""What the reference does with objects, where no other test shows it (docs/behaviours.md)."""

import io
import logging
import os
import tempfile
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from trackables import Model, value, var

import ckpt_jax as ckpt

# --- variables ----------------------------------------------------------------------------


@pytest.mark.behaviour(3, 10, 11)
def test_a_variable_of_64_bits_is_one_where_jax_has_them():
    with jax.enable_x64(True):
        zeros = ckpt.Trackable().add_variable("v", (2, 2), np.float64, jnp.zeros)
        one = ckpt.Trackable().add_variable("v", dtype=np.float64, initializer=1)
    assert (zeros.value.tolist(), one.value.tolist()) == ([[0.0, 0.0], [0.0, 0.0]], 1.0)
    assert zeros.dtype == one.dtype == np.float64


@pytest.mark.behaviour(6)
def test_a_variable_has_its_value_as_soon_as_it_is_made():
    calls = []

    def initializer(shape, dtype):
        calls.append((shape, dtype))
        return jnp.full(shape, 7, dtype)

    made = ckpt.Trackable().add_variable("v", (2,), jnp.int8, initializer)
    assert calls == [((2,), jnp.int8)]
    assert made.value.tolist() == [7, 7]


@pytest.mark.behaviour(188)
def test_the_objects_below_a_root_are_listed_after_it():
    root = ckpt.Trackable()
    old = root.add_variable("v", initializer=1.0)
    assert ckpt.list_objects(root) == [root, old]
    new = root.add_variable("v", initializer=2.0, overwrite=True)
    assert ckpt.list_objects(root) == [root, new]


@pytest.mark.behaviour(196)
def test_the_variables_of_modules_in_nested_lists_are_listed():
    inner, outer = Model(v=var(1.0)), Model(v=var(2.0))
    root = Model(layers=[[inner], outer])
    found = ckpt.TrackableView(root).descendants()
    assert [obj.value for obj in found if isinstance(obj, ckpt.Variable)] == [2.0, 1.0]


# --- the order in which objects come ------------------------------------------------------


@st.composite
def programs(draw):
    """Edges (parent, name, child) of a program of a few objects, with sharing and loops."""
    count = draw(st.integers(2, 5))
    ids = st.integers(0, count - 1)
    edges = {(draw(st.integers(0, n - 1)), f"n{n}"): n for n in range(1, count)}
    edges |= draw(st.dictionaries(st.tuples(ids, st.sampled_from("ab")), ids, max_size=4))
    return count, [(parent, name, child) for (parent, name), child in edges.items()]


@settings(max_examples=25)
@given(programs(), st.data())
@pytest.mark.behaviour(42, 50)
def test_a_program_may_be_put_together_in_any_order_after_the_restore(program, data):
    count, edges = program
    saved = [Model(v=var(n)) for n in range(count)]
    fresh = [Model(v=var(-1)) for _ in range(count)]
    for parent, name, child in edges:
        setattr(saved[parent], name, saved[child])
    order = data.draw(st.permutations(edges))
    early = data.draw(st.integers(0, len(order)))
    for parent, name, child in order[:early]:
        setattr(fresh[parent], name, fresh[child])
    with tempfile.TemporaryDirectory() as directory:
        options = ckpt.CheckpointOptions(durable=False)
        path = ckpt.Checkpoint(saved[0]).write(f"{directory}/written", options)
        status = ckpt.Checkpoint(fresh[0]).read(path)
        for parent, name, child in order[early:]:
            setattr(fresh[parent], name, fresh[child])
        status.assert_consumed()
    assert [value(model.v) for model in fresh] == list(range(count))


# --- values that nobody took --------------------------------------------------------------


@pytest.mark.behaviour(26, 27, 28)
def test_what_was_never_used_is_logged_at_once_where_nothing_waits(path, caplog, no_gc):
    ckpt.Checkpoint(v1=var(1.0), v2=var(2.0)).write(path)
    fresh = ckpt.Checkpoint(v1=ckpt.Trackable(), v2=var(0.0))
    fresh.read(path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "(root).v1" in caplog.text and "(root).v2" not in caplog.text
    assert "expect_partial()" in caplog.text
    assert value(fresh.v2) == 2.0
    gone = [weakref.ref(fresh.v2), weakref.ref(fresh)]
    del fresh
    assert [ref() for ref in gone] == [None, None]
    assert len(caplog.records) == 1


@pytest.mark.behaviour(30, 31)
def test_what_was_expected_to_be_partial_is_not_logged(path, caplog, no_gc):
    ckpt.Checkpoint(Model(v1=var(1.0), v2=var(2.0), v3=var(3.0))).write(path)
    fresh = ckpt.Checkpoint(Model(v1=ckpt.Trackable(), v2=var(0.0)))
    fresh.read(path).expect_partial()
    gone = [weakref.ref(fresh.root.v2), weakref.ref(fresh)]
    del fresh
    assert [ref() for ref in gone] == [None, None]
    assert not caplog.records


# --- roots --------------------------------------------------------------------------------


@pytest.mark.behaviour(67)
def test_a_fresh_model_computes_what_the_saved_one_did(tmp_path):
    class Net(nnx.Module):
        def __init__(self, seed):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            return jax.nn.relu(self.linear(x))

    model, fresh, x = Net(0), Net(1), jnp.arange(3.0)
    saved = ckpt.Checkpoint(model).save(tmp_path / "ckpt")
    assert not np.array_equal(fresh(x), model(x))
    ckpt.Checkpoint(fresh).restore(saved).assert_consumed()
    np.testing.assert_array_equal(fresh(x), model(x))


@pytest.mark.behaviour(73, 74, 75)
def test_a_saved_model_of_tensorflow_is_no_checkpoint(tmp_path):
    (tmp_path / "exported" / "variables").mkdir(parents=True)
    (tmp_path / "exported" / "saved_model.pb").touch()
    (tmp_path / "exported" / "variables" / "variables.index").touch()
    checkpoint = ckpt.Checkpoint(v=var(0.0))
    with pytest.raises(ckpt.CheckpointNotFoundError, match="exported"):
        checkpoint.restore(tmp_path / "exported")
    assert value(checkpoint.v) == 0.0


# --- objects with a configuration ---------------------------------------------------------


class Configured(ckpt.AutoTrackable):
    """An object that describes itself to another library."""

    def __init__(self, config):
        self.v = var(3.0)
        self.get_config = lambda: config


@pytest.mark.behaviour(190)
def test_an_objects_configuration_is_not_saved(path):
    ckpt.Checkpoint(o=Configured({"width": 3})).write(path)
    assert ckpt.list_variables(path) == [("o/v/.ATTRIBUTES/VARIABLE_VALUE", ())]
    plain = ckpt.Trackable()
    v = plain.track("v", var(0.0))
    ckpt.Checkpoint(o=plain).read(path).assert_consumed()
    assert value(v) == 3.0


@pytest.mark.behaviour(191)
def test_a_configuration_that_cannot_be_written_down_is_in_nobodys_way(path):
    saved = Configured(object())
    ckpt.Checkpoint(saved).write(path)
    saved.v.assign(np.float32(0.0))
    ckpt.Checkpoint(saved).read(path).assert_consumed()
    assert value(saved.v) == 3.0


# --- numpy state --------------------------------------------------------------------------


class NumpyState(ckpt.PythonState):
    """Arrays and numbers in attributes, which a restore makes where they are not there yet."""

    def serialize(self):
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **vars(self))
        return file.getvalue()

    def deserialize(self, value):
        with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
            vars(self).update(arrays)


@pytest.mark.behaviour(275, 276)
def test_state_of_numpy_arrays_is_restored_into_an_object_without_any(tmp_path):
    saved = NumpyState()
    saved.a, saved.b, saved.step = np.ones((2, 2)), np.arange(3), 4
    checkpoint = ckpt.Checkpoint(state=saved)
    first = checkpoint.save(tmp_path / "ckpt")
    saved.a[0, 0] = 5.0
    saved.step = 6
    second = checkpoint.save(tmp_path / "ckpt")
    fresh = ckpt.Checkpoint(state=NumpyState())
    for path, corner, step in ((first, 1.0, 4), (second, 5.0, 6), (first, 1.0, 4)):
        fresh.restore(path).assert_consumed()
        assert (fresh.state.a[0, 0], fresh.state.step) == (corner, step)
        assert fresh.state.b.tolist() == [0, 1, 2]
        fresh.state.a[:] = -1.0


@pytest.mark.behaviour(278)
def test_a_second_object_gets_the_array_of_the_first(path):
    one, other = NumpyState(), NumpyState()
    one.x = np.arange(4.0)
    ckpt.Checkpoint(state=one).write(path)
    ckpt.Checkpoint(state=other).read(path).assert_consumed()
    assert other.x.tolist() == [0.0, 1.0, 2.0, 3.0] and other.x is not one.x


@pytest.mark.behaviour(274, 276)
def test_arrays_of_numpy_wait_until_their_attribute_is_assigned(path):
    ckpt.Checkpoint(Model(x=np.arange(4.0))).write(path)
    empty = Model()
    status = ckpt.Checkpoint(empty).read(path)
    assert not hasattr(empty, "x")
    empty.x = np.zeros(4)
    assert empty.x.tolist() == [0.0, 1.0, 2.0, 3.0]
    status.assert_consumed()


# --- programs that are compiled -----------------------------------------------------------


@pytest.mark.behaviour(62, 63)
def test_a_compiled_function_does_not_write_but_its_caller_does(tmp_path):
    path = tmp_path / "written"
    with pytest.raises(ckpt.UnsaveableError, match="v"):
        jax.jit(lambda x: ckpt.Checkpoint(v=x).write(path))(jnp.float32(1.0))
    assert os.listdir(tmp_path) == []

    step = jax.jit(lambda x: x + 1)
    for place in (str(path), path):
        checkpoint = ckpt.Checkpoint(v=var(0.0))
        checkpoint.v.assign(step(checkpoint.v.value))
        assert checkpoint.write(place) == str(path)
        for _ in range(2):
            checkpoint.v.assign(np.float32(9.0))
            checkpoint.read(place).assert_consumed()
            assert value(checkpoint.v) == 1.0
