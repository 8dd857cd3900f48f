"""Which checkpoint of a directory is the latest."""

from __future__ import annotations

import logging
import os

from ckpt_jax.errors import CheckpointError
from ckpt_jax.reader import CheckpointReader
from ckpt_jax.state_file import get_checkpoint_state
from ckpt_jax.store.directory import checkpoints_in, number_of

_log = logging.getLogger("ckpt_jax")


def latest_checkpoint(
    directory: str | os.PathLike[str], latest_filename: str | None = None
) -> str | None:
    """The path of the newest usable checkpoint that the directory's state file knows of.

    Where the one that the state file names is gone or damaged, the newest older one is taken
    instead, by number, and a warning says so.

    Args:
      directory: where `Checkpoint.save` or a manager saved.
      latest_filename: name of the state file; "checkpoint" by default.

    Returns:
      A path for `Checkpoint.restore`, or None where there is none.

    Source: `tf.train.latest_checkpoint`.
    """
    directory = os.fspath(directory)
    state = get_checkpoint_state(directory, latest_filename)
    if state is None:
        return None
    first = state.model_checkpoint_path
    for path in [first, *_older(directory, first)]:
        problem = _problem(path)
        if problem is None:
            if path != first:
                _log.warning("falling back to %s, the newest usable checkpoint", path)
            return path
        _log.warning("the checkpoint %s is not usable: %s", path, problem)
    return None


def _older(directory: str, path: str) -> list[str]:
    """Checkpoints of the same name with smaller numbers, the newest first."""
    number = number_of(path)
    if number is None:
        return []
    name = os.path.basename(path)[: -len(str(number))]
    return [
        os.path.join(directory, other)
        for other in reversed(checkpoints_in(directory))
        if other[: len(name)] == name and (n := number_of(other)) is not None and n < number
    ]


def _problem(path: str) -> str | None:
    try:
        with CheckpointReader(path) as reader:
            missing = reader.missing_keys()
    except (CheckpointError, OSError) as error:
        return str(error)
    return f"it lacks {missing[0]}" if missing else None
