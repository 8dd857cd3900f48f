"""Writing `.npz` files, one array at a time and without compression.

numpy has no name for most dtypes that it does not know itself: it would write anonymous bytes. Two
bytes are read as bfloat16 here; arrays of all others are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Export
from ckpt_jax.restoring.formats.writing_safetensors import write_array


def write_npz(export: Export, path: str) -> Sequence[str]:
    """Writes a file.

    Raises:
      UnsaveableError: naming all values that numpy has no dtype for.
    """
    values = export.values_by_name("/")
    problems = [
        (name, f"numpy has no name for {attribute.spec.dtype}, so that it could not be read again")
        for name, attribute in values.items()
        if not _is_named(attribute.spec)
    ]
    if problems:
        listed = "\n".join(f"  {name}: {what}" for name, what in problems)
        raise UnsaveableError(
            f"{len(problems)} values cannot be written; nothing was written:\n{listed}\n"
            "Leave them out (only=...), or convert them (cast=...).",
            tuple(problems),
        )
    with zipfile.ZipFile(path, "x") as archive:
        found = export.read_all([attribute.key for attribute in values.values()])
        for (name, attribute), value in zip(values.items(), found, strict=True):
            if isinstance(value, bytes):
                value = _as_array(value, is_text=attribute.spec.kind == "str")
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed time: equal values, equal files
            with archive.open(entry, "w", force_zip64=True) as member:
                file = cast(BinaryIO, member)
                header = {"descr": value.dtype.str, "fortran_order": False, "shape": value.shape}
                npy.write_array_header_1_0(file, header)
                if value.nbytes:
                    write_array(file, value)
    return ("",)


def _as_array(value: bytes, *, is_text: bool) -> np.ndarray:
    """A text or a byte string as numpy's array of rank 0, which may have no bytes."""
    text = value.decode("utf-8", "surrogatepass") if is_text else value
    array = np.asarray(text)
    return array if text else np.ndarray((), f"{array.dtype.kind}0")


def _is_named(spec: LeafSpec) -> bool:
    if spec.is_bytes:
        return True
    dtype = dtype_of(spec.dtype)
    return spec.dtype == "bfloat16" or (dtype.kind != "V" and np.dtype(dtype.str) == dtype)
