"""Objects that can be tracked, and how the object graph sees them.

Importing any module of this package adds the views of plain values and pytrees. The order of the
fallbacks matters: a train state is registered with JAX, too, and must not be taken for a mere
pytree, and an object that gives its state may be a pytree, too. The views of Flax's types follow
when a program first uses them, because importing Flax takes longer than importing all of this
package.
"""

from ckpt_jax.objects.boxes import box_view
from ckpt_jax.objects.optax_states import train_state_view
from ckpt_jax.objects.pytrees import pytree_view
from ckpt_jax.objects.stateful import stateful_view
from ckpt_jax.objects.views import add_fallback, add_views_of_package

for _find in (box_view, train_state_view, pytree_view, stateful_view):
    add_fallback(_find)
add_views_of_package("flax.nnx", "ckpt_jax.objects.nnx")
add_views_of_package("flax.linen", "ckpt_jax.objects.linen")
