"""Identity: which live object is the same one as before.

A restore outlives the call that began it, as long as its status is kept or values wait for their
objects. It has to tell an object that it has restored from another one that has taken its place,
and it must not keep either alive. So it knows an object by a weak reference. Some objects cannot
be referred to weakly: an `nnx.Variable`, a `jax.Ref`, an object of a class with `__slots__`. Those
it refers to strongly, but only as long as their *owner* lives, the nearest object above them that
can be referred to weakly.

Values (arrays, scalars and the containers that are rebuilt around them) have no identity that
means anything: they are known by their *place*, the mutable object above them and the path from
there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, KeysView
from typing import Any, Generic, TypeVar

from ckpt_jax.matching.trace import LiveGraph

V = TypeVar("V")


def is_referable(obj: Any) -> bool:
    """Whether an object can be referred to weakly.

    >>> is_referable(7), is_referable(is_referable)
    (False, True)
    """
    return type(obj).__weakrefoffset__ != 0


class IdentityMap(Generic[V]):
    """A value for each of some objects, by identity. An entry goes with its object, or, if that
    cannot be referred to weakly, with the owner of the object.

    >>> class Thing: ...
    >>> numbers, thing = IdentityMap(), Thing()
    >>> numbers.set(thing, 3)
    >>> numbers.get(thing), numbers.get(Thing()), thing in numbers
    (3, None, True)
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Callable[[], Any], V]] = {}  # by id: the object, its value
        self._owned: dict[int, tuple[Any, set[int]]] = {}  # by id of an owner: a reference, ids

    def set(self, obj: Any, value: V, owner: Any = None) -> None:
        """Remembers a value for an object.

        Args:
          owner: an object that can be referred to weakly; without it an object that cannot be is
            kept alive by this map.
        """
        key = id(obj)
        if is_referable(obj):
            self._entries[key] = self._reference(obj, self._entries), value
            return
        self._entries[key] = (lambda: obj), value
        if owner is not None:
            if id(owner) not in self._owned:
                self._owned[id(owner)] = self._reference(owner, self._owned), set()
            self._owned[id(owner)][1].add(key)

    def _reference(self, obj: Any, table: dict[int, Any]) -> weakref.ref[Any]:
        """A reference to an object that takes the object's entry out of a table at its end."""
        key, this = id(obj), weakref.ref(self)

        def forget(_: object) -> None:
            entry = table.pop(key, None)
            if entry is not None and (map_ := this()) is not None and table is map_._owned:
                for owned in entry[1]:
                    map_._entries.pop(owned, None)

        return weakref.ref(obj, forget)

    def get(self, obj: Any) -> V | None:
        entry = self._entries.get(id(obj))
        return entry[1] if entry is not None and entry[0]() is obj else None

    def __contains__(self, obj: object) -> bool:
        entry = self._entries.get(id(obj))
        return entry is not None and entry[0]() is obj

    def with_id(self, key: int) -> tuple[Any, V] | None:
        """The object with this id, if it is here and alive, and its value."""
        entry = self._entries.get(key)
        obj = None if entry is None else entry[0]()
        return None if entry is None or obj is None else (obj, entry[1])


class Bindings:
    """The mutable objects that a restore has bound to saved nodes.

    Attributes:
      met: saved nodes that have been bound to anything, values included.
    """

    def __init__(self) -> None:
        self.met: set[int] = set()
        self._node_of: IdentityMap[int] = IdentityMap()
        self._ids: dict[int, list[int]] = {}  # of objects, by saved node

    def bind(self, saved: int, obj: Any, owner: Any) -> None:
        """Remembers that `saved` is bound to `obj`; see `IdentityMap.set` for the owner."""
        self._node_of.set(obj, saved, owner)
        self._ids.setdefault(saved, []).append(id(obj))

    def nodes(self) -> KeysView[int]:
        """Saved nodes that have been bound to objects."""
        return self._ids.keys()

    def node_of(self, obj: Any) -> int | None:
        """The saved node that an object was bound to last."""
        return self._node_of.get(obj)

    def first(self, saved: int) -> Any | None:
        """The object that a saved node was bound to first; None if it is gone."""
        found = self._node_of.with_id(self._ids[saved][0])
        return found[0] if found is not None and found[1] == saved else None


class PlaceSet:
    """A set of places: values by owner and path, mutable objects by identity."""

    def __init__(self) -> None:
        self._paths: IdentityMap[set[str]] = IdentityMap()

    def add(self, places: Places, nodes: Iterable[int]) -> None:
        for node in nodes:
            owner, path = places.of(node)
            paths = self._paths.get(owner)
            if paths is None:
                paths = set()
                self._paths.set(owner, paths, places.referable_owner(node))
            paths.add(path)

    def nodes_in(self, places: Places) -> frozenset[int]:
        """The nodes whose places are in the set."""
        found: list[int] = []
        for node in range(len(places)):
            owner, path = places.of(node)
            if path in (self._paths.get(owner) or ()):
                found.append(node)
        return frozenset(found)


class Places:
    """Where the nodes of a live graph lie: the mutable object that owns each, and the path from
    there.

    Args:
      live: the graph.
      root: where its root lies, if that is a value that belongs to an object outside of the graph.
    """

    def __init__(self, live: LiveGraph, root: tuple[Any, str] = (None, "")):
        keys = live.graph.object_keys
        self._live = live
        self._owner_of: list[int] = [-1] * len(keys)  # node of the owner; -1 above the root
        self._root_owner, self._root_path = root
        self._keys = keys
        parents = _parents(live)
        for node, parent in enumerate(parents):
            if live.views[node].mutable:
                self._owner_of[node] = node
            elif parent >= 0:
                self._owner_of[node] = self._owner_of[parent]
        self._parents = parents

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, node: int) -> tuple[Any, str]:
        """The owner of a node, and the path from it; the path of an owner itself is empty."""
        owner, key = self._owner_of[node], self._keys[node]
        if owner < 0:
            root = self._keys[0]
            return self._root_owner, self._root_path + key[len(root) :]
        above = self._keys[owner]
        is_below = not above or key == above or key.startswith(f"{above}/")
        return self._live.objects[owner], key[len(above) :].lstrip("/") if is_below else key

    def referable_owner(self, node: int) -> Any | None:
        """The nearest object above a node, or itself, that can be referred to weakly."""
        while node >= 0:
            obj = self._live.objects[node]
            if self._live.views[node].mutable and is_referable(obj):
                return obj
            node = self._parents[node]
        return self._root_owner


def _parents(live: LiveGraph) -> list[int]:
    """For each node the one that it is first reached from; -1 for the root."""
    parents = [-1] * len(live.objects)
    seen = bytearray(len(live.objects))
    seen[0] = 1
    for node, entry in enumerate(live.graph.nodes):
        for child in [child for _, child in entry.children] + [slot.node for slot in entry.slots]:
            if not seen[child]:
                seen[child] = 1
                parents[child] = node
    return parents
