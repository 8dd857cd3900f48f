import os
import shutil

import numpy as np
import pytest

from ckpt_jax.errors import CheckpointError, CheckpointNotFoundError, ShardError
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.merge import merge_shards
from ckpt_jax.store.shard import Slice, write_shard

ARRAY = np.arange(40.0).reshape(8, 5)
BIG = np.arange(200_000.0)


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


def test_a_missing_directory_is_no_shard(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="gone"):
        merge_shards([str(tmp_path / "gone")], str(tmp_path / "root"))


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
