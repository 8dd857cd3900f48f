import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from ckpt_jax.store.stack import DATA, files_nbytes, new_context, open_database
from descriptors import open_files
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.boxes import slices
from ckpt_jax.graph.dtypes import _DTYPES
from ckpt_jax.store import gather as gather_module
from ckpt_jax.store import shard as shard_module
from ckpt_jax.store.fetch import ShardedReader, read_index
from ckpt_jax.store.index import INDEX_KEY, Index, StackShape
from ckpt_jax.store.merge import merge_shards
from ckpt_jax.store.shard import Slice, write_shard

DTYPES = [*sorted(_DTYPES), "datetime64[ns]", "timedelta64[D]"]


@st.composite
def boxes(draw, shape):
    """A box inside `shape`."""
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in ends)


@st.composite
def tilings(draw, box, depth=3):
    """Boxes that make up `box`."""
    axes = [i for i, (a, b) in enumerate(box) if b - a > 1]
    if not depth or not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    a, b = box[axis]
    cut = draw(st.integers(a + 1, b - 1))
    parts = [(*box[:axis], half, *box[axis + 1 :]) for half in ((a, cut), (cut, b))]
    return [tile for part in parts for tile in draw(tilings(part, depth - 1))]


@st.composite
def stored_arrays(draw):
    """An array of any dtype with random bits, the boxes it is cut into, and boxes wanted."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    dtype = _dtype(draw)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    array = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(shape)
    whole = tuple((0, n) for n in shape)
    tiles = draw(tilings(whole)) if array.size else [whole]
    wanted = draw(st.lists(st.one_of(st.sampled_from([whole, *tiles]), boxes(shape)), max_size=4))
    return array, tiles, wanted


def _dtype(draw):
    name = draw(st.sampled_from(DTYPES))
    return _DTYPES.get(name) or np.dtype(name)


def check_result(array, wanted, source):
    assert array.dtype == source.dtype
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.__array_interface__["data"][0] % 64 == 0
    expected = source[slices(wanted)]
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


def write_checkpoint(root, stored, n_shards, compression=None):
    """Deals the slices of `stored`, key -> (array, boxes), to shards and merges them."""
    parts = [{} for _ in range(n_shards)]
    turn = 0
    for key, (array, tiles) in stored.items():
        for tile in tiles:
            part = Slice(array[slices(tile)].reshape([b - a for a, b in tile]), tile, array.shape)
            parts[turn % n_shards].setdefault(key, []).append(part)
            turn += 1
    paths = [os.path.join(root, "shards", str(i)) for i in range(n_shards)]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part, compression=compression, durable=False)
    return merge_shards(paths, root, durable=False)


@settings(max_examples=60)
@given(
    st.lists(stored_arrays(), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([None, "zstd"]),
    st.sampled_from([1, 100_000, 1 << 26]),
    st.sampled_from([64, 16 << 20]),
    st.sampled_from([64, 256 << 10]),
)
def test_what_is_read_is_what_was_written(
    arrays, n_shards, compression, inflight, run_nbytes, big_nbytes
):
    stored = {f"key {i}": (array, tiles) for i, (array, tiles, _) in enumerate(arrays)}
    requests = [(f"key {i}", wanted) for i, (_, _, wanted) in enumerate(arrays)]
    requests += requests[:1]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_module, "RUN_NBYTES", run_nbytes)
        patch.setattr(shard_module, "BIG_NBYTES", big_nbytes)
        write_checkpoint(root, stored, n_shards, compression)
        with ShardedReader(root) as reader:
            results = list(reader.read(requests, max_inflight_bytes=inflight))
    assert sorted(i for i, _ in results) == list(range(len(requests)))
    for i, found in results:
        key, wanted = requests[i]
        for array, box in zip(found, wanted, strict=True):
            check_result(array, box, stored[key][0])
    everything = [array for _, found in results for array in found if array.size]
    for i, array in enumerate(everything):
        assert not any(np.shares_memory(array, other) for other in everything[:i])


MATRIX = np.arange(64 * 40, dtype=np.float32).reshape(64, 40)
ROWS = [((i, i + 16), (0, 40)) for i in range(0, 64, 16)]


@pytest.fixture
def small(tmp_path):
    """A checkpoint of a few small arrays, and what is in it."""
    rng = np.random.default_rng(0)
    stored = {"matrix": (MATRIX, ROWS)}
    for i in range(6):
        array = rng.random((8, 8))
        stored[f"layer{i}"] = (array, [((0, 4), (0, 8)), ((4, 8), (0, 8))])
    big = rng.random(40_000)
    stored["big"] = (big, [((0, 40_000),)])
    root = str(tmp_path / "root")
    write_checkpoint(root, stored, 2)
    return root, {key: array for key, (array, _) in stored.items()}


def whole_requests(arrays):
    return [(key, [tuple((0, n) for n in array.shape)]) for key, array in arrays.items()]


def test_a_reader_opens_a_single_shard(small):
    root, _ = small
    with ShardedReader(os.path.join(root, "shards", "0")) as reader:
        ((_, (array,)),) = reader.read([("matrix", ROWS[:1])])
        check_result(array, ROWS[0], MATRIX)
        with pytest.raises(ValueError, match="matrix: only 640 of 1280 elements"):
            reader.read([("matrix", [((0, 32), (0, 40))])])


def test_a_wanted_box_that_was_stored_is_not_copied(small):
    root, _ = small
    with ShardedReader(root) as reader:
        ((_, found),) = reader.read([("matrix", [ROWS[1], ((32, 40), (0, 40))])])
        blocks = {id(array.base) for array in found}
    assert len(blocks) == 2  # one run in each of two shards
    assert all(array.base is not None for array in found)


def test_unknown_keys_and_boxes_outside_are_refused_at_once(small):
    root, _ = small
    with ShardedReader(root) as reader:
        with pytest.raises(KeyError, match="nothing"):
            reader.read([("nothing", [])])
        with pytest.raises(ValueError, match=r"matrix: box .* inside"):
            reader.read([("matrix", [((0, 65), (0, 40))])])
        with pytest.raises(ValueError, match=r"matrix: box .* inside"):
            reader.read([("matrix", [()])])


def test_byte_strings_are_read_like_arrays(tmp_path):
    values = {f"step{i}": str(i).encode() * i for i in range(50)} | {"x": np.ones(3)}
    write_shard(str(tmp_path / "shard"), values)
    with ShardedReader(str(tmp_path / "shard")) as reader:
        keys = list(values)[:-1]
        found = {keys[i]: a.tobytes() for i, (a,) in reader.read([(k, [()]) for k in keys])}
        assert found == {key: values[key] for key in keys}
        assert reader.read_bytes("step7") == b"7777777"
        with pytest.raises(ValueError, match="only box"):
            reader.read([("step7", [((0, 1),)])])


def test_a_small_box_of_a_big_array_costs_little_more_than_itself(tmp_path):
    big = np.arange(8 << 20, dtype=np.float32).reshape(1024, -1)  # 32 MiB, one slice
    write_shard(str(tmp_path / "shard"), {"big": big, "small": np.ones(4)})
    with ShardedReader(str(tmp_path / "shard")) as reader:
        box = ((500, 502), (0, big.shape[1]))
        ((_, (array,)),) = reader.read([("big", [box])])
        check_result(array, box, big)
        assert reader.bytes_read <= 2 << 20
        before = reader.bytes_read
        next(reader.read([("small", [((0, 4),)])]))
        assert reader.bytes_read - before == 32


def test_stored_bytes_are_read_once_however_many_boxes_need_them(tmp_path):
    big = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    write_shard(str(tmp_path / "shard"), {"big": big})
    wanted = [((0, 1024), (a, a + 128)) for a in range(0, 1024, 128)] + [((0, 1024), (0, 1024))]
    with ShardedReader(str(tmp_path / "shard")) as reader:
        ((_, found),) = reader.read([("big", wanted)])
        assert reader.bytes_read == big.nbytes
    for array, box in zip(found, wanted, strict=True):
        check_result(array, box, big)


def test_requests_are_yielded_while_others_are_still_to_be_read(tmp_path):
    values = {f"x{i}": np.full(1 << 20, i, np.uint8) for i in range(64)}
    write_shard(str(tmp_path / "shard"), values)
    with ShardedReader(str(tmp_path / "shard")) as reader:
        results = reader.read(whole_requests(values), max_inflight_bytes=16 << 20)
        next(results)
        assert reader.bytes_read <= 33 << 20
        assert len(list(results)) == 63


def test_results_arrive_in_the_order_of_requests_where_that_costs_nothing(tmp_path):
    values = {f"x{i:02}": np.full(1 << 20, i, np.uint8) for i in range(64)}
    write_shard(str(tmp_path / "shard"), values)
    requests = whole_requests(values)[::-1]
    with ShardedReader(str(tmp_path / "shard")) as reader:
        order = [i for i, _ in reader.read(requests)]
    assert order[0] < 16 and order[-1] >= 48


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"),
    reason="This system has no /proc, which lists the open files of a process.",
)
def test_no_file_stays_open_after_close(small):
    root, arrays = small
    with ShardedReader(root) as reader:
        list(reader.read(whole_requests(arrays)))
        unfinished = reader.read(whole_requests(arrays))
        next(unfinished)
        unfinished.close()
    assert open_files(root) == []
    with pytest.raises(RuntimeError, match="closed"):
        reader.read([])


def test_results_outlive_the_checkpoint(small):
    root, arrays = small
    with ShardedReader(root) as reader:
        found = dict(reader.read(whole_requests(arrays)))
    shutil.rmtree(root)
    for i, key in enumerate(arrays):
        np.testing.assert_array_equal(found[i][0], arrays[key])


def test_nothing_at_a_path_is_not_found(tmp_path, small):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointNotFoundError, match=r"manifest\.ocdbt"):
            ShardedReader(str(path))


def outcomes(root, arrays):
    """Reads each array on its own: keys that came back right, and the errors of the others."""
    try:
        reader = ShardedReader(root)
    except (CorruptCheckpointError, CheckpointNotFoundError) as error:
        return set(), [error]
    right, errors = set(), []
    with reader:
        for key, wanted in whole_requests(arrays):
            try:
                ((_, (array,)),) = reader.read([(key, wanted)])
            except CorruptCheckpointError as error:
                assert error.key == key and key in str(error)
                assert error.file is not None and error.file.startswith(root)
                assert error.file in str(error)
                errors.append(error)
            else:
                np.testing.assert_array_equal(array, arrays[key])
                right.add(key)
    return right, errors


def data_files(root):
    paths = [p for p in Path(root).rglob("*") if p.is_file()]
    return sorted(paths)


def test_a_flipped_byte_anywhere_is_an_error_or_does_no_harm(small):
    root, arrays = small
    caught = 0
    for path in data_files(root):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 40)):
            damaged = bytearray(data)
            damaged[at] ^= 0x20
            path.write_bytes(damaged)
            caught += bool(outcomes(root, arrays)[1])
        path.write_bytes(data)
    assert caught
    assert outcomes(root, arrays) == (set(arrays), [])


def test_a_flipped_bit_anywhere_in_a_value_is_an_error(tmp_path):
    """Up to its checksum, and without harm in the parts of a frame that are not the value's."""
    path = str(tmp_path / "shard")
    value = np.random.default_rng(5).integers(0, 256, 150, np.uint8)
    write_shard(path, {"x": value}, durable=False)
    (file,) = Path(path, "d").iterdir()
    data = file.read_bytes()
    start = data.index(value[:16].tobytes())
    frame = data.rindex(b"\x28\xb5\x2f\xfd", 0, start)
    stop = start + value.nbytes + 4
    harmless = []
    for bit in range(8 * frame, 8 * stop):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            with ShardedReader(path) as reader:
                ((_, (found,)),) = reader.read([("x", [((0, 150),)])])
        except CorruptCheckpointError:
            continue
        np.testing.assert_array_equal(found, value)
        harmless.append(bit // 8)
    assert all(frame <= at < start for at in harmless)


def test_truncated_and_missing_files_are_errors(small):
    root, arrays = small
    for path in data_files(root):
        data = path.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:length])
            outcomes(root, arrays)
        path.unlink()
        outcomes(root, arrays)
        path.write_bytes(data)
    for path in Path(root, "shards").glob("*/d/*"):
        data = path.read_bytes()
        path.unlink()
        assert outcomes(root, arrays)[1]
        path.write_bytes(data)


def test_of_a_checkpoint_a_missing_byte_is_noticed_before_anything_is_read(small):
    root, _ = small
    with ShardedReader(root) as reader:
        reader.check_files()
    for path in Path(root, "shards").glob("*/d/*"):
        os.truncate(path, path.stat().st_size - 1)
        refused = pytest.raises(CorruptCheckpointError, match="truncated or missing")
        with ShardedReader(root) as reader, refused:
            reader.check_files()


def test_a_shard_of_another_checkpoint_is_an_error(small, tmp_path):
    root, arrays = small
    other = str(tmp_path / "other")
    stored = {
        key: (array + 1, [tuple((0, n) for n in array.shape)]) for key, array in arrays.items()
    }
    write_checkpoint(other, stored, 2)
    for name in ("0", "1"):
        shutil.rmtree(os.path.join(root, "shards", name))
        shutil.copytree(os.path.join(other, "shards", name), os.path.join(root, "shards", name))
    right, errors = outcomes(root, arrays)
    assert not right and len(errors) == len(arrays)


def test_damage_is_blamed_on_the_arrays_in_the_damaged_chunk(tmp_path):
    chance = np.random.default_rng(0)
    values = {f"x{i}": chance.integers(0, 256, 1 << 20, np.uint8) for i in range(8)}
    path = tmp_path / "shard"
    write_shard(str(path), values)
    (file,) = (path / "d").iterdir()
    data = file.read_bytes()
    at = data.index(values["x5"][:1000].tobytes())
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with ShardedReader(str(path)) as reader, pytest.raises(CorruptCheckpointError) as caught:
        list(reader.read(whole_requests(values)))
    assert caught.value.key == "x5"
    assert caught.value.file == str(path)


def rewrite_index(directory, change):
    index = change(read_index(directory))
    context = new_context()
    open_database(directory, context).write(INDEX_KEY, index.to_bytes()).result()


def test_an_index_that_declares_more_than_the_files_hold_allocates_nothing(tmp_path):
    path = str(tmp_path / "shard")
    write_shard(path, {"x": np.ones(100_000)})

    def inflate(index):
        stack = StackShape(1, 1 << 50, 1 << 20)
        shard = dataclasses.replace(index.shards[0], stacks=(stack,))
        layout = dataclasses.replace(
            index.layouts[0], shape=(1 << 47,), box=((0, 1 << 47),), nbytes=1 << 50
        )
        columns = (index.key, index.layout, index.shard, index.stack, index.row, index.offset)
        return Index((shard,), (layout,), index.keys, *columns)

    rewrite_index(path, inflate)
    refused = pytest.raises(CorruptCheckpointError, match="truncated or missing")
    with ShardedReader(path) as reader, refused:
        next(reader.read([("x", [((0, 1 << 47),)])]))


def test_a_file_that_goes_in_this_moment_counts_as_missing(tmp_path):
    assert files_nbytes(str(tmp_path)) == 0
    (tmp_path / DATA).mkdir()
    (tmp_path / DATA / "gone").symlink_to("nowhere")  # is listed, but cannot be looked at
    assert files_nbytes(str(tmp_path)) == 0
