"""Checkpoints of every released format stay readable, and damaged ones are refused."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from make_golden import (
    GOLDEN,
    Cursor,
    Point,
    Settings,
    blank_1,
    tree_1,
    tree_2,
    write_1,
    write_2,
)

import ckpt_jax as ckpt

GRAPH_1, GRAPH_2, ZSTD = (GOLDEN / name for name in ("graph-1", "graph-2", "zstd"))


def assert_same(found, expected, path="root"):
    """Equal types, structure, dtypes and bits."""
    if isinstance(expected, Cursor):
        assert found.text in (expected.text, str(expected.text).encode()), path
        return
    assert type(found) is type(expected), path
    match expected:
        case dict():
            assert list(map(repr, found)) == list(map(repr, expected)), path
            for label in expected:
                assert_same(found[label], expected[label], f"{path}/{label!r}")
        case list() | tuple():
            assert len(found) == len(expected), path
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert_same(one, other, f"{path}/{i}")
        case Settings():
            assert_same(vars(found), vars(expected), path)
        case jax.Array() if jax.dtypes.issubdtype(expected.dtype, jax.dtypes.prng_key):
            assert found.dtype == expected.dtype, path
            assert_same(jax.random.key_data(found), jax.random.key_data(expected), path)
        case jax.Array() | np.ndarray() | np.generic():
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
            assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), path
        case _:
            assert repr(found) == repr(expected), path


def as_loaded(tree):
    """What `load` makes of the golden tree."""
    match tree:
        case Point():
            return {"x": as_loaded(tree.x), "y": as_loaded(tree.y)}
        case dict():
            return {label: as_loaded(child) for label, child in tree.items()}
        case list() | tuple():
            return type(tree)(map(as_loaded, tree))
        case Settings():
            return vars(tree)
        case Cursor():
            return str(tree.text).encode()
        case jax.Array() if jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(tree))
        case jax.Array():
            return np.asarray(tree)
    return tree


def test_graph_1_loads():
    found = ckpt.load(GRAPH_1)
    assert_same(found, as_loaded(tree_1()))
    assert found["tied"][0] is found["tied"][1]["again"]


def test_graph_1_restores():
    found = ckpt.restore(GRAPH_1, blank_1())
    assert_same(found, tree_1())
    assert found["tied"][0] is found["tied"][1]["again"]


def test_graph_1_restores_into_a_checkpoint():
    checkpoint = ckpt.Checkpoint(**blank_1())
    checkpoint.read(GRAPH_1).assert_consumed()
    assert checkpoint.labels["a/b"] == 8
    assert_same(checkpoint.big, tree_1()["big"])


def test_golden_checkpoints_say_that_they_are_of_format_2():
    from ckpt_jax.graph._proto import index_pb2, manifest_pb2, trackable_object_graph_pb2
    from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
    from ckpt_jax.store.fetch import ShardedReader
    from ckpt_jax.store.manifest import INDEX_KEY, MANIFEST

    for path in (GRAPH_1, GRAPH_2, ZSTD):
        with ShardedReader(str(path)) as reader:
            graph, index = reader.extra(OBJECT_GRAPH_KEY), reader.extra(INDEX_KEY)
        assert graph is not None and index is not None
        assert index_pb2.Index.FromString(index).format_version == 2
        manifest = manifest_pb2.Manifest.FromString((path / MANIFEST).read_bytes())
        assert manifest.format_version == 2
        parsed = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph)
        assert parsed.format_version == (2 if path == GRAPH_2 else 1)


def test_the_compressed_one_loads():
    assert_same(ckpt.load(ZSTD), as_loaded(tree_1()))
    assert ckpt.verify(ZSTD).ok


def test_the_golden_tree_is_still_written_so_that_it_reads_back(tmp_path):
    path = write_1(tmp_path / "a")
    assert_same(ckpt.load(path), as_loaded(tree_1()))
    with ckpt.load_checkpoint(path) as new, ckpt.load_checkpoint(GRAPH_1) as old:
        assert new.keys() == old.keys()
        assert new.get_variable_to_shape_map() == old.get_variable_to_shape_map()
        assert new.object_graph == old.object_graph


def test_graph_2_loads_and_restores():
    found = ckpt.load(GRAPH_2)
    assert_same(found, tree_2())
    assert [*map(type, found)] == [*map(type, tree_2())]
    assert_same(ckpt.restore(GRAPH_2, {key: x * 0 for key, x in tree_2().items()}), tree_2())


@pytest.mark.parametrize(("version", "write"), [(1, write_1), (2, write_2)])
def test_a_graph_says_the_oldest_format_that_has_its_labels(tmp_path, version, write):
    from ckpt_jax.graph._proto import trackable_object_graph_pb2
    from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
    from ckpt_jax.store.fetch import ShardedReader

    for path in (write(tmp_path / "a"), GOLDEN / f"graph-{version}"):
        reader = ShardedReader(str(path))
        graph = reader.extra(OBJECT_GRAPH_KEY)
        reader.close()
        assert graph is not None
        message = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph)
        assert message.format_version == version


def test_graph_1_is_small():
    assert sum(file.stat().st_size for file in GRAPH_1.rglob("*") if file.is_file()) < 500_000


FILES = sorted(str(file.relative_to(GRAPH_1)) for file in GRAPH_1.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_copy_is_refused_or_reads_the_same(tmp_path, name):
    """One file of it cut short, emptied, removed, or with a bit flipped."""
    path = Path(shutil.copytree(GRAPH_1, tmp_path / "a"))
    file = path / name
    data = file.read_bytes()
    expected = as_loaded(tree_1())
    outcomes = set()
    places = range(0, len(data), 1 + len(data) // 9)
    flipped = [data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :] for i in places]
    for damaged in (data[: len(data) // 2], b"", None, *flipped):
        if damaged is None:
            os.remove(file)
        else:
            file.write_bytes(damaged)
        try:
            found = ckpt.load(path)
        except (ckpt.CorruptCheckpointError, ckpt.CheckpointNotFoundError):
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert_same(found, expected)
    assert "refused" in outcomes
