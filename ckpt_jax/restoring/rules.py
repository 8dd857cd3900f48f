"""Rename rules: (saved pattern, target pattern, *transforms), parsed and checked.

A *wildcard* of the saved pattern is filled into the wildcard of the target pattern that is its
counterpart. A rule that joins *numbered* values (`Stack`, `Concat`) has one more wildcard in the
saved pattern, and a rule that makes numbered values (`Unstack`, `Split`) has one more in the target
pattern: it stands for the number.

The saved side may also be a tuple of patterns, and so may the target. The values of such a tuple
that have the same wildcards are *members* of one group. A rule can have both: it joins q, k and v
of each layer, and then stacks the layers. Which of its steps is for numbers and which for members
follows from the patterns and the kinds of the steps: see `_uses`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ckpt_jax.graph.patterns import (
    Pattern,
    compile_pattern,
    count_wildcards,
    fill,
    odd_wildcards,
)
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.restoring.transforms import (
    Concat,
    Dequantize,
    Map,
    Parting,
    Split,
    Stack,
    Transform,
    Unstack,
)

Patterns = Pattern | Sequence[Pattern]
Rule = tuple[Patterns, str | Sequence[str], *tuple[Transform, ...]]
Use = Literal["each", "numbers", "members"]  # what a step joins or makes
_ANYTHING = ".N"  # stands for any name; it is not one itself


@dataclass(frozen=True)
class ParsedRule:
    """A parsed rule.

    Attributes:
      sources, patterns: the saved patterns, as given and as regular expressions.
      templates: the target patterns.
      transforms: the steps.
      uses: what each step is for.
    """

    sources: tuple[Pattern, ...]
    patterns: tuple[re.Pattern[str], ...]
    templates: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()
    uses: tuple[Use, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{_shown(self.sources)} -> {_shown(self.templates)}"

    @property
    def pattern(self) -> re.Pattern[str]:
        """The saved pattern; the first one if there are several."""
        return self.patterns[0]

    @property
    def source(self) -> Pattern:
        return self.sources[0]

    @property
    def template(self) -> str:
        return self.templates[0]

    @property
    def is_single(self) -> bool:
        """Whether the rule makes one value of each value that it matches."""
        return len(self.sources) == len(self.templates) == 1 and {*self.uses} <= {"each"}

    def step_for(self, use: Use, *, makes: bool) -> Transform | None:
        """The step that joins numbered values or members, or the one that makes them."""
        steps = zip(self.transforms, self.uses, strict=True)
        found = [step for step, its in steps if its == use and isinstance(step, Parting) == makes]
        return found[0] if found else None

    def match(self, path: str) -> tuple[int, re.Match[str]] | None:
        """The first pattern that matches a path: its number, and the match."""
        for number, pattern in enumerate(self.patterns):
            if found := pattern.fullmatch(path):
                return number, found
        return None

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
        if not self.is_single:
            return None
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

    def target(self, found: re.Match[str], without: int | None = None, number: int = 0) -> str:
        """The target path for a match.

        Args:
          found: the match.
          without: a wildcard of the pattern that does not count.
          number: of the target pattern, if there are several.
        """
        template = self.templates[number]
        if "\\" in template:
            return found.expand(template)
        groups = [group for i, group in enumerate(found.groups()) if i != without]
        return fill(template, groups)


def parse(rule: Any) -> ParsedRule:
    """Parses one rule.

    Raises:
      TypeError, ValueError: it is malformed.
    """
    if not isinstance(rule, tuple | list) or len(rule) < 2:
        raise TypeError(
            f"a rename rule is (saved pattern, target pattern, *transforms), got {rule!r}. Rules "
            "are given as a list: rename=[(saved, target)]"
        )
    source, template, *transforms = rule
    sources = tuple(source) if isinstance(source, tuple | list) else (source,)
    templates = tuple(template) if isinstance(template, tuple | list) else (template,)
    if not (
        sources
        and templates
        and all(isinstance(each, str | re.Pattern) for each in sources)
        and all(isinstance(each, str) for each in templates)
    ):
        raise TypeError(
            f"the patterns of a rename rule are strings, or tuples of strings, got {rule!r}"
        )
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"{transform!r} in the rename rule {source!r} -> {template!r} is no transform; "
                "there are Transpose, Reshape, Pad, Slice, Cast, Map(fn), Dequantize, Stack, "
                "Concat, Unstack and Split"
            )
    parsed = ParsedRule(sources, tuple(map(compile_pattern, sources)), templates)
    for counts in (
        {each.groups for each in parsed.patterns},
        {count_wildcards(each) for each in templates if "\\" not in each},
    ):
        if len(counts) > 1:
            raise ValueError(
                f"the rename rule {parsed}: the patterns of one side have to have the same number "
                "of wildcards"
            )
    return ParsedRule(*_patterns(parsed), tuple(transforms), _uses(parsed, transforms))


def _patterns(
    rule: ParsedRule,
) -> tuple[tuple[Pattern, ...], tuple[re.Pattern[str], ...], tuple[str, ...]]:
    return rule.sources, rule.patterns, rule.templates


def _uses(rule: ParsedRule, transforms: Sequence[Transform]) -> tuple[Use, ...]:
    """What each step of a rule joins or makes.

    Members are there if a side of the rule is a tuple. If they are joined and numbered values are,
    too, `Concat` is for the members and `Stack` for the numbers; of two steps of one kind the first
    is for the members. It is the other way round for steps that make several values.

    Raises:
      ValueError: the steps do not lead from the patterns of one side to those of the other.
    """
    uses: list[Use] = ["each"] * len(transforms)
    has_members, makes_members = len(rule.sources) > 1, len(rule.templates) > 1
    joins = [i for i, step in enumerate(transforms) if isinstance(step, Stack | Concat)]
    cuts = [i for i, step in enumerate(transforms) if isinstance(step, Parting)]
    maps = [i for i, step in enumerate(transforms) if isinstance(step, Map)]
    scales = [i for i, step in enumerate(transforms) if isinstance(step, Dequantize)]
    more = _more_wildcards(rule)
    if scales and not has_members:
        raise ValueError(
            f"the rename rule {rule}: Dequantize needs a tuple of patterns: for the values, the "
            "scales and perhaps the zero points"
        )
    cuts_members = _settle(uses, transforms, cuts, Split, makes_members, more < 0, last=True)
    if scales:
        uses[scales[0]] = "members"
    passes = has_members and len(rule.sources) == len(rule.templates) and not cuts_members
    joins_members = _settle(uses, transforms, joins, Concat, has_members and not scales, more > 0)
    joins_members = joins_members or bool(scales)
    if has_members and maps and not joins_members and not passes:
        uses[maps[0]] = "members"
        joins_members = True
    numbered = [i for i in (*joins, *cuts) if uses[i] == "numbers"]
    members = [i for i in (*joins, *maps, *scales) if uses[i] == "members"]
    if len(numbered) > 1 or len(members) > 1 or len(scales) > 1:
        raise ValueError(f"the rename rule {rule} stacks or unstacks twice")
    if has_members and not joins_members and not passes:
        raise ValueError(
            f"the rename rule {rule} takes {len(rule.sources)} values, and no step joins them: "
            "Concat, Stack, Dequantize or Map"
        )
    if makes_members and not cuts_members and not passes:
        raise ValueError(
            f"the rename rule {rule} gives {len(rule.templates)} values, and no step makes them: "
            "Split or Unstack"
        )
    if passes and not transforms:
        raise ValueError(f"the rename rule {rule} has no steps; write a rule for each pattern")
    return tuple(uses)


def _settle(
    uses: list[Use],
    transforms: Sequence[Transform],
    steps: Sequence[int],
    of_members: type[Transform],
    has_members: bool,
    is_numbered: bool,
    *,
    last: bool = False,
) -> bool:
    """Notes for steps that join values, or for those that make several, what they are for.

    Returns:
      Whether one of them is for the members.
    """
    for i in steps:
        uses[i] = "numbers"
    if not has_members or not steps or (len(steps) == 1 and is_numbered):
        return False
    alike = [i for i in steps if isinstance(transforms[i], of_members)]
    mixed = 0 < len(alike) < len(steps)
    chosen = alike[0] if mixed else steps[-1] if last else steps[0]
    uses[chosen] = "members"
    return True


def _more_wildcards(rule: ParsedRule) -> int:
    """How many more wildcards the saved pattern has than the target pattern."""
    if "\\" in rule.template:
        return len(_unused_groups(rule.pattern, rule.template)) - count_wildcards(rule.template)
    return rule.pattern.groups - count_wildcards(rule.template)


def _unused_groups(pattern: re.Pattern[str], template: str) -> list[int]:
    """The groups that a template with references does not refer to, counted from 0."""
    used = {*re.findall(r"\\(?:g<)?(\w+)", template)}
    names = {number: name for name, number in pattern.groupindex.items()}
    return [
        i for i in range(pattern.groups) if str(i + 1) not in used and names.get(i + 1) not in used
    ]


def _shown(patterns: Sequence[Pattern]) -> str:
    texts = [each if isinstance(each, str) else each.pattern for each in patterns]
    return repr(texts[0]) if len(texts) == 1 else f"({', '.join(map(repr, texts))})"


def counting_wildcard(
    rule: ParsedRule, step: Stack | Concat, found: Sequence[re.Match[str]], number: int = 0
) -> int:
    """The wildcard of a rule's saved pattern that numbers the values to join.

    Args:
      rule: the rule.
      step: that joins the values.
      found: the matches of the pattern.
      number: of the pattern, if there are several.

    Raises:
      ValueError: there is none, or it is not clear which it is.
    """
    pattern, source = rule.patterns[number], rule.sources[number]
    if step.index is not None:
        if not 0 <= step.index < pattern.groups:
            raise ValueError(f"{step} names a wildcard that the saved pattern does not have")
        return step.index
    if isinstance(source, str) and "\\" not in rule.template:
        groups = odd_wildcards(source, rule.template)
    else:
        groups = _unused_groups(pattern, rule.template)
    numbers = [i for i in groups if all((m.group(i + 1) or "").isdecimal() for m in found)]
    if len(numbers) == 1:
        return numbers[0]
    name = type(step).__name__
    if not numbers:
        several = " It joins the values of a tuple of patterns, too." if name == "Concat" else ""
        raise ValueError(
            f"{name} needs one more wildcard in the saved pattern than in the target pattern, and "
            f"this wildcard has to match whole numbers.{several}"
        )
    raise ValueError(
        f"several wildcards could number the values; choose one with {name}(index=...)"
    )


def numbered_targets(
    rule: ParsedRule, step: Unstack | Split, found: re.Match[str], count: int, number: int = 0
) -> list[str]:
    """The target paths of the numbered values that a step makes of one.

    Args:
      rule: the rule.
      step: that makes them.
      found: the match of the value.
      count: how many there are.
      number: of the target pattern, if there are several.

    Raises:
      ValueError: no wildcard of the target pattern stands for the position, or several could.
    """
    template, groups = rule.templates[number], list(found.groups())
    if "\\" in template:
        template, groups = found.expand(template), []
        places = [*range(count_wildcards(template))]
    elif isinstance(rule.source, str):
        places = odd_wildcards(template, rule.source)
    else:
        places = [*range(count_wildcards(template))]
    if step.index is not None:
        places = [place for place in places if place == step.index]
    if len(places) != 1 or len(groups) + 1 != count_wildcards(template):
        name = type(step).__name__
        raise ValueError(
            f"{name} needs one more wildcard in the target pattern than in the saved pattern"
            + (f"; choose it with {name}(index=...)" if len(places) > 1 else "")
        )
    (place,) = places
    return [fill(template, [*groups[:place], str(i), *groups[place:]]) for i in range(count)]


def unmatched_rule(
    rule: ParsedRule, container: str | None, paths: Sequence[str], number: int = 0
) -> tuple[str, str]:
    """(saved pattern, problem) of a rule that no saved value matches.

    Args:
      rule: the rule.
      container: a container that the saved pattern matches, if there is one.
      paths: of all saved nodes.
      number: of the saved pattern, if there are several.
    """
    source = rule.sources[number]
    source = source if isinstance(source, str) else source.pattern
    what = f"the rename rule {rule} matches nothing saved"
    if len(rule.sources) > 1:
        what = f"{source!r} of {what}"
    if container is None and any(map(rule.patterns[number].fullmatch, paths)):
        what += " that no earlier rule matches"
    elif container is not None:
        what += f" that holds values; to rename those in {container} write {source}/**"
    else:
        what += near_miss(nearest(source, paths))
    return source, what
