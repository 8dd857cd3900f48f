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
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
from ckpt_jax.graph.patterns import Heads, fill
from ckpt_jax.report import ReportEntry
from ckpt_jax.restoring.formulas import Derivation, Derived, Source
from ckpt_jax.restoring.grids import part_of_stored, through
from ckpt_jax.restoring.rules import (
    ParsedRule,
    Rule,
    counting_wildcard,
    numbered_targets,
    parse,
    unmatched_rule,
)
from ckpt_jax.restoring.transforms import Concat, Split, Stack, Transform, Unstack

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
    if not isinstance(rules, Iterable):
        raise TypeError(f"rename= is a list of rules (saved pattern, target), got {rules!r}")
    parsed = [parse(rule) for rule in rules]
    if not parsed:
        return Renamed(graph)
    return _Renaming(graph, parsed).run()


@dataclass(frozen=True, slots=True)
class _Found:
    """An edge to a value that a rule with transforms matched; `member` is the number of the
    pattern."""

    child: int
    path: str
    match: re.Match[str]
    member: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Saved nodes of which a rule makes new nodes.

    Attributes:
      rule: the rule.
      rows: the nodes by number and by member, see `grids`.
      match: of the first of them.
      without: the wildcard of its pattern that numbers the rows; None if there is none.
      saved_path: says where they are.
    """

    rule: ParsedRule
    rows: tuple[tuple[int, ...], ...]
    match: re.Match[str]
    without: int | None
    saved_path: str

    @property
    def members(self) -> tuple[int, ...]:
        """All the nodes."""
        return tuple([node for row in self.rows for node in row])

    def targets(self, count: int, member: int) -> list[str]:
        """The paths of the values that the rule makes: of all numbers, for one target pattern."""
        step = self.rule.step_for("numbers", makes=True)
        if step is None:
            return [self.rule.target(self.match, self.without, member)]
        assert isinstance(step, Unstack | Split)
        return numbered_targets(self.rule, step, self.match, count, member)

    def derive(
        self, attributes: Mapping[int, Attribute], more: ParsedRule | None, *, of_slots: bool
    ) -> list[list[Derived]]:
        """The values that are made of one attribute of each member.

        Args:
          attributes: by node.
          more: a rule of which the steps come after those of this group.
          of_slots: whether these are the slots of the variables that the rule is for.
        """
        values = [
            [Source(attributes[node].key, attributes[node].spec) for node in row]
            for row in self.rows
        ]
        grid = through(self.rule, values, of_slots=of_slots)
        if more is not None:
            grid = [[through(more, [[each]])[0][0] for each in row] for row in grid]
        return [[Derived(each) for each in row] for row in grid]


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
        self.heads = Heads([source for rule in rules for source in rule.sources])
        self.rule_of = [number for number, rule in enumerate(rules) for _ in rule.sources]
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
        self.containers: dict[tuple[int, int], str] = {}  # rule, pattern -> a container it matched
        self.made: dict[tuple[object, ...], list[list[int]]] = {}  # nodes by members and steps
        self.notes: dict[int, str] = {}

    def run(self) -> Renamed:
        self.apply_rules()
        # A container is moved before the values that are moved into it.
        for child, path, target in sorted(self.moves, key=lambda move: move[2].count("/")):
            self.insert(child, target, path)
        for number, matches in self.found.items():
            try:
                for group in self.groups_of(self.rules[number], matches):
                    self.add_group(group)
            except ValueError as error:
                self.problems.append((matches[0].path, f"{error} (rule {self.rules[number]})"))
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
            members = {one.member for one in self.found.get(number, ())}
            for member in range(len(rule.sources)):
                if number not in self.matched or (len(rule.sources) > 1 and member not in members):
                    container = self.containers.get((number, member))
                    self.problems.append(unmatched_rule(rule, container, paths, member))

    def apply(self, number: int, match: re.Match[str], child: int, path: str) -> bool:
        """Applies a rule to an edge that it matches; whether it moves the edge."""
        self.matched.add(number)
        rule = self.rules[number]
        if match.re not in rule.patterns:
            rule = rule.of_containers
            assert rule is not None
        if rule.transforms:
            member = rule.patterns.index(match.re)
            self.found[number].append(_Found(child, path, match, member))
        elif (target := rule.target(match)) == path:
            return False
        else:
            self.moves.append((child, path, target))
        return True

    def apply_to_other_paths(self) -> None:
        """Applies rules that have matched nothing to the further paths of shared objects."""
        waiting = {*range(len(self.rules))} - self.matched
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
        self, path: str, child: int, among: Set[int] | None = None
    ) -> tuple[int, re.Match[str] | None]:
        """The first rule that applies to a path, and its match; all rules by default.

        Wildcards and transforms apply to values. One rule with a wildcard also moves a container: a
        rule for everything below an optimizer moves the optimizer together with its slots.
        """
        node = self.graph.nodes[child]
        for number in dict.fromkeys([self.rule_of[at] for at in self.heads.candidates(path)]):
            if among is not None and number not in among:
                continue
            rule = self.rules[number]
            found = rule.match(path)
            if found is None:
                whole = rule.of_containers if node.slots else None
                if whole is not None and (match := whole.pattern.fullmatch(path)):
                    return number, match
                continue
            member, match = found
            if node.attributes:
                return number, match
            if not rule.transforms and (node.saver or not rule.pattern.groups):
                return number, match
            if node.slots and rule.moves_all_below(path, match):
                return number, match
            self.containers.setdefault((number, member), path)
        return -1, None

    def groups_of(self, rule: ParsedRule, found: Sequence[_Found]) -> Iterator[_Group]:
        """The groups of values that a rule takes together."""
        if rule.step_for("numbers", makes=False) is None and len(rule.sources) == 1:
            for one in found:
                yield _Group(rule, ((one.child,),), one.match, None, one.path)
            return
        by_target: dict[tuple[str, ...], list[tuple[int, _Found]]] = defaultdict(list)
        wildcards = self.counting_wildcards(rule, found)
        for one in found:
            group = wildcards.get(one.member)
            number = "0" if group is None else one.match.group(group + 1) or ""
            if not number.isdecimal():
                self.problems.append((one.path, f"cannot be stacked: {number!r} is no number"))
                continue
            targets = [rule.target(one.match, group, i) for i in range(len(rule.templates))]
            by_target[tuple(targets)].append((int(number), one))
        for targets, members in by_target.items():
            group = self.gathered(rule, ", ".join(targets), members, wildcards)
            if group is not None:
                yield group

    def counting_wildcards(self, rule: ParsedRule, found: Sequence[_Found]) -> dict[int, int]:
        """By member: the wildcard that numbers the values; none if they are not numbered."""
        step = rule.step_for("numbers", makes=False)
        if step is None:
            return {}
        assert isinstance(step, Stack | Concat)
        matches: dict[int, list[re.Match[str]]] = defaultdict(list)
        for one in found:
            matches[one.member].append(one.match)
        return {
            member: counting_wildcard(rule, step, each, member) for member, each in matches.items()
        }

    def gathered(
        self,
        rule: ParsedRule,
        target: str,
        members: Sequence[tuple[int, _Found]],
        wildcards: Mapping[int, int],
    ) -> _Group | None:
        """The group of numbered values; None, after a problem was noted, if it is not complete."""
        count = len(rule.sources)
        by_member: list[list[tuple[int, _Found]]] = [[] for _ in range(count)]
        for number, one in sorted(members, key=lambda each: each[0]):
            by_member[one.member].append((number, one))
        for each in by_member:
            if problem := _gaps([number for number, _ in each]):
                self.problems.append((target, f"cannot be stacked: {problem} (rule {rule})"))
                return None
        lost = _lost(rule, by_member, wildcards)
        if lost:
            what = f"is made of {_listed(lost)}, too, which the checkpoint lacks, or which an "
            self.problems.append((target, f"{what}earlier rule takes (rule {rule})"))
            return None
        rows = tuple([tuple([one.child for _, one in row]) for row in zip(*by_member, strict=True)])
        paths = [
            f"{each[0][1].path} ... {each[-1][1].path}" if len(each) > 1 else each[0][1].path
            for each in by_member
        ]
        first = by_member[0][0][1]
        return _Group(rule, rows, first.match, wildcards.get(0), _listed(paths))

    def add_group(self, group: _Group) -> None:
        """Adds nodes for the values that a rule makes of a group, and nodes for the slots of these
        values."""
        source = (group.rows, group.rule.transforms, len(group.rule.templates))
        nodes = self.made.get(source)  # values that were tied stay tied
        if nodes is None:
            nodes = self.add_nodes(group, group.rows)
            if nodes is None:
                return
            self.made[source] = nodes
            self.consumed.update(group.members)
            self.add_slots(group, nodes)
        for member, column in enumerate(zip(*nodes, strict=True)):
            targets = group.targets(len(nodes), member)
            for node, target in zip(column, targets, strict=True):
                self.insert(node, target, self.saved_paths[node])

    def add_slots(self, group: _Group, nodes: Sequence[Sequence[int]]) -> None:
        """Adds nodes for the slots of the values of a group."""
        members = group.members
        for optimizer, name, slots in slot_groups(self.graph, members):
            rule = self.slot_rules.get((optimizer, name))
            slot_of = dict(zip(members, slots, strict=True))
            rows = tuple([tuple([slot_of[node] for node in row]) for row in group.rows])
            of_slots = replace(group, rows=rows)
            path = f"{name} of {self.graph.paths[optimizer]}"
            made = self.add_nodes(of_slots, rows, path, rule.rule if rule else None)
            if made is None:
                continue
            for row, its in zip(nodes, made, strict=True):
                for node, slot in zip(row, its, strict=True):
                    new = Slot(node, rule.name if rule else name, slot)
                    self.slots[optimizer].append(new)
            self.consumed.update(slots)

    def add_nodes(
        self,
        group: _Group,
        rows: Sequence[Sequence[int]],
        slots: str = "",
        more: ParsedRule | None = None,
    ) -> list[list[int]] | None:
        """Nodes for the values that a rule makes; None, after a problem was noted, if it cannot.

        Args:
          group: what the rule takes.
          rows: the nodes of the group.
          slots: if they are slots: which ones, for messages.
          more: a rule for slots.
        """
        members = [node for row in rows for node in row]
        entries = {node: self.graph.nodes[node] for node in members}
        made: dict[str, list[list[Derived]]] = {}
        try:
            for attribute in entries[members[0]].attributes:
                name = attribute.name
                alike = {
                    node: a for node, e in entries.items() for a in e.attributes if a.name == name
                }
                if len(alike) != len(entries):
                    raise ValueError(f"not all of them have {name}")
                made[name] = group.derive(alike, more, of_slots=bool(slots))
            shapes = {(len(grid), len(grid[0]) if grid else 0) for grid in made.values()}
            if len(shapes) != 1:
                raise ValueError("the values of these objects are not alike")
            ((height, width),) = shapes
            targets = [group.targets(height, member) for member in range(width)]
        except ValueError as error:
            if slots:
                self.notes.update(dict.fromkeys(members, str(error)))
                return None
            target = ", ".join(group.rule.templates)
            if group.rule.step_for("numbers", makes=True) is None:
                each = range(len(group.rule.templates))
                target = ", ".join([group.targets(1, number)[0] for number in each])
            self.problems.append((target, f"cannot be made of {group.saved_path}: {error}"))
            return None
        nodes: list[list[int]] = []
        for row in range(height):
            nodes.append([])
            for column in range(width):
                grid = {name: each[row][column] for name, each in made.items()}
                path = targets[column][row] + (f" ({slots})" if slots else "")
                nodes[-1].append(self.add_node(grid, path, group, is_slot=bool(slots)))
        return nodes

    def add_node(
        self, values: Mapping[str, Derived], path: str, group: _Group, *, is_slot: bool
    ) -> int:
        """A node with derived values, by the name of the attribute."""
        node = len(self.nodes)
        attributes: list[Attribute] = []
        for name, derived in values.items():
            key = attribute_key(f".DERIVED/{node}", name)
            self.derived[key] = derived
            attributes.append(Attribute(name, key, derived.spec))
        self.nodes.append(Node("leaf", attributes=tuple(attributes)))
        self.edges[node] = []
        if is_slot:
            first, more = group.members[0], " ..." * (len(group.members) > 1)
            self.saved_paths[node] = f"{self.graph.paths[first]}{more}"
        else:
            part = part_of_stored(next(iter(values.values())).formula)
            self.saved_paths[node] = f"{group.saved_path}{part}"
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
                    node = self.add_slot(slot.node, rule.rule)
                if node is not None:
                    name = slot.name if rule is None else rule.name
                    slots.append(replace(slot, name=name, node=node))
            self.nodes[optimizer] = replace(self.nodes[optimizer], slots=tuple(slots))

    def add_slot(self, slot: int, rule: ParsedRule) -> int | None:
        """A node for a slot that a rule for slots changes."""
        path = self.graph.paths[slot]
        match = re.fullmatch("(.*)", path)
        assert match is not None
        whole = replace(rule, templates=("**",))  # a slot keeps its place
        nodes = self.add_nodes(_Group(whole, ((slot,),), match, None, path), ((slot,),))
        self.consumed.add(slot)
        return None if nodes is None else nodes[0][0]

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
        return Renamed(renamed, paths, tuple(problems), self.derived, consumed, self.notes)

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


def _lost(
    rule: ParsedRule,
    by_member: Sequence[Sequence[tuple[int, _Found]]],
    wildcards: Mapping[int, int],
) -> list[str]:
    """The paths of members that a group lacks."""
    numbers = sorted({number for each in by_member for number, _ in each})
    lost: list[str] = []
    for member, each in enumerate(by_member):
        source, known = rule.sources[member], {number for number, _ in each}
        for number in numbers:
            if number in known:
                continue
            other = next(one for many in by_member for n, one in many if n == number)
            groups = [*other.match.groups()]
            if not isinstance(source, str):
                lost.append(source.pattern)
            else:
                lost.append(fill(source, groups))
    return lost


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
