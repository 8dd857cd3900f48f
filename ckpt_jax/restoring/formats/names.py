"""Graphs of checkpoints that have no object graph: of names, and of nested containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, canonical, escaped_names
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, object_keys
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
    tree: Any, stored_of: Callable[[Any], Stored] | None = None
) -> tuple[dict[str, Stored], ObjectGraph]:
    """The values in nested containers by key, and their graph.

    A key consists of the local names joined with "/", and escaped as in all checkpoint keys.

    Args:
      tree: dicts, lists and tuples of `Stored`, None and plain values.
      stored_of: gives what is stored for any other value; by default, for a plain value itself.
    """
    stored_of = stored_of or stored_value
    values: dict[str, Stored] = {}
    nodes: list[Node] = []
    todo: list[tuple[str, Any]] = [("", tree)]
    for key, part in todo:  # grows while it is walked
        if isinstance(part, dict):
            labels, container = [canonical(label) for label in part], "dict"
            parts = [*part.values()]
        elif isinstance(part, list | tuple):
            labels, container = [*range(len(part))], type(part).__name__
            parts = [*part]
        else:
            nodes.append(_leaf(key or WHOLE, part, values, stored_of))
            continue
        children: list[tuple[Label, int]] = []
        for label, name, child in zip(labels, escaped_names(labels), parts, strict=True):
            children.append((label, len(todo)))
            todo.append((f"{key}/{name}" if key else name, child))
        nodes.append(Node(container, children=tuple(children)))
    return values, ObjectGraph(tuple(nodes), object_keys(nodes), named=True)


def _leaf(
    key: str, value: Any, values: dict[str, Stored], stored_of: Callable[[Any], Stored]
) -> Node:
    if value is None:
        return Node("none")
    values[key] = stored = value if isinstance(value, Stored) else stored_of(value)
    return Node("leaf", attributes=(Attribute(VARIABLE_VALUE, key, stored.spec, full_name=key),))


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
