"""The state file: which checkpoints a directory holds, and which of them is the latest.

The file, by default called `checkpoint`, is a `CheckpointState` message in protobuf's text
format (`protos/checkpoint_state.proto`):

    model_checkpoint_path: "ckpt-3"
    all_model_checkpoint_paths: "ckpt-2"
    all_model_checkpoint_paths: "ckpt-3"

A path has two forms. A *usable* path is absolute, or relative to the working directory; it is
what callers give and get. A *stored* path is what the file says: relative to the directory of
the file where the checkpoint lies inside it, so that the directory can be moved, and absolute
otherwise. `stored_form` leads from the one to the other, `get_checkpoint_state` back.

The file is replaced in one step, so a reader sees the old state or the new one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from ckpt_jax.graph._proto import checkpoint_state_pb2
from ckpt_jax.store.durable import fsync_directory, naming
from ckpt_jax.store.paths import as_path
from ckpt_jax.store.staging import claim, new_file, remove_leftovers

STATE_FILE = "checkpoint"

_log = logging.getLogger("ckpt_jax")


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """What a state file says (`tf.train.CheckpointState`).

    Attributes:
      model_checkpoint_path: the latest checkpoint.
      all_model_checkpoint_paths: the checkpoints that are still managed, oldest first; the
        last one is the latest.
      all_model_checkpoint_timestamps: when each of them was written, in seconds since the
        epoch; empty where that was not recorded.
      last_preserved_timestamp: when the newest checkpoint was written that is kept for ever,
        in seconds since the epoch; 0 where there is none.
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
      directory: where the state file is.
      latest_filename: its name, "checkpoint" by default.

    Returns:
      The state, relative paths joined to `directory`, or None where there is no state file or
      it cannot be understood; the latter is logged as a warning.

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
        with open(path, encoding="utf-8") as file:
            state = parse(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnicodeDecodeError, text_format.ParseError, IsADirectoryError) as error:
        _log.warning("%s is ignored, because it is no checkpoint state file: %s", path, error)
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
      directory: where the state file is; it must exist.
      state: see `stored_form` for what is accepted and what becomes of it.
      latest_filename: name of the file, "checkpoint" by default.

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
            f"{path}: expected different names for checkpoint and state file, found the same. "
            "Save under another name, or pass another latest_filename."
        )
    replace_file(path, render(stored))


def stored_form(
    directory: str | bytes | os.PathLike[Any], state: CheckpointState
) -> CheckpointState:
    """`state` as the file in `directory` says it.

    The latest checkpoint is appended to the list where it is not its last element. A path
    inside `directory` becomes relative to it; any other absolute path stays as it is. A
    relative path is taken as relative to the working directory if `directory` is relative too,
    and as relative to `directory` if that is absolute.

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
      google.protobuf.text_format.ParseError: not a state file, or one with unknown fields.
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


def replace_file(path: str, text: str) -> None:
    """Replaces a small file in one step, durably; where that fails, it is as it was.

    Raises:
      OSError: naming the file.
    """
    before: bytes | None = None
    with suppress(FileNotFoundError):
        before = Path(path).read_bytes()
    remove_leftovers(path)
    _put(path, text.encode("ascii"))
    try:
        fsync_directory(os.path.dirname(path) or os.curdir)
    except OSError:
        # The new file is in place, but nobody may rely on it.
        if before is None:
            os.unlink(path)
        else:
            _put(path, before)
        raise


def _put(path: str, contents: bytes) -> None:
    with claim(path, new_file) as temporary:
        with naming(temporary), open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
