"""Several processes: four train and save together, two go on, one looks at the result.

This program starts its own processes, which `jax.distributed` joins on this machine as it would
join the machines of a cluster. What a checkpoint needs from a cluster is a directory that all
processes share.

first     4 processes with 2 devices each. The weights lie over all of them; every process reads
          its own rows of the data, and says so in a `ckpt.PerProcess`. A `CheckpointManager`
          saves in the background: each process writes its own slices, process 0 commits.
second    2 processes with 4 devices each, another mesh. Each reads the slices that its devices
          need. Where four processes were in the data does not say where two go on, so a merge
          function does.
after     this process alone loads the last checkpoint, without a target.

Exits with 1 if a check fails.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

ROWS, FEATURES, OUTPUTS = 8, 16, 32  # rows per step, of all processes together
TRUTH = np.random.default_rng(0).normal(size=(FEATURES, OUTPUTS)).astype(np.float32)
PHASES = {"first": (4, 2, 6), "second": (2, 4, 10)}  # processes, devices of each, last step


# --- one of several processes ----------------------------------------------------------


def work(phase: str, index: int, port: str, directory: str) -> None:
    """Trains, from wherever the latest checkpoint is, and prints what came of it."""
    count, devices, last = PHASES[phase]
    jax.distributed.initialize(f"localhost:{port}", count, index)
    mesh = Mesh(np.array(jax.devices()).reshape(count, devices), ("data", "model"))
    layout = NamedSharding(mesh, P("data", "model"))
    weights = jax.make_array_from_callback(
        (FEATURES, OUTPUTS), layout, lambda box: np.zeros((FEATURES, OUTPUTS), np.float32)[box]
    )
    rows = ROWS // count  # this process's part of a step

    def merge(positions: list, index: int, count: int) -> int:
        """The next row of each process, of the first one that no step has used."""
        return min(positions) + index * (ROWS // count)

    checkpoint = ckpt.Checkpoint(
        weights=weights, step=0, next_row=ckpt.PerProcess(index * rows, merge)
    )
    manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=2)
    manager.restore_or_initialize()  # checks the directory, too; all restore the same
    restored = digest(checkpoint.weights)
    first = checkpoint.step + 1
    batch = NamedSharding(mesh, P("data"))
    while checkpoint.step < last:
        data = rows_from(checkpoint.next_row.value, rows)
        x, y = (jax.make_array_from_process_local_data(batch, part) for part in data)
        checkpoint.weights = update(checkpoint.weights, x, y)
        checkpoint.next_row.value += ROWS
        checkpoint.step += 1
        if checkpoint.step % 2 == 0:
            manager.save(
                checkpoint_number=checkpoint.step, options=ckpt.CheckpointOptions(enable_async=True)
            )
    manager.sync()
    print(
        json.dumps(
            {
                "steps": [first, checkpoint.step],
                "restored": restored,
                "digest": digest(checkpoint.weights),
                "error": float(error_of(checkpoint.weights)),
                "next_row": checkpoint.next_row.value,
                "checkpoints": [os.path.basename(path) for path in manager.checkpoints],
            }
        )
    )


def rows_from(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive rows of an endless table, and what the weights should make of them."""
    rows = range(start, start + count)
    x = np.stack([np.random.default_rng(row).normal(size=FEATURES) for row in rows])
    return x.astype(np.float32), (x @ TRUTH).astype(np.float32)


@jax.jit
def update(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step of gradient descent."""
    return weights - 0.5 * jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(weights)


@jax.jit
def error_of(weights: jax.Array) -> jax.Array:
    return jnp.linalg.norm(weights - TRUTH)


def digest(weights: jax.Array) -> str:
    """What a copy of all weights hashes to, wherever they lie."""
    everywhere = NamedSharding(weights.sharding.mesh, P())
    whole = jax.jit(lambda w: w, out_shardings=everywhere)(weights)
    return digest_of(np.asarray(whole.addressable_data(0)))


def digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]


# --- the program that starts them ------------------------------------------------------


def start(phase: str, directory: str) -> list[dict]:
    """Runs the processes of a phase; what each of them said."""
    count, devices, _ = PHASES[phase]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, phase, str(index), str(port), directory],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{phase}: a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        said = {phase: start(phase, directory) for phase in PHASES}
        first, second = said["first"], said["second"]
        final = ckpt.load(ckpt.latest_checkpoint(directory))
    print("phase   processes x devices  first step  last step  error")
    for phase, (count, devices, _) in PHASES.items():
        a, b = said[phase][0]["steps"]
        print(f"{phase:<7} {count} x {devices} {a:>8} {b:>8}    {said[phase][0]['error']:.4f}")
    checks = {
        "all processes know the same checkpoints": all(
            each["checkpoints"] == ["ckpt-4", "ckpt-6"] for each in first
        )
        and all(each["checkpoints"] == ["ckpt-8", "ckpt-10"] for each in second),
        "what 2 processes restore is bit-equal to what 4 saved": all(
            each["restored"] == first[0]["digest"] for each in second
        ),
        "each process goes on with the rows that nobody has read": [
            each["next_row"] for each in (*first, *second)
        ]
        == [48, 50, 52, 54, 80, 84],
        "one process loads what 2 saved": digest_of(final["weights"]) == second[0]["digest"],
        "the error goes on falling": second[0]["error"] < first[0]["error"],
    }
    for check, passed in checks.items():
        print("ok    " if passed else "FAILED", check)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) == 5:
        work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        sys.exit(main())
