"""What can be tracked, and how the object graph sees it.

Importing any module of this package registers the views of plain values and pytrees. The order
matters: train states are registered with JAX as well, and must not be taken for mere pytrees.
"""

from ckpt_jax.objects.lazy_flax import load_flax_views
from ckpt_jax.objects.optax_states import train_state_view
from ckpt_jax.objects.pytrees import pytree_view
from ckpt_jax.objects.views import add_kind, add_loader

add_loader(load_flax_views)
for _kind_view in (train_state_view, pytree_view):
    add_kind(_kind_view)
