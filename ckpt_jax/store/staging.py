"""Staging directories: whose they are, and when they may be removed by somebody else.

What a save writes before it is a checkpoint, and what is on its way out, lies in a *staging
directory* beside the path that it is about:

    <path>.staging-<system><process><start><chance>      eight hexadecimal digits each

The name says who made it: the running system (its boot and its process namespace, hashed), the
process in it, and when that started, so that no later process of the same number is taken for
it. Besides, the owner holds a lock (flock) on the directory while it is at work.

A staging directory is *abandoned* where its owner is provably gone: the lock is free although
the owner would have to hold it, or the process that the name tells of runs no longer.

* A free lock is proof on a file system that only this machine can have mounted, whatever the
  name says (the owner may have run before a reboot, or in a container that is gone), and on any
  other one for names of this system.
* Where directories cannot be locked, as on NFS, only the name is left, and only names of this
  system prove anything.

All else is left alone. To make a directory and to lock it are two steps; so whoever locks one
looks whether it still has its name, and nothing is removed without having been locked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

STAGING = re.compile(r"^(?P<name>.+)\.staging-(?P<owner>[0-9a-f]{16}|[0-9a-f]{32})$", re.DOTALL)

# File systems on one machine at a time, by the magic numbers of statfs(2).
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
    """What came of the attempt to lock a directory."""

    OURS = "we hold it"
    THEIRS = "somebody else holds it"
    NONE = "directories cannot be locked there"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from all others of this and other machines, then and now.

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


def staging_name(path: str) -> str:
    """A new name of a staging directory for `path`, of this process."""
    process = os.getpid()
    owner = Owner(_system(), process, _start_of(process) or 0)
    return f"{path}.staging-{owner}{secrets.token_hex(4)}"


@contextmanager
def claim(path: str) -> Iterator[str]:
    """A new staging directory for `path`, held by this process until the block ends.

    What is under its name at the end of the block is removed, as far as that is possible.
    """
    with ExitStack() as held:
        staging, lock = _new_staging(path)
        held.enter_context(lock)
        try:
            yield staging
        finally:
            # A save that failed has already said why; what stays is abandoned from now on.
            shutil.rmtree(staging, ignore_errors=True)


def _new_staging(path: str) -> tuple[str, ExitStack]:
    while True:
        staging = staging_name(path)
        os.mkdir(staging)
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(locked(staging))
            except FileNotFoundError:  # collected before it was locked
                continue
            if lock is not Lock.THEIRS and os.path.isdir(staging):
                return staging, stack.pop_all()


@contextmanager
def locked(directory: str) -> Iterator[Lock]:
    """Tries to lock a directory, without waiting, until the block ends.

    Raises:
      FileNotFoundError: there is none of this name.
      NotADirectoryError: it is something else, a link for example.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock = _lock(descriptor)
        try:
            yield lock
        finally:
            if lock is Lock.OURS:
                # Closing would not do where a forked child has the descriptor, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.THEIRS
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return Lock.NONE
        raise
    return Lock.OURS


def staging_of(path: str) -> list[str]:
    """The staging directories that are about `path`, whoever they belong to."""
    parent, name = os.path.split(path)
    with os.scandir(parent) as entries:
        found = [
            entry.path
            for entry in entries
            if entry.name.startswith(f"{name}.staging-")
            if (match := STAGING.match(entry.name)) and match["name"] == name
        ]
    return sorted(found)


def is_abandoned(staging: str) -> bool:
    """Whether the owner of a staging directory is provably gone."""
    try:
        with locked(staging) as lock:
            return _is_abandoned(staging, lock)
    except (FileNotFoundError, NotADirectoryError):
        return False


def remove_abandoned(staging: str) -> bool:
    """Removes a staging directory if its owner is provably gone.

    Returns:
      Whether it was removed.

    Raises:
      OSError: it could not be removed, or not all of it.
    """
    try:
        with locked(staging) as lock:
            if not _is_abandoned(staging, lock):
                return False
            shutil.rmtree(staging)
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False  # somebody else removed it in this moment, or it never was ours


def _is_abandoned(staging: str, lock: Lock) -> bool:
    match = STAGING.match(os.path.basename(os.path.abspath(staging)))
    if match is None or lock is Lock.THEIRS:
        return False
    digits = match["owner"]
    owner = Owner(*(int(digits[i : i + 8], 16) for i in (0, 8, 16))) if len(digits) == 32 else None
    here = owner is not None and owner.system == _system() != 0
    if lock is Lock.OURS:
        return here or _is_local(staging)
    return owner is not None and here and _is_gone(owner)


def _system() -> int:
    """This boot and process namespace as 32 bits; 0 where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read()
        namespace = os.readlink("/proc/self/ns/pid").encode()
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(boot + namespace).digest()[:4]) or 1


def _start_of(process: int) -> int | None:
    """When a process of this system started; None where the system does not tell."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The second field is a program's name, which may hold anything, in parentheses.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]) & 0xFFFFFFFF


def _is_gone(owner: Owner) -> bool:
    """Whether a process of this system has ended; one that cannot be looked at has not."""
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
