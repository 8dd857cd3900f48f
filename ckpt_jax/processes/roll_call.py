"""Roll calls: which processes are alive.

JAX ends all processes if one of them has died or is stopped, after its heartbeats have been missing
for a while. The error that names the process has to come before that. So if process 0 has waited
for others for some seconds, it asks them for a sign of life. In each of them a thread looks for
such questions every few seconds, and answers, whatever else the process is doing. A process that
has been heard of before, and does not answer, is *lost*. A process that lives may take its time.

The keys, below "ckpt_jax/roll/":

    asked/n/who    the n-th roll call: the processes that are asked; until the answers were read
    here/n/k       the answer of process k

Process 0 needs no roll call: the service runs in it, and gives no answer if it is stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckpt_jax.processes.moment import numbers_in, ranges
from ckpt_jax.processes.service import Service
from ckpt_jax.processes.threads import LONGEST_CALL_SECONDS, ServiceThread

_ROLL = "ckpt_jax/roll"
_SERVICE_SECONDS = 5.0  # for an answer of the service
_KEPT = 8  # roll calls at a time, of saves in several backgrounds


@dataclass(frozen=True, slots=True)
class Rhythm:
    """When process 0 asks for signs of life.

    Attributes:
      listen_seconds: how often the others look whether they are asked.
      answer_seconds: how long process 0 waits for answers.
      unknown_seconds: how long a save waits for a process of which nothing was ever heard.
      ask_seconds: how long process 0 waits for others before it asks, at first and again.
    """

    listen_seconds: float
    answer_seconds: float
    unknown_seconds: float
    ask_seconds: float = 3.0

    @classmethod
    def of(cls, count: int, unknown_seconds: float) -> Rhythm:
        """The rhythm of `count` processes. Very many of them look less often, because process 0
        serves all of them."""
        listen_seconds = 4.0 + count / 500
        return cls(listen_seconds, 2 * listen_seconds + 4.0, unknown_seconds)


@dataclass(eq=False)
class RollCalls:
    """The roll calls that process 0 holds.

    Attributes:
      service: through which it asks.
      rhythm: when it asks.
      clock: returns seconds.
      known: the processes that have been heard of.
    """

    service: Service
    rhythm: Rhythm
    clock: Callable[[], float] = time.monotonic
    known: set[int] = field(default_factory=set)
    _next: int = 0

    def during_a_wait(self, is_save: bool) -> Callable[[Sequence[int]], list[int]]:
        """A function that says which of the processes that process 0 waits for are lost. It is to
        be called again and again during the wait, and asks them when it is time to.

        Args:
          is_save: whether a process of which nothing was ever heard counts as lost after some time.
            If a program begins, it may just be late.
        """
        begun = self.clock()
        asks_at = begun + self.rhythm.ask_seconds
        number: int | None = None

        def lost(missing: Sequence[int]) -> list[int]:
            nonlocal asks_at, number
            now = self.clock()
            if now < asks_at:
                return []
            if number is None:
                number = self._ask(missing)
                asks_at = now + self.rhythm.answer_seconds
                return []
            present = self._answers(number)
            self.known |= present
            number, asks_at = None, now + self.rhythm.ask_seconds
            is_long = is_save and now - begun >= self.rhythm.unknown_seconds
            return [k for k in missing if k not in present and (is_long or k in self.known)]

        return lost

    def _ask(self, processes: Sequence[int]) -> int:
        number, self._next = self._next, self._next + 1
        self._forget(number - _KEPT)  # if its answers were never read
        self.service.set(f"{_ROLL}/asked/{number}/who", ranges(processes), _SERVICE_SECONDS)
        return number

    def _answers(self, number: int) -> set[int]:
        prefix = f"{_ROLL}/here/{number}/"
        found = self.service.list(prefix, _SERVICE_SECONDS)
        self._forget(number)
        return {int(key.removeprefix(prefix)) for key in found}

    def _forget(self, number: int) -> None:
        for folder in ("asked", "here"):
            self.service.delete(f"{_ROLL}/{folder}/{number}/", _SERVICE_SECONDS)


def answer(service: Service, index: int, rhythm: Rhythm) -> ServiceThread:
    """Starts the thread of another process than 0 that answers roll calls.

    Args:
      service: through which it answers.
      index: of the process.
      rhythm: says how often it looks whether it is asked.
    """
    prefix = f"{_ROLL}/asked/"

    def listen(is_closed: threading.Event) -> None:
        answered: set[str] = set()
        while not is_closed.wait(rhythm.listen_seconds):
            try:
                asked = service.list(prefix, LONGEST_CALL_SECONDS)
                for key, processes in asked.items():
                    if key not in answered and index in numbers_in(processes):
                        number = key.removeprefix(prefix).partition("/")[0]
                        service.set(f"{_ROLL}/here/{number}/{index}", "", LONGEST_CALL_SECONDS)
                answered = {*asked}
            except TimeoutError:  # the service hangs; it may come back
                continue
            except ConnectionError:  # it is gone, and so is process 0
                return

    return ServiceThread(listen, "ckpt-roll")
