"""What waits for a child: restores that came before the object that they are for.

A *pending* entry waits on a trackable under the name of a child that does not exist yet.
Whoever gains a child says so with `receive`, which hands the child over. That is all that a
trackable knows of checkpoints: somebody awaits this name.

The entries live in the instance's `__dict__`, made on first use.
"""

from __future__ import annotations

from typing import Any, Protocol

from ckpt_jax.graph.labels import Label, local_name

PENDING = "_self_pending"  # {label: [Pending, ...]}, oldest first


class Pending(Protocol):
    """A restore that waits for a child to appear."""

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        """Restores what it can into `child`; returns the child to use."""

    def initial_value(self) -> Any | None:
        """The value that waits, where it is one array; None where it is more."""


def receive(parent: Any, label: Label, child: Any) -> Any:
    """Hands a newly tracked child to the restores that wait for its name.

    The oldest comes first, so that the values of later ones win, and what only an older
    checkpoint holds still arrives. If one fails, all go on waiting. What waits for the same
    text (the position 0, where the checkpoint has a key "0") is meant, too.
    """
    pending = getattr(parent, "__dict__", {}).get(PENDING)
    if not pending:
        return child
    if label not in pending:
        text = local_name(label)
        label = next((other for other in pending if local_name(other) == text), label)
    for waiting in tuple(pending.get(label, ())):
        child = waiting.attach(parent, label, child)
    pending.pop(label, None)
    return child


def await_child(parent: Any, label: Label, pending: Pending) -> None:
    """Lets `pending` wait for the child `label` of `parent`."""
    parent.__dict__.setdefault(PENDING, {}).setdefault(label, []).append(pending)


def pending_names(parent: Any) -> list[str]:
    """The names under which restores wait."""
    return list(getattr(parent, "__dict__", {}).get(PENDING, ()))
