"""Kill a training run, and resume it on another mesh as if nothing had happened.

A small transformer (flax.nnx, AdamW, dropout) learns the source text of Python's own
standard library. One training run is carried by three processes:

1. The first trains on a 4 x 2 mesh of virtual CPU devices, tensor parallel, and saves
   every few steps. It is killed with SIGKILL while it runs.
2. The second resumes from `ckpt.latest_checkpoint` on a 2 x 4 mesh, with other partition
   specs: the matrices are now split over both axes.
3. The third resumes from the last checkpoint of the second, and finishes on a single device.

How each of them can do that:

* Everything that changes is in the checkpoint: parameters, both AdamW moments, the
  dropout streams (key and count), and the step, which the optimizer keeps.
* Batches are a pure function of the step, so the data has no state to save.
* The target of a restore is abstract: `nnx.eval_shape` builds model and optimizer without
  memory for arrays, and each leaf gets its sharding on the new mesh. `restore` then reads
  for each device only the part that it holds. Nothing is initialised and then overwritten.

The example then compares the run with one that nobody interrupted, and exits with 1 if

* the state after a restore is not, bit for bit, the state that was saved (each save notes
  a digest of all leaves in a log beside the checkpoints),
* a restored leaf has another sharding than it was asked to have, or
* the losses differ by more than a small tolerance. They cannot be bit-equal across meshes,
  because another mesh adds the same floats in another order.

Run it with `python examples/resume_on_another_mesh.py`. It needs no accelerator and no
download, and takes about a minute on two cores.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import multiprocessing.process
import pathlib
import random
import re
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

if __name__ == "__main__":  # Ctrl-C during an import ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

VOCABULARY, WIDTH, HEADS, LAYERS, SEQUENCE, BATCH = 256, 64, 4, 2, 64, 16
LOSS_TOLERANCE = 1e-5  # in nats; forgetting the dropout streams costs 2e-2, one bias moment 9e-5


# The model -------------------------------------------------------------------------------


class Block(nnx.Module):
    """Causal self-attention and an MLP, each added to the residual stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=causal))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.mlp_norm(x)))))


class LanguageModel(nnx.Module):
    """Bytes (batch, length) to logits of the next byte (batch, length, VOCABULARY)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(SEQUENCE, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.tokens(text) + self.positions(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


Optimizer: TypeAlias = nnx.Optimizer[LanguageModel]


def build() -> tuple[LanguageModel, Optimizer]:
    """A new model and its optimizer. Dropout uses the second stream of `Rngs` in training."""
    model = LanguageModel(nnx.Rngs(params=0, dropout=1))
    return model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


def train_step(model: LanguageModel, optimizer: Optimizer, text: jax.Array) -> jax.Array:
    """Update model and optimizer in place; the mean loss in nats per byte."""

    def loss_fn(model: LanguageModel) -> jax.Array:
        logits = model(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


# The data --------------------------------------------------------------------------------


@functools.cache
def standard_library() -> np.ndarray:
    """The source of the top-level modules of the standard library, as one run of bytes."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)


def batch_of(step: int) -> np.ndarray:
    """The batch of this step, (BATCH, SEQUENCE + 1): the same in every process."""
    text = standard_library()
    starts = np.random.default_rng(step).integers(len(text) - SEQUENCE - 1, size=BATCH)
    return text[starts[:, None] + np.arange(SEQUENCE + 1)].astype(np.int32)


# Layouts: a mesh, and how each leaf is split on it ---------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of ('data', 'model') and the partition specs of the leaves on it.

    A leaf gets the spec of the first pattern that is found in its path. If there is none, it
    is replicated. The paths of AdamW's moments end with the paths of their parameters, so
    moments get the same specs.
    """

    mesh_shape: tuple[int, int]
    specs: tuple[tuple[str, P], ...]

    @property
    def size(self) -> int:
        return math.prod(self.mesh_shape)

    def mesh(self) -> Mesh:
        return jax.make_mesh(self.mesh_shape, ("data", "model"), (AxisType.Auto, AxisType.Auto))

    def shardings(self, state: nnx.State) -> nnx.State:
        """The sharding of every leaf of `state`, in the same structure."""
        mesh = self.mesh()

        def sharding_of(path: jax.tree_util.KeyPath, _: jax.ShapeDtypeStruct) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            specs = (spec for pattern, spec in self.specs if re.search(pattern, name))
            return NamedSharding(mesh, next(specs, P()))

        return jax.tree.map_with_path(sharding_of, state)

    def holds(self, state: nnx.State) -> bool:
        """Whether every leaf of `state` lies as the layout says."""
        actual = jax.tree.map(lambda leaf: leaf.sharding, state)
        return jax.tree.leaves(actual) == jax.tree.leaves(self.shardings(state))


TENSOR_PARALLEL = (
    (r"attention/(query|key|value)/kernel", P(None, "model", None)),
    (r"attention/out/kernel", P("model", None, None)),
    (r"up/kernel|head/kernel", P(None, "model")),
    (r"down/kernel", P("model", None)),
)
SPLIT_OVER_BOTH_AXES = (
    (r"attention/(query|key|value)/kernel", P("data", "model", None)),
    (r"attention/out/kernel", P("model", None, "data")),
    (r"up/kernel|head/kernel|embedding", P("data", "model")),
    (r"down/kernel", P("model", "data")),
)
FOUR_BY_TWO = Layout((4, 2), TENSOR_PARALLEL)
TWO_BY_FOUR = Layout((2, 4), SPLIT_OVER_BOTH_AXES)
ONE_DEVICE = Layout((1, 1), ())


# One process of the run ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phase:
    """The work of one process: train up to step `stop`, and save after every `every` steps."""

    name: str
    layout: Layout
    stop: int
    every: int


def train(phase: Phase, directory: pathlib.Path) -> None:
    """Continue from the newest checkpoint of `directory`, or start if there is none."""
    log = functools.partial(note, directory, phase=phase.name)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", phase.layout.size)

    path = ckpt.latest_checkpoint(directory)
    model, optimizer = create(phase.layout) if path is None else abstract(phase.layout)
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    if path is not None:
        start = time.perf_counter()
        checkpoint.restore(path).assert_consumed()
        jax.block_until_ready(nnx.state((model, optimizer)))
        seconds = time.perf_counter() - start
        log(
            event="restored",
            step=int(optimizer.step[...]),
            seconds=seconds,
            digest=digest(model, optimizer),
            placed=phase.layout.holds(nnx.state((model, optimizer))),
        )

    step_on_mesh = compile_step(phase.layout, model, optimizer)
    for step in range(int(optimizer.step[...]), phase.stop):
        loss = float(step_on_mesh(model, optimizer, jnp.asarray(batch_of(step))))
        done = step + 1
        log(event="trained", step=done, loss=loss)
        if done % phase.every == 0 or done == phase.stop:
            # The digest comes first, so that no checkpoint is ever without one.
            log(event="saving", step=done, digest=digest(model, optimizer))
            start = time.perf_counter()
            checkpoint.save(directory / "ckpt")
            log(event="saved", step=done, seconds=time.perf_counter() - start)


def abstract(layout: Layout) -> tuple[LanguageModel, Optimizer]:
    """Model and optimizer of `jax.ShapeDtypeStruct`s that carry the layout's shardings."""
    model, optimizer = nnx.eval_shape(build)
    state = nnx.state((model, optimizer))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        layout.shardings(state),
    )
    nnx.update((model, optimizer), placed)
    return model, optimizer


def create(layout: Layout) -> tuple[LanguageModel, Optimizer]:
    """A new model and optimizer, every leaf initialised on the devices that hold it."""
    model, optimizer = abstract(layout)
    shardings = layout.shardings(nnx.state((model, optimizer)))
    initialise = jax.jit(lambda: nnx.state(build()), out_shardings=shardings)
    nnx.update((model, optimizer), initialise())
    return model, optimizer


def compile_step(
    layout: Layout, model: LanguageModel, optimizer: Optimizer
) -> Callable[[LanguageModel, Optimizer, jax.Array], jax.Array]:
    """`train_step`, which takes and returns every leaf in its sharding of the layout.

    Without these shardings, the compiler is free to choose where updated leaves lie. The
    layout would drift, and the second step would be compiled again for the first one's outcome.
    """
    model_shardings = nnx.StateSharding(layout.shardings(nnx.state(model)))
    optimizer_shardings = nnx.StateSharding(layout.shardings(nnx.state(optimizer)))
    by_data = NamedSharding(layout.mesh(), P("data"))
    return nnx.jit(
        train_step,
        in_shardings=(model_shardings, optimizer_shardings, by_data),
        donate_argnums=(0, 1),
    )


def digest(model: LanguageModel, optimizer: Optimizer) -> str:
    """SHA-256 of all leaves, gathered to the host, in path order."""
    leaves = {
        "/".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state((model, optimizer)))
    }
    sha = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


# The log: JSON lines beside the checkpoints ----------------------------------------------


def note(directory: pathlib.Path, **record: object) -> None:
    """Append one record, in a single small write that a kill cannot cut in two."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def notes(directory: pathlib.Path, event: str, phase: str | None = None) -> list[dict[str, Any]]:
    """The records of one event so far, in the order of writing."""
    file = directory / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        record
        for record in records
        if record["event"] == event and phase in (None, record["phase"])
    ]


# The demonstration -----------------------------------------------------------------------


def run(phase: Phase, directory: pathlib.Path, kill_after: int | None = None) -> None:
    """Run a phase in a process of its own; raises if its exit code is unexpected.

    With `kill_after`, the process gets a SIGKILL at some moment after that step.
    """
    print("   starting, and compiling the training step ...", flush=True)
    process = multiprocessing.get_context("spawn").Process(target=train, args=(phase, directory))
    # The process inherits that Ctrl-C is ignored: this program handles it for both.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    try:
        follow(process, phase, directory, kill_after)
    finally:
        process.kill()  # if it is time, or this program was interrupted; else it has ended
        process.join()
    expected = 0 if kill_after is None else -signal.SIGKILL
    if process.exitcode != expected:
        raise RuntimeError(
            f"the {phase.name} process ended with {process.exitcode}, expected {expected}"
        )


def follow(
    process: multiprocessing.process.BaseProcess,
    phase: Phase,
    directory: pathlib.Path,
    kill_after: int | None,
) -> None:
    """Print what the process saves, until it ends or it is time to kill it."""
    printed = 0
    alive = True
    while alive:
        alive = process.is_alive()  # before the log is read: at the end, the log is complete
        trained = {record["step"]: record for record in notes(directory, "trained", phase.name)}
        saved = notes(directory, "saved", phase.name)
        for record in saved[printed:]:
            loss = trained[record["step"]]["loss"]
            print(f"   step {record['step']:>4}  loss {loss:.4f}  saved", flush=True)
        printed = len(saved)
        if kill_after is not None and max(trained, default=0) >= kill_after:
            time.sleep(random.uniform(0.0, 0.1))
            return
        time.sleep(0.02)


def compare(phase: Phase, directory: pathlib.Path, reference: pathlib.Path) -> float:
    """The largest difference of a phase's losses from those of the reference run."""
    expected = {record["step"]: record["loss"] for record in notes(reference, "trained")}
    return max(
        abs(record["loss"] - expected[record["step"]])
        for record in notes(directory, "trained", phase.name)
    )


TABLE_HEADER = (
    *("phase", "mesh", "steps", "first loss", "last loss"),
    *("save ms", "restore ms", "difference"),
)


def table_row(phase: Phase, directory: pathlib.Path, difference: float) -> tuple[str, ...]:
    """The row of the table about a phase."""
    trained = notes(directory, "trained", phase.name)
    saves = [record["seconds"] for record in notes(directory, "saved", phase.name)]
    restores = [record["seconds"] for record in notes(directory, "restored", phase.name)]
    return (
        phase.name,
        "{} x {}".format(*phase.layout.mesh_shape),
        f"{trained[0]['step']}-{trained[-1]['step']}",
        f"{trained[0]['loss']:.4f}",
        f"{trained[-1]['loss']:.4f}",
        f"{1e3 * statistics.median(saves):.0f}",
        f"{1e3 * restores[0]:.0f}" if restores else "-",
        f"{difference:.1e}",
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows of text in aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        print("  ".join(cells))


def demonstrate(directory: pathlib.Path, steps: int) -> bool:
    """Run the three phases and the uninterrupted run; whether all checks hold."""
    every = steps // 12
    first = Phase("first", FOUR_BY_TWO, steps, every)
    second = Phase("second", TWO_BY_FOUR, 3 * steps // 4, every)
    third = Phase("third", ONE_DEVICE, steps, every)
    unbroken = Phase("uninterrupted", FOUR_BY_TWO, steps, every)
    interrupted, reference = directory / "interrupted", directory / "uninterrupted"

    print(
        f"Three processes share one training run of {steps} steps, on virtual CPU devices. "
        "With 120 steps this\ntakes about a minute on two cores.\n"
    )
    print(f"1. The first process trains on a 4 x 2 mesh and saves every {every} steps.")
    run(first, interrupted, kill_after=4 * every + random.randrange(every))
    last = notes(interrupted, "trained")[-1]["step"]
    path = ckpt.latest_checkpoint(interrupted)
    print(f"   killed (SIGKILL) after step {last}; the newest checkpoint is {path}")
    print("2. The second process resumes from that checkpoint, on a 2 x 4 mesh.")
    run(second, interrupted)
    print("3. The third process resumes from the last checkpoint of the second, on one device.")
    run(third, interrupted)
    print("4. To compare with: a run of the same steps on a 4 x 2 mesh that nobody interrupts.")
    run(unbroken, reference)

    print("\nThe last column is the largest difference of a loss from the uninterrupted run's.\n")
    differences = [compare(phase, interrupted, reference) for phase in (first, second, third)]
    print_table(
        [
            TABLE_HEADER,
            table_row(first, interrupted, differences[0]),
            table_row(second, interrupted, differences[1]),
            table_row(third, interrupted, differences[2]),
            table_row(unbroken, reference, 0.0),
        ]
    )

    saved = {record["step"]: record["digest"] for record in notes(interrupted, "saving")}
    restored = notes(interrupted, "restored")
    difference = max(differences)
    checks = {
        "both restored states are bit-equal to the saved ones": len(restored) == 2
        and all(record["digest"] == saved[record["step"]] for record in restored),
        "their leaves lie as the new layouts say": all(record["placed"] for record in restored),
        f"the losses are those of the uninterrupted run: largest difference {difference:.1e}, "
        f"tolerance {LOSS_TOLERANCE:.0e}": difference <= LOSS_TOLERANCE,
    }
    print()
    for check, holds in checks.items():
        print("ok    " if holds else "FAILED", check)
    return all(checks.values())


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=pathlib.Path, help="default: a temporary directory")
    parser.add_argument("--steps", type=int, default=120, help="of the whole run, at least 24")
    args = parser.parse_args()
    if args.steps < 24:
        parser.error("--steps must be at least 24, so that the run can be killed halfway")
    try:
        if args.directory is None:
            with tempfile.TemporaryDirectory() as temporary:
                return 0 if demonstrate(pathlib.Path(temporary), args.steps) else 1
        if (args.directory / "interrupted").exists() or (args.directory / "uninterrupted").exists():
            parser.error(f"{args.directory} holds an earlier run; name another directory")
        return 0 if demonstrate(args.directory, args.steps) else 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
