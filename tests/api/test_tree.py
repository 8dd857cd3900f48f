"""Any pytree comes back exactly, or not at all: save, restore, load and plan_restore."""

import asyncio
import contextlib
import dataclasses
import os
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import FILLER, damage_values, save_unreadable
from flax.core import FrozenDict
from hypothesis import given, settings
from pytrees import as_loaded, assert_exactly, other_value, trees, with_leaves

import ckpt_jax as ckpt

QUICK = ckpt.CheckpointOptions(durable=False)

# --- every kind of container -----------------------------------------------------------


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


def test_keys_keep_their_type_and_live_side_by_side(tmp_path):
    tree = {0: np.array([1]), "0": np.array([2]), "a/b": {"c.d": np.array([3])}, "": np.array([4])}
    path = ckpt.save(tmp_path / "a", tree)
    found = ckpt.load(path)
    assert set(found) == set(tree) and found[0] == 1 and found["0"] == 2
    zeros = iter(np.zeros((4, 1), int))
    target = {0: next(zeros), "0": next(zeros), "a/b": {"c.d": next(zeros)}, "": next(zeros)}
    found = ckpt.restore(path, target)
    assert (found[0], found["0"], found["a/b"]["c.d"], found[""]) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "tree",
    [
        {"empty": jnp.zeros((0, 3)), "none": None, "dict": {}, "list": [], "tuple": ()},
        7,
        {"fp8": jnp.asarray([0.5, -2], jnp.float8_e4m3fn), "int4": jnp.asarray([7, -8], jnp.int4)},
        {"bf16": jnp.asarray([1e-40, jnp.nan], jnp.bfloat16)},
    ],
    ids=["empty", "scalar", "small", "bfloat16"],
)
def test_any_leaf_and_any_node_comes_back_as_it_was(tmp_path, tree):
    found = ckpt.restore(ckpt.save(tmp_path / "a", tree), tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert type(one) is type(other)
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


# --- strictness ------------------------------------------------------------------------

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


def donated() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


def test_a_donated_array_cannot_stand_in_for_what_the_checkpoint_lacks(tmp_path: Path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3)})
    restored = ckpt.restore(path, {"w": donated()})  # it says shape, dtype and sharding
    assert restored["w"].tolist() == [1, 1, 1]
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, {"w": donated(), "new": donated()}, strict=False)
    assert [entry.path for entry in caught.value.report.missing] == ["new"]
    with pytest.raises(ckpt.RestoreMismatchError, match="new"):
        ckpt.Checkpoint(w=jnp.zeros(3), new=donated()).restore(path)


def test_a_plan_says_how_many_bytes_a_restore_reads(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.ones(1000)})
    assert ckpt.plan_restore(path, {"x": np.ones(1000)}).nbytes == 8000


RNG = np.random.default_rng(11)


def layer():
    return {"kernel": RNG.normal(size=(16, 8)).astype(np.float32), "bias": np.ones(8, np.float32)}


def layered(count):
    return {"layers": [layer() for _ in range(count)], "step": 3}


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, tree
    )


def leaves_are_arrays(tree):
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_twelve_layers_do_not_go_into_sixteen_and_every_missing_value_is_named(tmp_path):
    path = ckpt.save(tmp_path / "a", layered(12))
    damage_values(path)
    target = layered(16)
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, target)
    missing = {entry.path for entry in failure.value.report.missing}
    assert missing == {f"layers/{i}/{name}" for i in range(12, 16) for name in ("kernel", "bias")}
    assert all(name in str(failure.value) for name in missing)


def test_sixteen_layers_do_not_go_into_twelve_either(tmp_path):
    path = ckpt.save(tmp_path / "a", layered(16))
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, layered(12))
    assert len(failure.value.report.unexpected) == 8


def test_the_shape_of_a_scanned_layer_is_not_ignored(tmp_path):
    path = ckpt.save(tmp_path / "a", {"layers": jnp.zeros((12, 16, 8)), "pad": np.zeros(1000)})
    damage_values(path)
    target = {"layers": jnp.zeros((16, 16, 8)), "pad": np.zeros(1000)}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"shape \(16, 16, 8\), got \(12, 16, 8\)"):
        ckpt.restore(path, target)


def test_no_abstract_leaf_leaves_a_restore(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3), "pad": np.zeros(1000)})
    damage_values(path)
    whole = {"w": jnp.zeros(3), "new": jnp.zeros(2), "newer": jnp.zeros(2), "pad": np.zeros(1000)}
    for strict in (True, False):
        with pytest.raises(ckpt.RestoreMismatchError) as failure:
            ckpt.restore(path, abstract(whole), strict=strict)
        assert {entry.path for entry in failure.value.report.missing} == {"new", "newer"}


def test_what_the_checkpoint_lacks_keeps_its_own_value_and_not_zeros(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3)})
    target = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "new": jnp.full(2, 7.0)}
    found = ckpt.restore(path, target, strict=False)
    assert leaves_are_arrays(found)
    equal(found, {"w": jnp.ones(3), "new": jnp.full(2, 7.0)})


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


@pytest.mark.parametrize("blank", [np.zeros(5, int), jnp.zeros(5)], ids=["numpy", "jax"])
def test_places_that_hold_one_array_now_each_get_their_own_value(tmp_path, blank):
    saved = {"embed": blank + 1, "head": blank + 2}
    path = ckpt.save(tmp_path / "a", saved)
    assert_exactly(ckpt.restore(path, {"embed": blank, "head": blank}), saved)


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


def test_all_that_cannot_be_saved_is_named_at_once_whatever_the_reason(tmp_path):
    gone = jnp.ones(2)
    gone.delete()
    tree = {"gone": gone, "abstract": jax.ShapeDtypeStruct((2,), "float32"), "odd": object()}
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.save(tmp_path / "a", tree | {"fine": 1})
    for what in ("gone: the array has been deleted", "abstract: .*describes", "odd: .*no view"):
        assert re.search(what, str(raised.value))
    assert not (tmp_path / "a").exists()
    path = ckpt.save(tmp_path / "b", {"gone": np.full(2, 3.0, np.float32)})
    assert ckpt.restore(path, {"gone": gone})["gone"].tolist() == [3, 3]  # as a target it will do


def test_arrays_of_numpy_that_the_target_holds_apart_stay_apart(tmp_path):
    one = np.ones(3)
    path = ckpt.save(tmp_path / "a", {"a": one, "b": one, "c": [one]})
    together = np.zeros(3)
    found = ckpt.restore(path, {"a": together, "b": np.zeros(3), "c": [together]})
    found["a"] *= 2
    assert (found["b"].tolist(), found["c"][0].tolist()) == ([1, 1, 1], [2, 2, 2])
    checkpoint = ckpt.Checkpoint(a=np.zeros(3), b=np.zeros(3), c=[np.zeros(3)])
    checkpoint.read(path).assert_consumed()
    checkpoint.a *= 2
    assert checkpoint.b.tolist() == checkpoint.c[0].tolist() == [1, 1, 1]


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


def test_a_path_with_a_backslash_is_refused_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(ckpt.CheckpointError, match="backslash"):
        ckpt.save(tmp_path / "a\\b", {"w": jnp.ones(2)})
    assert not any(tmp_path.iterdir())


def test_a_file_above_a_path_is_said_to_be_one(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="file"):
        ckpt.save(tmp_path / "file" / "a", {"w": jnp.ones(2)})
    with pytest.raises(ckpt.CheckpointNotFoundError, match="file is a file"):
        ckpt.load(tmp_path / "file" / "a")


def test_a_directory_may_be_reached_by_a_symbolic_link(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    ckpt.save(tmp_path / "link" / "a", {"x": 1})
    assert ckpt.load(real / "a") == {"x": 1}


def test_overwriting_a_symbolic_link_to_a_checkpoint_leaves_a_whole_one(tmp_path):
    ckpt.save(tmp_path / "real", {"x": 1})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with contextlib.suppress(FileExistsError):
        ckpt.save(tmp_path / "link", {"x": 2}, overwrite=True)
    assert ckpt.load(tmp_path / "link") in ({"x": 1}, {"x": 2})
    assert not list(tmp_path.glob("*.staging-*"))


def test_a_long_name_is_used_or_refused(tmp_path):
    name = "a" * 240
    try:
        path = ckpt.save(tmp_path / name, {"x": 1})
    except OSError:
        return
    assert ckpt.load(path) == {"x": 1}


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


def test_a_function_in_any_other_tree_is_named(tmp_path: Path):
    with pytest.raises(ckpt.UnsaveableError, match=r"layers/1: .*function has no view"):
        ckpt.save(tmp_path / "a", {"layers": [jnp.ones(2), lambda x: x]})


def test_what_cannot_be_saved_is_named_before_a_byte_is_written(tmp_path):
    tree = {"w": np.ones(3), "bad": {"objects": np.array([object()]), "file": sys.stdin}}
    with pytest.raises(ckpt.UnsaveableError, match=r"(?s)bad/objects.*bad/file") as failure:
        ckpt.save(tmp_path / "a", tree)
    assert {path for path, _ in failure.value.problems} == {"bad/objects", "bad/file"}
    assert list(tmp_path.iterdir()) == []
