"""Storage: the place where checkpoints lie, behind one interface.

`Posix` is the file system of this machine, or one that several machines have mounted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from typing import Protocol

from ckpt_jax.store.directory import Staging, require_checkpoint
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.forks import require_not_forked, use_tensorstore
from ckpt_jax.store.paths import resolved
from ckpt_jax.store.presence import status_of
from ckpt_jax.store.stack import MANIFEST


class Storage(Protocol):
    """A place where checkpoints lie. All paths are paths in it."""

    def stage(self, path: str, token: str) -> Staging:
        """The place where the checkpoint of `path` is written; `token` makes its name unique."""
        ...

    def located(self, path: str) -> str:
        """The location that a path leads to now. It stays the same checkpoint's even if a link is
        moved on, or if the program changes its working directory."""
        ...

    def open(self, location: str, path: str) -> ShardedReader:
        """The values of the checkpoint at a location.

        Args:
          location: where `path` leads.
          path: the path that errors name if there is no checkpoint.

        Raises:
          CheckpointNotFoundError: there is no checkpoint. The error says what is there instead, and
            which checkpoints are nearby.
          CorruptCheckpointError: its index cannot be read.
        """
        ...

    def generation(self, location: str) -> Hashable | None:
        """A value that changes if another checkpoint takes a location; None if nothing is there.

        Raises:
          OSError: it is not known what is there.
        """
        ...


class Posix:
    """A POSIX file system: a checkpoint is a directory, and takes its name in one rename."""

    def stage(self, path: str, token: str) -> Staging:
        use_tensorstore()  # its use may come later, on another thread, after a fork
        return Staging.of(path, token)

    def located(self, path: str) -> str:
        return resolved(path)

    def open(self, location: str, path: str) -> ShardedReader:
        require_not_forked()
        require_checkpoint(path)
        return ShardedReader(location)

    def generation(self, location: str) -> Hashable | None:
        for file in (os.path.join(location, MANIFEST), location):
            status = status_of(file)
            if status is not None and stat.S_ISREG(status.st_mode):
                return status.st_dev, status.st_ino, status.st_mtime_ns
        return None


POSIX = Posix()
