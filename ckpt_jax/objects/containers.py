"""Containers that notice what is put into them: lists and dicts of trackables.

A container may be assigned to an attribute. `wrap` decides what the attribute then holds:

* A list or dict is *wrapped* if it holds an object with a mutable identity (a trackable, a
  variable, a module), or if it holds nothing but plain data, because such an object may still
  come. A wrapper is a node of the object graph. An element that is put into it receives the
  restore that waits for its position or key.
* A tuple is rebuilt around its wrapped parts, if it has any.
* Any other container is a *value*, a pytree, and stays exactly what it is. It holds arrays, or
  things that have no view (devices, shardings), and perhaps plain data beside them. `jax.tree.map`
  must find the same structure in parameters and in their gradients, and `jax.device_put` in
  arrays and in their shardings.

A wrapper *shares* the list or dict that it was made of (its storage): a change through either is
seen through both. Only the program changes the storage. Nested containers are wrapped when they
are read, and the storage keeps the plain ones. If a restore replaces an immutable element, the
wrapper takes a copy as its new storage.

The wrappers are subclasses of list and dict for `isinstance`, but the elements are not in the
memory of the base class. CPython's own fast paths are for the exact builtin types; for a subclass
they call its methods. An extension might look into the base's memory all the same, and would take
the wrapper for an empty container. So the base holds one element that says where to look.
"""

from __future__ import annotations

import contextlib
import copy
import reprlib
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from operator import index as as_index
from typing import Any

import jax

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.pending import PENDING, copy_pending, pending_names, received
from ckpt_jax.objects.pytrees import TupleView
from ckpt_jax.objects.state import PLAIN, Holds, NoDependency, holds_each, holds_state
from ckpt_jax.objects.views import View, add_view, view_of

_ELSEWHERE = "(the elements are elsewhere: make a list or dict of this object)"
_wrappers: weakref.WeakValueDictionary[int, Wrapper] = weakref.WeakValueDictionary()


def wrap(value: Any, whole: bool) -> Any:
    """The object that is tracked in place of `value`.

    It is a wrapper if `value` is a list or a dict that needs one, a tuple around wrappers, or
    else `value` itself. One list or dict has one wrapper, however often it is wrapped.

    Args:
      value: anything.
      whole: whether plain data in the container is state, too.
    """
    wrapper = value if isinstance(value, Wrapper) else _wrapper_of(value)
    if wrapper is not None:
        wrapper._whole |= whole
        return wrapper
    if not isinstance(value, list | dict | tuple):
        return value
    made: dict[int, Any] = {}  # by id of a container: what is tracked in its place
    for container, kind in holds_each(value):
        if kind is not Holds.VALUES:
            made[id(container)] = _wrapped(container, whole, made)
    return made.get(id(value), value)


def _wrapper_of(value: Any) -> Wrapper | None:
    """The wrapper that a list or dict has already."""
    known = _wrappers.get(id(value)) if type(value) in _WRAPPERS else None
    return known if known is not None and known._storage is value else None


def _wrapped(container: Any, whole: bool, made: Mapping[int, Any]) -> Any:
    """The object tracked in place of a container; `made` has those of the containers in it."""
    if type(container) in _WRAPPERS:
        wrapper = _wrapper_of(container)
        if wrapper is None:
            wrapper = _wrappers[id(container)] = _WRAPPERS[type(container)](container)
        wrapper._whole |= whole
        for _, element in wrapper._elements():
            child = made.get(id(element), element)
            if child is not element:
                wrapper._parts[id(element)] = element, child
        return wrapper
    view = view_of(container)
    if not isinstance(view, TupleView):
        return container
    changed = {
        label: made[id(part)]
        for label, part in view.children(container)
        if made.get(id(part), part) is not part
    }
    return view.rebuild(container, changed) if changed else container


def unmarked(value: Any) -> Any:
    """`value` as the program reads it: without `NoDependency` marks."""
    if isinstance(value, NoDependency):
        return value.value
    if not isinstance(value, tuple):
        return value
    made: dict[int, Any] = {}  # by id of a part: the part without marks
    stack: list[Any] = [value]
    while stack:  # tuples may be nested deeper than functions can call each other
        here = stack[-1]
        view = view_of(here)
        parts = tuple(view.children(here)) if isinstance(view, TupleView) else ()
        inner = [part for _, part in parts if isinstance(part, tuple) and id(part) not in made]
        if inner:
            stack += inner
            continue
        stack.pop()
        marked = {label: part.value for label, part in parts if isinstance(part, NoDependency)}
        changed = {label: made[id(x)] for label, x in parts if made.get(id(x), x) is not x} | marked
        made[id(here)] = view.rebuild(here, changed) if view is not None and changed else here
    return made[id(value)]


# --- wrappers --------------------------------------------------------------------------


class Wrapper:
    """The part that the wrappers of lists and of dicts have in common."""

    _whole = False  # whether plain data is state, too
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, storage: Any):
        self._storage = storage
        self._parts: dict[int, tuple[Any, Any]] = {}  # id(raw) -> (raw, wrapped)

    # --- elements

    def _content(self) -> Any:
        """A plain container of the elements as they are read."""
        raise NotImplementedError

    def _elements(self) -> Iterable[tuple[Label, Any]]:
        """Label and element, as they are in the storage."""
        raise NotImplementedError

    def _child(self, element: Any) -> Any:
        """The object that the object graph sees for an element; always the same object."""
        if not isinstance(element, list | dict | tuple):
            return element
        _, known = self._parts.get(id(element), (None, element))
        child = wrap(known, self._whole)
        if child is not element:
            self._parts[id(element)] = element, child
        return child

    def _read(self, element: Any) -> Any:
        """The object that a program sees for an element."""
        return unmarked(self._child(element))

    def _is_state(self, child: Any) -> bool:
        return not isinstance(child, NoDependency) and (self._whole or holds_state(child))

    @contextlib.contextmanager
    def _received(self, label: Label, element: Any) -> Iterator[Any]:
        """Hands a new element to the restores that wait for it; the block stores what it gets."""
        if not pending_names(self):
            yield element
            return
        child = self._child(element)
        is_state = self._is_state(child)
        with received(self, label, child) if is_state else contextlib.nullcontext(child) as new:
            yield element if new is child else new

    # --- for the view

    def _children(self) -> list[tuple[Label, Any]]:
        skip = () if self._whole else PLAIN
        elements = [(at, value) for at, value in self._elements() if not isinstance(value, skip)]
        present = {id(element) for _, element in elements}
        self._parts = {key: part for key, part in self._parts.items() if key in present}
        children = [(label, self._child(element)) for label, element in elements]
        return [(label, child) for label, child in children if self._is_state(child)]

    def _replace(self, changed: Mapping[Any, Any]) -> None:
        """Takes a copy with other elements as the storage; the caller's stays as it is."""
        self._storage = self._storage.copy()
        for label, child in changed.items():
            self._storage[label] = child

    # --- what lists and dicts do alike

    def __len__(self) -> int:
        return len(self._storage)

    def __eq__(self, other: object) -> bool:
        return self._content() == other

    def __ne__(self, other: object) -> bool:
        return self._content() != other

    def __delitem__(self, key: Any) -> None:
        del self._storage[key]

    def __copy__(self) -> Any:
        copied = type(self)(self._content())
        copied._whole = self._whole
        copy_pending(self, copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self)(type(self._storage)())
        copied._storage = copy.deepcopy(self._content(), memo)  # no child appears: all were there
        copied._whole = self._whole
        copy_pending(self, copied)
        return copied

    def _state(self) -> dict[str, Any]:
        """What a pickle holds besides the elements. It is set when they are there."""
        waiting = {PENDING: self.__dict__[PENDING]} if pending_names(self) else {}
        return {"_whole": self._whole, **waiting}

    def copy(self) -> Any:
        return self.__copy__()

    def clear(self) -> None:
        self._storage.clear()


# The order of the bases of the wrappers matters. Each method is taken from the first base that has
# it, and a method of list or dict would look at its own memory, in which no elements are. So the
# builtin comes last. The abstract class before it defines most methods through a few that are
# defined here. `Wrapper` comes first, for its `__eq__` and `clear`. (The type checker believes that
# list and dict inherit from the abstract classes. They do not: they are registered with them.)


class ListWrapper(  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleMethodOverride]
    Wrapper, MutableSequence[Any], list[Any]
):
    """A list attribute; see the module."""

    def __init__(self, items: Iterable[Any] = ()):
        list.__init__(self, (_ELSEWHERE,))
        Wrapper.__init__(self, items if type(items) is list else list(items))

    def _content(self) -> list[Any]:
        return [self._read(element) for element in self._storage]

    def _elements(self) -> Iterable[tuple[Label, Any]]:
        return enumerate(self._storage)

    @reprlib.recursive_repr("[...]")
    def __repr__(self) -> str:
        return repr(self._content())

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self._storage)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self._read(element) for element in self._storage[at]]
        return self._read(self._storage[at])

    def __setitem__(self, at: Any, value: Any) -> None:
        if not isinstance(at, slice):
            position = range(len(self))[at]
            with self._received(position, value) as element:
                self._storage[position] = element
            return
        positions, values = range(len(self))[at], list(value)
        if positions.step == 1:
            positions = range(positions.start, positions.start + len(values))
        with contextlib.ExitStack() as stack:
            if len(positions) == len(values):
                pairs = zip(positions, values, strict=True)
                values = [stack.enter_context(self._received(i, x)) for i, x in pairs]
            self._storage[at] = values

    def insert(self, index: Any, value: Any) -> None:
        position = slice(as_index(index), None).indices(len(self))[0]
        with self._received(position, value) as element:
            self._storage.insert(position, element)

    def extend(self, values: Iterable[Any]) -> None:
        # A list is copied because it may be the storage, which grows meanwhile.
        for value in list(values) if isinstance(values, list) else values:
            self.append(value)

    def reverse(self) -> None:
        self._storage.reverse()

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        read = self._read if key is None else lambda element: key(self._read(element))
        self._storage.sort(key=read, reverse=reverse)

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

    def __imul__(self, times: Any) -> ListWrapper:
        repeated = self._storage * times
        del self._storage[len(repeated) :]
        self.extend(repeated[len(self._storage) :])
        return self

    def __reduce__(self) -> Any:
        return ListWrapper, (), self._state(), iter(self._content())


class DictWrapper(  # pyright: ignore[reportGeneralTypeIssues]
    Wrapper, MutableMapping[Any, Any], dict[Any, Any]
):
    """A dict attribute; see the module. If it was an OrderedDict, the storage still is one."""

    def __init__(self, *args: Any, **items: Any):
        dict.__init__(self, {_ELSEWHERE: None})
        shared = len(args) == 1 and type(args[0]) in (dict, OrderedDict) and not items
        Wrapper.__init__(self, args[0] if shared else dict(*args, **items))

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
        return key in self._storage  # the mixin would read, and so wrap, the element

    def __getitem__(self, key: Any) -> Any:
        return self._read(self._storage[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        with self._received(key, value) as element:
            self._storage[key] = element

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]  # a restore may have put another value there than `default`

    def popitem(self, *args: Any, **named: Any) -> tuple[Any, Any]:  # an OrderedDict takes `last`
        key, value = self._storage.popitem(*args, **named)
        return key, self._read(value)

    def move_to_end(self, key: Any, last: bool = True) -> None:
        self._storage.move_to_end(key, last)

    def __or__(self, other: Any) -> Any:
        return self._content() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._content()

    def __ior__(self, other: Any) -> DictWrapper:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        empty = type(self._storage)()
        return DictWrapper, (empty,), self._state(), None, iter(self.items())


_WRAPPERS: dict[type, type[ListWrapper] | type[DictWrapper]] = {
    list: ListWrapper,
    dict: DictWrapper,
    OrderedDict: DictWrapper,
}


class WrapperView(View):
    """A wrapper: a mutable object with its elements as children."""

    identity = True
    mutable = True

    def __init__(self, container: str):
        self.container = container

    def children(self, obj: Wrapper) -> Iterable[tuple[Label, Any]]:
        return obj._children()

    def type_of(self, obj: Wrapper) -> type:
        return type(obj._storage)

    def rebuild(self, obj: Wrapper, changed: Mapping[Label, Any]) -> Any:
        obj._replace(changed)
        return obj

    def awaiting(self, obj: Wrapper) -> tuple[Any, ...]:
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
add_view(ListWrapper, WrapperView("list"))
add_view(DictWrapper, WrapperView("dict"))
