"""Precedence: if two restores meet in one object, the later one wins.

They meet if values of the earlier one still wait, and the program then puts an object into their
place that the later one has restored. So each restore tells the earlier ones that wait which
places it has given values to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

from ckpt_jax.restoring.identity import IdentityMap, Places

_numbers = itertools.count(1)
_waiting: weakref.WeakSet[Rank] = weakref.WeakSet()


class Rank:
    """The rank of a restore among all restores of this program.

    It knows the places that are *settled*: this restore or a later one has given values to them.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._settled: IdentityMap[set[str]] = IdentityMap()  # by owner: paths

    def wait(self) -> None:
        """From now on, later restores tell this one which places they settle."""
        _waiting.add(self)

    def settle(self, places: Places, nodes: Iterable[int]) -> None:
        """Notes that this restore has given values to these nodes."""
        ranks = [rank for rank in {self, *_waiting} if rank._number <= self._number]
        for node in nodes:
            owner, path = places.of(node)
            if owner is None:
                continue  # nothing can come into this place later
            for rank in ranks:
                paths = rank._settled.get(owner)
                if paths is None:
                    paths = set[str]()
                    rank._settled.set(owner, paths, places.referable_above(node))
                paths.add(path)

    def settled(self, places: Places) -> frozenset[int]:
        """The nodes that have values of this restore or of a later one."""
        found: list[int] = []
        for node in range(len(places)):
            owner, path = places.of(node)
            if path in (self._settled.get(owner) or ()):
                found.append(node)
        return frozenset(found)
