"""Files in an object store: values that are read in parts, with many requests under way at once.

A request takes long, and many take no longer than one. So the beginning of a file is read in one
request that is large enough for most headers, what is read next in small parts is read ahead, and
parts that lie close to each other are read together. What was read stays until it is forgotten.

TensorStore does not say how large a value is. It only refuses to read beyond its end. So whoever
knows from a header how large a file should be says that (`expect`), and two small requests tell
whether it is. Otherwise the size is searched for.

All parts must be of one value: each one comes with the generation of its value.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from ckpt_jax.store import objects
from ckpt_jax.store.workers import Workers

T = TypeVar("T")
R = TypeVar("R")
Span = tuple[int, bytes]  # where bytes begin, and the bytes

HEAD_NBYTES = 256 << 10  # of a file are read at first
WHOLE_NBYTES = 256 << 20  # larger files are not read as a whole before it is known what they hold
_SMALL_NBYTES = 64 << 10  # shorter parts are read with what follows them
_AHEAD_NBYTES = 256 << 10
_WINDOWS = 8  # of a file that were read ahead and are kept
_GAP_NBYTES = 64 << 10  # parts that lie this close are read together
_REQUEST_NBYTES = 4 << 20
_IN_FLIGHT_NBYTES = 16 << 20  # of one job
_FIRST_GUESS_NBYTES = 16 << 20  # of a file that is read as a whole
_LARGEST = 46  # as a power of two: no store has larger values
_PROBES = 32  # of one round of the search for a size


class AbsentError(Exception):
    """There is no such value."""


class ChangedError(Exception):
    """The value is not the one of which other parts were read."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file, from `start` to `stop`."""

    file: RemoteFile
    start: int
    stop: int


class RemoteFile:
    """A value of an object store that is read in parts.

    All methods raise `AbsentError` and `ChangedError`, and OSError if the store does not answer.

    Args:
      url: of the value.

    Attributes:
      url: the same.
      generation: of the value; None if nothing of it was read.
      is_named: whether a list or another file says that it is there; see `objects.read`.
    """

    def __init__(self, url: str):
        self.url = url
        self.generation: bytes | None = None
        self.is_named = False
        self._is_absent = not objects.has_key(url)
        self._length: int | None = None
        self._least, self._most = 0, 1 << _LARGEST  # bounds of the length
        self._spans: list[Span] = []  # parts that were read, sorted
        self._windows: deque[Span] = deque(maxlen=_WINDOWS)
        self._tail = b""
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether there is such a value."""
        try:
            self.head(1)
        except AbsentError:
            return False
        return True

    @property
    def known_length(self) -> int | None:
        """The size in bytes; None if it is not known yet."""
        return self._length

    @property
    def length(self) -> int:
        """The size in bytes."""
        self.head(HEAD_NBYTES)
        while self._length is None:
            self._narrow()
        return self._length

    def head(self, nbytes: int) -> bytes:
        """The first bytes; fewer if there are not as many."""
        wanted = nbytes if self._length is None else min(nbytes, self._length)
        found = self._kept(0, wanted)
        if found is None:
            found = self._up_to(0, max(nbytes, HEAD_NBYTES))
            self._keep(0, found)
        return found[:nbytes]

    def tail(self, nbytes: int) -> bytes:
        """The last bytes; fewer if there are not as many."""
        if self._length is not None:
            start = max(0, self._length - nbytes)
            if (found := self._kept(start, self._length)) is not None:
                return found
        if len(self._tail) < nbytes:
            try:
                self._tail = self._begin(-nbytes)()
            except EOFError:
                return self.head(nbytes)  # it has fewer
        return self._tail[-nbytes:]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`.

        Raises:
          EOFError: it ends before.
        """
        if stop - start < _SMALL_NBYTES:
            found = self.read_up_to(start, stop)
            if start + len(found) < stop:
                raise EOFError(self.url)
            return found
        if (found := self._kept(start, stop)) is not None:
            return found
        starts = range(start, stop, _REQUEST_NBYTES)
        asked = [self._begin(each, min(each + _REQUEST_NBYTES, stop)) for each in starts]
        return b"".join([outcome() for outcome in asked])

    def read_up_to(self, start: int, stop: int) -> bytes:
        """The same, or fewer bytes if it ends before."""
        wanted = stop if self._length is None else max(start, min(stop, self._length))
        if (found := self._kept(start, wanted)) is not None:
            return found
        if stop - start >= _SMALL_NBYTES:
            return self._up_to(start, stop)
        found = self._up_to(start, start + _AHEAD_NBYTES)
        self._windows.append((start, found))
        return found[: stop - start]

    def read_whole(self) -> None:
        """Reads all of it, unless it is very large, so that further reads need no requests."""
        data = self.head(HEAD_NBYTES)
        for stop in (_FIRST_GUESS_NBYTES, WHOLE_NBYTES):
            if self._length is None or len(data) < self._length:
                data += self._up_to(len(data), stop)
        with self._lock:
            self._spans = [(0, data)]

    def forget(self) -> None:
        """Frees the memory of what was read."""
        with self._lock:
            self._spans.clear()
            self._windows.clear()
            self._tail = b""

    def _begin(self, start: int, stop: int | None = None) -> Callable[[], bytes]:
        """Begins to read; the outcome raises EOFError if the value ends before."""
        if self._is_absent:
            raise AbsentError(self.url)
        is_named = self.is_named or self.generation is not None
        outcome = objects.reading(self.url, start, stop, is_named=is_named)

        def taken() -> bytes:
            found = outcome()
            with self._lock:
                if found is None and self.generation is None:
                    self._is_absent = True
                    raise AbsentError(self.url)
                if found is None or self.generation not in (None, found.generation):
                    raise ChangedError(self.url)
                self.generation = found.generation
            return found.value

        return taken

    def _up_to(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, or to the end, which is known then."""
        if self._length is not None:
            stop = min(stop, self._length)
            return self._begin(start, stop)() if start < stop else b""
        try:
            return self._begin(start, stop)()
        except EOFError:
            return self._rest(start)

    def _rest(self, start: int) -> bytes:
        """The bytes from `start` on, of which there are few."""
        try:
            found = self._begin(start)()
        except EOFError:  # it ends before `start`
            return b""
        self._length = start + len(found)
        return found

    def _kept(self, start: int, stop: int) -> bytes | None:
        """Bytes that were read already; None if they were not."""
        if start == stop:
            return b""
        with self._lock:
            number = bisect_right(self._spans, start, key=lambda span: span[0])
            near = [*self._spans[max(0, number - 1) : number], *self._windows]
            if self._length is not None:
                near.append((self._length - len(self._tail), self._tail))
        for begin, data in near:
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        return None

    def drop(self, span: Span) -> None:
        """Frees the memory of a part that was read."""
        with self._lock, suppress(ValueError):  # it may be forgotten already
            self._spans.remove(span)

    def _keep(self, start: int, data: bytes) -> Span:
        span = start, data
        with self._lock:
            insort(self._spans, span, key=lambda span: span[0])
        return span

    # --- the size ----------------------------------------------------------------------

    def _asked(self, offset: int) -> Callable[[], bool]:
        """Asks whether there is a byte at an offset."""
        outcome = self._begin(offset, offset + 1)

        def found() -> bool:
            try:
                outcome()
            except EOFError:
                self._most = min(self._most, offset)
                return False
            self._least = max(self._least, offset + 1)
            return True

        return found

    def _narrow(self) -> None:
        """Narrows the bounds of the length."""
        least, most = max(self._least, HEAD_NBYTES), self._most  # its head was read
        if most - least <= _AHEAD_NBYTES:
            self._up_to(least, most + 1)
            if self._length is None:  # it ends at `least`
                self._length = least
            return
        if most > _PROBES * least:
            offsets = [1 << power for power in range(least.bit_length(), most.bit_length() - 1)]
        else:
            step = -(-(most - least) // (_PROBES + 1))
            offsets = [*range(least + step, most, step)]
        for answer in [self._asked(offset) for offset in offsets]:
            answer()

    def _ask_for(self, length: int) -> Callable[[], None]:
        """Asks whether it has this length."""
        asked = [self._asked(offset) for offset in (length - 1, length) if offset >= 0]

        def answered() -> None:
            found = [answer() for answer in asked]
            if [True, *found][-2:] == [True, False]:
                self._length = length

        return answered


def expect(lengths: Mapping[RemoteFile, int]) -> None:
    """Asks all at once whether files have the lengths that their headers or an index tell."""
    unknown = [each for each in lengths.items() if each[0].known_length is None]
    for answer in [file._ask_for(length) for file, length in unknown]:
        answer()


def fetch(parts: Iterable[Part]) -> list[tuple[RemoteFile, Span]]:
    """Reads parts of files all at once, so that further reads of them need no requests. What is not
    there is left out. Returns what was read."""
    wanted = [
        Part(part.file, start, min(start + _REQUEST_NBYTES, part.stop))
        for part in parts
        if not part.file._is_absent and part.file._kept(part.start, part.stop) is None
        for start in range(part.start, part.stop, _REQUEST_NBYTES)
    ]
    wanted.sort(key=lambda part: (part.file.url, part.start))
    asked = [(each, each.file._begin(each.start, each.stop)) for each in _joined(wanted)]
    kept: list[tuple[RemoteFile, Span]] = []
    for part, outcome in asked:
        with suppress(AbsentError):
            try:
                found = outcome()
            except EOFError:
                found = part.file._rest(part.start)
            kept.append((part.file, part.file._keep(part.start, found)))
    return kept


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Requests for parts, which lie close together if they follow on each other."""
    last: Part | None = None
    for part in parts:
        if last is None:
            last = part
            continue
        gap, stop = part.start - last.stop, max(last.stop, part.stop)
        is_near = part.file is last.file and last.start <= part.start and gap <= _GAP_NBYTES
        if is_near and stop - last.start <= _REQUEST_NBYTES:
            last = Part(last.file, last.start, stop)
        else:
            yield last
            last = part
    if last is not None:
        yield last


class Ahead:
    """Parts of files in the order in which they will be read, some of which are under way."""

    def __init__(self, parts: Iterable[Part]):
        self._waiting = deque(_joined(parts))
        self._asked: deque[_Asked] = deque()

    def read_into(self, file: RemoteFile, buffer: memoryview, start: int) -> None:
        """Fills a buffer with one of the parts; those before it are left out.

        Raises:
          EOFError: the file ends before.
        """
        self._ask()
        while not self._asked[0].has(file, start, len(buffer)):
            self._asked.popleft()
            self._ask()
        begin = start - self._asked[0].part.start
        buffer[:] = self._asked[0].data[begin : begin + len(buffer)]

    def _ask(self) -> None:
        """Begins to read what comes next, as far as there is room."""
        while self._waiting:
            part = self._waiting[0]
            held = sum([asked.part.stop - asked.part.start for asked in self._asked])
            if self._asked and held + part.stop - part.start > _IN_FLIGHT_NBYTES:
                return
            self._waiting.popleft()
            self._asked.append(_Asked(part, part.file._begin(part.start, part.stop)))


@dataclass(frozen=True)
class _Asked:
    """A part that is under way."""

    part: Part
    outcome: Callable[[], bytes]

    @cached_property
    def data(self) -> memoryview:
        return memoryview(self.outcome())

    def has(self, file: RemoteFile, start: int, nbytes: int) -> bool:
        part = self.part
        return part.file is file and part.start <= start and start + nbytes <= part.stop


def together(path: str, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What a function returns for each item: at once if a path lies in an object store, where each
    call waits for requests, and one after the other elsewhere.

    >>> together("/files", len, ["a", "bc"])
    [1, 2]
    """
    if not objects.is_url(path) or len(items) < 2:
        return [act(item) for item in items]
    with Workers(min(objects.PARALLEL, len(items)), "ckpt-headers") as workers:
        asked = [workers.submit(copy_context().run, act, item) for item in items]
    return [each.result() for each in asked]
