"""Storage: where checkpoints lie, as a seam between the verbs and the bytes.

`Posix` is the file system of this machine, or one that several machines have mounted.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Protocol

from ckpt_jax.store.directory import Staging, require_checkpoint
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.stack import MANIFEST


class Storage(Protocol):
    """Where checkpoints lie; every path is one of its own."""

    def stage(self, path: str, token: str) -> Staging:
        """A place to write the checkpoint of `path` in; `token` makes its name unique."""
        ...

    def open(self, path: str) -> ShardedReader:
        """The values of the checkpoint at `path`.

        Raises:
          CheckpointNotFoundError: saying what is there instead, and which checkpoints are near.
          CorruptCheckpointError: its index cannot be read.
        """
        ...

    def generation(self, path: str) -> Hashable | None:
        """Tells a checkpoint from others that were at the same path; None if there is none."""
        ...


class Posix:
    """A POSIX file system: a checkpoint is a directory, and takes its name in one rename."""

    def stage(self, path: str, token: str) -> Staging:
        return Staging.of(path, token)

    def open(self, path: str) -> ShardedReader:
        require_checkpoint(path)
        return ShardedReader(os.path.abspath(path))

    def generation(self, path: str) -> Hashable | None:
        try:
            manifest = os.stat(os.path.join(path, MANIFEST))
        except OSError:
            return None
        return manifest.st_dev, manifest.st_ino, manifest.st_mtime_ns


POSIX = Posix()
