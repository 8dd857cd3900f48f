"""Typed paths: an object graph for a checkpoint that lists the paths of its leaves.

Some files hold a tree as the list of its leaves. A *typed path* is the sequence of labels that
leads to a leaf: integers are positions in lists, everything else is a key of a dict. So, unlike
with `global_names`, it is known what is a label and what a separator. What lists and dicts stand
for in a program (tuples, named tuples, objects) is not known; matching allows for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, path_of
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, object_keys
from ckpt_jax.graph.specs import LeafSpec

Path = tuple[Label, ...]


def graph_of_paths(leaves: Iterable[tuple[Path, str]]) -> tuple[ObjectGraph, list[str]]:
    """The tree that has these leaves.

    Args:
      leaves: typed paths, each with what is there: "leaf" for a value, "none" for None, or "dict",
        "list" or "tuple" for a container that is empty, unless other leaves lie in it.

    Returns:
      The graph, in which values are called by their readable paths and have no specs yet, and the
      readable path of each leaf.

    Raises:
      ValueError: a path is listed twice, or leads through a value.

    >>> graph, paths = graph_of_paths([(("layers", 0), "leaf"), (("name",), "none")])
    >>> paths, [node.container for node in graph.nodes]
    (['layers/0', 'name'], ['dict', 'list', 'leaf', 'none'])
    """
    nodes = [Node("dict")]
    edges: list[dict[Label, int]] = [{}]
    ends: list[int] = []
    for path, container in leaves:
        here = 0
        for label in path:
            there = edges[here].setdefault(label, len(nodes))
            if there == len(nodes):
                nodes.append(Node("dict"))
                edges.append({})
            here = there
        ends.append(here)
        if container == "leaf" == nodes[here].container:
            raise ValueError(f"two values have the path {'/'.join(map(str, path))}")
        if nodes[here].container != "leaf":
            nodes[here] = Node(container)
    nodes = [
        _with_children(node, children) if children else node
        for node, children in zip(nodes, edges, strict=True)
    ]
    keys = object_keys(nodes)
    names = [path_of(key) for key in keys]
    for at, name in enumerate(names):
        if nodes[at].container == "leaf":
            if nodes[at].children:
                raise ValueError(f"there are values below the value {name or '(root)'}")
            value = Attribute(VARIABLE_VALUE, name, full_name=name)
            nodes[at] = Node("leaf", attributes=(value,))
    return ObjectGraph(tuple(nodes), keys, named=True), [names[end] for end in ends]


def described(graph: ObjectGraph, specs: Mapping[str, LeafSpec]) -> ObjectGraph:
    """The graph with the specs of its values, by key."""
    nodes = [
        replace(
            node,
            attributes=tuple([replace(a, spec=specs[a.key]) for a in node.attributes]),
        )
        if node.attributes
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def _with_children(node: Node, children: Mapping[Label, int]) -> Node:
    """The node with children. It is a list if their labels are all positions of one."""
    positions = sorted([label for label in children if isinstance(label, int)])
    is_list = positions == [*range(len(children))]
    pairs = [(at, children[at]) for at in positions] if is_list else children.items()
    if node.container == "leaf":
        return replace(node, children=tuple(pairs))
    return Node("list" if is_list else "dict", children=tuple(pairs))
