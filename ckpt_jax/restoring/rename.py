"""Renaming: a saved graph under the names, and in the shapes, of another program.

A rule is (saved pattern, target pattern, *transforms). A plain rule moves an edge of the graph: a
value or a whole container comes under another name and stays the node that it is. A rule with
transforms makes new nodes, whose values are *derived* from stored ones (see `transforms`). What
an optimizer holds for a variable (its slots) follows the variable: as it is where the variable
moves, derived in the same way where the variable is.

The outcome is a graph like any other, so that match, plan and assign know nothing of rules; only
reading does (see `reading`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from ckpt_jax.graph.labels import Label, attribute_key, escaped_names, path_of, unescape
from ckpt_jax.graph.nodes import (
    Attribute,
    Node,
    ObjectGraph,
    Slot,
    descendants,
    object_keys,
    slots_in,
)
from ckpt_jax.graph.patterns import (
    Pattern,
    compile_pattern,
    count_wildcards,
    fill,
    odd_wildcards,
)
from ckpt_jax.report import ReportEntry, near_miss, nearest
from ckpt_jax.restoring.transforms import (
    Cast,
    Derivation,
    Derived,
    Stack,
    Step,
    Transform,
    Unstack,
    derive,
)

Rule = tuple[Pattern, str, *tuple[Transform, ...]]
_MAX_LISTED = 6
_ANYTHING = ".N"  # stands for a name; no path ends so


@dataclass(frozen=True, slots=True)
class Renamed:
    """A graph under new names.

    Attributes:
      graph: the same values, reached by other edges, and derived ones.
      saved_paths: the path in the original graph of every node that moved.
      problems: for rules that cannot be followed.
      derived: how values that are not stored as they are come about, by their keys in `graph`.
    """

    graph: ObjectGraph
    saved_paths: Mapping[int, str] = field(default_factory=dict)
    problems: tuple[ReportEntry, ...] = ()
    derived: Mapping[str, Derivation] = field(default_factory=dict)


def rename(graph: ObjectGraph, rules: Iterable[Rule]) -> Renamed:
    """Applies rename rules to a saved graph; for each path the first rule that matches counts.

    Raises:
      TypeError, ValueError: a rule is none.
    """
    parsed = [_parse(rule) for rule in rules]
    if not parsed:
        return Renamed(graph)
    return _Renaming(graph, parsed).run()


# --- rules -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """A rule, taken apart. `many` is its Stack or Unstack, at position `at` of its transforms."""

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
    def of_containers(self) -> _Rule | None:
        """For a rule "a/**" -> "b/**" the rule "a" -> "b"."""
        source, end = self.source, "/**"
        if not isinstance(source, str) or self.transforms:
            return None
        if not (source.endswith(end) and self.template.endswith(end)):
            return None
        return _parse((source.removesuffix(end), self.template.removesuffix(end)))

    def moves_all_below(self, path: str, found: re.Match[str]) -> bool:
        """Whether whatever lies below a path moves with it."""
        below = self.pattern.fullmatch(f"{path}/{_ANYTHING}")
        return (
            below is not None
            and not self.transforms
            and self.target(below) == f"{self.target(found)}/{_ANYTHING}"
        )

    def target(self, found: re.Match[str], without: int | None = None) -> str:
        """The path for a match, in which wildcard `without` of the pattern does not count."""
        if "\\" in self.template:
            return found.expand(self.template)
        groups = [group for i, group in enumerate(found.groups()) if i != without]
        return fill(self.template, groups)


def _parse(rule: Any) -> _Rule:
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
    return _Rule(compile_pattern(source), source, template, tuple(transforms), chosen, at)


def _counting_group(rule: _Rule, stack: Stack, found: Sequence[re.Match[str]]) -> int:
    """The wildcard of a rule's source that numbers what is stacked.

    Raises:
      ValueError: none does, or it is not clear which.
    """
    if stack.index is not None:
        if not 0 <= stack.index < rule.pattern.groups:
            raise ValueError(f"{stack} counts by a wildcard that the saved pattern does not have")
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
            "Stack needs one wildcard more in the saved pattern than in the target pattern, which "
            "matches whole numbers"
        )
    raise ValueError("which wildcard counts is not clear; say it with Stack(index=...)")


def _numbered(rule: _Rule, unstack: Unstack, found: re.Match[str], count: int) -> list[str]:
    """The target paths of what is unstacked.

    Raises:
      ValueError: the target has no place for the number, or several.
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
            "Unstack needs one wildcard more in the target pattern than in the saved pattern"
            + ("; say which with Unstack(index=...)" if len(places) > 1 else "")
        )
    (place,) = places
    return [fill(template, [*groups[:place], str(i), *groups[place:]]) for i in range(count)]


# --- the graph -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """An edge to a value that a rule with transforms matched."""

    child: int
    path: str
    match: re.Match[str]


@dataclass(frozen=True, slots=True)
class _Group:
    """Saved nodes of which one new node is made, in order, and how."""

    target: str
    members: tuple[int, ...]
    transforms: tuple[Transform, ...]
    take: int | None  # the position, where the values are taken apart
    saved_path: str

    def derive(self, attributes: Sequence[Attribute], *, of_slot: bool = False) -> Derived:
        """The value that is made of one attribute of each. A slot keeps its dtype open: what is
        cast is the variable, and the optimizer decides what it keeps for it."""
        keys = [attribute.key for attribute in attributes]
        specs = [attribute.spec for attribute in attributes]
        steps: list[Step] = []
        for transform in self.transforms:
            if isinstance(transform, Unstack):
                spec = derive(keys, specs, steps).spec
                count = transform.count(spec)
                if self.take is None or not self.take < count:
                    raise ValueError(f"{transform}: {spec} has no position {self.take}")
                steps.append(transform.take(self.take, spec))
            else:
                steps.append(Cast() if of_slot and isinstance(transform, Cast) else transform)
        return derive(keys, specs, steps)


class _Renaming:
    """The growing columns of a renamed graph."""

    def __init__(self, graph: ObjectGraph, rules: Sequence[_Rule]):
        self.graph = graph
        self.rules = rules
        self.nodes = list(graph.nodes)
        self.edges: dict[int, list[tuple[Label, int]]] = {}
        self.by_text: dict[int, dict[str, int]] = {}  # see `below`
        self.slots: dict[int, list[Slot]] = defaultdict(list)
        self.saved_paths: dict[int, str] = {}
        self.derived: dict[str, Derived] = {}
        self.problems: list[tuple[str, str]] = []
        self.consumed: set[int] = set()
        self.containers: dict[int, str] = {}  # rule -> what it matched that holds no values
        self.made: dict[tuple[object, ...], int] = {}  # derived nodes by what they are made of

    def run(self) -> Renamed:
        moves, found = self.apply_rules()
        # What goes into a container comes after the container.
        for child, path, target in sorted(moves, key=lambda move: move[2].count("/")):
            self.insert(child, target, path)
        for number, matches in found.items():
            try:
                groups = [*self.groups_of(self.rules[number], matches)]
            except ValueError as error:
                self.problems.append((matches[0].path, f"{error} (rule {self.rules[number]})"))
                continue
            for group in groups:
                self.add_group(group)
        return self.finish()

    def apply_rules(self) -> tuple[list[tuple[int, str, str]], dict[int, list[_Found]]]:
        """Keeps the edges that no rule matches; gives plain moves, and the rest by rule."""
        moves: list[tuple[int, str, str]] = []
        found: dict[int, list[_Found]] = defaultdict(list)
        matched: set[int] = set()
        paths: list[str] = []
        for node_id, node in enumerate(self.graph.nodes):
            kept = self.edges[node_id] = []
            for (label, child), path in zip(
                node.children, _child_paths(self.graph, node_id), strict=True
            ):
                paths.append(path)
                number, match = self.rule_for(path, child)
                if match is None:
                    kept.append((label, child))
                    continue
                matched.add(number)
                rule = self.rules[number]
                if match.re is not rule.pattern:
                    rule = rule.of_containers
                    assert rule is not None
                if rule.transforms:
                    found[number].append(_Found(child, path, match))
                elif (target := rule.target(match)) == path:
                    kept.append((label, child))
                else:
                    moves.append((child, path, target))
        for number, rule in enumerate(self.rules):
            if number not in matched:
                self.problems.append(_unmatched(rule, self.containers.get(number), paths))
        return moves, found

    def rule_for(self, path: str, child: int) -> tuple[int, re.Match[str] | None]:
        """The first rule that applies to a path. Wildcards and transforms are for values; but a
        rule for everything below an optimizer moves it, and so its slots."""
        node = self.graph.nodes[child]
        for number, rule in enumerate(self.rules):
            match = rule.pattern.fullmatch(path)
            if match is None:
                whole = rule.of_containers if node.slots else None
                if whole is not None and (match := whole.pattern.fullmatch(path)):
                    return number, match
                continue
            if node.attributes:
                return number, match
            if not rule.transforms and (node.saver or not rule.pattern.groups):
                return number, match
            if node.slots and rule.moves_all_below(path, match):
                return number, match
            self.containers.setdefault(number, path)
        return -1, None

    def groups_of(self, rule: _Rule, found: Sequence[_Found]) -> Iterator[_Group]:
        match rule.many:
            case Stack() as stack:
                yield from self.stacked(rule, stack, found)
            case Unstack() as unstack:
                for one in found:
                    yield from self.unstacked(rule, unstack, one)
            case None:
                for one in found:
                    target = rule.target(one.match)
                    yield _Group(target, (one.child,), rule.transforms, None, one.path)

    def stacked(self, rule: _Rule, stack: Stack, found: Sequence[_Found]) -> Iterator[_Group]:
        group = _counting_group(rule, stack, [one.match for one in found])
        by_target: dict[str, list[tuple[int, _Found]]] = defaultdict(list)
        for one in found:
            number = one.match.group(group + 1) or ""
            if not number.isdecimal():
                self.problems.append((one.path, f"{number!r} is no position to stack at"))
                continue
            by_target[rule.target(one.match, without=group)].append((int(number), one))
        for target, members in by_target.items():
            members.sort(key=lambda member: member[0])
            if problem := _gaps([number for number, _ in members]):
                self.problems.append((target, f"cannot be stacked: {problem} (rule {rule})"))
                continue
            first, last = members[0][1].path, members[-1][1].path
            path = f"{first} ... {last}" if len(members) > 1 else first
            children = tuple([one.child for _, one in members])
            yield _Group(target, children, rule.transforms, None, path)

    def unstacked(self, rule: _Rule, unstack: Unstack, one: _Found) -> Iterator[_Group]:
        attribute = self.graph.nodes[one.child].attributes[0]
        before = [step for step in rule.transforms[: rule.at] if not isinstance(step, Unstack)]
        spec = derive([attribute.key], [attribute.spec], before).spec
        targets = _numbered(rule, unstack, one.match, unstack.count(spec))
        axis = unstack.axis % max(len(spec.shape), 1)
        for i, target in enumerate(targets):
            where = ", ".join([":"] * axis + [str(i)])
            path = f"{one.path}[{where}]"
            yield _Group(target, (one.child,), rule.transforms, i, path)

    def add_group(self, group: _Group) -> None:
        """A node for a group of values, and further ones for what optimizers hold for them."""
        what = (group.members, group.transforms, group.take)
        node = self.made.get(what)
        if node is not None:  # values that were tied stay tied
            self.insert(node, group.target, group.saved_path)
            return
        node = self.add_node(group, group.target, group.members)
        if node is None:
            return
        self.made[what] = node
        self.insert(node, group.target, group.saved_path)
        self.consumed.update(group.members)
        for optimizer, name, slots in slot_groups(self.graph, group.members):
            path = f"{group.target} ({name} of {self.graph.paths[optimizer]})"
            slot = self.add_node(group, path, slots, of_slot=True)
            if slot is not None:
                self.slots[optimizer].append(Slot(node, name, slot))
                self.consumed.update(slots)

    def add_node(
        self, group: _Group, path: str, members: Sequence[int], *, of_slot: bool = False
    ) -> int | None:
        entries = [self.graph.nodes[member] for member in members]
        node = len(self.nodes)
        attributes: list[Attribute] = []
        for attribute in entries[0].attributes:
            alike = [a for entry in entries for a in entry.attributes if a.name == attribute.name]
            try:
                if len(alike) != len(entries):
                    raise ValueError(f"not all of them have {attribute.name}")
                derived = group.derive(alike, of_slot=of_slot)
            except ValueError as error:
                self.problems.append((path, f"cannot be made of {group.saved_path}: {error}"))
                return None
            key = attribute_key(f".DERIVED/{node}", attribute.name)
            self.derived[key] = derived
            attributes.append(Attribute(attribute.name, key, derived.spec))
        self.nodes.append(Node("leaf", attributes=tuple(attributes)))
        self.edges[node] = []
        self.saved_paths[node] = (
            f"{self.graph.paths[members[0]]}{' ...' * (len(members) > 1)}"
            if of_slot
            else group.saved_path
        )
        return node

    def insert(self, child: int, target: str, path: str) -> None:
        """Adds an edge chain for `target` that ends in `child`."""
        here = 0
        names = [
            unescape(name) if ".S" in name or ".." in name else name for name in target.split("/")
        ]
        for name in names[:-1]:
            there = self.below(here).get(name)
            if there is None:
                there = len(self.nodes)
                self.nodes.append(Node(container="dict"))
                self.edges[there] = []
                self.edges[here].append((name, there))
                self.below(here)[name] = there
            here = there
        name = names[-1]
        known = self.below(here).get(name)
        if known is not None and not self.is_emptied(known):
            what = f"two saved values would be called {target} (one of them is {path})"
            self.problems.append((target, what))
            return
        if known is not None:
            self.edges[here] = [edge for edge in self.edges[here] if edge[1] != known]
        self.edges[here].append((name, child))
        self.below(here)[name] = child

    def below(self, node: int) -> dict[str, int]:
        """The children of a node by text, as `edges` has them."""
        if node not in self.by_text:
            edges = reversed(self.edges[node])
            self.by_text[node] = {str(label): child for label, child in edges}
        return self.by_text[node]

    def is_emptied(self, node: int) -> bool:
        """Whether a container has lost all its children to the rules."""
        entry = self.nodes[node]
        has_lost = bool(entry.children) and not self.edges[node]
        return has_lost and not (entry.attributes or entry.slots or entry.saver)

    def finish(self) -> Renamed:
        nodes = [self.finished(i, node) for i, node in enumerate(self.nodes)]
        # What was made into something else is gone, unless another edge still leads to it.
        gone = self.consumed & _unreachable(nodes)
        if gone:
            nodes = [
                replace(node, attributes=())
                if i in gone
                else replace(node, slots=tuple([s for s in node.slots if s.node not in gone]))
                if node.slots
                else node
                for i, node in enumerate(nodes)
            ]
        keys = list(object_keys(nodes))
        for i in _unreachable(nodes):
            if i < len(self.graph.nodes):  # left behind: known by the name that it had
                keys[i] = self.graph.object_keys[i]
        renamed = ObjectGraph(tuple(nodes), tuple(keys), self.graph.named)
        paths = {**self.saved_paths, **self.graph.other_paths(renamed)}
        problems = [ReportEntry(path, what=what) for path, what in self.problems]
        return Renamed(renamed, paths, tuple(problems), self.derived)

    def finished(self, number: int, node: Node) -> Node:
        children, slots = tuple(self.edges[number]), self.slots.get(number, ())
        if children == node.children and not slots:
            return node
        return replace(node, children=children, slots=(*node.slots, *slots))


def slot_groups(
    graph: ObjectGraph, variables: Sequence[int]
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(optimizer, slot name, slot variables) for what optimizers hold for all of some variables.

    The slot variables come in the order of the variables.
    """
    by_owner: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    for variable in variables:
        for optimizer, slot in graph.slots_of_variable.get(variable, ()):
            by_owner[optimizer, slot.name][variable] = slot.node
    for (optimizer, name), found in by_owner.items():
        if len(found) == len(set(variables)):
            yield optimizer, name, tuple([found[variable] for variable in variables])


def _unreachable(nodes: Sequence[Node]) -> set[int]:
    """Nodes that no edge leads to; the slot variables of such nodes are among them."""
    seen = {*descendants(nodes)}
    slots = {slot.node for optimizer, slot in slots_in(nodes) if {optimizer, slot.variable} <= seen}
    return {*range(len(nodes))} - seen - slots


def _child_paths(graph: ObjectGraph, node: int) -> list[str]:
    """The path of each of a node's edges (a shared child has several)."""
    names = escaped_names([label for label, _ in graph.nodes[node].children])
    prefix = f"{graph.paths[node]}/" if node else ""
    return [prefix + path_of(name) for name in names]


def _gaps(numbers: Sequence[int]) -> str | None:
    """Why sorted numbers do not count from the first to the last."""
    twice = [str(number) for number, count in Counter(numbers).items() if count > 1]
    if twice:
        return f"{_listed(twice)} appears twice"
    gaps = [
        str(a + 1) if b == a + 2 else f"{a + 1} to {b - 1}"
        for a, b in pairwise(numbers)
        if b > a + 1
    ]
    if gaps:
        return f"{_listed(gaps)} is missing between {numbers[0]} and {numbers[-1]}"
    return None


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _unmatched(rule: _Rule, container: str | None, paths: Sequence[str]) -> tuple[str, str]:
    source = rule.source if isinstance(rule.source, str) else rule.source.pattern
    what = f"the rename rule {rule} matches nothing saved"
    if container is None and any(map(rule.pattern.fullmatch, paths)):
        what += " that no earlier rule matches"
    elif container is not None:
        what += f" that holds values; to rename those in {container} write {source}/**"
    else:
        what += near_miss(nearest(source, paths))
    return source, what
