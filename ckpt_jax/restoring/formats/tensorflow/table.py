"""Sorted tables: the file format of `<prefix>.index`, which is LevelDB's.

A table is a sequence of *blocks*, and a footer of 48 bytes. A *data block* holds keys and values in
ascending order of the keys. The *index block* says where the data blocks lie: its values are
*handles*, that is offset and size of a block. The footer has the handle of the index block, and a
magic number at its end.

In a block, a key is stored without the beginning that it shares with the key before it. Every 16
entries there is a *restart*, an entry with its whole key. After the entries follow the positions of
the restarts, and their number. After each block follow a byte that says how it is compressed
(TensorFlow writes no compressed blocks), and a masked CRC-32C of the block and this byte.

A table from outside may be anything. Blocks are read one at a time, each byte of the file at most
once, and the keys take memory in proportion to the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.restoring.formats.tensorflow.checksums import crc_of, mask
from ckpt_jax.restoring.formats.tensorflow.varints import read_varint, varint

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER_NBYTES = 48

_TRAILER_NBYTES = 5
_RESTART_INTERVAL = 16
_BLOCK_NBYTES = 256 << 10  # of every block but the last, at least
_MAX_BLOCK_NBYTES = 64 << 20
# Keys are longer than what the file has of them. These are far beyond any real table.
_MAX_KEY_NBYTES = 64 << 10
_MAX_EXPANSION = 64
_FREE_NBYTES = 16 << 20

_COMPRESSIONS = {1: "snappy", 2: "zlib", 4: "zstd"}

Read = Callable[[int, int], bytes]
Entries = Iterator[tuple[bytes, bytes]]


# --- reading ---------------------------------------------------------------------------


def read_table(read: Read, size: int) -> Entries:
    """The keys and values of a table, in their order.

    Args:
      read: a function of (offset, number of bytes) that returns bytes of the file.
      size: of the file.

    Raises:
      ValueError: it is no table, or is damaged; raised during the iteration.
      UnsupportedFormatError: its blocks are compressed.
    """
    if size < FOOTER_NBYTES:
        raise ValueError(f"it is no index: it has {size} bytes, and a footer takes 48")
    end = size - FOOTER_NBYTES
    footer = read(end, FOOTER_NBYTES)
    if not footer.endswith(MAGIC):
        raise ValueError("it is no index, or is cut off: it does not end as one")
    offset, length, at = _handle(footer, 0, end)
    budget = _Budget(_FREE_NBYTES + _MAX_EXPANSION * size)
    for _ in _block(read, offset, length, budget):
        pass  # a block of which no table makes use
    offset, length, _ = _handle(footer, at, end)
    first = 0
    last: bytes | None = None
    for _, handle in _block(read, offset, length, budget):
        offset, length, _ = _handle(handle, 0, end)
        if offset < first:
            raise ValueError(f"the block at {offset} begins before the one before it ends")
        first = offset + length + _TRAILER_NBYTES
        for key, value in _block(read, offset, length, budget):
            if last is not None and key <= last:
                raise ValueError(f"the key {key[:100]!r} is out of order")
            last = key
            yield key, value


class _Budget:
    """How many bytes of keys may still be made."""

    def __init__(self, nbytes: int):
        self.left = nbytes

    def take(self, nbytes: int) -> None:
        self.left -= nbytes
        if nbytes > _MAX_KEY_NBYTES or self.left < 0:
            raise ValueError("its keys are longer than those of any real index")


def _handle(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """The offset and size of a block that has to lie before `end`, and the position after these."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    if offset + size + _TRAILER_NBYTES > end:
        raise ValueError(f"a block of {size} bytes at {offset} lies outside of the file")
    if size > _MAX_BLOCK_NBYTES:
        raise ValueError(f"a block of {size} bytes is larger than that of any real index")
    return offset, size, at


def _block(read: Read, offset: int, size: int, budget: _Budget) -> Entries:
    data = read(offset, size + _TRAILER_NBYTES)
    kind, stored = struct.unpack_from("<BI", data, size)
    if mask(crc_of(memoryview(data)[: size + 1])) != stored:
        raise ValueError(f"the checksum of the block at {offset} is wrong")
    if kind:
        name = _COMPRESSIONS.get(kind, f"unknown method {kind}")
        raise UnsupportedFormatError(
            f"its blocks are compressed ({name}), which TensorFlow itself never does. Write the "
            "checkpoint again with TensorFlow"
        )
    return _entries(data, size, budget)


def _entries(data: bytes, size: int, budget: _Budget) -> Entries:
    restarts = struct.unpack_from("<I", data, size - 4)[0] if size >= 4 else 0
    end = size - 4 - 4 * restarts
    if end < 0:
        raise ValueError("a block is too small for what it says of itself")
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(data, at)
        own, at = read_varint(data, at)
        length, at = read_varint(data, at)
        if shared > len(key) or at + own + length > end:
            raise ValueError("an entry lies outside of its block")
        budget.take(shared + own)
        key = key[:shared] + data[at : at + own]
        at += own
        yield key, data[at : at + length]
        at += length


# --- writing ---------------------------------------------------------------------------


def table(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The bytes of a table, block by block; the inverse of `read_table`.

    Args:
      entries: keys in ascending order, and values.

    >>> written = b"".join(table([(b"a", b"1"), (b"ab", b"2")]))
    >>> list(read_table(lambda offset, nbytes: written[offset : offset + nbytes], len(written)))
    [(b'a', b'1'), (b'ab', b'2')]
    """
    handles: list[tuple[bytes, bytes]] = []
    offset = 0

    def block(pairs: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        nonlocal offset
        content = _content(pairs)
        handle = varint(offset) + varint(len(content))
        sealed = content + b"\0"
        sealed += struct.pack("<I", mask(crc_of(sealed)))
        offset += len(sealed)
        return handle, sealed

    group: list[tuple[bytes, bytes]] = []
    nbytes = 0
    for key, value in entries:
        group.append((key, value))
        nbytes += len(key) + len(value)
        if nbytes >= _BLOCK_NBYTES:
            handle, sealed = block(group)
            handles.append((key, handle))
            yield sealed
            group, nbytes = [], 0
    if group:
        handle, sealed = block(group)
        handles.append((group[-1][0], handle))
        yield sealed
    empty, sealed = block([])
    yield sealed
    handle, sealed = block(handles)
    yield sealed
    yield (empty + handle).ljust(FOOTER_NBYTES - len(MAGIC), b"\0") + MAGIC


def _content(pairs: list[tuple[bytes, bytes]]) -> bytes:
    parts: list[bytes] = []
    restarts = [0]
    last, at = b"", 0
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % _RESTART_INTERVAL:
            shared = _common(last, key)
        elif number:
            restarts.append(at)
        part = varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:]
        parts += [part, value]
        at += len(part) + len(value)
        last = key
    return b"".join(parts) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _common(a: bytes, b: bytes) -> int:
    """The number of bytes that two keys begin with in common."""
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
