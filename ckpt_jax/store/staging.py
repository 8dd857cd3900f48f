"""Staging: directories that are not checkpoints yet, or that are being removed.

A save writes into a *staging* directory beside the path of the checkpoint. A checkpoint that is
being removed is first renamed to the name of a staging directory. For a state file, the staging
is a file. The name of staging is

    <path>.staging-<boot><space><process><start><random>      8, 4, 6, 6 and 8 hexadecimal digits

The name tells the owner: the running system (its boot), the process namespace in it, the process
there, and when that process started, so that no later process with the same number is mistaken for
it. In addition, every process that is at work on the staging *holds* it (a shared flock). A process
that wants to remove it needs an exclusive lock. If somebody is seen to hold it, it stays.

Staging is *abandoned* if one of these is true:

* The name tells a process of this system and namespace that no longer runs.
* This process has made it for itself alone, and no longer holds it.
* The name tells another namespace of this system (a container), nobody holds it, and it is on a
  local file system. There the lock of a container would be seen.
* The name tells anything else: another machine, or this one before a reboot. What looks like a
  local disk here may be served to other machines, whose locks are not seen here. So nothing can be
  proved, and it is abandoned when nothing in it has changed for `GRACE_SECONDS`.

Everything else is left alone, above all the staging of processes that run. A mistake about another
machine never costs a checkpoint that was reported: staging is removed by renaming it first, and
a save whose staging was renamed notices that before it publishes (`Held.check`), and fails.

Making staging and holding it are two steps. If another process finds and removes it between them,
it is made again.

If several processes write a checkpoint, the name tells process 0. Any of them may be the first to
make the directory, even while process 0 is still busy with an earlier save.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store.durable import naming

OWNER = "[0-9a-f]{16}|[0-9a-f]{32}"
STAGING = re.compile(rf"^(?P<name>.+)\.staging-(?P<owner>{OWNER})$", re.DOTALL)
_OWNED = re.compile(rf"^(?P<name>.+)\.(staging|replaced)-(?P<owner>{OWNER})$", re.DOTALL)
GRACE_SECONDS = 24 * 3600.0

_log = logging.getLogger("ckpt_jax")

# Local file systems, by the magic numbers of statfs(2). Some of them may be served to others.
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x794C7630,  # overlayfs
        0xF2F52010,  # f2fs
        0x2FC12FC1,  # zfs
    }
)


class Lock(Enum):
    """The outcome of an attempt to lock a file or directory."""

    OURS = "we have it"
    THEIRS = "somebody else has it"
    NONE = "it cannot be locked there"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, distinguished from all other processes of all machines, past and present.

    Attributes:
      boot: the running system, hashed; 0 if it does not tell.
      space: the process namespace in it, hashed.
      process: its number there.
      start: when it started, in ticks since the boot, modulo 2**24.
    """

    boot: int
    space: int
    process: int
    start: int

    def __str__(self) -> str:
        return f"{self.boot:08x}{self.space:04x}{self.process:06x}{self.start:06x}"

    @classmethod
    def parse(cls, digits: str) -> Owner:
        """The inverse of `str`. Further digits are ignored; too few are of an unknown system."""
        if len(digits) < 24:
            return cls(0, 0, 0, 0)
        ends = (0, 8, 12, 18, 24)
        return cls(*[int(digits[a:b], 16) for a, b in pairwise(ends)])


class Held:
    """Staging that this process holds.

    Attributes:
      path: its name.
      descriptor: of the open directory or file.
    """

    def __init__(self, path: str, descriptor: int):
        self.path, self.descriptor = path, descriptor

    @property
    def is_there(self) -> bool:
        """Whether its name still leads to it."""
        try:
            with naming(self.path):
                own = os.fstat(self.descriptor)
            return os.path.samestat(own, os.lstat(self.path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Checks that nobody has taken it away.

        Raises:
          CheckpointError: another process has renamed or removed it.
        """
        if not self.is_there:
            raise CheckpointError(
                f"{self.path}: expected the staging directory of this save, but it was renamed or "
                "removed, by hand or because nothing in it had changed for "
                f"{GRACE_SECONDS / 3600:g} hours. Nothing was saved. Save again."
            )


def is_staging(path: str) -> bool:
    """Whether a path has the name of a staging directory."""
    return STAGING.match(os.path.basename(os.path.abspath(path))) is not None


def owner_digits() -> str:
    """The part of a staging name that tells this process: 24 hexadecimal digits."""
    process = os.getpid()
    state = _state_of(process)
    return str(Owner(*_system(), process, state.start if state else 0))


_alone: set[str] = set()  # the digits of names that no other process of this run knows


def new_owner() -> str:
    """New digits for the end of a name that this process alone uses."""
    _alone.add(digits := f"{owner_digits()}{secrets.token_hex(4)}")
    return digits


def staging_name(path: str) -> str:
    """A new staging name for `path`, for this process alone."""
    return f"{path}.staging-{new_owner()}"


@contextmanager
def new_file(path: str) -> Iterator[Held]:
    """A new staging file for `path`, open for writing and held until the block ends.

    At the end of the block, a file under its name is removed as far as possible. The file is only
    ever written through the descriptor that has created it, so a link that somebody puts in its
    place leads nowhere.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        staging = staging_name(path)
        with _hold(staging, os.open(staging, flags, 0o666), fcntl.LOCK_SH) as (held, lock):
            if lock is Lock.THEIRS or not held.is_there:
                continue
            try:
                yield held
            finally:
                discard(staging)
            return


@contextmanager
def joined(staging: str) -> Iterator[Held]:
    """Holds the staging directory of a given name until the block ends. The first process creates
    it."""
    while True:
        with suppress(FileExistsError):  # os.makedirs fails if it is removed at this moment
            os.mkdir(staging)
        with ExitStack() as exits:
            try:
                held, lock = exits.enter_context(_opened(staging, fcntl.LOCK_SH))
            except FileNotFoundError:
                continue
            if lock is Lock.THEIRS or not held.is_there:
                continue
            yield held
            return


def discard(staging: str) -> None:
    """Removes everything under the name, as far as possible."""
    # Errors are not raised: if a save has failed, it has said why. What stays is abandoned.
    with suppress(OSError):
        _remove(staging)


def leave(staging: str, remove_own: Callable[[], None]) -> None:
    """Removes staging after a failure, as far as possible.

    If another process is still at work on it, it stays; that process will leave it, too. If it
    cannot be locked, this is not known; then `remove_own` removes what this process may remove.
    """
    with suppress(OSError), ExitStack() as exits:
        try:
            lock = exits.enter_context(locked(staging))
        except FileNotFoundError:
            return
        except OSError:
            lock = Lock.NONE
        if lock is Lock.OURS:
            _remove(staging)
        elif lock is Lock.NONE:
            remove_own()


def _remove(staging: str) -> None:
    if os.path.isdir(staging) and not os.path.islink(staging):
        shutil.rmtree(staging)
    elif os.path.lexists(staging):
        os.unlink(staging)
    _alone.discard(staging.rpartition("-")[2])


def held(path: str) -> AbstractContextManager[Lock]:
    """Tries to hold a directory or a file until the block ends. Others may hold it as well.

    Raises:
      FileNotFoundError: there is no such directory or file.
      OSError: it is a link, or it may not be opened.
    """
    return _locked(path, fcntl.LOCK_SH)


def locked(path: str) -> AbstractContextManager[Lock]:
    """Tries to lock a directory or a file exclusively until the block ends; raises like `held`."""
    return _locked(path, fcntl.LOCK_EX)


@contextmanager
def locked_file(path: str) -> Iterator[Lock]:
    """Tries to lock a file exclusively until the block ends. The first process creates it.

    It is opened for writing, because some file systems lock only such files.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with _hold(path, os.open(path, flags, 0o666), fcntl.LOCK_EX) as (_, lock):
        yield lock


@contextmanager
def locked_for_writing(path: str) -> Iterator[Lock]:
    """`locked` for a file that is there, opened for writing: some file systems lock only such
    files."""
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with _hold(path, os.open(path, flags), fcntl.LOCK_EX) as (_, lock):
        yield lock


@contextmanager
def _locked(path: str, operation: int) -> Iterator[Lock]:
    with _opened(path, operation) as (_, lock):
        yield lock


def _opened(path: str, operation: int) -> AbstractContextManager[tuple[Held, Lock]]:
    # O_NONBLOCK, because it may be a pipe, and opening that would wait for its other end.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    return _hold(path, os.open(path, flags), operation)


@contextmanager
def _hold(path: str, descriptor: int, operation: int) -> Iterator[tuple[Held, Lock]]:
    """Tries to lock what is open; unlocks and closes it at the end of the block."""
    try:
        with naming(path):
            lock = _lock(descriptor, operation)
        try:
            yield Held(path, descriptor), lock
        finally:
            if lock is Lock.OURS:
                # Closing is not enough if a forked child has the descriptor, too. What was done
                # under the lock is done, so an error here must not make it fail.
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        with suppress(OSError):
            os.close(descriptor)


def _lock(descriptor: int, operation: int) -> Lock:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.THEIRS
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return Lock.NONE
        raise
    return Lock.OURS


# --- what is abandoned ------------------------------------------------------------------


def staging_of(path: str) -> list[str]:
    """All staging for `path`, of any owner."""
    parent, name = os.path.split(os.path.abspath(path))
    with os.scandir(parent) as entries:
        found = [
            entry.path
            for entry in entries
            if entry.name.startswith(f"{name}.staging-")
            if (match := STAGING.match(entry.name)) and match["name"] == name
        ]
    return sorted(found)


def is_abandoned(staging: str) -> bool:
    """Whether a staging directory or file is abandoned."""
    return why_kept(staging) is None


def why_kept(staging: str, clock: Callable[[], float] = time.time) -> str | None:
    """Why a staging directory or file has to stay; None if it is abandoned.

    Args:
      staging: its path.
      clock: returns the time in seconds since the epoch, by which the age of files is told.
    """
    try:
        with locked(staging) as lock:
            return _why_kept(staging, lock, clock)
    except OSError as error:  # it has been removed, it is a link, or it may not be opened
        return f"it cannot be locked ({error.strerror})"


def remove_abandoned(staging: str, clock: Callable[[], float] = time.time) -> bool:
    """Removes a staging directory or file if it is abandoned; see `why_kept`.

    Returns:
      Whether it was removed.

    Raises:
      OSError: it could not be removed, or not all of it.
    """
    with ExitStack() as exits:
        try:
            lock = exits.enter_context(locked(staging))
        except OSError:  # it has been removed, it is a link, or it may not be opened
            return False
        if _why_kept(staging, lock, clock) is not None:
            return False
        # A name of our own: a save that still wants to publish it finds nothing under the old one.
        doomed = staging_name(owned_path(staging))
        try:
            os.rename(staging, doomed)
        except FileNotFoundError:  # it was published or removed at this moment
            return False
        _remove(doomed)
        return True


def owned_path(staging: str) -> str:
    """The path for which staging was made, or at which what was set aside had been."""
    above, name = os.path.split(os.path.abspath(staging))
    match = _OWNED.match(name)
    assert match is not None
    return os.path.join(above, match["name"])


def _why_kept(staging: str, lock: Lock, clock: Callable[[], float]) -> str | None:
    match = _OWNED.match(os.path.basename(os.path.abspath(staging)))
    if match is None:
        return "it is not called like staging"
    if lock is Lock.THEIRS:
        return "a process holds it"
    owner, (boot, space) = Owner.parse(match["owner"]), _system()
    if owner.boot == boot != 0:
        if owner.space == space:
            is_left = (
                lock is Lock.OURS and match["owner"] in _alone and os.getpid() == owner.process
            )
            if is_left or _is_gone(owner):
                return None
            return f"process {owner.process}, for which it was made, is running"
        if lock is Lock.OURS and _is_local(staging):
            return None
    age = clock() - _changed(staging)
    if age >= GRACE_SECONDS:
        return None
    return (
        "it was made on another machine, or before a reboot, and something in it has changed in "
        f"the last {GRACE_SECONDS / 3600:g} hours"
    )


def _changed(staging: str) -> float:
    """When something in a directory, or a file, was last changed, in seconds since the epoch."""

    def fail(error: OSError) -> None:
        raise error

    times = [os.lstat(staging).st_mtime]
    for above, folders, files in os.walk(staging, onerror=fail):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # somebody is at work on it; other times tell
                times.append(os.lstat(os.path.join(above, name)).st_mtime)
    return max(times)


def _system() -> tuple[int, int]:
    """This boot and this process namespace, hashed; zeros if the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read()
        space = os.readlink("/proc/self/ns/pid").encode()
    except OSError:
        return 0, 0
    return _hashed(boot, 4) or 1, _hashed(space, 2)


def _hashed(text: bytes, nbytes: int) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:nbytes])


@dataclass(frozen=True, slots=True)
class _State:
    """What the system tells of a process."""

    start: int
    is_over: bool


def _state_of(process: int) -> _State | None:
    """The state of a process of this system; None if the system does not tell."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The second field is the program's name in parentheses. It may contain anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # A process that has ended stays in the table until its parent asks how it ended. If only its
    # first thread has ended, it is at work.
    is_over = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1
    return _State(int(fields[19]) & 0xFFFFFF, is_over)


def _is_gone(owner: Owner) -> bool:
    """Whether a process of this system and namespace has provably ended."""
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    state = _state_of(owner.process)
    return state is not None and (state.is_over or state.start != owner.start)


def _is_local(path: str) -> bool:
    """Whether a path lies on a local file system."""
    if not sys.platform.startswith("linux"):
        return False
    status = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), status) != 0:
        return False
    word = ctypes.sizeof(ctypes.c_long)
    return int.from_bytes(status.raw[:word], sys.byteorder) & 0xFFFFFFFF in _LOCAL
