"""Transforms: the steps of a rename rule that change the values that it moves.

A rule is (saved pattern, target pattern, *transforms), and the transforms are applied in order.
There are three kinds. An `Each` makes one value of one. A `Joining` makes one value of several, and
a `Parting` several values of one. The first two are operations of formulas (see `formulas`), so
that a box of the outcome is made of just the boxes that it needs, if the transform allows that.

Transforms have *inverses*, if nothing is lost and what the inverse needs is known, so that one
table of rules leads both ways (see `inverses`).
"""

from ckpt_jax.restoring.transforms.axes import Reshape, Transpose
from ckpt_jax.restoring.transforms.elements import Cast, Dequantize, Map
from ckpt_jax.restoring.transforms.joints import Concat, Split, Stack, Take, Unstack
from ckpt_jax.restoring.transforms.kinds import Each, Joining, Parting, Transform
from ckpt_jax.restoring.transforms.regions import Pad, Slice

__all__ = [
    "Cast",
    "Concat",
    "Dequantize",
    "Each",
    "Joining",
    "Map",
    "Pad",
    "Parting",
    "Reshape",
    "Slice",
    "Split",
    "Stack",
    "Take",
    "Transform",
    "Transpose",
    "Unstack",
]
