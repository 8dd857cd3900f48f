"""The state file: which checkpoints a directory holds, and which of them is the latest.

The file, by default called `checkpoint`, is a `CheckpointState` message in protobuf's text
format (`protos/checkpoint_state.proto`):

    model_checkpoint_path: "ckpt-3"
    all_model_checkpoint_paths: "ckpt-2"
    all_model_checkpoint_paths: "ckpt-3"

A path has two forms. Callers give and get *usable* paths, which are absolute or relative to the
working directory. The file contains *stored* paths: if the checkpoint lies inside the directory of
the file, the path is relative to that directory, so that the directory can be moved; otherwise it
is absolute. `stored_form` turns usable paths into stored ones, `get_checkpoint_state` does the
reverse.

The file is replaced in one step, so a reader sees the old state or the new one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import text_format

from ckpt_jax.graph._proto import checkpoint_state_pb2
from ckpt_jax.store.files import read_file, replace_file
from ckpt_jax.store.paths import as_path

STATE_FILE = "checkpoint"

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The contents of a state file (`tf.train.CheckpointState`).

    Attributes:
      model_checkpoint_path: the latest checkpoint.
      all_model_checkpoint_paths: the checkpoints that are still managed, oldest first; the
        last one is the latest.
      all_model_checkpoint_timestamps: when each of them was written, in seconds since the
        epoch; empty if that was not recorded.
      last_preserved_timestamp: when the newest of the checkpoints that are kept forever was
        written, in seconds since the epoch; 0 if there is none.
    """

    model_checkpoint_path: str
    all_model_checkpoint_paths: tuple[str, ...] = ()
    all_model_checkpoint_timestamps: tuple[float, ...] = ()
    last_preserved_timestamp: float = 0.0


def get_checkpoint_state(
    directory: str | bytes | os.PathLike[Any], latest_filename: str | None = None
) -> CheckpointState | None:
    """Reads the state file of a directory (`tf.train.get_checkpoint_state`).

    Args:
      directory: the directory of the state file.
      latest_filename: its name, "checkpoint" by default.

    Returns:
      The state, with relative paths joined to `directory`. None if there is no state file, or
      if it cannot be parsed, which is logged as a warning.

    Raises:
      ValueError: the file names no latest checkpoint.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> get_checkpoint_state(directory) is None
    True
    >>> update_checkpoint_state(directory, CheckpointState(os.path.join(directory, "ckpt-1")))
    >>> state = get_checkpoint_state(directory)
    >>> os.path.relpath(state.model_checkpoint_path, directory)
    'ckpt-1'
    """
    directory = as_path(directory, "directory", is_directory=True)
    path = os.path.join(directory, latest_filename or STATE_FILE)
    try:
        text = read_file(path)
        if text is None:
            return None
        state = parse(text)
        if "\0" in "".join([state.model_checkpoint_path, *state.all_model_checkpoint_paths]):
            raise ValueError("a path in it has a NUL character")
    except (ValueError, text_format.ParseError) as error:
        _log.warning(
            "%s is ignored, because it is not a checkpoint state file: %s. Restore the file from a "
            "copy, or delete it: the next save writes a new one.",
            *(path, error),
        )
        return None
    if not state.model_checkpoint_path:
        raise ValueError(
            f"{path}: expected a model_checkpoint_path, found none. Delete the file, or name the "
            "latest checkpoint in it."
        )
    return _with_paths(state, lambda stored: os.path.join(directory, stored))


def update_checkpoint_state(
    directory: str | bytes | os.PathLike[Any],
    state: CheckpointState,
    latest_filename: str | None = None,
) -> None:
    """Replaces the state file of a directory (`tf.train.update_checkpoint_state`).

    The file is written beside its target, flushed to disk and renamed.

    Args:
      directory: the directory of the state file; it must exist.
      state: the new state; see `stored_form` for how its paths are stored.
      latest_filename: its name, "checkpoint" by default.

    Raises:
      ValueError: the state is incomplete; see `stored_form`.
      RuntimeError: the state file would replace the checkpoint itself.
    """
    directory = as_path(directory, "directory", is_directory=True)
    path = os.path.join(directory, latest_filename or STATE_FILE)
    stored = stored_form(directory, state)
    checkpoint = os.path.join(directory, stored.model_checkpoint_path)
    if os.path.abspath(checkpoint) == os.path.abspath(path):
        raise RuntimeError(
            f"{path}: expected different names for checkpoint and state file, got the same. "
            "Save under another name, or pass another latest_filename."
        )
    replace_file(path, render(stored))


def stored_form(
    directory: str | bytes | os.PathLike[Any], state: CheckpointState
) -> CheckpointState:
    """`state` with the paths that the file in `directory` stores.

    The latest checkpoint is appended to the list of paths if it is not the last one already. A
    path inside `directory` becomes relative to it; any other absolute path stays as it is. A
    relative path is understood as relative to the working directory if `directory` is relative
    too, and as relative to `directory` if that is absolute.

    Raises:
      ValueError: a path is empty, or there are timestamps, but not one for each path.

    >>> stored_form("runs/a", CheckpointState("runs/a/ckpt-1")).all_model_checkpoint_paths
    ('ckpt-1',)
    """
    directory = as_path(directory, "directory", is_directory=True)
    paths = state.all_model_checkpoint_paths
    if paths[-1:] != (state.model_checkpoint_path,):
        paths = (*paths, state.model_checkpoint_path)
    times = state.all_model_checkpoint_timestamps
    if not all(paths):
        raise ValueError(f"{directory}: expected paths of checkpoints, got {paths}.")
    if times and len(times) != len(paths):
        raise ValueError(
            f"{directory}: expected no timestamp or one for each of {len(paths)} "
            f"checkpoints, got {len(times)}."
        )
    state = replace(state, all_model_checkpoint_paths=paths)
    return _with_paths(state, lambda path: _stored_path(directory, path))


def render(state: CheckpointState) -> str:
    """The text of a state file, in ASCII.

    >>> print(render(CheckpointState("ckpt-1", ("ckpt-1",), (12.5,))), end="")
    model_checkpoint_path: "ckpt-1"
    all_model_checkpoint_paths: "ckpt-1"
    all_model_checkpoint_timestamps: 12.5
    """
    message = checkpoint_state_pb2.CheckpointState(
        model_checkpoint_path=state.model_checkpoint_path,
        all_model_checkpoint_paths=state.all_model_checkpoint_paths,
        all_model_checkpoint_timestamps=state.all_model_checkpoint_timestamps,
        last_preserved_timestamp=state.last_preserved_timestamp,
    )
    return text_format.MessageToString(message, as_utf8=False)


def parse(text: str) -> CheckpointState:
    """The inverse of `render`; an empty text gives an empty state.

    Raises:
      google.protobuf.text_format.ParseError: it is not a state file, or it has unknown fields.
    """
    message = checkpoint_state_pb2.CheckpointState()
    text_format.Merge(text, message)
    return CheckpointState(
        message.model_checkpoint_path,
        tuple(message.all_model_checkpoint_paths),
        tuple(message.all_model_checkpoint_timestamps),
        message.last_preserved_timestamp,
    )


def _with_paths(state: CheckpointState, change: Callable[[str], str]) -> CheckpointState:
    return replace(
        state,
        model_checkpoint_path=change(state.model_checkpoint_path),
        all_model_checkpoint_paths=tuple(map(change, state.all_model_checkpoint_paths)),
    )


def _stored_path(directory: str, path: str) -> str:
    if os.path.isabs(directory) and not os.path.isabs(path):
        return path
    relative = os.path.relpath(path, directory)
    outside = relative.split(os.sep, 1)[0] == os.pardir
    return path if outside and os.path.isabs(path) else relative
