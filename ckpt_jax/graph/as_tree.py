"""A graph as a tree: a shared object appears at each of its places.

The pattern `params/**` selects everything below `params`, even if the same arrays were saved under
the name `ema/**`, because the program shares them. In the tree, each path from the root to a node
is a node of its own. It has the attributes, and so the checkpoint keys, of the node that it stands
for.

If shared objects share others in turn, there may be very many paths. So a path is followed only as
long as at most a few of its edges lead to a node that another path has reached before: three, or
fewer if the tree would have far more nodes than the graph. An edge back to an object on the path
itself is never followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_jax.graph.labels import Label, escaped_names, path_of
from ckpt_jax.graph.nodes import ObjectGraph, PathLengths

_DETOURS = (3, 2, 1, 0)  # with 0, the tree has as many nodes as the graph
_MAX_NODES = 100_000  # of the tree, or `_MAX_GROWTH` times as many as the graph has
_MAX_GROWTH = 10


def is_tree(graph: ObjectGraph) -> bool:
    """Whether no two edges lead to the same node.

    >>> from ckpt_jax.graph.nodes import Node
    >>> is_tree(ObjectGraph((Node("dict", children=(("a", 1), ("b", 1))), Node("leaf")), ("", "a")))
    False
    """
    return max(_edges_into(graph).values(), default=0) < 2


def as_tree(graph: ObjectGraph) -> ObjectGraph:
    """The same graph with one node for each path; optimizers' slots are left out.

    >>> from ckpt_jax.graph.nodes import Node
    >>> graph = ObjectGraph(
    ...     (Node("dict", children=(("a", 1), ("b", 1))), Node("leaf")), ("", "a")
    ... )
    >>> as_tree(graph).paths
    ('', 'a', 'b')
    """
    tree = _walk(graph)
    nodes = [
        replace(graph.nodes[origin], children=own, slots=())
        for origin, own in zip(tree.origins, tree.children, strict=True)
    ]
    return ObjectGraph(tuple(nodes), tuple(tree.keys), graph.named)


def edges_by_path(graph: ObjectGraph) -> Iterator[tuple[str, int, Label]]:
    """Each path that leads to a node of a graph, with the last edge on it: its node and label."""
    tree = _walk(graph)
    for origin, edges in zip(tree.origins, tree.children, strict=True):
        for label, there in edges:
            yield path_of(tree.keys[there]), origin, label


@dataclass(frozen=True, slots=True)
class _Tree:
    """The nodes of a tree: for each, the node that it stands for, its key and its edges."""

    origins: list[int]
    keys: list[str]
    children: list[tuple[tuple[Label, int], ...]]


def _walk(graph: ObjectGraph) -> _Tree:
    edges_into = _edges_into(graph)
    found = (_with_detours(graph, edges_into, most) for most in _DETOURS)
    return next(tree for tree in found if tree is not None)


def _with_detours(graph: ObjectGraph, edges_into: Counter[int], most: int) -> _Tree | None:
    """The tree of the paths with at most `most` detours; None if it is too large."""
    limit = max(_MAX_NODES, _MAX_GROWTH * len(graph.nodes))
    lengths = PathLengths()
    seen: set[int] = set()
    # For each node of the tree: the node that it stands for, its parent, its key, its detours.
    origins, parents, keys, detours = [0], [-1], [""], [0]
    children: list[tuple[tuple[Label, int], ...]] = []
    while (at := len(children)) < len(origins):  # breadth first: shortest paths come first
        edges = graph.nodes[origins[at]].children
        if most:
            try:
                lengths.add(keys[at], len(edges) + 1)
            except ValueError:
                return None
            if len(origins) > limit:
                return None
        names = escaped_names([label for label, _ in edges])
        prefix = f"{keys[at]}/" if keys[at] else ""
        found: list[tuple[Label, int]] = []
        for (label, child), name in zip(edges, names, strict=True):
            count = detours[at]
            if edges_into[child] > 1 or child == 0:
                count += child in seen
                seen.add(child)
                if count > most or _is_above(origins, parents, at, child):
                    continue
            found.append((label, len(origins)))
            origins.append(child)
            parents.append(at)
            keys.append(prefix + name)
            detours.append(count)
        children.append(tuple(found))
    return _Tree(origins, keys, children)


def _edges_into(graph: ObjectGraph) -> Counter[int]:
    return Counter([child for node in graph.nodes for _, child in node.children])


def _is_above(origins: list[int], parents: list[int], at: int, node: int) -> bool:
    while at >= 0:
        if origins[at] == node:
            return True
        at = parents[at]
    return False
