"""Trackables: mutable objects that name their children.

To *track* a child is to give it a local name. A `Trackable` is told explicitly, an `AutoTrackable`
tracks what is assigned to its attributes. A restore may come before a child exists. It then waits
under the child's name, and gets the child when it is tracked (see `pending`).

The children are in the instance's `__dict__` under a private name that is created on first use, so
that a subclass need not call `super().__init__()`.

A subclass may use the names of this library for something else: an attribute `track`, a method
`slots` that takes arguments. So the library calls its methods through the class, and only those
that can be called as it calls them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload, runtime_checkable

import jax
import jax.numpy as jnp

from ckpt_jax.graph.labels import PYTHON_STATE, Label
from ckpt_jax.objects.containers import unmarked, wrap
from ckpt_jax.objects.pending import PENDING, copy_pending, received
from ckpt_jax.objects.python_state import PythonState
from ckpt_jax.objects.state import NoDependency, holds_state, leaves_state_out
from ckpt_jax.objects.stateful import why_stateless
from ckpt_jax.objects.variable import Variable
from ckpt_jax.objects.views import NoState, OptimizerView, SlotEntry, add_view, view_of

F = TypeVar("F", bound=Callable[..., Any])
_log = logging.getLogger("ckpt_jax")

_CHILDREN = "_self_children"  # {local name: child}
_TRACKING = "_self_tracking"  # False inside no_automatic_dependency_tracking
_UNTRACKED = "_self_untracked"  # names of attributes that the program does not want to be tracked
_ASSIGNED = "_self_assigned"  # {name: the attribute as it was tracked}
_PRIVATE = "_self_"  # how names of this library begin


class Trackable:
    """An object that is saved in an object graph, with its children and values.

    `track` gives it children. An object with values of its own overrides `serialize_to_arrays`
    and `restore_from_arrays`.

    Source: TensorFlow's `Trackable`, the base of `tf.train.experimental.PythonState`.

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
          a restored value if `value` is immutable and a restore waited for it.

        Raises:
          ValueError: the name already belongs to a different object.
          TypeError: nothing is known about how to save `value`.
        """
        value = wrap(value, whole=True)
        if view_of(value) is None:
            why = why_stateless(value)
            raise TypeError(
                f"cannot track {name!r}: {type(value).__qualname__} has no view "
                f"(ckpt.register_view teaches the library new kinds){why and f'; {why}'}"
            )
        children = _own(self, _CHILDREN)
        is_awaited = overwrite and name in self.__dict__.get(PENDING, ())
        if name not in children or is_awaited:
            with received(self, name, value) as value:
                children[name] = value
            return children[name]  # rebuilt if its slots were restored with it
        if children[name] is not value and not overwrite:
            raise ValueError(
                f"{name!r} is already declared as a dependency of {type(self).__qualname__}; "
                "pass overwrite=True to replace it"
            )
        children[name] = value
        return value

    def __copy__(self) -> Any:
        """A copy with the same children. Either side can get more children without the other."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for name, is_slot in _descriptors(type(self))[0].items():
            if is_slot and hasattr(self, name):
                object.__setattr__(copy, name, getattr(self, name))
        copy.__dict__[_CHILDREN] = dict(children_of(self))
        for private in (_UNTRACKED, _ASSIGNED):
            copy.__dict__[private] = dict(self.__dict__.get(private, ()))
        copy_pending(self, copy)
        return copy

    def trackable_children(self) -> dict[str, Any]:
        """The children by local name, in the order in which they were first tracked."""
        return dict(self.__dict__.get(_CHILDREN, ()))

    def serialize_to_arrays(self) -> dict[str, Any]:
        """The object's own values: local name -> array or Python scalar.

        A value may also be a function without arguments that makes it. Each save calls the
        function once, before `save` returns. A restore does not call it, so that no value has to
        exist before the restore: `restore_from_arrays` then gets what was saved, of any shape
        and dtype.
        """
        return {}

    def restore_from_arrays(self, arrays: dict[str, Any]) -> None:
        """Restores the values that `serialize_to_arrays` names."""
        raise NotImplementedError(
            f"{type(self).__qualname__} saves values but does not override restore_from_arrays"
        )

    def add_variable(
        self,
        name: str,
        shape: int | Sequence[int] | None = None,
        dtype: Any = jnp.float32,
        initializer: Any = None,
        overwrite: bool = False,
    ) -> Variable:
        """Creates a `Variable` and tracks it. If a restore waits for this name, its value is used.

        Args:
          name: the local name.
          shape: of the value; required unless the initializer is a constant. A number is the
            length of a vector.
          dtype: of the value.
          initializer: a function `(shape, dtype) -> array`, or a constant (then without a shape).
            Zeros by default. A function is not called if a restored value waits. For an initializer
            of JAX or Flax, which takes a key first, pass `functools.partial(initializer, key)`.
          overwrite: whether the name may already belong to a different object.

        Raises:
          ValueError: there are both a shape and a constant, or neither; the name is in use; or
            the initializer returns another shape.
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
        sizes = (
            tuple(shape or ()) if shape is None or isinstance(shape, Sequence) else (int(shape),)
        )
        if constant:
            value = jnp.asarray(initializer, dtype)
        else:
            waiting = self.__dict__.get(PENDING, {}).get(name, ())
            if waiting and waiting[-1].initial_value() is not None:
                value = jax.ShapeDtypeStruct(sizes, dtype)
            elif initializer is not None:
                value = jnp.asarray(_initialized(name, initializer, sizes, dtype))
                if value.shape != sizes:
                    raise ValueError(
                        f"variable {name!r}: expected shape {sizes}, the initializer returned "
                        f"{value.shape}"
                    )
            else:
                value = jnp.zeros(sizes, dtype)
        return Trackable.track(self, name, Variable(value), overwrite=overwrite)

    # --- recreated objects: for classes registered with `ckpt.register_serializable` ------

    def _serialize_to_proto(self, object_proto: Any = None, **kwargs: Any) -> Any:
        """A protobuf message with all that the class needs to recreate this object; or None."""
        return None

    @classmethod
    def _deserialize_from_proto(
        cls, proto: Any = None, object_proto: Any = None, dependencies: Any = None, **kwargs: Any
    ) -> Any:
        """A new object. Its children and values are added later.

        Args:
          proto: the message of `_serialize_to_proto`, as a `google.protobuf.Any`; empty for None.
          object_proto: not given; for classes that were written for TensorFlow.
          dependencies: by name, the objects that `_deserialization_dependencies` named.
        """
        return cls()

    def _deserialization_dependencies(self, children: Mapping[str, Any]) -> Mapping[str, Any]:
        """By name, the objects of the graph that have to be recreated before this one."""
        return {}

    def _add_trackable_child(self, name: str, value: Any) -> None:
        """Adds a child that was recreated."""
        Trackable.track(self, name, value, overwrite=True)


def _initialized(name: str, initializer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        return initializer(shape, dtype)
    except TypeError as error:
        error.add_note(
            f"The initializer of variable {name!r} was called with (shape, dtype). If it takes a "
            "key first, as those of jax.nn.initializers, pass functools.partial(initializer, key)."
        )
        raise


class AutoTrackable(Trackable):
    """Tracks what is assigned to its attributes; deleting an attribute drops the child.

    Arrays, trackables, Flax objects and containers of these are state. Plain Python scalars
    and strings, functions, and everything else that has no view are configuration.

    A list or dict of trackables becomes a wrapper that shares it. So does one of plain data,
    because trackables may still be added. What is appended or set later is tracked, too, and
    receives the restore that waits for it. A container of arrays is a value, and stays what it is.

    Attributes behind properties, descriptors and `__slots__` are tracked, too. State that was put
    into the object past `__setattr__` (into `__dict__`, or with `object.__setattr__` as a frozen
    dataclass does) is a child as well, unless it is the value of a `functools.cached_property`.

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
        """Is called before `value`, which is no state, replaces a child."""

    def trackable_children(self) -> dict[str, Any]:
        """The children by local name: what was tracked, then what was set past `__setattr__`."""
        children = super().trackable_children()
        known = {id(child) for child in children.values()}
        assigned = self.__dict__.get(_ASSIGNED, {})
        for name, value in _attributes(self, children):
            is_new = id(value) not in known if name not in children else name in assigned
            if is_new and value is not assigned.get(name) and self._is_state(value):
                children[name] = value
        return children

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, NoDependency):
            self.__dict__.get(_CHILDREN, {}).pop(name, None)
            self.__dict__.get(_ASSIGNED, {}).pop(name, None)
            _own(self, _UNTRACKED)[name] = None
            super().__setattr__(name, value.value)
            return
        children = _own(self, _CHILDREN)
        if not self.__dict__.get(_TRACKING, True):
            _own(self, _UNTRACKED)[name] = None
            super().__setattr__(name, value)
            return
        if _UNTRACKED in self.__dict__:
            self.__dict__[_UNTRACKED].pop(name, None)
        value = wrap(value, whole=self._plain_data_is_state)
        is_state = self._is_state(value)
        if not is_state:
            if name in children:
                self._before_dropping(name, value)
            if leaves_state_out(value):
                _log.warning(
                    "%s.%s is a %s, which is not saved, although it holds state. Assign a list or "
                    "a dict, or ckpt.NoDependency(...) if it is not to be saved.",
                    *(type(self).__qualname__, name, type(value).__name__),
                )
            super().__setattr__(name, unmarked(value))
            children.pop(name, None)
            self.__dict__.get(_ASSIGNED, {}).pop(name, None)
            return
        is_new = name not in children or name in self.__dict__.get(PENDING, ())
        with received(self, name, value) if is_new else contextlib.nullcontext(value) as value:
            plain = unmarked(value)
            super().__setattr__(name, plain)
            children[name] = value
            _own(self, _ASSIGNED)[name] = plain

    def _add_trackable_child(self, name: str, value: Any) -> None:
        """Adds a child that was recreated, as an attribute; it is state of whatever kind."""
        setattr(self, name, value)
        _own(self, _CHILDREN)[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        for private in (_CHILDREN, _ASSIGNED):
            self.__dict__.get(private, {}).pop(name, None)


@runtime_checkable
class SlotOwner(Protocol):
    """An optimizer: an object that owns state for each variable, its *slot variables*.

    `slots()` returns {(slot name, variable): slot variable}. In a checkpoint, a slot variable is
    found through its variable, so either may get another name. Two methods are optional:

    * `create_slot(slot_name, variable)` returns a slot variable, which `slots` contains from then
      on, or None. A restore calls it for slot variables of the checkpoint that the optimizer lacks.
    * `set_slot(slot_name, variable, value)` replaces a slot variable. It is needed only if slot
      variables are arrays and not `Variable`s.

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
    """A private dict of `obj`, created on first use."""
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
      method_or_object: a method that may assign to `self` untracked; or an `AutoTrackable`, for a
        `with` block in which assignments to it are not tracked.

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


def replace_children(obj: Trackable, changed: Mapping[Label, Any]) -> None:
    """Replaces children without handing them to restores that wait."""
    for label, child in changed.items():
        name, children = str(label), _own(obj, _CHILDREN)
        is_tracked = name in children or not isinstance(obj, AutoTrackable)
        if isinstance(obj, AutoTrackable):
            plain = unmarked(child)
            _replace_attribute(obj, name, plain)
            if name in obj.__dict__.get(_ASSIGNED, ()):
                obj.__dict__[_ASSIGNED][name] = plain
        if is_tracked:
            children[name] = child


def _replace_attribute(obj: AutoTrackable, name: str, value: Any) -> None:
    """Sets an attribute in the way that it was set: through `__setattr__` if the class has its own,
    and through a descriptor if the name has one."""
    if type(obj).__setattr__ is not AutoTrackable.__setattr__:
        with contextlib.suppress(AttributeError):  # of a frozen dataclass
            setattr(obj, name, value)
            return
    if name in _descriptors(type(obj))[0]:
        object.__setattr__(obj, name, value)
    else:
        obj.__dict__[name] = value


# --- names of one's own ----------------------------------------------------------------


def children_of(obj: Trackable) -> Mapping[str, Any]:
    """The children of a trackable, also if its class uses the name of the method for its own."""
    children = _method(obj, "trackable_children")()
    if isinstance(children, Mapping):
        return children
    return _base_of(obj).trackable_children(obj)


def _method(obj: Trackable, name: str, *arguments: Any) -> Callable[..., Any]:
    """A method of the class, or that of the base class if it cannot be called with arguments."""
    method, own = getattr(type(obj), name), getattr(_base_of(obj), name)
    if method is not own and not _takes(method, 1 + len(arguments)):
        method = own
    return functools.partial(method, obj, *arguments)


def _base_of(obj: Trackable) -> type[Trackable]:
    return AutoTrackable if isinstance(obj, AutoTrackable) else Trackable


def _takes(method: Any, count: int) -> bool:
    """Whether a function can be called with that many arguments."""
    if not isinstance(method, types.FunctionType):
        return callable(method) and not isinstance(method, type)
    return _function_takes(method, count)


@functools.lru_cache(maxsize=4096)
def _function_takes(function: types.FunctionType, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def _slots(obj: Any) -> Mapping[tuple[str, Any], Any]:
    """The slot variables of an optimizer; none if `slots` is something else."""
    method = getattr(type(obj), "slots", None)
    slots = method(obj) if method is not None and _takes(method, 1) else None
    if not isinstance(slots, Mapping):
        return {}
    is_owner = all(isinstance(k, tuple) and len(k) == 2 and isinstance(k[0], str) for k in slots)
    return slots if is_owner else {}


def _attributes(obj: AutoTrackable, children: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that may hold state, whether or not they are tracked."""
    descriptors, derived = _descriptors(type(obj))
    untracked = obj.__dict__.get(_UNTRACKED, ())
    for name, value in tuple(obj.__dict__.items()):
        if name[: len(_PRIVATE)] == _PRIVATE or name in untracked or name in descriptors:
            continue
        if name in children or name not in derived:
            yield name, value
    for name, is_slot in descriptors.items():
        if (is_slot or name in children) and name not in untracked:
            try:
                value = getattr(obj, name)
            except Exception:  # an empty slot, or a property of a program
                continue
            yield name, value


@functools.lru_cache(maxsize=4096)
def _descriptors(kind: type) -> tuple[Mapping[str, bool], frozenset[str]]:
    """The attributes of a class that descriptors with a setter take (and whether each is a slot),
    and the names of cached properties."""
    attributes: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        attributes.update(vars(base))
    with_setter = {
        name: isinstance(attribute, types.MemberDescriptorType)
        for name, attribute in attributes.items()
        if hasattr(type(attribute), "__set__") and not name.startswith("__")
        if not isinstance(attribute, property) or attribute.fset is not None
    }
    cached = [n for n, x in attributes.items() if isinstance(x, functools.cached_property)]
    return with_setter, frozenset(cached)


class TrackedView(OptimizerView):
    """Children and values of a `Trackable`, the string of a `PythonState`, or both."""

    identity = True
    mutable = True

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return children_of(obj).items() if isinstance(obj, Trackable) else ()

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        replace_children(obj, changed)
        return obj

    def values(self, obj: Any) -> Mapping[str, Any]:
        values = _method(obj, "serialize_to_arrays")() if isinstance(obj, Trackable) else {}
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
            _method(obj, "restore_from_arrays", arrays)()
        return obj

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        return (obj,) if isinstance(obj, Trackable) else ()

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        return [SlotEntry(name, of, value) for (name, of), value in _slots(obj).items()]

    def replaces_slots(self, obj: Any) -> bool:
        return hasattr(obj, "set_slot")

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        for (name, variable), value in changed.items():
            obj.set_slot(name, variable, value)
        return obj


class PythonStateView(TrackedView):
    """A `PythonState`, which may be a trackable, too: for a reader, it is its string."""

    container = "leaf"


add_view(PythonState, PythonStateView())
add_view(Trackable, TrackedView())
