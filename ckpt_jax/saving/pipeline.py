"""Saving: from live objects to a committed checkpoint directory.

trace      the object graph, and every value that is in it
encode     each value as an array or a byte string; what cannot be saved is named here
snapshot   host buffers: from here on the program may go on changing its objects
write      shards into a staging directory, registered savers first
commit     one transaction for graph and index, then one rename

Where there are several processes, each does all of this for its own slices up to the commit,
which process 0 does for all of them when their reports are in (`multihost`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

from ckpt_jax import io
from ckpt_jax.errors import ProcessError, ShardError, UnsaveableError
from ckpt_jax.graph import codec
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, path_of
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import SaveWatch
from ckpt_jax.objects.registry import get_saver
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import Meeting, described
from ckpt_jax.progress import progress
from ckpt_jax.saving.snapshot import snapshot
from ckpt_jax.saving.write import plan_write, write
from ckpt_jax.store.directory import Staging
from ckpt_jax.store.fetch import read_index
from ckpt_jax.store.seal import seal
from ckpt_jax.values.host import without_gc
from ckpt_jax.values.leaves import encode

SHARDS = "shards"
_MAX_PARTS = 256  # of a graph, in what a process says of it
_MAX_LISTED = 10


def write_checkpoint(
    live: Callable[[], LiveGraph],
    path: str,
    options: CheckpointOptions,
    meeting: Meeting,
    *,
    overwrite: bool,
    watch: SaveWatch,
    extra: Callable[[LiveGraph], Mapping[str, bytes]] = lambda live: {},
) -> None:
    """Writes a traced graph to `path`, or leaves everything as it was and raises."""
    begin(live, path, options, meeting, overwrite=overwrite, watch=watch, extra=extra)()


@without_gc()
def begin(
    trace: Callable[[], LiveGraph],
    path: str,
    options: CheckpointOptions,
    meeting: Meeting,
    *,
    overwrite: bool,
    watch: SaveWatch,
    extra: Callable[[LiveGraph], Mapping[str, bytes]] = lambda live: {},
) -> Callable[..., None]:
    """The part of a save that has to see the objects as they are now.

    Args:
      trace: gives the objects.
      path: of the checkpoint, the same on all processes.
      options: how to save.
      meeting: with the other processes. It has to be entered, and be left after the rest.
      overwrite: whether a checkpoint at `path` may be replaced.
      watch: measures the save.
      extra: small entries that are committed with the object graph.

    Returns:
      The rest, to be called once, on any thread: it writes and commits. Nothing that the
      program does meanwhile can change what is written. It takes two functions of no argument,
      which are called on each process when the checkpoint is there: `kept`, and then `then`, on
      process 0 before the others know of it. What `then` raises takes nothing back. Where it
      does so on process 0, the others call `kept` alone, and fail, too.
    """
    live = trace()
    process = meeting.index
    values = encoded_values(live)
    taken = snapshot(values, copy=options.enable_async, process=process, count=meeting.count)
    plan = plan_write(taken, options.sharding_policy)
    graph, more = seal(codec.encode(live.graph)), extra(live)
    digest, parts = "", {}
    if meeting.count > 1:  # one process has nobody to agree with
        digest, parts = hashlib.sha256(graph).hexdigest(), _digests_of_parts(live.graph)
    staging = Staging.of(path, meeting.token)
    shards = os.path.join(staging.directory, SHARDS)
    mine = f"{process:05d}-"
    with ExitStack() as stack:
        if meeting.leads:
            stack.enter_context(staging.claimed(overwrite=overwrite, durable=options.durable))
        else:
            stack.enter_context(
                staging.joined(
                    shards,
                    mine,
                    durable=options.durable,
                    is_lost=lambda: not meeting.is_in_doubt,
                )
            )
        stack.push(meeting.tell)  # before files go, or others would fail with that
        os.makedirs(shards, exist_ok=True)
        prefix = os.path.join(shards, mine if meeting.count > 1 else "")
        registered = _registered_shards(live, prefix)
        later = stack.pop_all()

    def finish(
        kept: Callable[[], None] = lambda: None, then: Callable[[], None] = lambda: None
    ) -> None:
        failures: list[BaseException] = []
        with later, progress(options.progress, f"saving {path}", taken.nbytes) as advance:

            def wrote(nbytes: int) -> None:
                watch.wrote(nbytes)
                advance(nbytes)

            written = [*registered, *write(plan, shards, options, process, wrote)]
            watch.wrote(sum([read_index(shard).total_nbytes for shard in registered]))
            report = _Report(
                os.path.basename(staging.path),
                digest,
                parts,
                tuple([os.path.relpath(shard, staging.directory) for shard in written]),
            )

            def commit(reports: list[Any]) -> str | None:
                found = [_Report(*said) for said in reports]
                _check_agreement(found, meeting.what)
                _check_shared(found, staging.directory, meeting.what)
                directories = [
                    os.path.normpath(os.path.join(staging.directory, shard))
                    for each in found
                    for shard in each.shards
                ]
                small = {**more, OBJECT_GRAPH_KEY: graph}
                io.merge_shards(directories, staging.directory, extra=small, options=options)
                staging.publish(overwrite=overwrite, durable=options.durable)
                later.close()
                watch.committed(path)
                kept()
                try:
                    with meeting.ending():
                        then()
                except BaseException as error:  # raised when the others know of the checkpoint
                    failures.append(error)
                    return described(error, process, meeting.what)["message"]
                return None

            failed = meeting.conclude(astuple(report), commit)
            if failures:
                raise failures[0]
            if meeting.leads:
                return
            watch.committed(path)
            kept()
            if failed is not None:
                what = f"{meeting.what}: the checkpoint was committed, but then {failed}"
                raise ProcessError(what, (0,))
            with meeting.ending():
                then()

    return finish


@dataclass(frozen=True, slots=True)
class _Report:
    """What a process says when its shards are written.

    Attributes:
      name: of the checkpoint.
      graph: digest of the object graph.
      parts: digests of its values by the beginning of their paths, to say where graphs differ.
      shards: directories, relative to the staging directory.
    """

    name: str
    graph: str
    parts: dict[str, str]
    shards: tuple[str, ...]


def _digests_of_parts(graph: ObjectGraph) -> dict[str, str]:
    for depth in (2, 1):
        parts: dict[str, list[str]] = {}
        for node, attribute in graph.attributes():
            part = "/".join(graph.paths[node].split("/", depth)[:depth])
            parts.setdefault(part, []).append(
                f"{attribute.key} {attribute.spec!r} {attribute.sharding!r}"
            )
        if len(parts) <= _MAX_PARTS:
            break
    else:
        return {}
    return {
        part: hashlib.sha256("\n".join(values).encode("utf-8", "replace")).hexdigest()[:8]
        for part, values in parts.items()
    }


def _check_agreement(reports: Sequence[_Report], what: str) -> None:
    """Checks that all processes have saved the same objects, to the same place."""
    names = [report.name for report in reports]
    if others := tuple([k for k, name in enumerate(names) if name != names[0]]):
        said = ", ".join(f"process {k} {name}" for k, name in enumerate(names))
        raise ProcessError(f"{what}: the processes save to different places: {said}", others)
    graphs = [report.graph for report in reports]
    if others := tuple([k for k, graph in enumerate(graphs) if graph != graphs[0]]):
        first, other = (reports[k].parts for k in (0, others[0]))
        where = sorted(part for part in {*first, *other} if first.get(part) != other.get(part))
        below = f" below {', '.join(where[:_MAX_LISTED])}" if where else ""
        raise ProcessError(
            f"{what}: the objects of process{'es' * (len(others) > 1)} "
            f"{', '.join(map(str, others))} are not those of process 0: names, shapes, dtypes or "
            f"shardings differ{below}. All processes have to save the same object graph; state "
            "that each has for itself goes into ckpt.PerProcess.",
            others,
        )


def _check_shared(reports: Sequence[_Report], staging: str, what: str) -> None:
    """Checks that process 0 finds the directories that the others have written."""
    unseen = tuple(
        k
        for k, report in enumerate(reports)
        if not all(os.path.isdir(os.path.join(staging, shard)) for shard in report.shards)
    )
    if unseen:
        raise ProcessError(
            f"{what}: process 0 does not find what was written by "
            f"{', '.join(map(str, unseen))}. All processes have to share the directory "
            f"{os.path.dirname(staging)}; ckpt.preflight tells whether they do.",
            unseen,
        )


def encoded_values(live: LiveGraph) -> dict[str, Any]:
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


def _registered_shards(live: LiveGraph, prefix: str) -> list[str]:
    """Calls each registered saver that takes objects, once, with all of them."""
    objects: dict[str, dict[str, Any]] = {}
    for node, obj in zip(live.graph.nodes, live.objects, strict=True):
        if node.saver is not None:
            objects.setdefault(node.saver.name, {})[node.saver.object_name] = obj
    prefixes: list[str] = []
    for name, by_name in objects.items():
        result = get_saver(name).save_fn(by_name, prefix + name)
        prefixes += _prefixes(name, result)
    return prefixes


def _prefixes(saver: str, result: Any) -> list[str]:
    if result is None:
        return []
    if isinstance(result, str | os.PathLike):
        return [os.fsdecode(result)]
    if isinstance(result, list | tuple):
        return [prefix for part in result for prefix in _prefixes(saver, part)]
    raise ShardError(
        f"save_fn of the checkpoint saver {saver!r} must return None, a shard prefix or a list of "
        f"them, got {type(result).__name__}"
    )
