"""Precedence: of two restores that meet in one object, the later one wins.

They meet if values of the earlier one still wait, and the program then puts an object into their
place that the later one has restored. So each restore tells the earlier ones that wait which
places it has given values.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

from ckpt_jax.restoring.identity import Places, PlaceSet

_numbers = itertools.count(1)
_waiting: weakref.WeakSet[Rank] = weakref.WeakSet()


class Rank:
    """The rank of a restore among all restores of this program.

    Attributes:
      given: places that this restore has given values.
      superseded: places that later restores have given values.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self.given = PlaceSet()
        self.superseded = PlaceSet()

    def wait(self) -> None:
        """From now on later restores tell what they have restored."""
        _waiting.add(self)

    def gave(self, places: Places, nodes: Iterable[int]) -> None:
        """This restore has given values to these nodes."""
        nodes = tuple(nodes)
        self.given.add(places, nodes)
        for other in list(_waiting):
            if other._number < self._number:
                other.superseded.add(places, nodes)

    def settled(self, places: Places) -> frozenset[int]:
        """The nodes that have values of this restore or of a later one."""
        return self.given.nodes_in(places) | self.superseded.nodes_in(places)
