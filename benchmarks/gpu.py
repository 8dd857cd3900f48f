"""On an accelerator: saves, restores, and what a save costs a training loop, beside Orbax.

    python benchmarks/gpu.py [--gib 8] [--directory /dev/shm/bench] [--json out.json]

* limits: copies between the device and pinned or ordinary memory; write + fsync and preadv with as
  many threads as there are cores.
* save, restore: of 128 MiB arrays on one device, and of 4,000 small ones.
* stall: how long a save in the background keeps the program, and what a training loop that donates
  its state loses in all. Every saved value is compared with what it was when the save was called.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

import ckpt_jax as ckpt

THREADS = len(os.sched_getaffinity(0))
PART = 64 << 20
SHAPE = (8192, 4096)
found: dict[str, list[float]] = {}


def timed(name: str, act: Callable[[], Any], repeats: int = 3, nbytes: int = 0) -> None:
    """Notes the seconds of an action, the first time apart."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(act())
        samples.append(time.perf_counter() - start)
    found[name] = samples
    rate = f"best {nbytes / min(samples) / 1e9:6.2f} GB/s" if nbytes else ""
    print(f"{name:48s}", *[f"{s:8.4f}" for s in samples], "s ", rate, flush=True)


def limits(arrays: list[jax.Array], directory: str, nbytes: int) -> None:
    device = jax.devices()[0]
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    timed("limit: device to pinned memory", lambda: jax.device_put(arrays, pinned), nbytes=nbytes)
    host = [np.asarray(x) for x in jax.device_put(arrays, pinned)]
    timed("limit: host memory to device", lambda: jax.device_put(host, device), nbytes=nbytes)
    data = np.concatenate([x.reshape(-1).view(np.uint8) for x in host])
    parts = range(0, data.nbytes, PART)

    def write(start: int) -> None:
        with open(f"{directory}/{start}", "wb", buffering=0) as file:
            file.write(data[start : start + PART])
            os.fsync(file.fileno())

    def read(start: int) -> np.ndarray:
        buffer = np.empty(min(PART, data.nbytes - start), np.uint8)
        with open(f"{directory}/{start}", "rb", buffering=0) as file:
            file.readinto(buffer)
        return buffer

    with ThreadPoolExecutor(THREADS) as pool:
        timed("limit: write + fsync", lambda: [*pool.map(write, parts)], nbytes=nbytes)
        timed(
            "limit: read into fresh memory", lambda: [*pool.map(read, parts)] and 0, nbytes=nbytes
        )
    shutil.rmtree(directory)
    os.makedirs(directory)


def libraries() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """By name, a durable save and a restore."""
    both = {
        "ckpt_jax": (lambda path, tree: ckpt.save(path, tree, overwrite=True), ckpt.restore),
    }
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        print("Orbax is not installed")
        return both
    logging.getLogger("absl").setLevel(logging.ERROR)
    checkpointer = ocp.StandardCheckpointer()

    def save(path: str, tree: Any) -> None:
        checkpointer.save(path, tree, force=True)
        checkpointer.wait_until_finished()

    return {**both, "Orbax": (save, checkpointer.restore)}


def transfers(name: str, tree: Any, directory: str) -> None:
    nbytes = sum(x.nbytes for x in jax.tree.leaves(tree))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    for library, (save, restore) in libraries().items():
        path = f"{directory}/{library}"
        timed(f"save {name}, {library}", partial(save, path, tree), nbytes=nbytes)
        timed(f"restore {name}, {library}", partial(restore, path, target), nbytes=nbytes)
        same = jax.tree.map(lambda x, y: bool((x == y).all()), restore(path, target), tree)
        assert all(jax.tree.leaves(same)), library


def stall(tree: Any, directory: str) -> None:
    """A loop of steps that donate the state, with a save in the background after the third."""
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0.5 + 1, t), donate_argnums=0)
    work = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    busy = jax.jit(
        lambda m: jax.lax.fori_loop(0, 40, lambda _, m: (m @ work) * jnp.bfloat16(0.01), m)
    )
    tree = step(jax.tree.map(jnp.copy, tree))
    state, m = {"state": tree}, work
    options = ckpt.CheckpointOptions(enable_async=True)
    for attempt in range(3):
        checkpoint = ckpt.Checkpoint(**state)
        before = jax.tree.map(lambda x: np.asarray(x[:1]), state["state"])
        steps, waited = [], 0.0
        for number in range(30):
            start = time.perf_counter()
            m = jax.block_until_ready(busy(m))
            if number == 3:
                begun = time.perf_counter()
                checkpoint.write(f"{directory}/stall", options=options)
                waited = time.perf_counter() - begun
            state["state"] = step(state["state"])  # donates what is being saved
            steps.append(time.perf_counter() - start)
        checkpoint.sync()
        usual = statistics.median(steps[:3] + steps[-10:])
        lost = sum(each - usual for each in steps[3:20])
        found[f"stall {attempt}"] = [waited, lost]
        print(
            f"save in the background: returns after {waited * 1e3:.1f} ms, the loop loses "
            f"{lost * 1e3:.0f} ms in all, a step takes {usual * 1e3:.0f} ms",
            flush=True,
        )
        saved = ckpt.load(f"{directory}/stall")["state"]
        same = jax.tree.map(lambda x, y: np.array_equal(x, y[:1]), before, saved)
        assert all(jax.tree.leaves(same)), "the save holds values of a later step"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--directory", default="/dev/shm/bench")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    os.makedirs(arguments.directory, exist_ok=True)
    key = jax.random.key(0)
    count = max(1, int(arguments.gib * 8))
    tree = {
        f"layer{i:03d}": jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(count)
    }
    small = {f"k{i}": jnp.full((16, 16), float(i)) for i in range(4000)}
    jax.block_until_ready((tree, small))
    arrays = jax.tree.leaves(tree)
    print(f"{len(arrays)} arrays of 128 MiB on {jax.devices()[0]}, {THREADS} cores")
    limits(arrays, arguments.directory, sum(x.nbytes for x in arrays))
    transfers("one device", tree, arguments.directory)
    transfers("4,000 small arrays", small, arguments.directory)
    stall(tree, arguments.directory)
    shutil.rmtree(arguments.directory)
    if arguments.json:
        about = {"device": str(jax.devices()[0]), "cores": THREADS, "gib": arguments.gib}
        Path(arguments.json).write_text(json.dumps({**about, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
