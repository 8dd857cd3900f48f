"""Metadata: what a program says about a checkpoint, as JSON.

It is a part of the checkpoint, committed with it, and can be read without its values: the
configuration of the run, the revision of the code, the position in the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_jax.errors import CorruptCheckpointError

METADATA_KEY = "_METADATA"
_DEEPEST = 100  # levels of nesting; readers of JSON have limits, too


def encode(metadata: Mapping[str, Any]) -> bytes:
    """Metadata as JSON text.

    Raises:
      TypeError: it is no dict.
      ValueError: something in it is no JSON, or would come back as something else; names all.

    >>> encode({"revision": "4f2a", "lr": 0.5})
    b'{"lr": 0.5, "revision": "4f2a"}'
    >>> encode({"config": {"lr": float("nan"), 3: "x"}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: metadata cannot be written as JSON:
      metadata['config']['lr']: expected a finite number, got nan
      metadata['config'][3]: expected a str as key, got int
    Nothing was saved. ...
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dict with names, got {metadata!r}")
    problems = [*_problems(metadata, "metadata", 0)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"metadata cannot be written as JSON:\n{lines}\nNothing was saved. Convert these: "
            "float(x), str(path), dataclasses.asdict(config), array.tolist()."
        )
    return json.dumps(_plain(metadata), sort_keys=True).encode()


def _problems(value: Any, where: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        yield f"{where}: expected at most {_DEEPEST} levels, got more, or a cycle"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                yield f"{where}[{key!r}]: expected a str as key, got {type(key).__qualname__}"
            else:
                yield from _problems(each, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _problems(each, f"{where}[{number}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{where}: expected a finite number, got {value}"
    elif not (value is None or type(value) in (str, bool, int)):
        kind = type(value)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        name = f"{module}{kind.__qualname__}"
        hint = "; a list comes back as it was" if isinstance(value, tuple) else ""
        yield f"{where}: expected None, bool, int, float, str, list or dict, got {name}{hint}"


def _plain(value: Any) -> Any:
    """The same with dicts in place of other mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [*map(_plain, value)] if isinstance(value, list) else value


def finite(value: Any) -> Any:
    """JSON that another library has written, without numbers that JSON does not have.

    >>> finite({"loss": float("nan"), "steps": [1]})
    {'loss': 'nan', 'steps': [1]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [*map(finite, value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(data: bytes) -> dict[str, Any]:
    """The inverse of `encode`.

    Raises:
      CorruptCheckpointError: it is no such text.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"the metadata cannot be parsed: {error}") from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError("the metadata contradict the format: they are no object")
    return found
