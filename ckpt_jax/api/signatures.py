"""Signatures: what a saved function takes and returns, as plain data.

A program that calls a saved function need not have the classes of its arguments. So a signature
knows dicts, lists, tuples, None and arrays. Namedtuples, dataclasses and other pytrees are dicts in
it, and a caller may give either. A shape has numbers, and the names of symbolic sizes.

As JSON, a signature is one of:

    ["array", dtype, [size, ...]]    a size is a number, or a string with a symbolic expression
    ["dict", [[key, signature], ...]]
    ["list", [signature, ...]], ["tuple", [signature, ...]], ["none"]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.objects.pytrees import is_registered

_SEQUENCES = {"list": list, "tuple": tuple}


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """An array.

    Attributes:
      dtype: its canonical name.
      shape: numbers, and strings for symbolic sizes.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """A container: "dict", "list", "tuple" or "none", with its parts by key or position."""

    kind: str
    parts: tuple[tuple[str | int, Signature], ...] = ()

    def __str__(self) -> str:
        if self.kind == "none":
            return "None"
        if self.kind == "dict":
            return "{" + ", ".join([f"{key!r}: {part}" for key, part in self.parts]) + "}"
        inner = ", ".join([str(part) for _, part in self.parts])
        return f"[{inner}]" if self.kind == "list" else f"({inner})"


Signature = Array | Parts


def array_like(leaf: Any) -> Array:
    """The signature of an array, a scalar, or a description of one.

    Raises:
      TypeError: it is none of them.
    """
    if not isinstance(leaf, jax.ShapeDtypeStruct | jax.Array | np.ndarray | np.generic):
        if isinstance(leaf, bool | int | float | complex):
            leaf = np.asarray(leaf)
        else:
            raise TypeError(f"{type(leaf).__qualname__} is no array")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("a typed PRNG key cannot be given to a saved function; give it a seed")
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    sizes = [size if isinstance(size, int) else str(size) for size in leaf.shape]
    return Array(dtype_name(np.dtype(dtype)), tuple(sizes))


def taken_apart(tree: Any) -> tuple[list[Any], Signature]:
    """The leaves of a tree, and its signature.

    Raises:
      TypeError: naming a leaf that is no array, or a key that is no string.
    """
    leaves: list[Any] = []
    return leaves, _signature(tree, "", leaves)


def _signature(tree: Any, path: str, leaves: list[Any]) -> Signature:
    if tree is None:
        return Parts("none")
    parts = _parts(tree)
    if parts is None:
        leaves.append(tree)
        try:
            return array_like(tree)
        except TypeError as error:
            raise TypeError(f"{path or 'the value'}: {error}") from None
    kind, members = parts
    found = [(key, _signature(part, _below(path, key), leaves)) for key, part in members]
    return Parts(kind, tuple(found))


def _parts(tree: Any) -> tuple[str, list[tuple[str | int, Any]]] | None:
    """The kind and the parts of a container; None if it is a leaf."""
    if type(tree) in (list, tuple):
        return type(tree).__name__, [*enumerate(tree)]
    if isinstance(tree, Mapping):
        if odd := [key for key in tree if not isinstance(key, str | int)]:
            raise TypeError(f"the key {odd[0]!r} is neither a string nor a number")
        return "dict", sorted(tree.items(), key=lambda item: (str(type(item[0])), item[0]))
    fields = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and fields is not None:
        return "dict", [*zip(fields, tree, strict=True)]
    if not is_registered(tree):
        return None
    level = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)[0]
    return "dict", [(_name(keys[0]), part) for keys, part in level]


def _name(key: Any) -> str | int:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def put_together(signature: Signature, leaves: Iterator[Any]) -> Any:
    """The tree with these leaves."""
    if isinstance(signature, Array):
        return next(leaves)
    if signature.kind == "none":
        return None
    parts = [(key, put_together(part, leaves)) for key, part in signature.parts]
    if signature.kind == "dict":
        return dict(parts)
    return _SEQUENCES[signature.kind]([part for _, part in parts])


def leaves_that_fit(
    signature: Signature, tree: Any, path: str, report: Callable[[str], object]
) -> list[Any]:
    """The leaves of a tree, in the order of a signature.

    Args:
      signature: that the tree has to have.
      tree: what a caller gives.
      path: of the tree, for problems.
      report: is told each difference.
    """
    if isinstance(signature, Array):
        try:
            found = array_like(tree)
        except TypeError as error:
            report(f"{path}: expected {signature}, but {error}")
            return []
        fits = found.dtype == signature.dtype and len(found.shape) == len(signature.shape)
        sizes = zip(signature.shape, found.shape, strict=False)
        if not fits or any(isinstance(want, int) and want != size for want, size in sizes):
            report(f"{path}: expected {signature}, got {found}")
        return [tree]
    parts = None if tree is None else _parts(tree)
    if signature.kind == "none":
        if tree is not None:
            report(f"{path}: expected None")
        return []
    kind, members = parts or ("an array" if tree is not None else "none", [])
    expected, given = dict(signature.parts), dict(members)
    if (signature.kind == "dict") != (kind == "dict") or expected.keys() != given.keys():
        report(f"{path}: expected {signature}, got {_outline(kind, given)}")
        return []
    return [
        leaf
        for key, part in signature.parts
        for leaf in leaves_that_fit(part, given[key], _below(path, key), report)
    ]


def _outline(kind: str, parts: Mapping[str | int, Any]) -> str:
    if kind == "dict":
        return f"a dict with the keys {', '.join(map(repr, parts)) or 'of none'}"
    return f"a {kind} of {len(parts)}" if kind in _SEQUENCES else kind


def _below(path: str, key: str | int) -> str:
    return f"{path}/{key}" if path else str(key)


# --- as JSON ---------------------------------------------------------------------------


def encode(signature: Signature, names: Sequence[str] = ()) -> str:
    """A signature as JSON, with the names of its parts, if it is of arguments.

    >>> encode(Parts("tuple", ((0, Array("float32", ("b", 3))),)), ["x"])
    '{"signature": ["tuple", [["array", "float32", ["b", 3]]]], "names": ["x"]}'
    """
    return json.dumps({"signature": _to_json(signature), "names": [*names]})


def _to_json(signature: Signature) -> list[Any]:
    if isinstance(signature, Array):
        return ["array", signature.dtype, [*signature.shape]]
    if signature.kind == "dict":
        return ["dict", [[key, _to_json(part)] for key, part in signature.parts]]
    if signature.kind == "none":
        return ["none"]
    return [signature.kind, [_to_json(part) for _, part in signature.parts]]


def decode(text: str) -> tuple[Signature, tuple[str, ...]]:
    """The inverse of `encode`.

    Raises:
      ValueError: it is no such text.
    """
    try:
        found = json.loads(text)
        return _from_json(found["signature"]), tuple(map(str, found["names"]))
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"no signature: {error!r}") from error


def _from_json(found: Any) -> Signature:
    match found:
        case ["array", str(dtype), list(shape)]:
            dtype_of(dtype)
            if not all(
                isinstance(size, str) or (type(size) is int and size >= 0) for size in shape
            ):
                raise ValueError(f"no shape: {shape}")
            return Array(dtype, tuple(shape))
        case ["none"]:
            return Parts("none")
        case ["dict", list(parts)]:
            named = [(key, _from_json(part)) for key, part in parts]
            if not all(isinstance(key, str | int) for key, _ in named):
                raise ValueError("a key is neither a string nor a number")
            return Parts("dict", tuple(named))
        case ["list" | "tuple" as kind, list(parts)]:
            return Parts(kind, tuple(enumerate(map(_from_json, parts))))
    raise ValueError(f"no signature: {found!r}")
