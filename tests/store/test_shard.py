import errno
import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.store import shard as shard_module
from ckpt_jax.store.fetch import ShardedReader, read_index
from ckpt_jax.store.shard import BIG_NBYTES, Slice, write_shard


def read_whole(directory, keys):
    """The arrays under `keys`, all of them stored whole."""
    with ShardedReader(directory) as reader:
        requests = []
        for key in keys:
            shape = reader.index.layout_of(key).shape
            requests.append((key, [tuple((0, n) for n in shape)]))
        return {keys[i]: array for i, (array,) in reader.read(requests)}


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_big_and_small_arrays_and_byte_strings_come_back(tmp_path, compression):
    rng = np.random.default_rng(0)
    values = {
        "big": rng.random((3, 100_001)),
        "same size": rng.random((100_001, 3)),
        "small": rng.integers(0, 100, (7, 5)),
        "scalar": np.array(3, np.float32),
        "empty": np.empty((3, 0), np.int8),
        "zeros": np.zeros((1 << 18,), np.float32),
        "bfloat16": rng.random((4, 4)).astype(ml_dtypes.bfloat16),
    }
    path = str(tmp_path / "shard")
    nbytes = write_shard(path, {**values, "text": b"abc", "none": b""}, compression=compression)
    assert nbytes == sum(v.nbytes for v in values.values()) + 3
    for key, array in read_whole(path, list(values)).items():
        assert_same_bits(array, values[key])
    with ShardedReader(path) as reader:
        assert reader.read_bytes("text") == b"abc"
        assert reader.read_bytes("none") == b""


def test_slices_of_equal_size_share_a_stack_and_small_ones_a_pack(tmp_path):
    big = np.ones(BIG_NBYTES, np.uint8)
    values = {f"big{i}": big for i in range(3)} | {f"small{i:03}": big[:100] for i in range(100)}
    write_shard(str(tmp_path / "shard"), values)
    index = read_index(str(tmp_path / "shard"))
    (shard,) = index.shards
    assert [(s.rows, s.row_nbytes) for s in shard.stacks] == [
        (3, BIG_NBYTES),
        (1, 99 * 128 + 100),
    ]
    assert not index.offset.any() or set((index.offset % 64).tolist()) == {0}


def test_arrays_of_any_memory_layout_and_byte_order_are_stored_alike(tmp_path):
    base = np.arange(1 << 20, dtype=np.int32).reshape(1024, 1024)
    values = {
        "transposed": base.T,
        "strided": base[::3, ::-2],
        "fortran": np.asfortranarray(base[:5, :7]),
        "swapped": base[:300].astype(">i4"),
        "small swapped": np.arange(5, dtype=">f8"),
    }
    read_only = base[:2].copy()
    read_only.flags.writeable = False
    values["read only"] = read_only
    write_shard(str(tmp_path / "shard"), values)
    for key, array in read_whole(str(tmp_path / "shard"), list(values)).items():
        np.testing.assert_array_equal(array, values[key])
        assert array.dtype.isnative


@pytest.mark.parametrize("limit", [1, 1000, 1 << 20, 3 << 20])
def test_a_limit_smaller_than_an_array_only_makes_more_transactions(tmp_path, limit):
    rng = np.random.default_rng(0)
    values = {f"big{i}": rng.random(400_000) for i in range(3)}
    values |= {f"small{i}": rng.random(1000) for i in range(10)}
    write_shard(str(tmp_path / "shard"), values, max_inflight_bytes=limit)
    for key, array in read_whole(str(tmp_path / "shard"), list(values)).items():
        assert_same_bits(array, values[key])


def test_several_slices_of_one_array_may_lie_in_one_shard(tmp_path):
    array = np.arange(24.0).reshape(4, 6)
    parts = [
        Slice(array[2:], ((2, 4), (0, 6)), (4, 6)),
        Slice(array[:2], ((0, 2), (0, 6)), (4, 6)),
    ]
    write_shard(str(tmp_path / "shard"), {"x": parts})
    assert_same_bits(read_whole(str(tmp_path / "shard"), ["x"])["x"], array)


def test_a_shard_of_nothing_is_a_shard(tmp_path):
    assert write_shard(str(tmp_path / "shard"), {}) == 0
    assert read_index(str(tmp_path / "shard")).keys == ()


def test_shards_are_written_in_several_threads(tmp_path):
    values = [{"x": np.full(100_000, i)} for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        paths = [str(tmp_path / str(i)) for i in range(8)]
        list(pool.map(lambda i: write_shard(paths[i], values[i]), range(8)))
    for path, value in zip(paths, values, strict=True):
        assert_same_bits(read_whole(path, ["x"])["x"], value["x"])


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="has files"):
        write_shard(str(tmp_path), {"x": np.ones(3)})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["a"]), "x: arrays of dtype <U1 cannot be stored"),
        (np.array([None]), "x: arrays of dtype object cannot be stored"),
        (Slice(np.ones(3), ((0, 2),), (4,)), "x: contents of shape"),
        (Slice(np.ones(3), ((2, 5),), (4,)), "x: contents of shape"),
    ],
)
def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        write_shard(str(tmp_path / "shard"), {"x": value})
    assert not os.listdir(tmp_path)


def test_an_unknown_compression_is_refused(tmp_path):
    with pytest.raises(ValueError, match="zstd"):
        write_shard(str(tmp_path / "shard"), {}, compression="rar")


def test_an_error_of_the_file_system_is_an_os_error_that_names_the_directory(tmp_path, monkeypatch):
    path = tmp_path / "shard"

    def write_group(directory, *_, **__):
        (path / "d").write_bytes(b"")  # where the directory of data files would be
        return original(directory, *_, **__)

    original = shard_module._write_group
    monkeypatch.setattr(shard_module, "_write_group", write_group)
    with pytest.raises(OSError, match="shard") as caught:
        write_shard(str(path), {"x": np.ones(100_000)})
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_a_write_that_was_interrupted_is_no_shard(tmp_path, monkeypatch):
    path = str(tmp_path / "shard")
    original = shard_module._write_group

    def write_group(*arguments, last):
        if last:
            raise KeyboardInterrupt
        original(*arguments, last=last)

    monkeypatch.setattr(shard_module, "_write_group", write_group)
    with pytest.raises(KeyboardInterrupt):
        write_shard(
            path, {"x": np.ones(100_000), "y": np.ones(100_000)}, max_inflight_bytes=1 << 19
        )
    with pytest.raises(CorruptCheckpointError, match="interrupted"):
        read_index(path)
