"""Guards: small files that several processes change, one at a time.

To change such a file means to read it, to decide, and to replace it. A process does this while it
has the guard of the directory, an exclusive lock (flock) on the directory itself, so that no change
of another process is lost. On file systems that cannot lock directories (NFS), a file
`checkpoint.lock` is locked instead, and stays. If nothing can be locked there, changes are not
guarded.

A thread that has the guard may enter it again: a signal handler may save in the middle of a save.

Nothing can be locked in an object store. There a change is made in the hope that nobody else makes
one: a file is replaced only if it is still the one that was read. If it is not, the change begins
again (`changing`).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt_jax.store import objects
from ckpt_jax.store.objects import ABSENT, Found, is_url
from ckpt_jax.store.paths import resolved
from ckpt_jax.store.staging import Lock, locked, locked_file

T = TypeVar("T")

LOCK_FILE = "checkpoint.lock"
PATIENCE_SECONDS = 60.0
_POLL_SECONDS = (0.001, 0.05)  # between two attempts: at first, and at most


@dataclass(eq=False)
class _Guard:
    """The guard of one directory, as this process sees it."""

    turn: threading.RLock = field(default_factory=threading.RLock)
    owner: int | None = None  # the thread that has the turn
    depth: int = 0  # how often its thread has entered it
    changes: int = 0  # how many of these are calls of `changing`
    seen: dict[str, Found | None] = field(default_factory=dict)  # files in a store, by URL


_guards: dict[str, _Guard] = {}
os.register_at_fork(after_in_child=_guards.clear)  # a thread that a child lacks may have the turn


@contextmanager
def guarded(directory: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Keeps other threads and processes from the files of a directory until the block ends.

    Args:
      directory: it must exist.
      patience_seconds: how long to wait for others.

    Raises:
      TimeoutError: another one has not left in time; names the directory.
      OSError: the directory cannot be opened.
    """
    directory, guard = _guard_of(directory)
    deadline = time.monotonic() + patience_seconds
    if not guard.turn.acquire(timeout=patience_seconds):
        raise _late(directory, patience_seconds)
    with ExitStack() as exits:
        exits.callback(guard.turn.release)
        if guard.depth == 0:
            guard.seen.clear()
            if not is_url(directory):
                exits.enter_context(_locked(directory, deadline, patience_seconds))
            guard.owner = threading.get_ident()
        guard.depth += 1
        try:
            yield
        finally:
            guard.depth -= 1
            if guard.depth == 0:
                guard.owner = None


class ChangedMeanwhileError(OSError):
    """A file in an object store is not the one that was read. Nothing was changed."""


def changing(directory: str, change: Callable[[], T]) -> T:
    """Calls a function under the guard of a directory; again if another program was faster.

    Args:
      directory: it must exist.
      change: reads files, decides, and replaces them. It is called from its beginning if another
        program has changed one of them after it was read, which happens in object stores only.
        There it reads each file once: what it decides is about the file that it replaces.

    Raises:
      ChangedMeanwhileError: others were faster each time, for as long as `guarded` waits.
      OSError: as for `guarded`.
    """
    guard = _guard_of(directory)[1]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with guarded(directory):
            if guard.changes == 0:
                guard.seen.clear()
            guard.changes += 1
            try:
                return change()
            except ChangedMeanwhileError:
                if guard.changes > 1 or time.monotonic() >= deadline:
                    raise
            finally:
                guard.changes -= 1


def read_again(url: str) -> Found | None:
    """What is at the URL of a file; in a change, what was there when it was read first.

    Raises:
      OSError: it is not known what is there.
    """
    guard = _guard_of(os.path.dirname(url))[1]
    is_ours = guard.owner == threading.get_ident()
    if is_ours and guard.changes and url in guard.seen:
        return guard.seen[url]
    found = objects.read(url)
    if is_ours:
        guard.seen[url] = found
    return found


def replace_seen(url: str, value: bytes) -> None:
    """Replaces a file in an object store, if it is still the one that was read under the guard.

    Raises:
      ChangedMeanwhileError: it is not.
      OSError: it is not known whether it was replaced.
    """
    guard = _guard_of(os.path.dirname(url))[1]
    is_ours = guard.owner == threading.get_ident()
    before = guard.seen[url] if is_ours and url in guard.seen else objects.read(url)
    generation = objects.write(url, value, ABSENT if before is None else before.generation)
    if generation is None:
        found = objects.read(url)
        if found is None and before is None:
            raise PermissionError(
                errno.EACCES,
                "the store says that this file is there, and does not show it. Check that the "
                "credentials allow to read it",
                url,
            )
        if found is None or found.value != value:  # else it is ours, and the reply was lost
            raise ChangedMeanwhileError(errno.EAGAIN, "another program has changed it", url)
        generation = found.generation
    if is_ours:
        guard.seen[url] = Found(value, generation)


def _guard_of(directory: str) -> tuple[str, _Guard]:
    directory = resolved(directory or os.curdir)
    return directory, _guards.setdefault(directory, _Guard())


@contextmanager
def _locked(directory: str, deadline: float, patience_seconds: float) -> Iterator[None]:
    pause, longest = _POLL_SECONDS
    while True:
        with ExitStack() as exits:
            lock = exits.enter_context(locked(directory))
            if lock is Lock.NONE:
                lock = exits.enter_context(locked_file(os.path.join(directory, LOCK_FILE)))
            if lock is not Lock.THEIRS:
                yield
                return
        if time.monotonic() >= deadline:
            raise _late(directory, patience_seconds)
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _late(directory: str, patience_seconds: float) -> TimeoutError:
    holders = ", ".join(map(str, _holders(directory)))
    return TimeoutError(
        errno.ETIMEDOUT,
        f"expected to have the lock of the directory within {patience_seconds:g} s, but "
        f"{f'process {holders}' if holders else 'another process'} has it. Let it go on, or end it",
        directory,
    )


def _holders(directory: str) -> list[int]:
    """The processes that have locked a directory, as far as the system tells."""
    try:
        status = os.stat(directory)
        with open("/proc/locks", encoding="ascii") as file:
            locks = [line.split() for line in file]
    except (OSError, ValueError):
        return []
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    place = f"{device}:{status.st_ino}"
    return [int(each[4]) for each in locks if each[1] == "FLOCK" and each[5:6] == [place]]
