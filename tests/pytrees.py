"""Containers and leaves of every kind: classes, exact comparison, strategies for whole trees."""

import dataclasses
import enum
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.core import FrozenDict
from hypothesis import strategies as st


class Point(NamedTuple):
    x: Any
    count: Any = None  # also a method of tuples


@dataclasses.dataclass
class Plain:
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    only: Any


@flax.struct.dataclass
class Struct:
    left: Any
    right: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


class Module(eqx.Module):
    weight: Any
    bias: Any
    name: str = eqx.field(static=True, default="static")


class Pair:
    """Registered without keys: its parts have positions only."""

    def __init__(self, one, two):
        self.one, self.two = one, two


jax.tree_util.register_pytree_node(
    Pair, lambda pair: ((pair.one, pair.two), None), lambda _, parts: Pair(*parts)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    value: Any
    unit: str = dataclasses.field(metadata={"static": True}, default="m")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def parts(obj) -> list[tuple[Any, Any]] | None:
    """Label and child of a container, in order; None for a leaf."""
    match obj:
        case FrozenDict():
            return sorted(obj.items())  # the order that JAX, which rebuilds it, gives it
        case dict():
            return list(obj.items())
        case tuple() | list():
            return list(enumerate(obj))
        case Pair():
            return [("one", obj.one), ("two", obj.two)]
    if dataclasses.is_dataclass(obj):
        return [(field.name, getattr(obj, field.name)) for field in dataclasses.fields(obj)]
    return None


def assert_exactly(found, expected, path="root"):
    """The same types, structure, order, dtypes, shapes and bits."""
    assert type(found) is type(expected), path
    if isinstance(expected, jax.Array) and jax.dtypes.issubdtype(
        expected.dtype, jax.dtypes.prng_key
    ):
        assert found.dtype == expected.dtype, path
        found, expected = jax.random.key_data(found), jax.random.key_data(expected)
    if isinstance(expected, jax.Array | np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), path
    elif isinstance(expected, float | complex):
        assert np.array(found).tobytes() == np.array(expected).tobytes(), path
    elif (children := parts(expected)) is not None:
        others = parts(found)
        assert others is not None
        assert [label for label, _ in others] == [label for label, _ in children], path
        kinds = [type(label) for label, _ in others]
        assert kinds == [type(label) for label, _ in children], path
        for (label, child), (_, other) in zip(children, others, strict=True):
            assert_exactly(other, child, f"{path}/{label!r}")
        if isinstance(expected, defaultdict):
            assert found.default_factory is expected.default_factory, path
    else:
        assert found == expected, path


def with_leaves(tree, leaf):
    """A copy of a tree with `leaf(value)` in the place of every value; static fields stay."""
    match tree:
        case None:
            return None
        case defaultdict():
            items = {label: with_leaves(child, leaf) for label, child in tree.items()}
            return defaultdict(tree.default_factory, items)
        case dict() | FrozenDict():
            return type(tree)({label: with_leaves(child, leaf) for label, child in tree.items()})
        case Point():
            return Point(*(with_leaves(child, leaf) for child in tree))
        case tuple() | list():
            return type(tree)(with_leaves(child, leaf) for child in tree)
        case Pair():
            return Pair(with_leaves(tree.one, leaf), with_leaves(tree.two, leaf))
        case Struct() | Module() | Registered() | Plain() | Frozen():
            static = ("name", "unit")
            children = [
                child if label in static else with_leaves(child, leaf)
                for label, child in parts(tree) or []
            ]
            return type(tree)(*children)
    return leaf(tree)


def other_value(value):
    """Something of the same kind, dtype and shape that holds another value."""
    match value:
        case jax.Array():
            return jax.ShapeDtypeStruct(value.shape, value.dtype)
        case np.ndarray():
            return np.zeros(value.shape, value.dtype)
        case np.generic():
            return np.zeros((), value.dtype)[()]
        case enum.Enum():
            return Color.BLUE
    return type(value)()


def as_loaded(tree):
    """What `load` gives: numpy arrays, dicts, lists, tuples, scalars."""
    match tree:
        case jax.Array() if jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(tree))
        case jax.Array():
            return np.asarray(tree)
        case Point():
            return {
                label: as_loaded(child) for label, child in zip(tree._fields, tree, strict=True)
            }
        case Pair():
            return {0: as_loaded(tree.one), 1: as_loaded(tree.two)}
        case list() | tuple():
            return type(tree)(as_loaded(child) for child in tree)
        case FrozenDict():
            return {label: as_loaded(tree[label]) for label in sorted(tree)}
    children = parts(tree)
    if children is None:
        return tree
    static = ("name", "unit") if isinstance(tree, Struct | Module | Registered) else ()
    return {label: as_loaded(child) for label, child in children if label not in static}


_bits = np.random.default_rng(0).bytes(4096)


def array_of(dtype, shape, offset) -> np.ndarray:
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * int(np.prod(shape))
    if dtype == np.bool_:
        return (np.frombuffer(_bits, np.uint8, nbytes, offset) > 127).reshape(shape)
    return np.frombuffer(_bits[offset : offset + nbytes], dtype).reshape(shape)


arrays = st.builds(
    array_of,
    st.sampled_from(["f4", "f2", "i4", "u1", "?", "c8", ml_dtypes.bfloat16]),
    st.sampled_from([(), (0,), (3,), (2, 0), (2, 3)]),
    st.integers(0, 100),
)
leaves = st.one_of(
    arrays,
    arrays.map(jnp.asarray),
    arrays.map(lambda array: array.flat[0] if array.size else array.dtype.type(0)),
    st.integers(0, 3).map(jax.random.key),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from(Color),
)
texts = st.one_of(
    st.sampled_from(["", ".", "..", "/", "a/b", "a.b", ".S", ".E", ".Tint", ".ATTRIBUTES"]),
    st.sampled_from(["0", "1", "-1", "True", "None", "6b", "é", "*", "\n", "\0"]),
    st.sampled_from([".OPTIMIZER_SLOT", "VARIABLE_VALUE", "save_counter"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
labels = st.one_of(
    texts,
    st.integers(-3, 3),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.binary(max_size=2),
)


def containers(inner):
    some = st.lists(inner, max_size=3)
    mixed = st.dictionaries(labels, inner, max_size=4)
    return st.one_of(
        mixed,
        mixed.map(OrderedDict),
        mixed.map(lambda items: defaultdict(list, items)),
        some,
        some.map(tuple),
        st.dictionaries(texts, leaves, max_size=3).map(FrozenDict),  # it would freeze dicts inside
        st.builds(Point, inner, inner),
        st.builds(Plain, inner, inner),
        st.builds(Frozen, inner),
        st.builds(Struct, inner, inner, texts),
        st.builds(Module, leaves, leaves, texts),  # it sorts the keys of what it is given
        st.builds(Pair, inner, inner),
        st.builds(Registered, inner, texts),
    )


trees = st.recursive(leaves, containers, max_leaves=12)
