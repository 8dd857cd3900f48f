"""How many requests checkpoints of other libraries take: a budget, as for our own."""

import equinox as eqx
import jax
import numpy as np
import pytest
import torch_files
from flax import serialization
from foreign import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec
from test_foreign_in_stores import upload

import ckpt_jax as ckpt

SHARDS = 8


def exported(format, **options):
    return lambda path, tree: ckpt.export(tree, path, format=format, **options)


def hub(path, tree):
    nbytes = sum([array.nbytes for array in tree.values()])
    ckpt.export(tree, path, format="safetensors", max_shard_nbytes=nbytes // SHARDS)


def npz(path, tree, save=np.savez):
    with open(path, "wb") as file:
        save(file, **tree)


def msgpack(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))


def equinox(path, tree):
    with open(path, "wb") as file:
        eqx.tree_serialise_leaves(file, tree)


# What writes it, and how many requests opening it may take, however many arrays it has.
WRITERS = {
    "a.safetensors": (exported("safetensors"), 8),
    "hub": (hub, 8 + 5 * SHARDS),
    "orbax": (exported("orbax"), 24),
    "tensorflow": (exported("tensorflow"), 16),
    "npz": (npz, 12),
    "compressed": (lambda path, tree: npz(path, tree, np.savez_compressed), 12),
    "torch": (torch_files.saved, 12),
    "npy": (lambda path, tree: npz(path, tree, lambda file, **t: np.save(file, t["a0"])), 8),
}
# These have no table of contents, and are read in windows.
WITHOUT_CONTENTS = {"msgpack": msgpack, "equinox": equinox}


def tree_of(count, rows=16):
    rng = np.random.default_rng(0)
    return {f"a{k}": rng.normal(size=(rows, 256)).astype(np.float32) for k in range(count)}


@pytest.fixture
def counted(a_server, tmp_path):
    """Uploads what a function writes, opens it and reads a part of it. Returns the numbers of
    requests for both, and how many were under way at once."""

    def counted(write, tree, boxes=None):
        counted.number += 1
        local = tmp_path / f"checkpoint-{counted.number}"
        write(local, tree)
        url = upload(local, f"{a_server.url}/{local.name}")
        proxy.forget()
        with ckpt.load_checkpoint(url) as reader:
            opening = dict(proxy.operations())
            proxy.forget()
            wanted = dict.fromkeys(reader.keys()) if boxes is None else boxes
            found = reader.read(wanted)
        assert len(found) == len(wanted)
        reading = dict(proxy.operations())
        assert {*opening, *reading} <= {"READ", "LIST", "STAT"}
        counted.proxy = proxy
        return sum(opening.values()), sum(reading.values()), proxy.most_at_once

    counted.number = 0
    ckpt.save(f"{a_server.url}/warm", {"w": 1})  # the bucket is looked at once
    proxy = a_server.through_proxy()
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{a_server.url}/nothing")
    proxy.delay_seconds = 0.01  # so that those that are sent together are there together
    return counted


@pytest.mark.parametrize("name", WRITERS)
def test_more_arrays_take_no_more_requests(counted, name):
    write, budget = WRITERS[name]
    for count in (10, 80):
        opening, reading, _ = counted(write, tree_of(count))
        assert opening <= budget
        # What lies side by side is one request, and compressed members are one each.
        assert reading <= (count if name == "compressed" else 2 * SHARDS)


@pytest.mark.parametrize("name", WITHOUT_CONTENTS)
def test_files_without_contents(counted, name):
    for count in (10, 80):
        opening, reading, _ = counted(WITHOUT_CONTENTS[name], tree_of(count))
        assert opening <= 8 + count // 8  # each window has 16 arrays or more
        assert reading <= 2


@pytest.mark.parametrize("name", ["a.safetensors", "tensorflow", "npz", "torch"])
def test_larger_arrays_take_requests_of_a_few_megabytes_at_once(counted, name):
    tree = {"a": np.arange(3 << 20, dtype=np.float32), "b": np.arange(3 << 20, dtype=np.float32)}
    opening, reading, at_once = counted(WRITERS[name][0], tree)
    assert opening <= WRITERS[name][1] + 2 * len(tree)
    assert reading <= 2 * 12 // 4 + 2  # 24 MB, 4 MB each
    assert at_once >= 3
    ranges = [map(int, each.range[6:].split("-")) for each in counted.proxy.find("READ")]
    assert max([stop - start + 1 for start, stop in ranges]) <= 4 << 20


def test_only_the_bytes_that_are_wanted_are_read(counted):
    box = ((8, 16), (0, 256))
    *_, reading, _ = counted(exported("safetensors"), tree_of(100, rows=64), {"a7": box})
    (request,) = counted.proxy.find("READ")
    first, last = map(int, request.range.removeprefix("bytes=").split("-"))
    assert (reading, last - first + 1) == (1, 8 * 256 * 4)


def test_a_database_of_orbax_is_read_once_for_all_arrays(a_server):
    url = upload(FIXTURES / "orbax" / "0.12.8_standard", f"{a_server.url}/orbax")
    proxy = a_server.through_proxy()
    assert len(jax.tree.leaves(ckpt.load(url))) > 20
    assert proxy.count("READ", r"orbax/manifest\.ocdbt$") <= 4
    assert proxy.count("READ", "orbax/d/") <= 2


def test_a_sharded_restore_reads_each_part_once(a_server, tmp_path, mesh42):
    array = np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096)
    local = tmp_path / "a.safetensors"
    ckpt.export({"w": array}, local, format="safetensors")
    url = upload(local, f"{a_server.url}/a.safetensors")
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    target = {"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)}
    proxy = a_server.through_proxy()
    found = ckpt.restore(url, target)["w"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, array)
    ranges = [each.range for each in proxy.find("READ", "safetensors$") if each.range]
    nbytes = [last - first + 1 for first, last in [map(int, r[6:].split("-")) for r in ranges]]
    assert sum(nbytes) <= array.nbytes + (1 << 19)  # and the beginning of the file
