"""Context: the surroundings of a save or a restore, as one argument.

Public functions and methods take them from the running process, and pass them on. So every stage
below can also run in memory, as one of several simulated processes, or with another clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckpt_jax.metrics import METER, Meter
from ckpt_jax.processes.current import current
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.store.forks import require_not_forked
from ckpt_jax.store.storage import Storage, storage_of


@dataclass(frozen=True, slots=True)
class Context:
    """The surroundings of a save or a restore.

    Attributes:
      processes: of the program.
      storage_of: gives the storage in which a path lies.
      meter: measures saves and restores with a clock.
    """

    processes: Processes
    storage_of: Callable[[str], Storage] = storage_of
    meter: Meter = METER


def current_context() -> Context:
    """The surroundings of this process.

    Raises:
      RuntimeError: JAX has several processes, but no coordination service; or this process was
        forked after its parent had saved or restored.
    """
    require_not_forked()  # before it would wait for other processes, or for devices
    return Context(current())
