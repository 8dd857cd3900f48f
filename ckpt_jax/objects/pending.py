"""What waits for a child: restores that came before the object that they are for.

A *pending* entry waits on a trackable under the name of a child that does not exist yet.
Whoever gains a child hands it over (`receive`, or `received` around putting it into its place).
That is all that a trackable knows of checkpoints: somebody awaits this name.

The entries live in the instance's `__dict__`, made on first use.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

from ckpt_jax.errors import CheckpointNotFoundError
from ckpt_jax.graph.labels import Label, local_name

_log = logging.getLogger("ckpt_jax")

PENDING = "_self_pending"  # {label: [Pending, ...]}, oldest first


class Pending(Protocol):
    """A restore that waits for a child to appear."""

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        """Restores what it can into `child`; returns the child to use."""

    def attached(self) -> None:
        """Is told that the child is in its place."""

    def initial_value(self) -> Any | None:
        """The value that waits, where it is one array; None where it is more."""


def receive(parent: Any, label: Label, child: Any, arrived: list[Pending]) -> Any:
    """Hands a new child to the restores that wait for its name; returns the child to use.

    The oldest comes first, so that the values of later ones win, and what only an older
    checkpoint holds still arrives. If one fails, all go on waiting; but where a checkpoint is gone
    and a later restore waits too, the later one does. What waits for the same text (the position
    0, where the checkpoint has a key "0") is meant, too. The restores are added to `arrived`: they
    are to be told when the child is in its place.
    """
    pending = getattr(parent, "__dict__", {}).get(PENDING)
    if not pending:
        return child
    if label not in pending:
        text = local_name(label)
        label = next((other for other in pending if local_name(other) == text), label)
    waiting = tuple(pending.get(label, ()))
    for restore in waiting:
        try:
            child = restore.attach(parent, label, child)
        except CheckpointNotFoundError as error:
            if restore is waiting[-1]:
                raise
            _log.warning("an earlier restore no longer has anything for %r: %s", label, error)
        else:
            arrived.append(restore)
    pending.pop(label, None)
    return child


@contextlib.contextmanager
def received(parent: Any, label: Label, child: Any) -> Iterator[Any]:
    """Hands a new child over, as `receive`; the block, which is given the child to use, puts it
    into its place."""
    arrived: list[Pending] = []
    yield receive(parent, label, child, arrived)
    for restore in arrived:
        restore.attached()


def await_child(parent: Any, label: Label, pending: Pending) -> None:
    """Lets `pending` wait for the child `label` of `parent`."""
    parent.__dict__.setdefault(PENDING, {}).setdefault(label, []).append(pending)


def pending_names(parent: Any) -> list[str]:
    """The names under which restores wait."""
    return list(getattr(parent, "__dict__", {}).get(PENDING, ()))
