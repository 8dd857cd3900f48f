"""The ledger: which checkpoints of a directory are managed, as a value and as two small files.

The state file names the managed checkpoints, with times. Their metrics lie in a file of their own
beside it, `checkpoint-metrics.json`:

    {"ckpt-3": {"loss": 0.25}, "ckpt-4": {"loss": "nan"}}

not in the checkpoints, because they are about the choice between checkpoints: one small file
answers it without opening any of them, and the state file cannot have fields that its other
readers do not know. It is replaced in one step, before the state file names the checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_jax.manage.retention import CheckpointRecord
from ckpt_jax.store.directory import number_of
from ckpt_jax.store.state_file import (
    CheckpointState,
    get_checkpoint_state,
    replace_file,
    update_checkpoint_state,
)

METRICS_FILE = "checkpoint-metrics.json"

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The managed checkpoints of a directory.

    Attributes:
      latest: the path of the checkpoint that was saved last; None where there is none.
      records: one for each path, in the order of numbers, the latest last.
      last_preserved: when the last checkpoint was saved that is kept for ever.
    """

    latest: str | None
    records: tuple[CheckpointRecord, ...]
    last_preserved: float

    def __post_init__(self) -> None:
        by_path = {record.path: record for record in self.records}  # of several, the last counts
        records = sorted(by_path.values(), key=lambda r: (r.path == self.latest, r.number, r.path))
        object.__setattr__(self, "records", tuple(records))

    def with_latest(self, record: CheckpointRecord) -> Ledger:
        """The ledger once a checkpoint was saved."""
        return Ledger(record.path, (*self.records, record), self.last_preserved)


def recovered(directory: str, now: float) -> Ledger:
    """What an earlier manager has left, as far as that can be relied on; an empty ledger where
    there was none.

    What is no longer listed is removed by nobody, so in doubt it is left out.
    """
    ledger = read_ledger(directory)
    if ledger is None:
        return Ledger(None, (), now - 1)
    if now < ledger.last_preserved:
        _log.warning(
            "%s: the clock (%s) is behind the last preserved checkpoint timestamp (%s). The "
            "checkpoints that are there will not be removed",
            *(directory, now, ledger.last_preserved),
        )
        return Ledger(ledger.latest, (), now)
    # What is older than the last preserved one may have been preserved, too. But not where its
    # metrics are still recorded; then a policy has kept it since.
    records = [
        record
        for record in ledger.records
        if min(record.time, now) > ledger.last_preserved or record.metrics
    ]
    return Ledger(ledger.latest, tuple(records), ledger.last_preserved)


def read_ledger(directory: str) -> Ledger | None:
    """The ledger as it was written; None where there is no state file.

    It has no records where the state file was not written by a manager, or without metrics that
    can be understood: policies have to know them.
    """
    state = get_checkpoint_state(directory)
    if state is None:
        return None
    latest = _own_path(directory, state.model_checkpoint_path) or state.model_checkpoint_path
    paths, times = state.all_model_checkpoint_paths, state.all_model_checkpoint_timestamps
    metrics = _read_metrics(directory)
    records: list[CheckpointRecord] = []
    if len(times) == len(paths) and metrics is not None:
        for listed, time in zip(paths, times, strict=True):
            path = _own_path(directory, listed)
            if path is not None and (number := number_of(path)) is not None:
                known = metrics.get(os.path.basename(path), {})
                records.append(CheckpointRecord(number, time, known, path))
    return Ledger(latest, tuple(records), state.last_preserved_timestamp)


def write_ledger(directory: str, ledger: Ledger) -> None:
    """Records a ledger with a latest checkpoint: metrics first, since the state file refers to
    them.

    Raises:
      OSError: a file could not be written.
    """
    assert ledger.latest is not None
    _write_metrics(directory, {os.path.basename(r.path): r.metrics for r in ledger.records})
    paths = [record.path for record in ledger.records]
    times = [record.time for record in ledger.records]
    if ledger.latest not in paths:
        # A state file lists its latest; a time that is not later than the last preserved one
        # says that it is not managed.
        paths.append(ledger.latest)
        times.append(ledger.last_preserved)
    state = CheckpointState(ledger.latest, tuple(paths), tuple(times), ledger.last_preserved)
    update_checkpoint_state(directory, state)


def _own_path(directory: str, path: str) -> str | None:
    """`path` as a manager of the directory writes it; None where that is elsewhere."""
    above, name = os.path.split(os.path.abspath(path))
    return os.path.join(directory, name) if above == os.path.abspath(directory) else None


def _read_metrics(directory: str) -> dict[str, dict[str, float]] | None:
    """The recorded metrics by the names of checkpoints; none where there is no file.

    Returns:
      None where the file cannot be understood; a warning says so. Nothing may be removed then,
      since a policy would take the best checkpoints for bad ones.
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


def _write_metrics(directory: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
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
