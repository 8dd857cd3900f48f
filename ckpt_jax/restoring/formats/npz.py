"""numpy's `.npz`, a zip file with one `.npy` member per name, and a single `.npy` file.

Opening reads the headers, that is names, dtypes and shapes. A member that is not compressed is read
in parts. If all of it is read, it is checked against the CRC-32 that the zip file keeps of it; a
part of it cannot be checked. A compressed member is always read as a whole. Nothing is unpickled.

numpy writes a dtype that is not its own as anonymous bytes of some width. Two bytes can only be
bfloat16, which they are taken for. There are many of one byte: such an array is listed, and read as
anonymous bytes, to which the dtype of a target gives a meaning. Arrays of objects and records are
listed and refused.
"""

from __future__ import annotations

import ast
import io
import math
import tokenize
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from ckpt_jax.graph.boxes import whole
from ckpt_jax.graph.dtypes import BYTES, dtype_name
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Checksum, Extent, ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.zips import Archive, first_member
from ckpt_jax.store.extents import c_strides
from ckpt_jax.store.looks import head_of
from ckpt_jax.store.objects import is_url

_SUFFIX = ".npy"
MAGIC = npy.MAGIC_PREFIX
_NAMELESS_FLOAT8 = "'<f1'"  # numpy's name for float8_e5m2, which numpy itself does not know
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_FIRST_NBYTES = 256  # enough for most headers
_MAX_HEADER_NBYTES = 16 << 10
_MAX_TEXT_NBYTES = 1 << 20
UNKNOWN = 1 << 62  # the size of a file that its header will tell
_REFUSED = (
    "numpy's dtype {} does not say what the array holds, or is none that can be read without "
    "unpickling. Write it as another dtype"
)
WHOLE_FILE = "array"  # the key of the array in a .npy file


def open_npz(path: str) -> ExtentsReader:
    """Opens a `.npz` file.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    files = Files(path)
    archive = Archive(files, path)
    values = {}
    for member in archive.members.values():
        if not member.name.endswith(_SUFFIX):
            continue
        name = member.name.removesuffix(_SUFFIX)
        try:
            values[name] = _member(archive, member.name)
        except ValueError as error:
            raise files.damage(path, str(error), name) from error
    return ExtentsReader(path, values, files=files)


def open_npy(path: str) -> ExtentsReader:
    """Opens a `.npy` file: one array, which is the root of the object graph.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    files = Files(path)

    def head(nbytes: int) -> bytes:
        return files.read(path, 0, nbytes)

    try:
        if is_url(path):
            _, header, nbytes = stored_array(path, 0, UNKNOWN, head, exact=False)
            files.expect({path: len(header) + nbytes})
        stored = stored_array(path, 0, files.size(path), head)[0]
    except ValueError as error:
        raise files.damage(path, str(error)) from error
    attribute = Attribute(VARIABLE_VALUE, WHOLE_FILE, stored.spec, full_name=WHOLE_FILE)
    graph = ObjectGraph((Node("leaf", attributes=(attribute,)),), ("",), named=True, ordered=True)
    return ExtentsReader(path, {WHOLE_FILE: stored}, lambda: graph, files)


def _member(archive: Archive, name: str) -> Stored:
    member = archive.members[name]
    first = archive.read(name, _FIRST_NBYTES)

    def head(nbytes: int) -> bytes:
        return first[:nbytes] if nbytes <= len(first) else archive.read(name, nbytes)

    start = member.offset
    stored, header, _ = stored_array(archive.file, start or 0, member.nbytes, head)
    if not stored.extents:
        return stored
    (extent,) = stored.extents
    # Contents are checked by whoever makes them.
    extent = replace(extent, checksum=Checksum("crc32", member.crc, zlib.crc32(header)))
    if stored.contents is not None:  # a text, which was read
        if zlib.crc32(archive.read(name)) != member.crc:
            raise ValueError("its crc32 is wrong")
        return replace(stored, extents=(extent,))
    if start is not None:
        return replace(stored, extents=(extent,))
    return replace(
        stored,
        extents=(replace(extent, offset=0),),
        nbytes=member.nbytes - len(header),
        contents=lambda buffer: archive.fill(name, buffer, len(header)),
    )


def stored_array(
    file: str, start: int, nbytes: int, head: Callable[[int], bytes], *, exact: bool = True
) -> tuple[Stored, bytes, int]:
    """An array in numpy's format, its header, and the number of bytes after the header.

    Args:
      file, start: where it lies.
      nbytes: how many bytes there are from there on.
      head: gives that many of the first bytes.
      exact: whether the array has to end where the bytes do.

    Raises:
      ValueError: it is damaged.
    """
    version, length = _lengths(head(min(nbytes, 12)))
    if length > min(nbytes, _MAX_HEADER_NBYTES):
        raise ValueError(f"its header has {length} bytes")
    header = head(length)
    if version not in _HEADERS:  # only records with names beyond Latin-1 need 3.0
        return _refused("of version 3", ()), header, _unknown(nbytes - length, exact)
    shape, is_fortran, dtype = _parsed(header, version)
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        return _refused(dtype.str, shape), header, _unknown(nbytes - length, exact)
    size = math.prod(shape) * dtype.itemsize
    if length + size > nbytes or (exact and length + size != nbytes):
        raise ValueError(f"{dtype}{list(shape)} does not take {nbytes - length} bytes")
    strides = tuple(reversed(c_strides(shape[::-1]))) if is_fortran and len(shape) > 1 else None
    extents = (Extent(whole(shape), file, start + length, strides),)
    if dtype.kind in "SU" and shape == ():
        if dtype.kind == "S":
            return Stored(LeafSpec("bytes", BYTES), extents, dtype.itemsize), header, size
        if size > _MAX_TEXT_NBYTES:
            return _refused(dtype.str, shape), header, size
        text = np.frombuffer(head(length + size)[length:], dtype).item()
        data = text.encode("utf-8", "surrogatepass")
        return Stored(LeafSpec("str", BYTES), (Extent((), file, 0),), len(data), data), header, size
    if dtype.str == "|V2":
        return Stored(LeafSpec("numpy", "bfloat16", shape), extents), header, size
    if dtype.str == "|V1":
        return Stored(LeafSpec("unreadable", dtype.str, shape), extents), header, size
    try:
        spec = LeafSpec("numpy", dtype_name(dtype), shape)
    except ValueError:
        return _refused(dtype.str, shape), header, size
    return Stored(spec, extents, finish=None if dtype.isnative else _swap), header, size


def _unknown(nbytes: int, exact: bool) -> int:
    """The size of an array that is not read; only the last one in a file may be such an array."""
    if not exact:
        raise ValueError("it holds objects or records, so that it is not known where it ends")
    return nbytes


def _swap(array: np.ndarray) -> None:
    array.byteswap(inplace=True)


def _refused(dtype: str, shape: tuple[int, ...]) -> Stored:
    return Stored(LeafSpec("unreadable", dtype, shape, note=_REFUSED.format(dtype)))


def _lengths(data: bytes) -> tuple[tuple[int, int], int]:
    """The version of an array in numpy's format, and the length of its header."""
    if data[:6] != MAGIC or len(data) < 10:
        raise ValueError("it does not begin as an array of numpy does")
    major, minor = data[6], data[7]
    width = 2 if major == 1 else 4
    return (major, minor), 8 + width + int.from_bytes(data[8 : 8 + width], "little")


def _parsed(header: bytes, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        shape, is_fortran, dtype = _HEADERS[version](io.BytesIO(header[8:]))
    except ValueError as error:
        if _NAMELESS_FLOAT8 not in str(error):
            raise
        entries = ast.literal_eval(header[10 if version == (1, 0) else 12 :].decode("latin1"))
        shape, is_fortran = tuple(map(int, entries["shape"])), bool(entries["fortran_order"])
        dtype = np.dtype(ml_dtypes.float8_e5m2)
    except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, is_fortran, dtype


def _is_npz(path: str) -> bool:
    name = first_member(path)
    return name is not None and (name == "" or name.endswith(_SUFFIX))


def _is_npy(path: str) -> bool:
    return head_of(path, len(MAGIC)) == MAGIC


NPZ = Format("npz", _is_npz, open_npz, suffixes=(".npz",))
NPY = Format("npy", _is_npy, open_npy, suffixes=(".npy",))
