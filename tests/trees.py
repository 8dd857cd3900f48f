"""One tree of known values, laid out on any number of processes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# By name: shape of the mesh, and its axes. There are eight devices, whoever they belong to.
LAYOUTS = {
    "4x2": ((4, 2), ("a", "b")),
    "2x4": ((2, 4), ("a", "b")),
    "8": ((8, 1), ("a", "b")),
}


def contents():
    """The values as numpy has them."""
    chance = np.random.default_rng(0)
    bits = chance.integers(0, 2**32, (64, 16), np.uint32)
    return {
        "both": chance.normal(size=(64, 48)).astype(np.float32),
        "rows": bits.view(np.float32),  # NaNs with payloads among them
        "columns": chance.normal(size=(8, 40)).astype(jnp.bfloat16),
        "partly": chance.integers(0, 100, (16, 8)),
        "replicated": chance.normal(size=(5, 7)).astype(np.float16),
        "large": chance.normal(size=(520, 1024)).astype(np.float32),
        "large2": chance.normal(size=(1030, 512)).astype(np.float32),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 8), np.int8),
    }


SPECS = {
    "both": P("a", "b"),
    "rows": P(("a", "b")),
    "columns": P(None, "b"),
    "partly": P("a"),
    "empty": P(None, "b"),
}


def placed_tree(shape, axes, abstract=False):
    """The values on a mesh; host-local ones beside them."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), axes)
    arrays = {}
    for name, data in contents().items():
        sharding = NamedSharding(mesh, SPECS.get(name, P()))
        with jax.enable_x64(True):
            if abstract:
                arrays[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
            else:
                arrays[name] = jax.make_array_from_callback(
                    data.shape, sharding, lambda index, data=data: data[index]
                )
    own = {"local": jnp.arange(5.0), "numpy": np.arange(6), "step": 7, "name": "run", "none": None}
    if abstract:
        own = {**own, "local": jnp.zeros(5), "numpy": np.zeros(6, int), "step": 0, "name": ""}
    return {"arrays": arrays, "own": own}


def differences(tree, shape, axes):
    """Where this process's part of a tree is not bit for bit what it should be."""
    expected = placed_tree(shape, axes, abstract=True)["arrays"]
    found = []
    for name, data in contents().items():
        array = tree["arrays"][name]
        if (array.shape, array.dtype) != (data.shape, data.dtype):
            found.append(f"{name}: {array.dtype}{array.shape}")
        if array.sharding != expected[name].sharding:
            found.append(f"{name}: {array.sharding}")
        for shard in array.addressable_shards:
            if np.asarray(shard.data).tobytes() != data[shard.index].tobytes():
                found.append(f"{name}: {shard.index}")
    own = placed_tree(shape, axes)["own"]
    for name in own:
        if not np.array_equal(tree["own"][name], own[name]):
            found.append(f"own/{name}: {tree['own'][name]}")
    return found
