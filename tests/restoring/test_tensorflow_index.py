"""The files of TensorFlow's checkpoints: tables, entries and strings, also damaged and hostile."""

import pathlib
import random
import shutil
import struct
import tracemalloc

import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from places import TESTS

import ckpt_jax as ckpt
from ckpt_jax.graph._proto import tensor_bundle_pb2 as pb
from ckpt_jax.graph._proto import trackable_object_graph_pb2 as graph_pb
from ckpt_jax.restoring.formats.tensorflow import strings
from ckpt_jax.restoring.formats.tensorflow.bundle import part_key, read_bundle
from ckpt_jax.restoring.formats.tensorflow.checksums import crc_of, mask, unmask
from ckpt_jax.restoring.formats.tensorflow.table import read_table, table
from ckpt_jax.restoring.formats.tensorflow.varints import read_varint, varint

FILES = TESTS / "foreign" / "tensorflow"
HEADER = pb.BundleHeaderProto(num_shards=1, version={"producer": 1})
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
EXPECTED_ERRORS = (ckpt.CorruptCheckpointError, ckpt.UnsupportedFormatError)


def reader_of(data):
    return lambda offset, nbytes: data[offset : offset + nbytes]


def entries_of(data):
    return list(read_table(reader_of(data), len(data)))


def index_of(entries, header=HEADER):
    """The bytes of an index, of entries by key."""
    pairs = {b"": header.SerializeToString()}
    for key, entry in entries.items():
        key = key.encode() if isinstance(key, str) else key
        pairs[key] = entry if isinstance(entry, bytes) else entry.SerializeToString()
    return b"".join(table(sorted(pairs.items())))


def entry(data=b"", dtype=1, shape=(), offset=0, size=None, **more):
    size = len(data) if size is None else size
    dims = [{"size": n} for n in shape]
    fields = {"shape": {"dim": dims}, "offset": offset, "size": size, "crc32c": mask(crc_of(data))}
    return pb.BundleEntryProto(dtype=dtype, **fields, **more)


def sliced(shape, boxes):
    """An entry in parts; a box is (start, length) for each axis."""
    parts = [{"extent": [{"start": a, "length": n} for a, n in box]} for box in boxes]
    return pb.BundleEntryProto(dtype=1, shape={"dim": [{"size": n} for n in shape]}, slices=parts)


def written(directory, entries, data=b"", header=HEADER):
    prefix = pathlib.Path(directory, "a")
    prefix.with_suffix(".index").write_bytes(index_of(entries, header))
    pathlib.Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return str(prefix)


# --- parts of the format -----------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varints_come_back(number, rest):
    assert read_varint(varint(number) + rest, 0) == (number, len(varint(number)))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 11, b"\xff" * 9 + b"\x02"])
def test_varints_that_are_none_are_refused(data):
    with pytest.raises(ValueError, match="number"):
        read_varint(data, 0)


@given(st.integers(0, 2**32 - 1))
def test_masks_come_off(crc):
    assert unmask(mask(crc)) == crc


@given(st.dictionaries(st.binary(max_size=30), st.binary(max_size=40), max_size=60))
def test_tables_come_back(pairs):
    assert entries_of(b"".join(table(sorted(pairs.items())))) == sorted(pairs.items())


def test_tables_of_several_blocks_come_back():
    pairs = [(b"%06d" % i, bytes(i % 300)) for i in range(5000)]
    data = b"".join(table(pairs))
    assert len(data) > 2 * (256 << 10)
    assert entries_of(data) == pairs


def test_our_table_is_tensorflows_byte_for_byte():
    """But for the key of a block in the index, which may be any that separates two blocks."""
    theirs = (FILES / "slices.index").read_bytes()
    ours = b"".join(table(entries_of(theirs)))
    assert entries_of(ours) == entries_of(theirs)
    first_block = len(theirs) - 48 - 40
    assert ours[: first_block - 40] == theirs[: first_block - 40]


@given(st.binary(max_size=400))
def test_strings_come_back(value):
    data, crc = strings.encode(value)
    assert strings.decode(data, crc) == value
    assert strings.length_in(len(data)) == len(value)


@given(st.binary(max_size=40), st.data())
def test_a_changed_string_is_noticed(value, draw):
    data, crc = strings.encode(value)
    at = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[at] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        strings.decode(bytes(changed), crc)


def test_the_keys_of_parts_sort_as_their_boxes_do():
    starts = [0, 1, 63, 64, 8191, 8192, 2**20, 2**40, 2**62 - 1]
    keys = [part_key("w", [(start, None)]) for start in starts]
    assert keys == sorted(keys)
    assert part_key("a\0b", [(0, 1)]).startswith(b"\0a\0\xffb\0\1")


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "i8", "c8", "c16", "?", "f2"])
def test_files_of_the_other_byte_order_are_read(tmp_path, dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    data = values.astype(values.dtype.newbyteorder(">")).tobytes()
    number = {"f4": 1, "f8": 2, "i2": 5, "i8": 9, "c8": 8, "c16": 18, "?": 10, "f2": 19}[dtype]
    header = pb.BundleHeaderProto(num_shards=1, endianness=pb.BundleHeaderProto.BIG)
    path = written(tmp_path, {"v": entry(data, number, (2, 3))}, data, header)
    found = ckpt.load(path)["v"]
    np.testing.assert_array_equal(found, values, strict=True)
    with ckpt.load_checkpoint(path) as reader:
        np.testing.assert_array_equal(reader.get_tensor("v", ((1, 2), (0, 2))), values[1:, :2])


# --- damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slices", "object_graph/ckpt-1", "keras3/ckpt-1", "blocks"])
def test_a_truncated_index_is_damaged(tmp_path, name):
    data = (FILES / f"{name}.index").read_bytes()
    prefix = written(tmp_path, {})
    rng = random.Random(name)
    for size in {0, 1, 47, 48, len(data) - 1, *[rng.randrange(len(data)) for _ in range(20)]}:
        pathlib.Path(f"{prefix}.index").write_bytes(data[:size])
        with pytest.raises(ckpt.CorruptCheckpointError, match="a.index"):
            ckpt.load(prefix)
        assert not ckpt.verify(prefix).ok


@pytest.mark.parametrize("name", ["slices", "maxshard", "keras2_slots/ckpt-1"])
def test_truncated_and_lost_data_files_are_named_when_a_checkpoint_is_opened(tmp_path, name):
    source = FILES / name
    for file in source.parent.glob(f"{source.name}.*"):
        shutil.copy(file, tmp_path)
    prefix = str(tmp_path / source.name)
    for file in sorted(tmp_path.glob("*.data-*")):
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(ckpt.CorruptCheckpointError, match=file.name):
            ckpt.load_checkpoint(prefix)
        file.unlink()
        with pytest.raises(ckpt.CorruptCheckpointError, match=file.name):
            ckpt.load_checkpoint(prefix)
        file.write_bytes(data)
    assert ckpt.verify(prefix).ok


@pytest.mark.parametrize("name", ["slices", "object_graph/ckpt-1", "nt"])
def test_no_bit_of_a_checkpoint_changes_unnoticed(tmp_path, name):
    """Every byte of every file has a checksum, but for padding at the end of the index."""
    source = FILES / name
    for file in source.parent.glob(f"{source.name}.*"):
        shutil.copy(file, tmp_path)
    prefix = str(tmp_path / source.name)
    rng = random.Random(1)
    for file in sorted(tmp_path.iterdir()):
        data = file.read_bytes()
        end = len(data) - 48 if file.suffix == ".index" else len(data)
        unread = b"" if name != "object_graph/ckpt-1" else data
        for _ in range(60):
            at = rng.randrange(end)
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            report = ckpt.verify(prefix)
            if report.ok:  # it lies in a value that cannot be read here
                assert report.unread and unread and file.suffix != ".index"
        file.write_bytes(data)
    assert ckpt.verify(prefix).ok


SEEDS = [0, *[pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 30)]]


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_indexes_with_right_checksums_end_in_an_answer(tmp_path, seed):
    """What a checksum cannot find: entries that contradict the files, or each other."""
    rng = random.Random(seed)
    for name in ("slices", "object_graph/ckpt-1", "keras2_new/ckpt-1"):
        pairs = entries_of((FILES / f"{name}.index").read_bytes())
        source = FILES / name
        for file in source.parent.glob(f"{source.name}.*"):
            shutil.copy(file, tmp_path)
        prefix = tmp_path / source.name
        for _ in range(150):
            changed = dict(pairs)
            for _ in range(rng.randrange(1, 4)):
                key = rng.choice(list(changed))
                changed[key] = mutated(changed[key], rng)
            if rng.random() < 0.3:
                key = rng.choice(list(changed))
                changed[mutated(key, rng)] = changed.pop(key)
            index = b"".join(table(sorted(changed.items())))
            pathlib.Path(f"{prefix}.index").write_bytes(index)
            outcome_of(prefix)


def mutated(data, rng):
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        at = rng.randrange(len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 4)]
        elif kind == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4)))
        else:
            out[at:at] = out[at : at + 12]
    return bytes(out)


TRANSFORMS = [optax.adam(0.1), optax.sgd(0.1, 0.9)]
RULES = [("model/layer-*/kernel", "model/kernel"), ("model/layer-*/bias", "model/bias")]


def outcome_of(prefix):
    """Opens, lists, verifies and loads; only errors of this library may come of it."""
    try:
        ckpt.list_variables(prefix)
        ckpt.verify(prefix)
        ckpt.plan_restore(prefix, {"model": {"w": np.zeros((3, 4), np.float32)}})
        for tx in TRANSFORMS:
            model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
            target = {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}
            ckpt.plan_restore(prefix, target, rename=RULES)
        ckpt.load(prefix)
    except EXPECTED_ERRORS:
        return "refused"
    return "read"


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_object_graphs_end_in_an_answer(tmp_path, seed):
    rng = random.Random(seed)
    for name in ("object_graph/ckpt-1", "keras3/ckpt-1", "keras2_slots/ckpt-1"):
        with ckpt.load_checkpoint(FILES / name) as reader:
            keys = reader.keys()
        data = graph_bytes(FILES / name)
        for _ in range(150):
            graph, crc = strings.encode(mutated(data, rng))
            values = {key: entry(b"\0" * 4, offset=0) for key in keys}
            values[GRAPH_KEY] = entry(graph, 7, offset=4)
            values[GRAPH_KEY].crc32c = crc
            outcome_of(written(tmp_path, values, b"\0" * 4 + graph))


def graph_bytes(prefix):
    data = pathlib.Path(f"{prefix}.index").read_bytes()
    found = pb.BundleEntryProto.FromString(dict(entries_of(data))[GRAPH_KEY.encode()])
    content = pathlib.Path(f"{prefix}.data-00000-of-00001").read_bytes()
    return strings.decode(content[found.offset : found.offset + found.size], found.crc32c)


# --- hostile files ---------------------------------------------------------------------


def refused(tmp_path, entries, match, error=ckpt.CorruptCheckpointError, data=b""):
    path = written(tmp_path, entries, data)
    with pytest.raises(error, match=match):
        ckpt.load(path)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (entry(shape=(2**40, 2**40), size=8), "takes .* bytes, and has 8"),
        (entry(shape=(2**62, 4), size=0), "takes"),
        (entry(shape=(-1,), size=0), "no shape"),
        (entry(shape=(1,) * 65, size=4), "no shape"),
        (entry(b"\0" * 4, offset=-4), "cannot have"),
        (entry(b"\0" * 4, offset=2**63 - 1), "cannot have"),
        (entry(b"\0" * 4, offset=2**61), "bytes"),
        (entry(b"\0" * 4, shard_id=1), "no data file 1"),
        (entry(b"\0" * 4, shard_id=-1), "no data file"),
        (entry(size=-4), "takes"),
        (entry(dtype=7, size=2**62 - 1), "bytes"),
        (entry(dtype=7, size=3), "no string"),
        (b"\xff\xff", "cannot be parsed"),
        (pb.BundleEntryProto(dtype=1, shape={"unknown_rank": True}), "no shape"),
        (sliced((4,), [[(0, 2), (0, 1)]]), "has 2 axes"),
        (sliced((4,), [[(3, 2)]]), "does not lie inside"),
        (sliced((4,), [[(-1, 2)]]), "does not lie inside"),
        (sliced((4,), [[(0, 2)]]), "is not stored"),
    ],
)
def test_entries_that_cannot_be_true_are_refused(tmp_path, bad, match):
    refused(tmp_path, {"bad": bad, "good": entry(b"\0" * 4)}, match, data=b"\0" * 4)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (entry(b"\0" * 8, shape=(3,), size=12), "another shape"),
        (entry(b"\0" * 8, dtype=3, shape=(2,)), "another shape or dtype"),
        (sliced((2,), [[(0, 2)]]), "another shape or dtype"),
        (entry(b"\0" * 8, shape=(2,)), "hold 2 of 4"),
    ],
)
def test_parts_that_contradict_their_variable_are_refused(tmp_path, part, match):
    entries = {"w": sliced((4,), [[(0, 2)]]), part_key("w", [(0, 2)]): part}
    refused(tmp_path, entries, match, data=b"\0" * 8)


def test_parts_that_overlap_are_refused(tmp_path):
    boxes = [[(0, 2)], [(1, 2)]]
    entries = {"w": sliced((4,), boxes)}
    entries |= {part_key("w", box): entry(b"\0" * 8, shape=(2,)) for box in boxes}
    refused(tmp_path, entries, "overlap", data=b"\0" * 8)


@pytest.mark.parametrize("count", [5000, 20_000])
def test_very_many_parts_take_time_in_proportion(tmp_path, count):
    """In a grid they are read; a staircase, in which all overlap on one axis, is refused."""
    row = entry(b"\0" * 4, shape=(1,))
    boxes = [[(i, 1)] for i in range(count)]
    entries = {"w": sliced((count,), boxes)} | {part_key("w", box): row for box in boxes}
    path = written(tmp_path, entries, b"\0" * 4)
    if count > 16 << 10:
        with pytest.raises(ckpt.CorruptCheckpointError, match="more than 16384"):
            ckpt.load(path)
    else:
        assert ckpt.load(path)["w"].shape == (count,)
    # Each row is cut somewhere else.
    width, boxes = count, []
    for i in range(count // 2):
        boxes += [[(i, 1), (0, i + 1)], [(i, 1), (i + 1, width - i - 1)]]
    entries = {"w": sliced((count // 2, width), boxes)}
    for box in boxes:
        shape = tuple(n for _, n in box)
        entries[part_key("w", box)] = entry(shape=shape, size=4 * shape[0] * shape[1])
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(written(tmp_path, entries, b""))


def blocks(*contents, kind=0, handles=None):
    """A table of given data blocks."""
    out, found = b"", []
    for content in contents:
        found.append((len(out), len(content)))
        sealed = content + bytes([kind])
        out += sealed + struct.pack("<I", mask(crc_of(sealed)))
    handles = found if handles is None else [found[i] for i in handles]
    index = raw_block([(b"%05d" % i, varint(a) + varint(n)) for i, (a, n) in enumerate(handles)])
    footer = b""
    for content in (raw_block([]), index):
        footer += varint(len(out)) + varint(len(content))
        out += content + b"\0" + struct.pack("<I", mask(crc_of(content + b"\0")))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def raw_block(pairs, shared=()):
    """A block; `shared` gives how much of the key before is repeated, whatever is true."""
    out = b""
    for i, (key, value) in enumerate(pairs):
        repeated = shared[i] if i < len(shared) else 0
        out += varint(repeated) + varint(len(key)) + varint(len(value)) + key + value
    return out + struct.pack("<II", 0, 1)


def header_block(*pairs, shared=()):
    return raw_block([(b"", HEADER.SerializeToString()), *pairs], (0, *shared))


def assert_table_refused(tmp_path, data, match, error=ckpt.CorruptCheckpointError):
    (tmp_path / "a.index").write_bytes(data)
    (tmp_path / "a.data-00000-of-00001").touch()
    with pytest.raises(error, match=match):
        ckpt.load(tmp_path / "a")


@pytest.mark.parametrize(("kind", "name"), [(1, "snappy"), (2, "zlib"), (77, "unknown method 77")])
def test_compressed_blocks_are_refused_by_name(tmp_path, kind, name):
    data = blocks(header_block(), kind=kind)
    assert_table_refused(tmp_path, data, rf"compressed \({name}\)", ckpt.UnsupportedFormatError)


def test_a_table_of_a_newer_version_is_refused(tmp_path):
    header = pb.BundleHeaderProto(num_shards=1, version={"producer": 2, "min_consumer": 2})
    path = written(tmp_path, {}, header=header)
    with pytest.raises(ckpt.UnsupportedFormatError, match="newer TensorFlow"):
        ckpt.load(path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (blocks(raw_block([(b"a", b"")])), "no header"),
        (blocks(header_block((b"b", b""), (b"a", b""))), "out of order"),
        (blocks(header_block((b"a", b""), (b"a", b""))), "out of order"),
        (blocks(header_block((b"a", b""), shared=[5])), "outside of its block"),
        (blocks(raw_block([(b"a", b"")]), header_block(), handles=[1, 0]), "begins before"),
        (blocks(header_block(), handles=[0] * 9000), "begins before"),
        (blocks(header_block() + b"\xff\xff\xff\x7f"), "too small"),
        (blocks(b"\0\0"), "too small"),
        (blocks(header_block((b"\xff\xfe", b""))), "not UTF-8"),
        (b"\0" * 100 + struct.pack("<Q", 0xDB4775248B80FB57), "too small|checksum"),
        (b"\xff" * 100 + struct.pack("<Q", 0xDB4775248B80FB57), "number"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path, data, match):
    assert_table_refused(tmp_path, data, match)


def test_keys_that_repeat_a_long_beginning_do_not_fill_the_memory(tmp_path):
    """An entry of five bytes can stand for a key of megabytes."""
    long = b"k" * 60_000
    pairs = [(long, b"")] + [(b"%05d" % i, b"") for i in range(50_000)]
    data = blocks(header_block(*pairs, shared=[0, *[60_000] * 50_000]))
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        assert_table_refused(tmp_path, data, "longer than those of any real index")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 << 20


def test_a_block_that_claims_to_be_huge_is_not_read(tmp_path):
    prefix = tmp_path / "a"
    data = blocks(header_block())
    with open(f"{prefix}.index", "wb") as file:  # a file with a hole, which takes no space
        file.truncate(8 << 30)
        file.seek(0, 2)
        footer = (varint(0) + varint(8 << 30)) * 2
        file.write(footer.ljust(40, b"\0") + data[-8:])
    (tmp_path / "a.data-00000-of-00001").touch()
    tracemalloc.start()
    try:
        with pytest.raises(ckpt.CorruptCheckpointError, match=r"outside|larger"):
            ckpt.load(prefix)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_value_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path):
    refused(tmp_path, {"w": entry(shape=(2**38,), size=2**40)}, "bytes")
    shape = (2**30, 2**10)
    lost = {"w": sliced(shape, [[(0, 1), (0, 1)]]), part_key("w", [(0, 1), (0, 1)]): b""}
    lost[part_key("w", [(0, 1), (0, 1)])] = entry(b"\0" * 4, shape=(1, 1))
    path = written(tmp_path, lost, b"\0" * 4)
    tracemalloc.start()
    try:
        with pytest.raises(ckpt.CorruptCheckpointError, match="hold 1 of"):
            ckpt.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def graph_of(*nodes):
    """An object graph: for each node its edges, and more fields."""
    message = graph_pb.TrackableObjectGraph()
    for edges, more in nodes:
        node = message.nodes.add(**more)
        for name, child in edges:
            node.children.add(local_name=name, node_id=child)
    return message.SerializeToString()


def with_graph(tmp_path, graph, keys=("k",)):
    data, crc = strings.encode(graph)
    found = {key: entry(b"\0" * 4) for key in keys}
    found[GRAPH_KEY] = entry(data, 7, offset=4)
    found[GRAPH_KEY].crc32c = crc
    return written(tmp_path, found, b"\0" * 4 + data)


@pytest.mark.parametrize(
    ("graph", "match"),
    [
        (b"", "no nodes"),
        (b"\xff\xff", "cannot be parsed"),
        (graph_of(([("a", 7)], {})), "not there"),
        (graph_of(([("a", -1)], {})), "not there"),
        (graph_of(([("a", 0), ("a", 0)], {})), "two children of one name"),
        (
            graph_of(([], {"slot_variables": [{"slot_name": "m", "slot_variable_node_id": 3}]})),
            "not there",
        ),
    ],
)
def test_graphs_that_contradict_themselves_are_refused(tmp_path, graph, match):
    with pytest.raises(ckpt.CorruptCheckpointError, match=f"{GRAPH_KEY}: .*{match}"):
        ckpt.load(with_graph(tmp_path, graph))


def test_a_graph_that_is_no_string_is_refused(tmp_path):
    found = {GRAPH_KEY: entry(b"\0" * 4)}
    refused(tmp_path, found, f"{GRAPH_KEY}: expected a byte string", data=b"\0" * 4)


def test_graphs_with_very_many_paths_are_read(tmp_path):
    """Two edges from each node to the next: more paths than there are atoms."""
    chain = [([("a", i + 1), ("b", i + 1)], {}) for i in range(200)]
    value = {"attributes": [{"name": "VARIABLE_VALUE", "checkpoint_key": "k"}]}
    path = with_graph(tmp_path, graph_of(*chain, ([], value)))
    found = ckpt.load(path)
    for _ in range(200):
        found = found["b"]
    assert found == 0
    assert ckpt.load(path, only="a/a/**")


def test_deep_graphs_and_circles_are_read(tmp_path):
    value = {"attributes": [{"name": "VARIABLE_VALUE", "checkpoint_key": "k"}]}
    chain = [([("a", i + 1), ("up", 0)], {}) for i in range(3000)]
    path = with_graph(tmp_path, graph_of(*chain, ([], value)))
    found = ckpt.load(path)
    for _ in range(3000):
        found = found["a"]
    assert found == 0


def test_values_that_the_graph_does_not_name_are_not_lost(tmp_path):
    """The tensors of a lookup table, and what nothing accounts for."""
    named = {"attributes": [{"name": "table", "checkpoint_key": "t/.ATTRIBUTES/table"}]}
    gone = {"attributes": [{"name": "VARIABLE_VALUE", "checkpoint_key": "not/stored"}]}
    graph = graph_of(([("t", 1), ("u", 2)], {}), ([], named), ([], gone))
    keys = ("t/.ATTRIBUTES/table-keys", "t/.ATTRIBUTES/table-values", "stray")
    path = with_graph(tmp_path, graph, keys)
    with ckpt.load_checkpoint(path) as reader:
        assert reader.paths() == ["stray", "t/table-keys", "t/table-values"]
    report = ckpt.plan_restore(path, {"u": np.float32(0)})
    assert [entry.path for entry in report.missing] == ["u"]
    assert {entry.path for entry in report.unexpected} == {
        "stray",
        "t/table-keys",
        "t/table-values",
    }


def test_no_data_is_read_to_open_a_checkpoint(tmp_path):
    data = (FILES / "slices.index").read_bytes()
    reader = read_bundle(reader_of(data), len(data))
    assert {key: tensor.shape for key, tensor in reader.tensors.items()} == {
        "a": (6, 5, 4),
        "c": (60, 60),
        "w": (3, 3),
        "z/only0": (),
    }
    with ckpt.load_checkpoint(FILES / "slices") as opened:
        assert opened.bytes_read == 0
