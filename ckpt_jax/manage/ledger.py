"""The ledger: the checkpoints of a directory that one manager manages.

The state file lists the managed checkpoints, with times. The notes (`store.notes`) say what the
state file cannot say: the metrics, and where each checkpoint comes from. The notes are written
before the state file lists the checkpoint.

The *origin* of a checkpoint is the one that the program had saved or restored before. The latest
checkpoint, its origin, the origin of that one, and so on are the *live branch*. All others are on
abandoned branches. If the program goes back onto one of these, its checkpoints are live again. If a
checkpoint is removed or replaced, those that come from it come from its origin from then on.

Several managers with different names may share a directory. Each manager reads and changes only the
entries of its own checkpoints, which are named after it: its name and a number. The state file then
names the latest checkpoint of the manager that saved last. The latest checkpoint of each manager is
the last one of its own in the list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_jax.api.latest import beside, checkpoint_exists, state_in, warn_of_move
from ckpt_jax.manage.fence import Fence
from ckpt_jax.manage.retention import CheckpointRecord
from ckpt_jax.store.directory import checkpoints_in, number_of
from ckpt_jax.store.guard import changing
from ckpt_jax.store.notes import NOTES_FILE, Notes, read_notes, write_notes
from ckpt_jax.store.paths import absolute
from ckpt_jax.store.state_file import STATE_FILE, CheckpointState, update_checkpoint_state

_MAX_DIGITS = 255  # no file name is longer

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The managed checkpoints of one manager.

    Attributes:
      latest: the path of the checkpoint that was saved last; None if there is none.
      records: one for each path. Those on abandoned branches come first, then the others, both in
        the order of numbers. The latest comes last.
      last_preserved: when the newest of the checkpoints that are kept forever was saved.
    """

    latest: str | None
    records: tuple[CheckpointRecord, ...]
    last_preserved: float

    def __post_init__(self) -> None:
        by_path = {
            record.path: record for record in self.records
        }  # the last record of a path counts
        records = sorted(
            by_path.values(),
            key=lambda r: (r.path == self.latest, not r.is_abandoned, r.number, r.path),
        )
        object.__setattr__(self, "records", tuple(records))

    def with_latest(self, record: CheckpointRecord) -> Ledger:
        """The ledger after a checkpoint was saved."""
        others, record = self._joined_by(record)
        live = _branch(record, others)
        others = [_marked(other, other.number not in live) for other in others]
        return Ledger(record.path, (*others, record), self.last_preserved)

    def with_adopted(self, records: Iterable[CheckpointRecord]) -> Ledger:
        """The ledger with checkpoints that were committed after the latest, but not recorded."""
        ledger = self
        for record in records:
            others, record = ledger._joined_by(record)
            ledger = Ledger(self.latest, (*others, record), self.last_preserved)
        return ledger

    def with_older(self, record: CheckpointRecord) -> Ledger:
        """The ledger with one more checkpoint that is not the latest."""
        latest = number_of(self.latest or "")
        is_abandoned = latest is not None and record.number > latest
        return self.with_adopted([replace(record, is_abandoned=is_abandoned)])

    def _joined_by(
        self, record: CheckpointRecord
    ) -> tuple[Sequence[CheckpointRecord], CheckpointRecord]:
        """The records of other paths, and a new record with one of them as its origin. If it has
        none, or one that is not managed, the one before that on the live branch takes its place."""
        origins = {other.number: other.origin for other in self.records}
        others = self.without(frozenset([record.path])).records
        origin = record.number - 1 if record.origin is None else record.origin
        if origin == record.number and origin in origins:
            origin = origins[origin]  # it replaces its origin
        elif origin not in {other.number for other in others}:
            origin = _last_live(others, origin)
        return others, replace(record, origin=origin)

    def without(self, paths: frozenset[str]) -> Ledger:
        """The ledger without the records of some paths. The latest stays the latest."""
        gone = {record.number: record.origin for record in self.records if record.path in paths}
        if not gone:
            return self
        records = [
            replace(record, origin=_remaining(record.origin, gone))
            if record.origin in gone
            else record
            for record in self.records
            if record.path not in paths
        ]
        return Ledger(self.latest, tuple(records), self.last_preserved)


def _marked(record: CheckpointRecord, is_abandoned: bool) -> CheckpointRecord:
    if record.is_abandoned == is_abandoned:
        return record
    return replace(record, is_abandoned=is_abandoned)


def _remaining(origin: int | None, gone: Mapping[int, int | None]) -> int | None:
    """The nearest origin that is not among those that are gone, which are given with their own."""
    seen: set[int] = set()
    while origin is not None and origin in gone:
        if origin in seen:
            return None
        seen.add(origin)
        origin = gone[origin]
    return origin


def _branch(latest: CheckpointRecord, records: Iterable[CheckpointRecord]) -> set[int]:
    """The numbers of the origin of a checkpoint, of its origin, and so on.

    Numbers begin anew if a program resets its step. Then those before do not count, but for the
    origin of the checkpoint itself.
    """
    origins = {record.number: record.origin for record in records}
    branch: set[int] = set()
    seen: set[int] = set()
    lowest, at = latest.number, latest.origin
    while at is not None and at not in seen:
        seen.add(at)
        if at < lowest or not branch:
            branch.add(at)
            lowest = min(lowest, at)
        at = origins.get(at)
    return branch


def _usual_origins(records: Sequence[CheckpointRecord]) -> dict[str, int | None]:
    """The origins of checkpoints if nothing is noted about them, by path."""
    live = sorted([record.number for record in records if not record.is_abandoned])
    before = {number: live[at - 1] if at else None for at, number in reversed([*enumerate(live)])}
    return {
        record.path: None if record.is_abandoned else before[record.number] for record in records
    }


def _last_live(records: Iterable[CheckpointRecord], number: int) -> int | None:
    """The largest number up to `number` on the live branch."""
    live = [record.number for record in records if not record.is_abandoned]
    return max([each for each in live if each <= number], default=None)


class UnknownMetrics(Mapping[str, float]):
    """Stands for metrics that are not known, because the file that may have had some is gone.

    Attributes:
      is_asked: whether a policy has tried to read them.
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
    """The metrics of a checkpoint; none if they are unknown. Does not set `is_asked`."""
    return {} if isinstance(record.metrics, UnknownMetrics) else record.metrics


def own_number(name: str, path: str) -> int | None:
    """The number of a checkpoint if its path shows that it belongs to this manager; else None.

    >>> own_number("ckpt", "/runs/ckpt-3"), own_number("ckpt", "/runs/ckpt-eval-3")
    (3, None)
    """
    beginning, _, number = os.path.basename(path).rpartition("-")
    is_own = beginning == name and number.isdecimal() and len(number) <= _MAX_DIGITS
    return int(number) if is_own else None


def recovered(directory: str, name: str, now: float) -> Ledger:
    """The ledger that an earlier manager of this name has left; an empty one if there was none.

    Checkpoints without a record are never removed, so records that may be wrong are left out.
    """
    state = state_in(directory)
    if state is None:
        return Ledger(_found_by_name(directory, name), (), now - 1)
    ledger = _ledger_of(directory, name, state)
    named = state.model_checkpoint_path
    found = beside(directory, named)
    if found == ledger.latest and found != named:
        warn_of_move(directory, named, found)
    _warn_of_unrecorded(directory, name, ledger)
    if now < ledger.last_preserved:
        _log.warning(
            "%s: the clock (%s) is behind the last preserved checkpoint timestamp (%s). The "
            "existing checkpoints will not be removed.",
            *(directory, now, ledger.last_preserved),
        )
        return Ledger(ledger.latest, (), now)
    return _managed(ledger)


def _managed(ledger: Ledger) -> Ledger:
    # A latest checkpoint that no manager manages is listed with this time.
    records = [
        record
        for record in ledger.records
        if record.time != ledger.last_preserved or known_metrics(record)
    ]
    return replace(ledger, records=tuple(records))


def observed(directory: str, name: str) -> Ledger:
    """The ledger that a manager of this name has left so far, for those who only ask."""
    found = read_ledger(directory, name)
    return _managed(found or Ledger(_found_by_name(directory, name), (), 0.0))


def _warn_of_unrecorded(directory: str, name: str, ledger: Ledger) -> None:
    """Warns of checkpoints that have larger numbers than the latest, but no record."""
    latest = own_number(name, ledger.latest or "")
    if latest is None:
        return
    recorded = {record.number for record in ledger.records}
    found = [n for n in restorable(directory, name) if n > latest and n not in recorded]
    if found:
        _log.warning(
            "%s: expected a record of each checkpoint %s-N above the latest (%s), found none of "
            "%s. Perhaps a program was killed before it recorded them. They will not be removed. "
            "manager.restore(N) restores one of them, manager.delete(N) removes it.",
            *(os.path.join(directory, STATE_FILE), name, latest, ", ".join(map(str, found))),
        )


def _found_by_name(directory: str, name: str) -> str | None:
    """The checkpoint of this name with the largest number; None if there is none. A warning says
    that the state file is missing or cannot be understood."""
    found = _own_in(directory, name)
    if not found:
        return None
    _log.warning(
        "%s: expected a state file that names the latest of the %d checkpoints %s-N in this "
        "directory, found none that can be read. The one with the largest number, %s, counts as "
        "the latest. The existing checkpoints will not be removed; the next save writes a new "
        "state file.",
        *(os.path.join(directory, STATE_FILE), len(found), name, found[-1]),
    )
    return os.path.join(directory, found[-1])


def read_ledger(directory: str, name: str) -> Ledger | None:
    """The ledger as the manager of this name wrote it; None if there is no state file.

    It has no records if no manager wrote the state file, or if the notes cannot be understood,
    because policies have to know the metrics.
    """
    state = state_in(directory)
    return None if state is None else _ledger_of(directory, name, state)


def _ledger_of(directory: str, name: str, state: CheckpointState) -> Ledger:
    notes = _notes_of(directory)
    model = _here(directory, state.model_checkpoint_path)
    listed = [(_here(directory, path), time) for path, time in _listed(state)]
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
            origin=notes.origins.get(os.path.basename(path)),
        )
        for path, time in own
    ]
    usual = _usual_origins(records)
    records = [
        record if record.origin is not None else replace(record, origin=usual[record.path])
        for record in records
    ]
    return Ledger(latest, tuple(records), state.last_preserved_timestamp)


def _listed(state: CheckpointState) -> list[tuple[str, float]]:
    """The paths that a state file lists, with their times; none if some have no time."""
    paths, times = state.all_model_checkpoint_paths, state.all_model_checkpoint_timestamps
    return [*zip(paths, times, strict=True)] if len(paths) == len(times) else []


def _here(directory: str, path: str) -> str:
    """A path of a state file as a manager of its directory writes it."""
    above, name = os.path.split(absolute(path))
    is_here = above == absolute(directory)
    return os.path.join(directory, name) if is_here else beside(directory, path)


def with_noted(directory: str, ledger: Ledger, fresh: Collection[str] = ()) -> Ledger:
    """A ledger with the metrics that were recorded since, perhaps by other programs.

    Args:
      directory: the one that has the files.
      ledger: of a manager.
      fresh: the paths of checkpoints that are not recorded yet. What is noted about them belongs to
        checkpoints that they have replaced.
    """
    return _merged(ledger, _understood_notes(directory), fresh)


def _understood_notes(directory: str) -> Notes:
    try:
        return read_notes(directory) or Notes()
    except ValueError:  # a warning has said so
        return Notes()


def _merged(ledger: Ledger, notes: Notes, fresh: Collection[str]) -> Ledger:
    noted = notes.metrics
    records = [
        replace(record, metrics={**known_metrics(record), **own})
        if record.path not in fresh and (own := noted.get(os.path.basename(record.path)))
        else record
        for record in ledger.records
    ]
    return replace(ledger, records=tuple(records))


def write_ledger(
    directory: str,
    name: str,
    ledger: Ledger,
    *,
    is_newest: bool,
    fence: Fence,
    fresh: Collection[str] = (),
    has_metrics: bool = False,
) -> Ledger:
    """Writes a ledger that has a latest checkpoint. Entries of managers with other names stay.

    Args:
      directory: the one that has the files.
      name: of the manager.
      ledger: the one to write.
      is_newest: whether its latest checkpoint was saved after all others in the directory. Then the
        name is claimed.
      fence: of the manager.
      fresh: see `with_noted`.
      has_metrics: whether a policy asks for metrics. Then there has to be a file of them, because
        metrics that are not there yet differ from a file that is lost.

    Returns:
      The ledger that was written: with the metrics that others have recorded.

    Raises:
      SupersededError: another manager has claimed the name since.
      OSError: a file could not be written.
    """
    assert ledger.latest is not None

    def change() -> Ledger:
        writers = fence.renewed(claims=is_newest)
        before = _understood_notes(directory)
        noted = _merged(ledger, before, fresh)
        _write_notes(directory, name, noted, before, has_metrics)
        state = _state_with(directory, name, noted, is_newest)
        update_checkpoint_state(directory, state, writers=writers)
        return noted

    return changing(directory, change)


def _state_with(directory: str, name: str, ledger: Ledger, is_newest: bool) -> CheckpointState:
    """The state of a directory with a new ledger of one manager."""
    assert ledger.latest is not None
    others: list[tuple[str, float]] = []
    newest = ledger.latest
    if (state := state_in(directory)) is not None:
        others = [
            (path, time)
            for path, time in state.managed.items()
            if own_number(name, path) is None and path != ledger.latest
        ]
        if not is_newest and state.model_checkpoint_path in dict(others):
            newest = state.model_checkpoint_path
    own = [(record.path, record.time) for record in ledger.records]
    if ledger.latest not in dict(own):
        # The state file has to list its latest checkpoint. This time says that it is not managed.
        own.append((ledger.latest, ledger.last_preserved))
    listed = sorted([*others, *own], key=lambda each: each[0] == newest)
    return CheckpointState(
        newest,
        tuple([path for path, _ in listed]),
        tuple([time for _, time in listed]),
        ledger.last_preserved,
    )


_LOST = Notes()  # stands for a missing file of notes


def _notes_of(directory: str) -> Notes | None:
    """The notes of a directory; `_LOST` if there is no file.

    Returns:
      None if the file cannot be understood; a warning says so. Then nothing may be removed,
      because a policy would take the best checkpoints for bad ones.
    """
    try:
        return read_notes(directory) or _LOST
    except ValueError as error:
        _log.warning(
            "%s is ignored, because it is not a file of metrics: %s. The existing checkpoints "
            "will not be removed. Restore the file from a copy before the next save, which "
            "writes a new one.",
            *(os.path.join(directory, NOTES_FILE), error),
        )
        return None


def _write_notes(
    directory: str, name: str, ledger: Ledger, before: Notes, has_metrics: bool
) -> None:
    def is_of_another(path: str) -> bool:
        return own_number(name, path) is None

    metrics = {path: own for path, own in before.metrics.items() if is_of_another(path)}
    metrics |= {os.path.basename(r.path): known_metrics(r) for r in ledger.records}
    abandoned = {path for path in before.abandoned if is_of_another(path)}
    abandoned |= {os.path.basename(r.path) for r in ledger.records if r.is_abandoned}
    origins = {path: number for path, number in before.origins.items() if is_of_another(path)}
    usual = _usual_origins(ledger.records)
    origins |= {
        os.path.basename(record.path): record.origin
        for record in ledger.records
        if record.origin not in (None, usual[record.path])
    }
    is_known = not any(isinstance(record.metrics, UnknownMetrics) for record in ledger.records)
    notes = Notes(metrics, frozenset(abandoned), origins)
    write_notes(directory, notes, is_needed=has_metrics and is_known)


def restorable(directory: str, name: str) -> list[int]:
    """The numbers of the existing checkpoints of this name, managed or not, ascending."""
    return sorted({number_of(each) or 0 for each in _own_in(directory, name)})


def _own_in(directory: str, name: str) -> list[str]:
    """The names of the existing checkpoints of this name, by number."""
    return checkpoints_in(directory, lambda each: own_number(name, each) is not None)


def path_in(directory: str, name: str, number: int) -> str:
    """The path of the checkpoint with a number, which may have leading zeros in its name."""
    plain = os.path.join(directory, f"{name}-{number}")
    if checkpoint_exists(plain):
        return plain
    same = checkpoints_in(directory, lambda each: own_number(name, each) == number)
    return os.path.join(directory, same[0]) if same else plain
