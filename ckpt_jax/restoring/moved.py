"""Moved: the rename rule that a program may have forgotten.

If values are missing on one side and unexpected on the other, they may be the same under other
names. From a few pairs of paths that look alike, candidates are made: what differs between the two
paths stands for a prefix, for a suffix or for a part in the middle; numbers in it become wildcards.
The candidate that fits most missing values is suggested, if that is at least half of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ckpt_jax.graph.patterns import compile_pattern, fill
from ckpt_jax.report import nearest

_MAX_SAMPLES = 3  # missing values from which candidates are made
_MAX_ALIKE = 4  # paths that are paired with each of them, in each way of being alike
_NUMBER = re.compile(r"\d+")


def suggested_rename(
    missing: Sequence[str],
    unexpected: Sequence[str],
    kept: Iterable[str] = (),
    fits: Callable[[str, str], bool] = lambda saved, target: True,
) -> tuple[str, str] | None:
    """A rule (saved pattern, target pattern) that leads from unexpected paths to missing ones.

    Args:
      missing: paths of the program.
      unexpected: paths of the checkpoint.
      kept: paths of the checkpoint that the rule must not touch.
      fits: whether the value at a path of the checkpoint may be the one that is missing at another.

    >>> suggested_rename(["w", "b/0"], ["state/w", "state/b/0", "step"])
    ('state/**', '**')
    >>> suggested_rename(["net/1/kernel", "net/2/kernel"], ["net/1/w", "net/2/w"])
    ('net/*/w', 'net/*/kernel')
    """
    wanted = set(missing)
    found: dict[tuple[str, str], int] = {}
    for path in _samples(missing):
        for other in _alike(path, unexpected):
            for rule in _rules(other.split("/"), path.split("/")):
                if rule not in found:
                    pairs = _images(rule, unexpected)
                    found[rule] = len({to for at, to in pairs if to in wanted and fits(at, to)})

    def merit(rule: tuple[str, str]) -> tuple[int, bool, int]:
        return -found[rule], rule[0].startswith("**/"), len(rule[0]) + len(rule[1])

    best = sorted(found, key=merit)
    for rule in best:
        pattern = compile_pattern(rule[0])
        if 2 * found[rule] < len(wanted):
            return None
        if not any(map(pattern.fullmatch, kept)):
            return rule
    return None


def _samples(paths: Sequence[str]) -> list[str]:
    step = max(1, len(paths) // _MAX_SAMPLES)
    return [*paths[::step]][:_MAX_SAMPLES]


def _alike(path: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that end, or begin, most like `path`; with the same numbers first."""
    segments, numbers = path.split("/"), _NUMBER.findall(path)

    def ends_alike(other: str) -> tuple[int, bool]:
        common = _common(segments[::-1], other.split("/")[::-1])
        return common, _NUMBER.findall(other) == numbers

    def begins_alike(other: str) -> tuple[bool, int, int]:
        theirs = other.split("/")
        has_same_numbers = _NUMBER.findall(other) == numbers
        return has_same_numbers, _common(segments, theirs), -abs(len(theirs) - len(segments))

    # Of equals the shorter differs in less.
    shortest = sorted(candidates, key=len)
    ending = sorted(shortest, key=ends_alike, reverse=True)[:_MAX_ALIKE]
    beginning = sorted(shortest, key=begins_alike, reverse=True)[:_MAX_ALIKE]
    return [*dict.fromkeys([*ending, *beginning])]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many segments two paths have in common, from the first on."""
    return (*[a == b for a, b in zip(one, other, strict=False)], False).index(False)


def _rules(saved: list[str], target: list[str]) -> Iterator[tuple[str, str]]:
    """Rules that lead from one path to the other, general ones among them."""
    start = _common(saved, target)
    saved_rest, target_rest = saved[start:], target[start:]
    end = _common(saved_rest[::-1], target_rest[::-1])
    old, new = saved_rest[: len(saved_rest) - end], target_rest[: len(target_rest) - end]
    before, after = saved[:start], [*["**"] * bool(end)]
    for prefix in (before, [*["**"] * bool(before)]) if old and new else (before,):
        rule = "/".join([*prefix, *old, *after]), "/".join([*prefix, *new, *after])
        is_general = "*" in rule[0] or bool(nearest(rule[0], [rule[1]]))
        if all(rule) and rule[0] != rule[1] and is_general:
            yield rule
            if _NUMBER.findall(rule[0]) == _NUMBER.findall(rule[1]) != []:
                yield _NUMBER.sub("*", rule[0]), _NUMBER.sub("*", rule[1])


def _images(rule: tuple[str, str], paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The paths that a rule matches, each with the path that it makes of it."""
    pattern = compile_pattern(rule[0])
    for path in paths:
        if match := pattern.fullmatch(path):
            yield path, fill(rule[1], match.groups())
