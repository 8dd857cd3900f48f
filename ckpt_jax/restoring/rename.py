"""Renaming: a saved graph under the names, and in the shapes, of another program.

A rule is (saved pattern, target pattern, *transforms). A plain rule moves an edge of the graph: a
value or a whole container gets another name and stays the same node. A rule with transforms makes
new nodes, with values that are *derived* from stored ones (see `transforms`). The *slots* of a
variable, which an optimizer holds for it, follow the variable: they stay as they are if it moves,
and are derived in the same way if it is derived.

A rule is for edges, and the path of an edge is made of the first, shortest path to its node. A rule
that matches none of these paths may mean all slots of one name: `optimizer/m`. Or it may mean
another path to a shared object.

The outcome is an ordinary graph. Match, plan and assign know nothing of rules; only reading does
(see `derived`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ckpt_jax.graph.as_tree import edges_by_path, is_tree
from ckpt_jax.graph.labels import (
    Label,
    attribute_key,
    escaped_names,
    path_of,
    readable,
    unescape,
)
from ckpt_jax.graph.nodes import (
    Attribute,
    Node,
    ObjectGraph,
    Slot,
    descendants,
    object_keys,
    slots_in,
)
from ckpt_jax.report import ReportEntry
from ckpt_jax.restoring.rules import (
    ParsedRule,
    Rule,
    counting_wildcard,
    numbered_targets,
    parse,
    unmatched_rule,
)
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

_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class Renamed:
    """A graph under new names.

    Attributes:
      graph: the same values, reached by other edges, and derived values.
      saved_paths: the path in the original graph of every node that moved.
      problems: of rules that cannot be applied.
      derived: how derived values are made, by their keys in `graph`.
      consumed: nodes that values are derived from, although another path leads to them: they need
        no place of their own.
      notes: for nodes that may be left without a place in the program: why.
    """

    graph: ObjectGraph
    saved_paths: Mapping[int, str] = field(default_factory=dict)
    problems: tuple[ReportEntry, ...] = ()
    derived: Mapping[str, Derivation] = field(default_factory=dict)
    consumed: frozenset[int] = frozenset()
    notes: Mapping[int, str] = field(default_factory=dict)


def rename(graph: ObjectGraph, rules: Iterable[Rule]) -> Renamed:
    """Applies rename rules to a saved graph; for each path the first rule that matches counts.

    Raises:
      TypeError, ValueError: a rule is malformed.
    """
    parsed = [parse(rule) for rule in rules]
    if not parsed:
        return Renamed(graph)
    return _Renaming(graph, parsed).run()


@dataclass(frozen=True, slots=True)
class _Found:
    """An edge to a value that a rule with transforms matched."""

    child: int
    path: str
    match: re.Match[str]


@dataclass(frozen=True, slots=True)
class _Group:
    """Saved nodes, in order, of which transforms make one new node."""

    target: str
    members: tuple[int, ...]
    transforms: tuple[Transform, ...]
    take: int | None  # the position, if the values are taken apart
    saved_path: str

    def derive(self, attributes: Sequence[Attribute], *, of_slot: bool = False) -> Derived:
        """The value that is made of one attribute of each member.

        `Cast(dtype)` is for the variable. A slot takes the dtype that its optimizer wants.
        """
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


@dataclass(frozen=True, slots=True)
class _SlotRule:
    """A rule for the slots of one name, and the path that it gives them."""

    rule: ParsedRule
    target: str

    @property
    def name(self) -> str:
        """The new name of the slots."""
        return _unescaped(self.target.rpartition("/")[2])

    @property
    def place(self) -> str:
        """The path of the optimizer."""
        return self.target.rpartition("/")[0]

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return self.rule.transforms


class _Renaming:
    """A renamed graph under construction."""

    def __init__(self, graph: ObjectGraph, rules: Sequence[ParsedRule]):
        self.graph = graph
        self.rules = rules
        self.nodes = list(graph.nodes)
        self.edges: dict[int, list[tuple[Label, int]]] = {}
        self.by_text: dict[int, dict[str, int]] = {}  # see `below`
        self.slots: dict[int, list[Slot]] = defaultdict(list)
        self.saved_paths: dict[int, str] = {}
        self.derived: dict[str, Derived] = {}
        self.problems: list[tuple[str, str]] = []
        self.matched: set[int] = set()  # numbers of rules
        self.moves: list[tuple[int, str, str]] = []  # (node, path, target)
        self.found: dict[int, list[_Found]] = defaultdict(list)  # by rule, if it has transforms
        self.slot_rules: dict[tuple[int, str], _SlotRule] = {}  # by optimizer and slot name
        self.consumed: set[int] = set()
        self.containers: dict[int, str] = {}  # rule -> a container that it matched
        self.made: dict[tuple[object, ...], int] = {}  # derived nodes by members and transforms

    def run(self) -> Renamed:
        self.apply_rules()
        # A container is moved before the values that are moved into it.
        for child, path, target in sorted(self.moves, key=lambda move: move[2].count("/")):
            self.insert(child, target, path)
        for number, matches in self.found.items():
            try:
                groups = [*self.groups_of(self.rules[number], matches)]
            except ValueError as error:
                self.problems.append((matches[0].path, f"{error} (rule {self.rules[number]})"))
                continue
            for group in groups:
                self.add_group(group)
        return self.finish()

    def apply_rules(self) -> None:
        """Keeps the edges that no rule matches; notes plain moves, and other matches by rule."""
        paths: list[str] = []
        for node_id, node in enumerate(self.graph.nodes):
            kept = self.edges[node_id] = []
            for (label, child), path in zip(
                node.children, _child_paths(self.graph, node_id), strict=True
            ):
                paths.append(path)
                number, match = self.rule_for(path, child)
                if match is None or not self.apply(number, match, child, path):
                    kept.append((label, child))
        if len(self.matched) < len(self.rules):
            paths += self.apply_to_slots()
        if len(self.matched) < len(self.rules) and not is_tree(self.graph):
            self.apply_to_other_paths()
        for number, rule in enumerate(self.rules):
            if number not in self.matched:
                self.problems.append(unmatched_rule(rule, self.containers.get(number), paths))

    def apply(self, number: int, match: re.Match[str], child: int, path: str) -> bool:
        """Applies a rule to an edge that it matches; whether it moves the edge."""
        self.matched.add(number)
        rule = self.rules[number]
        if match.re is not rule.pattern:
            rule = rule.of_containers
            assert rule is not None
        if rule.transforms:
            self.found[number].append(_Found(child, path, match))
        elif (target := rule.target(match)) == path:
            return False
        else:
            self.moves.append((child, path, target))
        return True

    def apply_to_other_paths(self) -> None:
        """Applies rules that have matched nothing to the further paths of shared objects."""
        waiting = [number for number in range(len(self.rules)) if number not in self.matched]
        kept = {node: dict(edges) for node, edges in self.edges.items()}
        for path, node, label in edges_by_path(self.graph):
            child = kept[node].get(label)
            if child is not None:
                number, match = self.rule_for(path, child, waiting)
                if match is not None and self.apply(number, match, child, path):
                    del kept[node][label]
        self.edges = {node: [*edges.items()] for node, edges in kept.items()}

    def apply_to_slots(self) -> list[str]:
        """Applies rules that have matched nothing to the slots of optimizers, all of one name at
        once. Returns the paths of these."""
        waiting = [rule for number, rule in enumerate(self.rules) if number not in self.matched]
        paths: list[str] = []
        for optimizer, node in enumerate(self.graph.nodes):
            for name in dict.fromkeys([slot.name for slot in node.slots]):
                paths.append(self.slot_path(optimizer, name))
                for rule in waiting:
                    if (target := rule.of_all_below(paths[-1])) is not None:
                        self.matched.add(self.rules.index(rule))
                        self.slot_rules[optimizer, name] = _SlotRule(rule, target)
                        break
        return paths

    def slot_path(self, optimizer: int, name: str) -> str:
        """The path that the slots of a name have in common."""
        return "/".join(filter(None, (self.graph.paths[optimizer], readable(name))))

    def rule_for(
        self, path: str, child: int, among: Sequence[int] | None = None
    ) -> tuple[int, re.Match[str] | None]:
        """The first rule that applies to a path, and its match; all rules by default.

        Wildcards and transforms apply to values. One rule with a wildcard also moves a container: a
        rule for everything below an optimizer moves the optimizer together with its slots.
        """
        node = self.graph.nodes[child]
        for number in range(len(self.rules)) if among is None else among:
            rule = self.rules[number]
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

    def groups_of(self, rule: ParsedRule, found: Sequence[_Found]) -> Iterator[_Group]:
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

    def stacked(self, rule: ParsedRule, stack: Stack, found: Sequence[_Found]) -> Iterator[_Group]:
        group = counting_wildcard(rule, stack, [one.match for one in found])
        by_target: dict[str, list[tuple[int, _Found]]] = defaultdict(list)
        for one in found:
            number = one.match.group(group + 1) or ""
            if not number.isdecimal():
                self.problems.append((one.path, f"cannot be stacked: {number!r} is no number"))
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

    def unstacked(self, rule: ParsedRule, unstack: Unstack, one: _Found) -> Iterator[_Group]:
        attribute = self.graph.nodes[one.child].attributes[0]
        before = [step for step in rule.transforms[: rule.at] if not isinstance(step, Unstack)]
        spec = derive([attribute.key], [attribute.spec], before).spec
        targets = numbered_targets(rule, unstack, one.match, unstack.count(spec))
        axis = unstack.axis % max(len(spec.shape), 1)
        for i, target in enumerate(targets):
            where = ", ".join([":"] * axis + [str(i)])
            path = f"{one.path}[{where}]"
            yield _Group(target, (one.child,), rule.transforms, i, path)

    def add_group(self, group: _Group) -> None:
        """Adds a node for a group of values, and nodes for the slots of these values."""
        source = (group.members, group.transforms, group.take)
        node = self.made.get(source)
        if node is not None:  # values that were tied stay tied
            self.insert(node, group.target, group.saved_path)
            return
        node = self.add_node(group, group.target, group.members)
        if node is None:
            return
        self.made[source] = node
        self.insert(node, group.target, group.saved_path)
        self.consumed.update(group.members)
        for optimizer, name, slots in slot_groups(self.graph, group.members):
            path = f"{group.target} ({name} of {self.graph.paths[optimizer]})"
            rule = self.slot_rules.get((optimizer, name))
            more = rule.transforms if rule else ()
            together = replace(group, transforms=(*group.transforms, *more))
            slot = self.add_node(together, path, slots, of_slot=True)
            if slot is not None:
                self.slots[optimizer].append(Slot(node, rule.name if rule else name, slot))
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
        """Adds the edges of the path `target`, so that it leads to `child`."""
        here = 0
        names = [*map(_unescaped, target.split("/"))]
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
        """The children of a node, from `edges`, by text."""
        if node not in self.by_text:
            edges = reversed(self.edges[node])
            self.by_text[node] = {str(label): child for label, child in edges}
        return self.by_text[node]

    def is_emptied(self, node: int) -> bool:
        """Whether a container has lost all its children to the rules."""
        entry = self.nodes[node]
        has_lost = bool(entry.children) and not self.edges[node]
        return has_lost and not (entry.attributes or entry.slots or entry.saver)

    def rename_slots(self) -> None:
        """Gives slots the names that rules have for them, and derives them if a rule says so."""
        for optimizer in {optimizer: None for optimizer, _ in self.slot_rules}:
            slots: list[Slot] = []
            for slot in self.nodes[optimizer].slots:
                rule = self.slot_rules.get((optimizer, slot.name))
                node: int | None = slot.node
                if rule is not None and rule.transforms:
                    path = self.graph.paths[slot.node]
                    group = _Group(path, (slot.node,), rule.transforms, None, path)
                    node = self.add_node(group, path, group.members)
                    self.consumed.add(slot.node)
                if node is not None:
                    name = slot.name if rule is None else rule.name
                    slots.append(replace(slot, name=name, node=node))
            self.nodes[optimizer] = replace(self.nodes[optimizer], slots=tuple(slots))

    def check_slot_rules(self, renamed: ObjectGraph) -> None:
        """Slots stay with their optimizer: a rule must not name another place for them."""
        for (optimizer, name), rule in self.slot_rules.items():
            places = {self.graph.paths[optimizer], renamed.paths[optimizer]}
            if rule.place not in places:
                path = self.slot_path(optimizer, name)
                what = (
                    f"slots stay with their optimizer: the rename rule {rule.rule} has to name "
                    f"a slot of {' or '.join(sorted(map(repr, places)))}"
                )
                self.problems.append((path, what))

    def finish(self) -> Renamed:
        self.rename_slots()
        nodes = [self.finished(i, node) for i, node in enumerate(self.nodes)]
        # Values that derived values were made of are gone, unless another edge leads to them.
        unreachable = _unreachable(nodes)
        gone = self.consumed & unreachable
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
        for i in unreachable:
            if i < len(self.graph.nodes):  # no edge leads to it any more: it keeps its old name
                keys[i] = self.graph.object_keys[i]
        renamed = ObjectGraph(tuple(nodes), tuple(keys), self.graph.named)
        self.check_slot_rules(renamed)
        paths = {**self.saved_paths, **self.graph.other_paths(renamed)}
        problems = [ReportEntry(path, what=what) for path, what in self.problems]
        consumed = frozenset(self.consumed - gone)
        return Renamed(renamed, paths, tuple(problems), self.derived, consumed)

    def finished(self, number: int, node: Node) -> Node:
        children, slots = tuple(self.edges[number]), self.slots.get(number, ())
        if children == node.children and not slots:
            return node
        return replace(node, children=children, slots=(*node.slots, *slots))


def slot_groups(
    graph: ObjectGraph, variables: Sequence[int]
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(optimizer, slot name, slot variables) for slots that an optimizer has for all variables.

    The slot variables are in the order of the variables.
    """
    by_owner: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    for variable in variables:
        for optimizer, slot in graph.slots_of_variable.get(variable, ()):
            by_owner[optimizer, slot.name][variable] = slot.node
    for (optimizer, name), found in by_owner.items():
        if len(found) == len(set(variables)):
            yield optimizer, name, tuple([found[variable] for variable in variables])


def _unescaped(name: str) -> str:
    """A part of a target path as a local name."""
    return unescape(name) if ".S" in name or ".." in name else name


def _unreachable(nodes: Sequence[Node]) -> set[int]:
    """Nodes that no edge leads to; the slot variables of such nodes are among them."""
    seen = {*descendants(nodes)}
    slots = {slot.node for optimizer, slot in slots_in(nodes) if {optimizer, slot.variable} <= seen}
    return {*range(len(nodes))} - seen - slots


def _child_paths(graph: ObjectGraph, node: int) -> list[str]:
    """The paths of a node's edges. A shared child has several."""
    names = escaped_names([label for label, _ in graph.nodes[node].children])
    prefix = f"{graph.paths[node]}/" if node else ""
    return [prefix + path_of(name) for name in names]


def _gaps(numbers: Sequence[int]) -> str | None:
    """Why sorted numbers are not consecutive; None if they are."""
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
