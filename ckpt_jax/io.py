"""The three primitives that every saver is made of.

`write_shard` writes slices of arrays into one shard. `merge_shards` makes a checkpoint of shards
by reference. `read_slices` reads any box of any array, whatever slices it was written in. They
correspond to TensorFlow's SaveV2, MergeV2Checkpoints and RestoreV2. The default saver uses nothing
else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any, Protocol

import jax
import numpy as np

from ckpt_jax.graph.boxes import Box, whole
from ckpt_jax.graph.dtypes import LossyConversionError, converted
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path
from ckpt_jax.readers import Contents
from ckpt_jax.store import merge as _merge
from ckpt_jax.store import shard as _shard
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.paths import as_path
from ckpt_jax.store.shard import Slice
from ckpt_jax.store.storage import Pinned, storage_of
from ckpt_jax.values import host
from ckpt_jax.values.leaves import encode


@host.transfers_allowed()
def write_shard(
    prefix: Path,
    values: Mapping[str, Any],
    *,
    options: CheckpointOptions = DEFAULT,
    written: Callable[[int], object] = lambda nbytes: None,
) -> str:
    """Writes arrays, or slices of larger arrays, into a new shard.

    Args:
      prefix: directory to create for the shard.
      values: by key, an array (numpy, jax.Array or a scalar), bytes, a `Slice`, or a list of
        slices. For a jax.Array, each distinct addressable shard is written once.
      options: `compression`, `durable` and `max_inflight_bytes` apply.
      written: called while values are written, with the number of bytes since the last call.

    Returns:
      `prefix`, for `merge_shards`.

    Raises:
      FileExistsError: there is something at `prefix`.
      TypeError: a key is no string, or a list contains something other than slices.
      ValueError: an array has a dtype that cannot be stored, or another shape than its box.

    Source: TensorFlow's SaveV2.

    Example:
      >>> import tempfile
      >>> top = Slice(np.zeros((2, 3)), ((0, 2), (0, 3)), (4, 3))
      >>> rest = Slice(np.ones((2, 3)), ((2, 4), (0, 3)), (4, 3))
      >>> with tempfile.TemporaryDirectory() as d:
      ...     shards = [write_shard(f"{d}/{i}", {"w": part}) for i, part in enumerate([top, rest])]
      ...     path = merge_shards(shards, f"{d}/merged")
      ...     read_slices(path, {"w": ((1, 3), (0, 1))})["w"].tolist()
      [[0.0], [1.0]]
    """
    prefix = as_path(prefix, "prefix")
    parts = _on_host({_checked(key): _slices_of(key, value) for key, value in values.items()})
    # Arrays of which this process holds nothing are left out.
    held = {key: value for key, value in parts.items() if not isinstance(value, list) or value}
    _shard.write_shards(
        {prefix: held},
        compression=options.compression,
        durable=options.durable,
        max_inflight_bytes=options.max_inflight_bytes,
        written=written,
    )
    return prefix


def _checked(key: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"checkpoint keys are strings, got {key!r}")
    return key


def _slices_of(key: str, value: Any) -> Any:
    """An array or bytes on the host, or a list of slices, whose arrays may be on devices."""
    if isinstance(value, Slice):
        return [_plain(value)]
    if isinstance(value, list | tuple):
        if not all([isinstance(part, Slice) for part in value]):
            raise TypeError(f"{key}: a list under one key is a list of ckpt.io.Slice")
        return [_plain(part) for part in value]
    value = encode(value)
    if isinstance(value, jax.Array):
        return [Slice(shard, box, value.shape) for box, _, shard in host.owned_shards(value)]
    return value


def _plain(part: Slice) -> Slice:
    """A slice of a numpy or single-device array, its box and shape tuples of Python integers."""
    box, shape = part.box, part.global_shape
    if type(part.array) is np.ndarray and type(box) is type(shape) is tuple:
        bounds = [bound for pair in (shape, *box) if type(pair) is tuple for bound in pair]
        if len(bounds) == 3 * len(shape) and {*map(type, bounds)} <= {int}:
            return part  # the usual case: the default saver writes thousands of such slices
    array = encode(part.array)
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) > 1:
        array = np.asarray(array)
    return Slice(array, _box(part.box), tuple(map(index, part.global_shape)))


def _on_host(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with all arrays on the host. All copies are started together."""
    lists = [value for value in parts.values() if isinstance(value, list)]
    far = [part.array for value in lists for part in value if isinstance(part.array, jax.Array)]
    if not far:
        return dict(parts)
    near = iter(host.to_host(far))

    def moved(part: Slice) -> Slice:
        return replace(part, array=next(near)) if isinstance(part.array, jax.Array) else part

    return {
        key: [*map(moved, value)] if isinstance(value, list) else value
        for key, value in parts.items()
    }


def _box(box: Iterable[Iterable[int]]) -> Box:
    """A box as tuples of Python integers; its pairs may be lists, and its bounds numpy integers."""
    return tuple([(index(start), index(stop)) for start, stop in box])


def merge_shards(
    prefixes: Sequence[Path],
    destination: Path,
    *,
    extra: Mapping[str, bytes] | None = None,
    options: CheckpointOptions = DEFAULT,
) -> str:
    """Makes one checkpoint directory of shards, by reference: no array byte is copied, unless a
    shard lies on another file system.

    Args:
      prefixes: the shards, as `write_shard` returned them. Shards outside of `destination` are
        moved into it. If that fails, all of them stay at their old paths.
      destination: the directory of the checkpoint.
      extra: small values by key that are committed in the same transaction.
      options: `durable` applies.

    Returns:
      `destination`.

    Raises:
      ShardError: two shards have the same slice of an array, shards disagree on an array's dtype
        or shape, or an array has a hole. All such arrays are named.

    Source: TensorFlow's MergeV2Checkpoints.
    """
    if isinstance(prefixes, str | bytes | os.PathLike):
        raise TypeError(f"merge_shards takes a list of shards, got the path {prefixes!r}")
    shards = [as_path(prefix, "prefixes") for prefix in prefixes]
    destination = as_path(destination, "destination")
    return _merge.merge_shards(shards, destination, extra or {}, durable=options.durable)


def read_slices(
    prefix: Path,
    requests: Mapping[str, jax.ShapeDtypeStruct | Box | None],
    *,
    options: CheckpointOptions = DEFAULT,
) -> dict[str, Any]:
    """Reads arrays, or boxes of arrays, from a checkpoint or a single shard.

    Args:
      prefix: what `merge_shards` or `write_shard` returned.
      requests: by key, None for the whole array in numpy (or bytes), a box for that part of it
        in numpy, or a `jax.ShapeDtypeStruct` for a jax.Array of its dtype on its sharding
        (the default device without one). Only what this process's devices need is read.
      options: `max_inflight_bytes` applies.

    Raises:
      KeyError: naming all keys that are not there.
      ValueError: a box or shape does not fit the stored array.
      CorruptCheckpointError: naming file and key.
      CheckpointNotFoundError: there is none, or it was replaced or removed while it was being read.

    Source: TensorFlow's RestoreV2.
    """
    path = as_path(prefix, "prefix")
    storage = storage_of(path)
    pinned = Pinned.of(path, storage.located(path), storage)
    with pinned.unless_replaced(), ShardedReader(pinned.location) as reader:
        return read_values(reader, requests, options)


class Values(Protocol):
    """What values are read from; a part of `readers.Reader`, which documents it."""

    @property
    def path(self) -> str: ...
    @property
    def index(self) -> Contents: ...
    def read_bytes(self, key: str) -> bytes: ...
    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]: ...


@host.transfers_allowed()
def read_values(
    reader: Values,
    requests: Mapping[str, jax.ShapeDtypeStruct | Box | None],
    options: CheckpointOptions = DEFAULT,
    arrived: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, Any]:
    """`read_slices` with an open reader. Arrays are placed while others are still being read.

    `arrived` is called with the number of bytes whenever some have been read.
    """
    results: dict[str, Any] = {}
    keys: list[str] = []
    boxes: list[tuple[Box, ...]] = []
    unplaced: dict[str, np.ndarray] = {}
    if absent := [key for key in requests if key not in reader.index]:
        names = ", ".join(map(repr, absent))
        raise KeyError(f"{reader.path} has no value under the key {names}")
    for key, request in requests.items():
        wanted = _wanted(reader, key, request)
        if wanted is None:
            results[key] = reader.read_bytes(key)
            arrived(len(results[key]))
        else:
            keys.append(key)
            boxes.append(wanted)
    found = reader.read(
        list(zip(keys, boxes, strict=True)),
        max_inflight_bytes=max(options.max_inflight_bytes // 2, 1),  # the rest is for assembly
    )
    for number, contents in found:
        key = keys[number]
        request = requests[key]
        arrived(sum([part.nbytes for part in contents]))
        if not isinstance(request, jax.ShapeDtypeStruct):
            results[key] = contents[0]
            continue
        dtype = np.dtype(request.dtype)
        try:
            contents = tuple([converted(x, dtype) for x in contents])
        except LossyConversionError as error:
            error.key = key
            raise
        if request.sharding is None:
            unplaced[key] = contents[0]
        else:
            results[key] = host.place(request.shape, dtype, request.sharding, contents)
    if unplaced:
        results.update(zip(unplaced, host.put(list(unplaced.values())), strict=True))
    return results


def _wanted(
    reader: Values, key: str, request: jax.ShapeDtypeStruct | Box | None
) -> tuple[Box, ...] | None:
    """The boxes to read for a request; None for a byte string."""
    layout = reader.index.layout_of(key)
    if layout.is_bytes:
        if request is not None:
            raise ValueError(f"{key!r} is a byte string; it has no boxes and no sharding")
        return None
    if request is None:
        return (whole(layout.shape),)
    if not isinstance(request, jax.ShapeDtypeStruct):
        return (_box(request),)
    if tuple(request.shape) != tuple(layout.shape):
        raise ValueError(f"{key!r} has shape {layout.shape}, asked for {tuple(request.shape)}")
    if request.sharding is None:
        return (whole(layout.shape),)
    return host.wanted_boxes(request.sharding, layout.shape)


__all__ = ["Slice", "merge_shards", "read_slices", "write_shard"]
