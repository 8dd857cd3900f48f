"""Durability: flushing files and directories, so that they survive a power failure.

A file survives if both its bytes and the directory entry that names it have been flushed. A
flush that has failed is final: the system may have dropped the bytes, and a second flush would
report a success although they are lost. So nothing here is tried twice. The error is raised, and
the save has failed.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ckpt_jax.store.presence import is_directory

_FLUSH_NBYTES = 8 << 20  # so much is written before the disk begins with it


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


def write_in_parts(path: str, parts: Iterable[Any], *, durable: bool) -> None:
    """Writes a new file.

    If it has to be durable, the disk writes what is there while the rest is being made. The last
    flush waits for all of it, and reports all errors.

    Args:
      path: of the file.
      parts: its contents, as buffers, each of which is taken when the one before is written.
      durable: flush it.

    Raises:
      FileExistsError: there is such a file.
    """
    with naming(path), open(path, "xb") as file:
        at = begun = 0
        for part in parts:
            file.write(part)
            at += len(part)
            if durable and at - begun >= _FLUSH_NBYTES:
                file.flush()
                _begin_flush(file.fileno(), begun, at - begun)
                begun = at
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _begin_flush(descriptor: int, offset: int, nbytes: int) -> None:
    """Asks the system to begin to write a range of a file to the disk, without waiting. What it
    returns means nothing: the flush that follows reports what has failed."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def _linux_call(name: str, *types: Any) -> Callable[..., int] | None:
    """A function of the C library that Python does not have; None if there is none."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.argtypes = types
    return function


_sync_file_range = _linux_call(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_SYNC_FILE_RANGE_WRITE = 2


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
