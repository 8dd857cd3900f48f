"""Boards: the keys of one meeting at the coordination service.

All waits of a meeting share one `Patience`. A single call of the service takes no longer than what
shows that process 0, in which it runs, is stopped. Whatever goes wrong with the service becomes an
error that names the meeting and process 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ckpt_jax.errors import BarrierTimeoutError, ProcessError
from ckpt_jax.processes.patience import Patience
from ckpt_jax.processes.service import Service

ROOT = "ckpt_jax"
_SILENCE_SECONDS = 15.0  # after which a service that does not answer counts as stopped
_ANOTHER_TRY_SECONDS = 1.0  # for its answer after that


class Board:
    """The keys of one meeting.

    Args:
      service: holds the keys of all meetings. None if there is one process, which needs no board.
      number: of the meeting.
      what: names it in errors.
      count: of the processes.
      patience: for all waits.

    Attributes:
      number: of the meeting.
      patience: for all waits.
    """

    def __init__(
        self, service: Service | None, number: int, what: str, count: int, patience: Patience
    ):
        self.number, self.patience = number, patience
        self._is_silent = False  # whether the service has given no answer
        self._given, self._what, self._count = service, what, count

    def set(self, name: str, value: str) -> bool:
        """Sets a key. Returns False, and changes nothing, if it has a value."""
        return self.set_key(self._key(name), value)

    def set_key(self, key: str, value: str) -> bool:
        """Sets a key that may not belong to the meeting."""
        with self.patience.waiting(), self.answered():
            return self._service.set(key, value, self._answer_seconds)

    def values(self, folder: str = "") -> dict[str, str]:
        """The keys that have a value, below a folder that ends in "/"; by default all."""
        prefix = self._key(folder)
        with self.patience.waiting(), self.answered():
            found = self._service.list(prefix, self._answer_seconds)
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def value(self, name: str) -> str | None:
        """The value of a key "folder/name" that is alone in its folder; None if it has none."""
        folder, _, last = name.rpartition("/")
        return self.values(f"{folder}/").get(last)

    def wait_for(self, name: str) -> str | None:
        """Waits for the value of a key; None if it does not come in time."""
        return self.wait_for_key(self._key(name))

    def wait_for_key(self, key: str) -> str | None:
        """Waits for the value of a key that may not belong to the meeting."""
        with self.patience.waiting() as left:
            while True:
                with self.answered():
                    found = self._service.get(key, min(left(), _SILENCE_SECONDS))
                if found is not None or left() <= 0:
                    return found

    @contextmanager
    def answered(self) -> Iterator[None]:
        """For calls of the service: it becomes an error if it gives no answer, or is gone."""
        try:
            yield
        except TimeoutError as error:
            self._is_silent = True
            what = f"{self._what}: process 0 is late: {error}"
            raise BarrierTimeoutError(what, (0,)) from error
        except ConnectionError as error:
            self._is_silent = True
            raise ProcessError(f"{self._what}: {error}", (0,)) from error

    @property
    def _answer_seconds(self) -> float:
        if self._is_silent:
            return _ANOTHER_TRY_SECONDS
        return min(self.patience.for_farewell, _SILENCE_SECONDS)

    @property
    def _service(self) -> Service:
        assert self._given is not None
        return self._given

    def _key(self, name: str) -> str:
        return f"{ROOT}/{self.number}/{name}"

    def late(self, processes: Sequence[int], *, unknown: bool = False) -> BarrierTimeoutError:
        """The error that processes did not come in time.

        Args:
          unknown: whether process 0 may have committed all the same.
        """
        what = f"did not arrive within {self.patience.seconds:g} s"
        if unknown:
            what += ". All had written their shards; "
            what += "it is not known whether the checkpoint was committed"
        return self._missing(processes, what)

    def lost(self, processes: Sequence[int]) -> BarrierTimeoutError:
        """The error that processes have died or are stopped."""
        return self._missing(processes, "gave no sign of life: it has died or is stopped")

    def _missing(self, processes: Sequence[int], what: str) -> BarrierTimeoutError:
        names = ", ".join(map(str, processes))
        noun = "process" if len(processes) == 1 else "processes"
        return BarrierTimeoutError(
            f"{self._what}: {noun} {names} of {self._count} {what}", tuple(processes)
        )
