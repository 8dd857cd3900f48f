"""Lists and dicts of trackables that hold plain data come back whole from `load_object`."""

import enum
import math
import struct
import tempfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from pytrees import arrays, labels

import ckpt_jax as ckpt
from ckpt_jax.graph import plain


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


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


def test_members_of_enums_come_back_as_such_if_their_class_is_imported(tmp_path):
    class Local(enum.Enum):  # not to be found in a module
        BLUE = 2

    parts = [ckpt.Variable(1.0), Color.RED, (Level.LOW, {Level.LOW: Color.RED}), Local.BLUE]
    found = ckpt.load_object(ckpt.save_object(model(parts), tmp_path / "a")).parts
    assert found[1:3] == parts[1:3] and type(found[2][0]) is Level
    assert type(next(iter(found[2][1]))) is Level
    assert found[3] == "BLUE"
    keys = {Color.RED: 1, Level.LOW: ckpt.Variable(2.0), ("a", Level.LOW): 3, 4: 5}
    found = ckpt.load_object(ckpt.save_object(model(keys), tmp_path / "b")).parts
    assert [*found] == [*keys] and [type(key) for key in found] == [type(key) for key in keys]
    assert values(found) == values(keys)


def comparable(found):
    """What a tree consists of, so that only equal trees of equal types are equal."""
    match found:
        case enum.Enum():
            return "member", found
        case ckpt.Variable() | jax.Ref():
            return "box", comparable(
                found.value if isinstance(found, ckpt.Variable) else found[...]
            )
        case ckpt.AutoTrackable():
            return "object", comparable(found.trackable_children())
        case jax.Array() if jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
            return "key", comparable(jax.random.key_data(found))
        case jax.Array():
            return "array", comparable(np.asarray(found))
        case np.ndarray():
            return "numpy", found.dtype, found.shape, found.tobytes()
        case str() | bytes():
            return type(found).__name__.rstrip("_"), found
        case np.generic():
            return "scalar", found.dtype, found.tobytes()
        case list():
            return "list", *map(comparable, found)
        case tuple():
            return "tuple", *map(comparable, found)
        case dict():
            return "dict", *[(comparable(key), comparable(part)) for key, part in found.items()]
        case float():
            return "float", "nan" if math.isnan(found) else struct.pack("d", found)
        case complex():
            return "complex", comparable(found.real), comparable(found.imag)
    return type(found).__name__, found


plain_data = st.one_of(
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    st.binary(max_size=3),
    st.none(),
    st.booleans(),
    st.sampled_from([np.float32(2), np.int8(3), np.bool_(True), np.float64(1.5)]),
    st.sampled_from([jnp.bfloat16(1), np.str_("q"), np.bytes_(b"q"), Color.RED, Level.LOW]),
)
state = st.one_of(
    arrays,
    arrays.map(jnp.asarray),
    arrays.map(ckpt.Variable),
    st.integers(0, 3).map(jax.random.key),
    st.builds(lambda: jax.new_ref(jnp.ones(2))),
    arrays.map(lambda array: model([3, ckpt.Variable(array)])),
)


def nested(inner):
    keys = labels | st.sampled_from([Color.RED, Level.LOW, (Level.LOW, "x"), np.int64(7)])
    some, mixed = st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)
    return st.one_of(some, some.map(tuple), mixed, mixed.map(OrderedDict))


containers = nested(st.recursive(plain_data | state, nested, max_leaves=12))


def assert_comes_back(root, expected, get=lambda found: found):
    with tempfile.TemporaryDirectory() as directory:
        path = ckpt.save_object(root, f"{directory}/a")
        assert ckpt.verify(path).ok
        assert comparable(get(ckpt.load_object(path))) == comparable(expected)


@given(containers)
def test_any_container_comes_back(container):
    assert_comes_back(container, container)
    assert_comes_back(ckpt.Checkpoint(parts=container), container, lambda found: found.parts)


@given(containers)
def test_any_container_in_an_attribute_comes_back_if_it_is_state(container):
    root = model(container)
    if "parts" in root.trackable_children():
        assert_comes_back(root, root.parts, lambda found: found.parts)


def deep(levels):
    value = ("x",)
    for _ in range(levels):
        value = (value,)
    return value


@pytest.mark.parametrize("container", [tuple, list, lambda parts: {"a": parts}])
def test_a_marked_element_is_refused_by_name(tmp_path, container):
    parts = container([ckpt.Variable(1.0), ckpt.NoDependency({"a": 1})])
    with pytest.raises(ckpt.UnsaveableError, match=r"parts.*: .*NoDependency"):
        ckpt.save_object(model(parts), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_plain_data_is_refused_by_name_if_it_is_nested_too_deeply_to_be_read_back(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="parts: its element 1: it is nested too"):
        ckpt.save_object(model([ckpt.Variable(1.0), deep(3000)]), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ckpt.UnsaveableError, match="parts: its element 1: plain data is nested"):
        ckpt.save_object(model([ckpt.Variable(1.0), deep(200)]), tmp_path / "a")
    parts = [ckpt.Variable(1.0), deep(90)]
    assert_comes_back(model(parts), parts, lambda found: found.parts)


def test_an_element_that_is_neither_state_nor_plain_data_is_refused_by_name(tmp_path):
    root = model([ckpt.Variable(jnp.zeros(2)), lambda: 0])
    with pytest.raises(ckpt.UnsaveableError, match="parts: its element 1: function is neither"):
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


def test_a_list_that_a_registered_class_makes_empty_comes_back_whole(tmp_path):
    class Net(ckpt.AutoTrackable):
        def __init__(self):
            self.parts, self.table = [], {"width": 3}
            self.layers = [nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "relu"]

    saved = Net()
    saved.parts += [1, ckpt.Variable(2.0), [3]]
    saved.table["v"] = ckpt.Variable(4.0)
    saved.layers[0].kernel[...] = 5.0
    with ckpt.registration_scope():
        ckpt.register_serializable()(Net)
        found = ckpt.load_object(ckpt.save_object(saved, tmp_path / "a"))
    assert type(found) is Net
    assert values(found.parts) == [1, 2.0, [3]]
    assert values(found.table) == {"width": 3, "v": 4.0}
    assert isinstance(found.layers[0], nnx.Linear) and found.layers[1] == "relu"
    assert found.layers[0].kernel[...] == 5.0
    found.parts.append(ckpt.Variable(6.0))
    assert ckpt.TrackableView.children(found)["parts"][-1] is found.parts[-1]
