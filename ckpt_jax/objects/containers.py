"""Containers that notice what is put into them: lists and dicts of trackables.

`wrap` decides what an attribute keeps of a container that is assigned to it:

* A list or dict that holds an object with a mutable identity (a trackable, a variable, a
  module), or nothing but plain data (so that such an object may yet come), is *wrapped*: it
  is a node of the object graph of its own, and an element that is put into it receives the
  restore that waits for its place.
* A tuple is rebuilt around its wrapped parts, where it has any.
* A container of arrays, or of things that have no view (devices, shardings), whatever plain data
  is beside them, is a *value*, a pytree, and stays exactly what it is: `jax.tree.map` must find
  the same structure in it as in its gradients, `jax.device_put` as in what it places.

A wrapper *shares* the list or dict that it was made of (its storage): a change through either
is seen through both. It never changes it of its own accord: nested containers are wrapped when
they are read, not where they lie, and where a restore replaces an element that is immutable,
the wrapper takes a copy as its new storage.

The wrappers are subclasses of list and dict for `isinstance`, but the memory of the base class
is not where the elements are. CPython's own fast paths are for the exact builtin types, and
ask a subclass; the base holds one element that says so, lest an extension that asks nobody
takes it for an empty container.
"""

from __future__ import annotations

import reprlib
import weakref
from collections import OrderedDict
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from operator import index as as_index
from typing import Any

import jax

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.pending import Pending, pending_names, receive
from ckpt_jax.objects.pytrees import TupleView
from ckpt_jax.objects.state import PLAIN, Holds, NoDependency, holds, holds_state
from ckpt_jax.objects.views import View, add_view, view_of

_ELSEWHERE = "(the elements are elsewhere: make a list or dict of this object)"
_wrappers: weakref.WeakValueDictionary[int, Container] = weakref.WeakValueDictionary()


def wrap(value: Any, whole: bool) -> Any:
    """What is to be tracked in the place of `value`: a wrapper where it is a list or a dict that
    needs one, a tuple around wrappers, or else `value` itself.

    Args:
      value: anything. One list or dict has one wrapper, however often it is asked for.
      whole: whether plain data in the container is state, too.
    """
    if isinstance(value, Container):
        value._whole |= whole
        return value
    if type(value) in _WRAPPERS:
        known = _wrappers.get(id(value))
        if known is not None and known._storage is value:
            return wrap(known, whole)
        if holds(value) is Holds.VALUES:
            return value
        wrapper = _wrappers[id(value)] = _WRAPPERS[type(value)](value)
        wrapper._whole = whole
        return wrapper
    if isinstance(value, tuple) and holds(value) is not Holds.VALUES:
        return _map_tuple(value, lambda part: wrap(part, whole))
    return value


def unmarked(value: Any) -> Any:
    """`value` as it is read: without marks of `NoDependency`."""
    if isinstance(value, NoDependency):
        return value.value
    return _map_tuple(value, unmarked) if isinstance(value, tuple) else value


def _map_tuple(value: tuple[Any, ...], function: Any) -> tuple[Any, ...]:
    """The tuple with `function` applied to its parts; itself where that changes none."""
    view = view_of(value)
    if not isinstance(view, TupleView):
        return value
    parts = {label: (part, function(part)) for label, part in view.children(value)}
    changed = {label: new for label, (old, new) in parts.items() if new is not old}
    return view.rebuild(value, changed) if changed else value


# --- wrappers --------------------------------------------------------------------------


class Container:
    """What the wrappers of lists and of dicts have in common."""

    _whole = False  # whether plain data is state, too

    def __init__(self, storage: Any):
        self._storage = storage
        self._parts: dict[int, tuple[Any, Any]] = {}  # id(raw) -> (raw, wrapped)
        self._arrived: list[Pending] = []  # restores to tell that elements are in their places

    def _content(self) -> Any:
        """A plain container of the elements as they are read."""
        raise NotImplementedError

    def _elements(self) -> Iterable[tuple[Label, Any]]:
        """Label and element, as they lie in the storage."""
        raise NotImplementedError

    def _child(self, element: Any) -> Any:
        """What the object graph sees of an element of the storage; always the same object."""
        if not isinstance(element, list | dict | tuple):
            return element
        _, known = self._parts.get(id(element), (None, element))
        child = wrap(known, self._whole)
        if child is not element:
            self._parts[id(element)] = element, child
        return child

    def _read(self, element: Any) -> Any:
        """What a program sees of an element of the storage."""
        return unmarked(self._child(element))

    def _is_state(self, child: Any) -> bool:
        return not isinstance(child, NoDependency) and (self._whole or holds_state(child))

    def _received(self, label: Label, element: Any) -> Any:
        """What to store for a new element: what a restore makes of it, where one waits."""
        if not pending_names(self):
            return element
        child = self._child(element)
        new = receive(self, label, child, self._arrived) if self._is_state(child) else child
        return element if new is child else new

    def _settle(self) -> None:
        """To be called after what was received is stored."""
        arrived, self._arrived = self._arrived, []
        for restore in arrived:
            restore.attached()

    def _children(self) -> list[tuple[Label, Any]]:
        skip = () if self._whole else PLAIN
        elements = [(at, value) for at, value in self._elements() if not isinstance(value, skip)]
        present = {id(element) for _, element in elements}
        self._parts = {key: part for key, part in self._parts.items() if key in present}
        children = [(label, self._child(element)) for label, element in elements]
        return [(label, child) for label, child in children if self._is_state(child)]

    def _replace(self, changed: Mapping[Any, Any]) -> None:
        """Takes a copy with other elements as the storage; the caller's stays as it was."""
        self._storage = self._storage.copy()
        for label, child in changed.items():
            self._storage[label] = child

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __len__(self) -> int:
        return len(self._storage)

    def __eq__(self, other: object) -> bool:
        return self._content() == other

    def __ne__(self, other: object) -> bool:
        return self._content() != other

    def __delitem__(self, key: Any) -> None:
        del self._storage[key]

    def __copy__(self) -> Any:
        copy = type(self)(self._content())
        copy._whole = self._whole
        return copy

    def copy(self) -> Any:
        return self.__copy__()

    def clear(self) -> None:
        self._storage.clear()


class ListWrapper(Container, list[Any]):
    """A list attribute; see the module."""

    def __init__(self, items: Iterable[Any] = ()):
        list.__init__(self, (_ELSEWHERE,))
        Container.__init__(self, items if type(items) is list else list(items))

    def _content(self) -> list[Any]:
        return [self._read(element) for element in self._storage]

    def _elements(self) -> Iterable[tuple[Label, Any]]:
        return enumerate(self._storage)

    @reprlib.recursive_repr("[...]")
    def __repr__(self) -> str:
        return repr(self._content())

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self._storage)

    def __reversed__(self) -> Iterator[Any]:
        return map(self._read, reversed(self._storage))

    def __contains__(self, value: object) -> bool:
        return value in self._content()

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self._read(element) for element in self._storage[at]]
        return self._read(self._storage[at])

    def __setitem__(self, at: Any, value: Any) -> None:
        if isinstance(at, slice):
            places, values = range(len(self))[at], list(value)
            if places.step == 1:
                values = [self._received(places.start + i, v) for i, v in enumerate(values)]
            elif len(places) == len(values):
                values = [self._received(i, v) for i, v in zip(places, values, strict=True)]
            self._storage[at] = values
        else:
            place = range(len(self))[at]
            self._storage[place] = self._received(place, value)
        self._settle()

    def __lt__(self, other: Any) -> bool:
        return self._content() < other

    def __le__(self, other: Any) -> bool:
        return self._content() <= other

    def __gt__(self, other: Any) -> bool:
        return self._content() > other

    def __ge__(self, other: Any) -> bool:
        return self._content() >= other

    def __add__(self, other: Any) -> Any:
        return self._content() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._content()

    def __mul__(self, times: Any) -> list[Any]:
        return self._content() * times

    __rmul__ = __mul__

    def __iadd__(self, values: Iterable[Any]) -> ListWrapper:
        self.extend(values)
        return self

    def __imul__(self, times: Any) -> ListWrapper:
        repeated = self._storage * times
        del self._storage[len(repeated) :]
        self.extend(repeated[len(self._storage) :])
        return self

    def append(self, value: Any) -> None:
        self._storage.append(self._received(len(self), value))
        self._settle()

    def extend(self, values: Iterable[Any]) -> None:
        for value in list(values) if isinstance(values, list) else values:
            self.append(value)

    def insert(self, at: Any, value: Any) -> None:
        place = slice(as_index(at), None).indices(len(self))[0]
        self._storage.insert(place, self._received(place, value))
        self._settle()

    def pop(self, at: Any = -1) -> Any:
        return self._read(self._storage.pop(at))

    def remove(self, value: Any) -> None:
        del self._storage[self.index(value)]

    def index(self, value: Any, *bounds: Any) -> int:
        return self._content().index(value, *bounds)

    def count(self, value: Any) -> int:
        return self._content().count(value)

    def reverse(self) -> None:
        self._storage.reverse()

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        read = self._read if key is None else lambda element: key(self._read(element))
        self._storage.sort(key=read, reverse=reverse)

    def __reduce__(self) -> Any:
        return ListWrapper, (), {"_whole": self._whole}, iter(self._content())


class DictWrapper(Container, dict[Any, Any]):
    """A dict attribute; see the module. An OrderedDict stays one underneath."""

    def __init__(self, *args: Any, **items: Any):
        dict.__init__(self, {_ELSEWHERE: None})
        shared = len(args) == 1 and type(args[0]) in (dict, OrderedDict) and not items
        Container.__init__(self, args[0] if shared else dict(*args, **items))

    def _content(self) -> dict[Any, Any]:
        return type(self._storage)((key, self._read(value)) for key, value in self._elements())

    def _elements(self) -> Iterable[tuple[Label, Any]]:
        return self._storage.items()

    @reprlib.recursive_repr("{...}")
    def __repr__(self) -> str:
        return repr(self._content())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._storage)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._storage)

    def __contains__(self, key: object) -> bool:
        return key in self._storage

    def __getitem__(self, key: Any) -> Any:
        return self._read(self._storage[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._storage[key] = self._received(key, value)
        self._settle()

    def __or__(self, other: Any) -> Any:
        return self._content() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._content()

    def __ior__(self, other: Any) -> DictWrapper:
        self.update(other)
        return self

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def keys(self) -> Any:
        return self._storage.keys()

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def pop(self, key: Any, *default: Any) -> Any:
        if key in self._storage:
            return self._read(self._storage.pop(key))
        return self._storage.pop(key, *default)

    def popitem(self, *args: Any, **named: Any) -> tuple[Any, Any]:  # an OrderedDict takes `last`
        key, value = self._storage.popitem(*args, **named)
        return key, self._read(value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **items: Any) -> None:
        for key, value in dict(*args, **items).items():
            self[key] = value

    def move_to_end(self, key: Any, last: bool = True) -> None:
        self._storage.move_to_end(key, last)

    def __reduce__(self) -> Any:
        empty = type(self._storage)()
        return DictWrapper, (empty,), {"_whole": self._whole}, None, iter(self.items())


_WRAPPERS: dict[type, type[ListWrapper] | type[DictWrapper]] = {
    list: ListWrapper,
    dict: DictWrapper,
    OrderedDict: DictWrapper,
}


class ContainerView(View):
    """A wrapper: a mutable object whose elements are its children."""

    identity = True
    mutable = True

    def __init__(self, container: str):
        self.container = container

    def children(self, obj: Container) -> Iterable[tuple[Label, Any]]:
        return obj._children()

    def type_of(self, obj: Container) -> type:
        return type(obj._storage)

    def rebuild(self, obj: Container, changed: Mapping[Label, Any]) -> Any:
        obj._replace(changed)
        return obj

    def awaiting(self, obj: Container) -> tuple[Any, ...]:
        return (obj,)


# --- as pytrees ------------------------------------------------------------------------


def _sorted_keys(wrapper: DictWrapper) -> tuple[Any, ...]:
    """The order in which JAX takes a dict apart."""
    keys = tuple(wrapper)
    if isinstance(wrapper._storage, OrderedDict):
        return keys
    try:
        return tuple(sorted(keys))
    except TypeError:
        return keys


def _flatten_list(wrapper: ListWrapper) -> tuple[list[tuple[Any, Any]], None]:
    key = jax.tree_util.SequenceKey
    return [(key(i), element) for i, element in enumerate(wrapper)], None


def _flatten_dict(wrapper: DictWrapper) -> tuple[list[tuple[Any, Any]], Any]:
    keys = _sorted_keys(wrapper)
    children = [(jax.tree_util.DictKey(key), wrapper[key]) for key in keys]
    return children, (type(wrapper._storage), keys)


def _unflatten_list(_: None, children: Iterable[Any]) -> ListWrapper:
    return ListWrapper(list(children))


def _unflatten_dict(kind_and_keys: Any, children: Iterable[Any]) -> DictWrapper:
    kind, keys = kind_and_keys
    return DictWrapper(kind(zip(keys, children, strict=True)))


jax.tree_util.register_pytree_with_keys(ListWrapper, _flatten_list, _unflatten_list)
jax.tree_util.register_pytree_with_keys(DictWrapper, _flatten_dict, _unflatten_dict)
add_view(ListWrapper, ContainerView("list"))
add_view(DictWrapper, ContainerView("dict"))
