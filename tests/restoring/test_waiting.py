"""Values that wait for objects which do not exist yet, and restores that meet in one object."""

import copy
import pickle
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trackables import Model, value, var

import ckpt_jax as ckpt
from ckpt_jax.objects.pending import pending_names

# --- deferred restoration ---------------------------------------------------------------


def test_what_waits_is_not_taken_from_another_checkpoint_that_replaced_the_first(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(path).expect_partial()
    ckpt.Checkpoint(v=var(2.0)).write(path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed since"):
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


def test_an_attachment_that_fails_changes_nothing_and_goes_on_waiting(path):
    """Decided: a restore is all or nothing. Today the misfit is tracked but not assigned, and
    the value that waited is lost."""
    ckpt.Checkpoint(o=Model(v=var([1.0, 2.0]))).write(path)
    o = Model()
    ckpt.Checkpoint(o=o).read(path)
    with pytest.raises(ckpt.RestoreMismatchError):
        o.v = var([0.0])
    assert not hasattr(o, "v") and o.trackable_children() == {}
    o.v = var([0.0, 0.0])
    assert value(o.v) == [1.0, 2.0]


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


@pytest.mark.behaviour(274, 276)
def test_arrays_of_numpy_wait_until_their_attribute_is_assigned(path):
    ckpt.Checkpoint(Model(x=np.arange(4.0))).write(path)
    empty = Model()
    status = ckpt.Checkpoint(empty).read(path)
    assert not hasattr(empty, "x")
    empty.x = np.zeros(4)
    assert empty.x.tolist() == [0.0, 1.0, 2.0, 3.0]
    status.assert_consumed()


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


@pytest.mark.parametrize(("one", "two", "zero"), [(1, 2, 0), ("one", "two", ""), (1.5, 2.5, 0.0)])
def test_of_two_restores_that_wait_for_a_python_value_the_later_wins(tmp_path, one, two, zero):
    old = ckpt.Checkpoint(x=one).write(tmp_path / "old")
    new = ckpt.Checkpoint(x=two).write(tmp_path / "new")
    fresh = ckpt.Checkpoint()
    fresh.read(old)
    fresh.read(new)
    fresh.x = zero
    assert fresh.x == two


def test_a_tree_that_waits_is_not_mixed_from_two_restores(tmp_path):
    old = ckpt.Checkpoint(x={"s": 1, "w": jnp.ones(1)}).write(tmp_path / "old")
    new = ckpt.Checkpoint(x={"s": 2, "w": jnp.full(1, 2.0)}).write(tmp_path / "new")
    fresh = ckpt.Checkpoint()
    fresh.read(old)
    fresh.read(new)
    fresh.x = {"s": 0, "w": jnp.zeros(1)}
    assert (fresh.x["s"], fresh.x["w"].tolist()) == (2, [2.0])


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


def test_two_places_that_hold_one_array_get_their_own_saved_values(path):
    """An immutable array has no identity to the program: z = zeros(); {"a": z, "b": z}."""
    ckpt.Checkpoint(a=jnp.ones(2), b=jnp.full(2, 2.0)).write(path)
    z = jnp.zeros(2)
    fresh = ckpt.Checkpoint(a=z, b=z)
    fresh.read(path).assert_consumed()
    assert (fresh.a.tolist(), fresh.b.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_a_shared_array_inside_a_module_is_restored_at_both_places(path):
    ckpt.Checkpoint(Model(a=jnp.ones(2), b=jnp.full(2, 2.0))).write(path)
    z = jnp.zeros(2)
    fresh = Model(a=z, b=z)
    ckpt.Checkpoint(fresh).read(path)
    assert (fresh.a.tolist(), fresh.b.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_objects_that_are_combined_get_the_same_values_early_or_late(path):
    """The frontier has one entry per (live parent, label), so the first saved child is lost."""
    ckpt.Checkpoint(a=Model(v=var(1.0)), b=Model(v=var(2.0))).write(path)
    early = Model(v=var(0.0))
    ckpt.Checkpoint(a=early, b=early).read(path)
    late = Model()
    ckpt.Checkpoint(a=late, b=late).read(path)
    late.v = var(0.0)
    assert value(early.v) == value(late.v) == 1.0


def test_combined_objects_that_got_their_value_late_are_matched(path):
    ckpt.Checkpoint(a=Model(v=var(1.0)), b=Model(v=var(2.0))).write(path)
    late = Model()
    status = ckpt.Checkpoint(a=late, b=late).read(path)
    late.v = var(0.0)
    status.assert_existing_objects_matched()


# --- copies ---------------------------------------------------------------------------------------


def empty():
    return Model(layers=[], table={}, sub=Model())


def put_layer(model):
    model.layers.append(var(0.0))
    return model.layers[0]


def put_entry(model):
    model.table["k"] = var(0.0)
    return model.table["k"]


def put_child(model):
    model.sub.w = var(0.0)
    return model.sub.w


def put_attribute(model):
    model.late = var(0.0)
    return model.late


@pytest.mark.parametrize(
    ("put", "expected"),
    [(put_layer, 1.0), (put_entry, 2.0), (put_child, 3.0), (put_attribute, 4.0)],
)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_gets_the_values_that_wait_wherever_they_wait(tmp_path, copied, put, expected):
    full = Model(layers=[var(1.0)], table={"k": var(2.0)}, sub=Model(w=var(3.0)), late=var(4.0))
    path = ckpt.Checkpoint(m=full).write(tmp_path / "a")
    model = empty()
    ckpt.Checkpoint(m=model).read(path).expect_partial()
    other = copied(model)
    assert value(put(other)) == expected
    if other.layers is not model.layers or put is put_attribute:
        assert value(put(model)) == expected


def test_copied_lists_and_dicts_wait_too_and_placeholders_stay_placeholders(tmp_path):
    path = ckpt.Checkpoint(l=[var(1.0), var(2.0)], d={"k": var(3.0)}).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint(l=[None], d={"k": None})
    checkpoint.read(path).expect_partial()
    for copied in (copy.copy, copy.deepcopy):
        parts, table = copied(checkpoint.l), copied(checkpoint.d)
        assert (parts, table) == ([None], {"k": None})
        parts[0] = var(0.0)
        parts.append(var(0.0))
        table["k"] = var(0.0)
        assert [value(x) for x in (*parts, table["k"])] == [1.0, 2.0, 3.0]


def test_a_pickled_list_says_that_its_values_stayed_behind(tmp_path, caplog):
    path = ckpt.Checkpoint(m=Model(l=[var(1.0)])).write(tmp_path / "a")
    model = Model(l=[])
    ckpt.Checkpoint(m=model).read(path).expect_partial()
    again = pickle.loads(pickle.dumps(model))
    again.l.append(var(0.0))
    assert value(again.l[0]) == 0.0
    (record,) = caplog.records
    assert path in record.getMessage() and "restore the checkpoint again" in record.getMessage()
