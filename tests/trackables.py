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


class Mirrored(ckpt.Trackable):
    """Two variables that are saved as one value."""

    def __init__(self, start):
        self.copies = [ckpt.Variable(jnp.float32(start)) for _ in range(2)]

    def assign(self, value):
        for variable in self.copies:
            variable.assign(jnp.float32(value))

    def serialize_to_arrays(self):
        return {"value": self.copies[0].value}

    def restore_from_arrays(self, arrays):
        self.assign(arrays["value"])


class Values(ckpt.Trackable):
    """Its own named values, as many as a test gives."""

    def __init__(self, **values):
        self.own = {name: jnp.float32(x) for name, x in values.items()}

    def serialize_to_arrays(self):
        return dict(self.own)

    def restore_from_arrays(self, arrays):
        self.own = {name: arrays[name] for name in self.own}


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
