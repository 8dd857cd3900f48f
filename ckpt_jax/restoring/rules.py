"""Rename rules: (saved pattern, target pattern, *transforms), parsed and checked.

A *wildcard* of the saved pattern is filled into the wildcard of the target pattern that is its
counterpart. A rule that stacks has one more wildcard in the saved pattern, and a rule that unstacks
has one more in the target pattern: it stands for the position along the axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckpt_jax.graph.patterns import (
    Pattern,
    compile_pattern,
    count_wildcards,
    fill,
    odd_wildcards,
)
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.restoring.transforms import Stack, Transform, Unstack

Rule = tuple[Pattern, str, *tuple[Transform, ...]]
_ANYTHING = ".N"  # stands for any name; it is not one itself


@dataclass(frozen=True)
class ParsedRule:
    """A parsed rule. `many` is its Stack or Unstack, at position `at` of its transforms."""

    pattern: re.Pattern[str]
    source: Pattern
    template: str
    transforms: tuple[Transform, ...]
    many: Stack | Unstack | None
    at: int

    def __str__(self) -> str:
        source = self.source if isinstance(self.source, str) else self.source.pattern
        return f"{source!r} -> {self.template!r}"

    @cached_property
    def of_containers(self) -> ParsedRule | None:
        """For a rule "a/**" -> "b/**" the rule "a" -> "b"."""
        source, end = self.source, "/**"
        if not isinstance(source, str) or self.transforms:
            return None
        if not (source.endswith(end) and self.template.endswith(end)):
            return None
        return parse((source.removesuffix(end), self.template.removesuffix(end)))

    def of_all_below(self, path: str) -> str | None:
        """The target path of everything below a path, for a rule for this path or for all below
        it; None if the rule is for something else."""
        if found := self.pattern.fullmatch(path):
            return self.target(found)
        source, end = self.source, "/**"
        if isinstance(source, str) and source.endswith(end) and self.template.endswith(end):
            plain = parse((source.removesuffix(end), self.template.removesuffix(end)))
            if found := plain.pattern.fullmatch(path):
                return plain.target(found)
        return None

    def moves_all_below(self, path: str, found: re.Match[str]) -> bool:
        """Whether everything below a path moves with it."""
        below = self.pattern.fullmatch(f"{path}/{_ANYTHING}")
        return (
            below is not None
            and not self.transforms
            and self.target(below) == f"{self.target(found)}/{_ANYTHING}"
        )

    def target(self, found: re.Match[str], without: int | None = None) -> str:
        """The target path for a match, if wildcard `without` of the pattern does not count."""
        if "\\" in self.template:
            return found.expand(self.template)
        groups = [group for i, group in enumerate(found.groups()) if i != without]
        return fill(self.template, groups)


def parse(rule: Any) -> ParsedRule:
    """Parses one rule.

    Raises:
      TypeError, ValueError: it is malformed.
    """
    if not isinstance(rule, tuple | list) or len(rule) < 2:
        raise TypeError(
            f"a rename rule is (saved pattern, target pattern, *transforms), got {rule!r}"
        )
    source, template, *transforms = rule
    if not isinstance(source, str | re.Pattern) or not isinstance(template, str):
        raise TypeError(f"the patterns of a rename rule are strings, got {rule!r}")
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"{transform!r} in the rename rule {source!r} -> {template!r} is no transform; "
                "there are Transpose(axes), Cast(dtype), Stack(axis) and Unstack(axis)"
            )
    many = [i for i, step in enumerate(transforms) if isinstance(step, Stack | Unstack)]
    if len(many) > 1:
        raise ValueError(f"the rename rule {source!r} -> {template!r} stacks or unstacks twice")
    at = many[0] if many else -1
    chosen = transforms[at] if many else None
    assert chosen is None or isinstance(chosen, Stack | Unstack)
    return ParsedRule(compile_pattern(source), source, template, tuple(transforms), chosen, at)


def counting_wildcard(rule: ParsedRule, stack: Stack, found: Sequence[re.Match[str]]) -> int:
    """The wildcard of a rule's saved pattern that numbers the values to stack.

    Raises:
      ValueError: there is none, or it is not clear which it is.
    """
    if stack.index is not None:
        if not 0 <= stack.index < rule.pattern.groups:
            raise ValueError(f"{stack} names a wildcard that the saved pattern does not have")
        return stack.index
    if isinstance(rule.source, str) and "\\" not in rule.template:
        groups = odd_wildcards(rule.source, rule.template)
    else:
        used = {*re.findall(r"\\(?:g<)?(\w+)", rule.template)}
        names = {number: name for name, number in rule.pattern.groupindex.items()}
        groups = [
            i
            for i in range(rule.pattern.groups)
            if str(i + 1) not in used and names.get(i + 1) not in used
        ]
    numbers = [i for i in groups if all((m.group(i + 1) or "").isdecimal() for m in found)]
    if len(numbers) == 1:
        return numbers[0]
    if not numbers:
        raise ValueError(
            "Stack needs one more wildcard in the saved pattern than in the target pattern, and "
            "this wildcard has to match whole numbers"
        )
    raise ValueError("several wildcards could number the values; choose one with Stack(index=...)")


def numbered_targets(
    rule: ParsedRule, unstack: Unstack, found: re.Match[str], count: int
) -> list[str]:
    """The target paths of the values that Unstack makes of one.

    Raises:
      ValueError: no wildcard of the target pattern stands for the position, or several could.
    """
    template, groups = rule.template, list(found.groups())
    if "\\" in template:
        template, groups = found.expand(template), []
        places = [*range(count_wildcards(template))]
    elif isinstance(rule.source, str):
        places = odd_wildcards(template, rule.source)
    else:
        places = [*range(count_wildcards(template))]
    if unstack.index is not None:
        places = [place for place in places if place == unstack.index]
    if len(places) != 1 or len(groups) + 1 != count_wildcards(template):
        raise ValueError(
            "Unstack needs one more wildcard in the target pattern than in the saved pattern"
            + ("; choose it with Unstack(index=...)" if len(places) > 1 else "")
        )
    (place,) = places
    return [fill(template, [*groups[:place], str(i), *groups[place:]]) for i in range(count)]


def unmatched_rule(
    rule: ParsedRule, container: str | None, paths: Sequence[str]
) -> tuple[str, str]:
    """(saved pattern, problem) of a rule that no saved value matches.

    Args:
      rule: the rule.
      container: a container that the saved pattern matches, if there is one.
      paths: of all saved nodes.
    """
    source = rule.source if isinstance(rule.source, str) else rule.source.pattern
    what = f"the rename rule {rule} matches nothing saved"
    if container is None and any(map(rule.pattern.fullmatch, paths)):
        what += " that no earlier rule matches"
    elif container is not None:
        what += f" that holds values; to rename those in {container} write {source}/**"
    else:
        what += near_miss(nearest(source, paths))
    return source, what
