"""Forks: why a forked child cannot read or write checkpoints, if its parent has.

TensorStore works with threads, and threads do not survive `os.fork`. It aborts a child that goes
on with it, or waits forever for a thread that is not there. So the process that has used it is
remembered, and a child of it gets an exception instead. A child whose parent has not used
TensorStore yet may use it.
"""

from __future__ import annotations

import os

_user: int | None = None  # the first process, of this one and its parents, that used TensorStore


def require_not_forked() -> None:
    """Checks that the parent of this process has not used TensorStore before it was forked.

    Raises:
      RuntimeError: it has. This is no `CheckpointError`, or a search for a usable checkpoint would
        take all checkpoints for unusable ones.
    """
    if _user is not None and _user != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {_user}, which had read or written "
            "checkpoints. A forked process cannot do so as well, because TensorStore's threads do "
            'not survive a fork. Start workers with multiprocessing.get_context("spawn") or '
            '"forkserver" (multiprocessing_context="spawn" in a torch DataLoader), or read and '
            "write checkpoints in the parent alone."
        )


def use_tensorstore() -> None:
    """Remembers that this process uses TensorStore from now on; raises as `require_not_forked`."""
    global _user
    require_not_forked()
    _user = os.getpid()
