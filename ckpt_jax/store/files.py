"""Small files beside the checkpoints. They are read as a whole, and replaced in one step."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ckpt_jax.store.durable import fsync_directory, naming
from ckpt_jax.store.staging import new_file, remove_leftovers

_MAX_NBYTES = 1 << 26  # of a file beside the checkpoints


def read_file(path: str) -> str | None:
    """The text of a small file beside the checkpoints; None if there is no file.

    If it is a pipe, this does not wait for a writer, because there may never be one.

    Raises:
      ValueError: it is not a regular file, is too large, or is not text in UTF-8.
      OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP):
            raise ValueError(f"it cannot be read ({error.strerror})") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    with open(descriptor, "rb") as file:
        contents = file.read(_MAX_NBYTES + 1)
    if len(contents) > _MAX_NBYTES:
        raise ValueError(f"it has more than {_MAX_NBYTES} bytes")
    return contents.decode("utf-8")


def replace_file(path: str, text: str) -> None:
    """Replaces a small file durably in one step. If that fails, the file is as it was before.

    Raises:
      OSError: the file could not be replaced; the error names it.
    """
    before = Path(path).read_bytes() if os.path.isfile(path) else None
    remove_leftovers(path)
    _put(path, text.encode("ascii"))
    try:
        fsync_directory(os.path.dirname(path) or os.curdir)
    except OSError:
        # The new file is in place, but it may not survive a power failure.
        if before is None:
            os.unlink(path)
        else:
            _put(path, before)
        raise


def _put(path: str, contents: bytes) -> None:
    with new_file(path) as staging:
        with naming(staging.path), open(staging.descriptor, "wb", closefd=False) as file:
            file.write(contents)
            file.flush()
            os.fsync(staging.descriptor)
        os.replace(staging.path, path)
