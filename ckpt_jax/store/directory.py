"""Checkpoint directories: how they are staged, published and recognised.

A checkpoint is written into a staging directory beside its destination. Then one rename gives it
the destination's name, so that a path holds a whole checkpoint or none. If there is a checkpoint
already, the two directories are exchanged in one step, and the old one is removed last.

A *prepared* directory, which is there already and empty, is *filled*, not replaced: it keeps its
owner and its mode, it may be a mount point or the working directory, and the directory above need
not be writable. The staging directory lies inside, and its contents are moved up, the manifest
last. The manifest makes the directory a checkpoint. If a crash leaves files in a prepared
directory, the staging directory is still there and shows that they are leftovers. The next save
removes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping

from ckpt_jax.errors import CheckpointNotFoundError, UnsupportedFormatError
from ckpt_jax.store import objects
from ckpt_jax.store.durable import fsync_directory, make_directories
from ckpt_jax.store.manifest import MANIFEST, META, Part, write_manifest
from ckpt_jax.store.merge import SHARDS
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, relative, require_addressable, require_room, resolved
from ckpt_jax.store.presence import is_directory, is_file, is_taken, names_in
from ckpt_jax.store.replacing import ASIDE, aside_of, exchange, is_refused, settle
from ckpt_jax.store.staging import (
    STAGING,
    Held,
    Lock,
    discard,
    held,
    is_abandoned,
    is_staging,
    joined,
    leave,
    locked,
    remove_abandoned,
    staging_name,
    staging_of,
)

_PARTS = {META, SHARDS}  # of a checkpoint, besides its manifest


def is_checkpoint(path: str) -> bool:
    """Whether there is a committed checkpoint at `path`."""
    return not is_staging(path) and is_file(os.path.join(path, MANIFEST))


def checkpoints_in(
    directory: str, is_wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """The names of the checkpoints in a directory, by number; those without a number come last.

    Args:
      directory: need not exist.
      is_wanted: says which names count. Nothing else is looked at.

    Raises:
      OSError: it is not known whether something is a checkpoint.
    """
    if is_url(directory):
        return _sorted([name for name in names_with_manifest(directory) if is_wanted(name)])
    names = filter(is_wanted, names_in(directory))
    return _sorted([name for name in names if is_checkpoint(os.path.join(directory, name))])


def visible_in(directory: str) -> list[str]:
    """`checkpoints_in` for the texts of errors and warnings: without what cannot be looked at."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        if is_url(directory):
            return _sorted(names_with_manifest(directory))
        for name in names_in(directory):
            with contextlib.suppress(OSError):
                if is_checkpoint(os.path.join(directory, name)):
                    found.append(name)
    return _sorted(found)


def names_with_manifest(url: str) -> list[str]:
    """The names of the checkpoints below a URL, in one request."""
    keys = [key.split("/") for key in objects.keys_below(url)]
    return [names[0] for names in keys if len(names) == 2 and names[1] == MANIFEST]


def _sorted(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (number_of(name) is None, number_of(name) or 0, name))


def number_of(path: str) -> int | None:
    """The number at the end of a checkpoint's name.

    >>> number_of("runs/ckpt-12"), number_of("runs/final")
    (12, None)
    """
    name = os.path.basename(path)
    found = re.search(r"-(\d{1,255})$", name)  # no file name is longer
    if found and ASIDE.match(name):  # it happens to have no letters among its digits
        return None
    return int(found.group(1)) if found else None


def require_checkpoint(path: str) -> None:
    """Checks that there is a checkpoint at `path`.

    Raises:
      CheckpointNotFoundError: there is none. The error says what is there instead, and which
        checkpoints are nearby.
      UnsupportedFormatError: a checkpoint of another library, or of format 1, is there.
      OSError: it is not known what is there.
    """
    if (library := _other_library(path)) is not None:
        raise UnsupportedFormatError(
            f"{path} was written by {library}, and ckpt_jax does not read its format. Restore it "
            f"with {library} and save it with ckpt_jax; docs/migrating.md shows how."
        )
    if is_checkpoint(path):
        return
    if is_staging(path):
        what = f"{path} is the staging directory of a save that did not finish"
        near = os.path.dirname(absolute(path))
    elif is_directory(path):
        what = f"{path} is a directory, but not a checkpoint (it has no {MANIFEST})"
        near = path
    elif is_taken(path):
        what = f"{path} is a file, not a checkpoint directory"
        near = os.path.dirname(absolute(path))
    elif aside := aside_of(path):
        what = (
            f"there is no checkpoint at {path}: a save that was to replace it has not come to its "
            f"end. The earlier one is at {aside}; the next save or manager puts it back"
        )
        near = os.path.dirname(absolute(path))
    else:
        what = f"there is no checkpoint at {path}"
        near = os.path.dirname(absolute(path))
    names = visible_in(near)
    if not names and near == path:
        near = os.path.dirname(absolute(path))
        names = visible_in(near)
    if names:
        what += f". Checkpoints in {near}: {', '.join(names[-20:])}"
    elif not is_directory(near):
        absent = f". The directory {near} does not exist"
        if near.startswith("gs://"):  # Google's store does not tell
            absent += ", or there is no such bucket"
        if is_url(near):
            absent += ", or this program may not list it"
        what += f". {near} is a file" if is_taken(near) else absent
    else:
        what += f". There are no checkpoints in {near}"
    raise CheckpointNotFoundError(what)


def _other_library(path: str) -> str | None:
    """The other library, or version of this one, that wrote the checkpoint at `path`; None if none
    did."""
    if is_url(path):
        return None
    return "ckpt_jax before its first release (format 1)" if _has_format_1(path) else None


def _has_format_1(path: str) -> bool:
    old, new = (os.path.join(path, name) for name in ("manifest.ocdbt", MANIFEST))
    is_old = is_file(old) and is_directory(os.path.join(path, SHARDS))
    return is_old and not is_taken(new) and not is_staging(path)


def others_in(directory: str) -> dict[str, str]:
    """The numbered checkpoints of other libraries in a directory, or the directory itself if it is
    one.

    Returns:
      The name of the library by the name of the checkpoint ("." for the directory itself). What
      this process may not look into is left out.
    """
    found = {".": library} if (library := _other_library(directory)) else {}
    names = names_in(directory)
    for name in names:
        with contextlib.suppress(PermissionError):
            if (other := _numbered_of_other(directory, name, names)) is not None:
                found[name.removesuffix(".index")] = other
    return found


def _numbered_of_other(directory: str, name: str, names: list[str]) -> str | None:
    """The name of the library that wrote a numbered checkpoint; None if none did."""
    path = os.path.join(directory, name)
    stem = name.removesuffix(".index")
    if stem != name and re.search(r"\d$", stem) and is_file(path):
        is_whole = any(each.startswith(f"{stem}.data-") for each in names)
        return "TensorFlow" if is_whole else None
    if not re.search(r"\d$", name) or not is_directory(path) or is_checkpoint(path):
        return None
    return _other_library(path)


class Staging:
    """The place where a checkpoint is written before it gets its name.

    Attributes:
      path: where the checkpoint will be.
      directory: the staging directory: beside the path, or in the prepared directory there.
      mark: none, because the directory is this attempt's alone.
    """

    mark = ""

    def __init__(self, path: str, directory: str):
        self.path, self.directory = path, directory
        self._held: Held | None = None  # while this process holds the directory

    @classmethod
    def of(cls, path: str, token: str) -> Staging:
        """The staging for `path`. A token makes its name unique, see `store.staging`.

        Raises:
          CheckpointError: TensorStore cannot name the path.
          OSError: a name, or the path, is too long.
        """
        path = resolved(path)  # a link stays, and its target is replaced
        require_addressable(path)
        require_room(path)
        suffix = f".staging-{token}"
        if _is_prepared(path):
            return cls(path, os.path.join(path, MANIFEST) + suffix)
        require_room(path, suffix)
        return cls(path, path + suffix)

    @property
    def is_inside(self) -> bool:
        """Whether it lies in the prepared directory at its path."""
        return os.path.dirname(self.directory) == self.path

    @contextlib.contextmanager
    def claimed(self, *, overwrite: bool, durable: bool, keeps: bool = False) -> Iterator[None]:
        """Makes the directory and holds it until the block ends.

        At the end, the directory under the staging name is removed. After an exchange this is the
        old checkpoint. If the block fails, it is the unfinished checkpoint, which is removed when
        all processes have left it; if `keeps` is set, it stays for another attempt with this token.

        The leftovers of abandoned saves to the same path are removed first, because they may be
        what fills the disk.

        Raises:
          FileExistsError: there is something at the path that may not be replaced.
        """
        check_replaceable(self.path, overwrite)
        self.make_parents(durable)
        # Another process of this run may have made the directory already.
        if self.is_inside:
            _remove_unfinished(self.path, keep=self.directory)
        else:
            settle(self.path, keep=self.directory)
            check_replaceable(self.path, overwrite)  # an earlier one may be there again
        try:
            with joined(self.directory) as self._held:
                if not self.is_inside:
                    _keep_access(self.path, self.directory)
                yield
        except BaseException:
            if not keeps:
                leave(self.directory, lambda: shutil.rmtree(self.directory, ignore_errors=True))
            raise
        discard(self.directory)

    def make_parents(self, durable: bool) -> None:
        """Makes the missing directories above the checkpoint."""
        parent = os.path.dirname(self.path)
        if durable:
            make_directories(parent)
        else:
            os.makedirs(parent, exist_ok=True)

    def written(self) -> frozenset[str]:
        """The names of the files in the directory, relative to it."""
        found = [
            relative(os.path.join(above, name), self.directory)
            for above, _, names in os.walk(self.directory)
            for name in names
        ]
        return frozenset(found)

    def check(self) -> None:
        """Checks that the directory is the one that this process has held from the beginning.

        Raises:
          CheckpointError: it was taken away, with all that was written into it.
        """
        assert self._held is not None
        self._held.check()

    def complete(self, parts: Mapping[str, Part], *, durable: bool) -> None:
        """Makes the directory a whole checkpoint, which only lacks its name.

        Raises:
          CheckpointError: the directory was taken away.
        """
        self.check()
        write_manifest(self.directory, parts, durable=durable)
        if durable:
            fsync_directory(os.path.dirname(self.directory))

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Gives the checkpoint its name. If that cannot be made durable, it is undone.

        Raises:
          CheckpointError: the directory was taken away.
          FileExistsError: there is something at the path that may not be replaced.
        """
        self.check()
        if self.is_inside:
            _fill(self.path, self.directory, durable=durable)
        else:
            _publish(self.directory, self.path, overwrite=overwrite, durable=durable)

    def is_committed(self) -> bool:
        """Nothing is ever in doubt."""
        return False

    @contextlib.contextmanager
    def joined(
        self, shards: str, prefix: str, *, durable: bool, is_lost: Callable[[], bool]
    ) -> Iterator[None]:
        """Holds the directory for a process that does not publish it. If the block fails, what
        this process wrote is removed.

        The process may be late: the others have finished and removed the directory, and this
        process has created it again.

        Args:
          shards: directory below the staging directory.
          prefix: the beginning of the names of this process's directories in `shards`.
          durable: whether the directories above have to survive a crash of the machine.
          is_lost: called if the block fails. Says whether no process can publish the directory
            any more.
        """

        def remove_own() -> None:
            for name in os.listdir(shards):
                if name.startswith(prefix):
                    shutil.rmtree(os.path.join(shards, name), ignore_errors=True)
            os.rmdir(shards)  # fails as long as another process has something in it
            os.rmdir(self.directory)

        self.make_parents(durable)
        try:
            with joined(self.directory) as self._held:
                yield
        except BaseException:
            if is_lost():
                leave(self.directory, remove_own)
            else:
                with contextlib.suppress(OSError):
                    remove_abandoned(self.directory)
            raise


@contextlib.contextmanager
def removing(path: str) -> Iterator[Callable[[], None] | None]:
    """Renames the checkpoint at an absolute path, so that it can be removed while the block runs;
    see `Storage.removing`. If there is a link, only the link is removed."""
    if not is_taken(path):
        yield None
        return
    require_checkpoint(path)
    try:
        if os.path.islink(path):
            os.unlink(path)
            yield None
            return
        with held(path):
            aside = staging_name(path)
            require_room(path, aside[len(path) :])
            os.rename(path, aside)
            try:
                # Otherwise a power failure could remove parts of it, but keep its old name.
                fsync_directory(os.path.dirname(path))
            except OSError:
                os.rename(aside, path)
                raise
            yield lambda: shutil.rmtree(aside)
    except FileNotFoundError:
        if is_taken(path):
            raise
        # Another process has just removed it.


def check_replaceable(path: str, overwrite: bool) -> None:
    """Checks that a checkpoint may be written to `path`.

    Raises:
      FileExistsError: there is something at the path that may not be replaced.
    """
    if not is_taken(path):
        return
    if is_checkpoint(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace the checkpoint")
        if (what := _why_not_renamed(path)) is not None:
            raise FileExistsError(
                f"{path} is {what}. A checkpoint is replaced by renaming, which is not possible "
                "there; nothing was written. Save to a name below it, or remove its contents first."
            )
    elif not _is_prepared(path):
        raise FileExistsError(
            f"{path} exists and is not a checkpoint; it is not replaced. Save under another name, "
            "or remove it first."
        )


def _is_prepared(path: str) -> bool:
    """Whether there is a directory that is empty except for leftovers of unfinished saves."""
    try:
        names = {*os.listdir(path)}
    except (FileNotFoundError, NotADirectoryError):
        return False
    staged = {name for name in names if (of := STAGING.match(name)) and of["name"] == MANIFEST}
    return not names or (bool(staged) and names - staged <= _PARTS)


def _why_not_renamed(path: str) -> str | None:
    """Why the directory at `path` cannot be renamed; None if it can."""
    with contextlib.suppress(OSError):  # the working directory may have been removed
        here = os.getcwd()
        if here == path:
            return "the working directory"
        if here.startswith(f"{path}{os.sep}"):
            return f"above the working directory {here}"
    return "a mount point" if os.path.ismount(path) or path in _mount_points() else None


def _mount_points() -> set[str]:
    """The mount points of this system; `os.path.ismount` does not see bind mounts."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            fields = [line.split()[4] for line in file]
    except (OSError, IndexError):
        return set()
    escape = re.compile(rb"\\([0-7]{3})")
    return {os.fsdecode(escape.sub(lambda m: bytes([int(m[1], 8)]), field)) for field in fields}


def _keep_access(old: str, new: str) -> None:
    """Gives a directory the owner, the group and the mode of the one that it will replace, as far
    as this process may."""
    try:
        status, own = os.lstat(old), os.stat(new)
    except OSError:
        return
    if not stat.S_ISDIR(status.st_mode):
        return
    with contextlib.suppress(OSError):
        if status.st_gid != own.st_gid:
            os.chown(new, -1, status.st_gid)
    with contextlib.suppress(OSError):
        if status.st_uid != own.st_uid:
            os.chown(new, status.st_uid, -1)
    mode = stat.S_IMODE(status.st_mode) | stat.S_IRWXU  # this save has to write there
    with contextlib.suppress(OSError):
        if mode != stat.S_IMODE(own.st_mode):
            os.chmod(new, mode)


def _remove_unfinished(path: str, keep: str) -> None:
    """Removes what saves that did not finish have left in a prepared directory, except `keep`."""
    manifest = os.path.join(path, MANIFEST)
    with locked(path) as lock:
        staged = [staging for staging in staging_of(manifest) if staging != keep]
        if lock is Lock.THEIRS or not all([is_abandoned(staging) for staging in staged]):
            return
        for name in _PARTS if staged else ():  # before the staging, which marks them as leftovers
            shutil.rmtree(os.path.join(path, name), ignore_errors=True)
        settle(manifest, keep=keep)


def _fill(path: str, staging: str, *, durable: bool) -> None:
    """Moves the contents of `staging`, which lies in `path`, up into `path`. After a failure they
    are moved back."""
    moved: list[str] = []
    with locked(path) as lock:
        if lock is Lock.THEIRS or not _PARTS.isdisjoint(os.listdir(path)) or is_checkpoint(path):
            raise FileExistsError(
                f"{path}: expected a directory that stays empty until the save ends, but another "
                "save has put its checkpoint there. Save again, or under another name."
            )
        try:
            for name in sorted(os.listdir(staging), key=lambda name: (name == MANIFEST, name)):
                if name == MANIFEST and durable:
                    fsync_directory(path)  # otherwise it could survive a power failure alone
                os.rename(os.path.join(staging, name), os.path.join(path, name))
                moved.append(name)
            if durable:
                fsync_directory(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the manifest goes back first: it needs all parts
                for name in reversed(moved):
                    os.rename(os.path.join(path, name), os.path.join(staging, name))
            raise


def _publish(staging: str, path: str, *, overwrite: bool, durable: bool) -> None:
    """Gives `staging` the name `path`. If that cannot be made durable, it is undone."""
    new = os.stat(staging)
    with contextlib.ExitStack() as exits:
        with contextlib.suppress(FileNotFoundError):
            # The old checkpoint may have to come back. Until then it has a staging name, and must
            # not be taken for abandoned.
            exits.enter_context(held(path))
        undo = _take_name(staging, path, overwrite)
        if not durable:
            return
        try:
            fsync_directory(os.path.dirname(path))
        except OSError:
            # If another save has replaced the checkpoint meanwhile, there is nothing to undo.
            if os.path.samestat(new, os.stat(path)):
                undo()
            raise


def _take_name(staging: str, path: str, overwrite: bool) -> Callable[[], object]:
    """Renames `staging` to `path`, and a checkpoint at `path` to `staging`.

    Returns:
      A function that undoes this.
    """
    try:
        os.rename(staging, path)
        return lambda: os.rename(path, staging)
    except OSError as error:
        if not is_refused(error, path):
            raise
    check_replaceable(path, overwrite)
    exchange(staging, path)
    return lambda: exchange(staging, path)
