"""Save a Linen `TrainState` on one mesh and continue from it on another.

A multilayer perceptron fits the XOR of two inputs' signs. Its `TrainState` is split over
a 4 x 2 mesh of virtual CPU devices, saved halfway, and restored on a 2 x 4 mesh into an
abstract state: shapes, dtypes and the new shardings, but no arrays. Training then goes on
there, and ends with the state of a run that never stopped. The program exits with 1 if it does not.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(64, name="hidden")(x))
        return nn.Dense(2, name="logits")(x)


# A `TrainState` compares its functions by identity, so all states must share these two.
MODEL, OPTIMIZER = Perceptron(), optax.adamw(1e-2)


def create() -> TrainState:
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=OPTIMIZER)


def abstract(mesh_shape: tuple[int, int]) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, with the hidden layer split over 'model'."""
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), (AxisType.Auto, AxisType.Auto))
    specs = {"hidden/kernel": P(None, "model"), "logits/kernel": P("model", None)}

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path[-2:], simple=True, separator="/")
        sharding = NamedSharding(mesh, specs.get(name, P()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(place, jax.eval_shape(create))


@jax.jit
def train_step(state: TrainState) -> tuple[TrainState, jax.Array]:
    """One step on a batch that depends only on `state.step`; returns the new state and the loss."""
    x = jax.random.normal(jax.random.key(state.step), (256, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


def train(state: TrainState, stop: int) -> tuple[TrainState, float]:
    loss = jnp.nan
    while state.step < stop:
        state, loss = train_step(state)
    return state, float(loss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="half of them before the save")
    steps = parser.parse_args().steps
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract((4, 2)))
    halfway, loss = train(jax.device_put(create(), shardings), steps // 2)

    with tempfile.TemporaryDirectory() as directory:
        path = ckpt.Checkpoint(state=halfway).save(pathlib.Path(directory) / "ckpt")
        checkpoint = ckpt.Checkpoint(state=abstract((2, 4)))
        with checkpoint.restore(path):
            pass  # leaving the block asserts that the checkpoint and the state match fully
        restored = checkpoint.state

        # Any part can be read without a target and without the classes of the saved objects.
        params = ckpt.load(path, only="state/params/**")["state"]["params"]

    resumed, resumed_loss = train(restored, steps)
    unbroken, unbroken_loss = train(halfway, steps)
    print("run            mesh    steps     loss")
    print(f"saved          4 x 2  {halfway.step:>5}  {loss:.5f}")
    print(f"resumed        2 x 4  {resumed.step:>5}  {resumed_loss:.5f}")
    print(f"uninterrupted  4 x 2  {unbroken.step:>5}  {unbroken_loss:.5f}")

    checks = {
        "restored on 2 x 4": restored.params["hidden"]["kernel"].sharding.mesh.axis_sizes == (2, 4),
        "restored bit for bit": same(restored, halfway),
        "loaded bit for bit": same(params, halfway.params),
        "resumed as if uninterrupted": same(resumed, unbroken, tolerance=1e-5),
    }
    for check, holds in checks.items():
        print("ok    " if holds else "FAILED", check)
    return 0 if all(checks.values()) else 1


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Whether two states have the same leaves, up to a tolerance."""
    close = jax.tree.map(lambda x, y: np.allclose(x, y, rtol=0.0, atol=tolerance), a, b)
    return all(jax.tree.leaves(close))


if __name__ == "__main__":
    sys.exit(main())
