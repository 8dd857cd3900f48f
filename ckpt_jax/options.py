"""Options: frozen values that say how to save and restore.

A sharding policy decides which slices go into which shard. It takes the slices that a process
is about to write and returns them in groups, one group per shard.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np

from ckpt_jax.graph.boxes import Box, size_of
from ckpt_jax.graph.dtypes import dtype_name, dtype_of, family
from ckpt_jax.graph.patterns import Pattern
from ckpt_jax.store.workers import spare_nbytes

Path = str | bytes | os.PathLike[Any]  # as programs give it


class PlannedSlice(NamedTuple):
    """One slice of one value, about to be written.

    Attributes:
      key: the checkpoint key.
      box: (start, stop) per axis, inside `shape`.
      shape: the shape of the whole array.
      dtype: its canonical name.
      nbytes: the size of the slice.
      process: index of the process that writes it.
      device: id of the device that holds it.
    """

    key: str
    box: Box
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    process: int
    device: int


Groups = Sequence[Sequence[PlannedSlice]]
ShardingPolicy = Callable[[Sequence[PlannedSlice]], Groups]


@dataclass(frozen=True, slots=True)
class ShardByDevice:
    """The slices of each device in shards of their own (the default).

    A device with very many bytes gets several shards, so that as many of them are written at a
    time as the process has cores.
    """

    def __call__(self, slices: Sequence[PlannedSlice]) -> Groups:
        groups: dict[int, list[PlannedSlice]] = {}
        for planned in slices:
            groups.setdefault(planned.device, []).append(planned)
        return list(groups.values())


@dataclass(frozen=True, slots=True)
class ShardByProcess:
    """One shard for each process.

    Source: `tf.train.experimental.ShardByTaskPolicy`.
    """

    def __call__(self, slices: Sequence[PlannedSlice]) -> Groups:
        return [slices] if slices else []


@dataclass(frozen=True, slots=True)
class MaxShardSize:
    """Shards of at most `nbytes`. Only a single element that is larger exceeds the limit.

    A slice that does not fit into the rest of a shard is cut along the axis that needs the fewest
    parts. If not even one row fits, the slice starts a new shard. If one element is larger than
    the limit, that element is a shard of its own.

    Source: `tf.train.experimental.MaxShardSizePolicy`.

    Attributes:
      nbytes: the limit, in bytes; at least 1.
    """

    nbytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.nbytes, Integral):
            raise TypeError(f"MaxShardSize needs a number of bytes, got {self.nbytes!r}")
        if self.nbytes < 1:
            raise ValueError(f"MaxShardSize needs at least 1 byte, got {self.nbytes}")

    def __call__(self, slices: Sequence[PlannedSlice]) -> Groups:
        groups: list[list[PlannedSlice]] = []
        room = 0  # bytes that are left in the last group
        for planned in slices:
            todo = [planned]
            while todo:
                part = todo.pop()
                if groups and part.nbytes <= room:
                    groups[-1].append(part)
                    room -= part.nbytes
                    continue
                split = _split_to_fit(part, room)
                if split is None and part.nbytes > self.nbytes:
                    split = self._split_for_empty_shard(part)
                if split is None:
                    groups.append([part])
                    room = self.nbytes - part.nbytes
                else:
                    first, rest = split
                    todo += [rest, first]
                    if room < first.nbytes <= self.nbytes:
                        groups.append([])
                        room = self.nbytes
        return groups

    def _split_for_empty_shard(
        self, planned: PlannedSlice
    ) -> tuple[PlannedSlice, PlannedSlice] | None:
        """A first part for an empty shard, or one row to split further; None for one element."""
        if split := _split_to_fit(planned, self.nbytes):
            return split
        if size_of(planned.box) <= 1:
            return None
        lengths = [stop - start for start, stop in planned.box]
        axis = lengths.index(max(lengths))
        return _split_at(planned, axis, planned.box[axis][0] + 1)


def _split_to_fit(planned: PlannedSlice, room: int) -> tuple[PlannedSlice, PlannedSlice] | None:
    """Splits a slice along the axis that needs the fewest parts of at most `room` bytes.

    Returns:
      The first part and the rest, or None if no row fits.
    """
    best: tuple[int, int, int] | None = None
    for axis, (start, stop) in enumerate(planned.box):
        length = stop - start
        fitting = room * length // planned.nbytes if planned.nbytes else 0
        if 0 < fitting < length:
            parts = -(-length // fitting)
            candidate = (parts, axis, -(-length // parts))
            best = min(best, candidate) if best else candidate
    if best is None:
        return None
    _, axis, length = best
    return _split_at(planned, axis, planned.box[axis][0] + length)


def _split_at(planned: PlannedSlice, axis: int, middle: int) -> tuple[PlannedSlice, PlannedSlice]:
    start, stop = planned.box[axis]
    return part_along(planned, axis, start, middle), part_along(planned, axis, middle, stop)


def part_along(planned: PlannedSlice, axis: int, start: int, stop: int) -> PlannedSlice:
    """The part of a slice that covers `start` to `stop` of one axis, and all of the others."""
    box = (*planned.box[:axis], (start, stop), *planned.box[axis + 1 :])
    nbytes = planned.nbytes // size_of(planned.box) * size_of(box)
    return planned._replace(box=box, nbytes=nbytes)


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How to save and restore. Every field has a default that is safe.

    Checksums are no option: whatever is read is verified.

    Attributes:
      For saves:
        enable_async: let a `Checkpoint` write in the background. When `save` returns, nothing
          that the program does can change what is written. An error is raised by the next `save`
          or by `sync`, or it is logged at exit.
        when_busy: what a save does if another save of the same `Checkpoint` is in flight, in the
          background or on another thread. "wait" waits for it; "skip" returns None at once and
          counts nothing. In both cases an error of a save in the background is raised. If there
          are several processes, process 0 decides for all of them whether a save is skipped.
        sharding_policy: decides which slices go into which shard.
        write_callbacks: functions that are called after the commit, with no argument or with the
          path. If there are several processes, the functions must not save.
        compression: None, or "zstd".
        cast_on_save: (pattern, dtype) pairs: arrays of floats that are stored with another dtype,
            such as `(("params/**", jnp.bfloat16),)`. For each array the first pattern that matches
            its path counts; other values are stored as they are. A value that does not fit is an
            error. The checkpoint says what the dtypes were. To restore into arrays of these dtypes,
            pass `cast=True`.
        durable: fsync files and directories before a save is reported as done.
      For restores:
        cast: allow a restore to change a value's dtype; otherwise another dtype is a mismatch.
        skip_slot_variables: leave out the optimizers' slots, in a restore and in its assertions.
        shardings: where a restore places JAX arrays, whatever the target says. Either one
          `jax.sharding.Sharding`; or a function of (path, `jax.ShapeDtypeStruct`) that returns a
          sharding or None; or a tree of shardings, in which a sharding applies to everything
          below its place. None leaves the placement to the target.
        broadcast: if several processes need the same slices of a large array, each process reads
          a part of them, and the devices pass the parts on. All processes have to restore the
          same values at the same time. If the mesh does not divide an array evenly, each process
          reads all that it needs.
      For both:
        max_inflight_bytes: host memory that a save or restore may use in addition to the arrays.
          By default 32 MiB for each core, at least 64 MiB, and at most an eighth of what is free.
        timeout_seconds: if there are several processes, how long one of them waits for the others,
          in all waits of a save or a restore together. This has to cover how much longer than this
          process the slowest one writes, and process 0's commit. A process that has died or is
          stopped is noticed earlier, after 15 seconds. `timeout_seconds` also bounds how long the
          program's exit waits for a save in the background.
        progress: a function `(done_bytes, total_bytes)` that is called while values are written
          or read, by one thread at a time, from 0 up to the total; or True for a bar on stderr,
          if that is a terminal, or a line in a notebook. If the function raises, this is logged
          once, and the function is not called again.

    Source: `tf.train.CheckpointOptions`.

    Example:
      >>> CheckpointOptions(cast=True).cast
      True
    """

    # For saves.
    enable_async: bool = False
    when_busy: Literal["wait", "skip"] = "wait"
    sharding_policy: ShardingPolicy = ShardByDevice()
    write_callbacks: tuple[Callable[..., Any], ...] = ()
    compression: Literal["zstd"] | None = None
    cast_on_save: Sequence[tuple[Pattern, Any]] = ()
    durable: bool = True

    # For restores.
    cast: bool = False
    skip_slot_variables: bool = False
    shardings: Any = None
    broadcast: bool = False

    # For both.
    max_inflight_bytes: int = field(default_factory=spare_nbytes)
    timeout_seconds: float = 600
    progress: bool | Callable[[int, int], object] | None = None

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if not callable(self.sharding_policy):
            raise ValueError(f"sharding_policy must be callable, got {self.sharding_policy!r}")
        if self.compression not in (None, "zstd"):
            raise ValueError(f"compression must be None or 'zstd', got {self.compression!r}")
        if not isinstance(self.max_inflight_bytes, Integral):
            raise TypeError(f"max_inflight_bytes must be an int, got {self.max_inflight_bytes!r}")
        if self.max_inflight_bytes < 1:
            raise ValueError("max_inflight_bytes must be positive")
        if not isinstance(self.timeout_seconds, Real) or not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds!r}")
        if self.when_busy not in ("wait", "skip"):
            raise ValueError(f"when_busy must be 'wait' or 'skip', got {self.when_busy!r}")
        if not (
            self.progress is None or isinstance(self.progress, bool) or callable(self.progress)
        ):
            raise ValueError(f"progress must be None, True or a function, got {self.progress!r}")
        callbacks = self.write_callbacks
        if not isinstance(callbacks, Iterable) or not all(map(callable, found := [*callbacks])):
            raise TypeError(f"write_callbacks must be a sequence of functions, got {callbacks!r}")
        for callback in found:
            takes_path(callback)  # or it would fail after the commit
        object.__setattr__(self, "write_callbacks", tuple(found))
        object.__setattr__(self, "cast_on_save", _casts(self.cast_on_save))


def takes_path(callback: Callable[..., Any]) -> bool:
    """Whether a write callback is called with the path, or without an argument.

    Raises:
      TypeError: it can be called in neither way.
    """
    try:
        signature = inspect.signature(callback)
    except ValueError:  # of code in C that does not tell
        return True
    for arguments in (("path",), ()):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return bool(arguments)
    raise TypeError(
        f"write_callbacks: expected functions of no argument or of one, the path, got {callback!r} "
        f"with the arguments {signature}"
    )


def _casts(given: Any) -> tuple[tuple[Pattern, np.dtype], ...]:
    """The casts of a save, with numpy's dtypes."""
    what = 'cast_on_save: expected (pattern, dtype) pairs, as (("params/**", jnp.bfloat16),)'
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{what}, got {given!r}")
    found: list[tuple[Pattern, np.dtype]] = []
    for each in given:
        if not isinstance(each, Sequence) or len(each) != 2 or isinstance(each, str):
            raise TypeError(f"{what}, got {each!r} among them")
        pattern, kind = each
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"{what}, got the pattern {pattern!r}")
        if not _is_float(kind):
            raise ValueError(
                f"cast_on_save: expected a dtype of floats for {pattern!r}, got {kind!r}"
            )
        found.append((pattern, np.dtype(kind)))
    return tuple(found)


def _is_float(kind: Any) -> bool:
    try:
        return family(dtype_of(dtype_name(np.dtype(kind)))) == "float"
    except (TypeError, ValueError):
        return False


_SWITCHES = ("enable_async", "durable", "cast", "skip_slot_variables", "broadcast")
DEFAULT = CheckpointOptions()


def given(options: CheckpointOptions | None) -> CheckpointOptions:
    """The options that a caller gave, or the defaults.

    Raises:
      TypeError: the caller gave something else.
    """
    if options is None:
        return DEFAULT
    if not isinstance(options, CheckpointOptions):
        raise TypeError(f"options must be ckpt.CheckpointOptions, got {options!r}")
    return options
