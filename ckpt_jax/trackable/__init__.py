"""What can be tracked, and how the object graph sees it.

Importing any module of this package registers the views of plain values and pytrees, after
the hook that loads Flax's: nnx modules are registered with JAX as well, and must not be taken
for mere pytrees.
"""

from ckpt_jax.trackable import lazy_flax, pytree

__all__ = ["lazy_flax", "pytree"]
