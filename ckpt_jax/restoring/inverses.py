"""Inverses: a table of rename rules, read from the other side.

A conversion is written once. Its rules read the other library's checkpoint, and their inverses
write one for it: the patterns of a rule change sides, and its steps are undone in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckpt_jax.graph.patterns import count_wildcards
from ckpt_jax.restoring.rules import ParsedRule, parse
from ckpt_jax.restoring.transforms import Concat, Stack


def inverse(rules: Iterable[Any]) -> list[Any]:
    """The rules that undo rename rules, so that one table leads there and back.

    `Stack` and `Unstack` undo each other, and so do `Split` and `Concat(axis, sizes)`, and
    `Reshape(shape, saved)` and a reshape to the shape before. `Pad` is undone by a `Slice`, and
    `Map(fn, inverse)` by its inverse. A `Cast` is left out: what was rounded stays so. Nothing
    undoes `Slice` and `Dequantize`. The numbers that `Stack` joins have to begin at 0.

    Args:
      rules: for values of one program.

    Returns:
      The rules for values of the other program, in the same order.

    Raises:
      TypeError: a rule is malformed.
      ValueError: naming all rules that have no inverse, and why.

    Example:
      >>> import ckpt_jax as ckpt
      >>> rules = [
      ...     ("h_*/w", "h/w", ckpt.Transpose(), ckpt.Stack()),
      ...     ("kv", ("k", "v"), ckpt.Split(axis=1, sizes=(4, 4))),
      ... ]
      >>> for rule in ckpt.inverse(rules): print(rule)
      ('h/w', 'h_*/w', Unstack(axis=0, index=None), Transpose(axes=None))
      (('k', 'v'), 'kv', Concat(axis=1, sizes=(4, 4), index=None))
    """
    found: list[Any] = []
    problems: list[str] = []
    for rule in map(parse, rules):
        try:
            found.append(_undone(rule))
        except ValueError as error:
            problems.append(f"  {rule}: {error}")
    if problems:
        listed = "\n".join(problems)
        raise ValueError(f"{len(problems)} rename rules have no inverse:\n{listed}")
    return found


def _undone(rule: ParsedRule) -> tuple[Any, ...]:
    sources = rule.sources
    if not all(isinstance(source, str) for source in sources) or "\\" in rule.template:
        raise ValueError("a regular expression cannot be read backwards; use wildcards")
    join = rule.step_for("numbers", makes=False)
    cut = rule.step_for("numbers", makes=True)
    more = 1 if isinstance(join, Stack | Concat) else -1 if cut is not None else 0
    for source in sources:
        for template in rule.templates:
            if count_wildcards(str(source)) != count_wildcards(template) + more:
                raise ValueError("not every wildcard has a counterpart on the other side")
    steps = [step.inverse() for step in reversed(rule.transforms)]
    saved, target = (each[0] if len(each) == 1 else each for each in (rule.templates, sources))
    outcome = (saved, target, *[step for step in steps if step is not None])
    parse(outcome)
    return outcome
