"""Objects that tests save and restore."""

import numpy as np

import ckpt_jax as ckpt


class Model(ckpt.AutoTrackable):
    """Takes its attributes from a test."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


def var(value):
    return ckpt.Variable(np.asarray(value, np.float32))


def value(variable):
    return np.asarray(variable.value).tolist()
