"""Transfer learning: the trained encoder of one model goes into another, moments included.

The new model calls the encoder "backbone", its head is new, and its optimizer has another chain.
The encoder's parameters and their moments come from the checkpoint. New parameters keep their
initial values. The report says which is which.
"""

from __future__ import annotations

import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ckpt_jax as ckpt


class Encoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.second(nnx.relu(self.first(x))))


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder = Encoder(rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.encoder(x))


class Regressor(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.backbone = Encoder(rngs)
        self.regression = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.regression(self.backbone(x))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array) -> None:
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (32, 8))
    classifier = Classifier(nnx.Rngs(0))
    old = nnx.Optimizer(classifier, optax.adam(1e-2), wrt=nnx.Param)
    for _ in range(3):
        train_step(classifier, old, x)

    with tempfile.TemporaryDirectory() as directory:
        path = ckpt.Checkpoint(model=classifier, optimizer=old).save(f"{directory}/pretrained")

        # These lines are the transfer.
        model = Regressor(nnx.Rngs(1))
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
        status = checkpoint.restore(path, rename=[("model/encoder", "model/backbone")])

        print(status.expect_partial().report)

    adam = "optimizer/ScaleByAdamState"
    restored = {entry.path for entry in status.report.restored}
    assert "model/backbone/first/kernel" in restored
    assert f"{adam}.mu/model/backbone/first/kernel" in restored
    assert {entry.path for entry in status.report.missing} == {
        f"{prefix}model/regression/{name}"
        for prefix in ("", f"{adam}.mu/", f"{adam}.nu/")
        for name in ("kernel", "bias")
    }
    assert (model.backbone.first.kernel[...] == classifier.encoder.first.kernel[...]).all()
    train_step(model, optimizer, x)
    print("the encoder and its moments came along; the head is new")


if __name__ == "__main__":
    main()
