import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.errors import CorruptCheckpointError, ShardError, UnsupportedFormatError
from ckpt_jax.graph._proto import index_pb2
from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.store.index import Index, Layout, Shard, StackShape, merge_indexes
from ckpt_jax.store.seal import seal, unseal


def shard_index(
    parts: dict[str, list[tuple[str, tuple[int, ...], tuple[tuple[int, int], ...]]]],
    shard_id: str,
    directory: str = ".",
) -> Index:
    """An index of slices that follow each other in one pack."""
    entries = [
        (key, Layout(dtype, shape, box, dtype_of(dtype).itemsize * size(box)))
        for key, slices in parts.items()
        for dtype, shape, box in slices
    ]
    keys = tuple(sorted(parts))
    layouts = tuple(sorted({layout for _, layout in entries}))
    rows = sorted((keys.index(key), layouts.index(layout)) for key, layout in entries)
    columns = np.array([[k, m, 0, 0, 0, 64 * i] for i, (k, m) in enumerate(rows)], np.int64)
    pack = StackShape(1, 64 * len(rows), 64 * len(rows))
    return Index((Shard(shard_id, directory, (pack,)),), layouts, keys, *columns.T)


def size(box: tuple[tuple[int, int], ...]) -> int:
    return int(np.prod([b - a for a, b in box], dtype=int))


A, B = "a" * 16, "b" * 16
HALVES = [("float32", (4,), ((0, 2),)), ("float32", (4,), ((2, 4),))]


def halves() -> Index:
    one = shard_index({"x": HALVES[:1], "y": HALVES[:1]}, A, "shards/0")
    two = shard_index({"x": HALVES[1:], "y": HALVES[1:]}, B, "shards/1")
    return merge_indexes([one, two])


def message_of(index: Index) -> index_pb2.Index:
    return index_pb2.Index.FromString(unseal(index.to_bytes()))


def resealed(message: index_pb2.Index) -> bytes:
    return seal(message.SerializeToString())


def same(a: Index, b: Index) -> bool:
    return a.to_bytes() == b.to_bytes()


def slices_of(index: Index, key: str) -> list[tuple[object, ...]]:
    """(box, shard, stack, row, offset, nbytes) of each slice of a key."""
    number = index.number[key]
    rows = slice(index.starts[number], index.starts[number + 1])
    layouts = [index.layouts[i] for i in index.patterns[index.pattern[number]]]
    columns = (index.shard, index.stack, index.row, index.offset)
    places = zip(*[column[rows].tolist() for column in columns], strict=True)
    return [
        (layout.box, *place, layout.nbytes) for layout, place in zip(layouts, places, strict=True)
    ]


def test_an_index_reads_back_as_it_was() -> None:
    index = halves()
    read = Index.from_bytes(index.to_bytes())
    assert same(read, index)
    assert "x" in read and "z" not in read
    assert (read.layout_of("y").dtype, read.layout_of("y").shape) == ("float32", (4,))
    assert slices_of(read, "y") == [(((0, 2),), 0, 0, 0, 64, 8), (((2, 4),), 1, 0, 0, 64, 8)]


def test_only_a_shard_may_leave_holes() -> None:
    part = shard_index({"x": HALVES[:1]}, A)
    assert Index.from_bytes(part.to_bytes()).is_shard
    with pytest.raises(CorruptCheckpointError, match=r"x: .*hole"):
        Index.from_bytes(part.moved("shards/0", 0).to_bytes())


def test_merging_names_every_problem_with_key_and_shards() -> None:
    one = shard_index(
        {
            "dtype": HALVES[:1],
            "shape": HALVES[:1],
            "hole": HALVES[:1],
            "twice": HALVES[:1],
            "overlap": [("float32", (4,), ((0, 3),))],
            "fine": HALVES,
        },
        A,
        "shards/0",
    )
    two = shard_index(
        {
            "dtype": [("int32", (4,), ((2, 4),))],
            "shape": [("float32", (5,), ((2, 4),))],
            "twice": HALVES,
            "overlap": HALVES[1:],
        },
        B,
        "shards/1",
    )
    with pytest.raises(ShardError) as caught:
        merge_indexes([one, two])
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "dtype",
        "hole",
        "overlap",
        "shape",
        "twice",
    ]
    for line in lines:
        assert "shards/0" in line
        assert ("shards/1" in line) == ("hole:" not in line)


def test_merging_one_shard_twice_is_refused() -> None:
    one = shard_index({"x": HALVES}, A, "shards/0")
    with pytest.raises(ShardError, match="id of another shard"):
        merge_indexes([one, one.moved("shards/1", 0)])


def test_an_empty_slice_stored_twice_is_refused() -> None:
    parts = [shard_index({"x": [("int8", (0,), ((0, 0),))]}, i, i) for i in (A, B)]
    with pytest.raises(ShardError, match="stored twice"):
        merge_indexes(parts)


def test_every_dtype_has_one_name() -> None:
    codes = [np.dtype(code) for code in "?bBhHiIqQefdFD"]
    extended = [
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e8m0fnu,
        ml_dtypes.float4_e2m1fn,
        ml_dtypes.int2,
        ml_dtypes.uint2,
        ml_dtypes.int4,
        ml_dtypes.uint4,
    ]
    dtypes = [*codes, *map(np.dtype, extended), np.dtype("datetime64[ns]"), np.dtype("m8[25s]")]
    names = [dtype_name(dtype) for dtype in dtypes]
    assert [dtype_of(name) for name in names] == dtypes
    assert len(set(names)) == len(names)
    assert dtype_name(np.dtype(">i4")) == "int32"


@pytest.mark.parametrize("code", ["O", "S3", "U3", "V8", "i4,f8", np.longdouble])
def test_a_dtype_without_a_fixed_meaning_has_no_name(code: object) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        dtype_name(np.dtype(code))


@pytest.mark.parametrize("name", ["", "bytes", "object", "i4,f8", "datetime64[q]", "finfo"])
def test_an_unknown_dtype_name_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="unknown dtype"):
        dtype_of(name)


def column(*values: int, kind: str = "<u4") -> bytes:
    return np.array(values, kind).tobytes()


HOSTILE = {
    "no version": lambda m: m.ClearField("format_version"),
    "short column": lambda m: setattr(m, "row", m.row[:-8]),
    "torn column": lambda m: setattr(m, "row", m.row[:-1]),
    "key out of range": lambda m: setattr(m, "key", column(0, 0, 1, 2)),
    "key without slices": lambda m: m.keys.append("z"),
    "keys unsorted": lambda m: m.keys.reverse(),
    "layout out of range": lambda m: setattr(m, "layout", column(0, 1, 0, 2)),
    "slice twice": lambda m: setattr(m, "layout", column(0, 0, 0, 1)),
    "shard out of range": lambda m: setattr(m, "shard", column(0, 1, 0, 2)),
    "stack out of range": lambda m: setattr(m, "stack", column(0, 0, 0, 1)),
    "row out of range": lambda m: setattr(m, "row", column(0, 0, 0, 1, kind="<u8")),
    "row huge": lambda m: setattr(m, "row", column(0, 0, 0, 2**64 - 1, kind="<u8")),
    "offset out of range": lambda m: setattr(m, "offset", column(0, 0, 64, 121, kind="<u8")),
    "shared bytes": lambda m: setattr(m, "offset", column(0, 0, 7, 64, kind="<u8")),
    "id": lambda m: setattr(m.shards[0], "id", "../../../../etc/"),
    "same ids": lambda m: setattr(m.shards[0], "id", m.shards[1].id),
    "parent directory": lambda m: setattr(m.shards[0], "directory", "shards/../../x"),
    "absolute directory": lambda m: setattr(m.shards[0], "directory", "/etc"),
    "no directory": lambda m: setattr(m.shards[0], "directory", ""),
    "own directory": lambda m: setattr(m.shards[0], "directory", "."),
    "no chunk": lambda m: setattr(m.shards[0].stacks[0], "chunk_nbytes", 0),
    "huge chunk": lambda m: setattr(m.shards[0].stacks[0], "chunk_nbytes", 1 << 40),
    "dtype": lambda m: setattr(m.layouts[0], "dtype", "float33"),
    "box outside": lambda m: m.layouts[1].stop.__setitem__(0, 5),
    "box backwards": lambda m: m.layouts[1].start.__setitem__(0, 5),
    "rank": lambda m: m.layouts[1].stop.append(5),
    "nbytes": lambda m: setattr(m.layouts[0], "nbytes", 7),
    "hole": lambda m: (m.layouts[0].stop.__setitem__(0, 1), setattr(m.layouts[0], "nbytes", 4)),
    "shapes differ": lambda m: m.layouts[1].shape.__setitem__(0, 9),
    "huge shape": lambda m: m.layouts[1].shape.__setitem__(0, 1 << 63),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_cannot_be_true_is_refused(name: str) -> None:
    message = message_of(halves())
    HOSTILE[name](message)
    with pytest.raises(CorruptCheckpointError):
        Index.from_bytes(resealed(message))


def test_a_later_format_is_called_unsupported() -> None:
    message = message_of(halves())
    message.format_version += 1
    with pytest.raises(UnsupportedFormatError, match="format version 2"):
        Index.from_bytes(resealed(message))


def test_a_damaged_byte_breaks_the_seal() -> None:
    data = halves().to_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 0x10
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(bytes(damaged))
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(data[:i])


@given(st.data())
def test_fuzzed_bytes_with_a_good_seal_are_refused_or_consistent(data: st.DataObject) -> None:
    body = bytearray(unseal(halves().to_bytes()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        index = Index.from_bytes(seal(bytes(body)))
    except (CorruptCheckpointError, UnsupportedFormatError):
        return
    for key in index.keys:
        slices_of(index, key)
    assert same(Index.from_bytes(index.to_bytes()), index)


@pytest.mark.parametrize("element", [b"\x12\x00", b"\x1a\x00", b"\x22\x00", b"\x12\x02\x1a\x00"])
def test_a_hostile_index_cannot_make_memory_explode(element: bytes) -> None:
    data = seal(element * 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def test_a_seal_with_another_field_number_does_not_open() -> None:
    assert unseal(seal(b"graph")) == b"graph"
    sealed = bytearray(seal(b"graph"))
    sealed[-6] ^= 8  # the lowest bit of the field number
    with pytest.raises(CorruptCheckpointError):
        unseal(bytes(sealed))


def test_columns_stay_what_they_are_when_a_shard_is_moved() -> None:
    index = shard_index({"x": HALVES}, A)
    moved = index.moved("shards/7", 1000)
    (shard,) = index.shards
    there = dataclasses.replace(shard, directory="shards/7", files_nbytes=1000)
    assert Index.from_bytes(moved.to_bytes()).shards == moved.shards == (there,)
    assert slices_of(moved, "x") == slices_of(index, "x")
