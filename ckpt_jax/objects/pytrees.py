"""Views of plain values and pytrees: leaves, the builtin containers, and all that JAX knows.

This library treats every pytree as immutable: it never changes the caller's lists and dicts, and a
restored tree is a rebuilt one. The builtin containers are read directly. So dicts keep their
order, and their keys need not be sortable. Any other type that is registered with JAX
(flax.struct, FrozenDict, Equinox modules, a user's own type) is taken apart and rebuilt by JAX
itself. Its static fields stay as the target has them.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label
from ckpt_jax.graph.texts import is_text
from ckpt_jax.objects.views import View


class LeafView(View):
    """A value without parts: an array, a scalar, a string."""

    container = "leaf"

    def __init__(self, identity: bool = False):
        self.identity = identity

    def values(self, obj: Any) -> Mapping[str, Any]:
        return {VARIABLE_VALUE: obj}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        return values[VARIABLE_VALUE]


class RefView(View):
    """A jax.Ref: a mutable box for one array."""

    container = "leaf"
    identity = True
    mutable = True

    def values(self, obj: Any) -> Mapping[str, Any]:
        return {VARIABLE_VALUE: obj[...]}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        obj[...] = values[VARIABLE_VALUE]
        return obj


class NoneView(View):
    """None, which keeps its place in the tree."""

    container = "none"


class DictView(View):
    """Dicts, by key."""

    container = "dict"

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return obj.items()

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        rebuilt = copy.copy(obj)  # a subclass's constructor may take anything
        for label, child in changed.items():
            rebuilt[label] = child
        return rebuilt


class ListView(View):
    """Lists, by position."""

    container = "list"

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return enumerate(obj)

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        rebuilt = copy.copy(obj)
        for index, child in changed.items():
            rebuilt[index] = child
        return rebuilt


class TupleView(View):
    """Tuples by position, named tuples by field."""

    def __init__(self, named: bool):
        self.named = named
        self.container = "namedtuple" if named else "tuple"

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return zip(obj._fields, obj, strict=True) if self.named else enumerate(obj)

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        parts = [changed.get(label, child) for label, child in self.children(obj)]
        if hasattr(obj, "n_fields"):  # a structseq, which tuple.__new__ cannot create
            return tuple(parts)
        rebuilt = tuple.__new__(type(obj), parts)  # a subclass's constructor may take anything
        if hasattr(obj, "__dict__"):
            rebuilt.__dict__.update(obj.__dict__)
        return rebuilt


class DataclassView(View):
    """Dataclasses that are not registered with JAX: every field is state."""

    container = "dataclass"

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return [(field.name, getattr(obj, field.name)) for field in dataclasses.fields(obj)]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        rebuilt = copy.copy(obj)  # not dataclasses.replace: it would run __post_init__ again
        for name, child in changed.items():
            object.__setattr__(rebuilt, str(name), child)
        return rebuilt


class RegisteredView(View):
    """Any other type that is registered with JAX; one level of it."""

    def __init__(self, container: str, has_program: bool = False):
        self.container = container
        self.has_program = has_program

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(obj, is_leaf=lambda x: x is not obj)
        return [(label_of(path[0]), child) for path, child in leaves]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(obj, is_leaf=lambda x: x is not obj)
        parts = [changed.get(label_of(path[0]), child) for path, child in leaves]
        return jax.tree.unflatten(treedef, parts)


def label_of(key: Any) -> Label:
    """The label of one step in a path of JAX's."""
    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return index
        case jax.tree_util.DictKey(key=label) | jax.tree_util.FlattenedIndexKey(key=label):
            return label
    return str(key)


def is_registered(obj: Any) -> bool:
    """Whether JAX takes an object apart."""
    # Not `jax.tree.leaves`, which warns of generators and other iterators.
    return jax.tree_util.default_registry.flatten_one_level(obj) is not None


def _is_registered_namedtuple(kind: type) -> bool:
    """Whether JAX takes a class of namedtuples apart in another way than by its fields."""
    fields: tuple[str, ...] = getattr(kind, "_fields", ())
    parts = [object() for _ in fields]
    probe = tuple.__new__(kind, parts)
    try:
        found, treedef = jax.tree.flatten(probe, is_leaf=lambda x: x is not probe)
    except Exception:  # the function that a program registered may raise anything
        return True
    is_same = len(found) == len(parts) and all(map(operator.is_, found, parts))
    return not is_same or treedef.node_data()[1] is not None


def _is_dataclass(obj: Any) -> bool:
    return dataclasses.is_dataclass(obj) and not isinstance(obj, type)


def _is_equinox(kind: type) -> bool:
    """Whether a type is a module of Equinox, whose leaves may be anything: functions, dtypes."""
    return any(
        base.__name__ == "Module" and base.__module__.partition(".")[0] == "equinox"
        for base in kind.__mro__
    )


def pytree_view(obj: Any) -> View | None:
    """The view of a plain value or a pytree, chosen by its type; None for any other object."""
    match obj:
        case None:
            return _NONE
        case jax.Array() | np.ndarray():
            return _ARRAY
        case jax.Ref():
            return _REF
        case enum.Enum() | int() | float() | complex() | bool() | str() | bytes() | np.generic():
            return _VALUE
        case jax.ShapeDtypeStruct():
            return _VALUE  # a description: equal ones are not one array
        case _ if is_text(obj):
            return _VALUE
        case tuple() if hasattr(obj, "_fields"):
            return _REGISTERED if _is_registered_namedtuple(type(obj)) else _NAMED_TUPLE
        case tuple() if type(obj) is tuple or not is_registered(obj):
            return _TUPLE
        case list() if type(obj) is list or not is_registered(obj):
            return _LIST
        case dict() if type(obj) in _DICTS or not is_registered(obj):
            return _DICT
    if is_registered(obj):
        if _is_equinox(type(obj)):
            return _EQUINOX
        return _REGISTERED_DATACLASS if _is_dataclass(obj) else _REGISTERED
    return _DATACLASS if _is_dataclass(obj) else None


_NONE = NoneView()
_VALUE = LeafView()
_ARRAY = LeafView(identity=True)
_REF = RefView()
_TUPLE = TupleView(named=False)
_NAMED_TUPLE = TupleView(named=True)
_LIST = ListView()
_DICT = DictView()
_DICTS = (dict, OrderedDict, defaultdict)
_DATACLASS = DataclassView()
_REGISTERED = RegisteredView("dict")
_REGISTERED_DATACLASS = RegisteredView("dataclass")
_EQUINOX = RegisteredView("dataclass", has_program=True)
