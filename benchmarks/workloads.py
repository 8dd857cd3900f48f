"""What is saved and restored: trees of random arrays, and the meshes that they lie on.

A workload says how many arrays of which shape; its values are made from a fixed seed, as host
arrays named "layer_00000/query" and so on, and are put on devices anew for every measurement,
because arrays that were read once keep the copy that was made for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Host = Mapping[str, np.ndarray]

PARTS = ("query", "key", "value", "output")


@dataclass(frozen=True, slots=True)
class Workload:
    """`leaves` float32 arrays of `shape`."""

    name: str
    leaves: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.leaves * math.prod(self.shape) * 4

    def scaled(self, size: float) -> Workload:
        """The same with `size` times as many arrays, at least one."""
        return replace(self, leaves=max(1, round(self.leaves * size)))

    def __str__(self) -> str:
        return f"{self.leaves:,} x {self.shape} float32, {self.nbytes / 1e6:,.0f} MB"


WORKLOADS = (
    Workload("wide", 96, (1024, 2560)),
    Workload("one-device", 96, (1024, 2560)),
    Workload("many-1k", 1_000, (64, 64)),
    Workload("many-10k", 10_000, (16, 16)),
)


def leaf_workloads(most: int) -> Iterator[Workload]:
    """Ever more arrays of 32 bytes: 100, 1,000, ... up to `most`."""
    leaves = 100
    while leaves <= most:
        yield Workload(f"leaves-{leaves}", leaves, (8,))
        leaves *= 10


def host_values(workload: Workload) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed=0)
    return {
        f"layer_{i // len(PARTS):05d}/{PARTS[i % len(PARTS)]}": random.standard_normal(
            workload.shape, np.float32
        )
        for i in range(workload.leaves)
    }


def mesh_sharding() -> Sharding:
    """Rows in four, columns in two: the devices as ("data", "model") = (4, 2)."""
    return _sharding(np.array(jax.devices()).reshape(4, 2))


def swapped_sharding() -> Sharding:
    """Rows in two, columns in four: the same devices with the mesh's axes swapped, (2, 4).

    No shard is a shard of `mesh_sharding`: every one is put together from two.
    """
    return _sharding(np.array(jax.devices()).reshape(4, 2).T)


def sharding_of(workload: Workload) -> Sharding:
    """Where the arrays of a workload lie."""
    return one_device() if workload.name == "one-device" else mesh_sharding()


def one_device() -> Sharding:
    return SingleDeviceSharding(jax.devices()[0])


def _sharding(devices: np.ndarray) -> Sharding:
    return NamedSharding(Mesh(devices, ("data", "model")), PartitionSpec("data", "model"))


def nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        outer, inner = name.split("/")
        tree.setdefault(outer, {})[inner] = value
    return tree


def on_devices(host: Host, sharding: Sharding) -> dict[str, Any]:
    """The values as a nested tree of new jax.Arrays."""
    arrays = jax.device_put(list(host.values()), sharding, may_alias=False)
    return nested(dict(zip(host, jax.block_until_ready(arrays), strict=True)))


def abstract(host: Host, sharding: Sharding) -> dict[str, Any]:
    """The same tree of `jax.ShapeDtypeStruct`s: a target to restore onto `sharding`."""
    return nested(
        {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
            for name, value in host.items()
        }
    )


def check_values(found: Mapping[str, Any], host: Host) -> None:
    """Raises AssertionError unless `found` holds exactly the values of `host`."""
    assert found.keys() == host.keys(), sorted(found.keys() ^ host.keys())[:5]
    for name, value in host.items():
        assert np.array_equal(np.asarray(found[name]), value), f"{name} has other values"


def flat(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{outer}/{inner}": x for outer, group in tree.items() for inner, x in group.items()}
