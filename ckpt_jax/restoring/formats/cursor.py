"""A cursor in a file that is read from front to back, and of which large parts are skipped."""

from __future__ import annotations

from ckpt_jax.readers import Files
from ckpt_jax.store.objects import is_url

_WINDOW_NBYTES, _REMOTE_WINDOW_NBYTES = 1 << 16, 1 << 20
_MAX_LINE_NBYTES = 4096


class Cursor:
    """Takes bytes from a file, one after the other.

    Args:
      files: to read with.
      file: path of the file.
      at, end: where to begin, and where the bytes end; by default all of the file.
    """

    def __init__(self, files: Files, file: str, at: int = 0, end: int | None = None):
        self.at = at
        # In a store the size of a file is not known before its end is reached.
        self._end = files.size(file) if end is None and not is_url(file) else end
        self._files, self._file = files, file
        self._window, self._start = b"", at
        self._window_nbytes = _REMOTE_WINDOW_NBYTES if is_url(file) else _WINDOW_NBYTES

    @property
    def end(self) -> int:
        """Where the bytes end."""
        if self._end is None:
            self._files.expect({self._file: self.at})
            self._end = self._files.size(self._file)
        return self._end

    def take(self, nbytes: int) -> bytes:
        """The next bytes.

        Raises:
          ValueError: there are fewer.
        """
        self._require(nbytes)
        begin = self.at - self._start
        if not 0 <= begin <= begin + nbytes <= len(self._window):
            length = max(nbytes, self._window_nbytes)
            if self._end is not None:
                length = min(length, self._end - self.at)
            self._window = self._files.read_up_to(self._file, self.at, length)
            self._start, begin = self.at, 0
            if len(self._window) < length:
                self._end = self.at + len(self._window)
                self._require(nbytes)
        self.at += nbytes
        return self._window[begin : begin + nbytes]

    def skip(self, nbytes: int) -> int:
        """Leaves out bytes, and returns where they begin.

        Raises:
          ValueError: there are fewer.
        """
        self._require(nbytes)
        self.at += nbytes
        return self.at - nbytes

    def line(self) -> bytes:
        """The bytes up to the next end of a line, which is left out.

        Raises:
          ValueError: there is no end of a line.
        """
        taken = bytearray()
        while (byte := self.take(1)) != b"\n":
            taken += byte
            if len(taken) > _MAX_LINE_NBYTES:
                raise ValueError("a line does not end")
        return bytes(taken)

    def uint(self, nbytes: int, order: str = "little") -> int:
        """The next bytes as a number without a sign."""
        return int.from_bytes(self.take(nbytes), "big" if order == "big" else "little")

    def _require(self, nbytes: int) -> None:
        if nbytes < 0 or (self._end is not None and self.at + nbytes > self._end):
            raise ValueError(f"{nbytes} bytes are expected, there are {self.end - self.at}")
