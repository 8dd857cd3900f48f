"""Threads that talk to the coordination service in the background.

A thread that is inside of JAX's client when the interpreter ends makes the process abort. So these
threads end before that: the program's exit closes them, and waits for the call that they are in.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

from ckpt_jax.store.workers import started

LONGEST_CALL_SECONDS = 1.0  # of the service, in such a thread
_EXIT_SECONDS = 3.0


class ServiceThread:
    """A thread that runs until it is closed.

    Args:
      work: is given an event, which is set when the thread is to end. No call of the service may
        take longer than `LONGEST_CALL_SECONDS`.
      name: of the thread.
    """

    def __init__(self, work: Callable[[threading.Event], None], name: str):
        self._is_closed = threading.Event()
        self._home = os.getpid()
        self._thread = threading.Thread(target=work, args=[self._is_closed], name=name, daemon=True)
        if started(self._thread):
            _all.difference_update([each for each in [*_all] if not each._thread.is_alive()])
            _all.add(self)

    def close(self) -> None:
        """Lets the thread end soon."""
        self._is_closed.set()

    def wait(self, seconds: float) -> None:
        """Waits until the thread has ended. A forked child does not have it."""
        if os.getpid() == self._home:
            self._thread.join(seconds)


_all: set[ServiceThread] = set()


@atexit.register
def _close_all() -> None:
    threads = [*_all]
    for thread in threads:
        thread.close()
    for thread in threads:
        thread.wait(_EXIT_SECONDS)
