"""Assigning is all or nothing, as far as the program's own code can take values back."""

import jax.numpy as jnp
import numpy as np
import pytest
from trackables import Model, Position, value, var

import ckpt_jax as ckpt


class Careful(Position):
    """Refuses some positions, after it has changed."""

    def deserialize(self, value):
        self.index = -1
        if int(value) in self.refused:
            raise RuntimeError("refused")
        self.index = int(value)

    refused = (1,)


class Never(Careful):
    refused = (0, 1)


class Arrays(ckpt.Trackable):
    """Takes arrays in place."""

    def __init__(self, x, *, fails=False):
        self.x, self.fails = np.full(2, x), fails

    def serialize_to_arrays(self):
        return {"x": self.x}

    def restore_from_arrays(self, arrays):
        self.x[...] = arrays["x"]
        if self.fails and arrays["x"][0]:
            raise RuntimeError("refused")


def program(x, last):
    return ckpt.Checkpoint(
        v=var(float(x)), state=Position(x), arrays=Arrays(x), w=jnp.full(1, x), z=last
    )


def contents(checkpoint):
    return (
        value(checkpoint.v),
        checkpoint.state.index,
        checkpoint.arrays.x.tolist(),
        int(checkpoint.w[0]),
    )


@pytest.mark.parametrize(
    ("saved", "failing"),
    [(Position(1), Careful(0)), (Arrays(1), Arrays(0, fails=True))],
    ids=["deserialize", "restore_from_arrays"],
)
def test_a_restore_that_raises_puts_everything_back(path, saved, failing):
    program(1, saved).write(path)
    checkpoint = program(0, failing)
    with pytest.raises(RuntimeError, match="refused") as error:
        checkpoint.read(path)
    assert not getattr(error.value, "__notes__", [])
    assert contents(checkpoint) == (0, 0, [0, 0], 0)
    assert failing.index == 0 if isinstance(failing, Careful) else not failing.x.any()


def test_an_object_that_cannot_be_put_back_is_named(path):
    program(1, Position(1)).write(path)
    checkpoint = program(0, Never(0))
    with pytest.raises(RuntimeError, match="refused") as error:
        checkpoint.read(path)
    assert error.value.__notes__ == ["Changed by this restore, and not put back: z"]
    assert contents(checkpoint) == (0, 0, [0, 0], 0)


def test_a_setter_that_raises_leaves_the_variables_as_they_were(path):
    class Picky(ckpt.AutoTrackable):
        def __init__(self, x):
            self.v = var(float(x))
            self.w = jnp.full(1, x)

        @property
        def w(self):
            return self.__dict__["_w"]

        @w.setter
        def w(self, array):
            if array[0] and value(self.v) == 1 and "_w" in self.__dict__:
                raise RuntimeError("refused")
            self.__dict__["_w"] = array

    ckpt.Checkpoint(a=Picky(1), b=var(1.0)).write(path)
    checkpoint = ckpt.Checkpoint(a=Picky(0), b=var(0.0))
    with pytest.raises(RuntimeError, match="refused"):
        checkpoint.read(path)
    assert (value(checkpoint.a.v), checkpoint.a.w[0], value(checkpoint.b)) == (0, 0, 0)


def test_objects_of_registered_savers_that_ran_are_named(path):
    def save_fn(objects, prefix):
        return ckpt.io.write_shard(prefix, {name: o.table for name, o in objects.items()})

    def restore_fn(objects, prefix):
        for name, table in ckpt.io.read_slices(prefix, dict.fromkeys(objects)).items():
            objects[name].table = table

    def is_table(obj):
        return hasattr(obj, "table")

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Table", predicate=is_table, save_fn=save_fn, restore_fn=restore_fn
        )
        ckpt.Checkpoint(t=Model(table=np.ones(1)), z=Position(1)).write(path)
        checkpoint = ckpt.Checkpoint(t=Model(table=np.zeros(1)), z=Careful(0))
        with pytest.raises(RuntimeError, match="refused") as error:
            checkpoint.read(path)
    assert error.value.__notes__ == ["Changed by this restore, and not put back: t"]
    assert checkpoint.z.index == 0
