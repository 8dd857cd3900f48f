"""Saving: from live objects to a committed checkpoint directory.

trace      the object graph, and every value that is in it
encode     each value as an array or a byte string; what cannot be saved is named here
snapshot   host buffers: from here on the program may go on changing its objects
write      shards into a staging directory, registered savers first
commit     one transaction for graph and index, then one rename
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from ckpt_jax import io
from ckpt_jax.arrays.host import without_gc
from ckpt_jax.arrays.values import encode
from ckpt_jax.errors import ShardError, UnsaveableError
from ckpt_jax.graph import codec
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, path_of
from ckpt_jax.graph.trace import LiveGraph
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.savers import default
from ckpt_jax.savers.registry import get_saver
from ckpt_jax.store.directory import staged
from ckpt_jax.store.seal import seal

SHARDS = "shards"


def write_checkpoint(
    live: LiveGraph, path: str, options: CheckpointOptions, *, overwrite: bool
) -> None:
    """Writes a traced graph to `path`, or leaves everything as it was and raises."""
    begin(live, path, options, overwrite=overwrite)()


@without_gc()
def begin(
    live: LiveGraph,
    path: str,
    options: CheckpointOptions,
    *,
    overwrite: bool,
    extra: Mapping[str, bytes] = MappingProxyType({}),
) -> Callable[[], None]:
    """The part of a save that has to see the objects as they are now.

    Returns:
      The rest, to be called once, on any thread: it writes and commits. Nothing that the
      program does meanwhile can change what is written.
    """
    snapshot = default.snapshot(_values(live), copy=options.enable_async)
    plan = default.plan_write(snapshot, options.sharding_policy)
    graph = seal(codec.encode(live.graph))
    with ExitStack() as stack:
        staging = stack.enter_context(staged(path, overwrite=overwrite, durable=options.durable))
        shards = os.path.join(staging, SHARDS)
        os.mkdir(shards)
        prefixes = _registered_shards(live, shards)
        later = stack.pop_all()

    def finish() -> None:
        with later:
            written = default.write(plan, shards, options)
            small = {**extra, OBJECT_GRAPH_KEY: graph}
            io.merge_shards([*prefixes, *written], staging, extra=small, options=options)

    return finish


def _values(live: LiveGraph) -> dict[str, Any]:
    """Every value of the default saver by key, as an array or a byte string."""
    values: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    causes: list[Exception] = []
    for node, attribute in live.graph.attributes():
        value = live.values[node][attribute.name]
        try:
            values[attribute.key] = encode(value)
        except Exception as error:  # whatever a user's serialize() raises: named with its path
            problems.append(
                (path_of(live.graph.object_keys[node]), f"{type(error).__name__}: {error}")
            )
            causes.append(error)
    if problems:
        lines = "\n".join(f"  {path or '(root)'}: {what}" for path, what in problems)
        raise UnsaveableError(
            f"{len(problems)} values cannot be saved; nothing was written:\n{lines}",
            tuple(problems),
        ) from causes[0]
    return values


def _registered_shards(live: LiveGraph, directory: str) -> list[str]:
    """Calls each registered saver that takes objects, once, with all of them."""
    objects: dict[str, dict[str, Any]] = {}
    for node, obj in zip(live.graph.nodes, live.objects, strict=True):
        if node.saver is not None:
            objects.setdefault(node.saver.name, {})[node.saver.object_name] = obj
    prefixes: list[str] = []
    for name, by_name in objects.items():
        result = get_saver(name).save_fn(by_name, os.path.join(directory, name))
        prefixes += _prefixes(name, result)
    return prefixes


def _prefixes(saver: str, result: Any) -> list[str]:
    if result is None:
        return []
    if isinstance(result, str):
        return [result]
    if isinstance(result, list | tuple):
        return [prefix for part in result for prefix in _prefixes(saver, part)]
    raise ShardError(
        f"save_fn of the checkpoint saver {saver!r} must return None, a shard prefix or a list of "
        f"them, got {type(result).__name__}"
    )
