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
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from ckpt_jax.api.checkpoint import (
    Checkpoint,
    check_values,
    replace_values,
    save_runs_of,
)
from ckpt_jax.api.latest import checkpoint_exists, refuse_others
from ckpt_jax.api.preflight import preflight
from ckpt_jax.api.status import LoadStatus
from ckpt_jax.errors import CheckpointError, CheckpointNotFoundError
from ckpt_jax.graph.metadata import METADATA_KEY, encode
from ckpt_jax.manage.arguments import as_integer, as_limit, as_metrics, as_policies
from ckpt_jax.manage.asking import Asking
from ckpt_jax.manage.collection import AT_ONCE, Collection
from ckpt_jax.manage.due import SavePolicy, parted
from ckpt_jax.manage.ledger import known_metrics, own_number
from ckpt_jax.manage.managed_save import ManagedSave
from ckpt_jax.manage.mirror import Mirror
from ckpt_jax.manage.ranges import require_kind, require_real
from ckpt_jax.manage.removal import Removal
from ckpt_jax.manage.restart import Restart, shown, synchronise
from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    RetentionPolicy,
    can_keep,
    counts_steps,
    metrics_of,
)
from ckpt_jax.manage.schedule import Schedule
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import Context, current_context
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.processes.patience import Patience
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import Rule
from ckpt_jax.store.directory import visible_in
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, as_path

SECONDS_PER_HOUR = 3600
Policy = RetentionPolicy | SavePolicy
T = TypeVar("T")

_log = logging.getLogger("ckpt_jax")


class CheckpointManager:
    """Saves numbered checkpoints into a directory and removes those that are not needed.

    A new manager takes over the checkpoints that an earlier manager of the directory recorded.
    Creating a manager removes nothing. Its first save removes the staging directories that dead
    runs of the same name have left. A checkpoint is removed only if this manager or an earlier
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
    * `max_to_keep=None`: all; retention policies decide nothing.

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
      policies: what to keep and when to save: policies of both kinds, or one. The checkpoints
        that retention policies keep stay besides the `max_to_keep` latest. If there are policies
        that say when to save, `save(step)` returns None unless one of them says that it is due.
      last_checkpoint_step: the step of the last save, as if this manager had made it.
      read_only: for programs that only restore and ask, such as evaluators: the manager writes,
        removes and takes over nothing. It always answers for the present state of the directory,
        which another manager may change.
      removal: how checkpoints that are not kept are removed: `Removal(in_background=True)`, or
        `Removal(trash="trash")`. By default a save removes them before it returns.
      mirror: a directory or URL to which committed checkpoints are copied in the background, such
        as "s3://bucket/run". Saves never wait for it; `sync` does. The policies choose among the
        copies, too. `restore_or_initialize` takes the newest usable checkpoint of both places.
      mirror_every: each checkpoint of this many is copied. If the one before is still being copied,
        it waits, and is left out if another one is due before its turn.
      clock: returns the time in seconds since the epoch, for everything that goes by time.

    Raises:
      ValueError: `max_to_keep` is not positive, an interval is negative or has no step counter, the
        name contains directories, a policy can keep nothing, there are both an interval and
        policies that say when to save, or the state file names no checkpoint
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
        policies: Policy | Iterable[Policy] = (),
        last_checkpoint_step: int | None = None,
        read_only: bool = False,
        removal: Removal = AT_ONCE,
        mirror: Path | None = None,
        mirror_every: int = 1,
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
        if not isinstance(checkpoint_name, str):
            raise TypeError(f"expected a str as checkpoint_name, got {checkpoint_name!r}")
        if os.path.basename(checkpoint_name) != checkpoint_name:
            raise ValueError(f"expected a name without directories, got {checkpoint_name!r}")
        limit = as_limit(max_to_keep)
        further, when = as_policies(policies)
        if when is not None and checkpoint_interval is not None:
            raise ValueError(
                "expected a checkpoint_interval or policies that say when to save, got both: "
                f"{checkpoint_interval} and {when.policies}. An interval is SaveEveryNSteps(n)."
            )
        everything = KeepAny(further if limit is None else (limit, *further))
        for policy in everything.policies:
            if not can_keep(policy):
                raise ValueError(f"expected policies that can keep something, got {policy!r}")
        self._checkpoint = checkpoint
        self._given = as_path(directory, "directory", is_directory=True)
        self._directory = absolute(self._given)  # stays if the working directory changes
        hours = keep_checkpoint_every_n_hours
        if hours is not None:
            require_real(keep_checkpoint_every_n_hours=hours)
        require_kind(bool, "True or False", read_only=read_only)
        preserve_interval_seconds = hours * SECONDS_PER_HOUR if hours else None
        self._name = checkpoint_name
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._step_counter = step_counter
        self._schedule = Schedule(
            None if step_counter is None else lambda: as_integer(step_counter),
            checkpoint_interval,
            last_checkpoint_step,
            when,
            clock,
        )
        self._asking = Asking(clock)
        self._notices: list[Callable[[], bool]] = []  # say whether the program is told to end
        self._known_paths: set[str] = set()  # which this manager replaces without a warning
        self._has_restored = False
        self._has_said_unknown = False
        self._status: LoadStatus | None = None
        # The names that its policies ask for at each save.
        self._metrics = metrics_of(everything, awaited=False)
        self._is_numbered_by_step = not (step_counter is not None and counts_steps(everything))
        self._collection = Collection(
            self._directory,
            checkpoint_name,
            None if limit is None else everything,
            preserve_interval_seconds,
            clock,
            read_only,
            removal,
        )
        self._is_read_only = read_only
        self._mirror: Mirror | None = None
        if mirror is not None:
            place = absolute(as_path(mirror, "mirror", is_directory=True))
            if place == self._directory:
                raise ValueError(f"mirror: expected another directory than {directory}")
            self._mirror = Mirror(
                place,
                checkpoint_name,
                as_integer(mirror_every),
                None if limit is None else everything,
                preserve_interval_seconds,
                clock,
            )
        self._shown = partial(shown, self._given, self._directory)
        self._restart = Restart(
            checkpoint, self._collection, self._schedule, self._directory, self._shown, self._mirror
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
        metadata: Mapping[str, Any] | None = None,
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
            passed, or if the policies say that no save is due. At the step of the last save None is
            returned in any case. If there are several processes, a save that failed in the
            background counts until `sync`, so that all of them find the same steps due.
          options: how to save. Write callbacks are called before the state file changes.
          metrics: numbers by name, for retention policies. `record_metrics` adds others later.
          metadata: what else to say about the checkpoint, as JSON: a dict of None, booleans,
            numbers, strings, lists and dicts, such as the configuration, the revision of the code
            and the position in the data. It is committed with the checkpoint, and read by
            `metadata`. If there are several processes, that of process 0 counts.
          force: whether to save even if no save is due, also at the step of the last save.
          **values: new values of the checkpoint by name: `manager.save(step, state=state)`; see
            `Checkpoint.save`. They are assigned in any case, even if nothing is saved.

        Returns:
          The path of the checkpoint, or None if `checkpoint_interval` or policies say not to save,
          or if another save was in flight and `when_busy="skip"` says not to wait for it.

        Raises:
          ValueError: the number is negative, a metric is not one number, the metric of a policy
            is neither among `metrics` nor recorded before, or `metadata` is no JSON.
          TypeError: a number or step is not an integer, or an argument is of the wrong type.
          UnsaveableError: values cannot be saved; nothing was written.
          CheckpointError: the manager is read-only.
          SupersededError: another manager has taken over. If nothing was at the path of this
            checkpoint, it was saved, but not recorded; later saves write nothing.
          AsyncSaveError: an earlier save failed in the background, and this one has not begun. If
            there are several processes, it has begun all the same, because the processes that know
            of no error take part in it.

        Source: `tf.train.CheckpointManager.save`, where a failed save advances the counter.
        """
        self._require_writable("save")
        options, context = given(options), current_context()
        patience = context.processes.patience(options.timeout_seconds)
        schedule = self._schedule
        is_asked = schedule.policy is not None and checkpoint_number is not None
        step = schedule.step(as_integer(checkpoint_number) if is_asked else None)
        runs = save_runs_of(self._checkpoint)
        parts: dict[str, bytes] = {}

        def check() -> None:
            check_values(self._checkpoint, values)
            if metadata is not None:
                parts[METADATA_KEY] = encode(metadata)
            for name, value in {"check_interval": check_interval, "force": force}.items():
                if not isinstance(value, bool | np.bool_):
                    raise TypeError(f"{name}: expected True or False, got {value!r}")

        if step is not None or schedule.policy is not None:
            runs.settle_doubts(patience)  # their outcome may change what is due
            if not (force or self._is_due(step, check_interval, context, patience)):
                check()
                replace_values(self._checkpoint, values)
                return None

        def open_books(meeting: Meeting) -> ManagedSave | None:
            if not force and schedule.is_due(step, check_interval) is False:
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
                parts,
                self._mirror,
            )

        prefix = os.path.join(self._directory, self._name)
        path = runs.save(prefix, options, patience, context, check, open_books)
        if path is None:  # a preemption handler may save next, without values
            replace_values(self._checkpoint, values)
            return None
        return self._shown(path)

    def _is_due(
        self, step: int | None, check_interval: bool, context: Context, patience: Patience
    ) -> bool:
        """Whether to save at a step, the same on all processes."""
        schedule, policy = self._schedule, self._schedule.policy
        is_due = schedule.is_due(step, check_interval)
        if is_due is not None or policy is None:
            return is_due is not False

        def answer(policies: Iterable[SavePolicy]) -> bool:
            occasion = schedule.occasion(
                step,
                is_saving=save_runs_of(self._checkpoint).background.is_busy,
                is_preempted=any([noticed() for noticed in self._notices]),
            )
            return any([policy.due(occasion) for policy in policies])

        by_step, others = parted(policy)
        if answer(by_step):  # on all processes, without a question
            return True
        if not others:
            return False
        return self._asking.is_due(context.processes, patience, lambda: answer(others))

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
        scores = as_metrics(metrics)
        if not self._metrics:
            return scores
        records = self._collection.present().records
        known = {*scores, *(name for record in records for name in known_metrics(record))}
        unknown = ", ".join(map(repr, sorted(self._metrics - known)))
        if unknown and metrics is not None:
            raise ValueError(
                f"{self._given}: a retention policy asks for the metric {unknown}, but no "
                f"checkpoint has it, and this save gives "
                f"{', '.join(map(repr, sorted(scores))) or 'no metric'}. Nothing was saved. "
                "Correct the name in the policy or in metrics={...}. If an evaluator records the "
                "metric later, say so: KeepBest(..., awaiting=3)."
            )
        if unknown and records and not self._has_said_unknown:
            self._has_said_unknown = True
            _log.warning(
                "%s: a retention policy asks for the metric %s, but keeps nothing so far, because "
                "no save has given metrics. Pass save(metrics={...}). If an evaluator records the "
                "metric later, say so: KeepBest(..., awaiting=3).",
                *(self._given, unknown),
            )
        return scores

    def restore_or_initialize(self, *, options: CheckpointOptions | None = None) -> str | None:
        """Restores the latest checkpoint; if there is none, calls `init_fn`.

        If the latest is gone or damaged, the one with the next smaller number that can be restored
        is taken instead, and a warning says so. If there are several processes, `preflight` comes
        first, and all restore the same checkpoint: if one process cannot use it, none does.

        If the directory holds steps of a manager of Orbax, and no checkpoint of this manager, the
        latest step is restored, and the save counter goes on from its number. Such steps are never
        removed.

        If something was not restored, a warning says what. `status` can then be asserted on.

        Args:
          options: see `Checkpoint.restore`. `CheckpointOptions(cast=True)` is for a run that saves
            with `cast_on_save`.

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
        options = given(options)
        is_shared = current().count > 1 or is_url(self._directory)
        if is_shared and not self._is_read_only:
            preflight(self._directory)
        paths = self._restart.agreed_paths(self._restart.candidates)
        if not paths:
            self._warn_of_others()
            if self._init_fn is not None:
                self._init_fn()
            return None
        path, left = self._restore_first(paths, (), options)
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
          ValueError: both a step and a metric were given, or checkpoints have metrics, but not
            this one.
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
                if found is None and self._collection.present().records:
                    raise CheckpointNotFoundError(
                        f"{self._given}: expected a checkpoint with the metric {best!r}, found "
                        "none for which it is a number. Pass save(metrics={...}), or restore a "
                        "step."
                    )
                paths = [found] if found is not None else []
            elif number is not None:
                return [self._restart.path_of(number)]
            else:
                paths = self._restart.candidates()
            if not paths:
                refuse_others(self._directory)
                raise CheckpointNotFoundError(
                    f"{self._given}: expected checkpoints {self._name}-N, found "
                    f"{self._others() or 'none'}. Save first, or check directory and "
                    "checkpoint_name."
                )
            return paths

        self._restore_first(self._restart.agreed_paths(chosen), rename, options)
        assert self._status is not None
        return self._status

    def _restore_first(
        self, paths: Sequence[str], rename: Iterable[Rule], options: CheckpointOptions | None
    ) -> tuple[str, str | None]:
        path, self._status, left = self._restart.restore_first(paths, rename, options)
        return path, left

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
          metric: its name in `save(metrics=...)` or `record_metrics`.
          mode: whether "min" or "max" is the best value.

        Returns:
          A path; None if no checkpoint has metrics, or if the values of this one are NaN.

        Raises:
          ValueError: checkpoints have metrics, but not this one; or the mode is unknown.
        """
        path = self._best(metric, mode)
        return path and self._shown(path)

    def _best(self, metric: str, mode: Literal["max", "min"]) -> str | None:
        best = KeepBest(metric, 1, mode)
        records = [
            replace(record, metrics=known_metrics(record))
            for record in self._collection.present().records
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
        """The metrics with which a managed checkpoint was saved, and those recorded since.

        Args:
          step: its number.

        Raises:
          CheckpointNotFoundError: there is no managed checkpoint of this number.
        """
        number = as_integer(step)
        for record in self._collection.present().records:
            if record.number == number:
                return dict(known_metrics(record))
        raise self._not_managed(number)

    def _not_managed(self, number: int) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(
            f"{self._given}: expected a managed checkpoint {self._name}-{number}, found "
            f"{', '.join(map(str, self.steps)) or 'none'}. Pass one of manager.steps."
        )

    def record_metrics(self, step: Any, **metrics: Any) -> None:
        """Adds metrics to those of a managed checkpoint, after it was saved.

        An evaluator in another process may do this with a manager of its own: that manager does not
        take over, and the one that saves finds the metrics when its policies choose next. Use
        `KeepBest(..., awaiting=3)` there, so that checkpoints wait for their metrics.

        If there are several processes, all of them have to call this; the metrics of process 0
        count.

        Args:
          step: the number of the checkpoint.
          **metrics: numbers by name. Those that are recorded already are replaced.

        Raises:
          CheckpointNotFoundError: there is no managed checkpoint of this number.
          ValueError: a metric is not one number.

        Example:
          >>> import tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     manager = CheckpointManager(Checkpoint(step=7), directory)
          ...     path = manager.save(100, metrics={"loss": 0.5})
          ...     evaluator = CheckpointManager(Checkpoint(step=0), directory)
          ...     evaluator.record_metrics(100, accuracy=0.75)
          ...     manager.metrics(100)
          {'loss': 0.5, 'accuracy': 0.75}
        """
        self._require_writable("record metrics")
        number, scores = as_integer(step), as_metrics(metrics)
        what = f"recording metrics of {self._name}-{number}"
        with current().meeting(what, DEFAULT.timeout_seconds) as meeting:
            is_there = meeting.conclude(
                None, lambda _: self._collection.record_metrics(number, scores)
            )
        if not is_there:
            raise self._not_managed(number)

    def metadata(self, step: Any) -> dict[str, Any]:
        """What `save(metadata=...)` said about a checkpoint; empty if it said nothing.

        No value is read, and no device is used.

        Args:
          step: the number of the checkpoint, managed or not.

        Raises:
          CheckpointNotFoundError: there is no checkpoint of this number.
          CorruptCheckpointError: it is damaged.

        Example:
          >>> import tempfile
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     manager = CheckpointManager(Checkpoint(step=7), directory)
          ...     path = manager.save(7, metadata={"revision": "4f2a", "config": {"lr": 0.5}})
          ...     manager.metadata(7)
          {'config': {'lr': 0.5}, 'revision': '4f2a'}
        """
        with CheckpointReader(self._restart.path_of(as_integer(step))) as reader:
            return reader.metadata

    def delete(self, step: Any) -> None:
        """Removes a checkpoint of this manager's name, whether it is managed or not.

        If it is the latest, the one before it becomes the latest. If the manager has a trash
        directory, the checkpoint is moved there.

        Args:
          step: its number.

        Raises:
          CheckpointNotFoundError: there is no checkpoint of this number.
          ValueError: it is the latest, and no other one is usable.
          SupersededError: another manager has taken over; nothing was removed.
          OSError: it could not be removed.
        """
        self._require_writable("delete")
        number = as_integer(step)
        self._changed(f"deleting {self._name}-{number}", lambda: self._collection.delete(number))

    def _require_writable(self, verb: str) -> None:
        """Refuses to change anything in a directory that is only read.

        Raises:
          CheckpointError: this manager is read-only.
        """
        if self._is_read_only:
            raise CheckpointError(
                f"{self._given}: this manager is read-only and cannot {verb}. Nothing was changed. "
                "To record metrics, use ckpt.evaluate_new, or a manager without read_only=True, "
                "which takes nothing over before it saves."
            )

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
        (Those with a larger number are removed by the first save of the next manager, or by the
        next save with this number.)
        If the latest checkpoint is not usable, nothing is removed. If checkpoints are removed in
        the background, this waits for it.

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
        if not dry_run:
            self._require_writable("remove")
        what = f"collecting in {self._directory}"
        removed = self._changed(what, lambda: self._collection.collect(dry_run))
        return [self._shown(path) for path in removed]

    def sync(self) -> None:
        """Waits for a save in the background, and for copies to a mirror.

        Raises:
          AsyncSaveError: it failed; the cause is chained.

        Source: `tf.train.CheckpointManager.sync`.
        """
        try:
            synchronise(self._checkpoint, self._schedule)
        finally:
            if self._mirror is not None:
                self._mirror.sync()

    def cancel(self) -> bool:
        """Cancels a save in the background; see `Checkpoint.cancel`. Its step is due again."""
        try:
            return self._checkpoint.cancel()
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
        latest = self._collection.present().latest
        return latest and self._shown(latest)

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the managed checkpoints, in the order of numbers, the latest last.

        Those on abandoned branches come first. Those that are kept forever are not listed.
        """
        return [self._shown(record.path) for record in self._collection.present().records]

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the managed checkpoints, in the order of `checkpoints`."""
        return tuple([record.number for record in self._collection.present().records])

    @property
    def status(self) -> LoadStatus | None:
        """The status of the last restore by this manager; None if there was none."""
        return self._status


def require_writable(manager: CheckpointManager, verb: str) -> None:
    """Refuses what changes the directory of a manager that is read-only.

    Raises:
      CheckpointError: it is.
    """
    manager._require_writable(verb)


def make_due(manager: CheckpointManager) -> None:
    """Makes a manager's next save due, whatever the step."""
    manager._schedule.make_due()


def has_saved_step(manager: CheckpointManager, step: int | None = None) -> bool:
    """Whether a manager's latest checkpoint is one of the step where the program is.

    Args:
      manager: any.
      step: where the program is, if a policy of the manager goes by the numbers of checkpoints.
    """
    return manager._schedule.has_saved(manager._collection.ledger.latest, step)


def save_step(manager: CheckpointManager, step: int | None) -> str | None:
    """Saves, whatever the interval or the policies say.

    Args:
      manager: any.
      step: where the program is. It is the number of the checkpoint if the policies of the manager
        go by numbers.
    """
    number = step if manager._schedule.goes_by_numbers else None
    return manager.save(number, check_interval=False)


def hear_notices(manager: CheckpointManager, noticed: Callable[[], bool]) -> Callable[[], object]:
    """Lets a manager's policies know whether the program is told to end.

    Args:
      manager: any.
      noticed: says whether it is.

    Returns:
      A function that ends this.
    """
    manager._notices.append(noticed)
    return lambda: manager._notices.remove(noticed)
