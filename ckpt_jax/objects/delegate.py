"""Delegates: objects that stand for another one.

In the object graph a delegate is not there: an edge to it is an edge to the object that it
stands for. So a program may wrap an object, or unwrap it, without its checkpoints changing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.views import SlotEntry, View, add_view, view_of

_INNER = "_self_delegate"


class DelegatingTrackable:
    """A wrapper that is saved and restored exactly as the object in it.

    Children, values, slots and registered saver are those of the object, in whose place the
    wrapper may stand anywhere: a checkpoint of one restores into the other. Reading an
    attribute that the wrapper does not have reads the object's. Attributes that are assigned
    to the wrapper stay with the wrapper and are not saved.

    Args:
      obj: a mutable object that has a view: a trackable, a `Variable`, an `nnx.Module`.

    Raises:
      TypeError: `obj` has no view, or is immutable, so that a restore could not change it.

    Source: TensorFlow's DelegatingTrackableMixin.

    Example:
      >>> import jax.numpy as jnp
      >>> from ckpt_jax.objects.trackable import Variable
      >>> class Logged(DelegatingTrackable):
      ...     def assign(self, value):
      ...         print("assigned")
      ...         return delegate_of(self).assign(value)
      >>> v = Logged(Variable(jnp.zeros(2)))
      >>> v.assign(jnp.ones(2)).value
      assigned
      Array([1., 1.], dtype=float32)
      >>> v.shape
      (2,)
    """

    def __init__(self, obj: Any):
        view = view_of(obj)
        if view is None or not view.mutable:
            why = "has no view" if view is None else "is immutable, a restore would replace it"
            raise TypeError(
                f"a delegate stands for a mutable object, but {type(obj).__qualname__} {why}; "
                "put it into a ckpt.Variable or a trackable"
            )
        self.__dict__[_INNER] = obj

    def __getattr__(self, name: str) -> Any:
        if _INNER not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.__dict__[_INNER], name)


def delegate_of(obj: Any) -> Any:
    """The object that `obj` stands for, through any number of wrappers; `obj` where for none."""
    while isinstance(obj, DelegatingTrackable):
        obj = obj.__dict__[_INNER]
    return obj


class DelegateView(View):
    """Whatever the object in the wrapper shows; for those who ask about a wrapper itself."""

    identity = True
    mutable = True

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return _view(obj).children(delegate_of(obj))

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        _view(obj).rebuild(delegate_of(obj), changed)
        return obj

    def values(self, obj: Any) -> Mapping[str, Any]:
        return _view(obj).values(delegate_of(obj))

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        _view(obj).assign(delegate_of(obj), values)
        return obj

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        return _view(obj).awaiting(delegate_of(obj))

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        return _view(obj).slots(delegate_of(obj))

    def parameters(self, obj: Any) -> Any | None:
        return _view(obj).parameters(delegate_of(obj))

    def replaces_slots(self, obj: Any) -> bool:
        return _view(obj).replaces_slots(delegate_of(obj))

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        _view(obj).with_slots(delegate_of(obj), changed)
        return obj


def _view(obj: Any) -> View:
    view = view_of(delegate_of(obj))
    assert view is not None  # checked when the wrapper was made
    return view


DELEGATE = DelegateView()
add_view(DelegatingTrackable, DELEGATE)
