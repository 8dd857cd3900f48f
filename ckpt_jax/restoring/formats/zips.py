"""Zip files as places: where their members lie, so that members can be read in parts.

Most libraries store arrays in zip files without compressing them. Such a member is plain bytes at
an offset. A compressed member can only be read as a whole.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.restoring.formats.cursor import Cursor
from ckpt_jax.store.looks import head_of
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.watched import Files

_MAGIC = b"PK\x03\x04"
_EMPTY = b"PK\x05\x06"
_LONG_END = b"PK\x06\x06"
_LOCAL_HEADER_NBYTES = 30
_HEAD_NBYTES = 512  # of a member: its header, and that of an array
_COMPRESSED_HEAD_NBYTES = 8 << 10
_FIRST_NBYTES, _LAST_NBYTES = 16 << 10, 64 << 10  # of an archive in an object store
_MAX_EXPANSION = {zipfile.ZIP_DEFLATED: 1032}  # no memory is allocated for more
_COPY_NBYTES = 1 << 20
_MAX_NAME_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip file.

    Attributes:
      name: of the member.
      nbytes: its size, uncompressed.
      crc: its CRC-32.
      offset: where its bytes lie in the file; None if they are compressed.
    """

    name: str
    nbytes: int
    crc: int
    offset: int | None


class Archive:
    """A zip file, or a part of a file that is one.

    Args:
      files: to read with.
      file: path of the file.
      base, nbytes: the part; all of the file by default.

    Attributes:
      members: by name.

    Raises:
      CorruptCheckpointError: it is no zip file, or a member does not lie inside it.
      UnsupportedFormatError: a member is encrypted, or compressed in an unusual way.
    """

    def __init__(self, files: Files, file: str, base: int = 0, nbytes: int | None = None):
        self.file = file
        self._files, self._base = files, base
        if nbytes is None:
            _expect_size(files, file)
        self._nbytes = files.size(file) - base if nbytes is None else nbytes
        files.fetch(self._ends())
        with self._damage(), zipfile.ZipFile(self._window()) as archive:
            self._infos = {info.filename: info for info in archive.infolist()}
        files.fetch([self._head(info) for info in self._infos.values()])
        self.members = {name: self._member(info) for name, info in self._infos.items()}

    def read(self, name: str, nbytes: int | None = None) -> bytes:
        """The first bytes of a member; all of it by default."""
        member = self.members[name]
        wanted = member.nbytes if nbytes is None else min(nbytes, member.nbytes)
        if member.offset is not None:
            return self._files.read(self.file, member.offset, wanted)
        buffer = bytearray(wanted)
        self.fill(name, memoryview(buffer))
        return bytes(buffer)

    def cursor(self, name: str) -> Cursor:
        """A cursor in a member that is not compressed."""
        member = self.members[name]
        if member.offset is None:
            raise ValueError(f"{name} is compressed")
        return Cursor(self._files, self.file, member.offset, member.offset + member.nbytes)

    def fill(self, name: str, buffer: memoryview, skip: int = 0) -> None:
        """Fills a buffer from a member, after the first `skip` bytes.

        Its CRC is checked if the buffer takes all the rest of the member.
        """
        info = self._infos[name]
        with self._damage(name), self._files.fetched(self._compressed(info, skip + len(buffer))):
            window = self._window()
            window.seek(self._start(info))
            member = zipfile.ZipExtFile(window, "r", info)
            while skip:
                skip -= len(member.read(min(skip, _COPY_NBYTES))) or skip
            done = 0
            while done < len(buffer):
                part = member.read(min(len(buffer) - done, _COPY_NBYTES))
                if not part:
                    raise ValueError(f"it ends after {done} of {len(buffer)} bytes")
                buffer[done : done + len(part)] = part
                done += len(part)
            member.read(1)  # the end is where the CRC is checked

    def _member(self, info: zipfile.ZipInfo) -> Member:
        size, name = info.file_size, info.filename
        if info.flag_bits & 1:
            raise UnsupportedFormatError(f"{self.file}: {name}: it is encrypted. Decrypt it first")
        if info.compress_type != zipfile.ZIP_STORED:
            if size > info.compress_size * _MAX_EXPANSION.get(info.compress_type, 1 << 16):
                what = f"{info.compress_size} compressed bytes cannot be {size} bytes"
                raise self._files.damage(self.file, what, name)
            return Member(name, size, info.CRC, None)
        with self._damage(name):
            if info.compress_size != size:
                raise ValueError(f"it has {info.compress_size} bytes, {size} were expected")
            return Member(name, size, info.CRC, self._base + self._start(info))

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin in the archive.

        Raises:
          ValueError: they do not lie inside it.
        """
        at = info.header_offset
        if at < 0 or at + _LOCAL_HEADER_NBYTES > self._nbytes:
            raise ValueError("its header does not lie inside the file")
        header = self._files.read(self.file, self._base + at, _LOCAL_HEADER_NBYTES)
        if header[:4] != _MAGIC:
            raise ValueError("its header is damaged")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = at + _LOCAL_HEADER_NBYTES + lengths
        if start + info.compress_size > self._nbytes:
            raise ValueError(f"it ends at {start + info.compress_size} of {self._nbytes} bytes")
        return start

    def _ends(self) -> list[tuple[str, int, int]]:
        """Where the directory lies, and in small archives what comes first."""
        start, stop = self._base, self._base + self._nbytes
        return [
            (self.file, start, min(start + _FIRST_NBYTES, stop)),
            (self.file, max(start, stop - _LAST_NBYTES), stop),
        ]

    def _head(self, info: zipfile.ZipInfo) -> tuple[str, int, int]:
        """Where the header of a member lies, and the beginning of an array in it."""
        is_compressed = info.compress_type != zipfile.ZIP_STORED
        at = self._base + max(info.header_offset, 0)
        nbytes = _COMPRESSED_HEAD_NBYTES if is_compressed else _HEAD_NBYTES
        return self.file, at, min(at + nbytes, self._base + self._nbytes)

    def _compressed(self, info: zipfile.ZipInfo, nbytes: int) -> list[tuple[str, int, int]]:
        """Where the bytes lie that give the first ones of a compressed member. Very few were
        fetched with its header."""
        file, at, stop = self._head(info)
        if nbytes <= _HEAD_NBYTES:
            return [(file, at, stop)]
        needed = min(info.compress_size, nbytes + _COMPRESSED_HEAD_NBYTES)
        return [(file, at, max(stop, at + _HEAD_NBYTES + needed))]

    def _window(self) -> _Window:
        return _Window(self._files, self.file, self._base, self._nbytes)

    @contextmanager
    def _damage(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:  # compressed in an unusual way
            raise UnsupportedFormatError(f"{self.file}: {name}: {error}") from error
        except CorruptCheckpointError as error:
            if name is None or error.key is not None:
                raise
            raise self._files.damage(self.file, str(error), name) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
            if is_url(self.file) and isinstance(error, OSError) and error.errno is not None:
                raise  # the store has failed
            raise self._files.damage(self.file, str(error), name) from error


def _expect_size(files: Files, file: str) -> None:
    """Says how large a zip file in an object store should be, as its end tells."""
    if not is_url(file):
        return
    tail = files.tail(file, _LAST_NBYTES)
    at = tail.rfind(_EMPTY)
    if at < 0 or len(tail) < at + 22:
        return
    nbytes, offset = struct.unpack_from("<LL", tail, at + 12)  # of the directory
    size = offset + nbytes + len(tail) - at
    long = tail.rfind(_LONG_END, 0, at)
    if offset == 0xFFFFFFFF and 0 <= long and at >= 20:
        (offset,) = struct.unpack_from("<Q", tail, at - 12)  # of the record `_LONG_END`
        size = offset + len(tail) - long
    files.expect({file: size})


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, files: Files, file: str, base: int, nbytes: int):
        self._files, self._file, self._base, self._nbytes = files, file, base, nbytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._at, self._nbytes)[whence]
        if start + offset < 0:
            raise OSError("seek to before the beginning")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._nbytes - self._at)
        size = rest if size is None or size < 0 else min(size, rest)
        data = self._files.read(self._file, self._base + self._at, size)
        self._at += size
        return data


def first_member(path: str) -> str | None:
    """The name of the first member of a zip file, "" if it has none; None if it is no zip file.

    It is read from the beginning of the file, so a truncated file has one, too.
    """
    header = head_of(path, _LOCAL_HEADER_NBYTES + _MAX_NAME_NBYTES)
    if header[:4] == _EMPTY:
        return ""
    if header[:4] != _MAGIC:
        return None
    length = int.from_bytes(header[26:28], "little")
    name = header[_LOCAL_HEADER_NBYTES : _LOCAL_HEADER_NBYTES + length]
    return name.decode("utf-8", "replace")
