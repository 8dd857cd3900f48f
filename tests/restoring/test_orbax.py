"""Orbax's checkpoints, as its versions 0.2.6 to 0.12.8 wrote them (tests/foreign/orbax)."""

import json
import os
import random
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from foreign import FIXTURES, mutations, outcome
from jax.sharding import NamedSharding, PartitionSpec
from pytrees import assert_exactly

import ckpt_jax as ckpt

ORBAX = FIXTURES / "orbax"
KERNEL = np.arange(64, dtype=np.float32).reshape(8, 8)
PARAMS = {"dense": {"bias": np.arange(8).astype(ml_dtypes.bfloat16), "kernel": KERNEL}}
ZEROS = {"dense": {name: np.zeros_like(value) for name, value in PARAMS["dense"].items()}}
ADAM = [{"count": np.int32(0), "mu": ZEROS, "nu": ZEROS}, None]
TREE = {
    "a/b": np.ones(2, np.float32),
    "bool": np.array([True, False]),
    "c64": np.ones(2, np.complex64),
    "empty": {},
    "f8": np.ones(3, ml_dtypes.float8_e4m3fn),
    "i4": np.ones(3, ml_dtypes.int4),
    "i8": np.arange(3, dtype=np.int8),
    "key.with.dot": np.ones(1, np.float32),
    "list": [np.ones(2, np.float32), np.zeros((2, 3), np.float32)],
    "lr": 0.5,
    "none": None,
    "np": np.arange(5),
    "nt": {"x": np.ones(2, np.float32), "y": 3},
    "opt_state": ADAM,
    "params": PARAMS,
    "scalar": np.float32(2.5),
    "step": 7,
    "tuple": [np.ones(1, np.float32), 2],
    "u32": np.arange(2, dtype=np.uint32),
}
# What version and layout have in common with TREE.
WHOLE = ["0.6.4_ocdbt", "0.12.8_standard", "0.12.8_zarr3", "0.12.8_zarr_files"]
MISSING = {
    "0.2.6_zarr_msgpack": ("a/b", "f8", "i4"),
    "0.4.8_ocdbt": ("i4",),
    "0.6.4_zarr3": ("a/b", "f8", "i4"),
    "0.11.0_zarr3_files": ("a/b", "f8", "i4"),
    **dict.fromkeys(WHOLE, ()),
}
EVERY = sorted(f"{name}/1" if name.endswith("manager") else name for name in os.listdir(ORBAX))


def flat(tree):
    """The tree with scalars of numpy in place of arrays without axes."""
    return jax.tree.map(lambda x: x[()] if isinstance(x, np.ndarray) and x.ndim == 0 else x, tree)


@pytest.fixture
def copied(tmp_path):
    """Copies a checkpoint, so that it can be damaged."""

    def copy(name, to="copy"):
        return shutil.copytree(ORBAX / name, tmp_path / to)

    return copy


# --- every version and layout ----------------------------------------------------------


@pytest.mark.parametrize("name", MISSING)
def test_every_value_is_what_was_saved(name):
    expected = {key: value for key, value in TREE.items() if key not in MISSING[name]}
    if name.startswith("0.2.6"):  # which did not note what was a number of Python
        expected = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else np.array(x), expected)
    assert_exactly(flat(ckpt.load(ORBAX / name)), flat(expected))


@pytest.mark.parametrize("name", ["0.4.8_aggregate", "0.4.8_zarr"])
def test_arrays_in_msgpack_and_beside_it_are_one_tree(name):
    expected = {
        "opt_state": ADAM,
        "params": PARAMS,
        "step": 7,
        "z": np.zeros((4, 4), np.float32),
    }
    assert_exactly(flat(ckpt.load(ORBAX / name)), flat(expected))


@pytest.mark.parametrize(
    "name", ["0.11.0_manager/1", "0.12.8_manager/1", "v1_0.12.8_checkpointables"]
)
def test_the_items_of_a_step_are_at_the_top_of_its_tree(name):
    expected = {
        "meta": {"epoch": 3},
        "state": {"opt_state": ADAM, "params": PARAMS, "step": 7},
    }
    assert_exactly(flat(ckpt.load(ORBAX / name)), flat(expected))


def test_the_only_item_of_a_step_has_no_name_if_orbax_gave_it_one(copied, tmp_path):
    assert_exactly(ckpt.load(ORBAX / "v1_0.11.39"), {"a": np.ones(3, np.float32), "s": 7})
    step = tmp_path / "7"
    copied("0.12.8_int_keys", step / "default")
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    assert list(ckpt.load(step)) == ["1", "2"]
    (step / "default").rename(step / "state")
    assert list(ckpt.load(step)) == ["state"]
    (step / "orbax.checkpoint").touch()
    assert list(ckpt.load(step)) == ["1", "2"]


def test_a_step_of_a_version_that_left_no_file_in_it_is_recognised(copied, tmp_path):
    copied("0.4.8_zarr", tmp_path / "run" / "12" / "default")
    assert ckpt.load(tmp_path / "run" / "12")["step"] == 7
    assert ckpt.latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "12")


def test_metrics_of_a_manager_belong_to_no_program(copied):
    step = copied("0.12.8_manager/1", "1")
    (step / "metrics").mkdir()
    (step / "metrics" / "metrics").write_text('{"loss": 0.5}')
    assert list(ckpt.load(step)) == ["meta", "state"]


def test_what_several_processes_wrote_is_one_array():
    loaded = ckpt.load(ORBAX / "0.12.8_two_processes")
    assert_exactly(loaded, {"a": KERNEL, "r": np.ones(3, np.float32), "s": 3})


def test_typed_keys_and_texts_come_back():
    target = {"k": jax.random.key(0), "s": ""}
    restored = ckpt.restore(ORBAX / "0.12.8_key_and_string", target)
    assert restored["k"] == jax.random.key(3)
    assert restored["s"] == "hello"
    with pytest.raises(ckpt.RestoreMismatchError, match="threefry2x32"):
        other = {"k": jax.random.key(0, impl="rbg"), "s": ""}
        ckpt.restore(ORBAX / "0.12.8_key_and_string", other)


def test_integer_keys_find_their_places_although_orbax_made_texts_of_them():
    target = {1: {"w": jnp.zeros(2)}, 2: {"w": jnp.zeros(2)}}
    restored = ckpt.restore(ORBAX / "0.12.8_int_keys", target)
    np.testing.assert_array_equal(restored[1]["w"], np.ones(2))


# --- restoring -------------------------------------------------------------------------


def target_of(tree):
    """A target for TREE with the containers that Orbax has not kept."""
    point = optax.ScaleByAdamState  # a named tuple
    adam = tree["opt_state"][0]
    state = (point(adam["count"], adam["mu"], adam["nu"]), optax.EmptyState())
    return {**tree, "opt_state": state, "tuple": tuple(tree["tuple"])}


def abstract(tree, sharding=None):
    def struct(value):
        if not isinstance(value, np.ndarray | np.generic):
            return value
        return jax.ShapeDtypeStruct(np.shape(value), value.dtype, sharding=sharding)

    return jax.tree.map(struct, tree)


@pytest.mark.parametrize("name", WHOLE)
def test_a_target_gets_its_own_containers_dtypes_and_shardings_back(name, mesh42):
    replicated = NamedSharding(mesh42, PartitionSpec())
    target = target_of(TREE)
    restored = ckpt.restore(ORBAX / name, abstract(target, replicated))
    assert isinstance(restored["opt_state"][0], optax.ScaleByAdamState)
    assert restored["params"]["dense"]["kernel"].sharding == replicated
    assert restored["step"] == 7 and type(restored["step"]) is int
    assert_exactly(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, target))


@pytest.mark.parametrize("name", ["0.12.8_zarr_files", "0.12.8_zarr3", "0.4.8_aggregate"])
@pytest.mark.parametrize("spec", [("data", "model"), ("model", "data"), (None, "data"), ()])
def test_devices_get_their_boxes_whatever_the_chunks(name, spec, mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec(*spec))
    target = {
        "params": {"dense": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32", sharding=sharding)}}
    }
    restored = ckpt.restore(ORBAX / name, target, allow_unexpected=True)
    kernel = restored["params"]["dense"]["kernel"]
    assert kernel.sharding == sharding
    np.testing.assert_array_equal(kernel, KERNEL)


@pytest.mark.parametrize("name", ["0.12.8_zarr_files", "0.12.8_zarr3", "0.2.6_zarr_msgpack"])
def test_a_box_takes_only_the_chunks_that_it_touches(name):
    with ckpt.load_checkpoint(ORBAX / name) as reader:
        box = reader.get_tensor("params/dense/kernel", ((3, 4), (0, 4)))
        assert reader.bytes_read == 2 * 4 * 4  # the chunks are (2, 4)
    np.testing.assert_array_equal(box, KERNEL[3:4, :4])


def test_only_what_is_asked_for_is_read(copied):
    path = copied("0.12.8_zarr_files")
    for name in os.listdir(path):
        if (path / name / "0").exists() and name != "params.dense.bias":
            (path / name / "0").unlink()
    loaded = ckpt.load(path, only="params/dense/bias")
    assert_exactly(loaded, {"params": {"dense": {"bias": PARAMS["dense"]["bias"]}}})
    report = ckpt.plan_restore(path, target_of(TREE))
    assert report.exact and report.nbytes > 0


def test_dtypes_are_exact_unless_they_may_change():
    target = {"params": {"dense": {"bias": jnp.zeros(8), "kernel": jnp.zeros((8, 8))}}}
    with pytest.raises(ckpt.RestoreMismatchError, match="bfloat16"):
        ckpt.restore(ORBAX / "0.12.8_standard", target, allow_unexpected=True)
    options = ckpt.CheckpointOptions(cast=True)
    path = ORBAX / "0.12.8_standard"
    restored = ckpt.restore(path, target, allow_unexpected=True, options=options)
    np.testing.assert_array_equal(restored["params"]["dense"]["bias"], np.arange(8.0))


def test_rules_and_transforms_apply_to_the_paths_of_orbax():
    target = {"layer": {"weight": jnp.zeros((8, 8)), "bias": jnp.zeros(8, jnp.bfloat16)}}
    rename = [
        ("params/dense/kernel", "layer/weight", ckpt.Transpose()),
        ("params/dense/bias", "layer/bias"),
    ]
    restored = ckpt.restore(ORBAX / "0.12.8_zarr3", target, rename=rename, allow_unexpected=True)
    np.testing.assert_array_equal(restored["layer"]["weight"], KERNEL.T)


def test_every_difference_is_reported_at_once():
    tree = {"params": {"dense": {"kernel": jnp.zeros((8, 9)), "scale": jnp.zeros(8)}}}
    report = ckpt.plan_restore(ORBAX / "0.12.8_standard", tree)
    assert [entry.path for entry in report.mismatched] == ["params/dense/kernel"]
    assert [entry.path for entry in report.missing] == ["params/dense/scale"]
    assert "params/dense/bias" in [entry.path for entry in report.unexpected]


def test_keys_that_hold_a_separator_keep_their_places():
    with ckpt.load_checkpoint(ORBAX / "0.12.8_standard") as reader:
        assert {"a.Sb", "key.with.dot", "list/0", "opt_state/0/mu/dense/kernel"} <= {
            *reader.paths()
        }
        np.testing.assert_array_equal(reader.get_tensor("a.Sb"), np.ones(2))


# --- optimizers ------------------------------------------------------------------------


class Model(nnx.Module):
    """The module of the fixture."""

    def __init__(self, rngs):
        self.l1 = nnx.Linear(4, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def nnx_program():
    model = Model(nnx.Rngs(1))
    return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))


def train_state(tx=None):
    network = Network()
    params = network.init(jax.random.key(5), jnp.ones((1, 4)))["params"]
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return TrainState.create(apply_fn=network.apply, params=params, tx=tx)


def test_boxes_and_moments_arrive_in_an_nnx_optimizer():
    path = ORBAX / "0.12.8_nnx_optimizer"
    model, optimizer = nnx_program()
    assert ckpt.plan_restore(path, {"model": model, "opt": optimizer}).exact
    ckpt.restore(path, {"model": model, "opt": optimizer})
    saved = ckpt.load(path)
    moments = saved["opt"]["opt_state"]["0"]
    np.testing.assert_array_equal(model.l1.kernel[...], saved["model"]["l1"]["kernel"]["value"])
    np.testing.assert_array_equal(
        optimizer.opt_state[0].mu["layers"][1]["kernel"][...],
        moments["mu"]["layers"]["1"]["kernel"]["value"],
    )
    assert optimizer.opt_state[0].count[...] == moments["count"]["value"] == 1
    assert model.drop.rngs.key[...] == jax.random.wrap_key_data(
        saved["model"]["drop"]["rngs"]["key"]["value"]
    )


def test_moments_wait_for_an_optimizer_that_is_made_after_the_restore():
    path = ORBAX / "0.12.8_nnx_optimizer"
    checkpoint = ckpt.Checkpoint()
    status = checkpoint.restore(path)
    checkpoint.model, checkpoint.opt = nnx_program()
    status.assert_consumed()
    saved = ckpt.load(path, only="opt/**")["opt"]["opt_state"]["0"]
    np.testing.assert_array_equal(
        checkpoint.opt.opt_state[0].nu["l1"]["kernel"][...], saved["nu"]["l1"]["kernel"]["value"]
    )


@pytest.mark.parametrize("is_abstract", [False, True])
def test_moments_arrive_in_a_train_state(is_abstract):
    path = ORBAX / "0.12.8_train_state"
    target = jax.eval_shape(train_state) if is_abstract else train_state()
    restored = ckpt.restore(path, target)
    saved = ckpt.load(path)
    assert isinstance(restored, TrainState) and restored.step == saved["step"] == 1
    assert_exactly(
        jax.tree.map(np.asarray, restored.opt_state[1][0].nu), saved["opt_state"][1][0]["nu"]
    )


def test_moments_follow_parameters_that_have_another_name():
    path = ORBAX / "0.12.8_train_state"
    state = train_state()
    names = {"Dense_0": "head", "Dense_1": "body"}
    params = {names[name]: value for name, value in state.params.items()}
    target = TrainState.create(apply_fn=state.apply_fn, params=params, tx=state.tx)
    rename = [(f"**/{old}/*", f"**/{new}/*") for old, new in names.items()]
    restored = ckpt.restore(path, target, rename=rename)
    saved = ckpt.load(path)
    np.testing.assert_array_equal(
        restored.opt_state[1][0].mu["head"]["kernel"],
        saved["opt_state"][1][0]["mu"]["Dense_0"]["kernel"],
    )


def test_moments_are_found_if_the_chain_of_transforms_has_changed():
    path = ORBAX / "0.12.8_train_state"
    restored = ckpt.restore(path, train_state(optax.adam(1e-3)))
    assert restored.opt_state[0].count == 1
    saved = ckpt.load(path)["opt_state"][1][0]["nu"]
    assert_exactly(jax.tree.map(np.asarray, restored.opt_state[0].nu), saved)


def test_an_optax_state_is_found_with_its_parameters_and_without():
    path = ORBAX / "0.12.8_standard"
    params = {"dense": {"bias": jnp.ones(8, jnp.bfloat16), "kernel": jnp.ones((8, 8))}}
    state = optax.adam(1e-3).init(params)
    for target in (
        {"params": params, "opt_state": ckpt.optax_state(state, params)},
        {"params": params, "opt_state": state},
        {"opt_state": ckpt.optax_state(state, params)},
    ):
        restored = ckpt.restore(path, target, allow_unexpected=True)
        np.testing.assert_array_equal(restored["opt_state"][0].mu["dense"]["kernel"], 0)


def test_a_dict_with_the_key_value_is_no_box():
    loaded = ckpt.load(ORBAX / "0.12.8_nnx_optimizer", only="model/l1/bias/value")
    assert list(loaded["model"]["l1"]["bias"]) == ["value"]
    target = {"model": {"l1": {"bias": {"value": jnp.ones(8)}}}}
    path = ORBAX / "0.12.8_nnx_optimizer"
    restored = ckpt.restore(path, target, allow_unexpected=True)
    bias = loaded["model"]["l1"]["bias"]["value"]
    np.testing.assert_array_equal(restored["model"]["l1"]["bias"]["value"], bias)


# --- managers --------------------------------------------------------------------------


@pytest.fixture
def run(copied, tmp_path):
    """The directory of a manager of Orbax, with the steps 1, 20 and 300."""
    directory = tmp_path / "run"
    for step in ("1", "20", "300"):
        copied("0.12.8_manager/1", directory / step)
    (directory / "20" / "meta" / "metadata").write_text('{"epoch": 20}')
    return directory


def program():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = {"params": zeros, "opt_state": optax.adam(1.0).init(zeros), "step": 0}
    return ckpt.Checkpoint(state=state, meta={"epoch": 0})


def test_a_manager_goes_on_where_orbax_ended(run):
    checkpoint = program()
    manager = ckpt.CheckpointManager(checkpoint, run)
    assert manager.restore_or_initialize() == str(run / "300")
    assert checkpoint.state["step"] == 7 and checkpoint.meta["epoch"] == 3
    np.testing.assert_array_equal(checkpoint.state["params"]["dense"]["kernel"], KERNEL)
    assert checkpoint.save_counter == 300
    manager.status.assert_consumed()
    checkpoint.meta = {"epoch": 4}
    assert manager.save() == str(run / "ckpt-301")
    later = program()
    assert ckpt.CheckpointManager(later, run).restore_or_initialize() == str(run / "ckpt-301")
    assert later.meta["epoch"] == 4 and ckpt.latest_checkpoint(run) == str(run / "ckpt-301")
    assert sorted(os.listdir(run))[:3] == ["1", "20", "300"]  # they are not ours to remove


def test_a_manager_restores_a_step_of_orbax_by_its_number(run):
    checkpoint = program()
    manager = ckpt.CheckpointManager(checkpoint, run)
    manager.restore(20).assert_consumed()
    assert checkpoint.meta["epoch"] == 20 and checkpoint.save_counter == 20
    with pytest.raises(ckpt.CheckpointNotFoundError):
        manager.restore(21)


@pytest.mark.parametrize("name", ["ckpt_300", "00000300", "run_000300"])
def test_names_of_steps_may_have_a_prefix_and_zeros(run, name):
    (run / "300").rename(run / name)
    assert ckpt.latest_checkpoint(run) == str(run / name)
    assert ckpt.load_checkpoint(run).path == str(run / name)
    assert ckpt.CheckpointManager(program(), run).restore_or_initialize() == str(run / name)


def test_a_step_that_is_damaged_or_unfinished_is_passed_over(run, caplog):
    (run / "300").rename(run / "300.orbax-checkpoint-tmp")
    assert ckpt.latest_checkpoint(run) == str(run / "20")
    shutil.rmtree(run / "20" / "state" / "d")
    assert ckpt.latest_checkpoint(run) == str(run / "1")
    assert "20 is not usable" in caplog.text.replace(str(run) + "/", "")
    assert ckpt.CheckpointManager(program(), run).restore_or_initialize() == str(run / "1")


def test_if_all_of_ours_are_damaged_the_steps_of_orbax_are_still_there(run):
    path = ckpt.CheckpointManager(program(), run).save()
    shutil.rmtree(os.path.join(path, "shards"), ignore_errors=True)
    shutil.rmtree(os.path.join(path, "d"), ignore_errors=True)
    assert ckpt.latest_checkpoint(run) == str(run / "300")
    assert ckpt.CheckpointManager(program(), run).restore_or_initialize() == str(run / "300")


def test_a_program_with_other_names_is_told_so(run):
    with pytest.raises(ckpt.RestoreMismatchError, match="nothing of this checkpoint was restored"):
        ckpt.CheckpointManager(ckpt.Checkpoint(other=1), run).restore_or_initialize()


def test_the_directory_of_a_manager_is_no_checkpoint(run):
    with pytest.raises(ckpt.CheckpointNotFoundError, match="1, 20, 300"):
        ckpt.load(run)


# --- damage ----------------------------------------------------------------------------


def damaged(path, match="damaged or incomplete"):
    with pytest.raises(ckpt.CorruptCheckpointError, match=match) as raised:
        ckpt.load(path)
    return raised.value


@pytest.mark.parametrize("name", ["0.2.6_zarr_msgpack", "0.12.8_zarr_files", "0.11.0_zarr3_files"])
def test_a_lost_chunk_is_an_error_and_no_zeros(copied, name):
    path = copied(name)
    folder = path / "params.dense.kernel"
    chunk = max([file for file in folder.rglob("*") if file.is_file() and file.name[0] not in ".z"])
    chunk.unlink()
    error = damaged(path, "params/dense/kernel")
    assert error.key == "params/dense/kernel"
    assert not ckpt.verify(path).ok
    with ckpt.load_checkpoint(path) as reader, pytest.raises(ckpt.CorruptCheckpointError):
        reader.check_files()


def test_zeros_that_old_versions_left_out_are_zeros(copied):
    path = ORBAX / "0.6.4_zarr3"
    assert not ckpt.load(path, only="opt_state/0/mu/**")["opt_state"][0]["mu"]["dense"][
        "kernel"
    ].any()
    with ckpt.load_checkpoint(path) as reader:
        reader.check_files()


@pytest.mark.parametrize("name", ["0.4.8_ocdbt", "0.12.8_zarr3", "0.12.8_two_processes"])
def test_files_of_a_database_that_are_lost_or_short_are_errors(copied, name):
    needed = 0
    for number, file in enumerate(sorted((ORBAX / name).rglob("d/*"))):
        for cut in (None, 0, file.stat().st_size // 2):
            path = copied(name, f"{number}-{cut}")
            there = path / file.relative_to(ORBAX / name)
            if cut is None:
                there.unlink()
            else:
                os.truncate(there, cut)
            # Nothing leads to some of the files any more. The values are right, or refused.
            if outcome(path) == "refused":
                needed += 1
                continue
            assert_exactly(ckpt.load(path), ckpt.load(ORBAX / name))
            with ckpt.load_checkpoint(path) as reader:
                reader.check_files()
    assert needed >= 3


def test_lost_files_are_named(copied):
    for name, lost in {
        "0.12.8_standard": "_METADATA",
        "0.12.8_zarr3": "manifest.ocdbt",
        "0.12.8_key_and_string": "_strings.json",
        "0.12.8_zarr_files": "params.dense.bias/.zarray",
        "0.4.8_aggregate": "checkpoint",
    }.items():
        path = copied(name, name)
        (path / lost).unlink()
        if lost == "manifest.ocdbt":
            shutil.copytree(path / "ocdbt.process_0", path / "ocdbt.process_1")
        damaged(path, lost.partition("/")[0].replace("params.dense.bias", "params"))


@pytest.mark.parametrize("name", ["_METADATA", "_strings.json", "manifest.ocdbt"])
def test_a_pipe_is_not_waited_for(copied, name):
    path = copied("0.12.8_key_and_string")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(ckpt.CorruptCheckpointError, match=f"{name}.*not a regular file"):
        ckpt.load(path)


def test_saves_that_have_not_finished_are_refused_by_name(copied, tmp_path):
    assert_exactly(ckpt.load(ORBAX / "0.12.8_unmerged"), {"a": np.arange(5, dtype=np.float32)})
    path = copied("0.12.8_unmerged")
    shutil.copytree(path / "ocdbt.process_0", path / "ocdbt.process_1")
    damaged(path, "what 2 processes wrote")
    for name in ("5.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-1700000000"):
        damaged(copied("0.12.8_standard", name), "has not finished")
    step = copied("0.12.8_manager/1", "6")
    (step / "state").rename(step / "state.orbax-checkpoint-tmp-17")
    damaged(step, "has not finished")


def edited(path, change):
    """A copy of a checkpoint whose `_METADATA` was changed."""
    file = path / "_METADATA"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    return path


def entry(*labels, kind="jax.Array"):
    keys = [{"key": str(label), "key_type": 1 if type(label) is int else 2} for label in labels]
    return {
        "key_metadata": keys,
        "value_metadata": {"value_type": kind, "skip_deserialize": False},
    }


def test_two_values_of_one_name_are_refused_by_name_and_the_others_are_read(copied):
    """Orbax joins paths with dots, and writes one array for both."""

    def change(metadata):
        metadata["tree_metadata"]["x"] = entry("params.dense", "kernel")

    path = edited(copied("0.12.8_standard"), change)
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"2 values have the name"):
        ckpt.load(path)
    assert ckpt.load(path, only="step") == {"step": 7}


def test_values_that_only_a_program_can_read_are_listed_and_refused(copied, tmp_path):
    def change(metadata):
        metadata["tree_metadata"]["x"] = entry("mine", kind="my.Type")

    path = edited(copied("0.12.8_standard"), change)
    with pytest.raises(ckpt.UnsupportedFormatError, match="mine.*my.Type.*only="):
        ckpt.load(path)
    assert ckpt.restore(path, {"step": 0}, allow_unexpected=True) == {"step": 7}
    step = copied("0.12.8_manager/1", "1")
    (step / "data").mkdir()
    (step / "data" / "process_0-of-1.json").write_text("{}")
    with pytest.raises(ckpt.UnsupportedFormatError, match="data.*process_0-of-1.json"):
        ckpt.load(step)
    assert ckpt.load(step, only="meta/**") == {"meta": {"epoch": 3}}


def test_containers_that_a_partial_save_has_filled_are_not_empty(copied):
    def change(metadata):
        metadata["tree_metadata"]["x"] = entry("params", kind="Dict")

    path = edited(copied("0.12.8_standard"), change)
    assert_exactly(ckpt.load(path, only="params/**"), {"params": PARAMS})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.clear(),
        lambda m: m.update(tree_metadata=[]),
        lambda m: m["tree_metadata"].update(x={}),
        lambda m: m["tree_metadata"].update(x=entry("params")),
        lambda m: m["tree_metadata"].update(x=entry("params", "dense", "kernel", "below")),
        lambda m: m["tree_metadata"].update(x=entry("nowhere")),
        lambda m: m["tree_metadata"].update(x=entry("t", kind="string")),
        lambda m: m["tree_metadata"].update(x=entry(*["deep"] * 5000)),
        lambda m: m["tree_metadata"]["('step',)"]["key_metadata"][0].update(key=3),
        lambda m: m["tree_metadata"]["('step',)"]["key_metadata"][0].update(key_type=1),
        lambda m: m["tree_metadata"]["('step',)"]["key_metadata"][0].update(key_type="2"),
        lambda m: m["tree_metadata"]["('step',)"]["value_metadata"].update(skip_deserialize=True),
        lambda m: m["tree_metadata"]["('step',)"].update(value_metadata=None),
        lambda m: m.update(use_zarr3=True),
        lambda m: m.update(use_ocdbt=False),
    ],
)
def test_metadata_of_the_wrong_form_is_refused(copied, change):
    error = damaged(edited(copied("0.12.8_standard"), change))
    assert "copy" in error.file


def test_keys_of_a_newer_orbax_are_refused(copied):
    def change(metadata):
        metadata["tree_metadata"]["('step',)"]["key_metadata"][0]["key_type"] = 3

    path = edited(copied("0.12.8_standard"), change)
    with pytest.raises(ckpt.UnsupportedFormatError, match="newer"):
        ckpt.load(path)


@pytest.mark.parametrize("name", ["../outside", "..", "/etc", "a//b", "./x"])
def test_no_name_leads_out_of_the_directory(copied, name):
    outside = copied("0.12.8_zarr_files", "outside")
    shutil.copytree(outside / "u32", outside.parent / "u32")

    def change(metadata):
        metadata["tree_metadata"] = {"x": entry(name.replace("outside", "u32"))}

    damaged(edited(copied("0.12.8_zarr_files"), change))


def test_sizes_that_cannot_be_are_refused_before_memory_is_taken(copied):
    path = copied("0.12.8_zarr_files")
    file = path / "params.dense.kernel" / ".zarray"
    described = json.loads(file.read_text())
    for shape in ([1 << 20, 1 << 20], [1 << 40, 8]):
        file.write_text(json.dumps({**described, "shape": shape}))
        assert outcome(path) == "refused"


HOSTILE = {
    "0.12.8_standard": ["_METADATA", "manifest.ocdbt", "array_metadatas/process_0"],
    "0.12.8_key_and_string": ["_strings.json"],
    "0.12.8_manager/1": ["meta/metadata"],
    "0.12.8_zarr_files": ["params.dense.kernel/.zarray", "params.dense.kernel/0.0"],
    "0.11.0_zarr3_files": ["params.dense.kernel/zarr.json", "params.dense.kernel/c/0/0"],
    "0.4.8_aggregate": ["checkpoint"],
    "0.2.6_zarr_msgpack": ["checkpoint"],
}


def test_arrays_of_another_checkpoint_with_the_same_names_are_not_taken(copied):
    path, other = copied("0.12.8_zarr_files"), copied("0.12.8_zarr_files", "other")
    with ckpt.load_checkpoint(path) as reader:
        shutil.rmtree(path)
        other.rename(path)
        with pytest.raises(ckpt.CheckpointNotFoundError, match="was replaced"):
            reader.read(dict.fromkeys(reader.keys()))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_within_bounds(copied, name):
    path = copied(name)
    for file in HOSTILE[name]:
        data = (path / file).read_bytes()
        for number, changed in enumerate(mutations(data, 40)):
            (path / file).write_bytes(changed)
            assert outcome(path) in ("fine", "refused", "none"), (file, number)
        (path / file).write_bytes(data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY)
def test_many_hostile_files(copied, name):
    path = copied(name)
    choice = random.Random(name)
    files = sorted([file for file in path.rglob("*") if file.is_file() and file.stat().st_size])
    for _ in range(300):
        file = choice.choice(files)
        data = file.read_bytes()
        (changed,) = mutations(data, 1, choice.randrange(1 << 30))
        file.write_bytes(changed)
        outcome(path)
        file.write_bytes(data)
