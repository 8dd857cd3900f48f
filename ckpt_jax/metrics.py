"""Metrics: what saves and restores cost, for monitoring systems, programs and logs.

Every save and every restore ends with one frozen value. The listeners of `jax.monitoring` get it
as events whose names begin with `/ckpt_jax/`; `last_save()` and `last_restore()` return it; and a
save also writes one line to the logger "ckpt_jax".

    /ckpt_jax/write/duration           seconds from the call to the commit
    /ckpt_jax/write/blocked            the part of them in which the program had to wait
    /ckpt_jax/write/bytes              bytes of the values that this process wrote
    /ckpt_jax/training_time_saved      seconds since the previous write, or since the first
                                       `Checkpoint` was made: a crash no longer loses them
    /ckpt_jax/read/duration            seconds of a restore
    /ckpt_jax/read/bytes               bytes of the chunks that were read

Durations and times are events with a duration, bytes are scalars. A save that fails causes no
events. If a registered listener raises, this is logged and does not affect the save.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jax import monitoring

_log = logging.getLogger("ckpt_jax")

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class SaveMetrics:
    """The cost of one save.

    Attributes:
      path: path of the checkpoint.
      nbytes: size of all values that this process wrote, before compression; graph and index are
        not counted.
      blocked_seconds: time from the call of `save` until the program could go on; for a save that
        is not in the background, until the commit.
      durable_seconds: time from the call of `save` until the commit. Write callbacks run later.

    Example:
      >>> SaveMetrics("runs/a/ckpt-1", 6_000_000, 0.5, 2.0).bytes_per_second
      3000000.0
    """

    path: str
    nbytes: int
    blocked_seconds: float
    durable_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes that became durable per second; 0 if no time passed."""
        return _rate(self.nbytes, self.durable_seconds)


@dataclass(frozen=True, slots=True)
class RestoreMetrics:
    """The cost of one restore.

    Attributes:
      path: path of the checkpoint.
      nbytes: size of all chunks that were read, before they were cut to the wanted boxes. Values
        of objects that appear later are read then, and not counted.
      seconds: duration of the whole call.
    """

    path: str
    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes read per second; 0 if no time passed."""
        return _rate(self.nbytes, self.seconds)


def _rate(nbytes: int, seconds: float) -> float:
    return nbytes / seconds if seconds > 0 else 0.0


class _Reader(Protocol):
    @property
    def path(self) -> str: ...

    @property
    def bytes_read(self) -> int: ...


R = TypeVar("R", bound=_Reader)


class Meter:
    """Measures saves and restores against one clock.

    Args:
      clock: gives seconds; only differences count. If it goes backwards, durations are 0.
    """

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._mark: float | None = None  # the end of the last write, or the first construction
        self._saved_seconds = 0.0
        self._last_save: SaveMetrics | None = None
        self._last_restore: RestoreMetrics | None = None

    def constructed(self) -> None:
        """Notes that a `Checkpoint` was made: from the first one on, training time can be lost."""
        with self._lock:
            if self._mark is None:
                self._mark = self._clock()

    def saving(self) -> SaveWatch:
        """Starts to measure a save."""
        return SaveWatch(self, self._clock)

    @contextmanager
    def restoring(self, opened: Callable[[], AbstractContextManager[R]]) -> Iterator[R]:
        """Opens a reader for the block, and measures from before the opening until the end."""
        started = self._clock()
        with opened() as reader:
            yield reader
            seconds = max(0.0, self._clock() - started)
            done = self._last_restore = RestoreMetrics(reader.path, reader.bytes_read, seconds)
        _tell(("/ckpt_jax/read/duration", done.seconds), ("/ckpt_jax/read/bytes", done.nbytes))

    def saved(self, done: SaveMetrics) -> None:
        """Records and reports a save that has just been committed."""
        now = self._clock()
        with self._lock:
            gained = max(0.0, now - self._mark) if self._mark is not None else 0.0
            self._mark = now
            self._saved_seconds += gained
            self._last_save = done
        _log.info(
            "saved %s: %.1f MB, blocked %.3f s, durable after %.3f s, %.1f MB/s",
            *(done.path, done.nbytes / 1e6, done.blocked_seconds, done.durable_seconds),
            done.bytes_per_second / 1e6,
        )
        _tell(
            ("/ckpt_jax/write/duration", done.durable_seconds),
            ("/ckpt_jax/write/blocked", done.blocked_seconds),
            ("/ckpt_jax/write/bytes", done.nbytes),
            ("/ckpt_jax/training_time_saved", gained),
        )

    def last_save(self) -> SaveMetrics | None:
        return self._last_save

    def last_restore(self) -> RestoreMetrics | None:
        return self._last_restore

    def training_seconds_saved(self) -> float:
        return self._saved_seconds


class SaveWatch:
    """The stopwatch of one save. It runs from its construction on."""

    def __init__(self, meter: Meter, clock: Clock):
        self._meter, self._clock = meter, clock
        self._started = clock()
        self._blocked_seconds: float | None = None
        self._nbytes = 0
        self._lock = threading.Lock()

    def unblocked(self) -> None:
        """Notes that the program can go on."""
        self._blocked_seconds = self._elapsed()

    def wrote(self, nbytes: int) -> None:
        """Notes that bytes were written. May be called on any thread."""
        with self._lock:
            self._nbytes += nbytes

    def committed(self, path: str) -> None:
        """Notes that the checkpoint was committed. Must be called once."""
        durable = self._elapsed()
        blocked = durable if self._blocked_seconds is None else self._blocked_seconds
        self._meter.saved(SaveMetrics(path, self._nbytes, blocked, durable))

    def _elapsed(self) -> float:
        return max(0.0, self._clock() - self._started)


def _tell(*events: tuple[str, float | int]) -> None:
    """Passes events on; integers are sizes, floats are seconds."""
    try:
        for name, value in events:
            if isinstance(value, int):
                monitoring.record_scalar(name, value)
            else:
                monitoring.record_event_duration_secs(name, value)
    except Exception:  # a listener may raise anything; the checkpoint is committed all the same
        _log.exception("a listener of jax.monitoring failed")


METER = Meter()


def last_save() -> SaveMetrics | None:
    """The cost of this process's last committed save; None before the first.

    Example:
      >>> import ckpt_jax as ckpt, numpy as np, os, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.zeros(1000, np.float32)})
      >>> os.path.basename(last_save().path), last_save().nbytes
      ('a', 4000)
    """
    return METER.last_save()


def last_restore() -> RestoreMetrics | None:
    """The cost of this process's last restore; None before the first."""
    return METER.last_restore()


def training_seconds_saved() -> float:
    """The training time that the saves of this process have secured against a crash.

    Each save adds the time since the end of the previous save. The first save adds the time since
    the first `Checkpoint` was made. Restores do not change it.

    Source: the metric of the same purpose that `tf.train.Checkpoint` keeps.
    """
    return METER.training_seconds_saved()


__all__ = [
    "RestoreMetrics",
    "SaveMetrics",
    "last_restore",
    "last_save",
    "training_seconds_saved",
]
