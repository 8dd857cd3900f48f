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

The file is replaced in one step, so a reader sees the old state or the new one. Who changes it has
the guard of the directory (`store.guard`), so no change is lost.

Comments at its beginning name the *writers* (`manage.fence`): for each name of managed checkpoints,
the manager that records them, and a number that grows whenever another one takes over. They are
comments, because other readers of the file refuse fields that they do not know.

    # ckpt_jax writer {"host": "node-7", "name": "ckpt", "number": 2, "process": 812, "run": "5c9d"}
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from google.protobuf import text_format

from ckpt_jax.graph._proto import checkpoint_state_pb2
from ckpt_jax.store.files import read_file, replace_file, shortened
from ckpt_jax.store.guard import changing
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, as_path, is_within, relative

STATE_FILE = "checkpoint"
_MAX_PATH, _MAX_NAME = 4096, 255  # characters; no system takes more bytes
# What needs no escapes, and a line of a state file that has none. All else is left to protobuf,
# which takes a hundred times as long; each save of a manager reads and writes all checkpoints.
_PLAIN = re.compile(r"[ !#-&(-\[\]-~]*")
_LINE = re.compile(
    rf"""^(?:#.*|(\w+): (?:"({_PLAIN.pattern})"|(\d+(?:\.\d+)?(?:e[+-]?\d+)?)))$""",
    re.ASCII | re.MULTILINE,
)
_WRITER = re.compile(r"^# ckpt_jax writer (\{.{1,4000}\})\n", re.MULTILINE)

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

    @property
    def managed(self) -> dict[str, float]:
        """The checkpoints that managers manage, with their times; none if some have no time.

        The latest has to be listed, managed or not. A time that is the last preserved timestamp
        says that it is not managed.
        """
        paths, times = self.all_model_checkpoint_paths, self.all_model_checkpoint_timestamps
        if len(paths) != len(times):
            return {}
        listed = dict(zip(paths, times, strict=True))
        return {
            path: time for path, time in listed.items() if time != self.last_preserved_timestamp
        }


@dataclass(frozen=True, slots=True)
class Writer:
    """A manager that records the checkpoints of one name.

    Attributes:
      number: larger than that of all its predecessors.
      run: random digits that distinguish it.
      process: the number of its process.
      host: the name of its machine.
    """

    number: int
    run: str
    process: int
    host: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


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
        state = _understood(text)
    except ValueError as error:
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
    return _with_paths(state, lambda stored: _usable_path(directory, stored))


def _understood(text: str) -> CheckpointState:
    """The state in a text.

    Raises:
      ValueError: it is not a state file, or a path in it cannot be one.
    """
    try:
        state = parse(text)
    except text_format.ParseError as error:
        raise ValueError(shortened(str(error))) from error
    for path in (state.model_checkpoint_path, *state.all_model_checkpoint_paths):
        if "\0" in path:
            raise ValueError(f"the path {shortened(repr(path))} in it has a NUL character")
        if len(path) > _MAX_PATH or max(map(len, path.split("/"))) > _MAX_NAME:
            raise ValueError(f"the path {shortened(path)} in it is longer than any can be")
    return state


def update_checkpoint_state(
    directory: str | bytes | os.PathLike[Any],
    state: CheckpointState,
    latest_filename: str | None = None,
    *,
    writers: Mapping[str, Writer] | None = None,
) -> None:
    """Replaces the state file of a directory (`tf.train.update_checkpoint_state`).

    The file is written beside its target, flushed to disk and renamed. Its writers stay.

    Args:
      directory: the directory of the state file; it must exist.
      state: the new state; see `stored_form` for how its paths are stored.
      latest_filename: its name, "checkpoint" by default.
      writers: take the place of those that the file names.

    Raises:
      ValueError: the state is incomplete; see `stored_form`.
      RuntimeError: the state file would replace the checkpoint itself.
    """
    directory = as_path(directory, "directory", is_directory=True)
    path = os.path.join(directory, latest_filename or STATE_FILE)
    stored = stored_form(directory, state)
    checkpoint = os.path.join(directory, stored.model_checkpoint_path)
    if absolute(checkpoint) == absolute(path):
        raise RuntimeError(
            f"{path}: expected different names for checkpoint and state file, got the same. "
            "Save under another name, or pass another latest_filename."
        )

    def change() -> None:
        text = state_text(directory, os.path.basename(path))
        before = writers_in(text) if writers is None else writers
        replace_file(path, _rendered(before) + render(stored))

    changing(directory, change)


def record_latest(directory: str, name: str, path: str) -> None:
    """Makes a checkpoint that no manager manages the latest of a directory.

    Managed checkpoints with other names stay listed. The others do not, as in TensorFlow.

    Args:
      directory: of the state file.
      name: of the checkpoint, without its number.
      path: of the checkpoint.
    """

    def change() -> None:
        try:
            before = _understood(state_text(directory))
        except ValueError:
            before = CheckpointState("")
        before = _with_paths(before, lambda stored: _usable_path(directory, stored))
        others = {
            other: time
            for other, time in before.managed.items()
            if not re.fullmatch(re.escape(name) + r"-\d+", os.path.basename(other))
        }
        state = CheckpointState(path)
        if others:
            last = before.last_preserved_timestamp
            state = CheckpointState(path, (*others, path), (*others.values(), last), last)
        update_checkpoint_state(directory, state)

    changing(directory, change)


def state_text(directory: str, latest_filename: str = STATE_FILE) -> str:
    """The text of a state file; an empty one if there is none, or if it is no text.

    Raises:
      OSError: it cannot be read.
    """
    try:
        return read_file(os.path.join(directory, latest_filename)) or ""
    except ValueError:
        return ""


def writers_of(directory: str) -> dict[str, Writer]:
    """The writers that the state file of a directory names; raises like `state_text`."""
    return writers_in(state_text(directory))


def writers_in(text: str) -> dict[str, Writer]:
    """The writers that the text of a state file names. What cannot be understood is left out."""
    found: dict[str, Writer] = {}
    for match in _WRITER.finditer(text):
        try:
            said = json.loads(match[1])
            name, number, process = said["name"], said["number"], said["process"]
            writer = Writer(int(number), str(said["run"]), int(process), str(said["host"]))
            if not 0 <= writer.number < 1 << 60:
                continue
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        if isinstance(name, str) and not (name in found and found[name].number > writer.number):
            found[name] = writer
    return found


def replace_writers(directory: str, writers: Mapping[str, Writer]) -> bool:
    """Replaces the writers in the state file of a directory; all else in it stays.

    Returns:
      Whether there is a state file.

    Raises:
      OSError: it could not be replaced.
    """
    path = os.path.join(directory, STATE_FILE)

    def change() -> bool:
        text = state_text(directory)
        if text:
            replace_file(path, _rendered(writers) + _WRITER.sub("", text))
        return bool(text)

    return changing(directory, change)


def _rendered(writers: Mapping[str, Writer]) -> str:
    return "".join(
        f"# ckpt_jax writer {json.dumps({'name': name, **asdict(writer)}, sort_keys=True)}\n"
        for name, writer in sorted(writers.items())
    )


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
    if all(map(_PLAIN.fullmatch, (state.model_checkpoint_path, *state.all_model_checkpoint_paths))):
        return _rendered_lines(state)
    message = checkpoint_state_pb2.CheckpointState(
        model_checkpoint_path=state.model_checkpoint_path,
        all_model_checkpoint_paths=state.all_model_checkpoint_paths,
        all_model_checkpoint_timestamps=state.all_model_checkpoint_timestamps,
        last_preserved_timestamp=state.last_preserved_timestamp,
    )
    return text_format.MessageToString(message, as_utf8=False)


def _rendered_lines(state: CheckpointState) -> str:
    """What protobuf makes of a state without characters that need an escape."""
    latest, preserved = state.model_checkpoint_path, float(state.last_preserved_timestamp)
    lines = [
        *([f'model_checkpoint_path: "{latest}"\n'] if latest else []),
        *[f'all_model_checkpoint_paths: "{path}"\n' for path in state.all_model_checkpoint_paths],
        *[
            f"all_model_checkpoint_timestamps: {float(time)}\n"
            for time in state.all_model_checkpoint_timestamps
        ],
        *([f"last_preserved_timestamp: {preserved}\n"] if str(preserved) != "0.0" else []),
    ]
    return "".join(lines)


def parse(text: str) -> CheckpointState:
    """The inverse of `render`; an empty text gives an empty state.

    Raises:
      google.protobuf.text_format.ParseError: it is not a state file, or it has unknown fields.
    """
    found = _parsed_lines(text)
    if found is not None:
        return found
    message = checkpoint_state_pb2.CheckpointState()
    text_format.Merge(text, message)
    return CheckpointState(
        message.model_checkpoint_path,
        tuple(message.all_model_checkpoint_paths),
        tuple(message.all_model_checkpoint_timestamps),
        message.last_preserved_timestamp,
    )


def _parsed_lines(text: str) -> CheckpointState | None:
    """The state in a text as `render` writes it; None if there is anything else in it."""
    lines = _LINE.findall(text)
    if len(lines) != text.count("\n") or not text.endswith("\n"):
        return None
    texts: dict[str, list[str]] = {}
    numbers: dict[str, list[float]] = {}
    for field, string, number in lines:
        if number:
            numbers.setdefault(field, []).append(float(number))
        elif field:
            texts.setdefault(field, []).append(string)
    latest = texts.pop("model_checkpoint_path", [""])[-1]
    paths = tuple(texts.pop("all_model_checkpoint_paths", ()))
    times = tuple(numbers.pop("all_model_checkpoint_timestamps", ()))
    preserved = numbers.pop("last_preserved_timestamp", [0.0])[-1]
    return None if texts or numbers else CheckpointState(latest, paths, times, preserved)


def _with_paths(state: CheckpointState, change: Callable[[str], str]) -> CheckpointState:
    return replace(
        state,
        model_checkpoint_path=change(state.model_checkpoint_path),
        all_model_checkpoint_paths=tuple(map(change, state.all_model_checkpoint_paths)),
    )


def _usable_path(directory: str, stored: str) -> str:
    return stored if is_url(stored) else os.path.join(directory, stored)


def _stored_path(directory: str, path: str) -> str:
    above, slash, name = path.rpartition("/")
    if slash and above == directory and name not in ("", ".", ".."):  # as nearly always
        return name
    if is_url(directory) or is_url(path):
        return relative(path, directory) if is_within(path, directory) else path
    if os.path.isabs(directory) and not os.path.isabs(path):
        return path
    way = os.path.relpath(path, directory)
    outside = way.split(os.sep, 1)[0] == os.pardir
    return path if outside and os.path.isabs(path) else way
