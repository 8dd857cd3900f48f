"""Arrays and scalars of numpy, and other plain values, in pickles that are read as data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ckpt_jax.readers import Stored
from ckpt_jax.restoring.formats.names import stored_value
from ckpt_jax.restoring.formats.pickled import Call, Global

_KINDS = "biufcmM"


def array_of(value: Any) -> Stored | None:
    """An array of numpy; None if it is none, or holds objects or records."""
    match value:
        case Call(
            function=Global(
                "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct"
            ),
            args=(Global("numpy.ndarray"), *_),
            state=(_, tuple(shape), dtype, is_fortran, data),
        ):
            found, contents = _dtype_of(dtype), _bytes_of(data)
            if found is None or contents is None or any(type(n) is not int for n in shape):
                return None
            if min(shape, default=0) < 0 or math.prod(shape) * found.itemsize != len(contents):
                raise ValueError(f"an array {found}{list(shape)} has {len(contents)} bytes")
            array = np.frombuffer(contents, found)
            return Stored.of(array.reshape(shape, order="F" if is_fortran else "C"))
    return None


def scalar_of(value: Any) -> Stored | None:
    """A scalar of numpy, a complex number or a byte string; None if it is none of them."""
    match value:
        case Call(
            function=Global("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar"),
            args=(dtype, data),
        ):
            found, contents = _dtype_of(dtype), _bytes_of(data)
            if found is None or contents is None:
                return None
            if found.itemsize != len(contents):
                raise ValueError(f"a scalar {found} has {len(contents)} bytes")
            return stored_value(np.frombuffer(contents, found)[0])
        case Call(
            function=Global("__builtin__.complex" | "builtins.complex"),
            args=(int() | float() as real, int() | float() as imaginary),
        ):
            return stored_value(complex(real, imaginary))
    contents = _bytes_of(value)
    return None if contents is None else stored_value(contents)


def _dtype_of(value: Any) -> np.dtype | None:
    """A dtype of numbers; None if it is none."""
    match value:
        case Call(function=Global("numpy.dtype"), args=(str(name), *_)):
            order = value.state[1] if isinstance(value.state, tuple) and value.state[1:] else "="
            try:
                found = np.dtype(name)
                found = found.newbyteorder(order) if order in ("<", ">") else found
            except (TypeError, ValueError):
                return None
            return found if found.kind in _KINDS else None
    return None


def _bytes_of(value: Any) -> bytes | None:
    """A byte string, which Python 2's protocol has as a text; None if it is none."""
    match value:
        case bytes():
            return value
        case Call(function=Global("_codecs.encode"), args=(str(text), "latin1")):
            return text.encode("latin1")
    return None
