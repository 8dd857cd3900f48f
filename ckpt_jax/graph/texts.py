"""Values that are stored as text: dates and times, paths, dtypes.

They are configuration rather than state, and come back as they were. Only these types themselves
are taken: an object of a subclass would come back as another one.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of


class Text(NamedTuple):
    """How values of one kind become text, and are made of it again."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


def _microseconds(value: datetime.timedelta) -> str:
    return str(value // datetime.timedelta(microseconds=1))


KINDS: dict[str, Text] = {
    "datetime": Text(lambda value: value.isoformat(), datetime.datetime.fromisoformat),
    "date": Text(lambda value: value.isoformat(), datetime.date.fromisoformat),
    "time": Text(lambda value: value.isoformat(), datetime.time.fromisoformat),
    "timedelta": Text(_microseconds, lambda text: datetime.timedelta(microseconds=int(text))),
    "path": Text(str, pathlib.Path),
    "dtype": Text(dtype_name, dtype_of),
}
_KIND_OF: dict[type, str] = {
    datetime.datetime: "datetime",
    datetime.date: "date",
    datetime.time: "time",
    datetime.timedelta: "timedelta",
    type(pathlib.Path()): "path",
}


def kind_of(value: Any) -> str | None:
    """The kind of a value that is stored as text; None if it is not.

    Raises:
      TypeError: it could not come back as it was.

    >>> kind_of(datetime.date(2026, 1, 31)), kind_of(np.dtype("int8")), kind_of(3)
    ('date', 'dtype', None)
    """
    if isinstance(value, np.dtype):
        try:
            dtype_of(dtype_name(value))
        except (TypeError, ValueError):
            raise TypeError(f"the numpy dtype {value} is not supported") from None
        return "dtype"
    kind = _KIND_OF.get(type(value))
    zone = getattr(value, "tzinfo", None) if kind in ("datetime", "time") else None
    if zone is not None and not isinstance(zone, datetime.timezone):
        raise TypeError(
            f"the time zone {zone} would come back as a fixed offset; convert it to "
            "datetime.timezone.utc"
        )
    return kind


def is_text(value: Any) -> bool:
    """Whether the type of a value is one of those that are stored as text."""
    return type(value) in _KIND_OF or isinstance(value, np.dtype)
