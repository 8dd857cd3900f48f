"""Transforms of regions: more elements around an array, or a part of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_jax.graph.boxes import Box, intersect, relative, shape_of, slices
from ckpt_jax.graph.dtypes import converted, dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import ANY_DTYPE
from ckpt_jax.restoring.transforms.kinds import (
    Each,
    Parts,
    Specs,
    Transform,
    only,
    rank_of,
    require_array,
    reshaped,
)


@dataclass(frozen=True, slots=True)
class Pad(Each):
    """Adds elements around the values that a rename rule moves. Its inverse cuts them off again.

    The state that an optimizer has for the new elements is 0.

    Args:
      widths: for each axis a pair, how many elements are added before and after it. A number, or
        a single pair of numbers, is for all axes.
      value: of the new elements.

    Source: `numpy.pad`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"embedding": np.ones((2, 2), int)})
      ...     rules = [("embedding", "embedding", ckpt.Pad(((0, 1), (0, 0)), value=7))]
      ...     ckpt.restore(path, {"embedding": np.zeros((3, 2), int)}, rename=rules)
      {'embedding': array([[1, 1], [1, 1], [7, 7]])}
    """

    widths: Any
    value: complex = 0

    def __post_init__(self) -> None:
        given: Any = self.widths
        if isinstance(given, int):
            given = (given, given)
        is_pair = isinstance(given, tuple | list) and all(isinstance(n, int) for n in given)
        try:
            pairs = [given] if is_pair else given
            found = tuple([(operator.index(a), operator.index(b)) for a, b in pairs])
        except (TypeError, ValueError):
            found = ((-1, -1),)
        if any(min(pair) < 0 for pair in found):
            what = f"expected pairs (before, after) of numbers from 0, got {self.widths!r}"
            raise ValueError(f"Pad: {what}")
        object.__setattr__(self, "widths", found[0] if is_pair else found)

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        require_array(spec, self)
        if spec.is_key:
            raise ValueError(f"{self} has no value for new PRNG keys")
        widths = self._all(spec)
        if len(widths) != len(spec.shape):
            raise ValueError(f"{self} has widths for {len(widths)} axes, and found {spec}")
        if spec.dtype != ANY_DTYPE:
            try:
                converted(np.asarray(self.value), dtype_of(spec.dtype))
            except (OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"{self}: the value does not fit into {spec}") from error
        lengths = zip(spec.shape, widths, strict=True)
        return reshaped(spec, tuple([n + a + b for n, (a, b) in lengths]))

    def _all(self, spec: LeafSpec) -> tuple[tuple[int, int], ...]:
        return (self.widths,) * len(spec.shape) if self._is_for_all else self.widths

    @property
    def _is_for_all(self) -> bool:
        """Whether there is one pair, for all axes."""
        return all(isinstance(each, int) for each in self.widths)

    def _inner(self, spec: LeafSpec) -> Box:
        """Where the elements lie that there were before."""
        lengths = zip(spec.shape, self._all(spec), strict=True)
        return tuple([(a, a + n) for n, (a, _) in lengths])

    def pull(self, box: Box, specs: Specs) -> Sequence[Box | None]:
        inner = self._inner(specs[0])
        common = intersect(box, inner)
        return [None if common is None else relative(common, inner)]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        (part,) = parts
        dtype = dtype_of(specs[0].dtype) if part is None else part.dtype
        result = np.full(shape_of(box), converted(np.asarray(self.value), dtype))
        common = intersect(box, self._inner(specs[0]))
        if part is not None and common is not None:
            result[slices(common, box)] = part
        return result

    def for_slot(self) -> Pad:
        return Pad(self.widths)

    def inverse(self) -> Slice:
        if self._is_for_all:
            raise ValueError(f"{self}: to have an inverse, give the widths of each axis")
        return Slice(tuple([(a, -b if b else None) for a, b in self.widths]))


@dataclass(frozen=True, slots=True)
class Slice(Each):
    """Takes a part of the values that a rename rule moves; only its bytes are read.

    Not to be confused with `ckpt.io.Slice`, which is a part of an array that a saver writes.

    Args:
      box: for each axis (start, stop), or None for the whole axis. As in Python, None is an end of
        the axis and negative numbers are counted from the end. Axes that are not given are whole.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.arange(10)})
      ...     rules = [("w", "w", ckpt.Slice([(2, 5)]))]
      ...     ckpt.restore(path, {"w": np.zeros(3, int)}, rename=rules)
      {'w': array([2, 3, 4])}
    """

    box: tuple[tuple[int | None, int | None] | None, ...]

    def __post_init__(self) -> None:
        try:
            found = tuple(map(_bounds, self.box))
        except (TypeError, ValueError):
            what = f"expected a pair (start, stop) for each axis, got {self.box!r}"
            raise ValueError(f"Slice: {what}") from None
        object.__setattr__(self, "box", found)

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        require_array(spec, self)
        return reshaped(spec, shape_of(self._box(spec)))

    def _box(self, spec: LeafSpec) -> Box:
        """The box as numbers from 0."""
        if len(self.box) > rank_of(spec):
            raise ValueError(f"{self} has {len(self.box)} axes, and found {spec}")
        found = []
        for axis, n in enumerate(spec.shape):
            start, stop = (self.box[axis] if axis < len(self.box) else None) or (0, n)
            start, stop = 0 if start is None else start, n if stop is None else stop
            start, stop = start + n * (start < 0), stop + n * (stop < 0)
            if not 0 <= start <= stop <= n:
                raise ValueError(f"{self}: {self.box[axis]} does not lie in axis {axis} of {spec}")
            found.append((start, stop))
        return tuple(found)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        return [_shifted(box, self._box(specs[0]))]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        return only(parts)

    def inverse(self) -> Transform:
        raise ValueError(f"{self} has no inverse: what it leaves out is lost")


def _bounds(given: Any) -> tuple[int | None, int | None] | None:
    if given is None:
        return None
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise ValueError("a step")
        given = (given.start, given.stop)
    start, stop = given
    return (
        None if start is None else operator.index(start),
        None if stop is None else operator.index(stop),
    )


def _shifted(box: Box, origin: Box) -> Box:
    """A box that is given in the coordinates of the box `origin`."""
    pairs = zip(box, origin, strict=True)
    return tuple([(start + first, stop + first) for (start, stop), (first, _) in pairs])
