"""Shards: the slices of a snapshot are grouped by the sharding policy, and written.

plan_write  groups the slices into shards, and checks the groups if a user wrote the policy
write       writes each shard with the same function that registered savers use
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ckpt_jax import io
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
    part_along,
)
from ckpt_jax.saving.snapshot import Snapshot
from ckpt_jax.store.workers import Workers, cores
from ckpt_jax.values import host

_BUILT_IN = (ShardByDevice, ShardByProcess, MaxShardSize)


_LEAST_NBYTES = 32 << 20  # of a shard that a device's slices are divided into


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
    if isinstance(policy, ShardByDevice):
        groups = divided(groups, cores())
    elif not isinstance(policy, _BUILT_IN):
        groups = _lists(groups)
        _check_policy(snap.slices, groups)
    return WritePlan(tuple(group for group in groups if group), snap)


def divided(groups: Groups, count: int) -> list[Sequence[PlannedSlice]]:
    """Groups of slices, the large ones divided, so that there are about `count`.

    A slice that is larger than its part of a group is cut along its first axis of several rows, so
    that each part is contiguous.
    """
    sizes = [sum([piece.nbytes for piece in group]) for group in groups]
    total = sum(sizes)
    found: list[Sequence[PlannedSlice]] = []
    for group, nbytes in zip(groups, sizes, strict=True):
        parts = min(count * nbytes // max(total, 1), nbytes // _LEAST_NBYTES)
        if parts < 2:
            found.append(group)
            continue
        limit = -(-nbytes // parts)
        part: list[PlannedSlice] = []
        held = 0
        for piece in (row for whole in group for row in _rows(whole, limit)):
            if part and held + piece.nbytes // 2 > limit:
                found.append(part)
                part, held = [], 0
            part.append(piece)
            held += piece.nbytes
        found.append(part)
    return found


def _rows(piece: PlannedSlice, limit: int) -> list[PlannedSlice]:
    """A slice, or parts of it of about `limit` bytes."""
    lengths = [stop - start for start, stop in piece.box]
    axis = next((axis for axis, length in enumerate(lengths) if length > 1), None)
    count = 0 if axis is None else min(piece.nbytes // limit, lengths[axis])
    if axis is None or count < 2:
        return [piece]
    start = piece.box[axis][0]
    bounds = [start + lengths[axis] * i // count for i in range(count + 1)]
    return [part_along(piece, axis, a, b) for a, b in pairwise(bounds)]


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
        if isinstance(data, host.Arriving):
            data = data.wait()
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
            if isinstance(data, host.Arriving):
                data = data.wait()
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
) -> list[str]:
    """Writes the shards into new directories.

    If one shard fails, or the program is interrupted, the others are given up.

    Args:
      plan: the shards.
      prefix: the beginning of the paths of the shards, in a directory that exists already. It
        tells the shards of this process from those of others.
      options: how to write.
      written: called with numbers of bytes while shards are written, on several threads.

    Returns:
      The directories of the shards.
    """
    writers = max(1, min(cores(), len(plan.groups)))
    options = replace(options, max_inflight_bytes=max(options.max_inflight_bytes // writers, 1))
    given_up = threading.Event()
    boxes_of: dict[str, list[Box]] = {}
    for key, box in plan.snapshot.contents:
        boxes_of.setdefault(key, []).append(box)

    def go_on(nbytes: int) -> None:
        if given_up.is_set():
            raise ShardError("given up, because another shard failed or the save was interrupted")
        written(nbytes)

    def write_one(number: int, group: Sequence[PlannedSlice]) -> str:
        contents = _shard(plan.snapshot, group, boxes_of)
        return io.write_shard(f"{prefix}{number:05d}", contents, options=options, written=go_on)

    with Workers(writers, "ckpt-write") as pool:
        try:
            return list(pool.map(write_one, range(len(plan.groups)), plan.groups))
        except BaseException:
            given_up.set()
            raise
