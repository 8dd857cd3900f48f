"""Compiling: functions of an object, made into artifacts that run without the object's code.

A function is traced with a copy of the object in which every array is an argument. So the artifact
holds no weights: it says which values of the checkpoint it takes, and the caller's arguments come
after them. Values that the function does not use are not among its arguments.

`jax.export` makes the artifact: StableHLO, for one or several platforms, with symbolic sizes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.api.signatures import Array, Signature, array_like, encode, taken_apart
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.graph.saved_objects import FunctionRecord
from ckpt_jax.matching.assign import assign
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.saving.unsaveable import Unsaveable

ARTIFACT = "_FUNCTION/"  # begins the keys of artifacts
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MAX_CONSTANT_NBYTES = 1 << 20  # of a table that a function may hold

Functions = Mapping[str, Sequence[Any]]  # (fn, *arg_specs) by name


def compiled(
    live: LiveGraph, functions: Functions, platforms: Sequence[str] | None
) -> tuple[dict[str, FunctionRecord], dict[str, bytes]]:
    """The records of functions, and their artifacts by key.

    Args:
      live: the graph of the object.
      functions: (fn, *arg_specs) by name.
      platforms: to compile for; by default the present one.

    Raises:
      UnsaveableError: naming all functions that cannot be saved, and why.
    """
    records: dict[str, FunctionRecord] = {}
    artifacts: dict[str, bytes] = {}
    unsaveable = Unsaveable()
    for name, given in functions.items():
        with unsaveable.at(name):
            records[name], artifacts[ARTIFACT + name] = _compiled(name, live, given, platforms)
    unsaveable.require_none("functions cannot be saved")
    return records, artifacts


def checked_platforms(platforms: Any) -> tuple[str, ...] | None:
    """Platforms as they were given, if `jax.export` knows them. It would take any text.

    Raises:
      TypeError: they are no sequence of names.
      ValueError: there are none, or one is not known.
    """
    if platforms is None:
        return None
    if isinstance(platforms, str) or not isinstance(platforms, Sequence | Set):
        raise TypeError(f'platforms: expected names, as ("cpu", "cuda"), got {platforms!r}')
    known = (*_PLATFORMS, jax.export.default_export_platform())
    if not platforms or any(name not in known for name in platforms):
        raise ValueError(f"platforms: expected some of {', '.join(known)}, got {platforms!r}")
    return tuple(platforms)


def checked(functions: Any) -> Functions:
    """Functions as they were given, if they are what `save_object` takes.

    Raises:
      TypeError: they are not.
    """
    if functions is None:
        return {}
    what = "functions: expected {name: (fn, *arg_specs)}"
    if not isinstance(functions, Mapping):
        raise TypeError(f"{what}, got {type(functions).__name__}")
    for name, given in functions.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{what}, got the name {name!r}")
        if not isinstance(given, tuple | list) or not given or not callable(given[0]):
            raise TypeError(f"{what}, got {given!r} for {name!r}")
    return functions


def _compiled(
    name: str, live: LiveGraph, given: Sequence[Any], platforms: Sequence[str] | None
) -> tuple[FunctionRecord, bytes]:
    fn, *specs = given
    structs, signature = taken_apart(tuple(specs))
    arguments = [_abstract(leaf) for leaf in structs]
    weights = _weights(live)
    call = _Call(live, fn, tuple(specs))
    every = [weights[node] for node in weights]
    used = _used_weights(call.of([*weights]), every, arguments, live)
    inputs = [node for node, is_used in zip(weights, used, strict=True) if is_used]
    function = jax.jit(call.of(inputs))
    export = jax.export.export(function, platforms=platforms)
    exported = export(*[weights[node] for node in inputs], *arguments)
    assert call.outputs is not None
    described = [array_like(jax.ShapeDtypeStruct(a.shape, a.dtype)) for a in exported.out_avals]
    outputs = _with_arrays(call.outputs, iter(described))
    names = _names(fn, len(specs))
    record = FunctionRecord(
        tuple(inputs),
        encode(signature, names),
        encode(outputs),
        ARTIFACT + name,
        f"jax {jax.__version__}",
        exported.calling_convention_version,
        tuple(exported.platforms),
    )
    return record, bytes(exported.serialize())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    array = np.asarray(leaf) if not isinstance(leaf, jax.Array) else leaf
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _weights(live: LiveGraph) -> dict[int, jax.ShapeDtypeStruct]:
    """The values that become arguments, by node: arrays, and the data of PRNG keys."""
    found: dict[int, jax.ShapeDtypeStruct] = {}
    for node, entry in enumerate(live.graph.nodes):
        if [a.name for a in entry.attributes] != [VARIABLE_VALUE] or entry.saver is not None:
            continue
        spec = entry.attributes[0].spec
        if spec.is_key or (spec.is_array and not spec.is_bytes and spec.dtype):
            try:
                # That of the program, also if the save casts the value.
                dtype = jax.dtypes.canonicalize_dtype(np.dtype(spec.cast_from or spec.dtype))
            except TypeError:  # a dtype of numpy alone, such as of times
                continue
            found[node] = jax.ShapeDtypeStruct(spec.shape, dtype)
    return found


@dataclass
class _Call:
    """A function of an object as a function of arrays."""

    live: LiveGraph
    fn: Callable[..., Any]
    specs: tuple[Any, ...]  # of the caller's arguments
    outputs: Signature | None = None

    def of(self, inputs: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
        """The function of the values of some nodes, followed by the caller's arguments."""

        def flat(*arrays: Any) -> tuple[Any, ...]:
            weights = dict(zip(inputs, arrays[: len(inputs)], strict=True))
            arguments = self.arguments(arrays[len(inputs) :])
            result = self.fn(self.with_values(weights), *arguments)
            leaves, self.outputs = taken_apart(result)
            return tuple(leaves)

        return flat

    def arguments(self, leaves: Sequence[Any]) -> Any:
        """The caller's arguments, in the classes that the function takes them in."""
        _, structure = jax.tree.flatten(self.specs)
        numbers, _ = taken_apart(structure.unflatten(range(structure.num_leaves)))
        by_number = dict(zip(numbers, leaves, strict=True))
        return structure.unflatten([by_number[i] for i in range(structure.num_leaves)])

    def with_values(self, weights: Mapping[int, Any]) -> Any:
        """The object, or a copy if it is mutable, with these values and no others of its own."""
        live = self.live
        values: dict[int, Any] = {}
        for node, struct in _weights(live).items():
            value = weights[node] if node in weights else jnp.zeros(struct.shape, struct.dtype)
            spec = live.graph.nodes[node].attributes[0].spec
            values[node] = (
                jax.random.wrap_key_data(value, impl=spec.prng_impl) if spec.is_key else value
            )
        if not any(view.mutable for view in live.views):
            return assign(live, {node: {VARIABLE_VALUE: value} for node, value in values.items()})
        return _copied(live, {id(live.values[n][VARIABLE_VALUE]): x for n, x in values.items()})


def _copied(live: LiveGraph, arrays: Mapping[int, Any]) -> Any:
    """A copy of the root with other arrays, by the identity of those that they replace."""
    memo: dict[int, Any] = {**arrays}
    by_copier: dict[Any, list[Any]] = {}
    for view, obj in zip(live.views, live.objects, strict=True):
        if view.copier is not None:
            by_copier.setdefault(view.copier, []).append(obj)
    for copier, objects in by_copier.items():
        copies = copier(objects, arrays)
        memo.update({id(obj): each for obj, each in zip(objects, copies, strict=True)})
    return copy.deepcopy(live.objects[0], memo)


def _used_weights(
    function: Callable[..., Any],
    weights: Sequence[Any],
    arguments: Sequence[Any],
    live: LiveGraph,
) -> list[bool]:
    """Whether each of the weights is used.

    Raises:
      ValueError: the function holds weights or other large arrays as constants.
    """
    traced = jax.jit(function).trace(*weights, *arguments).jaxpr
    jaxpr = traced.jaxpr
    used = {id(var) for var in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(var) in used for var in equation.outvars):
            used.update(map(id, equation.invars))
    held = {id(value): node for node, each in enumerate(live.values) for value in each.values()}
    constants = [
        (live.graph.paths[held[id(value)]] if id(value) in held else "", value)
        for var, value in zip(jaxpr.constvars, traced.consts, strict=True)
        if id(var) in used
    ]
    for path, value in constants:
        nbytes = getattr(value, "nbytes", 0)
        if path or nbytes > _MAX_CONSTANT_NBYTES:
            name = f"{value.dtype}{list(value.shape)}"
            what = f"{path} ({name})" if path else f"an array {name} that is no part of the object"
            raise ValueError(
                f"the function holds {what} as a constant, so that it would be in the artifact. "
                "Take it from the object that the function is given"
            )
    return [id(var) in used for var in jaxpr.invars[: len(weights)]]


def _with_arrays(signature: Signature, arrays: Iterator[Array]) -> Signature:
    """The signature of what a function returned, with the shapes that the artifact states."""
    if isinstance(signature, Array):
        return next(arrays)
    parts = tuple([(key, _with_arrays(part, arrays)) for key, part in signature.parts])
    return replace(signature, parts=parts)


def _names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of a function's arguments after the object."""
    try:
        parameters = [*inspect.signature(fn).parameters.values()][1 : count + 1]
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return [*names, *[f"argument {i}" for i in range(len(names) + 1, count + 1)]]
