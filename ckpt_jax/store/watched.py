"""Files that are read in parts, and that must not change between two reads.

No file stays open. So each read checks that the file still is the one whose header was read.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Hashable

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError


class Files:
    """The files of a checkpoint.

    Args:
      path: of the checkpoint, for errors.
    """

    def __init__(self, path: str):
        self.path = path
        self._found: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """The size of a file in bytes.

        Raises:
          CorruptCheckpointError: there is no such file.
        """
        with self._lock:
            if file not in self._found:
                self._found[file] = _identity(self._status(file))
            return self._found[file][2]

    def identity(self) -> Hashable | None:
        """A value that changes if a file is replaced or changed; None if one is gone."""
        try:
            return tuple([(file, *_identity(os.stat(file))) for file in sorted(self._found)])
        except OSError:
            return None

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """Bytes of a file.

        Raises:
          CorruptCheckpointError: the file ends before, or is not the one that was there.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size(file):
            raise self.damage(
                file, f"it has {self.size(file)} bytes, {offset + nbytes} were expected"
            )
        buffer = bytearray(nbytes)
        with self.opened(file) as source:
            source.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def opened(self, file: str) -> OpenFile:
        """Opens a file, which has to be the one whose size was asked for."""
        size = self.size(file)
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.damage(file, error.strerror or str(error)) from error
        if _identity(os.fstat(descriptor)) != self._found[file]:
            os.close(descriptor)
            raise self.damage(file, f"it was changed or replaced; it had {size} bytes")
        return OpenFile(self, file, descriptor)

    def damage(self, file: str, what: str, key: str | None = None) -> CorruptCheckpointError:
        """The error for a damaged file."""
        where = f"{key}: {file}" if key else file
        return CorruptCheckpointError(f"{where}: damaged or incomplete: {what}", file=file, key=key)

    def _status(self, file: str) -> os.stat_result:
        try:
            status = os.stat(file)
        except OSError as error:
            if file == self.path:
                raise CheckpointNotFoundError(f"{file}: there is no checkpoint") from error
            raise self.damage(file, error.strerror or str(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise self.damage(file, "it is not a regular file")
        return status


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile:
    """A file during a read."""

    def __init__(self, files: Files, file: str, descriptor: int):
        self._files, self._file, self._descriptor = files, file, descriptor

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from an offset on.

        Raises:
          CorruptCheckpointError: the file ends before.
        """
        done = 0
        while done < len(buffer):
            n = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if n == 0:
                raise self.damage(
                    f"it ends at {offset + done}, {offset + len(buffer)} bytes were expected"
                )
            done += n

    def damage(self, what: str) -> CorruptCheckpointError:
        """The error for damage in this file."""
        return self._files.damage(self._file, what)
