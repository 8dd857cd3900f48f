"""Views: how the object graph sees an object.

A view answers four questions about the objects of one kind: what are your children, what
are your own values, here are new children, here are new values. The last two return the
object to use from then on: the same one where it is mutable, a rebuilt one where it is not.
That one rule lets a Flax module be restored in place and a pytree be restored by
rebuilding it.

The registry finds the view of an object: its exact type first, then predicates, the newest
first, then its base classes, then what kind of value its type is. What depends on the type
alone is looked up once and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_jax.graph.labels import Label


@dataclass(frozen=True, slots=True)
class Below:
    """A variable, as a place in the tree of parameters that an optimizer was made for."""

    path: tuple[Label, ...]


class SlotEntry(NamedTuple):
    """A slot variable of an optimizer.

    Attributes:
      name: of the slot ("momentum").
      variable: the variable that it belongs to: an object, or where it is.
      value: the slot variable.
    """

    name: str
    variable: Any
    value: Any


class NoState(Exception):
    """Raised by a view that knows its object, and that there is nothing in it to save; it says
    what to do instead."""


class View:
    """How objects of one kind are shown to the object graph. Subclasses override what applies.

    Attributes:
      container: what a reader without the program rebuilds ("" for a plain object).
      identity: whether two edges to one object mean one node. True for mutable objects and
        arrays; False for immutable containers and scalars, whose identity means nothing.
      mutable: whether `rebuild` and `assign` change the object in place.
      has_functions: whether functions in it, at any depth, are a part of the program and no state.
    """

    container: str = ""
    identity: bool = False
    mutable: bool = False
    has_functions: bool = False

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        """Labelled children in a stable order. Must not create objects with an identity."""
        return ()

    def type_of(self, obj: Any) -> type:
        """The type to name where people look into a checkpoint."""
        return type(obj)

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        """`obj` with some children replaced."""
        raise NotImplementedError(f"{type(self).__name__} has no children to replace")

    def values(self, obj: Any) -> Mapping[str, Any]:
        """The object's own values: arrays, Python scalars, strings, or callables giving those."""
        return {}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        """`obj` with its own values replaced."""
        raise NotImplementedError(f"{type(self).__name__} has no values to replace")

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        """The trackables that will say so when the object gets another child; none if nobody."""
        return ()

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        """The slot variables of an optimizer. Those of variables that are not in the graph are
        left out, but where the variable is a place, they are children after all: one for each
        slot name, nested dicts along the places."""
        return ()

    def parameters(self, obj: Any) -> Any | None:
        """What the places of an optimizer's variables start from, where it has it at hand; else
        it is looked for."""
        return None

    def replaces_slots(self, obj: Any) -> bool:
        """Whether `with_slots` works; where not, slot variables have to be mutable."""
        return False

    def with_slots(self, obj: Any, changed: Mapping[tuple[str, Any], Any]) -> Any:
        """`obj` with some slot variables replaced, by (slot name, variable)."""
        raise NotImplementedError(f"{type(obj).__qualname__} cannot replace its slot variables")


_by_type: dict[type, View] = {}
_loaders: list[Callable[[type], bool]] = []
_by_kind: list[Callable[[Any], View | None]] = []
_by_predicate: list[tuple[Callable[[Any], bool], View]] = []
_cache: dict[type, View | None] = {}


def add_view(kind: type | Callable[[Any], bool], view: View) -> None:
    """Registers `view` for a type and its subclasses, or for all that a predicate accepts."""
    if isinstance(kind, type):
        _by_type[kind] = view
    else:
        _by_predicate.append((kind, view))
    _cache.clear()


def add_loader(load: Callable[[type], bool]) -> None:
    """Registers a function that is shown each new type and may register views then; it says
    whether it has."""
    _loaders.append(load)


def add_kind(kind_view: Callable[[Any], View | None]) -> None:
    """Registers a function that gives the view of an object from what its type is."""
    _by_kind.append(kind_view)
    _cache.clear()


def remove_views_since(mark: tuple[int, dict[type, View]]) -> None:
    """Undoes the calls of `register_view` made after `mark_views()` returned `mark`.

    The library's own views stay: those of Flax are registered when an object of Flax's is first
    seen, whoever shows it.
    """
    later = _by_predicate[mark[0] :]
    _by_predicate[mark[0] :] = [each for each in later if not isinstance(each[1], _FunctionView)]
    own = {kind: view for kind, view in _by_type.items() if not isinstance(view, _FunctionView)}
    _by_type.clear()
    _by_type.update({**own, **mark[1]})
    _cache.clear()


def mark_views() -> tuple[int, dict[type, View]]:
    return len(_by_predicate), dict(_by_type)


def view_of(obj: Any) -> View | None:
    """The view of `obj`, or None where nothing is known about its kind."""
    kind = type(obj)
    if kind not in _cache and any([load(kind) for load in _loaders]):
        return view_of(obj)
    if _by_predicate and kind not in _by_type:
        for predicate, candidate in reversed(_by_predicate):
            if predicate(obj):
                return candidate  # a predicate may look at the instance: not cached
    try:
        return _cache[kind]
    except KeyError:
        pass
    view = next((_by_type[base] for base in kind.__mro__ if base in _by_type), None)
    if view is None:
        view = next((found for f in _by_kind if (found := f(obj)) is not None), None)
    _cache[kind] = view
    return view


class _FunctionView(View):
    def __init__(
        self,
        children: Callable[[Any], Mapping[Label, Any]],
        rebuild: Callable[[Any, Mapping[Label, Any]], Any],
    ):
        self._children = children
        self._rebuild = rebuild

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return self._children(obj).items()

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
      type_or_predicate: a class (its subclasses included), or a function that accepts objects.
      children: gives an object's state as a dict from label to child; children can be
        anything that has a view.
      rebuild: `(object, children) -> object`, called with all children, new ones included.
        It may change the object in place and return it.

    Raises:
      TypeError: an argument that is no class or function.

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
    add_view(type_or_predicate, _FunctionView(children, rebuild))
