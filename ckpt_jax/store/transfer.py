"""Transfers: directories are moved to other places, all of them or none.

Within a file system a directory is renamed. Into another one it is copied, and what was copied is
removed from its old place at the very end.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

from ckpt_jax.store.durable import fsync_directory, fsync_file
from ckpt_jax.store.replacing import settle
from ckpt_jax.store.staging import discard, staging_name

_log = logging.getLogger("ckpt_jax")


@contextlib.contextmanager
def transferred(moves: Sequence[tuple[str, str]], *, durable: bool) -> Iterator[None]:
    """Moves directories, and lets the block go on with them at their new places. If the block
    fails, or a move does, all of them are at their old places again.

    Args:
      moves: the old and the new path of each directory. Nothing is at the new one.
      durable: flush what is copied, so that it survives a power failure.

    Raises:
      OSError: a directory cannot be moved; nothing was changed.
    """
    with contextlib.ExitStack() as undo:
        copied: list[str] = []
        for source, target in moves:
            try:
                os.rename(source, target)
                undo.callback(_attempt, lambda s=source, t=target: os.rename(t, s))
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                _copy(source, target, durable=durable)
                undo.callback(_attempt, lambda t=target: shutil.rmtree(t))
                copied.append(source)
        yield
        undo.pop_all()
    for source in copied:
        try:
            shutil.rmtree(source)
        except OSError as error:  # what was to be made of it is made
            _log.warning("%s was copied, but could not be removed: %s", source, error)


def _copy(source: str, target: str, *, durable: bool) -> None:
    """Copies a directory. If it is killed, what there is of the copy has the name of staging."""
    settle(target)
    staging = staging_name(target)
    try:
        shutil.copytree(source, staging, symlinks=True)
        if durable:
            _flush(staging)
        os.rename(staging, target)
    except BaseException:
        discard(staging)
        raise


def _flush(directory: str) -> None:
    for above, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(above, name)
            if not os.path.islink(path):
                fsync_file(path)
        fsync_directory(above)


def _attempt(undo: Callable[[], object]) -> None:
    # The error that made it necessary is the one to raise.
    with contextlib.suppress(OSError):
        undo()
