"""Trace: from live objects to an object graph.

The walk is breadth first over the children that *views* show; a view says how objects of a type
are seen. An object with an identity (a trackable, a module, an array) is one node, however many
edges lead to it, and is named after the first, shortest path. The parts of an immutable container
are one node for each place. After the walk, optimizers add their *slots*: the state that they keep
for each variable.

The walk reads no value. Three functions tell it what it needs to know: `describe` says what a
value is, `evaluate` calls a function that stands for a value, and `saver_of` says whether a
registered saver takes an object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph import labels
from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import (
    Attribute,
    Node,
    ObjectGraph,
    PathLengths,
    SaverRef,
    Slot,
    has_values,
)
from ckpt_jax.graph.specs import LeafSpec, ShardingSpec
from ckpt_jax.objects.delegate import DELEGATE, delegate_of
from ckpt_jax.objects.stateful import why_stateless
from ckpt_jax.objects.views import (
    NoState,
    OptimizerView,
    ParameterPath,
    SlotEntry,
    View,
    slots_of,
    view_of,
)

# Names of copies of parameters, which no optimizer is made for.
_COPY = re.compile(r"(^|_)(ema|ref|reference|target|teacher|old|prev|best|avg|average|swa)(_|$)")

Describe = Callable[[Any], tuple[LeafSpec, ShardingSpec | None]]
SaverOf = Callable[[Any], str | None]
Evaluate = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class LiveGraph:
    """An object graph together with the objects that it was traced from.

    `objects`, `views` and `values` have one entry for each of `graph.nodes`; `values[i]` maps
    attribute names to the values that were there when traced. `variables` maps the node of each
    slot variable to its variable, as the optimizer gives it: an object or a place.
    """

    graph: ObjectGraph
    objects: tuple[Any, ...]
    views: tuple[View, ...]
    values: tuple[Mapping[str, Any], ...]
    variables: Mapping[int, Any] = field(default_factory=dict)

    def awaiting(self, node: int) -> tuple[Any, ...]:
        """The trackables that will tell when a node's object gets another child."""
        if not 0 <= node < len(self.views):
            return ()
        return self.views[node].awaiting(self.objects[node])


def trace(
    root: Any,
    describe: Describe,
    saver_of: SaverOf = lambda obj: None,
    *,
    root_view: View | None = None,
    root_key: str = "",
    tie_values: bool = True,
    evaluate: Evaluate | None = None,
) -> LiveGraph:
    """The graph of everything reachable from `root`.

    Args:
      root: any object that has a view.
      describe: says what a value is; raises TypeError for a value that cannot be saved.
      saver_of: gives the name of the registered saver that takes an object, or None.
      root_view: the view of the root, if it is not the usual one.
      root_key: the root's escaped path, if it is part of something larger.
      tie_values: whether one immutable array at two places is one node, as a save needs it. For a
        restore, each place is a node of its own.
      evaluate: gives the value to save for a value that a view shows, which may be a function
        that makes it. It is called once for each value. By default values stay as they are.

    Raises:
      UnsaveableError: naming every object that has no view or cannot be saved.
    """
    walk = _Walk(describe, saver_of, tie_values, evaluate)
    walk.enter(root, root_key, view=root_view)
    walk.run()
    return walk.finish()


@dataclass(slots=True, eq=False)
class _Walk:
    """A trace that is growing: lists with one entry for each node."""

    describe: Describe
    saver_of: SaverOf
    tie_values: bool
    evaluate: Evaluate | None
    objects: list[Any] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    values: list[Mapping[str, Any]] = field(default_factory=list)
    attributes: list[tuple[Attribute, ...]] = field(default_factory=list)
    savers: list[SaverRef | None] = field(default_factory=list)
    children: list[tuple[tuple[Label, int], ...]] = field(default_factory=list)
    slots: dict[int, list[Slot]] = field(default_factory=dict)
    variables: dict[int, Any] = field(default_factory=dict)
    slot_aliases: dict[tuple[int, int, str], int] = field(default_factory=dict)
    node_of: dict[int, int] = field(default_factory=dict)  # by id, of objects with an identity
    containers: set[int] = field(default_factory=set)  # ids, of objects without
    problems: list[tuple[str, str]] = field(default_factory=list)
    lengths: PathLengths = field(default_factory=PathLengths)

    def enter(
        self, obj: Any, key: str, parent: int = -1, view: View | None = None, tie: bool = True
    ) -> int:
        """The node of `obj`, or of the object that it stands for; a new node if it has none.

        If `tie` is false, an array gets a node of its own even if it has one already.
        """
        view = view or view_of(obj)
        if view is DELEGATE:
            obj = delegate_of(obj)
            view = view_of(obj)
        if view is None and self.saver_of(obj) is not None:
            view = _OPAQUE
        elif view is None and self.is_program(parent):
            view = _PROGRAM
        elif view is None:
            self.problems.append((labels.path_of(key), _no_view(obj)))
            view = _NOTHING
        node = len(self.objects)
        if view.mutable or (view.identity and tie and self.tie_values):
            if (known := self.node_of.setdefault(id(obj), node)) != node:
                return known
        elif view.container != "leaf" and self.is_inside_itself(obj, parent):
            self.problems.append((labels.path_of(key), "the container contains itself"))
            view = _NOTHING
        self.objects.append(obj)
        self.parents.append(parent)
        self.views.append(view)
        self.keys.append(key)
        saver = self.saver_of(obj)
        self.savers.append(SaverRef(saver, key) if saver else None)
        values: Mapping[str, Any] = {}
        if not saver:
            try:
                values = self.evaluated(key, view.values(obj))
            except NoState as error:
                self.problems.append((labels.path_of(key), str(error)))
        self.values.append(values)
        self.attributes.append(
            tuple([self.attribute(key, name, value) for name, value in values.items()])
        )
        return node

    def evaluated(self, key: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.evaluate is None or not any(map(callable, values.values())):
            return values
        result: dict[str, Any] = {}
        for name, value in values.items():
            try:
                result[name] = self.evaluate(value)
            except Exception as error:  # a user's function may raise anything
                what = f"{name}: {type(error).__name__}: {error}"
                self.problems.append((labels.path_of(key), what))
        return result

    def is_inside_itself(self, obj: Any, parent: int) -> bool:
        if id(obj) not in self.containers:  # as usual: without it, depth would cost its square
            self.containers.add(id(obj))
            return False
        return any(self.objects[node] is obj for node in self.upwards(parent))

    def is_program(self, parent: int) -> bool:
        """Whether something without a view below `parent` is part of the program, not state."""
        return any(self.views[node].has_program for node in self.upwards(parent))

    def upwards(self, node: int) -> Iterator[int]:
        """A node and the nodes above it, along the first path to each."""
        while node >= 0:
            yield node
            node = self.parents[node]

    def attribute(self, key: str, name: str, value: Any) -> Attribute:
        try:
            spec, sharding = self.describe(value)
        except TypeError as error:
            what = f"{error}" if name in labels.ONLY_VALUE else f"{name}: {error}"
            self.problems.append((labels.path_of(key), what))
            spec, sharding = LeafSpec(), None
        return Attribute(name, labels.attribute_key(key, name), spec, sharding)

    def run(self) -> None:
        """Walks breadth first; the list of objects is the queue."""
        at = len(self.children)
        while at < len(self.objects):
            try:
                pairs = tuple(self.views[at].children(self.objects[at]))
            except Exception as error:  # of code of the program, which may raise anything
                path = labels.path_of(self.keys[at]) or "(root)"
                error.add_note(f"This happened when the children of {path} were listed.")
                raise
            self.check_lengths(self.keys[at], len(pairs) + len(self.attributes[at]))
            if pairs:
                prefix = f"{self.keys[at]}/" if self.keys[at] else ""
                names = labels.escaped_names([label for label, _ in pairs])
                self.check_labels(pairs, names, prefix)
                self.children.append(
                    tuple(
                        [
                            (label, self.enter(child, prefix + name, at))
                            for (label, child), name in zip(pairs, names, strict=True)
                        ]
                    )
                )
            else:
                self.children.append(())
            at += 1

    def check_lengths(self, key: str, count: int) -> None:
        try:
            self.lengths.add(key, count)
        except ValueError as error:
            what = str(error)
            path = labels.path_of(key)
            raise UnsaveableError(f"{what}. Nothing was written.", ((path, what),)) from None

    def check_labels(
        self, pairs: Sequence[tuple[Label, Any]], names: Sequence[str], prefix: str
    ) -> None:
        if len(set(names)) < len(names):
            self.problems.append((labels.path_of(prefix[:-1]), "two of its keys look the same"))
        for (label, _), name in zip(pairs, names, strict=True):
            if not labels.is_label(label):
                what = (
                    f"the key {label!r} is of type {type(label).__qualname__}; use a string, a "
                    "number, the member of an enum, or a tuple of these"
                )
                self.problems.append((labels.path_of(prefix + name), what))
            if not name.isascii():
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    what = f"the name {name!r} is not valid Unicode ({error.reason})"
                    self.problems.append((labels.path_of(prefix) + repr(name), what))

    def add_slots(self) -> None:
        """Adds slot variables, named after their variables, if optimizer and variable are nodes."""
        regular = len(self.objects)
        for node in range(regular):
            entries = tuple(slots_of(self.views[node], self.objects[node]))
            if not entries:
                continue
            paths = [e.variable for e in entries if isinstance(e.variable, ParameterPath)]
            trees = self.places(node, paths)
            for entry in entries:
                if isinstance(entry.variable, ParameterPath):
                    owners = [tree[entry.variable] for tree in trees]
                else:
                    owner = self.node_of.get(id(delegate_of(entry.variable)))
                    owners = [] if owner is None else [owner]
                if owners:
                    slot = self.add_slot(node, owners[0], entry, regular)
                    for other in owners[1:]:
                        self.slot_aliases[node, other, entry.name] = slot
            if not trees:
                self.add_as_children(node, entries)
        self.run()

    def add_slot(self, optimizer: int, variable: int, entry: SlotEntry, regular: int) -> int:
        key = labels.slot_key(self.keys[variable], self.keys[optimizer], entry.name)
        self.check_lengths(key, 1)
        slot = self.enter(entry.value, key, tie=False)
        if slot < regular:
            what = (
                f"slot variable {entry.name!r} of {labels.path_of(self.keys[optimizer])} "
                "is also an ordinary child; it can be one or the other"
            )
            self.problems.append((labels.path_of(self.keys[slot]), what))
        self.variables[slot] = entry.variable
        self.slots.setdefault(optimizer, []).append(Slot(variable, entry.name, slot))
        return slot

    def places(
        self, optimizer: int, wanted: Sequence[ParameterPath]
    ) -> list[dict[ParameterPath, int]]:
        """The nodes of variables that are given as paths in a tree of parameters.

        Returns:
          The trees that may be meant, the likeliest first. If the optimizer has its parameters at
          hand, these are the trees that are the same object. There may be several, because a
          copy of the parameters often begins as the very same tree. Else it is the tree that is
          called like parameters or a model, or is the nearest.
        """
        view = self.views[optimizer]
        if not wanted or not isinstance(view, OptimizerView):
            return []
        parameters = view.parameters(self.objects[optimizer])
        same = [node for node, obj in enumerate(self.objects) if obj is parameters]
        is_known = parameters is not None and bool(same)
        candidates = same if is_known else range(len(self.children))
        own = self.keys[optimizer].split("/")

        def merit(candidate: tuple[int, Any]) -> tuple[int, ...]:
            key = self.keys[candidate[0]].split("/")
            common = (*[a == b for a, b in zip(key, own, strict=False)], False).index(False)
            is_named = key[-1] in ("params", "model")
            is_original = not any(map(_COPY.search, key))
            near = (common, is_named) if is_known else (is_named, common)
            return is_original, *near, -candidate[0]

        found = [(node, there) for node in candidates if (there := self.below(node, wanted))]
        trees = [there for _, there in sorted(found, key=merit, reverse=True)]
        return trees if is_known else trees[:1]

    def below(self, node: int, wanted: Sequence[ParameterPath]) -> dict[ParameterPath, int]:
        """Nodes by their path below `node`; none at all unless every path is there."""
        edges: dict[int, dict[Label, int]] = {}
        found: dict[ParameterPath, int] = {}
        for variable in wanted:
            here: int | None = node
            for label in variable.steps:
                if here not in edges:
                    edges[here] = dict(self.children[here])
                here = edges[here].get(label)
                if here is None:
                    return {}
            if not self.attributes[here]:
                return {}
            found[variable] = here
        return found

    def add_as_children(self, optimizer: int, entries: Sequence[SlotEntry]) -> None:
        trees: dict[Label, Any] = {}
        for name, variable, value in entries:
            if isinstance(variable, ParameterPath):
                tree, label = trees, cast(Label, name)
                for step in variable.steps:
                    tree, label = tree.setdefault(label, {}), step
                tree[label] = value
        prefix = f"{self.keys[optimizer]}/" if self.keys[optimizer] else ""
        more = [
            (name, self.enter(tree, prefix + labels.escape(labels.local_name(name)), optimizer))
            for name, tree in trees.items()
        ]
        self.children[optimizer] = (*self.children[optimizer], *more)

    def finish(self) -> LiveGraph:
        self.add_slots()
        if self.problems:
            lines = "\n".join(f"  {path or '(root)'}: {what}" for path, what in self.problems)
            raise UnsaveableError(
                f"{len(self.problems)} of the object graph's values cannot be saved or restored; "
                f"nothing was written:\n{lines}\n"
                "Remove them, wrap them in ckpt.NoDependency, or register a view for their type.",
                tuple(self.problems),
            )
        own = [
            bool(attributes or saver or i in self.slots)
            for i, (attributes, saver) in enumerate(zip(self.attributes, self.savers, strict=True))
        ]
        rows = zip(
            self.objects,
            self.views,
            self.children,
            self.attributes,
            self.savers,
            has_values(own, self.children),
            strict=True,
        )
        nodes = tuple(
            [
                Node(
                    view.container,
                    # A leaf's spec says what kind of array it was, and JAX's class names change.
                    ""
                    if view.container == "leaf" and not view.mutable
                    else _type_name(view.type_of(obj)),
                    children,
                    attributes,
                    tuple(self.slots.get(i, ())),
                    saver,
                    has,
                )
                for i, (obj, view, children, attributes, saver, has) in enumerate(rows)
            ]
        )
        graph = ObjectGraph(nodes, tuple(self.keys), slot_aliases=self.slot_aliases)
        columns = (tuple(self.objects), tuple(self.views), tuple(self.values))
        return LiveGraph(graph, *columns, self.variables)


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else _dotted(kind)


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _no_view(obj: Any) -> str:
    why = why_stateless(obj)
    return f"{_dotted(type(obj))} has no view, so its state is unknown{why and f'; {why}'}"


class _OpaqueView(View):
    """An object without a view; only its registered saver knows what is in it."""

    identity = True
    mutable = True


class _ProgramView(View):
    """A part of the program, which is not saved, but keeps its place in the graph."""

    container = "none"


_NOTHING = View()
_PROGRAM = _ProgramView()
_OPAQUE = _OpaqueView()
