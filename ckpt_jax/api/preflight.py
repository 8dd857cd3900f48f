"""Preflight: checks that saving will work, before training time is lost.

Every process writes a small file into the directory and reports it. Then it looks for the files of
all the others and reports which of them it does not see. The problems of all processes become one
error, which all of them raise.
"""

from __future__ import annotations

import contextlib
import os
import socket

from ckpt_jax.errors import PreflightError
from ckpt_jax.options import DEFAULT, Path
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.store import objects
from ckpt_jax.store.files import read_file
from ckpt_jax.store.objects import ABSENT, is_url
from ckpt_jax.store.paths import absolute, as_path


def preflight(
    directory: Path,
    timeout_seconds: float = DEFAULT.timeout_seconds,
) -> None:
    """Checks that all processes can write to a directory, and that all of them share it.

    All processes have to call it. If there are several, `CheckpointManager.restore_or_initialize`
    calls it. So it does for an object store, which also has to heed conditions.

    Args:
      directory: the directory for the checkpoints. It is created if it does not exist.
      timeout_seconds: the longest wait for another process.

    Raises:
      PreflightError: names each process that cannot write there, or sees another directory.
      BarrierTimeoutError: a process did not call it in time.

    Example:
      >>> import tempfile
      >>> preflight(tempfile.mkdtemp())
    """
    _check(absolute(as_path(directory, "directory", is_directory=True)), current(), timeout_seconds)


def _check(directory: str, processes: Processes, timeout_seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        with processes.meeting(f"checking {directory}", timeout_seconds) as meeting:
            token = meeting.token
            names = [f".preflight-{token}-{k}" for k in range(meeting.count)]
            own = os.path.join(directory, names[meeting.index])
            stack.callback(_remove, own)
            problem = _write(own, token)
            hosts = meeting.conclude([socket.gethostname(), problem], lambda reports: reports)
        with processes.meeting(f"checking {directory}", timeout_seconds) as meeting:
            unseen = [k for k, name in enumerate(names) if not _holds(directory, name, token)]
            unseen_by = meeting.conclude(unseen, lambda reports: reports)
    problems = _problems(hosts, unseen_by)
    if problems:
        lines = "\n".join(f"  process {k} {what}" for k, what in problems)
        raise PreflightError(
            f"{directory} cannot take the checkpoints of {processes.count} processes:\n{lines}\n"
            "Every process has to be able to write there, and all have to share the directory.",
            problems,
        )


def _problems(
    hosts: list[tuple[str, str | None]], unseen_by: list[list[int]]
) -> tuple[tuple[int, str], ...]:
    """The problems, as (process, problem).

    Args:
      hosts: for each process, its host's name and why it could not write, or None if it could.
      unseen_by: for each process, the processes whose files it does not see.

    Example:
      >>> _problems([("a", None), ("b", None)], [[], [0]])
      ((1, '(b) does not see the files of 0 (a)'),)
    """
    problems = [(k, f"({host}) {problem}") for k, (host, problem) in enumerate(hosts) if problem]
    failed = {k for k, _ in problems}
    for k, unseen in enumerate(unseen_by):
        if k not in failed and (others := sorted({*unseen} - failed)):
            listed = ", ".join(f"{other} ({hosts[other][0]})" for other in others)
            problems.append((k, f"({hosts[k][0]}) does not see the files of {listed}"))
    return tuple(sorted(problems))


def _write(path: str, content: str) -> str | None:
    """Writes a small file. If this is not possible, returns the reason."""
    try:
        if is_url(path):
            return _write_to_store(path, content.encode("ascii"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "x", encoding="ascii") as file:
            file.write(content)
    except OSError as error:
        return f"cannot write: {error}"
    return None


def _write_to_store(url: str, content: bytes) -> str | None:
    """Writes a small value, and checks that the store refuses to write it again."""
    objects.write(url, content, ABSENT)
    if objects.write(url, content, ABSENT) is not None:
        return (
            "the store ignores conditions: it has created the same value twice. Of two saves that "
            "meet, both would seem to win. It cannot hold checkpoints safely"
        )
    found = objects.read(url)
    return None if found and found.value == content else "the store has lost what it acknowledged"


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # it was never written, and the error says so already
        if is_url(path):
            objects.delete(path)
        else:
            os.unlink(path)


def _holds(directory: str, name: str, content: str) -> bool:
    try:
        return read_file(os.path.join(directory, name)) == content
    except (OSError, ValueError):
        return False
