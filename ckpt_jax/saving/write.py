"""Shards: the slices of a snapshot are grouped by the sharding policy, and written.

plan_write  groups the slices into shards, and checks the groups if a user wrote the policy
write       writes all shards with the function that registered savers use for theirs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_jax.errors import ShardError
from ckpt_jax.graph.boxes import Box, inside, relative, shape_of, size_of, slices, tiling_problem
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
from ckpt_jax.store.index import Shard, Table
from ckpt_jax.store.shard import Slice, write_shards
from ckpt_jax.values import host

_BUILT_IN = (ShardByDevice, ShardByProcess, MaxShardSize)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """The slices of each shard, and where their contents are."""

    groups: tuple[Sequence[PlannedSlice], ...]
    snapshot: Snapshot


def plan_write(snap: Snapshot, policy: ShardingPolicy) -> WritePlan:
    """Groups a snapshot into shards.

    Raises:
      ShardError: a user's policy dropped, repeated or changed a slice, or mixed processes.
    """
    groups = policy(snap.slices)
    if isinstance(policy, ShardByDevice) and snap.shared:
        # The shards of what each process alone holds are alike, and so their tables are shared.
        groups = [part for group in groups for part in _divided(group, snap.shared)]
    elif not isinstance(policy, _BUILT_IN):
        groups = _lists(groups)
        _check_policy(snap.slices, groups)
    return WritePlan(tuple(group for group in groups if group), snap)


def _divided(
    group: Sequence[PlannedSlice], shared: frozenset[tuple[str, Box]]
) -> tuple[list[PlannedSlice], list[PlannedSlice]]:
    """The slices of a group that this process alone holds, and the others."""
    own = [piece for piece in group if (piece.key, piece.box) not in shared]
    return own, [piece for piece in group if (piece.key, piece.box) in shared]


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


def _shard(
    snap: Snapshot, group: Sequence[PlannedSlice], boxes_of: Mapping[str, Sequence[Box]]
) -> dict[str, Any]:
    """The contents of a shard; `boxes_of` has those of each key in the snapshot."""
    shard: dict[str, Any] = {}
    for piece in group:
        data = snap.contents.get((piece.key, piece.box))
        if data is None:  # a part of a slice
            data = _part(snap, piece, boxes_of[piece.key])
        if isinstance(data, bytes):
            shard[piece.key] = data
        else:
            shard.setdefault(piece.key, []).append(Slice(data, piece.box, piece.shape))
    return shard


def _part(
    snap: Snapshot, piece: PlannedSlice, boxes: Sequence[Box]
) -> np.ndarray | host.Arriving | host.Converting:
    for box in boxes:
        if _holds(box, piece.box):
            data = snap.contents[piece.key, box]
            assert not isinstance(data, bytes)
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
        boxes = [relative(part.box, piece.box) for part in found]
        if problem := tiling_problem(boxes, shape_of(piece.box)):
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
    prefix: str,
    options: CheckpointOptions,
    written: Callable[[int], object],
) -> list[tuple[Shard, Table]]:
    """Writes the shards into new directories.

    If one shard fails, or the program is interrupted, the others are given up.

    Args:
      plan: the shards.
      prefix: the beginning of the paths of the shards, in a directory that exists already. It
        tells the shards of this process from those of others.
      options: how to write.
      written: called with numbers of bytes while shards are written, on several threads.

    Returns:
      The entries of the shards in the index of the checkpoint, and their tables.
    """
    boxes_of: dict[str, list[Box]] = {}
    for key, box in plan.snapshot.contents:
        boxes_of.setdefault(key, []).append(box)
    shards = {
        f"{prefix}{number:05d}": _shard(plan.snapshot, group, boxes_of)
        for number, group in enumerate(plan.groups)
    }
    return write_shards(
        shards,
        compression=options.compression,
        durable=options.durable,
        max_inflight_bytes=options.max_inflight_bytes,
        written=written,
        is_new=True,
    )
