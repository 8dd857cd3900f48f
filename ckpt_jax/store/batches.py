"""Batches: a sequence cut into groups of bounded size, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], nbytes_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Groups of at most `limit` bytes, in order; a larger item is a group of its own.

    >>> list(batches([2, 3, 4, 9, 1], lambda nbytes: nbytes, 5))
    [[2, 3], [4], [9], [1]]
    """
    batch: list[T] = []
    held = 0
    for item in items:
        nbytes = nbytes_of(item)
        if batch and held + nbytes > limit:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += nbytes
    if batch:
        yield batch
