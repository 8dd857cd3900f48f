"""Go on training a Keras model in Flax, from the checkpoint that TensorFlow wrote.

The folder `keras/run` is that of a `tf.train.Checkpoint` with a Keras model, its Adam and a step;
`keras/train.py` wrote it. It is restored through its object graph into an `nnx` module, an
`nnx.Optimizer` and a number. TensorFlow is not needed. Rules say what Keras calls the weights; the
moments of Adam follow their weights. Training then goes on with the losses that Keras had when it
went on itself, and saves go to a folder of this program. The program exits with 1 if anything
differs.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ckpt_jax as ckpt

KERAS = pathlib.Path(__file__).parent / "keras"

# What Keras calls its weights: `_operations` are the layers of a functional model, 0 is its input.
RULES = [
    ("model/_operations/1/_kernel", "model/hidden/kernel"),
    ("model/_operations/1/bias", "model/hidden/bias"),
    ("model/_operations/2/_kernel", "model/logits/kernel"),
    ("model/_operations/2/bias", "model/logits/bias"),
]


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.logits = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits(nnx.tanh(self.hidden(x)))


def create() -> ckpt.Checkpoint:
    """A new model with its optimizer and its step."""
    model = Perceptron(nnx.Rngs(1))
    # The epsilon is Keras's default.
    optimizer = nnx.Optimizer(model, optax.adam(0.02, eps=1e-7), wrt=nnx.Param)
    return ckpt.Checkpoint(model=model, optimizer=optimizer, step=0)


@nnx.jit
def train_step(model: Perceptron, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def train(checkpoint: ckpt.Checkpoint, steps: int) -> list[float]:
    x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)
    losses = []
    for _ in range(steps):
        loss = train_step(checkpoint.model, checkpoint.optimizer, jnp.asarray(x), jnp.asarray(y))
        losses.append(float(loss))
        checkpoint.step += 1
    return losses


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    theirs = json.loads((KERAS / "losses.json").read_text())
    path = ckpt.latest_checkpoint(KERAS / "run")

    checkpoint = create()
    status = checkpoint.restore(path, rename=RULES)
    print(status.report.table(limit=6))
    # All that this program has comes from the checkpoint. The learning rate has no place here.
    status.assert_existing_objects_matched().expect_partial()
    unused = [entry.path for entry in status.report.unexpected]
    at = checkpoint.step

    with tempfile.TemporaryDirectory() as directory:
        half = len(theirs) // 2
        ours = train(checkpoint, half)
        checkpoint.save(pathlib.Path(directory) / "ckpt")  # from here on, in our own format
        resumed = create()
        resumed.restore(ckpt.latest_checkpoint(directory)).assert_consumed()
        ours += train(resumed, len(theirs) - half)

        # And back again: tf.train.Checkpoint.restore reads this, under the names of Keras.
        back = [(ours_, theirs_) for theirs_, ours_ in RULES]
        again = ckpt.export(
            {"model": resumed.model},
            pathlib.Path(directory) / "back",
            format="tensorflow",
            rename=back,
        )
        keys = [key for key, _ in ckpt.list_variables(again)]

    print(f"\nstep  {at}  {at + half}  {at + len(theirs)}")
    print(f"Keras {theirs[0]:.4f} {theirs[half]:.4f} {theirs[-1]:.4f}")
    print(f"Flax  {ours[0]:.4f} {ours[half]:.4f} {ours[-1]:.4f}")
    checks = {
        "it goes on at the step at which Keras saved": at == 60,
        "everything but the learning rate has a place": unused == ["optimizer/_learning_rate"],
        "the losses are those of Keras": np.allclose(ours, theirs, rtol=1e-4),
        "the weights go back under the names of Keras": all("_operations" in key for key in keys),
    }
    for check, holds in checks.items():
        print("ok    " if holds else "FAILED", check)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
