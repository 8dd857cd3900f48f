"""Checkpoints from outside: whatever their bytes say, no memory is taken for it and nothing runs.

A process with a limit on its memory opens hundreds of checkpoints whose sealed messages have been
changed at random, the seals made anew. It may fail only with this library's own errors.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
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
