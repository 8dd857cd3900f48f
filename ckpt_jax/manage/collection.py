"""The managed checkpoints of a directory: recorded when they are committed, removed when they are
not needed.

record  the new checkpoint becomes the latest: metrics first, then the state file
select  a retention policy looks at all managed checkpoints and names the numbers to keep
sweep   the others go, the oldest first: kept forever if they are to be preserved, else removed
record  metrics and state file once more
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable

from ckpt_jax.api.latest import (
    checkpoint_exists,
    older_checkpoints,
    problem_with,
    remove_checkpoint,
)
from ckpt_jax.manage.ledger import Ledger, read_ledger, recovered, write_ledger
from ckpt_jax.manage.retention import CheckpointRecord, RetentionPolicy, Sweep, plan_sweep
from ckpt_jax.store.directory import number_of
from ckpt_jax.store.staging import STAGING, is_abandoned, remove_abandoned

_log = logging.getLogger("ckpt_jax")


class Collection:
    """The managed checkpoints of a directory.

    Args:
      directory: an absolute path; it need not exist yet.
      name: what the names of its checkpoints begin with.
      policy: which to keep; None keeps all.
      preserve_interval_seconds: between two that are kept forever; None keeps none.
      now: the time, in seconds since the epoch.

    Attributes:
      ledger: what is recorded.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        policy: RetentionPolicy | None,
        preserve_interval_seconds: float | None,
        now: float,
    ):
        self._directory, self._name = directory, name
        self._policy = policy
        self._preserve_interval_seconds = preserve_interval_seconds
        self.ledger = recovered(directory, now)

    def candidates(self) -> list[str]:
        """What there is to restore, best first."""
        latest = self.ledger.latest
        return [latest, *older_checkpoints(self._directory, latest)] if latest else []

    def collect(self, dry_run: bool) -> list[str]:
        sweep = self._plan_sweep()
        leftovers = self._leftovers()
        if not (sweep.preserve or sweep.remove or leftovers) or not self._is_latest_usable():
            return []
        if dry_run:
            return [*(record.path for record in sweep.remove), *leftovers]
        return [*self._sweep(sweep), *(p for p in leftovers if _attempt(remove_abandoned, p))]

    def record(self, record: CheckpointRecord) -> None:
        """Makes a checkpoint that was just committed the latest, and sweeps."""
        ledger = self.ledger.with_latest(record)
        write_ledger(self._directory, ledger)
        self.ledger = ledger
        sweep = self._plan_sweep()
        if (sweep.preserve or sweep.remove) and self._is_latest_usable():
            self._sweep(sweep)

    def follow(self) -> None:
        """Takes over what process 0 has recorded."""
        self.ledger = read_ledger(self._directory) or self.ledger

    def _plan_sweep(self) -> Sweep:
        records, last_preserved = self.ledger.records, self.ledger.last_preserved
        if self._policy is None:
            return Sweep(records, (), (), last_preserved)
        return plan_sweep(records, self._policy, self._preserve_interval_seconds, last_preserved)

    def _is_latest_usable(self) -> bool:
        latest = self.ledger.latest
        problem = problem_with(latest) if latest else "there is none"
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
        records = (*sweep.keep, *stay)
        self.ledger = Ledger(self.ledger.latest, records, sweep.last_preserved)
        try:
            write_ledger(self._directory, self.ledger)
        except OSError as error:  # the file still names the latest, and some that are gone
            _log.warning("%s: what was removed could not be recorded: %s", self._directory, error)
        return removed

    def _leftovers(self) -> list[str]:
        """Abandoned staging directories that a later save has made pointless."""
        latest = number_of(self.ledger.latest or "")
        if latest is None or not os.path.isdir(self._directory):
            return []
        own = re.compile(rf"{re.escape(self._name)}-(\d+)")
        return [
            path
            for name in sorted(os.listdir(self._directory))
            if (staging := STAGING.match(name)) and (of := own.fullmatch(staging["name"]))
            if int(of[1]) <= latest and is_abandoned(path := os.path.join(self._directory, name))
        ]


def _attempt(remove: Callable[[str], bool | None], path: str) -> bool:
    """Whether `path` was removed; the save before it has succeeded, so it must not fail."""
    try:
        return remove(path) is not False
    except OSError as error:
        _log.warning("%s could not be removed: %s", path, error)
        return False
