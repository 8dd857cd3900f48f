"""Variables of penzai (`Parameter`, `StateVariable`): mutable boxes for an array, or for named
arrays and other trees, which are their children."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from penzai.core.variables import LabeledVariable

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label
from ckpt_jax.objects.views import View, add_view, view_of


class PenzaiVariableView(View):
    """A variable: an array is its own value; any other value is its child."""

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


add_view(LabeledVariable, PenzaiVariableView())
