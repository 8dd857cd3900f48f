"""Trackables: mutable objects that name their children.

*Tracking* gives a child a local name. A `Trackable` is told explicitly, an `AutoTrackable`
tracks what is assigned to its attributes. Restoring may come before a child exists: then a
*pending* entry waits under the child's name, and tracking the child hands it over. That is
all a trackable knows of checkpoints: somebody awaits this name.

State lives in the instance's `__dict__` under two private names, made on first use, so that a
subclass need not call `super().__init__()`.
"""

from __future__ import annotations

import contextlib
import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.graph.labels import PYTHON_STATE, VARIABLE_VALUE, Label
from ckpt_jax.objects.containers import unmarked, wrap
from ckpt_jax.objects.pending import PENDING, received
from ckpt_jax.objects.state import NoDependency, holds_state
from ckpt_jax.objects.views import NoState, OptimizerView, SlotEntry, View, add_view, view_of

F = TypeVar("F", bound=Callable[..., Any])

_CHILDREN = "_self_children"  # {local name: child}
_TRACKING = "_self_tracking"  # False inside no_automatic_dependency_tracking


class Trackable:
    """An object whose children and values are saved in an object graph.

    Children are given with `track`. An object with values of its own overrides
    `serialize_to_arrays` and `restore_from_arrays`.

    Source: `tf.train.experimental.PythonState`'s base, TensorFlow's `Trackable`.

    Example:
      >>> class Model(Trackable):
      ...     def __init__(self):
      ...         self.w = self.track("w", Variable(jnp.zeros(2)))
      >>> sorted(Model().trackable_children())
      ['w']
    """

    def track(self, name: str, value: Any, overwrite: bool = False) -> Any:
        """Names `value` as a child.

        Args:
          name: the local name; it identifies the child in checkpoints.
          value: anything that has a view.
          overwrite: whether the name may already belong to a different object.

        Returns:
          The child to use: `value`, a wrapper that shares a list or a dict of trackables, or
          a rebuilt one where a pending restore waited for it and it is immutable.

        Raises:
          ValueError: the name already belongs to a different object.
          TypeError: nothing is known about how to save `value`.
        """
        value = wrap(value, whole=True)
        if view_of(value) is None:
            raise TypeError(
                f"cannot track {name!r}: {type(value).__qualname__} has no view "
                "(ckpt.register_view teaches the library new kinds)"
            )
        children = _own(self, _CHILDREN)
        if name not in children:
            with received(self, name, value) as value:
                children[name] = value
            return children[name]  # which slots that came with it may have rebuilt
        if children[name] is not value and not overwrite:
            raise ValueError(
                f"{name!r} is already declared as a dependency of {type(self).__qualname__}; "
                "pass overwrite=True to replace it"
            )
        children[name] = value
        return value

    def __copy__(self) -> Any:
        """A copy with the same children, to which others can be added on either side."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__[_CHILDREN] = self.trackable_children()
        copy.__dict__.pop(PENDING, None)
        return copy

    def trackable_children(self) -> dict[str, Any]:
        """The children by local name, in the order in which they were first tracked."""
        return dict(self.__dict__.get(_CHILDREN, ()))

    def serialize_to_arrays(self) -> dict[str, Any]:
        """The object's own values: local name -> array or Python scalar.

        A value may also be a function of no argument that makes it. Each save calls it once,
        before `save` returns. A restore does not call it, so that it needs no value to be
        there already: `restore_from_arrays` then gets whatever was saved, of any shape and
        dtype.
        """
        return {}

    def restore_from_arrays(self, arrays: dict[str, Any]) -> None:
        """Takes back the values that `serialize_to_arrays` names."""
        raise NotImplementedError(
            f"{type(self).__qualname__} saves values but does not override restore_from_arrays"
        )

    def add_variable(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtype: Any = jnp.float32,
        initializer: Any = None,
        overwrite: bool = False,
    ) -> Variable:
        """Creates a `Variable` and tracks it; a value that waits for this name wins.

        Args:
          name: the local name.
          shape: of the value; required with an initializer function or none at all.
          dtype: of the value.
          initializer: a function `(shape, dtype) -> array`, or a constant (then no shape).
            Zeros by default. A function is not called when a restored value waits.
          overwrite: whether the name may already belong to a different object.

        Raises:
          ValueError: both a shape and a constant, neither, a name in use, or an initializer that
            returns another shape.
          RestoreMismatchError: the value that waits has another shape or dtype.
        """
        if name in self.__dict__.get(_CHILDREN, ()) and not overwrite:
            raise ValueError(f"a variable named {name!r} is already declared here")
        constant = initializer is not None and not callable(initializer)
        if constant and shape is not None:
            raise ValueError(
                f"variable {name!r}: do not specify shape with a constant initial value"
            )
        if shape is None and not constant:
            raise ValueError(f"variable {name!r}: a shape is needed without a constant value")
        if constant:
            value = jnp.asarray(initializer, dtype)
        else:
            waiting = self.__dict__.get(PENDING, {}).get(name, ())
            if waiting and waiting[-1].initial_value() is not None:
                value = jax.ShapeDtypeStruct(tuple(shape or ()), dtype)
            elif initializer is not None:
                value = jnp.asarray(initializer(tuple(shape or ()), dtype))
                if value.shape != tuple(shape or ()):
                    raise ValueError(
                        f"variable {name!r}: expected shape {tuple(shape or ())}, the initializer "
                        f"returned {value.shape}"
                    )
            else:
                value = jnp.zeros(tuple(shape or ()), dtype)
        return self.track(name, Variable(value), overwrite=overwrite)

    # --- made anew: for classes registered with `ckpt.register_serializable` --------------

    def _serialize_to_proto(self, object_proto: Any = None, **kwargs: Any) -> Any:
        """What the class needs to make this object anew: a protobuf message, or None."""
        return None

    @classmethod
    def _deserialize_from_proto(
        cls, proto: Any = None, object_proto: Any = None, dependencies: Any = None, **kwargs: Any
    ) -> Any:
        """A new object; its children and values follow.

        Args:
          proto: what `_serialize_to_proto` gave, as a `google.protobuf.Any`; empty for None.
          object_proto: not given; for classes that were written for TensorFlow.
          dependencies: by name, the objects that `_deserialization_dependencies` named.
        """
        return cls()

    def _deserialization_dependencies(self, children: Mapping[str, Any]) -> Mapping[str, Any]:
        """By name, the objects of the graph that have to be made before this one."""
        return {}

    def _add_trackable_child(self, name: str, value: Any) -> None:
        """Takes a child that was made anew."""
        self.track(name, value, overwrite=True)


class AutoTrackable(Trackable):
    """Tracks what is assigned to its attributes; deleting an attribute drops the child.

    Arrays, trackables, Flax objects and containers of these are state. Plain Python scalars
    and strings, functions, and whatever else has no view are configuration.

    A list or dict of trackables, or of plain data, to which trackables may yet be added, becomes
    a wrapper that shares it: what is appended or set later is tracked, too, and receives what
    waits for it. A container of arrays is a value, and stays what it is.

    Source: TensorFlow's `AutoTrackable` (`tf.Module`, `tf.train.Checkpoint`).

    Example:
      >>> class Model(AutoTrackable):
      ...     def __init__(self):
      ...         self.w = Variable(jnp.zeros(2))
      ...         self.width = 2
      >>> sorted(Model().trackable_children())
      ['w']
    """

    _plain_data_is_state = False  # in containers

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _is_state(self, value: Any) -> bool:
        return holds_state(value)

    def _before_dropping(self, name: str, value: Any) -> None:
        """Called where `value`, which is no state, takes the place of a child."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, NoDependency):
            self.__dict__.get(_CHILDREN, {}).pop(name, None)
            super().__setattr__(name, value.value)
            return
        if not self.__dict__.get(_TRACKING, True):
            super().__setattr__(name, value)
            return
        children = _own(self, _CHILDREN)
        value = wrap(value, whole=self._plain_data_is_state)
        is_state = self._is_state(value)
        if is_state and name not in children:
            with received(self, name, value) as value:
                super().__setattr__(name, unmarked(value))
                children[name] = value
            return
        if not is_state and name in children:
            self._before_dropping(name, value)
        super().__setattr__(name, unmarked(value))
        if is_state:
            children[name] = value
        else:
            children.pop(name, None)

    def _add_trackable_child(self, name: str, value: Any) -> None:
        """Takes a child that was made anew, as an attribute; it is state whatever it is."""
        setattr(self, name, value)
        _own(self, _CHILDREN)[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.get(_CHILDREN, {}).pop(name, None)


class Variable:
    """A mutable box for one array.

    Args:
      value: an array, or a `jax.ShapeDtypeStruct` for a variable that will be restored.

    Source: the part that `tf.Variable` plays in a checkpoint.

    Example:
      >>> v = Variable(jnp.zeros(2))
      >>> v.assign(v.value + 1).value
      Array([1., 1.], dtype=float32)
    """

    def __init__(self, value: Any):
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            value = jnp.asarray(value)
        self._value = value

    @property
    def value(self) -> Any:
        """The array in the box."""
        return self._value

    def assign(self, value: Any) -> Variable:
        """Replaces the array by one of the same shape and dtype; returns the variable.

        Raises:
          ValueError: another shape or dtype.
        """
        value = value if hasattr(value, "dtype") else jnp.asarray(value, self.dtype)
        if (value.shape, value.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"expected {self.dtype}{list(self.shape)}, got {value.dtype}{list(value.shape)}"
            )
        self._value = value
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self._value.dtype

    def __repr__(self) -> str:
        return f"Variable({self._value!r})"


class PythonState:
    """Python state that saves itself as one string.

    Subclasses implement `serialize() -> str | bytes` and `deserialize(value: bytes)`.

    Source: `tf.train.experimental.PythonState`.

    Example:
      >>> class Position(PythonState):
      ...     index = 0
      ...     def serialize(self): return str(self.index)
      ...     def deserialize(self, value): self.index = int(value)
    """

    def serialize(self) -> str | bytes:
        """The state as a string; called once per save, while `save` blocks."""
        raise NotImplementedError

    def deserialize(self, value: bytes) -> None:
        """Takes back a string that `serialize` gave (text arrives as UTF-8)."""
        raise NotImplementedError


@runtime_checkable
class SlotOwner(Protocol):
    """An optimizer: an object that owns per-variable state.

    `slots()` returns {(slot name, variable): slot variable}. In a checkpoint a slot variable
    is found through its variable, whatever either is called. Two methods are optional:

    * `create_slot(slot_name, variable)` returns a slot variable that `slots` then contains, or
      None. Restoring calls it for what a checkpoint has and the optimizer not yet.
    * `set_slot(slot_name, variable, value)` replaces a slot variable; needed only where slots
      are arrays rather than `Variable`s.

    Source: the slot methods of TensorFlow's optimizers (`_create_or_restore_slot_variable`).

    Example:
      >>> class Momentum(Trackable):
      ...     def __init__(self): self._momenta = {}
      ...     def slots(self): return {("m", v): m for v, m in self._momenta.items()}
      ...     def create_slot(self, name, variable):
      ...         return self._momenta.setdefault(variable, Variable(jnp.zeros(variable.shape)))
      >>> isinstance(Momentum(), SlotOwner)
      True
    """

    def slots(self) -> Mapping[tuple[str, Any], Any]:
        """{(slot name, variable): slot variable}"""
        ...


# --- tracking --------------------------------------------------------------------------


def _own(obj: Any, name: str) -> dict[Any, Any]:
    """A private dict of `obj`, made on first use."""
    return obj.__dict__.setdefault(name, {})


@contextlib.contextmanager
def _untracked(obj: AutoTrackable) -> Iterator[None]:
    """Inside the block, attributes assigned to `obj` are not tracked."""
    before = obj.__dict__.get(_TRACKING, True)
    obj.__dict__[_TRACKING] = False
    try:
        yield
    finally:
        obj.__dict__[_TRACKING] = before


@overload
def no_automatic_dependency_tracking(
    method_or_object: AutoTrackable,
) -> contextlib.AbstractContextManager[None]: ...
@overload
def no_automatic_dependency_tracking(method_or_object: F) -> F: ...
def no_automatic_dependency_tracking(method_or_object: Any) -> Any:
    """Decorator or scope in which attributes are assigned without being tracked.

    Args:
      method_or_object: a method, whose assignments to `self` are not tracked; or an
        `AutoTrackable`, for a `with` block in which those to it are not.

    Source: TensorFlow's decorator of the same name, and no_automatic_dependency_tracking_scope.

    Example:
      >>> class Model(AutoTrackable):
      ...     @no_automatic_dependency_tracking
      ...     def cache(self, value): self.cached = value
      >>> model = Model()
      >>> model.cache(Variable(jnp.zeros(2)))
      >>> with no_automatic_dependency_tracking(model):
      ...     model.other = Variable(jnp.zeros(2))
      >>> model.trackable_children()
      {}
    """
    if isinstance(method_or_object, AutoTrackable):
        return _untracked(method_or_object)

    @functools.wraps(method_or_object)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _untracked(self):
            return method_or_object(self, *args, **kwargs)

    return wrapper


# --- views -----------------------------------------------------------------------------


class TrackableView(OptimizerView):
    """Children and values of a `Trackable`, the string of a `PythonState`, or both."""

    identity = True
    mutable = True

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return obj.trackable_children().items() if isinstance(obj, Trackable) else ()

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        for label, child in changed.items():
            _own(obj, _CHILDREN)[str(label)] = child
            if isinstance(obj, AutoTrackable):
                obj.__dict__[str(label)] = unmarked(child)
        return obj

    def values(self, obj: Any) -> Mapping[str, Any]:
        values = obj.serialize_to_arrays() if isinstance(obj, Trackable) else {}
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise NoState(
                f"{type(obj).__qualname__}.serialize_to_arrays() must return a dict of arrays by "
                f"name, got {reprlib.repr(values)}"
            )
        return {PYTHON_STATE: obj, **values} if isinstance(obj, PythonState) else values

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        arrays = dict(values)
        if isinstance(obj, PythonState) and PYTHON_STATE in arrays:
            obj.deserialize(arrays.pop(PYTHON_STATE))
        if arrays and isinstance(obj, Trackable):
            obj.restore_from_arrays(arrays)
        return obj

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        return (obj,) if isinstance(obj, Trackable) else ()

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        if not callable(getattr(type(obj), "slots", None)):
            return ()
        return [SlotEntry(name, of, value) for (name, of), value in obj.slots().items()]

    def replaces_slots(self, obj: Any) -> bool:
        return hasattr(obj, "set_slot")

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        for (name, variable), value in changed.items():
            obj.set_slot(name, variable, value)
        return obj


class VariableView(View):
    """A box: the value is the variable's own."""

    container = "leaf"
    identity = True
    mutable = True

    def values(self, obj: Variable) -> Mapping[str, Any]:
        return {VARIABLE_VALUE: obj._value}

    def assign(self, obj: Variable, values: Mapping[str, Any]) -> Any:
        obj._value = values[VARIABLE_VALUE]
        return obj


class PythonStateView(TrackableView):
    """One string, and what a trackable has where it is one, too."""

    container = "leaf"


add_view(PythonState, PythonStateView())
add_view(Trackable, TrackableView())
add_view(Variable, VariableView())
