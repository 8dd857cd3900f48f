"""Plain data as text, and back: numbers, strings, None, and lists, tuples and dicts of them.

The text is JSON. A value that JSON has itself (a string, an int, a bool, None, a list) stands for
itself; any other value is an object with one field, which is named after its type.

Text from a file is data from outside: whatever is not written as `encode` writes it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of


def encode(value: Any) -> str:
    """Plain data as text.

    Raises:
      TypeError, ValueError: it is no plain data.

    >>> encode(["relu", (1, 2.5), {"a": None}])
    '["relu", {"tuple": [1, {"float": "2.5"}]}, {"dict": [["a", null]]}]'
    """
    return json.dumps(_to_json(value))


def decode(text: str) -> Any:
    """The inverse of `encode`.

    Raises:
      ValueError: the text is not written by `encode`.

    >>> decode('["relu", {"tuple": [1, {"float": "2.5"}]}]')
    ['relu', (1, 2.5)]
    """
    try:
        return _from_json(json.loads(text))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"no plain data: {error}") from error


def _to_json(value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case np.generic():  # before float, which np.float64 is
            dtype = dtype_name(value.dtype)
            return {"numpy": [dtype, np.asarray(value, dtype_of(dtype)).tobytes().hex()]}
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return {"float": float.__repr__(value)}
        case complex():
            return {"complex": complex.__repr__(value)}
        case bytes():
            return {"bytes": value.hex()}
        case list():
            return [_to_json(part) for part in value]
        case tuple():
            return {"tuple": [_to_json(part) for part in value]}
        case dict():
            return {"dict": [[_to_json(key), _to_json(part)] for key, part in value.items()]}
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


def _numpy(what: Any) -> np.generic:
    name, data = what
    (value,) = np.frombuffer(bytes.fromhex(data), dtype_of(name))
    return value


_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": complex,
    "bytes": bytes.fromhex,
    "numpy": _numpy,
    "tuple": lambda parts: tuple(_from_json(parts)),
    "dict": lambda items: {_from_json(key): _from_json(part) for key, part in items},
}
