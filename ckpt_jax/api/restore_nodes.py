"""Restoring chosen nodes of a checkpoint into chosen objects, without matching two graphs.

The caller gives the pairs of nodes and objects. Only the values of each node itself are restored,
none of its children's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.graph.nodes import Node, ObjectGraph
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.restoring.run import opened, restore_pairs


def restore_nodes(
    path: Path,
    nodes: Mapping[int, Any],
    *,
    options: CheckpointOptions | None = None,
) -> None:
    """Restores the values of single nodes of a checkpoint's object graph.

    Args:
      path: of a checkpoint.
      nodes: for each node id the object to restore into, in place: a trackable, a variable, or
        another mutable object. Its children stay as they are. A node id is a position in
        `object_metadata(path).nodes`.
      options: `cast` and `broadcast` apply.

    Raises:
      ValueError: `nodes` is no dict, the checkpoint lacks a node, an object is not mutable, or an
        object and its node differ in the number of values. It names all such problems at once.
      RestoreMismatchError: a value differs in name, dtype or shape. Nothing was changed.
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.

    Source: TensorFlow's `restore_nodes`.

    Example:
      >>> import ckpt_jax as ckpt, jax.numpy as jnp, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": jnp.ones(2)})
      ...     kernel = ckpt.Variable(jnp.zeros(2))
      ...     restore_nodes(path, {ckpt.object_metadata(path).paths.index("w"): kernel})
      ...     kernel.value
      Array([1., 1.], dtype=float32)
    """
    options = given(options)
    if path is None:
        raise ValueError("restore_nodes needs the path of a checkpoint, got None")
    if not isinstance(nodes, Mapping):
        raise ValueError(f"expected a dict of objects by node id, got {type(nodes).__qualname__}")
    with opened(path, options, current_context()) as (reader, meeting):
        saved = reader.object_graph
        traced = {node: live_graph(obj) for node, obj in nodes.items() if _is_mutable(obj)}
        if problems := [
            what for node, obj in nodes.items() if (what := _problem(saved, node, obj, traced))
        ]:
            lines = "\n".join(f"  {what}" for what in problems)
            raise ValueError(f"{reader.path}: nothing was restored:\n{lines}")
        live = _without_edges(traced, saved)
        bound = {node: number for number, node in enumerate(traced)}
        restore_pairs(reader, live, bound, options, meeting)


def _is_mutable(obj: Any) -> bool:
    view = view_of(obj)
    return view is not None and view.mutable


def _problem(
    saved: ObjectGraph, node: Any, obj: Any, traced: Mapping[int, LiveGraph]
) -> str | None:
    if isinstance(node, bool) or not isinstance(node, int):
        return f"node ids are integers, got {node!r}"
    if not 0 <= node < len(saved.nodes):
        return f"node {node} does not exist in the checkpoint, which has {len(saved.nodes)}"
    if node not in traced:
        return (
            f"node {node}: please pass a valid Trackable, or another object that can be restored "
            f"in place, got {obj!r}"
        )
    expected, found = _num_values(traced[node].graph.nodes[0]), _num_values(saved.nodes[node])
    where = f"node {node} ({saved.paths[node] or '(root)'})"
    if expected and not found:
        return f"{where} has no values, but the {type(obj).__qualname__} expects {expected}"
    if found and not expected:
        return f"{where} has {found} values, but the {type(obj).__qualname__} takes none"
    if found != expected:
        return (
            f"{where}: the number of values differs: it has {found}, the "
            f"{type(obj).__qualname__} expects {expected}"
        )
    return None


def _num_values(node: Node) -> int:
    return len(node.attributes) + (node.saver is not None)


def _without_edges(traced: Mapping[int, LiveGraph], saved: ObjectGraph) -> LiveGraph:
    """The objects, named after their nodes."""
    graphs = traced.values()
    nodes = [replace(live.graph.nodes[0], children=(), slots=()) for live in graphs]
    return LiveGraph(
        ObjectGraph(tuple(nodes), tuple([saved.object_keys[node] for node in traced])),
        tuple([live.objects[0] for live in graphs]),
        tuple([live.views[0] for live in graphs]),
        tuple([live.values[0] for live in graphs]),
    )
