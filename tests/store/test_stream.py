"""Streams: the sizes of blocks and files, and files that any reader of zarr3 reads."""

import json
import os
import re

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from places import DOCS

from ckpt_jax.store import stream as stream_module
from ckpt_jax.store.fetch import read_index
from ckpt_jax.store.shard import write_shards
from ckpt_jax.store.stream import (
    ALIGNMENT,
    BLOCK_NBYTES,
    CHUNKS,
    DATA,
    FILE_NBYTES,
    block_nbytes,
    file_end,
    file_nbytes,
    file_path,
    file_size,
    files_nbytes,
)

BYTES = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)


@pytest.fixture
def tiny(monkeypatch):
    """Blocks of about 256 bytes and files of 1000."""
    monkeypatch.setattr(stream_module, "BLOCK_NBYTES", 256)
    monkeypatch.setattr(stream_module, "FILE_NBYTES", 1000)


def written(directory, values, **options):
    """A shard, and its entry."""
    write_shards({str(directory): values}, durable=False, **options)
    (shard,) = read_index(str(directory)).shards
    return shard


@given(st.integers(0, 1 << 40))
def test_blocks_of_a_stream_are_of_one_size_near_the_usual(nbytes):
    block = block_nbytes(nbytes)
    assert block % (CHUNKS * ALIGNMENT) == 0
    assert min(nbytes, BLOCK_NBYTES // 2) <= block <= 3 * BLOCK_NBYTES // 2


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_files_are_whole_blocks_and_no_larger_than_the_limit_or_the_stream(nbytes, limit):
    block = block_nbytes(nbytes)
    file = file_nbytes(nbytes, block, limit)
    assert file % block == 0 and file >= block
    assert file <= max(block, min(limit, FILE_NBYTES))
    assert file < nbytes + block


def test_a_small_stream_takes_little_more_than_itself(tmp_path):
    assert written(tmp_path / "a", {"x": np.ones(1)}).stored_nbytes < 350
    assert written(tmp_path / "b", {"x": np.ones(1000)}).stored_nbytes < 8400


@pytest.mark.parametrize("nbytes", [0, 1, 64, 255, 256, 1000, 1001, 2500, 10_000])
def test_without_compression_files_hold_the_bytes_at_their_offsets(tmp_path, tiny, nbytes):
    shard = written(tmp_path / "a", {"x": BYTES[:nbytes]})
    files = [file_path(str(tmp_path / "a"), number) for number in range(shard.files)]
    if nbytes:
        assert sorted(os.listdir(tmp_path / "a" / DATA), key=int) == list(
            map(str, range(len(files)))
        )
    found = b""
    for number, path in enumerate(files):
        with open(path, "rb") as file:
            data = file.read()
        held = min(shard.file_nbytes, nbytes - len(found))
        found += data[:held]
        assert data[held:] == file_end(shard, number)
        assert len(data) == file_size(shard, number)
    assert found == BYTES[:nbytes].tobytes()


def test_slices_begin_at_multiples_of_64_with_zeros_between_them(tmp_path, tiny):
    directory = tmp_path / "a"
    shard = written(directory, {"a": b"one", "b": BYTES[:100], "c": np.empty(0), "d": b"two"})
    (table,) = read_index(str(directory)).tables
    assert table.offset.tolist() == [0, 64, 0, 192]
    with open(file_path(str(directory), 0), "rb") as file:
        data = file.read(shard.nbytes)
    assert data == b"one" + bytes(61) + BYTES[:100].tobytes() + bytes(28) + b"two"


def metadata(shard):
    """The metadata that docs/format.md gives for other readers of zarr3."""
    page = (DOCS / "format.md").read_text(encoding="utf-8")
    ((text,),) = [re.findall(r"```\n(\{\n.*?)```", page, re.DOTALL)]
    for name in ("file_nbytes", "chunk_nbytes", "nbytes"):
        text = re.sub(rf"\b{name}\b", str(getattr(shard, name)), text)
    found = json.loads(text)
    (codec,) = found["codecs"]
    if shard.compression:
        codec["configuration"]["codecs"].append({"name": "zstd", "configuration": {"level": 1}})
    return found


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("nbytes", [1, 64, 256, 1000, 2500])
def test_a_shard_with_the_metadata_of_the_format_page_is_a_zarr3_array(
    tmp_path, tiny, compression, nbytes
):
    shard = written(tmp_path / "a", {"x": BYTES[:nbytes]}, compression=compression)
    (tmp_path / "a" / "zarr.json").write_text(json.dumps(metadata(shard)))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
    store = ts.open(spec).result()
    np.testing.assert_array_equal(store.read().result(), BYTES[:nbytes])


def test_a_file_that_goes_in_this_moment_counts_as_missing(tmp_path):
    assert files_nbytes(str(tmp_path)) == 0
    (tmp_path / DATA).mkdir()
    (tmp_path / DATA / "gone").symlink_to("nowhere")  # is listed, but cannot be looked at
    assert files_nbytes(str(tmp_path)) == 0
