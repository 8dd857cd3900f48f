"""Identity: how a restore recognizes the objects and values that it has restored.

A restore outlives the call that began it, as long as its status is kept or values wait for their
objects. It has to tell an object that it has restored from another one that has taken its place,
and it must keep neither of them alive. So it knows an object by a weak reference. Some objects
have no weak references: an `nnx.Variable`, a `jax.Ref`, an object of a class with `__slots__`. It
refers to these strongly, but only until the nearest object above them that has weak references
is gone.

Values (arrays, scalars and the containers that are rebuilt around them) have no identity that
means anything. They are known by their *place*: their *owner*, which is the mutable object above
them, and the path from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from ckpt_jax.matching.trace import LiveGraph

V = TypeVar("V")
Place = tuple[Any, str]  # owner and path; the owner is None if no mutable object is above


def is_referable(obj: Any) -> bool:
    """Whether an object can be referred to weakly.

    >>> is_referable(7), is_referable(is_referable)
    (False, True)
    """
    return type(obj).__weakrefoffset__ != 0


class _Entry(NamedTuple, Generic[V]):
    find: Callable[[], Any]  # the object, or None if it is gone
    value: V
    end: weakref.ref[Any] | None  # removes the entry


class IdentityMap(Generic[V]):
    """A value for each of some objects, by identity.

    An entry is removed when its object dies, or, if that has no weak references, when the object
    that was named for this dies.

    >>> class Thing: ...
    >>> numbers, thing = IdentityMap(), Thing()
    >>> numbers.set(thing, 3)
    >>> numbers.get(thing), numbers.get(Thing())
    (3, None)
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[V]] = {}  # by id

    def set(self, obj: Any, value: V, above: Any = None) -> None:
        """Remembers a value for an object.

        Args:
          above: an object that has weak references. If `obj` has none, the entry lasts as long as
            this object; without it, as long as the map.
        """
        key, entries = id(obj), self._entries
        mortal = obj if is_referable(obj) else above
        end = None if mortal is None else weakref.ref(mortal, lambda _: entries.pop(key, None))
        find = end if end is not None and mortal is obj else lambda: obj
        entries[key] = _Entry(find, value, end)

    def get(self, obj: Any) -> V | None:
        entry = self._entries.get(id(obj))
        return entry.value if entry is not None and entry.find() is obj else None

    def with_id(self, key: int) -> tuple[Any, V] | None:
        """The object with this id and its value; None if it is not here or is gone."""
        entry = self._entries.get(key)
        obj = None if entry is None else entry.find()
        return None if entry is None or obj is None else (obj, entry.value)


class Bindings:
    """The mutable objects that a restore has bound to saved nodes.

    Attributes:
      met: saved nodes that have been bound to anything, values included.
    """

    def __init__(self) -> None:
        self.met: set[int] = set()
        self._node_of: IdentityMap[int] = IdentityMap()
        self._first_id: dict[int, int] = {}  # by saved node: the id of the first object

    def bind(self, saved: int, obj: Any, above: Any) -> None:
        """Remembers that `saved` is bound to `obj`; for `above` see `IdentityMap.set`."""
        self._node_of.set(obj, saved, above)
        self._first_id.setdefault(saved, id(obj))

    def node_of(self, obj: Any) -> int | None:
        """The saved node that an object was bound to last."""
        return self._node_of.get(obj)

    def first(self, saved: int) -> Any | None:
        """The object that a saved node was bound to first; None if there is none or it is gone."""
        key = self._first_id.get(saved)
        found = None if key is None else self._node_of.with_id(key)
        return found[0] if found is not None and found[1] == saved else None


class Places:
    """The places of the nodes of a live graph.

    Args:
      live: the graph.
      root: the place of its root, if that is a value of an object outside of the graph.
    """

    def __init__(self, live: LiveGraph, root: Place = (None, "")):
        self.live = live
        self._root = root
        self._parents = _parents(live)
        self._owners = [-1] * len(self._parents)  # by node; -1 for the owner of the root
        for node, parent in enumerate(self._parents):
            if live.views[node].mutable:
                self._owners[node] = node
            elif parent >= 0:
                self._owners[node] = self._owners[parent]

    def __len__(self) -> int:
        return len(self._owners)

    def of(self, node: int) -> Place:
        """The place of a node. The path of an owner itself is empty."""
        keys, owner = self.live.graph.object_keys, self._owners[node]
        if owner < 0:
            root_owner, root_path = self._root
            return root_owner, root_path + keys[node][len(keys[0]) :]
        key, above = keys[node], keys[owner]
        is_below = not above or key == above or key.startswith(f"{above}/")
        return self.live.objects[owner], key[len(above) :].lstrip("/") if is_below else key

    def referable_above(self, node: int) -> Any | None:
        """The nearest mutable object above a node, or at it, that has weak references."""
        while node >= 0:
            obj = self.live.objects[node]
            if self.live.views[node].mutable and is_referable(obj):
                return obj
            node = self._parents[node]
        return self._root[0]


def _parents(live: LiveGraph) -> list[int]:
    """The node that each node is first reached from; -1 for the root."""
    parents = [-1] * len(live.objects)
    seen = bytearray(len(live.objects))
    seen[0] = 1
    for node, entry in enumerate(live.graph.nodes):
        for child in [child for _, child in entry.children] + [slot.node for slot in entry.slots]:
            if not seen[child]:
                seen[child] = 1
                parents[child] = node
    return parents
