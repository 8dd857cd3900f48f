"""nnx: modules, optimizers and everything else that is built on its Pytree.

Such an object is mutable. Its children are the attributes that nnx itself calls data. Static
attributes belong to the program, with one exception: mutable objects that this library knows and
nnx does not, such as a `ckpt.Variable`. The same holds for the elements of a `nnx.List`: functions
and other static elements belong to the program. An `nnx.Variable` is a mutable box for one value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.training.optimizer import OptVariable

from ckpt_jax.graph.labels import VARIABLE_VALUE, Label
from ckpt_jax.objects.optax_states import (
    StateLeaf,
    flatten,
    is_leaf,
    is_masked,
    layout_of,
    places_in,
)
from ckpt_jax.objects.pytrees import DictView
from ckpt_jax.objects.state import NoDependency
from ckpt_jax.objects.views import (
    OptimizerView,
    ParameterPath,
    SlotEntry,
    StatePlace,
    View,
    add_view,
    view_of,
)


def copies(objects: Sequence[Any], arrays: Mapping[int, Any]) -> Sequence[Any]:
    """Copies of nnx objects, with other arrays. `copy.deepcopy` would copy the arrays, too."""
    structure, state = nnx.split(tuple(objects))
    return nnx.merge(structure, jax.tree.map(lambda leaf: arrays.get(id(leaf), leaf), state))


class NnxObjectView(View):
    """An nnx object: the attributes that hold data, or a mutable object that nnx does not know."""

    identity = True
    mutable = True
    copier = staticmethod(copies)
    has_program = True

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return [(name, value) for name, value in _state(obj) if not name.startswith("_pytree__")]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        for name, value in changed.items():
            setattr(obj, str(name), value)
        return obj


class NnxListView(NnxObjectView):
    """An nnx.List, by position. Static elements keep their position, but are not state."""

    container = "list"

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        state = {name for name, _ in _state(obj)}
        return [
            (i, value if str(i) in state or view_of(value) is None else NoDependency(value))
            for i, value in enumerate(obj)
        ]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        for index, value in changed.items():
            obj[index] = value
        return obj


class NnxDictView(NnxObjectView):
    """An nnx.Dict, by key."""

    container = "dict"


class NnxOptimizerView(NnxObjectView, OptimizerView):
    """An nnx.Optimizer: what mirrors the model's variables are their slot variables."""

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        layout, leaves = _state_of(obj)
        own = [(name, value) for name, value in super().children(obj) if name != "opt_state"]
        return own + [
            (leaf.name, leaves[leaf.position]) for leaf in layout if leaf.parameter is None
        ]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        """Leaves of the state are boxes that were restored in place."""
        own = {name: value for name, value in changed.items() if name in vars(obj)}
        return super().rebuild(obj, own)

    def slots(self, obj: Any) -> Iterable[SlotEntry]:
        layout, leaves = _state_of(obj)
        return [
            SlotEntry(leaf.name, leaf.parameter, leaves[leaf.position])
            for leaf in layout
            if leaf.parameter is not None
        ]

    def places(self, obj: Any) -> Iterable[StatePlace]:
        return places_in(obj.opt_state, _state_of(obj)[0], ("opt_state",))

    def parameters(self, obj: Any) -> Any | None:
        return vars(obj).get("model")


def _state_of(optimizer: nnx.Optimizer[Any]) -> tuple[list[StateLeaf], list[Any]]:
    """The layout of an optimizer's state without the masked leaves, and all its leaves."""
    leaves = jax.tree.leaves(optimizer.opt_state, is_leaf=is_leaf)
    layout = layout_of(optimizer.opt_state, leaves, _mirrored)
    masked = [isinstance(x, nnx.Variable) and is_masked(x.get_raw_value()) for x in leaves]
    return [leaf for leaf in layout if not masked[leaf.position]], leaves


def _mirrored(node: Any) -> list[ParameterPath] | None:
    """The parameters of an nnx.State of variables; nothing else in an optimizer mirrors them."""
    if not isinstance(node, nnx.State):
        return None
    leaves, _ = flatten(node)
    is_mirror = leaves and all(isinstance(leaf, OptVariable) for _, leaf in leaves)
    return [path for path, _ in leaves] if is_mirror else None


class NnxVariableView(View):
    """An nnx.Variable: one array is its own value; any other value is its child."""

    container = "leaf"
    identity = True
    mutable = True
    copier = staticmethod(copies)

    def children(self, obj: nnx.Variable[Any]) -> Iterable[tuple[Label, Any]]:
        value = obj.get_raw_value()
        return () if _is_leaf(value) else [("value", value)]

    def rebuild(self, obj: nnx.Variable[Any], changed: Mapping[Label, Any]) -> Any:
        obj.set_raw_value(changed["value"])
        return obj

    def values(self, obj: nnx.Variable[Any]) -> Mapping[str, Any]:
        value = obj.get_raw_value()
        return {VARIABLE_VALUE: value} if _is_leaf(value) else {}

    def assign(self, obj: nnx.Variable[Any], values: Mapping[str, Any]) -> Any:
        obj.set_raw_value(values[VARIABLE_VALUE])
        return obj


class NnxStateView(DictView):
    """An nnx.State: a mapping that is rebuilt, of variables that are restored in place."""

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        return type(obj)({label: changed.get(label, child) for label, child in obj.items()})


def _state(obj: Any) -> Iterable[tuple[str, Any]]:
    """The attributes of an nnx object that are state."""
    nodes = obj._pytree__nodes
    return [
        (name, value)
        for name, value in vars(obj).items()
        if nodes.get(name, False) or _is_foreign(value)
    ]


def _is_foreign(value: Any) -> bool:
    """Whether a static attribute is state that nnx does not know."""
    view = view_of(value)
    return view is not None and view.mutable


def _is_leaf(value: Any) -> bool:
    view = view_of(value)
    return view is not None and view.container == "leaf"


add_view(nnx.Pytree, NnxObjectView())
add_view(nnx.List, NnxListView())
add_view(nnx.Dict, NnxDictView())
add_view(nnx.Optimizer, NnxOptimizerView())
add_view(nnx.Variable, NnxVariableView())
add_view(nnx.State, NnxStateView())
