"""Optax states, shown as optimizers with slot variables that follow their parameters.

An optax state is a nest of named tuples. Some parts of it *mirror* the parameters: they have the
parameters' tree structure, with a masked node for each parameter that a transform leaves alone.
Each leaf of such a part is a *slot variable*. It belongs to the parameter at the same path, and its
name is made of the state's class and field: "ScaleByAdamState.mu". A leaf of any other part (a
count, a hyperparameter) is a child with such a name.

So neither the parameters' names nor the position of a transform in its chain matter: moments
move with their parameter, and stay if transforms are added, removed, wrapped or reordered.
If two leaves have the same name and the same parameter, the later one gets a number.

This module does not import optax: it looks at the structure of the state alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.pytrees import RegisteredView, is_registered, label_of
from ckpt_jax.objects.views import (
    OptimizerView,
    ParameterPath,
    SlotEntry,
    StatePlace,
    View,
    add_view,
    view_of,
)

_log = logging.getLogger("ckpt_jax")


class StateLeaf(NamedTuple):
    """One leaf of an optimizer state, as far as it is known.

    Attributes:
      name: by class and field.
      parameter: the parameter that it belongs to; None if it belongs to none.
      position: its number in the flattened state.
    """

    name: str
    parameter: ParameterPath | None
    position: int


def is_masked(node: Any) -> bool:
    """Whether a transform leaves the parameter at this path alone."""
    return type(node).__name__ == "MaskedNode"


def is_leaf(node: Any) -> bool:
    """Whether a state is not taken apart any further: masked nodes, and boxes (nnx.Variables)."""
    return is_masked(node) or ((view := view_of(node)) is not None and view.mutable)


def flatten(state: Any) -> tuple[list[tuple[ParameterPath, Any]], Any]:
    """The leaves of a tree with their paths, and its structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
    paths = [ParameterPath(tuple([label_of(key) for key in keys])) for keys, _ in leaves]
    return [(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)], treedef


def layout_of(
    state: Any, leaves: Sequence[Any], mirrored: Callable[[Any], Sequence[ParameterPath] | None]
) -> tuple[StateLeaf, ...]:
    """Describes the leaves of an optimizer state; masked leaves are left out.

    Args:
      state: a tree of optax states.
      leaves: of the state, taken apart as far as `is_leaf` says.
      mirrored: gives, for a subtree, the parameter of each of its leaves; None if the subtree does
        not mirror the parameters.
    """
    found: list[StateLeaf] = []
    index = 0

    def walk(node: Any, name: str) -> None:
        nonlocal index
        if node is None:
            return
        paths = mirrored(node)
        if paths is not None:
            for path in paths:
                if not is_masked(leaves[index]):
                    found.append(StateLeaf(name, path, index))
                index += 1
            return
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node or is_leaf(x)
        )
        if len(children) == 1 and not children[0][0]:  # an empty path: the node is a leaf
            if not is_masked(node):
                found.append(StateLeaf(name, None, index))
            index += 1
            return
        is_state = hasattr(node, "_fields") or dataclasses.is_dataclass(node)
        before = type(node).__name__ if is_state else name
        for path, child in children:
            step = label_of(path[0])
            walk(child, f"{before}.{step}" if before else str(step))

    walk(state, "")
    return _numbered(found)


def _numbered(leaves: Iterable[StateLeaf]) -> tuple[StateLeaf, ...]:
    """Leaves with distinct names; for each parameter, equal names are counted."""
    count: Counter[tuple[str, ParameterPath | None]] = Counter()
    numbered: list[StateLeaf] = []
    for leaf in leaves:
        number = count[leaf.name, leaf.parameter]
        count[leaf.name, leaf.parameter] += 1
        numbered.append(leaf._replace(name=f"{leaf.name}#{number}") if number else leaf)
    return tuple(numbered)


def places_in(
    state: Any, layout: Iterable[StateLeaf], above: tuple[Label, ...] = ()
) -> list[StatePlace]:
    """Where the described leaves lie in a state; `above` are the labels that lead to it."""
    paths = [path.steps for path, _ in flatten(state)[0]]
    return [
        StatePlace(leaf.name, leaf.parameter, (*above, *paths[leaf.position])) for leaf in layout
    ]


class Parameters:
    """The structure of a tree of parameters; it tells what mirrors them."""

    def __init__(self, params: Any):
        leaves, self.treedef = flatten(params)
        self.paths = tuple([path for path, _ in leaves])
        self.shapes = tuple([tuple(getattr(leaf, "shape", ())) for _, leaf in leaves])
        self.inner = None
        if hasattr(params, "_fields") and params:  # optax.LookaheadParams: its state mirrors fast
            first = params._fields[0]
            self.inner = first, Parameters(params[0])

    def mirrored(self, node: Any) -> Sequence[ParameterPath] | None:
        """The parameters of a subtree's leaves; None if it does not mirror the parameters."""
        leaves, treedef = jax.tree.flatten(node, is_leaf=is_leaf)
        if self.paths and treedef == self.treedef:
            is_tree = self.paths != (ParameterPath(()),)
            return self.paths if is_tree or _could_be_moment(node, self.shapes[0]) else None
        if (masked := self._mirrored_in_part(node, leaves, treedef)) is not None:
            return masked
        if self.inner is not None:
            step, parameters = self.inner
            paths = parameters.mirrored(node)
            return None if paths is None else [ParameterPath((step, *p.steps)) for p in paths]
        return None

    def _mirrored_in_part(
        self, node: Any, leaves: Sequence[Any], treedef: Any
    ) -> Sequence[ParameterPath] | None:
        """The same for a subtree in which one masked place stands for several parameters: labels
        of `optax.multi_transform` and masks may be a prefix of the parameters."""
        if node is None or is_leaf(node) or not any(map(is_masked, leaves)):
            return None
        numbers = jax.tree.unflatten(self.treedef, range(len(self.paths)))
        try:
            parts = treedef.flatten_up_to(numbers)
        except (TypeError, ValueError):
            return None  # of another structure
        pairs = [*zip(leaves, parts, strict=True)]
        if not all(is_masked(leaf) or isinstance(part, int) for leaf, part in pairs):
            return None
        nowhere = ParameterPath(())  # of a masked place, which is left out
        return [self.paths[part] if isinstance(part, int) else nowhere for part in parts]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parameters) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.treedef, self.shapes


def _could_be_moment(leaf: Any, shape: tuple[int, ...]) -> bool:
    """A bare array as parameters looks like any array: shape and dtype have to tell."""
    dtype = getattr(leaf, "dtype", None)
    is_inexact = dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)
    return is_masked(leaf) or (is_inexact and tuple(leaf.shape) == shape)


class OptaxState:
    """An optax state as the optimizer of some parameters; see `optax_state`.

    It can be read like the state that it holds, and `tx.update` takes it, too.

    Attributes:
      opt_state: the optax state itself.
    """

    def __init__(self, opt_state: Any, params: Any = None, parameters: Parameters | None = None):
        self.opt_state = opt_state
        self._params = params
        self._parameters = Parameters(params) if parameters is None else parameters

    @cached_property
    def layout(self) -> tuple[StateLeaf, ...]:
        return layout_of(self.opt_state, self.leaves, self._parameters.mirrored)

    @cached_property
    def leaves(self) -> list[Any]:
        return jax.tree.leaves(self.opt_state, is_leaf=is_leaf)

    def replaced(self, changed: Mapping[int, Any]) -> OptaxState:
        """A copy with some leaves replaced, by their index."""
        leaves = [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        treedef = jax.tree.structure(self.opt_state, is_leaf=is_leaf)
        new = OptaxState(jax.tree.unflatten(treedef, leaves), self._params, self._parameters)
        new.__dict__["layout"] = self.layout  # the structure is the same
        return new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "opt_state" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.opt_state, name)

    def __getitem__(self, at: Any) -> Any:
        return self.opt_state[at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.opt_state)

    def __len__(self) -> int:
        return len(self.opt_state)

    def __repr__(self) -> str:
        return f"OptaxState({self.opt_state!r})"


jax.tree_util.register_pytree_with_keys(
    OptaxState,
    lambda obj: (((jax.tree_util.GetAttrKey("opt_state"), obj.opt_state),), obj._parameters),
    lambda parameters, children: OptaxState(next(iter(children)), parameters=parameters),
)


def optax_state(opt_state: Any, params: Any) -> OptaxState:
    """An optax state to save or restore, as the optimizer of its parameters.

    The values that it has for each parameter are saved as slot variables of the parameter, which
    has to be in the same checkpoint. Its other values are saved by class and field. If the
    program changes, a restore takes what is still there: moments follow their parameters under
    new names, and survive if transforms are added, removed, wrapped or reordered. (If an optax
    state is saved without this, as a tuple, all its values are found by position.)

    Args:
      opt_state: what `tx.init(params)` or `tx.update` returned.
      params: the parameters that it is for.

    Returns:
      An object to put into the tree, or to give to a `Checkpoint`. After a restore, its
      `.opt_state` is the restored state. It can be read and updated like that state.

    Raises:
      ValueError: the state holds arrays that look like moments, but no part of it has the
        structure of the parameters.

    Example:
      >>> import ckpt_jax as ckpt, jax.numpy as jnp, optax, tempfile
      >>> params, tx = {"w": jnp.ones(2)}, optax.adam(0.1)
      >>> tree = {"params": params, "opt": ckpt.optax_state(tx.init(params), params)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", tree)
      ...     restored = ckpt.restore(path, tree)
      >>> restored["opt"][0].mu["w"]
      Array([0., 0.], dtype=float32)
    """
    state = OptaxState(opt_state, params)
    if lost := _lost_moments(state):
        paths = ["/".join(map(str, path.steps)) or "(root)" for path in state._parameters.paths]
        listed = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise ValueError(
            f"optax_state: expected the parameters that the state is for, got {listed or 'none'}; "
            f"nothing in the state has their structure ({lost}), so that its moments would be "
            "found by position only. Pass the params of tx.init(params)."
        )
    return state


def _lost_moments(state: OptaxState) -> str:
    """What looks like moments in a state in which nothing mirrors the parameters; "" if nothing
    does."""
    if any(leaf.parameter is not None for leaf in state.layout):
        return ""
    total = sum(map(prod, state._parameters.shapes))
    lost = [
        f"{leaf.name} of shape {shape}"
        for leaf in state.layout
        if (shape := tuple(getattr(state.leaves[leaf.position], "shape", ())))
        and prod(shape) > 1
        and not (shape == (total,) and leaf.name.count(".") == 1)  # optax.flatten
        and "hyperparams" not in leaf.name
    ]
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{lost[0]}{more}" if lost else ""


class OptaxStateView(OptimizerView):
    """Slot variables and other leaves, by class and field; rebuilt with the same structure."""

    def children(self, obj: OptaxState) -> Iterable[tuple[Label, Any]]:
        return [
            (leaf.name, obj.leaves[leaf.position]) for leaf in obj.layout if leaf.parameter is None
        ]

    def slots(self, obj: OptaxState) -> Iterable[SlotEntry]:
        return [
            SlotEntry(leaf.name, leaf.parameter, obj.leaves[leaf.position])
            for leaf in obj.layout
            if leaf.parameter is not None
        ]

    def places(self, obj: OptaxState) -> Iterable[StatePlace]:
        return places_in(obj.opt_state, obj.layout)

    def parameters(self, obj: OptaxState) -> Any | None:
        return obj._params

    def rebuild(self, obj: OptaxState, changed: Mapping[Label, Any]) -> Any:
        new: dict[int, Any] = {}
        for name, parameter, position in obj.layout:
            if name in changed:  # if it has a parameter, the child is a tree of slot variables
                new[position] = _at(changed[name], parameter.steps if parameter else ())
        return obj.replaced(new)

    def replaces_slots(self, obj: OptaxState) -> bool:
        return True

    def with_slots(self, obj: OptaxState, changed: Mapping[tuple[str, Any], Any]) -> Any:
        return obj.replaced(
            {
                position: changed[name, parameter]
                for name, parameter, position in obj.layout
                if (name, parameter) in changed
            }
        )


def _at(tree: Any, steps: Iterable[Label]) -> Any:
    for step in steps:
        tree = tree[step]
    return tree


class TrainStateView(RegisteredView):
    """A dataclass with `params`, `opt_state` and `tx`, as flax's TrainState is."""

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        children = [
            (label, OptaxState(child, obj.params) if label == "opt_state" else child)
            for label, child in super().children(obj)
        ]
        if type(obj) not in _told:
            for state in [child for _, child in children if isinstance(child, OptaxState)]:
                if lost := _lost_moments(state):
                    _tell(
                        type(obj),
                        f"nothing in opt_state has the structure of params ({lost}). Make it "
                        "with tx.init(params)",
                    )
        return children

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        state = changed.get("opt_state")
        state = state.opt_state if isinstance(state, OptaxState) else obj.opt_state
        return super().rebuild(obj, {**changed, "opt_state": state})


_told: set[type] = set()  # the classes about which `_tell` has written


def _tell(kind: type, why: str) -> None:
    """Says, once for each class, that the moments in an optimizer state are not recognised."""
    _told.add(kind)
    _log.warning(
        "%s.%s: restores find the moments in opt_state by their position, not by their parameters: "
        "%s.",
        *(kind.__module__, kind.__qualname__, why),
    )


def train_state_view(obj: Any) -> View | None:
    """The view of a train state, which is recognised by its fields. Called once for each class."""
    if isinstance(obj, tuple):
        names = {*getattr(obj, "_fields", ())}
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        names = {field.name for field in dataclasses.fields(obj)}
    else:
        return None
    if not {"params", "opt_state"} <= names:
        return None
    if "tx" in names and not isinstance(obj, tuple) and is_registered(obj):
        return _TRAIN_STATE
    if _holds_plain_moments(obj):
        _tell(
            type(obj),
            "it has params and opt_state, but is no dataclass with a field tx that is registered "
            "with JAX. Be one, or save ckpt.optax_state(opt_state, params) as its opt_state",
        )
    return None


def _holds_plain_moments(obj: Any) -> bool:
    if isinstance(obj.opt_state, OptaxState):
        return False
    try:
        layout = OptaxState(obj.opt_state, obj.params).layout
    except (TypeError, ValueError):  # JAX cannot take it apart, so that optax has not made it
        return False
    return any(leaf.parameter is not None for leaf in layout)


_TRAIN_STATE = TrainStateView("dataclass")
add_view(OptaxState, OptaxStateView())
