"""What can be tracked, and how the object graph sees it.

Importing any module of this package registers the views of plain values and pytrees. The order
matters: nnx modules and train states are registered with JAX as well, and must not be taken for
mere pytrees.
"""

from ckpt_jax.trackable.lazy_flax import flax_view
from ckpt_jax.trackable.optimizer import train_state_view
from ckpt_jax.trackable.pytree import pytree_view
from ckpt_jax.trackable.view import add_kind

for _kind_view in (flax_view, train_state_view, pytree_view):
    add_kind(_kind_view)
