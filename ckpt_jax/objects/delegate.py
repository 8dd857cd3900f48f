"""Delegates: objects that stand for another object.

The object graph does not contain a delegate: an edge to it is an edge to the object that it
stands for. So a program may wrap or unwrap an object, and its checkpoints do not change.
"""

from __future__ import annotations

from typing import Any

from ckpt_jax.objects.views import ForwardingView, View, add_view, view_of

_INNER = "_self_delegate"


class DelegatingTrackable:
    """A wrapper that is saved and restored exactly as the object in it.

    The wrapper has the object's children, values, slots and registered saver. It may stand in
    place of the object anywhere: a checkpoint of one restores into the other. If the wrapper
    lacks an attribute, reading it reads the object's attribute. Attributes that are assigned to
    the wrapper stay with the wrapper and are not saved.

    Args:
      obj: a mutable object that has a view: a trackable, a `Variable`, an `nnx.Module`.

    Raises:
      TypeError: `obj` has no view, or is immutable, so that a restore could not change it.

    Source: TensorFlow's DelegatingTrackableMixin.

    Example:
      >>> import ckpt_jax as ckpt, jax.numpy as jnp
      >>> class Logged(DelegatingTrackable):
      ...     def assign(self, value):
      ...         print("assigned")
      ...         return delegate_of(self).assign(value)
      >>> v = Logged(ckpt.Variable(jnp.zeros(2)))
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
    """The object that `obj` stands for, through any number of wrappers; `obj` if for none."""
    while isinstance(obj, DelegatingTrackable):
        obj = obj.__dict__[_INNER]
    return obj


class DelegateView(ForwardingView):
    """Shows what the view of the wrapped object shows, if a wrapper itself is asked about."""

    identity = True
    mutable = True

    def shown(self, obj: Any) -> tuple[View, Any]:
        inner = delegate_of(obj)
        view = view_of(inner)
        assert view is not None  # checked when the wrapper was made
        return view, inner


DELEGATE = DelegateView()
add_view(DelegatingTrackable, DELEGATE)
