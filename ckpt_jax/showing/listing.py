"""The checkpoints of a directory, of all formats, without opening them.

Of a checkpoint of this library, the manifest and the index are compared with their digests, and the
sizes of its files with those that the index lists. A checkpoint of another library is opened, which
reads its headers.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_jax.api.latest import latest_checkpoint
from ckpt_jax.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_jax.graph.metadata import METADATA_KEY, decode
from ckpt_jax.manage.retention import CheckpointRecord, KeepBest
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats import foreign_steps, format_of
from ckpt_jax.showing.contents import OWN_FORMAT
from ckpt_jax.store.attempts import remains_in
from ckpt_jax.store.directory import is_checkpoint, number_of, others_in
from ckpt_jax.store.glance import glance
from ckpt_jax.store.looks import looking
from ckpt_jax.store.notes import Notes, read_notes
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, relative
from ckpt_jax.store.presence import is_directory, is_taken, names_in
from ckpt_jax.store.staging import STAGING, why_kept
from ckpt_jax.store.state_file import STATE_FILE
from ckpt_jax.store.storage import storage_of


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint of a directory.

    Attributes:
      name, path: of the checkpoint.
      format: the name of its format.
      step: the number in its name; None if there is none.
      time: when it was committed or copied there, in seconds since the epoch; None if an object
        store does not tell.
      nbytes: the size of its values; None if it is damaged.
      metrics: that it was saved with.
      metadata: what the program said about it.
      problem: why it is damaged or cannot be read; "" if nothing is known to be wrong.
      is_damaged: whether it is damaged, and not only of another version of the format.
      is_latest: whether it is what `latest_checkpoint` returns.
      is_abandoned: whether the program went back to an earlier step, and saved from there.
      best: the metrics of which it has the best value.
    """

    name: str
    path: str
    format: str
    step: int | None
    time: float | None
    nbytes: int | None
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    problem: str = ""
    is_damaged: bool = False
    is_latest: bool = False
    is_abandoned: bool = False
    best: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The checkpoint as it stands in JSON."""
        return {
            "name": self.name,
            "path": self.path,
            "format": self.format,
            "step": self.step,
            "time": self.time,
            "nbytes": self.nbytes,
            "metrics": dict(self.metrics),
            "metadata": dict(self.metadata),
            "ok": not self.problem,
            "damaged": self.is_damaged,
            "problem": self.problem or None,
            "latest": self.is_latest,
            "abandoned": self.is_abandoned,
            "best": list(self.best),
        }


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a save that is running or did not finish, or a removal, has left.

    Attributes:
      path: of the staging directory or file.
      why_kept: why it may still be needed; None if `gc` would remove it.
    """

    path: str
    why_kept: str | None

    def as_json(self) -> dict[str, Any]:
        """It as it stands in JSON."""
        return {"path": self.path, "abandoned": self.why_kept is None, "why": self.why_kept}


@dataclass(frozen=True, slots=True)
class Listing:
    """What a directory holds.

    Attributes:
      directory: its path.
      checkpoints: in the order of their numbers.
      unfinished: staging directories and files.
      maximized: the metrics of which the largest value is the best.
      note: why the latest checkpoint or the metrics are not known; "" if they are.
    """

    directory: str
    checkpoints: tuple[Listed, ...]
    unfinished: tuple[Unfinished, ...]
    maximized: frozenset[str] = frozenset()
    note: str = ""


def listing(directory: str, maximized: Collection[str] = ()) -> Listing:
    """What a directory holds.

    Args:
      directory: its path.
      maximized: the metrics of which the largest value is the best; of others it is the smallest.

    Raises:
      CheckpointNotFoundError: there is no directory.
    """
    if not is_directory(directory):
        what = "is a file, no directory" if is_taken(directory) else "does not exist"
        raise CheckpointNotFoundError(f"{directory} {what}; ls takes a directory of checkpoints")
    notes, note = _notes(directory)
    found = _at(directory, notes)
    if not found and (others := others_in(directory)):
        libraries = ", ".join(sorted({*others.values()}))
        note = note or f"there are checkpoints of {libraries}, which cannot be read here"
    latest = None
    if is_taken(os.path.join(directory, STATE_FILE)) or any([e.step is not None for e in found]):
        try:
            latest = latest_checkpoint(directory)
        except (ValueError, UnsupportedFormatError) as error:
            note = note or str(error)
    best = _best(found, maximized)
    found = [
        replace(
            each,
            is_latest=latest is not None and absolute(each.path) == absolute(latest),
            best=tuple([metric for metric, path in best.items() if path == each.path]),
        )
        for each in found
    ]
    found.sort(key=lambda each: (each.step is None, each.step or 0, each.name))
    left = unfinished(directory)
    return Listing(directory, tuple(found), left, frozenset(maximized), note)


def _at(directory: str, notes: Notes) -> list[Listed]:
    """The directory itself if it is a checkpoint, or else those in it.

    To some formats, a directory that holds a file of theirs is a checkpoint. It is none if it holds
    checkpoints of this library, too.
    """
    inside = [] if is_checkpoint(directory) else _inside(directory, notes)
    if not any([each.format == OWN_FORMAT for each in inside]):
        itself = _listed(directory, ".", notes)
        if itself is not None:
            return [itself]
    return inside


def _inside(directory: str, notes: Notes) -> list[Listed]:
    with looking(absolute(directory)):
        found = {
            name: listed
            for name in names_in(directory)
            if STAGING.match(name) is None
            and (listed := _listed(os.path.join(directory, name), name, notes)) is not None
        }
        for step, path in foreign_steps(absolute(directory)).items():
            name = relative(path, absolute(directory))
            listed = found.get(name) or _foreign(os.path.join(directory, name), name)
            if listed is not None:
                found[name] = replace(listed, step=step)
        return [*found.values()]


def unfinished(directory: str) -> tuple[Unfinished, ...]:
    """The staging directories and files in a directory, or what is old and unused in a store."""
    if is_url(directory):
        return tuple([Unfinished(path, None) for path in remains_in(directory, lambda name: True)])
    paths = [os.path.join(directory, name) for name in names_in(directory) if STAGING.match(name)]
    return tuple([Unfinished(path, why_kept(path)) for path in paths])


def _notes(directory: str) -> tuple[Notes, str]:
    try:
        return read_notes(directory) or Notes(), ""
    except ValueError as error:
        return Notes(), f"the metrics are not known: {error}"


def _listed(path: str, name: str, notes: Notes) -> Listed | None:
    """What is at a path; None if it is no checkpoint."""
    if not is_checkpoint(path):
        return _foreign(path, name) if format_of(absolute(path)) is not None else None
    problem, nbytes, is_damaged = "", None, False
    metadata: Mapping[str, Any] = {}
    try:
        found = glance(path, [METADATA_KEY])
        if METADATA_KEY in found.small:
            metadata = decode(found.small[METADATA_KEY])
        nbytes = found.nbytes
    except (CheckpointError, OSError) as error:
        problem, is_damaged = str(error), isinstance(error, CorruptCheckpointError)
    return Listed(
        name,
        path,
        OWN_FORMAT,
        number_of(path),
        storage_of(path).saved_at(path),
        nbytes,
        notes.metrics.get(name, {}),
        metadata,
        problem,
        is_damaged,
        is_abandoned=name in notes.abandoned,
    )


def _foreign(path: str, name: str) -> Listed | None:
    """A checkpoint of another library; None if it is none that can be read here."""
    found = format_of(absolute(path))
    problem, nbytes, is_damaged = "", None, False
    metadata: Mapping[str, Any] = {}
    try:
        with CheckpointReader(path) as reader:
            metadata = reader.metadata
            nbytes = sum([reader.stored_nbytes(key) for key in reader.keys()])  # noqa: SIM118
    except UnsupportedFormatError:
        return None
    except (CheckpointError, OSError) as error:
        problem, is_damaged = str(error), isinstance(error, CorruptCheckpointError)
    kind, time = "?" if found is None else found.name, _time(path)
    return Listed(
        name, path, kind, number_of(path), time, nbytes, {}, metadata, problem, is_damaged
    )


def _time(path: str) -> float | None:
    if is_url(path):  # which does not tell
        return None
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:  # a prefix of several files, or it was just removed
        above = os.path.dirname(path)
        try:
            return os.stat(f"{path}.index").st_mtime
        except FileNotFoundError:
            return os.stat(above).st_mtime


def _best(found: list[Listed], maximized: Collection[str]) -> dict[str, str]:
    """The path of the best checkpoint for each metric."""
    usable = [each for each in found if not each.problem and each.metrics]
    best: dict[str, str] = {}
    for metric in sorted({name for each in usable for name in each.metrics}):
        records = [
            CheckpointRecord(number, metrics=each.metrics, path=each.path)
            for number, each in enumerate(usable)
        ]
        policy = KeepBest(metric, 1, "max" if metric in maximized else "min")
        for number in policy.keep(tuple(records)):
            best[metric] = records[number].path
    return best
