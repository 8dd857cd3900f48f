"""JAX's internals: everything that this package uses of them, in one place.

Three functions and a key use what has no public interface. A test pins what they expect of JAX, so
that a release of JAX that moves one of these internals fails there and not in somebody's training
run.

place_shards      places all shards of an array in one call, in a third of the time that
                  `jax.make_array_from_single_device_arrays` takes, which is used if it is missing
held_shards       the addressable shards of an array, without making a view of each;
                  uses `addressable_data` if the internal attribute is missing
service_client    the client of the coordination service that `jax.distributed` started:
                  keys and values that all processes share, without touching a device
PREEMPTION_NOTICE the key that JAX's preemption service sets there when a process has had SIGTERM
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

try:
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    place_shards: Callable[..., jax.Array] | None = xla_client.batched_device_put
except (ImportError, AttributeError):
    place_shards = None

try:
    from jax._src import distributed as _distributed
except ImportError:
    _distributed = None

PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def held_shards(array: jax.Array) -> Sequence[jax.Array]:
    """The addressable shards, as single-device arrays, in the order of the sharding."""
    shards = getattr(array, "_arrays", None)
    if shards is None or array.is_deleted():
        numbers = range(len(array.sharding.addressable_devices))
        return [array.addressable_data(number) for number in numbers]
    return shards


def heartbeat_seconds() -> float:
    """After how many seconds without a sign of life from one process JAX ends all of them.

    JAX keeps no record of what `jax.distributed.initialize` was given, so this is its default.
    """
    parameters = inspect.signature(jax.distributed.initialize).parameters
    parameter = parameters.get("heartbeat_timeout_seconds")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else 100.0


def service_client() -> Any | None:
    """The coordination service's client; None if `jax.distributed` was not initialized.

    This package uses four methods: `key_value_set(key, value)`, which fails with "ALREADY_EXISTS"
    if there is a value; `blocking_key_value_get(key, timeout_ms)`, which fails with
    "DEADLINE_EXCEEDED"; `key_value_dir_get(prefix)`, which returns pairs of key and value; and
    `key_value_delete(prefix)`, which removes everything below a prefix that ends in "/".
    """
    state = getattr(_distributed, "global_state", None)
    return getattr(state, "client", None)
