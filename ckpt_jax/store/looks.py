"""What is at a path, in a file system or in an object store, for those who recognise formats.

More than ten formats are asked whether they know a checkpoint, and each looks at the same files. In
a store each look would be a request. So what was found out about a URL is remembered while a block
of `looking` runs: one list of all that lies below it, and the beginnings of files.
"""

from __future__ import annotations

import os
import stat
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property

from ckpt_jax.store import objects, presence
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.remote import HEAD_NBYTES, AbsentError, Part, RemoteFile, fetch


class Look:
    """What was found out about a URL, what lies below it, and files beside it.

    Args:
      root: the URL.
    """

    def __init__(self, root: str):
        self.root = root
        self._files: dict[str, RemoteFile] = {}
        self._lock = threading.RLock()

    def covers(self, path: str) -> bool:
        """Whether a path is the root, or lies below it."""
        return path == self.root or path.startswith(self._below)

    def file(self, url: str) -> RemoteFile:
        """The file at a URL, whether it is there or not."""
        with self._lock:
            found = self._files.setdefault(url, RemoteFile(url))
        if url != self.root and self.covers(url):
            found.is_named = url.removeprefix(self._below) in self._key_set
        return found

    def forget(self) -> None:
        """Frees the memory of what was read of files."""
        with self._lock:
            for file in self._files.values():
                file.forget()

    def is_file(self, url: str) -> bool:
        """Whether there is a value."""
        if url == self.root or not self.covers(url):
            return self.file(url).is_there
        return url.removeprefix(self._below) in self._key_set

    def is_directory(self, url: str) -> bool:
        """Whether there is something below a URL."""
        return bool(self.keys_below(url))

    def names_in(self, url: str) -> list[str]:
        """The names in a directory, sorted."""
        return sorted({key.partition("/")[0] for key in self.keys_below(url)} - {""})

    def keys_below(self, url: str) -> Sequence[str]:
        """The keys below a URL, relative to it."""
        if not self.covers(url):
            return objects.keys_below(url)
        if url == self.root:
            return self._keys
        prefix = f"{url.removeprefix(self._below)}/"
        first = bisect_left(self._keys, prefix)
        last = bisect_left(self._keys, f"{prefix[:-1]}0", first)  # "0" follows "/"
        return [key.removeprefix(prefix) for key in self._keys[first:last]]

    @property
    def _below(self) -> str:
        return self.root if self.root.endswith("/") else f"{self.root}/"

    @cached_property
    def _keys(self) -> list[str]:
        return [] if self.file(self.root).is_there else sorted(objects.keys_below(self.root))

    @cached_property
    def _key_set(self) -> frozenset[str]:
        return frozenset(self._keys)


_current: ContextVar[Look | None] = ContextVar("look", default=None)


@contextmanager
def looking(path: str) -> Iterator[None]:
    """Remembers what is found out about a URL until the block ends."""
    look = _current.get()
    if not is_url(path) or (look is not None and look.covers(path)):
        yield
        return
    token = _current.set(Look(path))
    try:
        yield
    finally:
        _current.reset(token)


def look_at(url: str) -> Look:
    """The look that is going on, or else a new one."""
    look = _current.get()
    return look if look is not None and look.covers(url) else Look(url)


def _look_beside(url: str) -> Look:
    """The look that is going on, also for files that lie beside what is looked at."""
    return _current.get() or Look(url)


def is_file(path: str) -> bool:
    """Whether a path leads to a regular file.

    Raises:
      OSError: a store did not tell.
    """
    return _look_beside(path).is_file(path) if is_url(path) else os.path.isfile(path)


def is_directory(path: str) -> bool:
    """Whether a path leads to a directory; raises like `is_file`."""
    return _look_beside(path).is_directory(path) if is_url(path) else os.path.isdir(path)


def names_in(directory: str) -> list[str]:
    """The names in a directory, sorted; none if there is no directory.

    Raises:
      OSError: it is not known what is there.
    """
    if is_url(directory):
        return _look_beside(directory).names_in(directory)
    return presence.names_in(directory)


def head_of(path: str, nbytes: int) -> bytes:
    """At most that many of the first bytes of a regular file; b"" if there is none.

    It does not wait for the writer of a pipe. Raises like `is_file`.
    """
    if is_url(path):
        look = _look_beside(path)
        with suppress(AbsentError):
            if look.is_file(path):
                return look.file(path).head(nbytes)
        return b""
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


def tail_of(path: str, nbytes: int) -> bytes:
    """The last bytes of a regular file; b"" if there are not as many; raises like `is_file`."""
    if is_url(path):
        look = _look_beside(path)
        found = b""
        with suppress(AbsentError):
            # A file beside what is looked at may not be there, which reading it tells.
            if not look.covers(path) or look.is_file(path):
                found = look.file(path).tail(nbytes)
        return found if len(found) == nbytes else b""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(-nbytes, os.SEEK_END)
        return file.read()
    return b""


def size_of(path: str) -> int | None:
    """The size of a file that is there; None if it is large and lies in an object store, where it
    would have to be searched for."""
    return _look_beside(path).file(path).known_length if is_url(path) else os.path.getsize(path)


def keys_below(path: str) -> Sequence[str]:
    """The keys of all that lies below a URL, relative to it; none in a file system."""
    return _look_beside(path).keys_below(path) if is_url(path) else ()


def fetch_heads(paths: Sequence[str]) -> None:
    """Reads the beginnings of files of an object store at once; does nothing elsewhere."""
    files = [_look_beside(path).file(path) for path in paths if is_url(path)]
    fetch([Part(file, 0, HEAD_NBYTES) for file in files])


__all__ = [
    "Look",
    "fetch_heads",
    "head_of",
    "is_directory",
    "is_file",
    "keys_below",
    "look_at",
    "looking",
    "names_in",
    "size_of",
    "tail_of",
]
