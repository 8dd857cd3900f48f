"""Restores that came before the object that they are for.

A *pending* restore waits on a trackable, under the name of a child that does not exist yet. When
the trackable gets the child, it hands the child over with `received`. This is all that a trackable
knows of checkpoints: somebody waits for this name.

The entries are in the `__dict__` of the trackable, and are created on first use.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ckpt_jax.errors import CheckpointNotFoundError
from ckpt_jax.graph.labels import Label, canonical, local_name

_log = logging.getLogger("ckpt_jax")

PENDING = "_self_pending"  # {label: [Pending, ...]}, oldest first


class Pending(Protocol):
    """A restore that waits for a child to appear."""

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        """Restores what it can into `child`; returns the child to use."""

    def attached(self) -> None:
        """Is called when the child is a child of its parent."""

    @property
    def appeared(self) -> Callable[[Any, Label], None]:
        """Is called, once for each restore, with a parent and the label of a new child for which
        nobody waits. Perhaps a restore knows the name, if "/" and "." are read in another way."""
        ...

    def initial_value(self) -> Any | None:
        """The value that waits if it is one array; None if it is more."""


@contextlib.contextmanager
def received(parent: Any, label: Label, child: Any) -> Iterator[Any]:
    """Hands a new child to the restores that wait for its name.

    The block gets the child to use, and makes it a child of the parent. Then the restores are told
    (`Pending.attached`).

    The oldest restore comes first, so that the values of later restores win, and a value that
    only an older checkpoint has still arrives. If a restore fails, all go on waiting. But if its
    checkpoint is gone and a later restore waits too, the later restore goes on. A restore that
    waits for the same text is meant, too: the position 0, if the checkpoint has a key "0".
    """
    pending = getattr(parent, "__dict__", {}).get(PENDING)
    if not pending:
        yield child
        return
    label = canonical(label)
    if label not in pending:
        text = local_name(label)
        label = next((other for other in pending if local_name(other) == text), label)
    waiting = tuple(pending.get(label, ()))
    others = [] if waiting else [*dict.fromkeys(_in_other_words(local_name(label), pending))]
    arrived: list[Pending] = []
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
    yield child
    for restore in arrived:
        restore.attached()
    for appeared in others:
        appeared(parent, label)


def _in_other_words(
    name: str, pending: Mapping[Label, Sequence[Pending]]
) -> Iterator[Callable[[Any, Label], None]]:
    """What tells the restores that may know the parts of a name, or a name that it is a part of."""
    words = f"{name}/".replace(".", "/")
    has_parts = "/" in words[:-1]
    for label, restores in pending.items():
        if has_parts or f"{local_name(label)}/".replace(".", "/").startswith(words):
            yield from [restore.appeared for restore in restores]


def await_child(parent: Any, label: Label, pending: Pending) -> None:
    """Lets `pending` wait for the child `label` of `parent`."""
    parent.__dict__.setdefault(PENDING, {}).setdefault(label, []).append(pending)


def copy_pending(parent: Any, copied: Any) -> None:
    """Lets the restores that wait for children of an object wait for children of its copy, too."""
    if (pending := parent.__dict__.get(PENDING)) is not None:
        copied.__dict__[PENDING] = {label: [*restores] for label, restores in pending.items()}


def pending_names(parent: Any) -> list[str]:
    """The names under which restores wait."""
    return list(getattr(parent, "__dict__", {}).get(PENDING, ()))
