"""Merging: shards become one checkpoint, by reference, in one step, or nothing changes."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from parts import data_files, manifest, shard_index

from ckpt_jax.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ShardError,
)
from ckpt_jax.store import merge as merge_module
from ckpt_jax.store import transfer
from ckpt_jax.store.fetch import ShardedReader, read_index
from ckpt_jax.store.merge import commit, merge_shards, read_shard
from ckpt_jax.store.shard import Slice, write_shards

ARRAY = np.arange(40.0).reshape(8, 5)
BIG = np.arange(200_000.0)


def write_shard(path, values):
    write_shards({path: values}, durable=False)


def write_halves(directory):
    paths = [str(directory / name) for name in ("left", "right")]
    for i, path in enumerate(paths):
        half = slice(4 * i, 4 * i + 4)
        box = ((4 * i, 4 * i + 4), (0, 5))
        part = BIG[i * 100_000 : (i + 1) * 100_000]
        big = Slice(part, ((i * 100_000, (i + 1) * 100_000),), BIG.shape)
        write_shard(path, {"x": Slice(ARRAY[half], box, ARRAY.shape), "big": big})
    return paths


def check(root):
    with ShardedReader(str(root)) as reader:
        requests = [("x", [((0, 8), (0, 5))]), ("big", [((0, 200_000),)])]
        found = dict(reader.read(requests))
    np.testing.assert_array_equal(found[0][0], ARRAY)
    np.testing.assert_array_equal(found[1][0], BIG)


def files(directory):
    return sorted(
        os.path.relpath(os.path.join(path, name), directory)
        for path, _, names in os.walk(directory)
        for name in names
    )


def test_merging_moves_shards_and_commits_extra_values(tmp_path):
    paths = write_halves(tmp_path)
    root = str(tmp_path / "root")
    assert merge_shards(paths, root, {"graph": b"g" * 1000}) == root
    assert not any(map(os.path.exists, paths))
    assert sorted(os.listdir(os.path.join(root, "shards"))) == ["00000", "00001"]
    check(root)
    with ShardedReader(root) as reader:
        assert reader.extra("graph") == b"g" * 1000
        assert reader.extra("other") is None
        assert [s.directory for s in reader.index.shards] == ["shards/00000", "shards/00001"]


def test_shards_inside_the_checkpoint_stay_where_they_are(tmp_path):
    (tmp_path / "parts").mkdir()
    paths = write_halves(tmp_path / "parts")
    merge_shards(paths, str(tmp_path))
    assert all(map(os.path.exists, paths))
    check(tmp_path)


def test_moved_shards_keep_clear_of_those_that_are_there(tmp_path):
    root = tmp_path / "root"
    os.makedirs(root / "shards")
    left, right = write_halves(tmp_path)
    os.rename(left, root / "shards" / "00000")
    merge_shards([str(root / "shards" / "00000"), right], str(root))
    check(root)


def test_a_checkpoint_can_be_renamed_and_copied(tmp_path):
    merge_shards(write_halves(tmp_path), str(tmp_path / "root"))
    shutil.copytree(tmp_path / "root", tmp_path / "copy")
    os.rename(tmp_path / "root", tmp_path / "renamed")
    check(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    check(tmp_path / "renamed")


def test_a_name_can_be_used_again_while_a_reader_of_the_old_one_is_open(tmp_path):
    root = str(tmp_path / "root")
    merge_shards(write_halves(tmp_path), root)
    with ShardedReader(root) as reader:
        next(reader.read([("x", [((0, 8), (0, 5))])]))
        shutil.rmtree(root)
        merge_shards(write_halves(tmp_path), root)
        check(root)


def test_a_refused_merge_changes_nothing(tmp_path):
    left, right = write_halves(tmp_path)
    write_shard(str(tmp_path / "odd"), {"x": np.ones(3), "y": Slice(np.ones(1), ((0, 1),), (2,))})
    before = files(tmp_path)
    with pytest.raises(ShardError) as caught:
        merge_shards([left, right, str(tmp_path / "odd")], str(tmp_path / "root"))
    for part in ("x: ", "y: ", "disagrees", "hole", "shards/00002"):
        assert part in str(caught.value)
    assert files(tmp_path) == before


def test_one_missing_shard_is_a_hole(tmp_path):
    left, _ = write_halves(tmp_path)
    with pytest.raises(ShardError, match="hole"):
        merge_shards([left], str(tmp_path / "root"))


@pytest.mark.parametrize("name", ["gone", "file", "file/below"])
def test_what_is_no_directory_is_no_shard(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match=name):
        merge_shards([str(tmp_path / name)], str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_a_directory_without_an_index_is_an_interrupted_shard(tmp_path):
    left, right = write_halves(tmp_path)
    os.unlink(os.path.join(left, "index"))
    with pytest.raises(CorruptCheckpointError, match=r"left: has no index.*interrupted"):
        merge_shards([left, right], str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_a_damaged_shard_is_named(tmp_path):
    left, right = write_halves(tmp_path)
    file = Path(right, "index")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"right: .*checksum") as caught:
        merge_shards([left, right], str(tmp_path / "root"))
    assert caught.value.file == str(file)


def test_entries_that_are_known_are_not_read_again(tmp_path, monkeypatch):
    paths = write_halves(tmp_path)
    known = [read_shard(path) for path in paths]
    monkeypatch.setattr(merge_module, "read_file", None)
    tables = {table.digest: table for _, table in known}
    entries = [(shard, table.digest) for shard, table in known]
    assert commit(entries, tables, str(tmp_path / "root")) == str(tmp_path / "root")
    check(tmp_path / "root")


def test_the_index_says_what_the_indexes_of_the_shards_say(tmp_path):
    paths = write_halves(tmp_path)
    own = [shard_index(path) for path in paths]
    root = merge_shards(paths, str(tmp_path / "root"))
    index = read_index(root)
    assert len(index.tables) == 1  # the shards differ in the places of their boxes alone
    for shard, message in zip(index.shards, own, strict=True):
        (theirs,) = message.shards
        assert shard.starts == tuple(theirs.starts)
        for name in ("nbytes", "block_nbytes", "file_nbytes", "stored_nbytes", "compression"):
            assert getattr(shard, name) == getattr(theirs, name)
        assert (len(shard.digest), shard.checksums) == (32, b"")
    nbytes = sum(file.stat().st_size for file in data_files(root))
    assert sum(shard.stored_nbytes for shard in index.shards) == nbytes


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    """If merging stops at any step, there is no checkpoint, and it can be done again."""
    steps = ["os.rename", "write_parts", "fsync_directory", "write_manifest"]
    for number, step in enumerate(steps):
        place = tmp_path / str(number)
        place.mkdir()
        paths = write_halves(place)
        root = str(place / "root")

        def stop(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            name = step.rpartition(".")[2]
            patch.setattr(merge_module.os if "." in step else merge_module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                merge_shards(paths, root)
        assert not os.path.exists(os.path.join(root, "manifest.ckpt"))
        moved = [f"{root}/shards/{i:05d}" for i in range(2)]
        merge_shards(moved if os.path.exists(moved[0]) else paths, root, {"graph": b"g"})
        check(root)
        assert [part.name for part in manifest(root).parts] == ["_INDEX", "graph"]


@pytest.fixture
def elsewhere(tmp_path):
    """A directory on another file system."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("This needs two file systems.")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield directory


@pytest.mark.parametrize("durable", [True, False])
def test_shards_of_another_file_system_are_copied_and_then_removed(tmp_path, elsewhere, durable):
    left, right = write_halves(tmp_path)
    far = shutil.move(right, elsewhere)
    root = merge_shards([left, far], str(tmp_path / "root"), durable=durable)
    check(root)
    assert os.listdir(elsewhere) == []
    assert sorted(os.listdir(os.path.join(root, "shards"))) == ["00000", "00001"]


def test_a_copy_that_cannot_be_removed_is_no_failure(tmp_path, elsewhere, monkeypatch, caplog):
    paths = [shutil.move(path, elsewhere) for path in write_halves(tmp_path)]
    rmtree = shutil.rmtree

    def refuse(path, **options):
        if str(path) == paths[0]:
            raise OSError(errno.EROFS, "Read-only file system", path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    check(merge_shards(paths, str(tmp_path / "root")))
    assert os.listdir(elsewhere) == ["left"]
    assert f"{paths[0]} was copied, but could not be removed" in caplog.text


FAILING = [
    "copytree",
    "fsync_file",
    "write_parts",
    "write_manifest",
    "fsync of the directory above",
]


@pytest.mark.parametrize("step", FAILING)
def test_if_a_merge_fails_all_shards_are_where_they_were(tmp_path, elsewhere, monkeypatch, step):
    """The first is renamed, the second is copied."""
    (tmp_path / "runs").mkdir()
    left, right = write_halves(tmp_path / "runs")
    paths = [left, shutil.move(right, elsewhere)]
    before = files(tmp_path), files(elsewhere)
    tried = []

    def fail(path, *arguments, **options):
        tried.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def fail_above(path):
        if path == str(tmp_path):
            fail(path)

    with monkeypatch.context() as patch:
        if step == FAILING[-1]:
            patch.setattr(merge_module, "fsync_directory", fail_above)
        else:
            module = shutil if step == "copytree" else merge_module
            patch.setattr(transfer if step == "fsync_file" else module, step, fail)
        with pytest.raises(OSError, match="No space left"):
            merge_shards(paths, str(tmp_path / "root"))
    assert tried
    assert (files(tmp_path), files(elsewhere)) == before
    assert not (tmp_path / "root").exists()
    check(merge_shards(paths, str(tmp_path / "root")))


def test_a_merge_that_fails_leaves_what_was_there_before(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "shards" / "mine").mkdir(parents=True)
    left, right = write_halves(tmp_path)
    inside = shutil.move(left, root / "left")
    before = files(tmp_path)

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "write_manifest", fail)
        with pytest.raises(OSError, match="Input/output error"):
            merge_shards([str(inside), right], str(root))
    assert files(tmp_path) == before
    assert os.listdir(root / "shards") == ["mine"]
    check(merge_shards([str(inside), right], str(root)))


def test_arrays_that_are_cut_in_more_ways_than_a_reader_accepts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module.Index, "is_readable", lambda index, nbytes: index.is_shard)
    paths = write_halves(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ShardError, match="2 arrays are cut in too many different ways over 2"):
        merge_shards(paths, str(tmp_path / "root"))
    assert files(tmp_path) == before


def test_a_shard_may_be_listed_only_once(tmp_path):
    left, right = write_halves(tmp_path)
    with pytest.raises((ValueError, ShardError), match="twice"):
        merge_shards([left, right, left], str(tmp_path / "root"))


def test_a_checkpoint_is_neither_a_shard_nor_overwritten(tmp_path):
    root = str(tmp_path / "root")
    merge_shards(write_halves(tmp_path), root)
    with pytest.raises(CheckpointError, match="not a shard"):
        merge_shards([root], str(tmp_path / "other"))
    with pytest.raises(FileExistsError, match="already is a checkpoint"):
        merge_shards([], root)
    check(root)


def test_a_checkpoint_of_no_shards_holds_extra_values(tmp_path):
    merge_shards([], str(tmp_path / "root"), {"graph": b"g"}, durable=False)
    with ShardedReader(str(tmp_path / "root")) as reader:
        assert reader.index.keys == ()
        assert reader.extra("graph") == b"g"


def test_the_index_is_no_extra_value(tmp_path):
    with pytest.raises(ValueError, match="_INDEX"):
        merge_shards([], str(tmp_path / "root"), {"_INDEX": b""})
