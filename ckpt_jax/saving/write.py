"""Shards: the slices of a snapshot are grouped by the sharding policy, and written.

plan_write  groups the slices into shards, and checks the groups if a user wrote the policy
write       writes each shard with the same function that registered savers use
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_jax import io
from ckpt_jax.errors import ShardError
from ckpt_jax.graph.boxes import Box, inside, shape_of, size_of, slices, tiling_problem
from ckpt_jax.options import (
    CheckpointOptions,
    Groups,
    MaxShardSize,
    PlannedSlice,
    ShardByDevice,
    ShardByProcess,
    ShardingPolicy,
)
from ckpt_jax.saving.snapshot import Snapshot
from ckpt_jax.store.workers import Workers

_BUILT_IN = (ShardByDevice, ShardByProcess, MaxShardSize)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """The content of each shard: key -> a byte string or slices."""

    shards: tuple[Mapping[str, Any], ...]


def plan_write(snap: Snapshot, policy: ShardingPolicy) -> WritePlan:
    """Groups a snapshot into shards.

    Raises:
      ShardError: a user's policy dropped, repeated or changed a slice, or mixed processes.
    """
    groups = policy(snap.slices)
    if not isinstance(policy, _BUILT_IN):
        groups = _lists(groups)
        _check_policy(snap.slices, groups)
    return WritePlan(tuple(_shard(snap, group) for group in groups if group))


def _lists(groups: Any) -> list[list[PlannedSlice]]:
    """The groups that a policy returned, as lists: they and their groups may be generators."""
    try:
        lists = [list(group) for group in groups]
    except TypeError as error:
        raise ShardError(f"a sharding policy returns groups of slices: {error}") from error
    for piece in (piece for group in lists for piece in group):
        if not isinstance(piece, PlannedSlice):
            raise ShardError(f"a sharding policy returns groups of slices, got {piece!r} in one")
    return lists


def _shard(snap: Snapshot, group: Sequence[PlannedSlice]) -> dict[str, Any]:
    shard: dict[str, Any] = {}
    whole_of: dict[str, list[Box]] | None = None
    for piece in group:
        data = snap.contents.get((piece.key, piece.box))
        if data is None:  # a part of a slice
            if whole_of is None:
                whole_of = {}
                for key, box in snap.contents:
                    whole_of.setdefault(key, []).append(box)
            data = _part(snap, piece, whole_of[piece.key])
        if isinstance(data, bytes):
            shard[piece.key] = data
        else:
            part = io.Slice(data, piece.box, piece.shape)
            shard.setdefault(piece.key, []).append(part)
    return shard


def _part(snap: Snapshot, piece: PlannedSlice, boxes: Sequence[Box]) -> np.ndarray:
    for box in boxes:
        if _holds(box, piece.box):
            data = snap.contents[piece.key, box]
            assert isinstance(data, np.ndarray)
            return data[slices(piece.box, origin=box)]
    raise ShardError(f"{piece.key}: no slice of this process contains {piece.box}")


def _check_policy(slices: Sequence[PlannedSlice], groups: Groups) -> None:
    """Checks that the groups hold exactly the slices, each whole or cut into disjoint parts."""
    problems: list[str] = []
    by_key: dict[str, list[PlannedSlice]] = {}
    for piece in slices:
        by_key.setdefault(piece.key, []).append(piece)
    parts: dict[tuple[str, Box], list[PlannedSlice]] = {}
    for number, group in enumerate(groups):
        processes = {piece.process for piece in group}
        if len(processes) > 1:
            problems.append(f"shard {number} mixes processes {sorted(processes)}")
        for part in group:
            owner = next((p for p in by_key.get(part.key, ()) if _holds(p.box, part.box)), None)
            if part.key not in by_key:
                problems.append(f"{part.key}: added")
            elif owner is None:
                problems.append(f"{part.key}: {part.box} lies in no slice that is to be written")
            else:
                problems += _changes(owner, part)
                parts.setdefault((owner.key, owner.box), []).append(part)
    for piece in slices:
        found = parts.get((piece.key, piece.box), [])
        if not found:
            problems.append(f"{piece.key}: {piece.box} was dropped")
            continue
        origin = [start for start, _ in piece.box]
        relative = [
            tuple((a - o, b - o) for (a, b), o in zip(part.box, origin, strict=True))
            for part in found
        ]
        if problem := tiling_problem(relative, shape_of(piece.box)):
            problems.append(f"{piece.key}: {problem}")
        elif len(found) > 1 and not size_of(piece.box):
            problems.append(f"{piece.key}: {piece.box} is repeated")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ShardError(f"the sharding policy did not keep the values; nothing written:\n{listed}")


def _holds(outer: Box, inner: Box) -> bool:
    return len(outer) == len(inner) and all(
        a <= c <= d <= b for (a, b), (c, d) in zip(outer, inner, strict=True)
    )


def _changes(owner: PlannedSlice, part: PlannedSlice) -> list[str]:
    facts = ("shape", "dtype", "process")
    changed = [name for name in facts if getattr(owner, name) != getattr(part, name)]
    if not inside(part.box, part.shape) and "shape" not in changed:
        changed.append("box")
    return [f"{part.key}: changed its {name}" for name in changed]


def write(
    plan: WritePlan,
    directory: str,
    options: CheckpointOptions,
    process: int,
    written: Callable[[int], object],
) -> list[str]:
    """Writes the shards into new directories below `directory`.

    If one shard fails, or the program is interrupted, the others are given up.

    Args:
      plan: the shards.
      directory: exists already.
      options: how to write.
      process: index of this process, which is part of the names.
      written: called with numbers of bytes while shards are written, on several threads.

    Returns:
      The directories of the shards.
    """
    prefix = os.path.join(directory, f"{process:05d}-")
    jobs = [(f"{prefix}{number:05d}", shard) for number, shard in enumerate(plan.shards)]
    given_up = threading.Event()

    def go_on(nbytes: int) -> None:
        if given_up.is_set():
            raise ShardError("given up, because another shard failed or the save was interrupted")
        written(nbytes)

    with Workers(min(2, len(jobs)), "ckpt-write") as pool:
        write_one = functools.partial(io.write_shard, options=options, written=go_on)
        try:
            return list(pool.map(lambda job: write_one(*job), jobs))
        except BaseException:
            given_up.set()
            raise
