"""Variable-length integers: seven bits a byte, the lowest first; the last byte is below 128."""

from __future__ import annotations

_MAX_NBYTES = 10


def varint(number: int) -> bytes:
    """A number that is not negative.

    >>> varint(5), varint(300)
    (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a position, and the position after it.

    Raises:
      ValueError: the data ends before, or the number has more than 64 bits.
    """
    number = shift = 0
    try:
        while (byte := data[at]) > 127:
            number |= (byte & 127) << shift
            shift += 7
            at += 1
            if shift >= 7 * _MAX_NBYTES:
                raise ValueError("a number is too long")
    except IndexError:
        raise ValueError("a number is cut off") from None
    number |= byte << shift
    if number >= 1 << 64:
        raise ValueError("a number is too large")
    return number, at + 1
