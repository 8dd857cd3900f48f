"""Seals: a message that carries the checksum of its own bytes.

A sealed message ends with one more field, number 1000. It is a `fixed32` that holds the CRC-32
(zlib's polynomial) of every byte before it. To a protobuf parser it is an ordinary field. `unseal`
needs no parser, so damaged bytes never reach one.
"""

from __future__ import annotations

import zlib

from ckpt_jax.errors import CorruptCheckpointError

_TAG = b"\xc5\x3e"  # of field 1000 with the wire type fixed32: the varint 1000 << 3 | 5


def seal(data: bytes) -> bytes:
    """`data`, a serialized message, followed by its checksum."""
    return data + _TAG + zlib.crc32(data).to_bytes(4, "little")


def unseal(data: bytes) -> bytes:
    """The message that was sealed.

    Raises:
      CorruptCheckpointError: the checksum is absent or does not match.

    >>> unseal(seal(b"abc"))
    b'abc'
    """
    end = len(data) - len(_TAG) - 4
    if end < 0 or data[end:-4] != _TAG:
        raise CorruptCheckpointError(f"no checksum at the end of {len(data)} bytes")
    found, expected = zlib.crc32(memoryview(data)[:end]), int.from_bytes(data[-4:], "little")
    if found != expected:
        raise CorruptCheckpointError(f"checksum is {found:#010x}, expected {expected:#010x}")
    return data[:end]
