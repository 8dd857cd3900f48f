"""Train, save with functions, and serve in a program that has neither Flax nor the model's code.

The trainer is a program with an `nnx.Module` and an optimizer. It saves the model together with two
functions, for any size of batch and for several platforms. The server is a process of its own that
imports JAX and this library alone. It loads one function with the values that the function needs,
placed over all its devices. Then the trainer trains on, and the server takes the newer values.

    python examples/serve_without_code.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np

import ckpt_jax as ckpt

CENTERS = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) * 2


def points(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points around the centers, and the number of the center of each."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CENTERS), count)
    return CENTERS[labels] + rng.normal(size=(count, 8)).astype(np.float32), labels


# --- the trainer -----------------------------------------------------------------------


def train(directory: str) -> None:
    import optax
    from flax import nnx

    class Classifier(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(8, 64, rngs=rngs)
            self.norm = nnx.BatchNorm(64, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.out = nnx.Linear(64, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(self.drop(nnx.relu(self.norm(self.hidden(x)))))

    def predict(model: Classifier, x: jax.Array) -> dict[str, jax.Array]:
        model.eval()  # the function has a copy of the model
        logits = model(x)
        return {"label": jnp.argmax(logits, -1), "probability": jax.nn.softmax(logits).max(-1)}

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(model: Classifier) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 8"), jnp.float32)
    for number in range(40):
        step(model, optimizer, *points(number, 64))
        if number == 3:
            ckpt.save_object(
                model,
                f"{directory}/model",
                functions={
                    "predict": (predict, batch),
                    "embed": (lambda model, x: nnx.relu(model.hidden(x)), batch),
                },
                platforms=("cpu", "cuda", "tpu"),
            )
    checkpoint.save(f"{directory}/run/ckpt")


# --- the server ------------------------------------------------------------------------


def serve(directory: str) -> None:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("model",))

    def placed(path: str, struct: jax.ShapeDtypeStruct) -> NamedSharding:
        """The wide axis of each array lies on all devices."""
        names = ["model" if size == 64 else None for size in struct.shape]
        return NamedSharding(mesh, PartitionSpec(*names))

    predict = ckpt.load_function(f"{directory}/model", "predict", sharding=placed)
    print(predict.signature)
    x, labels = points(1000, 500)

    def accuracy(function: ckpt.LoadedFunction) -> float:
        return float(np.mean(function(x)["label"] == labels))

    early = accuracy(predict)
    newer = predict.with_weights(
        ckpt.latest_checkpoint(f"{directory}/run"), rename=[("model/**", "**")], sharding=placed
    )
    print(f"accuracy {early:.2f} with the values that were saved, {accuracy(newer):.2f} with newer")
    check("the newer values are better", accuracy(newer) > max(early, 0.9))
    check("one point is served as well as 500", predict(x[:1])["label"].shape == (1,))
    known = sorted({name.partition(".")[0] for name in sys.modules} & {"flax", "optax"})
    check("neither Flax nor optax was imported", not known)


def check(what: str, holds: bool) -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)


def main() -> None:
    if len(sys.argv) == 3:
        {"train": train, "serve": serve}[sys.argv[1]](sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as directory:
        for role in ("train", "serve"):
            subprocess.run([sys.executable, __file__, role, directory], check=True)


if __name__ == "__main__":
    main()
