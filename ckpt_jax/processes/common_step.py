"""Agreeing on a step: processes that pass the same steps choose one at which all of them stop.

Any process may ask for it at any time. In each process a thread waits until one does. The thread
then says how many steps its process has passed, and holds the process at its next step until all
processes have said so. The step after the farthest is the common one: no process has passed it,
and all will come to it. Steps are counted here; how the program numbers them does not matter.

Only these threads wait for each other. A program may therefore wait in the middle of a step for
devices of another process, and a step costs no communication as long as no process wants to stop.
A process is held for no longer than it takes to notice that another one has died.
The keys of the n-th agreement, below "ckpt_jax/steps/n/":

    asked       set if a process has asked
    passed/k    how many steps process k has passed

A process that has left its loop also sets its `passed/k`, and will pass no other step. A process
that asks afterwards then need not wait for it, but finds no step to which all come.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from queue import Empty, SimpleQueue

from ckpt_jax.errors import BarrierTimeoutError, ProcessError
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.processes.service import Service
from ckpt_jax.processes.threads import LONGEST_CALL_SECONDS, ServiceThread

_log = logging.getLogger("ckpt_jax")
_ANSWER_SECONDS = 15.0  # the threads answer at once, if their processes are there


class CommonStep:
    """One agreement. All processes make it, in the same order as their other agreements.

    Args:
      processes: the processes that agree; more than one.
      answer_seconds: the longest wait for all other processes, once a process has asked.
      listen_seconds: how long to wait for a process to ask, before looking whether this one has
        left its loop.
    """

    def __init__(
        self,
        processes: Processes,
        answer_seconds: float = _ANSWER_SECONDS,
        listen_seconds: float = LONGEST_CALL_SECONDS,
    ):
        assert processes.service is not None
        self._service: Service = processes.service
        self._index, self._count = processes.index, processes.count
        self._key = f"ckpt_jax/steps/{processes.next_agreement()}"
        self._patience = processes.patience(answer_seconds)
        self._listen_seconds = listen_seconds
        # Very many processes listen with pauses, because process 0 serves all of them.
        self._pause_seconds = processes.count / 500
        self._wanted: SimpleQueue[bool] = SimpleQueue()  # a signal handler may put into it
        # Held during the agreement, so that this process passes no step meanwhile.
        self._agreeing = threading.Lock()
        self._passed = 0
        self._common: int | None = None
        self._error: BarrierTimeoutError | ProcessError | None = None
        self._threads = [
            ServiceThread(work, "ckpt-agree")
            for work in (self._ask_when_wanted, self._agree_when_asked)
        ]

    def ask(self) -> None:
        """Asks all processes to stop. Any thread may call it, and so may a signal handler."""
        self._wanted.put(True)

    def close(self) -> None:
        """Says that this process has left its loop. The threads end some time later."""
        for thread in self._threads:
            thread.close()
        self._wanted.put(False)

    def is_passed(self) -> bool:
        """Says that this process has passed a step.

        Returns:
          Whether it is the common step, or a later one.

        Raises:
          BarrierTimeoutError: a process has asked, but not all processes have answered.
          ProcessError: a process has asked, but the coordination service is gone.
        """
        with self._agreeing:
            if self._error is not None:
                raise self._error
            self._passed += 1
            return self._common is not None and self._passed >= self._common

    def _ask_when_wanted(self, is_closed: threading.Event) -> None:
        if not self._is_wanted(is_closed):
            return
        while True:
            try:
                self._service.set(f"{self._key}/asked", "", LONGEST_CALL_SECONDS)
                return
            except (TimeoutError, ConnectionError) as error:
                _log.error("no other process could be asked to stop: %s", error)
                if isinstance(error, ConnectionError) or is_closed.wait(LONGEST_CALL_SECONDS):
                    return

    def _is_wanted(self, is_closed: threading.Event) -> bool:
        """Waits until this process wants to ask; False if it has left its loop before that."""
        while not is_closed.is_set():
            with contextlib.suppress(Empty):
                return self._wanted.get(timeout=LONGEST_CALL_SECONDS)
        return False

    def _agree_when_asked(self, is_closed: threading.Event) -> None:
        try:
            is_asked = self._is_asked(is_closed)
        except ConnectionError as error:
            if not is_closed.is_set():
                _log.error("the processes cannot agree on a step to stop at: %s", error)
            return
        with self._agreeing:
            try:
                self._answer()
                if is_asked:
                    self._hear_all(is_closed)
            except (TimeoutError, ConnectionError) as error:
                kind = BarrierTimeoutError if isinstance(error, TimeoutError) else ProcessError
                self._error = kind(f"agreeing on a step to stop at: {error}", (0,))

    def _is_asked(self, is_closed: threading.Event) -> bool:
        """Waits for a process to ask; False if this one has left its loop before that."""
        has_warned = False
        while not is_closed.is_set():
            try:
                if self._service.get(f"{self._key}/asked", self._listen_seconds) is not None:
                    return True
                has_warned = False
            except TimeoutError as error:  # the service hangs; it may come back
                if not has_warned:
                    _log.warning("cannot hear at present whether a process asks to stop: %s", error)
                has_warned = True
            is_closed.wait(self._pause_seconds)
        return False

    def _answer(self) -> None:
        key = f"{self._key}/passed/{self._index}"
        with self._patience.waiting():
            self._service.set(key, str(self._passed), self._patience.for_farewell)

    def _hear_all(self, is_closed: threading.Event) -> None:
        prefix = f"{self._key}/passed/"
        with self._patience.waiting() as left:
            for process in range(self._count):
                while not is_closed.is_set() and left() > 0:
                    seconds = min(left(), LONGEST_CALL_SECONDS)
                    if self._service.get(f"{prefix}{process}", seconds) is not None:
                        break
            found = self._service.list(prefix, self._patience.for_farewell)
        said = {int(key.removeprefix(prefix)): int(passed) for key, passed in found.items()}
        if late := tuple(process for process in range(self._count) if process not in said):
            names = ", ".join(map(str, late))
            self._error = BarrierTimeoutError(
                f"agreeing on a step to stop at: processes {names} of {self._count} gave no answer "
                f"in {self._patience.seconds:g} s. They have died, are stopped, or do not take "
                "part",
                late,
            )
        else:
            self._common = 1 + max(said.values())
