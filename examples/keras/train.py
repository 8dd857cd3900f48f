"""Writes the checkpoint of this folder: a Keras model, its Adam, and a step, after 60 steps.

    python train.py     needs tensorflow with Keras 3

It trains on for 20 more steps, and notes the losses in `losses.json`. A program that continues from
the checkpoint has to come to the same losses.
"""

import json
import os
import pathlib

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

HERE = pathlib.Path(__file__).parent


def main():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)

    inputs = keras.Input((2,))
    hidden = keras.layers.Dense(32, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(hidden))
    optimizer = keras.optimizers.Adam(0.02)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(steps):
        losses = []
        for _ in range(steps):
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model(x))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            losses.append(float(loss))
        return losses

    train(60)
    step = tf.Variable(60, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, step=step)
    checkpoint.save(str(HERE / "run" / "ckpt"))
    (HERE / "losses.json").write_text(json.dumps(train(20)) + "\n")


if __name__ == "__main__":
    main()
