"""State or configuration: each value that is assigned to a trackable is one or the other.

Arrays, trackables, modules, and containers that hold some of these are state. Configuration is
plain data (scalars, strings, None, and containers of nothing else) and everything that has no
view. A program can choose otherwise: `NoDependency` marks configuration, and all that is given to
a `Checkpoint` by name is state.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ckpt_jax.objects.views import View, add_view, view_of

PLAIN = (int, float, complex, str, bytes, type(None), np.generic)  # plain data, but for containers


class NoDependency:
    """Marks a value that is assigned to an attribute, or put in a container, but is not state.

    Reading the attribute or the element gives the value, without the mark.

    Example:
      >>> import ckpt_jax as ckpt
      >>> class Model(ckpt.AutoTrackable):
      ...     def __init__(self): self.cache = ckpt.NoDependency({})
      >>> Model().cache, Model().trackable_children()
      ({}, {})
    """

    def __init__(self, value: Any):
        self.value = value


class NoDependencyView(View):
    """A marked value is shown as empty; inside a container it keeps its place."""

    container = "none"


def holds_state(value: Any) -> bool:
    """Whether an attribute's value is state: an array, a trackable, or a container that holds one.

    Scalars, strings, None, and containers of nothing else are configuration. An empty list or dict
    is state, because state may still be added to it.
    """
    seen: dict[int, Any] = {}  # by id; kept alive, because a view may make a container for the walk
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, PLAIN):
            continue
        if isinstance(value, jax.ShapeDtypeStruct):
            return True
        if isinstance(value, list | dict) and not value:
            return True
        view = view_of(value)
        if view is None or id(value) in seen:
            continue
        if view.identity:
            return True
        seen[id(value)] = value
        todo += [child for _, child in view.children(value)]
    return False


def leaves_state_out(value: Any) -> bool:
    """Whether a value is a container of Python's that no view knows, and holds state."""
    if not isinstance(value, deque | set | frozenset | MappingProxyType):
        return False
    parts = value.values() if isinstance(value, MappingProxyType) else value
    return any([holds_state(part) for part in parts])


class Holds(enum.IntEnum):
    """The kinds of content of a container, at any depth. If it has several, the last counts."""

    PLAIN_DATA = 0
    VALUES = 1
    OBJECTS = 2


def holds_each(container: Any) -> Iterable[tuple[Any, Holds]]:
    """A container and each container in it, with what they hold; inner ones come first.

    Objects are mutable or marked with `NoDependency`. Values are arrays, and anything that has no
    view. The rest is plain data.
    """
    entered: dict[int, tuple[Any, Holds, list[Any]]] = {}
    found: dict[int, tuple[Any, Holds]] = {}
    stack = [container]
    while stack:
        here = stack[-1]
        if id(here) not in entered:
            own, inner = _own_parts(here)
            entered[id(here)] = here, own, inner
            stack += [child for child in inner if id(child) not in entered]
            continue
        stack.pop()
        _, own, inner = entered[id(here)]
        below = [found[id(child)][1] for child in inner if id(child) in found]
        found[id(here)] = here, max([own, *below])
    return found.values()


def _own_parts(container: Any) -> tuple[Holds, list[Any]]:
    """The content of a container apart from the containers in it, and those containers."""
    view = view_of(container)
    own, inner = Holds.PLAIN_DATA, []
    for _, child in () if view is None else view.children(container):
        if isinstance(child, PLAIN):
            continue  # there may be very many numbers in a list
        view = view_of(child)
        if view is None:
            own = max(own, Holds.VALUES)  # devices, shardings, functions
        elif view.mutable or isinstance(child, NoDependency):
            own = Holds.OBJECTS
        elif view.identity or isinstance(child, jax.ShapeDtypeStruct):
            own = max(own, Holds.VALUES)
        else:
            inner.append(child)
    return own, inner


add_view(NoDependency, NoDependencyView())
