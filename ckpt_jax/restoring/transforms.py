"""Transforms: how a rename rule changes the values that it moves.

A rule is (saved pattern, target pattern, *transforms). The transforms are applied in order. Each
has three functions, so that a plan knows the outcome before a byte is read and a restore reads no
more than it needs:

* `specs` gives the specs of the output, or says why there is none.
* `pull` gives the box of the input that a box of the output needs.
* `apply` makes that box of the output from that box of the input.

A *span* (start, stop) says which of several values are needed. There are several only before a
`Stack`, which makes one value of them; otherwise the span is (0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.graph.specs import LeafSpec

ANY_DTYPE = ""  # of a value that takes the dtype of its target
Span = tuple[int, int]


class Step(Protocol):
    """One step from stored values to a renamed value."""

    def specs(self, specs: Sequence[LeafSpec]) -> list[LeafSpec]:
        """The specs of the output for inputs of these specs.

        Raises:
          ValueError: saying why such inputs cannot be transformed.
        """
        ...

    def pull(self, span: Span, box: Box) -> tuple[Span, Box]:
        """The inputs that a box of the output needs, and the box of each."""
        ...

    def apply(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The wanted part of the output, from the parts of the inputs."""
        ...


@dataclass(frozen=True, slots=True)
class Transpose(Step):
    """Permutes the axes of the values that a rename rule moves.

    Args:
      axes: for each axis of the target, the axis of the saved value. By default the order of the
        axes is reversed.

    Source: `numpy.transpose`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"weight": np.arange(6).reshape(2, 3)})
      ...     rules = [("weight", "kernel", ckpt.Transpose())]
      ...     ckpt.restore(path, {"kernel": np.zeros((3, 2), int)}, rename=rules)
      {'kernel': array([[0, 3], [1, 4], [2, 5]])}
    """

    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(self.axes))

    def specs(self, specs: Sequence[LeafSpec]) -> list[LeafSpec]:
        return [self._one(spec) for spec in specs]

    def _one(self, spec: LeafSpec) -> LeafSpec:
        _require_array(spec, self)
        rank = _rank(spec)
        axes = self.axes if self.axes is not None else tuple(reversed(range(rank)))
        if len(axes) != rank or sorted(a % rank if rank else a for a in axes) != [*range(rank)]:
            raise ValueError(f"{self} does not permute the axes of {spec}")
        shape = tuple([spec.shape[axis % rank] for axis in axes])
        return replace(spec, shape=shape + spec.shape[rank:], weak_type=False)

    def at(self, rank: int) -> Transpose:
        """The same transform with its axes written out, for values of `rank` axes."""
        axes = reversed(range(rank)) if self.axes is None else [axis % rank for axis in self.axes]
        return Transpose(tuple(axes))

    def _order(self, rank: int) -> list[int]:
        """The axes, and the further axis at the end that the data of a PRNG key has."""
        axes = self.axes or ()
        return [*axes, *range(len(axes), rank)]

    def pull(self, span: Span, box: Box) -> tuple[Span, Box]:
        order = self._order(len(box))
        return span, tuple([box[order.index(axis)] for axis in range(len(box))])

    def apply(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [part.transpose(self._order(part.ndim)) for part in parts]


@dataclass(frozen=True, slots=True)
class Cast(Step):
    """Converts the values that a rename rule moves, even if `CheckpointOptions.cast` is off.

    Args:
      dtype: to convert to; by default the dtype of the target.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.arange(3.0)})
      ...     target = {"w": np.zeros(3, np.float32)}
      ...     ckpt.restore(path, target, rename=[("w", "w", ckpt.Cast())])
      {'w': array([0., 1., 2.], dtype=float32)}
    """

    dtype: Any = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(np.dtype(self.dtype)))

    def specs(self, specs: Sequence[LeafSpec]) -> list[LeafSpec]:
        return [self._one(spec) for spec in specs]

    def _one(self, spec: LeafSpec) -> LeafSpec:
        if not (spec.is_array or spec.is_number) or spec.is_bytes:
            raise ValueError(f"{self} needs numbers, and found {spec}")
        kind = "numpy_scalar" if spec.is_number else spec.kind
        return LeafSpec(kind, self.dtype or ANY_DTYPE, spec.shape)

    def pull(self, span: Span, box: Box) -> tuple[Span, Box]:
        return span, box

    def apply(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.dtype is None:
            return list(parts)  # converted when the value is assigned to its target
        with np.errstate(over="ignore", invalid="ignore"):
            return [part.astype(dtype_of(self.dtype), copy=False) for part in parts]


@dataclass(frozen=True, slots=True)
class Stack(Step):
    """Stacks the values that a rename rule gives one name: `layers_0`, `layers_1`, ... to `layers`.

    One wildcard of the saved pattern has no counterpart in the target pattern. It matches a number,
    which is the position along the new axis. The numbers need not begin at 0, but a gap or a
    number that appears twice is an error.

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

    def specs(self, specs: Sequence[LeafSpec]) -> list[LeafSpec]:
        first = specs[0]
        _require_array(first, self)
        odd = next((spec for spec in specs if not _alike(spec, first)), None)
        if odd is not None:
            raise ValueError(f"{self} needs values of one kind, and found {first} and {odd}")
        rank = _rank(first) + 1
        if not -rank <= self.axis < rank:
            raise ValueError(f"{self}: a stack of {first} has no axis {self.axis}")
        axis = self.axis % rank
        shape = (*first.shape[:axis], len(specs), *first.shape[axis:])
        kind = "numpy" if first.kind == "numpy_scalar" else first.kind
        return [replace(first, kind=kind, shape=shape, weak_type=False)]

    def at(self, rank: int) -> Stack:
        """The same transform with its axis counted from the front, for values of `rank` axes."""
        return Stack(self.axis % (rank + 1), self.index)

    def pull(self, span: Span, box: Box) -> tuple[Span, Box]:
        return box[self.axis], (*box[: self.axis], *box[self.axis + 1 :])

    def apply(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.stack(parts, self.axis)]


@dataclass(frozen=True, slots=True)
class Unstack:
    """Takes apart a value that a rename rule moves: `layers` to `layers_0`, `layers_1`, ...

    One wildcard of the target pattern has no counterpart in the saved pattern. It stands for the
    position along the axis. Only the parts that the target needs are read.

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

    def count(self, spec: LeafSpec) -> int:
        """The number of values that a value of this spec is taken apart into."""
        _require_array(spec, self)
        rank = _rank(spec)
        if not -rank <= self.axis < rank:
            raise ValueError(f"{self}: {spec} has no axis {self.axis}")
        return spec.shape[self.axis % rank]

    def take(self, position: int, spec: LeafSpec) -> Take:
        """The step that takes one of these values."""
        return Take(self.axis % _rank(spec), position)


Transform = Transpose | Cast | Stack | Unstack


@dataclass(frozen=True, slots=True)
class Take(Step):
    """Takes one position along an axis: the part of an `Unstack` for a single target."""

    axis: int
    position: int

    def specs(self, specs: Sequence[LeafSpec]) -> list[LeafSpec]:
        return [
            replace(
                spec,
                shape=(*spec.shape[: self.axis], *spec.shape[self.axis + 1 :]),
                weak_type=False,
            )
            for spec in specs
        ]

    def pull(self, span: Span, box: Box) -> tuple[Span, Box]:
        here = (self.position, self.position + 1)
        return span, (*box[: self.axis], here, *box[self.axis :])

    def apply(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [part.squeeze(self.axis) for part in parts]


class Derivation(Protocol):
    """A value that is made of stored ones: by rules (`Derived`), or by an adapter."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Checkpoint keys of the stored values."""
        ...

    @property
    def stored(self) -> LeafSpec:
        """The spec of the first of them."""
        ...

    @property
    def spec(self) -> LeafSpec:
        """The spec of the result."""
        ...

    @property
    def reshaped(self) -> bool:
        """Whether more than the dtype changes."""
        ...


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that transforms make of stored ones, box by box.

    Attributes:
      keys: checkpoint keys of the stored values, in the order in which they are stacked.
      steps: transform them, in this order.
      stored: the spec of the first of them.
      spec: of the result.
    """

    keys: tuple[str, ...]
    steps: tuple[Step, ...]
    stored: LeafSpec
    spec: LeafSpec

    @property
    def reshaped(self) -> bool:
        """Whether more than the dtype changes."""
        return any(not isinstance(step, Cast) for step in self.steps)

    def needs(self, box: Box) -> tuple[tuple[str, ...], Box]:
        """The keys that a box of the result is made of, and the box that is needed of each."""
        span = (0, 1)
        for step in reversed(self.steps):
            span, box = step.pull(span, box)
        return self.keys[span[0] : span[1]], box

    def make(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Makes a box of the result from the parts that `needs` named."""
        for step in self.steps:
            parts = step.apply(parts)
        (part,) = parts
        return np.ascontiguousarray(part) if part.ndim else part

    def __str__(self) -> str:
        return f"{len(self.keys)} x {self.stored}" if len(self.keys) > 1 else str(self.stored)


def derive(keys: Sequence[str], specs: Sequence[LeafSpec], steps: Sequence[Step]) -> Derived:
    """The value that `steps` make of stored ones.

    Raises:
      ValueError: saying why they cannot.

    >>> spec = LeafSpec("array", "float32", (4, 3))
    >>> str(derive(["a", "b"], [spec, spec], [Transpose(), Stack(-1)]).spec)
    'float32[3, 4, 2]'
    """
    settled: list[Step] = []
    stored, now = specs[0], list(specs)
    for step in steps:
        after = step.specs(now)
        settled.append(step.at(_rank(now[0])) if isinstance(step, Transpose | Stack) else step)
        now = after
    return Derived(tuple(keys), tuple(settled), stored, now[0])


def _rank(spec: LeafSpec) -> int:
    """The number of axes that a program sees; the data of a PRNG key has one more."""
    return len(spec.shape) - spec.is_key


def _alike(spec: LeafSpec, other: LeafSpec) -> bool:
    facts = [(s.shape, s.dtype, s.prng_impl, s.is_key) for s in (spec, other)]
    return facts[0] == facts[1]


def _require_array(spec: LeafSpec, transform: object) -> None:
    if not (spec.is_array or spec.is_key) or spec.is_bytes:
        raise ValueError(f"{transform} needs arrays, and found {spec}")
