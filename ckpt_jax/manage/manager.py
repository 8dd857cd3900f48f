"""CheckpointManager: numbered checkpoints in a directory; those that are not needed are removed.

A *managed* checkpoint was written by this manager, or by an earlier manager of the same directory
and name that recorded it in the state file. The manager removes no other checkpoints; `collection`
says when it removes these.

Checkpoints are in the order of their numbers. If the program goes back to an earlier step and goes
on from there, the checkpoint that was saved last is the latest. Checkpoints that it did not come
from are then on an *abandoned branch*: they are the first to be removed, and no restart falls back
to them. Times matter only for `keep_checkpoint_every_n_hours`.

If there are several processes, process 0 records and removes checkpoints, and the others read the
outcome from the state file. Process 0 decides which checkpoint is restored.
"""

from __future__ import annotations

import contextlib
import html
import logging
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np

from ckpt_jax.api.checkpoint import (
    Checkpoint,
    check_values,
    replace_values,
    save_runs_of,
    set_save_counter,
)
from ckpt_jax.api.latest import checkpoint_exists, refuse_others
from ckpt_jax.api.preflight import preflight
from ckpt_jax.api.status import LoadStatus, outcome_of
from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError, RestoreMismatchError
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.ledger import known_metrics, own_number
from ckpt_jax.manage.managed_save import ManagedSave
from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    KeepLatest,
    RetentionPolicy,
    can_keep,
    counts_steps,
    metrics_of,
)
from ckpt_jax.manage.schedule import Schedule
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Meeting, Processes
from ckpt_jax.restoring.formats import foreign_steps
from ckpt_jax.restoring.rename import Rule
from ckpt_jax.store.directory import visible_in
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, as_path

SECONDS_PER_HOUR = 3600
T = TypeVar("T")

_log = logging.getLogger("ckpt_jax")


class CheckpointManager:
    """Saves numbered checkpoints into a directory and removes those that are not needed.

    A new manager takes over the checkpoints that an earlier manager of the directory recorded.
    Creating a manager removes nothing. A checkpoint is removed only if this manager or an earlier
    one wrote it, and only after a newer one was committed and could be opened.

    There can be one manager of a directory and name at a time. The first save of a new one takes
    over. If an earlier one, in a job that was stopped for example, saves after that, it gets a
    `SupersededError`, and the latest checkpoint stays. Managers with different names in the same
    directory leave each other's checkpoints alone.

    These checkpoints stay: the latest, those that `max_to_keep` keeps, and those that a policy
    keeps.

    * `max_to_keep=3`: the three latest.
    * `max_to_keep=KeepBest("loss", 3, "min")`: the three best, and the latest.
    * `max_to_keep=3, policies=[KeepEveryNSteps(50)]`: the three latest, and 50, 100, 150, ...
      as long as the training steps are the numbers: `save(step)`.
    * `max_to_keep=None`: all; policies decide nothing.

    After the program has gone back to an earlier step and saved, the checkpoints that the new
    latest did not come from count as older than all others.

    Args:
      checkpoint: the `Checkpoint` to save.
      directory: where the checkpoints go; the first save creates it. A relative path keeps its
        meaning if the program changes its working directory.
      max_to_keep: how many of the latest checkpoints to keep, or a policy that takes the place of
        this number. None keeps all.
      keep_checkpoint_every_n_hours: a checkpoint that would be removed is kept forever if it was
        saved at least this many hours after the last one that is kept forever. None or 0 keeps
        none forever.
      checkpoint_name: the names of checkpoints begin with it.
      step_counter: the training step: an integer, a `Variable`, an `nnx.Variable`, or a
        function of no argument that returns one of these. Needed for `checkpoint_interval`.
      checkpoint_interval: at least this many steps are between two saves.
      init_fn: called by `restore_or_initialize` if there is nothing to restore.
      policies: retention policies, or one. The checkpoints that they keep stay besides the
        `max_to_keep` latest.
      last_checkpoint_step: the step of the last save, as if this manager had made it.
      clock: returns the time in seconds since the epoch. It matters only for
        `keep_checkpoint_every_n_hours`.

    Raises:
      ValueError: `max_to_keep` is not positive, an interval is negative or has no step counter, the
        name contains directories, a policy can keep nothing, or the state file names no checkpoint
        and the directory has none.
      TypeError: an argument is of the wrong type.

    Source: `tf.train.CheckpointManager`.

    Example:
      >>> import os, tempfile
      >>> from ckpt_jax.manage.retention import KeepBest
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     manager = CheckpointManager(Checkpoint(step=7), directory, max_to_keep=2,
      ...                                 policies=[KeepBest("accuracy")])
      ...     for accuracy in (0.5, 0.9, 0.6, 0.7):
      ...         path = manager.save(metrics={"accuracy": accuracy})
      ...     [os.path.basename(path) for path in manager.checkpoints]
      ['ckpt-2', 'ckpt-3', 'ckpt-4']
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Path,
        max_to_keep: int | RetentionPolicy | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        policies: RetentionPolicy | Iterable[RetentionPolicy] = (),
        last_checkpoint_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"a manager saves a ckpt.Checkpoint, got {type(checkpoint).__qualname__}. "
                "Pass Checkpoint(name=value)."
            )
        if checkpoint_interval is not None and step_counter is None:
            raise ValueError("checkpoint_interval needs a step_counter, got none")
        if checkpoint_interval is not None and as_integer(checkpoint_interval) < 0:
            raise ValueError(
                f"expected a checkpoint_interval of 0 or more, got {checkpoint_interval}"
            )
        if init_fn is not None and not callable(init_fn):
            raise TypeError(f"init_fn must be a function of no argument, got {init_fn!r}")
        if os.path.basename(checkpoint_name) != checkpoint_name:
            raise ValueError(f"expected a name without directories, got {checkpoint_name!r}")
        limit = _limit(max_to_keep)
        further = (policies,) if isinstance(policies, RetentionPolicy) else (*policies,)
        everything = KeepAny(further if limit is None else (limit, *further))
        for policy in everything.policies:
            if not can_keep(policy):
                raise ValueError(f"expected policies that can keep something, got {policy!r}")
        self._checkpoint = checkpoint
        self._given = as_path(directory, "directory", is_directory=True)
        self._directory = absolute(self._given)  # stays if the working directory changes
        hours = keep_checkpoint_every_n_hours
        if hours is not None and hours < 0:
            raise ValueError(f"expected keep_checkpoint_every_n_hours of 0 or more, got {hours}")
        preserve_interval_seconds = hours * SECONDS_PER_HOUR if hours else None
        self._name = checkpoint_name
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._step_counter = step_counter
        self._schedule = Schedule(
            lambda: as_integer(step_counter), checkpoint_interval, last_checkpoint_step
        )
        self._known_paths: set[str] = set()  # which this manager replaces without a warning
        self._has_restored = False
        self._has_said_unknown = False
        self._status: LoadStatus | None = None
        self._metrics = metrics_of(everything)  # the names that its policies ask for
        self._is_numbered_by_step = not (step_counter is not None and counts_steps(everything))
        self._collection = Collection(
            self._directory,
            checkpoint_name,
            None if limit is None else everything,
            preserve_interval_seconds,
            clock,
        )
        save_runs_of(checkpoint).listen(self._restored)

    # --- verbs -------------------------------------------------------------------------

    def save(
        self,
        checkpoint_number: Any = None,
        *,
        check_interval: bool = True,
        options: CheckpointOptions | None = None,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
        **values: Any,
    ) -> str | None:
        """Saves a checkpoint, records it as the latest, and removes those that are not needed.

        The checkpoint's save counter advances by one, even if a number is given. A save that fails
        changes nothing: neither the counter, nor the state file, nor any checkpoint. If a write
        callback fails, or the state file cannot be written, the new checkpoint exists but is not
        recorded. The next save adopts it, so that it does not stay forever. A save in the
        background is recorded when it has finished; other checkpoints are removed after that.

        If a signal handler or a write callback saves in the middle of a save, the save that
        began later is the latest.

        Args:
          checkpoint_number: the number in the name: an integer, or anything else that is allowed
            as `step_counter`. By default the save counter. A checkpoint of this name is replaced.
          check_interval: whether to return None if fewer than `checkpoint_interval` steps have
            passed. At the step of the last save None is returned in any case. If there are several
            processes, a save that failed in the background counts until `sync`, so that all of
            them find the same steps due.
          options: how to save. Write callbacks are called before the state file changes.
          metrics: numbers by name, for retention policies.
          force: whether to save even if no save is due, also at the step of the last save.
          **values: new values of the checkpoint by name: `manager.save(step, state=state)`; see
            `Checkpoint.save`. They are assigned in any case, even if nothing is saved.

        Returns:
          The path of the checkpoint, or None if `checkpoint_interval` says not to save, or
          if another save was in flight and `when_busy="skip"` says not to wait for it.

        Raises:
          ValueError: the number is negative, a metric is not one number, or the metric of a policy
            is neither among `metrics` nor recorded before.
          TypeError: a number or step is not an integer, or an argument is of the wrong type.
          UnsaveableError: values cannot be saved; nothing was written.
          SupersededError: another manager has taken over. If nothing was at the path of this
            checkpoint, it was saved, but not recorded; later saves write nothing.
          AsyncSaveError: an earlier save failed in the background, and this one has not begun. If
            there are several processes, it has begun all the same, because the processes that know
            of no error take part in it.

        Source: `tf.train.CheckpointManager.save`, where a failed save advances the counter.
        """
        options, context = given(options), current_context()
        patience = context.processes.patience(options.timeout_seconds)
        schedule, step = self._schedule, self._schedule.step()
        runs = save_runs_of(self._checkpoint)

        def check() -> None:
            check_values(self._checkpoint, values)
            for name, value in {"check_interval": check_interval, "force": force}.items():
                if not isinstance(value, bool | np.bool_):
                    raise TypeError(f"{name}: expected True or False, got {value!r}")

        if step is not None:
            runs.settle_doubts(patience)  # their outcome may change what is due
            if not (force or schedule.is_due(step, check_interval)):
                check()
                replace_values(self._checkpoint, values)
                return None

        def open_books(meeting: Meeting) -> ManagedSave | None:
            if not (force or schedule.is_due(step, check_interval)):
                return None  # another thread has saved this step meanwhile
            replace_values(self._checkpoint, values)
            now = step
            if meeting.count > 1 and now is None:
                counter = checkpoint_number if self._step_counter is None else self._step_counter
                now = None if counter is None else as_integer(counter)

            def new_record(count: int) -> CheckpointRecord:
                return self._new_record(count, checkpoint_number, metrics, meeting.leads)

            return ManagedSave(
                self._checkpoint,
                schedule,
                self._collection,
                meeting,
                options,
                step,
                now,
                new_record,
            )

        prefix = os.path.join(self._directory, self._name)
        path = runs.save(prefix, options, patience, context, check, open_books)
        if path is None:  # a preemption handler may save next, without values
            replace_values(self._checkpoint, values)
            return None
        return self._shown(path)

    def _new_record(
        self, count: int, number: Any, metrics: Mapping[str, Any] | None, leads: bool
    ) -> CheckpointRecord:
        """The record of a save that begins, given the save counter and the arguments of `save`."""
        scores = self._checked_metrics(metrics)
        is_numbered = number is not None
        number = as_integer(number) if is_numbered else count
        if number < 0:
            raise ValueError(f"expected a checkpoint number of 0 or more, got {number}")
        path = os.path.join(self._directory, f"{self._name}-{number}")
        if leads:
            self._warn_of_replacing(path)
            if not is_numbered:
                self._warn_of_counter(path)
        return CheckpointRecord(number, metrics=scores, path=path)

    def _checked_metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        """The metrics of a save as numbers, after a check that the policies can use them."""
        scores = _numbers(metrics)
        records = self._collection.ledger.records
        known = {*scores, *(name for record in records for name in known_metrics(record))}
        unknown = ", ".join(map(repr, sorted(self._metrics - known)))
        if unknown and metrics is not None:
            raise ValueError(
                f"{self._given}: a retention policy asks for the metric {unknown}, but no "
                f"checkpoint has it, and this save gives "
                f"{', '.join(map(repr, sorted(scores))) or 'no metric'}. Nothing was saved. "
                "Correct the name in the policy or in metrics={...}."
            )
        if unknown and records and not self._has_said_unknown:
            self._has_said_unknown = True
            _log.warning(
                "%s: a retention policy asks for the metric %s, but keeps nothing so far, because "
                "no save has given metrics. Pass save(metrics={...}).",
                *(self._given, unknown),
            )
        return scores

    def restore_or_initialize(self) -> str | None:
        """Restores the latest checkpoint; if there is none, calls `init_fn`.

        If the latest is gone or damaged, the one with the next smaller number that can be restored
        is taken instead, and a warning says so. If there are several processes, `preflight` comes
        first, and all restore the same checkpoint: if one process cannot use it, none does.

        If the directory holds steps of a manager of Orbax, and no checkpoint of this manager, the
        latest step is restored, and the save counter goes on from its number. Such steps are never
        removed.

        If something was not restored, a warning says what. `status` can then be asserted on.

        Returns:
          The path of the checkpoint that was restored, or None if there was none.

        Raises:
          CheckpointNotFoundError, CorruptCheckpointError: there should be a checkpoint, but
            neither the latest nor an older one is usable. The error describes the latest.
          RestoreMismatchError: as in `Checkpoint.restore`, or nothing of the checkpoint was
            restored, because the program has other names.
          UnsupportedFormatError: as in `Checkpoint.restore`, or the directory holds only
            checkpoints of another library that cannot be read here.
          PreflightError, ProcessError, BarrierTimeoutError: only if there are several processes.

        Source: `tf.train.CheckpointManager.restore_or_initialize`, without the older ones.

        Example:
          >>> import os, tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     path = CheckpointManager(Checkpoint(step=7), directory).save()
          ...     fresh = Checkpoint(step=0)
          ...     path = CheckpointManager(fresh, directory).restore_or_initialize()
          ...     os.path.basename(path), fresh.step
          ('ckpt-1', 7)
        """
        if current().count > 1 or is_url(self._directory):
            preflight(self._directory)
        paths = self._agreed_paths(self._candidates)
        if not paths:
            self._warn_of_others()
            if self._init_fn is not None:
                self._init_fn()
            return None
        path, _, left = self._restore_newest(paths, (), None)
        if left is not None:
            _log.warning(
                "%s was restored in part: %s. If you did not expect that, compare the names in "
                "print(manager.status.report), and map them with manager.restore(rename=[...]).",
                *(self._shown(path), left),
            )
        return self._shown(path)

    def restore(
        self,
        step: Any = None,
        *,
        best: str | None = None,
        mode: Literal["max", "min"] = "min",
        rename: Iterable[Rule] = (),
        options: CheckpointOptions | None = None,
    ) -> LoadStatus:
        """Restores a checkpoint of the directory: the latest, the one of a step, or the best.

        To go back to an earlier step, restore it and go on saving. The next save is then the
        latest, and the checkpoints above it are the first to be removed.

        Args:
          step: the number of the checkpoint. By default the latest, as in `restore_or_initialize`.
          best: the metric by which the best checkpoint is chosen.
          mode: whether "min" or "max" is the best value of the metric.
          rename: see `Checkpoint.restore`.
          options: see `Checkpoint.restore`.

        Returns:
          A status to assert on: `manager.restore(3000).assert_consumed()`.

        Raises:
          CheckpointNotFoundError: there is no such checkpoint, or none at all.
          ValueError: both a step and a metric were given, or no checkpoint has the metric.
          RestoreMismatchError: as in `Checkpoint.restore`, or nothing of the checkpoint was
            restored.
          CorruptCheckpointError: it is damaged.

        Example:
          >>> import tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     checkpoint = Checkpoint(x=0)
          ...     manager = CheckpointManager(checkpoint, directory)
          ...     for checkpoint.x, loss in ((1, 0.5), (2, 0.25), (3, 8.0)):
          ...         path = manager.save(checkpoint.x, metrics={"loss": loss})
          ...     status = manager.restore(best="loss").assert_consumed()
          ...     checkpoint.x
          2
        """
        options = given(options)
        if step is not None and best is not None:
            raise ValueError(f"expected a step or a metric, got {step!r} and best={best!r}")
        number = None if step is None else as_integer(step)

        def chosen() -> list[str]:
            if best is not None:
                found = self._best(best, mode)
                paths = [found] if found is not None else []
            elif number is not None:
                return [self._path_of(number)]
            else:
                paths = self._candidates()
            if not paths:
                refuse_others(self._directory)
                raise CheckpointNotFoundError(
                    f"{self._given}: expected checkpoints {self._name}-N, found "
                    f"{self._others() or 'none'}. Save first, or check directory and "
                    "checkpoint_name."
                )
            return paths

        return self._restore_newest(self._agreed_paths(chosen), rename, options)[1]

    def _candidates(self) -> list[str]:
        """The checkpoints that can be restored, best first; those of other libraries come last."""
        foreign = foreign_steps(self._directory)
        return [*self._collection.candidates(), *reversed(foreign.values())]

    def _path_of(self, number: int) -> str:
        """The path of the checkpoint with a number, or else of the step of another library."""
        try:
            return self._collection.path_of(number)
        except CheckpointNotFoundError:
            foreign = foreign_steps(self._directory)
            if number not in foreign:
                raise
            return foreign[number]

    def _warn_of_replacing(self, path: str) -> None:
        """Warns if a save will replace a checkpoint of an earlier run."""
        ledger = self._collection.ledger
        listed = {record.path for record in ledger.records} | {ledger.latest}
        is_new = not (self._known_paths or self._has_restored or self._checkpoint.save_counter > 1)
        is_surprise = path not in self._known_paths and (is_new or path not in listed)
        if is_surprise and checkpoint_exists(path):
            _log.warning(
                "%s: expected no checkpoint at the path of this save, found one of an earlier "
                "run. It is replaced. To go on with that run, call restore_or_initialize() "
                "first; to keep its checkpoints, save into another directory or under another "
                "checkpoint_name.",
                self._shown(path),
            )
        self._known_paths.add(path)

    def _warn_of_counter(self, path: str) -> None:
        """Warns once if a policy takes numbers of the save counter for training steps."""
        if not self._is_numbered_by_step:
            self._is_numbered_by_step = True
            _log.warning(
                "%s: a retention policy takes the numbers of checkpoints for training steps, but "
                "they come from the save counter: this checkpoint is %s. Pass the step: "
                "save(step).",
                *(self._given, os.path.basename(path)),
            )

    def _agreed_paths(self, find: Callable[[], list[str]]) -> list[str]:
        """The checkpoints to restore, best first, as process 0 finds them."""
        seconds = DEFAULT.timeout_seconds
        with current().meeting(f"restoring from {self._directory}", seconds) as meeting:
            self.sync()
            return meeting.conclude(None, lambda _: find())

    def _restore_newest(
        self, paths: Sequence[str], rename: Iterable[Rule], options: CheckpointOptions | None
    ) -> tuple[str, LoadStatus, str | None]:
        """Restores the first usable path; returns it, the status, and what was left out."""
        processes: Processes = current()
        rules, before = tuple(rename), self._checkpoint.save_counter
        first: Exception | None = None
        for path in paths:
            error: CorruptCheckpointError | CheckpointNotFoundError | None = None
            status: LoadStatus | None = None
            # If one process cannot use a checkpoint, none does.
            with processes.meeting(f"restoring {path}", DEFAULT.timeout_seconds) as meeting:
                try:
                    status = self._checkpoint.restore(path, options, rename=rules)
                except (CorruptCheckpointError, CheckpointNotFoundError) as found:
                    error = found
                problem = meeting.conclude(error and str(error), _first_problem)
            if problem is None:
                assert status is not None
                left = self._check_match(path, status, before)
                if path != paths[0]:
                    _log.warning("fell back to %s, the newest usable checkpoint", path)
                self._status = status
                self._schedule.restored(path)
                self._count_on(path)
                return path, status, left
            _log.warning("the checkpoint %s is not usable: %s", path, problem)
            first = first or error or CorruptCheckpointError(problem)
        assert first is not None
        raise first

    def _count_on(self, path: str) -> None:
        """Lets the save counter go on from the step of another library, which does not know it."""
        for step, foreign in foreign_steps(self._directory).items():
            if foreign == path:
                set_save_counter(self._checkpoint, step)

    def _check_match(self, path: str, status: LoadStatus, counter: int) -> str | None:
        """Checks that a restore has restored something; says what it has left out."""
        is_nothing, left = outcome_of(status)
        if is_nothing:
            status.expect_partial()
            set_save_counter(self._checkpoint, counter)
            raise RestoreMismatchError(
                f"{self._shown(path)}: nothing of this checkpoint was restored: "
                f"{left}. Give the objects the names under which they were saved, "
                "or pass manager.restore(rename=[(saved, target), ...]).",
                status.report,
            )
        return left

    def _restored(self, path: str) -> None:
        """Notes that the checkpoint's objects were restored, by the manager or without it."""
        self._has_restored = True
        above, name = os.path.split(absolute(path))
        is_own = above == self._directory and own_number(self._name, name) is not None
        if is_own:
            self._collection.restored(os.path.join(above, name))
        with contextlib.suppress(TypeError):  # the step counter may hold nothing yet
            self._schedule.restored(os.path.join(above, name) if is_own else None)

    def _warn_of_others(self) -> None:
        """Warns if there are only checkpoints with other names.

        Raises:
          UnsupportedFormatError: there are checkpoints of another library that cannot be read.
        """
        refuse_others(self._directory)
        if others := self._others():
            _log.warning(
                "%s: expected checkpoints %s-N, found %s. Nothing is restored. To go on from one "
                "of these, restore it by its path, or pass its name as checkpoint_name.",
                *(self._given, self._name, others),
            )

    def _others(self) -> str:
        names = visible_in(self._directory)
        return f"only {', '.join(names[-5:])}" if names else ""

    def best(self, metric: str, mode: Literal["max", "min"] = "min") -> str | None:
        """The path of the managed checkpoint with the best value of a metric.

        Args:
          metric: its name in `save(metrics=...)`.
          mode: whether "min" or "max" is the best value.

        Returns:
          A path; None if no checkpoint has metrics.

        Raises:
          ValueError: checkpoints have metrics, but not this one; or the mode is unknown.
        """
        path = self._best(metric, mode)
        return path and self._shown(path)

    def _best(self, metric: str, mode: Literal["max", "min"]) -> str | None:
        best = KeepBest(metric, 1, mode)
        records = [
            replace(record, metrics=known_metrics(record))
            for record in self._collection.ledger.records
            if checkpoint_exists(record.path)
        ]
        numbers = best.keep(tuple(records))
        for record in records:
            if record.number in numbers:
                return record.path
        known = sorted({name for record in records for name in record.metrics})
        if known and metric not in known:
            raise ValueError(
                f"{self._given}: expected checkpoints with the metric {metric!r}, found the "
                f"metrics {', '.join(map(repr, known))}. Pass one of these."
            )
        return None

    def metrics(self, step: Any) -> dict[str, float]:
        """The metrics with which a managed checkpoint was saved.

        Args:
          step: its number.

        Raises:
          CheckpointNotFoundError: there is no managed checkpoint of this number.
        """
        number = as_integer(step)
        for record in self._collection.ledger.records:
            if record.number == number:
                return dict(known_metrics(record))
        raise CheckpointNotFoundError(
            f"{self._given}: expected a managed checkpoint {self._name}-{number}, found "
            f"{', '.join(map(str, self.steps)) or 'none'}. Pass one of manager.steps."
        )

    def delete(self, step: Any) -> None:
        """Removes a checkpoint of this manager's name, whether it is managed or not.

        If it is the latest, the one before it becomes the latest.

        Args:
          step: its number.

        Raises:
          CheckpointNotFoundError: there is no checkpoint of this number.
          ValueError: it is the latest, and no other one is usable.
          SupersededError: another manager has taken over; nothing was removed.
          OSError: it could not be removed.
        """
        number = as_integer(step)
        self._changed(f"deleting {self._name}-{number}", lambda: self._collection.delete(number))

    def _changed(self, what: str, change: Callable[[], T]) -> T:
        """Lets process 0 change the collection while nothing is saved; the others follow.

        Returns:
          The result of `change`.
        """
        with (
            current().meeting(what, DEFAULT.timeout_seconds) as meeting,
            save_runs_of(self._checkpoint).background.turn(),
        ):
            result = meeting.conclude(None, lambda _: change())
            if not meeting.leads:
                self._collection.follow()
        return result

    def gc(self, dry_run: bool = False) -> list[str]:
        """Removes now what the next save would remove, and what interrupted saves left.

        Interrupted saves leave staging directories. Those that begin with this manager's name and a
        number up to that of the latest checkpoint are removed, if their owner is provably gone.
        (Those with a larger number are removed by the next save with this number.)
        If the latest checkpoint is not usable, nothing is removed.

        Args:
          dry_run: whether to say only what would be removed.

        Returns:
          The paths that were, or would be, removed.

        Raises:
          SupersededError: another manager has taken over; nothing was removed.

        Example:
          >>> import os, tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     manager = CheckpointManager(Checkpoint(step=7), directory, max_to_keep=None)
          ...     paths = [manager.save() for _ in range(3)]
          ...     manager = CheckpointManager(Checkpoint(step=7), directory, max_to_keep=1)
          ...     [os.path.basename(path) for path in manager.gc(dry_run=True)]
          ['ckpt-1', 'ckpt-2']
        """
        what = f"collecting in {self._directory}"
        removed = self._changed(what, lambda: self._collection.collect(dry_run))
        return [self._shown(path) for path in removed]

    def sync(self) -> None:
        """Waits for a save in the background.

        Raises:
          AsyncSaveError: it failed; the cause is chained.

        Source: `tf.train.CheckpointManager.sync`.
        """
        try:
            self._checkpoint.sync()
        finally:
            self._schedule.synchronised()

    # --- properties --------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """The `Checkpoint` that the manager saves."""
        return self._checkpoint

    def __repr__(self) -> str:
        steps = self.steps
        count = f"{len(steps)} checkpoint{'s'[: len(steps) != 1]}"
        latest = f", the latest of step {steps[-1]}" if steps else ""
        return f"<CheckpointManager of {self._given}: {count}{latest}>"

    def _repr_html_(self) -> str:
        """The checkpoints with their metrics, for notebooks."""
        records = self._collection.ledger.records
        found = [(record.number, known_metrics(record)) for record in records]
        names = sorted({name for _, metrics in found for name in metrics})
        rows = [["step", *names]]
        for step, metrics in found:
            rows.append([str(step), *[f"{metrics[n]:.6g}" if n in metrics else "" for n in names]])
        cells = ["".join([f"<td>{html.escape(cell)}</td>" for cell in row]) for row in rows]
        table = "".join([f"<tr>{row}</tr>" for row in cells]) if found else ""
        return f"<div>{html.escape(repr(self)[1:-1])}</div><table>{table}</table>"

    @property
    def directory(self) -> str:
        """The directory of the checkpoints, as it was given."""
        return self._given

    @property
    def checkpoint_interval(self) -> int | None:
        """The least number of steps between two saves."""
        return self._interval

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the checkpoint that was saved last; None if there is none.

        It may have been removed since. `ckpt.latest_checkpoint` checks that it exists.
        """
        latest = self._collection.ledger.latest
        return latest and self._shown(latest)

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the managed checkpoints, in the order of numbers, the latest last.

        Those on abandoned branches come first. Those that are kept forever are not listed.
        """
        return [self._shown(record.path) for record in self._collection.ledger.records]

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the managed checkpoints, in the order of `checkpoints`."""
        return tuple([record.number for record in self._collection.ledger.records])

    @property
    def status(self) -> LoadStatus | None:
        """The status of the last restore by this manager; None if there was none."""
        return self._status

    def _shown(self, path: str) -> str:
        """A path of this manager, beginning with the directory as it was given."""
        directory, name = os.path.split(path)
        return os.path.join(self._given, name) if directory == self._directory else path


def make_due(manager: CheckpointManager) -> None:
    """Makes a manager's next save due, whatever the step."""
    manager._schedule.make_due()


def has_saved_step(manager: CheckpointManager) -> bool:
    """Whether a manager's latest checkpoint is one of the step where the program is."""
    return manager._schedule.has_saved(manager._collection.ledger.latest)


def _first_problem(problems: Sequence[str | None]) -> str | None:
    """The first problem of any process; the process is named if there are several."""
    for process, problem in enumerate(problems):
        if problem is not None:
            return problem if len(problems) == 1 else f"process {process}: {problem}"
    return None


# --- numbers ---------------------------------------------------------------------------


def as_integer(value: Any) -> int:
    """The integer that a number, a variable, or a function that returns one of these stands for.

    Raises:
      TypeError: there is none.

    >>> from ckpt_jax.objects.trackable import Variable
    >>> as_integer(np.int64(3)), as_integer(Variable(4)), as_integer(lambda: 5)
    (3, 4, 5)
    """
    view = view_of(value)
    if view is not None and view.mutable:
        value = view.values(value).get(VARIABLE_VALUE, value)
    elif callable(value):
        return as_integer(value())
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            "expected an integer, a variable that holds one, or a function that returns one, "
            f"got {value!r}"
        ) from None


def _limit(max_to_keep: Any) -> RetentionPolicy | None:
    """The policy that `max_to_keep` stands for; None if it keeps all."""
    if max_to_keep is None:
        return None
    if isinstance(max_to_keep, RetentionPolicy):
        return max_to_keep
    if as_integer(max_to_keep) <= 0:
        raise ValueError(f"expected a positive max_to_keep or None, got {max_to_keep}")
    return KeepLatest(as_integer(max_to_keep))


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be numbers by name, got {metrics!r}")
    return {name: _as_number(name, value) for name, value in (metrics or {}).items()}


def _as_number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if not isinstance(name, str) or array.shape != () or array.dtype.kind in "cOSUMm":
        raise ValueError(f"metrics[{name!r}]: expected one real number by name, got {value!r}")
    return float(array)
