"""Variables of Keras and penzai: mutable boxes of other libraries.

Their types are recognised by name, so that neither library has to be there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label
from ckpt_jax.objects.views import View, view_of


class KerasVariableView(View):
    """A `keras.Variable`: arrays of JAX as they are, those of other backends as arrays of numpy."""

    container = "leaf"
    identity = True
    mutable = True

    def values(self, obj: Any) -> Mapping[str, Any]:
        value = obj.value
        if not isinstance(value, jax.Array):
            value = np.asarray(sys.modules["keras"].ops.convert_to_numpy(value))
        return {VARIABLE_VALUE: value}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        obj.assign(values[VARIABLE_VALUE])
        return obj


class PenzaiVariableView(View):
    """A `Parameter` or `StateVariable` of penzai: an array is its own value; a named array or
    another tree is its child."""

    container = "leaf"
    identity = True
    mutable = True

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return () if _is_leaf(obj.value) else [("value", obj.value)]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        obj.value = changed["value"]
        return obj

    def values(self, obj: Any) -> Mapping[str, Any]:
        return {VARIABLE_VALUE: obj.value} if _is_leaf(obj.value) else {}

    def assign(self, obj: Any, values: Mapping[str, Any]) -> Any:
        obj.value = values[VARIABLE_VALUE]
        return obj


def _is_leaf(value: Any) -> bool:
    view = view_of(value)
    return view is not None and view.container == "leaf"


_VIEWS: Mapping[tuple[str, str], View] = {
    ("keras.src.backend.common.variables", "Variable"): KerasVariableView(),
    ("penzai.core.variables", "LabeledVariable"): PenzaiVariableView(),
}


def box_view(obj: Any) -> View | None:
    """The view of a variable of these libraries, by its type; None for anything else."""
    names = [(base.__module__, base.__qualname__) for base in type(obj).__mro__]
    return next((_VIEWS[name] for name in names if name in _VIEWS), None)
