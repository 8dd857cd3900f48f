"""Patterns that match paths, and templates that make new paths of the matches.

In a pattern, "*" matches any text without "/", "**" matches any text, "?" matches one character
except "/", and every other character matches itself. A compiled regular expression is used as it
is; it has to match the whole path. The wildcards of a template are replaced with what the
pattern's wildcards matched, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

Pattern = str | re.Pattern[str]
Selection = Pattern | Sequence[Pattern] | Callable[[str], bool]

_WILDCARD = re.compile(r"\*\*|\*|\?")
_MEANING = {"**": "(.*)", "*": "([^/]*)", "?": "([^/])"}


def compile_pattern(pattern: Pattern) -> re.Pattern[str]:
    """The regular expression for a pattern, with one group per wildcard.

    >>> compile_pattern("layers/*/w").fullmatch("layers/3/w").groups()
    ('3',)
    """
    if isinstance(pattern, re.Pattern):
        return pattern
    literals = [re.escape(part) for part in _WILDCARD.split(pattern)]
    wildcards = [_MEANING[found] for found in _WILDCARD.findall(pattern)]
    text = "".join(a + b for a, b in zip(literals, [*wildcards, ""], strict=True))
    return re.compile(text, re.DOTALL)


class Heads:
    """Says which of many patterns may match a path, by the names with which they begin.

    A tree with thousands of values may be given thousands of patterns. Of these, only few are
    compared with each path.

    >>> heads = Heads(["a/b", "a/*", "c/**", "**/w"])
    >>> heads.candidates("a/b"), heads.candidates("c/d/w")
    ([0, 1, 3], [2, 3])
    """

    def __init__(self, patterns: Iterable[Pattern]):
        self._by_head: dict[str, list[int]] = {}
        for number, pattern in enumerate(patterns):
            self._by_head.setdefault(_head(pattern), []).append(number)
        self._longest = max([head.count("/") + 1 for head in self._by_head], default=0)

    def candidates(self, path: str) -> list[int]:
        """The numbers of the patterns that may match a path, ascending."""
        found = list(self._by_head.get("", ()))
        end = -1
        for _ in range(self._longest):
            end = path.find("/", end + 1)
            head = path if end < 0 else path[:end]
            if head:
                found += self._by_head.get(head, ())
            if end < 0:
                break
        return sorted(found)


def _head(pattern: Pattern) -> str:
    """The names at the beginning of a pattern that have no wildcards, joined with "/"."""
    if isinstance(pattern, re.Pattern):
        return ""
    wildcard = _WILDCARD.search(pattern)
    return pattern if wildcard is None else pattern[: wildcard.start()].rpartition("/")[0]


def selects(selection: Selection | None) -> Callable[[str], bool]:
    """A function that says of a path whether a selection contains it.

    A selection is a pattern, a list of patterns or such a function; None selects every path.

    >>> chosen = selects(["params/**", "step"])
    >>> [chosen(path) for path in ("params/dense/kernel", "step", "opt_state/0")]
    [True, True, False]
    """
    if selection is None:
        return lambda path: True
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str | re.Pattern) else selection
    if not isinstance(patterns, Iterable) or not all(
        [isinstance(pattern, str | re.Pattern) for pattern in patterns]
    ):
        raise TypeError(f"only= is a pattern, a list of patterns or a function, got {selection!r}")
    patterns = [*patterns]
    compiled, heads = [*map(compile_pattern, patterns)], Heads(patterns)
    return lambda path: any(compiled[number].fullmatch(path) for number in heads.candidates(path))


def fill(template: str, groups: Sequence[str | None]) -> str:
    """A template with its wildcards replaced by what the pattern's wildcards matched.

    >>> fill("blocks/*/w", ["3"])
    'blocks/3/w'
    """
    rest = iter(groups)
    return _WILDCARD.sub(lambda wildcard: next(rest, None) or wildcard.group(), template)


def odd_wildcards(longer: str, shorter: str) -> list[int]:
    """The positions of wildcards in `longer` that may have no counterpart in `shorter`.

    Without such a wildcard, `longer` has the same kinds of wildcards in the same order as
    `shorter`. If some of the candidates lie in segments that `shorter` does not have, only those
    are returned.

    >>> odd_wildcards("layers_*/*", "layers/*"), odd_wildcards("*/layers_*/w", "*/layers/w")
    ([0], [1])
    >>> odd_wildcards("a_*/b_*", "c_*"), odd_wildcards("a_*", "b_*")
    ([0, 1], [])
    """
    kinds = [wildcard.group() for wildcard in _WILDCARD.finditer(longer)]
    others = _WILDCARD.findall(shorter)
    found = [i for i in range(len(kinds)) if kinds[:i] + kinds[i + 1 :] == others]
    segments = [
        segment for segment in longer.split("/") for _ in range(len(_WILDCARD.findall(segment)))
    ]
    new = [i for i in found if segments[i] not in shorter.split("/")]
    return new or found


def count_wildcards(template: str) -> int:
    return len(_WILDCARD.findall(template))
