"""Any pytree comes back exactly, or not at all: save, restore, load and plan_restore."""

import asyncio
import dataclasses
import enum
import os
import re
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_jax as ckpt

# --- every kind of container -----------------------------------------------------------


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
        case enum.Enum():
            return tree.name
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
QUICK = ckpt.CheckpointOptions(durable=False)


@given(trees)
@settings(max_examples=100)
def test_any_pytree_restores_into_a_target_of_its_structure(tmp_path_factory, tree):
    path = ckpt.save(tmp_path_factory.mktemp("x") / "a", tree, options=QUICK)
    assert_exactly(ckpt.restore(path, with_leaves(tree, other_value)), tree)
    assert ckpt.plan_restore(path, tree).exact


@given(trees)
@settings(max_examples=100)
def test_any_pytree_loads_as_plain_containers(tmp_path_factory, tree):
    path = ckpt.save(tmp_path_factory.mktemp("x") / "a", tree, options=QUICK)
    assert_exactly(ckpt.load(path), as_loaded(tree))


@given(trees)
@settings(max_examples=50)
def test_treedefs_are_those_of_the_target(tmp_path_factory, tree):
    try:
        treedef = jax.tree.structure(tree)
    except (TypeError, ValueError):
        return  # JAX itself cannot sort keys of mixed types
    path = ckpt.save(tmp_path_factory.mktemp("x") / "a", tree, options=QUICK)
    assert jax.tree.structure(ckpt.restore(path, tree)) == treedef


@pytest.mark.parametrize("empty", [{}, [], (), None, OrderedDict(), FrozenDict(), {"a": {}}, [[]]])
def test_a_tree_without_values_comes_back(tmp_path, empty):
    path = ckpt.save(tmp_path / "a", empty)
    assert_exactly(ckpt.restore(path, empty), empty)
    assert_exactly(ckpt.load(path), as_loaded(empty))


@pytest.mark.parametrize("leaf", [3, "text", b"", 1.5, np.arange(3), np.float32(2), True])
def test_a_single_value_is_a_tree(tmp_path, leaf):
    path = ckpt.save(tmp_path / "a", leaf)
    assert_exactly(ckpt.load(path), leaf)
    assert_exactly(ckpt.restore(path, other_value(leaf)), leaf)


def test_int_and_text_keys_live_side_by_side(tmp_path):
    tree = {0: 1, "0": 2, True: 0, b"k": 3, "6b": 4, None: 5, "None": 6, 0.5: 7, "0.5": 8}
    path = ckpt.save(tmp_path / "a", tree)
    assert_exactly(ckpt.load(path), tree)
    assert_exactly(ckpt.restore(path, dict.fromkeys(tree, 0)), tree)


def test_joined_names_do_not_collide(tmp_path):
    tree = {"a.b": 1, "a": {"b": 2, ".b": 3}, "a/b": 4, "a.": {"b": 5}, "a.Sb": 6}
    path = ckpt.save(tmp_path / "a", tree)
    assert_exactly(ckpt.load(path), tree)
    assert_exactly(ckpt.restore(path, with_leaves(tree, other_value)), tree)


def test_a_deep_tree_comes_back(tmp_path):
    tree: Any = 7
    for _ in range(3000):
        tree = [tree]
    found = ckpt.load(ckpt.save(tmp_path / "a", tree))
    for _ in range(3000):
        (found,) = found
    assert found == 7


def test_a_list_restores_into_a_tuple(tmp_path):
    path = ckpt.save(tmp_path / "a", {"layers": [1, 2]})
    assert ckpt.restore(path, {"layers": (0, 0)}) == {"layers": (1, 2)}


# --- strictness ------------------------------------------------------------------------

FILLER = np.zeros(1000)
SAVED = {
    "params": {"w": jnp.ones((2, 3)), "b": np.zeros(3, np.float32), "gone": jnp.ones(4)},
    "step": 7,
    "name": "run",
    "old": [1, 2],
    "filler": FILLER,
}
TARGET = {
    "params": {"w": jnp.ones((3, 2)), "b": np.zeros(3, np.float64), "new": jnp.ones(4)},
    "step": 7.5,
    "name": b"run",
    "old": [1],
    "more": jax.ShapeDtypeStruct((2,), jnp.float32),
    "filler": FILLER,
}


def save_unreadable(path, tree):
    """Saves a tree and inverts bits of every byte of its values: reading any of them fails.

    The filler keeps the values from being so small that they lie among the metadata.
    """
    path = ckpt.save(path, {**tree, "filler": FILLER})
    damage_values(path)
    return path


def damage_values(path):
    files = [file for file in Path(path).glob("shards/*/d/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(bytes(b ^ 0x5A for b in file.read_bytes()))
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)


def paths_of(entries):
    return sorted(entry.path for entry in entries)


def test_every_difference_is_reported_together_before_a_byte_is_read(tmp_path):
    path = ckpt.save(tmp_path / "a", SAVED)
    damage_values(path)
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, TARGET)
    report = raised.value.report
    assert paths_of(report.mismatched) == ["name", "params/b", "params/w", "step"]
    assert paths_of(report.missing) == ["more", "params/new"]
    assert paths_of(report.unexpected) == ["old/1", "params/gone"]
    for entry in (*report.mismatched, *report.missing, *report.unexpected):
        assert entry.path in str(raised.value)
    assert "expected shape (3, 2), got (2, 3)" in str(raised.value)
    assert "expected dtype float64, got float32" in str(raised.value)
    assert path in str(raised.value)


def test_planning_a_restore_reads_no_value_and_reports_the_same(tmp_path):
    path = ckpt.save(tmp_path / "a", SAVED)
    damage_values(path)
    report = ckpt.plan_restore(path, TARGET)
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, TARGET)
    assert dataclasses.replace(report, nbytes=0) == raised.value.report
    assert report.nbytes > 0
    assert not report.exact
    assert ckpt.plan_restore(path, SAVED).exact


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"w": jnp.ones((4, 2))}, "w"),
        ({"w": jnp.ones((2, 4), jnp.bfloat16)}, "w"),
        ({"w": np.ones((2, 4), np.float64)}, "w"),
        ({"w": jax.ShapeDtypeStruct((2, 5), jnp.float32)}, "w"),
        ({"w": 1.0}, "w"),
        ({"w": "text"}, "w"),
        ({"w": None}, "w"),
        ({"w": {"kernel": jnp.ones((2, 4))}}, "w"),
        ({"extra": jnp.ones(())}, "extra"),
        ({"extra": 3}, "extra"),
        ({"step": "7"}, "step"),
        ({"step": True}, "step"),
        ({"step": jnp.zeros((1,), jnp.int32)}, "step"),
        ({"step": jnp.float32(0)}, "step"),
        ({"step": None}, "step"),
        ({"step": jax.random.key(0)}, "step"),
    ],
)
def test_one_difference_is_enough_to_refuse(tmp_path, change, where):
    saved = {"w": jnp.ones((2, 4)), "step": 7}
    path = save_unreadable(tmp_path / "a", saved)
    with pytest.raises(ckpt.RestoreMismatchError, match=rf"\b{where}\b"):
        ckpt.restore(path, {**saved, **change, "filler": FILLER})


def test_layers_that_the_checkpoint_lacks_are_missing(tmp_path):
    path = ckpt.save(tmp_path / "a", {"layers": [jnp.full(2, i) for i in range(12)]})
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, {"layers": [jnp.zeros(2, jnp.int32) for _ in range(16)]})
    assert paths_of(raised.value.report.missing) == [f"layers/{i}" for i in range(12, 16)]


def test_a_missing_value_names_what_looks_most_like_it(tmp_path):
    path = ckpt.save(tmp_path / "a", {"decoder": {"kernel": jnp.ones(3)}})
    with pytest.raises(ckpt.RestoreMismatchError, match="nearest: decoder/kernel"):
        ckpt.restore(path, {"decoder": {"kernels": jnp.ones(3)}})


def test_lenient_keeps_the_targets_own_values_and_drops_the_rest(tmp_path):
    path = ckpt.save(tmp_path / "a", {"both": 1, "saved": 2})
    target = {"both": 0, "own": np.arange(3)}
    found = ckpt.restore(path, target, strict=False)
    assert_exactly(found, {"both": 1, "own": np.arange(3)})


def test_lenient_still_refuses_shapes_dtypes_and_kinds(tmp_path):
    path = ckpt.save(tmp_path / "a", SAVED)
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, {**TARGET, "more": 0}, strict=False)
    report = raised.value.report
    assert paths_of(report.mismatched) == ["name", "params/b", "params/w", "step"]
    assert not report.missing
    assert not report.unexpected


def test_no_abstract_leaf_leaves_a_lenient_restore(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1})
    target = {"a": 0, "b": [jax.ShapeDtypeStruct((2,), jnp.float32)], "c": 5}
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, target, strict=False)
    assert paths_of(raised.value.report.missing) == ["b/0"]


def test_a_partial_target_is_refused_unless_lenient(tmp_path):
    path = ckpt.save(tmp_path / "a", {"params": {"w": jnp.ones(3)}, "opt": {"m": jnp.ones(3)}})
    target = {"params": {"w": jnp.zeros(3)}}
    with pytest.raises(ckpt.RestoreMismatchError, match="opt/m"):
        ckpt.restore(path, target)
    assert_exactly(ckpt.restore(path, target, strict=False), {"params": {"w": jnp.ones(3)}})


def test_a_functional_restore_ignores_only_the_save_counter_of_a_checkpoint(tmp_path):
    path = ckpt.Checkpoint(w=jnp.ones(3)).save(tmp_path / "ckpt")
    assert_exactly(ckpt.restore(path, {"w": jnp.zeros(3)}), {"w": jnp.ones(3)})
    with pytest.raises(ckpt.RestoreMismatchError, match="w"):
        ckpt.restore(path, {})


# --- rename ----------------------------------------------------------------------------


def test_rename_moves_values_and_containers(tmp_path):
    saved = {"encoder": {"dense": {"w": 1, "b": 2}}, "head": [3, 4], "step": 5}
    path = ckpt.save(tmp_path / "a", saved)
    rules = [("encoder/dense", "trunk/linear"), ("head/*", "heads/*"), ("step", "count")]
    target = {"trunk": {"linear": {"w": 0, "b": 0}}, "heads": [0, 0], "count": 0}
    found = ckpt.restore(path, target, rename=rules)
    assert found == {"trunk": {"linear": {"w": 1, "b": 2}}, "heads": [3, 4], "count": 5}
    report = ckpt.plan_restore(path, target, rename=rules)
    assert {entry.path: entry.saved_path for entry in report.renamed} == {
        "trunk/linear/w": "encoder/dense/w",
        "trunk/linear/b": "encoder/dense/b",
        "heads/0": "head/0",
        "heads/1": "head/1",
        "count": "step",
    }


def test_the_first_rename_rule_that_matches_counts(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1, "b": 2})
    rules = [("a", "x"), ("*", "y")]
    assert ckpt.restore(path, {"x": 0, "y": 0}, rename=rules) == {"x": 1, "y": 2}


def test_names_can_be_swapped(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1, "b": 2})
    rules = [("a", "b"), ("b", "a")]
    assert ckpt.restore(path, {"a": 0, "b": 0}, rename=rules) == {"a": 2, "b": 1}


def test_a_regular_expression_renames(tmp_path):
    path = ckpt.save(tmp_path / "a", {"layer_0": {"w": 1}, "layer_1": {"w": 2}})
    rules = [(re.compile(r"layer_(\d+)/w"), r"layers/\1/kernel")]
    found = ckpt.restore(path, {"layers": [{"kernel": 0}, {"kernel": 0}]}, rename=rules)
    assert found == {"layers": [{"kernel": 1}, {"kernel": 2}]}


def test_a_rename_rule_that_matches_nothing_is_refused(tmp_path):
    path = save_unreadable(tmp_path / "a", {"a": 1})
    with pytest.raises(ckpt.RestoreMismatchError, match="typo.*matches nothing"):
        ckpt.restore(path, {"a": 0, "filler": FILLER}, rename=[("typo", "a")])


def test_two_values_that_land_on_one_name_are_refused(tmp_path):
    path = save_unreadable(tmp_path / "a", {"a": 1, "b": 2})
    with pytest.raises(ckpt.RestoreMismatchError, match="two saved values would be called b"):
        ckpt.restore(path, {"b": 0, "filler": FILLER}, rename=[("a", "b")])
    with pytest.raises(ckpt.RestoreMismatchError, match="two saved values would be called c"):
        ckpt.restore(path, {"c": 0, "filler": FILLER}, rename=[("?", "c")])


# --- load ------------------------------------------------------------------------------


@pytest.fixture
def train_state(tmp_path):
    """(path, tree): parameters of 4 MB and an optimizer state of 8 MB."""
    w = np.random.default_rng(1).normal(size=(1024, 1024)).astype(np.float32)
    tree = {
        "params": {"dense": {"kernel": w, "bias": w[0]}},
        "opt_state": [(w + 1, w + 2), None, {}],
        "step": 9,
    }
    return ckpt.save(tmp_path / "a", tree), tree


def test_only_reads_nothing_else(train_state):
    path, tree = train_state
    assert_exactly(ckpt.load(path, only="params/**"), {"params": tree["params"]})
    for file in sorted(Path(path).glob("shards/*/d/*"), key=lambda file: -file.stat().st_size):
        assert file.stat().st_size  # what only= reads can be told from what it leaves
    assert ckpt.load(path, only="step") == {"step": 9}
    assert_exactly(
        ckpt.load(path, only=["step", "**/bias"]),
        {"params": {"dense": {"bias": tree["params"]["dense"]["bias"]}}, "step": 9},
    )
    assert_exactly(
        ckpt.load(path, only=lambda name: name.endswith("0/1")),
        {"opt_state": {0: {1: tree["opt_state"][0][1]}}},
    )
    assert ckpt.load(path, only=re.compile("st.p")) == {"step": 9}


def test_reading_one_value_costs_its_bytes(train_state):
    path, tree = train_state
    with ckpt.load_checkpoint(path) as reader:
        graph = reader.object_graph
        assert reader.get_variable_to_shape_map()
        assert reader.bytes_read == 0
        key = "params/dense/kernel/.ATTRIBUTES/VARIABLE_VALUE"
        assert key in graph.by_key
        assert_exactly(reader.get_tensor(key), tree["params"]["dense"]["kernel"])
        nbytes = tree["params"]["dense"]["kernel"].nbytes
        assert nbytes <= reader.bytes_read < 1.1 * nbytes


def test_only_that_selects_nothing_raises(train_state):
    path, _ = train_state
    with pytest.raises(KeyError, match=r"prams.*It has opt_state, params, step"):
        ckpt.load(path, only="prams/**")


def test_sharding_places_what_is_loaded(tmp_path, mesh42):
    tree = {"w": np.arange(16.0, dtype=np.float32).reshape(8, 2), "b": np.ones(4), "step": 3}
    path = ckpt.save(tmp_path / "a", tree)
    replicated = NamedSharding(mesh42, PartitionSpec())
    rows = NamedSharding(mesh42, PartitionSpec("data"))
    found = ckpt.load(path, only=["w", "step"], sharding=rows)
    assert found["w"].sharding == rows
    assert_exactly(np.asarray(found["w"]), tree["w"])
    assert_exactly(found["step"], 3)
    asked = {}

    def choose(name, struct):
        asked[name] = struct.shape, struct.dtype
        return {"w": rows}.get(name)

    found = ckpt.load(path, sharding=choose)
    assert asked == {"w": ((8, 2), np.float32), "b": ((4,), np.float64)}
    assert found["w"].sharding == rows
    assert_exactly(found["b"], tree["b"])
    assert ckpt.load(path, only="w", sharding=replicated)["w"].sharding == replicated


def test_a_sharding_that_does_not_divide_is_reported_with_the_path(tmp_path, mesh8: Mesh):
    path = save_unreadable(tmp_path / "a", {"layers": [np.ones(12, np.float32)]})
    rows = NamedSharding(mesh8, PartitionSpec("data"))
    with pytest.raises(ckpt.RestoreMismatchError, match="layers/0"):
        ckpt.load(path, sharding=rows)


# --- identity --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_tied_arrays_are_saved_once_and_tied_again(tmp_path, kind):
    table, same = (kind(np.random.default_rng(2).normal(size=4096)) for _ in range(2))
    tree = {"embed": table, "head": {"kernel": table}, "copy": same}
    path = ckpt.save(tmp_path / "a", tree)
    with ckpt.load_checkpoint(path) as reader:
        assert len(reader.keys()) == 2
    blank = kind(np.zeros(4096))
    for found in (
        ckpt.load(path),
        ckpt.restore(
            path, {"embed": blank, "head": {"kernel": blank}, "copy": kind(np.ones(4096))}
        ),
    ):
        assert found["embed"] is found["head"]["kernel"]
        assert found["embed"] is not found["copy"]
        np.testing.assert_array_equal(found["embed"], table)


def test_tied_arrays_restore_into_a_target_that_does_not_tie_them(tmp_path):
    table = np.arange(5)
    path = ckpt.save(tmp_path / "a", {"embed": table, "head": table})
    target = {"embed": np.zeros(5, int), "head": np.zeros(5, int)}
    assert_exactly(ckpt.restore(path, target), {"embed": table, "head": table})


def test_arrays_that_differ_do_not_restore_into_one(tmp_path):
    path = save_unreadable(tmp_path / "a", {"embed": np.arange(5), "head": np.ones(5, int)})
    blank = np.zeros(5, int)
    with pytest.raises(ckpt.RestoreMismatchError, match="two values.*embed and head; a copy or"):
        ckpt.restore(path, {"embed": blank, "head": blank, "filler": FILLER})


def test_equal_scalars_and_abstract_leaves_are_not_tied(tmp_path):
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    path = ckpt.save(tmp_path / "a", {"a": jnp.zeros(2), "b": jnp.ones(2), "c": 1, "d": 2})
    found = ckpt.restore(path, {"a": spec, "b": spec, "c": 0, "d": 0})
    assert_exactly(found, {"a": jnp.zeros(2), "b": jnp.ones(2), "c": 1, "d": 2})


def test_the_callers_containers_and_arrays_are_never_changed(tmp_path):
    shared = [np.arange(3), {"x": 1}]
    tree = {"a": shared, "b": (shared, OrderedDict(z=2, y=np.ones(2)))}
    before = with_leaves(tree, lambda leaf: np.copy(leaf) if isinstance(leaf, np.ndarray) else leaf)
    path = ckpt.save(tmp_path / "a", tree)
    target = with_leaves(tree, other_value)
    objects = [id(x) for x in (target, target["a"], target["a"][0], target["a"][1], target["b"])]
    blank = with_leaves(target, np.copy)
    found = ckpt.restore(path, target)
    assert_exactly(tree, before)
    assert_exactly(with_leaves(target, np.copy), blank)
    assert objects == [
        id(x) for x in (target, target["a"], target["a"][0], target["a"][1], target["b"])
    ]
    assert not np.shares_memory(found["a"][0], target["a"][0])
    assert found["a"] is not target["a"]


def test_what_was_loaded_belongs_to_the_caller(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": np.zeros(3), "b": np.zeros(3)})
    for read in (
        lambda: ckpt.load(path),
        lambda: ckpt.restore(path, {k: np.ones(3) for k in "ab"}),
    ):
        found = read()
        found["a"] += 1
        assert found["b"].tolist() == [0, 0, 0]
        assert read()["a"].tolist() == [0, 0, 0]


def test_a_save_holds_the_values_of_its_own_moment(tmp_path):
    tree = {"w": np.zeros(1000), "nested": [np.zeros(3, np.int8)], "step": 0}
    paths = []
    for step in range(5):
        tree["w"] += 1
        tree["nested"][0] += 1
        tree["step"] += 1
        paths.append(ckpt.save(tmp_path / f"a-{step}", tree))
    for step, path in enumerate(paths):
        found = ckpt.load(path)
        assert (found["w"] == step + 1).all()
        assert (found["nested"][0] == step + 1).all()
        assert found["step"] == step + 1


# --- paths and overwriting -------------------------------------------------------------


def files_below(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in Path(directory).rglob("*")
        if file.is_file()
    }


def test_an_existing_checkpoint_is_kept_unless_asked(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    before = files_below(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ckpt.save(path, {"x": 2})
    assert files_below(tmp_path) == before


def test_overwriting_replaces_the_whole_checkpoint(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.ones(100_000), "gone": 1})
    assert ckpt.save(path, {"x": 2}, overwrite=True) == path
    assert ckpt.load(path) == {"x": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_failed_overwrite_leaves_the_old_checkpoint(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    before = files_below(tmp_path)
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.save(path, {"x": object()}, overwrite=True)

    def failing(slices):
        raise RuntimeError("no policy today")

    with pytest.raises(RuntimeError, match="no policy today"):
        options = ckpt.CheckpointOptions(sharding_policy=failing)
        ckpt.save(path, {"x": 2}, overwrite=True, options=options)
    assert files_below(tmp_path) == before


def test_a_failure_in_the_middle_of_writing_leaves_nothing_behind(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    before = files_below(tmp_path)

    class Table:
        pass

    def save_fn(objects, prefix):
        ckpt.io.write_shard(prefix, {"rows": np.arange(5)})
        raise RuntimeError("disk on fire")

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Table",
            predicate=lambda obj: isinstance(obj, Table),
            save_fn=save_fn,
            restore_fn=lambda objects, prefix: None,
        )
        ckpt.register_view(Table, children=lambda obj: {}, rebuild=lambda obj, children: obj)
        for name in ("a", "b"):
            with pytest.raises(RuntimeError, match="disk on fire"):
                ckpt.save(tmp_path / name, {"t": Table(), "x": 2}, overwrite=True)
    assert files_below(tmp_path) == before
    assert ckpt.load(path) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, overwrite):
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    before = files_below(tmp_path)
    for name in ("directory", "file"):
        with pytest.raises(FileExistsError, match=name):
            ckpt.save(tmp_path / name, {"x": 1}, overwrite=overwrite)
    assert files_below(tmp_path) == before


def test_an_empty_directory_may_be_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    assert ckpt.load(ckpt.save(tmp_path / "a", {"x": 1})) == {"x": 1}


def test_directories_on_the_way_are_made(tmp_path):
    assert ckpt.load(ckpt.save(tmp_path / "deep" / "er" / "a", {"x": 1})) == {"x": 1}


def test_paths_may_be_relative_and_path_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ckpt.save("a", {"x": 1}) == "a"
    assert ckpt.load("a") == {"x": 1}
    assert ckpt.restore(Path("a"), {"x": 0}) == {"x": 1}
    assert ckpt.save(Path("b") / "c", {"x": 2}) == os.path.join("b", "c")
    assert ckpt.load("b/c/") == {"x": 2}
    assert ckpt.plan_restore("./b/c", {"x": 0}).exact


def test_all_works_inside_a_running_event_loop(tmp_path):
    async def program():
        path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3)})
        return ckpt.restore(path, {"w": jnp.zeros(3)}), ckpt.load(path)

    restored, loaded = asyncio.run(program())
    assert_exactly(restored, {"w": jnp.ones(3)})
    assert_exactly(loaded, {"w": np.ones(3, np.float32)})


@pytest.mark.parametrize("how", ["cp -r", "mv"])
def test_a_copied_or_moved_checkpoint_stays_valid(tmp_path, how):
    tree = {"w": np.arange(200_000), "s": "text"}
    path = ckpt.save(tmp_path / "a", tree)
    (tmp_path / "other").mkdir()
    assert os.system(f"{how} '{path}' '{tmp_path}/other/b'") == 0
    assert_exactly(ckpt.load(tmp_path / "other" / "b"), tree)


# --- what cannot be saved --------------------------------------------------------------


def test_everything_that_cannot_be_saved_is_named_at_once(tmp_path):
    tree = {
        "good": jnp.ones(3),
        "set": {1, 2},
        "layers": [{"act": jnp.tanh}, {"obj": np.array([object()])}],
    }
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.save(tmp_path / "a", tree)
    assert sorted(path for path, _ in raised.value.problems) == [
        "layers/0/act",
        "layers/1/obj",
        "set",
    ]
    for path, _ in raised.value.problems:
        assert path in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_the_directories_on_the_way_are_not_made_for_what_cannot_be_saved(tmp_path):
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.save(tmp_path / "new" / "a", {"x": object()})
    assert list(tmp_path.iterdir()) == []
