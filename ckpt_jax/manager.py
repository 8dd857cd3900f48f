"""CheckpointManager: numbered checkpoints in a directory, of which the unneeded are removed.

A *managed* checkpoint is one that this manager wrote, or an earlier manager of the directory
as the state file says. The manager removes no other. What becomes of the managed ones:

save      the new checkpoint is committed, then recorded: metrics first, then the state file
select    a retention policy looks at all of them and names the numbers to keep
sweep     the others go, the oldest first: kept for ever where `keep_checkpoint_every_n_hours`
          says so, else removed
record    metrics and state file once more

Checkpoints are in the order of their numbers, except that the one saved last is the latest
whatever its number, so that going back to an earlier step and on from there works. Times
decide nothing but `keep_checkpoint_every_n_hours`.

Where there are several processes, process 0 does all of this, and the others read from the state
file what came of it. Which checkpoint is restored is for process 0 to say.

Metrics lie in a file of their own beside the state file, `checkpoint-metrics.json`:

    {"ckpt-3": {"loss": 0.25}, "ckpt-4": {"loss": "nan"}}

not in the checkpoints, because they are about the choice between checkpoints: one small file
answers it without opening any of them, and the state file cannot have fields that its other
readers do not know. It is replaced in one step, before the state file names the checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ckpt_jax import multihost
from ckpt_jax.checkpoint import Checkpoint
from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.latest import (
    checkpoint_exists,
    older_checkpoints,
    problem_with,
    remove_checkpoint,
)
from ckpt_jax.metrics import METER
from ckpt_jax.options import DEFAULT, CheckpointOptions
from ckpt_jax.preflighting import preflight
from ckpt_jax.retention import (
    CheckpointRecord,
    KeepAny,
    KeepLatest,
    RetentionPolicy,
    Sweep,
    plan_sweep,
)
from ckpt_jax.state_file import (
    CheckpointState,
    get_checkpoint_state,
    replace_file,
    update_checkpoint_state,
)
from ckpt_jax.store.directory import number_of
from ckpt_jax.store.staging import STAGING, is_abandoned, remove_abandoned
from ckpt_jax.trackable.view import view_of

METRICS_FILE = "checkpoint-metrics.json"
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
      directory: where the checkpoints go; it is made by the first save.
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
      ValueError: `max_to_keep` is not positive, an interval without a step counter, a name
        with directories, or a state file that names no checkpoint.
      TypeError: a policy that is none.

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
        directory: str | bytes | os.PathLike[Any],
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
        if max_to_keep is not None and max_to_keep <= 0:
            raise ValueError(f"expected a positive max_to_keep or None, got {max_to_keep}")
        if checkpoint_interval is not None and step_counter is None:
            raise ValueError("checkpoint_interval needs a step_counter, got none")
        if os.path.basename(checkpoint_name) != checkpoint_name:
            raise ValueError(f"expected a name without directories, got {checkpoint_name!r}")
        given = KeepAny(tuple(policies))
        self._checkpoint = checkpoint
        self._directory = os.fsdecode(directory)
        self._policy = (
            None if max_to_keep is None else KeepAny((KeepLatest(max_to_keep), *given.policies))
        )
        hours = keep_checkpoint_every_n_hours
        self._preserve_interval_seconds = hours * SECONDS_PER_HOUR if hours else None
        self._name = checkpoint_name
        self._step_counter = step_counter
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._last_step = last_checkpoint_step
        self._clock = clock
        # Values that are replaced as a whole: the latest, and the managed ones, the latest last.
        self._latest: str | None = None
        self._records: tuple[CheckpointRecord, ...] = ()
        self._last_preserved = clock() - 1
        self._recover()

    def _recover(self) -> None:
        """Takes up what the state file says."""
        state = get_checkpoint_state(self._directory)
        if state is None:
            return
        now = self._clock()
        self._latest = self._own_path(state.model_checkpoint_path) or state.model_checkpoint_path
        self._last_preserved = state.last_preserved_timestamp
        if now < self._last_preserved:
            _log.warning(
                "%s: the clock (%s) is behind the last preserved checkpoint timestamp (%s). The "
                "checkpoints that are there will not be removed",
                *(self._directory, now, self._last_preserved),
            )
            self._last_preserved = now
            return
        paths = state.all_model_checkpoint_paths
        times = state.all_model_checkpoint_timestamps
        metrics = read_metrics(self._directory)
        if len(times) != len(paths) or metrics is None:
            return  # not written by a manager, or without what its policies have to know
        found: dict[str, CheckpointRecord] = {}
        for path, then in zip(map(self._own_path, paths), times, strict=True):
            if path is None or (number := number_of(path)) is None:
                continue
            known = metrics.get(os.path.basename(path))
            # Older than the last preserved one: it may have been preserved, too. But not where
            # its metrics are still recorded; then a policy has kept it since.
            if min(then, now) > self._last_preserved or known is not None:
                found[path] = CheckpointRecord(number, then, known or {}, path)
        self._records = self._in_order(found.values())

    def _own_path(self, path: str) -> str | None:
        """`path` as this manager would write it; None where that is in another directory."""
        directory, name = os.path.split(os.path.abspath(path))
        own = directory == os.path.abspath(self._directory)
        return os.path.join(self._directory, name) if own else None

    def _in_order(self, records: Iterable[CheckpointRecord]) -> tuple[CheckpointRecord, ...]:
        return tuple(sorted(records, key=lambda r: (r.path == self._latest, r.number, r.path)))

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
            by. At the step of the last save it is None in any case.
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
        step = None if self._interval is None else as_integer(self._step_counter)
        if step is not None and not self._is_due(step, check_interval):
            return None
        options = options or DEFAULT
        watch = METER.saving()
        prefix = os.path.join(self._directory, self._name)
        with ExitStack() as stack:
            meeting = self._checkpoint._meet(prefix, options, stack)
            scores = {name: _as_number(name, value) for name, value in (metrics or {}).items()}
            with self._checkpoint._turn(options) as is_mine:
                if not is_mine or (step is not None and not self._is_due(step, check_interval)):
                    return None  # another thread saves, or has saved this step meanwhile
                self._checkpoint._settle(options)
                count = self._checkpoint.save_counter + 1
                number = count if checkpoint_number is None else as_integer(checkpoint_number)
                if number < 0:
                    raise ValueError(f"expected a checkpoint number of 0 or more, got {number}")
                path = f"{prefix}-{number}"
                last_step = self._last_step

                def committed() -> None:
                    if meeting.leads:
                        self._record(number, path, scores)
                    else:
                        self._follow()

                def counted() -> None:
                    self._checkpoint._count(count)
                    self._last_step = step

                def failed() -> None:  # a save that failed has not happened
                    self._checkpoint._count(count - 1)
                    self._last_step = last_step

                counted()
                self._checkpoint._write(
                    path, options, watch, meeting, stack, committed, counted, failed
                )
        return path

    def _is_due(self, step: int, check_interval: bool) -> bool:
        if self._last_step is None:
            return True
        assert self._interval is not None
        early = check_interval and step < self._last_step + self._interval
        return step != self._last_step and not early

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
        processes = multihost.current()
        if processes.count > 1:
            preflight(self._directory)
        seconds = DEFAULT.timeout_seconds
        with processes.meeting(f"restoring from {self._directory}", seconds) as meeting:
            self.sync()
            paths = meeting.conclude(None, lambda _: self._candidates())
        if not paths:
            if self._init_fn is not None:
                self._init_fn()
            return None
        path = self._restore_newest(paths, processes)
        if self._interval is not None:
            self._last_step = as_integer(self._step_counter)
        return path

    def _candidates(self) -> list[str]:
        """What there is to restore, best first."""
        if self._latest is None:
            return []
        return [self._latest, *older_checkpoints(self._directory, self._latest)]

    def _restore_newest(self, paths: Sequence[str], processes: multihost.Processes) -> str:
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
            multihost.current().meeting(what, seconds) as meeting,
            self._checkpoint._turn(DEFAULT),
        ):
            removed = meeting.conclude(None, lambda _: self._collect(dry_run))
            if not meeting.leads:
                self._follow()
        return removed

    def _collect(self, dry_run: bool) -> list[str]:
        sweep = self._plan_sweep()
        leftovers = self._leftovers()
        if not (sweep.preserve or sweep.remove or leftovers) or not self._is_latest_usable():
            return []
        if dry_run:
            return [*(record.path for record in sweep.remove), *leftovers]
        return [*self._sweep(sweep), *(p for p in leftovers if _attempt(remove_abandoned, p))]

    def sync(self) -> None:
        """Waits for a save in the background.

        Raises:
          AsyncSaveError: it failed; the cause is chained.

        Source: `tf.train.CheckpointManager.sync`.
        """
        self._checkpoint.sync()

    # --- properties --------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint whose objects are saved."""
        return self._checkpoint

    @property
    def directory(self) -> str:
        """Where the checkpoints are."""
        return self._directory

    @property
    def checkpoint_interval(self) -> int | None:
        """The least number of steps between two saves."""
        return self._interval

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the checkpoint that was saved last, or None.

        That it is still there is not checked; `ckpt.latest_checkpoint` does that.
        """
        return self._latest

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the managed checkpoints, in the order of numbers, the latest last.

        Those that are kept for ever are not among them.
        """
        return [record.path for record in self._records]

    # --- after the commit --------------------------------------------------------------

    def _record(self, number: int, path: str, metrics: Mapping[str, float]) -> None:
        """Makes a checkpoint that was just committed the latest, and sweeps."""
        before = self._latest, self._records
        self._latest = path
        others = [record for record in self._records if record.path != path]
        self._records = self._in_order(
            [*others, CheckpointRecord(number, self._clock(), metrics, path)]
        )
        try:
            self._write_state()
        except BaseException:  # not recorded, so it is not the latest
            self._latest, self._records = before
            raise
        sweep = self._plan_sweep()
        if (sweep.preserve or sweep.remove) and self._is_latest_usable():
            self._sweep(sweep)

    def _follow(self) -> None:
        """Takes over what process 0 has recorded."""
        state = get_checkpoint_state(self._directory)
        if state is None:
            return
        self._latest = self._own_path(state.model_checkpoint_path) or state.model_checkpoint_path
        self._last_preserved = state.last_preserved_timestamp
        metrics = read_metrics(self._directory) or {}
        times = state.all_model_checkpoint_timestamps
        paths = map(self._own_path, state.all_model_checkpoint_paths)
        self._records = self._in_order(
            CheckpointRecord(number, then, metrics.get(os.path.basename(path), {}), path)
            for path, then in zip(paths, times, strict=False)
            if path is not None and (number := number_of(path)) is not None
        )

    def _plan_sweep(self) -> Sweep:
        if self._policy is None:
            return Sweep(self._records, (), (), self._last_preserved)
        return plan_sweep(
            self._records, self._policy, self._preserve_interval_seconds, self._last_preserved
        )

    def _is_latest_usable(self) -> bool:
        problem = problem_with(self._latest) if self._latest else "there is none"
        if problem is not None:
            _log.warning(
                "%s: nothing is removed, because the latest checkpoint is not usable: %s",
                *(self._directory, problem),
            )
        return problem is None

    def _sweep(self, sweep: Sweep) -> list[str]:
        """Removes what the plan says; what cannot be removed stays managed, for the next time."""
        removed: list[str] = []
        stay: list[CheckpointRecord] = []
        for record in sweep.remove:
            if not checkpoint_exists(record.path):
                _log.warning("%s was to be removed, but is there no longer", record.path)
            elif _attempt(remove_checkpoint, record.path) or not checkpoint_exists(record.path):
                removed.append(record.path)
            else:
                stay.append(record)
        self._records = self._in_order([*sweep.keep, *stay])
        self._last_preserved = sweep.last_preserved
        try:
            self._write_state()
        except OSError as error:  # the file still names the latest, and some that are gone
            _log.warning("%s: what was removed could not be recorded: %s", self._directory, error)
        return removed

    def _write_state(self) -> None:
        """Records the managed checkpoints: metrics first, since the state file refers to them."""
        write_metrics(self._directory, {os.path.basename(r.path): r.metrics for r in self._records})
        assert self._latest is not None
        paths = [record.path for record in self._records]
        times = [record.time for record in self._records]
        if self._latest not in paths:
            # A state file lists its latest; a time that is not later than the last preserved
            # one says that it is not managed.
            paths.append(self._latest)
            times.append(self._last_preserved)
        update_checkpoint_state(
            self._directory,
            CheckpointState(self._latest, tuple(paths), tuple(times), self._last_preserved),
        )

    def _leftovers(self) -> list[str]:
        """Abandoned staging directories that a later save has made pointless."""
        latest = number_of(self._latest) if self._latest else None
        if latest is None or not os.path.isdir(self._directory):
            return []
        own = re.compile(rf"{re.escape(self._name)}-(\d+)")
        return [
            path
            for name in sorted(os.listdir(self._directory))
            if (staging := STAGING.match(name)) and (of := own.fullmatch(staging["name"]))
            if int(of[1]) <= latest and is_abandoned(path := os.path.join(self._directory, name))
        ]


def _first_problem(problems: Sequence[str | None]) -> str | None:
    """Of the processes' problems the first, with the process where there are several."""
    for process, problem in enumerate(problems):
        if problem is not None:
            return problem if len(problems) == 1 else f"process {process}: {problem}"
    return None


def _attempt(remove: Callable[[str], bool | None], path: str) -> bool:
    """Whether `path` was removed; the save before it has succeeded, so it must not fail."""
    try:
        return remove(path) is not False
    except OSError as error:
        _log.warning("%s could not be removed: %s", path, error)
        return False


# --- numbers ---------------------------------------------------------------------------


def as_integer(value: Any) -> int:
    """The integer that a number, a variable, or a function returning one of these stands for.

    Raises:
      TypeError: it stands for none.

    >>> from ckpt_jax.trackable.base import Variable
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


def _as_number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if not isinstance(name, str) or array.shape != () or array.dtype.kind in "cOSUMm":
        raise ValueError(f"metrics[{name!r}]: expected one real number by name, got {value!r}")
    return float(array)


# --- metrics on disk -------------------------------------------------------------------


def read_metrics(directory: str) -> dict[str, dict[str, float]] | None:
    """The recorded metrics by the names of checkpoints; none where there is no file.

    Returns:
      None where the file cannot be understood; a warning says so. The caller must then remove
      nothing, since a policy would take the best checkpoints for bad ones.
    """
    path = os.path.join(directory, METRICS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return {
            name: {metric: float(value) for metric, value in metrics.items()}
            for name, metrics in content.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning(
            "%s is ignored, because it is no file of metrics: %s. The checkpoints that are there "
            "will not be removed",
            *(path, error),
        )
        return None


def write_metrics(directory: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Replaces the recorded metrics; what is not finite is written as a string.

    Checkpoints without metrics leave no entry, and where there are none at all no file is made.
    """
    path = os.path.join(directory, METRICS_FILE)
    content = {
        name: {key: value if math.isfinite(value) else str(value) for key, value in own.items()}
        for name, own in metrics.items()
        if own
    }
    if content or os.path.lexists(path):
        replace_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
