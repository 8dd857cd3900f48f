"""Durability: what has to be flushed so that a power failure does not take it away.

A file survives when both its bytes and the directory entry that names it have been flushed.
"""

from __future__ import annotations

import os


def fsync_file(path: str) -> None:
    """Flushes the contents and the size of the file at `path`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: str) -> None:
    """Flushes the names in the directory at `path`, not the files that they name."""
    fsync_file(path)
