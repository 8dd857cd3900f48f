"""Variables: mutable boxes for arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.objects.views import View, add_view


class Variable:
    """A mutable box for one array.

    Args:
      value: an array, or a `jax.ShapeDtypeStruct` for a variable that will be restored.

    Source: what `tf.Variable` is in a checkpoint.

    Example:
      >>> import ckpt_jax as ckpt
      >>> v = ckpt.Variable(jnp.zeros(2))
      >>> v.assign(v.value + 1).value
      Array([1., 1.], dtype=float32)
    """

    def __init__(self, value: Any):
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            value = jnp.asarray(value)
        self._value = value

    @property
    def value(self) -> Any:
        """The array in the box."""
        return self._value

    def assign(self, value: Any) -> Variable:
        """Replaces the array by one of the same shape and dtype; returns the variable.

        Raises:
          ValueError: the shape or dtype differs.
        """
        value = value if hasattr(value, "dtype") else jnp.asarray(value, self.dtype)
        if (value.shape, value.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"expected {self.dtype}{list(self.shape)}, got {value.dtype}{list(value.shape)}"
            )
        self._value = value
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self._value.dtype

    def __repr__(self) -> str:
        return f"Variable({self._value!r})"


class VariableView(View):
    """The array in the box is the variable's own value."""

    container = "leaf"
    identity = True
    mutable = True

    def values(self, obj: Variable) -> Mapping[str, Any]:
        return {VARIABLE_VALUE: obj._value}

    def assign(self, obj: Variable, values: Mapping[str, Any]) -> Any:
        obj._value = values[VARIABLE_VALUE]
        return obj


add_view(Variable, VariableView())
