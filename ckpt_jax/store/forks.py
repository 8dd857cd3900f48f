"""Forks: a forked child cannot read or write checkpoints if its parent has done so.

TensorStore works with threads, and threads do not survive `os.fork`. If a child goes on to use it,
TensorStore aborts the child, or waits forever for a thread that does not exist. Therefore the
process that has used it is remembered, and its children get an exception instead. A child may use
TensorStore if its parent has not used it yet.
"""

from __future__ import annotations

import os

_user: int | None = None  # the first process that used TensorStore: this one or a parent


def require_not_forked() -> None:
    """Checks that no parent of this process had used TensorStore before the fork.

    Raises:
      RuntimeError: one had. It is not a `CheckpointError`, because a search for a usable checkpoint
        would then take all checkpoints for unusable.
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
