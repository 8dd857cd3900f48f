"""Replicas: each byte is read by one process, and the devices pass it on to those that need it.

If an array is replicated, several processes would read the same bytes. If the same array is also
split along the mesh axes that its sharding leaves unused, every slice exists once. Then each
process reads a part, and gathering the parts over the devices gives the array that is wanted.

The mesh has to allow this: all parts have to be of equal size. The gathering moves unsigned
integers, so that no conversion changes a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ckpt_jax.graph.boxes import Shape
from ckpt_jax.values.host import held_boxes

MIN_NBYTES = 1 << 20  # reading a smaller array is faster than passing it on


@lru_cache(maxsize=4096)
def parted(
    sharding: jax.sharding.Sharding, shape: Shape, dtype: np.dtype
) -> jax.sharding.NamedSharding | None:
    """A sharding in which every slice exists once, and from which `gather` makes `sharding`.

    Returns:
      None if the array is small, if no two processes need the same slice, or if the unused axes
      of the mesh divide none of its dimensions.
    """
    if not isinstance(sharding, NamedSharding) or not _is_gathered(shape, dtype):
        return None
    if all(len(holders) == 1 for _, holders in held_boxes(sharding, shape)):
        return None
    mesh = sharding.mesh
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    used = [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]
    taken = {axis for axes in used for axis in axes}
    free = tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in taken)
    choices = [free, *[(axis,) for axis in free]] if len(free) > 1 else [free]
    for chosen in choices:
        for dimension, (length, axes) in enumerate(zip(shape, used, strict=True)):
            parts = [(*axes, *chosen) if d == dimension else own for d, own in enumerate(used)]
            count = int(np.prod([mesh.shape[axis] for axis in parts[dimension]]))
            if length % count == 0:
                layout = PartitionSpec(*[part or None for part in parts])
                return NamedSharding(mesh, layout, memory_kind=sharding.memory_kind)
    return None


def _is_gathered(shape: Shape, dtype: np.dtype) -> bool:
    plain = dtype.kind in "iuf" or dtype.name == "bfloat16" or dtype.name.startswith("float8")
    return plain and int(np.prod(shape)) * dtype.itemsize >= MIN_NBYTES


def gather(
    arrays: Sequence[jax.Array], shardings: Sequence[jax.sharding.Sharding]
) -> list[jax.Array]:
    """The arrays on their shardings. All processes have to call it, with the same arrays."""
    layouts = [array.sharding for array in arrays]

    def move(parts: list[jax.Array]) -> list[jax.Array]:
        moved = []
        for part, layout, sharding in zip(parts, layouts, shardings, strict=True):
            bits = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
            plain = jax.lax.bitcast_convert_type(part, bits)
            plain = jax.lax.with_sharding_constraint(plain, layout)
            plain = jax.lax.with_sharding_constraint(plain, sharding)
            moved.append(jax.lax.bitcast_convert_type(plain, part.dtype))
        return moved

    with jax.enable_x64(True):
        return jax.jit(move, out_shardings=list(shardings))(list(arrays))
