"""Identity: which live object is the same one as before.

A restore outlives the call that began it, while values wait for their objects. It has to tell an
object that it has restored from another one that has taken its place, and it must not keep either
alive. So an object is known by a weak reference. An object that cannot be referred to weakly (an
`nnx.Variable`, a `jax.Ref`, a class with `__slots__`) is known by its place alone: whatever is
there counts as the same object, and as one that no restore has touched yet.
"""

from __future__ import annotations

import weakref
from collections.abc import KeysView
from typing import Any


def is_referable(obj: Any) -> bool:
    """Whether an object can be told from its replacement without keeping it alive.

    >>> is_referable(7), is_referable(is_referable)
    (False, True)
    """
    return type(obj).__weakrefoffset__ != 0


class ObjectNumbers:
    """A number for each of some objects, as long as they live.

    >>> class Thing: ...
    >>> numbers, thing = ObjectNumbers(), Thing()
    >>> numbers.set(thing, 3)
    >>> numbers.get(thing), numbers.get(Thing())
    (3, None)
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id of the object

    def set(self, obj: Any, number: int) -> None:
        """Remembers the number of an object; of one that cannot be referred to, nothing."""
        if is_referable(obj):
            key, entries = id(obj), self._entries
            entries[key] = weakref.ref(obj, lambda _: entries.pop(key, None)), number

    def get(self, obj: Any) -> int | None:
        reference, number = self._entries.get(id(obj), (None, None))
        return number if reference is not None and reference() is obj else None


class Bindings:
    """The live objects that a restore has bound to saved nodes.

    Attributes:
      met: saved nodes that have been bound to anything, values included.
    """

    def __init__(self) -> None:
        self.met: set[int] = set()
        self._objects: dict[int, list[weakref.ref[Any]]] = {}  # by saved node
        self._node_of = ObjectNumbers()

    def bind(self, saved: int, obj: Any) -> None:
        """Remembers that `saved` was restored into `obj`."""
        if is_referable(obj):
            self._objects.setdefault(saved, []).append(weakref.ref(obj))
            self._node_of.set(obj, saved)

    def nodes(self) -> KeysView[int]:
        """Saved nodes that have been bound to objects."""
        return self._objects.keys()

    def node_of(self, obj: Any) -> int | None:
        """The saved node that was restored into an object."""
        return self._node_of.get(obj)

    def first(self, saved: int) -> Any | None:
        """The object that a saved node was bound to first; None if it is gone."""
        return self._objects[saved][0]()

    def holds(self, saved: int, obj: Any) -> bool:
        """Whether `saved` was restored into this very object, as far as that can be told."""
        if not is_referable(obj):
            return True
        return any(reference() is obj for reference in self._objects.get(saved, ()))
