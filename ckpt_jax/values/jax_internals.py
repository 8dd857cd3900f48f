"""JAX's internals: all that this package uses of them, in one place.

Three things have no public door. Each is looked up by name when it is needed, and
`tests/project/test_jax_internals.py` pins what is expected of it, so that a release of JAX that
moves one fails there and not in somebody's training run.

place_shards      places all shards of an array in one call, in a third of the time of
                  `jax.make_array_from_single_device_arrays`, which stands in where it is gone
held_shards       the addressable shards of an array without making a view of each;
                  `addressable_data` stands in
service_client    the client of the coordination service that `jax.distributed` started:
                  keys and values shared by all processes, without touching a device
"""

from __future__ import annotations

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


def held_shards(array: jax.Array) -> Sequence[jax.Array]:
    """The addressable shards, as single-device arrays, in the order of the sharding."""
    shards = getattr(array, "_arrays", None)
    if shards is None or array.is_deleted():
        numbers = range(len(array.sharding.addressable_devices))
        return [array.addressable_data(number) for number in numbers]
    return shards


def service_client() -> Any | None:
    """The coordination service's client; None where `jax.distributed` was not initialized.

    Used of it: `key_value_set(key, value)`, which fails with "ALREADY_EXISTS" where there is a
    value; `blocking_key_value_get(key, timeout_ms)`, which fails with "DEADLINE_EXCEEDED";
    `key_value_dir_get(prefix)`, pairs of key and value; and `key_value_delete(prefix)`, which
    removes everything below a prefix that ends in "/".
    """
    state = getattr(_distributed, "global_state", None)
    return getattr(state, "client", None)
