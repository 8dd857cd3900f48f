"""Workers: threads for saves, which work even while the program ends.

A save may be running, or begin, when the interpreter is already ending: in the background, in
an `atexit` handler, or on a thread that outlives the main thread. At some point, which depends on
the release of Python, pools no longer accept work and threads can no longer be started. Therefore
workers are started with their pool, before there is work for them. If that is not possible, the
caller does the work itself.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def cores() -> int:
    """The number of processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def spare_nbytes() -> int:
    """The bytes of host memory that a save or restore may use besides the arrays. They depend on
    the number of cores and the free memory."""
    wanted = cores() * _NBYTES_PER_CORE
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # the system does not tell
        free = _LEAST_NBYTES
    return max(_LEAST_NBYTES, min(wanted, free // 8))


_NBYTES_PER_CORE = 32 << 20
_LEAST_NBYTES = 64 << 20


def started(thread: threading.Thread) -> bool:
    """Starts a thread. Returns whether that was possible."""
    if sys.is_finalizing():
        return False
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending, or there are too many threads
        return False
    return True


class Workers(Executor):
    """An executor that starts all its threads at once. If it cannot, it runs jobs in the caller.

    The interpreter does not wait for these threads when it ends; the code that needs their results
    has to wait.

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
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        if self._threads:
            self._jobs.put(job)
        else:
            job()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads after all submitted work, which is never cancelled."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
