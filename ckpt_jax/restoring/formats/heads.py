"""The first bytes of a file, by which its format is recognised."""

from __future__ import annotations

import os
import stat


def head_of(path: str, nbytes: int) -> bytes:
    """At most that many of the first bytes of a regular file; b"" if there is none.

    It does not wait for the writer of a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, nbytes) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)
