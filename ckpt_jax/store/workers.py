"""Workers: threads that a save needs, which it gets at the end of the program, too.

A save may be under way, or begin, when the interpreter is already ending: in the background, in
an `atexit` handler, on a thread that outlives the main one. From some moment on, which differs
between releases of Python, no pool takes work and no thread can be started. So workers are
started with their pool, before there is work for them, and where that is not possible the
caller does the work itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def started(thread: threading.Thread) -> bool:
    """Starts a thread; says whether that was possible."""
    if sys.is_finalizing():
        return False
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending, or there are too many threads
        return False
    return True


class Workers(Executor):
    """An executor whose threads are there from the start, or else its caller's is.

    The interpreter does not wait for them when it ends: who waits for their work does.

    >>> with Workers(2, "adder") as workers:
    ...     list(workers.map(sum, [[1, 2], [3, 4]]))
    [3, 7]
    """

    def __init__(self, count: int, name: str):
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        wanted = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(count)]
        self._threads = [thread for thread in wanted if started(thread)]

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # raised to whoever asks for the result
                future.set_exception(error)

        if self._threads:
            self._jobs.put(job)
        else:
            job()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads after all that was submitted, which is never cancelled."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
