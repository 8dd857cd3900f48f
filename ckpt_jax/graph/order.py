"""Order: what has to exist before what."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)


class CyclicDependencyError(ValueError):
    """Things that wait for each other.

    Attributes:
      cycle: them, the first one once more at the end.
    """

    def __init__(self, cycle: tuple[Any, ...]):
        super().__init__(f"dependencies form a cycle: {' -> '.join(map(str, cycle))}")
        self.cycle = cycle


def order_by_dependency(dependencies: Mapping[T, Iterable[T]]) -> list[T]:
    """All keys, each after those that it depends on.

    Args:
      dependencies: for each key, the keys that have to come before it.

    Raises:
      ValueError: a dependency is no key.
      CyclicDependencyError: there is no such order.

    >>> order_by_dependency({"roof": ["walls"], "walls": ["ground"], "ground": []})
    ['ground', 'walls', 'roof']
    """
    known = {key: list(needed) for key, needed in dependencies.items()}
    unknown = {need for needed in known.values() for need in needed} - known.keys()
    if unknown:
        raise ValueError(f"dependencies that are not in the map: {sorted(map(str, unknown))}")
    try:
        return list(TopologicalSorter(known).static_order())
    except CycleError as error:
        raise CyclicDependencyError(tuple(reversed(error.args[1]))) from None
