"""The mirror: copies of committed checkpoints in another storage, made in the background.

A program saves to a disk beside it, which is fast, and every n-th checkpoint is copied to a place
that survives the machine. Training never waits for that: one thread copies, and if it is still busy
when the next checkpoint is due, the one that waits is replaced. What goes wrong is logged, and the
next checkpoint is copied all the same.

The mirror has a state file, notes and a retention of its own, like any directory of a manager.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace

from ckpt_jax.api.copying import copy
from ckpt_jax.errors import CheckpointError
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.retention import CheckpointRecord, RetentionPolicy

_log = logging.getLogger("ckpt_jax")


class Mirror:
    """Copies of a manager's checkpoints.

    Args:
      directory: an absolute path, or a URL; it need not exist yet.
      name: the names of its checkpoints begin with it.
      every: each checkpoint of this many is copied.
      policy: chooses the copies to keep; None keeps all.
      preserve_interval_seconds: the least time between two copies that are kept forever; None keeps
        none forever.
      clock: returns the time in seconds since the epoch.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        every: int,
        policy: RetentionPolicy | None,
        preserve_interval_seconds: float | None,
        clock: Callable[[], float],
    ):
        if every < 1:
            raise ValueError(f"mirror_every: expected 1 or more, got {every}.")
        self.directory, self._every = directory, every
        self._make = lambda: Collection(directory, name, policy, preserve_interval_seconds, clock)
        self._made: Collection | None = None
        self._count = 0
        self._changed = threading.Condition()
        self._waiting: CheckpointRecord | None = None
        self._is_busy = False

    @property
    def _collection(self) -> Collection:
        if self._made is None:
            self._made = self._make()
        return self._made

    def candidates(self) -> list[str]:
        """The copies that can be restored, best first."""
        return self._collection.candidates()

    def committed(self, record: CheckpointRecord) -> None:
        """Copies a checkpoint that was just committed, if it is due, in the background."""
        self._count += 1
        if self._count % self._every:
            return
        with self._changed:
            self._waiting = record
            if self._is_busy:
                return
            self._is_busy = True
        # Not a daemon: the program ends when the copy has ended.
        threading.Thread(target=self._work, name="ckpt-mirror").start()

    def sync(self) -> None:
        """Waits until nothing is left to copy."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy)

    def _work(self) -> None:
        while True:
            with self._changed:
                record, self._waiting = self._waiting, None
                if record is None:
                    self._is_busy = False
                    self._changed.notify_all()
                    return
            try:
                self._copy(record)
            except Exception as error:  # the checkpoint itself is safe at its own path
                _log.warning("%s was not copied to %s: %s", record.path, self.directory, error)

    def _copy(self, record: CheckpointRecord) -> None:
        path = os.path.join(self.directory, os.path.basename(record.path))
        own = replace(record, path=path)
        collection = self._collection
        collection.begin(own)
        try:
            copy(record.path, path, overwrite=True)
        except (CheckpointError, OSError):
            collection.take_back(path)
            raise
        collection.record(own)
