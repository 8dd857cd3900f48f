"""CheckpointManager: numbered checkpoints in a directory, of which the unneeded are removed.

A *managed* checkpoint is one that this manager wrote, or an earlier manager of the directory as
the state file says. The manager removes no other; `collection` says when.

Checkpoints are in the order of their numbers, except that the one saved last is the latest
whatever its number, so that going back to an earlier step and on from there works. Times decide
nothing but `keep_checkpoint_every_n_hours`.

If there are several processes, process 0 records and removes, and the others read the outcome
from the state file. Process 0 says which checkpoint is restored.
"""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_jax.api.checkpoint import Checkpoint, request_for, save_runs_of, set_save_counter
from ckpt_jax.api.preflight import preflight
from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepLatest,
    RetentionPolicy,
)
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Meeting, Processes
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.store.paths import absolute, as_path

SECONDS_PER_HOUR = 3600

_log = logging.getLogger("ckpt_jax")


class CheckpointManager:
    """Saves numbered checkpoints into a directory and removes those that are not needed.

    What an earlier manager of the directory recorded is taken up again. Nothing is removed
    by making a manager; a checkpoint is removed only after a newer one was committed and
    could be opened, and only if this manager or an earlier one wrote it. There can be one
    manager of a directory at a time.

    Args:
      checkpoint: the `Checkpoint` whose objects are saved.
      directory: where the checkpoints go; it is made by the first save. A relative one means
        the same as long as the manager lives, wherever the program goes.
      max_to_keep: how many of the latest to keep; None keeps all.
      keep_checkpoint_every_n_hours: of those that would be removed, one is kept for ever if
        it was saved this many hours after the last such one. None or 0 keeps none.
      checkpoint_name: what the names of checkpoints begin with.
      step_counter: the training step: an integer, a `Variable`, an `nnx.Variable`, or a
        function of no argument that returns one of these. Needed for `checkpoint_interval`.
      checkpoint_interval: at least this many steps are between two saves.
      init_fn: called by `restore_or_initialize` where there is nothing to restore.
      policies: retention policies. What one of them keeps stays beyond the `max_to_keep`
        latest; with `max_to_keep=1` the policies alone decide, but for the latest.
      last_checkpoint_step: the step of the last save, as if this manager had made it.
      clock: the time in seconds since the epoch. It decides nothing but
        `keep_checkpoint_every_n_hours`.

    Raises:
      ValueError: `max_to_keep` is not positive, a negative interval or one without a step
        counter, a name with directories, or a state file that names no checkpoint.
      TypeError: a checkpoint, policy, number or function that is none.

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
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        policies: Iterable[RetentionPolicy] = (),
        last_checkpoint_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"a manager saves a ckpt.Checkpoint, got {type(checkpoint).__qualname__}: "
                "give it Checkpoint(name=value)"
            )
        if max_to_keep is not None and as_integer(max_to_keep) <= 0:
            raise ValueError(f"expected a positive max_to_keep or None, got {max_to_keep}")
        if checkpoint_interval is not None and step_counter is None:
            raise ValueError("checkpoint_interval needs a step_counter, got none")
        if checkpoint_interval is not None and as_integer(checkpoint_interval) < 0:
            raise ValueError(f"expected a checkpoint_interval of 0 or more: {checkpoint_interval}")
        if init_fn is not None and not callable(init_fn):
            raise TypeError(f"init_fn must be a function of no argument, got {init_fn!r}")
        if os.path.basename(checkpoint_name) != checkpoint_name:
            raise ValueError(f"expected a name without directories, got {checkpoint_name!r}")
        further = KeepAny(tuple(policies))
        self._checkpoint = checkpoint
        self._given = as_path(directory, "directory", is_directory=True)
        # What that means now, also when the program has gone elsewhere since.
        self._directory = absolute(self._given)
        policy = (
            None if max_to_keep is None else KeepAny((KeepLatest(max_to_keep), *further.policies))
        )
        hours = keep_checkpoint_every_n_hours
        if hours is not None and hours < 0:
            raise ValueError(f"expected keep_checkpoint_every_n_hours of 0 or more, got {hours}")
        preserve_interval_seconds = hours * SECONDS_PER_HOUR if hours else None
        self._name = checkpoint_name
        self._step_counter = step_counter
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._last_step = last_checkpoint_step
        self._last_path: str | None = None  # what was saved or restored at that step
        self._failed_after: list[int | None] = []  # the last step before a save that has failed
        self._clock = clock
        self._collection = Collection(
            self._directory, checkpoint_name, policy, preserve_interval_seconds, clock()
        )

    # --- verbs -------------------------------------------------------------------------

    def save(
        self,
        checkpoint_number: Any = None,
        check_interval: bool = True,
        options: CheckpointOptions | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Saves a checkpoint, records it as the latest, and removes what is not needed.

        The checkpoint's save counter advances by one, with an explicit number too. A save
        that fails changes nothing: not the counter, the state file, or any checkpoint. If a
        write callback fails, or the state file cannot be written, the new checkpoint is there,
        but is not recorded. A save in the background is recorded, and the others are removed,
        when it has finished.

        Args:
          checkpoint_number: the number in its name; an integer, or what else `step_counter`
            may be. By default the save counter. A checkpoint that has this name is replaced.
          check_interval: whether to return None before `checkpoint_interval` steps have gone
            by. At the step of the last save it is None in any case. Where there are several
            processes, a save that failed in the background counts until `sync`, so that all of
            them find the same steps due.
          options: how to save; write callbacks are called before the state file changes.
          metrics: numbers by name, for retention policies.

        Returns:
          The path of the checkpoint, or None where `checkpoint_interval` says not to save, or
          where another save was in flight and `when_busy="skip"` says not to wait for it.

        Raises:
          ValueError: a negative number, or a metric that is not one number.
          TypeError: a number or step that is no integer.
          UnsaveableError: values that cannot be saved; nothing was written.
          AsyncSaveError: an earlier save failed in the background; this one has not begun. Where
            there are several processes it has, because those that know of no error take part.

        Source: `tf.train.CheckpointManager.save`, where a failed save advances the counter.
        """
        options = given(options)
        step = None if self._interval is None else as_integer(self._step_counter)
        runs = save_runs_of(self._checkpoint)
        if step is not None:
            runs.settle_doubts(options.timeout_seconds)  # by which it may be due
            if not self._is_due(step, check_interval):
                return None

        def open_books(meeting: Meeting) -> _ManagedSave | None:
            if step is not None and not self._is_due(step, check_interval):
                return None  # another thread has saved this step meanwhile
            return _ManagedSave(self, meeting, options, step, checkpoint_number, metrics)

        prefix = os.path.join(self._directory, self._name)
        path = runs.save(prefix, options, current_context(), open_books)
        return path and self._shown(path)

    def _is_due(self, step: int, check_interval: bool) -> bool:
        if self._last_step is None:
            return True
        assert self._interval is not None
        early = check_interval and step < self._last_step + self._interval
        return step != self._last_step and not early

    def _has_saved_step(self) -> bool:
        """Whether the latest checkpoint is of the step where the program is."""
        is_latest = (
            self._last_path is not None and self._last_path == self._collection.ledger.latest
        )
        return (
            is_latest
            and self._interval is not None
            and not self._is_due(as_integer(self._step_counter), check_interval=False)
        )

    def _make_due(self) -> None:
        """Lets the next save be one, whatever the step."""
        self._last_step = None

    def restore_or_initialize(self) -> str | None:
        """Restores the latest checkpoint; where there is none, calls `init_fn`.

        Where the latest is gone or damaged, the newest older one that can be restored is
        taken instead, by number, and a warning says so. Where there are several processes,
        `preflight` comes first, and all restore the same checkpoint: one that some process
        cannot use is used by none.

        Returns:
          The path of the checkpoint that was restored, or None where there was none.

        Raises:
          CheckpointNotFoundError, CorruptCheckpointError: there should be a checkpoint, but
            neither the latest nor an older one is usable; the error is that of the latest.
          RestoreMismatchError, UnsupportedFormatError: as `Checkpoint.restore`.
          PreflightError, ProcessError, BarrierTimeoutError: where there are several processes.

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
        processes = current()
        if processes.count > 1:
            preflight(self._directory)
        seconds = DEFAULT.timeout_seconds
        with processes.meeting(f"restoring from {self._directory}", seconds) as meeting:
            self.sync()
            paths = meeting.conclude(None, lambda _: self._collection.candidates())
        if not paths:
            if self._init_fn is not None:
                self._init_fn()
            return None
        path = self._restore_newest(paths, processes)
        if self._interval is not None:
            self._last_step, self._last_path = as_integer(self._step_counter), path
        return self._shown(path)

    def _restore_newest(self, paths: Sequence[str], processes: Processes) -> str:
        first: Exception | None = None
        for path in paths:
            error: CorruptCheckpointError | CheckpointNotFoundError | None = None
            # One that some process cannot use is not used by any.
            with processes.meeting(f"restoring {path}", DEFAULT.timeout_seconds) as meeting:
                try:
                    self._checkpoint.restore(path)
                except (CorruptCheckpointError, CheckpointNotFoundError) as found:
                    error = found
                problem = meeting.conclude(error and str(error), _first_problem)
            if problem is None:
                if path != paths[0]:
                    _log.warning("fell back to %s, the newest usable checkpoint", path)
                return path
            _log.warning("the checkpoint %s is not usable: %s", path, problem)
            first = first or error or CorruptCheckpointError(problem)
        assert first is not None
        raise first

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
            if self._failed_after:
                self._last_step = self._failed_after.pop()

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

        Those that are kept for ever are not among them.
        """
        return [self._shown(record.path) for record in self._collection.ledger.records]

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
        self._step, self._last_step = step, manager._last_step
        self._count = manager.checkpoint.save_counter + 1
        self._given_number, self._given_metrics = number, metrics
        self._record: CheckpointRecord | None = None

    def begin(self) -> SaveRequest:
        manager, number = self._manager, self._given_number
        set_save_counter(manager.checkpoint, self._count)
        manager._last_step = self._step
        manager._failed_after.clear()
        scores = _scores(self._given_metrics)
        number = self._count if number is None else as_integer(number)
        if number < 0:
            raise ValueError(f"expected a checkpoint number of 0 or more, got {number}")
        path = os.path.join(manager._directory, f"{manager._name}-{number}")
        manager._last_path = path
        self._record = CheckpointRecord(number, 0.0, scores, path)
        return request_for(manager.checkpoint, path, self._options)

    def record(self) -> None:
        assert self._record is not None
        if self._meeting.leads:
            self._manager._collection.record(replace(self._record, time=self._manager._clock()))
        else:
            self._manager._collection.follow()

    def undo(self) -> None:
        manager, meeting = self._manager, self._meeting
        set_save_counter(manager.checkpoint, self._count - 1)
        # Other processes may not know yet, and all have to find the same steps due.
        if meeting.count == 1 or not (self._options.enable_async or meeting.is_in_doubt):
            manager._last_step = self._last_step
        elif not meeting.is_in_doubt:
            manager._failed_after.append(self._last_step)


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


def _scores(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be numbers by name, got {metrics!r}")
    return {name: _as_number(name, value) for name, value in (metrics or {}).items()}


def _as_number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if not isinstance(name, str) or array.shape != () or array.dtype.kind in "cOSUMm":
        raise ValueError(f"metrics[{name!r}]: expected one real number by name, got {value!r}")
    return float(array)
