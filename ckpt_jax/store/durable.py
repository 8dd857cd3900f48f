"""Durability: flushing files and directories, so that they survive a power failure.

A file survives if both its bytes and the directory entry that names it have been flushed. A
flush that has failed is final: the system may have dropped the bytes, and a second flush would
report a success although they are lost. So nothing here is tried twice. The error is raised, and
the save has failed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_jax.store.presence import is_directory


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Gives a system error that names no file the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        raise


def fsync_file(path: str) -> None:
    """Flushes the contents and the size of the file at `path`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: str) -> None:
    """Flushes the entries of the directory at `path`, but not the files themselves."""
    fsync_file(path)


def make_directories(path: str) -> None:
    """Makes the directory at `path` and its missing parents; flushes the entry of each."""
    if is_directory(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_directories(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not is_directory(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
    fsync_directory(parent)
