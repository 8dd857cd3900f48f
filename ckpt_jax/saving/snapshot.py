"""Snapshots: the values that no registered saver takes, brought to host memory.

CPU arrays become views. Arrays of other devices become copies, which are all started before the
first of them is waited for. If there are several processes, each takes only the slices that it
writes, as `spread` assigns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.boxes import Box, shape_of, slices, whole
from ckpt_jax.graph.dtypes import dtype_name
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.options import PlannedSlice
from ckpt_jax.saving.spread import Holding, own_slices
from ckpt_jax.values import host
from ckpt_jax.values.jax_internals import held_shards

Contents = np.ndarray | host.Arriving | host.Converting | bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Slices on the host.

    Attributes:
      slices: the slices.
      contents: by (key, box).
      shared: (key, box) of slices that other processes hold as well, who write others of them.
    """

    slices: tuple[PlannedSlice, ...]
    contents: Mapping[tuple[str, Box], Contents]
    shared: frozenset[tuple[str, Box]] = frozenset()

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
    casts: Mapping[str, host.Cast] = MappingProxyType({}),
) -> Snapshot:
    """Brings the slices of `values` that this process writes to the host.

    Process 0 writes values that lie on no device, and arrays of which each process has its own.

    Args:
      values: by checkpoint key, as `encode` gives them, the same keys on all processes.
      in_background: whether the program goes on while the values are written: numpy arrays are
        copied then, and copies from devices may still be on their way.
      process: index of this process.
      count: number of processes.
      casts: by key, for arrays that are stored with another dtype.

    Raises:
      UnsaveableError: arrays that only a process other than 0 can reach.
    """
    if count == 1:
        parts = [
            _Part(key, box, device, shard)
            for key, value in values.items()
            if isinstance(value, jax.Array)
            for box, device, shard in host.owned_shards(value)
        ]
    else:
        parts = _assigned(values, process, count)
    found: dict[str, list[tuple[_Part, np.ndarray | host.Arriving]]] = {}
    on_host = host.to_host([part.shard for part in parts], wait=not in_background)
    for part, data in zip(parts, on_host, strict=True):
        found.setdefault(part.key, []).append((part, data[part.where] if part.where else data))
    home = jax.local_devices()[0].id
    planned: list[PlannedSlice] = []
    contents: dict[tuple[str, Box], Contents] = {}
    for key, value in values.items():
        if isinstance(value, jax.Array):
            cast = casts.get(key)
            dtype = dtype_name(value.dtype if cast is None else cast.dtype)
            for part, data in found.get(key, ()):
                if cast is not None:
                    data = host.Converting(data, cast)
                contents[key, part.box] = data
                place = (process, part.device)
                planned.append(PlannedSlice(key, part.box, value.shape, dtype, data.nbytes, *place))
        elif process == 0:
            if isinstance(value, bytes):
                data, box, dtype, nbytes = value, (), "bytes", len(value)
            else:
                data = value.copy() if in_background and key not in casts else value
                if key in casts:
                    data = casts[key].of(data)  # another array, whatever the program does
                box, dtype, nbytes = whole(data.shape), dtype_name(data.dtype), data.nbytes
            contents[key, box] = data
            planned.append(PlannedSlice(key, box, shape_of(box), dtype, nbytes, process, home))
    shared = frozenset([(part.key, part.box) for part in parts if part.is_shared])
    return Snapshot(tuple(planned), contents, shared)


@dataclass(frozen=True, slots=True)
class _Part:
    """A slice that this process writes.

    Attributes:
      key: of the array.
      box: the slice.
      device: id of the device that holds it.
      shard: the single-device array in which it lies.
      where: the place of the slice in the shard; None if it is all of the shard.
      is_shared: whether other processes hold it as well.
    """

    key: str
    box: Box
    device: int
    shard: jax.Array
    where: tuple[slice, ...] | None = None
    is_shared: bool = False


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
) -> list[_Part]:
    """The slices that this process writes."""
    load = [0] * count
    arrays: list[tuple[str, jax.Array]] = []
    held: list[tuple[Holding, int]] = []
    assigned: list[_Part] = []
    unreachable: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, bytes):
            continue
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            load[0] += value.nbytes
            if process == 0 and isinstance(value, jax.Array):
                assigned += [_Part(key, *owned) for owned in host.owned_shards(value)]
            continue
        holding = _holding(value.sharding, value.shape, process, count)
        if len(holding.processes) == 1 and 0 not in holding.processes:
            only = min(holding.processes)
            what = f"lies on devices of process {only} only, which takes it for its own"
            unreachable.append((path_of(object_key_of(key)), what))
        arrays.append((key, value))
        held.append((holding, value.dtype.itemsize))
    if unreachable:
        lines = "\n".join(f"  {path}: {what}" for path, what in unreachable)
        raise UnsaveableError(
            f"{len(unreachable)} arrays cannot be saved; nothing was written:\n{lines}\n"
            "Lay them over a mesh with devices of several processes, or of process 0, or save "
            "them with ckpt.PerProcess.",
            tuple(unreachable),
        )
    for own in own_slices(held, process, load):
        key, value = arrays[own.source]
        where = None if own.box == own.origin else slices(own.box, origin=own.origin)
        shard = host.shard_on(value, own.device)
        assigned.append(_Part(key, own.box, own.device, shard, where, own.is_shared))
    return assigned


@lru_cache(maxsize=1024)
def _holding(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], process: int, count: int
) -> Holding:
    return Holding.of(host.held_boxes(sharding, shape), process, count)
