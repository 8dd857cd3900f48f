"""The checkpoints of a directory as files: finds the latest, waits for new ones, and removes one.

A checkpoint *exists* if there is a committed directory. It is *usable* if its index and object
graph can be read and agree, and if its files hold as many bytes as the index lists. The bytes of
arrays are not looked at; they are checked when they are read.

Checkpoints are in the order of the numbers in their names. Times are only reported.

If the system does not tell whether a checkpoint is there, or what it holds, its error is raised.
Otherwise the program would go on from an older checkpoint, and write over the newer ones.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator

from ckpt_jax.errors import CheckpointError, UnsupportedFormatError
from ckpt_jax.options import Path
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats import foreign_steps
from ckpt_jax.store.directory import (
    checkpoints_in,
    is_checkpoint,
    number_of,
    others_in,
    visible_in,
)
from ckpt_jax.store.notes import read_notes
from ckpt_jax.store.paths import absolute, as_path
from ckpt_jax.store.presence import is_taken
from ckpt_jax.store.replacing import settle_in
from ckpt_jax.store.state_file import STATE_FILE, CheckpointState, get_checkpoint_state
from ckpt_jax.store.storage import generation_at, storage_of

_log = logging.getLogger("ckpt_jax")


def latest_checkpoint(directory: Path, latest_filename: str | None = None) -> str | None:
    """The path of the newest usable checkpoint of a directory.

    The state file says which one that is. If that one is gone or damaged, the usable one with the
    next smaller number is taken, and a warning says so. Checkpoints on a branch that the program
    left by going back are not taken. If no state file can be read, the usable checkpoint with the
    largest number in its name is taken, and a warning says so, too. If the directory has no
    checkpoint of this library, the usable one of another library with the largest step is taken.

    Args:
      directory: where `Checkpoint.save`, a manager, or a manager of Orbax saved.
      latest_filename: name of the state file; "checkpoint" by default. If it is given, and this
        file cannot be read, no checkpoint is found.

    Returns:
      A path for `Checkpoint.restore`, or None if there is none.

    Raises:
      ValueError: the state file names no checkpoint, and the directory holds none with a number.
      UnsupportedFormatError: the directory holds only checkpoints that cannot be read here, or the
        latest one is of a newer format.
      OSError: something could not be looked at, so it is not known which one is the latest.

    Source: `tf.train.latest_checkpoint`, which returns None if the latest is gone, or if there is
    no state file.

    Example:
      >>> import os, tempfile
      >>> from ckpt_jax.api.checkpoint import Checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     checkpoint = Checkpoint(step=7)
      ...     paths = [checkpoint.save(f"{directory}/ckpt") for _ in range(2)]
      ...     os.path.basename(latest_checkpoint(directory))
      'ckpt-2'
    """
    directory = as_path(directory, "directory", is_directory=True)
    first = None
    while True:
        state = state_in(directory, latest_filename)
        if state is None:
            return _newest_by_name(directory) if latest_filename is None else None
        latest = beside(directory, state.model_checkpoint_path)
        problem = problem_with(latest)
        if problem is None:
            if latest != state.model_checkpoint_path:
                warn_of_move(directory, state.model_checkpoint_path, latest)
            return latest
        if latest == first:
            break
        first = latest  # read again: a newer save may have just replaced and removed it
        settle_in(os.path.dirname(latest), os.path.basename(latest).__eq__)
    _refuse_unsupported(latest)
    _warn_of_problem(latest, problem)
    path = _first_usable(older_checkpoints(directory, latest))
    if path is None:
        path = _first_usable(reversed(foreign_steps(directory).values()))
    if path is not None:
        _log.warning("falling back to %s, the newest usable checkpoint", path)
    return path


def _first_usable(paths: Iterable[str]) -> str | None:
    """The first usable one of several checkpoints; warnings say why those before it are not."""
    for path in paths:
        problem = problem_with(path)
        if problem is None:
            return path
        _warn_of_problem(path, problem)
    return None


def _warn_of_problem(path: str, problem: str) -> None:
    _log.warning("the checkpoint %s is not usable: %s", path, problem)


def state_in(directory: str, latest_filename: str | None = None) -> CheckpointState | None:
    """The contents of the state file of a directory; None if it is missing or cannot be understood.

    Raises:
      ValueError: it names no checkpoint, and the directory holds none with a number.
    """
    try:
        return get_checkpoint_state(directory, latest_filename)
    except ValueError as error:
        if latest_filename is not None or not _numbered(directory):
            raise
        _log.warning("%s The file is ignored.", error)
        return None


def beside(directory: str, path: str) -> str:
    """The checkpoint that a state file in `directory` means by a path.

    It is usually the path itself. If the directory was copied, nothing may be there. Then it is the
    checkpoint of this name beside the state file, if there is one.
    """
    here = os.path.join(directory, os.path.basename(path.rstrip("/")))
    if here == path or is_taken(path):
        return path
    return here if is_checkpoint(here) else path


def warn_of_move(directory: str, named: str, found: str) -> None:
    """Warns that a checkpoint was found beside a state file that names another place."""
    _log.warning(
        "%s names the checkpoint %s, but nothing is there. Instead, the checkpoint of this name "
        "beside the file is taken: %s. The next save corrects the file.",
        *(os.path.join(directory, STATE_FILE), named, found),
    )


def _numbered(directory: str) -> list[str]:
    return checkpoints_in(directory, lambda name: number_of(name) is not None)


def _newest_by_name(directory: str) -> str | None:
    """The newest checkpoint of a directory without a state file, by the numbers in the names."""
    settle_in(directory, lambda name: number_of(name) is not None)
    numbered = _numbered(directory)
    names = [] if numbered else visible_in(directory)
    if not numbered and not names:
        steps = foreign_steps(directory)
        if not steps:
            refuse_others(directory)
        return _first_usable(reversed(steps.values()))
    if names:
        _log.warning(
            "%s: expected a state file or checkpoints with a number in their names, found %s. "
            "It is not known which one is the latest. Restore one of them by its path.",
            *(directory, ", ".join(names)),
        )
    path = _first_usable(os.path.join(directory, name) for name in reversed(numbered))
    if path is not None:
        _log.warning(
            "%s: expected a state file that names the latest checkpoint, found none that can be "
            "read. Of %d checkpoints, the usable one with the largest number is taken: %s.",
            *(os.path.join(directory, STATE_FILE), len(numbered), os.path.basename(path)),
        )
    return path


def refuse_others(directory: str) -> None:
    """Refuses a directory that holds checkpoints of another library.

    Raises:
      UnsupportedFormatError: there are some; the error names them.
    """
    found = others_in(directory)
    if found:
        names = list(found)
        what = "a checkpoint" if names == ["."] else f"checkpoints ({', '.join(names[-5:])})"
        raise UnsupportedFormatError(
            f"{directory}: expected checkpoints of ckpt_jax, found {what} of "
            f"{', '.join(sorted(set(found.values())))}, which cannot be read here. Restore with "
            "that library and save with ckpt_jax; docs/migrating.md shows how. To start from "
            "scratch, use another directory."
        )


def older_checkpoints(directory: Path, path: str) -> list[str]:
    """The checkpoints in `directory` with the same name as `path` and smaller numbers. Those on a
    branch that the program left by going back are not among them.

    Returns:
      Paths, the largest number first; none if `path` has no number.
    """
    number = number_of(path)
    if number is None:
        return []
    directory = as_path(directory, "directory", is_directory=True)
    name = _name_without_number(path)
    try:
        notes = read_notes(directory)
    except ValueError:  # then abandoned branches are not known
        notes = None
    abandoned = notes.abandoned if notes is not None else frozenset()

    def is_older(other: str) -> bool:
        n = number_of(other)
        return n is not None and n < number and _name_without_number(other) == name

    older = checkpoints_in(directory, lambda other: other not in abandoned and is_older(other))
    return [os.path.join(directory, other) for other in reversed(older)]


def problem_with(path: str) -> str | None:
    """Why the checkpoint at `path` is not usable; None if it is.

    Raises:
      OSError: this is not known.
    """
    try:
        with CheckpointReader(path) as reader:
            _ = reader.object_graph
            reader.check_files()
    except CheckpointError as error:
        return str(error)
    return None


def _refuse_unsupported(path: str) -> None:
    """Raises UnsupportedFormatError if `path` has a format that ckpt_jax does not read."""
    try:
        CheckpointReader(path).close()
    except UnsupportedFormatError:
        raise
    except CheckpointError:
        return


def checkpoints_iterator(
    directory: Path,
    timeout: float | None = None,
    *,
    min_interval_seconds: float = 0.0,
    timeout_fn: Callable[[], bool] | None = None,
    poll_seconds: float = 1.0,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[str]:
    """Yields the checkpoints of a directory as they appear, for evaluation during training.

    Each iteration yields the latest checkpoint, if it is a new one, or was saved again. Checkpoints
    that were overtaken in between are skipped. While the latest is not usable, because it is still
    being copied, is damaged, or was just removed, a warning says so, and no older one is yielded in
    its place.

    Args:
      directory: where another program saves; it need not exist yet.
      timeout: seconds to wait for each new checkpoint; None waits forever.
      min_interval_seconds: the least time between two checkpoints that are yielded.
      timeout_fn: called when the timeout is over. If it returns true, the iteration ends; otherwise
        it goes on waiting. Without this function, the iteration ends.
      poll_seconds: the time between two looks at the state file.
      wait: a function that waits for a number of seconds.
      clock: returns the time in seconds, from any origin.

    Returns:
      An iterator over paths for `Checkpoint.restore`.

    Raises:
      ValueError: the state file names no checkpoint; raised during the iteration.
      OSError: something could not be looked at; raised during the iteration.

    Source: `tf.train.checkpoints_iterator`.

    Example:
      >>> import os, tempfile
      >>> from ckpt_jax.api.checkpoint import Checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Checkpoint(step=7).save(f"{directory}/ckpt")
      ...     [os.path.basename(path) for path in checkpoints_iterator(directory, timeout=0)]
      ['ckpt-1']
    """
    given = as_path(directory, "directory", is_directory=True)  # now, not at the first checkpoint
    return _as_they_appear(
        given, timeout, min_interval_seconds, timeout_fn, poll_seconds, wait, clock
    )


def _as_they_appear(
    directory: str,
    timeout: float | None,
    min_interval_seconds: float,
    timeout_fn: Callable[[], bool] | None,
    poll_seconds: float,
    wait: Callable[[float], object],
    clock: Callable[[], float],
) -> Iterator[str]:
    seen: tuple[str, Hashable] | None = None
    while True:
        deadline = math.inf if timeout is None else clock() + timeout
        path, generation, problem = _newer(directory, seen, None)
        while path is None and (remaining := deadline - clock()) > 0:
            wait(min(poll_seconds, remaining))
            path, generation, problem = _newer(directory, seen, problem)
        if path is not None:
            seen, earliest = (path, generation), clock() + min_interval_seconds
            yield path
            if (early := earliest - clock()) > 0:
                wait(early)
        elif timeout_fn is None or timeout_fn():
            return


def _newer(
    directory: str, seen: tuple[str, Hashable] | None, known_problem: str | None
) -> tuple[str | None, Hashable, str | None]:
    """The latest checkpoint, if it is not `seen` and is usable.

    Returns:
      Its path, its generation, and None; or None twice, and the problem with it. A known problem is
      not logged again.
    """
    state = state_in(directory)
    if state is not None:
        path = beside(directory, state.model_checkpoint_path)
    elif numbered := _numbered(directory):
        path = os.path.join(directory, numbered[-1])
    elif steps := foreign_steps(directory):
        path = [*steps.values()][-1]
    else:
        return None, None, None
    generation = generation_at(absolute(path))
    if seen is not None and path == seen[0] and generation in (None, seen[1]):
        return None, None, None
    problem = problem_with(path)
    if problem is None:
        return path, generation, None
    if problem != known_problem:
        _log.warning("the checkpoint %s is not usable yet: %s", path, problem)
    return None, None, problem


def checkpoint_exists(path: Path) -> bool:
    """Whether there is a committed checkpoint at `path`; it may still be damaged.

    Args:
      path: of a checkpoint, as `save` returned it.

    Raises:
      OSError: this is not known, because the system refuses to tell.

    Source: `tf.compat.v1.train.checkpoint_exists`.

    Example:
      >>> checkpoint_exists("/nowhere/ckpt-1")
      False
    """
    return is_checkpoint(as_path(path))


def get_checkpoint_mtimes(paths: Iterable[Path]) -> list[float]:
    """The times at which checkpoints were committed, or copied to where they are.

    Args:
      paths: of checkpoints.

    Returns:
      Seconds since the epoch by the clock of the file system, in the order of `paths`. In an
      object store it is the clock of the process that saved. Checkpoints that do not exist are left
      out.

    Source: `tf.compat.v1.train.get_checkpoint_mtimes`.

    Example:
      >>> get_checkpoint_mtimes(["/nowhere/ckpt-1"])
      []
    """
    times: list[float] = []
    for path in paths:
        time = storage_of(as_path(path)).saved_at(as_path(path))
        if time is not None:
            times.append(time)
    return times


def remove_checkpoint(path: Path) -> None:
    """Removes the checkpoint at `path`. It is no error if nothing is there.

    The checkpoint is first renamed to a staging directory, so that a part of it is never taken for
    a checkpoint. If the path is a symbolic link, only the link is removed.

    Args:
      path: of a checkpoint, as `save` returned it.

    Raises:
      CheckpointNotFoundError: something else is there; it stays.
      OSError: it could not be removed, or not all of it. Then the rest is in a directory
        `<path>.staging-<32 hex digits>`, which is not a checkpoint.

    Source: `tf.compat.v1.train.remove_checkpoint`.

    Example:
      >>> import tempfile
      >>> from ckpt_jax.api.checkpoint import Checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Checkpoint(step=7).save(f"{directory}/ckpt")
      ...     remove_checkpoint(path)
      ...     checkpoint_exists(path)
      False
    """
    path = absolute(as_path(path))
    with storage_of(path).removing(path) as remove_rest:
        if remove_rest is not None:
            remove_rest()


def _name_without_number(path: str) -> str:
    return os.path.basename(path).rpartition("-")[0]
