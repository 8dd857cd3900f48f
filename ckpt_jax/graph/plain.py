"""Plain data as text, and back: numbers, strings, None, members of enums, and lists, tuples and
dicts of them.

The text is JSON. A value that JSON has itself (a string, an int, a bool, None, a list) stands for
itself; any other value is an object with one field, which is named after its type.

Text from a file is data from outside: whatever is not written as `encode` writes it is refused.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.graph.labels import (
    EnumKey,
    EnumScalar,
    canonical,
    enum_class_of,
    plain_keys,
    without_enums,
)

_MAX_LEVELS = 100  # so that whoever writes it can read it, however deep its own calls are


def encode(value: Any) -> str:
    """Plain data as text.

    Raises:
      TypeError: it is no plain data.
      ValueError: it is nested too deeply, or has a dtype that cannot be stored.

    >>> encode(["relu", (1, 2.5), {"a": None}])
    '["relu", {"tuple": [1, {"float": "2.5"}]}, {"dict": [["a", null]]}]'
    """
    return json.dumps(_to_json(value))


def decode(text: str) -> Any:
    """The inverse of `encode`, but for members of enums: they become labels that stand for them,
    and `without_labels` finds the members.

    Raises:
      ValueError: the text is not written by `encode`.

    >>> decode('["relu", {"tuple": [1, {"float": "2.5"}]}]')
    ['relu', (1, 2.5)]
    """
    try:
        return _from_json(json.loads(text))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"no plain data: {error}") from error


def without_labels(value: Any) -> Any:
    """Plain data with the members of enums; see `labels.without_enums`."""
    match value:
        case list():
            return [without_labels(part) for part in value]
        case tuple():
            return tuple([without_labels(part) for part in value])
        case dict():
            return dict(zip(plain_keys([*value]), map(without_labels, value.values()), strict=True))
        case EnumKey() | EnumScalar():
            return without_enums(value)
    return value


def _to_json(value: Any, levels: int = _MAX_LEVELS) -> Any:
    if not levels:
        raise ValueError(f"plain data is nested at most {_MAX_LEVELS} deep")
    match value:
        case None | bool():
            return value
        case enum.Enum() | EnumKey() | EnumScalar():  # before str and int, which it may be, too
            plain = canonical(value)
            if isinstance(plain, EnumKey):
                return {"enum": [plain.enum_class, plain.name]}
            kind = enum_class_of(value) if isinstance(value, enum.Enum) else value.enum_class
            return {"member": [kind, _to_json(plain, levels - 1)]}
        case str():  # before np.generic, which np.str_ is, too; likewise np.bytes_
            return str.__str__(value)
        case bytes():
            return {"bytes": value.hex()}
        case np.generic():  # before float, which np.float64 is, too
            dtype = dtype_name(value.dtype)
            return {"numpy": [dtype, np.asarray(value, dtype_of(dtype)).tobytes().hex()]}
        case int():
            return int(value)
        case float():
            return {"float": float.__repr__(value)}
        case complex():
            return {"complex": complex.__repr__(value)}
    inner = levels - 1
    match value:
        case list():
            return [_to_json(part, inner) for part in value]
        case tuple():
            return {"tuple": [_to_json(part, inner) for part in value]}
        case dict():
            items = [[_to_json(key, inner), _to_json(part, inner)] for key, part in value.items()]
            return {"dict": items}
    raise TypeError(f"{type(value).__qualname__} is no plain data")


def _from_json(found: Any) -> Any:
    if isinstance(found, list):
        return [_from_json(part) for part in found]
    if not isinstance(found, dict):
        if isinstance(found, float):
            raise ValueError("a float that is not written as one")
        return found
    ((kind, what),) = found.items()
    return _FROM_JSON[kind](what)


def _member(what: Any) -> EnumScalar:
    kind, value = what
    return EnumScalar(_from_json(value), str(kind))


def _numpy(what: Any) -> np.generic:
    name, data = what
    (value,) = np.frombuffer(bytes.fromhex(data), dtype_of(name))
    return value


_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": complex,
    "bytes": bytes.fromhex,
    "numpy": _numpy,
    "enum": lambda what: EnumKey(str(what[1]), str(what[0])),
    "member": _member,
    "tuple": lambda parts: tuple(_from_json(parts)),
    "dict": lambda items: {_from_json(key): _from_json(part) for key, part in items},
}
