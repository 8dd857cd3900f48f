"""Reading: every box of every array, however it is cut and stored; all damage is found."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from boxes import boxes, tilings
from descriptors import open_files
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import (
    data_files,
    index,
    part,
    replace_index,
    replace_index_of_shard,
    replace_shard_index,
    shard_index,
)

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.boxes import intersect, relative, shape_of, size_of, slices
from ckpt_jax.graph.dtypes import _DTYPES, dtype_of
from ckpt_jax.store import fetch as fetch_module
from ckpt_jax.store import gather as gather_module
from ckpt_jax.store import stream as stream_module
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.manifest import INDEX_KEY
from ckpt_jax.store.merge import merge_shards
from ckpt_jax.store.seal import seal
from ckpt_jax.store.shard import Slice, write_shards
from ckpt_jax.store.stream import BLOCK_NBYTES

DTYPES = [*sorted(_DTYPES), "datetime64[ns]", "timedelta64[D]"]


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


def write_shard(path, values, **options):
    write_shards({str(path): values}, durable=False, **options)
    return str(path)


def write_checkpoint(root, stored, n_shards, compression=None):
    """Deals the slices of `stored`, key -> (array, boxes), to shards and merges them."""
    parts = [{} for _ in range(n_shards)]
    turn = 0
    for key, (array, tiles) in stored.items():
        for tile in tiles:
            contents = np.asarray(array[slices(tile)])
            where = parts[turn % n_shards].setdefault(key, [])
            where.append(Slice(contents, tile, array.shape))
            turn += 1
    shards = {os.path.join(root, "shards", str(i)): part for i, part in enumerate(parts)}
    write_shards(shards, compression=compression, durable=False)
    return merge_shards(list(shards), root, durable=False)


# Of blocks and files; small ones cut every slice.
SIZES = [(64, 64), (64, 128), (200, 1000), (256 << 10, 64 << 20)]


@settings(max_examples=60)
@given(
    st.lists(stored_arrays(), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([None, "zstd"]),
    st.sampled_from([1, 100_000, 1 << 26]),
    st.sampled_from([64, 16 << 20]),
    st.sampled_from(SIZES),
)
def test_what_is_read_is_what_was_written(
    arrays, n_shards, compression, inflight, run_nbytes, sizes
):
    stored = {f"key {i}": (array, tiles) for i, (array, tiles, _) in enumerate(arrays)}
    requests = [(f"key {i}", wanted) for i, (_, _, wanted) in enumerate(arrays)]
    requests += requests[:1]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_module, "RUN_NBYTES", run_nbytes)
        patch.setattr(stream_module, "BLOCK_NBYTES", sizes[0])
        patch.setattr(stream_module, "FILE_NBYTES", sizes[1])
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


def test_a_wanted_box_that_fills_its_chunks_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 640)
    root = write_checkpoint(str(tmp_path / "root"), {"matrix": (MATRIX, ROWS)}, 2)
    monkeypatch.setattr(fetch_module, "_empty", None)  # makes the arrays that are copied to
    wanted = [ROWS[1], ((32, 40), (0, 40))]
    with ShardedReader(root) as reader:
        ((_, found),) = reader.read([("matrix", wanted)])
        with pytest.raises(TypeError):
            list(reader.read([("matrix", [((30, 40), (0, 40))])]))  # of two slices
        with pytest.raises(TypeError):
            list(reader.read([("matrix", [((0, 1), (0, 40))])]))  # would keep a whole chunk
    for array, box in zip(found, wanted, strict=True):
        check_result(array, box, MATRIX)


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
    write_shard(tmp_path / "shard", values)
    with ShardedReader(str(tmp_path / "shard")) as reader:
        keys = list(values)[:-1]
        found = {keys[i]: a.tobytes() for i, (a,) in reader.read([(k, [()]) for k in keys])}
        assert found == {key: values[key] for key in keys}
        assert reader.read_bytes("step7") == b"7777777"
        with pytest.raises(ValueError, match="only box"):
            reader.read([("step7", [((0, 1),)])])


def nbytes_of_blocks(reader, key, wanted):
    """The size of the blocks that a box touches, from its first byte to its last in each slice."""
    found = reader.index
    tiling = found.tiling(found.tiling_number(key))
    total = 0
    for i, stored in enumerate(tiling.boxes()):
        common = intersect(stored, wanted)
        if common is None:
            continue
        shard, table = found.shards[tiling.shard[i]], found.tables[found.table[tiling.shard[i]]]
        row = table.first[table.keys.index(key)] + tiling.row[i]
        elements = np.arange(size_of(stored)).reshape(shape_of(stored))
        inner = elements[slices(relative(common, stored))].ravel()
        itemsize = dtype_of(tiling.first.dtype).itemsize
        start = int(table.offset[row]) + int(inner[0]) * itemsize
        stop = int(table.offset[row]) + int(inner[-1] + 1) * itemsize
        block = shard.block_nbytes
        total += min(-(-stop // block) * block, shard.nbytes) - start // block * block
    return total


@settings(max_examples=40)
@given(stored_arrays(), st.sampled_from(SIZES))
def test_of_a_box_only_the_blocks_are_read_that_it_touches(stored, sizes):
    array, tiles, wanted = stored
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "BLOCK_NBYTES", sizes[0])
        patch.setattr(stream_module, "FILE_NBYTES", sizes[1])
        # In shards of their own, so that no two slices share a block.
        write_checkpoint(root, {"x": (array, tiles)}, len(tiles))
        for box in wanted:
            with ShardedReader(root) as reader:
                list(reader.read([("x", [box])]))
                assert reader.bytes_read == nbytes_of_blocks(reader, "x", box)


def test_a_small_box_of_a_big_array_costs_the_blocks_that_it_touches(tmp_path):
    big = np.arange(8 << 20, dtype=np.float32).reshape(1024, -1)  # 32 MiB, one slice
    write_shard(tmp_path / "shard", {"big": big, "small": np.ones(4)})
    with ShardedReader(str(tmp_path / "shard")) as reader:
        for key, box in [("big", ((500, 502), (0, big.shape[1]))), ("small", ((0, 4),))]:
            before = reader.bytes_read
            ((_, (array,)),) = reader.read([(key, [box])])
            check_result(array, box, big if key == "big" else np.ones(4))
            assert reader.bytes_read - before == nbytes_of_blocks(reader, key, box)
            assert reader.bytes_read - before < 2 * BLOCK_NBYTES


def test_stored_bytes_are_read_once_however_many_boxes_need_them(tmp_path):
    big = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    write_shard(tmp_path / "shard", {"big": big})
    wanted = [((0, 1024), (a, a + 128)) for a in range(0, 1024, 128)] + [((0, 1024), (0, 1024))]
    with ShardedReader(str(tmp_path / "shard")) as reader:
        ((_, found),) = reader.read([("big", wanted)])
        assert reader.bytes_read == big.nbytes
    for array, box in zip(found, wanted, strict=True):
        check_result(array, box, big)


def test_requests_are_yielded_while_others_are_still_to_be_read(tmp_path):
    values = {f"x{i}": np.full(1 << 20, i, np.uint8) for i in range(64)}
    write_shard(tmp_path / "shard", values)
    with ShardedReader(str(tmp_path / "shard")) as reader:
        results = reader.read(whole_requests(values), max_inflight_bytes=16 << 20)
        next(results)
        assert reader.bytes_read <= 33 << 20
        assert len(list(results)) == 63


def test_results_arrive_in_the_order_of_requests_where_that_costs_nothing(tmp_path):
    values = {f"x{i:02}": np.full(1 << 20, i, np.uint8) for i in range(64)}
    write_shard(tmp_path / "shard", values)
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
        with pytest.raises(CheckpointNotFoundError, match=r"manifest\.ckpt"):
            ShardedReader(str(path))


# --- damage ----------------------------------------------------------------------------


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


def files_below(root):
    return sorted(path for path in Path(root).rglob("*") if path.is_file())


def test_a_flipped_byte_anywhere_is_an_error(small):
    root, arrays = small
    for path in files_below(root):
        data = path.read_bytes()
        for at in {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
            damaged = bytearray(data)
            damaged[at] ^= 0x20
            path.write_bytes(damaged)
            assert outcomes(root, arrays)[1], (path, at)
        path.write_bytes(data)
    assert outcomes(root, arrays) == (set(arrays), [])


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[3]])
def test_a_flipped_bit_anywhere_in_a_data_file_is_an_error(tmp_path, monkeypatch, sizes):
    """In values, between them, and in the end that only other readers need."""
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", sizes[0])
    monkeypatch.setattr(stream_module, "FILE_NBYTES", sizes[1])
    value = np.random.default_rng(5).integers(0, 256, 70, np.uint8)
    path = write_shard(tmp_path / "shard", {"x": value, "y": value[:3]})
    with ShardedReader(path) as reader:
        for file in data_files(path):
            data = file.read_bytes()
            for bit in range(0, 8 * len(data), 3):
                damaged = bytearray(data)
                damaged[bit // 8] ^= 1 << bit % 8
                file.write_bytes(damaged)
                with pytest.raises(CorruptCheckpointError) as caught:
                    list(reader.read([("x", [((0, 70),)]), ("y", [((0, 3),)])]))
                assert caught.value.file == str(file)
            file.write_bytes(data)


def test_a_flipped_bit_of_a_compressed_file_is_an_error_or_does_no_harm(tmp_path):
    """A frame of zstd has bits that mean nothing."""
    value = np.repeat(np.random.default_rng(5).integers(0, 256, 50, np.uint8), 6)
    path = write_shard(tmp_path / "shard", {"x": value}, compression="zstd")
    (file,) = data_files(path)
    data = file.read_bytes()
    assert len(data) < 250
    harmless = 0
    with ShardedReader(path) as reader:
        for bit in range(0, 8 * len(data), 3):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                ((_, (found,)),) = reader.read([("x", [((0, 300),)])])
            except CorruptCheckpointError:
                continue
            np.testing.assert_array_equal(found, value)
            harmless += 1
    assert harmless < 8


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_truncated_and_missing_files_are_errors(tmp_path, small, compression):
    _, arrays = small
    root = str(tmp_path / "packed")
    stored = {key: (array, [tuple((0, n) for n in array.shape)]) for key, array in arrays.items()}
    write_checkpoint(root, stored, 2, compression)
    for path in files_below(root):
        data = path.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:length])
            assert outcomes(root, arrays)[1]
        path.unlink()
        assert outcomes(root, arrays)[1]
        path.write_bytes(data)
    assert outcomes(root, arrays) == (set(arrays), [])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_missing_file_is_never_read_as_zeros(tmp_path, monkeypatch, compression):
    """zarr says that a block which is not there holds zeros. Here it is damage, even of zeros."""
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 64)
    monkeypatch.setattr(stream_module, "FILE_NBYTES", 128)
    path = write_shard(tmp_path / "shard", {"x": np.zeros(1000)}, compression=compression)
    files = data_files(path)
    assert len(files) > 30
    for change in (Path.unlink, lambda file: file.write_bytes(b"")):
        for file in (files[0], files[20], files[-1]):
            data = file.read_bytes()
            with ShardedReader(path) as reader:  # before and after it was opened
                change(file)
                with pytest.raises(CorruptCheckpointError):
                    list(reader.read([("x", [((0, 1000),)])]))
            file.write_bytes(data)
            with ShardedReader(path) as reader:
                list(reader.read([("x", [((0, 1000),)])]))
                change(file)
                with pytest.raises(CorruptCheckpointError):
                    list(reader.read([("x", [((0, 1000),)])]))
            file.write_bytes(data)


def test_of_a_checkpoint_a_missing_byte_is_noticed_before_anything_is_read(small):
    root, _ = small
    with ShardedReader(root) as reader:
        reader.check_files()
    for path in data_files(root):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        refused = pytest.raises(CorruptCheckpointError, match=rf"{path}: .*truncated")
        with ShardedReader(root) as reader, refused:
            reader.check_files()
        path.unlink()
        refused = pytest.raises(CorruptCheckpointError, match=rf"{path}: the file is missing")
        with ShardedReader(root) as reader, refused:
            reader.check_files()
        path.write_bytes(data)


def test_the_index_of_a_shard_that_is_gone_is_noticed_as_a_missing_file(small):
    root, _ = small
    indexes = sorted(Path(root).glob("shards/*/index"))
    assert indexes
    for path in indexes:
        data = path.read_bytes()
        path.unlink()
        refused = pytest.raises(CorruptCheckpointError, match=rf"{path}: the file is missing")
        with ShardedReader(root) as reader, refused:
            reader.check_files()
        path.write_bytes(data)


def test_damage_is_blamed_on_the_arrays_in_the_damaged_block(tmp_path):
    chance = np.random.default_rng(0)
    values = {f"x{i}": chance.integers(0, 256, 1 << 20, np.uint8) for i in range(8)}
    path = write_shard(tmp_path / "shard", values)
    (file,) = data_files(path)
    data = file.read_bytes()
    at = data.index(values["x5"][:1000].tobytes())
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with ShardedReader(path) as reader, pytest.raises(CorruptCheckpointError) as caught:
        list(reader.read(whole_requests(values)))
    assert caught.value.key == "x5"
    assert caught.value.file == str(file)
    assert "x4" not in str(caught.value)


# --- bytes that belong elsewhere -------------------------------------------------------


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Two checkpoints that differ in their values alone."""
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 256)
    monkeypatch.setattr(stream_module, "FILE_NBYTES", 1024)
    chance = np.random.default_rng(7)
    arrays = {f"x{i}": chance.integers(0, 256, (8, 100), np.uint8) for i in range(3)}
    halves = [((0, 4), (0, 100)), ((4, 8), (0, 100))]
    roots = [str(tmp_path / name) for name in ("one", "other")]
    for i, root in enumerate(roots):
        stored = {key: (array ^ i, halves) for key, array in arrays.items()}
        write_checkpoint(root, stored, 2)
    one, other = ([file.relative_to(root) for file in files_below(root)] for root in roots)
    assert one == other
    return *roots, arrays


def swapped(root, other, name):
    shutil.copyfile(os.path.join(other, name), os.path.join(root, name))


def test_every_file_that_is_swapped_with_that_of_a_twin_is_an_error(twins):
    root, other, arrays = twins
    names = [str(file.relative_to(root)) for file in files_below(root)]
    kinds = {"manifest.ckpt", "index", "0"}
    for name in names:
        if Path(root, name).read_bytes() == Path(other, name).read_bytes():
            continue
        kinds.discard(Path(name).name)
        with tempfile.TemporaryDirectory() as place:
            copy = shutil.copytree(root, os.path.join(place, "copy"))
            swapped(copy, other, name)
            assert outcomes(copy, arrays)[1], name
    assert not kinds  # there was one of each


def test_a_file_that_is_swapped_with_another_of_the_same_shard_is_an_error(twins):
    root, _, arrays = twins
    one, other = data_files(root)[:2]
    assert one.parent == other.parent
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    assert outcomes(root, arrays)[1]
    one.write_bytes(data)
    assert not outcomes(root, arrays)[1]


def test_a_block_of_a_twin_is_an_error(twins):
    root, other, arrays = twins
    (shard, *_), block = index(root).shards, 64
    block = shard.block_nbytes
    for file in data_files(root):
        data = file.read_bytes()
        theirs = Path(other, file.relative_to(root)).read_bytes()
        for start in range(0, min(shard.file_nbytes, len(data) - block), block):
            file.write_bytes(data[:start] + theirs[start : start + block] + data[start + block :])
            assert outcomes(root, arrays)[1]
        file.write_bytes(data)


def test_blocks_that_change_places_are_an_error(twins):
    root, _, arrays = twins
    (shard, *_) = index(root).shards
    block = shard.block_nbytes
    file = data_files(root)[0]
    data = file.read_bytes()
    file.write_bytes(data[block : 2 * block] + data[:block] + data[2 * block :])
    assert outcomes(root, arrays)[1]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_of_a_twin_is_an_error(twins, with_index):
    root, other, arrays = twins
    for name in ("0", "1"):
        own = os.path.join(root, "shards", name, "index")
        with open(own, "rb") as file:
            data = file.read()
        shutil.rmtree(os.path.join(root, "shards", name))
        shutil.copytree(os.path.join(other, "shards", name), os.path.join(root, "shards", name))
        if not with_index:
            with open(own, "wb") as file:
                file.write(data)
    right, errors = outcomes(root, arrays)
    assert not right and len(errors) == len(arrays)
    what = "not the bytes of this checkpoint" if with_index else "the checksum of block"
    assert all(what in str(error) for error in errors)


def test_shards_that_change_places_are_an_error(twins):
    root, _, arrays = twins
    shards = os.path.join(root, "shards")
    os.rename(f"{shards}/0", f"{shards}/2")
    os.rename(f"{shards}/1", f"{shards}/0")
    os.rename(f"{shards}/2", f"{shards}/1")
    right, errors = outcomes(root, arrays)
    assert not right and len(errors) == len(arrays)


# --- what comes from outside -----------------------------------------------------------


def test_an_index_that_declares_more_than_the_files_hold_allocates_nothing(tmp_path):
    path = write_shard(tmp_path / "shard", {"x": np.ones(100_000)})
    message = shard_index(path)
    (table,), (shard,) = message.tables, message.shards
    table.layouts[0].shape[0] = table.layouts[0].extent[0] = 1 << 36
    table.layouts[0].nbytes = shard.nbytes = 1 << 39
    shard.chunk_nbytes = shard.block_nbytes = shard.file_nbytes = 1 << 26
    shard.checksums = bytes(4 << 13)
    replace_shard_index(path, message)
    with ShardedReader(path) as reader, pytest.raises(CorruptCheckpointError, match="truncated"):
        next(reader.read([("x", [((0, 1 << 36),)])]))


def test_slices_of_which_there_are_too_many_for_the_files_are_not_listed(small):
    """Each of a thousand keys in each of a thousand shards, whose files are not there."""
    root, _ = small
    message = index(root)
    del message.tables[:], message.shards[:]
    count = 1000
    table = message.tables.add(keys=[f"{i:04d}" for i in range(count)])
    table.layouts.add(dtype="int8", shape=[count], extent=[1], nbytes=1)
    table.key = np.arange(count, dtype="<u4").tobytes()
    table.layout = bytes(4 * count)
    table.offset = np.arange(0, 64 * count, 64, dtype="<u8").tobytes()
    for number in range(count):
        names = ("nbytes", "chunk_nbytes", "block_nbytes", "file_nbytes")
        sizes = dict.fromkeys(names, 64 * count)
        name = f"shards/x{number}"
        message.shards.add(directory=name, starts=[number], digest=b"d" * 32, **sizes)
    replace_index(root, message)
    with ShardedReader(root) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_module.Pieces, "of", None)  # would take a gigabyte
        refused = pytest.raises(CorruptCheckpointError, match="and 992 more keys: .*is missing")
        with refused:
            next(reader.read([(key, [((0, count),)]) for key in reader.index.keys]))


@pytest.mark.parametrize(
    "change",
    [
        lambda message: b"",
        lambda message: b"junk",
        lambda message: seal(b""),
        lambda message: seal(b"\xff\xff"),
        lambda message: message.ClearField("shards"),
        lambda message: message.shards.append(message.shards[0]),
        lambda message: message.shards[0].ClearField("checksums"),
        lambda message: setattr(message.shards[0], "checksums", message.shards[0].checksums * 2),
    ],
)
def test_an_index_of_a_shard_that_was_committed_but_makes_no_sense_is_damage(small, change):
    root, arrays = small
    message = shard_index(os.path.join(root, index(root).shards[0].directory))
    data = change(message)
    if not isinstance(data, bytes):
        data = seal(message.SerializeToString())
    replace_index_of_shard(root, 0, data)
    right, errors = outcomes(root, arrays)
    assert errors and not right & {error.key for error in errors}


def test_the_index_of_a_shard_is_not_that_of_a_checkpoint(small):
    root, _ = small
    message = shard_index(os.path.join(root, "shards", "0"))
    replace_index(root, message)
    with pytest.raises(CorruptCheckpointError, match="index of a shard"):
        ShardedReader(root)


def test_what_is_no_regular_file_is_damage_and_not_waited_for(small):
    root, arrays = small
    for compression in (None, "zstd"):
        stored = {
            key: (array, [tuple((0, n) for n in array.shape)]) for key, array in arrays.items()
        }
        path = f"{root}-{compression}"
        write_checkpoint(path, stored, 1, compression)
        (file,) = data_files(path)
        size = file.stat().st_size
        file.unlink()
        os.mkfifo(file)
        with open(file.with_name("other"), "wb") as other:  # the sizes are right in sum
            other.write(bytes(size))
        assert outcomes(path, arrays)[1]


def test_a_compressed_block_that_says_it_is_elsewhere_is_damage(tmp_path):
    """The places of blocks at the end of a file, with the checksum made anew."""
    from crc32c import crc32c

    value = np.arange(1000.0)
    path = write_shard(tmp_path / "shard", {"x": value}, compression="zstd")
    (file,) = data_files(path)
    data = file.read_bytes()
    for place in [(0, 1 << 60), (1 << 60, 10), (2**64 - 1, 2**64 - 1), (1, len(data) - 21), (0, 0)]:
        places = np.array(place, "<u8").tobytes()
        file.write_bytes(data[:-20] + places + crc32c(places).to_bytes(4, "little"))
        with ShardedReader(path) as reader, pytest.raises(CorruptCheckpointError):
            list(reader.read([("x", [((0, 1000),)])]))


def test_digests_are_those_of_the_files(small):
    root, _ = small
    assert part(root, INDEX_KEY) == Path(root, "meta", "index").read_bytes()
    for shard in index(root).shards:
        data = Path(root, shard.directory, "index").read_bytes()
        assert shard.digest == hashlib.sha256(data).digest()
