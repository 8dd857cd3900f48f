"""Preflight: finding out, before training time is lost, that saving would not work.

Every process writes a small file into the directory and says so, then looks for the files of
all the others and says which it does not see. What is wrong anywhere becomes one error on all
processes.
"""

from __future__ import annotations

import contextlib
import os
import socket

from ckpt_jax.errors import PreflightError
from ckpt_jax.options import DEFAULT, Path
from ckpt_jax.processes.current import current


def preflight(
    directory: Path,
    timeout_seconds: float = DEFAULT.timeout_seconds,
) -> None:
    """Checks that all processes can write to a directory, and that it is one for all of them.

    To be called on all processes. `CheckpointManager.restore_or_initialize` calls it where
    there are several.

    Args:
      directory: where checkpoints will go; it is made.
      timeout_seconds: the longest wait for another process.

    Raises:
      PreflightError: naming each process that cannot write there, or sees another directory.
      BarrierTimeoutError: a process did not come.

    Example:
      >>> import tempfile
      >>> preflight(tempfile.mkdtemp())
    """
    directory = os.path.abspath(os.fsdecode(directory))
    processes = current()
    with contextlib.ExitStack() as stack:
        with processes.meeting(f"checking {directory}", timeout_seconds) as meeting:
            token = meeting.token
            names = [f".preflight-{token}-{k}" for k in range(meeting.count)]
            own = os.path.join(directory, names[meeting.index])
            stack.callback(_remove, own)
            problem = _written(own, token)
            hosts = meeting.conclude([socket.gethostname(), problem], lambda reports: reports)
        with processes.meeting(f"checking {directory}", timeout_seconds) as meeting:
            unseen = [k for k, name in enumerate(names) if not _holds(directory, name, token)]
            seen_by_all = meeting.conclude(unseen, lambda reports: reports)
    problems = [(k, f"({host}) {problem}") for k, (host, problem) in enumerate(hosts) if problem]
    failed = {k for k, _ in problems}
    for k, unseen in enumerate(seen_by_all):
        if k not in failed and (others := sorted({*unseen} - failed)):
            listed = ", ".join(f"{other} ({hosts[other][0]})" for other in others)
            problems.append((k, f"({hosts[k][0]}) does not see what was written by {listed}"))
    if problems:
        lines = "\n".join(f"  process {k} {what}" for k, what in sorted(problems))
        raise PreflightError(
            f"{directory} cannot take the checkpoints of {processes.count} processes:\n{lines}\n"
            "Every process has to be able to write there, and all have to share it.",
            tuple(sorted(problems)),
        )


def _written(path: str, content: str) -> str | None:
    """Writes a small file; returns why that was not possible."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "x", encoding="ascii") as file:
            file.write(content)
    except OSError as error:
        return f"cannot write: {error}"
    return None


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # it could not be written, and that is said already
        os.unlink(path)


def _holds(directory: str, name: str, content: str) -> bool:
    try:
        with open(os.path.join(directory, name), encoding="ascii") as file:
            return file.read() == content
    except OSError:
        return False
