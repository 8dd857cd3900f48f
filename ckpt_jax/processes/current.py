"""The processes of this program: from `jax.distributed`, or simulated by a test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

from ckpt_jax.processes.meeting import Processes
from ckpt_jax.processes.roll_call import Rhythm, RollCalls, answer
from ckpt_jax.processes.service import CoordinationService
from ckpt_jax.values.jax_internals import heartbeat_seconds, service_client

_BEFORE_THE_ABORT = 0.6  # of the time after which JAX ends all processes because of a dead one
_simulated: ContextVar[Processes | None] = ContextVar("ckpt_jax_processes", default=None)
# The client of JAX's service, and the processes that share it. They are kept, because `Processes`
# counts meetings.
_present: tuple[Any, Processes] | None = None
_present_lock = threading.Lock()


def current() -> Processes:
    """The processes of this program, as this process sees them.

    Only public functions and methods call this, and pass the processes on as an argument.

    Raises:
      RuntimeError: JAX has several processes, but no coordination service.
    """
    global _present
    simulated = _simulated.get()
    if simulated is not None:
        return simulated
    count = jax.process_count()
    client = service_client() if count > 1 else None
    if count > 1 and client is None:
        raise RuntimeError(
            f"there are {count} processes, but no coordination service to agree on a save: "
            "jax.distributed.initialize() was not called, or jax.distributed.shutdown() was"
        )
    with _present_lock:
        if _present is None or _present[0] is not client:
            _present = client, Processes() if client is None else _joined(client, count)
        return _present[1]


def _joined(client: Any, count: int) -> Processes:
    """The processes that share a service. From now on, this one gives signs of life."""
    service, index = CoordinationService(client), jax.process_index()
    rhythm = Rhythm.of(count, _BEFORE_THE_ABORT * heartbeat_seconds())
    if index:
        answer(service, index, rhythm)
        return Processes(index, count, service)
    return Processes(index, count, service, RollCalls(service, rhythm))


@contextlib.contextmanager
def simulated(processes: Processes) -> Iterator[None]:
    """Lets the current thread act as one of several processes while the block runs."""
    token = _simulated.set(processes)
    try:
        yield
    finally:
        _simulated.reset(token)
