"""Saving and restoring objects."""

import copy
import gc
import os
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from descriptors import open_files
from trackables import Model, value, var

import ckpt_jax as ckpt
from ckpt_jax.objects.pending import pending_names


class Position(ckpt.PythonState):
    def __init__(self, index=0):
        self.index = index

    def serialize(self):
        return str(self.index)

    def deserialize(self, value):
        self.index = int(value)


class Pair(ckpt.Trackable):
    """Two named values in one object."""

    def __init__(self, v1=0.0, v2=0.0):
        self.v1, self.v2 = jnp.float32(v1), jnp.float32(v2)

    def serialize_to_arrays(self):
        return {"v1": self.v1, "v2": self.v2}

    def restore_from_arrays(self, arrays):
        self.v1, self.v2 = arrays["v1"], arrays["v2"]


class Optimizer(ckpt.AutoTrackable):
    """Keeps a slot "m" for each variable it is given."""

    def __init__(self, rate, *variables, value=0.0):
        self.rate = ckpt.Variable(rate)
        self.state = ckpt.NoDependency({("m", v): var(value) for v in variables})

    def slots(self):
        return self.state


@pytest.fixture
def prefix(tmp_path):
    return str(tmp_path / "ckpt")


# --- write and read, save and restore ---------------------------------------------------


def test_what_was_written_is_read_back(path):
    ckpt.Checkpoint(v=var([1.0, 2.0]), p=Position(7), step=3).write(path)
    fresh = ckpt.Checkpoint(v=var([0.0, 0.0]), p=Position(), step=0)
    fresh.read(path).assert_consumed()
    assert (value(fresh.v), fresh.p.index, fresh.step) == ([1.0, 2.0], 7, 3)


def test_objects_are_restored_in_place_and_pytrees_are_rebuilt(path):
    ckpt.Checkpoint(v=var(1.0), tree={"w": jnp.ones(2)}).write(path)
    v, tree = var(0.0), {"w": jnp.zeros(2)}
    fresh = ckpt.Checkpoint(v=v, tree=tree)
    fresh.read(path).assert_consumed()
    assert fresh.v is v and value(v) == 1.0
    assert fresh.tree["w"].tolist() == [1.0, 1.0]
    assert fresh.tree is not tree and tree["w"].tolist() == [0.0, 0.0]


@pytest.mark.behaviour(24)
def test_write_returns_exactly_the_path_that_it_was_given(path):
    checkpoint = ckpt.Checkpoint(v=var(0.0))
    for step in (0, 2, 4, 6, 8):
        checkpoint.v.assign(np.float32(step))
        assert checkpoint.write(f"{path}-{step}") == f"{path}-{step}"
    checkpoint.read(f"{path}-4").assert_consumed()
    assert value(checkpoint.v) == 4.0


def test_write_leaves_the_counter_and_the_state_file_alone(tmp_path, path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    checkpoint.write(path)
    assert checkpoint.save_counter == 0
    assert os.listdir(tmp_path) == ["written"]
    with ckpt.load_checkpoint(path) as reader:
        assert reader.keys() == ["v/.ATTRIBUTES/VARIABLE_VALUE"]


def test_write_replaces_what_it_wrote_before(path):
    checkpoint = ckpt.Checkpoint(v=var(1.0), w=var(2.0))
    checkpoint.write(path)
    ckpt.Checkpoint(v=var(5.0)).write(path)
    assert ckpt.load(path) == {"v": 5.0}


def test_saves_are_numbered_by_the_counter_which_is_saved_with_them(prefix):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    assert checkpoint.save_counter == 0
    assert [checkpoint.save(prefix) for _ in range(2)] == [f"{prefix}-1", f"{prefix}-2"]
    assert checkpoint.save_counter == 2
    fresh = ckpt.Checkpoint(v=var(0.0))
    fresh.restore(f"{prefix}-1").assert_consumed()
    assert fresh.save_counter == 1
    assert fresh.save(f"{prefix}-again") == f"{prefix}-again-2"


def test_a_save_that_failed_leaves_no_trace(tmp_path, prefix):
    checkpoint = ckpt.Checkpoint(p=Position())
    checkpoint.p.serialize = lambda: 3
    with pytest.raises(ckpt.UnsaveableError, match=r"p: .*must return str or bytes, got int"):
        checkpoint.save(prefix)
    assert checkpoint.save_counter == 0
    assert os.listdir(tmp_path) == []
    del checkpoint.p.serialize
    assert checkpoint.save(prefix) == f"{prefix}-1"


@pytest.mark.behaviour(64, 84, 85)
def test_paths_may_be_path_objects(tmp_path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    saved = checkpoint.save(tmp_path / "deep" / "er" / "ckpt")
    written = checkpoint.write(tmp_path / "written")
    assert (saved, written) == (str(tmp_path / "deep/er/ckpt-1"), str(tmp_path / "written"))
    checkpoint.v.assign(np.float32(0.0))
    checkpoint.restore(Path(saved)).assert_consumed()
    assert value(checkpoint.v) == 1.0
    ckpt.Checkpoint(v=var(0.0)).restore(Path(written)).assert_consumed()


def test_read_and_write_do_not_go_with_save_and_restore(path):
    """A restore makes a counter, which a written checkpoint does not have."""
    ckpt.Checkpoint(v=var(1.0)).write(path)
    fresh = ckpt.Checkpoint(v=var(0.0))
    status = fresh.restore(path)
    assert value(fresh.v) == 1.0
    with pytest.raises(AssertionError, match="save_counter"):
        status.assert_existing_objects_matched()


@pytest.mark.behaviour(74)
def test_a_missing_checkpoint_is_reported_with_those_that_exist(prefix):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    checkpoint.save(prefix)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-1") as caught:
        checkpoint.restore(prefix)
    assert isinstance(caught.value, FileNotFoundError)
    assert value(checkpoint.v) == 1.0


@pytest.mark.behaviour(61)
def test_restoring_from_nothing_is_legal_but_matches_nothing():
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    status = checkpoint.restore(None)
    assert status.initialize_or_restore() is status
    assert status.expect_partial() is status
    for assertion in (
        status.assert_consumed,
        status.assert_existing_objects_matched,
        status.assert_nontrivial_match,
    ):
        with pytest.raises(AssertionError, match="No checkpoint specified"):
            assertion()
    assert value(checkpoint.v) == 1.0 and checkpoint.save_counter == 0
    assert not status.report.restored


@pytest.mark.behaviour(87)
def test_no_file_stays_open_after_a_restore(prefix):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    saved = checkpoint.save(prefix)
    status = checkpoint.restore(saved)
    assert not open_files(saved)
    status.assert_consumed()


def test_write_callbacks_run_after_the_commit_with_or_without_the_path(prefix):
    seen = []
    options = ckpt.CheckpointOptions(
        write_callbacks=(
            lambda path: seen.append(ckpt.load(path)["v"]),
            lambda: seen.append("done"),
        )
    )
    ckpt.Checkpoint(v=var(4.0)).save(prefix, options)
    assert seen == [4.0, "done"]


def test_a_cast_is_asked_for(path):
    ckpt.Checkpoint(v=var([1.0, 2.0])).write(path)
    fresh = ckpt.Checkpoint(v=ckpt.Variable(jnp.zeros(2, jnp.bfloat16)))
    with pytest.raises(ckpt.RestoreMismatchError, match="expected dtype bfloat16, got float32"):
        fresh.read(path)
    assert fresh.v.value.tolist() == [0.0, 0.0]
    fresh.read(path, ckpt.CheckpointOptions(cast=True)).assert_consumed()
    assert fresh.v.dtype == jnp.bfloat16 and fresh.v.value.tolist() == [1.0, 2.0]


@pytest.mark.behaviour(83)
def test_a_restore_is_all_or_nothing(path):
    """Everything is checked before anything changes."""
    ckpt.Checkpoint(a=var(1.0), b=var([1.0, 2.0]), p=Position(5), z=var(3.0)).write(path)
    fresh = ckpt.Checkpoint(a=var(0.0), b=var([0.0]), p=Position(), z=var([0.0]))
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        fresh.read(path)
    assert [entry.path for entry in caught.value.report.mismatched] == ["b", "z"]
    assert "b: expected shape (1,), got (2,)" in str(caught.value)
    assert (value(fresh.a), value(fresh.b), fresh.p.index) == (0.0, [0.0], 0)


# --- keys and names ---------------------------------------------------------------------


@pytest.mark.behaviour(8, 38)
def test_variables_made_by_helpers_have_plain_keys(path):
    root = Model(leaf=Model())
    root.add_variable("a", initializer=1.0)
    root.leaf.add_variable("v", (2,), initializer=jnp.ones)
    ckpt.Checkpoint(root).write(path)
    assert ckpt.list_variables(path) == [
        ("a/.ATTRIBUTES/VARIABLE_VALUE", ()),
        ("leaf/v/.ATTRIBUTES/VARIABLE_VALUE", (2,)),
    ]


@pytest.mark.parametrize("name", ["a/b", "a.b", "c/", "d/.ATTRIBUTES/f", ".ATTRIBUTES", "", "ü"])
@pytest.mark.behaviour(36, 39)
def test_any_name_survives(path, name):
    """TensorFlow itself cannot restore a value that is named a/b."""
    saved, fresh = ckpt.Trackable(), ckpt.Trackable()
    saved.track(name, var(3.0))
    target = fresh.track(name, var(0.0))
    ckpt.Checkpoint(saved).write(path)
    ckpt.Checkpoint(fresh).read(path).assert_consumed()
    assert value(target) == 3.0


@pytest.mark.behaviour(88, 89, 90, 91)
def test_named_values_of_one_object_are_attributes_of_one_node(path):
    ckpt.Checkpoint(Pair(1.0, 2.0), child=Pair(3.0, 4.0)).write(path)
    graph = ckpt.object_metadata(path)
    assert [(a.name, a.key) for a in graph.nodes[0].attributes] == [
        ("v1", "/.ATTRIBUTES/v1"),
        ("v2", "/.ATTRIBUTES/v2"),
    ]
    assert [a.key for a in graph.nodes[1].attributes] == [
        "child/.ATTRIBUTES/v1",
        "child/.ATTRIBUTES/v2",
    ]
    assert ckpt.load_variable(path, "child/.ATTRIBUTES/v2") == 4.0
    with pytest.raises(KeyError, match=r"nearest: child/.ATTRIBUTES/v1, child/.ATTRIBUTES/v2"):
        ckpt.load_variable(path, "child")
    root, child = Pair(), Pair()
    ckpt.Checkpoint(root, child=child).read(path).assert_consumed()
    assert (root.v1, root.v2, child.v1, child.v2) == (1.0, 2.0, 3.0, 4.0)


def test_named_arguments_are_children_in_the_order_of_their_names(prefix):
    checkpoint = ckpt.Checkpoint(b=var(1.0), a=var(2.0))
    checkpoint.save(prefix)
    checkpoint.c = var(3.0)
    graph = ckpt.object_metadata(checkpoint.save(prefix))
    assert [label for label, _ in graph.nodes[0].children] == ["a", "b", "save_counter", "c"]


def test_the_save_counter_cannot_be_given():
    with pytest.raises(AttributeError, match="save_counter"):
        ckpt.Checkpoint(save_counter=3)


def test_what_has_no_view_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match="f=.*register_view"):
        ckpt.Checkpoint(f=print)
    with pytest.raises(ValueError, match="root"):
        ckpt.Checkpoint(object())


# --- every kind of state ----------------------------------------------------------------


@pytest.mark.behaviour(65)
def test_lists_and_dicts_of_variables_are_restored_element_by_element(prefix):
    saved = ckpt.Checkpoint(l=[var(1.0), var(2.0)], d={"a": var(3.0), "b": var(4.0)})
    saved_path = saved.save(prefix)
    parts = [var(0.0) for _ in range(4)]
    fresh = ckpt.Checkpoint(l=parts[:2], d={"a": parts[2], "b": parts[3]})
    fresh.restore(saved_path).assert_consumed()
    assert [value(v) for v in parts] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.behaviour(12)
def test_an_object_may_save_one_value_for_several_variables(prefix):

    class Mirrored(ckpt.Trackable):
        def __init__(self, start):
            self.copies = [var(start), var(start)]

        def serialize_to_arrays(self):
            return {"value": self.copies[0].value}

        def restore_from_arrays(self, arrays):
            for v in self.copies:
                v.assign(arrays["value"])

    checkpoint = ckpt.Checkpoint(m=Mirrored(2.0))
    saved = checkpoint.save(prefix)
    for _ in range(2):
        for v in checkpoint.m.copies:
            v.assign(np.float32(9.0))
        checkpoint.restore(saved).assert_consumed()
        assert [value(v) for v in checkpoint.m.copies] == [2.0, 2.0]


def test_python_state_gives_text_or_bytes_and_gets_bytes(path):
    class Raw(ckpt.PythonState):
        def __init__(self, state):
            self.state = state

        def serialize(self):
            return self.state

        def deserialize(self, value):
            self.state = value

    ckpt.Checkpoint(t=Raw("ü\0"), b=Raw(b"\xff\0"), e=Raw("")).write(path)
    fresh = ckpt.Checkpoint(t=Raw(""), b=Raw(""), e=Raw("x"))
    fresh.read(path).assert_consumed()
    assert (fresh.t.state, fresh.b.state, fresh.e.state) == ("ü\0".encode(), b"\xff\0", b"")
    assert ("t/.ATTRIBUTES/py_state", ()) in ckpt.list_variables(path)


@pytest.mark.behaviour(274, 276)
def test_numpy_state_in_attributes_is_restored_again_and_again(tmp_path):
    state = Model(a=np.ones((2, 2)), b=np.arange(3))
    checkpoint = ckpt.Checkpoint(numpy=state)
    first = checkpoint.save(tmp_path / "ckpt")
    state.a[0, 0] = 5.0
    state.b = np.arange(3) * 2
    second = checkpoint.save(tmp_path / "ckpt")
    for saved, corner, last in ((first, 1.0, 2), (second, 5.0, 4), (first, 1.0, 2)):
        checkpoint.restore(saved).assert_consumed()
        assert (state.a[0, 0], state.b[2]) == (corner, last)


@pytest.mark.behaviour(279)
def test_an_object_without_values_in_the_way_of_python_state_is_named(path):
    ckpt.Checkpoint(p=Position(3)).write(path)
    status = ckpt.Checkpoint(p=ckpt.Trackable()).read(path)
    with pytest.raises(AssertionError, match=r"\bp\b"):
        status.assert_consumed()


@pytest.mark.behaviour(311)
def test_slots_are_restored_through_their_variables(path):
    w = var(1.0)
    ckpt.Checkpoint(model=Model(w=w), opt=Optimizer(0.5, w, value=7.0)).write(path)
    v = var(0.0)
    optimizer = Optimizer(0.0, v)
    ckpt.Checkpoint(opt=optimizer, model=Model(w=v)).read(path).assert_consumed()
    assert (value(v), value(optimizer.state["m", v]), value(optimizer.rate)) == (1.0, 7.0, 0.5)
    assert "model/w/.OPTIMIZER_SLOT/opt/m/.ATTRIBUTES/VARIABLE_VALUE" in dict(
        ckpt.list_variables(path)
    )


@pytest.mark.behaviour(310)
def test_slots_may_be_skipped(path):
    w = var(1.0)
    ckpt.Checkpoint(w=w, opt=Optimizer(0.5, w, value=7.0)).write(path)
    v = var(0.0)
    optimizer = Optimizer(0.0, v)
    options = ckpt.CheckpointOptions(skip_slot_variables=True)
    ckpt.Checkpoint(w=v, opt=optimizer).read(path, options).assert_consumed()
    assert (value(v), value(optimizer.state["m", v])) == (1.0, 0.0)


# --- deferred restoration ---------------------------------------------------------------


def test_what_waits_is_not_taken_from_another_checkpoint_that_replaced_the_first(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(path).expect_partial()
    ckpt.Checkpoint(v=var(2.0)).write(path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced since"):
        checkpoint.v = var(0.0)
    checkpoint.read(path).expect_partial()  # a later restore has the say
    checkpoint.v = var(0.0)
    assert value(checkpoint.v) == 2.0


@pytest.mark.behaviour(40, 41)
def test_a_value_waits_for_an_object_that_does_not_exist_yet(prefix):
    saved = ckpt.Checkpoint(Model(dep=Model(v=var(123.0)))).save(prefix)
    root = Model()
    status = ckpt.Checkpoint(root).restore(saved)
    status.assert_existing_objects_matched()
    with pytest.raises(AssertionError, match=r"\(root\)\.dep\.v"):
        status.assert_consumed()
    root.dep = Model()
    with pytest.raises(AssertionError):
        status.assert_consumed()
    v = root.dep.add_variable("v", (), initializer=lambda *args: pytest.fail("not needed"))
    status.assert_consumed()
    assert value(v) == 123.0


@pytest.mark.behaviour(42)
def test_an_object_whose_variable_exists_is_restored_when_it_is_attached(prefix):
    saved = ckpt.Checkpoint(Model(dep=Model(v=var(123.0)))).save(prefix)
    root, dep = Model(), Model(v=var(0.0))
    status = ckpt.Checkpoint(root).restore(saved)
    root.dep = dep
    status.assert_consumed()
    assert value(dep.v) == 123.0


@pytest.mark.behaviour(52, 53)
def test_a_variable_keeps_its_own_value_until_it_is_attached(prefix):
    saved = ckpt.Checkpoint(Model(v1=var(1.0), v2=var(2.0))).save(prefix)
    root, late = Model(v1=var(0.0)), var(5.0)
    status = ckpt.Checkpoint(root).restore(saved)
    assert (value(root.v1), value(late)) == (1.0, 5.0)
    root.v2 = late
    assert root.v2 is late and value(late) == 2.0
    status.assert_consumed()


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_objects_may_be_attached_in_any_order(path, order):
    saved = Model(a=Model(x=var(1.0)))
    saved.b = Model(x=saved.a.x, y=var(2.0))
    saved.c = Model(b=saved.b, z=var(3.0))
    ckpt.Checkpoint(saved).write(path)
    root, x = Model(), var(0.0)
    b = Model(x=x, y=var(0.0))
    parts = {"a": Model(x=x), "b": b, "c": Model(b=b, z=var(0.0))}
    status = ckpt.Checkpoint(root).read(path)
    for name in order:
        setattr(root, name, parts[name])
    status.assert_consumed()
    assert [value(v) for v in (x, b.y, parts["c"].z)] == [1.0, 2.0, 3.0]


@pytest.mark.behaviour(49, 50, 51)
def test_a_loop_can_be_restored_before_it_is_closed(prefix):

    def loop():
        first, second = Model(), Model()
        first.second, second.first = second, first
        return first, second

    first, second = loop()
    first.v, second.v = var(1.0), var([2.0])
    saved = ckpt.Checkpoint(first).save(prefix)

    first, second = loop()
    checkpoint = ckpt.Checkpoint(first)
    status = checkpoint.restore(saved)
    for obj, shape, found in ((first, (), 1.0), (second, (1,), [2.0])):
        with pytest.raises(AssertionError):
            status.assert_consumed()
        obj.v = obj.add_variable("v", shape)
        assert value(obj.v) == found
    status.assert_consumed()
    second.v.assign(np.float32([9.0]))
    checkpoint.restore(saved).assert_consumed()
    assert value(second.v) == [2.0]


@pytest.mark.behaviour(78, 79)
def test_only_names_that_carry_values_wait(prefix):
    branch = Model(inner=Model(v=var(1.0)))
    saved = ckpt.Checkpoint(Model(empty=Model(deep=Model()), branch=branch, w=var(2.0))).save(
        prefix
    )
    root = Model()
    ckpt.Checkpoint(root).restore(saved)
    assert sorted(pending_names(root)) == ["branch", "w"]
    root.empty = Model(deep=Model())
    assert sorted(pending_names(root)) == ["branch", "w"]
    root.w = var(0.0)
    assert pending_names(root) == ["branch"]
    root.branch = Model()
    assert pending_names(root) == [] and pending_names(root.branch) == ["inner"]


def test_a_pytree_that_is_assigned_receives_what_waits_for_it(path):
    ckpt.Checkpoint(state={"w": jnp.ones(2), "step": 4}).write(path)
    fresh = ckpt.Checkpoint()
    status = fresh.read(path)
    fresh.state = {"w": jnp.zeros(2), "step": 0}
    assert fresh.state["w"].tolist() == [1.0, 1.0] and fresh.state["step"] == 4
    status.assert_consumed()


def test_an_abstract_value_is_filled_or_refused(path):
    ckpt.Checkpoint(v=var([1.0, 2.0])).write(path)
    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    fresh = ckpt.Checkpoint(v=ckpt.Variable(abstract))
    fresh.read(path).assert_consumed()
    assert fresh.v.value.tolist() == [1.0, 2.0]
    other = ckpt.Checkpoint(v=var([0.0, 0.0]), w=ckpt.Variable(abstract))
    with pytest.raises(ckpt.RestoreMismatchError, match="w: expected float32"):
        other.read(path)
    assert value(other.v) == [0.0, 0.0]


def test_a_name_that_was_overwritten_after_a_restore_keeps_its_new_object(path):
    ckpt.Checkpoint(Model(v=var(1.0))).write(path)
    root = Model(v=var(0.0))
    status = ckpt.Checkpoint(root).read(path).assert_consumed()
    root.v = var(5.0)
    assert value(root.v) == 5.0
    with pytest.raises(AssertionError, match=r"\(root\)\.v"):
        status.assert_existing_objects_matched()


# --- overlapping restores ---------------------------------------------------------------


@pytest.mark.parametrize("first", ["one", "other"])
@pytest.mark.parametrize("attach_first", ["one", "other"])
@pytest.mark.behaviour(43, 44)
def test_of_two_restores_that_meet_in_one_object_the_later_wins(tmp_path, first, attach_first):
    values = {"one": 1.0, "other": 2.0}
    paths = {
        name: ckpt.Checkpoint(Model(dep=Model(v=var(x)))).write(tmp_path / name)
        for name, x in values.items()
    }
    roots = {name: Model() for name in values}
    second = "other" if first == "one" else "one"
    status = [ckpt.Checkpoint(roots[name]).read(paths[name]) for name in (first, second)]
    shared = Model(v=var(0.0))
    for name in (attach_first, "other" if attach_first == "one" else "one"):
        roots[name].dep = shared
    assert value(shared.v) == values[second]
    for each in status:
        each.assert_consumed()


def test_of_two_restores_that_wait_for_one_name_the_later_wins(tmp_path):
    old = ckpt.Checkpoint(v=var(1.0), only_old=var(3.0)).write(tmp_path / "old")
    new = ckpt.Checkpoint(v=var(2.0)).write(tmp_path / "new")
    fresh = ckpt.Checkpoint()
    fresh.read(old)
    fresh.read(new)
    fresh.v, fresh.only_old = var(0.0), var(0.0)
    assert (value(fresh.v), value(fresh.only_old)) == (2.0, 3.0)


def test_a_later_restore_overrides_what_an_earlier_one_gave(tmp_path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    first = checkpoint.save(tmp_path / "ckpt")
    checkpoint.v.assign(np.float32(2.0))
    second = checkpoint.save(tmp_path / "ckpt")
    status = checkpoint.restore(first).assert_consumed()
    assert value(checkpoint.v) == 1.0
    checkpoint.restore(second).assert_consumed()
    assert value(checkpoint.v) == 2.0
    status.assert_consumed()


# --- when sharing differs ---------------------------------------------------------------


@pytest.mark.behaviour(45, 46)
def test_one_saved_object_cannot_become_two(prefix):
    shared = Model(v=var(3.0))
    saved = ckpt.Checkpoint(Model(a=shared, b=shared)).save(prefix)
    fresh = Model(a=Model(v=var(0.0)), b=Model(v=var(0.0)))
    status = ckpt.Checkpoint(fresh).restore(saved)
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match=r"\(root\)\.b\.v"):
            assertion()
    assert (value(fresh.a.v), value(fresh.b.v)) == (3.0, 0.0)


@pytest.mark.behaviour(47)
def test_two_saved_objects_may_become_one(prefix):
    saved = ckpt.Checkpoint(Model(a=Model(v=var(1.0)), b=Model(w=var(2.0)))).save(prefix)
    root, both = Model(), Model()
    status = ckpt.Checkpoint(root).restore(saved)
    root.a = root.b = both
    v, w = both.add_variable("v", ()), both.add_variable("w", ())
    status.assert_consumed()
    status.assert_existing_objects_matched()
    assert (value(v), value(w)) == (1.0, 2.0)


# --- status -----------------------------------------------------------------------------


def test_assertions_return_the_status_for_chaining(path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    status = checkpoint.read(checkpoint.write(path))
    assert status.assert_consumed() is status
    assert status.assert_existing_objects_matched() is status
    assert status.assert_nontrivial_match() is status
    assert status.expect_partial() is status
    assert status.initialize_or_restore() is status


def test_what_a_prompt_or_a_notebook_shows_says_what_it_is(prefix):
    checkpoint = ckpt.Checkpoint({"a": 1}, v=var(1.0))
    assert repr(checkpoint) == "<Checkpoint of root dict, v>"
    saved = checkpoint.save(prefix)
    assert repr(checkpoint) == "<Checkpoint of root dict, v>"
    assert repr(ckpt.Checkpoint()) == "<Checkpoint of nothing yet>"
    status = checkpoint.restore(saved)
    assert saved in repr(status)
    assert status._repr_html_() == status.report._repr_html_()
    assert repr(checkpoint.restore(None)).startswith("<LoadStatus of no checkpoint")
    with ckpt.load_checkpoint(saved) as reader:
        assert repr(reader) == f"CheckpointReader({saved!r})"
    manager = ckpt.CheckpointManager(checkpoint, os.path.dirname(prefix))
    manager.save()
    assert repr(manager) == f"<CheckpointManager of {os.path.dirname(prefix)}: 1 checkpoint>"


def test_an_assertion_about_no_checkpoint_says_where_none_comes_from():
    with pytest.raises(AssertionError, match="latest_checkpoint returns where there is none"):
        ckpt.Checkpoint(v=var(1.0)).restore(None).assert_consumed()


@pytest.mark.behaviour(15)
def test_a_status_outlives_its_checkpoint(prefix):
    saved = ckpt.Checkpoint(v=var(1.0)).save(prefix)
    fresh = ckpt.Checkpoint(v=var(0.0))
    status = fresh.restore(saved)
    del fresh
    gc.collect()
    status.assert_consumed()


def test_leaving_the_block_of_a_status_asserts_consumption(path):
    ckpt.Checkpoint(v=var(1.0), w=var(2.0)).write(path)
    fresh = ckpt.Checkpoint(v=var(0.0))
    with pytest.raises(AssertionError, match=r"\(root\)\.w"), fresh.read(path):
        pass
    with fresh.read(path) as status:
        fresh.w = var(0.0)
    assert status.report.exact and value(fresh.w) == 2.0


def test_an_error_inside_the_block_is_not_replaced_by_an_assertion(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    with pytest.raises(KeyError), ckpt.Checkpoint().read(path):
        raise KeyError


@pytest.mark.behaviour(26, 29)
def test_a_value_without_a_place_in_its_object_is_an_unused_attribute(prefix):
    saved = ckpt.Checkpoint(v1=var(1.0), v2=var(2.0)).save(prefix)
    fresh = ckpt.Checkpoint(v1=ckpt.Trackable(), v2=var(0.0))
    status = fresh.restore(saved)
    assert value(fresh.v2) == 2.0
    status.assert_existing_objects_matched()
    with pytest.raises(AssertionError, match="Unused attributes.*v1"):
        status.assert_consumed()


def test_an_object_that_the_checkpoint_lacks_is_not_matched(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    status = ckpt.Checkpoint(v=var(0.0), extra=Model(w=var(0.0))).read(path)
    status.assert_nontrivial_match()
    with pytest.raises(AssertionError, match=r"\(root\)\.extra\.w"):
        status.assert_existing_objects_matched()


def test_python_state_that_the_checkpoint_lacks_is_not_matched(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    status = ckpt.Checkpoint(v=var(0.0), p=Position()).read(path)
    with pytest.raises(AssertionError, match=r"\(root\)\.p"):
        status.assert_existing_objects_matched()


def test_a_match_of_nothing_but_the_root_is_trivial(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    with pytest.raises(AssertionError, match="It holds v; the program has w"):
        ckpt.Checkpoint(w=var(0.0)).read(path).assert_nontrivial_match()
    with pytest.raises(AssertionError, match="tracks no objects"):
        ckpt.Checkpoint().read(path).assert_nontrivial_match()


def test_objects_without_values_never_fail_an_assertion(path):
    ckpt.Checkpoint(v=var(1.0), gone=Model(deep=Model())).write(path)
    ckpt.Checkpoint(v=var(0.0), new=Model(deep=Model())).read(path).assert_consumed()


@pytest.mark.behaviour(48)
def test_empty_containers_are_ignored(prefix):
    saved = Model(v=var(1.0), l=[], nested=[[]])
    saved_path = ckpt.Checkpoint(saved).save(prefix)
    fresh = Model(v=var(0.0), other=[], d={})
    status = ckpt.Checkpoint(fresh).restore(saved_path)
    fresh.nested = []
    fresh.nested.append([])
    status.assert_consumed()
    status.assert_existing_objects_matched()
    status.assert_nontrivial_match()


@pytest.mark.behaviour(60, 61)
def test_plain_data_that_was_added_after_the_save_breaks_nothing(prefix):
    model = Model(v=var(1.0))
    checkpoint = ckpt.Checkpoint(model)
    checkpoint.restore(None).initialize_or_restore()
    saved = checkpoint.save(prefix)
    fresh = Model(v=var(0.0), d={"a": 1}, l=[1, "b"], empty={})
    ckpt.Checkpoint(fresh).restore(saved).assert_existing_objects_matched()
    assert value(fresh.v) == 1.0 and fresh.d == {"a": 1}


def test_a_restored_object_that_is_dropped_is_missed(path):
    ckpt.Checkpoint(Model(v=var(1.0))).write(path)
    root = Model(v=var(0.0))
    status = ckpt.Checkpoint(root).read(path).assert_consumed()
    del root.v
    with pytest.raises(AssertionError, match=r"\(root\)\.v"):
        status.assert_consumed()


def test_at_most_ten_names_are_listed_and_the_rest_is_counted(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    many = {f"w{i:02}": var(0.0) for i in range(15)}
    with pytest.raises(AssertionError) as caught:
        ckpt.Checkpoint(v=var(0.0), **many).read(path).assert_existing_objects_matched()
    message = str(caught.value)
    assert message.count("(root).w") == 10 and "15 in all" in message


def test_the_report_shows_how_things_stand_now(path):
    ckpt.Checkpoint(Model(a=var(1.0), late=Model(b=var(2.0)))).write(path)
    root = Model(a=var(0.0), extra=var(0.0))
    status = ckpt.Checkpoint(root).read(path)
    report = status.report
    assert [entry.path for entry in report.restored] == ["a"]
    assert [entry.path for entry in report.deferred] == ["late/b"]
    assert [entry.path for entry in report.missing] == ["extra"]
    root.late = Model(b=var(0.0))
    assert [entry.path for entry in status.report.restored] == ["a", "late/b"]
    assert not status.report.deferred
    assert report.deferred and report.path == path


# --- the state file ---------------------------------------------------------------------


@pytest.mark.behaviour(54, 55, 56, 57, 58, 59)
def test_saves_keep_all_their_files_and_the_state_names_the_last(tmp_path, prefix):
    root = Model(v0=var(0.0))
    checkpoint = ckpt.Checkpoint(root)
    options = ckpt.CheckpointOptions(durable=False)
    for step in range(1, 11):
        setattr(root, f"v{step}", var(step))
        root.v0.assign(np.float32(step))
        checkpoint.save(prefix, options)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["checkpoint", *(f"ckpt-{i}" for i in range(1, 11))]
    )
    assert ckpt.latest_checkpoint(tmp_path) == f"{prefix}-10"
    state = ckpt.get_checkpoint_state(tmp_path)
    assert state.all_model_checkpoint_paths == (f"{prefix}-10",)

    for step in range(11):
        getattr(root, f"v{step}").assign(np.float32(-1.0))
    checkpoint.restore(f"{prefix}-6")
    assert [value(getattr(root, f"v{i}")) for i in range(11)] == [6, 1, 2, 3, 4, 5, 6] + [-1] * 4
    checkpoint.restore(f"{prefix}-10").assert_consumed()
    assert [value(getattr(root, f"v{i}")) for i in range(11)] == [10, *range(1, 11)]


def test_the_state_file_is_relative_so_that_the_directory_can_move(tmp_path):
    ckpt.Checkpoint(v=var(1.0)).save(tmp_path / "here" / "ckpt")
    (tmp_path / "here").rename(tmp_path / "there")
    latest = ckpt.latest_checkpoint(tmp_path / "there")
    assert latest == str(tmp_path / "there" / "ckpt-1")
    ckpt.Checkpoint(v=var(0.0)).restore(latest).assert_consumed()


@pytest.mark.behaviour(112)
def test_a_relative_prefix_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = ckpt.Checkpoint(v=var(0.0))
    for step in range(3):
        checkpoint.v.assign(np.float32(step))
        assert checkpoint.save("ckpt") == f"ckpt-{step + 1}"
    latest = ckpt.latest_checkpoint(".")
    fresh = ckpt.Checkpoint(v=var(-1.0))
    fresh.restore(latest).assert_consumed()
    assert value(fresh.v) == 2.0


def test_a_callback_that_fails_leaves_the_state_file_as_it_was(tmp_path, prefix):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    checkpoint.save(prefix)

    def fail(path):
        assert ckpt.latest_checkpoint(tmp_path) == f"{prefix}-1"
        raise KeyError(path)

    with pytest.raises(KeyError):
        checkpoint.save(prefix, ckpt.CheckpointOptions(write_callbacks=(fail,)))
    assert ckpt.latest_checkpoint(tmp_path) == f"{prefix}-1"


# --- rooted checkpoints -----------------------------------------------------------------


@pytest.mark.behaviour(67, 68)
def test_the_root_object_is_the_root_of_the_graph(prefix):
    saved = ckpt.Checkpoint(Model(v=var(1.0), w=var(2.0))).save(prefix)
    fresh = Model(v=var(0.0))
    ckpt.Checkpoint(fresh).restore(saved)
    assert value(fresh.v) == 1.0
    fresh.w = var(0.0)
    assert value(fresh.w) == 2.0


@pytest.mark.behaviour(69)
def test_a_name_that_the_root_uses_for_another_object_is_refused():
    v = var(1.0)
    root = Model(v=v)
    ckpt.Checkpoint(root, v=v)
    with pytest.raises(ValueError, match=r"root\.v already exists"):
        ckpt.Checkpoint(root, v=var(1.0))


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(
            lambda v, w: ckpt.Checkpoint(Model(v=v), w=w),
            id="as saved",
            marks=pytest.mark.behaviour(70),
        ),
        pytest.param(
            lambda v, w: ckpt.Checkpoint(Model(w=w), v=v),
            id="the other way round",
            marks=pytest.mark.behaviour(71),
        ),
        pytest.param(
            lambda v, w: ckpt.Checkpoint(v=v, w=w),
            id="no root",
            marks=pytest.mark.behaviour(72),
        ),
        pytest.param(lambda v, w: ckpt.Checkpoint(Model(v=v, w=w)), id="all in the root"),
    ],
)
def test_it_does_not_matter_which_names_the_root_has_and_which_are_attached(prefix, load):
    saved = ckpt.Checkpoint(Model(v=var(1.0)), w=var(2.0)).save(prefix)
    v, w = var(0.0), var(0.0)
    fresh = load(v, w)
    fresh.restore(saved).assert_consumed()
    assert (value(v), value(w), fresh.save_counter) == (1.0, 2.0, 1)


@pytest.mark.behaviour(80)
def test_only_common_names_are_restored_from_another_programs_file(tmp_path):

    def one(x):
        return ckpt.Checkpoint(Model(v1=var(x)), v2=var(x), v3=var(x))

    def other(x):
        return ckpt.Checkpoint(Model(v2=var(x), v3=var(x)), v4=var(x))

    def values(checkpoint):
        found = {**checkpoint.root.trackable_children(), **checkpoint.trackable_children()}
        return {name: value(v) for name, v in found.items() if name != "save_counter"}

    saved_one, saved_other = one(1.0).save(tmp_path / "1"), other(2.0).save(tmp_path / "2")
    mine, theirs = one(0.0), other(0.0)
    mine.restore(saved_other)
    theirs.restore(saved_one)
    assert values(mine) == {"v1": 0.0, "v2": 2.0, "v3": 2.0}
    assert values(theirs) == {"v2": 1.0, "v3": 1.0, "v4": 0.0}


def test_the_counter_of_a_rooted_checkpoint_is_not_put_on_the_root(prefix):
    root = Model(v=var(1.0))
    checkpoint = ckpt.Checkpoint(root)
    assert checkpoint.save(prefix) == f"{prefix}-1"
    assert list(root.trackable_children()) == ["v"]
    assert "save_counter/.ATTRIBUTES/VARIABLE_VALUE" in dict(ckpt.list_variables(f"{prefix}-1"))


def test_the_counter_comes_from_the_newest_restore(tmp_path):
    checkpoint = ckpt.Checkpoint(Model(v=var(1.0)))
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(3)]
    fresh = ckpt.Checkpoint(Model(v=var(0.0)))
    fresh.restore(paths[2]).assert_consumed()
    fresh.restore(paths[1]).assert_consumed()
    assert fresh.save_counter == 2
    assert fresh.save(tmp_path / "ckpt") == paths[2]


def test_a_counter_that_waited_for_its_first_use_comes_from_the_newest_read(tmp_path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(3)]
    fresh = ckpt.Checkpoint(v=var(0.0))
    fresh.read(paths[1])
    fresh.read(paths[2])
    assert fresh.save_counter == 3


def test_a_checkpoint_as_root_shares_its_counter(prefix):
    inner = ckpt.Checkpoint(v=var(1.0))
    saved = ckpt.Checkpoint(inner).save(prefix)
    assert inner.save_counter == 1
    fresh = ckpt.Checkpoint(v=var(0.0))
    fresh.restore(saved).assert_consumed()
    assert (value(fresh.v), fresh.save_counter) == (1.0, 1)


def test_an_immutable_root_is_rebuilt(prefix):
    saved = ckpt.Checkpoint({"w": jnp.ones(2)}, extra=var(3.0)).save(prefix)
    fresh = ckpt.Checkpoint({"w": jnp.zeros(2)}, extra=var(0.0))
    fresh.restore(saved).assert_consumed()
    assert fresh.root["w"].tolist() == [1.0, 1.0] and value(fresh.extra) == 3.0
    fresh.restore(fresh.save(prefix)).assert_consumed()


@pytest.mark.behaviour(81, 82)
def test_a_root_may_be_given_by_a_weak_reference(prefix, no_gc):
    saved = ckpt.Checkpoint(Model(v=var(1.0))).save(prefix)
    root = Model(v=var(0.0))
    checkpoint = ckpt.Checkpoint(weakref.ref(root))
    checkpoint.restore(saved).assert_consumed()
    assert value(root.v) == 1.0
    checkpoint.save(prefix)
    variable = weakref.ref(root.v)
    del root
    assert variable() is None
    with pytest.raises(AssertionError, match="garbage-collected"):
        checkpoint.save(prefix)


# --- lifetimes --------------------------------------------------------------------------


@pytest.mark.behaviour(76)
def test_a_checkpoint_and_its_objects_go_with_their_last_reference(prefix, no_gc):
    root = Model(v=var(1.0))
    checkpoint = ckpt.Checkpoint(root)
    checkpoint.save(prefix)
    gone = [weakref.ref(root.v), weakref.ref(root), weakref.ref(checkpoint)]
    del root, checkpoint
    assert [ref() for ref in gone] == [None, None, None]


@pytest.mark.behaviour(28, 31, 77)
def test_values_that_still_wait_keep_nothing_alive(prefix, no_gc):
    saved = ckpt.Checkpoint(Model(v=var(1.0), late=var(2.0))).save(prefix)
    root = Model(v=var(0.0))
    checkpoint = ckpt.Checkpoint(root)
    checkpoint.restore(saved).expect_partial()
    gone = [weakref.ref(root.v), weakref.ref(root), weakref.ref(checkpoint)]
    del root, checkpoint
    assert [ref() for ref in gone] == [None, None, None]


@pytest.mark.behaviour(17, 18)
def test_a_deep_copy_is_independent_and_its_file_restores_into_the_original(prefix):
    original = ckpt.Checkpoint(v=var(1.0))
    original.save(prefix)
    other = copy.deepcopy(original)
    other.v.assign(np.float32(2.0))
    assert value(original.v) == 1.0
    saved = other.save(f"{prefix}-copy")
    original.restore(saved).assert_consumed()
    assert value(original.v) == 2.0


# --- looking at checkpoints and programs ------------------------------------------------


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
