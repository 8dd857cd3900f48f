"""Seals: a message that carries the checksum of its own bytes.

A sealed message ends with one more field, a `fixed32` that holds the CRC-32 (zlib's polynomial)
of every byte before it. A protobuf parser reads it as an ordinary field; `unseal` needs no
parser, so damaged bytes never reach one.
"""

from __future__ import annotations

import zlib

from ckpt_jax.errors import CorruptCheckpointError

CHECKSUM_FIELD = 1000
_FIXED32 = 5


def _tag(field: int) -> bytes:
    number, tag = field << 3 | _FIXED32, bytearray()
    while number > 0x7F:
        tag.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*tag, number])


def seal(data: bytes, field: int = CHECKSUM_FIELD) -> bytes:
    """`data`, a serialized message, followed by its checksum as field number `field`."""
    return data + _tag(field) + zlib.crc32(data).to_bytes(4, "little")


def unseal(data: bytes, field: int = CHECKSUM_FIELD) -> bytes:
    """The message that was sealed.

    Raises:
      CorruptCheckpointError: the checksum is absent or does not match.

    >>> unseal(seal(b"abc"))
    b'abc'
    """
    tag = _tag(field)
    end = len(data) - len(tag) - 4
    if end < 0 or data[end:-4] != tag:
        raise CorruptCheckpointError(f"no checksum at the end of {len(data)} bytes")
    found, expected = zlib.crc32(memoryview(data)[:end]), int.from_bytes(data[-4:], "little")
    if found != expected:
        raise CorruptCheckpointError(f"checksum is {found:#010x}, expected {expected:#010x}")
    return data[:end]
