"""Flax's msgpack: `checkpoint_N` files and `.msgpack` files, as `flax.serialization` writes them.

A file is one nested dict. Lists, tuples and named tuples have become dicts with the keys "0", "1",
... Arrays are extensions of type 1, complex numbers of type 2, scalars of numpy of type 3. An array
above 1 GiB is a dict with its shape and flat chunks. Opening walks over the file and notes where
arrays lie; their bytes are not read. There are no checksums.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_jax.graph.boxes import Box, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.cursor import Cursor
from ckpt_jax.restoring.formats.names import graph_of_tree
from ckpt_jax.restoring.formats.numbered import numbered_in
from ckpt_jax.store.looks import head_of

SUFFIX = ".msgpack"
_STEP = re.compile(r".*_(\d+)")
_MAX_DEPTH = 128
_MAX_ITEMS = 1 << 20
_CHUNKED = "__msgpack_chunked_array__"
_ELSEWHERE = "//GDAPlaceholder:"  # of an array that several processes wrote beside the file


def open_msgpack(path: str) -> ExtentsReader:
    """Opens a file.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    files = Files(path)
    values, graph = graph_of_tree(tree_of(files, path))
    return ExtentsReader(path, values, lambda: graph, files)


def tree_of(files: Files, file: str) -> Any:
    """What a file holds: nested containers with `Stored` arrays and plain values.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    walk = _Walk(files, file)
    try:
        tree = walk.value(0)
        if walk.cursor.at != walk.cursor.end:
            raise ValueError(f"it ends at {walk.cursor.at} of {walk.cursor.end} bytes")
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise files.damage(file, f"at byte {walk.cursor.at}: {error}") from error
    return tree


class _Walk:
    """A walk over a file in msgpack. The bytes of arrays are skipped."""

    def __init__(self, files: Files, file: str):
        self.cursor = Cursor(files, file)
        self._files, self._file = files, file
        self._items = 0

    def value(self, depth: int) -> Any:
        """The next value."""
        self._items += 1
        if depth > _MAX_DEPTH or self._items > _MAX_ITEMS:
            raise ValueError(f"more than {_MAX_DEPTH} levels or {_MAX_ITEMS} values")
        kind = self._uint(1)
        match kind:
            case _ if kind < 0x80:
                return kind
            case _ if kind >= 0xE0:
                return kind - 256
            case _ if kind < 0x90:
                return self._dict(kind & 15, depth)
            case _ if kind < 0xA0:
                return self._list(kind & 15, depth)
            case _ if kind < 0xC0:
                return self._text(kind & 31)
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return kind == 0xC3
            case 0xC4 | 0xC5 | 0xC6:
                return self._bytes(1 << kind - 0xC4)
            case 0xC7 | 0xC8 | 0xC9:
                return self._extension(self._uint(1 << kind - 0xC7), depth)
            case 0xCA:
                return struct.unpack(">f", self._take(4))[0]
            case 0xCB:
                return struct.unpack(">d", self._take(8))[0]
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return self._uint(1 << kind - 0xCC)
            case 0xD0 | 0xD1 | 0xD2 | 0xD3:
                return int.from_bytes(self._take(1 << kind - 0xD0), "big", signed=True)
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self._extension(1 << kind - 0xD4, depth)
            case 0xD9 | 0xDA | 0xDB:
                return self._text(self._uint(1 << kind - 0xD9))
            case 0xDC | 0xDD:
                return self._list(self._uint(2 << kind - 0xDC), depth)
            case 0xDE | 0xDF:
                return self._dict(self._uint(2 << kind - 0xDE), depth)
        raise ValueError(f"{kind:#x} begins no value")

    def _take(self, nbytes: int) -> bytes:
        return self.cursor.take(nbytes)

    def _uint(self, nbytes: int) -> int:
        return self.cursor.uint(nbytes, "big")

    def _text(self, nbytes: int) -> Any:
        text = self._take(nbytes).decode("utf-8", "surrogateescape")
        if text.startswith(_ELSEWHERE):
            note = (
                "its array lies beside the file, because several processes wrote it. Restore it "
                "with the release of Flax that saved it"
            )
            return Stored(LeafSpec("unreadable", "array of several processes", note=note))
        return text

    def _bytes(self, width: int) -> Stored:
        nbytes = self._uint(width)
        return Stored(LeafSpec("bytes", "bytes"), (self._skip(nbytes, ()),), nbytes)

    def _skip(self, nbytes: int, box: Box) -> Extent:
        """An extent that begins here; the walk goes on after it."""
        return Extent(box, self._file, self.cursor.skip(nbytes))

    def _list(self, length: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(length)]

    def _dict(self, length: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if isinstance(key, dict | list | Stored) or key in found:
                raise ValueError(f"{str(key)[:80]!r} is no key, or occurs twice")
            found[key] = self.value(depth + 1)
        return _joined(found) if _CHUNKED in found else found

    def _extension(self, nbytes: int, depth: int) -> Any:
        kind = self._uint(1)
        end = self.cursor.at + nbytes
        match kind:
            case 1:  # an array
                value = self._array("numpy", depth)
            case 3:  # a scalar of numpy
                value = self._array("numpy_scalar", depth)
            case 2:  # a complex number
                real, imaginary = self.value(depth + 1)
                value = complex(real, imaginary)
            case 4:  # a tuple, in Orbax's files
                value = tuple(self.value(depth + 1))
            case _:
                note = f"it is an extension of type {kind}, which Flax does not write"
                value = Stored(LeafSpec("unreadable", f"msgpack extension {kind}", note=note))
                self._skip(nbytes, ())
        if self.cursor.at != end:
            raise ValueError(f"an extension does not end at byte {end}")
        return value

    def _array(self, kind: str, depth: int) -> Stored:
        if self._uint(1) != 0x93:
            raise ValueError("an array is not described by three values")
        shape, name = self.value(depth + 1), self.value(depth + 1)
        if isinstance(name, Stored):  # as bytes, in old files
            extent = name.extents[0]
            name = self._files.read(self._file, extent.offset, name.nbytes).decode("ascii")
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"the shape of an array is {str(shape)[:80]}")
        width = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(self._uint(1))
        if width is None:
            raise ValueError("an array has no bytes")
        nbytes, shape = self._uint(width), tuple(shape)
        extent = self._skip(nbytes, whole(shape))
        try:
            dtype = dtype_of(name)
        except ValueError:
            note = f"{str(name)[:80]} is no dtype that can be read. Save it as another dtype"
            return Stored(LeafSpec("unreadable", str(name)[:80], shape, note=note))
        if math.prod(shape) * dtype.itemsize != nbytes:
            raise ValueError(f"{name}{list(shape)} does not take {nbytes} bytes")
        return Stored(LeafSpec(kind, name, shape), (extent,))


def _joined(found: Mapping[Any, Any]) -> Stored:
    """An array that is stored as flat chunks."""
    shape, chunks = (_in_order(found.get(name)) for name in ("shape", "chunks"))
    if any(type(n) is not int or n < 0 for n in shape) or not chunks:
        raise ValueError("the shape or the chunks of an array are wrong")
    if any(not isinstance(chunk, Stored) or len(chunk.spec.shape) != 1 for chunk in chunks):
        raise ValueError("a chunk of an array is no flat array")
    dtypes = {chunk.spec.dtype for chunk in chunks}
    if len(dtypes) > 1 or sum([chunk.spec.shape[0] for chunk in chunks]) != math.prod(shape):
        raise ValueError("the chunks of an array do not make up the array")
    spec = LeafSpec(chunks[0].spec.kind, chunks[0].spec.dtype, tuple(shape))
    if spec.is_unreadable:
        return Stored(spec)
    itemsize, extents, at = dtype_of(spec.dtype).itemsize, [], 0
    for chunk in chunks:
        (extent,) = chunk.extents
        offset = extent.offset
        for box, length in _boxes_of_range(spec.shape, at, at + chunk.spec.shape[0]):
            extents.append(Extent(box, extent.file, offset))
            offset += length * itemsize
        at += chunk.spec.shape[0]
    return Stored(spec, tuple(extents))


def _in_order(parts: Any) -> list[Any]:
    """A list that was saved as a dict with the keys "0", "1", ..."""
    if not isinstance(parts, dict) or [*parts] != [*map(str, range(len(parts)))]:
        raise ValueError("an array in chunks is not described as Flax does")
    return [*parts.values()]


def _boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Boxes for the elements from `start` to `stop` of a flattened array, and their lengths.

    >>> [box for box, _ in _boxes_of_range((3, 4), 2, 9)]
    [((0, 1), (2, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 1))]
    """
    if start == stop:
        return
    if not shape:
        yield (), 1
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are wholly inside
    ends = [(first - 1, start, min(stop, first * row)), (last, max(start, last * row), stop)]
    if first > last:
        ends = ends[:1]  # all in one row
    for number, begin, end in ends[:1]:
        for box, length in _boxes_of_range(shape[1:], begin - number * row, end - number * row):
            yield ((number, number + 1), *box), length
    if first < last:
        yield ((first, last), *whole(shape[1:])), (last - first) * row
    for number, begin, end in ends[1:]:
        for box, length in _boxes_of_range(shape[1:], begin - number * row, end - number * row):
            yield ((number, number + 1), *box), length


def _recognises(path: str) -> bool:
    """Whether a file begins like a dict whose first key is a text."""
    start = head_of(path, 64)
    if start == b"\x80":
        return True  # an empty dict, and nothing else
    length = {0xDE: 2, 0xDF: 4}.get(start[0], 0) if start else 0
    if not length and not (start and 0x81 <= start[0] <= 0x8F):
        return False
    key = start[1 + length :]
    if key and 0xA1 <= key[0] <= 0xBF:
        text = key[1 : 1 + (key[0] & 31)]
    elif len(key) > 1 and key[0] == 0xD9:
        text = key[2 : 2 + key[1]]
    else:
        return False
    return text != b"" and text.decode("utf-8", "ignore").isprintable()


def _steps(directory: str) -> dict[int, str]:
    """The files `checkpoint_N`, or of another name with a number, in a directory."""
    return numbered_in(directory, _STEP, _recognises)


MSGPACK = Format("msgpack", _recognises, open_msgpack, _steps, suffixes=(SUFFIX,))
