"""Placing: where the arrays of a restore go, when the target does not say or is to be overruled.

`shardings` is one sharding for all arrays, a function of (path, `jax.ShapeDtypeStruct`) that
gives one or None, or a tree of them: a prefix of what is restored, in which a sharding stands for
everything below its place and None for no wish. Only JAX arrays are placed; the rest of a target
stays what it is.
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

Place = tuple[int, str]  # node and attribute
Structs = dict[Place, jax.ShapeDtypeStruct]
Problems = list[tuple[str, str]]


def placed(
    live: LiveGraph, shardings: Any, *, root_key: str = "", known: Sequence[ObjectGraph] = ()
) -> tuple[LiveGraph, Problems]:
    """A live graph whose arrays ask for these shardings, and (path, what) where they cannot.

    Args:
      live: the graph of the program's objects.
      shardings: see above; None changes nothing.
      root_key: the escaped path of the root of `live` in what `shardings` is a tree of.
      known: further graphs whose paths the tree may name.
    """
    if shardings is None:
        return live, []
    structs: Structs = {}
    for node, attribute in live.graph.attributes():
        if attribute.spec.is_placed:
            value = live.values[node][attribute.name]
            structs[node, attribute.name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    wishes, problems = with_shardings(
        live.graph, structs, shardings, root_key=root_key, known=known
    )
    values: list[Mapping[str, Any]] = list(live.values)
    for (node, name), wish in wishes.items():
        values[node] = {**values[node], name: wish}
    return replace(live, values=tuple(values)), problems


def with_shardings(
    graph: ObjectGraph,
    structs: Structs,
    shardings: Any,
    *,
    root_key: str = "",
    known: Sequence[ObjectGraph] = (),
) -> tuple[Structs, Problems]:
    """Those of some values for which there is a wish, with it, and what is wrong with wishes."""
    problems: Problems = []
    wishes: dict[Place, Any] = {}
    if isinstance(shardings, _LEAVES):
        wishes = dict.fromkeys(structs, shardings)
    elif callable(shardings) and view_of(shardings) is None:
        for (node, name), struct in structs.items():
            wishes[node, name] = shardings(graph.value_path(node, name), struct)
    else:
        wishes, problems = _by_tree(graph, shardings, structs, root_key, known)
    found: Structs = {}
    for place, wish in wishes.items():
        struct = structs[place]
        if wish is None:
            continue
        if isinstance(wish, _LEAVES):
            wish = host.on_devices(wish)
        if not isinstance(wish, jax.sharding.Sharding):
            problems.append((graph.value_path(*place), _no_sharding(wish)))
        elif problem := host.placement_problem(struct.shape, wish):
            problems.append((graph.value_path(*place), problem))
        else:
            found[place] = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=wish)
    return found, problems


def _by_tree(
    graph: ObjectGraph,
    tree: Any,
    places: Collection[Place],
    root_key: str,
    known: Sequence[ObjectGraph],
) -> tuple[dict[Place, Any], Problems]:
    root = [unescape(name) for name in root_key.split("/")] if root_key else []
    names_of: dict[int, list[str]] = {}
    for node, name in places:
        names_of.setdefault(node, []).append(name)
    wishes: dict[Place, Any] = {}
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
            continue  # elsewhere in the tree, where this graph is only a part of it
        node = edges.walk(labels[len(root) :])
        if node is not None:
            below = reachable(graph, [node])
            wishes.update({(n, name): wish for n in below for name in names_of.get(n, ())})
        elif not root and all(other.walk(labels) is None for other in others):
            hint = near_miss(nearest(path, graph.paths))
            problems.append((path, f"shardings names it, but there is no such value{hint}"))
    return wishes, problems


def _flatten(tree: Any, labels: tuple[Label, ...] = ()) -> Iterator[tuple[tuple[Label, ...], Any]]:
    """The shardings of a tree by their labels, and what else stands in the place of one."""
    if tree is None:
        return
    view = None if isinstance(tree, _LEAVES) else view_of(tree)
    if view is None or view.values(tree):
        yield labels, tree
        return
    for label, child in view.children(tree):
        yield from _flatten(child, (*labels, label))


class _Edges:
    """The edges of a graph by label, and by text where a label is no string."""

    def __init__(self, graph: ObjectGraph):
        self.graph = graph
        self._children: dict[int, dict[Label, int]] = {}

    def walk(self, labels: Sequence[Label]) -> int | None:
        """The node that labels lead to from the root."""
        node = 0
        for label in labels:
            child = self.of(node).get(label, self.of(node).get(local_name(label)))
            if child is None and label == "value" and self.graph.nodes[node].attributes:
                child = node  # a box with a sharding in the place of its array
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
