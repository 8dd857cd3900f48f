"""Optax states, shown as optimizers whose slot variables follow their parameters.

An optax state is a nest of named tuples. Some parts of it *mirror* the parameters: they have
the parameters' tree structure, with masked places where a transform leaves parameters alone.
Each leaf of such a part is a slot variable, tied to the parameter in whose place it stands, and
named by the state's class and field: "ScaleByAdamState.mu". What mirrors nothing (counts,
hyperparameters) is a child with such a name.

So neither the parameters' names nor the position of a transform in its chain matter: moments
move with their parameter, and stay when transforms are added, removed, wrapped or reordered.
Where two have the same name (for the same parameter), the later ones get a number.

Nothing here imports optax: what it looks at is structure.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.pytrees import RegisteredView, is_registered, label_of
from ckpt_jax.objects.views import Below, SlotEntry, View, add_view, view_of

Place = tuple[Label, ...]


class Part(NamedTuple):
    """One leaf of an optimizer state.

    Attributes:
      name: by class and field.
      place: of the parameter that it belongs to; None for what belongs to none.
      leaf: its number in the flattened state.
    """

    name: str
    place: Place | None
    leaf: int


def is_masked(node: Any) -> bool:
    """Whether a transform leaves the parameter in this place alone."""
    return type(node).__name__ == "MaskedNode"


def is_leaf(node: Any) -> bool:
    """Whether a state is not taken apart any further: masked places, and boxes (nnx.Variables)."""
    return is_masked(node) or ((view := view_of(node)) is not None and view.mutable)


def flatten(state: Any) -> tuple[list[tuple[Place, Any]], Any]:
    """The leaves of a tree with their places, and its structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
    return [(tuple([label_of(key) for key in path]), leaf) for path, leaf in leaves], treedef


def parts_of(
    state: Any, leaves: Sequence[Any], mirrored: Callable[[Any], Sequence[Place] | None]
) -> tuple[Part, ...]:
    """The leaves of an optimizer state, masked ones left out.

    Args:
      state: a tree of optax states.
      leaves: of the state, taken apart as far as `is_leaf` says.
      mirrored: says of a subtree in which parameter's place each of its leaves stands, or None
        where it does not mirror the parameters.
    """
    found: list[Part] = []
    index = 0

    def walk(node: Any, name: str) -> None:
        nonlocal index
        if node is None:
            return
        places = mirrored(node)
        if places is not None:
            for place in places:
                if not is_masked(leaves[index]):
                    found.append(Part(name, place, index))
                index += 1
            return
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node or is_leaf(x)
        )
        if len(children) == 1 and not children[0][0]:  # at no distance: a leaf
            if not is_masked(node):
                found.append(Part(name, None, index))
            index += 1
            return
        is_state = hasattr(node, "_fields") or dataclasses.is_dataclass(node)
        before = type(node).__name__ if is_state else name
        for path, child in children:
            step = label_of(path[0])
            walk(child, f"{before}.{step}" if before else str(step))

    walk(state, "")
    return _numbered(found)


def _numbered(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts with distinct names, each name counted for each parameter."""
    count: Counter[tuple[str, Place | None]] = Counter()
    numbered: list[Part] = []
    for part in parts:
        number = count[part.name, part.place]
        count[part.name, part.place] += 1
        numbered.append(part._replace(name=f"{part.name}#{number}") if number else part)
    return tuple(numbered)


class Parameters:
    """The structure of a tree of parameters, and so what mirrors it."""

    def __init__(self, params: Any):
        leaves, self.treedef = flatten(params)
        self.places = tuple([place for place, _ in leaves])
        self.shapes = tuple([tuple(getattr(leaf, "shape", ())) for _, leaf in leaves])
        self.inner = None
        if hasattr(params, "_fields") and params:  # optax.LookaheadParams: its state mirrors fast
            first = params._fields[0]
            self.inner = first, Parameters(params[0])

    def mirrored(self, node: Any) -> Sequence[Place] | None:
        """The places of a subtree's leaves, or None where it does not mirror the parameters."""
        if self.places and jax.tree.structure(node, is_leaf=is_leaf) == self.treedef:
            is_tree = self.places != ((),)
            return self.places if is_tree or _could_be_moment(node, self.shapes[0]) else None
        if self.inner is not None:
            step, parameters = self.inner
            places = parameters.mirrored(node)
            return None if places is None else [(step, *place) for place in places]
        return None

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

    It reads like the state that it holds: `tx.update` takes it, too.

    Attributes:
      opt_state: the optax state itself.
    """

    def __init__(self, opt_state: Any, params: Any = None, parameters: Parameters | None = None):
        self.opt_state = opt_state
        self._params = params
        self._parameters = Parameters(params) if parameters is None else parameters

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return parts_of(self.opt_state, self.leaves, self._parameters.mirrored)

    @cached_property
    def leaves(self) -> list[Any]:
        return jax.tree.leaves(self.opt_state, is_leaf=is_leaf)

    def replaced(self, changed: Mapping[int, Any]) -> OptaxState:
        """A copy with some leaves replaced, by their index."""
        leaves = [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        treedef = jax.tree.structure(self.opt_state, is_leaf=is_leaf)
        new = OptaxState(jax.tree.unflatten(treedef, leaves), self._params, self._parameters)
        new.__dict__["parts"] = self.parts  # of the same structure
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

    Its per-parameter parts are saved as slot variables of the parameters, which have to be in
    the same checkpoint, and the rest by class and field. After the program has changed, what
    still is there is restored: moments follow their parameters under new names, and survive
    when transforms are added, removed, wrapped or reordered. (In an optax state that is saved as
    the bare tuple that it is, everything goes by position.)

    Args:
      opt_state: what `tx.init(params)` or `tx.update` returned.
      params: the parameters it is for.

    Returns:
      An object to put into the tree, or to give to a `Checkpoint`; after a restore its
      `.opt_state` is the restored state. It can be read and updated like that state.

    Example:
      >>> import jax.numpy as jnp, optax, tempfile
      >>> from ckpt_jax.api.tree import restore, save
      >>> params, tx = {"w": jnp.ones(2)}, optax.adam(0.1)
      >>> tree = {"params": params, "opt": optax_state(tx.init(params), params)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/a", tree)
      ...     restored = restore(path, tree)
      >>> restored["opt"][0].mu["w"]
      Array([0., 0.], dtype=float32)
    """
    return OptaxState(opt_state, params)


class OptaxStateView(View):
    """Slot variables and other leaves, by class and field; rebuilt with the same structure."""

    def children(self, obj: OptaxState) -> Iterable[tuple[Label, Any]]:
        return [(part.name, obj.leaves[part.leaf]) for part in obj.parts if part.place is None]

    def slots(self, obj: OptaxState) -> Iterable[SlotEntry]:
        return [
            SlotEntry(part.name, Below(part.place), obj.leaves[part.leaf])
            for part in obj.parts
            if part.place is not None
        ]

    def parameters(self, obj: OptaxState) -> Any | None:
        return obj._params

    def rebuild(self, obj: OptaxState, changed: Mapping[Label, Any]) -> Any:
        new = {part.leaf: changed[part.name] for part in obj.parts if part.name in changed}
        for part in obj.parts:
            if part.place is not None and part.name in changed:  # kept as a tree of children
                new[part.leaf] = _at(changed[part.name], part.place)
        return obj.replaced(new)

    def replaces_slots(self, obj: OptaxState) -> bool:
        return True

    def with_slots(self, obj: OptaxState, changed: Mapping[tuple[str, Any], Any]) -> Any:
        keys = [(part.name, Below(part.place or ())) for part in obj.parts]
        new = {
            part.leaf: changed[key]
            for part, key in zip(obj.parts, keys, strict=True)
            if part.place is not None and key in changed
        }
        return obj.replaced(new)


def _at(tree: Any, place: Place) -> Any:
    for step in place:
        tree = tree[step]
    return tree


class TrainStateView(RegisteredView):
    """A dataclass with `params`, `opt_state` and `tx`, as flax's TrainState is."""

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return [
            (label, OptaxState(child, obj.params) if label == "opt_state" else child)
            for label, child in super().children(obj)
        ]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        state = changed.get("opt_state")
        state = state.opt_state if isinstance(state, OptaxState) else obj.opt_state
        return super().rebuild(obj, {**changed, "opt_state": state})


def train_state_view(obj: Any) -> View | None:
    """The view of a train state, recognised by its fields."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type) or not is_registered(obj):
        return None
    names = {field.name for field in dataclasses.fields(obj)}
    return _TRAIN_STATE if {"params", "opt_state", "tx"} <= names else None


_TRAIN_STATE = TrainStateView("dataclass")
add_view(OptaxState, OptaxStateView())
