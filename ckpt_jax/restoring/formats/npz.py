"""numpy's `.npz`: a zip file with one `.npy` member per name.

Opening reads the headers of the members, that is names, dtypes and shapes; a member is read
when it is asked for, against the CRC-32 that the zip file keeps of it. Nothing is unpickled.

numpy writes a dtype that is not its own as anonymous bytes of some width. Two bytes can only be
bfloat16, which they are taken for. There are many of one byte: such an array is listed, and read as
anonymous bytes, to which the dtype of a target gives a meaning. Arrays of objects and records are
listed and refused.
"""

from __future__ import annotations

import ast
import errno
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.dtypes import ANONYMOUS_BYTE, BYTES, dtype_name, dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formats.named import Format
from ckpt_jax.store.presence import is_file

_SUFFIX = ".npy"
_NAMELESS_FLOAT8 = "'<f1'"  # numpy's name for float8_e5m2, which numpy itself does not know
_MAGIC = npy.MAGIC_LEN
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError)
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[Any, bool, np.dtype]]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


class NpzReader:
    """A `.npz` file.

    Args:
      path: of the file.

    Raises:
      CorruptCheckpointError: it is no zip file.
    """

    def __init__(self, path: str):
        self.path = path
        with self._damage(""):
            self._zip = zipfile.ZipFile(path)

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()

    def specs(self) -> dict[str, LeafSpec]:
        """Describes the value under each name."""
        return {name: _spec(shape, dtype) for name, (shape, dtype) in self._headers.items()}

    def read(self, name: str) -> np.ndarray | bytes:
        """The value under a name."""
        if self._zip.fp is None:
            raise RuntimeError(f"{self.path}: the reader is closed")
        shape, dtype = self._headers[name]
        spec = _spec(shape, dtype)
        if spec.is_unreadable and spec.dtype != ANONYMOUS_BYTE:
            raise UnsupportedFormatError(
                f"{self.path}: {name}: numpy's dtype {dtype.str} does not say what the array "
                "holds, or is none that can be read without unpickling. Leave it out (only=...), "
                "or write it as another dtype"
            )
        with self._damage(name), self._zip.open(name + _SUFFIX) as member:
            array = _read_array(member, shape, dtype)
            if member.read(1):  # reading to the very end is what checks the CRC
                raise ValueError("there are bytes after the array")
        if spec.kind == "bytes":
            return array.tobytes()  # item() would lose zero bytes at the end
        if spec.kind == "str":
            return array.item().encode("utf-8", "surrogatepass")
        if spec.is_unreadable:
            return array
        native = dtype_of(spec.dtype)
        return array.view(native) if dtype.kind == "V" else array.astype(native, copy=False)

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            name.removesuffix(_SUFFIX): self._header(name)
            for name in self._zip.namelist()
            if name.endswith(_SUFFIX)
        }

    def _header(self, member_name: str) -> tuple[tuple[int, ...], np.dtype]:
        name = member_name.removesuffix(_SUFFIX)
        with self._damage(name), self._zip.open(member_name) as member:
            version = npy.read_magic(member)
            if version not in _HEADERS:  # only records with names beyond Latin-1 need 3.0
                return (), np.dtype(np.void)
            try:
                shape, _, dtype = _HEADERS[version](member)
            except ValueError as error:
                if _NAMELESS_FLOAT8 not in str(error):
                    raise
                shape, dtype = _shape_of_float8(member, version), np.dtype(ml_dtypes.float8_e5m2)
            stored = self._zip.getinfo(member_name).file_size - member.tell()
            if not dtype.hasobject and stored != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{dtype}{list(shape)} does not take {stored} bytes")
        return shape, dtype

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # encrypted, or compressed in an unusual way
            raise UnsupportedFormatError(f"{self.path}: {name}: {error}") from error
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # anything but a seek to where no file can reach
            where = f"{self.path}: {name}" if name else self.path
            raise CorruptCheckpointError(
                f"{where}: damaged or incomplete: {error}", file=self.path, key=name or None
            ) from error


def _shape_of_float8(member: IO[bytes], version: tuple[int, int]) -> tuple[int, ...]:
    """The shape in a header that numpy writes but does not read: that of a float8_e5m2."""
    return tuple(map(int, _header_of_float8(member, version)["shape"]))


def _header_of_float8(member: IO[bytes], version: tuple[int, int]) -> dict[str, Any]:
    member.seek(_MAGIC)
    size = int.from_bytes(member.read(2 if version == (1, 0) else 4), "little")
    return ast.literal_eval(member.read(size).decode("latin1"))


def _read_array(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype != ml_dtypes.float8_e5m2:
        return npy.read_array(member, allow_pickle=False)
    header = _header_of_float8(member, npy.read_magic(member))
    order = "F" if header["fortran_order"] else "C"
    return np.frombuffer(bytearray(member.read()), dtype).reshape(shape, order=order)


def _spec(shape: tuple[int, ...], dtype: np.dtype) -> LeafSpec:
    if shape == () and dtype.kind in "SU":
        return LeafSpec("bytes" if dtype.kind == "S" else "str", BYTES)
    if dtype.str == "|V2" and dtype.names is None:
        return LeafSpec("numpy", "bfloat16", shape)
    try:
        return LeafSpec("numpy", dtype_name(dtype), shape)
    except ValueError:
        return LeafSpec("unreadable", dtype.str, shape)


NPZ = Format(
    # A directory of that name is a checkpoint of our own.
    recognises=lambda path: path.lower().endswith(".npz") and is_file(path),
    open=NpzReader,
)
