"""Storage: the place where checkpoints lie, behind one interface.

`Posix` is the file system of this machine, or one that several machines have mounted. `ObjectStore`
is a store without directories, renames and locks. The path says which one it is (`storage_of`). It
is then passed on, from the public functions to those that save and read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.store import attempts, objects
from ckpt_jax.store.attempts import Attempt
from ckpt_jax.store.directory import (
    Staging,
    is_checkpoint,
    removing,
    require_checkpoint,
)
from ckpt_jax.store.fetch import ShardedReader
from ckpt_jax.store.forks import require_not_forked, use_tensorstore
from ckpt_jax.store.manifest import MANIFEST, META, Part
from ckpt_jax.store.merge import SHARDS
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, resolved
from ckpt_jax.store.presence import is_file, status_of

Removing = Callable[[], object] | None


class Stage(Protocol):
    """The place where a checkpoint is written before it is there.

    Attributes:
      path: where the checkpoint will be.
      directory: where it is written.
      mark: in the names of what this process writes there; empty if the directory is this save's.
    """

    @property
    def path(self) -> str: ...
    @property
    def directory(self) -> str: ...
    @property
    def mark(self) -> str: ...

    def claimed(
        self, *, overwrite: bool, durable: bool, keeps: bool = False
    ) -> AbstractContextManager[None]:
        """Entered by the process that publishes, while the checkpoint is written. If the block
        fails, what was written is removed, unless it may still become a checkpoint, or `keeps` says
        that another attempt with the same token may go on from there.

        Raises:
          FileExistsError: there is something at the path that may not be replaced.
        """
        ...

    def joined(
        self, shards: str, prefix: str, *, durable: bool, is_lost: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Entered by the other processes; see `Staging.joined`."""
        ...

    def written(self) -> frozenset[str]:
        """The names of the files that an earlier attempt with this token has left, relative to the
        directory. To be called in the block of `claimed`."""
        ...

    def check(self) -> None:
        """Checks that what was written is still there.

        Raises:
          CheckpointError: it was taken away.
        """
        ...

    def complete(self, parts: Mapping[str, Part], *, durable: bool) -> None:
        """Writes what is left to write, given the parts for the manifest."""
        ...

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Makes the checkpoint appear at its path, whole, and in one step.

        Raises:
          FileExistsError: there is something at the path that may not be replaced.
          CommitInDoubtError: it is not known whether it has appeared.
        """
        ...

    def is_committed(self) -> bool:
        """Whether a checkpoint that was in doubt has appeared.

        Raises:
          OSError: this is still not known.
        """
        ...


class Storage(Protocol):
    """A place where checkpoints lie. All paths are paths in it."""

    def stage(self, path: str, token: str) -> Stage:
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

    def saved_at(self, path: str) -> float | None:
        """When the checkpoint at a path was committed, in seconds since the epoch; None if there is
        none, or if the storage does not tell."""
        ...

    def removing(self, path: str) -> AbstractContextManager[Removing]:
        """Takes the checkpoint at a path away, so that it can be removed while the block runs. A
        part of it is never taken for a checkpoint.

        Returns:
          A context manager. Its value is a function that removes what is left; None if nothing is.

        Raises:
          CheckpointNotFoundError: something else is there; it stays.
          OSError: the checkpoint could not be taken away.
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

    def saved_at(self, path: str) -> float | None:
        status = status_of(os.path.join(path, MANIFEST)) if is_checkpoint(path) else None
        return None if status is None else status.st_mtime

    def removing(self, path: str) -> AbstractContextManager[Removing]:
        return removing(path)

    def entries(self, location: str) -> Hashable:
        folders = [status_of(os.path.join(location, name)) for name in ("", META, SHARDS)]
        return tuple([each and (each.st_ino, each.st_mtime_ns) for each in folders])


class ObjectStore:
    """A store behind a URL: a checkpoint is there as soon as its manifest is."""

    def stage(self, path: str, token: str) -> Attempt:
        return Attempt(path, token)

    def located(self, path: str) -> str:
        return absolute(path)

    def open(self, location: str, path: str) -> ShardedReader:
        require_not_forked()
        try:
            return ShardedReader(location)
        except CheckpointNotFoundError:
            require_checkpoint(path)  # says what is there instead
            raise

    def generation(self, location: str) -> Hashable | None:
        return objects.generation_of(f"{location}/{MANIFEST}")

    def saved_at(self, path: str) -> float | None:
        return attempts.saved_at(absolute(path))

    def removing(self, path: str) -> AbstractContextManager[Removing]:
        remove_rest = attempts.taken_away(absolute(path))
        if remove_rest is None and is_file(path):
            require_checkpoint(path)
        return nullcontext(remove_rest)

    def entries(self, location: str) -> Hashable:
        return None  # the manifest goes first, and tells


POSIX, OBJECT_STORE = Posix(), ObjectStore()


def storage_of(path: str) -> Storage:
    """The storage in which a path lies.

    >>> type(storage_of("s3://bucket/run")).__name__, type(storage_of("run")).__name__
    ('ObjectStore', 'Posix')
    """
    return OBJECT_STORE if is_url(path) else POSIX


def generation_at(path: str) -> Hashable | None:
    """`Storage.generation`, of the storage in which a path lies."""
    return storage_of(path).generation(path)


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
