"""Placing: where a restore puts arrays, if the target does not say or the caller overrules it.

`shardings` is one sharding for all arrays, or a function of (path, `jax.ShapeDtypeStruct`) that
returns a sharding or None, or a tree. The tree is a prefix of the restored tree: a sharding in it
is for everything below its path, and None asks for nothing. Only JAX arrays are placed; other
values of a target keep their kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from ckpt_jax.graph.labels import Label, local_name, readable, unescape
from ckpt_jax.graph.nodes import ObjectGraph, reachable
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import view_of
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.values import host

ValueId = tuple[int, str]  # node and attribute
Structs = dict[ValueId, jax.ShapeDtypeStruct]
Problems = list[tuple[str, str]]


def placed(
    live: LiveGraph, shardings: Any, *, known: Sequence[ObjectGraph]
) -> tuple[LiveGraph, Problems]:
    """Lets the arrays of a live graph ask for shardings.

    Args:
      live: the graph of the program's objects.
      shardings: see the module; None changes nothing.
      known: further graphs, with paths that the tree may name.

    Returns:
      The graph, and (path, problem) for each sharding that is wrong.
    """
    if shardings is None:
        return live, []
    structs: Structs = {}
    for node, attribute in live.graph.attributes():
        if attribute.spec.is_placed:
            value = live.values[node][attribute.name]
            structs[node, attribute.name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    wishes, problems = with_shardings(live.graph, structs, shardings, known=known)
    values: list[Mapping[str, Any]] = list(live.values)
    for (node, name), wish in wishes.items():
        values[node] = {**values[node], name: wish}
    return replace(live, values=tuple(values)), problems


def with_shardings(
    graph: ObjectGraph,
    structs: Structs,
    shardings: Any,
    *,
    known: Sequence[ObjectGraph] = (),
) -> tuple[Structs, Problems]:
    """Gives values the shardings that are wished for them.

    Args:
      graph: the graph of the values.
      structs: shapes and dtypes of the values that can be placed.
      shardings, known: as for `placed`.

    Returns:
      The structs that got a sharding, and (path, problem) for each sharding that is wrong.
    """
    problems: Problems = []
    wishes: dict[ValueId, Any] = {}
    if isinstance(shardings, _LEAVES):
        wishes = dict.fromkeys(structs, shardings)
    elif callable(shardings) and view_of(shardings) is None:
        for (node, name), struct in structs.items():
            wishes[node, name] = shardings(graph.value_path(node, name), struct)
    else:
        wishes, problems = _by_tree(graph, shardings, structs, known)
    found: Structs = {}
    for value, wish in wishes.items():
        struct = structs[value]
        if wish is None:
            continue
        if isinstance(wish, _LEAVES):
            wish = host.on_devices(wish)
        if not isinstance(wish, jax.sharding.Sharding):
            problems.append((graph.value_path(*value), _no_sharding(wish)))
        elif problem := host.placement_problem(struct.shape, wish):
            problems.append((graph.value_path(*value), problem))
        else:
            found[value] = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=wish)
    return found, problems


def _by_tree(
    graph: ObjectGraph,
    tree: Any,
    values: Collection[ValueId],
    known: Sequence[ObjectGraph],
) -> tuple[dict[ValueId, Any], Problems]:
    root_key = graph.object_keys[0]  # not empty if the graph is only a part of the tree
    root = [unescape(name) for name in root_key.split("/")] if root_key else []
    names_of: dict[int, list[str]] = {}
    for node, name in values:
        names_of.setdefault(node, []).append(name)
    wishes: dict[ValueId, Any] = {}
    problems: Problems = []
    edges = _Edges(graph)
    others = [_Edges(other) for other in known]
    for labels, wish in sorted(_flatten(tree), key=lambda entry: len(entry[0])):
        path = "/".join([readable(local_name(label)) for label in labels])
        if not isinstance(wish, _LEAVES):
            problems.append((path, _no_sharding(wish)))
            continue
        ahead = [local_name(label) for label in labels[: len(root)]]
        if ahead != root[: len(ahead)]:
            continue  # for another part of the tree
        node = edges.walk(labels[len(root) :])
        if node is not None:
            below = reachable(graph, [node])
            wishes.update({(n, name): wish for n in below for name in names_of.get(n, ())})
        elif not root and all(other.walk(labels) is None for other in others):
            hint = near_miss(nearest(path, graph.paths))
            problems.append((path, f"shardings names it, but there is no such value{hint}"))
    return wishes, problems


def _flatten(tree: Any, labels: tuple[Label, ...] = ()) -> Iterator[tuple[tuple[Label, ...], Any]]:
    """The shardings of a tree by their labels, and whatever stands where a sharding should."""
    if tree is None:
        return
    view = None if isinstance(tree, _LEAVES) else view_of(tree)
    if view is None or view.values(tree):
        yield labels, tree
        return
    for label, child in view.children(tree):
        yield from _flatten(child, (*labels, label))


class _Edges:
    """The edges of a graph by label, and by text if a label is no string."""

    def __init__(self, graph: ObjectGraph):
        self.graph = graph
        self._children: dict[int, dict[Label, int]] = {}

    def walk(self, labels: Sequence[Label]) -> int | None:
        """The node that labels lead to from the root."""
        node = 0
        for label in labels:
            child = self.of(node).get(label, self.of(node).get(local_name(label)))
            if child is None and label == "value" and self.graph.nodes[node].attributes:
                child = node  # a box that holds a sharding instead of its array
            if child is None:
                return None
            node = child
        return node

    def of(self, node: int) -> dict[Label, int]:
        if node not in self._children:
            children = self.graph.nodes[node].children
            by_text: dict[Label, int] = {local_name(label): child for label, child in children}
            self._children[node] = {**by_text, **dict(children)}
        return self._children[node]


_LEAVES = (jax.sharding.Sharding, jax.sharding.PartitionSpec)


def _no_sharding(wish: Any) -> str:
    if isinstance(wish, jax.sharding.PartitionSpec):
        return (
            f"{wish} needs a mesh: restore under jax.set_mesh(mesh), or give "
            f"jax.sharding.NamedSharding(mesh, {wish})"
        )
    return f"expected a jax.sharding.Sharding, got {type(wish).__qualname__}"
