"""Files that are read in parts, and that must not change between two reads.

No file stays open. So each read checks that the file still is the one whose header was read. Files
in an object store are read as `remote` says.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.store.looks import Look, look_at
from ckpt_jax.store.objects import generations_of, is_url
from ckpt_jax.store.remote import (
    AbsentError,
    Ahead,
    ChangedError,
    Part,
    RemoteFile,
    expect,
    fetch,
)


class Files:
    """The files of a checkpoint, in a file system or in an object store.

    Args:
      path: of the checkpoint, for errors.
    """

    def __init__(self, path: str):
        self.path = path
        self._found: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        self._look: Look | None = look_at(path) if is_url(path) else None
        self._remote: dict[str, RemoteFile] = {}

    def size(self, file: str) -> int:
        """The size of a file in bytes.

        Raises:
          CorruptCheckpointError: there is no such file.
        """
        if is_url(file):
            with self._remote_file(file) as found:
                return found.length
        with self._lock:
            if file not in self._found:
                self._found[file] = _identity(self._status(file))
            return self._found[file][2]

    def has(self, file: str) -> bool:
        """Whether there is a file that another one names.

        Raises:
          OSError: an object store does not answer.
        """
        return self._known(file).is_there if is_url(file) else os.path.isfile(file)

    def identity(self) -> Hashable | None:
        """A value that changes if a file is replaced or changed; None if one is gone.

        Raises:
          OSError: an object store does not answer.
        """
        urls = sorted(url for url, file in self._remote.items() if file.generation is not None)
        generations = generations_of(urls)
        if None in generations:
            return None
        try:
            local = [(file, *_identity(os.stat(file))) for file in sorted(self._found)]
        except OSError:
            return None
        return (*zip(urls, generations, strict=True), *local)

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """Bytes of a file.

        Raises:
          CorruptCheckpointError: the file ends before, or is not the one that was there.
        """
        if is_url(file) and offset >= 0 and nbytes >= 0:
            with self._remote_file(file, offset + nbytes) as found:
                return found.read(offset, offset + nbytes)
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size(file):
            raise self._too_short(file, offset + nbytes)
        buffer = bytearray(nbytes)
        with self.opened(file) as source:
            source.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_up_to(self, file: str, offset: int, nbytes: int) -> bytes:
        """The same, or fewer bytes if the file ends before."""
        if is_url(file):
            with self._remote_file(file) as found:
                return found.read_up_to(offset, offset + nbytes)
        return self.read(file, offset, max(0, min(nbytes, self.size(file) - offset)))

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

    def _too_short(self, file: str, nbytes: int) -> CorruptCheckpointError:
        return self.damage(file, f"it has {self.size(file)} bytes, {nbytes} were expected")

    # --- in an object store; elsewhere these do nothing ------------------------------------

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Says how large files should be, so that it need not be searched for how large they are.

        Raises:
          CorruptCheckpointError: a file is missing.
        """
        found = {self._known(file): size for file, size in sizes.items() if is_url(file)}
        with self._translated():
            expect(found)

    def fetch(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Reads parts of files ahead, all at once: (file, start, stop). They need not be there."""
        wanted = [Part(self._known(file), *ends) for file, *ends in parts if is_url(file)]
        with self._translated():
            fetch(wanted)

    @contextmanager
    def fetched(self, parts: Iterable[tuple[str, int, int]]) -> Iterator[None]:
        """Reads parts of files ahead, and frees their memory when the block ends."""
        wanted = [Part(self._known(file), *ends) for file, *ends in parts if is_url(file)]
        with self._translated():
            kept = fetch(wanted)
        try:
            yield
        finally:
            for file, span in kept:
                file.drop(span)

    def fetch_whole(self, file: str) -> None:
        """Reads all of a file ahead, unless it is very large."""
        if is_url(file):
            with self._remote_file(file) as found:
                found.read_whole()

    def tail(self, file: str, nbytes: int) -> bytes:
        """The last bytes of a file in an object store, whose size need not be known."""
        with self._remote_file(file) as found:
            return found.tail(nbytes)

    def forget(self) -> None:
        """Frees the memory of what was read ahead."""
        if self._look is not None:
            self._look.forget()

    def ahead(self, parts: Iterable[tuple[str, int, int]]) -> Callable[[str], Source]:
        """Begins to read parts of files of an object store: (file, offset, number of bytes).

        Returns:
          A function that gives the source of a file. The parts have to be read in their order.
        """
        wanted = [Part(self._known(file), start, start + n) for file, start, n in parts]
        ahead = Ahead(wanted)
        return lambda file: _RemoteSource(self, file, ahead)

    def _known(self, file: str) -> RemoteFile:
        """The file at a URL, whose generation is part of the identity from now on."""
        if file not in self._remote:
            found = (self._look or look_at(file)).file(file)
            found.is_named = True
            self._remote[file] = found
        return self._remote[file]

    @contextmanager
    def _remote_file(self, file: str, nbytes: int = 0) -> Iterator[RemoteFile]:
        """The file at a URL, with at least that many bytes."""
        found = self._known(file)
        with self._translated():
            try:
                yield found
            except EOFError:
                raise self._too_short(file, nbytes) from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises errors about files at URLs as errors about a checkpoint."""
        try:
            yield
        except AbsentError as error:
            if str(error) == self.path:
                raise CheckpointNotFoundError(f"{error}: there is no checkpoint") from None
            raise self.damage(str(error), "No such file") from None
        except ChangedError as error:
            raise self.damage(str(error), "it was changed or replaced") from None

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


class Source(Protocol):
    """A file during a read."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from an offset on.

        Raises:
          CorruptCheckpointError: the file ends before.
        """
        ...

    def damage(self, what: str) -> CorruptCheckpointError:
        """The error for damage in this file."""
        ...


class _RemoteSource:
    """A file in an object store during a read."""

    def __init__(self, files: Files, file: str, ahead: Ahead):
        self._files, self._file, self._ahead = files, file, ahead

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self._files._remote_file(self._file, offset + len(buffer)) as found:
            self._ahead.read_into(found, buffer, offset)

    def damage(self, what: str) -> CorruptCheckpointError:
        return self._files.damage(self._file, what)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile:
    """A file of a file system during a read."""

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
