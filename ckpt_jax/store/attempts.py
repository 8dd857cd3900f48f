"""Attempts: how a checkpoint is saved to an object store, and removed from it.

Nothing can be renamed in a store, so each *attempt* to save writes below the final URL, under names
that bear its *mark*: the time, and a token that no other attempt has.

    run/ckpt-7/manifest.ckpt
    run/ckpt-7/meta/index-6743f1a0-<token>
    run/ckpt-7/shards/6743f1a0-<token>-00000-00000/...

The manifest is the commit. It is written in one request, on the condition that the present one is
still the one that was there when the attempt began, or that there still is none. So one of several
attempts wins, and the others get an error. Who reads sees the old manifest or the new one, and
through it the values of one attempt alone.

If the store does not say what has become of the manifest, the commit is *in doubt*: the request may
arrive at any later time. Then nothing is removed. An attempt removes what it has written if it has
failed before it asked for the commit, or if another one has won. All other remains are collected
when they are old.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from ckpt_jax.errors import CheckpointError, CommitInDoubtError
from ckpt_jax.store import objects
from ckpt_jax.store.index import Index
from ckpt_jax.store.manifest import (
    INDEX,
    INDEX_KEY,
    MANIFEST,
    META,
    Part,
    manifest_of,
    part_path,
    parts_in,
    read_part,
)
from ckpt_jax.store.merge import SHARDS
from ckpt_jax.store.objects import ABSENT, Found
from ckpt_jax.store.paths import absolute, below
from ckpt_jax.store.staging import GRACE_SECONDS
from ckpt_jax.store.stream import file_path
from ckpt_jax.store.workers import Workers

_MARK = re.compile(r"(?P<time>[0-9a-f]{8})-(?P<token>[0-9a-f]{32})")
_DOUBT_SECONDS = 20.0  # to learn what has become of a commit
_PAUSE_SECONDS = 0.5

_log = logging.getLogger("ckpt_jax")


class Attempt:
    """An attempt to save a checkpoint to an object store.

    Args:
      path: the URL of the checkpoint.
      token: 32 hexadecimal digits, the same on all processes.
      clock: returns the time in seconds since the epoch.

    Attributes:
      path, directory: the URL.
      mark: in the names of all that this process writes.
    """

    def __init__(self, path: str, token: str, clock: Callable[[], float] = time.time):
        self.path = self.directory = absolute(path)
        self._token = token
        self.mark = f"{int(clock()):08x}-{token}"
        self._manifest = f"{self.path}/{MANIFEST}"
        self._before: Found | None = None  # the manifest that this one replaces
        self._data = b""  # of the manifest of this attempt
        self._may_appear = False  # the commit was asked for, and nobody else has won

    @contextlib.contextmanager
    def claimed(self, *, overwrite: bool, durable: bool, keeps: bool = False) -> Iterator[None]:
        """Notes what is at the URL. If the block fails before the commit, what the attempt has
        written is removed, unless `keeps` says that another attempt may go on from there. If it
        succeeds, the checkpoint that was replaced is removed.

        Raises:
          FileExistsError: there is a checkpoint that may not be replaced.
        """
        self._before = objects.read(self._manifest)
        self._check_replaceable(overwrite)
        try:
            yield
        except BaseException:  # an interrupt, too: it does not call a request back
            if not (keeps or self._may_appear):
                self._remove_all(self._token)
            raise
        if self._before is not None:
            kept = {self._manifest, *values_of(self.path, self._data)}
            _remove(each for each in values_of(self.path, self._before.value) if each not in kept)

    @contextlib.contextmanager
    def joined(
        self, shards: str, prefix: str, *, durable: bool, is_lost: Callable[[], bool]
    ) -> Iterator[None]:
        """The same for a process that does not commit. What it has written is removed if the block
        fails and `is_lost` says that no process can commit it any more."""
        try:
            yield
        except BaseException:
            if is_lost():
                self._remove_all(self.mark)
            raise

    def written(self) -> frozenset[str]:
        """What an earlier attempt with this token has written, as far as the store tells. This one
        takes over its mark, and goes on from there."""
        try:
            found = objects.keys_below(self.path)
        except PermissionError:
            return frozenset()
        marks = [mark for key in found if (mark := _MARK.search(key))]
        own = sorted(mark[0] for mark in marks if mark["token"] == self._token)
        if own:
            self.mark = own[-1]
        return frozenset(key for key in found if self.mark in key)

    def check(self) -> None:
        """Nobody takes anything away: the names are this attempt's alone."""

    def complete(self, parts: Mapping[str, Part], *, durable: bool) -> None:
        """Notes the parts of the checkpoint, which are written."""
        self._data = manifest_of(parts)

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Commits the checkpoint.

        Raises:
          FileExistsError: another save has committed one since this one has begun, or there was one
            that may not be replaced.
          CommitInDoubtError: the store did not say whether it is committed.
        """
        self._check_replaceable(overwrite)
        expected = ABSENT if self._before is None else self._before.generation
        self._may_appear = True
        try:
            if objects.write(self._manifest, self._data, expected) is not None:
                return
            # If a reply was lost, TensorStore has asked again, and has met its own manifest.
            # If a bucket is missing, reading says so.
            if not self._is_ours(objects.read(self._manifest)):
                raise self._overtaken()
        except _OvertakenError:
            raise
        except OSError as error:
            self._settle(expected, error)

    def is_committed(self) -> bool:
        """Whether a commit that was in doubt has come to pass.

        Raises:
          OSError: this is still not known.
        """
        return self._is_ours(objects.read(self._manifest))

    def _settle(self, expected: bytes, error: OSError) -> None:
        """Finds out what has become of the manifest after an error."""
        deadline = time.monotonic() + _DOUBT_SECONDS
        while True:
            with contextlib.suppress(OSError):
                found = objects.read(self._manifest)
                if self._is_ours(found):
                    return
                if (ABSENT if found is None else found.generation) != expected:
                    raise self._overtaken() from error
            if isinstance(error, PermissionError | objects.NoSuchBucketError):
                raise error  # it was refused, at least when it was asked for last
            if time.monotonic() >= deadline:
                raise CommitInDoubtError(
                    f"{self.path}: the store did not say whether it has committed this checkpoint "
                    f"({error.strerror}), and may still do so. Nothing was removed. Save again: "
                    "the next save finds out, and goes on from there."
                ) from error
            time.sleep(_PAUSE_SECONDS)

    def _is_ours(self, found: Found | None) -> bool:
        return found is not None and found.value == self._data

    def _check_replaceable(self, overwrite: bool) -> None:
        if self._before is not None and not overwrite:
            raise FileExistsError(
                f"{self.path} exists; pass overwrite=True to replace the checkpoint"
            )

    def _overtaken(self) -> _OvertakenError:
        self._may_appear = False
        return _OvertakenError(
            errno.EEXIST,
            "expected what was there when this save began, but another save has committed its "
            "checkpoint meanwhile, or has removed one. Save again, or under another name",
            self.path,
        )

    def _remove_all(self, mark: str) -> None:
        """Removes what bears a mark, as far as possible."""
        # Errors are not raised: the save has said why it has failed. What stays is collected later.
        with contextlib.suppress(OSError):
            found = objects.keys_below(self.path)
            _remove(f"{self.path}/{key}" for key in found if mark in key)


class _OvertakenError(FileExistsError):
    """Another attempt has won."""


def values_of(path: str, manifest: bytes) -> list[str]:
    """The URLs of all values of a checkpoint, the manifest first.

    Args:
      path: the URL of the checkpoint.
      manifest: its contents. If it is damaged, or what it names, the list is not complete.
    """
    found = [f"{path}/{MANIFEST}"]
    with contextlib.suppress(CheckpointError, OSError):
        parts = parts_in(manifest)
        found += [part_path(path, part) for part in parts.values()]
        index = _index_of(path, parts)
        for shard in index.shards:
            directory = below(path, shard.directory)
            found += [file_path(directory, number) for number in range(shard.files)]
            found.append(os.path.join(directory, INDEX))
    return found


def _index_of(path: str, parts: Mapping[str, Part]) -> Index:
    return Index.from_bytes(read_part(path, parts[INDEX_KEY]))


def taken_away(path: str) -> Callable[[], None] | None:
    """Removes the manifest of the checkpoint at a URL. What other attempts have written stays.

    Returns:
      A function that removes the other values; None if there is no checkpoint, or if it has just
      been replaced.

    Raises:
      OSError: it is not known whether it was removed.
    """
    found = objects.read(f"{path}/{MANIFEST}")
    if found is None:
        return None
    manifest, *others = values_of(path, found.value)
    if not objects.delete(manifest, found.generation):
        return None

    return lambda: _delete_all(others)


def saved_at(path: str) -> float | None:
    """When the checkpoint at a URL was saved, in seconds since the epoch; None if there is none, or
    if its names do not tell."""
    found = objects.read(f"{path}/{MANIFEST}")
    return None if found is None else _time_of(found.value)


def _time_of(manifest: bytes) -> float | None:
    times = [_MARK.search(part.file) for part in parts_in(manifest).values()]
    return max([int(each["time"], 16) for each in times if each], default=None)


def remains_in(
    directory: str, is_wanted: Callable[[str], bool], clock: Callable[[], float] = time.time
) -> list[str]:
    """What attempts have left below a URL that have not been committed, and are old.

    Args:
      directory: a URL with checkpoints below it.
      is_wanted: says which names of checkpoints count.
      clock: returns the time in seconds since the epoch.

    Returns:
      URLs, each with a mark: `collect` removes what bears it.
    """
    remains: dict[str, set[str]] = {}
    for key in objects.keys_below(directory):
        name, *names = key.split("/")
        mark = _MARK.search("/".join(names))
        if mark and names[0] in (META, SHARDS) and is_wanted(name):
            remains.setdefault(name, set()).add(mark[0])
    found: list[str] = []
    for name, marks in sorted(remains.items()):
        path = f"{directory}/{name}"
        used = _marks_of(path)
        if used is None:  # it is not known what is used
            continue
        # What processes of one attempt write differs in the time alone.
        newest: dict[str, int] = {}
        for each in marks:
            when, token = int(each[:8], 16), each[9:]
            newest[token] = max(newest.get(token, 0), when)
        for each in sorted(marks):
            token = each[9:]
            if token not in used and clock() - newest[token] >= GRACE_SECONDS:
                found.append(f"{path}/*{each}*")
    return found


def collect(remains: str) -> bool:
    """Removes what `remains_in` has found; returns whether there was something."""
    path, mark = remains.rstrip("*").split("/*")
    found = [key for key in objects.keys_below(path) if mark in key]
    _delete_all(f"{path}/{key}" for key in found)
    return bool(found)


def _marks_of(path: str) -> set[str] | None:
    """The tokens of attempts whose values the checkpoint at a URL uses; None if it cannot be
    read."""
    found = objects.read(f"{path}/{MANIFEST}")
    if found is None:
        return set()
    try:
        parts = parts_in(found.value)
        index = _index_of(path, parts)
    except (CheckpointError, KeyError):
        return None
    names = [*(part.file for part in parts.values()), *(each.directory for each in index.shards)]
    return {mark["token"] for name in names if (mark := _MARK.search(name))}


def _delete_all(urls: Iterable[str]) -> None:
    with Workers(objects.PARALLEL, "ckpt-remove") as workers:
        list(workers.map(objects.delete, urls))


def _remove(urls: Iterable[str]) -> None:
    """Removes values, as far as possible: who may save may not be allowed to remove."""
    with Workers(objects.PARALLEL, "ckpt-remove") as workers:
        for removal in [workers.submit(objects.delete, url) for url in urls]:
            try:
                removal.result()
            except OSError as error:
                _log.info("what is no longer needed stays: %s", error)
