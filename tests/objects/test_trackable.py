"""Trackables and variables."""

import collections
import copy
import dataclasses
import functools
import io
import pickle
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trackables import Model, value, var

import ckpt_jax as ckpt
from ckpt_jax.objects.pending import await_child, pending_names, received


def names(obj):
    return list(obj.trackable_children())


class Waiting:
    """A restore that waits, as a trackable sees it."""

    def __init__(self, log, name="restore", replacement=None, value=None):
        self.log, self.name, self.replacement, self.value = log, name, replacement, value

    def attached(self):
        pass

    def attach(self, parent, label, child):
        self.log.append((self.name, parent, label, child))
        return child if self.replacement is None else self.replacement

    def initial_value(self):
        return self.value


def wait(parent, label, waiting):
    await_child(parent, label, waiting)


# --- Trackable --------------------------------------------------------------------------


def test_children_are_listed_in_the_order_in_which_they_were_tracked():
    obj = ckpt.Trackable()
    first, second = ckpt.Variable(1.0), ckpt.Variable(2.0)
    assert obj.track("b", first) is first
    obj.track("a", second)
    assert obj.trackable_children() == {"b": first, "a": second}
    assert names(obj) == ["b", "a"]


def test_the_listing_of_children_is_a_copy():
    obj = Model(v=ckpt.Variable(1.0))
    obj.trackable_children().clear()
    assert names(obj) == ["v"]


@pytest.mark.behaviour(187, 264)
def test_a_name_belongs_to_one_object_unless_it_is_overwritten():
    obj = ckpt.Trackable()
    first, second = ckpt.Variable(1.0), ckpt.Variable(2.0)
    obj.track("v", first)
    with pytest.raises(ValueError, match="already declared as a dependency"):
        obj.track("v", second)
    assert obj.trackable_children() == {"v": first}
    obj.track("v", second, overwrite=True)
    assert obj.trackable_children() == {"v": second}


def test_an_overwritten_child_keeps_its_place():
    obj = Model(a=ckpt.Variable(1.0), b=ckpt.Variable(2.0))
    obj.track("a", ckpt.Variable(3.0), overwrite=True)
    assert names(obj) == ["a", "b"]


@pytest.mark.behaviour(264)
def test_tracking_one_object_twice_under_one_name_is_fine():
    obj, v = ckpt.Trackable(), ckpt.Variable(1.0)
    obj.track("v", v)
    assert obj.track("v", v) is v
    assert names(obj) == ["v"]


def test_what_has_no_view_cannot_be_tracked():
    obj = ckpt.Trackable()
    with pytest.raises(TypeError, match="'f'.*register_view"):
        obj.track("f", print)
    assert names(obj) == []


def test_a_plain_trackable_does_not_track_its_attributes():
    obj = ckpt.Trackable()
    obj.v = ckpt.Variable(1.0)
    assert names(obj) == []


def test_an_object_with_values_has_to_say_how_they_come_back():
    class Half(ckpt.Trackable):
        def serialize_to_arrays(self):
            return {"x": jnp.zeros(1)}

    with pytest.raises(NotImplementedError, match="Half.*restore_from_arrays"):
        Half().restore_from_arrays({"x": jnp.zeros(1)})
    assert ckpt.Trackable().serialize_to_arrays() == {}


# --- what waits for a child -------------------------------------------------------------


def test_a_child_that_is_awaited_is_handed_over_once():
    obj, log, v = ckpt.Trackable(), [], ckpt.Variable(1.0)
    wait(obj, "v", Waiting(log))
    assert pending_names(obj) == ["v"]
    obj.track("w", ckpt.Variable(0.0))
    assert log == []
    obj.track("v", v)
    assert log == [("restore", obj, "v", v)]
    assert "v" not in pending_names(obj)
    obj.track("v", ckpt.Variable(2.0), overwrite=True)
    assert len(log) == 1


def test_of_several_restores_the_newest_has_the_last_word():
    obj, log = ckpt.Trackable(), []
    for name in ("old", "new"):
        wait(obj, "v", Waiting(log, name))
    obj.track("v", ckpt.Variable(1.0))
    assert [entry[0] for entry in log] == ["old", "new"]


def test_a_rebuilt_child_takes_the_place_of_the_one_that_was_assigned():
    obj, new = Model(), jnp.ones(2)
    wait(obj, "w", Waiting([], replacement=new))
    obj.w = jnp.zeros(2)
    assert obj.w is new
    assert obj.trackable_children()["w"] is new


def test_an_object_that_awaits_nothing_hands_nothing_over():
    v = ckpt.Variable(1.0)
    with received(object(), "v", v) as child:
        assert child is v
    assert pending_names(object()) == []


# --- add_variable -----------------------------------------------------------------------


@pytest.mark.behaviour(1)
def test_a_shape_and_a_constant_contradict_each_other():
    with pytest.raises(ValueError, match="not specify shape"):
        ckpt.Trackable().add_variable("v", shape=(2,), initializer=1.0)


def test_an_initializer_that_returns_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"'v': expected shape \(2,\), the initializer .* \(3,\)"):
        ckpt.Trackable().add_variable("v", (2,), initializer=lambda shape, dtype: np.zeros(3))


@pytest.mark.behaviour(2)
def test_a_variable_may_be_made_from_a_constant():
    obj = ckpt.Trackable()
    v = obj.add_variable("v", initializer=3.0)
    assert (v.value, v.shape) == (3.0, ())
    assert obj.trackable_children() == {"v": v}


@pytest.mark.behaviour(3, 6)
def test_a_variable_may_be_made_from_a_shape_and_an_initializer():
    obj = ckpt.Trackable()
    ones = obj.add_variable("ones", shape=(2,), initializer=jnp.ones)
    zeros = obj.add_variable("zeros", shape=(2, 2), dtype=jnp.int16)
    assert ones.value.tolist() == [1.0, 1.0]
    assert zeros.value.tolist() == [[0, 0], [0, 0]] and zeros.dtype == jnp.int16


@pytest.mark.parametrize("shape", [3, np.int64(3), (3,), [3]])
def test_a_shape_is_what_jax_takes_for_one(shape):
    obj = ckpt.Trackable()
    assert obj.add_variable("zeros", shape).shape == (3,)
    assert obj.add_variable("ones", shape, initializer=jnp.ones).shape == (3,)


def test_an_initializer_that_takes_a_key_is_told_what_to_pass():
    normal = jax.nn.initializers.normal()
    with pytest.raises(TypeError) as raised:
        ckpt.Trackable().add_variable("v", (2,), initializer=normal)
    assert "functools.partial(initializer, key)" in raised.value.__notes__[-1]
    keyed = functools.partial(normal, jax.random.key(0))
    assert ckpt.Trackable().add_variable("v", (2,), initializer=keyed).shape == (2,)


@pytest.mark.behaviour(4)
def test_a_second_variable_of_one_name_is_refused():
    obj = ckpt.Trackable()
    first = obj.add_variable("v", initializer=1.0)
    with pytest.raises(ValueError, match="already declared"):
        obj.add_variable("v", initializer=2.0)
    assert obj.trackable_children() == {"v": first}
    second = obj.add_variable("v", initializer=2.0, overwrite=True)
    assert obj.trackable_children() == {"v": second}


@pytest.mark.behaviour(5)
def test_variables_of_one_name_on_different_objects_do_not_clash():
    one, other = ckpt.Trackable(), ckpt.Trackable()
    assert one.add_variable("v", initializer=1.0) is not other.add_variable("v", initializer=1.0)


@pytest.mark.behaviour(10, 11)
def test_the_dtype_that_is_asked_for_is_honoured():
    obj = ckpt.Trackable()
    assert obj.add_variable("a", dtype=jnp.bfloat16, initializer=1.0).dtype == jnp.bfloat16
    made = obj.add_variable("b", (3,), jnp.float16, jnp.ones)
    assert (made.dtype, made.shape) == (jnp.float16, (3,))


def test_a_variable_needs_a_shape_or_a_constant():
    obj = ckpt.Trackable()
    with pytest.raises(ValueError, match="shape is needed"):
        obj.add_variable("v", initializer=jnp.ones)
    assert names(obj) == []


def test_the_initializer_is_not_called_for_a_variable_whose_value_waits():
    obj, log = ckpt.Trackable(), []
    wait(obj, "v", Waiting(log, value="float32[2]"))
    made = obj.add_variable("v", (2,), initializer=lambda *args: pytest.fail("called"))
    ((_, _, _, child),) = log
    assert child is made
    assert made.value == jax.ShapeDtypeStruct((2,), jnp.float32)


def test_the_initializer_is_called_where_more_than_one_value_waits():
    obj = ckpt.Trackable()
    wait(obj, "v", Waiting([], value=None))
    made = obj.add_variable("v", (2,), initializer=jnp.ones)
    assert made.value.tolist() == [1.0, 1.0]


def test_add_variable_refuses_another_shape_as_documented(path):
    ckpt.Checkpoint(o=Model(v=var([1.0, 2.0]))).write(path)
    o = Model()
    ckpt.Checkpoint(o=o).read(path)
    with pytest.raises(ValueError):
        o.add_variable("v", (3,))
    assert o.trackable_children() == {}


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


# --- AutoTrackable ----------------------------------------------------------------------


def test_attributes_that_hold_state_are_tracked_and_configuration_is_not():
    obj = Model(
        array=jnp.zeros(1),
        numpy=np.zeros(1),
        variable=ckpt.Variable(0.0),
        object=Model(),
        width=3,
        rate=0.1,
        name="model",
        flag=True,
        nothing=None,
        function=len,
        scalar=np.float32(1),
    )
    assert names(obj) == ["array", "numpy", "variable", "object"]
    assert (obj.width, obj.name, obj.function) == (3, "model", len)


@pytest.mark.parametrize(
    "value",
    [
        collections.deque([jnp.ones(1)]),
        {ckpt.Variable(0.0)},
        frozenset([ckpt.Variable(0.0)]),
        types.MappingProxyType({"a": [jnp.ones(1)]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_container_that_cannot_be_saved_is_not_left_out_in_silence(value, caplog):
    obj = Model(ring=value)
    assert not names(obj) and obj.ring is value
    assert f"Model.ring is a {type(value).__name__}, which is not saved" in caplog.text
    caplog.clear()
    Model(ring=ckpt.NoDependency(value), sizes={1, 2}, names=collections.deque("ab"))
    assert not caplog.text


@pytest.mark.parametrize(
    ("value", "tracked"),
    [
        ([], True),
        ({}, True),
        ([1, "a"], True),
        ({"rate": 0.1}, True),
        ((), False),
        ((3, 3), False),
        ([1, ckpt.Variable(0.0)], True),
        ({"a": [{"b": (jnp.zeros(1),)}]}, True),
        ((1, (2, jnp.zeros(1))), True),
    ],
)
def test_a_container_is_state_if_it_holds_state_or_may_yet_do_so(value, tracked):
    assert (names(Model(attribute=value)) == ["attribute"]) is tracked


@pytest.mark.behaviour(9)
def test_a_subclass_need_not_call_its_base_constructor():

    class Bare(ckpt.AutoTrackable):
        def __init__(self):
            pass

    obj = Bare()
    obj.v = ckpt.Variable(1.0)
    made = obj.add_variable("w", initializer=2.0)
    assert obj.trackable_children() == {"v": obj.v, "w": made}


@pytest.mark.behaviour(264, 265)
def test_assigning_another_object_replaces_the_child():
    obj = Model(v=ckpt.Variable(1.0))
    new = obj.v = ckpt.Variable(2.0)
    obj.v = obj.v
    assert obj.v is new
    assert obj.trackable_children() == {"v": new}


@pytest.mark.parametrize("value", [3, None, "text", len, ckpt.NoDependency(ckpt.Variable(2.0))])
def test_assigning_something_that_is_no_state_drops_the_child(value):
    obj = Model(v=ckpt.Variable(1.0))
    obj.v = value
    assert names(obj) == []


@pytest.mark.behaviour(266)
def test_deleting_an_attribute_drops_the_child():
    obj = Model(v=ckpt.Variable(1.0))
    del obj.v
    assert names(obj) == [] and not hasattr(obj, "v")
    obj.v = ckpt.Variable(2.0)
    assert obj.trackable_children() == {"v": obj.v}


def test_deleting_what_is_not_there_is_an_attribute_error():
    obj = Model(v=ckpt.Variable(1.0))
    with pytest.raises(AttributeError):
        del obj.w
    assert names(obj) == ["v"]


def test_attributes_with_underscores_are_tracked_too():
    assert names(Model(_v=ckpt.Variable(1.0))) == ["_v"]


def test_tracking_keeps_its_books_out_of_sight_of_other_instances():
    one, other = Model(v=ckpt.Variable(1.0)), Model()
    assert (names(one), names(other)) == (["v"], [])


@pytest.mark.behaviour(235)
def test_a_deep_copy_has_children_of_its_own():
    obj = Model(v=ckpt.Variable(jnp.zeros(2)))
    other = copy.deepcopy(obj)
    other.v.assign(jnp.ones(2))
    assert type(other.v) is ckpt.Variable and other.trackable_children()["v"] is other.v
    assert obj.v.value.tolist() == [0.0, 0.0]


def test_pickling_keeps_what_is_tracked():
    obj = pickle.loads(pickle.dumps(Model(v=ckpt.Variable(np.ones(2)), width=3)))
    assert obj.trackable_children() == {"v": obj.v} and obj.width == 3


@pytest.mark.behaviour(234)
def test_a_shallow_copy_has_its_own_list_of_children():
    """__dict__ is copied shallowly, so both share one dict of children."""
    one = Model(v=var(1.0))
    other = copy.copy(one)
    other.w = var(2.0)
    assert list(one.trackable_children()) == ["v"]
    assert list(other.trackable_children()) == ["v", "w"]


def test_an_abstract_array_is_state():
    """Abstract first: jax.eval_shape leaves ShapeDtypeStructs in attributes."""
    model = Model(w=jax.ShapeDtypeStruct((2,), jnp.float32))
    assert list(model.trackable_children()) == ["w"]


def test_an_attribute_that_cannot_be_set_is_not_tracked():
    class Fixed(ckpt.AutoTrackable):
        @property
        def v(self):
            return 1

    obj = Fixed()
    with pytest.raises(AttributeError):
        obj.v = var(1.0)
    assert obj.trackable_children() == {}


class Configured(ckpt.AutoTrackable):
    """An object that describes itself to another library."""

    def __init__(self, config):
        self.v = var(3.0)
        self.get_config = lambda: config


@pytest.mark.behaviour(190)
def test_an_objects_configuration_is_not_saved(path):
    ckpt.Checkpoint(o=Configured({"width": 3})).write(path)
    assert ckpt.list_variables(path) == [("o/v", ())]
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


# --- NoDependency -----------------------------------------------------------------------


def test_no_dependency_gives_its_value_to_the_attribute_and_tracks_nothing():
    cache = {"v": ckpt.Variable(1.0)}
    obj = Model(cache=ckpt.NoDependency(cache))
    assert obj.cache is cache
    assert names(obj) == []


def test_no_automatic_dependency_tracking_holds_for_one_method():
    class Quiet(ckpt.AutoTrackable):
        @ckpt.no_automatic_dependency_tracking
        def __init__(self, v):
            self.v = v

        def track_more(self, v):
            self.w = v

    obj = Quiet(ckpt.Variable(1.0))
    obj.track_more(ckpt.Variable(2.0))
    assert names(obj) == ["w"] and obj.v.value == 1.0
    assert Quiet.__init__.__name__ == "__init__"


def test_tracking_comes_back_after_a_method_that_failed():
    class Failing(ckpt.AutoTrackable):
        @ckpt.no_automatic_dependency_tracking
        def fail(self):
            raise KeyError

    obj = Failing()
    with pytest.raises(KeyError):
        obj.fail()
    obj.v = ckpt.Variable(1.0)
    assert names(obj) == ["v"]


def test_methods_without_tracking_may_call_each_other():
    class Nested(ckpt.AutoTrackable):
        @ckpt.no_automatic_dependency_tracking
        def outer(self):
            self.inner()
            self.after = ckpt.Variable(1.0)

        @ckpt.no_automatic_dependency_tracking
        def inner(self):
            self.inside = ckpt.Variable(2.0)

    obj = Nested()
    obj.outer()
    assert names(obj) == []


def test_a_method_without_tracking_returns_what_it_returns():
    class Quiet(ckpt.AutoTrackable):
        @ckpt.no_automatic_dependency_tracking
        def add(self, a, *, b):
            return a + b

    assert Quiet().add(1, b=2) == 3


# --- Variable ---------------------------------------------------------------------------


def test_a_variable_holds_one_array_and_its_shape():
    v = ckpt.Variable(jnp.zeros(2))
    assert v.assign(jnp.ones(2)) is v
    assert v.value.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"expected float32\[2\], got float32\[3\]"):
        v.assign(jnp.ones(3))
    assert v.shape == (2,)


def test_a_number_that_is_assigned_takes_the_dtype_of_the_variable():
    v = ckpt.Variable(jnp.zeros((), jnp.bfloat16))
    assert v.assign(3).dtype == jnp.bfloat16
    assert v.value == 3


def test_numbers_become_arrays_and_arrays_stay_what_they_are():
    array = np.arange(2)
    assert isinstance(ckpt.Variable(1.5).value, jax.Array)
    assert ckpt.Variable(array).value is array


def test_variables_are_told_apart_by_identity():
    one, other = ckpt.Variable(1.0), ckpt.Variable(1.0)
    assert one != other and len({one, other}) == 2


def test_a_variable_may_be_abstract():
    v = ckpt.Variable(jax.ShapeDtypeStruct((2, 3), jnp.int8))
    assert (v.shape, v.dtype) == ((2, 3), jnp.int8)


def test_an_assignment_does_not_change_the_dtype_of_a_variable():
    v = ckpt.Variable(jnp.zeros(2))
    with pytest.raises(ValueError):
        v.assign(np.zeros(2, np.float64))
    assert v.dtype == jnp.float32


# --- PythonState ------------------------------------------------------------------------


def test_python_state_has_to_say_what_it_is():
    class State(ckpt.PythonState):
        pass

    with pytest.raises(NotImplementedError, match="State, .* has to implement serialize"):
        State().serialize()
    with pytest.raises(NotImplementedError, match="State, .* has to implement deserialize"):
        State().deserialize(b"")


def test_an_object_with_slots_is_a_slot_owner():
    class Optimizer(ckpt.Trackable):
        def slots(self):
            return {}

    assert isinstance(Optimizer(), ckpt.SlotOwner)
    assert not isinstance(ckpt.Trackable(), ckpt.SlotOwner)


def test_python_state_that_is_a_trackable_too_is_saved_in_either_order_of_bases(path):
    class State(ckpt.Trackable, ckpt.PythonState):
        def serialize(self):
            return "x"

    ckpt.Checkpoint(p=State()).write(path)
    with ckpt.load_checkpoint(path) as reader:
        assert reader.keys() == ["p/.ATTRIBUTES/py_state"]


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


# --- values of an object's own ----------------------------------------------------------


class Named(ckpt.Trackable):
    """An object that saves one value under a name of its choice."""

    def __init__(self, name: str, value: jax.Array):
        self.name, self.value = name, value

    def serialize_to_arrays(self) -> dict[str, Any]:
        return {self.name: self.value}

    def restore_from_arrays(self, arrays: dict[str, Any]) -> None:
        self.value = arrays[self.name]


@pytest.mark.parametrize("name", ["", "a/b", "a.b", ".E", "VARIABLE_VALUE", "py_state"])
def test_an_object_may_call_its_values_anything(tmp_path: Path, name: str):
    path = ckpt.save(tmp_path / "a", {"x": Named(name, jnp.ones(2))})
    target = Named(name, jnp.zeros(2))
    assert ckpt.restore(path, {"x": target})["x"] is target
    assert target.value.tolist() == [1, 1]


class Careless(ckpt.Trackable):
    """An object that saves whatever it was given."""

    def __init__(self, values: Any):
        self.values = values

    def serialize_to_arrays(self) -> dict[str, Any]:
        return self.values


@pytest.mark.parametrize("values", [None, [1], {3: 1}])
def test_values_that_have_no_names_are_refused_with_the_path(tmp_path: Path, values: Any):
    with pytest.raises(ckpt.UnsaveableError, match=r"Careless\.serialize_to_arrays\(\) must"):
        ckpt.save(tmp_path / "a", {"x": Careless(values), "y": 1})


def test_of_several_values_the_one_that_cannot_be_saved_is_named(tmp_path: Path):
    with pytest.raises(ckpt.UnsaveableError, match="x: second: builtins.list is not an array"):
        ckpt.save(tmp_path / "a", {"x": Careless({"first": 1, "second": [2]})})


# --- attributes that are not just in __dict__ --------------------------------------------


class Behind(ckpt.AutoTrackable):
    """`w` is a property over a dict that is not tracked."""

    def __init__(self, w):
        self.store = ckpt.NoDependency({})
        self.w = w

    @property
    def w(self):
        return self.store["w"]

    @w.setter
    def w(self, value):
        self.store["w"] = value


class Underscore(ckpt.AutoTrackable):
    """`w` is a property over an attribute."""

    def __init__(self, w):
        self.w = w

    @property
    def w(self):
        return self._w

    @w.setter
    def w(self, value):
        self._w = value


class Slots(ckpt.AutoTrackable):
    __slots__ = ("w",)

    def __init__(self, w):
        self.w = w


@dataclasses.dataclass(slots=True)
class SlotsDataclass(ckpt.AutoTrackable):
    w: Any


@dataclasses.dataclass(frozen=True)
class FrozenDataclass(ckpt.AutoTrackable):
    w: Any


class Field:
    def __set_name__(self, owner, name):
        self.name = "_" + name

    def __get__(self, obj, kind=None):
        return obj.__dict__[self.name]

    def __set__(self, obj, value):
        obj.__dict__[self.name] = value


class Described(ckpt.AutoTrackable):
    w = Field()

    def __init__(self, w):
        self.w = w


class Observed(ckpt.AutoTrackable):
    def __init__(self, w):
        self.w = w

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__["seen"] = value


class Past(ckpt.AutoTrackable):
    def __init__(self, w):
        self.__dict__["w"] = w
        object.__setattr__(self, "v", w)


ODD = [Behind, Underscore, Slots, SlotsDataclass, FrozenDataclass, Described, Observed, Past]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: jnp.full(2, x), lambda w: w[0]),
        (lambda x: {"k": jnp.full(2, x)}, lambda w: w["k"][0]),
        (lambda x: ckpt.Variable(jnp.full(2, x)), lambda w: w.value[0]),
        (lambda x: [ckpt.Variable(jnp.full(2, x))], lambda w: w[0].value[0]),
    ],
    ids=["array", "pytree", "object", "list"],
)
def test_a_restore_reaches_attributes_however_they_are_set(tmp_path, kind, make, read):
    path = ckpt.Checkpoint(m=kind(make(1.0))).write(tmp_path / "a")
    fresh = kind(make(0.0))
    ckpt.Checkpoint(m=fresh).read(path).assert_consumed()
    assert read(fresh.w) == 1
    assert kind is not Observed or read(fresh.seen) == 1


def test_what_is_set_past_setattr_is_what_is_saved(tmp_path):
    model = ckpt.AutoTrackable()
    model.w = jnp.zeros(1)
    model.__dict__["w"] = jnp.ones(1)
    path = ckpt.Checkpoint(m=model).write(tmp_path / "a")
    assert ckpt.load(path)["m"]["w"] == 1


def test_marked_untracked_and_derived_attributes_are_no_state():
    class Quiet(ckpt.AutoTrackable):
        def __init__(self):
            self.w = jnp.ones(1)
            self.marked = ckpt.NoDependency(jnp.ones(1))
            self.untracked()
            assert self.derived == 2

        @ckpt.no_automatic_dependency_tracking
        def untracked(self):
            self.hidden = jnp.ones(1)

        @functools.cached_property
        def derived(self):
            return self.w * 2

    quiet = Quiet()
    assert sorted(quiet.trackable_children()) == ["w"]
    quiet.marked = jnp.ones(1)
    assert sorted(quiet.trackable_children()) == ["marked", "w"]


# --- names of one's own ------------------------------------------------------------------


class OwnAttributes(ckpt.AutoTrackable):
    slots = 3
    track = None

    def __init__(self, x):
        self.add_variable("w", (2,))
        for name in ("trackable_children", "serialize_to_arrays", "add_variable", "save", "root"):
            setattr(self, name, ckpt.Variable(jnp.full(1, x)))


class OwnMethods(ckpt.AutoTrackable):
    def __init__(self, x):
        self.save = ckpt.Variable(jnp.full(1, x))
        self.add_variable("w", (2,))

    def slots(self, inputs):
        return inputs

    def track(self, audio):
        return audio

    def trackable_children(self, depth):
        return depth

    def serialize_to_arrays(self, which):
        return which

    def checkpoint_adapter(self, path):
        return 5


class OtherResults(OwnMethods):
    def slots(self):
        return {"a": self.save}

    def trackable_children(self):
        return 7


@pytest.mark.parametrize("kind", [OwnAttributes, OwnMethods, OtherResults])
def test_a_program_may_use_the_librarys_names_for_something_else(tmp_path, kind):
    path = ckpt.Checkpoint(m=kind(1.0)).write(tmp_path / "a")
    fresh = kind(0.0)
    ckpt.Checkpoint(m=fresh).read(path).assert_consumed()
    assert fresh.save.value == 1


@pytest.mark.parametrize("name", ["save", "restore", "track", "root", "trackable_children"])
def test_a_name_of_the_checkpoint_itself_is_refused_when_it_is_assigned(name):
    checkpoint = ckpt.Checkpoint()
    with pytest.raises(AttributeError, match=f"{name} is the checkpoint's own"):
        setattr(checkpoint, name, jnp.ones(1))
