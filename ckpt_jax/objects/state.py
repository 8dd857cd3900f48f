"""State or configuration: each value that is assigned to a trackable is one or the other.

Arrays, trackables, modules, and containers that hold some of these are state. Configuration is
plain data (scalars, strings, None, and containers of nothing else) and everything that has no
view. A program can choose otherwise: `NoDependency` marks configuration, and all that is given to
a `Checkpoint` by name is state.
"""

from __future__ import annotations

import enum
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


def holds_state(value: Any, inside: tuple[int, ...] = ()) -> bool:
    """Whether an attribute's value is state: an array, a trackable, or a container that holds one.

    Scalars, strings, None, and containers of nothing else are configuration. An empty list or dict
    is state, because state may still be added to it.
    """
    if isinstance(value, PLAIN):
        return False
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    if isinstance(value, list | dict) and not value:
        return True
    view = view_of(value)
    if view is None or id(value) in inside:
        return False
    inside = (*inside, id(value))
    return view.identity or any(holds_state(child, inside) for _, child in view.children(value))


class Holds(enum.IntEnum):
    """What a container holds, at any depth. If it holds several of these, the last counts."""

    PLAIN_DATA = 0
    VALUES = 1
    OBJECTS = 2


def holds(value: Any, inside: tuple[int, ...] = ()) -> Holds:
    """What `value` holds, itself included.

    Objects are mutable or marked with `NoDependency`. Values are arrays, and anything that has no
    view. The rest is plain data.
    """
    if isinstance(value, NoDependency):
        return Holds.OBJECTS
    view = view_of(value)
    if view is None:
        return Holds.VALUES  # devices, shardings, functions
    if id(value) in inside:
        return Holds.PLAIN_DATA
    if view.mutable:
        return Holds.OBJECTS
    if view.identity or isinstance(value, jax.ShapeDtypeStruct):
        return Holds.VALUES
    inside = (*inside, id(value))
    found = Holds.PLAIN_DATA
    for _, child in view.children(value):
        if isinstance(child, PLAIN):
            continue  # there may be very many numbers in a list
        found = max(found, holds(child, inside))
        if found is Holds.OBJECTS:
            break
    return found


add_view(NoDependency, NoDependencyView())
