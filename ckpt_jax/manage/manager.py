"""CheckpointManager: numbered checkpoints in a directory, of which the unneeded are removed.

A *managed* checkpoint is one that this manager wrote, or an earlier manager of the same directory
and name as the state file says. The manager removes no other; `collection` says when.

Checkpoints are in the order of their numbers. If the program goes back to an earlier step and on
from there, the one that was saved last is the latest. Those with larger numbers are then on an
*abandoned branch*: they are the first to be removed, and no restart falls back to them. Times
decide nothing but `keep_checkpoint_every_n_hours`.

If there are several processes, process 0 records and removes, and the others read the outcome
from the state file. Process 0 says which checkpoint is restored.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ckpt_jax.api.checkpoint import (
    Checkpoint,
    check_values,
    replace_values,
    request_for,
    save_runs_of,
    set_save_counter,
    take_back_count,
)
from ckpt_jax.api.latest import checkpoint_exists, refuse_others
from ckpt_jax.api.preflight import preflight
from ckpt_jax.api.status import LoadStatus, restored_nothing, what_was_left
from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError, RestoreMismatchError
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.ledger import known_metrics, own_number
from ckpt_jax.manage.schedule import Schedule
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Meeting, Processes
from ckpt_jax.restoring.rename import Rule
from ckpt_jax.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    KeepLatest,
    RetentionPolicy,
    can_keep,
    counts_steps,
    metrics_of,
)
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.store.directory import checkpoints_in
from ckpt_jax.store.paths import absolute, as_path

SECONDS_PER_HOUR = 3600

_log = logging.getLogger("ckpt_jax")


class CheckpointManager:
    """Saves numbered checkpoints into a directory and removes those that are not needed.

    What an earlier manager of the directory recorded is taken up again. Nothing is removed
    by making a manager; a checkpoint is removed only after a newer one was committed and
    could be opened, and only if this manager or an earlier one wrote it. There can be one
    manager of a directory and name at a time. Managers with other names in the same directory leave
    each other's checkpoints alone.

    The checkpoints that stay are the latest, what `max_to_keep` says, and what any policy keeps:

    * `max_to_keep=3`: the three latest.
    * `max_to_keep=KeepBest("loss", 3, "min")`: the three best, and the latest.
    * `max_to_keep=3, policies=[KeepEveryNSteps(50)]`: the three latest, and 50, 100, 150, ...
      as long as the training steps are the numbers: `save(step)`.
    * `max_to_keep=None`: all; policies decide nothing.

    After going back to an earlier step, the checkpoints above the new latest count as older
    than all others.

    Args:
      checkpoint: the `Checkpoint` whose objects are saved.
      directory: where the checkpoints go; it is made by the first save. A relative one means
        the same as long as the manager lives, wherever the program goes.
      max_to_keep: how many of the latest to keep; None keeps all. Or a policy, which then decides
        in place of a number.
      keep_checkpoint_every_n_hours: of those that would be removed, one is kept forever if
        it was saved this many hours after the last such one. None or 0 keeps none.
      checkpoint_name: what the names of checkpoints begin with.
      step_counter: the training step: an integer, a `Variable`, an `nnx.Variable`, or a
        function of no argument that returns one of these. Needed for `checkpoint_interval`.
      checkpoint_interval: at least this many steps are between two saves.
      init_fn: called by `restore_or_initialize` if there is nothing to restore.
      policies: retention policies, or one. What one of them keeps stays beyond the `max_to_keep`
        latest.
      last_checkpoint_step: the step of the last save, as if this manager had made it.
      clock: the time in seconds since the epoch. It decides nothing but
        `keep_checkpoint_every_n_hours`.

    Raises:
      ValueError: `max_to_keep` is not positive, a negative interval or one without a step
        counter, a name with directories, a policy that can keep nothing, or a state file that
        names no checkpoint in a directory without any.
      TypeError: a checkpoint, policy, number or function that is none.

    Source: `tf.train.CheckpointManager`.

    Example:
      >>> import os, tempfile
      >>> from ckpt_jax.retention import KeepBest
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
                f"a manager saves a ckpt.Checkpoint, got {type(checkpoint).__qualname__}: "
                "give it Checkpoint(name=value)"
            )
        limit = _limit(max_to_keep)
        if checkpoint_interval is not None and step_counter is None:
            raise ValueError("checkpoint_interval needs a step_counter, got none")
        if checkpoint_interval is not None and as_integer(checkpoint_interval) < 0:
            raise ValueError(f"expected a checkpoint_interval of 0 or more: {checkpoint_interval}")
        if init_fn is not None and not callable(init_fn):
            raise TypeError(f"init_fn must be a function of no argument, got {init_fn!r}")
        if os.path.basename(checkpoint_name) != checkpoint_name:
            raise ValueError(f"expected a name without directories, got {checkpoint_name!r}")
        further = KeepAny((policies,) if isinstance(policies, RetentionPolicy) else (*policies,))
        for policy in further.policies:
            if not can_keep(policy):
                raise ValueError(f"expected policies that can keep something, got {policy!r}")
        self._checkpoint = checkpoint
        self._given = as_path(directory, "directory", is_directory=True)
        # What that means now, also when the program has gone elsewhere since.
        self._directory = absolute(self._given)
        policy = None if limit is None else KeepAny((limit, *further.policies))
        hours = keep_checkpoint_every_n_hours
        if hours is not None and hours < 0:
            raise ValueError(f"expected keep_checkpoint_every_n_hours of 0 or more, got {hours}")
        preserve_interval_seconds = hours * SECONDS_PER_HOUR if hours else None
        self._name = checkpoint_name
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._schedule = Schedule(
            lambda: as_integer(step_counter), checkpoint_interval, last_checkpoint_step
        )
        self._clock = clock
        self._known_paths: set[str] = set()  # that this manager may replace without a word
        self._has_restored = False
        self._has_said_unknown = False
        self._status: LoadStatus | None = None
        everything = KeepAny((*further.policies, *([limit] if limit else [])))
        self._metrics = metrics_of(everything)  # that its policies go by
        self._is_numbered_by_step = not (step_counter is not None and counts_steps(everything))
        self._collection = Collection(
            self._directory, checkpoint_name, policy, preserve_interval_seconds, clock()
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
        """Saves a checkpoint, records it as the latest, and removes what is not needed.

        The checkpoint's save counter advances by one, with an explicit number too. A save
        that fails changes nothing: not the counter, the state file, or any checkpoint. If a
        write callback fails, or the state file cannot be written, the new checkpoint is there,
        but is not recorded; the next save adopts it, so that it does not stay forever. A save in
        the background is recorded, and the others are removed, when it has finished.

        If a signal handler or a write callback saves in the middle of a save, the save that
        began later is the latest.

        Args:
          checkpoint_number: the number in its name; an integer, or what else `step_counter`
            may be. By default the save counter. A checkpoint that has this name is replaced.
          check_interval: whether to return None before `checkpoint_interval` steps have gone
            by. At the step of the last save it is None in any case. If there are several
            processes, a save that failed in the background counts until `sync`, so that all of
            them find the same steps due.
          options: how to save; write callbacks are called before the state file changes.
          metrics: numbers by name, for retention policies.
          force: saves whatever the interval says, at the step of the last save too.
          **values: new values of the checkpoint by name: `manager.save(step, state=state)`; see
            `Checkpoint.save`. They are assigned in any case, even if nothing is saved.

        Returns:
          The path of the checkpoint, or None if `checkpoint_interval` says not to save, or
          if another save was in flight and `when_busy="skip"` says not to wait for it.

        Raises:
          ValueError: a negative number, a metric that is not one number, or metrics among which
            that of a policy is not, nor has it been recorded before.
          TypeError: a number or step that is no integer, or an argument of another kind.
          UnsaveableError: values that cannot be saved; nothing was written.
          AsyncSaveError: an earlier save failed in the background; this one has not begun. If
            there are several processes it has, because those that know of no error take part.

        Source: `tf.train.CheckpointManager.save`, where a failed save advances the counter.
        """
        options = given(options)
        check_values(self._checkpoint, values)
        for name, value in {"check_interval": check_interval, "force": force}.items():
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        schedule, step = self._schedule, self._schedule.step()
        runs = save_runs_of(self._checkpoint)
        if step is not None:
            runs.settle_doubts(options.timeout_seconds)  # by which it may be due
            if not (force or schedule.is_due(step, check_interval)):
                replace_values(self._checkpoint, values)
                return None

        def open_books(meeting: Meeting) -> _ManagedSave | None:
            if not (force or schedule.is_due(step, check_interval)):
                return None  # another thread has saved this step meanwhile
            replace_values(self._checkpoint, values)
            return _ManagedSave(self, meeting, options, step, checkpoint_number, metrics)

        prefix = os.path.join(self._directory, self._name)
        path = runs.save(prefix, options, current_context(), open_books)
        if path is None:  # a preemption handler may save next, without values
            replace_values(self._checkpoint, values)
            return None
        return self._shown(path)

    def _scores(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        """The metrics of a save, as numbers."""
        scores = _scores(metrics)
        records = self._collection.ledger.records
        known = {*scores, *(name for record in records for name in known_metrics(record))}
        unknown = ", ".join(map(repr, sorted(self._metrics - known)))
        if unknown and metrics is not None:
            raise ValueError(
                f"{self._given}: a retention policy goes by the metric {unknown}, which no "
                f"checkpoint has, and this save gives "
                f"{', '.join(map(repr, sorted(scores))) or 'no metric'}. Nothing was saved: "
                "correct the name in the policy or in metrics={...}."
            )
        if unknown and records and not self._has_said_unknown:
            self._has_said_unknown = True
            _log.warning(
                "%s: a retention policy goes by the metric %s, and keeps nothing so far: no save "
                "has given metrics. Pass save(metrics={...}).",
                *(self._given, unknown),
            )
        return scores

    def restore_or_initialize(self) -> str | None:
        """Restores the latest checkpoint; if there is none, calls `init_fn`.

        If the latest is gone or damaged, the newest older one that can be restored is
        taken instead, by number, and a warning says so. If there are several processes,
        `preflight` comes first, and all restore the same checkpoint: one that some process
        cannot use is used by none.

        A warning says what was not restored, if anything. `status` can then be asserted on.

        Returns:
          The path of the checkpoint that was restored, or None if there was none.

        Raises:
          CheckpointNotFoundError, CorruptCheckpointError: there should be a checkpoint, but
            neither the latest nor an older one is usable; the error is that of the latest.
          RestoreMismatchError: as `Checkpoint.restore`, or nothing of the checkpoint was restored,
            because the program has other names.
          UnsupportedFormatError: as `Checkpoint.restore`, or the directory holds checkpoints of
            another library alone.
          PreflightError, ProcessError, BarrierTimeoutError: if there are several processes.

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
        if current().count > 1:
            preflight(self._directory)
        paths = self._agreed_paths(self._collection.candidates)
        if not paths:
            self._say_what_else_is_there()
            if self._init_fn is not None:
                self._init_fn()
            return None
        path, status = self._restore_newest(paths, (), None)
        left = what_was_left(status)
        if left is not None:
            _log.warning(
                "%s was restored in part: %s. If that is not as it should be, compare the names: "
                "print(manager.status.report); manager.restore(rename=[...]) maps them.",
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
        """Restores a checkpoint of the directory: the latest, that of a step, or the best.

        Going back to an earlier step is restoring it and saving on: the next save is the latest,
        and the checkpoints above it are the first to be removed.

        Args:
          step: the number of the checkpoint. By default the latest, as `restore_or_initialize`.
          best: the metric by which the best checkpoint is taken.
          mode: whether "min" or "max" is the best value of it.
          rename: see `Checkpoint.restore`.
          options: see `Checkpoint.restore`.

        Returns:
          A status to assert on: `manager.restore(3000).assert_consumed()`.

        Raises:
          CheckpointNotFoundError: there is no such checkpoint, or none at all.
          ValueError: both a step and a metric, or a metric that no checkpoint has.
          RestoreMismatchError: as `Checkpoint.restore`, or nothing of the checkpoint was restored.
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
                return [self._collection.path_of(number)]
            else:
                paths = self._collection.candidates()
            if not paths:
                refuse_others(self._directory)
                raise CheckpointNotFoundError(
                    f"{self._given}: expected checkpoints {self._name}-N, found none"
                    f"{self._others_listed()}. Save first, or check directory and checkpoint_name."
                )
            return paths

        return self._restore_newest(self._agreed_paths(chosen), rename, options)[1]

    def _before_save(self, path: str, *, is_numbered: bool) -> None:
        """Says what may surprise about the path of a save."""
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
        if not (is_numbered or self._is_numbered_by_step):
            self._is_numbered_by_step = True
            _log.warning(
                "%s: a retention policy counts the numbers of checkpoints, which are those of the "
                "save counter: this one is %s. To count training steps, pass them: save(step).",
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
    ) -> tuple[str, LoadStatus]:
        processes: Processes = current()
        rules, before = tuple(rename), self._checkpoint.save_counter
        first: Exception | None = None
        for path in paths:
            error: CorruptCheckpointError | CheckpointNotFoundError | None = None
            status: LoadStatus | None = None
            # One that some process cannot use is not used by any.
            with processes.meeting(f"restoring {path}", DEFAULT.timeout_seconds) as meeting:
                try:
                    status = self._checkpoint.restore(path, options, rename=rules)
                except (CorruptCheckpointError, CheckpointNotFoundError) as found:
                    error = found
                problem = meeting.conclude(error and str(error), _first_problem)
            if problem is None:
                assert status is not None
                self._check_match(path, status, before)
                if path != paths[0]:
                    _log.warning("fell back to %s, the newest usable checkpoint", path)
                self._status = status
                self._schedule.restored(path)
                return path, status
            _log.warning("the checkpoint %s is not usable: %s", path, problem)
            first = first or error or CorruptCheckpointError(problem)
        assert first is not None
        raise first

    def _check_match(self, path: str, status: LoadStatus, counter: int) -> None:
        if restored_nothing(status):
            status.expect_partial()
            set_save_counter(self._checkpoint, counter)
            raise RestoreMismatchError(
                f"{self._shown(path)}: nothing of this checkpoint was restored: "
                f"{what_was_left(status)}. Give the objects the names under which they were saved, "
                "or pass manager.restore(rename=[(saved, target), ...]).",
                status.report,
            )

    def _restored(self, path: str) -> None:
        """Notes that the checkpoint's objects were restored, by whatever verb."""
        self._has_restored = True
        above, name = os.path.split(os.path.abspath(path))
        is_own = above == self._directory and own_number(self._name, name) is not None
        if is_own:
            self._collection.restored(os.path.join(above, name))
        with contextlib.suppress(TypeError):  # a step counter that holds nothing yet
            self._schedule.restored(os.path.join(above, name) if is_own else None)

    def _say_what_else_is_there(self) -> None:
        refuse_others(self._directory)
        if others := self._others_listed():
            _log.warning(
                "%s: expected checkpoints %s-N, found none%s. Nothing is restored; to go on from "
                "one of these, restore it by its path, or give its name as checkpoint_name.",
                *(self._given, self._name, others),
            )

    def _others_listed(self) -> str:
        names = checkpoints_in(self._directory)
        return f", but {', '.join(names[-5:])}" if names else ""

    def best(self, metric: str, mode: Literal["max", "min"] = "min") -> str | None:
        """The path of the managed checkpoint with the best value of a metric.

        Args:
          metric: its name in `save(metrics=...)`.
          mode: whether "min" or "max" is the best value.

        Returns:
          A path; None if no checkpoint has metrics.

        Raises:
          ValueError: checkpoints have other metrics, or another mode.
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
          CheckpointNotFoundError: there is none of this number.
          ValueError: there is no other one that could become the latest.
          OSError: it could not be removed.
        """
        number, seconds = as_integer(step), DEFAULT.timeout_seconds
        with (
            current().meeting(f"deleting {self._name}-{number}", seconds) as meeting,
            save_runs_of(self._checkpoint).background.turn(),
        ):
            meeting.conclude(None, lambda _: self._collection.delete(number))
            if not meeting.leads:
                self._collection.follow()

    def gc(self, dry_run: bool = False) -> list[str]:
        """Removes now what the next save would remove, and what interrupted saves left.

        The latter are staging directories of this manager's name with a number up to that of
        the latest checkpoint, whose owner is provably gone. (The next save of a later number
        removes what an interrupted one has left of it.)
        Where the latest checkpoint is not usable, nothing is removed.

        Args:
          dry_run: only says what would be removed.

        Returns:
          The paths that were, or would be, removed.

        Example:
          >>> import os, tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     manager = CheckpointManager(Checkpoint(step=7), directory, max_to_keep=None)
          ...     paths = [manager.save() for _ in range(3)]
          ...     manager = CheckpointManager(Checkpoint(step=7), directory, max_to_keep=1)
          ...     [os.path.basename(path) for path in manager.gc(dry_run=True)]
          ['ckpt-1', 'ckpt-2']
        """
        seconds = DEFAULT.timeout_seconds
        what = f"collecting in {self._directory}"
        with (
            current().meeting(what, seconds) as meeting,
            save_runs_of(self._checkpoint).background.turn(),
        ):
            removed = meeting.conclude(None, lambda _: self._collection.collect(dry_run))
            if not meeting.leads:
                self._collection.follow()
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
        """The checkpoint whose objects are saved."""
        return self._checkpoint

    def __repr__(self) -> str:
        count = len(self.checkpoints)
        return f"<CheckpointManager of {self._given}: {count} checkpoint{'s'[: count != 1]}>"

    @property
    def directory(self) -> str:
        """Where the checkpoints are, as it was given."""
        return self._given

    @property
    def checkpoint_interval(self) -> int | None:
        """The least number of steps between two saves."""
        return self._interval

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the checkpoint that was saved last, or None.

        That it is still there is not checked; `ckpt.latest_checkpoint` does that.
        """
        latest = self._collection.ledger.latest
        return latest and self._shown(latest)

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the managed checkpoints, in the order of numbers, the latest last.

        Those on abandoned branches come first. Those that are kept forever are not among them.
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
        """A path of this manager as it begins with the directory that was given."""
        directory, name = os.path.split(path)
        return os.path.join(self._given, name) if directory == self._directory else path


class _ManagedSave:
    """The bookkeeping of one save of a manager."""

    def __init__(
        self,
        manager: CheckpointManager,
        meeting: Meeting,
        options: CheckpointOptions,
        step: int | None,
        number: Any,
        metrics: Mapping[str, Any] | None,
    ):
        self._manager, self._meeting, self._options = manager, meeting, options
        self._step, self._before = step, manager._schedule.position
        self._count = manager.checkpoint.save_counter + 1
        self._given_number, self._given_metrics = number, metrics
        self._record: CheckpointRecord | None = None
        self.series = manager._directory, manager._name

    def begin(self) -> SaveRequest:
        manager, number = self._manager, self._given_number
        set_save_counter(manager.checkpoint, self._count)
        scores = manager._scores(self._given_metrics)
        number = self._count if number is None else as_integer(number)
        if number < 0:
            raise ValueError(f"expected a checkpoint number of 0 or more, got {number}")
        path = os.path.join(manager._directory, f"{manager._name}-{number}")
        manager._schedule.began(self._step, path)
        self._record = CheckpointRecord(number, manager._clock(), scores, path)
        if self._meeting.leads:
            manager._before_save(path, is_numbered=self._given_number is not None)
            manager._collection.begin(self._record)
        return request_for(manager.checkpoint, path, self._options, number)

    def record(self, is_overtaken: bool = False) -> None:
        assert self._record is not None
        collection = self._manager._collection
        if self._meeting.leads:
            collection.record(replace(self._record, time=self._manager._clock()), is_overtaken)
        else:
            collection.follow()

    def undo(self) -> None:
        manager, meeting = self._manager, self._meeting
        is_there = self._record is not None and manager._collection.take_back(self._record.path)
        if not is_there:  # else its number is taken
            take_back_count(manager.checkpoint, self._count)
        if self._record is not None:
            is_async = self._options.enable_async
            manager._schedule.undo(self._before, self._record.path, meeting, is_async=is_async)


def schedule_of(manager: CheckpointManager) -> Schedule:
    """When a manager's next checkpoint is due, for those who decide that in another way."""
    return manager._schedule


def _first_problem(problems: Sequence[str | None]) -> str | None:
    """Of the processes' problems the first, with the process where there are several."""
    for process, problem in enumerate(problems):
        if problem is not None:
            return problem if len(problems) == 1 else f"process {process}: {problem}"
    return None


# --- numbers ---------------------------------------------------------------------------


def as_integer(value: Any) -> int:
    """The integer that a number, a variable, or a function returning one of these stands for.

    Raises:
      TypeError: it stands for none.

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
    """What `max_to_keep` keeps; None if it keeps all."""
    if max_to_keep is None:
        return None
    if isinstance(max_to_keep, RetentionPolicy):
        if not can_keep(max_to_keep):
            raise ValueError(f"expected a policy that can keep something, got {max_to_keep!r}")
        return max_to_keep
    if as_integer(max_to_keep) <= 0:
        raise ValueError(f"expected a positive max_to_keep or None, got {max_to_keep}")
    return KeepLatest(as_integer(max_to_keep))


def _scores(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be numbers by name, got {metrics!r}")
    return {name: _as_number(name, value) for name, value in (metrics or {}).items()}


def _as_number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if not isinstance(name, str) or array.shape != () or array.dtype.kind in "cOSUMm":
        raise ValueError(f"metrics[{name!r}]: expected one real number by name, got {value!r}")
    return float(array)
