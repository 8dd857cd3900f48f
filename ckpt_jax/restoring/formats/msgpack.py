"""msgpack, as Flax and Orbax use it: trees of plain values, and arrays as plain bytes.

Three extension types are theirs: 1 is an array (shape, dtype and bytes), 2 a complex number, 3 a
scalar of numpy; Orbax adds 4, a tuple. An array that is too large for msgpack is a dict of its
parts. Nothing but the tree itself is read: where an array's bytes lie is noted, and they are
skipped.

The file may come from anywhere: its depth and the number of its values are bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckpt_jax.graph.boxes import Box, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, Files, Stored

_WINDOW_NBYTES = 64 << 10
_MAX_TEXT_NBYTES = 64 << 20
_MAX_VALUES = 10_000_000
_MAX_DEPTH = 200  # two calls each
_CHUNKED = "__msgpack_chunked_array__"
_SCALARS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_SCALARS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}


def tree_in(files: Files, file: str) -> Any:
    """The tree in a file: dicts, lists, tuples, plain values, and a `Stored` for each array.

    Raises:
      CorruptCheckpointError: it is damaged, or is none in msgpack.
    """
    walker = _Walker(files, file)
    try:
        tree = walker.value(0)
        if walker.at != walker.size:
            raise ValueError(f"{walker.size - walker.at} bytes follow the tree")
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise files.damage(file, f"at byte {walker.at}: {error}") from error
    return tree


class _Walker:
    """Reads values one after the other. `at` is where the next one begins."""

    def __init__(self, files: Files, file: str):
        self.at = 0
        self.size = files.size(file)
        self._files, self._file = files, file
        self._window, self._window_at = b"", 0
        self._count = 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > _MAX_TEXT_NBYTES:
            raise ValueError(f"a text of {nbytes} bytes")
        start = self.at - self._window_at
        if not 0 <= start <= start + nbytes <= len(self._window):
            wanted = min(max(nbytes, _WINDOW_NBYTES), self.size - self.at)
            if wanted < nbytes:
                raise ValueError(f"{nbytes} bytes were expected, and {wanted} are left")
            self._window, self._window_at = self._files.read(self._file, self.at, wanted), self.at
            start = 0
        self.at += nbytes
        return self._window[start : start + nbytes]

    def skip(self, nbytes: int) -> int:
        """Skips bytes; returns where they begin."""
        start = self.at
        if nbytes > self.size - start:
            raise ValueError(f"{nbytes} bytes were expected, and {self.size - start} are left")
        self.at += nbytes
        return start

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "big")

    def value(self, depth: int) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError("more values, or deeper, than a checkpoint can be")
        first = self.number(1)
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 256
        if first < 0x90:
            return self.dict(first & 0x0F, depth)
        if first < 0xA0:
            return self.list(first & 0x0F, depth)
        if first < 0xC0:
            return self.text(first & 0x1F)
        if first in _SCALARS:
            kind = _SCALARS[first]
            return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]
        match first:
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return first == 0xC3
            case 0xC4 | 0xC5 | 0xC6:
                return self.take(self.number(1 << (first - 0xC4)))
            case 0xC7 | 0xC8 | 0xC9:
                return self.extension(self.number(1 << (first - 0xC7)), depth)
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self.extension(1 << (first - 0xD4), depth)
            case 0xD9 | 0xDA | 0xDB:
                return self.text(self.number(1 << (first - 0xD9)))
            case 0xDC | 0xDD:
                return self.list(self.number(2 << (first - 0xDC)), depth)
            case 0xDE | 0xDF:
                return self.dict(self.number(2 << (first - 0xDE)), depth)
        raise ValueError(f"the byte {first:#04x}, which has no meaning")

    def text(self, nbytes: int) -> str:
        return self.take(nbytes).decode("utf-8")

    def list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(count)]

    def dict(self, count: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int | float | bytes | None) or key in found:
                raise ValueError(f"the key {key!r} occurs twice, or is no key")
            found[key] = self.value(depth + 1)
        return _joined(found) if _CHUNKED in found else found

    def extension(self, nbytes: int, depth: int) -> Any:
        kind = self.number(1)
        end = self.at + nbytes
        match kind:
            case 1:
                value: Any = self.array()
            case 2:
                value = complex(*self.numbers(2))
            case 3:
                value = self.scalar()
            case 4:
                value = tuple(self.value(depth + 1))
            case _:
                raise ValueError(f"a value of the extension type {kind}, which is not known")
        if self.at != end:
            raise ValueError("a value does not fill its place")
        return value

    def numbers(self, count: int | None = None) -> list[Any]:
        found = self.value(_MAX_DEPTH - 1)
        if not isinstance(found, list) or len(found) != (len(found) if count is None else count):
            raise ValueError("a list of numbers was expected")
        return found

    def array(self) -> Stored:
        if self.number(1) != 0x93:
            raise ValueError("shape, dtype and bytes were expected")
        shape = self.numbers()
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"the shape {shape}")
        name = self.value(_MAX_DEPTH)
        name = name.decode("ascii") if isinstance(name, bytes) else name
        first = self.number(1)
        if first not in (0xC4, 0xC5, 0xC6):
            raise ValueError("bytes were expected")
        nbytes = self.number(1 << (first - 0xC4))
        extent = Extent(whole(shape), self._file, self.skip(nbytes))
        try:
            itemsize = dtype_of(name).itemsize
        except ValueError:
            spec = LeafSpec("unreadable", str(name), tuple(shape), note=f"no dtype {name!r}")
            return Stored(spec)
        if math.prod(shape) * itemsize != nbytes:
            raise ValueError(f"{name}{shape} does not take {nbytes} bytes")
        return Stored(LeafSpec("numpy", name, tuple(shape)), (extent,))

    def scalar(self) -> np.generic:
        stored = self.array()
        if stored.spec.shape or not stored.extents:
            raise ValueError(f"{stored.spec} is no scalar")
        dtype = dtype_of(stored.spec.dtype)
        data = self._files.read(self._file, stored.extents[0].offset, dtype.itemsize)
        return np.frombuffer(data, dtype)[0]


def _joined(parts: dict[Any, Any]) -> Stored:
    """An array of its parts, which are consecutive elements of it."""
    shape, chunks = _numbered(parts.get("shape")), _numbered(parts.get("chunks"))
    if not all(type(n) is int and n >= 0 for n in shape) or not chunks:
        raise ValueError("an array in parts needs a shape and parts")
    first, extents, start = chunks[0], [], 0
    for chunk in chunks:
        if not isinstance(chunk, Stored) or len(chunk.spec.shape) != 1:
            raise ValueError("a part of an array is no array of rank 1")
        if chunk.spec.dtype != first.spec.dtype or not chunk.extents:
            raise ValueError("parts of an array have different dtypes, or unknown ones")
        (extent,), (count,) = chunk.extents, chunk.spec.shape
        offset, itemsize = extent.offset, dtype_of(chunk.spec.dtype).itemsize
        for box, size in _boxes(start, start + count, shape):
            extents.append(Extent(box, extent.file, offset))
            offset += size * itemsize
        start += count
    if start != math.prod(shape):
        raise ValueError(f"the parts have {start} elements, the array has {math.prod(shape)}")
    return replace(first, spec=replace(first.spec, shape=tuple(shape)), extents=tuple(extents))


def _numbered(found: Any) -> list[Any]:
    """A sequence that may have become a dict from its positions."""
    if isinstance(found, dict):
        return [found[str(at)] for at in range(len(found))] if "0" in found else []
    return list(found) if isinstance(found, list | tuple) else []


def _boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Box, int]]:
    """The boxes of an array that consecutive elements fill, in their order, with their sizes.

    >>> [*_boxes(1, 7, (4, 2))]
    [(((0, 1), (1, 2)), 1), (((1, 3), (0, 2)), 4), (((3, 4), (0, 1)), 1)]
    """
    if not shape:
        yield (), 1
        return
    row = math.prod(shape[1:])
    while start < stop:
        at = start // row
        if start % row == 0 and stop - start >= row:
            end = stop // row
            yield ((at, end), *whole(shape[1:])), (end - at) * row
            start = end * row
            continue
        end = min(stop, (at + 1) * row)
        for box, size in _boxes(start - at * row, end - at * row, shape[1:]):
            yield ((at, at + 1), *box), size
        start = end
