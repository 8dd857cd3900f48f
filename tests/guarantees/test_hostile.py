"""Checkpoints from outside: whatever their bytes say, no memory is taken for it and nothing runs.

A process with a limit on its memory opens hundreds of checkpoints whose sealed messages have been
changed at random, seals and digests made anew. It may fail only with this library's own errors.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hostile import huge_array, many_slices, many_tilings, stairs
from parts import (
    data_files,
    file_of,
    index,
    manifest,
    part,
    replace_index,
    replace_part,
    write_manifest,
)
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
from ckpt_jax.store.manifest import INDEX_KEY, MANIFEST

TREE = {"w": jnp.ones((64, 64)), "big": np.arange(200_000), "text": "abc", "n": [1, 2.5, None]}

LIMITED = """
import resource, sys
import ckpt_jax as ckpt

path = sys.argv[1]
ckpt.load(sys.argv[2])  # threads and caches are there before the limit is
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), used + (400 << 20)))
"""

MUTATIONS = (
    LIMITED
    + """
import os, random
from parts import part, replace_index_of_shard, replace_part
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.seal import seal, unseal

what, seed = sys.argv[3], int(sys.argv[4])
files = {"manifest": MANIFEST, "shard": "shards/00000-00000/index"}
if what in files:
    with open(os.path.join(path, files[what]), "rb") as file:
        message = unseal(file.read())
else:
    message = unseal(part(path, what))

def put(data):
    if what == "manifest":
        with open(os.path.join(path, MANIFEST), "wb") as file:
            file.write(data)
    elif what == "shard":
        replace_index_of_shard(path, 0, data)
    else:
        replace_part(path, what, data)

choice = random.Random(seed)
outcomes = {"fine": 0, "refused": 0}
for _ in range(150):
    data = bytearray(message)
    for _ in range(choice.randint(1, 4)):
        how, at = choice.randrange(3), choice.randrange(len(data))
        if how == 0:
            data[at] = choice.randrange(256)
        elif how == 1:  # a large varint where there was a small one
            data[at : at + 1] = b"\\\\xff\\\\xff\\\\xff\\\\xff\\\\xff\\\\x7f"
        else:
            del data[at : at + choice.randint(1, 8)]
    put(seal(bytes(data)))
    try:
        ckpt.load(path)
        outcomes["fine"] += 1
    except ckpt.CheckpointError:
        outcomes["refused"] += 1
    put(seal(message))
print(outcomes["fine"], outcomes["refused"])
"""
)

REFUSED = (
    LIMITED
    + """
for read in (ckpt.load, ckpt.list_variables, ckpt.latest_checkpoint):
    try:
        read(path)
        print(read.__name__, "accepted")
    except ckpt.CheckpointError as error:
        print(read.__name__, type(error).__name__, error)
try:
    print("ok:", ckpt.verify(path).ok)
except ckpt.CheckpointNotFoundError as error:
    print("not found:", error)
"""
)


def run(program, *arguments):
    """The output of a program in a process of its own, which would be ended after two minutes."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def path(tmp_path):
    return ckpt.save(tmp_path / "c", TREE)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return ckpt.save(tmp_path_factory.mktemp("sound") / "a", TREE)


@pytest.mark.parametrize(
    ("what", "compression"),
    [
        ("manifest", None),
        (INDEX_KEY, None),
        (INDEX_KEY, "zstd"),
        ("shard", None),
        (OBJECT_GRAPH_KEY, None),
    ],
)
def test_a_changed_message_is_refused_or_harmless_and_takes_no_memory(
    tmp_path, sound, what, compression
):
    options = ckpt.CheckpointOptions(compression=compression)
    path = ckpt.save(tmp_path / "c", TREE, options=options)
    fine, refused = map(int, run(MUTATIONS, path, sound, what, "7").split())
    assert fine + refused == 150
    assert refused > 20


def assert_refused(path, sound, error, match):
    """No reader accepts the checkpoint, in a process that may not take much memory."""
    said = run(REFUSED, path, sound)
    assert "accepted" not in said
    assert f"load {error} " in said and match in said, said
    assert "ok: True" not in said


@pytest.mark.parametrize("name", [MANIFEST, INDEX_KEY, OBJECT_GRAPH_KEY, "shard"])
def test_a_file_of_6_gb_that_takes_no_room_is_not_read(path, sound, name):
    files = {MANIFEST: Path(path, MANIFEST), "shard": Path(path, "shards/00000-00000/index")}
    file = files.get(name) or file_of(path, name)
    message = manifest(path)
    for each in message.parts:
        each.nbytes = 6 << 30
    if name != MANIFEST:
        write_manifest(path, message)
        for each in message.parts:
            if each.name not in (name, "shard"):
                data = Path(path, "meta", each.file).read_bytes()
                replace_part(path, each.name, data)
    os.truncate(file, 6 << 30)
    said = run(REFUSED, path, sound)
    assert "load CorruptCheckpointError" in said and "6442450944 bytes, at most" in said, said
    assert "ok: False" in said


@pytest.mark.parametrize("name", [MANIFEST, INDEX_KEY, OBJECT_GRAPH_KEY, "shard", "data"])
def test_a_pipe_is_not_waited_for(path, sound, name):
    files = {
        MANIFEST: Path(path, MANIFEST),
        "shard": Path(path, "shards/00000-00000/index"),
        "data": data_files(path)[0],
    }
    file = files.get(name) or file_of(path, name)
    file.unlink()
    os.mkfifo(file)
    said = run(REFUSED, path, sound)
    error = "CheckpointNotFoundError" if name == MANIFEST else "CorruptCheckpointError"
    assert f"load {error} " in said, said
    assert "ok: True" not in said


IMPOSSIBLE = {
    "an array of 2 TB": (lambda: huge_array(1 << 41), "the file is missing"),
    "a billion slices": (lambda: many_slices(20_000, 50_000), "the file is missing"),
    "millions of slices in many ways": (
        lambda: many_tilings(1000, 64, 2000),
        "cut in too many different ways",
    ),
    "slices that cannot be told apart quickly": (lambda: stairs(50_000), "hole at element"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_an_index_that_says_more_than_there_is_takes_no_memory(path, sound, kind):
    make, expected = IMPOSSIBLE[kind]
    replace_index(path, make())
    assert len(part(path, INDEX_KEY)) < 8 << 20
    program = LIMITED + textwrap.dedent(
        """
        from ckpt_jax.store.fetch import ShardedReader
        from ckpt_jax.graph.boxes import whole
        try:
            with ShardedReader(path) as reader:
                layout = reader.index.layout_of(reader.index.keys[0])
                wanted = [(key, [whole(layout.shape)]) for key in reader.index.keys]
                next(iter(reader.read(wanted)))
        except ckpt.CorruptCheckpointError as error:
            print("refused", str(error)[-300:])
        """
    )
    said = run(program, path, sound)
    assert "refused" in said and expected in said, said


def test_a_data_file_that_takes_no_room_is_refused_by_its_checksums(path, sound):
    """It has the size that the index asks for; so its bytes are read, some at a time."""
    (file,) = data_files(path)
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)
    said = run(REFUSED, path, sound)
    assert "load CorruptCheckpointError" in said and "checksum of block" in said, said


def test_a_changed_index_may_not_lead_out_of_the_checkpoint(path, sound):
    for directory in ("../sound/a/shards/00000-00000", "/etc", "shards/../../x", ".", ""):
        message = index(path)
        message.shards[0].directory = directory
        replace_index(path, message)
        said = run(REFUSED, path, sound)
        assert "load CorruptCheckpointError" in said and "inconsistent" in said, said
