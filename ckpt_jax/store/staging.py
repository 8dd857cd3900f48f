"""Staging: directories that are not checkpoints yet, or that are being removed.

A save writes into a *staging* directory beside the path of the checkpoint. A checkpoint that is
being removed is first renamed to the name of a staging directory. For a state file, the staging
is a file. The name of staging is

    <path>.staging-<system><process><start><random>      eight hexadecimal digits each

The name tells the owner: the running system (its boot and its process namespace, hashed), the
process in it, and when that process started, so that no later process with the same number is
mistaken for it. In addition, every process that is at work on the staging *holds* it (a shared
flock). A process that wants to remove it needs an exclusive lock.

Staging is *abandoned* if its owner is provably gone. There are two proofs:

* Nobody holds it, and it is on a file system that only this machine can have mounted. Then the
  name does not matter: the owner may have run before a reboot, or in a container that is gone.
* The name tells a process of this system that no longer runs. On other file systems, and if the
  staging cannot be locked (directories on NFS), this is the only proof. A name of another system
  proves nothing.

Everything else is left alone. Making staging and holding it are two steps. If another process
finds and removes it between them, it is made again.

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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

STAGING = re.compile(r"^(?P<name>.+)\.staging-(?P<owner>[0-9a-f]{16}|[0-9a-f]{32})$", re.DOTALL)

_log = logging.getLogger("ckpt_jax")

# File systems that only one machine at a time can have mounted, by the magic numbers of statfs(2).
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
      system: the boot and the process namespace in which it runs, hashed.
      process: its number there.
      start: when it started, in ticks since the boot, modulo 2**32.
    """

    system: int
    process: int
    start: int

    def __str__(self) -> str:
        return f"{self.system:08x}{self.process:08x}{self.start:08x}"


def is_staging(path: str) -> bool:
    """Whether a path has the name of a staging directory."""
    return STAGING.match(os.path.basename(os.path.abspath(path))) is not None


def owner_digits() -> str:
    """The part of a staging name that tells this process: 24 hexadecimal digits."""
    process = os.getpid()
    return str(Owner(_system(), process, _start_of(process) or 0))


def staging_name(path: str) -> str:
    """A new staging name for `path` that tells this process."""
    return f"{path}.staging-{owner_digits()}{secrets.token_hex(4)}"


def new_directory(path: str) -> None:
    os.mkdir(path)


def new_file(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


@contextmanager
def claim(path: str, make: Callable[[str], None] = new_directory) -> Iterator[str]:
    """New staging for `path`, held by this process until the block ends.

    At the end of the block, everything under its name is removed as far as possible.
    """
    while True:
        make(staging := staging_name(path))
        if (lock := _hold_on_new(staging)) is not None:
            break
    with lock:
        try:
            yield staging
        finally:
            discard(staging)


@contextmanager
def joined(staging: str) -> Iterator[None]:
    """Holds the staging directory of a given name until the block ends. The first process creates
    it."""
    while True:
        with suppress(FileExistsError):  # os.makedirs fails if it is removed at this moment
            os.mkdir(staging)
        if (lock := _hold_on_new(staging)) is not None:
            break
    with lock:
        yield


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
    with suppress(OSError), locked(staging) as lock:
        if lock is Lock.OURS:
            _remove(staging)
        elif lock is Lock.NONE:
            remove_own()


def _hold_on_new(staging: str) -> ExitStack | None:
    """Holds new staging; None if another process has taken it for abandoned and removed it."""
    with ExitStack() as exits:
        try:
            lock = exits.enter_context(held(staging))
        except FileNotFoundError:
            return None
        if lock is Lock.THEIRS or not os.path.exists(staging):
            return None
        return exits.pop_all()


def _remove(staging: str) -> None:
    if os.path.isdir(staging):
        shutil.rmtree(staging)
    elif os.path.lexists(staging):
        os.unlink(staging)


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
def _locked(path: str, operation: int) -> Iterator[Lock]:
    # O_NONBLOCK, because it may be a pipe, and opening that would wait for its other end.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        lock = _lock(descriptor, operation)
        try:
            yield lock
        finally:
            if lock is Lock.OURS:
                # Closing is not enough if a forked child has the descriptor, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
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
    """Whether the owner of a staging directory or file is provably gone."""
    try:
        with locked(staging) as lock:
            return _is_abandoned(staging, lock)
    except OSError:  # it has been removed, it is a link, or it may not be opened
        return False


def remove_abandoned(staging: str) -> bool:
    """Removes a staging directory or file if its owner is provably gone.

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
        if not _is_abandoned(staging, lock):
            return False
        _remove(staging)
        return True


def remove_leftovers(path: str) -> None:
    """Removes abandoned staging for `path`, before new work on `path` begins."""
    for staging in staging_of(path):
        try:
            remove_abandoned(staging)
        except FileNotFoundError:  # another process is removing it
            pass
        except OSError as error:  # new work can begin all the same
            _log.warning("%s is abandoned, but could not be removed: %s", staging, error)


def _is_abandoned(staging: str, lock: Lock) -> bool:
    match = STAGING.match(os.path.basename(os.path.abspath(staging)))
    if match is None or lock is Lock.THEIRS:
        return False
    if lock is Lock.OURS and _is_local(staging):
        return True
    digits = match["owner"]
    if len(digits) != 32:
        return False
    owner = Owner(*(int(digits[i : i + 8], 16) for i in (0, 8, 16)))
    return owner.system == _system() != 0 and _is_gone(owner)


def _system() -> int:
    """This boot and process namespace as 32 bits; 0 if the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read()
        namespace = os.readlink("/proc/self/ns/pid").encode()
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(boot + namespace).digest()[:4]) or 1


def _start_of(process: int) -> int | None:
    """The time at which a process of this system started; None if the system does not tell."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The second field is the program's name in parentheses. It may contain anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]) & 0xFFFFFFFF


def _is_gone(owner: Owner) -> bool:
    """Whether a process of this system has provably ended."""
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _start_of(owner.process) not in (None, owner.start)


def _is_local(path: str) -> bool:
    """Whether a path lies on a file system that no other machine can have mounted."""
    if not sys.platform.startswith("linux"):
        return False
    status = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), status) != 0:
        return False
    word = ctypes.sizeof(ctypes.c_long)
    return int.from_bytes(status.raw[:word], sys.byteorder) & 0xFFFFFFFF in _LOCAL
