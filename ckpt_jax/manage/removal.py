"""How a manager removes checkpoints: at once, in the background, or into a trash directory.

In every case one rename comes first, so that a part of a checkpoint is never taken for one. Whoever
is at work on a checkpoint has a lease of it (`store.lease`); then it stays for now.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from ckpt_jax.store.directory import is_checkpoint
from ckpt_jax.store.durable import fsync_directory, make_directories
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.presence import is_taken, names_in
from ckpt_jax.store.staging import STAGING, held, remove_abandoned
from ckpt_jax.store.storage import storage_of
from ckpt_jax.store.workers import started

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class Removal:
    """How the checkpoints that a manager does not keep are removed: `removal=` of a manager.

    By default, a save removes them before it returns.

    Attributes:
      in_background: whether files are removed on a thread of their own, so that no save waits for
        it. The checkpoints are gone at once. The end of the program, and `gc`, wait for the thread.
      trash: a directory to which the checkpoints are moved instead, relative to that of the
        checkpoints, on the same file system; not for object stores. Those that `delete` removes go
        there, too. They can be restored from
        there by their paths, `trash/ckpt-3.1764272000`; the number at the end is the time, in
        seconds since the epoch.
      trash_seconds: how long they stay there; None leaves them until somebody removes them by hand.

    Raises:
      ValueError: there is a time for the trash, but no trash, or it is negative.
      TypeError: `in_background` is not a bool.

    Example:
      >>> import ckpt_jax as ckpt, os, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     removal = Removal(trash="trash", trash_seconds=7 * 24 * 3600)
      ...     checkpoint = ckpt.Checkpoint(step=0)
      ...     manager = ckpt.CheckpointManager(checkpoint, directory, 1, removal=removal)
      ...     paths = [manager.save(step, step=step) for step in (1, 2)]
      ...     (thrown_away,) = os.listdir(os.path.join(directory, "trash"))
      ...     ckpt.load(os.path.join(directory, "trash", thrown_away), only="step")
      {'step': 1}
    """

    in_background: bool = False
    trash: str | None = None
    trash_seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.in_background, bool):
            raise TypeError(f"in_background must be True or False, got {self.in_background!r}")
        if self.trash_seconds is not None and (self.trash is None or self.trash_seconds < 0):
            raise ValueError(
                f"expected a trash directory and trash_seconds of 0 or more, got {self}"
            )
        if self.trash is not None and os.path.basename(self.trash) in ("", ".", ".."):
            raise ValueError(f"expected the name of a trash directory, got {self}")


class Remover:
    """Removes the checkpoints of one manager, as its `Removal` says.

    Args:
      directory: of the checkpoints.
      name: the names of the checkpoints begin with it.
      removal: how.
      clock: returns the time in seconds since the epoch.
    """

    def __init__(self, directory: str, name: str, removal: Removal, clock: Callable[[], float]):
        if removal.trash is not None and is_url(directory):
            raise ValueError(
                f"{directory}: expected no trash, because nothing can be moved in an object store, "
                f"got {removal}. Let the store keep old versions instead."
            )
        if removal.trash is not None and re.fullmatch(rf"{re.escape(name)}-\d+", removal.trash):
            raise ValueError(
                f"{directory}: expected a trash that is not called like a checkpoint {name}-N, got "
                f"{removal.trash!r}"
            )
        self._name, self._removal, self._clock = name, removal, clock
        self._trash = removal.trash and os.path.join(directory, removal.trash)
        self._thread: threading.Thread | None = None

    def remove(self, path: str) -> None:
        """Removes the checkpoint at `path`; there is one.

        Raises:
          OSError: it could not be removed, at least not from its path.
        """
        if self._trash is None or os.path.islink(path):
            self._delete(path)
        else:
            self._throw_away(path, self._trash)

    def _throw_away(self, path: str, trash: str) -> None:
        make_directories(trash)
        seconds = int(self._clock())
        name = os.path.basename(path)
        while is_taken(target := os.path.join(trash, f"{name}.{seconds}")):
            seconds += 1
        with held(path):
            os.rename(path, target)
            fsync_directory(trash)
            fsync_directory(os.path.dirname(path))

    def _delete(self, path: str) -> None:
        with ExitStack() as exits:
            remove_rest = exits.enter_context(storage_of(path).removing(path))
            if remove_rest is None:
                return
            if not self._removal.in_background:
                remove_rest()
                return
            rest, before = exits.pop_all(), self._thread

            def work() -> None:
                if before is not None:
                    before.join()
                try:
                    with rest:
                        remove_rest()
                except OSError as error:
                    _log.warning("%s could not be removed as a whole: %s", path, error)

            # No daemon: the interpreter waits for it.
            thread = threading.Thread(target=work, name="ckpt-remove", daemon=False)
            if started(thread):
                self._thread = thread
            else:
                work()

    def empty_trash(self) -> list[str]:
        """Removes what has been in the trash for long enough; returns the paths.

        If something cannot be removed, it stays, and a warning says so.
        """
        longest, trash = self._removal.trash_seconds, self._trash
        if trash is None or longest is None:
            return []
        removed: list[str] = []
        for name in names_in(trash):
            if STAGING.match(name):  # of a removal that did not finish
                with suppress(OSError):
                    remove_abandoned(os.path.join(trash, name))
                continue
            match = re.fullmatch(re.escape(self._name) + r"-\d+\.(\d{1,15})", name)
            path = os.path.join(trash, name)
            if match and self._clock() - int(match[1]) >= longest and is_checkpoint(path):
                try:
                    self._delete(path)
                except OSError as error:
                    _log.warning("%s could not be removed: %s", path, error)
                else:
                    removed.append(path)
        return removed

    def wait(self) -> None:
        """Waits until nothing is being removed in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
