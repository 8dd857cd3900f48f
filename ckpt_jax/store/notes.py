"""Notes: facts about checkpoints that a manager needs and that the state file cannot hold.

They are in the file `checkpoint-metrics.json` beside the state file: the metrics of each checkpoint
by its name, the number of the checkpoint that its program had saved or restored before (its
*origin*), and the names of the checkpoints on an *abandoned branch* (the program went back to an
earlier step and went on from there):

    {"ckpt-3": {"loss": 0.25}, "ckpt-4": {"loss": "nan"}, "abandoned": ["ckpt-4"],
     "origins": {"ckpt-4": 3}}

They are not in the checkpoints, because a manager needs them to choose between checkpoints, and
reads one small file instead of opening them all. Evaluators in other processes add metrics to it
(`add_metrics`). They are not in the state file, because its other
readers refuse unknown fields. The file is replaced in one step. If there is nothing to note, no
file is created.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckpt_jax.store.files import read_file, replace_file, shortened
from ckpt_jax.store.guard import read_again
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.presence import is_file

NOTES_FILE = "checkpoint-metrics.json"
# Not the names of managed checkpoints, which would have a number.
_ABANDONED = "abandoned"
_ORIGINS = "origins"


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of a directory, by the names of checkpoints.

    Attributes:
      metrics: the metrics of each checkpoint.
      abandoned: the checkpoints on abandoned branches.
      origins: the number of the origin of each checkpoint, if it is known.
    """

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    abandoned: frozenset[str] = frozenset()
    origins: Mapping[str, int] = field(default_factory=dict)


def read_notes(directory: str) -> Notes | None:
    """The notes of a directory; None if there is no file.

    Raises:
      ValueError: the file cannot be understood.
      OSError: it cannot be read.
    """
    text = read_file(os.path.join(directory, NOTES_FILE))
    if text is None:
        return None
    try:
        content = json.loads(text)
        abandoned = content.pop(_ABANDONED, [])
        if not isinstance(abandoned, list):
            raise ValueError(f"{_ABANDONED!r} is not a list")
        origins = {name: int(number) for name, number in content.pop(_ORIGINS, {}).items()}
        metrics = {
            name: {metric: float(value) for metric, value in own.items()}
            for name, own in content.items()
        }
        return Notes(metrics, frozenset([str(name) for name in abandoned]), origins)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(shortened(str(error))) from error


def write_notes(directory: str, notes: Notes, *, is_needed: bool = False) -> None:
    """Replaces the notes of a directory. Numbers that are not finite are written as strings.

    Args:
      directory: where the file is.
      notes: its new contents.
      is_needed: whether there has to be a file, even if there is nothing to note.

    Raises:
      OSError: the file could not be written.
    """
    path = os.path.join(directory, NOTES_FILE)
    content: dict[str, object] = {
        name: {key: value if math.isfinite(value) else str(value) for key, value in own.items()}
        for name, own in notes.metrics.items()
        if own
    }
    if notes.abandoned:
        content[_ABANDONED] = sorted(notes.abandoned)
    if notes.origins:
        content[_ORIGINS] = dict(notes.origins)
    if content or is_needed or _is_there(path):
        replace_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def add_metrics(directory: str, name: str, metrics: Mapping[str, float]) -> None:
    """Adds metrics to those of a checkpoint. Those with the same names are replaced.

    Args:
      directory: of the checkpoint; the caller has its guard.
      name: of the checkpoint.
      metrics: to add.

    Raises:
      ValueError: the file cannot be understood.
      OSError: it could not be read or written.
    """
    try:
        before = read_notes(directory) or Notes()
    except ValueError as error:
        raise ValueError(
            f"{os.path.join(directory, NOTES_FILE)}: expected a file of metrics, found something "
            f"else: {error}. Nothing was recorded. Restore the file from a copy."
        ) from error
    own = {**before.metrics.get(name, {}), **metrics}
    write_notes(directory, replace(before, metrics={**before.metrics, name: own}))


def _is_there(path: str) -> bool:
    return read_again(path) is not None if is_url(path) else is_file(path)
