"""The default saver: every value that no registered saver takes.

snapshot    brings what this process holds of each value to host memory: views of CPU arrays,
            copies from other devices, all started before the first is waited for. Where there
            are several processes, `spread` says which of them writes what.
plan_write  groups the slices into shards, as the sharding policy says.
write       writes each shard with the same primitive that registered savers use.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ckpt_jax import io
from ckpt_jax.arrays import host
from ckpt_jax.errors import ShardError, UnsaveableError
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.options import (
    CheckpointOptions,
    Groups,
    MaxShardSize,
    PlannedSlice,
    ShardByDevice,
    ShardByProcess,
    ShardingPolicy,
)
from ckpt_jax.savers.spread import HeldBox, spread
from ckpt_jax.store.box import Box, inside, shape_of, size_of, slices, tiling_problem, whole
from ckpt_jax.store.index import dtype_name
from ckpt_jax.store.workers import Workers

_BUILT_IN = (ShardByDevice, ShardByProcess, MaxShardSize)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Slices on the host, by (key, box)."""

    slices: tuple[PlannedSlice, ...]
    contents: Mapping[tuple[str, Box], np.ndarray | bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all slices."""
        return sum([piece.nbytes for piece in self.slices])


@dataclass(frozen=True, slots=True)
class WritePlan:
    """The contents of each shard: key -> a byte string or slices."""

    shards: tuple[Mapping[str, Any], ...]


@host.transfers_allowed()
def snapshot(
    values: Mapping[str, jax.Array | np.ndarray | bytes],
    *,
    copy: bool,
    process: int = 0,
    count: int = 1,
) -> Snapshot:
    """What this process writes of `values`, on the host.

    What lies on no device, and arrays of which each process has its own, are written by
    process 0.

    Args:
      values: by checkpoint key, as `encode` gives them, the same keys on all processes.
      copy: also copy numpy arrays, which the program could change while they are written.
      process: index of this process.
      count: number of processes.

    Raises:
      UnsaveableError: arrays that only a process other than 0 can reach.
    """
    if count == 1:
        parts = [
            (key, *owned)
            for key, value in values.items()
            if isinstance(value, jax.Array)
            for owned in host.owned_shards(value)
        ]
    else:
        parts = _assigned(values, process, count)
    found: dict[str, list[tuple[Box, int, np.ndarray]]] = {}
    on_host = host.to_host([shard for *_, shard in parts])
    for (key, box, device, _), data in zip(parts, on_host, strict=True):
        found.setdefault(key, []).append((box, device, data))
    home = jax.local_devices()[0].id
    planned: list[PlannedSlice] = []
    contents: dict[tuple[str, Box], np.ndarray | bytes] = {}
    for key, value in values.items():
        if isinstance(value, jax.Array):
            dtype = dtype_name(value.dtype)
            for box, device, data in found.get(key, ()):
                contents[key, box] = data
                planned.append(
                    PlannedSlice(key, box, value.shape, dtype, data.nbytes, process, device)
                )
        elif process == 0:
            if isinstance(value, bytes):
                data, box, dtype, nbytes = value, (), "bytes", len(value)
            else:
                data = value.copy() if copy else value
                box, dtype, nbytes = whole(data.shape), dtype_name(data.dtype), data.nbytes
            contents[key, box] = data
            planned.append(PlannedSlice(key, box, shape_of(box), dtype, nbytes, process, home))
    return Snapshot(tuple(planned), contents)


def _assigned(
    values: Mapping[str, jax.Array | np.ndarray | bytes], process: int, count: int
) -> list[tuple[str, Box, int, jax.Array | np.ndarray]]:
    """(key, box, device id, single-device array) of what `spread` gives to this process."""
    held: list[HeldBox] = []
    places: list[tuple[str, dict[int, int]]] = []  # of each held box: key, {process: device id}
    unreachable: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, bytes):
            continue
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            held.append(HeldBox(whole(value.shape), value.nbytes, (0,)))
            places.append((key, {}))
            continue
        processes = {device.process_index for device in value.sharding.device_set}
        if len(processes) == 1 and processes != {0}:
            what = f"lies on devices of process {min(processes)} only, which takes it for its own"
            unreachable.append((path_of(object_key_of(key)), what))
        itemsize = value.dtype.itemsize
        for box, holders in host.held_boxes(value.sharding, value.shape):
            held.append(HeldBox(box, size_of(box) * itemsize, tuple([p for p, _ in holders])))
            places.append((key, dict(holders)))
    if unreachable:
        lines = "\n".join(f"  {path}: {what}" for path, what in unreachable)
        raise UnsaveableError(
            f"{len(unreachable)} arrays cannot be saved; nothing was written:\n{lines}\n"
            "Lay them over a mesh with devices of several processes, or of process 0, or save "
            "them with ckpt.PerProcess.",
            tuple(unreachable),
        )
    assigned: list[tuple[str, Box, int, jax.Array | np.ndarray]] = []
    for part in spread(held, count):
        key, devices = places[part.source]
        value = values[key]
        if part.process != process or not isinstance(value, jax.Array):
            continue
        if not devices:
            assigned += [(key, *owned) for owned in host.owned_shards(value)]
            continue
        origin = held[part.source].box
        inner = tuple([(a - o, b - o) for (a, b), (o, _) in zip(part.box, origin, strict=True)])
        shard = host.part_of(value, devices[process], inner)
        assigned.append((key, part.box, devices[process], shard))
    return assigned


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
    """What a policy returned, where the groups and each of them may be generators."""
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
        if all(a <= c and d <= b for (a, b), (c, d) in zip(box, piece.box, strict=True)):
            data = snap.contents[piece.key, box]
            assert isinstance(data, np.ndarray)
            return data[slices(piece.box, origin=box)]
    raise ShardError(f"{piece.key}: no slice of this process contains {piece.box}")


def _check_policy(slices: Sequence[PlannedSlice], groups: Groups) -> None:
    """Whether the groups hold exactly the slices, each whole or cut into disjoint parts."""
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
                problems.append(f"{part.key}: {part.box} lies in no slice that there is to write")
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
    changed = [name for name in ("shape", "dtype", "process") if _differs(owner, part, name)]
    if not inside(part.box, part.shape) and "shape" not in changed:
        changed.append("box")
    return [f"{part.key}: changed its {name}" for name in changed]


def _differs(owner: PlannedSlice, part: PlannedSlice, name: str) -> bool:
    return getattr(owner, name) != getattr(part, name)


def write(
    plan: WritePlan,
    directory: str,
    options: CheckpointOptions,
    process: int = 0,
    written: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """Writes the shards into new directories below `directory`; returns those.

    `written` is called with numbers of bytes while the work goes on, on several threads.
    If one shard fails, or the program is interrupted, the others are given up.
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
