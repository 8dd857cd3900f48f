"""Patterns on paths, and rules that rename them.

In a pattern "*" stands for any text without "/", "**" for any text, "?" for one character; all
else stands for itself. A compiled regular expression is taken as it is and has to match the
whole path. In the target of a rule the wildcards stand for what those of the source matched,
in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ckpt_jax.graph.codec import object_keys
from ckpt_jax.graph.labels import Label, escaped_names, path_of, unescape
from ckpt_jax.graph.model import Node, ObjectGraph

Pattern = str | re.Pattern[str]
Rule = tuple[Pattern, str]
Selection = Pattern | Sequence[Pattern] | Callable[[str], bool]

_WILDCARD = re.compile(r"\*\*|\*|\?")
_MEANING = {"**": "(.*)", "*": "([^/]*)", "?": "([^/])"}


def compile_pattern(pattern: Pattern) -> re.Pattern[str]:
    """A regular expression with one group per wildcard.

    >>> compile_pattern("layers/*/w").fullmatch("layers/3/w").groups()
    ('3',)
    """
    if isinstance(pattern, re.Pattern):
        return pattern
    literals = [re.escape(part) for part in _WILDCARD.split(pattern)]
    wildcards = [_MEANING[found] for found in _WILDCARD.findall(pattern)]
    text = "".join(a + b for a, b in zip(literals, [*wildcards, ""], strict=True))
    return re.compile(text, re.DOTALL)


def selects(selection: Selection | None) -> Callable[[str], bool]:
    """The predicate on paths that a pattern, a list of patterns or a function stands for.

    >>> chosen = selects(["params/**", "step"])
    >>> [chosen(path) for path in ("params/dense/kernel", "step", "opt_state/0")]
    [True, True, False]
    """
    if selection is None:
        return lambda path: True
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str | re.Pattern) else selection
    compiled = [compile_pattern(pattern) for pattern in patterns]
    return lambda path: any(pattern.fullmatch(path) for pattern in compiled)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A graph under new names.

    Attributes:
      graph: the same values, reached by other edges.
      saved_paths: the path in the original graph of every node that moved.
      problems: (path, what) for rules that match nothing and values that would collide.
    """

    graph: ObjectGraph
    saved_paths: dict[int, str]
    problems: tuple[tuple[str, str], ...] = ()


def rename(graph: ObjectGraph, rules: Iterable[Rule]) -> Renamed:
    """Moves the nodes whose paths a rule matches; for each path the first such rule counts.

    A rule moves values, or, where its source is the path of a container, the whole container.
    """
    compiled = [(compile_pattern(source), source, target) for source, target in rules]
    if not compiled:
        return Renamed(graph, {})
    matched: set[int] = set()
    edges: dict[int, list[tuple[Label, int]]] = {}
    moved: list[tuple[int, str]] = []
    for node_id, node in enumerate(graph.nodes):
        edges[node_id] = []
        keys = _child_paths(graph, node_id)
        for (label, child), path in zip(node.children, keys, strict=True):
            target = None
            for number, (pattern, _, template) in enumerate(compiled):
                found = pattern.fullmatch(path)
                if found and (graph.nodes[child].attributes or not pattern.groups):
                    matched.add(number)
                    target = _fill(template, found)
                    break
            if target is None or target == path:
                edges[node_id].append((label, child))
            else:
                moved.append((child, target))
    problems = [
        (str(source), f"the rename rule {source!r} -> {target!r} matches nothing saved")
        for number, (_, source, target) in enumerate(compiled)
        if number not in matched
    ]
    nodes = list(graph.nodes)
    problems += [
        problem for child, target in moved if (problem := _insert(nodes, edges, child, target))
    ]
    nodes = [replace(node, children=tuple(edges[i])) for i, node in enumerate(nodes)]
    renamed = ObjectGraph(tuple(nodes), object_keys(nodes), graph.named)
    saved_paths = {
        i: graph.value_path(i, "VARIABLE_VALUE") if graph.nodes[i].attributes else graph.paths[i]
        for i in range(len(graph.nodes))
        if graph.paths[i] != renamed.paths[i]
    }
    return Renamed(renamed, saved_paths, tuple(problems))


def _child_paths(graph: ObjectGraph, node: int) -> list[str]:
    """The path of each of a node's edges (a shared child has several)."""
    names = escaped_names([label for label, _ in graph.nodes[node].children])
    prefix = f"{graph.paths[node]}/" if node else ""
    return [prefix + path_of(name) for name in names]


def _fill(template: str, found: re.Match[str]) -> str:
    """The target path: wildcards take the groups in order; \\1 and \\g<name> work as well."""
    groups = iter(found.groups())
    if "\\" in template:
        return found.expand(template)
    return _WILDCARD.sub(lambda wildcard: next(groups, wildcard.group()), template)


def _insert(
    nodes: list[Node], edges: dict[int, list[tuple[Label, int]]], child: int, target: str
) -> tuple[str, str] | None:
    """Adds an edge chain for `target` that ends in `child`; says what is in the way."""
    here = 0
    names = [unescape(name) if ".S" in name or ".." in name else name for name in target.split("/")]
    for name in names[:-1]:
        there = next((node for label, node in edges[here] if str(label) == name), None)
        if there is None:
            there = len(nodes)
            nodes.append(Node(container="dict"))
            edges[there] = []
            edges[here].append((name, there))
        here = there
    if any(str(label) == names[-1] for label, _ in edges[here]):
        return target, f"two saved values would be called {target}"
    edges[here].append((names[-1], child))
    return None
