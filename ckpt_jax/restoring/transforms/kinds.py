"""What transforms of rename rules have in common: their three kinds, and questions about specs."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import ANY_DTYPE, Operation

Specs = Sequence[LeafSpec]
Parts = Sequence[np.ndarray | None]


class Transform(ABC):
    """A step of a rename rule."""

    __slots__ = ()

    @abstractmethod
    def inverse(self) -> Transform | None:
        """The step that undoes this one; None if there is nothing to undo.

        Raises:
          ValueError: there is none; says why, and what to do.
        """


class Each(Transform, Operation):
    """Makes one value of one."""

    __slots__ = ()


class Joining(Transform, Operation):
    """Makes one value of several."""

    __slots__ = ()


class Parting(Transform):
    """Makes several values of one."""

    __slots__ = ()

    @abstractmethod
    def pieces(self, spec: LeafSpec, count: int | None) -> tuple[Operation, ...]:
        """The operations that make each of the values.

        Args:
          spec: of the value.
          count: how many there have to be, if that is known.

        Raises:
          ValueError: saying why it cannot be taken apart.
        """


def rank_of(spec: LeafSpec) -> int:
    """The number of axes that a program sees; the data of a PRNG key has one more."""
    return len(spec.shape) - spec.is_key


def only(parts: Parts) -> np.ndarray:
    (part,) = parts
    assert part is not None
    return part


def nothing(box: Box, specs: Specs) -> np.ndarray:
    """An empty box of a value of which nothing is read."""
    dtype = specs[0].dtype
    return np.empty(shape_of(box), np.float32 if dtype == ANY_DTYPE else dtype_of(dtype))


def alike(spec: LeafSpec, other: LeafSpec) -> bool:
    facts = [(s.shape, s.dtype, s.prng_impl, s.is_key) for s in (spec, other)]
    return facts[0] == facts[1]


def with_length(spec: LeafSpec, axis: int, length: int) -> LeafSpec:
    """The spec with another length of one axis."""
    if axis >= rank_of(spec):
        return spec
    shape = (*spec.shape[:axis], length, *spec.shape[axis + 1 :])
    return replace(spec, shape=shape, weak_type=False)


def reshaped(spec: LeafSpec, shape: tuple[int, ...]) -> LeafSpec:
    kind = "numpy" if spec.kind == "numpy_scalar" and shape else spec.kind
    return replace(spec, kind=kind, shape=shape, weak_type=False)


def axis_of(spec: LeafSpec, axis: int, transform: object) -> int:
    """An axis, counted from the front."""
    require_array(spec, transform)
    rank = rank_of(spec)
    if not -rank <= axis < rank:
        raise ValueError(f"{transform}: {spec} has no axis {axis}")
    return axis % rank


def require_array(spec: LeafSpec, transform: object) -> None:
    if not (spec.is_array or spec.is_key) or spec.is_bytes:
        raise ValueError(f"{transform} needs arrays, and found {spec}")


def sizes_of(given: Sequence[int], transform: object) -> tuple[int, ...]:
    try:
        found = tuple(map(operator.index, given))
    except TypeError:
        found = (-1,)
    if any(size < 0 for size in found):
        raise ValueError(f"{type(transform).__name__}: expected numbers from 0, got {given!r}")
    return found
