"""The index: which bytes hold which slice of which array.

Terms. A *slice* is a box of an array. Its *layout* is everything that it may share with slices of
other arrays: dtype, shape of the whole array, shape of the box, number of bytes. The bytes of a
shard are one *stream*; the *offset* of a slice is where its bytes begin in it. A *table* lists the
slices of a shard by key, layout and offset; shards whose slices differ only in the place of their
boxes share a table. A key's *pattern* in a table is the tuple of layouts of its slices: a model
has many arrays and few patterns.

Keys that have the same patterns in the same tables have one *tiling*: their slices have the same
boxes and lie in the same shards. So the boxes of an array are looked at once for each distinct
tiling, and an index with thousands of arrays on thousands of shards is small, and quickly read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from google.protobuf.message import DecodeError

from ckpt_jax.errors import CorruptCheckpointError, ShardError, UnsupportedFormatError
from ckpt_jax.graph._proto import index_pb2
from ckpt_jax.graph.dtypes import BYTES, dtype_of
from ckpt_jax.store.seal import seal, unseal
from ckpt_jax.store.tiling import Layout, Tiling, clashes

FORMAT_VERSION = 2
COMPRESSIONS = ("", "zstd")
DIGEST_NBYTES = 32
CHECKSUM = np.dtype("<u4")

_LIMIT = 1 << 62  # sums of two numbers below it fit into an int64
_MAX_RANK = 64
_MAX_CHUNKS = 1 << 20  # in a file: the place of each takes memory
_MAX_BLOCK_NBYTES = 64 << 20  # a block has to be read as a whole, into memory
_MAX_BOUNDS_PER_BYTE = 16
_MIN_BOUNDS = 1 << 20
_COLUMNS = {"key": "<u4", "layout": "<u4", "offset": "<u8"}
_UNSAFE = re.compile(r"[\\\0]|(^|/)\.{0,2}(/|$)")  # in the directory of a shard


@dataclass(frozen=True, eq=False)
class Table:
    """The slices of shards that are alike, as columns of int64; see `index.proto`.

    The constructor takes columns that are known to be consistent and ordered.

    Attributes:
      keys, layouts: the tables that the columns point into.
      key, layout, offset: the columns.
    """

    keys: tuple[str, ...]
    layouts: tuple[Layout, ...]
    key: np.ndarray
    layout: np.ndarray
    offset: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """The slices of key number k are the rows from first[k] to first[k + 1]."""
        return np.searchsorted(self.key, np.arange(len(self.keys) + 1))

    @cached_property
    def patterns(self) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
        """The distinct tuples of layout numbers, and for each key the number of its own."""
        raw, cuts = self.layout.tobytes(), (self.first * 8).tolist()
        distinct: dict[bytes, int] = {}
        pattern = [
            distinct.setdefault(raw[a:b], len(distinct)) for a, b in itertools.pairwise(cuts)
        ]
        layouts = tuple(tuple(np.frombuffer(p, np.int64).tolist()) for p in distinct)
        return layouts, np.array(pattern, np.int64)

    @cached_property
    def axes(self) -> np.ndarray:
        """Where the bounds of each layout begin in the `starts` of a shard, and where all end."""
        return np.cumsum([0, *[len(layout.extent) for layout in self.layouts]])

    @cached_property
    def nbytes(self) -> np.ndarray:
        """The size of each slice."""
        return np.array([layout.nbytes for layout in self.layouts], np.int64)[self.layout]

    @cached_property
    def message(self) -> bytes:
        """This table as a message. Equal tables have equal messages."""
        message = index_pb2.Table(
            keys=self.keys,
            **{name: getattr(self, name).astype(kind).tobytes() for name, kind in _COLUMNS.items()},
        )
        for each in self.layouts:
            message.layouts.add(
                dtype=each.dtype, shape=each.shape, extent=each.extent, nbytes=each.nbytes
            )
        return message.SerializeToString(deterministic=True)

    @cached_property
    def digest(self) -> bytes:
        """Distinguishes this table from others."""
        return hashlib.sha256(self.message).digest()


@dataclass(frozen=True, slots=True)
class Shard:
    """One stream of bytes; see `index.proto`."""

    directory: str
    starts: tuple[int, ...]
    nbytes: int
    chunk_nbytes: int
    block_nbytes: int
    file_nbytes: int
    compression: str = ""
    stored_nbytes: int = 0
    checksums: bytes = b""
    digest: bytes = b""

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.nbytes // self.block_nbytes)

    @property
    def files(self) -> int:
        """The number of data files."""
        return -(-self.nbytes // self.file_nbytes)


@dataclass(frozen=True, eq=False)
class Index:
    """The slices of a shard or checkpoint.

    The constructor takes parts that are known to be consistent.

    Attributes:
      tables: the distinct tables.
      shards: the streams.
      table: for each shard, the number of its table.
      keys: all keys, sorted.
      number: key -> key number.
    """

    tables: tuple[Table, ...]
    shards: tuple[Shard, ...]
    table: tuple[int, ...]
    keys: tuple[str, ...] = field(init=False)
    number: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.tables) == 1:
            keys = self.tables[0].keys
        else:
            keys = tuple(sorted(set().union(*[table.keys for table in self.tables])))
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "number", {key: i for i, key in enumerate(keys)})
        object.__setattr__(self, "_tilings", {})

    def __contains__(self, key: object) -> bool:
        return key in self.number

    @property
    def is_shard(self) -> bool:
        """Whether this is a shard's own index, not the index of a whole checkpoint."""
        return len(self.shards) == 1 and self.shards[0].directory == "."

    @property
    def total_nbytes(self) -> int:
        """The size of all slices."""
        return sum([int(self.tables[number].nbytes.sum()) for number in self.table])

    @cached_property
    def key_numbers(self) -> tuple[np.ndarray, ...]:
        """For each table, the numbers of its keys here; ascending."""
        number = self.number
        return tuple(
            np.fromiter(map(number.__getitem__, table.keys), np.int64, len(table.keys))
            for table in self.tables
        )

    @cached_property
    def _alike(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """For each key the number of its tiling, and what tilings are made of.

        A tiling is (number of another tiling or -1, table, pattern): the slices of the other one,
        and those that have this pattern in this table.
        """
        current = np.full(len(self.keys), -1, np.int64)
        made: list[tuple[int, int, int]] = []
        for number, (table, at) in enumerate(zip(self.tables, self.key_numbers, strict=True)):
            patterns, pattern = table.patterns
            code = (current[at] + 1) * len(patterns) + pattern
            distinct, which = np.unique(code, return_inverse=True)
            base = len(made)
            made += [(c // len(patterns) - 1, number, c % len(patterns)) for c in distinct.tolist()]
            current[at] = base + which
        return current.tolist(), made

    @cached_property
    def shards_of(self) -> tuple[np.ndarray, ...]:
        """For each table, the numbers of the shards that have it."""
        found: list[list[int]] = [[] for _ in self.tables]
        for number, table in enumerate(self.table):
            found[table].append(number)
        return tuple(np.array(numbers, np.int64) for numbers in found)

    @cached_property
    def _starts_of(self) -> tuple[np.ndarray, ...]:
        """For each table, the `starts` of the shards that have it, one row for each."""
        return tuple(
            np.array([self.shards[i].starts for i in shards.tolist()], np.int64).reshape(
                len(shards), table.axes[-1]
            )
            for table, shards in zip(self.tables, self.shards_of, strict=True)
        )

    def tiling_number(self, key: str) -> int:
        """Distinguishes the tilings of keys."""
        return self._alike[0][self.number[key]]

    def tiling(self, number: int) -> Tiling:
        """The tiling of this number."""
        known: dict[int, Tiling] = self.__dict__["_tilings"]
        found = known.get(number)
        if found is None:
            found = known[number] = self._tiling(number)
        return found

    def _tiling(self, number: int) -> Tiling:
        layouts: dict[Layout, int] = {}
        starts: list[np.ndarray] = []
        parts: list[tuple[np.ndarray, int, int]] = []  # shards, row, layout
        for table, pattern in self._parts(number):
            members, shards = self.tables[table], self.shards_of[table]
            for row, position in enumerate(pattern):
                layout = members.layouts[position]
                begin, end = members.axes[position : position + 2]
                starts.append(self._starts_of[table][:, begin:end])
                parts.append((shards, row, layouts.setdefault(layout, len(layouts))))
        counts = [len(shards) for shards, _, _ in parts]
        layout = np.repeat([layout for _, _, layout in parts], counts)
        row = np.repeat([row for _, row, _ in parts], counts)
        shard = np.concatenate([shards for shards, _, _ in parts])
        ranks = {len(each.extent) for each in layouts}
        rank = max(ranks)
        if len(ranks) > 1:  # they disagree, which is said elsewhere
            starts = [np.pad(each, ((0, 0), (0, rank - each.shape[1]))) for each in starts]
        first = np.concatenate(starts)
        extents = np.array([[*x.extent, *[0] * (rank - len(x.extent))] for x in layouts], np.int64)
        last = first + extents.reshape(len(layouts), rank)[layout]
        order = np.lexsort((*last.T[::-1], *first.T[::-1])) if rank else np.arange(len(shard))
        columns = [column[order] for column in (layout, first, last, shard, row)]
        return Tiling(tuple(layouts), *columns)

    def _parts(self, number: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The tables and patterns that make up a tiling."""
        while number >= 0:
            number, table, pattern = self._alike[1][number]
            yield table, self.tables[table].patterns[0][pattern]

    def layout_of(self, key: str) -> Layout:
        """The layout of a slice of `key`, which tells the array's dtype and shape."""
        table, pattern = next(self._parts(self.tiling_number(key)))
        return self.tables[table].layouts[pattern[0]]

    def nbytes(self, key: str) -> int:
        """The size of the array or byte string under `key`."""
        return sum(
            self.tables[table].layouts[each].nbytes * len(self.shards_of[table])
            for table, pattern in self._parts(self.tiling_number(key))
            for each in pattern
        )

    def problems(self) -> list[str]:
        """What is wrong with the slices of arrays: if this is a shard's index, holes are not."""
        whole = not self.is_shard
        found: dict[int, list[str]] = {}
        for number in sorted(set(self._alike[0])):
            if self._is_whole(number):
                continue
            tiling = self.tiling(number)
            for clash in clashes(tiling, whole=whole):
                shards = tiling.shard[list(clash.slices)].tolist()
                names = sorted({self.shards[i].directory for i in shards})
                shown = ", ".join(names[:_MAX_NAMES])
                more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
                found.setdefault(number, []).append(f"{clash.text} (in {shown}{more})")
        if not found:
            return []
        return [
            f"{key}: {text}"
            for key, number in zip(self.keys, self._alike[0], strict=True)
            for text in found.get(number, ())
        ]

    def _is_whole(self, number: int) -> bool:
        """Whether the arrays of a tiling are stored in one piece."""
        parts = list(self._parts(number))
        table, pattern = parts[0]
        if len(parts) != 1 or len(pattern) != 1 or len(self.shards_of[table]) > 1:
            return False
        layout = self.tables[table].layouts[pattern[0]]
        return layout.extent == layout.shape

    def is_readable(self, nbytes: int) -> bool:
        """Whether all tilings together are small enough for the size of the message.

        So neither time nor memory is spent on slices that a small message has by the million.
        """
        counts: list[int] = []  # of the bounds of slices, by tiling
        for before, table, pattern in self._alike[1]:
            members = self.tables[table]
            ranks = [len(members.layouts[i].extent) or 1 for i in members.patterns[0][pattern]]
            known = counts[before] if before >= 0 else 0
            counts.append(known + sum(ranks) * len(self.shards_of[table]))
        total = sum([counts[number] for number in set(self._alike[0])])
        return total <= max(_MAX_BOUNDS_PER_BYTE * nbytes, _MIN_BOUNDS)

    def to_bytes(self) -> bytes:
        """This index as a sealed message."""
        message = index_pb2.Index(format_version=FORMAT_VERSION)
        for table in self.tables:
            message.tables.add().MergeFromString(table.message)
        for table, shard in zip(self.table, self.shards, strict=True):
            message.shards.add(table=table, **{f: getattr(shard, f) for f in _SHARD_FIELDS})
        return seal(message.SerializeToString(deterministic=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        """Reads what `to_bytes` wrote and checks that all of it is consistent.

        Args:
          data: a sealed message; it may come from anywhere.

        Raises:
          CorruptCheckpointError: some part of it contradicts another, or is impossible.
          UnsupportedFormatError: another version of this library wrote it.
        """
        message = _parse(data)
        table = tuple([m.table for m in message.shards])
        count = len(message.tables)
        _check(count <= len(table) and {*table} == {*range(count)}, "not each table has a shard")
        shards = tuple([_shard(m) for m in message.shards])
        tables = tuple([_table(m) for m in message.tables])
        _check(len({t.digest for t in tables}) == len(tables), "two tables are the same")
        directories = {shard.directory for shard in shards}
        _check(len(directories) == len(shards), "two shards have the same directory")
        alone = len(shards) == 1 or "." not in directories
        _check(alone, "a shard in directory '.' is not the only one")
        index = cls(tables, shards, table)
        _check_shards(index)
        _check(index.is_readable(len(data)), "arrays are cut in too many different ways")
        for problem in index.problems():
            raise CorruptCheckpointError(f"index is inconsistent: {problem}")
        return index


_MAX_NAMES = 8
_SHARD_FIELDS = tuple(field.name for field in dataclasses.fields(Shard))


def check_version(found: int, what: str) -> None:
    """Checks the format version of a message.

    Raises:
      CorruptCheckpointError: there is none.
      UnsupportedFormatError: it is not the version that this library reads.
    """
    if not found:
        raise CorruptCheckpointError(f"{what} is inconsistent: format version is missing")
    if found != FORMAT_VERSION:
        older = found < FORMAT_VERSION
        raise UnsupportedFormatError(
            f"{what} has format version {found}, but this ckpt_jax reads version {FORMAT_VERSION}; "
            + ("it was written before the first release" if older else "install a newer ckpt_jax")
        )


def encode_entry(shard: Shard, table: bytes) -> bytes:
    """What another process needs to know of a shard, whose table has the digest `table`."""
    fields = {name: getattr(shard, name) for name in _SHARD_FIELDS}
    message = index_pb2.Entry(shard=index_pb2.Shard(**fields), table=table)
    return message.SerializeToString(deterministic=True)


def decode_entry(data: bytes) -> tuple[Shard, bytes]:
    """Reads what `encode_entry` wrote: the shard, and the digest of its table."""
    message = index_pb2.Entry.FromString(data)
    return _shard(message.shard, is_inside=False), message.table


def own_checksums(data: bytes) -> bytes:
    """The checksums of the blocks of a shard, from its own index.

    Raises:
      CorruptCheckpointError: it is no index of a shard.
    """
    shards = _parse(data).shards
    _check(len(shards) == 1, "this is not the index of a shard")
    return shards[0].checksums


def _parse(data: bytes) -> index_pb2.Index:
    try:
        message = index_pb2.Index.FromString(unseal(data))
    except DecodeError as error:
        raise CorruptCheckpointError(f"index cannot be parsed: {error}") from error
    check_version(message.format_version, "index")
    return message


def _check(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise CorruptCheckpointError(f"index is inconsistent: {message}")


def _table(message: index_pb2.Table) -> Table:
    keys = tuple(message.keys)
    _check(all(map(operator.lt, keys, keys[1:])), "keys are not sorted")
    layouts = tuple([_layout(m) for m in message.layouts])
    key, layout, offset = [_column(getattr(message, name), kind) for name, kind in _COLUMNS.items()]
    _check(key.size == layout.size == offset.size, "columns differ in length")
    steps = np.diff(key, prepend=0)
    covered = key[-1] + 1 if key.size else 0
    known = covered == len(keys) and (not key.size or key[0] == 0)
    _check(known and np.all((steps == 0) | (steps == 1)), "not each key has slices")
    _check(np.all(layout < len(layouts)), "unknown layout")
    table = Table(keys, layouts, key, layout, offset)
    empty = table.nbytes == 0
    _check(not np.any(offset[empty]), "a slice of zero bytes has a place")
    start, stop = offset[~empty], (offset + table.nbytes)[~empty]
    order = np.argsort(start, kind="stable")
    _check(np.all(start[order][1:] >= stop[order][:-1]), "two slices share bytes")
    return table


def _column(data: bytes, kind: str) -> np.ndarray:
    _check(len(data) % np.dtype(kind).itemsize == 0, "a column is cut off")
    values = np.frombuffer(data, kind)
    _check(not values.size or values.max() < _LIMIT, "a number is too large")
    return values.astype(np.int64)


def _layout(message: index_pb2.Layout) -> Layout:
    shape, extent = tuple(message.shape), tuple(message.extent)
    _check(len(shape) <= _MAX_RANK, f"rank {len(shape)}")
    _check(len(extent) == len(shape), "a slice and its array differ in rank")
    _check(all(map(operator.le, extent, shape)), f"slice of shape {extent} of an array {shape}")
    nbytes = message.nbytes
    if message.dtype == BYTES:
        _check(not shape and nbytes < _LIMIT, "a byte string has a shape")
    else:
        try:
            itemsize = dtype_of(message.dtype).itemsize
        except ValueError as error:
            raise CorruptCheckpointError(f"index is inconsistent: {error}") from error
        _check(math.prod([n or 1 for n in shape]) * itemsize < _LIMIT, f"shape {shape}")
        _check(nbytes == math.prod(extent) * itemsize, f"slice of {extent} has {nbytes} bytes")
    return Layout(message.dtype, shape, extent, nbytes)


def _shard(message: index_pb2.Shard, *, is_inside: bool = True) -> Shard:
    directory = message.directory
    safe = not is_inside or directory == "." or not _UNSAFE.search(directory)
    _check(safe, f"shard directory {directory[:80]!r}")
    shard = Shard(
        directory,
        tuple(message.starts),
        *[getattr(message, name) for name in _SHARD_FIELDS[2:]],
    )
    sizes = (shard.chunk_nbytes, shard.block_nbytes, shard.file_nbytes)
    _check(max(shard.nbytes, shard.stored_nbytes, *sizes) < _LIMIT, "size of a stream")
    for small, large in itertools.pairwise(sizes):
        _check(0 < small <= large and large % small == 0, f"parts of a stream of {sizes} bytes")
    _check(shard.block_nbytes <= _MAX_BLOCK_NBYTES, "size of blocks")
    _check(shard.file_nbytes // shard.chunk_nbytes <= _MAX_CHUNKS, "chunks of a file")
    _check(shard.compression in COMPRESSIONS, f"compression {shard.compression[:40]!r}")
    if directory == ".":
        _check(len(shard.checksums) == shard.blocks * CHECKSUM.itemsize, "checksums are missing")
    else:
        _check(len(shard.digest) == DIGEST_NBYTES, "the digest of a shard is missing")
    return shard


def _check_shards(index: Index) -> None:
    for table, shards in zip(index.tables, index.shards_of, strict=True):
        axes = int(table.axes[-1])
        sizes = [len(index.shards[i].starts) for i in shards.tolist()]
        _check({*sizes} == {axes}, "a shard does not say where its boxes start")
        bounds = [max(index.shards[i].starts, default=0) for i in shards.tolist()]
        _check(max(bounds) < _LIMIT, "a number is too large")
        end = int((table.offset + table.nbytes).max(initial=0))
        _check(end <= min(index.shards[i].nbytes for i in shards.tolist()), "a slice is cut off")
    for table, starts in zip(index.tables, index._starts_of, strict=True):
        room = [n - k for x in table.layouts for n, k in zip(x.shape, x.extent, strict=True)]
        _check(np.all(starts <= np.array(room, np.int64)), "a box does not lie inside its array")


def merge_indexes(indexes: Sequence[tuple[Shard, Table]]) -> Index:
    """The index of all slices of shards, which have to make up whole arrays.

    Args:
      indexes: each shard with its directory and digest, and its table.

    Raises:
      ShardError: a slice is stored twice, or slices overlap, leave a hole, or disagree on dtype or
        shape. All such problems are listed.
    """
    numbers: dict[bytes, int] = {}
    tables: list[Table] = []
    of_shard: list[int] = []
    for _, table in indexes:
        number = numbers.setdefault(table.digest, len(tables))
        if number == len(tables):
            tables.append(table)
        of_shard.append(number)
    merged = Index(tuple(tables), tuple([shard for shard, _ in indexes]), tuple(of_shard))
    if problems := merged.problems():
        raise ShardError(f"{len(problems)} problems in shards:\n  " + "\n  ".join(problems))
    return merged
