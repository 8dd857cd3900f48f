"""Writes `optimizers/`: one small checkpoint for each optimizer of each generation.

    python make_optimizers.py     needs tensorflow, keras 3 and tf_keras

Each takes three steps with the gradients of `gradients`, saves, and takes two more. The variables
that it arrives at are in `optimizers.json`. A program that goes on from the checkpoint has to
arrive there, too.
"""

import json
import os
import pathlib
import shutil

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "0"

import keras
import numpy as np
import tensorflow as tf
import tf_keras

HERE = pathlib.Path(__file__).parent
SAVED_AFTER, STEPS = 3, 5
KERNEL = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
BIAS = np.array([0.5, -0.5], np.float32)


def gradients(step):
    """The gradients of kernel and bias in a step."""
    kernel = np.cos(np.arange(6, dtype=np.float32) + step).reshape(3, 2)
    return kernel, np.sin(np.arange(2, dtype=np.float32) - step)


def keras3(make):
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    layer.set_weights([KERNEL, BIAS])
    optimizer = make(keras.optimizers)
    return layer, optimizer, [layer.kernel, layer.bias], optimizer.apply


def keras2(make, optimizers=tf_keras.optimizers):
    layer = tf_keras.layers.Dense(2)
    layer.build((None, 3))
    layer.set_weights([KERNEL, BIAS])
    optimizer = make(optimizers)

    def apply(grads, variables):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    return layer, optimizer, [layer.kernel, layer.bias], apply


def legacy(make):
    return keras2(make, tf_keras.optimizers.legacy)


def v1(make):
    module = tf.Module()
    module.kernel, module.bias = tf.Variable(KERNEL), tf.Variable(BIAS)
    optimizer = make(tf.compat.v1.train)

    def apply(grads, variables):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    return module, optimizer, [module.kernel, module.bias], apply


KERAS = {
    "adam": lambda o: o.Adam(0.1),
    "amsgrad": lambda o: o.Adam(0.1, amsgrad=True),
    "sgd": lambda o: o.SGD(0.1),
    "momentum": lambda o: o.SGD(0.1, momentum=0.9),
    "nesterov": lambda o: o.SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda o: o.RMSprop(0.1),
    "rmsprop_centered": lambda o: o.RMSprop(0.1, momentum=0.9, centered=True),
    "adagrad": lambda o: o.Adagrad(0.1),
    "adadelta": lambda o: o.Adadelta(0.1),
    "adamax": lambda o: o.Adamax(0.1),
    "nadam": lambda o: o.Nadam(0.1),
    "ftrl": lambda o: o.Ftrl(0.1),
}
NEW = {
    **KERAS,
    "adamw": lambda o: o.AdamW(0.1, weight_decay=0.01),
    "lion": lambda o: o.Lion(0.1),
    "schedule": lambda o: o.SGD(o.schedules.ExponentialDecay(0.1, 1, 0.5), momentum=0.9),
}
GENERATIONS = {
    "keras3": (keras3, {**NEW, "lamb": lambda o: o.Lamb(0.1)}),
    "keras2": (keras2, NEW),
    "legacy": (legacy, {**KERAS, "decay": lambda o: o.SGD(0.1, momentum=0.9, decay=0.1)}),
    "v1": (
        v1,
        {
            "adam": lambda o: o.AdamOptimizer(0.1),
            "momentum": lambda o: o.MomentumOptimizer(0.1, 0.9),
            "rmsprop_centered": lambda o: o.RMSPropOptimizer(0.1, momentum=0.9, centered=True),
            "adagrad": lambda o: o.AdagradOptimizer(0.1),
            "adadelta": lambda o: o.AdadeltaOptimizer(0.1, rho=0.95),
        },
    ),
}


def main():
    shutil.rmtree(HERE / "optimizers", ignore_errors=True)
    arrived = {}
    for generation, (build, kinds) in GENERATIONS.items():
        for name, make in kinds.items():
            model, optimizer, variables, apply = build(make)
            for step in range(STEPS):
                if step == SAVED_AFTER:
                    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
                    checkpoint.write(str(HERE / "optimizers" / f"{generation}_{name}"))
                apply([tf.constant(g) for g in gradients(step)], variables)
            arrived[f"{generation}_{name}"] = [np.asarray(v).tolist() for v in variables]
    (HERE / "optimizers.json").write_text(json.dumps(arrived, indent=1))


if __name__ == "__main__":
    main()
