"""Objects that tests save and restore."""

import jax.numpy as jnp
import numpy as np

import ckpt_jax as ckpt


class Model(ckpt.AutoTrackable):
    """Takes its attributes from a test."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


class Position(ckpt.PythonState):
    """State of a program that is a number."""

    def __init__(self, index=0):
        self.index = index

    def serialize(self):
        return str(self.index)

    def deserialize(self, value):
        self.index = int(value)


class Pair(ckpt.Trackable):
    """Two named values in one object."""

    def __init__(self, v1=0.0, v2=0.0):
        self.v1, self.v2 = jnp.float32(v1), jnp.float32(v2)

    def serialize_to_arrays(self):
        return {"v1": self.v1, "v2": self.v2}

    def restore_from_arrays(self, arrays):
        self.v1, self.v2 = arrays["v1"], arrays["v2"]


class Optimizer(ckpt.AutoTrackable):
    """Keeps a slot "m" for each variable it is given."""

    def __init__(self, rate, *variables, value=0.0):
        self.rate = ckpt.Variable(rate)
        self.state = ckpt.NoDependency({("m", v): var(value) for v in variables})

    def slots(self):
        return self.state


def var(value):
    return ckpt.Variable(np.asarray(value, np.float32))


def value(variable):
    return np.asarray(variable.value).tolist()
