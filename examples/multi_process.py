"""Several processes: four train and save together, two go on, one looks at the result.

This program starts its own processes, which `jax.distributed` joins on this machine as it would
join the machines of a cluster. A checkpoint needs one thing from a cluster: a directory that all
processes share.

first     4 processes with 2 devices each. The weights lie over all of them; every process reads
          its own rows of the data, and says so in a `ckpt.PerProcess`. A `CheckpointManager`
          saves in the background: each process writes its own slices, process 0 commits.
second    2 processes with 4 devices each, on another mesh. Each reads the slices that its devices
          need. The positions of four processes in the data do not say where two processes go on,
          so a merge function says it.
after     this process alone loads the last checkpoint, without a target.

The program exits with 1 if a check fails.
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
    """Trains on from the latest checkpoint, if there is one, and prints the outcome as JSON."""
    count, devices, last = PHASES[phase]
    jax.distributed.initialize(f"localhost:{port}", count, index)
    mesh = Mesh(np.array(jax.devices()).reshape(count, devices), ("data", "model"))
    layout = NamedSharding(mesh, P("data", "model"))
    weights = jax.make_array_from_callback(
        (FEATURES, OUTPUTS), layout, lambda box: np.zeros((FEATURES, OUTPUTS), np.float32)[box]
    )
    rows = ROWS // count  # this process's part of a step

    def merge(positions: list, index: int, count: int) -> int:
        """The next row of this process, counted from the first row that no step has used."""
        return min(positions) + index * (ROWS // count)

    checkpoint = ckpt.Checkpoint(
        weights=weights, step=0, next_row=ckpt.PerProcess(index * rows, merge)
    )
    manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=2)
    manager.restore_or_initialize()  # also checks the directory; all processes restore the same
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
    """Consecutive rows of an endless table, and the outputs that belong to them."""
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
    """A hash of all weights, on whatever devices they lie."""
    everywhere = NamedSharding(weights.sharding.mesh, P())
    whole = jax.jit(lambda w: w, out_shardings=everywhere)(weights)
    return digest_of(np.asarray(whole.addressable_data(0)))


def digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]


# --- the program that starts them ------------------------------------------------------


def start(phase: str, directory: str) -> list[dict]:
    """Runs the processes of a phase; returns what each of them printed."""
    count, devices, _ = PHASES[phase]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    processes: list[subprocess.Popen[str]] = []
    print(f"{phase}: {count} processes with {devices} devices each ...", flush=True)
    try:
        for index in range(count):
            process = subprocess.Popen(
                [sys.executable, __file__, phase, str(index), str(port), directory],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this program alone, which ends the others
            )
            processes.append(process)
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # if this program was interrupted; else they have ended
            process.wait()
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
        "each process continues with rows that no process has read": [
            each["next_row"] for each in (*first, *second)
        ]
        == [48, 50, 52, 54, 80, 84],
        "one process loads what 2 saved": digest_of(final["weights"]) == second[0]["digest"],
        "the error continues to fall": second[0]["error"] < first[0]["error"],
    }
    for check, passed in checks.items():
        print("ok    " if passed else "FAILED", check)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) == 5:
        work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(130)
