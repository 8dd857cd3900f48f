"""The managed checkpoints of a directory. They are recorded when they are committed, and removed
when they are no longer needed.

record  the new checkpoint becomes the latest: the notes are written first, then the state file
        (first, `fence` makes sure that no other manager has taken over)
select  a retention policy looks at all managed checkpoints and names the numbers to keep
sweep   the others leave the ledger, oldest first: each one is kept forever, or is removed
record  the notes and the state file are written once more
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from ckpt_jax.api.latest import (
    checkpoint_exists,
    older_checkpoints,
    problem_with,
)
from ckpt_jax.errors import CheckpointNotFoundError, SupersededError
from ckpt_jax.manage.fence import Fence
from ckpt_jax.manage.ledger import (
    Ledger,
    UnknownMetrics,
    observed,
    own_number,
    path_in,
    read_ledger,
    recovered,
    restorable,
    with_noted,
    write_ledger,
)
from ckpt_jax.manage.removal import Removal, Remover
from ckpt_jax.manage.retention import (
    CheckpointRecord,
    RetentionPolicy,
    Sweep,
    metrics_of,
    plan_sweep,
)
from ckpt_jax.store.attempts import collect, remains_in
from ckpt_jax.store.directory import number_of
from ckpt_jax.store.guard import changing, guarded
from ckpt_jax.store.lease import without_lease
from ckpt_jax.store.notes import NOTES_FILE, add_metrics
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.presence import is_taken, names_in
from ckpt_jax.store.replacing import ASIDE, settle_in
from ckpt_jax.store.staging import STAGING, owned_path, remove_abandoned, why_kept
from ckpt_jax.store.state_file import state_text
from ckpt_jax.store.storage import generation_at, storage_of

AT_ONCE = Removal()

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class _Begun:
    """A save that has begun.

    Attributes:
      record: of its checkpoint.
      before: the generation of what was at its path before (`Storage.generation`).
      origin: the checkpoint that the program saved or restored before.
    """

    record: CheckpointRecord
    before: Hashable | None
    origin: str | None

    @property
    def is_committed(self) -> bool:
        """Whether the checkpoint is at its path."""
        return generation_at(self.record.path) not in (None, self.before)


class Collection:
    """The managed checkpoints of a directory.

    A checkpoint may be committed but not recorded, because a write callback failed, or Ctrl-C came
    between the two. The next save *adopts* it: it is then managed, but it is not the latest.

    Args:
      directory: an absolute path; it need not exist yet.
      name: the names of its checkpoints begin with it.
      policy: chooses the checkpoints to keep; None keeps all.
      preserve_interval_seconds: the least time between two checkpoints that are kept forever; None
        keeps none forever.
      clock: returns the time in seconds since the epoch.
      is_read_only: whether it is only asked.
      removal: how checkpoints are removed.

    Attributes:
      series: the same for managers of the same directory and name.
      ledger: the recorded checkpoints.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        policy: RetentionPolicy | None,
        preserve_interval_seconds: float | None,
        clock: Callable[[], float],
        is_read_only: bool = False,
        removal: Removal = AT_ONCE,
    ):
        self._is_read_only = is_read_only
        self._remover = Remover(directory, name, removal, clock)
        self._removal = removal
        self._directory, self._name = self.series = directory, name
        self._clock = clock
        self._policy = policy
        self._preserve_interval_seconds = preserve_interval_seconds
        self._begun: dict[str, _Begun] = {}  # by path
        self._origin: str | None = None  # the checkpoint that was saved or restored last
        self._published: dict[str, Hashable] = {}  # generations by path, until they are recorded
        self._fence = Fence(directory, name)
        self._is_recovered = False  # what dead runs have left was looked for
        if not is_read_only:
            settle_in(directory, self._is_own)
        self._read()

    def _is_own(self, name: str) -> bool:
        return own_number(self._name, name) is not None

    def _read(self) -> None:
        """Reads the ledger as it is in the files."""
        self._state = state_text(self._directory)
        if self._is_read_only:
            self.ledger = observed(self._directory, self._name)
        else:
            self.ledger = recovered(self._directory, self._name, self._clock())

    def _read_again(self) -> None:
        """Reads the ledger again if another program has changed it."""
        if state_text(self._directory) != self._state:
            self._read()

    def _keep_up(self) -> None:
        """Prepares a change outside of a save.

        Raises:
          SupersededError: another manager has taken over.
        """
        if not self._fence.is_claimed:
            self._read_again()
        elif self._fence.is_behind():
            raise self._fence.error()

    def present(self) -> Ledger:
        """The ledger as it is now, for questions: with the metrics that evaluators have recorded,
        and, as long as this manager has saved nothing, with the checkpoints of the one that saves.
        """
        ledger = self.ledger
        if not self._fence.is_claimed and state_text(self._directory) != self._state:
            ledger = observed(self._directory, self._name)
        return with_noted(self._directory, ledger)

    def record_metrics(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Adds metrics to those of a managed checkpoint, for this manager and all others.

        Returns:
          Whether there is such a checkpoint.

        Raises:
          ValueError: the file of the metrics cannot be understood; it is not changed.
        """
        for record in self.present().records:
            if record.number == number:
                add = partial(add_metrics, self._directory, os.path.basename(record.path), metrics)
                changing(self._directory, add)
                return True
        return False

    def candidates(self) -> list[str]:
        """The checkpoints that can be restored, best first."""
        ledger = self.present()
        latest = ledger.latest
        if latest is None:
            return []
        abandoned = {record.path for record in ledger.records if record.is_abandoned}
        older = [p for p in older_checkpoints(self._directory, latest) if p not in abandoned]
        return [latest, *older]

    def path_of(self, number: int) -> str:
        """The path of the checkpoint with a number.

        Raises:
          CheckpointNotFoundError: there is none.
        """
        path = path_in(self._directory, self._name, number)
        if not checkpoint_exists(path):
            found = ", ".join(map(str, restorable(self._directory, self._name)[-20:]))
            advice = f"Pass one of the steps {found}" if found else "Save first"
            raise CheckpointNotFoundError(f"{path}: expected a checkpoint, found none. {advice}.")
        return path

    def restored(self, path: str) -> None:
        """Notes that the program has restored one of the checkpoints, and goes on from there."""
        self._origin = path

    def begin(self, record: CheckpointRecord) -> None:
        """Notes that a save has begun. The time of its record becomes the present.

        Raises:
          SupersededError: another manager has taken over, and this save could not even leave its
            checkpoint, or an earlier one has done so.
        """
        if self._fence.is_known or (self._fence.is_behind() and is_taken(record.path)):
            raise self._fence.error("Nothing was saved.")
        self._recover()
        origin = number_of(self._origin or "")
        record = replace(record, time=self._clock(), origin=origin)
        before = generation_at(record.path)
        self._begun[record.path] = _Begun(record, before, self._origin)
        self._origin = record.path

    @contextmanager
    def publishing(self, path: str) -> Iterator[bool]:
        """Entered while a checkpoint takes its name. Gives whether it may replace another one.

        A manager that is behind may leave its checkpoint at a free path, so that it is not lost.

        Raises:
          SupersededError: another manager has taken over, and the path is not free.
        """
        with guarded(self._directory):
            is_behind = self._fence.is_behind()
            if not (is_behind or self._fence.is_claimed):
                self._read_again()
                self._fence.claim()
            try:
                yield not is_behind
            except FileExistsError as error:
                if not is_behind:
                    raise
                raise self._fence.error("Nothing was saved.") from error
            with suppress(OSError):  # the checkpoint is there, and is recorded all the same
                generation = generation_at(path)
                if generation is not None:
                    self._published[path] = generation

    def take_back(self, path: str) -> bool:
        """Notes that a save has failed. Returns whether its checkpoint exists all the same, because
        an interrupt came after the commit. Then it will be adopted."""
        begun = self._begun.get(path)
        if begun is None:
            return False
        try:
            exists = begun.is_committed
        except OSError:  # then its number may be taken
            exists = True
        if exists:
            return True
        del self._begun[path]
        if self._origin == path:
            self._origin = begun.origin
        return False

    def _with_adopted(self, ledger: Ledger) -> Ledger:
        """A ledger with the checkpoints that were committed but not recorded."""
        begun = [*self._begun.values()]  # a signal handler may change them
        return ledger.with_adopted([each.record for each in begun if each.is_committed])

    def collect(self, dry_run: bool) -> list[str]:
        """Removes checkpoints that are not needed, and what interrupted saves have left; see
        `CheckpointManager.gc`."""
        if not dry_run:
            self._remover.wait()
        self._keep_up()
        if self.ledger.latest is None:
            return []
        ledger = self._with_adopted(with_noted(self._directory, self.ledger))
        unknown, sweep = self._plan_sweep(ledger)
        latest = number_of(self.ledger.latest or "")
        leftovers = self._leftovers(lambda number: latest is not None and number <= latest)
        if not (sweep.preserve or sweep.remove or leftovers) or not self._is_latest_usable():
            return []
        if dry_run:
            return [*(record.path for record in sweep.remove), *leftovers]
        self.ledger = ledger.without(unknown)
        self._forget_recorded()
        remove = collect if is_url(self._directory) else remove_abandoned
        removed = [*self._sweep(sweep), *[p for p in leftovers if _attempt(remove, p)]]
        removed += self._remover.empty_trash()
        self._remover.wait()
        return removed

    def record(self, record: CheckpointRecord, is_overtaken: bool = False) -> None:
        """Makes a checkpoint that was just committed the latest, and sweeps.

        Args:
          record: of the checkpoint; its time becomes the present.
          is_overtaken: whether a checkpoint with newer values is recorded already, and stays the
            latest.

        Raises:
          SupersededError: another manager has taken over. The checkpoint stays, unrecorded.
        """
        path = record.path
        begun = self._begun.get(record.path)
        origin = begun.record.origin if begun is not None else None
        record = replace(record, time=self._clock(), origin=origin)
        while True:
            before = self.ledger
            ledger = self._with_adopted(before)
            fresh = {path, *self._begun}
            is_older = is_overtaken and ledger.latest is not None
            ledger = ledger.with_older(record) if is_older else ledger.with_latest(record)
            with guarded(self._directory):
                if self._published.pop(path, None) not in (None, generation_at(path)):
                    raise self._fence.error(f"It has replaced {path} before that was recorded.")
                try:
                    ledger = self._write_to_files(ledger, is_newest=True, fresh=fresh)
                except SupersededError:
                    saved = f"{path} was saved, but is not recorded: restore it by its path."
                    raise self._fence.error(saved) from None
            if self.ledger is before:
                break
            is_overtaken = True  # by a save in a signal handler, during this loop
        self.ledger = ledger
        self._forget_recorded()
        try:
            unknown, sweep = self._plan_sweep(self.ledger)
        except Exception as error:  # of a policy of the program
            error.add_note(f"{path} was saved and is the latest. No checkpoint was removed.")
            raise
        if unknown:
            self.ledger = self.ledger.without(unknown)
        if (sweep.preserve or sweep.remove) and self._is_latest_usable():
            self._sweep(sweep)
            self._remover.empty_trash()

    def _forget_recorded(self) -> None:
        for record in self.ledger.records:
            self._begun.pop(record.path, None)

    def follow(self) -> None:
        """Takes over the ledger that process 0 has written."""
        self.ledger = read_ledger(self._directory, self._name) or self.ledger

    def delete(self, number: int) -> None:
        """Removes a checkpoint, which need not be managed. If it is the latest, the one before it
        becomes the latest.

        Raises:
          CheckpointNotFoundError: there is no checkpoint of this number.
          ValueError: it is the latest, and no other is usable.
          OSError: it could not be removed.
        """
        self._keep_up()
        path = self.path_of(number)
        ledger = self.ledger
        if path == ledger.latest:
            others = [each for each in self.candidates()[1:] if problem_with(each) is None]
            if not others:
                raise ValueError(
                    f"{path}: expected another usable checkpoint to become the latest, found none. "
                    "Save first, or remove the directory."
                )
            ledger = Ledger(others[0], ledger.records, ledger.last_preserved)
            self._write(ledger)
        self._remover.remove(path)
        self._begun.pop(path, None)
        if ledger.latest is not None:
            self._write(self.ledger.without(frozenset([path])))

    def _write(self, ledger: Ledger) -> None:
        self.ledger = self._write_to_files(ledger, is_newest=False)

    def _write_to_files(
        self, ledger: Ledger, *, is_newest: bool, fresh: Iterable[str] = ()
    ) -> Ledger:
        """Writes a ledger; returns it with the metrics that others have recorded."""
        return write_ledger(
            self._directory,
            self._name,
            ledger,
            is_newest=is_newest,
            fence=self._fence,
            fresh=frozenset(fresh),
            has_metrics=self._policy is not None and bool(metrics_of(self._policy)),
        )

    def _plan_sweep(self, ledger: Ledger) -> tuple[frozenset[str], Sweep]:
        """The paths of checkpoints that a policy cannot judge, and the plan for all others."""
        sweep = self._planned(ledger)
        gone = self._removed_by_hand(sweep)
        if gone:
            unknown, sweep = self._plan_sweep(ledger.without(gone))
            return gone | unknown, sweep
        unknown = frozenset(
            record.path
            for record in ledger.records
            if isinstance(record.metrics, UnknownMetrics) and record.metrics.is_asked
        )
        if not unknown:
            return unknown, sweep
        _log.warning(
            "%s: expected the metrics of %d checkpoints, which a retention policy asks for, found "
            "no file. These checkpoints will not be removed: %s. Restore the file from a copy and "
            "create the manager again, or remove checkpoints by hand.",
            os.path.join(self._directory, NOTES_FILE),
            len(unknown),
            ", ".join(sorted(map(os.path.basename, unknown))),
        )
        return unknown, self._planned(ledger.without(unknown))

    def _removed_by_hand(self, sweep: Sweep) -> frozenset[str]:
        """The checkpoints that a plan keeps, but that are not there any more. No other one may be
        removed in their favour. In an object store, which would be asked for each, nobody looks."""
        if not sweep.remove or is_url(self._directory):
            return frozenset()
        return frozenset([record.path for record in sweep.keep if _is_gone(record.path)])

    def _planned(self, ledger: Ledger) -> Sweep:
        records, last_preserved = ledger.records, ledger.last_preserved
        if self._policy is None:
            return Sweep(records, (), (), last_preserved)
        return plan_sweep(records, self._policy, self._preserve_interval_seconds, last_preserved)

    def _is_latest_usable(self) -> bool:
        latest = self.ledger.latest
        try:
            problem = problem_with(latest) if latest else "there is none"
        except OSError as error:  # what was saved is recorded all the same
            problem = str(error)
        if problem is not None:
            _log.warning(
                "%s: nothing is removed, because the latest checkpoint is not usable: %s",
                *(self._directory, problem),
            )
        return problem is None

    def _sweep(self, sweep: Sweep) -> list[str]:
        """Removes checkpoints as planned, in two phases: they lose their names and their records,
        and then they are deleted, which may take long. Those whose names stay are still managed,
        and the next sweep tries again."""
        removed: list[str] = []
        rests: list[_Rest] = []
        gone = {record.path for record in sweep.preserve}
        for record in sweep.remove:
            if self._fence.is_claimed and self._fence.is_behind():
                break  # the new manager may need what is left
            if len(rests) == _MOST_RESTS:
                _delete(rests)
            outcome = _attempt(lambda path: self._remove_managed(path, rests), record.path)
            if outcome is None:
                continue
            if outcome:
                removed.append(record.path)
            else:
                _log.warning("%s was to be removed, but no longer exists", record.path)
            gone.add(record.path)
        # A save in a signal handler may have changed the ledger meanwhile.
        ledger = self.ledger.without(frozenset(gone))
        self.ledger = replace(ledger, last_preserved=sweep.last_preserved)
        try:
            self._write_to_files(self.ledger, is_newest=False)
        except (
            OSError,
            SupersededError,
        ) as error:  # the file still names the latest, and some that are gone
            _log.warning(
                "%s: the removal of checkpoints could not be recorded: %s", self._directory, error
            )
        _delete(rests)
        return removed

    def _remove_managed(self, path: str, rests: list[_Rest]) -> bool:
        """Removes a checkpoint, at least from its path; returns whether there was one.

        Args:
          path: of the checkpoint.
          rests: what is left to delete is appended to them.

        Raises:
          BlockingIOError: somebody has a lease of it.
          OSError: it is still there, or this is not known.
        """
        if not checkpoint_exists(path):
            return False
        with without_lease(path) as is_free:
            if not is_free:
                raise BlockingIOError(errno.EAGAIN, "an evaluator is at work on it", path)
            try:
                if self._removal != AT_ONCE:
                    self._remover.remove(path)
                elif (rest := _taken_away(path)) is not None:
                    rests.append((path, rest))
            except OSError as error:
                if checkpoint_exists(path):
                    raise
                _log.warning("%s could not be removed as a whole: %s", path, error)
        return True

    def _recover(self) -> None:
        """Removes, once, what saves of dead runs have left, before it fills the disk."""
        if self._is_recovered or is_url(self._directory):
            return
        self._is_recovered = True
        settle_in(self._directory, self._is_own)
        left = self._leftovers(lambda number: True, warns=False)
        if left and (self.ledger.latest is None or self._is_latest_usable()):
            for path in left:
                _attempt(remove_abandoned, path)

    def _leftovers(self, is_wanted: Callable[[int], bool], *, warns: bool = True) -> list[str]:
        """Abandoned staging directories of saves with some numbers. A warning says why others
        stay."""

        def is_meant(name: str) -> bool:
            number = own_number(self._name, name)
            return number is not None and is_wanted(number)

        if is_url(self._directory):
            return remains_in(self._directory, is_meant, self._clock)
        found: list[str] = []
        for name in names_in(self._directory):
            left = STAGING.match(name) or ASIDE.match(name)
            if left is None or not is_meant(left["name"]):
                continue
            path = os.path.join(self._directory, name)
            if not (STAGING.match(name) or is_taken(owned_path(path))):
                continue  # a process is putting it back
            reason = why_kept(path)
            if reason is None:
                found.append(path)
            elif warns and is_taken(path):
                _log.warning("%s is not removed: %s", path, reason)
        return found


_Rest = tuple[str, Callable[[], None]]  # the path of a checkpoint, and what deletes its files
_MOST_RESTS = 100  # at a time: each has a file open


def _delete(rests: list[_Rest]) -> None:
    """Deletes the files of checkpoints that were taken away, and empties the list."""
    while rests:
        path, remove_rest = rests.pop(0)
        try:
            remove_rest()
        except OSError as error:
            _log.warning("%s could not be removed as a whole: %s", path, error)


def _taken_away(path: str) -> Callable[[], None] | None:
    """Takes a checkpoint away from its path. Returns what deletes its files, if any are left.

    Raises:
      OSError: it is still there, or this is not known.
    """
    with ExitStack() as stack:
        remove_rest = stack.enter_context(storage_of(path).removing(path))
        if remove_rest is None:
            return None
        held = stack.pop_all()

    def work() -> None:
        with held:
            remove_rest()

    return work


def _is_gone(path: str) -> bool:
    try:
        return not checkpoint_exists(path)
    except OSError:  # not known
        return False


def _attempt(remove: Callable[[str], bool], path: str) -> bool | None:
    """What `remove` returns; None if it fails. Its error is logged, not raised, because the save
    itself has succeeded."""
    try:
        return remove(path)
    except BlockingIOError as error:
        _log.info("%s stays for now: %s", path, error.strerror)
        return None
    except OSError as error:
        _log.warning("%s could not be removed: %s", path, error)
        return None
