"""Leases: a reader keeps a checkpoint from being removed while it is at work on it.

A lease is a shared lock (flock) on the manifest. It ends with its block, or with the process. A
manager that wants to remove a checkpoint takes the exclusive lock first. If it does not get it, the
checkpoint stays for now. Where nothing can be locked, there are no leases: a reader may then find
that its checkpoint was removed, and has to take a newer one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ckpt_jax.errors import CheckpointNotFoundError
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.staging import Lock, held, locked, locked_for_writing
from ckpt_jax.store.storage import generation_at


@contextmanager
def leased(path: str) -> Iterator[None]:
    """Keeps managers from removing the checkpoint at `path` while the block runs.

    A save to the same path, and a removal by hand, are not kept from replacing or removing it.

    Raises:
      CheckpointNotFoundError: it was removed, or is being removed.
    """
    gone = CheckpointNotFoundError(f"{path} was removed before it could be read")
    before = generation_at(path)
    with ExitStack() as exits:
        try:
            lock = Lock.NONE
            if not is_url(path):
                lock = exits.enter_context(held(os.path.join(path, MANIFEST)))
        except (FileNotFoundError, NotADirectoryError):
            raise gone from None
        if lock is Lock.THEIRS or before is None or generation_at(path) != before:
            raise gone
        yield


@contextmanager
def without_lease(path: str) -> Iterator[bool]:
    """Gives whether nobody has a lease of the checkpoint at `path`, and nobody gets one while the
    block runs."""
    manifest = os.path.join(path, MANIFEST)
    if is_url(path):  # nothing can be locked there
        yield True
        return
    with ExitStack() as exits:
        try:
            lock = exits.enter_context(locked(manifest))
            if lock is Lock.NONE:
                lock = exits.enter_context(locked_for_writing(manifest))
        except OSError:  # it is gone, or may not be opened: its removal will tell
            lock = Lock.NONE
        yield lock is not Lock.THEIRS
