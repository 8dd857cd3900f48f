"""The real Orbax, both ways: what it writes is read here, and what is exported it reads back."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from foreign import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from places import PYTHONPATH
from pytrees import assert_exactly
from test_orbax import TREE, nnx_program, target_of, train_state

import ckpt_jax as ckpt

ocp = pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Orbax's


def standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def restored(path, target=None):
    with ocp.StandardCheckpointer() as checkpointer:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        return (
            checkpointer.restore(path, abstract)
            if target is not None
            else checkpointer.restore(path)
        )


def numbers(tree):
    """A tree whose arrays are of numpy, and its key arrays are their data."""

    def array(value):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return np.asarray(value)

    return jax.tree.map(array, tree)


# --- in --------------------------------------------------------------------------------

LAYOUTS = {
    "ocdbt": {},
    "files": {"use_ocdbt": False},
    "zarr3": {"use_zarr3": True},
    "zarr3 files": {"use_ocdbt": False, "use_zarr3": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_restored_onto_any_sharding(tmp_path, layout, mesh42, mesh24):
    sharded = NamedSharding(mesh42, PartitionSpec("data", "model"))
    x = jax.device_put(jnp.arange(4096.0).reshape(64, 64), sharded)
    handler = ocp.PyTreeCheckpointHandler(**LAYOUTS[layout])
    arguments = ocp.args.PyTreeSave({"x": x}, {"x": ocp.SaveArgs(chunk_byte_size=512)})
    ocp.Checkpointer(handler).save(tmp_path / "a", args=arguments)
    for sharding in (
        sharded,
        NamedSharding(mesh24, PartitionSpec("model", None)),
        NamedSharding(mesh24, PartitionSpec(None, ("data", "model"))),
    ):
        target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
        found = ckpt.restore(tmp_path / "a", target)["x"]
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, x)


_LEAVES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.sampled_from([None, {}, []]),
    st.builds(
        lambda dtype, shape: np.arange(np.prod(shape)).astype(dtype).reshape(shape),
        st.sampled_from(["float32", "int8", "bool", "bfloat16", "complex64", "uint32"]),
        st.lists(st.integers(1, 5), max_size=3).map(tuple),
    ),
)
_KEYS = st.text(st.characters(codec="ascii", exclude_characters="\0/.~"), min_size=1, max_size=8)
_TREES = st.dictionaries(
    _KEYS,
    st.recursive(
        _LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    min_size=1,
)


@given(tree=_TREES.filter(jax.tree.leaves))
@settings(max_examples=15)
def test_any_tree_comes_back_as_orbax_gives_it_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("any") / "a"
    ocp.PyTreeCheckpointer().save(path, tree)
    assert_exactly(ckpt.load(path), _sorted(tree))
    again = path.with_name("b")
    ckpt.export(tree, again, format="orbax")
    assert_exactly(ocp.PyTreeCheckpointer().restore(again), ocp.PyTreeCheckpointer().restore(path))


def _sorted(tree):
    """The order that JAX gives the keys of dicts."""
    if isinstance(tree, dict):
        return {key: _sorted(tree[key]) for key in sorted(tree)}
    return [*map(_sorted, tree)] if isinstance(tree, list) else tree


def test_a_program_goes_on_with_what_the_manager_of_orbax_has_saved(tmp_path):
    state = train_state()
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    options = ocp.CheckpointManagerOptions(step_prefix="run", step_format_fixed_length=6)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (10, 20):
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(state.replace(step=step)),
                data=ocp.args.JsonSave({"position": step, "names": ["a", None]}),
            )
            manager.save(step, args=arguments, metrics={"loss": 1.0 / step})
    checkpoint = ckpt.Checkpoint(state=train_state(), data={"position": 0, "names": ["", None]})
    ours = ckpt.CheckpointManager(checkpoint, tmp_path / "run")
    assert ours.restore_or_initialize() == str(tmp_path / "run" / "run_000020")
    ours.status.assert_consumed()
    assert (checkpoint.state.step, checkpoint.data["position"], checkpoint.save_counter) == (
        20,
        20,
        20,
    )
    assert checkpoint.data["names"] == ["a", None]
    assert_exactly(numbers(checkpoint.state.opt_state), numbers(state.opt_state))
    ours.restore(10)
    assert checkpoint.state.step == 10


def test_a_save_of_orbax_that_was_killed_is_passed_over(tmp_path):
    program = f"""
        import os, signal, jax.numpy as jnp, orbax.checkpoint as ocp
        from orbax.checkpoint._src.path import atomicity
        manager = ocp.CheckpointManager({str(tmp_path / "run")!r})
        manager.save(1, args=ocp.args.StandardSave({{"x": jnp.arange(9.0)}}))
        manager.wait_until_finished()
        async def killed(self, *arguments, **more):
            os.kill(os.getpid(), signal.SIGKILL)
        atomicity.AtomicRenameTemporaryPath.finalize = killed
        manager.save(2, args=ocp.args.StandardSave({{"x": jnp.zeros(9)}}))
        manager.wait_until_finished()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (unfinished,) = [name for name in os.listdir(tmp_path / "run") if "tmp" in name]
    with pytest.raises(ckpt.CorruptCheckpointError, match="has not finished"):
        ckpt.load(tmp_path / "run" / unfinished)
    assert ckpt.latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "1")
    assert ckpt.load(tmp_path / "run" / "1")["x"].sum() == 36


def test_version_1_of_the_interface(tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    tree = {"x": jnp.arange(3.0), "step": 7}
    v1.save_pytree(tmp_path / "a", tree)
    assert ckpt.load(tmp_path / "a")["step"] == 7
    v1.save_checkpointables(tmp_path / "b", {"model": tree, "more": {"y": jnp.ones(2)}})
    assert list(ckpt.load(tmp_path / "b")) == ["model", "more"]
    with v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_pytree(3, tree)
    assert ckpt.latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "3")
    assert ckpt.load(tmp_path / "run" / "3")["step"] == 7


def test_items_of_one_array_and_of_keys_are_values_of_the_step(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = ocp.args.Composite(
            average=ocp.args.ArraySave(jnp.arange(3.0)),
            rng=ocp.args.JaxRandomKeySave(jax.random.key(3)),
            state=ocp.args.StandardSave({"x": jnp.ones(2)}),
        )
        manager.save(1, args=items)
    path = ckpt.latest_checkpoint(tmp_path / "run")
    target = {"average": jnp.zeros(3), "rng": jax.random.key(0), "state": {"x": jnp.zeros(2)}}
    found = ckpt.restore(path, target)
    assert_exactly(found["rng"], jax.random.key(3))
    np.testing.assert_array_equal(found["average"], [0, 1, 2])


def test_steps_of_orbax_appear_to_a_program_that_evaluates(tmp_path):
    steps = ckpt.checkpoints_iterator(tmp_path / "run", timeout=0)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (3, 20):
            manager.save(step, args=ocp.args.StandardSave({"x": jnp.full(2, step)}))
            manager.wait_until_finished()
            assert next(steps) == str(tmp_path / "run" / str(step))
    assert next(steps, None) is None


# --- and out ---------------------------------------------------------------------------


@pytest.fixture
def tree(mesh42):
    """TREE on devices, without what StandardCheckpointer does not take as a target."""
    sharding = NamedSharding(mesh42, PartitionSpec())
    kept = {
        key: value for key, value in target_of(TREE).items() if key not in ("scalar", "np", "i8")
    }
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding) if isinstance(x, np.ndarray | np.generic) else x, kept
    )


def test_what_is_exported_the_checkpointers_read_back(tmp_path, tree):
    path = ckpt.export(tree, tmp_path / "a", format="orbax")
    found = restored(path, tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert_exactly(numbers(found), numbers(tree))
    assert found["params"]["dense"]["kernel"].sharding == tree["params"]["dense"]["kernel"].sharding
    assert_exactly(numbers(ocp.PyTreeCheckpointer().restore(path, item=tree)), numbers(tree))
    assert_exactly(numbers(ckpt.restore(path, tree)), numbers(tree))
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    assert v1.load_pytree(path)["step"] == 7


def test_what_is_exported_as_a_step_the_manager_goes_on_from(tmp_path, tree):
    (tmp_path / "run").mkdir()
    ckpt.export(tree, tmp_path / "run" / "300", format="orbax")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        assert manager.latest_step() == 300
        found = manager.restore(300, args=ocp.args.StandardRestore(abstract))
        assert_exactly(numbers(found), numbers(tree))
        manager.save(301, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        assert manager.all_steps() == [300, 301]
    assert ckpt.latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "301")


def test_the_metadata_is_what_orbax_writes_for_the_same_objects(tmp_path):
    model, optimizer = nnx_program()
    state = train_state()
    sources = {
        "state": state,
        "nnx": {"model": nnx.state(model), "opt": nnx.state(optimizer)},
        "containers": {"a": [[], {}], "b": (None, {3: jnp.ones(2)}), "c": optax.EmptyState()},
    }
    for name, source in sources.items():
        ours = _metadata(ckpt.export(source, tmp_path / name, format="orbax"))
        theirs = _metadata(standard(tmp_path / f"{name}-orbax", source))
        assert ours == theirs


def _metadata(path):
    with open(os.path.join(path, "_METADATA")) as file:
        entries = json.load(file)["tree_metadata"]
    for each in entries.values():
        each["value_metadata"].pop("write_shape", None)
        if each["value_metadata"]["value_type"] == "np.ndarray":
            each["value_metadata"]["value_type"] = "jax.Array"
    return entries


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_program_that_used_orbax_restores_what_is_exported_with_its_own_target(
    tmp_path, is_saved
):
    state = train_state()
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    if is_saved:  # ours on disk: the names of slots need a target that knows their places
        state = ckpt.restore(ckpt.save(tmp_path / "ours", state), train_state())
    found = restored(ckpt.export(state, tmp_path / "a", format="orbax"), train_state())
    assert_exactly(numbers(found.opt_state), numbers(state.opt_state))
    assert found.step == 1
    model, optimizer = nnx_program()
    source = {"model": nnx.state(model), "opt": nnx.state(optimizer)}
    path = ckpt.export(source, tmp_path / "nnx", format="orbax")
    found = numbers(restored(path, source))
    assert_exactly(jax.tree.leaves(found), jax.tree.leaves(numbers(source)))


def test_keys_and_texts_go_out_and_come_back(tmp_path):
    tree = {"k": jax.random.key(3), "many": jax.random.split(jax.random.key(1, impl="rbg"), 3)}
    path = ckpt.export(tree, tmp_path / "keys", format="orbax")
    assert_exactly(restored(path, tree), tree)
    assert_exactly(ckpt.restore(path, tree), tree)
    path = ckpt.export({"s": "hello", "more": {"t": "ö\n"}}, tmp_path / "texts", format="orbax")
    assert ocp.PyTreeCheckpointer().restore(path) == {"s": "hello", "more": {"t": "ö\n"}}


def test_a_checkpoint_of_any_format_goes_out_with_rules_and_dtypes(tmp_path):
    source = ckpt.Checkpoint(params={"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}, step=7)
    saved = source.save(tmp_path / "ckpt")
    path = ckpt.export(
        saved,
        tmp_path / "a",
        format="orbax",
        rename=[("params/w", "layer/kernel", ckpt.Transpose()), ("params/b", "layer/bias")],
        cast="bfloat16",
    )
    found = restored(path)
    assert set(found) == {"layer", "step"} and found["step"] == 7  # and no save counter
    assert (
        found["layer"]["kernel"].shape == (3, 2) and found["layer"]["kernel"].dtype == jnp.bfloat16
    )
    path = ckpt.export(saved, tmp_path / "b", format="orbax", only="params/**")
    assert set(restored(path)) == {"params"}
    tree = {"a": [1, 2, None], "b": {"c": None, "d": {}}, "e": {"f": 3}}
    path = ckpt.export(tree, tmp_path / "d", format="orbax", only=["a/1", "b/**"])
    assert restored(path) == {"a": {"1": 2}, "b": {"c": None, "d": {}}}
    path = ckpt.export(FIXTURES / "orbax" / "0.12.8_manager" / "1", tmp_path / "c", format="orbax")
    assert restored(path)["meta"] == {"epoch": 3}


def test_large_arrays_are_written_in_bounded_parts(tmp_path, monkeypatch):
    from ckpt_jax.restoring.formats.orbax import writing_orbax

    monkeypatch.setattr(writing_orbax, "_BATCH_NBYTES", 1 << 12)
    monkeypatch.setattr(writing_orbax, "_CHUNK_NBYTES", 1 << 10)
    tree = {"x": np.arange(40 * 60, dtype=np.float32).reshape(40, 60), "y": np.arange(5000)}
    path = ckpt.export(tree, tmp_path / "a", format="orbax")
    assert_exactly(restored(path), tree)
    assert_exactly(ckpt.load(path), tree)


def test_what_orbax_cannot_hold_is_refused_by_name_before_anything_is_written(tmp_path):
    tree = {
        "none": jnp.zeros((0, 3)),
        "bytes": b"raw",
        "big": 1 << 80,
        "a.b": 1,
        "a": {"b": 2},
        "t": {"x/y": "text"},
        "half": np.zeros(2, jnp.float8_e4m3),
    }
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.export(tree, tmp_path / "a", format="orbax")
    names = sorted([name for name, _ in raised.value.problems])
    assert names == ["a.b", "a.b", "big", "bytes", "half", "none", "t.x/y"]
    assert not os.path.exists(tmp_path / "a")
    with pytest.raises(ckpt.UnsaveableError, match="dict"):
        ckpt.export(np.ones(3), tmp_path / "a", format="orbax")
    with pytest.raises(FileExistsError):
        ckpt.export({"x": 1}, tmp_path, format="orbax")
