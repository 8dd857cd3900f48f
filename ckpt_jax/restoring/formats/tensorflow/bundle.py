"""Tensor bundles: what the index of a TensorFlow checkpoint says, as plain values.

The index is a sorted table. The empty key has a header: how many data files there are, and in which
byte order numbers are stored. Every other key has an *entry*: dtype, shape, and the bytes of a data
file. A variable that is partitioned, or lies on several devices, is stored in *parts*. Its entry
has no bytes, but a list of boxes, and each box has an entry of its own. The key of that is made of
the variable's key and the box, and begins with a zero byte, which no other key does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.graph._proto import tensor_bundle_pb2 as pb
from ckpt_jax.graph._proto.saved_object_graph_pb2 import DT_STRING
from ckpt_jax.graph.boxes import Box, Shape, inside, shape_of, size_of, tiling_problem, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.restoring.formats.tensorflow.table import Read, read_table

VERSION = 1  # of bundles; there has been no other

_MAX_RANK = 64
_LIMIT = 1 << 62
_MAX_UNEVEN = 512  # parts of one variable that lie in no grid
_MAX_PARTS = 16 << 10

DTYPES: Mapping[int, str] = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    8: "complex64",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
    26: "float8_e4m3fnuz",
    27: "float8_e4m3b11fnuz",
    28: "float8_e5m2fnuz",
    29: "int4",  # these take one byte an element
    30: "uint4",
    31: "int2",
    32: "uint2",
    33: "float4_e2m1fn",
}
_QUANTISED: Mapping[int, str] = {  # integers; what they stand for is not stored
    11: "int8",
    12: "uint8",
    13: "int32",
    15: "int16",
    16: "uint16",
}
_UNREADABLE: Mapping[int, str] = {
    DT_STRING: "strings",
    20: "a handle of a resource",
    21: "a variant",
}


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of a data file. `crc` is their CRC-32C, masked."""

    shard: int
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a bundle.

    Attributes:
      dtype: its canonical name; "" if its elements are no numbers.
      shape: of the whole tensor.
      parts: the bytes of each box. The boxes tile the tensor unless there is a problem.
      what: describes the elements if they are no numbers, for people.
      problem: why the tensor cannot be read, if its index is damaged.
    """

    dtype: str
    shape: Shape
    parts: tuple[tuple[Box, Bytes], ...]
    what: str = ""
    problem: str = ""

    @property
    def is_string(self) -> bool:
        """Whether it is one byte string."""
        return self.what == _UNREADABLE[DT_STRING] and not self.shape


@dataclass(frozen=True, slots=True)
class Bundle:
    """The index of a checkpoint.

    Attributes:
      shards: the number of data files.
      is_big_endian: whether numbers are stored with the highest byte first.
      tensors: by key, without the parts of partitioned ones.
    """

    shards: int
    is_big_endian: bool
    tensors: Mapping[str, Tensor]


def read_bundle(read: Read, size: int) -> Bundle:
    """The bundle in an index file; see `read_table`.

    Raises:
      ValueError: it is damaged.
      UnsupportedFormatError: it is of a newer version.
    """
    entries = read_table(read, size)
    header = _header(next(entries, None))
    own: dict[str, pb.BundleEntryProto] = {}
    parts: dict[bytes, pb.BundleEntryProto] = {}
    for key, value in entries:
        try:
            entry = pb.BundleEntryProto.FromString(value)
        except DecodeError as error:
            raise ValueError(f"the entry of {key[:100]!r} cannot be parsed: {error}") from error
        if key.startswith(b"\0"):
            parts[key] = entry
        else:
            own[_decoded(key)] = entry
    tensors: dict[str, Tensor] = {}
    for key, entry in own.items():
        try:
            tensors[key] = _tensor(key, entry, parts, header.num_shards)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return Bundle(header.num_shards, header.endianness == header.BIG, tensors)


def _decoded(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the key {key[:100]!r} is not UTF-8") from None


def _header(entry: tuple[bytes, bytes] | None) -> pb.BundleHeaderProto:
    if entry is None or entry[0]:
        raise ValueError("it has no header")
    try:
        header = pb.BundleHeaderProto.FromString(entry[1])
    except DecodeError as error:
        raise ValueError(f"its header cannot be parsed: {error}") from error
    version = header.version
    if version.min_consumer > VERSION or VERSION in version.bad_consumers:
        raise UnsupportedFormatError(
            f"written by a newer TensorFlow, for readers of version {version.min_consumer} and "
            f"up; this one is of version {VERSION}. Install a newer ckpt_jax"
        )
    if header.num_shards < 0 or header.endianness not in (header.LITTLE, header.BIG):
        raise ValueError("its header contradicts itself")
    return header


def _tensor(
    key: str,
    entry: pb.BundleEntryProto,
    parts: Mapping[bytes, pb.BundleEntryProto],
    shards: int,
) -> Tensor:
    shape = _shape(entry)
    number = entry.dtype
    dtype = DTYPES.get(number) or _QUANTISED.get(number, "")
    if not dtype:
        what = _UNREADABLE.get(number, f"elements of TensorFlow's type {number}")
        return Tensor("", shape, ((whole(shape), _bytes(entry, shards)),), what)
    if not entry.slices:
        return Tensor(dtype, shape, ((whole(shape), _located(entry, shape, dtype, shards)),))
    found: list[tuple[Box, Bytes]] = []
    for box, part_key in _slices(key, entry, shape):
        part = parts.get(part_key)
        if part is None:
            return Tensor(dtype, shape, (), problem=f"its part {box} is not stored")
        if _shape(part) != shape_of(box) or part.dtype != number or part.slices:
            raise ValueError(f"its part {box} is of another shape or dtype")
        found.append((box, _located(part, shape_of(box), dtype, shards)))
    problem = _tiling_problem([box for box, _ in found], shape)
    return Tensor(dtype, shape, () if problem else tuple(found), problem=problem or "")


def _shape(entry: pb.BundleEntryProto) -> Shape:
    shape = tuple([dim.size for dim in entry.shape.dim])
    if len(shape) > _MAX_RANK or entry.shape.unknown_rank or min(shape, default=0) < 0:
        raise ValueError(f"it has no shape: {list(shape[:_MAX_RANK])}")
    return shape


def _located(entry: pb.BundleEntryProto, shape: Shape, dtype: str, shards: int) -> Bytes:
    expected = math.prod(shape) * dtype_of(dtype).itemsize
    if entry.size != expected:
        raise ValueError(f"{dtype}{list(shape)} takes {expected} bytes, and has {entry.size}")
    return _bytes(entry, shards)


def _bytes(entry: pb.BundleEntryProto, shards: int) -> Bytes:
    if not (0 <= entry.offset < _LIMIT and 0 <= entry.size < _LIMIT):
        raise ValueError(f"it cannot have {entry.size} bytes from {entry.offset} on")
    if not 0 <= entry.shard_id < max(shards, 1):
        raise ValueError(f"there is no data file {entry.shard_id}, of {shards}")
    return Bytes(entry.shard_id, entry.offset, entry.size, entry.crc32c)


# --- parts -----------------------------------------------------------------------------


def _slices(key: str, entry: pb.BundleEntryProto, shape: Shape) -> Iterator[tuple[Box, bytes]]:
    """Each box of a tensor in parts, and its key."""
    for slice_ in entry.slices:
        extents = [
            (extent.start, extent.length if extent.HasField("length") else None)
            for extent in slice_.extent
        ]
        if len(extents) != len(shape):
            raise ValueError(f"a part has {len(extents)} axes, and the tensor has {len(shape)}")
        box = tuple(
            [
                (start, n if length is None else start + length)
                for (start, length), n in zip(extents, shape, strict=True)
            ]
        )
        if not inside(box, shape):
            raise ValueError(f"its part {box} does not lie inside its shape {list(shape)}")
        yield box, part_key(key, extents)


def part_key(key: str, extents: list[tuple[int, int | None]]) -> bytes:
    """The key of a part of a tensor.

    Args:
      key: of the tensor.
      extents: start and length for each axis; the length is None for a whole axis.

    >>> part_key("w", [(0, 2), (0, None)])
    b'\\x00w\\x00\\x01\\x01\\x02\\x80\\x82\\x80\\x7f'
    """
    text = key.encode().replace(b"\0", b"\0\xff")
    out = _ordered(0) + text + b"\0\1" + _ordered(len(extents))
    for start, length in extents:
        out += _signed(start) + _signed(-1 if length is None else length)
    return out


def _ordered(number: int) -> bytes:
    """A number whose bytes sort as numbers do: how many bytes, then these."""
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return bytes([len(data)]) + data


def _signed(number: int) -> bytes:
    """The same for numbers that may be negative: the first bits say how many bytes there are."""
    count = 1
    while not -(1 << (7 * count - 1)) <= number < 1 << (7 * count - 1):
        count += 1
    # As many ones as there are bytes, from the highest bit on; the sign makes zeros of them.
    ones = ((1 << count) - 1) << (7 * count)
    return (number % (1 << (8 * count)) ^ ones).to_bytes(count, "big")


def _tiling_problem(boxes: list[Box], shape: Shape) -> str | None:
    """Why boxes do not tile a shape; None if they do. Takes time in proportion to their number."""
    if len(boxes) > _MAX_PARTS:
        return f"it has {len(boxes)} parts, which is more than {_MAX_PARTS}"
    held = sum(map(size_of, boxes))
    if held != math.prod(shape):
        return f"its {len(boxes)} parts hold {held} of {math.prod(shape)} elements"
    if len(boxes) <= _MAX_UNEVEN:
        return tiling_problem(boxes, shape)
    cells = np.zeros(len(boxes), np.int64)
    count = 1
    for axis in range(len(shape)):
        starts, place = np.unique([box[axis][0] for box in boxes], return_inverse=True)
        ends = np.append(starts[1:], shape[axis])[place]
        if (ends != [box[axis][1] for box in boxes]).any():
            return f"its {len(boxes)} parts do not lie in a grid"
        cells = cells * len(starts) + place
        count *= len(starts)
        if count > len(boxes):
            return f"its {len(boxes)} parts do not lie in a grid"
    return None if len(np.unique(cells)) == len(boxes) else "two of its parts overlap"
