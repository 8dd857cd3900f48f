"""Options: frozen values that say how to save and restore.

A sharding policy decides which slices go into which shard: it takes the slices that a process
is about to write and returns them in groups, one group per shard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

Path = str | bytes | os.PathLike[Any]  # as programs give it
MIB = 1 << 20

Box = tuple[tuple[int, int], ...]


class PlannedSlice(NamedTuple):
    """One slice of one value, about to be written.

    Attributes:
      key: the checkpoint key.
      box: (start, stop) per axis, inside `shape`.
      shape: of the whole array.
      dtype: canonical name.
      nbytes: of the slice.
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
    """One shard for each device that holds values (the default)."""

    def __call__(self, slices: Sequence[PlannedSlice]) -> Groups:
        groups: dict[int, list[PlannedSlice]] = {}
        for piece in slices:
            groups.setdefault(piece.device, []).append(piece)
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
    """Shards of at most `nbytes`, as far as single elements allow.

    A slice that does not fit into what is left of a shard is cut along the axis that needs the
    fewest parts; where not even one row fits, it starts a new shard; where one element is
    larger than the limit, that element is a shard of its own.

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
        room = 0
        for piece in slices:
            todo = [piece]
            while todo:
                part = todo.pop()
                if groups and part.nbytes <= room:
                    groups[-1].append(part)
                    room -= part.nbytes
                    continue
                cut = _cut(part, room) or (None if part.nbytes <= self.nbytes else self._cut(part))
                if cut is None:
                    groups.append([part])
                    room = self.nbytes - part.nbytes
                else:
                    todo += [cut[1], cut[0]]
                    if room < cut[0].nbytes <= self.nbytes:
                        groups.append([])
                        room = self.nbytes
        return groups

    def _cut(self, piece: PlannedSlice) -> tuple[PlannedSlice, PlannedSlice] | None:
        """A first part for an empty shard, or one row to cut further; None for one element."""
        if cut := _cut(piece, self.nbytes):
            return cut
        if _size(piece.box) <= 1:
            return None
        lengths = [stop - start for start, stop in piece.box]
        axis = lengths.index(max(lengths))
        start = piece.box[axis][0]
        stop = start + lengths[axis]
        return _part(piece, axis, start, start + 1), _part(piece, axis, start + 1, stop)


def _size(box: Box) -> int:
    return math.prod([stop - start for start, stop in box])


def _cut(piece: PlannedSlice, room: int) -> tuple[PlannedSlice, PlannedSlice] | None:
    """`piece` in two, the first at most `room` bytes, along the axis with the fewest parts."""
    best: tuple[int, int, int] | None = None
    for axis, (start, stop) in enumerate(piece.box):
        length = stop - start
        fitting = room * length // piece.nbytes if piece.nbytes else 0
        if 0 < fitting < length:
            parts = -(-length // fitting)
            candidate = (parts, axis, -(-length // parts))
            best = min(best, candidate) if best else candidate
    if best is None:
        return None
    _, axis, length = best
    start, stop = piece.box[axis]
    return (
        _part(piece, axis, start, start + length),
        _part(piece, axis, start + length, stop),
    )


def _part(piece: PlannedSlice, axis: int, start: int, stop: int) -> PlannedSlice:
    box = (*piece.box[:axis], (start, stop), *piece.box[axis + 1 :])
    return piece._replace(box=box, nbytes=piece.nbytes // _size(piece.box) * _size(box))


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How to save and restore. Every field has a default that is safe.

    Attributes:
      enable_async: let a `Checkpoint` write in the background. When `save` returns, nothing
        that the program does can change what is written; errors come with the next `save`,
        with `sync`, or are logged at exit.
      sharding_policy: which slices go into which shard.
      write_callbacks: functions of no argument, or of the path, called after the commit. Where
        there are several processes, they must not save.
      skip_slot_variables: leave optimizer slots out of a restore and its assertions.
      cast: allow a restore to change a value's dtype; otherwise a difference is a mismatch.
      compression: None, or "zstd".
      durable: fsync files and directories before a save is reported as done.
      verify: check every checksum that is read. It costs next to nothing here, so that False
        saves nothing: TensorStore checks what it decodes in any case.
      max_inflight_bytes: host memory that a save or restore may use beyond the arrays' own.
      timeout_seconds: the longest wait for another process, where there are several: give it
        the time that the slowest takes to write, and process 0 to commit. And the longest wait
        of an exit of the program for a save in the background.
      shardings: where a restore places JAX arrays, whatever the target says: one
        `jax.sharding.Sharding`, a function of (path, `jax.ShapeDtypeStruct`) that gives one or
        None, or a tree of shardings. A sharding in a tree stands for everything below its place,
        None for what the target says.
      when_busy: what a save does while another one of the same `Checkpoint` is in flight, in
        the background or on another thread: "wait" for it, or "skip": return None at once and
        count nothing. What failed in the background is raised in both cases. Of several
        processes, process 0 says for all whether a save is skipped.
      progress: a function `(done_bytes, total_bytes)`, called from one thread at a time while
        values are written or read, from 0 up to the total; or True for a line on stderr, where
        that is a terminal. What the function raises is logged once, and it is not called again.
      broadcast: where several processes need the same slices of a large array, each reads a part
        of them, and the devices hand over the rest. All processes have to restore the same at
        the same time. Where the mesh does not divide an array evenly, each process reads all
        that it needs.

    Source: `tf.train.CheckpointOptions`.

    Example:
      >>> CheckpointOptions(cast=True).cast
      True
    """

    enable_async: bool = False
    sharding_policy: ShardingPolicy = ShardByDevice()
    write_callbacks: tuple[Callable[..., Any], ...] = ()
    skip_slot_variables: bool = False
    cast: bool = False
    compression: Literal["zstd"] | None = None
    durable: bool = True
    verify: bool = True
    max_inflight_bytes: int = 64 * MIB
    timeout_seconds: float = 600
    shardings: Any = None
    progress: bool | Callable[[int, int], object] | None = None
    when_busy: Literal["wait", "skip"] = "wait"
    broadcast: bool = False

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
        object.__setattr__(self, "write_callbacks", tuple(found))


_SWITCHES = ("enable_async", "skip_slot_variables", "cast", "durable", "verify", "broadcast")
DEFAULT = CheckpointOptions()


def given(options: CheckpointOptions | None) -> CheckpointOptions:
    """The options that a caller gave, or the default ones.

    Raises:
      TypeError: they are something else.
    """
    if options is None:
        return DEFAULT
    if not isinstance(options, CheckpointOptions):
        raise TypeError(f"options must be ckpt.CheckpointOptions, got {options!r}")
    return options
