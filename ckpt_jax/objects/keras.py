"""Variables of Keras 3: mutable boxes for one array, whatever its backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from keras.src.backend import Variable, convert_to_numpy

from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.objects.views import View, add_view


class KerasVariableView(View):
    """A variable: arrays of JAX as they are, and those of other backends as arrays of numpy."""

    container = "leaf"
    identity = True
    mutable = True

    def values(self, obj: Any) -> Mapping[str, Any]:
        value = obj.value
        is_ours = isinstance(value, jax.Array)
        return {VARIABLE_VALUE: value if is_ours else np.asarray(convert_to_numpy(value))}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        obj.assign(values[VARIABLE_VALUE])
        return obj


add_view(Variable, KerasVariableView())
