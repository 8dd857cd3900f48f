"""Formulas: values that are made of stored ones, before any of them is read.

A *formula* is a stored value, or an operation on other formulas. An *operation* makes one value of
one or several, and has three functions, so that a plan knows the outcome before a byte is read and
a restore reads no more than it needs:

* `spec` gives the spec of the output, or says why there is none.
* `pull` gives the box of each input that a box of the output needs.
* `apply` makes that box of the output from those boxes of the inputs.

Two formulas may have an input in common: the values that `Split` makes of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from ckpt_jax.graph.boxes import Box, size_of, slices, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec

ANY_DTYPE = ""  # of a value that takes the dtype of its target


class Operation(ABC):
    """Makes one value of one or several."""

    __slots__ = ()
    keeps_shape: ClassVar[bool] = False  # whether at most the dtype changes

    @property
    def is_whole(self) -> bool:
        """Whether all of the output is made at once, whatever is needed of it."""
        return False

    @abstractmethod
    def spec(self, specs: Sequence[LeafSpec]) -> LeafSpec:
        """The spec of the output for inputs of these specs.

        Raises:
          ValueError: saying why such inputs cannot be used.
        """

    @abstractmethod
    def pull(self, box: Box, specs: Sequence[LeafSpec]) -> Sequence[Box | None]:
        """The box of each input that a box of the output needs; None if it needs nothing of it."""

    @abstractmethod
    def apply(
        self, box: Box, parts: Sequence[np.ndarray | None], specs: Sequence[LeafSpec]
    ) -> np.ndarray:
        """A box of the output, from the parts of the inputs that `pull` names."""

    def for_slot(self) -> Operation | None:
        """What is done with the slots of a variable if this is done with the variable.

        None if nobody but the author of the operation could know.
        """
        return self


@dataclass(frozen=True, eq=False)
class Source:
    """A stored value: its checkpoint key, and its spec."""

    key: str
    spec: LeafSpec


@dataclass(frozen=True, eq=False)
class Made:
    """The outcome of an operation on other values."""

    operation: Operation
    inputs: tuple[Formula, ...]
    spec: LeafSpec

    @cached_property
    def specs(self) -> tuple[LeafSpec, ...]:
        """The specs of the inputs."""
        return tuple([each.spec for each in self.inputs])


Formula = Source | Made
Part = Callable[[str, Box], np.ndarray]


def made(operation: Operation, *inputs: Formula) -> Made:
    """The formula of an operation.

    Raises:
      ValueError: saying why the operation does not fit the inputs.
    """
    return Made(operation, inputs, operation.spec([each.spec for each in inputs]))


def needs(formula: Formula, box: Box) -> dict[tuple[str, Box], None]:
    """The keys that a box of a value is made of, each with a box that is needed of it, in order."""
    if isinstance(formula, Source):
        return {(formula.key, box): None}
    found: dict[tuple[str, Box], None] = {}
    boxes = formula.operation.pull(box, formula.specs)
    for each, wanted in zip(formula.inputs, boxes, strict=True):
        if wanted is not None:
            found.update(needs(each, wanted))
    return found


def evaluate(
    formula: Formula, box: Box, part: Part, known: dict[int, np.ndarray] | None = None
) -> np.ndarray:
    """A box of a value.

    Args:
      formula: of the value.
      box: the wanted box.
      part: gives the boxes of stored values that `needs` names.
      known: results that are made at once, by the identity of the formula; they are added, and no
        two callers get the same memory.
    """
    if isinstance(formula, Source):
        return part(formula.key, box)
    everything = whole(formula.spec.shape)
    if formula.operation.is_whole and (known is not None or box != everything):
        known = {} if known is None else known
        is_new = id(formula) not in known
        if is_new:
            known[id(formula)] = _applied(formula, everything, part, known)
        found = known[id(formula)]
        return found if is_new and box == everything else found[slices(box)].copy()
    return _applied(formula, box, part, known)


def _applied(
    formula: Made, box: Box, part: Part, known: dict[int, np.ndarray] | None
) -> np.ndarray:
    boxes = formula.operation.pull(box, formula.specs)
    parts = [
        None if wanted is None else evaluate(each, wanted, part, known)
        for each, wanted in zip(formula.inputs, boxes, strict=True)
    ]
    return formula.operation.apply(box, parts, formula.specs)


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


@dataclass(frozen=True)
class Derived:
    """A value that a formula makes of stored ones, box by box."""

    formula: Formula

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The stored values that occur in the formula, in order."""
        found: dict[str, Source] = {}
        todo: list[Formula] = [self.formula]
        while todo:
            each = todo.pop()
            if isinstance(each, Source):
                found.setdefault(each.key, each)
            else:
                todo += reversed(each.inputs)
        return tuple(found.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """Checkpoint keys of the stored values."""
        return tuple([source.key for source in self.sources])

    @property
    def stored(self) -> LeafSpec:
        """The spec of the first of them."""
        return self.sources[0].spec

    @property
    def spec(self) -> LeafSpec:
        """The spec of the result."""
        return self.formula.spec

    @property
    def reshaped(self) -> bool:
        """Whether more than the dtype changes."""
        return any(not operation.keeps_shape for operation in self._operations())

    def _operations(self) -> list[Operation]:
        found: list[Operation] = []
        todo: list[Formula] = [self.formula]
        while todo:
            each = todo.pop()
            if isinstance(each, Made):
                found.append(each.operation)
                todo += each.inputs
        return found

    @cached_property
    def stored_nbytes(self) -> int:
        """Bytes that are read of stored values for the whole value."""
        itemsize = {source.key: dtype_of(source.spec.dtype).itemsize for source in self.sources}
        return sum(
            [size_of(box) * itemsize[key] for key, box in needs(self.formula, whole(self.shape))]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which the value is stored; keys have one axis more than a program sees."""
        return self.formula.spec.shape

    def of_slots(self, slots: Mapping[str, Source]) -> Derived:
        """The same formula for the slots of the variables that it is made of.

        Args:
          slots: by the key of the variable.

        Raises:
          ValueError: saying why it cannot be made.
        """
        done: dict[int, Formula] = {}

        def again(formula: Formula) -> Formula:
            if id(formula) not in done:
                done[id(formula)] = (
                    slots[formula.key]
                    if isinstance(formula, Source)
                    else made(for_slot(formula.operation), *map(again, formula.inputs))
                )
            return done[id(formula)]

        return Derived(again(self.formula))

    def __str__(self) -> str:
        alike = {str(source.spec): None for source in self.sources}
        if len(alike) > 1:
            return ", ".join(alike)
        return f"{len(self.sources)} x {self.stored}" if len(self.sources) > 1 else str(self.stored)


def for_slot(operation: Operation) -> Operation:
    """What is done with slots.

    Raises:
      ValueError: it is not known.
    """
    found = operation.for_slot()
    if found is None:
        raise ValueError(
            f"{operation} changes values in a way that need not hold for the state of optimizers"
        )
    return found
