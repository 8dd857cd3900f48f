"""Objects made anew from a checkpoint alone: what they become, what runs, what is refused."""

import dataclasses
import enum
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parts import part, replace_part

import ckpt_jax as ckpt
from ckpt_jax.graph._proto import saved_object_graph_pb2 as pb
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY
from ckpt_jax.store.seal import seal, unseal


@pytest.fixture(autouse=True)
def scope():
    with ckpt.registration_scope():
        yield


def saved_objects(path):
    return pb.SavedObjectGraph.FromString(unseal(part(path, SAVED_OBJECTS_KEY)))


def anew(obj, path):
    return ckpt.load_object(ckpt.save_object(obj, path))


def cycle(obj, directory, cycles=3):
    """Saves and loads several times; both graphs have to stay what they are, to the byte."""
    graphs = set()
    for number in range(cycles):
        path = ckpt.save_object(obj, directory / f"cycle-{number}")
        graphs.add((part(path, OBJECT_GRAPH_KEY), part(path, SAVED_OBJECTS_KEY)))
        obj = ckpt.load_object(path)
    assert len(graphs) == 1
    return obj


def module(**children):
    result = ckpt.AutoTrackable()
    for name, child in children.items():
        setattr(result, name, child)
    return result


# --- the graph stays what it is --------------------------------------------------------


class Unregistered(ckpt.AutoTrackable):
    """A class that no program is told of."""


def test_nested_trackables_and_variables_stay_the_same_over_three_cycles(tmp_path):
    root = module(a=ckpt.Variable(jnp.arange(3.0)), b=module(c=module(d=ckpt.Variable(2))))
    root = cycle(root, tmp_path)
    assert type(root) is type(root.b.c) is ckpt.AutoTrackable
    assert type(root.b.c.d) is ckpt.Variable
    assert root.a.value.tolist() == [0, 1, 2]
    assert root.b.c.d.value == 2


def test_containers_of_anything_stay_the_same_over_three_cycles(tmp_path):
    values = {
        "list": [1, [], [2.5, {}]],
        "tuple": (True, (), ("x",)),
        0: b"\xff",
        "0": None,
        b"k": {"deep": [({"er": 3j},)]},
        "big": 2**100,
    }
    assert repr(cycle(values, tmp_path)) == repr(values)


def test_values_come_back_as_the_kinds_that_they_were(tmp_path):
    tree = {
        "jax": jnp.arange(4, dtype=jnp.bfloat16),
        "numpy": np.arange(4, dtype=np.int16),
        "scalar": np.float32(2.5),
        "key": jax.random.key(3, impl="rbg"),
        "keys": jax.random.split(jax.random.key(1), 3),
        "empty": jnp.zeros((0, 3)),
        "text": "é",
    }
    back = cycle(tree, tmp_path)
    assert isinstance(back["jax"], jax.Array) and back["jax"].dtype == jnp.bfloat16
    assert type(back["numpy"]) is np.ndarray and back["numpy"].dtype == np.int16
    assert type(back["scalar"]) is np.float32
    for name in ("key", "keys"):
        assert back[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(
            jax.random.key_data(back[name]), jax.random.key_data(tree[name])
        )
    assert back["empty"].shape == (0, 3)
    assert back["text"] == "é"


@pytest.mark.parametrize("value", [jnp.ones(2), np.ones(2), 7, jax.random.key(0), "text"])
def test_a_variable_holds_what_it_held(tmp_path, value):
    box = ckpt.Variable(np.zeros(1))
    box._value = value
    back = cycle(box, tmp_path)
    assert type(back) is ckpt.Variable
    assert type(back.value) is type(value)
    assert str(back.value) == str(value)


def test_what_was_shared_is_shared_and_cycles_close(tmp_path):
    v, array = ckpt.Variable(jnp.ones(2)), jnp.ones(3)
    root = module(v=v, list=[v, {"again": v}], child=module(v=v))
    root.child.parent = root
    root.me = [(root,)]
    root.tied = {"a": array, "b": array}
    root = cycle(root, tmp_path)
    assert root.v is root.list[0] is root.list[1]["again"] is root.child.v
    assert root.child.parent is root.me[0][0] is root
    assert root.tied["a"] is root.tied["b"]


def test_a_class_that_is_not_registered_becomes_a_plain_trackable_that_says_what_it_was(tmp_path):
    root = Unregistered()
    root.v = ckpt.Variable(1.0)  # weakly typed, as restored arrays never are
    root.rest = Unregistered()
    back = cycle(root, tmp_path)
    assert type(back) is type(back.rest) is ckpt.AutoTrackable
    names = [node.type_name for node in ckpt.object_metadata(tmp_path / "cycle-2").nodes]
    assert names[0].endswith("test_revive.Unregistered")


def test_scalars_given_to_a_checkpoint_stay_state(tmp_path):
    checkpoint = ckpt.Checkpoint(step=7, model=module(w=ckpt.Variable(jnp.ones(2))))
    assert checkpoint.save_counter == 0
    back = cycle(checkpoint, tmp_path)
    assert (back.step, back.save_counter.value) == (7, 0)
    assert sorted(back.trackable_children()) == ["model", "save_counter", "step"]


def test_an_array_of_another_program_lies_on_the_default_device(tmp_path, mesh42):
    array = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh42, P("data")))
    back = anew({"x": array}, tmp_path / "a")
    assert back["x"].sharding == jnp.zeros(1).sharding
    np.testing.assert_array_equal(back["x"], array)


def test_64_bit_arrays_keep_their_bits(tmp_path):
    with jax.enable_x64(True):
        tree = module(x=jnp.float64(1) / 3, v=ckpt.Variable(jnp.arange(2, dtype=jnp.int64) << 40))
    back = anew(tree, tmp_path / "a")
    assert (back.x.dtype, back.v.value.dtype) == (np.float64, np.int64)
    assert np.asarray(back.x) == 1 / 3
    assert np.asarray(back.v.value).tolist() == [0, 1 << 40]


class Moments(NamedTuple):
    mu: object
    nu: object


@struct.dataclass
class State:
    params: object
    step: int = 0


class Mode(enum.Enum):
    TRAIN = 1


def test_other_containers_become_dicts_and_enums_members_as_load_gives_them(tmp_path):
    tree = [Moments(1, {"x": 2}), State({"w": np.ones(2)}, 3), Mode.TRAIN]
    path = ckpt.save_object(tree, tmp_path / "a")
    back = ckpt.load_object(path)
    assert repr(back) == repr(ckpt.load(path))
    assert back[0] == {"mu": 1, "nu": {"x": 2}}
    assert back[2] is Mode.TRAIN
    objects = part(path, SAVED_OBJECTS_KEY)
    again = ckpt.save_object(back, tmp_path / "b")
    assert part(again, SAVED_OBJECTS_KEY) == objects


def test_flax_modules_become_trackables_of_variables(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.layers = nnx.List([nnx.Param(jnp.ones(2))])

    model = Model()
    back = cycle(anew(model, tmp_path / "a"), tmp_path)
    assert type(back) is type(back.linear) is ckpt.AutoTrackable
    assert type(back.linear.kernel) is type(back.layers[0]) is ckpt.Variable
    np.testing.assert_array_equal(back.linear.kernel.value, model.linear.kernel.get_value())


# --- an ordinary checkpoint ------------------------------------------------------------


def test_the_result_is_an_ordinary_checkpoint(tmp_path):
    root = module(w=ckpt.Variable(jnp.arange(2.0)), rest=[np.ones(1), "x"])
    path = ckpt.save_object(root, tmp_path / "a")
    assert path == str(tmp_path / "a")
    assert ckpt.verify(path).ok
    assert repr(ckpt.load(path)["rest"]) == "[array([1.]), 'x']"
    fresh = module(w=ckpt.Variable(jnp.zeros(2)), rest=[np.zeros(1), ""])
    ckpt.Checkpoint(fresh).read(path).assert_consumed()
    assert fresh.w.value.tolist() == [0, 1]
    with pytest.raises(FileExistsError):
        ckpt.save_object(root, path)
    ckpt.save_object(module(), path, overwrite=True)
    assert ckpt.load_object(path).trackable_children() == {}


def test_a_checkpoint_without_objects_says_which_verb_reads_it(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    with pytest.raises(ckpt.CheckpointError, match=r"not by ckpt\.save_object.*ckpt\.load"):
        ckpt.load_object(path)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load_object(tmp_path / "b")


def test_the_message_is_what_the_page_on_the_format_says(tmp_path):
    v = ckpt.Variable(jnp.ones((2, 3), jnp.bfloat16))
    path = ckpt.save_object(module(v=v, list=[np.ones(2), None]), tmp_path / "a")
    graph = saved_objects(path)
    assert graph.format_version == 1
    kinds = [node.user_object.identifier or node.WhichOneof("kind") for node in graph.nodes]
    assert kinds == ["object", "variable", "list", "value", "none"]
    variable = graph.nodes[1].variable
    assert pb.DataType.Name(variable.dtype) == "DT_BFLOAT16"
    assert ([dim.size for dim in variable.shape.dim], variable.name) == ([2, 3], "v")
    ids = [[(c.local_name, c.node_id) for c in node.children] for node in graph.nodes]
    nodes = ckpt.object_metadata(path).nodes
    assert ids == [[(str(label), child) for label, child in node.children] for node in nodes]


# --- registered classes ----------------------------------------------------------------


@pytest.mark.behaviour(295)
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_a_registered_class_is_made_with_the_message_that_it_wrote(tmp_path, cycles):
    @ckpt.register_serializable()
    class Module(ckpt.AutoTrackable):
        def __init__(self, name):
            self.v = ckpt.Variable(jnp.float32(1))
            self.name = name

        def _serialize_to_proto(self, object_proto=None, **kwargs):
            return StringValue(value=self.name)

        @classmethod
        def _deserialize_from_proto(cls, proto, **unused_kwargs):
            assert proto.Is(StringValue.DESCRIPTOR)
            proto.Unpack(text := StringValue())
            return cls(text.value)

    root = Module("a")
    root.v.assign(jnp.float32(5))
    root.b = Module("b")
    root.b.v = root.v
    root = cycle(root, tmp_path, cycles)
    assert type(root) is type(root.b) is Module
    assert (root.name, root.b.name, float(root.v.value)) == ("a", "b", 5.0)
    assert root.v is root.b.v


@pytest.mark.behaviour(295)
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_a_class_that_writes_nothing_is_given_an_empty_message(tmp_path, cycles):
    @ckpt.register_serializable()
    class Module(ckpt.AutoTrackable):
        def __init__(self, name="made"):
            self.v = ckpt.Variable(jnp.float32(1))
            self.name = name

        @classmethod
        def _deserialize_from_proto(cls, proto, **unused_kwargs):
            assert type(proto) is AnyMessage
            assert proto.ByteSize() == 0
            return cls("made anew")

    root = Module()
    root.v.assign(jnp.float32(5))
    root = cycle(root, tmp_path, cycles)
    assert (root.name, float(root.v.value)) == ("made anew", 5.0)


@pytest.mark.behaviour(295)
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_dependencies_are_made_first_with_their_values_and_given_by_name(tmp_path, cycles):
    @ckpt.register_serializable()
    class Module(ckpt.AutoTrackable):
        def __init__(self, v, parts):
            self.v = v
            self.parts = parts
            self.first = float(v.value)

        def _deserialization_dependencies(self, children):
            assert sorted(children) == ["parts", "v"]
            return {"v": self.v, "items": children["parts"]}

        @classmethod
        def _deserialize_from_proto(cls, dependencies, **unused_kwargs):
            return cls(dependencies["v"], dependencies["items"])

    root = module(deep=Module(ckpt.Variable(jnp.float32(5)), [Module(ckpt.Variable(6.0), {})]))
    root.same = root.deep.v
    root = cycle(root, tmp_path, cycles)
    assert (root.deep.first, root.deep.parts[0].first) == (5.0, 6.0)
    assert root.same is root.deep.v


def test_a_class_without_methods_is_called_without_arguments_and_given_its_children(tmp_path):
    @ckpt.register_serializable()
    class Given(ckpt.Trackable):
        def __init__(self):
            self.got = []

        def _add_trackable_child(self, name, value):
            self.got.append(name)
            super()._add_trackable_child(name, value)

    given = Given()
    given.track("b", ckpt.Variable(jnp.ones(2)))
    given.track("a", [1])
    back = cycle(given, tmp_path)
    assert (type(back), back.got) == (Given, ["b", "a"])
    assert back.trackable_children()["b"].value.tolist() == [1, 1]


def test_registered_containers_and_variables_are_made_of_their_parts(tmp_path):
    class Weight(ckpt.Variable):
        pass

    @dataclasses.dataclass
    class Pair:
        a: object
        b: object

    for cls in (Moments, State, Pair, Weight):
        ckpt.register_serializable()(cls)
    tree = (Moments(Weight(jnp.ones(2)), [1]), State(Pair(1, State(2)), 3))
    back = cycle(tree, tmp_path)
    assert isinstance(back[0], Moments) and isinstance(back[0].mu, Weight)
    assert back[0].mu.value.tolist() == [1, 1]
    assert back[1] == tree[1]


def test_values_that_objects_take_in_themselves_are_restored(tmp_path):
    @ckpt.register_serializable()
    class Counter(ckpt.Trackable):
        total, history = 0, None

        def serialize_to_arrays(self):
            return {"total": self.total, "history": jnp.full(2, self.total)}

        def restore_from_arrays(self, arrays):
            self.total, self.history = arrays["total"], arrays["history"]

    @ckpt.register_serializable()
    class Position(ckpt.PythonState):
        at = ""

        def serialize(self):
            return self.at

        def deserialize(self, value):
            self.at = value.decode()

    root = module(counter=Counter(), positions=[Position()])
    root.counter.total = 3
    root.positions[0].at = "here"
    back = cycle(root, tmp_path)
    assert (back.counter.total, back.counter.history.tolist()) == (3, [3, 3])
    assert back.positions[0].at == "here"


def test_a_module_that_a_registered_class_makes_is_kept_and_restored_in_place(tmp_path):
    @ckpt.register_serializable()
    class Agent(ckpt.AutoTrackable):
        def __init__(self):
            self.net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.more = [nnx.Linear(2, 2, rngs=nnx.Rngs(0))]

    @ckpt.register_serializable()
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
            self.raw = jnp.zeros(2)

    root = {"agent": Agent(), "net": Net()}
    root["agent"].net.kernel.set_value(jnp.ones((2, 3)))
    root["agent"].more[0].kernel.set_value(2 * jnp.ones((2, 2)))
    root["net"].linear.kernel.set_value(3 * jnp.ones((2, 3)))
    root["net"].raw = jnp.ones(2)
    root["net"].drop(jnp.ones(3))  # its generator moves on
    root["net"].linear.bias = root["agent"].net.bias
    back = cycle(root, tmp_path)
    assert isinstance(back["agent"].net, nnx.Linear) and isinstance(back["net"], Net)
    assert back["agent"].net(jnp.ones((1, 2))).tolist() == [[2, 2, 2]]
    assert back["agent"].more[0](jnp.ones((1, 2))).tolist() == [[4, 4]]
    assert back["net"].linear(jnp.ones((1, 2))).tolist() == [[6, 6, 6]]
    assert back["net"].raw.tolist() == [1, 1]
    assert back["net"].linear.bias is back["agent"].net.bias
    np.testing.assert_array_equal(back["net"].drop(jnp.ones(9)), root["net"].drop(jnp.ones(9)))


def test_slots_go_into_the_optimizer_that_made_them(tmp_path):
    @ckpt.register_serializable()
    class Optimizer(ckpt.AutoTrackable):
        def __init__(self, variables):
            self.variables = list(variables)
            self.own = ckpt.NoDependency(
                {("m", v): ckpt.Variable(jnp.zeros_like(v.value)) for v in variables}
            )

        def slots(self):
            return self.own

        def _deserialization_dependencies(self, children):
            return {"variables": children["variables"]}

        @classmethod
        def _deserialize_from_proto(cls, dependencies, **kwargs):
            return cls(dependencies["variables"])

    v = ckpt.Variable(jnp.ones(2))
    root = module(v=v, optimizer=Optimizer([v]))
    root.optimizer.own["m", v].assign(jnp.full(2, 9.0))
    back = cycle(root, tmp_path)
    assert back.optimizer.own["m", back.v].value.tolist() == [9, 9]


def test_a_predicate_chooses_the_class(tmp_path):
    class One(ckpt.AutoTrackable):
        pass

    @ckpt.register_serializable(predicate=lambda obj: isinstance(obj, One))
    class Other(ckpt.AutoTrackable):
        pass

    assert type(anew(One(), tmp_path / "a")) is Other


def test_what_a_changed_class_no_longer_takes_is_named_and_what_it_adds_keeps_its_value(tmp_path):
    class Before(ckpt.Trackable):
        def serialize_to_arrays(self):
            return {"old": 1}

        def restore_from_arrays(self, arrays):
            raise AssertionError

    class After(ckpt.AutoTrackable):
        def __init__(self):
            self.new = ckpt.Variable(jnp.ones(2))

    with ckpt.registration_scope():
        ckpt.register_serializable(name="Model")(Before)
        path = ckpt.save_object(module(m=Before(), w=1), tmp_path / "a")
        empty = ckpt.save_object(
            ckpt.register_serializable(name="X")(Unregistered)(), tmp_path / "b"
        )
    ckpt.register_serializable(name="Model")(After)
    with pytest.raises(ckpt.RestoreMismatchError, match="m: int") as caught:
        ckpt.load_object(path)
    assert [e.path for e in caught.value.report.unexpected] == ["m"]
    ckpt.register_serializable(name="X")(After)
    assert ckpt.load_object(empty).new.value.tolist() == [1, 1]


def test_errors_of_a_class_say_which_object_they_were_about(tmp_path):
    @ckpt.register_serializable()
    class Model(ckpt.AutoTrackable):
        def __init__(self, needed):
            pass

    path = ckpt.save_object({"a": {"b": Model(1)}}, tmp_path / "a")
    with pytest.raises(TypeError) as caught:
        ckpt.load_object(path)
    assert caught.value.__notes__ == ["while making a/b anew as 'Custom.Model'"]


# --- registered savers -----------------------------------------------------------------


class Rows(ckpt.AutoTrackable):
    """Rows that a saver saves, beside a child that is saved as usual."""

    def __init__(self):
        self.rows = ckpt.NoDependency(None)


def register_rows():
    def save(tables, file_prefix):
        values = {f"{name}/rows": table.rows for name, table in tables.items()}
        return ckpt.io.write_shard(file_prefix, values)

    def restore(tables, merged_prefix):
        for name, table in tables.items():
            key = f"{name}/rows"
            rows = ckpt.io.read_slices(merged_prefix, {key: None})[key]
            table.rows = ckpt.NoDependency(rows)

    ckpt.register_checkpoint_saver(
        name="Rows",
        predicate=lambda obj: isinstance(obj, Rows),
        save_fn=save,
        restore_fn=restore,
    )


@pytest.mark.behaviour(296)
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_registered_savers_restore_the_objects_that_are_made_anew(tmp_path, cycles):
    register_rows()
    ckpt.register_serializable()(Rows)
    root = module(table=Rows())
    root.table.rows = ckpt.NoDependency(np.arange(3))
    root.table.scale = ckpt.Variable(jnp.float32(2))
    root = cycle(root, tmp_path, cycles)
    assert type(root.table) is Rows
    assert root.table.rows.tolist() == [0, 1, 2]
    assert float(root.table.scale.value) == 2


def test_a_saver_restores_arrays_and_variables_that_need_no_class(tmp_path):
    def taken(obj):
        value = obj.value if isinstance(obj, ckpt.Variable) else obj
        return isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct) and value.ndim == 2

    def save(objects, prefix):
        plain = {k: v.value if isinstance(v, ckpt.Variable) else v for k, v in objects.items()}
        return ckpt.io.write_shard(prefix, plain)

    def restore(objects, prefix):
        found = ckpt.io.read_slices(prefix, dict.fromkeys(objects))
        new = {}
        for name, obj in objects.items():
            if isinstance(obj, ckpt.Variable):
                obj.assign(jnp.asarray(found[name]))
            else:
                new[name] = found[name] if type(obj) is np.ndarray else jnp.asarray(found[name])
        return new

    ckpt.register_checkpoint_saver(name="M", predicate=taken, save_fn=save, restore_fn=restore)
    tree = [ckpt.Variable(jnp.ones((1, 2))), np.full((2, 1), 3), (jnp.zeros((2, 2)),)]
    back = cycle(tree, tmp_path)
    assert isinstance(back[0], ckpt.Variable) and back[0].value.tolist() == [[1, 1]]
    assert type(back[1]) is np.ndarray and back[1].tolist() == [[3], [3]]
    assert isinstance(back[2][0], jax.Array) and back[2][0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("wrap", "what"), [(lambda x: x, "returned no values for x"), (ckpt.Variable, "a value: x")]
)
def test_a_saver_that_leaves_an_array_without_a_value_is_named(tmp_path, wrap, what):
    ckpt.register_checkpoint_saver(
        name="Lazy",
        predicate=lambda obj: isinstance(obj, ckpt.Variable | jax.Array | jax.ShapeDtypeStruct),
        save_fn=lambda objects, prefix: None,
        restore_fn=lambda objects, prefix: None,
    )
    path = ckpt.save_object({"x": wrap(jnp.ones(2))}, tmp_path / "a")
    with pytest.raises(ckpt.RegistrationError, match=what):
        ckpt.load_object(path)


def test_a_strict_saver_refuses_what_was_made_without_the_class(tmp_path):
    register_rows()
    table = Rows()
    table.rows = ckpt.NoDependency(np.ones(1))
    path = ckpt.save_object(module(table=table), tmp_path / "a")
    with pytest.raises(ckpt.RegistrationError, match="'Custom.Rows' cannot be used to restore"):
        ckpt.load_object(path)


# --- what is missing -------------------------------------------------------------------


def test_all_missing_classes_and_savers_are_named_at_once_and_nothing_is_made(tmp_path):
    made = []

    class Here(ckpt.AutoTrackable):
        @classmethod
        def _deserialize_from_proto(cls, **kwargs):
            made.append(cls)
            return cls()

    class Gone(ckpt.AutoTrackable):
        pass

    ckpt.register_serializable()(Here)
    with ckpt.registration_scope():
        register_rows()
        ckpt.register_serializable()(Gone)
        ckpt.register_serializable(package="Other")(Rows)
        root = module(here=Here(), gone=[Gone(), Gone()], rows=Rows())
        root.rows.rows = ckpt.NoDependency(np.ones(1))
        path = ckpt.save_object(root, tmp_path / "a")
    with pytest.raises(ckpt.RegistrationError) as caught:
        ckpt.load_object(path)
    for line in (
        "3 registrations cannot be found",
        "class 'Custom.Gone', needed for gone/0 and 1 more",
        "class 'Other.Rows', needed for rows",
        "checkpoint saver 'Custom.Rows', needed for rows",
    ):
        assert line in str(caught.value)
    assert made == []
    assert ckpt.load(path)["here"] == {}


def test_what_only_its_class_could_make_anew_is_named_before_anything_is_written(tmp_path):
    class Position(ckpt.PythonState):
        def serialize(self):
            return "7"

    class Own(ckpt.Trackable):
        def serialize_to_arrays(self):
            return {"x": 1}

    class Optimizer(ckpt.AutoTrackable):
        def slots(self):
            return {("m", v): np.ones(1)}

    v = ckpt.Variable(jnp.ones(2))
    root = module(position=Position(), own=[Own()], v=v, optimizer=Optimizer())
    with pytest.raises(ckpt.UnsaveableError) as caught:
        ckpt.save_object(root, tmp_path / "a")
    assert [path for path, _ in caught.value.problems] == ["position", "optimizer", "own/0"]
    assert "register_serializable" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_dependencies_have_to_be_in_the_graph_and_messages_protobufs(tmp_path):
    @ckpt.register_serializable()
    class Lost(ckpt.AutoTrackable):
        def _deserialization_dependencies(self, children):
            return {"x": ckpt.Variable(jnp.ones(1))}

    @ckpt.register_serializable()
    class Texts(ckpt.AutoTrackable):
        def _serialize_to_proto(self, **kwargs):
            return "text"

    with pytest.raises(ckpt.UnsaveableError, match="lost: it depends on 'x', which is not in"):
        ckpt.save_object({"lost": Lost()}, tmp_path / "a")
    with pytest.raises(ckpt.UnsaveableError, match="texts: _serialize_to_proto: .* got str"):
        ckpt.save_object({"texts": Texts()}, tmp_path / "a")


def test_objects_that_depend_on_each_other_are_named(tmp_path):
    @ckpt.register_serializable()
    class Node(ckpt.AutoTrackable):
        def _deserialization_dependencies(self, children):
            return children

    a, b = Node(), Node()
    a.b, b.a = b, a
    with pytest.raises(ckpt.UnsaveableError, match="a -> a/b -> a: these depend on each other"):
        ckpt.save_object({"a": a}, tmp_path / "a")


# --- another program -------------------------------------------------------------------

SAVES = """
import sys
import ckpt_jax as ckpt, jax.numpy as jnp
from google.protobuf.wrappers_pb2 import StringValue

def serializable(cls):
    return ckpt.register_serializable(package="Mine")(cls) if "register" in sys.argv else cls

@serializable
class Model(ckpt.AutoTrackable):
    def __init__(self, name):
        print("made", name)
        self.name = name
        self.w = ckpt.Variable(jnp.zeros(2))

    def __setattr__(self, name, value):
        print("set", name)
        super().__setattr__(name, value)

    def _serialize_to_proto(self, **kwargs):
        return StringValue(value=self.name)

    @classmethod
    def _deserialize_from_proto(cls, proto, **kwargs):
        text = StringValue()
        proto.Unpack(text)
        return cls(text.value)

    def _add_trackable_child(self, name, value):
        print("given", name)
        super()._add_trackable_child(name, value)
"""
SAVE = """
model = Model("a")
model.w.assign(jnp.arange(2.0))
model.tree = [{"x": (1, model.w)}]
ckpt.save_object(model, sys.argv[1])
"""
LOAD = """
model = ckpt.load_object(sys.argv[1])
assert model.w is model.tree[0]["x"][1]
print(type(model).__name__, model.w.value.tolist(), getattr(model, "name", None))
"""


def program(*parts, argv):
    source = textwrap.dedent("".join(parts))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *argv], capture_output=True, text=True
    )
    return done.stdout.split("\n"), done.stderr


def test_a_fresh_program_that_registers_the_class_gets_its_objects(tmp_path):
    path = str(tmp_path / "a")
    program(SAVES, SAVE, argv=[path, "register"])
    out, error = program(SAVES, LOAD, argv=[path, "register"])
    assert not error
    assert out[0] == "made a"
    assert out[-2] == "Model [0.0, 1.0] a"


def test_a_fresh_program_without_the_class_is_told_its_name(tmp_path):
    path = str(tmp_path / "a")
    program(SAVES, SAVE, argv=[path, "register"])
    out, error = program(SAVES, LOAD, argv=[path])
    assert out == [""]
    assert "RegistrationError" in error and "class 'Mine.Model', needed for (root)" in error


def test_no_line_of_an_unregistered_class_runs_though_the_program_has_it(tmp_path):
    path = str(tmp_path / "a")
    out, _ = program(SAVES, SAVE, argv=[path])
    assert "made a" in out
    out, error = program(SAVES, LOAD, argv=[path])
    assert not error
    assert out == ["AutoTrackable [0.0, 1.0] None", ""]


# --- bytes from outside ----------------------------------------------------------------


def tamper(path, change):
    graph = saved_objects(path)
    change(graph)
    graph.ClearField("checksum")
    replace_part(path, SAVED_OBJECTS_KEY, seal(graph.SerializeToString(deterministic=True)))


def drop_last(graph):
    del graph.nodes[-1]


def other_edge(graph):
    graph.nodes[0].children[0].local_name = "other"


def unknown_kind(graph):
    graph.nodes[0].user_object.identifier = "posix.system"


def a_function(graph):
    graph.nodes[1].bare_concrete_function.concrete_function_name = "f"


def a_value_as_list(graph):
    graph.nodes[1].user_object.identifier = "list"


def an_object_as_value(graph):
    graph.nodes[0].user_object.identifier = "value"


def a_dict_as_list(graph):
    graph.nodes[2].user_object.identifier = "list"


def far_dependency(graph):
    graph.nodes[0].registered_name = "Custom.Unregistered"
    graph.nodes[0].dependencies.add(node_id=99, local_name="x")


def circular_dependency(graph):
    graph.nodes[0].registered_name = "Custom.Unregistered"
    graph.nodes[0].dependencies.add(node_id=0, local_name="x")


def dependency_without_class(graph):
    graph.nodes[0].dependencies.add(node_id=1, local_name="x")


def a_saver(graph):
    graph.nodes[1].registered_saver = "Custom.Rows"


def no_version(graph):
    graph.format_version = 0


@pytest.mark.parametrize(
    "change",
    [
        drop_last,
        other_edge,
        unknown_kind,
        a_function,
        a_value_as_list,
        an_object_as_value,
        a_dict_as_list,
        far_dependency,
        circular_dependency,
        dependency_without_class,
        a_saver,
        no_version,
    ],
)
def test_objects_that_contradict_the_checkpoint_are_refused(tmp_path, change):
    ckpt.register_serializable()(Unregistered)
    path = ckpt.save_object(
        module(v=ckpt.Variable(jnp.ones(2)), d={"x": np.ones(1)}), tmp_path / "a"
    )
    tamper(path, change)
    with pytest.raises(ckpt.CorruptCheckpointError, match=SAVED_OBJECTS_KEY) as caught:
        ckpt.load_object(path)
    assert caught.value.key == SAVED_OBJECTS_KEY
    if change is not circular_dependency:  # found when the objects are to be made
        assert [damage.key for damage in ckpt.verify(path).problems] == [SAVED_OBJECTS_KEY]
    assert ckpt.load(path)["d"]["x"] == 1


def test_objects_of_a_newer_format_say_so(tmp_path):
    path = ckpt.save_object({"x": 1}, tmp_path / "a")
    tamper(path, lambda graph: setattr(graph, "format_version", 2))
    with pytest.raises(ckpt.UnsupportedFormatError, match="format 2.*up to 1"):
        ckpt.load_object(path)


def test_bytes_that_are_damaged_or_no_message_are_refused(tmp_path):
    path = ckpt.save_object({"x": 1}, tmp_path / "a")
    data = part(path, SAVED_OBJECTS_KEY)
    for damaged in (data[:-1], b"", seal(b"\xff" * 9), bytes([data[0] ^ 1]) + data[1:]):
        replace_part(path, SAVED_OBJECTS_KEY, damaged)
        with pytest.raises(ckpt.CorruptCheckpointError, match=SAVED_OBJECTS_KEY):
            ckpt.load_object(path)
        assert not ckpt.verify(path).ok


def test_changed_bytes_are_refused_or_harmless(tmp_path):
    root = module(v=ckpt.Variable(jnp.ones(2)), rest=[{"a": (1, None)}, np.ones(2)])
    path = ckpt.save_object(root, tmp_path / "a")
    message = unseal(part(path, SAVED_OBJECTS_KEY))
    choice = np.random.default_rng(5)
    refused = 0
    for _ in range(100):
        changed = bytearray(message)
        changed[choice.integers(len(changed))] = choice.integers(256)
        replace_part(path, SAVED_OBJECTS_KEY, seal(bytes(changed)))
        try:
            ckpt.load_object(path)
        except ckpt.CheckpointError:
            refused += 1
    assert refused > 20
