"""Checkpoints from outside: whatever their bytes say, no memory is taken for it and nothing runs.

A process with a limit on its memory opens hundreds of checkpoints whose sealed messages have been
changed at random, the seals made anew. It may fail only with this library's own errors.
"""

import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ckpt_jax.restoring.plain_slots import slots_as_children

import ckpt_jax as ckpt
from ckpt_jax.graph import codec
from ckpt_jax.graph._proto import trackable_object_graph_pb2 as pb
from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.store.index import INDEX_KEY

PROGRAM = """
import random, resource, shutil, sys
import tensorstore as ts
import ckpt_jax as ckpt
from ckpt_jax.store.seal import seal, unseal

path, key, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
ckpt.load(path)  # threads and caches are there before the limit is
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), used + (400 << 20)))
spec = {"driver": "ocdbt", "base": f"file://{path}/"}
database = ts.KvStore.open(spec).result()
message = unseal(database.read(key).result().value)
choice = random.Random(seed)
outcomes = {"fine": 0, "refused": 0}
for _ in range(150):
    data = bytearray(message)
    for _ in range(choice.randint(1, 4)):
        what, at = choice.randrange(3), choice.randrange(len(data))
        if what == 0:
            data[at] = choice.randrange(256)
        elif what == 1:  # a large varint where there was a small one
            data[at : at + 1] = b"\\xff\\xff\\xff\\xff\\xff\\x7f"
        else:
            del data[at : at + choice.randint(1, 8)]
    database.write(key, seal(bytes(data))).result()
    try:
        ckpt.load(path)
        outcomes["fine"] += 1
    except ckpt.CheckpointError:
        outcomes["refused"] += 1
print(outcomes["fine"], outcomes["refused"])
"""


@pytest.mark.parametrize("key", [INDEX_KEY, OBJECT_GRAPH_KEY])
def test_a_changed_message_is_refused_or_harmless_and_takes_no_memory(tmp_path: Path, key: str):
    tree = {"w": jnp.ones((64, 64)), "big": np.arange(200_000), "text": "abc", "n": [1, 2.5, None]}
    path = ckpt.save(tmp_path / "c", tree)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), path, key, "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fine, refused = map(int, done.stdout.split())
    assert fine + refused == 150
    assert refused > 20


# --- long paths -----------------------------------------------------------------------------------


def chain(message):
    """Objects in objects, with long names."""
    for number in range(2000):
        node = message.nodes.add()
        if number < 1999:
            node.children.add(node_id=number + 1, local_name="x" * 500)


def values(message):
    """Many values of an object with a long name."""
    message.nodes.add().children.add(node_id=1, local_name="x" * 500_000)
    node = message.nodes.add()
    for number in range(20_000):
        node.attributes.add(name=str(number), checkpoint_key=str(number), leaf_spec=1)


def slots(message):
    """Many slot variables of an optimizer with a long name."""
    root = message.nodes.add()
    for number in (1, 2):
        root.children.add(node_id=number, local_name=str(number) * 250_000)
    message.nodes.add()
    optimizer = message.nodes.add()
    for number in range(3000):
        optimizer.slot_variables.add(
            original_variable_node_id=1, slot_name=str(number), slot_variable_node_id=3 + number
        )
        message.nodes.add()


def encoded(fill):
    message = pb.TrackableObjectGraph(format_version=1)
    message.leaf_specs.add(kind="array", dtype="float32", shape=[1])
    fill(message)
    return message.SerializeToString()


def peak_nbytes(act):
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fill", [chain, values, slots])
def test_a_small_graph_whose_paths_would_take_all_memory_is_refused(fill):
    data = encoded(fill)
    assert len(data) < 1 << 20

    def decode():
        with pytest.raises(ckpt.CorruptCheckpointError, match="nested too deeply"):
            codec.decode(data)

    assert peak_nbytes(decode) < 256 << 20


def test_a_name_with_very_many_parts_is_refused():
    def make():
        with pytest.raises(ValueError, match="nested too deeply"):
            graph_of({"/".join(["x"] * 30_000): LeafSpec("numpy", "float32", ())})

    assert peak_nbytes(make) < 256 << 20


def test_shared_objects_in_shared_objects_do_not_make_a_tree_without_end():
    def ladder(message):
        for number in range(2000):
            node = message.nodes.add()
            for name in "ab":
                if number < 1999:
                    node.children.add(node_id=number + 1, local_name=name)

    graph = codec.decode(encoded(ladder))
    assert peak_nbytes(lambda: as_tree(graph)) < 256 << 20
    assert len(as_tree(graph).nodes) >= len(graph.nodes)


def test_slots_of_a_deep_variable_do_not_make_a_tree_without_end():
    def deep_slots(message):
        for number in range(2000):
            node = message.nodes.add()
            if number < 1999:
                node.children.add(node_id=number + 1, local_name="a")
        message.nodes[0].children.add(node_id=2000, local_name="o")
        optimizer = message.nodes.add()
        for number in range(1000):
            optimizer.slot_variables.add(
                original_variable_node_id=1999,
                slot_name=str(number),
                slot_variable_node_id=2001 + number,
            )
            message.nodes.add()

    graph = codec.decode(encoded(deep_slots))
    with pytest.raises(ckpt.CorruptCheckpointError, match="the slots of o lie too deep"):
        slots_as_children(graph)


def test_a_table_with_one_long_path_has_no_long_rows_for_the_others():
    entries = [ReportEntry("x" * 100_000), *[ReportEntry(f"{c}{c}") for c in "abcdefgh"]]
    assert len(str(RestoreReport("p", missing=tuple(entries)))) < 110_000


def test_a_program_with_such_paths_is_refused_by_name_before_anything_is_written(tmp_path):
    tree = {}
    for number in range(2000):
        tree = {f"{number}{'x' * 500}": tree}
    with pytest.raises(ckpt.UnsaveableError, match="nested too deeply.*1999xxx"):
        ckpt.save(tmp_path / "a", tree)
    assert not (tmp_path / "a").exists()
