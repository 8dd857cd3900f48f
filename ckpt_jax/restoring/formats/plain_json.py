"""JSON of unknown origin."""

from __future__ import annotations

import json
from typing import Any


def parsed(data: bytes) -> Any:
    """What a text in JSON says.

    Raises:
      ValueError: it is no JSON, is nested too deeply, or an object has a key twice.

    >>> parsed(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found
