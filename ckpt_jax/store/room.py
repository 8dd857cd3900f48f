"""Room: bounds the memory that several threads take together."""

from __future__ import annotations

import threading
from dataclasses import dataclass


class Room:
    """Bounds a number of bytes that several threads hold. More than all is held by one alone."""

    def __init__(self, nbytes: int):
        self._nbytes = nbytes
        self._held = 0
        self._changed = threading.Condition()

    def taken(self, nbytes: int) -> _Taken:
        return _Taken(self, nbytes)

    def add(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + nbytes <= self._nbytes)
            self._held += nbytes

    def remove(self, nbytes: int) -> None:
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Taken:
    room: Room
    nbytes: int

    def __enter__(self) -> None:
        self.room.add(self.nbytes)

    def __exit__(self, *exception: object) -> None:
        self.room.remove(self.nbytes)
