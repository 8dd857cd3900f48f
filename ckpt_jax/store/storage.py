"""Storage: the place where checkpoints lie, behind one interface.

`Posix` is the file system of this machine, or one that several machines have mounted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.store.directory import Staging, require_checkpoint
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.forks import require_not_forked, use_tensorstore
from ckpt_jax.store.manifest import MANIFEST, META
from ckpt_jax.store.merge import SHARDS
from ckpt_jax.store.paths import absolute, resolved
from ckpt_jax.store.presence import status_of


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

    def entries(self, location: str) -> Hashable:
        """A value that changes if files are added to the checkpoint at a location, or removed from
        it: a checkpoint that is whole never changes. Raises like `generation`."""
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

    def entries(self, location: str) -> Hashable:
        folders = [status_of(os.path.join(location, name)) for name in ("", META, SHARDS)]
        return tuple([each and (each.st_ino, each.st_mtime_ns) for each in folders])


POSIX = Posix()


class Pinned:
    """A checkpoint as it is when it is opened. Readers notice if another one takes its place.

    Args:
      path: of the checkpoint.
      location: where the path leads. Readers go on reading there, even if a link is moved on, or if
        the program changes its working directory.
      identity: gives a value that changes if another checkpoint takes the place.
      entries: gives a value that changes if something is added or removed there.

    Attributes:
      path, location: the same.
      generation: distinguishes the checkpoint from others that may take its place.
    """

    def __init__(
        self,
        path: str,
        location: str,
        identity: Callable[[], Hashable | None],
        entries: Callable[[], Hashable] = lambda: None,
    ):
        self.path, self.location = path, location
        self._identity, self._entries = identity, entries
        self.generation, self._entries_before = identity(), entries()

    @classmethod
    def of(cls, path: str, location: str, storage: Storage) -> Pinned:
        """A checkpoint of this library."""
        return cls(
            path,
            location,
            lambda: storage.generation(location),
            lambda: storage.entries(location),
        )

    def check(self, error: Exception | None = None) -> None:
        """Checks that the checkpoint is still the one that was opened.

        Args:
          error: what looks like damage. The reason may be that another checkpoint was saved to its
            path, or that it is being removed or copied.

        Raises:
          CheckpointNotFoundError: it was replaced or removed; `error` is the cause.
          OSError: this is not known.
        """
        is_same = self._identity() == self.generation
        if is_same and error is not None:
            is_same = self._entries() == self._entries_before
        if not is_same:
            led = "" if self.location == absolute(self.path) else f" (which led to {self.location})"
            raise CheckpointNotFoundError(
                f"{self.path}{led} was replaced or removed while it was being read; nothing of it "
                "is used from now on. Open it again, or take the latest checkpoint."
            ) from error

    @contextmanager
    def unless_replaced(self) -> Iterator[None]:
        """Raises CheckpointNotFoundError instead of an error in the block if the checkpoint was
        replaced or removed."""
        try:
            yield
        except (CorruptCheckpointError, OSError) as error:
            self.check(error)
            raise
