"""Nested: objects as plain dicts and lists, in the way that JAX takes them apart.

This library shows some objects in a form of its own: the state of an optimizer as slots of
variables, a box of nnx as its value. Other libraries of JAX save a pytree as JAX flattens it. For
them, `nested` gives the same containers, with the same names, that they would see. What is no
pytree, as a trackable is not, has the children that its view shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import FlattenedIndexKey, SequenceKey

from ckpt_jax.graph.labels import ONLY_VALUE, local_name
from ckpt_jax.objects.delegate import delegate_of
from ckpt_jax.objects.optax_states import OptaxState
from ckpt_jax.objects.pytrees import is_registered, label_of
from ckpt_jax.objects.registry import saver_name
from ckpt_jax.objects.views import slots_of, view_of


@dataclass(frozen=True, slots=True)
class OfSaver:
    """Stands for an object that a registered saver takes, in a form that only the saver knows.

    Attributes:
      name: of the saver.
    """

    name: str


def nested(obj: Any) -> Any:
    """The object as dicts and lists of leaves. Objects that savers take are `OfSaver`s.

    Empty containers stay: None, dicts and lists; any other becomes None. Keys of dicts are texts.

    Raises:
      TypeError: an object contains itself, or is an optimizer whose slots have no such form.

    >>> nested({"pair": (1, [2]), 3: None})
    {'pair': [1, [2]], '3': None}
    """
    return _nested(obj, ())


def _nested(obj: Any, above: tuple[int, ...]) -> Any:
    obj = delegate_of(obj)
    if (saver := saver_name(obj)) is not None:
        return OfSaver(saver)
    if id(obj) in above:
        raise TypeError(f"a {type(obj).__qualname__} contains itself")
    above = (*above, id(obj))
    if isinstance(obj, OptaxState):
        return _nested(obj.opt_state, above)
    if type(obj) is dict:  # JAX refuses keys that it cannot sort
        return {str(key): _nested(part, above) for key, part in obj.items()}
    if not is_registered(obj):
        return _viewed(obj, above)
    pairs, _ = jax.tree_util.tree_flatten_with_path(obj, is_leaf=lambda part: part is not obj)
    keys = [path[0] for path, _ in pairs]
    parts = [_nested(child, above) for _, child in pairs]
    if not pairs:
        return {} if isinstance(obj, Mapping) else [] if type(obj) in (list, tuple) else None
    if all([isinstance(key, SequenceKey | FlattenedIndexKey) for key in keys]):
        return parts
    return {str(label_of(key)): part for key, part in zip(keys, parts, strict=True)}


def _viewed(obj: Any, above: tuple[int, ...]) -> Any:
    """An object that is no pytree: a leaf, or what its view shows."""
    view = view_of(obj)
    if view is None or (view.container == "leaf" and not view.mutable):
        return obj
    if any(True for _ in slots_of(view, obj)):
        raise TypeError(
            f"the slots of a {type(obj).__qualname__} have no place in plain containers"
        )
    values = {name: _nested(value, above) for name, value in view.values(obj).items()}
    children = {local_name(label): _nested(part, above) for label, part in view.children(obj)}
    if len(values) == 1 and not children:
        ((name, value),) = values.items()
        if name in ONLY_VALUE:
            return value
    return {**children, **values}
