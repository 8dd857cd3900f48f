"""What programs do that follow the documented surface to the letter, in combinations that are
seldom seen, and what they are told where they do not."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_jax as ckpt

# --- values of an object's own ------------------------------------------------------------


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


# --- views ------------------------------------------------------------------------------


class Switch:
    """An object of which a predicate accepts some instances and not others."""

    def __init__(self, x: Any, accepted: bool):
        self.x, self.accepted = x, accepted


def test_a_predicate_that_refuses_one_instance_is_asked_about_the_next(tmp_path: Path):
    with ckpt.registration_scope():
        ckpt.register_view(
            lambda obj: isinstance(obj, Switch) and obj.accepted,
            children=lambda switch: {"x": switch.x},
            rebuild=lambda switch, new: Switch(new["x"], True),
        )
        with pytest.raises(ckpt.UnsaveableError, match="has no view"):
            ckpt.save(tmp_path / "refused", Switch(jnp.ones(2), False))
        path = ckpt.save(tmp_path / "accepted", Switch(jnp.ones(2), True))
        assert ckpt.restore(path, Switch(jnp.zeros(2), True)).x.tolist() == [1, 1]


def test_a_module_can_be_bound_as_the_error_about_an_unbound_one_says(tmp_path: Path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(x)

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ckpt.UnsaveableError, match=r"module\.bind"):
        ckpt.save(tmp_path / "unbound", {"model": model})
    path = ckpt.save(tmp_path / "bound", {"model": model.bind(variables)})
    assert ckpt.load(path)["model"]["Dense_0"]["params"]["kernel"].shape == (3, 2)


@pytest.mark.parametrize("name", ["type_or_predicate", "children", "rebuild"])
def test_a_view_of_anything_but_functions_is_refused_at_once(name: str):
    given: dict[str, Any] = {"type_or_predicate": Switch, "children": vars, "rebuild": vars}
    given[name] = 3
    kind = given.pop("type_or_predicate")
    with pytest.raises(TypeError, match=f"{name} must be callable, got 3"):
        ckpt.register_view(kind, **given)


# --- arrays that hold nothing --------------------------------------------------------------


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


# --- tracing -----------------------------------------------------------------------------


def test_values_outside_of_a_traced_function_are_saved_and_restored_inside_of_it(tmp_path: Path):
    values = {
        "array": jnp.arange(4.0),
        "int4": jnp.ones(2, jnp.int4),
        "key": jax.random.key(3),
        "weak": jnp.asarray(2.0),
        "step": 3,
    }
    checkpoint = ckpt.Checkpoint(values=values, box=ckpt.Variable(jnp.ones(2)))

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        path = checkpoint.save(tmp_path / "ckpt")
        checkpoint.save(tmp_path / "ckpt", ckpt.CheckpointOptions(enable_async=True))
        checkpoint.restore(path).assert_consumed()
        return x + 1

    function(jnp.ones(()))
    checkpoint.sync()
    assert checkpoint.save_counter == 1
    leaves = [*jax.tree.leaves(checkpoint.values), checkpoint.box.value]
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    assert checkpoint.values["array"].tolist() == [0, 1, 2, 3]
    assert jnp.array_equal(
        jax.random.key_data(checkpoint.values["key"]), jax.random.key_data(values["key"])
    )
    assert ckpt.verify(tmp_path / "ckpt-2").ok


# --- objects that are not the library's ----------------------------------------------------


class Table:
    """An object of which nobody knows anything but a registered saver."""

    def __init__(self, rows: Any):
        self.rows = rows


@pytest.fixture
def table_saver():
    def save_fn(trackables: dict[str, Any], file_prefix: str) -> str:
        return ckpt.io.write_shard(file_prefix, {k: t.rows for k, t in trackables.items()})

    def restore_fn(trackables: dict[str, Any], merged_prefix: str) -> None:
        rows = ckpt.io.read_slices(merged_prefix, dict.fromkeys(trackables))
        for name, table in trackables.items():
            table.rows = rows[name]

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Table",
            predicate=lambda obj: isinstance(obj, Table),
            save_fn=save_fn,
            restore_fn=restore_fn,
        )
        yield


@pytest.mark.usefixtures("table_saver")
def test_a_registered_saver_takes_objects_of_any_class(tmp_path: Path):
    class Model(nnx.Module):
        def __init__(self, value: float):
            self.tables = nnx.List([Table(np.full(1, value)), Table(np.full(2, value))])

    def objects(value: float) -> ckpt.Checkpoint:
        return ckpt.Checkpoint(
            table=Table(np.full(3, value)),
            tree={"x": jnp.full(2, value), "tables": [Table(np.full(4, value))]},
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
    late.table = table = Table(None)
    assert table.rows.tolist() == [7, 7, 7]
    late.tree, late.model = objects(0.0).tree, Model(0.0)
    status.assert_consumed()


def test_an_object_that_neither_view_nor_saver_knows_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="table=Table: nothing is known"):
        ckpt.Checkpoint(table=Table(1))
    with pytest.raises(ckpt.UnsaveableError, match=r"tree/0: .*Table has no view"):
        ckpt.save(tmp_path / "a", {"tree": [Table(1)]})


def test_variables_in_attributes_of_an_nnx_module_are_state(tmp_path: Path):
    class Position(ckpt.PythonState):
        index = 0

        def serialize(self) -> str:
            return str(self.index)

        def deserialize(self, value: bytes) -> None:
            self.index = int(value)

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.scale = ckpt.Variable(jnp.zeros(2))
            self.position = Position()
            self.width = 2

    model = Model()
    model.scale.assign(jnp.ones(2))
    model.position.index = 5
    path = ckpt.save(tmp_path / "a", model)
    assert {entry.path for entry in ckpt.plan_restore(path, Model()).restored} == {
        "linear/kernel",
        "linear/bias",
        "scale",
        "position",
    }
    fresh = ckpt.restore(path, Model())
    assert fresh.scale.value.tolist() == [1, 1] and fresh.position.index == 5


def test_state_of_a_checkpoint_is_not_replaced_by_what_cannot_be_saved(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="state=Table: nothing is known"):
        checkpoint.state = Table(1)
    assert checkpoint.state["w"].tolist() == [1, 1]
    assert "state/w/.ATTRIBUTES/VARIABLE_VALUE" in dict(
        ckpt.list_variables(checkpoint.save(tmp_path / "ckpt"))
    )
    checkpoint.state = ckpt.NoDependency(Table(1))  # said in so many words
    checkpoint.other = Table(1)  # never was state
    assert set(checkpoint.trackable_children()) == {"save_counter"}


@pytest.mark.parametrize("name", ["save", "restore", "sync", "track", "save_counter"])
def test_no_object_takes_the_name_of_a_method(name: str):
    with pytest.raises(AttributeError, match=f"{name} is the checkpoint's own"):
        ckpt.Checkpoint(**{name: jnp.ones(1)})


# --- arguments of the wrong kind, refused where they are given -----------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"cast": "yes"},
        {"durable": None},
        {"enable_async": 1},
        {"timeout_seconds": -1},
        {"timeout_seconds": "600"},
        {"timeout_seconds": float("nan")},
        {"max_inflight_bytes": "1"},
        {"max_inflight_bytes": 1.5},
        {"write_callbacks": print},
        {"write_callbacks": ["print"]},
    ],
    ids=str,
)
def test_an_option_of_the_wrong_kind_is_named_where_it_is_given(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        ckpt.CheckpointOptions(**wrong)


def test_options_take_the_numbers_of_numpy():
    options = ckpt.CheckpointOptions(
        max_inflight_bytes=np.int64(1 << 20), timeout_seconds=np.float32(2)
    )
    assert options.max_inflight_bytes == 1 << 20 and options.timeout_seconds == 2


def test_options_of_another_class_are_named(tmp_path: Path):
    wrong: Any = {"cast": True}
    checkpoint = ckpt.Checkpoint(x=1)
    path = checkpoint.save(tmp_path / "ckpt")
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "managed")
    for call in (
        lambda: ckpt.save(tmp_path / "a", {"x": 1}, options=wrong),
        lambda: ckpt.restore(path, {"x": 1}, options=wrong),
        lambda: checkpoint.save(tmp_path / "ckpt", wrong),
        lambda: checkpoint.write(tmp_path / "a", wrong),
        lambda: checkpoint.restore(path, wrong),
        lambda: checkpoint.read(path, wrong),
        lambda: manager.save(options=wrong),
    ):
        with pytest.raises(TypeError, match=r"options must be ckpt\.CheckpointOptions, got \{"):
            call()
    assert checkpoint.save_counter == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"checkpoint": {"x": 1}}, r"a manager saves a ckpt\.Checkpoint, got dict"),
        ({"max_to_keep": 1.5}, "expected an integer"),
        ({"max_to_keep": "3"}, "expected an integer"),
        ({"step_counter": 5, "checkpoint_interval": -2}, "checkpoint_interval of 0 or more"),
        ({"keep_checkpoint_every_n_hours": -1}, "keep_checkpoint_every_n_hours of 0 or more"),
        ({"init_fn": 3}, "init_fn must be a function"),
    ],
)
def test_a_manager_refuses_what_it_could_not_work_with(
    tmp_path: Path, wrong: dict[str, Any], message: str
):
    given = {"checkpoint": ckpt.Checkpoint(x=1), "directory": tmp_path, **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        ckpt.CheckpointManager(**given)


def test_metrics_without_names_are_refused(tmp_path: Path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path)
    wrong: Any = 0.5
    with pytest.raises(TypeError, match=r"metrics must be numbers by name, got 0\.5"):
        manager.save(metrics=wrong)
    assert manager.checkpoints == []


@pytest.mark.parametrize(
    "only, hint",
    [
        ("params", r"say 'params/\*\*'"),
        (["params/", "nothing"], r"say 'params/\*\*'"),
        ("params/kernl", "nearest: params/kernel"),
    ],
)
def test_a_selection_of_nothing_says_what_may_have_been_meant(tmp_path: Path, only: Any, hint: str):
    path = ckpt.save(tmp_path / "a", {"params": {"kernel": jnp.ones(2)}})
    with pytest.raises(KeyError, match=hint):
        ckpt.load(path, only=only)


@pytest.mark.parametrize("only", [3, [3], ["params/**", None]])
def test_a_selection_that_is_no_pattern_is_refused(tmp_path: Path, only: Any):
    path = ckpt.save(tmp_path / "a", {"params": {"kernel": jnp.ones(2)}})
    with pytest.raises(TypeError, match="only= is a pattern"):
        ckpt.load(path, only=only)


# --- copies and views of a program ---------------------------------------------------------


def test_a_checkpoint_can_be_pickled_after_it_was_saved(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(params={"w": jnp.ones(2)}, step=3)
    checkpoint.save(tmp_path / "ckpt", ckpt.CheckpointOptions(enable_async=True))
    copy = pickle.loads(pickle.dumps(checkpoint))
    checkpoint.sync()
    copy.step = 4
    assert copy.save(tmp_path / "copy") == str(tmp_path / "copy-2")
    assert (checkpoint.step, checkpoint.save_counter) == (3, 1)
    assert ckpt.load(tmp_path / "copy-2", only="step") == {"step": 4}


def test_a_mismatch_comes_whole_from_another_process(tmp_path: Path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(2)})
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, {"w": jnp.ones(3)})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ckpt.RestoreMismatchError
    assert (str(copy), copy.report) == (str(caught.value), caught.value.report)


def test_a_tree_can_be_viewed_though_it_cannot_be_referred_to_weakly():
    tree = {"a": jnp.ones(2)}
    view = ckpt.TrackableView(tree)
    assert view.root is tree
    assert [type(obj) for obj in view.descendants()] == [dict, type(tree["a"])]


def test_a_problem_that_verify_finds_is_file_key_and_what(tmp_path: Path):
    path = ckpt.save(tmp_path / "a", {"w": np.arange(1000)})
    largest = max(Path(path).rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    problems = ckpt.verify(path).problems
    assert problems
    for problem in problems:
        file, key, what = problem
        assert (file, key, what) == (problem.file, problem.key, problem.what)
        assert file.startswith(path) and what


# --- paths -----------------------------------------------------------------------------------


def test_the_primitives_take_paths_of_pathlib(tmp_path: Path):
    shard = ckpt.io.write_shard(tmp_path / "shard", {"w": np.arange(3)})
    assert shard == str(tmp_path / "shard")
    merged = ckpt.io.merge_shards([tmp_path / "shard"], tmp_path / "merged")
    assert merged == str(tmp_path / "merged")
    assert ckpt.io.read_slices(tmp_path / "merged", {"w": None})["w"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="takes a list of shards"):
        ckpt.io.merge_shards(shard, tmp_path / "other")


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


# --- what is shared ----------------------------------------------------------------------------


def test_a_selection_finds_what_is_shared_at_each_of_its_places_and_nothing_else(tmp_path: Path):
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    state = {"ema": params, "params": params, "tied": [params["dense"]["bias"], jnp.ones(1)]}
    path = ckpt.save(tmp_path / "a", state)
    for name in ("ema", "params"):
        found = ckpt.load(path, only=f"{name}/**")
        assert jax.tree.map(np.shape, found) == {name: {"dense": {"kernel": (2, 3), "bias": (3,)}}}
    assert jax.tree.map(np.shape, ckpt.load(path, only="tied/0")) == {"tied": {0: (3,)}}
    assert list(ckpt.load(path, only=["ema/**/bias", "params/**/bias"])) == ["ema", "params"]


def test_a_selection_finds_the_slots_of_an_optimizer_beside_what_is_shared(tmp_path: Path):
    params = {"w": jnp.ones(2)}
    opt_state = optax.adam(0.1).init(params)
    checkpoint = ckpt.Checkpoint(
        ema=params, params=params, opt=ckpt.optax_state(opt_state, params), n=3
    )
    path = checkpoint.save(tmp_path / "ckpt")
    (mu,) = ckpt.load(path, only="opt/ScaleByAdamState.mu/**").values()
    assert [leaf.tolist() for leaf in jax.tree.leaves(mu)] == [[0, 0]]
    assert jax.tree.map(np.shape, ckpt.load(path, only="params/**")) == {"params": {"w": (2,)}}


def test_a_selection_ends_where_objects_refer_to_each_other(tmp_path: Path):
    parent, child = ckpt.AutoTrackable(), ckpt.AutoTrackable()
    parent.child, child.parent = child, parent
    child.w = ckpt.Variable(jnp.ones(2))
    parent.again = child
    path = ckpt.Checkpoint(parent).write(tmp_path / "a")
    for name in ("child", "again"):
        (found,) = ckpt.load(path, only=f"{name}/w").values()
        assert found["w"].tolist() == [1, 1]


# --- Equinox ---------------------------------------------------------------------------------


class Convolutional(eqx.Module):
    """A model as Equinox's users write it: functions lie between the layers."""

    layers: list[Any]
    norm: eqx.nn.BatchNorm

    def __init__(self, key: jax.Array):
        self.layers = [
            eqx.nn.Linear(2, 4, key=key),
            jax.nn.relu,
            lambda x: 2 * x,
            eqx.nn.MLP(4, 2, 8, depth=1, key=key),
            eqx.nn.Lambda(jnp.ravel),
        ]
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")


@pytest.mark.parametrize("abstract", [True, False])
def test_an_equinox_module_keeps_its_functions_and_gets_its_arrays(tmp_path: Path, abstract: bool):
    def make(key: jax.Array) -> tuple[Convolutional, eqx.nn.State]:
        return eqx.nn.make_with_state(Convolutional)(key)

    model, state = make(jax.random.key(0))
    path = ckpt.save(tmp_path / "a", {"model": model, "state": state})
    maker = eqx.filter_eval_shape if abstract else lambda function, key: function(key)
    target, target_state = maker(make, jax.random.key(1))
    restored = ckpt.restore(path, {"model": target, "state": target_state})
    arrays, functions = eqx.partition(restored["model"], eqx.is_array)
    assert eqx.tree_equal(arrays, eqx.filter(model, eqx.is_array))
    assert functions.layers[2] is target.layers[2] and functions.layers[1] is jax.nn.relu
    checkpoint = ckpt.Checkpoint(model=target, state=target_state)
    checkpoint.read(path).assert_consumed()
    assert jnp.array_equal(checkpoint.model.layers[0].weight, model.layers[0].weight)


def test_a_function_in_any_other_tree_is_named(tmp_path: Path):
    with pytest.raises(ckpt.UnsaveableError, match=r"layers/1: .*function has no view"):
        ckpt.save(tmp_path / "a", {"layers": [jnp.ones(2), lambda x: x]})


# --- relative paths ----------------------------------------------------------------------------


@pytest.fixture
def two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The current directory, and another one."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    return here, elsewhere


def test_a_save_in_the_background_ends_where_it_began(two_directories: tuple[Path, Path]):
    here, elsewhere = two_directories
    gone = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=[lambda: gone.wait()])
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    assert checkpoint.save("ckpt", options) == "ckpt-1"
    os.chdir(elsewhere)
    gone.set()
    checkpoint.sync()
    assert ckpt.latest_checkpoint(here) == str(here / "ckpt-1")
    assert not any(elsewhere.iterdir())


def test_a_manager_stays_in_its_directory(two_directories: tuple[Path, Path]):
    here, elsewhere = two_directories
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    manager = ckpt.CheckpointManager(checkpoint, "run", max_to_keep=2)
    assert manager.save(metrics={"loss": 1.0}) == "run/ckpt-1"
    gone = threading.Event()
    manager.save(
        options=ckpt.CheckpointOptions(enable_async=True, write_callbacks=[lambda: gone.wait()])
    )
    os.chdir(elsewhere)
    gone.set()
    manager.sync()
    manager.save()
    assert manager.directory == "run"
    assert manager.checkpoints == ["run/ckpt-2", "run/ckpt-3"]
    assert manager.restore_or_initialize() == "run/ckpt-3" == manager.latest_checkpoint
    assert manager.gc() == []
    assert not any(elsewhere.iterdir())
    names = {entry.name for entry in (here / "run").iterdir()}
    assert names == {"ckpt-2", "ckpt-3", "checkpoint"} | (names & {"checkpoint-metrics.json"})
    again = ckpt.CheckpointManager(checkpoint, here / "run", max_to_keep=2)
    assert again.checkpoints == [str(here / "run" / name) for name in ("ckpt-2", "ckpt-3")]


def test_what_waits_is_restored_from_where_the_checkpoint_is(two_directories: tuple[Path, Path]):
    _, elsewhere = two_directories
    path = ckpt.Checkpoint(x=jnp.ones(2)).save("ckpt")
    fresh = ckpt.Checkpoint()
    status = fresh.restore(path)
    os.chdir(elsewhere)
    fresh.x = jnp.zeros(2)
    assert fresh.x.tolist() == [1, 1]
    status.assert_consumed()


def test_a_directory_may_be_named_by_a_detour_that_does_not_exist(
    two_directories: tuple[Path, Path],
):
    here, _ = two_directories
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    path = checkpoint.save("nowhere/../run/ckpt")
    assert path == "nowhere/../run/ckpt-1"
    manager = ckpt.CheckpointManager(checkpoint, "nowhere/../run", max_to_keep=1)
    assert manager.save() == "nowhere/../run/ckpt-2" == manager.latest_checkpoint
    assert ckpt.latest_checkpoint(here / "run") == str(here / "run" / "ckpt-2")
