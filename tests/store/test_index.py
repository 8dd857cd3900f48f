"""The index: tables that shards share, tilings that follow from them, and what is refused."""

import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from boxes import grids, tilings
from calls import calls
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.errors import CorruptCheckpointError, ShardError, UnsupportedFormatError
from ckpt_jax.graph._proto import index_pb2
from ckpt_jax.graph.boxes import shape_of, size_of, slices, whole
from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.store.index import Index, Shard, Table, merge_indexes, own_checksums
from ckpt_jax.store.seal import seal, unseal
from ckpt_jax.store.tiling import Layout

DIGEST = b"d" * 32


def shard_of(slices, directory, **changes):
    """The entry and table of a shard with slices that follow each other: (key, dtype, shape, box).

    As `write_shards` makes them: layouts are shared by the slices that have the same box.
    """
    keys = tuple(sorted({key for key, *_ in slices}))
    seen, rows, offset = {}, [], 0
    for key, dtype, shape, box in sorted(slices):
        nbytes = dtype_of(dtype).itemsize * size_of(box)
        number = seen.setdefault((dtype, shape, box), len(seen))
        rows.append((keys.index(key), number, offset if nbytes else 0))
        offset += -(-nbytes // 64) * 64
    layouts = tuple(
        Layout(dtype, shape, shape_of(box), dtype_of(dtype).itemsize * size_of(box))
        for dtype, shape, box in seen
    )
    starts = tuple(start for _, _, box in seen for start, _ in box)
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    entry = Shard(directory, starts, offset, 256, 256, 1024, digest=DIGEST)
    return dataclasses.replace(entry, **changes), Table(keys, layouts, *columns)


def slices_of(index, key):
    """The slices of a key as it was written: (directory, dtype, shape, box, offset, nbytes)."""
    tiling = index.tiling(index.tiling_number(key))
    found = []
    for i in range(tiling.count):
        layout, number = tiling.layouts[tiling.layout[i]], int(tiling.shard[i])
        table = index.tables[index.table[number]]
        row = int(table.first[table.keys.index(key)] + tiling.row[i])
        place = (int(table.offset[row]), int(table.nbytes[row]))
        found.append(
            (index.shards[number].directory, layout.dtype, layout.shape, tiling.box(i), *place)
        )
    return found


def message_of(index):
    return index_pb2.Index.FromString(unseal(index.to_bytes()))


def resealed(message):
    return seal(message.SerializeToString())


LEFT, RIGHT = ((0, 2),), ((2, 4),)
X = ("float32", (4,))


def halves():
    """Two arrays in two shards, which share a table."""
    return merge_indexes(
        [
            shard_of([(key, *X, box) for key in "xy"], f"shards/{i}")
            for i, box in enumerate((LEFT, RIGHT))
        ]
    )


# --- what is read is what was written --------------------------------------------------


def test_an_index_reads_back_as_it_was():
    index = halves()
    read = Index.from_bytes(index.to_bytes())
    assert read.to_bytes() == index.to_bytes()
    assert "x" in read and "z" not in read
    assert (read.layout_of("y").dtype, read.layout_of("y").shape) == X
    assert slices_of(read, "y") == [
        ("shards/0", *X, LEFT, 64, 8),
        ("shards/1", *X, RIGHT, 64, 8),
    ]
    assert (read.nbytes("y"), read.total_nbytes) == (16, 32)


@st.composite
def arrays_in_shards(draw):
    """Arrays of a few shapes, cut in several ways, and for each slice the number of its shard."""
    count = draw(st.integers(1, 4))
    found = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.sampled_from([(), (4,), (0, 3), (5, 4)]))
        cut = [whole(shape)]
        if 0 not in shape:
            cut = draw(st.one_of(tilings(whole(shape)), grids(shape)))
        dtype = draw(st.sampled_from(["float32", "int8", "bfloat16"]))
        turn = draw(st.integers(0, count - 1))
        alike = draw(st.booleans())  # dealt out in turn, or by chance
        found += [
            (f"key {number}", dtype, shape, box, (i + turn) % count)
            if alike
            else (f"key {number}", dtype, shape, box, draw(st.integers(0, count - 1)))
            for i, box in enumerate(cut)
        ]
    return count, found


@given(arrays_in_shards())
def test_every_slice_is_found_with_its_box_and_place(case):
    count, dealt = case
    shards = [
        shard_of([each for *each, shard in dealt if shard == number], f"shards/{number}")
        for number in range(count)
    ]
    index = Index.from_bytes(merge_indexes(shards).to_bytes())
    assert index.keys == tuple(sorted({key for key, *_ in dealt}))
    for key in index.keys:
        expected = []
        for number, (_, table) in enumerate(shards):
            own = sorted(each for *each, shard in dealt if shard == number)
            for row, (name, dtype, shape, box) in enumerate(own):
                if name == key:
                    place = (int(table.offset[row]), int(table.nbytes[row]))
                    expected.append((f"shards/{number}", dtype, shape, box, *place))
        assert sorted(slices_of(index, key)) == sorted(expected)
        assert index.nbytes(key) == sum(nbytes for *_, nbytes in expected)
        assert index.layout_of(key).shape == expected[0][2]
    assert index.total_nbytes == sum(map(index.nbytes, index.keys))
    assert index.to_bytes() == Index.from_bytes(index.to_bytes()).to_bytes()


def test_a_shard_reads_back_with_its_checksums_and_only_it_may_leave_holes():
    shard, table = shard_of([("x", *X, LEFT)], ".", digest=b"", checksums=b"abcd")
    data = Index((table,), (shard,), (0,)).to_bytes()
    read = Index.from_bytes(data)
    assert read.is_shard and read.shards == (shard,)
    assert own_checksums(data) == b"abcd"
    entry = dataclasses.replace(shard, directory="shards/0", checksums=b"", digest=DIGEST)
    with pytest.raises(CorruptCheckpointError, match=r"x: .*hole"):
        Index.from_bytes(Index((table,), (entry,), (0,)).to_bytes())


@pytest.mark.parametrize("data", [halves().to_bytes(), seal(b""), seal(b"\x08\x02"), seal(b"\xff")])
def test_only_the_index_of_a_shard_has_checksums(data):
    with pytest.raises(CorruptCheckpointError):
        own_checksums(data)


# --- what is alike is there once -------------------------------------------------------


def simulated(arrays, count):
    """The index of arrays that are sharded over `count` shards, some along rows, some as grids."""
    side = 16
    shards = []
    for number in range(count):
        own = []
        for i in range(arrays):
            key = f"layer_{i:05d}/kernel"
            if i % 3:
                row, column = divmod(number, side)
                box = ((2 * row, 2 * row + 2), (3 * column, 3 * column + 3))
                own.append((key, "float32", (2 * count // side, 3 * side), box))
            else:
                own.append((key, "float32", (4 * count, 5), ((4 * number, 4 * number + 4), (0, 5))))
        shards.append(shard_of(own, f"shards/{number:05d}"))
    return merge_indexes(shards)


def test_an_array_that_is_sharded_over_512_shards_is_one_row():
    index = simulated(30, 512)
    (table,) = index.tables
    assert len(table.key) == 30 and len(table.layouts) == 2
    assert len({index.tiling_number(key) for key in index.keys}) == 2
    for key in index.keys[:3]:
        tiling = index.tiling(index.tiling_number(key))
        assert tiling.count == 512
        held = np.zeros(tiling.first.shape, int)
        for box in tiling.boxes():
            held[slices(box)] += 1
        assert (held == 1).all()


def test_the_index_of_512_shards_grows_with_shards_plus_arrays_not_with_their_product():
    few, many = (len(simulated(arrays, 512).to_bytes()) for arrays in (30, 60))
    assert many - few < 30 * 60  # a key, and 16 bytes, for each further array
    half, whole = (len(simulated(30, count).to_bytes()) for count in (256, 512))
    assert whole - half < 256 * 80  # the name, the digest and a few numbers of each further shard


def test_four_times_the_slices_take_no_more_than_four_times_the_calls():
    def index(count):
        keys = [f"layer_{i:05d}" for i in range(count)]
        parts = [
            shard_of([(key, *X, box) for key in keys], f"shards/{i}")
            for i, box in enumerate((LEFT, RIGHT))
        ]
        return lambda: Index.from_bytes(merge_indexes(parts).to_bytes()).nbytes(keys[-1])

    index(10)()  # what is made once is made here
    assert calls(index(10_000)) <= 4.2 * calls(index(2500))


def test_shards_that_differ_in_a_key_do_not_share_a_table():
    one = shard_of([("x", *X, LEFT), ("z", "int8", (), ())], "shards/0")
    other = shard_of([("x", *X, RIGHT)], "shards/1")
    index = merge_indexes([one, other])
    assert len(index.tables) == 2
    assert Index.from_bytes(index.to_bytes()).keys == ("x", "z")


# --- merging ---------------------------------------------------------------------------


def test_merging_names_every_problem_with_key_and_shards():
    one = shard_of(
        [
            ("dtype", *X, LEFT),
            ("shape", *X, LEFT),
            ("hole", *X, LEFT),
            ("twice", *X, LEFT),
            ("overlap", *X, ((0, 3),)),
            ("fine", *X, LEFT),
            ("fine", *X, RIGHT),
        ],
        "shards/0",
    )
    two = shard_of(
        [
            ("dtype", "int32", (4,), RIGHT),
            ("shape", "float32", (5,), RIGHT),
            ("twice", *X, LEFT),
            ("twice", *X, RIGHT),
            ("overlap", *X, RIGHT),
        ],
        "shards/1",
    )
    with pytest.raises(ShardError) as caught:
        merge_indexes([one, two])
    first, *lines = str(caught.value).splitlines()
    assert first == "5 problems in shards:"
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


@pytest.mark.parametrize("change", ["a cell is missing", "a cell is there twice"])
def test_a_grid_over_many_shards_is_refused_if_a_cell_is_missing_or_doubled(change):
    shape = (16, 8)
    cells = [((2 * i, 2 * i + 2), (4 * j, 4 * j + 4)) for i in range(8) for j in range(2)]
    shards = [shard_of([("x", "int8", shape, box)], f"shards/{i}") for i, box in enumerate(cells)]
    assert len(merge_indexes(shards).tables) == 1
    if "missing" in change:
        changed, expected = shards[:5] + shards[6:], r"hole at element \(4, 4\)"
    else:
        again = shard_of([("x", "int8", shape, cells[5])], "shards/again")
        changed = [*shards, again]
        expected = r"\(4, 6\), \(4, 8\)\) is stored twice \(in shards/5, shards/again\)"
    with pytest.raises(ShardError, match=f"x: .*{expected}"):
        merge_indexes(changed)


def test_an_empty_slice_stored_twice_is_refused():
    parts = [shard_of([("x", "int8", (0,), ((0, 0),))], f"shards/{i}") for i in range(2)]
    with pytest.raises(ShardError, match="stored twice"):
        merge_indexes(parts)


# --- dtypes ----------------------------------------------------------------------------


def test_every_dtype_has_one_name():
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
def test_a_dtype_without_a_fixed_meaning_has_no_name(code):
    with pytest.raises(ValueError, match="cannot be stored"):
        dtype_name(np.dtype(code))


@pytest.mark.parametrize("name", ["", "bytes", "object", "i4,f8", "datetime64[q]", "finfo"])
def test_an_unknown_dtype_name_is_a_value_error(name):
    with pytest.raises(ValueError, match="unknown dtype"):
        dtype_of(name)


# --- what comes from outside -----------------------------------------------------------


def column(*values, kind="<u4"):
    return np.array(values, kind).tobytes()


def of_table(name, value):
    return lambda m: setattr(m.tables[0], name, value)


def of_shard(name, value):
    return lambda m: setattr(m.shards[0], name, value)


def of_layout(name, value):
    return lambda m: setattr(m.tables[0].layouts[0], name, value)


# The table has the keys x and y, both with layout 0, at the offsets 0 and 64.
HOSTILE = {
    "no version": lambda m: m.ClearField("format_version"),
    "no tables": lambda m: m.ClearField("tables"),
    "no shards": lambda m: m.ClearField("shards"),
    "a table without a shard": lambda m: m.tables.add(),
    "a table out of range": of_shard("table", 1),
    "two equal tables": lambda m: (m.tables.append(m.tables[0]), of_shard("table", 1)(m)),
    "short column": of_table("layout", column(0)),
    "torn column": of_table("layout", column(0, 0)[:-1]),
    "key out of range": of_table("key", column(0, 2)),
    "keys out of order": of_table("key", column(1, 0)),
    "first key without slices": of_table("key", column(1, 1)),
    "last key without slices": lambda m: m.tables[0].keys.append("z"),
    "keys not sorted": lambda m: m.tables[0].keys.reverse(),
    "one key twice": lambda m: m.tables[0].keys.__setitem__(0, "y"),
    "layout out of range": of_table("layout", column(0, 1)),
    "offset huge": of_table("offset", column(0, 2**64 - 1, kind="<u8")),
    "slice cut off by the end": of_table("offset", column(0, 121, kind="<u8")),
    "shared bytes": of_table("offset", column(0, 7, kind="<u8")),
    "dtype": of_layout("dtype", "float33"),
    "size": of_layout("nbytes", 7),
    "size of bytes": lambda m: (of_layout("dtype", "bytes")(m), of_layout("nbytes", 8)(m)),
    "rank of the slice": lambda m: m.tables[0].layouts[0].extent.append(5),
    "slice larger than the array": lambda m: m.tables[0].layouts[0].extent.__setitem__(0, 5),
    "empty slice with a place": lambda m: (
        m.tables[0].layouts[0].extent.__setitem__(0, 0),
        of_layout("nbytes", 0)(m),
    ),
    "huge shape": lambda m: m.tables[0].layouts[0].shape.__setitem__(0, 1 << 61),
    "huge rank": lambda m: (
        m.tables[0].layouts[0].shape.extend([1] * 64),
        m.tables[0].layouts[0].extent.extend([1] * 64),
    ),
    "starts are missing": lambda m: m.shards[0].ClearField("starts"),
    "too many starts": lambda m: m.shards[0].starts.append(0),
    "box outside": lambda m: m.shards[0].starts.__setitem__(0, 3),
    "huge start": lambda m: m.shards[0].starts.__setitem__(0, 2**64 - 1),
    "slices overlap": lambda m: m.shards[0].starts.__setitem__(0, 1),
    "slice twice": lambda m: m.shards[0].starts.__setitem__(0, 2),
    "hole": lambda m: m.shards.__delitem__(1),
    "same directories": of_shard("directory", "shards/1"),
    "parent directory": of_shard("directory", "shards/../../x"),
    "absolute directory": of_shard("directory", "/etc"),
    "no directory": of_shard("directory", ""),
    "directory with an empty part": of_shard("directory", "shards//0"),
    "own directory": of_shard("directory", "."),
    "backslash in a directory": of_shard("directory", "shards\\0"),
    "no digest": of_shard("digest", b""),
    "long digest": of_shard("digest", b"d" * 33),
    "unknown compression": of_shard("compression", "rar"),
    "no chunk": of_shard("chunk_nbytes", 0),
    "no block": of_shard("block_nbytes", 0),
    "blocks cut through chunks": of_shard("chunk_nbytes", 100),
    "more chunks than a file can hold": lambda m: (
        of_shard("chunk_nbytes", 1)(m),
        of_shard("file_nbytes", 1 << 30)(m),
    ),
    "huge block": lambda m: (
        of_shard("block_nbytes", 1 << 40)(m),
        of_shard("file_nbytes", 1 << 40)(m),
    ),
    "no file": of_shard("file_nbytes", 0),
    "files cut through blocks": of_shard("file_nbytes", 1000),
    "huge file": of_shard("file_nbytes", 1 << 63),
    "huge stream": of_shard("nbytes", 1 << 63),
    "stream too short": of_shard("nbytes", 71),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_cannot_be_true_is_refused(name):
    message = message_of(halves())
    HOSTILE[name](message)
    with pytest.raises(CorruptCheckpointError):
        Index.from_bytes(resealed(message))


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_shard_with_more_or_fewer_checksums_than_blocks_is_refused(size):
    shard, table = shard_of([("x", *X, LEFT)], ".", checksums=bytes(size))
    with pytest.raises(CorruptCheckpointError, match="checksums"):
        Index.from_bytes(Index((table,), (shard,), (0,)).to_bytes())


@pytest.mark.parametrize(("version", "advice"), [(1, "first release"), (3, "newer ckpt_jax")])
def test_another_format_is_called_unsupported(version, advice):
    message = message_of(halves())
    message.format_version = version
    with pytest.raises(UnsupportedFormatError, match=f"format version {version}, .*{advice}"):
        Index.from_bytes(resealed(message))


def test_a_damaged_byte_breaks_the_seal():
    data = halves().to_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 0x10
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(bytes(damaged))
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(data[:i])


@given(st.data())
def test_fuzzed_bytes_with_a_good_seal_are_refused_or_consistent(data):
    body = bytearray(unseal(halves().to_bytes()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        index = Index.from_bytes(seal(bytes(body)))
    except (CorruptCheckpointError, UnsupportedFormatError):
        return
    for key in index.keys:
        assert slices_of(index, key)
    assert Index.from_bytes(index.to_bytes()).to_bytes() == index.to_bytes()


def test_a_seal_with_another_field_number_does_not_open():
    assert unseal(seal(b"graph")) == b"graph"
    sealed = bytearray(seal(b"graph"))
    sealed[-6] ^= 8  # the lowest bit of the field number
    with pytest.raises(CorruptCheckpointError):
        unseal(bytes(sealed))


def peak_of(data):
    """The memory that is taken while an index is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            Index.from_bytes(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("element", [b"\x12\x00", b"\x1a\x00", b"\x12\x02\x12\x00"])
def test_many_elements_of_nothing_take_no_memory(element):
    data = seal(b"\x08\x02" + element * 100_000)
    assert peak_of(data) < 20 * len(data)


def many_tilings(keys, layouts, shards):
    """A small message that says of millions of slices that they make up arrays.

    Each key has half of the layouts, every time another half.
    """
    message = index_pb2.Index(format_version=2)
    table = message.tables.add(keys=[f"{i:05d}" for i in range(keys)])
    for _ in range(layouts):
        table.layouts.add(dtype="int8", shape=[layouts * shards], extent=[1], nbytes=1)
    chance = np.random.default_rng(0)
    half = layouts // 2
    chosen = [chance.choice(layouts, half, replace=False) for _ in range(keys)]
    table.key = np.repeat(np.arange(keys), half).astype("<u4").tobytes()
    table.layout = np.concatenate(chosen).astype("<u4").tobytes()
    table.offset = np.arange(keys * half, dtype="<u8").tobytes()
    for number in range(shards):
        message.shards.add(
            directory=f"{number}",
            starts=range(layouts * number, layouts * (number + 1)),
            nbytes=keys * half,
            chunk_nbytes=1 << 20,
            block_nbytes=1 << 20,
            file_nbytes=1 << 20,
            digest=DIGEST,
        )
    return resealed(message)


def test_millions_of_slices_in_a_small_message_are_refused_before_they_are_made():
    data = many_tilings(1000, 64, 2000)
    assert len(data) < 2 << 20  # it speaks of 64 million slices
    assert peak_of(data) < 40 * len(data)


def test_slices_that_irregularly_overlap_are_found_without_comparing_each_pair():
    """Disjoint boxes, of which all overlap each other along one axis, and a hole."""

    def stairs(count):
        boxes = [((i, count + i), (i, i + 1)) for i in range(count)]
        found = [("x", "int8", (2 * count, count), box) for box in boxes]
        shard, table = shard_of(found, "shards/0")
        data = Index((table,), (shard,), (0,)).to_bytes()

        def work():
            with pytest.raises(CorruptCheckpointError, match="hole"):
                Index.from_bytes(data)

        return work

    stairs(10)()
    assert calls(stairs(4000)) <= 4.2 * calls(stairs(1000))
