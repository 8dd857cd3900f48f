"""Snapshots: the values that no registered saver takes, brought to host memory.

CPU arrays become views. Arrays of other devices become copies, which are all started before the
first of them is waited for. If there are several processes, each takes only the slices that it
writes, as `spread` assigns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.boxes import Box, relative, shape_of, size_of, whole
from ckpt_jax.graph.dtypes import dtype_name
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.options import PlannedSlice
from ckpt_jax.saving.spread import HeldBox, spread
from ckpt_jax.values import host
from ckpt_jax.values.jax_internals import held_shards


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Slices on the host, by (key, box)."""

    slices: tuple[PlannedSlice, ...]
    contents: Mapping[tuple[str, Box], np.ndarray | host.Arriving | bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all slices."""
        return sum([piece.nbytes for piece in self.slices])


@host.transfers_allowed()
def snapshot(
    values: Mapping[str, jax.Array | np.ndarray | bytes],
    *,
    in_background: bool,
    process: int,
    count: int,
) -> Snapshot:
    """Brings the slices of `values` that this process writes to the host.

    Process 0 writes values that lie on no device, and arrays of which each process has its own.

    Args:
      values: by checkpoint key, as `encode` gives them, the same keys on all processes.
      in_background: whether the program goes on while the values are written: numpy arrays are
        copied then, and copies from devices may still be on their way.
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
    found: dict[str, list[tuple[Box, int, np.ndarray | host.Arriving]]] = {}
    on_host = host.to_host([shard for *_, shard in parts], wait=not in_background)
    for (key, box, device, _), data in zip(parts, on_host, strict=True):
        found.setdefault(key, []).append((box, device, data))
    home = jax.local_devices()[0].id
    planned: list[PlannedSlice] = []
    contents: dict[tuple[str, Box], np.ndarray | host.Arriving | bytes] = {}
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
                data = value.copy() if in_background else value
                box, dtype, nbytes = whole(data.shape), dtype_name(data.dtype), data.nbytes
            contents[key, box] = data
            planned.append(PlannedSlice(key, box, shape_of(box), dtype, nbytes, process, home))
    return Snapshot(tuple(planned), contents)


@host.transfers_allowed()
def counts(
    values: Mapping[str, jax.Array | np.ndarray | bytes], count: int
) -> dict[str, np.ndarray]:
    """The signed integers without dimensions that lie on devices, if each of `count` processes has
    a copy: steps and counts.

    Unsigned ones belong to generators of random numbers, which may differ between processes.
    """
    found = {
        key: held_shards(value)[0]
        for key, value in values.items()
        if isinstance(value, jax.Array)
        and value.ndim == 0
        and jnp.issubdtype(value.dtype, jnp.signedinteger)
        and _is_everywhere(value.sharding, count)
    }
    return {key: np.asarray(shard) for key, shard in found.items()}


@lru_cache(maxsize=4096)
def _is_everywhere(sharding: jax.sharding.Sharding, count: int) -> bool:
    """Whether each process has a value of its own, or a copy of one that all of them have."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return sharding.is_fully_addressable
    return len({device.process_index for device in sharding.device_set}) == count


def _assigned(
    values: Mapping[str, jax.Array | np.ndarray | bytes], process: int, count: int
) -> list[tuple[str, Box, int, jax.Array | np.ndarray]]:
    """(key, box, device id, single-device array) for the slices that this process writes."""
    held: list[HeldBox] = []
    sources: list[tuple[str, dict[int, int]]] = []  # of each held box: key, {process: device id}
    unreachable: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, bytes):
            continue
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            held.append(HeldBox(whole(value.shape), value.nbytes, (0,)))
            sources.append((key, {}))
            continue
        processes = {device.process_index for device in value.sharding.device_set}
        if len(processes) == 1 and processes != {0}:
            what = f"lies on devices of process {min(processes)} only, which takes it for its own"
            unreachable.append((path_of(object_key_of(key)), what))
        itemsize = value.dtype.itemsize
        for box, holders in host.held_boxes(value.sharding, value.shape):
            held.append(HeldBox(box, size_of(box) * itemsize, tuple([p for p, _ in holders])))
            sources.append((key, dict(holders)))
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
        key, devices = sources[part.source]
        value = values[key]
        if part.process != process or not isinstance(value, jax.Array):
            continue
        if not devices:
            assigned += [(key, *owned) for owned in host.owned_shards(value)]
            continue
        inner = relative(part.box, origin=held[part.source].box)
        shard = host.part_of(value, devices[process], inner)
        assigned.append((key, part.box, devices[process], shard))
    return assigned
