"""What is state: the question that is asked of each value that is assigned or put somewhere.

Arrays, trackables, modules, and containers that hold some of these are state; plain data
(scalars, strings, None, and containers of nothing else) and what has no view are
configuration, unless somebody says otherwise.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np

from ckpt_jax.objects.views import View, add_view, view_of

PLAIN = (int, float, complex, str, bytes, type(None), np.generic)  # of plain data, the parts


class NoDependency:
    """Marks a value that is assigned to an attribute, or put in a container, but is not state.

    Whoever reads the attribute or the element gets the value.

    Example:
      >>> from ckpt_jax import AutoTrackable
      >>> class Model(AutoTrackable):
      ...     def __init__(self): self.cache = NoDependency({})
      >>> Model().cache, Model().trackable_children()
      ({}, {})
    """

    def __init__(self, value: Any):
        self.value = value


class NoDependencyView(View):
    """Nothing to see; inside a container it keeps its place."""

    container = "none"


def holds_state(value: Any, inside: tuple[int, ...] = ()) -> bool:
    """Whether an attribute's value is state: an array, a trackable, or a container of some.

    Scalars, strings, None, and containers of nothing else are configuration, except for empty
    lists and dicts, to which state may yet be added.
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
    """What is in a container, at any depth; the highest counts."""

    PLAIN_DATA = 0
    VALUES = 1
    OBJECTS = 2


def holds(value: Any, inside: tuple[int, ...] = ()) -> Holds:
    """What is in `value`, itself included: objects that are mutable or marked with
    `NoDependency`, or else values (arrays, and what has no view), or else plain data."""
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
