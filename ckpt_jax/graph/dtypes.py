"""Dtypes by their canonical names: all dtypes that arrays in a checkpoint can have.

The names are numpy's, and those of `ml_dtypes` for the types that numpy lacks.
"""

from __future__ import annotations

import re
from functools import cache

import ml_dtypes
import numpy as np

BYTES = "bytes"  # the dtype of byte strings


_TIME_DTYPE = re.compile(r"(datetime|timedelta)64(\[\d*[a-zA-Z]+\])?")


def _named_dtypes() -> dict[str, np.dtype]:
    # longdouble is left out, because the same name means different bits on different machines.
    # Types are listed by name, not by type code: if two codes mean one type, the name gives the
    # usual one.
    sized = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
    numpy_types = [np.dtype(name) for name in ("bool", *sized.split(), "complex64", "complex128")]
    members = [getattr(ml_dtypes, name) for name in dir(ml_dtypes)]
    scalars = [m for m in members if isinstance(m, type) and issubclass(m, np.generic)]
    return {dtype.name: dtype for dtype in [*numpy_types, *map(np.dtype, scalars)]}


_DTYPES = _named_dtypes()


@cache
def dtype_name(dtype: np.dtype) -> str:
    """The canonical name of `dtype`, which is the same for both byte orders.

    Raises:
      ValueError: arrays of that dtype cannot be stored.

    >>> dtype_name(np.dtype(">f4"))
    'float32'
    """
    name = dtype.name
    if _DTYPES.get(name) == dtype.newbyteorder("=") or _TIME_DTYPE.fullmatch(name):
        return name
    raise ValueError(f"arrays of dtype {dtype} cannot be stored")


def dtype_of(name: str) -> np.dtype:
    """The dtype with that canonical name, in native byte order.

    Raises:
      ValueError: no dtype has that name.

    >>> dtype_of("bfloat16").itemsize
    2
    """
    dtype = _DTYPES.get(name)
    if dtype is not None:
        return dtype
    if _TIME_DTYPE.fullmatch(name):
        try:
            return np.dtype(name)
        except TypeError:
            pass
    raise ValueError(f"unknown dtype {name!r}")
