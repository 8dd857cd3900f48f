"""What programs do that follow the documented surface to the letter, in combinations that are
seldom seen, and what they are told where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpt_jax as ckpt

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
