"""Checksums as TensorFlow stores them: CRC-32C, *masked*.

A file that holds checksums may itself get one. So that the checksum of data with checksums in it is
as good as any other, the stored number is a rotated sum, which is called masked.
"""

from __future__ import annotations

_DELTA = 0xA282EAD8
_ALL = 0xFFFFFFFF


def mask(crc: int) -> int:
    """A CRC-32C as it is stored.

    >>> hex(mask(crc_of(b"123456789")))
    '0xc78ab0e5'
    """
    return (((crc >> 15) | (crc << 17)) + _DELTA) & _ALL


def unmask(stored: int) -> int:
    """The inverse of `mask`.

    >>> unmask(mask(123456789))
    123456789
    """
    rotated = (stored - _DELTA) & _ALL
    return ((rotated >> 17) | (rotated << 15)) & _ALL


def crc_of(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The CRC-32C of bytes, or of all bytes so far if `start` is that of those before them.

    >>> hex(crc_of(b"456789", crc_of(b"123")))
    '0xe3069283'
    """
    import crc32c  # only TensorFlow's files need it

    return crc32c.crc32c(data, start)
