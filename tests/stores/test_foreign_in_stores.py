"""Checkpoints of other libraries in object stores: they are read as those on a disk are."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_proxy import answer
from foreign import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax import readers
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.showing.commands import main
from ckpt_jax.store import objects

SUFFIX = ".index"


def _fixtures():
    """The path of each checkpoint of another library that there is, relative to `FIXTURES`."""
    todo, found = sorted(FIXTURES.iterdir()), []
    for each in todo:  # grows while it is walked
        path = each.with_suffix("") if each.suffix == SUFFIX else each
        if format_of(str(path)) is not None and not each.name.count(".data-"):
            found.append(str(path.relative_to(FIXTURES)))
        elif each.is_dir():
            todo += sorted(each.iterdir())
    return sorted(found)


def upload(source, url):
    """Copies a file or the files in a directory, and those whose names begin like it."""
    source = Path(source)
    for each in [source, *source.parent.glob(f"{source.name}.*")]:
        for file in [each, *each.rglob("*")]:
            if file.is_file():
                objects.write(url + str(file).removeprefix(str(source)), file.read_bytes())
    return url


@pytest.fixture
def uploaded(memory):
    return lambda source: upload(source, f"{memory.url}/{Path(source).name}")


def contents(path):
    """All that a checkpoint says of itself, and all values that can be read; or why it cannot be
    opened."""
    try:
        with ckpt.load_checkpoint(path) as reader:
            refused = reader.refusals()
            keys = [key for key in reader.get_variable_to_shape_map() if key not in refused]
            return reader.object_graph, reader.unchecked, refused, reader.read(dict.fromkeys(keys))
    except ckpt.CheckpointError as error:
        return type(error), str(error).replace(str(path), "PATH")


def assert_alike(found, expected):
    assert found[:-1] == expected[:-1]
    if not isinstance(expected[-1], dict):
        assert found == expected
        return
    assert found[-1].keys() == expected[-1].keys()
    for key, value in expected[-1].items():
        assert type(found[-1][key]) is type(value)
        np.testing.assert_array_equal(found[-1][key], value, err_msg=key)


@pytest.mark.parametrize("name", _fixtures())
def test_every_checkpoint_reads_as_on_a_disk(uploaded, name):
    local = FIXTURES / name
    url = uploaded(local)
    assert_alike(contents(url), contents(local))
    here, there = ckpt.verify(local), ckpt.verify(url)
    assert str(there).replace(url, str(local)) == str(here)


@pytest.mark.parametrize("name", ["hub", "orbax/0.12.8_standard", "tensorflow/slices", "new.pt"])
def test_servers_give_the_same(any_server, name):
    local = FIXTURES / name
    assert_alike(contents(upload(local, f"{any_server.url}/a")), contents(local))


# --- everything that takes a path ------------------------------------------------------

MANAGER = FIXTURES / "orbax" / "0.12.8_manager"


def target_like(path, mesh):
    """A target with the values of a checkpoint, spread over a mesh as far as they allow it."""

    def struct(value):
        if not isinstance(value, np.ndarray):
            return value
        axis = ("data",) if value.ndim and value.shape[0] % 4 == 0 else ()
        sharding = NamedSharding(mesh, PartitionSpec(*axis))
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return jax.tree.map(struct, ckpt.load(path))


@pytest.mark.parametrize("name", ["hub", "orbax/0.12.8_train_state", "flax_legacy/checkpoint_3"])
def test_values_are_restored_onto_a_mesh(uploaded, mesh42, name):
    local = FIXTURES / name
    url, target = uploaded(local), target_like(local, mesh42)
    assert str(ckpt.plan_restore(url, target)) == str(ckpt.plan_restore(local, target)).replace(
        str(local), url
    )
    found, expected = ckpt.restore(url, target), ckpt.restore(local, target)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), (found, expected))
    assert shardings[0] == shardings[1]


def test_objects_are_restored_through_the_graph_of_tensorflow(uploaded):
    local = FIXTURES / "tensorflow" / "nt"
    url = uploaded(local)
    assert ckpt.list_variables(url) == ckpt.list_variables(local)
    tree = ckpt.load(local)
    restored = ckpt.Checkpoint(**jax.tree.map(np.zeros_like, tree))
    restored.restore(url).expect_partial()
    for name in tree:
        jax.tree.map(np.testing.assert_array_equal, getattr(restored, name), tree[name])


def test_a_box_is_read_alone(uploaded):
    local = FIXTURES / "orbax" / "0.12.8_standard"
    with ckpt.load_checkpoint(uploaded(local)) as reader, ckpt.load_checkpoint(local) as other:
        key = max(other.keys(), key=other.stored_nbytes)
        box = tuple([(n // 3, n - n // 4) for n in other.get_variable_to_shape_map()[key]])
        np.testing.assert_array_equal(reader.get_tensor(key, box), other.get_tensor(key, box))


@pytest.mark.parametrize(
    ("directory", "latest"),
    [
        (MANAGER, "1"),
        (FIXTURES / "flax_legacy", "checkpoint_3"),
        (FIXTURES / "tensorflow" / "keras3", "ckpt-1"),
    ],
)
def test_the_latest_checkpoint_of_a_directory(uploaded, directory, latest):
    url = uploaded(directory)
    path = f"{url}/{latest}"
    assert ckpt.latest_checkpoint(url) == path
    assert [*ckpt.checkpoints_iterator(url, timeout=0)] == [path]
    assert ckpt.list_variables(url) == ckpt.list_variables(directory)
    with pytest.raises(ckpt.CheckpointNotFoundError, match=f"another library: {latest}"):
        ckpt.restore(url, {})


def test_a_manager_goes_on_where_one_of_orbax_has_ended(uploaded):
    url = uploaded(MANAGER)
    values = ckpt.load(MANAGER / "1")
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(**jax.tree.map(np.zeros_like, values)), url)
    assert manager.restore_or_initialize() == f"{url}/1"
    assert manager.save() == ckpt.latest_checkpoint(url) == f"{url}/ckpt-2"
    found = ckpt.load(f"{url}/ckpt-2")
    for name in values:
        jax.tree.map(np.testing.assert_array_equal, found[name], values[name])


def test_commands(uploaded, capsys):
    url = uploaded(MANAGER)
    assert main(["ls", url]) == 0 and "orbax" in capsys.readouterr().out
    for command in (["show"], ["verify"], ["diff", str(MANAGER / "1")]):
        assert main([command[0], f"{url}/1", *command[1:]]) == 0, capsys.readouterr()


def test_conversion(uploaded, tmp_path):
    local = FIXTURES / "hub"
    own = ckpt.convert(uploaded(local), tmp_path / "own")
    jax.tree.map(np.testing.assert_array_equal, ckpt.load(own), ckpt.load(local))
    exported = ckpt.export(uploaded(local), tmp_path / "a.npz", format="npz")
    jax.tree.map(np.testing.assert_array_equal, ckpt.load(exported), ckpt.load(local))


@pytest.mark.parametrize("format", ["safetensors", "orbax", "tensorflow", "npz"])
def test_nothing_is_exported_to_a_store(memory, format):
    with pytest.raises(ValueError, match="Export to a local path, and upload"):
        ckpt.export({"w": np.zeros(3)}, f"{memory.url}/a", format=format)
    assert objects.keys_below(memory.url) == []


def test_a_registered_format_reads_what_lies_in_a_store(memory):
    """A header of eight bytes says how many numbers follow."""

    def open_numbers(path):
        files = readers.Files(path)
        count = int.from_bytes(files.read(path, 0, 8), "little")
        assert files.size(path) == 8 + 8 * count
        extent = readers.Extent(((0, count),), path, 8)
        stored = readers.Stored(readers.LeafSpec("numpy", "int64", (count,)), (extent,))
        return readers.ExtentsReader(path, {"n": stored}, files=files)

    numbers = np.arange(100_000)
    url = f"{memory.url}/a.numbers"
    objects.write(url, numbers.size.to_bytes(8, "little") + numbers.tobytes())
    with ckpt.registration_scope():
        ckpt.register_format(
            readers.Format("numbers", lambda path: path.endswith(".numbers"), open_numbers)
        )
        np.testing.assert_array_equal(ckpt.load(url)["n"], numbers)


# --- what is lost, damaged or replaced -------------------------------------------------


def keys_of(url, end):
    return [f"{url}/{key}" for key in objects.keys_below(url) if key.endswith(end)]


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("hub", "model-00002-of-00002.safetensors"),
        ("dcp_two_ranks", "__1_0.distcp"),
        ("tensorflow/saved_model", "variables/variables.data-00000-of-00001"),
    ],
)
def test_a_file_that_is_missing_is_named(uploaded, name, lost):
    url = uploaded(FIXTURES / name)
    objects.delete(f"{url}/{lost}")
    with pytest.raises(ckpt.CorruptCheckpointError, match=f"{url}.*{lost.rpartition('/')[2]}"):
        ckpt.load(url)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("orbax/0.12.8_zarr_files", "params.dense.kernel/1.0"),
        ("orbax/0.11.0_zarr3_files", "params.dense.kernel/c/1/0"),
    ],
)
def test_a_lost_chunk_of_orbax_is_an_error_and_not_zeros(uploaded, name, lost):
    url = uploaded(FIXTURES / name)
    (first, *_) = keys_of(url, lost)
    objects.delete(first)
    with pytest.raises(ckpt.CorruptCheckpointError, match=url):
        ckpt.load(url)
    assert not ckpt.verify(url).ok


def test_the_data_of_a_database_of_orbax_are_missing(uploaded):
    url = uploaded(FIXTURES / "orbax" / "0.12.8_two_processes")
    with ckpt.load_checkpoint(url) as reader:
        reader.check_files()
    for key in objects.keys_below(f"{url}/d"):
        objects.delete(f"{url}/d/{key}")
    with pytest.raises(ckpt.CorruptCheckpointError, match=url):
        ckpt.load(url)


def test_a_save_of_orbax_that_has_not_finished_on_google_cloud_storage(gcs):
    """Nothing is renamed there; a file says that a step is whole."""
    upload(MANAGER, gcs.url)
    later = upload(MANAGER / "1", f"{gcs.url}/2")
    assert ckpt.latest_checkpoint(gcs.url) == later
    objects.delete(f"{later}/commit_success.txt")
    assert ckpt.latest_checkpoint(gcs.url) == later  # it has the time at which it was finished
    assert ckpt.list_variables(f"{later}/state")  # and so have its items, if it has
    file = f"{later}/_CHECKPOINT_METADATA"
    described = json.loads(objects.read(file).value) | {"commit_timestamp_nsecs": None}
    objects.write(file, json.dumps(described).encode())
    assert ckpt.latest_checkpoint(gcs.url) == f"{gcs.url}/1"
    objects.delete(f"{later}/state/commit_success.txt")
    for path in (later, f"{later}/state"):
        with pytest.raises(ckpt.CorruptCheckpointError, match="the save has not finished"):
            ckpt.load(path)
    objects.write(f"{later}/commit_success.txt", b"")
    assert_alike(contents(later), contents(MANAGER / "1"))


CUT = [
    "all_dtypes.safetensors",
    "new.pt",
    "types.msgpack",
    "old.pt",
    "mlp_adam.eqx",
    "keras3.keras",
]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_file_that_is_cut_off(uploaded, tmp_path, name, kept):
    data = (FIXTURES / name).read_bytes()
    local = tmp_path / name
    local.write_bytes(data[: int(kept * len(data))])
    url = uploaded(local)
    found, expected = contents(url), contents(local)
    assert found[0] is expected[0] is ckpt.CorruptCheckpointError
    if name.endswith(".eqx"):  # the size of such a file is known last
        place = re.compile(r"array \d+, at byte \d+")
        assert place.search(found[1])[0] == place.search(expected[1])[0]
    else:
        assert found == expected


def test_a_damaged_header(uploaded, tmp_path):
    local = tmp_path / "a.safetensors"
    data = bytearray((FIXTURES / "all_dtypes.safetensors").read_bytes())
    data[40:44] = b"]]]]"
    local.write_bytes(data)
    assert contents(uploaded(local)) == contents(local)
    local.write_bytes(b"no header at all")
    with pytest.raises(ckpt.CorruptCheckpointError, match="it does not begin like one"):
        ckpt.load(uploaded(local))


def test_what_is_no_checkpoint_is_said_as_ever(any_store):
    ckpt.save(f"{any_store.url}/run/ckpt-1", {"w": 1})
    objects.write(f"{any_store.url}/run/notes.txt", b"hello")
    for name in ("ckpt-2", "notes.txt"):
        with pytest.raises(ckpt.CheckpointNotFoundError, match=r"Checkpoints in .*/run: ckpt-1"):
            ckpt.load(f"{any_store.url}/run/{name}")
    with pytest.raises(ckpt.CheckpointNotFoundError, match="does not exist"):
        ckpt.load(f"{any_store.url}/other/model.safetensors")


def test_what_h5py_reads_and_what_lies_as_it_is(uploaded, tmp_path):
    h5py = pytest.importorskip("h5py")
    x = np.arange(400_000.0).reshape(1000, 400)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plain"] = x
        file.create_dataset("compressed", data=x, chunks=(100, 400), compression="gzip")
    url = uploaded(tmp_path / "a.h5")
    for name in ("plain", "compressed"):
        with ckpt.load_checkpoint(url) as reader:
            np.testing.assert_array_equal(reader.get_tensor(name, ((5, 7), (0, 9))), x[5:7, :9])
            np.testing.assert_array_equal(reader.get_tensor(name), x)
    assert_alike(contents(url), contents(tmp_path / "a.h5"))


def test_what_a_store_refuses_while_h5py_reads_is_no_damage(a_server, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        x = np.random.default_rng(0).normal(size=(2000, 400))
        file.create_dataset("x", data=x, chunks=(100, 400), compression="gzip")
    url = upload(tmp_path / "a.h5", f"{a_server.url}/a.h5")
    proxy = a_server.through_proxy()
    with ckpt.load_checkpoint(url) as reader:
        proxy.fault(answer(403), operation="READ", key="a.h5")
        with pytest.raises(PermissionError):
            reader.get_tensor("x")


def test_a_bucket_that_is_missing(any_s3):
    with pytest.raises(FileNotFoundError, match="no such bucket") as caught:
        ckpt.load("s3://no-such-bucket-of-tests/model.safetensors")
    assert not isinstance(caught.value, ckpt.CheckpointError)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("hub", "00002-of-00002"),
        ("hub:/model.safetensors.index.json", "00002-of-00002"),
        ("orbax/0.12.8_zarr_files", "params.dense.kernel/"),
        ("orbax/0.12.8_standard", "/d/"),
        ("tensorflow/dtypes", "data-00000"),
        ("dcp_two_ranks", "__1_0"),
        ("keras3.keras", "a"),
    ],
)
def test_what_a_store_refuses_is_no_damage(a_server, name, data):
    directory, _, file = name.partition(":")
    url = upload(FIXTURES / directory, f"{a_server.url}/a") + file
    assert ckpt.verify(url).ok
    proxy = a_server.through_proxy()
    proxy.fault(answer(403), operation="READ", key=data)
    with pytest.raises(PermissionError):
        ckpt.load(url)


READ_LATER = ["hub", "orbax/0.12.8_zarr_files", "tensorflow/dtypes", "new.pt", "compressed.npz"]


@pytest.mark.parametrize("name", READ_LATER)
def test_a_store_that_begins_to_refuse_is_no_damage(a_server, tmp_path, name):
    local = FIXTURES / name
    if name.endswith(".npz"):
        local = tmp_path / name
        np.savez_compressed(local, **{f"a{k}": np.arange(100_000) + k for k in range(3)})
    url = upload(local, f"{a_server.url}/{local.name}")
    proxy = a_server.through_proxy()
    with ckpt.load_checkpoint(url) as reader:
        wanted = dict.fromkeys({*reader.keys()} - {*reader.refusals()})
        proxy.fault(answer(403), operation="READ")
        with pytest.raises(PermissionError):
            reader.read(wanted)


@pytest.mark.parametrize("name", ["hub", "orbax/0.12.8_zarr_files", "tensorflow/saved_model"])
def test_a_checkpoint_is_replaced_while_it_is_read(uploaded, name):
    local = FIXTURES / name
    url = uploaded(local)
    with ckpt.load_checkpoint(url) as reader:
        uploaded(local)  # with the same bytes
        with pytest.raises(ckpt.CheckpointNotFoundError, match="was replaced"):
            reader.read(dict.fromkeys(reader.keys()))
