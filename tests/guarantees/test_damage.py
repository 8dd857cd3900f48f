"""What is not there, not whole or not ours is refused, and everything stays as it was."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpt_jax as ckpt
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
from ckpt_jax.store.manifest import MANIFEST

BIG = np.random.default_rng(6).normal(size=1_000_000).astype(np.float32)


def tree():
    return {
        "params": {"w": BIG, "b": np.arange(50, dtype=np.int16)},
        "tiny": jnp.ones(2),
        "step": 7,
        "name": "run",
    }


def files_below(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in Path(directory).rglob("*")
        if file.is_file()
    }


def every_reader(path):
    """All ways to read a checkpoint, each with a target whose values it must not change."""
    blank = {
        "params": {"w": np.zeros_like(BIG), "b": np.zeros(50, np.int16)},
        "tiny": jnp.zeros(2),
        "step": 0,
        "name": "",
    }
    checkpoint = ckpt.Checkpoint(**blank)

    def unchanged():
        assert checkpoint.step == 0
        assert not np.asarray(checkpoint.params["w"]).any()
        assert not blank["params"]["w"].any()
        assert checkpoint.save_counter == 0

    return {
        "load": lambda: ckpt.load(path),
        "restore": lambda: ckpt.restore(path, blank),
        "Checkpoint.restore": lambda: checkpoint.restore(path),
    }, unchanged


def assert_refused(path, errors, match=None):
    """Every reader raises one of `errors`; nothing on disk or in memory changes."""
    before = files_below(Path(path).parent)
    readers, unchanged = every_reader(path)
    for name, read in readers.items():
        with pytest.raises(errors, match=match) as raised:
            read()
        assert isinstance(raised.value, ckpt.CheckpointError), name
        unchanged()
    assert files_below(Path(path).parent) == before


def test_a_path_that_is_not_there_lists_the_checkpoints_that_are(tmp_path):
    for number in (2, 10):
        ckpt.save(tmp_path / f"ckpt-{number}", {"x": number})
    (tmp_path / "notes").mkdir()
    with pytest.raises(ckpt.CheckpointNotFoundError) as raised:
        ckpt.load(tmp_path / "ckpt-3")
    assert isinstance(raised.value, FileNotFoundError)
    assert str(raised.value).endswith(": ckpt-2, ckpt-10")
    assert str(tmp_path / "ckpt-3") in str(raised.value)
    assert_refused(tmp_path / "ckpt-3", ckpt.CheckpointNotFoundError, "ckpt-2, ckpt-10")


def test_a_path_in_a_directory_without_checkpoints_says_so(tmp_path):
    assert_refused(tmp_path / "a", ckpt.CheckpointNotFoundError, "There are no checkpoints in")


def test_a_path_below_a_directory_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ckpt.CheckpointNotFoundError, match="gone does not exist"):
        ckpt.load(tmp_path / "gone" / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_checkpoints_is_no_checkpoint_but_lists_them(tmp_path):
    checkpoint = ckpt.Checkpoint(x=1)
    for _ in range(2):
        checkpoint.save(tmp_path / "runs" / "ckpt")
    assert_refused(tmp_path / "runs", ckpt.CheckpointNotFoundError, "ckpt-1, ckpt-2")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "a").write_bytes(b"anything")
    assert_refused(tmp_path / "a", ckpt.CheckpointNotFoundError, "is a file")


def test_an_empty_directory_and_one_of_another_program_are_no_checkpoints(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.h5").write_bytes(b"\x89HDF")
    for name in ("empty", "other"):
        assert_refused(tmp_path / name, ckpt.CheckpointNotFoundError, "not a checkpoint")


def format_1(path):
    """The files of a checkpoint of format 1, which no released version has written."""
    for name in ("d/7938323a", "shards/00000-00000/manifest.ocdbt", "manifest.ocdbt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"\x0c\xdb")
    return path


def test_a_checkpoint_of_format_1_is_called_by_its_name(tmp_path):
    path = format_1(tmp_path / "ckpt-1")
    assert_refused(path, ckpt.UnsupportedFormatError, r"ckpt_jax .*\(format 1\)")
    with pytest.raises(FileExistsError, match="not a checkpoint; it is not replaced"):
        ckpt.save(path, tree(), overwrite=True)
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path)
    for _ in range(2):  # without a state file, and with one
        for look in (lambda: ckpt.latest_checkpoint(tmp_path), manager.restore_or_initialize):
            with pytest.raises(ckpt.UnsupportedFormatError, match=r"ckpt-1.*format 1"):
                look()
        (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"\n')


def test_what_lies_in_a_staging_directory_has_no_format(tmp_path):
    format_1(tmp_path / "ckpt-1.staging-0123456789abcdef")
    assert ckpt.latest_checkpoint(tmp_path) is None


def test_a_checkpoint_beside_one_of_tensorflow_of_the_same_name_is_read(tmp_path):
    (tmp_path / "a.index").touch()
    assert ckpt.load(ckpt.save(tmp_path / "a", {"step": 7})) == {"step": 7}


def test_a_staging_directory_is_no_checkpoint_whatever_is_in_it(tmp_path):
    path = ckpt.save(tmp_path / "a", tree())
    staging = f"{path}.staging-0123456789abcdef"
    os.rename(path, staging)
    assert_refused(staging, ckpt.CheckpointNotFoundError, "staging directory")
    assert_refused(path, ckpt.CheckpointNotFoundError, "There are no checkpoints in")


def test_a_shard_is_no_checkpoint(tmp_path):
    path = ckpt.save(tmp_path / "a", tree())
    (shard,) = Path(path, "shards").iterdir()
    assert_refused(shard, (ckpt.CheckpointNotFoundError, ckpt.CorruptCheckpointError))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    with jax.default_device(jax.devices()[0]):
        return Path(ckpt.save(directory / "a", tree()))


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())


@pytest.mark.parametrize("size", [lambda size: 0, lambda size: size // 2])
def test_no_file_can_be_cut_short(tmp_path, sound, size):
    for number, name in enumerate(files_of(sound)):
        path = tmp_path / str(number) / "a"
        shutil.copytree(sound, path)
        os.truncate(path / name, size((path / name).stat().st_size))
        assert_refused(path, (ckpt.CorruptCheckpointError, ckpt.CheckpointNotFoundError))


def test_no_file_can_be_missing(tmp_path, sound):
    for number, name in enumerate(files_of(sound)):
        path = tmp_path / str(number) / "a"
        shutil.copytree(sound, path)
        (path / name).unlink()
        assert_refused(path, (ckpt.CorruptCheckpointError, ckpt.CheckpointNotFoundError))


def assert_sound_values(found):
    assert found["params"]["w"].tobytes() == BIG.tobytes()
    assert found["params"]["b"].tolist() == list(range(50))
    assert (found["tiny"].tolist(), found["step"], found["name"]) == ([1, 1], 7, "run")


def test_a_flipped_bit_anywhere_is_found(tmp_path, sound):
    """At 40 places of each file, and at its last byte."""
    random = np.random.default_rng(8)
    for number, name in enumerate(files_of(sound)):
        path = tmp_path / str(number) / "a"
        shutil.copytree(sound, path)
        data = (path / name).read_bytes()
        for place in [*random.integers(0, len(data), 40).tolist(), len(data) - 1]:
            flipped = bytearray(data)
            flipped[place] ^= 1 << random.integers(8)
            (path / name).write_bytes(flipped)
            with pytest.raises(ckpt.CorruptCheckpointError):
                ckpt.load(path)
            assert not ckpt.verify(path).ok
        (path / name).write_bytes(data)
        assert_sound_values(ckpt.load(path))


def test_a_flipped_bit_in_an_array_names_its_file_and_key(tmp_path, sound):
    path = tmp_path / "a"
    shutil.copytree(sound, path)
    largest = max(path.glob("shards/*/c/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[data.find(BIG[500_000:500_010].tobytes())] ^= 4
    largest.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError) as raised:
        ckpt.load(path)
    assert raised.value.key == "params/w/.ATTRIBUTES/VARIABLE_VALUE"
    assert raised.value.file is not None
    assert str(path) in raised.value.file
    assert "params/w" in str(raised.value)
    assert ckpt.load(path, only="step") == {"step": 7}


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_found_while_reading_leaves_a_module_as_it_was(tmp_path, damage):
    class Model(nnx.Module):
        def __init__(self, fill):
            self.a = nnx.Param(jnp.full(3, fill))
            self.b = nnx.Param(jnp.full((400, 400), fill))

    path = Path(ckpt.save(tmp_path / "a", Model(5.0)))
    largest = max(path.glob("shards/*/c/*"), key=lambda file: file.stat().st_size)
    if damage == "bit":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif damage == "cut":
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        largest.unlink()
    model = Model(1.0)
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.restore(path, model)
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.Checkpoint(model).restore(path)
    assert (model.a[...] == 1).all()
    assert (model.b[...] == 1).all()


def test_a_checkpoint_whose_object_graph_is_not_there_is_corrupt(tmp_path):
    prefix = ckpt.io.write_shard(str(tmp_path / "part"), {"x": np.arange(3)})
    path = ckpt.io.merge_shards([prefix], str(tmp_path / "a"))
    assert_refused(path, ckpt.CorruptCheckpointError, "object graph")
    assert ckpt.io.read_slices(path, {"x": None})["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("contents", [b"", b"junk", b"\xff" * 1000])
def test_an_object_graph_of_junk_is_corrupt(tmp_path, contents):
    prefix = ckpt.io.write_shard(str(tmp_path / "part"), {"x": np.arange(3)})
    path = str(tmp_path / "a")
    from ckpt_jax.store.merge import merge_shards  # the extra entries are not public

    merge_shards([prefix], path, extra={OBJECT_GRAPH_KEY: contents})
    assert_refused(path, ckpt.CorruptCheckpointError, OBJECT_GRAPH_KEY)


def test_a_graph_of_a_newer_format_says_so(tmp_path):
    """The same bytes with format_version 3, sealed again as a later library would."""
    from ckpt_jax.graph._proto import trackable_object_graph_pb2 as pb
    from ckpt_jax.store.fetch import ShardedReader
    from ckpt_jax.store.merge import merge_shards
    from ckpt_jax.store.seal import seal, unseal

    old = ckpt.save(tmp_path / "old", {"x": np.arange(3)})
    reader = ShardedReader(old)
    data = reader.extra(OBJECT_GRAPH_KEY)
    reader.close()
    assert data is not None
    graph = pb.TrackableObjectGraph.FromString(unseal(data))
    assert graph.format_version == 1
    graph.format_version = 3
    (shard,) = Path(old, "shards").iterdir()
    path = tmp_path / "new"
    path.mkdir()
    shutil.copytree(shard, path / "shards" / "00000")
    shard_path = str(path / "shards" / "00000")
    merge_shards([shard_path], str(path), extra={OBJECT_GRAPH_KEY: seal(graph.SerializeToString())})
    assert_refused(path, ckpt.UnsupportedFormatError, "3")


needs_permissions = pytest.mark.skipif(
    os.geteuid() == 0,
    reason="The tests run as root, who may read and write everything, so nothing is refused.",
)


@needs_permissions
@pytest.mark.behaviour(64)
def test_a_directory_that_may_not_be_written_to_is_left_alone(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            ckpt.save(tmp_path / "a", tree())
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


@needs_permissions
def test_a_file_that_may_not_be_read_is_an_error(tmp_path):
    path = ckpt.save(tmp_path / "a", tree())
    manifest = Path(path, MANIFEST)
    manifest.chmod(0)
    try:
        with pytest.raises((ckpt.CheckpointError, PermissionError)):
            ckpt.load(path)
    finally:
        manifest.chmod(0o600)


@pytest.mark.behaviour(64)
def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="file"):
        ckpt.save(tmp_path / "file" / "a", tree())
    assert files_below(tmp_path) == {"file": b"text"}
