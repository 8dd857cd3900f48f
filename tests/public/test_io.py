"""The three primitives: write a shard, merge shards, read slices."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.io import Slice, merge_shards, read_slices, write_shard

ARRAY = np.arange(40.0).reshape(8, 5)


def piece(array, *box):
    """The slice of an array at a box."""
    return Slice(array[tuple(slice(*pair) for pair in box)], box, array.shape)


def merged(directory, *shards, name="merged"):
    """A checkpoint of shards with these contents."""
    paths = [write_shard(str(directory / f"{name}-{i}"), s) for i, s in enumerate(shards)]
    return merge_shards(paths, str(directory / name))


def read(path, key, request=None):
    return read_slices(path, {key: request})[key]


def data_nbytes(shard):
    """The size of the data files of a shard."""
    return sum(file.stat().st_size for file in Path(shard, "c").iterdir())


# --- writing ---------------------------------------------------------------------------


@pytest.mark.behaviour(159)
def test_an_array_can_be_put_together_from_uneven_pieces(tmp_path):
    path = merged(
        tmp_path,
        {"x": [piece(ARRAY, (0, 1), (0, 5)), piece(ARRAY, (1, 8), (3, 5))]},
        {"x": piece(ARRAY, (1, 4), (0, 3))},
        {"x": [piece(ARRAY, (4, 8), (0, 1)), piece(ARRAY, (4, 8), (1, 3))]},
    )
    np.testing.assert_array_equal(read(path, "x"), ARRAY)
    np.testing.assert_array_equal(read(path, "x", ((0, 5), (2, 4))), ARRAY[:5, 2:4])
    assert read(path, "x", ((3, 3), (0, 5))).shape == (0, 5)


@pytest.mark.parametrize(
    "value",
    [
        np.int8([1, -2]),
        np.float64(2.5),
        np.zeros((0, 3)),
        np.array(3 + 4j),
        np.array([True, False]),
        np.arange(6).reshape(2, 3).T,
        np.arange(4, dtype=">i4"),
        np.array([1.5], ml_dtypes.bfloat16),
        7,
        True,
        2.5,
    ],
)
def test_arrays_and_scalars_come_back_as_arrays_of_their_dtype(tmp_path, value):
    found = read(write_shard(str(tmp_path / "a"), {"x": value}), "x")
    expected = np.asarray(value)
    assert found.dtype == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, expected)


def test_bytes_and_strings_come_back_as_bytes(tmp_path):
    path = write_shard(str(tmp_path / "a"), {"b": b"\x00\xff", "": b"", "s": "text"})
    assert read_slices(path, {"b": None, "": None, "s": None}) == {
        "b": b"\x00\xff",
        "": b"",
        "s": b"text",
    }


def test_of_a_jax_array_each_distinct_part_is_written_once(tmp_path, mesh42):
    array = jax.device_put(ARRAY, NamedSharding(mesh42, P("data")))
    plain = write_shard(str(tmp_path / "plain"), {"x": ARRAY})
    path = write_shard(str(tmp_path / "sharded"), {"x": array})
    assert data_nbytes(path) < data_nbytes(plain) + ARRAY.nbytes
    np.testing.assert_array_equal(read(path, "x"), ARRAY)
    with ckpt.CheckpointReader(merge_shards([path], str(tmp_path / "a"))) as reader:
        np.testing.assert_array_equal(reader.get_tensor("x", ((1, 7), (0, 2))), ARRAY[1:7, :2])


def test_a_slice_may_hold_a_jax_array_of_any_sharding(tmp_path, mesh8):
    half = jax.device_put(ARRAY[:4], NamedSharding(mesh8, P()))
    rest = jax.device_put(ARRAY[4:], jax.devices()[3])
    path = merged(
        tmp_path,
        {"x": Slice(half, ((0, 4), (0, 5)), (8, 5))},
        {"x": Slice(rest, ((4, 8), (0, 5)), (8, 5))},
    )
    np.testing.assert_array_equal(read(path, "x"), ARRAY)


def test_boxes_and_shapes_may_be_lists_and_numpy_integers(tmp_path):
    parts = [
        Slice(ARRAY[:3], [[0, 3], [0, 5]], [8, 5]),
        Slice(ARRAY[3:], ((np.int64(3), np.int64(8)), (0, np.int32(5))), np.array([8, 5])),
    ]
    path = write_shard(str(tmp_path / "a"), {"x": parts})
    np.testing.assert_array_equal(read(path, "x", [[2, np.int64(4)], [0, 5]]), ARRAY[2:4])


def test_a_process_that_holds_no_slice_of_an_array_writes_none(tmp_path):
    path = merged(tmp_path, {"x": []}, {"x": ARRAY})
    np.testing.assert_array_equal(read(path, "x"), ARRAY)


@pytest.mark.parametrize(
    ("value", "error", "what"),
    [
        ([1, 2], TypeError, "x: a list under one key"),
        ([ARRAY], TypeError, "x: a list under one key"),
        (object(), ValueError, "x: .*dtype"),
        (np.array(["text"]), ValueError, "x: .*dtype"),
        (Slice(ARRAY, ((0, 4), (0, 5)), (8, 5)), ValueError, "x: contents of shape"),
        (Slice(ARRAY, ((1, 9), (0, 5)), (8, 5)), ValueError, "x: contents of shape"),
        (Slice(ARRAY, ((0, 8),), (8,)), ValueError, "x: contents of shape"),
        (Slice(ARRAY, ((0, 8.0), (0, 5)), (8, 5)), TypeError, "float"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, value, error, what):
    with pytest.raises(error, match=what):
        write_shard(str(tmp_path / "a"), {"x": value})
    assert os.listdir(tmp_path) == []


def test_keys_are_strings(tmp_path):
    with pytest.raises(TypeError, match="keys are strings, got 3"):
        write_shard(str(tmp_path / "a"), {3: ARRAY})


def test_a_shard_is_not_written_over_anything(tmp_path):
    path = write_shard(str(tmp_path / "a"), {"x": ARRAY})
    with pytest.raises(FileExistsError):
        write_shard(path, {"x": ARRAY + 1})
    np.testing.assert_array_equal(read(path, "x"), ARRAY)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_options_apply(tmp_path, compression):
    options = ckpt.CheckpointOptions(
        compression=compression, durable=False, max_inflight_bytes=100_000
    )
    zeros = np.zeros(200_000)
    path = write_shard(str(tmp_path / "a"), {"x": zeros}, options=options)
    assert (data_nbytes(path) < zeros.nbytes / 10) == (compression == "zstd")
    found = read_slices(path, {"x": None}, options=options)["x"]
    np.testing.assert_array_equal(found, zeros)


def test_the_primitives_take_paths_of_pathlib(tmp_path: Path):
    shard = ckpt.io.write_shard(tmp_path / "shard", {"w": np.arange(3)})
    assert shard == str(tmp_path / "shard")
    merged = ckpt.io.merge_shards([tmp_path / "shard"], tmp_path / "merged")
    assert merged == str(tmp_path / "merged")
    assert ckpt.io.read_slices(tmp_path / "merged", {"w": None})["w"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="takes a list of shards"):
        ckpt.io.merge_shards(shard, tmp_path / "other")


# --- merging ---------------------------------------------------------------------------


def test_merging_copies_no_array_byte(tmp_path):
    array = np.arange(1 << 18, dtype=np.float32)
    paths = [
        write_shard(str(tmp_path / str(i)), {"x": piece(array, (i << 16, (i + 1) << 16))})
        for i in range(4)
    ]
    nbytes = [data_nbytes(path) for path in paths]
    assert sum(nbytes) >= array.nbytes
    files = {file.stat().st_ino for path in paths for file in Path(path).rglob("*")}
    root = Path(merge_shards(paths, str(tmp_path / "root")))
    kept = [data_nbytes(root / "shards" / f"{i:05d}") for i in range(4)]
    assert kept == nbytes
    new = [file for file in root.rglob("*") if file.is_file() and file.stat().st_ino not in files]
    assert sum(file.stat().st_size for file in new) < array.nbytes / 100
    np.testing.assert_array_equal(read(root, "x"), array)


def test_shards_outside_are_moved_in_and_those_inside_stay(tmp_path):
    root = tmp_path / "root"
    inside = write_shard(str(root / "mine" / "first"), {"x": ARRAY})
    outside = write_shard(str(tmp_path / "second"), {"y": ARRAY})
    assert merge_shards([inside, outside], str(root)) == str(root)
    assert os.listdir(tmp_path) == ["root"]
    assert os.path.exists(inside)
    np.testing.assert_array_equal(read(str(root), "x"), ARRAY)
    np.testing.assert_array_equal(read(str(root), "y"), ARRAY)


def test_a_merge_names_every_array_that_shards_disagree_on_and_changes_nothing(tmp_path):
    one = {
        "twice": piece(ARRAY, (0, 8), (0, 5)),
        "half": piece(ARRAY, (0, 4), (0, 5)),
        "shape": Slice(np.ones(2), ((0, 2),), (4,)),
        "dtype": Slice(np.ones(2), ((0, 2),), (4,)),
        "overlap": Slice(np.ones(3), ((0, 3),), (4,)),
        "kind": b"bytes",
        "fine": np.ones(3),
    }
    two = {
        "twice": piece(ARRAY, (0, 8), (0, 5)),
        "shape": Slice(np.ones(2), ((2, 4),), (5,)),
        "dtype": Slice(np.ones(2, np.float32), ((2, 4),), (4,)),
        "overlap": Slice(np.ones(2), ((2, 4),), (4,)),
        "kind": np.ones(3),
    }
    paths = [write_shard(str(tmp_path / str(i)), values) for i, values in enumerate((one, two))]
    with pytest.raises(ckpt.ShardError) as caught:
        merge_shards(paths, str(tmp_path / "root"))
    lines = str(caught.value)
    for key in ("twice", "half", "shape", "dtype", "overlap", "kind"):
        assert f"{key}: " in lines
    assert "hole" in lines
    assert "fine" not in lines
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
    np.testing.assert_array_equal(read(paths[0], "twice"), ARRAY)


def test_a_checkpoint_is_not_merged_over(tmp_path):
    root = merged(tmp_path, {"x": ARRAY})
    with pytest.raises(FileExistsError):
        merge_shards([write_shard(str(tmp_path / "more"), {"y": ARRAY})], root)


# --- reading ---------------------------------------------------------------------------


@pytest.mark.behaviour(159)
def test_a_shard_is_read_without_merging(tmp_path):
    path = write_shard(str(tmp_path / "a"), {"x": ARRAY})
    np.testing.assert_array_equal(read(path, "x", ((7, 8), (1, 5))), ARRAY[7:, 1:])


def test_a_struct_reads_a_jax_array_on_its_sharding(tmp_path, mesh42, mesh24):
    path = merged(
        tmp_path, {"x": piece(ARRAY, (0, 3), (0, 5))}, {"x": piece(ARRAY, (3, 8), (0, 5))}
    )
    for sharding in (
        NamedSharding(mesh42, P("data")),
        NamedSharding(mesh24, P(("data", "model"))),
        NamedSharding(mesh24, P()),
        SingleDeviceSharding(jax.devices()[5]),
    ):
        struct = jax.ShapeDtypeStruct((8, 5), np.float32, sharding=sharding)
        found = read(path, "x", struct)
        assert isinstance(found, jax.Array)
        assert (found.sharding, found.dtype) == (sharding, jnp.float32)
        np.testing.assert_array_equal(found, ARRAY)


def test_a_struct_without_a_sharding_reads_onto_the_default_device(tmp_path):
    path = write_shard(str(tmp_path / "a"), {"x": ARRAY, "y": np.int32([1, 2])})
    found = read_slices(
        path,
        {
            "y": jax.ShapeDtypeStruct((2,), np.int32),
            "x": jax.ShapeDtypeStruct((8, 5), np.float32),
        },
    )
    assert [array.devices() for array in found.values()] == [{jax.devices()[0]}] * 2
    assert not any(array.committed for array in found.values())
    np.testing.assert_array_equal(found["x"], ARRAY)
    assert found["y"].tolist() == [1, 2]


def test_requests_of_all_kinds_mix(tmp_path, mesh8):
    path = write_shard(str(tmp_path / "a"), {"x": ARRAY, "b": b"text", "s": 3})
    by_rows = NamedSharding(mesh8, P("data"))
    found = read_slices(
        path,
        {
            "x": jax.ShapeDtypeStruct((8, 5), np.float32, sharding=by_rows),
            "b": None,
            "s": (),
        },
    )
    assert found["x"].sharding == by_rows
    assert (found["b"], found["s"].item()) == (b"text", 3)


@pytest.mark.parametrize(
    ("key", "request_", "error", "what"),
    [
        ("gone", None, KeyError, "gone"),
        ("x", ((0, 9), (0, 5)), ValueError, "x"),
        ("x", ((-1, 3), (0, 5)), ValueError, "x"),
        ("x", ((3, 2), (0, 5)), ValueError, "x"),
        ("x", ((0, 8),), ValueError, "x"),
        ("x", jax.ShapeDtypeStruct((5, 8), np.float32), ValueError, r"x.*\(8, 5\).*\(5, 8\)"),
        ("b", ((0, 1),), ValueError, "byte string"),
        ("b", jax.ShapeDtypeStruct((), np.int8), ValueError, "byte string"),
    ],
)
def test_a_request_that_does_not_fit_is_named(tmp_path, key, request_, error, what):
    path = write_shard(str(tmp_path / "a"), {"x": ARRAY, "b": b"text"})
    with pytest.raises(error, match=what):
        read_slices(path, {key: request_})


def test_nothing_at_the_prefix_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        read_slices(str(tmp_path / "gone"), {"x": None})


@st.composite
def cuttings(draw):
    """A shape, disjoint boxes that fill it, and a box to read."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        start, stop = box[axis]
        at = draw(st.integers(start, stop))
        parts = [(*box[:axis], pair, *box[axis + 1 :]) for pair in ((start, at), (at, stop))]
        boxes += parts if start < at < stop else [box]
    corners = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, boxes, tuple(map(tuple, corners))


@settings(max_examples=40)  # each writes a checkpoint
@given(cuttings(), st.integers(1, 3))
def test_any_box_reads_back_whatever_the_slices_were(tmp_path_factory, cutting, num_shards):
    shape, boxes, wanted = cutting
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    shards = [
        {"x": [piece(array, *box) for box in boxes[i::num_shards]]} for i in range(num_shards)
    ]
    path = merged(tmp_path_factory.mktemp("io"), *shards)
    np.testing.assert_array_equal(read(path, "x"), array)
    index = tuple(slice(*pair) for pair in wanted)
    np.testing.assert_array_equal(read(path, "x", wanted), array[index])


@pytest.mark.behaviour(159)
def test_a_shard_is_written_and_read_back_whatever_device_holds_the_array(tmp_path, mesh8):
    x = jnp.arange(8.0)
    arrays = {
        "host": np.arange(8.0),
        "last": jax.device_put(x, jax.devices()[-1]),
        "all": jax.device_put(x, NamedSharding(mesh8, P("data"))),
    }
    shard = ckpt.io.write_shard(str(tmp_path / "part"), arrays)
    for found in ckpt.io.read_slices(shard, dict.fromkeys(arrays)).values():
        np.testing.assert_array_equal(found, np.arange(8.0))
