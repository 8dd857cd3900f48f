"""Checkpoints of TensorFlow: through their object graph, or by name, without TensorFlow."""

import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from places import TESTS
from trackables import Model, value, var

import ckpt_jax as ckpt

FILES = TESTS / "foreign" / "tensorflow"
EXPECTED = json.loads((FILES / "expected.json").read_text())
OBJECTS = str(FILES / "object_graph" / "ckpt-1")
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
SAVED_MODEL = "saved_model"
SAVED_MODEL_VARIABLES = "saved_model/variables/variables"

# The values in the object graph: the module after one step, its optimizer's state.
W = np.arange(12, dtype=np.float32).reshape(3, 4) - np.float32(0.1)


class Text(ckpt.PythonState):
    text = b""

    def serialize(self):
        return self.text

    def deserialize(self, value):
        self.text = value


class Adam(ckpt.Trackable):
    """An optimizer with slots as TensorFlow's has them."""

    def __init__(self, *variables):
        self.state = {(name, v): var(jnp.zeros_like(v.value)) for name in "mv" for v in variables}

    def slots(self):
        return self.state


def module():
    return Model(
        w=var(jnp.zeros((3, 4))),
        b=var(jnp.zeros(4)),
        layers=[var(jnp.zeros(2)), {"k": integer()}],
        cfg=(integer(), ckpt.Variable(jnp.zeros(1, jnp.int32))),
    )


def integer():
    return ckpt.Variable(jnp.int32(0))


def copied(tmp_path, name):
    """A copy of a checkpoint, to change it; returns its prefix."""
    source = FILES / name
    for file in source.parent.glob(f"{source.name}.*"):
        shutil.copy(file, tmp_path)
    return str(tmp_path / source.name)


# --- values ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", EXPECTED)
def test_every_value_is_what_tensorflow_reads(prefix):
    expected = {key: facts for key, facts in EXPECTED[prefix].items() if key != GRAPH_KEY}
    with ckpt.load_checkpoint(FILES / prefix) as reader:
        assert reader.keys() == sorted(expected)
        for key, facts in expected.items():
            if facts is None or facts[0] == "object":
                with pytest.raises((ckpt.UnsupportedFormatError, ckpt.CorruptCheckpointError)):
                    reader.get_tensor(key)
                continue
            found = reader.get_tensor(key)
            data = found if isinstance(found, bytes) else np.asarray(found).tobytes()
            assert hashlib.sha256(data).hexdigest() == facts[2], key
            if not isinstance(found, bytes):
                assert list(found.shape) == facts[1]
                assert found.dtype.name == facts[0].replace("void", found.dtype.name)


def test_an_index_of_several_blocks_is_read():
    found = ckpt.load(FILES / "blocks", only="**/kernel")
    flat = dict(jax.tree.leaves_with_path(found))
    assert [float(value) for value in flat.values()] == [*range(700)]


def test_verify_checks_every_byte(tmp_path):
    assert ckpt.verify(OBJECTS).ok
    prefix = copied(tmp_path, "slices")
    assert ckpt.verify(prefix).ok
    data = pathlib.Path(f"{prefix}.data-00002-of-00003")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    (problem,) = ckpt.verify(prefix).problems
    assert problem.file == str(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match="crc32c"):
        ckpt.load(prefix)


@pytest.mark.parametrize("position", [0, 1, 4, -1])
def test_no_byte_of_a_string_may_change(tmp_path, position):
    prefix = copied(tmp_path, "strings")
    key = "long"
    with ckpt.load_checkpoint(prefix) as reader:
        assert reader.get_tensor(key) == b"x" * 300
    data = pathlib.Path(f"{prefix}.data-00000-of-00001")
    content = data.read_bytes()
    start = content.index(b"x" * 300) - 6  # two bytes of length, four of its checksum
    at = start + (position if position >= 0 else 305)
    data.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert [problem.key for problem in ckpt.verify(prefix).problems] == [key]


def test_values_that_no_array_can_hold_are_listed_and_refused_by_name():
    with ckpt.load_checkpoint(OBJECTS) as reader:
        assert reader.get_variable_to_shape_map()["data/.ATTRIBUTES/ITERATOR_STATE"] == (3,)
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"ITERATOR_STATE: it holds a variant"):
        ckpt.load(OBJECTS)
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"it holds strings"):
        ckpt.load(OBJECTS, only="table/*")
    report = ckpt.verify(OBJECTS)
    assert report.ok
    assert "data/.ATTRIBUTES/ITERATOR_STATE" in report.unread
    assert "cannot be read here" in str(report)
    with pytest.raises(ckpt.RestoreMismatchError, match=r"vec: .*it holds strings"):
        ckpt.restore(FILES / "strings", {"vec": np.zeros(3)}, strict=False)


def test_a_variable_of_which_parts_are_lost_is_listed_and_damaged():
    assert ckpt.list_variables(FILES / "hole") == [("a", (6, 5, 4))]
    with pytest.raises(ckpt.CorruptCheckpointError, match="a: .*32 of 120 elements") as raised:
        ckpt.load(FILES / "hole")
    assert raised.value.key == "a"
    (problem,) = ckpt.verify(FILES / "hole").problems
    assert problem.key == "a"


# --- the object graph --------------------------------------------------------------------


def test_objects_are_restored_through_the_object_graph():
    mine = module()
    mine.shared = mine.w
    optimizer, state = Adam(mine.w, mine.b), Text()
    checkpoint = ckpt.Checkpoint(model=mine, optimizer=optimizer, state=state, step=0)
    status = checkpoint.restore(OBJECTS)
    status.assert_existing_objects_matched()
    np.testing.assert_allclose(value(mine.w), W, rtol=1e-6)
    np.testing.assert_array_equal(value(mine.layers[0]), [1, 2])
    assert value(mine.layers[1]["k"]) == 3
    assert (value(mine.cfg[0]), value(mine.cfg[1])) == (5, [6])
    assert state.text == "état".encode()
    assert checkpoint.step == 7
    assert checkpoint.save_counter == 1
    with ckpt.load_checkpoint(OBJECTS) as reader:
        for (name, variable), slot in optimizer.state.items():
            path = f"optimizer/{name}/model/{'w' if variable is mine.w else 'b'}"
            np.testing.assert_array_equal(value(slot), reader.get_tensor(path))
    unused = {entry.path for entry in status.report.unexpected + status.report.deferred}
    assert unused == {
        "data/ITERATOR_STATE",
        "gen/_state_var",
        "optimizer/beta1_power",
        "optimizer/beta2_power",
        "table/table-keys",
        "table/table-values",
    }
    with pytest.raises(AssertionError):
        status.assert_consumed()


@pytest.mark.parametrize("order", ["wob", "owb", "bow"])
def test_objects_that_appear_later_receive_what_waits(order):
    """Variables, containers and optimizers; slots as soon as both of their ends are there."""
    checkpoint = ckpt.Checkpoint(model=Model())
    status = checkpoint.restore(OBJECTS)
    w, b = var(jnp.zeros((3, 4))), var(jnp.zeros(4))
    optimizer = Adam(w, b)
    for step in order:
        if step == "o":
            checkpoint.optimizer = optimizer
        else:
            setattr(checkpoint.model, step, w if step == "w" else b)
    checkpoint.model.layers = [var(jnp.zeros(2))]
    checkpoint.model.layers.append({"k": integer()})
    status.expect_partial().assert_existing_objects_matched()
    np.testing.assert_allclose(value(w), W, rtol=1e-6)
    assert value(checkpoint.model.layers[1]["k"]) == 3
    with ckpt.load_checkpoint(OBJECTS) as reader:
        for name in "mv":
            slot = optimizer.state[name, w]
            np.testing.assert_array_equal(
                value(slot), reader.get_tensor(f"optimizer/{name}/model/w")
            )


def test_a_shared_variable_is_one_object():
    mine = Model(w=(w := var(jnp.zeros((3, 4)))), shared=w)
    ckpt.Checkpoint(model=mine).restore(OBJECTS).expect_partial()
    np.testing.assert_allclose(value(w), W, rtol=1e-6)
    apart = Model(w=var(jnp.zeros((3, 4))), shared=var(jnp.zeros((3, 4))))
    ckpt.Checkpoint(model=apart).restore(OBJECTS).expect_partial()
    np.testing.assert_array_equal(value(apart.w), value(w))


def test_named_tuples_are_found_by_field_and_by_position():
    for mine in (
        {"x": var(0.0), "y": var(0.0)},
        (var(0.0), var(0.0)),
        [var(0.0), var(0.0)],
    ):
        model = Model(nt=mine)
        ckpt.Checkpoint(m=model).read(FILES / "nt").expect_partial()
        parts = mine.values() if isinstance(mine, dict) else mine
        assert [float(value(part)) for part in parts] == [1, 2]
    assert ckpt.load(FILES / "nt", only="m/nt/**")["m"]["nt"].keys() == {"x", "y"}


def test_the_graph_is_given_as_it_was_saved():
    graph = ckpt.object_metadata(OBJECTS)
    root = graph.nodes[0]
    assert [str(label) for label, _ in root.children][:3] == ["data", "gen", "model"]
    assert {slot.name for _, slot in graph.slots()} == {"m", "v"}
    view = ckpt.CheckpointView(OBJECTS)
    assert "save_counter" in view.children(0)
    found = ckpt.load(OBJECTS, only=["model/**", "optimizer/**", "state"])
    assert found["state"] == "état".encode()
    np.testing.assert_array_equal(found["model"]["shared"], found["model"]["w"])
    assert found["optimizer"]["m"]["model"]["w"].shape == (3, 4)


def test_an_nnx_module_is_a_target(mesh42):
    class Net(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(jnp.zeros((3, 4))), nnx.Param(jnp.zeros(4))

    net = Net()
    report = ckpt.Checkpoint(model=net).restore(OBJECTS).expect_partial().report
    np.testing.assert_allclose(net.w[...], W, rtol=1e-6)
    assert "model/layers/0" in {entry.path for entry in report.unexpected}


def test_values_come_without_objects_into_an_abstract_tree():
    target = {"model": {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    report = ckpt.plan_restore(OBJECTS, target)
    assert [entry.path for entry in report.restored] == ["model/w"]
    assert "model/b" in {entry.path for entry in report.unexpected}
    found = ckpt.restore(OBJECTS, target, allow_unexpected=True)
    np.testing.assert_allclose(found["model"]["w"], W, rtol=1e-6)
    with pytest.raises(ckpt.RestoreMismatchError, match="model/b"):
        ckpt.restore(OBJECTS, target)
    wrong = {"model": {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"model/w: .*\(3, 5\).*\(3, 4\)"):
        ckpt.restore(OBJECTS, wrong, allow_unexpected=True)


# --- partitioned variables ---------------------------------------------------------------


@pytest.mark.parametrize("spec", [("data", "model"), (None, "data"), (), ("model",)])
def test_partitioned_variables_are_restored_onto_shards(mesh42, spec):
    sharding = NamedSharding(mesh42, PartitionSpec(*spec))
    target = {"c": jax.ShapeDtypeStruct((60, 60), jnp.float32, sharding=sharding)}
    rows = 60 // (mesh42.shape[spec[0]] if spec and spec[0] else 1)
    found = ckpt.restore(
        FILES / "slices",
        target,
        allow_unexpected=True,
        options=ckpt.CheckpointOptions(cast=True),
    )["c"]
    assert found.sharding.is_equivalent_to(sharding, 2)
    assert found.addressable_shards[0].data.shape[0] == rows
    np.testing.assert_array_equal(found, np.arange(3600, dtype=np.float32).reshape(60, 60))


def test_only_the_wanted_parts_are_read():
    with ckpt.load_checkpoint(FILES / "slices") as reader:
        box = ((10, 20), (0, 60))
        found = reader.get_tensor("c", box)
        np.testing.assert_array_equal(found, np.arange(3600.0).reshape(60, 60)[10:20])
        assert reader.bytes_read == found.nbytes


def test_files_cut_by_size_are_put_together(mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec(None, "model"))
    mine = Model(w=ckpt.Variable(jax.device_put(jnp.zeros((3, 4)), sharding)))
    ckpt.Checkpoint(model=mine).read(FILES / "maxshard").expect_partial()
    np.testing.assert_allclose(mine.w.value, W, rtol=1e-6)
    assert mine.w.value.sharding.is_equivalent_to(sharding, 2)


# --- SavedModels, and checkpoints without a graph -----------------------------------------


@pytest.mark.behaviour(73)
def test_the_values_of_a_saved_model_are_restored():
    mine = module()
    ckpt.Checkpoint(mine).read(FILES / SAVED_MODEL).assert_existing_objects_matched()
    np.testing.assert_allclose(value(mine.w), W, rtol=1e-6)
    assert ckpt.load(FILES / SAVED_MODEL)["cfg"] == [5, np.array([6])]
    assert ckpt.verify(FILES / SAVED_MODEL).ok


@pytest.mark.behaviour(75)
def test_the_values_of_a_saved_model_wait_for_attributes():
    mine = Model()
    status = ckpt.Checkpoint(mine).read(FILES / SAVED_MODEL)
    mine.w = var(jnp.zeros((3, 4)))
    np.testing.assert_allclose(value(mine.w), W, rtol=1e-6)
    mine.b, mine.layers, mine.cfg = (part := module()).b, part.layers, part.cfg
    status.assert_existing_objects_matched().expect_partial()


def test_a_saved_model_without_variables_is_refused_by_name(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"SavedModel .*variables.index"):
        ckpt.load(tmp_path)


def test_name_based_checkpoints_are_restored_by_name(mesh42):
    path = FILES / "tf1" / "model.ckpt-1"
    names = [name for name, _ in ckpt.list_variables(path)]
    assert {"net/dense/kernel", "net/dense/kernel/Adam_1", "emb", "global_step"} <= {*names}
    rules = [("net/dense/kernel", "dense/kernel"), ("net/dense/bias", "dense/bias")]
    sharding = NamedSharding(mesh42, PartitionSpec(None, "data"))
    target = {
        "dense": nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        "emb": jax.ShapeDtypeStruct((10, 4), jnp.float32, sharding=sharding),
    }
    found = ckpt.restore(path, target, rename=rules, allow_unexpected=True)
    with ckpt.load_checkpoint(path) as reader:
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(
                getattr(found["dense"], name)[...], reader.get_tensor(f"net/dense/{name}")
            )
        np.testing.assert_array_equal(found["emb"], reader.get_tensor("emb"))


def test_moments_of_name_based_checkpoints_are_restored_by_two_rules():
    path = FILES / "tf1" / "model.ckpt-1"
    dense = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    params = {"net": {"dense": dense}, "emb": jnp.zeros((10, 4))}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    rules = [
        ("**/Adam", "opt_state/ScaleByAdamState.mu/params/**"),
        ("**/Adam_1", "opt_state/ScaleByAdamState.nu/params/**"),
        ("global_step", "step"),
        ("net/**", "params/net/**"),
        ("emb", "params/emb"),
    ]
    found = ckpt.restore(
        path, state, rename=rules, allow_unexpected="beta*", allow_missing="**/*.count"
    )
    assert found.step == 1
    with ckpt.load_checkpoint(path) as reader:
        for moments, name in ((found.opt_state[0].mu, "Adam"), (found.opt_state[0].nu, "Adam_1")):
            np.testing.assert_array_equal(moments["emb"], reader.get_tensor(f"emb/{name}"))
            kernel = reader.get_tensor(f"net/dense/kernel/{name}")
            np.testing.assert_array_equal(moments["net"]["dense"]["kernel"], kernel)


# --- paths -------------------------------------------------------------------------------


def test_files_of_the_first_format_are_refused_by_name():
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"old.ckpt: .*first format \(V1\)"):
        ckpt.load(FILES / "tf1" / "old.ckpt")


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
def test_the_path_of_a_file_leads_to_the_prefix(ending):
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"Pass its prefix: '.*ckpt-1'"):
        ckpt.load(f"{OBJECTS}{ending}")


def test_content_counts_and_not_the_name(tmp_path):
    (tmp_path / "a.index").write_bytes(b"no table")
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(tmp_path / "a")
    prefix = copied(tmp_path, "nt")
    path = ckpt.save(prefix, {"step": 7})  # one of ours, of the same name
    assert ckpt.load(path) == {"step": 7}


def test_a_checkpoint_that_is_replaced_during_a_read_is_not_mixed(tmp_path):
    prefix = copied(tmp_path, "slices")
    reader = ckpt.load_checkpoint(prefix)
    for file in tmp_path.iterdir():
        file.rename(tmp_path / f"old-{file.name}")
    copied(tmp_path, "slices")
    with pytest.raises(ckpt.CheckpointNotFoundError, match="was replaced"):
        reader.get_tensor("c")


def test_a_directory_of_tensorflow_has_a_latest_checkpoint(tmp_path):
    shutil.copytree(FILES / "object_graph", run := tmp_path / "run")
    assert ckpt.latest_checkpoint(run) == str(run / "ckpt-1")
    assert dict(ckpt.list_variables(run))["save_counter"] == ()
    assert [*ckpt.checkpoints_iterator(run, timeout=0)] == [str(run / "ckpt-1")]


def run_of_tensorflow(tmp_path, numbers):
    """A directory as `tf.train.CheckpointManager` leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [f'model_checkpoint_path: "ckpt-{numbers[-1]}"']
    for number in numbers:
        for file in (FILES / "object_graph").glob("ckpt-1.*"):
            shutil.copy(file, run / file.name.replace("ckpt-1", f"ckpt-{number}"))
        lines.append(f'all_model_checkpoint_paths: "ckpt-{number}"')
    lines += [f"all_model_checkpoint_timestamps: {number}.5" for number in numbers]
    (run / "checkpoint").write_text("\n".join([*lines, "last_preserved_timestamp: 0.5", ""]))
    return run


def test_a_manager_goes_on_in_a_directory_of_tensorflow(tmp_path):
    run = run_of_tensorflow(tmp_path, [8, 9, 10])
    mine = Model(w=var(jnp.zeros((3, 4))), b=var(jnp.zeros(4)))
    checkpoint = ckpt.Checkpoint(model=mine, step=0)
    manager = ckpt.CheckpointManager(checkpoint, run, max_to_keep=2)
    assert manager.restore_or_initialize() == str(run / "ckpt-10")
    np.testing.assert_allclose(value(mine.w), W, rtol=1e-6)
    assert checkpoint.step == 7
    theirs = {file.name for file in run.iterdir()} - {"checkpoint"}
    for number in (11, 12, 13):
        assert manager.save() == str(run / f"ckpt-{number}")
    assert [pathlib.Path(path).name for path in manager.checkpoints] == ["ckpt-12", "ckpt-13"]
    assert theirs <= {file.name for file in run.iterdir()}  # they are never removed
    assert ckpt.latest_checkpoint(run) == str(run / "ckpt-13")
    again = ckpt.CheckpointManager(ckpt.Checkpoint(model=Model(w=var(jnp.zeros((3, 4))))), run)
    assert again.restore_or_initialize() == str(run / "ckpt-13")


def test_a_manager_restores_a_step_of_tensorflow_by_its_number(tmp_path):
    run = run_of_tensorflow(tmp_path, [2, 10])
    net = Model(kernel=var(jnp.zeros((3, 4))))
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(net=net), run)
    status = manager.restore(2, rename=[("model/w", "net/kernel")])
    status.expect_partial()
    np.testing.assert_allclose(value(net.kernel), W, rtol=1e-6)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        manager.restore(3)


def test_if_the_latest_is_damaged_the_one_before_is_taken(tmp_path, caplog):
    run = run_of_tensorflow(tmp_path, [8, 9, 10])
    (run / "ckpt-10.data-00000-of-00001").unlink()
    index = (run / "ckpt-9.index").read_bytes()
    (run / "ckpt-9.index").write_bytes(index[:-10])
    assert ckpt.latest_checkpoint(run) == str(run / "ckpt-8")
    assert "ckpt-10 is not usable" in caplog.text
    mine = Model(w=var(jnp.zeros((3, 4))))
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(model=mine), run)
    assert manager.restore_or_initialize() == str(run / "ckpt-8")
    (run / "checkpoint").unlink()
    assert ckpt.latest_checkpoint(run) == str(run / "ckpt-8")


def test_a_checkpoint_of_tensorflow_becomes_ours(tmp_path):
    source = FILES / "keras3" / "ckpt-1"
    path = ckpt.convert(source, tmp_path / "own")
    assert ckpt.verify(path).ok

    class Net(nnx.Module):
        def __init__(self):
            self.enc = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    rules = [
        ("model/_operations/1/_kernel", "model/enc/kernel"),
        ("model/_operations/1/bias", "model/enc/bias"),
    ]
    found = []
    for where in (source, path):
        net = Net()
        optimizer = nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)
        status = ckpt.Checkpoint(model=net, optimizer=optimizer).restore(where, rename=rules)
        status.assert_existing_objects_matched().expect_partial()
        found.append(jax.tree.leaves(nnx.state((net, optimizer))))
    jax.tree.map(np.testing.assert_array_equal, *found)
