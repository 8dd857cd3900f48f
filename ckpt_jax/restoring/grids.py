"""Grids: the values that pass through the steps of one rule.

A rule for the q, k and v of each layer takes a *grid* of values: a row for each layer, and in each
row the members of the rule's tuple of patterns. A step for the members makes one value of each row,
a step for the numbers one value of each column, and any other step one value of each value. A step
that makes several values does the reverse. A rule without tuples and numbers has one row of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ckpt_jax.restoring.formulas import Formula, Made, Operation, Source, for_slot, made
from ckpt_jax.restoring.rules import ParsedRule
from ckpt_jax.restoring.transforms import Parting, Slice, Take, Transform

T = TypeVar("T")
Grid = Sequence[Sequence[Formula]]  # by number, then by member


def through(rule: ParsedRule, values: Grid, *, of_slots: bool = False) -> Grid:
    """The values that the steps of a rule make.

    Args:
      rule: the rule.
      values: that it takes.
      of_slots: whether they are the slots of the variables that the rule is for.

    Raises:
      ValueError: saying which step does not fit which values.
    """
    grid = values
    for step, use in zip(rule.transforms, rule.uses, strict=True):
        if isinstance(step, Parting):
            if use == "members":
                count = len(rule.templates)
                grid = [_pieces(step, _one(row, step), count) for row in grid]
            else:
                columns = [_pieces(step, each, None) for each in _one(grid, step)]
                if len({*map(len, columns)}) > 1:
                    raise ValueError(f"{step} makes more values of one pattern than of another")
                grid = [*zip(*columns, strict=True)]
            continue
        operation = for_slot(_operation(step)) if of_slots else _operation(step)
        if use == "members":
            grid = [[made(operation, *row)] for row in grid]
        elif use == "numbers":
            grid = [[made(operation, *column) for column in zip(*grid, strict=True)]]
        else:
            grid = [[made(operation, each) for each in row] for row in grid]
    return grid


def _operation(step: Transform) -> Operation:
    assert isinstance(step, Operation)
    return step


def _one(several: Sequence[T], step: Transform) -> T:
    if len(several) != 1:
        raise ValueError(f"{step} takes one value apart, and there are {len(several)}; join them")
    return several[0]


def _pieces(step: Parting, value: Formula, count: int | None) -> list[Formula]:
    return [made(operation, value) for operation in step.pieces(value.spec, count)]


def part_of_stored(formula: Formula) -> str:
    """The part of a stored value that a value is, as an index; "" if it is the whole or more.

    >>> from ckpt_jax.graph.specs import LeafSpec
    >>> part_of_stored(made(Take(1, 3), Source("w", LeafSpec("array", "float32", (4, 5)))))
    '[:, 3]'
    """
    while isinstance(formula, Made) and len(formula.inputs) == 1:
        (inner,) = formula.inputs
        if isinstance(inner, Source):
            operation = formula.operation
            if isinstance(operation, Take):
                return f"[{', '.join([*[':'] * operation.axis, str(operation.position)])}]"
            if isinstance(operation, Slice):
                ends = [f"{a or 0}:{b}" for a, b in [e or (None, None) for e in operation.box]]
                return f"[{', '.join(ends)}]".replace("0:None", ":").replace("None", "")
        formula = inner
    return ""
