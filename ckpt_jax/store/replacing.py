"""Replacing: a directory or a file takes the name of another one.

One call of the system does this if the file system can exchange two names (directories), or rename
over what is there (files). Some can do neither: NFS does not exchange names, and sshfs renames
nothing over anything. There the old one is first set *aside*, under another name:

    <path>.replaced-<the owner's 32 hexadecimal digits, as in the names of staging>    a directory
    <path>.replaced                                                                    a small file

If the process is killed at this moment, nothing is at the path. Then a checkpoint that was set
aside is *put back*: by the next save to the path, by the next manager, or when the latest
checkpoint is looked for. This may happen at any time, because it only takes a name that is free: a
process that is replacing the checkpoint at this moment notices it, and sets it aside again. What
was set aside and has a successor is removed like abandoned staging.

A small file is read where it was set aside as long as nothing is at its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import sys
from collections.abc import Callable

from ckpt_jax.store.durable import fsync_directory
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.presence import is_directory, is_taken, names_in
from ckpt_jax.store.staging import (
    OWNER,
    STAGING,
    Lock,
    locked,
    new_owner,
    owned_path,
    remove_abandoned,
)

ASIDE = re.compile(rf"^(?P<name>.+)\.replaced-(?P<owner>{OWNER})$", re.DOTALL)
_ATTEMPTS = 8  # to replace what others put back again and again
# How systems say that there is something at the path: sshfs passes on "failure".
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM)

_log = logging.getLogger("ckpt_jax")


def is_refused(error: OSError, path: str) -> bool:
    """Whether a rename to `path` may have failed because there is something."""
    return error.errno in _TAKEN and is_taken(path)


def replace(new: str, path: str) -> None:
    """Gives a file the name `path`. What was there before is removed.

    Raises:
      OSError: this is not possible; nothing was changed.
    """
    aside = set_aside(path)
    try:
        os.replace(new, path)
    except OSError as error:
        if not is_refused(error, path) or is_directory(path):
            raise
        with contextlib.suppress(FileNotFoundError):  # of a process that was killed later than that
            os.unlink(aside)
        _put_in_place(new, path, lambda: aside, error)
    with contextlib.suppress(OSError):  # it has a successor, and the next call removes it
        os.unlink(aside)


def set_aside(path: str) -> str:
    """Where a small file is while another one takes its place."""
    return f"{path}.replaced"


def exchange(new: str, path: str) -> None:
    """Gives a directory the name `path`, and the name `new` to the directory there.

    Raises:
      OSError: this is not possible; nothing was changed.
    """
    if _exchange(new, path):
        return
    aside = _put_in_place(new, path, lambda: f"{path}.replaced-{new_owner()}", None)
    try:
        os.rename(aside, new)
    except FileNotFoundError:  # another process has removed what was there
        pass
    except OSError:
        os.rename(path, new)
        os.rename(aside, path)
        raise


def _put_in_place(new: str, path: str, new_name: Callable[[], str], refusal: OSError | None) -> str:
    """Gives `new` the name `path`. Returns the new name of what was there.

    Args:
      new_name: makes it.
      refusal: raised if what is there cannot be set aside.
    """
    attempts = _ATTEMPTS
    while True:
        aside = new_name()
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # another process has done so, or has removed it
            pass
        except OSError as error:
            raise refusal or error from None
        try:
            os.rename(new, path)
            return aside
        except OSError as error:
            with contextlib.suppress(OSError):  # others may have put it back
                os.rename(aside, path)
            attempts -= 1
            if not (attempts and is_refused(error, path)):
                raise


def _exchange(one: str, other: str) -> bool:
    """Swaps two names in one step with Linux's renameat2; False if that is impossible."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), one, None, other)


# --- what a killed process has left ------------------------------------------------------


def aside_of(path: str) -> str | None:
    """Where what was at `path` was set aside; the newest if there are several, None if none is.

    Raises:
      OSError: this is not known.
    """
    if is_url(path):
        return None
    above, name = os.path.split(os.path.abspath(path))
    found = [os.path.join(above, each) for each in names_in(above) if _is_for(ASIDE, each, name)]
    return max(found, key=_changed, default=None)


def settle(path: str, keep: str | None = None) -> None:
    """Puts back the checkpoint that was set aside for `path`, if nothing is there. Removes
    abandoned staging for `path`, and what was set aside and has a successor.

    Args:
      path: of a checkpoint or of a small file.
      keep: staging for `path` that stays, because it is the present work.
    """
    above, name = os.path.split(os.path.abspath(path))
    beginning = f"{name}."
    left = [
        os.path.join(above, each)
        for each in os.listdir(above)
        if each.startswith(beginning)
        and (_is_for(STAGING, each, name) or _is_for(ASIDE, each, name))
    ]
    for each in sorted(left, key=_changed, reverse=True):  # of several, the newest is put back
        if each != keep:
            _settle(each)


def settle_in(directory: str, is_wanted: Callable[[str], bool]) -> None:
    """Puts back the checkpoints of a directory that were set aside and have no successor.

    Args:
      directory: need not exist.
      is_wanted: says for which names.
    """
    if is_url(directory):  # there every save commits with one request
        return
    with contextlib.suppress(OSError):  # it is only looked at
        found = [(name, ASIDE.match(name)) for name in names_in(directory)]
        wanted = [name for name, match in found if match and is_wanted(match["name"])]
        paths = [os.path.join(directory, name) for name in wanted]
        for aside in sorted(paths, key=_changed, reverse=True):
            _put_back(aside)


def _settle(left: str) -> None:
    """Puts back or removes what is left, as far as possible."""
    try:
        is_last = ASIDE.match(os.path.basename(left)) and not is_taken(owned_path(left))
        if is_last:
            _put_back(left)
        else:
            remove_abandoned(left)
    except FileNotFoundError:  # another process is removing it
        pass
    except OSError as error:  # new work can begin all the same
        _log.warning("%s is abandoned, but could not be removed: %s", left, error)


def _put_back(aside: str) -> None:
    """Gives a checkpoint its path back, unless another one is there or a process is at work."""
    path = owned_path(aside)
    if not is_directory(aside) or is_taken(path):
        return
    with contextlib.suppress(OSError), locked(aside) as lock:
        if lock is Lock.THEIRS:
            return
        os.rename(aside, path)  # it is a directory, so it cannot replace another one
        _log.warning(
            "%s: a save that was to replace this checkpoint was killed before the new one was in "
            "its place. The earlier one is there again.",
            path,
        )
        fsync_directory(os.path.dirname(path))


def _is_for(kind: re.Pattern[str], left: str, name: str) -> bool:
    found = kind.match(left)
    return found is not None and found["name"] == name


def _changed(path: str) -> float:
    with contextlib.suppress(OSError):  # it has just been put back
        return os.lstat(path).st_mtime
    return 0.0
