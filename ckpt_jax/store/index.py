"""The index: which bytes hold which slice of which array.

Terms. A *slice* is a box of an array. Its *layout* is everything that it may share with slices of
other arrays: dtype, shape of the whole array, box, number of bytes. A *stack* is a two-dimensional
array of bytes in a shard. The *place* of a slice is a shard, a stack of that shard, a row of that
stack, and an offset into that row. A key's *pattern* is the tuple of layouts of its slices: a model
has many arrays and few patterns.

An index holds the slices as columns of integers, ordered by key and then by layout. Places are
checked on whole columns at once. The slices of one array have to agree with each other, must not
overlap and must leave no hole; this is checked once for each distinct pattern. So the cost per
slice is a few array operations.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError

from ckpt_jax.errors import CorruptCheckpointError, ShardError, UnsupportedFormatError
from ckpt_jax.graph._proto import index_pb2
from ckpt_jax.graph.boxes import Box, Shape, inside, overlap, size_of
from ckpt_jax.graph.dtypes import BYTES, dtype_of
from ckpt_jax.store.seal import seal, unseal

FORMAT_VERSION = 1
INDEX_KEY = "_INDEX"  # where the database of a shard or of a checkpoint holds its index

_LIMIT = 1 << 62  # sums of two numbers below it fit into an int64
_MAX_RANK = 64
_ID = re.compile(r"[0-9a-f]{16}")
_COLUMNS = {
    "key": "<u4",
    "layout": "<u4",
    "shard": "<u4",
    "stack": "<u4",
    "row": "<u8",
    "offset": "<u8",
}


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """The properties that slices of different arrays share; see `index.proto`."""

    dtype: str
    shape: Shape
    box: Box
    nbytes: int

    @property
    def is_bytes(self) -> bool:
        """Whether it is the layout of a byte string."""
        return self.dtype == BYTES


@dataclass(frozen=True, slots=True)
class StackShape:
    """The sizes of a stack; see `index.proto`."""

    rows: int
    row_nbytes: int
    chunk_nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One database of values; see `index.proto`."""

    id: str
    directory: str
    stacks: tuple[StackShape, ...]
    files_nbytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The slices of a shard or checkpoint, as columns of int64; see the module's docstring.

    The constructor takes columns that are known to be consistent and ordered.

    Attributes:
      shards, layouts, keys: the tables that the columns point into.
      key, layout, shard, stack, row, offset: the columns, see `index.proto`.
      starts: the slices of key number k are the rows from starts[k] to starts[k + 1].
      patterns: the distinct tuples of layout numbers.
      pattern: for each key number, an index into `patterns`.
      number: key -> key number.
    """

    shards: tuple[Shard, ...]
    layouts: tuple[Layout, ...]
    keys: tuple[str, ...]
    key: np.ndarray
    layout: np.ndarray
    shard: np.ndarray
    stack: np.ndarray
    row: np.ndarray
    offset: np.ndarray

    starts: np.ndarray = field(init=False)
    patterns: tuple[tuple[int, ...], ...] = field(init=False)
    pattern: list[int] = field(init=False)
    number: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        starts = np.searchsorted(self.key, np.arange(len(self.keys) + 1))
        raw = self.layout.tobytes()
        cuts = (starts * 8).tolist()
        distinct: dict[bytes, int] = {}
        pattern = [
            distinct.setdefault(raw[a:b], len(distinct)) for a, b in itertools.pairwise(cuts)
        ]
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(
            self, "patterns", tuple(tuple(np.frombuffer(p, np.int64).tolist()) for p in distinct)
        )
        object.__setattr__(self, "number", {key: i for i, key in enumerate(self.keys)})

    def __contains__(self, key: object) -> bool:
        return key in self.number

    @property
    def is_shard(self) -> bool:
        """Whether this is a shard's own index, not the index of a whole checkpoint."""
        return len(self.shards) == 1 and self.shards[0].directory == "."

    @property
    def total_nbytes(self) -> int:
        """The size of all slices."""
        return sum([self.layouts[i].nbytes for i in self.layout.tolist()])

    def layout_of(self, key: str) -> Layout:
        """The layout of the first slice of `key`, which tells the array's dtype and shape."""
        return self.layouts[self.patterns[self.pattern[self.number[key]]][0]]

    def nbytes(self, key: str) -> int:
        """The size of the array or byte string under `key`."""
        pattern = self.patterns[self.pattern[self.number[key]]]
        return sum([self.layouts[i].nbytes for i in pattern])

    def moved(self, directory: str, files_nbytes: int) -> Index:
        """This index of one shard, as seen from a checkpoint that holds it in `directory`."""
        (shard,) = self.shards
        moved = copy.copy(self)  # columns are shared
        shards = (dataclasses.replace(shard, directory=directory, files_nbytes=files_nbytes),)
        object.__setattr__(moved, "shards", shards)
        return moved

    def to_bytes(self) -> bytes:
        """This index as a sealed message."""
        message = index_pb2.Index(
            format_version=FORMAT_VERSION,
            keys=self.keys,
            **{name: getattr(self, name).astype(kind).tobytes() for name, kind in _COLUMNS.items()},
        )
        for shard in self.shards:
            added = message.shards.add(
                id=shard.id, directory=shard.directory, files_nbytes=shard.files_nbytes
            )
            for s in shard.stacks:
                added.stacks.add(rows=s.rows, row_nbytes=s.row_nbytes, chunk_nbytes=s.chunk_nbytes)
        for layout in self.layouts:
            message.layouts.add(
                dtype=layout.dtype,
                shape=layout.shape,
                start=[start for start, _ in layout.box],
                stop=[stop for _, stop in layout.box],
                nbytes=layout.nbytes,
            )
        return seal(message.SerializeToString(deterministic=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        """Reads what `to_bytes` wrote and checks that all of it is consistent.

        The slices may leave holes in arrays only if this is a shard's own index.

        Args:
          data: a sealed message; it may come from anywhere.

        Raises:
          CorruptCheckpointError: some part of it contradicts another, or is impossible.
          UnsupportedFormatError: a later version of this library wrote it.
        """
        try:
            message = index_pb2.Index.FromString(unseal(data))
        except DecodeError as error:
            raise CorruptCheckpointError(f"index cannot be parsed: {error}") from error
        if message.format_version > FORMAT_VERSION:
            raise UnsupportedFormatError(
                f"index has format version {message.format_version}, but this ckpt_jax reads "
                f"versions up to {FORMAT_VERSION}; install a newer ckpt_jax"
            )
        _check(message.format_version == FORMAT_VERSION, "format version is missing")
        shards = tuple([_shard(s) for s in message.shards])
        _check(len({s.id for s in shards}) == len(shards), "two shards have the same id")
        alone = len(shards) == 1 or "." not in [s.directory for s in shards]
        _check(alone, "a shard in directory '.' is not the only one")
        layouts = tuple([_layout(m) for m in message.layouts])
        _check(_ascending(layouts), "layouts are not sorted")
        keys = tuple(message.keys)
        _check(_ascending(keys), "keys are not sorted")
        columns = [_column(getattr(message, name), kind) for name, kind in _COLUMNS.items()]
        _check(len({c.size for c in columns}) == 1, "columns differ in length")
        _check_columns(shards, layouts, keys, *columns)
        index = cls(shards, layouts, keys, *columns)
        for problem in _problems(index, whole=not index.is_shard):
            raise CorruptCheckpointError(f"index is inconsistent: {problem}")
        return index


def _check(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise CorruptCheckpointError(f"index is inconsistent: {message}")


def _ascending(values: Sequence[str] | Sequence[Layout]) -> bool:
    return all(map(operator.lt, values, values[1:]))


def _column(data: bytes, kind: str) -> np.ndarray:
    _check(len(data) % np.dtype(kind).itemsize == 0, "a column is cut off")
    values = np.frombuffer(data, kind)
    _check(not values.size or values.max() < _LIMIT, "a number is too large")
    return values.astype(np.int64)


def _shard(message: index_pb2.Shard) -> Shard:
    _check(_ID.fullmatch(message.id) is not None, f"shard id {message.id[:40]!r}")
    directory = message.directory
    parts = directory.split("/")
    safe = not {"", ".", ".."} & set(parts) and "\\" not in directory and "\0" not in directory
    _check(safe or directory == ".", f"shard directory {directory[:80]!r}")
    stacks = []
    for s in message.stacks:
        _check(0 < s.rows < _LIMIT and 0 < s.chunk_nbytes <= s.row_nbytes < _LIMIT, "stack size")
        stacks.append(StackShape(s.rows, s.row_nbytes, s.chunk_nbytes))
    return Shard(message.id, directory, tuple(stacks), message.files_nbytes)


def _layout(message: index_pb2.Layout) -> Layout:
    rank = len(message.shape)
    _check(rank <= _MAX_RANK, f"rank {rank}")
    _check(len(message.start) == len(message.stop) == rank, "a box and its shape differ in rank")
    shape = tuple(message.shape)
    box = tuple(zip(message.start, message.stop, strict=True))
    _check(inside(box, shape), f"box {box} does not lie inside shape {shape}")
    nbytes = message.nbytes
    if message.dtype == BYTES:
        _check(rank == 0 and nbytes < _LIMIT, "a byte string has a shape")
    else:
        try:
            itemsize = dtype_of(message.dtype).itemsize
        except ValueError as error:
            raise CorruptCheckpointError(f"index is inconsistent: {error}") from error
        _check(math.prod([n or 1 for n in shape]) * itemsize < _LIMIT, f"shape {shape}")
        _check(nbytes == size_of(box) * itemsize, f"box {box} has {nbytes} bytes")
    return Layout(message.dtype, shape, box, nbytes)


def _check_columns(
    shards: tuple[Shard, ...],
    layouts: tuple[Layout, ...],
    keys: tuple[str, ...],
    key: np.ndarray,
    layout: np.ndarray,
    shard: np.ndarray,
    stack: np.ndarray,
    row: np.ndarray,
    offset: np.ndarray,
) -> None:
    steps = np.diff(key, prepend=0)
    covered = key[-1] + 1 if key.size else 0
    known = covered == len(keys) and (not key.size or key[0] == 0)
    _check(known and np.all((steps == 0) | (steps == 1)), "not each key has slices")
    _check(np.all(layout < len(layouts)), "unknown layout")
    _check(np.all(np.diff(layout)[steps[1:] == 0] > 0), "slices of a key are not sorted")
    _check(np.all(shard < len(shards)), "unknown shard")
    nbytes = np.array([m.nbytes for m in layouts], np.int64)[layout]
    empty = nbytes == 0
    _check(not np.any((stack | row | offset)[empty]), "a slice of zero bytes has a place")
    stored = ~empty
    shard, stack, row, offset = shard[stored], stack[stored], row[stored], offset[stored]
    counts = np.array([len(s.stacks) for s in shards], np.int64)
    _check(np.all(stack < counts[shard]), "unknown stack")
    place = np.concatenate([[0], np.cumsum(counts)])[shard] + stack
    rows = np.array([t.rows for s in shards for t in s.stacks], np.int64)
    row_nbytes = np.array([t.row_nbytes for s in shards for t in s.stacks], np.int64)
    _check(np.all(row < rows[place]), "unknown row")
    stop = offset + nbytes[stored]
    _check(np.all(stop <= row_nbytes[place]), "a slice exceeds its row")
    order = np.lexsort((offset, row, place))
    place, row, offset, stop = place[order], row[order], offset[order], stop[order]
    shared = (np.diff(place) == 0) & (np.diff(row) == 0) & (offset[1:] < stop[:-1])
    _check(not np.any(shared), "two slices share bytes")


@dataclass(frozen=True, slots=True)
class _Clash:
    """A problem of a pattern: a text, and the positions of the slices that it is about."""

    text: str
    slices: tuple[int, ...]


def _clashes(layouts: Sequence[Layout], *, whole: bool) -> Iterator[_Clash]:
    first = layouts[0]
    agree = True
    for i, other in enumerate(layouts):
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            agree = False
            yield _Clash(
                f"{other.dtype}{list(other.shape)} disagrees with {first.dtype}{list(first.shape)}",
                (0, i),
            )
    if not agree:
        return
    boxes = [layout.box for layout in layouts]
    pair = overlap(boxes)
    if pair is None and len(set(boxes)) < len(boxes):  # empty slices overlap with no other
        twice = next(box for i, box in enumerate(boxes) if box in boxes[:i])
        pair = (twice, twice)
    if pair is not None:
        a = boxes.index(pair[0])
        b = boxes.index(pair[1], a + 1) if pair[0] == pair[1] else boxes.index(pair[1])
        what = "is stored twice" if pair[0] == pair[1] else f"overlaps slice {pair[1]}"
        yield _Clash(f"slice {pair[0]} {what}", (a, b))
    held, total = sum(map(size_of, boxes)), math.prod(first.shape)
    if whole and pair is None and held != total:
        yield _Clash(
            f"{len(boxes)} slices hold {held} of {total} elements, so there is a hole",
            tuple(range(len(boxes))),
        )


def _problems(index: Index, *, whole: bool) -> Iterator[str]:
    clashes = [
        tuple(_clashes([index.layouts[i] for i in pattern], whole=whole))
        for pattern in index.patterns
    ]
    if not any(clashes):
        return
    for number, key in enumerate(index.keys):
        for clash in clashes[index.pattern[number]]:
            shards = index.shard[index.starts[number] + np.array(clash.slices)]
            names = sorted({index.shards[i].directory for i in shards.tolist()})
            yield f"{key}: {clash.text} (in {', '.join(names)})"


def merge_indexes(indexes: Sequence[Index]) -> Index:
    """The index of all slices of `indexes`, which have to make up whole arrays.

    Raises:
      ShardError: two shards have the same id; or a slice is stored twice, or slices overlap,
        leave a hole, or disagree on dtype or shape. All such problems are listed.
    """
    shards = tuple([shard for index in indexes for shard in index.shards])
    keys = tuple(sorted(set().union(*[index.keys for index in indexes])))
    layouts = tuple(sorted(set().union(*[index.layouts for index in indexes])))
    number = {key: i for i, key in enumerate(keys)}
    layout_number = {layout: i for i, layout in enumerate(layouts)}
    shard_base = np.cumsum([0, *[len(index.shards) for index in indexes]])
    parts = [[np.empty(0, np.int64)] * len(_COLUMNS)]
    for index, base in zip(indexes, shard_base, strict=False):
        to_key = np.fromiter(map(number.__getitem__, index.keys), np.int64, len(index.keys))
        to_layout = np.array([layout_number[m] for m in index.layouts], np.int64)
        parts.append(
            [
                to_key[index.key],
                to_layout[index.layout],
                index.shard + base,
                index.stack,
                index.row,
                index.offset,
            ]
        )
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    merged = Index(shards, layouts, keys, *[column[order] for column in columns])
    problems = list(_problems(merged, whole=True))
    ids = [shard.id for shard in shards]
    problems += [
        f"shard {shard.directory} has the id of another shard, {shard.id}"
        for i, shard in enumerate(shards)
        if shard.id in ids[:i]
    ]
    if problems:
        raise ShardError(f"{len(problems)} problems in shards:\n  " + "\n  ".join(problems))
    return merged
