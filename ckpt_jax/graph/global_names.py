"""Global names: an object graph for a checkpoint that has none.

Some files hold no object graph, only a flat mapping from names to values. The *global name* of
a value is its path: the local names of its objects joined with "/", or with "." if no name in the
file has a "/". Splitting the names at their separators gives a tree of nodes, and with the tree
such a file is matched, planned, renamed and reported like any other.

The names leave one question open: whether `a/b` is the value of an object `b`, or a value called
"b" that the object `a` owns. The tree assumes an object `b`. `own_values` corrects this for
objects of the program that turn out to own values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, readable, unescape
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, object_keys
from ckpt_jax.graph.specs import LeafSpec


def labels_of(name: str, separator: str = "/") -> tuple[str, ...]:
    """The labels that a global name consists of.

    >>> labels_of("layers/0/w"), labels_of("layers.0.w", "."), labels_of("a.Sb/c")
    (('layers', '0', 'w'), ('layers', '0', 'w'), ('a/b', 'c'))
    """
    parts = name.split(separator)
    return tuple([raw if readable(raw := unescape(part)) == part else part for part in parts])


def graph_of(specs: Mapping[str, LeafSpec]) -> ObjectGraph:
    """The tree of a name-based checkpoint. The key of each value is its name.

    Raises:
      ValueError: two names give the same path.
    """
    separator = "/" if any("/" in name for name in specs) else "."
    nodes = [Node(container="dict")]
    edges: list[dict[Label, int]] = [{}]
    for name, spec in specs.items():
        here = 0
        for label in labels_of(name, separator):
            there = edges[here].setdefault(label, len(nodes))
            if there == len(nodes):
                nodes.append(Node(container="dict"))
                edges.append({})
            here = there
        if nodes[here].attributes:
            other = nodes[here].attributes[0].key
            raise ValueError(f"the names {other!r} and {name!r} mean one value")
        nodes[here] = replace(nodes[here], attributes=(_attribute(VARIABLE_VALUE, name, spec),))
    nodes = [
        replace(
            node,
            container="dict" if children or not node.attributes else "leaf",
            children=tuple(children.items()),
        )
        for node, children in zip(nodes, edges, strict=True)
    ]
    return ObjectGraph(tuple(nodes), object_keys(nodes), named=True)


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
        for label, child in nodes[source].children:
            entry = nodes[child]
            if label not in wanted or entry.children or len(entry.attributes) != 1:
                edges.append((label, child))
                continue
            (value,) = entry.attributes
            moved = _attribute(str(label), value.key, value.spec)
            own = (*nodes[source].attributes, moved)
            nodes[source] = replace(nodes[source], attributes=own)
            nodes[child] = replace(entry, attributes=())
        if len(edges) < len(nodes[source].children):
            nodes[source] = replace(nodes[source], children=tuple(edges))
    return saved if nodes == list(saved.nodes) else replace(saved, nodes=tuple(nodes))


def _attribute(name: str, key: str, spec: LeafSpec) -> Attribute:
    return Attribute(name, key, spec, full_name=key)
