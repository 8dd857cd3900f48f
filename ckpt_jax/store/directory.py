"""Checkpoint directories: how they are staged, published and recognised.

A checkpoint is written into a staging directory beside its destination. Then one rename gives it
the destination's name, so that a path holds a whole checkpoint or none. If there is a checkpoint
already, the two directories are exchanged in one step, and the old one is removed last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckpt_jax.errors import CheckpointNotFoundError, UnsupportedFormatError
from ckpt_jax.store.durable import fsync_directory, make_directories
from ckpt_jax.store.stack import MANIFEST
from ckpt_jax.store.staging import (
    discard,
    held,
    is_staging,
    joined,
    leave,
    remove_abandoned,
    remove_leftovers,
)

# The files by which checkpoints of other libraries are recognised, to name the library in an error.
_OTHERS = {
    "_CHECKPOINT_METADATA": "Orbax",
    "_METADATA": "Orbax",
    ".metadata": "torch.distributed.checkpoint",
}


def is_checkpoint(path: str) -> bool:
    """Whether `path` is a directory with a committed root database."""
    return os.path.isfile(os.path.join(path, MANIFEST)) and not is_staging(path)


def checkpoints_in(directory: str) -> list[str]:
    """The names of the checkpoints in a directory, by number; those without a number come last."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    found = [name for name in names if is_checkpoint(os.path.join(directory, name))]
    return sorted(found, key=lambda name: (number_of(name) is None, number_of(name) or 0, name))


def number_of(path: str) -> int | None:
    """The number at the end of a checkpoint's name.

    >>> number_of("runs/ckpt-12"), number_of("runs/final")
    (12, None)
    """
    found = re.search(
        r"-(\d{1,255})$", os.path.basename(path)
    )  # no longer name fits in a directory
    return int(found.group(1)) if found else None


def require_checkpoint(path: str) -> None:
    """Checks that there is a checkpoint at `path`.

    Raises:
      CheckpointNotFoundError: saying what is there instead, and which checkpoints are nearby.
      UnsupportedFormatError: another library's checkpoint is there.
    """
    if (library := _other_library(path)) is not None:
        raise UnsupportedFormatError(
            f"{path} was written by {library}, and ckpt_jax does not read its format. Restore it "
            f"with {library} and save it with ckpt_jax; docs/migrating.md shows how."
        )
    if is_checkpoint(path):
        return
    if is_staging(path):
        what = f"{path} is the staging directory of a save that did not finish"
        near = os.path.dirname(os.path.abspath(path))
    elif os.path.isdir(path):
        what = f"{path} is a directory, but not a checkpoint (it has no {MANIFEST})"
        near = path
    elif os.path.lexists(path):
        what = f"{path} is a file, not a checkpoint directory"
        near = os.path.dirname(os.path.abspath(path))
    else:
        what = f"there is no checkpoint at {path}"
        near = os.path.dirname(os.path.abspath(path))
    names = checkpoints_in(near)
    if not names and near == path:
        near = os.path.dirname(os.path.abspath(path))
        names = checkpoints_in(near)
    if names:
        what += f". Checkpoints in {near}: {', '.join(names[-20:])}"
    elif not os.path.isdir(near):
        is_file = os.path.lexists(near)
        what += f". {near} is a file" if is_file else f". The directory {near} does not exist"
    else:
        what += f". There are no checkpoints in {near}"
    raise CheckpointNotFoundError(what)


def _other_library(path: str) -> str | None:
    """The name of the other library that wrote the checkpoint at `path`; None if none did."""
    for name, library in _OTHERS.items():
        if os.path.isfile(os.path.join(path, name)):
            return library
    return "TensorFlow" if not os.path.exists(path) and os.path.isfile(f"{path}.index") else None


def others_in(directory: str) -> dict[str, str]:
    """The numbered checkpoints of other libraries in a directory, or the directory itself if it is
    one.

    Returns:
      The name of the library by the name of the checkpoint ("." for the directory itself).
    """
    found = {".": library} if (library := _other_library(directory)) else {}
    names = _listed(directory)
    for name in names:
        path = os.path.join(directory, name)
        stem = name.removesuffix(".index")
        if stem != name and re.search(r"\d$", stem) and os.path.isfile(path):
            if any(each.startswith(f"{stem}.data-") for each in names):
                found[stem] = "TensorFlow"
        elif re.search(r"\d$", name) and os.path.isdir(path) and not is_checkpoint(path):
            # The newer kind of Orbax's folders has one folder for each item.
            below = [path, *[os.path.join(path, item) for item in _listed(path)]]
            libraries = [each for each in map(_other_library, below) if each is not None]
            if libraries:
                found[name] = libraries[0]
    return found


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


@dataclass(frozen=True, slots=True)
class Staging:
    """The place where a checkpoint is written before it gets its name.

    Attributes:
      path: where the checkpoint will be.
      directory: the staging directory beside it.
    """

    path: str
    directory: str

    @classmethod
    def of(cls, path: str, token: str) -> Staging:
        """The staging for `path`. A token makes its name unique, see `store.staging`."""
        path = os.path.realpath(path)  # a link stays; what it points to is replaced
        return cls(path, f"{path}.staging-{token}")

    @contextlib.contextmanager
    def claimed(self, *, overwrite: bool, durable: bool) -> Iterator[None]:
        """Makes the directory and holds it until the block ends.

        At the end, the directory under the staging name is removed. After an exchange this is the
        old checkpoint. If the block fails, it is the unfinished checkpoint, which is removed when
        all processes have left it.

        The leftovers of abandoned saves to the same path are removed first, because they may be
        what fills the disk.

        Raises:
          FileExistsError: there is something at the path that may not be replaced.
        """
        check_replaceable(self.path, overwrite)
        self.make_parents(durable)
        remove_leftovers(self.path)
        try:
            with joined(self.directory):
                yield
        except BaseException:
            leave(self.directory, lambda: shutil.rmtree(self.directory, ignore_errors=True))
            raise
        discard(self.directory)

    def make_parents(self, durable: bool) -> None:
        """Makes the missing directories above the checkpoint."""
        parent = os.path.dirname(self.path)
        if durable:
            make_directories(parent)
        else:
            os.makedirs(parent, exist_ok=True)

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Gives the checkpoint its name. If that cannot be made durable, it is undone.

        Raises:
          FileExistsError: there is something at the path that may not be replaced.
        """
        _publish(self.directory, self.path, overwrite=overwrite, durable=durable)

    @contextlib.contextmanager
    def joined(
        self, shards: str, prefix: str, *, durable: bool, is_lost: Callable[[], bool]
    ) -> Iterator[None]:
        """Holds the directory for a process that does not publish it. If the block fails, what
        this process wrote is removed.

        The process may be late: the others have finished and removed the directory, and this
        process has created it again.

        Args:
          shards: directory below the staging directory.
          prefix: the beginning of the names of this process's directories in `shards`.
          durable: whether the directories above have to survive a crash of the machine.
          is_lost: called if the block fails. Says whether no process can publish the directory
            any more.
        """

        def remove_own() -> None:
            for name in os.listdir(shards):
                if name.startswith(prefix):
                    shutil.rmtree(os.path.join(shards, name), ignore_errors=True)
            os.rmdir(shards)  # fails as long as another process has something in it
            os.rmdir(self.directory)

        self.make_parents(durable)
        try:
            with joined(self.directory):
                yield
        except BaseException:
            if is_lost():
                leave(self.directory, remove_own)
            else:
                with contextlib.suppress(OSError):
                    remove_abandoned(self.directory)
            raise


def check_replaceable(path: str, overwrite: bool) -> None:
    """Checks that a checkpoint may be written to `path`.

    Raises:
      FileExistsError: there is something at the path that may not be replaced.
    """
    if not os.path.lexists(path):
        return
    if is_checkpoint(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace the checkpoint")
    elif not os.path.isdir(path) or os.listdir(path):
        raise FileExistsError(f"{path} exists and is not a checkpoint; it is not replaced")


def _publish(staging: str, path: str, *, overwrite: bool, durable: bool) -> None:
    """Gives `staging` the name `path`. If that cannot be made durable, it is undone."""
    new = os.stat(staging)
    with contextlib.ExitStack() as exits:
        with contextlib.suppress(FileNotFoundError):
            # The old checkpoint may have to come back. Until then it has a staging name, and
            # nobody may take it for abandoned.
            exits.enter_context(held(path))
        undo = _take_name(staging, path, overwrite)
        if not durable:
            return
        try:
            fsync_directory(os.path.dirname(path))
        except OSError:
            # If another save has replaced the checkpoint meanwhile, there is nothing to undo.
            if os.path.samestat(new, os.stat(path)):
                undo()
            raise


def _take_name(staging: str, path: str, overwrite: bool) -> Callable[[], object]:
    """Renames `staging` to `path`, and a checkpoint at `path` to `staging`.

    Returns:
      A function that undoes this.
    """
    try:
        os.rename(staging, path)
        return lambda: os.rename(path, staging)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    check_replaceable(path, overwrite)
    _swap(staging, path)
    return lambda: _swap(staging, path)


def _swap(staging: str, path: str) -> None:
    if _exchange(staging, path):
        return
    # Without an atomic exchange the old checkpoint is first renamed to a name that nobody takes
    # for abandoned: if this process dies between the renames, it is the only checkpoint there is.
    aside = f"{path}.replaced-{secrets.token_hex(8)}"
    os.rename(path, aside)
    try:
        os.rename(staging, path)
    except OSError:
        os.rename(aside, path)
        raise
    os.rename(aside, staging)


def _exchange(one: str, other: str) -> bool:
    """Swaps two names in one step with Linux's renameat2; False if that is impossible."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), one, None, other)
