"""Transfers between devices and host memory: which slices a process holds, and where they go.

A save takes a jax.Array apart along its own sharding: each distinct box once, from the first
device that holds it. So nothing is gathered, and replicas are not written twice. A restore puts it
together along the sharding that the target asks for. Everything that depends only on the sharding
and the shape is worked out once for all arrays that share them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from ckpt_jax.graph.boxes import Box, Shape, from_index, size_of, slices
from ckpt_jax.graph.dtypes import LossyConversionError, converted
from ckpt_jax.values.jax_internals import held_shards, place_shards

_log = logging.getLogger("ckpt_jax")


@lru_cache(maxsize=4096)
def owned_boxes(sharding: jax.sharding.Sharding, shape: Shape) -> tuple[tuple[int, Box, int], ...]:
    """The slices of an array that this process writes.

    A box that several devices hold belongs to the first of them, in the sharding's order.

    Returns:
      (number of the addressable shard, box, device id) of each slice.
    """
    owner: dict[Box, int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        owner.setdefault(from_index(index, shape), device.id)
    addressable = sharding.addressable_devices_indices_map(shape)
    found = []
    for number, (device, index) in enumerate(addressable.items()):
        box = from_index(index or (), shape)
        if owner[box] == device.id:
            found.append((number, box, device.id))
    return tuple(found)


@lru_cache(maxsize=4096)
def held_boxes(
    sharding: jax.sharding.Sharding, shape: Shape
) -> tuple[tuple[Box, tuple[tuple[int, int], ...]], ...]:
    """The distinct boxes of an array over all processes, and the processes that hold each.

    Returns:
      (box, ((process, device id), ...)), with the first device of each process that holds the box.
      The result is the same on all processes.
    """
    holders: dict[Box, dict[int, int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        holders.setdefault(from_index(index, shape), {}).setdefault(device.process_index, device.id)
    return tuple((box, tuple(sorted(found.items()))) for box, found in holders.items())


@lru_cache(maxsize=4096)
def _shard_numbers(sharding: jax.sharding.Sharding, shape: Shape) -> dict[int, int]:
    """The number of the addressable shard on each device of this process, by device id."""
    devices = sharding.addressable_devices_indices_map(shape)
    return {device.id: number for number, device in enumerate(devices)}


def shard_on(array: jax.Array, device: int) -> jax.Array:
    """The shard on the device of this process with this id."""
    return held_shards(array)[_shard_numbers(array.sharding, array.shape)[device]]


@lru_cache(maxsize=4096)
def wanted_boxes(sharding: jax.sharding.Sharding, shape: Shape) -> tuple[Box, ...]:
    """The distinct boxes that this process's devices need of an array."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return tuple(dict.fromkeys(from_index(index or (), shape) for index in indices))


@lru_cache(maxsize=4096)
def wanted_size(sharding: jax.sharding.Sharding, shape: Shape) -> int:
    """The number of elements in `wanted_boxes`."""
    return sum(map(size_of, wanted_boxes(sharding, shape)))


def owned_shards(array: jax.Array) -> list[tuple[Box, int, jax.Array]]:
    """(box, device id, single-device array) of each slice that this process writes."""
    shards = held_shards(array)
    owned = owned_boxes(array.sharding, array.shape)
    return [(box, device, shards[number]) for number, box, device in owned]


class Arriving:
    """A copy of a single-device array, or a part of one, that is on its way to pinned host memory.

    The runtime orders everything that the program does to the array behind the copy. So the array
    may be donated or deleted before the copy arrives. Parts are cut on the host: on a device, that
    would compile a program for each shape.
    """

    def __init__(self, started: jax.Array, where: tuple[slice, ...] = ()):
        self._started, self._where = started, where
        self.dtype = started.dtype
        cut = tuple([part.stop - part.start for part in where])
        self.shape: Shape = (*cut, *started.shape[len(cut) :])
        self.nbytes = math.prod(self.shape) * started.dtype.itemsize

    def __getitem__(self, where: tuple[slice, ...]) -> Arriving:
        origin = self._where or tuple([slice(0, size) for size in self.shape])
        inside = [
            slice(a.start + b.start, a.start + b.stop) for a, b in zip(origin, where, strict=True)
        ]
        return Arriving(self._started, tuple(inside))

    def wait(self) -> np.ndarray:
        """The contents; on any thread."""
        with transfers_allowed(), jax.enable_x64(True):
            whole_array = np.asarray(self._started)
            return whole_array[self._where] if self._where else whole_array


@dataclass(frozen=True, slots=True)
class Cast:
    """How an array is stored with another dtype.

    Attributes:
      path: of the array, for errors.
      dtype: to convert it to.
    """

    path: str
    dtype: np.dtype

    def of(self, data: np.ndarray) -> np.ndarray:
        """The converted contents.

        Raises:
          LossyConversionError: a value does not fit into the dtype.
        """
        try:
            return converted(data, self.dtype)
        except LossyConversionError as error:
            raise LossyConversionError(
                f"{self.path}: {error} (CheckpointOptions.cast_on_save). Nothing was saved. Cast "
                "it to a dtype with a larger range, or leave it out."
            ) from None


class Converting:
    """A slice that is converted to another dtype when it is written."""

    def __init__(self, source: np.ndarray | Arriving, cast: Cast):
        self._source, self._cast = source, cast
        self.dtype, self.shape = cast.dtype, source.shape
        self.nbytes = math.prod(self.shape) * cast.dtype.itemsize

    def __getitem__(self, where: tuple[slice, ...]) -> Converting:
        return Converting(self._source[where], self._cast)

    def wait(self) -> np.ndarray:
        """The converted contents; on any thread."""
        source = self._source
        return self._cast.of(source if isinstance(source, np.ndarray) else source.wait())


def to_host(
    shards: Sequence[jax.Array | np.ndarray], *, wait: bool = True
) -> list[np.ndarray | Arriving]:
    """The contents of single-device arrays: views if they lie on the host, otherwise copies.

    Views stay valid even if the array is donated or deleted: JAX does not reuse memory while a
    view of it exists.

    Args:
      wait: if not, large copies may still be on their way (`Arriving`).
    """
    far = {
        number: shard
        for number, shard in enumerate(shards)
        if isinstance(shard, jax.Array) and not _on_host(shard.sharding)
    }
    arrays = copies(list(far.values()), wait=wait) if far else ()
    copied = dict(zip(far, arrays, strict=True))
    return [copied[n] if n in copied else np.asarray(shard) for n, shard in enumerate(shards)]


@lru_cache(maxsize=4096)
def _on_host(sharding: jax.sharding.Sharding) -> bool:
    device = next(iter(sharding.device_set))
    return device.platform == "cpu" or sharding.memory_kind in ("pinned_host", "unpinned_host")


_PINNED_FROM = 1 << 16  # bytes; the driver stages smaller copies itself
_PINNED_AT_MOST = 32 << 30  # bytes; XLA provides 64 GiB, and programs keep values there as well


def copies(shards: Sequence[jax.Array], *, wait: bool = True) -> list[np.ndarray | Arriving]:
    """Copies single-device arrays to host memory; starts all copies before waiting for the first.

    The copies go straight to pinned memory if the platform has it. Through ordinary memory the
    driver would copy twice, at a fraction of the bus's speed. The arrays themselves keep no copy,
    unlike after `np.asarray`.

    Args:
      wait: if not, copies to pinned memory are only started.
    """
    chosen = _for_pinned(shards)
    others = [number for number in range(len(shards)) if number not in chosen]
    found: dict[int, np.ndarray | Arriving] = {}
    # Without 64-bit types enabled, JAX would copy 64-bit values as 32-bit ones.
    with jax.enable_x64(True):
        if not wait:  # these first, because copies arrive in the order in which they were started
            found = _copied(shards, others)
            others = []
        pinned = _to_pinned(shards, chosen)
        others += [number for number in chosen if number not in pinned]
        found |= _copied(shards, others)
        for number, started in pinned.items():
            found[number] = _arrived(started, shards[number]) if wait else Arriving(started)
    return [found[number] for number in range(len(shards))]


def _copied(
    shards: Sequence[jax.Array], numbers: Sequence[int]
) -> dict[int, np.ndarray | Arriving]:
    """Copies of some shards in ordinary memory, by their numbers."""
    started = {number: _start_copy(shards[number]) for number in numbers}
    return {number: np.asarray(copy) for number, copy in started.items()}


def _for_pinned(shards: Sequence[jax.Array]) -> dict[int, jax.sharding.Sharding]:
    """The shards that go to pinned host memory, by number, and where to.

    Shards that are too small, or for which there is no room, are left out.
    """
    room, chosen = _PINNED_AT_MOST, {}
    for number, shard in enumerate(shards):
        pinned = _pinned(shard.sharding)
        whole_bytes = jax.dtypes.itemsize_bits(shard.dtype) % 8 == 0
        if pinned is not None and whole_bytes and _PINNED_FROM <= shard.nbytes <= room:
            room -= shard.nbytes
            chosen[number] = pinned
    return chosen


def _to_pinned(
    shards: Sequence[jax.Array], chosen: Mapping[int, jax.sharding.Sharding]
) -> dict[int, jax.Array]:
    """Starts copies to pinned host memory; none if that is not possible."""
    try:
        arrays = jax.device_put([shards[number] for number in chosen], list(chosen.values()))
    except jax.errors.JaxRuntimeError as error:
        _log.warning("copying through ordinary host memory: %s", error)
        return {}
    return dict(zip(chosen, arrays, strict=True))


@lru_cache(maxsize=4096)
def _pinned(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """The same place in pinned host memory; None if the platform has none."""
    (device,) = sharding.device_set
    kinds = {memory.kind for memory in device.addressable_memories()}
    return sharding.with_memory_kind("pinned_host") if "pinned_host" in kinds else None


def _start_copy(shard: jax.Array) -> jax.Array:
    # Uses another array on the same buffer, because an array keeps the copy that is made of it.
    other = jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])
    other.copy_to_host_async()
    return other


def _arrived(started: jax.Array, shard: jax.Array) -> np.ndarray:
    try:
        return np.asarray(started)
    except jax.errors.JaxRuntimeError as error:
        if started.sharding == shard.sharding:
            raise
        _log.warning("copying through ordinary host memory: %s", error)
        return np.asarray(_start_copy(shard))


def place(
    shape: Shape,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    contents: Sequence[np.ndarray],
) -> jax.Array:
    """The array on `sharding` whose `wanted_boxes` have these contents.

    On CPU, contents at addresses that are multiples of 64 become the array's memory without a copy.
    """
    # Without 64-bit types enabled, JAX would place 32-bit shards in an array that says 64.
    wide = jax.enable_x64(True) if dtype.itemsize >= 8 else contextlib.nullcontext()
    with wide:
        return _place(shape, dtype, sharding, contents)


def _place(
    shape: Shape,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    contents: Sequence[np.ndarray],
) -> jax.Array:
    devices, numbers = _device_boxes(sharding, shape)
    if place_shards is None or not devices:  # an array can lie on other processes' devices only
        parts = jax.device_put([contents[n] for n in numbers], list(devices))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)
    aval = _aval(shape, dtype)
    return place_shards(aval, sharding, [contents[n] for n in numbers], list(devices))


def put(
    arrays: Sequence[np.ndarray], sharding: jax.sharding.Sharding | None = None
) -> list[jax.Array]:
    """Arrays of exactly these dtypes, on `sharding` or on the default device."""
    if sharding is not None and not sharding.is_fully_addressable:
        # `device_put` would make the devices of all processes compare the arrays.
        return [
            place(
                x.shape, x.dtype, sharding, [x[slices(b)] for b in wanted_boxes(sharding, x.shape)]
            )
            for x in arrays
        ]
    with jax.enable_x64(True):  # without it 64-bit values would quietly lose half their bits
        return jax.device_put(list(arrays), sharding)


def weakly_typed(array: jax.Array) -> jax.Array:
    """A rank-0 array with a weak type, as if made from a Python number; other arrays unchanged.

    (JAX has no public way to weaken the type of a larger array.)
    """
    if array.ndim or not array.is_fully_addressable:
        return array
    weak = jnp.asarray(array.item())
    return jax.device_put(weak, array.sharding) if weak.dtype == array.dtype else array


def in_formats(arrays: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
    """Restored values in the memory layouts (`Format`) that their targets have or ask for."""
    wanted = {
        number: format
        for number, (array, target) in enumerate(zip(arrays, targets, strict=True))
        if isinstance(array, jax.Array)
        and (format := _format_of(target)) is not None
        and _layout(array) != format.layout
    }
    if not wanted:
        return list(arrays)
    with jax.enable_x64(True):
        moved = jax.device_put([arrays[number] for number in wanted], list(wanted.values()))
    changed = dict(zip(wanted, moved, strict=True))
    return [changed.get(number, array) for number, array in enumerate(arrays)]


def _layout(array: Any) -> Any:
    return array.format.layout


def _format_of(target: Any) -> Any | None:
    """The layout and sharding of a target, unless it leaves the layout to JAX."""
    if isinstance(target, jax.Array):
        # With one axis there is one layout. One that is not committed lies as JAX chose.
        if target.ndim < 2 or not target.committed or target.is_deleted():
            return None
    elif not isinstance(target, jax.ShapeDtypeStruct):
        return None
    if jnp.issubdtype(target.dtype, jax.dtypes.extended):
        return None
    format: Any = getattr(target, "format", None)
    layout: Any = None if format is None else format.layout
    if layout is None or (not layout.tiling and [*layout.major_to_minor] == [*range(target.ndim)]):
        return None
    return format


@lru_cache(maxsize=4096)
def _device_boxes(
    sharding: jax.sharding.Sharding, shape: Shape
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """This process's devices in the sharding's order, and the number of the box each needs."""
    number = {box: i for i, box in enumerate(wanted_boxes(sharding, shape))}
    indices = sharding.addressable_devices_indices_map(shape)
    numbers = [number[from_index(index or (), shape)] for index in indices.values()]
    return tuple(indices), tuple(numbers)


@lru_cache(maxsize=4096)
def _aval(shape: Shape, dtype: np.dtype) -> Any:
    return ShapedArray(shape, dtype)


@contextlib.contextmanager
def transfers_allowed() -> Iterator[None]:
    """Allows transfers in the block, whatever `jax.transfer_guard` says: the program asks for them.

    If a function is being traced, the block is executed all the same: a restored value must not
    be a tracer.
    """
    with jax.transfer_guard("allow"), jax.ensure_compile_time_eval():
        yield


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Switches the cyclic garbage collector off while very many objects are made that all stay.

    It would visit all of them again and again, although there are no cycles among them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def placement(value: Any) -> jax.sharding.Sharding | None:
    """The sharding that a target asks for; None if it leaves that to JAX."""
    if isinstance(value, jax.Array):
        return value.sharding if value.committed else None
    sharding = value.sharding if isinstance(value, jax.ShapeDtypeStruct) else None
    return None if sharding is None else on_devices(sharding)


def on_devices(sharding: Any) -> Any:
    """A sharding that lies on an abstract mesh, or a bare spec, on the mesh of `jax.set_mesh`.

    It stays what it is if no mesh is set, or one with other axes.
    """
    if isinstance(sharding, jax.sharding.PartitionSpec):
        mesh = jax.sharding.get_mesh()
        return sharding if mesh.empty else jax.sharding.NamedSharding(mesh, sharding)
    if not _is_abstract(sharding):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or dict(mesh.shape) != dict(sharding.mesh.shape):
        return sharding
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _is_abstract(sharding: Any) -> bool:
    return isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    )


def placement_problem(shape: Shape, sharding: jax.sharding.Sharding | None) -> str | None:
    """Why an array of `shape` cannot lie on `sharding`; None if it can."""
    if sharding is None:
        return None
    if _is_abstract(sharding):
        return _no_devices(sharding)
    return _placement_problem(tuple(shape), sharding)


def _no_devices(sharding: Any) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
    mesh = jax.sharding.get_mesh()
    found = "no mesh is set" if mesh.empty else f"the mesh that is set is {dict(mesh.shape)}"
    return (
        f"expected devices, got the spec {sharding.spec} on an abstract mesh ({axes}), and "
        f"{found}: restore under jax.set_mesh(mesh), or pass options=CheckpointOptions("
        "shardings=...)"
    )


@lru_cache(maxsize=4096)
def _placement_problem(shape: Shape, sharding: jax.sharding.Sharding) -> str | None:
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) > len(shape):
        axes = len(sharding.spec)
        return f"shape {shape} cannot be placed on {sharding}, whose spec is for {axes} axes"
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return f"shape {shape} cannot be placed on {sharding}: {error}".splitlines()[0]
    return None
