"""Views: how the object graph sees an object.

A view answers questions about the objects of one kind. What are an object's children and its own
values? What is the object with new children, or with new values? Who notices if it gets another
child? `rebuild` and `assign` return the object to use from then on: the same object if it is
mutable, a rebuilt one if it is not. So a Flax module is changed in place, and a pytree is rebuilt.

An optimizer has *slot variables*, such as a momentum for each parameter. An `OptimizerView` shows
them, too. A `ForwardingView` passes all questions on to another view.

`view_of` finds the view of an object. It looks for the exact type, then for a predicate that
accepts the object (the newest first), then for a base class, and at last asks what kind of value
the object is. If the answer depends on the type alone, it is cached.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_jax.graph.labels import Label


class NoState(Exception):
    """Raised by a view if an object has nothing to save; the message says what to do instead."""


Copier = Callable[[Sequence[Any], Mapping[int, Any]], Sequence[Any]]


class View:
    """How the object graph sees objects of one kind. Subclasses override what applies to it.

    Attributes:
      container: what is rebuilt if the program is not at hand ("" for a plain object).
      identity: whether two edges to one object mean one node. True for mutable objects and
        arrays. False for immutable containers and scalars: which object they are means nothing.
      mutable: whether `rebuild` and `assign` change the object in place.
      copier: (objects, arrays) -> copies of several objects at once, with what they share, and with
        arrays replaced by identity. None if `copy.deepcopy` does it.
      has_program: whether things without a view in the object, at any depth, belong to the program
        and are not state: functions, dtypes, devices.
    """

    container: str = ""
    identity: bool = False
    mutable: bool = False
    copier: Copier | None = None
    has_program: bool = False

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        """Labelled children in a stable order. Must not create objects with an identity."""
        return ()

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        """`obj` with some children replaced."""
        raise NotImplementedError(f"{type(self).__name__} has no children to replace")

    def values(self, obj: Any) -> Mapping[str, Any]:
        """The object's own values: arrays, Python scalars, strings, or functions that make them."""
        return {}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        """`obj` with its own values replaced."""
        raise NotImplementedError(f"{type(self).__name__} has no values to replace")

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        """The trackables that notice if the object gets another child; empty if there are none."""
        return ()

    def type_of(self, obj: Any) -> type:
        """The type that is named to people who look into a checkpoint."""
        return type(obj)


# --- optimizers ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParameterPath:
    """The place of a parameter in the tree of parameters that an optimizer was made for."""

    steps: tuple[Label, ...]


class SlotEntry(NamedTuple):
    """A slot variable of an optimizer.

    Attributes:
      name: of the slot ("momentum").
      variable: the variable that it belongs to: an object, or its `ParameterPath`.
      value: the slot variable.
    """

    name: str
    variable: Any
    value: Any


class StatePlace(NamedTuple):
    """The place of a value in the state that an optimizer keeps, as its library nests it.

    Attributes:
      name: of the slot or of the child.
      variable: the variable that a slot belongs to; None for a child.
      steps: the labels on the way from the optimizer.
    """

    name: str
    variable: ParameterPath | None
    steps: tuple[Label, ...]


class OptimizerView(View):
    """A view of objects that may have slot variables."""

    def places(self, obj: Any) -> Iterable[StatePlace]:
        """Where slots and children lie in files that hold the state by position; none if the
        state has no other form than this view."""
        return ()

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        """The slot variables.

        A slot variable is left out if its variable is not in the graph. But if the variable is
        given as a path, the slot variable is then a child: one child for each slot name, with
        nested dicts along the paths.
        """
        return ()

    def parameters(self, obj: Any) -> Any | None:
        """The object that paths of parameters start from; None if it has to be looked for."""
        return None

    def replaces_slots(self, obj: Any) -> bool:
        """Whether `with_slots` works. If it does not, slot variables have to be mutable."""
        return False

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        """`obj` with some slot variables replaced, by (slot name, variable)."""
        raise NotImplementedError(f"{type(obj).__qualname__} cannot replace its slot variables")


def slots_of(view: View, obj: Any) -> Iterable[SlotEntry]:
    """The slot variables of an object; none if it is no optimizer."""
    return view.slots(obj) if isinstance(view, OptimizerView) else ()


# --- views of views --------------------------------------------------------------------


class ForwardingView(OptimizerView):
    """Shows an object as another view shows it, or as another object is shown.

    Subclasses override `shown`, and the questions that they answer in another way.
    """

    def shown(self, obj: Any) -> tuple[View, Any]:
        """The view that answers, and the object that it is asked about."""
        raise NotImplementedError

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        view, inner = self.shown(obj)
        return view.children(inner)

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        view, inner = self.shown(obj)
        return _same_or_new(obj, inner, view.rebuild(inner, changed))

    def values(self, obj: Any) -> Mapping[str, Any]:
        view, inner = self.shown(obj)
        return view.values(inner)

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        view, inner = self.shown(obj)
        return _same_or_new(obj, inner, view.assign(inner, values))

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        view, inner = self.shown(obj)
        return view.awaiting(inner)

    def type_of(self, obj: Any) -> type:
        view, inner = self.shown(obj)
        return view.type_of(inner)

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        view, inner = self.shown(obj)
        return slots_of(view, inner)

    def places(self, obj: Any) -> Iterable[StatePlace]:
        view, inner = self.shown(obj)
        return view.places(inner) if isinstance(view, OptimizerView) else ()

    def parameters(self, obj: Any) -> Any | None:
        view, inner = self.shown(obj)
        return view.parameters(inner) if isinstance(view, OptimizerView) else None

    def replaces_slots(self, obj: Any) -> bool:
        view, inner = self.shown(obj)
        return isinstance(view, OptimizerView) and view.replaces_slots(inner)

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        view, inner = self.shown(obj)
        if not isinstance(view, OptimizerView):
            return super().with_slots(inner, changed)
        return _same_or_new(obj, inner, view.with_slots(inner, changed))


def _same_or_new(obj: Any, inner: Any, result: Any) -> Any:
    """The object to use after `inner` was changed, for which `obj` stands."""
    return obj if result is inner else result


# --- finding a view --------------------------------------------------------------------

_own: dict[type, View] = {}
_registered: dict[type, View] = {}
_registered_predicates: list[tuple[Callable[[Any], bool], View]] = []
_fallbacks: list[Callable[[Any], View | None]] = []
_not_imported: dict[str, str] = {}  # package -> the module with the views of its types
_cache: dict[type, View | None] = {}


def add_view(kind: type, view: View) -> None:
    """Adds the library's view of a type and its subclasses."""
    _own[kind] = view
    _cache.clear()


def add_views_of_package(package: str, module: str) -> None:
    """Lets `module`, which adds the views of a package's types, be imported when a program first
    shows the library an object of such a type."""
    _not_imported[package] = module


def add_fallback(find: Callable[[Any], View | None]) -> None:
    """Adds a function that finds the view of an object if its type and its base classes have none.

    It must give the same view for all objects of a type. Functions are asked in the order in which
    they were added.
    """
    _fallbacks.append(find)
    _cache.clear()


def view_of(obj: Any) -> View | None:
    """The view of `obj`; None if nothing is known about its kind."""
    kind = type(obj)
    if kind not in _cache:
        _import_views(kind)
    if _registered_predicates and kind not in _registered and kind not in _own:
        for predicate, view in reversed(_registered_predicates):
            if predicate(obj):
                return view  # not cached: a predicate may look at the object, not at its type
    try:
        return _cache[kind]
    except KeyError:
        view = _cache[kind] = _find(obj)
        return view


def _import_views(kind: type) -> None:
    if not _not_imported:
        return
    packages = {".".join(base.__module__.split(".")[:2]) for base in kind.__mro__}
    for package in packages & _not_imported.keys():
        importlib.import_module(_not_imported.pop(package))


def _find(obj: Any) -> View | None:
    for base in type(obj).__mro__:
        for views in (_registered, _own):
            if base in views:
                return views[base]
    return next((view for find in _fallbacks if (view := find(obj)) is not None), None)


# --- views that programs register ------------------------------------------------------


class _RegisteredByUser(View):
    def __init__(
        self,
        children: Callable[[Any], Mapping[Label, Any]],
        rebuild: Callable[[Any, Mapping[Label, Any]], Any],
    ):
        self._children = children
        self._rebuild = rebuild

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        children = self._children(obj)
        if not isinstance(children, Mapping):
            raise TypeError(
                f"register_view: children of {type(obj).__qualname__} has to return a dict of "
                f"children by name, got {children!r}"
            )
        return children.items()

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        return self._rebuild(obj, {**self._children(obj), **changed})


def register_view(
    type_or_predicate: type | Callable[[Any], bool],
    *,
    children: Callable[[Any], Mapping[Label, Any]],
    rebuild: Callable[[Any, Mapping[Label, Any]], Any],
) -> None:
    """Teaches the library to save and restore objects of another kind.

    Args:
      type_or_predicate: a class (its subclasses are included), or a function that accepts objects.
      children: gives an object's state as a dict from label to child; children can be
        anything that has a view.
      rebuild: `(object, children) -> object`, called with all children, new ones included.
        It may change the object in place and return it.

    Raises:
      TypeError: an argument is neither a class nor a function.

    Example:
      >>> import numpy as np
      >>> class Point:
      ...     def __init__(self, xy): self.xy = xy
      >>> register_view(Point, children=lambda p: {"xy": p.xy},
      ...               rebuild=lambda p, new: Point(new["xy"]))
      >>> [label for label, _ in view_of(Point(np.zeros(2))).children(Point(np.zeros(2)))]
      ['xy']
    """
    given = {"type_or_predicate": type_or_predicate, "children": children, "rebuild": rebuild}
    for name, value in given.items():
        if not callable(value):
            raise TypeError(f"register_view: {name} must be callable, got {value!r}")
    view = _RegisteredByUser(children, rebuild)
    if isinstance(type_or_predicate, type):
        _registered[type_or_predicate] = view
    else:
        _registered_predicates.append((type_or_predicate, view))
    _cache.clear()


@contextlib.contextmanager
def view_registration_scope() -> Iterator[None]:
    """Undoes, on leaving, the calls of `register_view` that were made inside."""
    types, predicates = dict(_registered), list(_registered_predicates)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(types)
        _registered_predicates[:] = predicates
        _cache.clear()
