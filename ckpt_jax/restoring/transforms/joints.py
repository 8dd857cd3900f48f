"""Transforms that make one value of several along an axis, or several of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import Operation
from ckpt_jax.restoring.transforms.kinds import (
    Joining,
    Parting,
    Parts,
    Specs,
    alike,
    axis_of,
    nothing,
    only,
    rank_of,
    require_array,
    reshaped,
    sizes_of,
    with_length,
)
from ckpt_jax.restoring.transforms.regions import Slice


@dataclass(frozen=True, slots=True)
class Stack(Joining):
    """Stacks the values that a rename rule gives one name: `layers_0`, `layers_1`, ... to `layers`.

    One wildcard of the saved pattern has no counterpart in the target pattern. It matches a number,
    which is the position along the new axis. The numbers need not begin at 0, but a gap or a
    number that appears twice is an error. Without such a wildcard, the values of a tuple of
    patterns are stacked.

    Args:
      axis: the new axis of the result, along which the values are stacked; may be negative.
      index: which wildcard of the saved pattern matches the number, counted from 0. It is needed
        only if several could.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {f"h_{i}": np.full(2, i) for i in range(3)})
      ...     rules = [("h_*", "h", ckpt.Stack())]
      ...     ckpt.restore(path, {"h": np.zeros((3, 2), int)}, rename=rules)
      {'h': array([[0, 0], [1, 1], [2, 2]])}
    """

    axis: int = 0
    index: int | None = None

    def spec(self, specs: Specs) -> LeafSpec:
        first = specs[0]
        require_array(first, self)
        odd = next((spec for spec in specs if not alike(spec, first)), None)
        if odd is not None:
            raise ValueError(f"{self} needs values of one kind, and found {first} and {odd}")
        rank = rank_of(first) + 1
        if not -rank <= self.axis < rank:
            raise ValueError(f"{self}: a stack of {first} has no axis {self.axis}")
        axis = self.axis % rank
        return reshaped(first, (*first.shape[:axis], len(specs), *first.shape[axis:]))

    def _axis(self, specs: Specs) -> int:
        return self.axis % (rank_of(specs[0]) + 1)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box | None]:
        axis = self._axis(specs)
        (start, stop), inner = box[axis], (*box[:axis], *box[axis + 1 :])
        return [inner if start <= i < stop else None for i in range(len(specs))]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        found = [part for part in parts if part is not None]
        return np.stack(found, self._axis(specs)) if found else nothing(box, specs)

    def inverse(self) -> Unstack:
        return Unstack(self.axis, self.index)


@dataclass(frozen=True, slots=True)
class Concat(Joining):
    """Joins the values that a rename rule gives one name along an axis that they have.

    They are those of a tuple of patterns, in its order. Or they are numbered by a wildcard, as
    those for `Stack` are: shards of one array.

    Args:
      axis: along which they are joined; may be negative.
      sizes: how long each of them is along the axis, which is only needed for the inverse.
      index: which wildcard of the saved pattern matches the number, if several could.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"k": np.arange(2), "v": np.arange(3)})
      ...     rules = [(("k", "v"), "kv", ckpt.Concat(axis=0))]
      ...     ckpt.restore(path, {"kv": np.zeros(5, int)}, rename=rules)
      {'kv': array([0, 1, 0, 1, 2])}
    """

    axis: int = 0
    sizes: tuple[int, ...] | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None:
            object.__setattr__(self, "sizes", sizes_of(self.sizes, self))

    def spec(self, specs: Specs) -> LeafSpec:
        first, axis = specs[0], axis_of(specs[0], self.axis, self)
        unlike = [
            spec
            for spec in specs
            if not alike(with_length(spec, axis, 1), with_length(first, axis, 1))
        ]
        if unlike:
            raise ValueError(
                f"{self} needs values that differ along axis {axis} alone, and found {first} and "
                f"{unlike[0]}"
            )
        lengths = tuple([spec.shape[axis] for spec in specs])
        if self.sizes is not None and lengths != self.sizes:
            raise ValueError(f"{self}: the values have lengths {lengths} along axis {axis}")
        return with_length(first, axis, sum(lengths))

    def _places(self, box: Box, specs: Specs) -> list[tuple[int, int] | None]:
        """The interval that is needed of each value, along the axis."""
        axis = axis_of(specs[0], self.axis, self)
        (start, stop), at, found = box[axis], 0, []
        for spec in specs:
            n = spec.shape[axis]
            a, b = max(start - at, 0), min(stop - at, n)
            found.append((a, b) if a < b else None)
            at += n
        return found

    def pull(self, box: Box, specs: Specs) -> Sequence[Box | None]:
        axis = axis_of(specs[0], self.axis, self)
        return [
            None if place is None else (*box[:axis], place, *box[axis + 1 :])
            for place in self._places(box, specs)
        ]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        found = [part for part in parts if part is not None]
        axis = axis_of(specs[0], self.axis, self)
        if len(found) == 1:
            return found[0]
        return np.concatenate(found, axis) if found else nothing(box, specs)

    def inverse(self) -> Split:
        if self.sizes is None:
            raise ValueError(
                f"{self} has an inverse only if it says how long the values are: "
                "Concat(axis, sizes)"
            )
        return Split(self.axis, self.sizes, self.index)


@dataclass(frozen=True, slots=True)
class Unstack(Parting):
    """Takes apart a value that a rename rule moves: `layers` to `layers_0`, `layers_1`, ...

    One wildcard of the target pattern has no counterpart in the saved pattern. It stands for the
    position along the axis. Without such a wildcard, the target is a tuple of patterns. Only the
    parts that the target needs are read.

    Args:
      axis: the axis of the saved value along which it is taken apart; may be negative.
      index: which wildcard of the target pattern stands for the position, counted from 0. It is
        needed only if several could.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"h": np.arange(4).reshape(2, 2)})
      ...     target = {"h_0": np.zeros(2, int), "h_1": np.zeros(2, int)}
      ...     ckpt.restore(path, target, rename=[("h", "h_*", ckpt.Unstack())])
      {'h_0': array([0, 1]), 'h_1': array([2, 3])}
    """

    axis: int = 0
    index: int | None = None

    def pieces(self, spec: LeafSpec, count: int | None) -> tuple[Operation, ...]:
        axis = axis_of(spec, self.axis, self)
        if count is not None and count != spec.shape[axis]:
            raise ValueError(f"{self}: {spec} does not have {count} positions along the axis")
        return tuple([Take(axis, position) for position in range(spec.shape[axis])])

    def inverse(self) -> Stack:
        return Stack(self.axis, self.index)


@dataclass(frozen=True, slots=True)
class Split(Parting):
    """Cuts a value that a rename rule moves into several along an axis.

    Only what is needed is read.
    The target is a tuple of patterns, one for each part. Or one wildcard of the target pattern
    stands for the number of the part; then `sizes` says how many there are.

    Args:
      axis: the axis that is cut; may be negative.
      sizes: how long the parts are; by default they are equally long.
      index: which wildcard of the target pattern stands for the number, if several could.

    Source: `numpy.split`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"kv": np.arange(5)})
      ...     rules = [("kv", ("k", "v"), ckpt.Split(axis=0, sizes=(2, 3)))]
      ...     ckpt.restore(path, {"k": np.zeros(2, int), "v": np.zeros(3, int)}, rename=rules)
      {'k': array([0, 1]), 'v': array([2, 3, 4])}
    """

    axis: int = 0
    sizes: tuple[int, ...] | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None:
            object.__setattr__(self, "sizes", sizes_of(self.sizes, self))

    def pieces(self, spec: LeafSpec, count: int | None) -> tuple[Operation, ...]:
        axis = axis_of(spec, self.axis, self)
        length, sizes = spec.shape[axis], self.sizes
        if sizes is None:
            if count is None:
                raise ValueError(f"{self}: say how many parts there are: Split(axis, sizes)")
            if length % count:
                raise ValueError(f"{self}: {spec} cannot be cut into {count} equal parts")
            sizes = (length // count,) * count
        if sum(sizes) != length:
            raise ValueError(f"{self}: the sizes add up to {sum(sizes)}, and found {spec}")
        if count is not None and count != len(sizes):
            raise ValueError(f"{self} has {len(sizes)} sizes for {count} patterns")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(
            [
                Slice((*[None] * axis, (start, start + size)))
                for start, size in zip(starts, sizes, strict=True)
            ]
        )

    def inverse(self) -> Concat:
        return Concat(self.axis, self.sizes, self.index)


@dataclass(frozen=True, slots=True)
class Take(Operation):
    """Takes one position along an axis: one of the values that `Unstack` makes."""

    axis: int
    position: int

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        shape = (*spec.shape[: self.axis], *spec.shape[self.axis + 1 :])
        return replace(spec, shape=shape, weak_type=False)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        here = (self.position, self.position + 1)
        return [(*box[: self.axis], here, *box[self.axis :])]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        return only(parts).squeeze(self.axis)
