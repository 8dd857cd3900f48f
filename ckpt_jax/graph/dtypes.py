"""Dtypes by their canonical names: all dtypes that arrays in a checkpoint can have.

The names are numpy's, and those of `ml_dtypes` for the types that numpy lacks.
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

BYTES = "bytes"  # the dtype of byte strings
ANONYMOUS_BYTE = "|V1"  # numpy's name for a dtype of one byte that is not its own


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


class LossyConversionError(OverflowError):
    """A value cannot be converted to a dtype without becoming another value.

    Attributes:
      key: the checkpoint key of the array, if it has one.
    """

    key = ""


def converted(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array as another dtype.

    Floats are rounded, because that is what such a conversion means. Any other change of a value is
    an error. Anonymous bytes, as numpy writes a dtype that is not its own, are taken for the dtype.

    Raises:
      LossyConversionError: a value does not fit into the dtype.

    >>> converted(np.array([1, 2]), np.dtype("float16"))
    array([1., 2.], dtype=float16)
    """
    if data.dtype == dtype:
        return data
    if data.dtype.type is np.void:
        return np.ascontiguousarray(data).view(dtype).reshape(data.shape)
    if family(data.dtype) == "complex":
        data = data.astype(np.result_type(data.dtype, np.complex64), copy=False)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        try:
            result = data.astype(dtype)
        except TypeError:  # two of the small dtypes of ml_dtypes, which float32 holds exactly
            result = data.astype(np.float32).astype(dtype)
    if not _holds_all(dtype, data.dtype):
        fits = _unchanged(data, result)
        if not fits.all():
            raise LossyConversionError(f"{data[~fits].flat[0]} does not fit into {dtype}")
    return result


def _unchanged(data: Any, result: Any) -> Any:
    """For each element, whether a conversion did no more than round it."""
    kinds = family(data.dtype), family(result.dtype)
    if "time" in kinds:
        return np.ones(data.shape, bool)
    if "complex" in kinds:
        if kinds[1] != "complex":
            return (data.imag == 0) & _unchanged(data.real, result)
        result = result.astype(np.complex128)
        return _unchanged(data.real, result.real) & _unchanged(data.imag, result.imag)
    if kinds == ("int", "int"):
        is_equal = result.astype(np.int64) == data.astype(np.int64)
        return is_equal & (_negative(result) == _negative(data))  # as int64, uint64 wraps around
    if kinds[1] in ("int", "bool"):
        return _as_float(result) == _as_float(data) if kinds[0] == "float" else result == data
    fits = (np.isfinite(result) == np.isfinite(data)) & (np.isnan(result) == np.isnan(data))
    if _saturates(result.dtype):
        fits &= np.abs(_as_float(data)) <= float(ml_dtypes.finfo(result.dtype).max)
    return fits


def _negative(data: np.ndarray) -> np.ndarray:
    is_signed = data.dtype.name.startswith("int")
    return data.astype(np.int64) < 0 if is_signed else np.zeros(data.shape, bool)


@cache
def _saturates(dtype: np.dtype) -> bool:
    """Whether a dtype of floats has nothing that stands for a value that is too large."""
    return not np.isnan(np.array(np.nan).astype(dtype)).any()


def _as_float(data: np.ndarray) -> np.ndarray:
    return data.astype(np.float64)


@cache
def _holds_all(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether `dtype` has a value, at least a rounded one, for each value of `other`."""
    kind, other_kind = family(dtype), family(other)
    if "time" in (kind, other_kind):
        return True
    if other_kind == "bool":
        return kind != "int" or ml_dtypes.iinfo(dtype).max > 0
    if kind == "int" == other_kind:
        range_, others = ml_dtypes.iinfo(dtype), ml_dtypes.iinfo(other)
        return range_.min <= others.min and others.max <= range_.max
    if kind == "float" and dtype.itemsize >= 4:
        return other_kind == "int" or (other_kind == "float" and other.itemsize <= dtype.itemsize)
    return kind == "complex" and dtype.itemsize >= 16


def family(dtype: np.dtype) -> str:
    """ "bool", "int", "float", "complex" or "time"."""
    if dtype.kind in "mM":
        return "time"
    if dtype.kind == "b":
        return "bool"
    if "complex" in dtype.name:
        return "complex"
    return "int" if dtype.name.startswith(("int", "uint")) else "float"


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
