"""Savers and classes of one's own: what may be registered, who is asked, what is called when."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trackables import Mirrored, Values, var

import ckpt_jax as ckpt
from ckpt_jax.objects.registry import (
    get_saver,
    registered_class,
    registered_name,
    saver_name,
    unregister_checkpoint_saver,
)


@pytest.fixture(autouse=True)
def scope():
    with ckpt.registration_scope():
        yield


class Table(ckpt.AutoTrackable):
    """Rows that a saver saves, beside a child that is saved as usual."""

    def __init__(self, rows, scale=1.0):
        self.assign(None if rows is None else np.asarray(rows))
        self.scale = ckpt.Variable(jnp.float32(scale))

    def assign(self, rows):
        self.rows = ckpt.NoDependency(rows)


class Tables:
    """A saver for `Table`, which notes its calls."""

    def __init__(self, **registration):
        self.calls = []
        registration = {"predicate": lambda obj: isinstance(obj, Table), **registration}
        ckpt.register_checkpoint_saver(
            **{"name": "Tables", "save_fn": self.save, "restore_fn": self.restore, **registration}
        )

    def save(self, tables, file_prefix):
        self.calls.append(("save", dict(tables)))
        values = {f"{name}/rows": table.rows for name, table in tables.items()}
        return ckpt.io.write_shard(file_prefix, values)

    def restore(self, tables, merged_prefix):
        self.calls.append(("restore", dict(tables)))
        for name, table in tables.items():
            key = name if "/.ATTRIBUTES/" in name else f"{name}/rows"
            table.assign(ckpt.io.read_slices(merged_prefix, {key: None})[key])

    def names(self, verb):
        return [list(objects) for called, objects in self.calls if called == verb]


def nothing(objects, prefix):
    return None


def register(name, **arguments):
    functions = {"predicate": lambda obj: True, "save_fn": nothing, "restore_fn": nothing}
    ckpt.register_checkpoint_saver(name=name, **{**functions, **arguments})


def keys(path):
    with ckpt.load_checkpoint(path) as reader:
        return reader.keys()


# --- registration of savers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "name"),
    [("Custom", name) for name in ("a/b", "a b", "é", "a\n", "a:b", "\x00")]
    + [("a/b", "c"), ("", ".")],
)
@pytest.mark.behaviour(291)
def test_a_name_of_other_characters_is_refused(package, name):
    with pytest.raises(ValueError, match="Invalid registered checkpoint saver"):
        register(name, package=package)


@pytest.mark.parametrize("name", ["Table", "a.b-c_9", "A.B.C"])
def test_letters_digits_dots_dashes_and_underscores_make_a_name(name):
    register(name)
    assert get_saver(f"Custom.{name}").name == f"Custom.{name}"


@pytest.mark.parametrize(("package", "name"), [(1, "a"), ("a", 1), ("a", None), (None, "a")])
@pytest.mark.behaviour(290)
def test_package_and_name_are_strings(package, name):
    with pytest.raises(TypeError, match="must be strings"):
        register(name, package=package)


@pytest.mark.parametrize("argument", ["predicate", "save_fn", "restore_fn"])
@pytest.mark.parametrize("value", [None, "f"])
@pytest.mark.behaviour(292)
def test_each_function_is_required_and_named_where_it_is_none(argument, value):
    with pytest.raises(TypeError, match=f"{argument} .*must be callable"):
        register("a", **{argument: value})
    with pytest.raises(ckpt.RegistrationError):
        get_saver("Custom.a")


def test_a_name_is_registered_once():
    register("a")
    with pytest.raises(ckpt.RegistrationError, match="'Custom.a' is already registered"):
        register("a")
    register("a", package="Other")


@pytest.mark.behaviour(293)
def test_the_predicate_decides_the_saver_and_later_ones_are_asked_first():
    register("arrays", predicate=lambda obj: isinstance(obj, np.ndarray))
    register("vectors", predicate=lambda obj: isinstance(obj, np.ndarray) and obj.ndim == 1)
    assert saver_name(np.zeros(2)) == "Custom.vectors"
    assert saver_name(np.zeros((2, 2))) == "Custom.arrays"
    assert saver_name(3) is None
    register("all")
    assert saver_name(np.zeros(2)) == "Custom.all"
    assert get_saver("Custom.vectors").save_fn is nothing


def test_a_python_state_saves_itself_whatever_a_predicate_says(tmp_path):
    class Position(ckpt.PythonState):
        def serialize(self):
            return "7"

    register("all", predicate=lambda obj: not isinstance(obj, ckpt.Checkpoint))
    path = ckpt.Checkpoint(position=Position()).write(tmp_path / "a")
    assert keys(path) == ["position/.ATTRIBUTES/py_state"]


@pytest.mark.behaviour(294)
def test_an_unknown_saver_is_named_with_those_there_are():
    register("here")
    with pytest.raises(ValueError, match=r"saver cannot be found: 'Custom.gone'.*'Custom.here'"):
        get_saver("Custom.gone")


def test_registrations_of_a_scope_are_undone_in_order():
    register("a", predicate=lambda obj: obj == 1)
    with ckpt.registration_scope():
        register("b")
        unregister_checkpoint_saver("Custom.a")
        assert saver_name(1) == "Custom.b"
    assert saver_name(1) == "Custom.a"
    with pytest.raises(ckpt.RegistrationError):
        get_saver("Custom.b")
    with pytest.raises(RuntimeError), ckpt.registration_scope():
        register("b")
        raise RuntimeError
    assert saver_name(2) is None


def test_a_scope_undoes_classes_and_views_too(tmp_path):
    class Point:
        pass

    with ckpt.registration_scope():
        ckpt.register_serializable(name="P")(Point)
        ckpt.register_view(Point, children=lambda p: {}, rebuild=lambda p, children: p)
        ckpt.save(tmp_path / "a", Point())
    assert registered_name(Point()) is None
    with pytest.raises(ckpt.UnsaveableError, match="Point"):
        ckpt.save(tmp_path / "b", Point())


def test_a_scope_leaves_the_views_of_flax_that_it_was_the_first_to_need():
    program = """if True:
        import ckpt_jax as ckpt
        from flax import linen, nnx
        objects = nnx.Rngs(0), linen.Dense(2).bind({"params": {"bias": 1.0}})
        with ckpt.registration_scope():
            before = ckpt.list_objects(objects)
        after = ckpt.list_objects(objects)
        print([type(obj).__name__ for obj in before] == [type(obj).__name__ for obj in after])
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


# --- registration of classes -----------------------------------------------------------


@pytest.mark.behaviour(283)
def test_a_class_is_known_by_package_and_name_both_ways():
    @ckpt.register_serializable()
    class Plain:
        pass

    @ckpt.register_serializable(package="Mine", name="Other.Name")
    class Named:
        pass

    assert registered_name(Plain()) == "Custom.Plain"
    assert registered_name(Named()) == "Mine.Other.Name"
    assert registered_class("Custom.Plain") is Plain
    assert registered_class("Mine.Other.Name") is Named


@pytest.mark.behaviour(284, 285)
def test_what_is_not_registered_has_no_name_and_no_class():
    assert registered_name(object()) is None
    assert registered_class("Custom.Nothing") is None


@pytest.mark.behaviour(286)
def test_a_class_may_have_two_names_of_which_the_newer_counts_but_a_name_one_class():
    class Model:
        pass

    ckpt.register_serializable(name="old")(Model)
    ckpt.register_serializable(name="new")(Model)
    assert registered_name(Model()) == "Custom.new"
    assert registered_class("Custom.old") is registered_class("Custom.new") is Model
    with pytest.raises(ckpt.RegistrationError, match="'Custom.new' is already registered"):
        ckpt.register_serializable(name="new")(Model)


@pytest.mark.behaviour(287, 288)
def test_only_classes_are_registered():
    with pytest.raises(TypeError, match="decorates classes"):
        ckpt.register_serializable()(lambda: None)
    with pytest.raises(TypeError, match="predicate .*must be callable"):
        ckpt.register_serializable(predicate="no")(Table)
    with pytest.raises(ValueError, match="Invalid registered class name"):
        ckpt.register_serializable(name="a/b")(Table)
    with pytest.raises(TypeError, match="must be strings"):
        ckpt.register_serializable(package=3)(Table)


@pytest.mark.behaviour(289)
def test_a_predicate_may_look_at_the_instance_and_a_later_broader_one_takes_over():
    class Model:
        def __init__(self, ready):
            self.ready = ready

    ckpt.register_serializable(
        name="Ready", predicate=lambda obj: isinstance(obj, Model) and obj.ready
    )(Model)
    assert registered_name(Model(True)) == "Custom.Ready"
    assert registered_name(Model(False)) is None
    ckpt.register_serializable(name="Any")(Model)
    assert registered_name(Model(True)) == registered_name(Model(False)) == "Custom.Any"


# --- saving ----------------------------------------------------------------------------


@pytest.mark.behaviour(320)
def test_one_call_saves_all_objects_of_a_saver_by_their_paths(tmp_path):
    tables, others = Tables(), Tables(name="Others", predicate=lambda obj: isinstance(obj, Other))
    one, two, three = Table([1]), Table([2]), Other([3])
    ckpt.save(tmp_path / "a", {"one": one, "more": {"two/2": two}, "three": three})
    assert tables.calls == [("save", {"one": one, "more/two.S2": two})]
    assert others.calls == [("save", {"three": three})]


class Other(Table):
    pass


def test_saver_and_object_name_are_stored_in_the_graph_and_no_value(tmp_path):
    Tables()
    path = ckpt.save(tmp_path / "a", {"x": {"y.z": Table([1])}})
    with ckpt.load_checkpoint(path) as reader:
        graph = reader.object_graph
    (node,) = [node for node in graph.nodes if node.saver]
    assert (node.saver.name, node.saver.object_name) == ("Custom.Tables", "x/y..z")
    assert node.attributes == ()
    assert node.has_values
    assert [label for label, _ in node.children] == ["scale"]


@pytest.mark.behaviour(303)
def test_a_saver_is_called_before_the_default_one(tmp_path):
    seen = []

    def look(objects, file_prefix):
        directory, name = os.path.split(file_prefix)
        seen.append((os.listdir(directory), name, os.path.exists(tmp_path / "a")))

    register("first", predicate=lambda obj: isinstance(obj, Table), save_fn=look)
    ckpt.save(tmp_path / "a", {"table": Table([1]), "array": np.ones(1000)})
    assert seen == [([], "Custom.first", False)]


def test_an_object_that_two_names_lead_to_is_given_once(tmp_path):
    tables, table = Tables(), Table([1])
    path = ckpt.Checkpoint(a=table, b=table).write(tmp_path / "a")
    assert tables.names("save") == [["a"]]
    restored = Table(None)
    ckpt.Checkpoint(a=restored, b=restored).read(path)
    assert tables.names("restore") == [["a"]]
    assert restored.rows == [1]


@pytest.mark.parametrize("shape", ["none", "prefix", "list", "nested"])
def test_a_saver_returns_none_a_shard_or_shards(tmp_path, shape):
    def save(tables, file_prefix):
        if shape == "none":
            return None
        if shape == "prefix":
            return ckpt.io.write_shard(file_prefix, {"a": np.ones(1), "b": np.ones(1)})
        shards = [ckpt.io.write_shard(f"{file_prefix}-{key}", {key: np.ones(1)}) for key in "ab"]
        return shards if shape == "list" else [[shards[0]], (shards[1],)]

    Tables(save_fn=save)
    path = ckpt.save(tmp_path / "a", {"table": Table([1])})
    expected = [] if shape == "none" else ["a", "b"]
    assert keys(path) == [*expected, "table/scale/.ATTRIBUTES/VARIABLE_VALUE"]


@pytest.mark.parametrize("result", [3, b"shard", {"a": 1}, ["shard", None, 3], object()])
def test_anything_else_that_a_saver_returns_is_refused(tmp_path, result):
    Tables(save_fn=lambda objects, prefix: result)
    with pytest.raises(ValueError, match="save_fn of the checkpoint saver 'Custom.Tables' must"):
        ckpt.save(tmp_path / "a", Table([1]))
    assert os.listdir(tmp_path) == []


def test_a_shard_written_elsewhere_is_moved_into_the_checkpoint(tmp_path):
    def save(tables, file_prefix):
        return ckpt.io.write_shard(str(tmp_path / "elsewhere"), {"rows": np.arange(3)})

    Tables(save_fn=save)
    path = ckpt.save(tmp_path / "a", Table([1]))
    assert os.listdir(tmp_path) == ["a"]
    assert ckpt.io.read_slices(path, {"rows": None})["rows"].tolist() == [0, 1, 2]


def test_two_savers_may_not_write_under_one_key(tmp_path):
    def save(objects, file_prefix):
        return ckpt.io.write_shard(file_prefix, {"same": np.ones(2)})

    Tables(save_fn=save)
    Tables(name="Others", predicate=lambda obj: isinstance(obj, Other), save_fn=save)
    with pytest.raises(ckpt.ShardError, match="same"):
        ckpt.save(tmp_path / "a", {"x": Table([1]), "y": Other([1])})
    assert os.listdir(tmp_path) == []


def test_a_value_that_cannot_be_saved_is_found_before_any_saver_is_called(tmp_path):
    class Broken(ckpt.PythonState):
        def serialize(self):
            raise RuntimeError("not now")

    tables = Tables()
    with pytest.raises(ckpt.UnsaveableError, match="not now"):
        ckpt.save(tmp_path / "a", {"table": Table([1]), "broken": Broken()})
    assert tables.calls == []


ASYNC = ckpt.CheckpointOptions(enable_async=True)


@pytest.mark.behaviour(321)
def test_registered_savers_get_the_objects_themselves_while_save_blocks(tmp_path):
    seen = []

    def save(objects, file_prefix):
        seen.append((dict(objects), threading.current_thread()))
        values = {name: table.copies[0].value for name, table in objects.items()}
        return ckpt.io.write_shard(file_prefix, values)

    def restore(objects, merged_prefix):
        for name, table in objects.items():
            table.assign(ckpt.io.read_slices(merged_prefix, {name: None})[name])

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Mirrored",
            predicate=lambda obj: isinstance(obj, Mirrored),
            save_fn=save,
            restore_fn=restore,
        )
        m = Mirrored(2.0)
        checkpoint = ckpt.Checkpoint(m=m, v=ckpt.Variable(jnp.ones(3)))
        path = checkpoint.save(tmp_path / "ckpt", ASYNC)
        assert seen == [({"m": m}, threading.main_thread())]
        m.assign(9.0)
        checkpoint.restore(path).assert_consumed()
        assert [float(v.value) for v in m.copies] == [2.0, 2.0]


# --- restoring -------------------------------------------------------------------------


def test_several_objects_and_their_children_come_back(tmp_path):
    tables = Tables()
    path = ckpt.Checkpoint(a=Table([1, 2], 3.0), b=Table([4], 5.0)).write(tmp_path / "a")
    a, b = Table(None), Table(None)
    ckpt.Checkpoint(a=a, b=b).read(path).assert_consumed()
    assert (a.rows.tolist(), b.rows.tolist()) == ([1, 2], [4])
    assert (float(a.scale.value), float(b.scale.value)) == (3.0, 5.0)
    assert tables.names("restore") == [["a", "b"]]


@pytest.mark.behaviour(298, 299)
def test_one_of_two_objects_is_restored_and_then_the_other_into_the_same_object(tmp_path):
    tables = Tables()
    path = ckpt.Checkpoint(a=Table([1]), b=Table([2])).write(tmp_path / "a")
    table = Table(None)
    ckpt.Checkpoint(a=table).read(path).expect_partial()
    assert table.rows == [1]
    ckpt.Checkpoint(b=table).read(path).expect_partial()
    assert table.rows == [2]
    assert tables.names("restore") == [["a"], ["b"]]


def test_a_restore_function_gets_the_objects_bound_in_its_pass(tmp_path):
    tables = Tables()
    path = ckpt.Checkpoint(a=Table([1]), b=Table([2])).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint(a=Table(None))
    status = checkpoint.read(path)
    assert tables.names("restore") == [["a"]]
    checkpoint.b = Table(None)
    assert tables.names("restore") == [["a"], ["b"]]
    assert checkpoint.b.rows == [2]
    status.assert_consumed()


def test_objects_of_nnx_are_given_to_savers(tmp_path):
    class Module(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    saved = []

    def save(variables, file_prefix):
        saved.extend(variables)
        return ckpt.io.write_shard(file_prefix, {k: v.get_value() for k, v in variables.items()})

    def restore(variables, merged_prefix):
        for name, value in ckpt.io.read_slices(merged_prefix, dict.fromkeys(variables)).items():
            variables[name].set_value(jnp.asarray(value))

    ckpt.register_checkpoint_saver(
        name="Params",
        predicate=lambda obj: isinstance(obj, nnx.Param),
        save_fn=save,
        restore_fn=restore,
    )
    module, fresh = Module(), Module()
    path = ckpt.save(tmp_path / "a", module)
    assert sorted(saved) == ["linear/bias", "linear/kernel"]
    fresh.linear.kernel.set_value(jnp.zeros((2, 3)))
    ckpt.restore(path, fresh)
    np.testing.assert_array_equal(fresh.linear.kernel.get_value(), module.linear.kernel.get_value())


def test_a_missing_saver_fails_by_name_and_nothing_changes(tmp_path):
    with ckpt.registration_scope():
        Tables()
        path = ckpt.Checkpoint(a=Table([1]), b=np.ones(2)).write(tmp_path / "a")
    table = Table([9], 9.0)
    checkpoint = ckpt.Checkpoint(a=table, b=np.zeros(2))
    with pytest.raises(ckpt.RegistrationError, match=r"cannot be found: 'Custom.Tables'"):
        checkpoint.read(path)
    assert (table.rows, float(table.scale.value)) == ([9], 9.0)
    assert checkpoint.b.tolist() == [0, 0]


@pytest.mark.behaviour(294, 302)
def test_a_strict_saver_refuses_another_type_by_name_and_path(tmp_path):
    Tables()
    path = ckpt.Checkpoint(a=Table([1])).write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"'Custom.Tables' cannot be used to restore a:"):
        ckpt.Checkpoint(a=ckpt.AutoTrackable()).read(path)


@pytest.mark.behaviour(301)
def test_a_lenient_saver_skips_another_type_but_restores_its_children(tmp_path):
    tables = Tables(strict_predicate_restore=False)
    path = ckpt.Checkpoint(a=Table([1], 5.0)).write(tmp_path / "a")
    other = ckpt.AutoTrackable()
    other.scale = ckpt.Variable(jnp.float32(0))
    ckpt.Checkpoint(a=other).read(path)
    assert float(other.scale.value) == 5.0
    assert tables.names("restore") == []


def test_a_lenient_saver_restores_the_objects_that_it_takes(tmp_path):
    tables = Tables(strict_predicate_restore=False)
    path = ckpt.Checkpoint(a=Table([1]), b=Table([2])).write(tmp_path / "a")
    b = Table(None)
    ckpt.Checkpoint(a=ckpt.AutoTrackable(), b=b).read(path)
    assert tables.names("restore") == [["b"]]
    assert b.rows == [2]


@pytest.mark.parametrize("result", [3, ["a"], {"c": 1}])
def test_a_restore_function_returns_none_or_values_by_the_names_it_got(tmp_path, result):
    Tables(restore_fn=lambda objects, prefix: result)
    path = ckpt.Checkpoint(a=Table([1])).write(tmp_path / "a")
    with pytest.raises(ckpt.RegistrationError, match=r"restore_fn .*'Custom.Tables'"):
        ckpt.Checkpoint(a=Table(None)).read(path)


def test_a_saver_can_name_the_values_it_stores_for_readers(tmp_path):
    Tables()
    path = ckpt.save(tmp_path / "a", {"t": Table([1, 2])})
    with ckpt.load_checkpoint(path) as reader:
        assert reader.get_tensor("t/rows").tolist() == [1, 2]
        assert reader.get_tensor("t/rows", ((1, 2),)).tolist() == [2]
        assert reader.get_variable_to_shape_map()["t/rows"] == (2,)
    assert ("t/rows", (2,)) in ckpt.list_variables(path)
    assert ckpt.verify(path).ok


def test_a_registered_object_without_a_place_is_unexpected_in_a_strict_restore(tmp_path):
    Tables()
    path = ckpt.save(tmp_path / "a", {"t": Table([1]), "step": 7})
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, {"step": 0})
    assert "t" in [entry.path for entry in caught.value.report.unexpected]


# --- migration -------------------------------------------------------------------------


class Before(ckpt.Trackable):
    """A table as it was before it had a saver."""

    def __init__(self, rows):
        self.assign(rows)

    def assign(self, rows):
        self.rows = rows

    def serialize_to_arrays(self):
        return {"rows": self.rows}

    def restore_from_arrays(self, arrays):
        self.assign(arrays["rows"])


@pytest.mark.behaviour(304)
def test_a_saver_restores_what_the_default_one_saved_under_its_key(tmp_path):
    path = ckpt.Checkpoint(t=Before(np.array([1, 2]))).write(tmp_path / "a")
    tables, table = Tables(), Table(None)
    ckpt.Checkpoint(t=table).read(path)
    assert tables.names("restore") == [["t/.ATTRIBUTES/rows"]]
    assert table.rows.tolist() == [1, 2]


def test_an_object_goes_back_to_the_default_saver(tmp_path):
    saved = Before(np.array([1, 2]))
    with ckpt.registration_scope():
        Tables(predicate=lambda obj: isinstance(obj, Before))
        with_saver = ckpt.Checkpoint(t=saved).write(tmp_path / "with")
        restored = Before(np.zeros(2))
        ckpt.Checkpoint(t=restored).read(with_saver)
        unregister_checkpoint_saver("Custom.Tables")
        without = ckpt.Checkpoint(t=restored).write(tmp_path / "without")
    assert keys(without) == ["t/.ATTRIBUTES/rows"]
    again = Before(np.zeros(2, np.int64))
    ckpt.Checkpoint(t=again).read(without).assert_consumed()
    assert again.rows.tolist() == [1, 2]


def test_the_saver_that_the_checkpoint_names_restores_where_a_newer_one_saves(tmp_path):
    old = Tables()
    path = ckpt.Checkpoint(t=Table([1])).write(tmp_path / "a")
    new = Tables(name="New")
    table = Table(None)
    checkpoint = ckpt.Checkpoint(t=table)
    checkpoint.read(path)
    assert (old.names("restore"), new.names("restore")) == ([["t"]], [])
    ckpt.Checkpoint(t=Table(None)).read(checkpoint.write(tmp_path / "b"))
    assert new.names("restore") == [["t"]]


def test_a_saver_of_the_checkpoint_that_the_program_lacks_is_reported(path):
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="T",
            predicate=lambda obj: isinstance(obj, Values),
            save_fn=lambda objects, prefix: None,
            restore_fn=lambda objects, prefix: None,
        )
        ckpt.Checkpoint(t=Values(v=1.0), v=var(1.0)).write(path)
        report = ckpt.Checkpoint(v=var(0.0)).read(path).report
        assert [entry.path for entry in (*report.deferred, *report.unexpected)] == ["t"]


# --- immutable values ------------------------------------------------------------------


def register_halves(predicate):
    """A saver that keeps arrays in half precision, and returns new ones."""

    def save(arrays, file_prefix):
        halves = {name: jnp.asarray(array, jnp.float16) for name, array in arrays.items()}
        return ckpt.io.write_shard(file_prefix, halves)

    def restore(arrays, merged_prefix):
        requests = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in arrays.items()
        }
        return ckpt.io.read_slices(merged_prefix, requests)

    ckpt.register_checkpoint_saver(
        name="Half", predicate=predicate, save_fn=save, restore_fn=restore
    )


def is_float(obj):
    return isinstance(obj, jax.Array | jax.ShapeDtypeStruct) and obj.dtype == jnp.float32


@pytest.mark.parametrize("root", [True, False])
def test_a_leaf_is_replaced_by_what_the_restore_function_returns(tmp_path, root):
    register_halves(is_float)
    value = jnp.float32([1.0, 0.1])
    tree = value if root else {"w": (value, 7)}
    path = ckpt.save(tmp_path / "a", tree)
    target = jnp.zeros(2) if root else {"w": (jnp.zeros(2), 0)}
    restored = ckpt.restore(path, target)
    leaf = restored if root else restored["w"][0]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, np.float32(np.float16([1.0, 0.1])))
    np.testing.assert_array_equal(jax.tree.leaves(target)[0], [0.0, 0.0])


def test_the_parameters_of_a_linen_module_go_through_a_saver_leaf_by_leaf(tmp_path, mesh42):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Dense(8)(x))

    register_halves(is_float)
    params = Net().init(jax.random.key(0), jnp.ones((1, 16)))
    sharding = NamedSharding(mesh42, P("model"))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params
    )
    path = ckpt.save(tmp_path / "a", {"variables": params, "step": 3})
    assert len([key for key in keys(path) if key.startswith("variables/")]) == 4
    restored = ckpt.restore(path, {"variables": target, "step": 0})
    assert restored["step"] == 3
    for leaf, expected in zip(
        jax.tree.leaves(restored["variables"]), jax.tree.leaves(params), strict=True
    ):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, np.float32(np.float16(expected)))


def test_a_whole_tree_is_replaced_by_what_the_restore_function_returns(tmp_path):
    def save(trees, file_prefix):
        values = {
            f"{name}/{key}": leaf for name, tree in trees.items() for key, leaf in tree.items()
        }
        return ckpt.io.write_shard(file_prefix, values)

    def restore(trees, merged_prefix):
        return {
            name: {
                key: -ckpt.io.read_slices(merged_prefix, {f"{name}/{key}": None})[f"{name}/{key}"]
                for key in tree
            }
            for name, tree in trees.items()
        }

    register("Tree", predicate=is_parameters, save_fn=save, restore_fn=restore)
    path = ckpt.Checkpoint(params={"kernel": np.ones(2), "bias": np.ones(1)}).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint(params={"kernel": np.zeros(2), "bias": np.zeros(1)})
    checkpoint.read(path)
    assert checkpoint.params["kernel"].tolist() == [-1, -1]
    assert checkpoint.params["bias"].tolist() == [-1]


def is_parameters(obj):
    return isinstance(obj, dict) and set(obj) == {"kernel", "bias"}


def test_a_leaf_that_two_names_lead_to_restores_into_two_leaves(tmp_path):
    register_halves(is_float)
    value = jnp.float32([1.0, 2.0])
    path = ckpt.save(tmp_path / "a", {"x": value, "y": value})
    restored = ckpt.restore(path, {"x": jnp.zeros(2), "y": jnp.zeros(2)})
    np.testing.assert_array_equal(restored["x"], [1.0, 2.0])
    np.testing.assert_array_equal(restored["y"], [1.0, 2.0])


def test_a_plain_leaf_migrates_to_a_saver(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.float32([1.0, 0.1])})
    register_halves(is_float)
    restored = ckpt.restore(path, {"w": jnp.zeros(2)})
    np.testing.assert_array_equal(restored["w"], np.float32([1.0, 0.1]))


def test_a_saver_that_restores_no_value_leaves_no_placeholder_behind(tmp_path: Path):
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Forgetful",
            predicate=lambda obj: isinstance(obj, jax.Array | jax.ShapeDtypeStruct),
            save_fn=lambda objects, prefix: None,
            restore_fn=lambda objects, prefix: None,
        )
        path = ckpt.save(tmp_path / "a", {"w": jnp.ones(2)})
        with pytest.raises(ckpt.RegistrationError, match="returned no values for w"):
            ckpt.restore(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
        assert ckpt.restore(path, {"w": jnp.full(2, 5.0)})["w"].tolist() == [5, 5]


# --- objects of any class ---------------------------------------------------------------


class Foreign:
    """An object of which nobody knows anything but a registered saver."""

    def __init__(self, rows: Any):
        self.rows = rows


@pytest.fixture
def foreign_saver():
    def save_fn(trackables: dict[str, Any], file_prefix: str) -> str:
        return ckpt.io.write_shard(file_prefix, {k: t.rows for k, t in trackables.items()})

    def restore_fn(trackables: dict[str, Any], merged_prefix: str) -> None:
        rows = ckpt.io.read_slices(merged_prefix, dict.fromkeys(trackables))
        for name, table in trackables.items():
            table.rows = rows[name]

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Foreign",
            predicate=lambda obj: isinstance(obj, Foreign),
            save_fn=save_fn,
            restore_fn=restore_fn,
        )
        yield


@pytest.mark.usefixtures("foreign_saver")
def test_a_registered_saver_takes_objects_of_any_class(tmp_path: Path):
    class Model(nnx.Module):
        def __init__(self, value: float):
            self.tables = nnx.List([Foreign(np.full(1, value)), Foreign(np.full(2, value))])

    def objects(value: float) -> ckpt.Checkpoint:
        return ckpt.Checkpoint(
            table=Foreign(np.full(3, value)),
            tree={"x": jnp.full(2, value), "tables": [Foreign(np.full(4, value))]},
            model=Model(value),
        )

    options = ckpt.CheckpointOptions(enable_async=True)
    saved = objects(7.0)
    path = saved.save(tmp_path / "ckpt", options)
    saved.sync()
    fresh = objects(0.0)
    tables = [fresh.table, fresh.tree["tables"][0], *fresh.model.tables]
    fresh.restore(path).assert_consumed()
    assert [table.rows.tolist() for table in tables] == [[7.0] * n for n in (3, 4, 1, 2)]

    late = ckpt.Checkpoint()
    status = late.restore(path)
    late.table = table = Foreign(None)
    assert table.rows.tolist() == [7, 7, 7]
    late.tree, late.model = objects(0.0).tree, Model(0.0)
    status.assert_consumed()


def test_an_object_that_neither_view_nor_saver_knows_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="table=Foreign: nothing is known"):
        ckpt.Checkpoint(table=Foreign(1))
    with pytest.raises(ckpt.UnsaveableError, match=r"tree/0: .*Foreign has no view"):
        ckpt.save(tmp_path / "a", {"tree": [Foreign(1)]})
