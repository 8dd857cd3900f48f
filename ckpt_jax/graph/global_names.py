"""Global names: an object graph for a checkpoint that has none.

Some files hold no object graph, only a flat mapping from names to values. The *global name* of
a value is its path: the local names of its objects joined with "/", or with "." if no name in the
file has a "/". Splitting the names at their separators gives a tree of nodes, and with the tree
such a file is matched, planned, renamed and reported like any other.

The names leave two questions open. The first is whether a separator is part of a label: a program
may have a dict with the key "mlp/linear_0". The tree assumes that it is not. `with_labels_of` cuts
the names in the way that the objects of the program are named. The second question is whether `a/b`
is the value of an object `b`, or a value called "b" that the object `a` owns. The tree assumes an
object `b`. `own_values` corrects this for objects of the program that turn out to own values. It
also opens boxes: nnx gives the value of a variable the name "value" below the variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckpt_jax.graph.labels import (
    VARIABLE_VALUE,
    Label,
    local_name,
    readable,
    unescape,
)
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, object_keys
from ckpt_jax.graph.specs import LeafSpec

BOX = "value"  # what nnx calls the value of a variable


def labels_of(name: str, separator: str = "/") -> tuple[str, ...]:
    """The labels that a global name consists of.

    >>> labels_of("layers/0/w"), labels_of("layers.0.w", "."), labels_of("a.Sb/c")
    (('layers', '0', 'w'), ('layers', '0', 'w'), ('a/b', 'c'))
    """
    parts = name.split(separator)
    return tuple([raw if readable(raw := unescape(part)) == part else part for part in parts])


def graph_of(specs: Mapping[str, LeafSpec], separator: str | None = None) -> ObjectGraph:
    """The tree of a name-based checkpoint. The key of each value is its name.

    Args:
      specs: of the values, by name.
      separator: between the parts of a name. By default it is "/", or "." if no name has a "/".

    Raises:
      ValueError: two names give the same path.
    """
    if separator is None:
        separator = "/" if any("/" in name for name in specs) else "."
    edges: list[dict[Label, int]] = [{}]
    named: dict[int, str] = {}  # node -> the name of its value
    for name in specs:
        here = 0
        for label in labels_of(name, separator):
            there = edges[here].setdefault(label, len(edges))
            if there == len(edges):
                edges.append({})
            here = there
        if here in named:
            raise ValueError(f"the names {named[here]!r} and {name!r} mean one value")
        named[here] = name
    nodes: list[Node] = []
    for number, children in enumerate(edges):
        name = named.get(number)
        own = () if name is None else (_attribute(VARIABLE_VALUE, name, specs[name]),)
        container = "dict" if children or not own else "leaf"
        nodes.append(Node(container, children=tuple(children.items()), attributes=own))
    return ObjectGraph(tuple(nodes), object_keys(nodes), named=True)


def with_labels_of(
    saved: ObjectGraph, live: ObjectGraph
) -> tuple[ObjectGraph, list[tuple[str, str]]]:
    """The tree, with names cut as the program's objects are named.

    A value is moved if the program has no value of its name, but one whose name differs only in
    what is a label and what is a separator. Ids of nodes do not change; new nodes come last.

    Args:
      saved: the tree.
      live: the graph of the program's objects; its root may be below that of the tree.

    Returns:
      The tree, and (name, what) for every value that several names could mean, or the reverse.
    """
    try:
        root = saved.object_keys.index(live.object_keys[0])
    except ValueError:
        return saved, []
    stored = {labels: node for node, labels in _places(saved, root) if saved.nodes[node].attributes}
    wanted = [
        labels if live.nodes[node].has_only(attribute.name) else (*labels, attribute.name)
        for node, labels in _places(live, 0)
        for attribute in live.nodes[node].attributes
    ]
    wanted += _places_of_slots(live)
    if all(labels in stored for labels in wanted):
        return saved, []
    by_text: dict[str, list[Labels]] = {}
    for labels in stored:
        by_text.setdefault(_text(labels), []).append(labels)
    rivals: dict[str, list[Labels]] = {}
    for labels in wanted:
        rivals.setdefault(_text(labels), []).append(labels)
    moves: list[tuple[Labels, Labels]] = []
    ambiguous: list[tuple[str, str]] = []
    for text, places in rivals.items():
        names = [
            labels for labels in by_text.get(text, ()) if not saved.nodes[stored[labels]].children
        ]
        if not names or all(labels in stored for labels in places):
            continue
        if len(names) == len(places) == 1:
            moves.append((names[0], places[0]))
        else:
            found, here = (" and ".join(map(repr, sorted(x))) for x in (names, places))
            what = f"ambiguous: the file has {found}, which may mean {here}"
            ambiguous.append((saved.paths[stored[names[0]]], what))
    return _moved(saved, root, [(stored[old], old, new) for old, new in moves]), ambiguous


Labels = tuple[str, ...]


def _text(labels: Labels) -> str:
    """The text of a name, the same for names that differ only in their separators."""
    return "/".join(labels).replace(".", "/")


def _places(graph: ObjectGraph, root: int) -> Iterator[tuple[int, Labels]]:
    """Each node below a node, and the labels on the first path to it."""
    labels: dict[int, Labels] = {root: ()}
    queue = [root]
    for node in queue:  # grows while it is walked
        yield node, labels[node]
        for label, child in graph.nodes[node].children:
            if child not in labels:
                labels[child] = (*labels[node], local_name(label))
                queue.append(child)


def _places_of_slots(graph: ObjectGraph) -> list[Labels]:
    """Where slot variables lie if they are no slots: below their optimizer, under the name of the
    slot and the labels of their variable."""
    places: dict[int, Labels] = dict(_places(graph, 0))
    return [
        (*places[optimizer], slot.name, *places[slot.variable])
        for optimizer, slot in graph.slots()
        if optimizer in places and slot.variable in places
    ]


def _moved(
    saved: ObjectGraph, root: int, moves: Sequence[tuple[int, Labels, Labels]]
) -> ObjectGraph:
    """The tree with nodes (node, old labels, new labels) at other places below `root`."""
    if not moves:
        return saved
    edges: list[dict[Label, int]] = [dict(node.children) for node in saved.nodes]
    nodes = list(saved.nodes)
    for node, old, new in moves:
        above = [root]
        for label in old[:-1]:
            above.append(edges[above[-1]][label])
        del edges[above[-1]][old[-1]]
        for label, parent, child in zip(old[-2::-1], above[-2::-1], above[:0:-1], strict=True):
            if edges[child] or nodes[child].attributes:
                break
            del edges[parent][label]
        here = root
        for label in new[:-1]:
            there = edges[here].setdefault(label, len(nodes))
            if there == len(nodes):
                nodes.append(Node(container="dict"))
                edges.append({})
            here = there
        edges[here][new[-1]] = node
    nodes = [
        replace(node, children=tuple(children.items()))
        for node, children in zip(nodes, edges, strict=True)
    ]
    return replace(saved, nodes=tuple(nodes), object_keys=object_keys(nodes))


def own_values(saved: ObjectGraph, live: ObjectGraph, bound: Mapping[int, int]) -> ObjectGraph:
    """The tree, with values moved to their parents if the parents' objects in the program own them.

    Node ids do not change. A node whose value has moved to its parent is left empty.

    Args:
      saved: the tree.
      live: the graph of the program's objects.
      bound: saved node -> live node.
    """
    nodes = list(saved.nodes)
    for source, target in bound.items():
        wanted = {a.name for a in live.nodes[target].attributes} if target >= 0 else ()
        edges: list[tuple[Label, int]] = []
        has_box = wanted == {VARIABLE_VALUE} and not saved.nodes[source].attributes
        for label, child in nodes[source].children:
            entry = nodes[child]
            name = VARIABLE_VALUE if has_box and label == BOX else str(label)
            if name not in wanted or entry.children or len(entry.attributes) != 1:
                edges.append((label, child))
                continue
            (value,) = entry.attributes
            moved = _attribute(name, value.key, value.spec)
            own = (*nodes[source].attributes, moved)
            nodes[source] = replace(nodes[source], attributes=own)
            nodes[child] = replace(entry, attributes=())
        if len(edges) < len(nodes[source].children):
            nodes[source] = replace(nodes[source], children=tuple(edges))
    return saved if nodes == list(saved.nodes) else replace(saved, nodes=tuple(nodes))


def _attribute(name: str, key: str, spec: LeafSpec) -> Attribute:
    return Attribute(name, key, spec, full_name=key)
