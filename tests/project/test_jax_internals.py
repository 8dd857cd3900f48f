"""What this package expects of JAX's internals; see `ckpt_jax.values.jax_internals`.

A release of JAX that moves one of them fails here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from real_processes import outputs_of

from ckpt_jax.values import jax_internals


def test_the_shards_of_an_array_are_placed_in_one_call(mesh8):
    assert jax_internals.place_shards is not None
    sharding = NamedSharding(mesh8, P("data"))
    data = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    aval = jax.core.ShapedArray(data.shape, data.dtype)
    devices = list(sharding.addressable_devices_indices_map(data.shape))
    array = jax_internals.place_shards(aval, sharding, list(data[:, None]), devices)
    assert array.sharding == sharding
    assert np.array_equal(array, data)


def test_an_array_lists_its_shards_in_the_order_of_the_sharding(mesh8):
    sharding = NamedSharding(mesh8, P("data"))
    array = jax.device_put(jnp.arange(8), sharding)
    assert array._arrays is not None
    shards = jax_internals.held_shards(array)
    assert [int(shard[0]) for shard in shards] == list(range(8))
    devices = list(sharding.addressable_devices_indices_map(array.shape))
    assert [shard.devices() for shard in shards] == [{device} for device in devices]


def test_a_single_process_has_no_service():
    assert jax_internals.service_client() is None
    assert jax_internals._distributed is not None
    assert jax_internals._distributed.global_state.client is None


SERVICE = """
from ckpt_jax.values.jax_internals import service_client

def fails_with(name, function, *arguments):
    try:
        function(*arguments)
    except jax.errors.JaxRuntimeError as error:
        return name in str(error)

client = service_client()
if index == 0:
    client.key_value_set("a/b/c", "one")
    client.key_value_set("a/b/d", "two")
print(client.blocking_key_value_get("a/b/d", 10_000))
print(sorted(client.key_value_dir_get("a/b/")))
print(fails_with("ALREADY_EXISTS", client.key_value_set, "a/b/c", "three"))
print(fails_with("DEADLINE_EXCEEDED", client.blocking_key_value_get, "a/b/e", 100))
client.key_value_set(f"done/{index}", "")
client.blocking_key_value_get(f"done/{1 - index}", 10_000)
if index == 0:
    client.key_value_delete("a/b/")
    print(client.key_value_dir_get("a/b/"))
"""


def test_the_service_keeps_keys_and_values_and_refuses_a_second_one():
    first, other = outputs_of(SERVICE, 2, 1)
    expected = "two\n[('a/b/c', 'one'), ('a/b/d', 'two')]\nTrue\nTrue\n"
    assert first == f"{expected}[]\n"
    assert other == expected


NOTICE = """
import signal
from ckpt_jax.values.jax_internals import PREEMPTION_NOTICE, service_client

client = service_client()
if index == 1:
    os.kill(os.getpid(), signal.SIGTERM)
print(bool(client.blocking_key_value_get(PREEMPTION_NOTICE, 60_000)), flush=True)
if index == 1:
    client.key_value_set("done", "")
else:
    client.blocking_key_value_get("done", 60_000)
os._exit(0)  # after a notice, JAX's own end sometimes hangs on a busy machine
"""


def test_a_preemption_notice_is_a_key_that_all_processes_see():
    first, other = outputs_of(NOTICE, 2, 1)
    assert first.endswith("True\n")
    assert other.endswith("True\n")


def test_the_time_after_which_jax_ends_all_processes_is_known():
    assert 10 <= jax_internals.heartbeat_seconds() <= 1000
