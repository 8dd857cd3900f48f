"""Storage: where checkpoints lie, as a seam between the verbs and the bytes.

`Posix` is the file system of this machine, or one that several machines have mounted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from contextlib import suppress
from typing import Protocol

from ckpt_jax.store.directory import Staging, require_checkpoint
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.forks import require_not_forked, use_tensorstore
from ckpt_jax.store.paths import resolved
from ckpt_jax.store.stack import MANIFEST


class Storage(Protocol):
    """Where checkpoints lie; every path is one of its own."""

    def stage(self, path: str, token: str) -> Staging:
        """A place to write the checkpoint of `path` in; `token` makes its name unique."""
        ...

    def located(self, path: str) -> str:
        """Where a path leads at this moment: the same checkpoint also when a link is moved on, or
        when the program goes to another directory."""
        ...

    def open(self, location: str, path: str) -> ShardedReader:
        """The values of the checkpoint at a location.

        Args:
          location: where `path` leads.
          path: what errors call it if there is nothing.

        Raises:
          CheckpointNotFoundError: saying what is there instead, and which checkpoints are near.
          CorruptCheckpointError: its index cannot be read.
        """
        ...

    def generation(self, location: str) -> Hashable | None:
        """Tells what is at a location from what else was there; None if there is nothing."""
        ...


class Posix:
    """A POSIX file system: a checkpoint is a directory, and takes its name in one rename."""

    def stage(self, path: str, token: str) -> Staging:
        use_tensorstore()  # soon, perhaps on another thread: a fork in between is one too late
        return Staging.of(path, token)

    def located(self, path: str) -> str:
        return resolved(path)

    def open(self, location: str, path: str) -> ShardedReader:
        require_not_forked()
        require_checkpoint(path)
        return ShardedReader(location)

    def generation(self, location: str) -> Hashable | None:
        for file in (os.path.join(location, MANIFEST), location):
            with suppress(OSError):
                status = os.stat(file)
                if stat.S_ISREG(status.st_mode):
                    return status.st_dev, status.st_ino, status.st_mtime_ns
        return None


POSIX = Posix()
