"""Looking at checkpoints and at programs without restoring anything."""

import logging

import jax.numpy as jnp
import pytest
from trackables import Model, Optimizer, var

import ckpt_jax as ckpt


@pytest.mark.behaviour(105, 106)
def test_a_checkpoint_view_lists_children_and_descendants(prefix):
    root = Model(leaf=Model())
    saved = ckpt.Checkpoint(root).save(prefix)
    view = ckpt.CheckpointView(saved)
    assert view.children(0) == {"leaf": 1, "save_counter": 2}
    assert view.descendants() == [0, 1, 2]


@pytest.mark.behaviour(107)
def test_a_checkpoint_view_matches_a_tree_that_is_partly_the_same(path):
    saved = Model(a=Model(c=Model(), d=Model()), b=Model(e=Model(), f=Model()))
    ckpt.Checkpoint(saved).write(path)
    fresh = Model(a=Model(d=Model()), b=Model(f=Model()))
    view = ckpt.CheckpointView(path)
    matched = view.match(fresh)
    expected = {0: fresh, 1: fresh.a, 2: fresh.b, 4: fresh.a.d, 6: fresh.b.f}
    assert matched.keys() == expected.keys()
    assert all(matched[node] is obj for node, obj in expected.items())
    fresh.new = new = Model()
    assert view.diff(fresh)[1:] == ([3, 5], [new])


@pytest.mark.behaviour(108)
def test_one_saved_object_under_two_names_matches_the_first_candidate(path):
    shared = Model()
    ckpt.Checkpoint(Model(a=shared, b=shared)).write(path)
    fresh = Model(a=Model(), b=Model())
    assert ckpt.CheckpointView(path).match(fresh)[1] is fresh.a


@pytest.mark.behaviour(109, 110, 188)
def test_a_trackable_view_lists_children_and_descendants():
    leaf = Model()
    root = Model(leaf=leaf)
    assert ckpt.TrackableView.children(root) == {"leaf": leaf}
    assert ckpt.TrackableView(root).descendants() == [root, leaf]
    assert ckpt.list_objects(root) == [root, leaf]


def test_a_tree_can_be_viewed_though_it_cannot_be_referred_to_weakly():
    tree = {"a": jnp.ones(2)}
    view = ckpt.TrackableView(tree)
    assert view.root is tree
    assert [type(obj) for obj in view.descendants()] == [dict, type(tree["a"])]


@pytest.mark.behaviour(108)
def test_an_ambiguous_match_is_logged(path, caplog):
    shared = Model()
    ckpt.Checkpoint(Model(a=shared, b=shared)).write(path)
    with caplog.at_level(logging.WARNING):
        ckpt.CheckpointView(path).match(Model(a=Model(), b=Model()))
    assert "Inconsistent references" in caplog.text


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


def test_a_slot_variable_with_children_keeps_its_path_in_the_file(path):
    """object_keys does not walk on from slot variables: '.N4' instead of '.../f/row'."""
    v = var(1.0)
    optimizer = Optimizer(0.1)
    optimizer.state["f", v] = {"row": jnp.ones(2), "col": jnp.ones(3)}
    checkpoint = ckpt.Checkpoint(opt=optimizer, v=v)
    checkpoint.write(path)
    assert ckpt.object_metadata(path).object_keys == checkpoint._trace().graph.object_keys
