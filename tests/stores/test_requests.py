"""How many requests things take: a budget. Requests cost money, and those in sequence cost time."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

SHARDS, ARRAYS = 8, 12
# A shard is its data and its index. Then there are the index and the graph, and the manifest.
WRITES = 2 * SHARDS + 3


@pytest.fixture
def tree(mesh8):
    sharding = NamedSharding(mesh8, P("data"))
    return {
        f"a{k}": jax.device_put(np.arange(8 * 64.0).reshape(8, 64) + k, sharding)
        for k in range(ARRAYS)
    }


@pytest.fixture
def counted(any_server, mesh8):
    """Runs something, and returns how many requests it took, by operation."""
    ckpt.save(f"{any_server.url}/warm", {"w": np.zeros(3)})  # the bucket is looked at once
    proxy = any_server.through_proxy()
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{any_server.url}/nothing")
    proxy.delay_seconds = 0.01  # so that those that are sent together are there together

    def counted(act):
        proxy.forget()
        act()
        counted.most_at_once = proxy.most_at_once
        counted.proxy = proxy
        return dict(proxy.operations())

    return counted


def test_a_save(any_server, counted, tree):
    assert counted(lambda: ckpt.save(f"{any_server.url}/a", tree)) == {"READ": 1, "WRITE": WRITES}
    assert counted.most_at_once > SHARDS // 2  # they meet at the server, if not all at once


def test_twice_the_arrays_take_no_more_requests(any_server, counted, tree):
    more = {**tree, **{f"b{name}": value for name, value in tree.items()}}
    assert counted(lambda: ckpt.save(f"{any_server.url}/a", more)) == {"READ": 1, "WRITE": WRITES}
    reads = counted(lambda: ckpt.load(f"{any_server.url}/a"))["READ"]
    ckpt.save(f"{any_server.url}/b", tree)
    assert counted(lambda: ckpt.load(f"{any_server.url}/b"))["READ"] == reads


def test_an_overwrite(any_server, counted, tree):
    path = ckpt.save(f"{any_server.url}/a", tree)
    found = counted(lambda: ckpt.save(path, tree, overwrite=True))
    assert found.pop("READ") <= 3
    assert found == {"WRITE": WRITES, "DELETE": WRITES - 1}  # the manifest stays


def test_a_numbered_save(any_server, counted, tree):
    checkpoint = ckpt.Checkpoint(**tree)
    for _ in range(2):
        found = counted(lambda: checkpoint.save(f"{any_server.url}/ckpt"))
        assert found == {"READ": 2, "WRITE": WRITES + 1}


def test_a_managed_save(any_server, counted, tree):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(**tree), any_server.url, max_to_keep=2)
    for _ in range(2):
        manager.save(metrics={"loss": 1.0})
    found = counted(lambda: manager.save(metrics={"loss": 1.0}))
    # The state file and the notes are written twice: before and after a checkpoint is removed.
    assert found["WRITE"] == WRITES + 4
    assert found["DELETE"] == WRITES
    assert found["READ"] + found["LIST"] + found.get("STAT", 0) <= 26
    # Of these, none grows with the number of shards.
    small = ckpt.CheckpointManager(ckpt.Checkpoint(w=1), f"{any_server.url}/s", max_to_keep=2)
    for _ in range(2):
        small.save(metrics={"loss": 1.0})
    of_small = counted(lambda: small.save(metrics={"loss": 1.0}))
    assert {each: of_small.get(each) for each in ("READ", "LIST", "STAT")} == {
        each: found.get(each) for each in ("READ", "LIST", "STAT")
    }


@pytest.mark.parametrize("how", ["load", "restore"])
def test_a_restore(any_server, counted, tree, how):
    path = ckpt.save(f"{any_server.url}/a", tree)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    acts = {"load": lambda: ckpt.load(path), "restore": lambda: ckpt.restore(path, target)}
    found = counted(acts[how])
    assert set(found) == {"READ"} and found["READ"] <= 2 * SHARDS + 5
    assert counted.most_at_once > SHARDS // 2  # they meet at the server, if not all at once


def test_the_latest_checkpoint(any_server, counted, tree):
    checkpoint = ckpt.Checkpoint(**tree)
    for _ in range(2):
        checkpoint.save(f"{any_server.url}/ckpt")
    found = counted(lambda: ckpt.latest_checkpoint(any_server.url))
    assert found["READ"] <= 7 and found["LIST"] == 1


def test_a_small_array_of_a_large_checkpoint(any_server, counted):
    path = ckpt.save(f"{any_server.url}/a", {"big": np.zeros(1 << 20), "small": np.arange(3.0)})
    with ckpt.load_checkpoint(path) as reader:
        found = counted(lambda: reader.get_tensor("small"))
    assert set(found) == {"READ"} and found["READ"] <= 4
    (data,) = counted.proxy.find("READ", "/c/0$")
    first, last = map(int, data.range.removeprefix("bytes=").split("-"))
    assert last - first < 1 << 21  # of 8 MiB: one block


def test_without_data_there_are_fewer(any_server, counted):
    found = counted(lambda: ckpt.save(f"{any_server.url}/a", {"step": 1}))
    assert found == {"READ": 1, "WRITE": 5}
