"""Boards: the keys of one meeting at the coordination service.

Whatever goes wrong with the service becomes an error that names the meeting and process 0, in which
the service runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_jax.errors import BarrierTimeoutError, CheckpointError, ProcessError
from ckpt_jax.processes.service import Service

ROOT = "ckpt_jax"


@dataclass(slots=True)
class Board:
    """The keys of one meeting.

    Attributes:
      service: holds the keys of all meetings. None if there is one process, which needs no board.
      number: of the meeting.
      what: names it in errors.
      count: of the processes.
      seconds: the longest wait for other processes.
    """

    service: Service | None
    number: int
    what: str
    count: int
    seconds: float

    def set(self, name: str, value: str, seconds: float | None = None) -> bool:
        """Sets a key. Returns False, and changes nothing, if it has a value."""
        try:
            return self._service.set(self._key(name), value, seconds or self.seconds)
        except (TimeoutError, ConnectionError) as error:
            raise self.unanswered(error) from error

    def wait_for(self, name: str) -> str | None:
        """Waits for the value of a key; None if it does not come in time."""
        try:
            return self._service.get(self._key(name), self.seconds)
        except (TimeoutError, ConnectionError) as error:
            raise self.unanswered(error) from error

    def values(self, folder: str = "", seconds: float | None = None) -> dict[str, str]:
        """The keys that have a value, below a folder that ends in "/"; by default all."""
        prefix = self._key(folder)
        try:
            found = self._service.list(prefix, seconds or self.seconds)
        except (TimeoutError, ConnectionError) as error:
            raise self.unanswered(error) from error
        return {key.removeprefix(prefix): value for key, value in found.items()}

    @property
    def _service(self) -> Service:
        assert self.service is not None
        return self.service

    def _key(self, name: str) -> str:
        return f"{ROOT}/{self.number}/{name}"

    def late(self, processes: Sequence[int], *, unknown: bool = False) -> BarrierTimeoutError:
        """The error that processes did not come in time.

        Args:
          unknown: whether process 0 may have committed all the same.
        """
        names = ", ".join(map(str, processes))
        noun = "process" if len(processes) == 1 else "processes"
        message = f"{noun} {names} of {self.count} did not arrive within {self.seconds:g} s"
        if unknown:
            message += ". All had written their shards; "
            message += "it is not known whether the checkpoint was committed"
        return BarrierTimeoutError(f"{self.what}: {message}", tuple(processes))

    def unanswered(self, error: OSError) -> CheckpointError:
        """The error that the service gave no answer, or is gone."""
        if isinstance(error, TimeoutError):
            return BarrierTimeoutError(f"{self.what}: process 0 is late: {error}", (0,))
        return ProcessError(f"{self.what}: {error}", (0,))
