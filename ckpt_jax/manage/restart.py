"""How a manager restarts its program: it restores the first usable one of several checkpoints.

If there are several processes, process 0 says which checkpoints come into question. If one process
cannot use one of them, none does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence

from ckpt_jax.api.checkpoint import Checkpoint, set_save_counter
from ckpt_jax.api.status import LoadStatus, outcome_of
from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError, RestoreMismatchError
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.mirror import Mirror
from ckpt_jax.manage.schedule import Schedule
from ckpt_jax.options import DEFAULT, CheckpointOptions
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.restoring.formats import foreign_steps
from ckpt_jax.restoring.rename import Rule
from ckpt_jax.store.directory import number_of

_log = logging.getLogger("ckpt_jax")


class Restart:
    """Restores checkpoints of a directory, those of other libraries included.

    Args:
      checkpoint: receives the values.
      collection: the managed checkpoints.
      schedule: learns of restores.
      directory: of the checkpoints.
      shown: makes a path as errors have it.
      mirror: holds copies; None if there are none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        collection: Collection,
        schedule: Schedule,
        directory: str,
        shown: Callable[[str], str],
        mirror: Mirror | None,
    ):
        self._checkpoint, self._collection, self._schedule = checkpoint, collection, schedule
        self._directory, self._shown, self._mirror = directory, shown, mirror

    def candidates(self) -> list[str]:
        """The checkpoints that can be restored, best first; those of other libraries come last."""
        foreign = foreign_steps(self._directory)
        own = self._collection.candidates()
        if copies := self._copies(is_needed=not own):
            # The newest of both places first; of two that are alike, the one here.
            own = sorted([*own, *copies], key=lambda path: number_of(path) or 0, reverse=True)
        return [*own, *reversed(foreign.values())]

    def _copies(self, is_needed: bool) -> list[str]:
        if self._mirror is None:
            return []
        try:
            return self._mirror.candidates()
        except OSError as error:
            if is_needed:
                raise
            _log.warning("the mirror cannot be asked for a newer checkpoint: %s", error)
            return []

    def path_of(self, number: int) -> str:
        """The path of the checkpoint with a number, or else of the step of another library.

        Raises:
          CheckpointNotFoundError: there is none.
        """
        try:
            return self._collection.path_of(number)
        except CheckpointNotFoundError:
            foreign = foreign_steps(self._directory)
            if number not in foreign:
                raise
            return foreign[number]

    def agreed_paths(self, find: Callable[[], list[str]]) -> list[str]:
        """The checkpoints to restore, best first, as process 0 finds them."""
        seconds = DEFAULT.timeout_seconds
        with current().meeting(f"restoring from {self._directory}", seconds) as meeting:
            synchronise(self._checkpoint, self._schedule)
            return meeting.conclude(None, lambda _: find())

    def restore_first(
        self, paths: Sequence[str], rename: Iterable[Rule], options: CheckpointOptions | None
    ) -> tuple[str, LoadStatus, str | None]:
        """Restores the first usable one of some checkpoints, at least one.

        Returns:
          Its path, the status, and what was left out.

        Raises:
          CorruptCheckpointError, CheckpointNotFoundError: none is usable; about the first one.
          RestoreMismatchError: nothing of it was restored.
        """
        processes: Processes = current()
        rules, before = tuple(rename), self._checkpoint.save_counter
        first: Exception | None = None
        for path in paths:
            error: CorruptCheckpointError | CheckpointNotFoundError | None = None
            status: LoadStatus | None = None
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


def _first_problem(problems: Sequence[str | None]) -> str | None:
    """The first problem of any process; the process is named if there are several."""
    for process, problem in enumerate(problems):
        if problem is not None:
            return problem if len(problems) == 1 else f"process {process}: {problem}"
    return None


def synchronise(checkpoint: Checkpoint, schedule: Schedule) -> None:
    """Waits for a save in the background.

    Raises:
      AsyncSaveError: it failed; the cause is chained.
    """
    try:
        checkpoint.sync()
    finally:
        schedule.synchronised()


def shown(given: str, directory: str, path: str) -> str:
    """A path below a directory, beginning with the directory as it was given."""
    above, name = os.path.split(path)
    return os.path.join(given, name) if above == directory else path
