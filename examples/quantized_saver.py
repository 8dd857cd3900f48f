"""A registered saver for immutable values: optimizer moments in 8 bits on disk.

Adam's first moment is an average of gradients, and training hardly notices when a restart
rounds it. Here it is float32 in memory and, in the checkpoint, an int8 code per element and
a float32 scale per block of 256: a bit more than a quarter of the bytes.

The program decides which values may lose precision, not the saver. It wraps these values in
`Approximate` when it saves, and in the target when it restores. The default saver saves
everything else bit for bit. An `Approximate` is immutable, so the restore function returns new
objects, and the library rebuilds the optimizer's state around them.

Two details make it a saver for sharded training:

* Blocks lie along the last axis, so the codes have the shape of the value. One compiled function
  computes codes and scales on the devices that hold the value, and each device's part is written
  as a separate slice.
* Restoring reads the codes straight onto the sharding of the target, as int8.

The example fits a small network on a mesh of 8 virtual CPU devices, saves it once with the
default saver and once with this one, and restores both on another mesh. It prints sizes and
errors, and exits with 1 if a check fails.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

BLOCK, LEVELS = 256, 127  # elements per scale; codes are -127 to 127
WIDTH, STEPS = 512, 10


@dataclasses.dataclass(frozen=True)
class Approximate:
    """A float32 array that may come back a little different: by at most 1/254 of the largest
    magnitude in its block. In a target it may be a `jax.ShapeDtypeStruct`."""

    value: Any


# The saver -------------------------------------------------------------------------------


@jax.jit
def quantize(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The int8 codes, in the shape of `value`, and the float32 scales (..., blocks)."""
    blocks = in_blocks(value)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / LEVELS
    codes = jnp.round(blocks / jnp.where(scales == 0.0, 1.0, scales)[..., None])
    codes = codes.reshape(*value.shape[:-1], -1)[..., : value.shape[-1]]
    return codes.astype(jnp.int8), scales


def dequantize(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The values that codes and scales represent, in the shape of `codes`."""
    blocks = in_blocks(codes).astype(jnp.float32) * scales[..., None]
    return blocks.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def in_blocks(array: jax.Array) -> jax.Array:
    """An array (..., n) as (..., blocks, BLOCK), with zeros at the end."""
    padding = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % BLOCK)]
    return jnp.pad(array, padding).reshape(*array.shape[:-1], -1, BLOCK)


def save_quantized(values: dict[str, Approximate], file_prefix: str) -> str:
    arrays = {}
    for name, approximate in values.items():
        arrays[f"{name}/codes"], arrays[f"{name}/scales"] = quantize(approximate.value)
    return ckpt.io.write_shard(file_prefix, arrays)


def restore_quantized(values: dict[str, Approximate], merged_prefix: str) -> dict[str, Approximate]:
    requests: dict[str, jax.ShapeDtypeStruct | None] = {}
    for name, approximate in values.items():
        target = approximate.value
        requests[f"{name}/codes"] = jax.ShapeDtypeStruct(
            target.shape, jnp.int8, sharding=target.sharding
        )
        requests[f"{name}/scales"] = None  # small: every device may see all of them
    found = ckpt.io.read_slices(merged_prefix, requests)
    return {
        name: Approximate(
            jax.jit(dequantize, out_shardings=approximate.value.sharding)(
                found[f"{name}/codes"], found[f"{name}/scales"]
            )
        )
        for name, approximate in values.items()
    }


def register() -> None:
    """Makes the saver known; a checkpoint refers to it as "Examples.Approximate"."""
    # The default saver saves nothing of an `Approximate`, which therefore has no children.
    ckpt.register_view(Approximate, children=lambda obj: {}, rebuild=lambda obj, children: obj)
    ckpt.register_checkpoint_saver(
        package="Examples",
        name="Approximate",
        predicate=lambda obj: isinstance(obj, Approximate),
        save_fn=save_quantized,
        restore_fn=restore_quantized,
    )


# The program that uses it ----------------------------------------------------------------

OPTIMIZER = optax.adam(1e-3)
State = dict[str, Any]  # params and the optimizer's opt_state


def wrap(state: State) -> State:
    """A state, real or abstract, whose first moments may lose precision."""
    adam, *others = state["opt_state"]
    moments = jax.tree.map(Approximate, adam.mu)
    return {**state, "opt_state": (adam._replace(mu=moments), *others)}


def unwrap(state: State) -> State:
    """The inverse of `wrap`."""
    adam, *others = state["opt_state"]
    moments = jax.tree.map(lambda moment: moment.value, adam.mu)
    return {**state, "opt_state": (adam._replace(mu=moments), *others)}


def create() -> State:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (WIDTH, WIDTH), "hidden": (WIDTH, WIDTH), "out": (WIDTH, WIDTH // 4 + 1)}
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"params": params, "opt_state": OPTIMIZER.init(params)}


def abstract(mesh_shape: tuple[int, int]) -> State:
    """The state as `jax.ShapeDtypeStruct`s on a mesh, matrices split over both axes if they can."""
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), (AxisType.Auto, AxisType.Auto))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        split = leaf.ndim == 2 and leaf.shape[1] % mesh_shape[1] == 0
        spec = P("data", "model") if split else P("data") if leaf.ndim == 2 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(create))


@functools.partial(jax.jit, static_argnames="steps")
def train(state: State, steps: int) -> tuple[State, jax.Array]:
    """Some steps on fixed data; returns the new state and the last loss."""
    x = jax.random.normal(jax.random.key(1), (64, WIDTH))
    y = jnp.sin(3.0 * x[:, : WIDTH // 4 + 1])

    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["hidden"])
        return jnp.mean((hidden @ params["out"] - y) ** 2)

    def step(state: State, _: None) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = OPTIMIZER.update(gradients, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, loss

    state, losses = jax.lax.scan(step, state, length=steps)
    return state, losses[-1]


# The demonstration -----------------------------------------------------------------------


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    register()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract((4, 2)))
    state, _ = train(jax.jit(create, out_shardings=shardings)(), STEPS)
    state = jax.device_put(state, shardings)
    target = abstract((2, 4))

    with tempfile.TemporaryDirectory() as directory:
        exact_path = ckpt.save(pathlib.Path(directory) / "exact", state)
        small_path = ckpt.save(pathlib.Path(directory) / "small", wrap(state))
        exact = ckpt.restore(exact_path, target)
        small = unwrap(ckpt.restore(small_path, wrap(target)))
        sizes = {path: kib_on_disk(path) for path in (exact_path, small_path)}

    error = max(jax.tree.leaves(jax.tree.map(largest_error, moments(state), moments(small))))
    (_, exact_loss), (_, small_loss) = train(exact, STEPS), train(small, STEPS)
    print("first moment      on disk  largest error  loss later")
    print(f"default saver  {sizes[exact_path]:>7} KiB  {0.0:>13.4f}  {exact_loss:>10.7f}")
    print(f"8 bits         {sizes[small_path]:>7} KiB  {error:>13.4f}  {small_loss:>10.7f}")
    print("(errors are fractions of the largest magnitude in their block)")

    kept = sum(leaf.size for leaf in jax.tree.leaves(moments(state))) * 4 // 1024  # in KiB
    saved = sizes[exact_path] - sizes[small_path]
    checks = {
        "the moments take about a quarter": 0.7 * kept < saved < 0.75 * kept,
        "no error exceeds half a step": 0.0 < error <= 0.5 / LEVELS * 1.001,
        "parameters and second moments are bit-equal": same(without_mu(small), without_mu(state)),
        "everything lies on the other mesh": jax.tree.map(lambda leaf: leaf.sharding, small)
        == jax.tree.map(lambda leaf: leaf.sharding, target),
        "training continues with about the same loss": abs(exact_loss - small_loss)
        < 0.02 * exact_loss,
    }
    for check, passed in checks.items():
        print("ok    " if passed else "FAILED", check)
    return 0 if all(checks.values()) else 1


def kib_on_disk(directory: str) -> int:
    """The size of all files below a directory."""
    files = (pathlib.Path(path, name) for path, _, names in os.walk(directory) for name in names)
    return sum(file.stat().st_size for file in files) // 1024


def moments(state: State) -> dict[str, jax.Array]:
    return state["opt_state"][0].mu


def without_mu(state: State) -> Any:
    adam, *others = state["opt_state"]
    return state["params"], adam._replace(mu=None), others


def largest_error(a: jax.Array, b: jax.Array) -> float:
    """The largest difference, as a fraction of the largest magnitude in its block of `a`."""
    a, b = (in_blocks(np.asarray(x)) for x in (a, b))
    return float(jnp.max(jnp.abs(a - b) / jnp.max(jnp.abs(a), axis=-1, keepdims=True)))


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


if __name__ == "__main__":
    sys.exit(main())
