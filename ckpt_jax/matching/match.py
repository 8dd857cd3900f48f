"""Match: walks two rooted graphs side by side, along equal edge labels.

Terms. A saved node is *bound* to the live node that corresponds to it. The *frontier* is the set
of saved edges whose parent is bound, but which the live graph lacks, or at which it has None: their
children may appear later. A *conflict* is a saved node that two live nodes ask for, or a live node
that two saved nodes ask for; the first binding counts.

Algorithm. The walk is breadth first from the given pairs, so that shallow paths bind first. Slots
are edges, too: their label is (variable, slot name), known as soon as optimizer and variable are
both bound. `extend` continues a match when the live graph has grown. It never unbinds, and the
result does not depend on the order in which the parts appeared.

A match does not look at values: the plan that is made from it checks whether dtypes and shapes fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ckpt_jax.graph.labels import Label, canonical, local_name
from ckpt_jax.graph.nodes import Node, ObjectGraph

Edges = tuple[tuple[Label, int], ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """A saved node and a live node that asks for it although one of them is bound elsewhere."""

    saved: int
    live: int
    bound_saved: int | None  # the saved node that `live` is bound to, if it is bound


@dataclass(frozen=True, slots=True)
class Match:
    """The result of matching a saved graph with a live one.

    Attributes:
      bound: saved node -> live node.
      frontier: (live parent, label) -> saved child that has no live counterpart yet.
      conflicts: differences in what is shared, in the order in which they were found.
      shared: (saved node, live node) for each further live node that takes the values of a
        bound saved node.
    """

    bound: Mapping[int, int]
    frontier: Mapping[tuple[int, Label], int]
    conflicts: tuple[Conflict, ...] = ()
    shared: tuple[tuple[int, int], ...] = ()

    def sources(self) -> dict[int, int]:
        """Live node -> the saved node whose values it takes."""
        sources = {live: saved for saved, live in self.shared}
        for saved, live in reversed(tuple(self.bound.items())):  # the first of several counts
            sources[live] = saved
        return sources


NOTHING_MATCHED = Match(MappingProxyType({}), MappingProxyType({}))


def match(saved: ObjectGraph, live: ObjectGraph) -> Match:
    """Matches two graphs from their roots."""
    return extend(NOTHING_MATCHED, saved, live, [(0, 0)])


def extend(
    before: Match, saved: ObjectGraph, live: ObjectGraph, pairs: Sequence[tuple[int, int]]
) -> Match:
    """Continues a match from pairs of (saved node, live node) that belong together.

    Live node ids of `before` must still mean the same nodes. Nothing is unbound.
    """
    bound = dict(before.bound)
    frontier = dict(before.frontier)
    conflicts = list(before.conflicts)
    shared = list(before.shared)
    further: dict[int, list[int]] = {}  # saved node -> its live nodes but for the first
    for source, there in shared:
        further.setdefault(source, []).append(there)
    taken = before.sources()
    queue = list(pairs)
    for saved_node, live_node in queue:  # grows while it is walked
        known_live, known_saved = bound.get(saved_node), taken.get(live_node)
        if known_live == live_node or known_saved == saved_node:
            continue
        if known_live is not None and known_saved is None and _may_share(live, live_node):
            # The program has two leaves, the checkpoint has one: both leaves take its value.
            shared.append((saved_node, live_node))
            further.setdefault(saved_node, []).append(live_node)
            taken[live_node] = saved_node
            queue.extend(_slot_pairs(saved, live, bound, further, saved_node))
            continue
        if known_live is not None:
            conflicts.append(Conflict(saved_node, live_node, known_saved))
            continue
        if known_saved is None:
            taken[live_node] = saved_node
        elif saved.nodes[saved_node].attributes:
            # Two saved values for one live one. (Two saved containers may become one object.)
            conflicts.append(Conflict(saved_node, live_node, known_saved))
        bound[saved_node] = live_node
        theirs, ours = _aligned(saved.nodes[saved_node], live.nodes[live_node])
        here = _edges(ours)
        for label, child in theirs:
            key = canonical(label)
            there = here.get(key)
            if there is None:
                there = here.get(local_name(key))
            if there is None or _is_placeholder(live.nodes[there], saved, child):
                frontier.setdefault((live_node, label), child)
            else:
                frontier.pop((live_node, label), None)
                queue.append((child, there))
        queue.extend(_slot_pairs(saved, live, bound, further, saved_node))
    return Match(
        MappingProxyType(bound), MappingProxyType(frontier), tuple(conflicts), tuple(shared)
    )


def _is_placeholder(live: Node, saved: ObjectGraph, child: int) -> bool:
    """Whether the program has None at a place, and the checkpoint has values for it."""
    return (
        live.container == "none"
        and saved.nodes[child].container != "none"
        and saved.carries_values(child)
    )


def _aligned(saved: Node, live: Node) -> tuple[Edges, Edges]:
    """The children of both nodes; by position if one is a namedtuple and the other a sequence."""
    if live.container == "namedtuple" and saved.container in ("list", "tuple"):
        return saved.children, _numbered(live)
    if saved.container == "namedtuple" and live.container in ("list", "tuple"):
        return _numbered(saved), live.children
    return saved.children, live.children


def _numbered(node: Node) -> Edges:
    return tuple(enumerate(child for _, child in node.children))


def _may_share(live: ObjectGraph, node: int) -> bool:
    return live.nodes[node].container in ("leaf", "none") and not live.nodes[node].children


def _edges(children: Iterable[tuple[Label, int]]) -> dict[Label, int]:
    """Live children by label, and also by the label's text if no other label has that text."""
    edges: dict[Label, int] = {}
    by_text: dict[str, int | None] = {}
    for label, node in children:
        if type(label) is str:
            edges[label] = node
            continue
        key = canonical(label)
        edges[key] = node
        if not isinstance(key, str):
            text = local_name(key)
            by_text[text] = None if text in by_text else node
    for text, node in by_text.items():
        if node is not None:
            edges.setdefault(text, node)
    return edges


def _slot_pairs(
    saved: ObjectGraph,
    live: ObjectGraph,
    bound: Mapping[int, int],
    further: Mapping[int, Sequence[int]],
    node: int,
) -> list[tuple[int, int]]:
    """Slots that the binding of `node`, as optimizer or as variable, makes known.

    If the checkpoint has one variable where the program has several, an optimizer of the program
    may hold slots for any of them.
    """
    slots = [(node, slot) for slot in saved.nodes[node].slots if slot.variable in bound]
    slots += [entry for entry in saved.slots_of_variable.get(node, ()) if entry[0] in bound]
    return [
        (slot.node, there)
        for optimizer, slot in slots
        for variable in (bound[slot.variable], *further.get(slot.variable, ()))
        if (there := live.slot(bound[optimizer], variable, slot.name)) is not None
    ]
