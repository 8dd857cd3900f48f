"""Byte strings as TensorFlow stores them in a data file.

The length as a varint, a masked CRC-32C of the length, and the bytes. The checksum of the length is
taken over its four bytes (eight if it needs more), and the checksum in the index over those bytes,
the stored checksum, and the bytes of the string.
"""

from __future__ import annotations

import struct

from ckpt_jax.restoring.formats.tensorflow.checksums import crc_of, mask
from ckpt_jax.restoring.formats.tensorflow.varints import read_varint, varint


def decode(data: bytes, crc: int) -> bytes:
    """The byte string that is stored as `data`; `crc` is the masked checksum in the index.

    Raises:
      ValueError: it is damaged.
    """
    length, at = read_varint(data, 0)
    head, running = _head(length)
    start = at + len(head)
    if data[at:start] != head:
        raise ValueError("the checksum of its length is wrong")
    value = data[start:]
    if len(value) != length:
        raise ValueError(f"its length is {length}, but it has {len(value)} bytes")
    if mask(crc_of(value, running)) != crc:
        raise ValueError("its checksum is wrong")
    return value


def encode(value: bytes) -> tuple[bytes, int]:
    """The stored form of a byte string, and its masked checksum for the index.

    >>> decode(*encode(b"abc"))
    b'abc'
    """
    head, running = _head(len(value))
    return varint(len(value)) + head + value, mask(crc_of(value, running))


def _head(length: int) -> tuple[bytes, int]:
    """The checksum that is stored after a length, and the running one up to there."""
    crc = crc_of(length.to_bytes(4 if length < 1 << 32 else 8, "little"))
    head = struct.pack("<I", mask(crc))
    return head, crc_of(head, crc)


def length_in(nbytes: int) -> int | None:
    """The length of a string whose stored form takes so many bytes; None if there is none.

    >>> length_in(len(encode(b"abc")[0])), length_in(3)
    (3, None)
    """
    for size in range(1, 11):
        length = nbytes - 4 - size
        if length >= 0 and len(varint(length)) == size:
            return length
    return None
