"""Plan: turns a match into a list of values to read. All problems are known before a byte is read.

A `ReadPlan` lists one `ValueRead` for each value that the program takes from the checkpoint, and
the `SaverCall`s of registered savers. Its report accounts for every value of the checkpoint and of
the program. After the values have been read, `assign` puts them into the live objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_jax.graph.labels import ONLY_VALUE
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, reachable
from ckpt_jax.graph.specs import OPEN, LeafSpec
from ckpt_jax.matching.match import Match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import OptimizerView
from ckpt_jax.report import ReportEntry, RestoreReport, nearest

Fits = Callable[[LeafSpec, LeafSpec, Any], str | None]
_MAX_HINTS = 50  # missing values with suggestions: looking for similar names takes time


@dataclass(frozen=True, slots=True)
class ValueRead:
    """One value to read: from checkpoint key `key` into attribute `name` of a live node."""

    node: int
    name: str
    key: str
    saved: LeafSpec
    target: LeafSpec
    value: Any  # the present value of the target


@dataclass(frozen=True, slots=True)
class SaverCall:
    """Live nodes for a registered saver, by the name that the saver knows them by."""

    saver: str
    nodes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The values that a restore has to read.

    Attributes:
      report: accounts for every value of the checkpoint and of the program.
      reads: the values that the default saver reads.
      calls: the objects that registered savers restore.
      used: the saved nodes whose values all have a place in the program.
    """

    report: RestoreReport
    reads: tuple[ValueRead, ...]
    calls: tuple[SaverCall, ...]
    used: frozenset[int] = frozenset()
    conflicting: tuple[ReportEntry, ...] = ()


def plan_read(
    saved: ObjectGraph,
    live: LiveGraph,
    match: Match,
    *,
    path: str,
    fits: Fits,
    saved_paths: Mapping[int, str] | None = None,
    only: frozenset[int] | None = None,
    skip_slots: bool = False,
    consumed: frozenset[int] = frozenset(),
    notes: Mapping[int, str] | None = None,
) -> ReadPlan:
    """The plan that follows from a match.

    Args:
      saved, live, match: the two graphs and their match.
      path: the path of the checkpoint, for the report.
      fits: a function of (saved spec, target spec, target value) that returns why the saved value
        cannot become the target's, or None if it can.
      saved_paths: for nodes whose names were changed, their path in the checkpoint.
      only: live nodes to plan for, if the others are done; all by default. Then the report is
        about these nodes only, and does not list saved values that no node takes.
      skip_slots: leave out slot variables, both saved and live ones.
      consumed: saved nodes that need no place, because other values are made of theirs.
      notes: for saved nodes that may have no place: why, for the report.
    """
    planner = _Planner(saved, live, match, fits, saved_paths or {}, skip_slots)
    planner.skipped_saved |= consumed
    planner.notes = notes or {}
    planner.live_side(only)
    planner.fixed_slots(only)
    planner.conflicts()
    if only is None:
        planner.saved_side()
    return planner.finish(path)


class _Planner:
    def __init__(
        self,
        saved: ObjectGraph,
        live: LiveGraph,
        match: Match,
        fits: Fits,
        saved_paths: Mapping[int, str],
        skip_slots: bool,
    ):
        self.saved, self.live, self.match, self.fits = saved, live, match, fits
        self.sources = match.sources()
        self.saved_paths = saved_paths
        self.skipped_saved = saved.slot_nodes if skip_slots else frozenset()
        self.skipped_live = live.graph.slot_nodes if skip_slots else frozenset()
        self.notes: Mapping[int, str] = {}
        self.reads: list[ValueRead] = []
        self.calls: dict[str, list[dict[str, int]]] = {}  # by saver
        self.used: set[tuple[int, str]] = set()  # (saved node, attribute) with a place to go
        self.conflicting: list[ReportEntry] = []
        self.entries: dict[str, list[ReportEntry]] = {
            kind: [] for kind in ("restored", "missing", "unexpected", "mismatched", "deferred")
        }

    def live_side(self, only: frozenset[int] | None) -> None:
        for node_id, node in enumerate(self.live.graph.nodes):
            if node_id in self.skipped_live or (only is not None and node_id not in only):
                continue
            source = self.sources.get(node_id)
            if self.saved.named and node.saver:
                source = None  # a registered saver reads only what a registered saver wrote
            if source is not None and (node.saver or self.saved.nodes[source].saver):
                self.by_saver(node_id, node, source)
                continue
            self.by_attributes(node_id, node, source)
            if node.saver:
                path = self.live.graph.paths[node_id]
                self.entries["missing"].append(ReportEntry(path, f"saver {node.saver.name}"))

    def fixed_slots(self, only: frozenset[int] | None) -> None:
        """Reports slot variables that can neither change nor be replaced."""
        for optimizer, node in enumerate(self.live.graph.nodes):
            obj, view = self.live.objects[optimizer], self.live.views[optimizer]
            if not isinstance(view, OptimizerView) or not node.slots or view.replaces_slots(obj):
                continue
            what = (
                f"a slot variable that cannot change: let {type(obj).__qualname__}.slots() give a "
                "ckpt.Variable, or give it a method set_slot(slot_name, variable, value)"
            )
            self.entries["mismatched"] += [
                ReportEntry(self.live.graph.paths[slot], "a variable", what=what)
                for slot in (slot.node for slot in node.slots)
                if slot in self.sources
                and (only is None or slot in only)
                and slot not in self.skipped_live
                and not self.live.views[slot].mutable
            ]

    def by_attributes(self, node_id: int, node: Node, source: int | None) -> None:
        missing = len(self.entries["missing"])
        for attribute in node.attributes:
            self.by_attribute(node_id, attribute, source)
        lost = self.entries["missing"][missing:]
        if 0 < len(lost) < len(node.attributes):
            # An object takes all of its values or none; otherwise it would be half restored.
            del self.entries["missing"][missing:]
            self.entries["mismatched"] += [
                ReportEntry(
                    entry.path,
                    entry.expected,
                    what=f"expected {entry.expected}, but the checkpoint has only other values of "
                    "this object",
                )
                for entry in lost
            ]

    def by_saver(self, node_id: int, node: Node, source: int) -> None:
        """Plans a node whose values a registered saver wrote, or whose object one takes now."""
        saved = self.saved.nodes[source]
        if saved.saver:
            name, object_name = saved.saver.name, saved.saver.object_name
        elif saved.attributes and node.saver:
            name, object_name = node.saver.name, saved.attributes[0].key
        else:
            return
        # Two leaves of the program may take the same saved object. Then each needs its own call.
        calls = self.calls.setdefault(name, [])
        free = next((nodes for nodes in calls if object_name not in nodes), None)
        if free is None:
            calls.append(free := {})
        free[object_name] = node_id
        self.used.update((source, value) for value in _value_names(saved))
        entry = ReportEntry(self.live.graph.paths[node_id], f"saver {name}", f"saver {name}")
        self.entries["restored"].append(entry)

    def by_attribute(self, node_id: int, target: Attribute, source: int | None) -> None:
        path = self.live.graph.value_path(node_id, target.name)
        found = None if source is None else _same_attribute(self.saved.nodes[source], target)
        if source is None or found is None:
            self.entries["missing"].append(ReportEntry(path, str(target.spec)))
            return
        self.used.add((source, found.name))
        value = self.live.values[node_id][target.name]
        # If a function makes the value, the object takes whatever was saved.
        is_open = target.spec == OPEN
        spec = found.spec if is_open else target.spec
        problem = None if is_open else self.fits(found.spec, spec, value)
        entry = ReportEntry(
            path, str(spec), str(found.spec), problem or "", self.original(source, found)
        )
        if problem:
            self.entries["mismatched"].append(entry)
        else:
            self.entries["restored"].append(entry)
            read = ValueRead(node_id, target.name, found.key, found.spec, spec, value)
            self.reads.append(read)

    def original(self, node: int, attribute: Attribute) -> str:
        """The path under which the checkpoint holds a value."""
        if node in self.saved_paths:
            return self.saved_paths[node]
        return self.saved.value_path(node, attribute.name)

    def saved_side(self) -> None:
        waiting = reachable(self.saved, self.waiting_roots())
        for node_id, node in enumerate(self.saved.nodes):
            if node_id in self.skipped_saved:
                continue
            is_waiting = node_id in waiting and node_id not in self.match.bound
            entries = self.entries["deferred" if is_waiting else "unexpected"]
            for attribute in node.attributes:
                if (node_id, attribute.name) not in self.used:
                    path = self.saved.value_path(node_id, attribute.name)
                    original = self.original(node_id, attribute)
                    note = self.notes.get(node_id, "")
                    entries.append(ReportEntry(path, "", str(attribute.spec), note, original))
            if node.saver and (node_id, node.saver.name) not in self.used:
                path = self.saved.paths[node_id]
                original = self.saved_paths.get(node_id, path)
                entries.append(ReportEntry(path, "", f"saver {node.saver.name}", "", original))

    def waiting_roots(self) -> list[int]:
        """Saved nodes whose parent is bound to an object that may still get this child."""
        return [
            saved
            for (parent, _), saved in self.match.frontier.items()
            if saved not in self.match.bound and self.live.awaiting(parent)
        ]

    def conflicts(self) -> None:
        """One object of the program that would get two values of the checkpoint.

        Equal identity of immutable values means nothing: each place takes its own value.
        """
        pairs = [
            (conflict.live, conflict.bound_saved, conflict.saved)
            for conflict in self.match.conflicts
            if conflict.bound_saved is not None
        ]
        for node, one, two in pairs:
            here = self.live.graph.paths[node]
            paths = f"{self.saved.paths[one]} and {self.saved.paths[two]}"
            what = f"one object in the program, but two values in the checkpoint: {paths}"
            self.conflicting.append(ReportEntry(here, "", "", what))
            self.used.update((two, name) for name in _value_names(self.saved.nodes[two]))

    def finish(self, path: str) -> ReadPlan:
        self.entries["missing"] = self.with_hints()
        renamed = tuple(
            entry
            for entries in self.entries.values()
            for entry in entries
            if self.saved_paths and entry.saved_path not in ("", entry.path)
        )
        report = RestoreReport(
            path,
            restored=tuple(self.entries["restored"]),
            missing=tuple(self.entries["missing"]),
            unexpected=tuple(self.entries["unexpected"]),
            mismatched=(*self.entries["mismatched"], *self.conflicting),
            deferred=tuple(self.entries["deferred"]),
            renamed=renamed,
        )
        calls = tuple(
            SaverCall(name, nodes) for name, calls in self.calls.items() for nodes in calls
        )
        used = frozenset(
            node
            for node in {node for node, _ in self.used}
            if all((node, name) in self.used for name in _value_names(self.saved.nodes[node]))
        )
        return ReadPlan(report, tuple(self.reads), calls, used, tuple(self.conflicting))

    def with_hints(self) -> list[ReportEntry]:
        spare = [entry.path for kind in ("unexpected", "deferred") for entry in self.entries[kind]]
        return [
            ReportEntry(
                entry.path,
                entry.expected,
                what=f"expected {entry.expected}, but the checkpoint has nothing there",
                nearest=nearest(entry.path, spare) if i < _MAX_HINTS else (),
            )
            for i, entry in enumerate(self.entries["missing"])
        ]


def _value_names(node: Node) -> list[str]:
    """A name for each of a node's values; a registered saver counts as one value."""
    names = [attribute.name for attribute in node.attributes]
    return [*names, node.saver.name] if node.saver else names


def _same_attribute(node: Node, target: Attribute) -> Attribute | None:
    """The saved value for a live attribute: by name, or because both are the only value."""
    for attribute in node.attributes:
        if attribute.name == target.name:
            return attribute
    if node.has_only(target.name):
        only = node.attributes[0]
        return only if only.name in ONLY_VALUE else None
    return None
