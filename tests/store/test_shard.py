"""Writing shards: many threads write one stream, memory is bounded, failures end the write."""

import errno
import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import data_files
from places import ROOT

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.dtypes import _DTYPES, dtype_name
from ckpt_jax.store import shard as shard_module
from ckpt_jax.store import stream as stream_module
from ckpt_jax.store.fetch import ShardedReader, read_index
from ckpt_jax.store.merge import read_shard
from ckpt_jax.store.room import Room
from ckpt_jax.store.shard import Slice, write_shards


def write_shard(path, values, **options):
    """Writes one shard; returns its entry and its table."""
    ((shard, table),) = write_shards({str(path): values}, durable=False, **options)
    return shard, table


def read_whole(directory, keys):
    """The arrays under `keys`, all of them stored whole."""
    with ShardedReader(str(directory)) as reader:
        requests = []
        for key in keys:
            shape = reader.index.layout_of(key).shape
            requests.append((key, [tuple((0, n) for n in shape)]))
        return {keys[i]: array for i, (array,) in reader.read(requests)}


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.fixture
def small_files(monkeypatch):
    """Files of 4 blocks of 64 KiB."""
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 64 << 10)
    monkeypatch.setattr(stream_module, "FILE_NBYTES", 256 << 10)


# --- what is read is what was written --------------------------------------------------


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
    written = write_shard(path, {**values, "text": b"abc", "none": b""}, compression=compression)
    shard, table = written
    assert int(table.nbytes.sum()) == sum(v.nbytes for v in values.values()) + 3
    for key, array in read_whole(path, list(values)).items():
        assert_same_bits(array, values[key])
    with ShardedReader(path) as reader:
        assert reader.read_bytes("text") == b"abc"
        assert reader.read_bytes("none") == b""
    again, own = read_shard(path)
    assert (again, own.message) == (shard, table.message)


def test_slices_are_stored_in_the_order_of_their_keys(tmp_path):
    values = {f"{name}": np.full(100, i, np.uint8) for i, name in enumerate("cab")}
    _, table = write_shard(tmp_path / "shard", values)
    assert table.keys == ("a", "b", "c")
    assert table.offset.tolist() == [0, 128, 256]


def test_slices_that_have_the_same_box_share_a_layout(tmp_path):
    values = {f"x{i}": np.zeros((3, 4)) for i in range(10)} | {"y": np.zeros((4, 3))}
    shard, table = write_shard(tmp_path / "shard", values)
    assert len(table.layouts) == 2
    assert table.layout.tolist() == [0] * 10 + [1]
    assert shard.starts == (0, 0, 0, 0)


def test_arrays_of_any_memory_layout_and_byte_order_are_stored_alike(tmp_path, small_files):
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
    write_shard(tmp_path / "shard", values)
    for key, array in read_whole(tmp_path / "shard", list(values)).items():
        np.testing.assert_array_equal(array, values[key])
        assert array.dtype.isnative


@st.composite
def odd_arrays(draw):
    """An array of any dtype with random bits, whose elements lie in memory in any order."""
    dtype = draw(st.sampled_from([*_DTYPES.values(), *map(np.dtype, (">i4", ">f8", ">c16"))]))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    raw = chance.integers(0, 256, 2 * int(np.prod(shape)) * dtype.itemsize, np.uint8)
    array = np.frombuffer(raw.tobytes(), dtype).reshape(*shape, 2)[..., 1]
    return draw(st.sampled_from([array, array.T, array[::-1] if shape else array]))


@given(odd_arrays(), st.data())
def test_any_range_of_bytes_of_an_array_is_that_range_of_its_copy(array, data):
    swapped = array.dtype.byteorder == ">"
    stored = (array.astype(array.dtype.newbyteorder("<")) if swapped else array).tobytes()
    start = data.draw(st.integers(0, len(stored) - 1))
    stop = data.draw(st.integers(start + 1, len(stored)))
    contents = shard_module._Contents(array)
    assert contents.bytes(start, stop).tobytes() == stored[start:stop]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("limit", [1, 1000, 1 << 20, 3 << 20])
def test_a_limit_smaller_than_an_array_only_makes_more_files(tmp_path, limit, compression):
    rng = np.random.default_rng(0)
    values = {f"big{i}": rng.random(400_000) for i in range(3)}
    values |= {f"small{i}": rng.random(1000) for i in range(10)}
    shard, _ = write_shard(
        tmp_path / "shard", values, max_inflight_bytes=limit, compression=compression
    )
    assert shard.file_nbytes <= max(limit // 2, shard.block_nbytes)
    assert len(data_files(tmp_path / "shard")) == shard.files
    for key, array in read_whole(tmp_path / "shard", list(values)).items():
        assert_same_bits(array, values[key])


def test_several_slices_of_one_array_may_lie_in_one_shard(tmp_path):
    array = np.arange(24.0).reshape(4, 6)
    parts = [
        Slice(array[2:], ((2, 4), (0, 6)), (4, 6)),
        Slice(array[:2], ((0, 2), (0, 6)), (4, 6)),
    ]
    write_shard(tmp_path / "shard", {"x": parts})
    assert_same_bits(read_whole(tmp_path / "shard", ["x"])["x"], array)


def test_a_shard_of_nothing_is_a_shard(tmp_path):
    shard, _ = write_shard(tmp_path / "shard", {})
    assert (shard.nbytes, shard.files, shard.stored_nbytes) == (0, 0, 0)
    assert read_index(str(tmp_path / "shard")).keys == ()
    assert os.listdir(tmp_path / "shard") == ["index"]


def test_what_is_written_is_counted_without_padding(tmp_path, small_files):
    counts = []
    values = {"a": np.zeros(300_000, np.uint8), "b": b"text", "c": np.zeros((3, 5)).T}
    write_shard(tmp_path / "shard", values, written=counts.append)
    assert sum(counts) == 300_000 + 4 + 120
    assert len(counts) == 2  # of each file


class Arriving:
    """An array whose contents are on their way until somebody waits for them."""

    def __init__(self, array):
        self.array, self.waits = array, 0
        self.dtype, self.shape, self.nbytes = array.dtype, array.shape, array.nbytes

    def wait(self):
        self.waits += 1
        return self.array


def test_contents_that_are_on_their_way_are_waited_for_once(tmp_path, small_files):
    arriving = Arriving(np.arange(300_000.0))
    part = Slice(arriving, ((0, 300_000),), (300_000,))
    shard, _ = write_shard(tmp_path / "shard", {"x": part})
    assert shard.files > 5 and arriving.waits == 1
    assert_same_bits(read_whole(tmp_path / "shard", ["x"])["x"], arriving.array)


# --- threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_streams_are_written_by_as_many_threads_as_there_are_cores(
    tmp_path, small_files, monkeypatch, shards
):
    """All meet in the middle of writing, and no file is written before they have met."""
    count = 3
    monkeypatch.setattr(shard_module, "cores", lambda: count)
    meeting = threading.Barrier(count, timeout=60)
    names, original = [], shard_module._LocalStream.write

    def write(stream, number, **options):
        names.append(threading.current_thread())
        if len(names) <= count:
            meeting.wait()
        original(stream, number, **options)

    monkeypatch.setattr(shard_module._LocalStream, "write", write)
    values = {f"{tmp_path}/{i}": {"x": np.full(250_000, i)} for i in range(shards)}
    written = write_shards(values, durable=False, max_inflight_bytes=1 << 30)
    assert len({*names[:count]}) == len({*names}) == count
    assert {thread.name for thread in names} == {"ckpt-write"}
    assert len(names) == sum(shard.files for shard, _ in written)
    for i, path in enumerate(values):
        assert_same_bits(read_whole(path, ["x"])["x"], values[path]["x"])
        assert read_shard(path)[0] == written[i][0]


def test_the_index_of_a_shard_is_written_after_all_its_files(tmp_path, small_files, monkeypatch):
    seen, original = [], shard_module.write_file

    def write_file(path, data, **options):
        shard = os.path.dirname(path)
        seen.append(len(data_files(shard)))
        original(path, data, **options)

    monkeypatch.setattr(shard_module, "write_file", write_file)
    shard, _ = write_shard(tmp_path / "shard", {"x": np.zeros(1 << 20, np.uint8)})
    assert seen == [shard.files] == [4]


# --- memory ----------------------------------------------------------------------------


# In a process of its own, because threads of TensorStore may not give arrays back while
# tracemalloc is stopped.
PEAKS = """
import sys, tracemalloc
import numpy as np
from ckpt_jax.store.shard import write_shards

directory, limit = sys.argv[1], int(sys.argv[2])
VALUES = {
    "many small": lambda: {f"{i:05d}": np.full(1000, i % 256, np.uint8) for i in range(16_000)},
    "transposed": lambda: {"x": np.arange(1 << 22, dtype=np.int32).reshape(2048, -1).T},
    "several": lambda: {f"{i}": np.full((512, 1024), i, np.float64).T for i in range(4)},
    "swapped": lambda: {"x": np.arange(1 << 21, dtype=">f8")},
    "one row": lambda: {"x": np.arange(1 << 22, dtype=np.int32).reshape(1, 2048, -1).T},
    "contiguous": lambda: {f"{i}": np.full((1 << 20,), i, np.float64) for i in range(4)},
}
write_shards({f"{directory}/first": {"x": np.ones(3)}}, durable=False)
tracemalloc.start()
for name, make in VALUES.items():
    values = make()
    assert sum(array.nbytes for array in values.values()) >= 16_000_000
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    ((shard, _),) = write_shards(
        {f"{directory}/{name}": values}, durable=False, max_inflight_bytes=limit
    )
    assert shard.files > 4
    print(name, len(values), tracemalloc.get_traced_memory()[1] - before, sep=",", flush=True)
"""


def test_copies_take_no_more_memory_than_the_limit(tmp_path):
    limit = 4 << 20
    program = [sys.executable, "-c", PEAKS, str(tmp_path), str(limit)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(",") for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for name, slices, peak in lines:
        objects = 600 * int(slices) + (1 << 20)  # of Python, for each slice and in all
        assert int(peak) < limit + objects, name
        assert name != "contiguous" or int(peak) < 3 << 20  # chunks that two arrays share


def test_room_is_given_to_as_many_as_fit_and_to_a_large_one_alone():
    room = Room(10)
    inside, most, lock = [0], [0], threading.Lock()
    started = threading.Barrier(8, timeout=60)

    def work(nbytes):
        started.wait()
        for _ in range(200):
            with room.taken(nbytes):
                with lock:
                    inside[0] += nbytes
                    most[0] = max(most[0], inside[0] if inside[0] != 25 else 0)
                    assert inside[0] <= 10 or inside[0] == 25
                with lock:
                    inside[0] -= nbytes

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4, 5, 6, 25, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [0] and most[0] <= 10


# --- failures --------------------------------------------------------------------------


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="has files"):
        write_shard(tmp_path, {"x": np.ones(3)})
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
        write_shards({f"{tmp_path}/a": {"x": np.ones(3)}, f"{tmp_path}/b": {"x": value}})
    assert not os.listdir(tmp_path)


def test_an_unknown_compression_is_refused(tmp_path):
    with pytest.raises(ValueError, match="zstd"):
        write_shard(tmp_path / "shard", {}, compression="rar")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_error_of_the_file_system_is_an_os_error_that_names_the_directory(
    tmp_path, monkeypatch, compression
):
    original = shard_module._LocalStream.write

    def write(stream, number, **options):
        with open(os.path.join(stream.directory, "c"), "xb"):  # where the directory would be
            pass
        original(stream, number, **options)

    monkeypatch.setattr(shard_module._LocalStream, "write", write)
    with pytest.raises(OSError, match="shard") as caught:
        write_shard(tmp_path / "shard", {"x": np.ones(100_000)}, compression=compression)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_if_one_file_fails_its_error_is_raised_and_the_others_are_given_up(
    tmp_path, small_files, monkeypatch
):
    """The other writers wait in the middle of their files until one has failed."""
    monkeypatch.setattr(shard_module, "cores", lambda: 3)
    meeting = threading.Barrier(3, timeout=60)
    writes, original = [], shard_module._LocalStream.write

    def write(stream, number, **options):
        writes.append(number)
        meeting.wait()
        if number == 1:
            raise OSError(errno.ENOSPC, "No space left on device", stream.directory)
        original(stream, number, **options)

    monkeypatch.setattr(shard_module._LocalStream, "write", write)
    path = tmp_path / "shard"
    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(path, {"x": np.zeros(100 << 18, np.uint8)}, max_inflight_bytes=1 << 30)
    assert caught.value.errno == errno.ENOSPC
    assert len(writes) < 10  # of a hundred
    with pytest.raises(CorruptCheckpointError, match="interrupted"):
        read_shard(str(path))


def test_an_error_of_the_callback_ends_the_write(tmp_path, small_files):
    def written(nbytes):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        write_shard(tmp_path / "shard", {"x": np.zeros(4 << 20, np.uint8)}, written=written)
    assert not os.path.exists(tmp_path / "shard" / "index")


def test_a_write_that_was_interrupted_is_no_shard(tmp_path, small_files, monkeypatch):
    path = str(tmp_path / "shard")

    def as_completed(futures, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_module, "as_completed", as_completed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, {"x": np.ones(100_000), "y": np.ones(100_000)})
    for read in (read_index, read_shard):
        with pytest.raises((CorruptCheckpointError, FileNotFoundError)):
            read(path)


@pytest.mark.parametrize("name", sorted(_DTYPES))
def test_a_value_of_every_dtype_comes_back(tmp_path, name):
    dtype = _DTYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, 6 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(2, 3)
    write_shard(tmp_path / "a", {"x": array})
    assert dtype_name(dtype) == name
    assert_same_bits(read_whole(tmp_path / "a", ["x"])["x"], array)
