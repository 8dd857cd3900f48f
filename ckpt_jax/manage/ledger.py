"""The ledger: which checkpoints of a directory one manager manages.

The state file names the managed checkpoints, with times. What it cannot say is in the notes
(`store.notes`): metrics, and which checkpoints are on an abandoned branch. The notes are written
before the state file names the checkpoint.

Several managers with different names may share a directory. Each reads and changes only the entries
of its own checkpoints: those whose names are its own name and a number. The state file then names
the checkpoint of whichever manager saved last as the latest. The latest checkpoint of each manager
is the last one of its own in the list.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ckpt_jax.api.latest import beside, checkpoint_exists, say_moved, state_in
from ckpt_jax.retention import CheckpointRecord
from ckpt_jax.state_file import STATE_FILE, CheckpointState, update_checkpoint_state
from ckpt_jax.store.directory import checkpoints_in, number_of
from ckpt_jax.store.notes import NOTES_FILE, Notes, read_notes, write_notes

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The managed checkpoints of one manager.

    Attributes:
      latest: the path of the checkpoint that was saved last; None if there is none.
      records: one for each path. Those on abandoned branches come first, then the others, both in
        the order of numbers; the latest is the last one.
      last_preserved: when the last checkpoint was saved that is kept forever.
    """

    latest: str | None
    records: tuple[CheckpointRecord, ...]
    last_preserved: float

    def __post_init__(self) -> None:
        by_path = {record.path: record for record in self.records}  # of several, the last counts
        records = sorted(
            by_path.values(),
            key=lambda r: (r.path == self.latest, not r.is_abandoned, r.number, r.path),
        )
        object.__setattr__(self, "records", tuple(records))

    def with_latest(self, record: CheckpointRecord, origin: str | None = None) -> Ledger:
        """The ledger after a checkpoint was saved.

        Args:
          record: of the checkpoint.
          origin: the checkpoint that the program had saved or restored last, if that is known.
            Those with larger numbers are on a branch that the program has left by going back.
        """
        last = number_of(origin or "")
        last = record.number if last is None else min(last, record.number)
        others = [
            replace(
                other,
                is_abandoned=other.path != origin and (other.is_abandoned or other.number > last),
            )
            for other in self.records
        ]
        return Ledger(record.path, (*others, record), self.last_preserved)

    def with_adopted(self, records: Iterable[CheckpointRecord]) -> Ledger:
        """The ledger with checkpoints that were committed after the latest, but not recorded."""
        return Ledger(self.latest, (*self.records, *records), self.last_preserved)

    def with_older(self, record: CheckpointRecord) -> Ledger:
        """The ledger with one more checkpoint, which is not the latest."""
        latest = number_of(self.latest or "")
        is_abandoned = latest is not None and record.number > latest
        record = replace(record, is_abandoned=is_abandoned)
        return Ledger(self.latest, (*self.records, record), self.last_preserved)

    def without(self, paths: frozenset[str]) -> Ledger:
        """The ledger without the records of some paths. The latest stays the latest."""
        records = tuple([record for record in self.records if record.path not in paths])
        return Ledger(self.latest, records, self.last_preserved)


class UnknownMetrics(Mapping[str, float]):
    """The metrics of checkpoints that may have had some, but the file with them is gone.

    Attributes:
      is_asked: whether somebody wanted to know them.
    """

    def __init__(self) -> None:
        self.is_asked = False

    def __getitem__(self, name: str) -> float:
        self.is_asked = True
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        self.is_asked = True
        return iter(())

    def __len__(self) -> int:
        self.is_asked = True
        return 0


def known_metrics(record: CheckpointRecord) -> Mapping[str, float]:
    """The metrics of a checkpoint as far as they are known, without asking for unknown ones."""
    return {} if isinstance(record.metrics, UnknownMetrics) else record.metrics


def own_number(name: str, path: str) -> int | None:
    """The number of a path if a manager of this name may have given it; else None.

    >>> own_number("ckpt", "/runs/ckpt-3"), own_number("ckpt", "/runs/ckpt-eval-3")
    (3, None)
    """
    is_own = re.fullmatch(re.escape(name) + r"-\d+", os.path.basename(path)) is not None
    return number_of(path) if is_own else None


def recovered(directory: str, name: str, now: float) -> Ledger:
    """What an earlier manager of this name has left, as far as that can be relied on; an empty
    ledger if there was none.

    A checkpoint that is no longer listed is removed by nobody, so in doubt it is left out.
    """
    ledger = read_ledger(directory, name)
    if ledger is None:
        return Ledger(_found_by_name(directory, name), (), now - 1)
    state = state_in(directory)
    named = state.model_checkpoint_path if state is not None else ""
    found = beside(directory, named)
    if found == ledger.latest and found != named:
        say_moved(directory, named, found)
    _say_unlisted(directory, name, ledger)
    if now < ledger.last_preserved:
        _log.warning(
            "%s: the clock (%s) is behind the last preserved checkpoint timestamp (%s). The "
            "checkpoints that are there will not be removed",
            *(directory, now, ledger.last_preserved),
        )
        return Ledger(ledger.latest, (), now)
    # The latest of all is listed with this time if nobody manages it.
    records = [
        record
        for record in ledger.records
        if record.time != ledger.last_preserved or known_metrics(record)
    ]
    return Ledger(ledger.latest, tuple(records), ledger.last_preserved)


def _say_unlisted(directory: str, name: str, ledger: Ledger) -> None:
    """Says which checkpoints are newer than the latest by their numbers, and are not recorded."""
    latest = own_number(name, ledger.latest or "")
    listed = {record.number for record in ledger.records}
    there = [] if latest is None else restorable(directory, name)
    if unlisted := [n for n in there if n > (latest or 0) and n not in listed]:
        _log.warning(
            "%s: expected no checkpoints %s-N above the latest, %s, that are not recorded, found "
            "%s: perhaps a program was killed before it recorded them. They will not be removed. "
            "manager.restore(N) restores one of them, manager.delete(N) removes it.",
            *(os.path.join(directory, STATE_FILE), name, latest, ", ".join(map(str, unlisted))),
        )


def _found_by_name(directory: str, name: str) -> str | None:
    """The checkpoint of this name with the largest number, of a directory whose state file is
    missing or cannot be understood; a warning says so."""
    found = [each for each in checkpoints_in(directory) if own_number(name, each) is not None]
    if not found:
        return None
    _log.warning(
        "%s: expected a state file that names the latest of the %d checkpoints %s-N in this "
        "directory, found none that can be read. %s, which has the largest number, is taken for "
        "the latest. The checkpoints that are there will not be removed; the next save writes a "
        "new state file.",
        *(os.path.join(directory, STATE_FILE), len(found), name, found[-1]),
    )
    return os.path.join(directory, found[-1])


def read_ledger(directory: str, name: str) -> Ledger | None:
    """The ledger of the manager of this name as it was written; None if there is no state file.

    It has no records if the state file was not written by a manager, or if there are notes that
    cannot be understood: policies have to know the metrics.
    """
    state = state_in(directory)
    if state is None:
        return None
    notes = _notes_of(directory)
    paths, times = state.all_model_checkpoint_paths, state.all_model_checkpoint_timestamps
    model = _here(directory, state.model_checkpoint_path)
    listed = (
        [(_here(directory, path), time) for path, time in zip(paths, times, strict=True)]
        if len(times) == len(paths)
        else []
    )
    own = [
        (path, time)
        for path, time in listed
        if os.path.dirname(path) == directory and own_number(name, path) is not None
    ]
    is_of_another = own_number(name, model) is None and any(
        path == model and time != state.last_preserved_timestamp for path, time in listed
    )
    latest = own[-1][0] if own and is_of_another else model
    if notes is None:
        return Ledger(latest, (), state.last_preserved_timestamp)
    unknown = UnknownMetrics()
    records = [
        CheckpointRecord(
            number_of(path) or 0,
            time,
            unknown if notes is _LOST else notes.metrics.get(os.path.basename(path), {}),
            path,
            is_abandoned=path != latest and os.path.basename(path) in notes.abandoned,
        )
        for path, time in own
    ]
    return Ledger(latest, tuple(records), state.last_preserved_timestamp)


def _here(directory: str, path: str) -> str:
    """A path of a state file as a manager of its directory writes it."""
    above, name = os.path.split(os.path.abspath(path))
    is_here = above == os.path.abspath(directory)
    return os.path.join(directory, name) if is_here else beside(directory, path)


def write_ledger(directory: str, name: str, ledger: Ledger, *, is_newest: bool) -> None:
    """Records a ledger with a latest checkpoint. The entries of managers with other names stay.

    Args:
      directory: where the files are.
      name: of the manager.
      ledger: what to record.
      is_newest: whether its latest checkpoint was saved after all others in the directory.

    Raises:
      OSError: a file could not be written.
    """
    assert ledger.latest is not None
    _write_notes(directory, name, ledger)
    others: list[tuple[str, float]] = []
    newest = ledger.latest
    if (state := state_in(directory)) is not None:
        paths, times = state.all_model_checkpoint_paths, state.all_model_checkpoint_timestamps
        if len(paths) == len(times):
            others = [
                (path, time)
                for path, time in dict(zip(paths, times, strict=True)).items()
                if own_number(name, path) is None and path != ledger.latest
                if time != state.last_preserved_timestamp
            ]
        if not is_newest and state.model_checkpoint_path in dict(others):
            newest = state.model_checkpoint_path
    own = [(record.path, record.time) for record in ledger.records]
    if ledger.latest not in dict(own):
        # A state file lists its latest; the time of the last preserved one says that it is not
        # managed.
        own.append((ledger.latest, ledger.last_preserved))
    listed = sorted([*others, *own], key=lambda each: each[0] == newest)
    state = CheckpointState(
        newest,
        tuple([path for path, _ in listed]),
        tuple([time for _, time in listed]),
        ledger.last_preserved,
    )
    update_checkpoint_state(directory, state)


_LOST = Notes()  # of a directory that has none


def _notes_of(directory: str) -> Notes | None:
    """The notes of a directory, `_LOST` if there is no file.

    Returns:
      None if the file cannot be understood; a warning says so. Nothing may be removed then,
      since a policy would take the best checkpoints for bad ones.
    """
    try:
        return read_notes(directory) or _LOST
    except ValueError as error:
        _log.warning(
            "%s is ignored, because it is no file of metrics: %s. The checkpoints that are there "
            "will not be removed. Restore the file from a copy before the next save, which "
            "writes a new one.",
            *(os.path.join(directory, NOTES_FILE), error),
        )
        return None


def _write_notes(directory: str, name: str, ledger: Ledger) -> None:
    try:
        before = read_notes(directory) or Notes()
    except ValueError:  # a warning has said so
        before = Notes()

    def is_of_another(path: str) -> bool:
        return own_number(name, path) is None

    metrics = {path: own for path, own in before.metrics.items() if is_of_another(path)}
    metrics |= {os.path.basename(r.path): known_metrics(r) for r in ledger.records}
    abandoned = {path for path in before.abandoned if is_of_another(path)}
    abandoned |= {os.path.basename(r.path) for r in ledger.records if r.is_abandoned}
    write_notes(directory, Notes(metrics, frozenset(abandoned)))


def restorable(directory: str, name: str) -> list[int]:
    """The numbers of the checkpoints of this name that are there, managed or not, ascending."""
    found = [own_number(name, each) for each in checkpoints_in(directory)]
    return sorted({number for number in found if number is not None})


def path_in(directory: str, name: str, number: int) -> str:
    """The path of the checkpoint with a number: numbers may have leading zeros."""
    plain = os.path.join(directory, f"{name}-{number}")
    if checkpoint_exists(plain):
        return plain
    same = [each for each in checkpoints_in(directory) if own_number(name, each) == number]
    return os.path.join(directory, same[0]) if same else plain
