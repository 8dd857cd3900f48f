"""Small files beside the checkpoints. They are read as a whole, and replaced in one step.

Anything may have been put in their place: a pipe, a device, a link, a file that fills the memory.
So only regular files of bounded size are read, without waiting, and a new file is written through
the descriptor that has created it. In an object store, a file is replaced only if it is still the
one that was read (`guard.changing`).
"""

from __future__ import annotations

import errno
import os
import stat

from ckpt_jax.store.durable import fsync_directory, naming
from ckpt_jax.store.guard import read_again, replace_seen
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.replacing import replace, set_aside, settle
from ckpt_jax.store.staging import new_file

_MAX_NBYTES = 1 << 23  # of a file beside the checkpoints: about 100,000 of them can be listed
_CHUNK_NBYTES = 1 << 18  # that is read at once
_MAX_SHOWN = 300  # characters of what was found, in errors and warnings


def shortened(text: str) -> str:
    """A text of bounded length that begins like a given one."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} ..."


def read_file(path: str) -> str | None:
    """The text of a small file beside the checkpoints; None if there is no file.

    If it is a pipe, this does not wait for a writer, because there may never be one.

    Raises:
      ValueError: it is not a regular file, is too large, or is not text in UTF-8.
      OSError: it cannot be read.
    """
    if is_url(path):
        found = read_again(path)
        return None if found is None else _text_of(found.value)
    for each in (path, set_aside(path), path):  # the last if it has just been replaced
        if (text := _read(each)) is not None:
            return text
    return None


def _read(path: str) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP):
            raise ValueError(f"it cannot be read ({error.strerror})") from error
        raise
    contents = bytearray()
    try:
        with naming(path):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a regular file")
            while chunk := os.read(descriptor, min(_CHUNK_NBYTES, _MAX_NBYTES + 1 - len(contents))):
                contents += chunk
    finally:
        os.close(descriptor)
    return _text_of(contents)


def _text_of(contents: bytes | bytearray) -> str:
    if len(contents) > _MAX_NBYTES:
        raise ValueError(f"it has more than {_MAX_NBYTES} bytes")
    return contents.decode("utf-8")


def replace_file(path: str, text: str) -> None:
    """Replaces a small file durably in one step. If that fails, the file is as it was before.

    Raises:
      ChangedMeanwhileError: in an object store, it is not the one that was read.
      OSError: the file could not be replaced, or would be larger than `read_file` reads; the error
        names it.
    """
    contents = text.encode("utf-8")
    if len(contents) > _MAX_NBYTES:
        raise OSError(
            errno.EFBIG,
            f"expected at most {_MAX_NBYTES} bytes about the checkpoints of a directory, got "
            f"{len(contents)}. Keep fewer checkpoints or metrics, or save into another directory",
            path,
        )
    if is_url(path):
        replace_seen(path, contents)
        return
    try:
        before = read_file(path)
    except ValueError:  # it is odd, and nobody needs it back
        before = None
    settle(path)
    _put(path, contents)
    try:
        fsync_directory(os.path.dirname(path) or os.curdir)
    except OSError:
        # The new file is in place, but it may not survive a power failure.
        if before is None:
            os.unlink(path)
        else:
            _put(path, before.encode("utf-8"))
        raise


def _put(path: str, contents: bytes) -> None:
    with new_file(path) as staging:
        with naming(staging.path), open(staging.descriptor, "wb", closefd=False) as file:
            file.write(contents)
            file.flush()
            os.fsync(staging.descriptor)
        replace(staging.path, path)
