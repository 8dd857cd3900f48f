"""Graphs of checkpoints that have no object graph: of names, and of nested containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, canonical
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, local_names, object_keys
from ckpt_jax.readers import Extent, Stored
from ckpt_jax.values.leaves import describe, encode

WHOLE = "value"  # the key of a value that is a checkpoint of its own


def graph_of_names(
    path: str, values: Mapping[str, Stored], separator: str
) -> Callable[[], ObjectGraph]:
    """Makes the graph of names that are split at a separator, when it is asked for."""

    def graph() -> ObjectGraph:
        try:
            return graph_of({name: stored.spec for name, stored in values.items()}, separator)
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: {error}", file=path) from error

    return graph


def graph_of_tree(
    tree: Any,
    separator: str | None = None,
    stored_of: Callable[[Any], Stored] | None = None,
) -> tuple[dict[str, Stored], ObjectGraph]:
    """The values in nested containers by key, and their graph.

    Args:
      tree: dicts, lists and tuples of `Stored`, None and plain values.
      separator: splits keys of dicts that are text. Then the key of a value consists of its local
        names joined with the separator. Otherwise they are joined with "/", and escaped as in all
        checkpoint keys.

      stored_of: gives what is stored for any other value; by default, for a plain value itself.

    Raises:
      ValueError: two values have one name.
    """
    stored_of = stored_of or stored_value
    containers = ["leaf"]
    edges: list[dict[Label, int]] = [{}]
    values: list[Stored | None] = [None]

    def below(node: int, label: Label) -> int:
        child = edges[node].setdefault(label, len(edges))
        if child == len(edges):
            containers.append("dict")
            edges.append({})
            values.append(None)
        return child

    todo: list[tuple[int, Any]] = [(0, tree)]
    for node, part in todo:  # grows while it is walked
        if isinstance(part, dict):
            containers[node] = "dict"
            for label, child in part.items():
                steps = label.split(separator) if separator and isinstance(label, str) else [label]
                here = node
                for step in steps:
                    here = below(here, canonical(step))
                todo.append((here, child))
        elif isinstance(part, list | tuple):
            containers[node] = type(part).__name__
            todo += [(below(node, number), child) for number, child in enumerate(part)]
        elif values[node] is not None:
            raise ValueError("two values have one name")
        elif part is None:
            containers[node] = "dict" if edges[node] else "none"
        else:
            values[node] = part if isinstance(part, Stored) else stored_of(part)
            containers[node] = "dict" if edges[node] else "leaf"
    bare = [
        Node(container, children=tuple(children.items()))
        for container, children in zip(containers, edges, strict=True)
    ]
    keys = object_keys(bare)
    names = local_names(bare, separator) if separator else keys
    by_key: dict[str, Stored] = {}
    nodes = []
    for node, name, value in zip(bare, names, values, strict=True):
        if value is not None:
            key = name or WHOLE
            if key in by_key:
                raise ValueError(f"two values are called {key}")
            by_key[key] = value
            attribute = Attribute(VARIABLE_VALUE, key, value.spec, full_name=key)
            node = replace(node, attributes=(attribute,))
        nodes.append(node)
    return by_key, ObjectGraph(tuple(nodes), keys, named=True)


def stored_value(value: Any) -> Stored:
    """A Python or numpy value that is part of a header.

    Raises:
      TypeError: it is none that can be saved.
    """
    spec, data = describe(value)[0], encode(value)
    if isinstance(data, bytes):
        return Stored(spec, (Extent((), "", 0),), len(data), data)
    array = Stored.of(data)  # pyright: ignore[reportArgumentType]
    return Stored(spec, array.extents, array.nbytes, array.contents)
