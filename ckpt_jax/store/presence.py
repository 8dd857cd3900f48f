"""What is at a path. Nothing is there only if the system says so.

A file system may refuse to answer: the disk fails (EIO), a server has forgotten a file (ESTALE), a
directory is closed to this user (EACCES). Who takes that for absence believes that there is no
checkpoint, goes back to an older one, and writes over the good one. So only ENOENT and ENOTDIR mean
that nothing is there. All other errors are raised as they are, and name the path.

In an object store, a directory is there if there is a value below it.
"""

from __future__ import annotations

import os
import stat

from ckpt_jax.store import objects
from ckpt_jax.store.objects import is_url


def status_of(path: str, *, follow_links: bool = True) -> os.stat_result | None:
    """The status of what a path leads to; None if nothing is there.

    Raises:
      OSError: it is not known what is there.
    """
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_taken(path: str) -> bool:
    """Whether something has this name, if only a link that leads nowhere; raises like
    `status_of`."""
    if is_url(path):
        return is_file(path) or is_directory(path)
    return status_of(path, follow_links=False) is not None


def is_directory(path: str) -> bool:
    """Whether a path leads to a directory; raises like `status_of`."""
    if is_url(path):
        return bool(objects.keys_below(path))
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: str) -> bool:
    """Whether a path leads to a regular file; raises like `status_of`."""
    if is_url(path):
        return objects.read(path) is not None
    status = status_of(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def names_in(directory: str) -> list[str]:
    """The names in a directory, sorted; none if there is no directory; raises like `status_of`."""
    if is_url(directory):
        return sorted({key.partition("/")[0] for key in objects.keys_below(directory)})
    try:
        return sorted(os.listdir(directory or os.curdir))
    except (FileNotFoundError, NotADirectoryError):
        return []
