"""Writing a shard: the slices of one call, in a database of their own.

A *stack* is a two-dimensional array of bytes in the database. Big slices become rows of stacks,
one stack for each size, straight from the memory that they lie in. Small slices are copied one
after the other into *packs*, which are stacks of one row, so that ten thousand small slices cost no
more than a few big ones.

The bytes reach the database in groups of bounded size, one transaction for each group, because
TensorStore keeps an encoded copy of everything in a transaction. The last transaction contains the
index. So a database without an index is the remains of an interrupted write.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from ckpt_jax.graph.boxes import Box, Shape, inside, shape_of, whole
from ckpt_jax.graph.dtypes import BYTES, dtype_name
from ckpt_jax.store.batches import batches
from ckpt_jax.store.durable import fsync_directory, fsync_file
from ckpt_jax.store.index import INDEX_KEY, Index, Layout, Shard, StackShape
from ckpt_jax.store.stack import (
    ALIGNMENT,
    DATA,
    LEVELS,
    chunk_nbytes,
    new_context,
    open_database,
    open_stack,
    round_up,
    storage_error,
)
from ckpt_jax.store.workers import Workers

BIG_NBYTES = 256 << 10  # from here on a slice is a row of its own
PACK_NBYTES = 16 << 20  # the largest size of a pack; the reader reads a pack in one go


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a larger array.

    Attributes:
      array: the contents of the box; it has the shape of the box.
      box: where the contents lie in the whole array: one (start, stop) pair per axis.
      global_shape: shape of the whole array.

    Example:
      >>> Slice(np.zeros((2, 3)), ((0, 2), (0, 3)), (4, 3)).box
      ((0, 2), (0, 3))
    """

    array: Any
    box: Box
    global_shape: Shape


Value = np.ndarray | bytes | Slice | Sequence[Slice]


def write_shard(
    directory: str,
    slices: Mapping[str, Value],
    *,
    compression: str | None = None,
    durable: bool = True,
    max_inflight_bytes: int = 16 << 20,
    written: Callable[[int], object] = lambda nbytes: None,
) -> int:
    """Writes `slices` and their index to a new database in `directory`.

    Contiguous arrays are not copied, so they must not change until the call returns.

    Args:
      directory: a directory that does not exist yet or is empty.
      slices: by key, a whole array, a byte string, or boxes of an array.
      compression: None or "zstd".
      durable: return only when the shard would survive a power failure.
      max_inflight_bytes: bound on the memory for encoded copies and packs.
      written: called with the number of bytes of slices that were written since the last call.

    Returns:
      The number of bytes of all slices.

    Raises:
      FileExistsError: `directory` is not empty.
      OSError: the file system refused, for lack of space or permission for example.
      ValueError: an array has a dtype that cannot be stored, or another shape than its box.
    """
    if compression not in LEVELS:
        raise ValueError(f"compression is {compression!r}, expected None or 'zstd'")
    plan = _plan(slices, max_inflight_bytes)
    os.makedirs(directory, exist_ok=True)
    if os.listdir(directory):
        raise FileExistsError(f"{directory}: a shard needs a new directory, but this has files")
    level = LEVELS[compression]
    groups = batches(_transfers(plan, max_inflight_bytes), _nbytes_held, max_inflight_bytes)
    group: list[_Transfer] | None = next(groups, [])
    context = new_context()
    flushed: set[str] = set()
    flushes: list[Future[None]] = []
    data = os.path.join(directory, DATA)
    with Workers(1 if durable else 0, "ckpt-flush") as flusher:
        created: set[int] = set()
        try:
            while group is not None:
                following = next(groups, None)
                last = following is None
                _write_group(directory, context, plan.index, group, created, level, last=last)
                written(sum([transfer.payload for transfer in group]))
                group = following
                if durable:
                    new = set(os.listdir(data)) - flushed
                    flushed |= new
                    flushes += [flusher.submit(fsync_file, os.path.join(data, f)) for f in new]
        except ValueError as error:
            raise storage_error(error, directory) from error
        for flush in flushes:
            flush.result()
    if durable:
        with os.scandir(directory) as files:
            for file in files:
                fsync_file(file.path)
        fsync_directory(directory)
        fsync_directory(os.path.dirname(os.path.abspath(directory)))
    return plan.index.total_nbytes


@dataclass(frozen=True, slots=True)
class _Plan:
    """The index of the shard, and where the bytes of its stacks come from.

    Attributes:
      index: the index.
      rows: by stack number, the rows of each stack of big slices.
      packs: by stack number, the buffers that follow each other in each pack.
      payloads: by stack number, the size of each pack without padding.
    """

    index: Index
    rows: dict[int, list[np.ndarray | bytes]]
    packs: dict[int, list[np.ndarray | bytes]]
    payloads: dict[int, int]


_PADDING = [bytes(n) for n in range(ALIGNMENT)]


def _plan(slices: Mapping[str, Value], max_pack_nbytes: int) -> _Plan:
    max_pack_nbytes = min(PACK_NBYTES, max_pack_nbytes)
    keys = tuple(sorted(slices))
    layouts: dict[Layout, int] = {}
    seen: dict[tuple[object, ...], tuple[int, int]] = {}  # -> number of the layout, nbytes
    places: list[tuple[int, int, int, int, int]] = []  # key, layout, stack, row, offset
    rows: dict[int, list[np.ndarray | bytes]] = {}
    packs: dict[int, list[np.ndarray | bytes]] = {}
    payloads: dict[int, int] = {}
    sizes: list[int] = []  # of the rows of each stack
    stack_of_size: dict[int, int] = {}
    pack = -1
    for number, key in enumerate(keys):
        for part in _parts(slices[key]):
            # The layout is worked out once for all slices that share it.
            if isinstance(part, bytes):
                source, alike = part, (len(part),)
            else:
                source = part.array
                alike = (source.dtype, source.shape, part.box, part.global_shape)
            known = seen.get(alike)
            if known is None:
                new = _layout(key, part)
                known = seen[alike] = (layouts.setdefault(new, len(layouts)), new.nbytes)
            layout, nbytes = known
            if nbytes == 0:
                places.append((number, layout, 0, 0, 0))
            elif nbytes >= BIG_NBYTES:
                stack = stack_of_size.setdefault(nbytes, len(sizes))
                if stack == len(sizes):
                    sizes.append(nbytes)
                    rows[stack] = []
                places.append((number, layout, stack, len(rows[stack]), 0))
                rows[stack].append(source)
            else:
                offset = round_up(sizes[pack]) if packs else 0
                if not packs or offset + nbytes > max_pack_nbytes:
                    pack, offset = len(sizes), 0
                    sizes.append(0)
                    packs[pack] = []
                    payloads[pack] = 0
                if offset != sizes[pack]:
                    packs[pack].append(_PADDING[offset - sizes[pack]])
                places.append((number, layout, pack, 0, offset))
                packs[pack].append(source)
                payloads[pack] += nbytes
                sizes[pack] = offset + nbytes
    stacks = [
        StackShape(len(rows.get(i, "1")), nbytes, chunk_nbytes(nbytes))
        for i, nbytes in enumerate(sizes)
    ]
    shard = Shard(secrets.token_hex(8), ".", tuple(stacks))
    return _Plan(_index(shard, keys, list(layouts), places), rows, packs, payloads)


def _index(
    shard: Shard,
    keys: tuple[str, ...],
    layouts: list[Layout],
    places: list[tuple[int, int, int, int, int]],
) -> Index:
    in_order = sorted(range(len(layouts)), key=layouts.__getitem__)
    rank = np.argsort(in_order)
    key, layout, stack, row, offset = np.array(places, np.int64).reshape(-1, 5).T
    layout = rank[layout] if len(layouts) else layout
    order = np.lexsort((layout, key))
    columns = [c[order] for c in (key, layout, np.zeros_like(key), stack, row, offset)]
    return Index((shard,), tuple([layouts[i] for i in in_order]), keys, *columns)


def _parts(value: Value) -> Sequence[bytes | Slice]:
    if isinstance(value, np.ndarray):
        return (Slice(value, whole(value.shape), value.shape),)
    return (value,) if isinstance(value, bytes | Slice) else value


def _layout(key: str, part: bytes | Slice) -> Layout:
    if isinstance(part, bytes):
        return Layout(BYTES, (), (), len(part))
    array, box, shape = part.array, part.box, part.global_shape
    if not inside(box, shape) or array.shape != shape_of(box):
        raise ValueError(
            f"{key}: contents of shape {array.shape} for box {box} of an array of shape {shape}"
        )
    try:
        return Layout(dtype_name(array.dtype), shape, box, array.nbytes)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _buffer(source: np.ndarray | bytes) -> np.ndarray | bytes:
    """An object that exports the bytes of `source` as they are stored: itself, if it can."""
    if isinstance(source, bytes):
        return source
    if source.dtype.byteorder == ">":
        source = source.astype(source.dtype.newbyteorder("<"))
    source = np.ascontiguousarray(source)
    exports = source.dtype.kind in "biufc" and source.dtype.isbuiltin == 1
    return source if exports else source.reshape(-1).view(np.uint8)


def _as_bytes(source: np.ndarray | bytes) -> np.ndarray:
    source = _buffer(source)
    if isinstance(source, bytes):
        return np.frombuffer(source, np.uint8)
    return source.reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """The bytes from `start` to `stop` of one row of a stack; `payload` of them are no padding."""

    stack: int
    row: int
    start: int
    stop: int
    source: np.ndarray | list[np.ndarray | bytes]
    payload: int


def _transfers(plan: _Plan, max_nbytes: int) -> Iterator[_Transfer]:
    (shard,) = plan.index.shards
    for number, sources in plan.rows.items():
        stack = shard.stacks[number]
        step = max(1, max_nbytes // stack.chunk_nbytes) * stack.chunk_nbytes
        for row, source in enumerate(sources):
            source = _as_bytes(source)  # only now, so that copies live no longer than their group
            for start in range(0, stack.row_nbytes, step):
                stop = min(start + step, stack.row_nbytes)
                yield _Transfer(number, row, start, stop, source, stop - start)
    for number, parts in plan.packs.items():
        nbytes = shard.stacks[number].row_nbytes
        yield _Transfer(number, 0, 0, nbytes, parts, plan.payloads[number])


def _nbytes_held(transfer: _Transfer) -> int:
    nbytes = transfer.stop - transfer.start
    return 2 * nbytes if isinstance(transfer.source, list) else nbytes  # a pack is itself a copy


def _write_group(
    directory: str,
    context: ts.Context,
    index: Index,
    group: list[_Transfer],
    created: set[int],
    level: int,
    *,
    last: bool,
) -> None:
    (shard,) = index.shards
    transaction = ts.Transaction(atomic=True)
    stores: dict[int, ts.TensorStore] = {}
    writes = []
    for t in group:
        if t.stack not in stores:
            stores[t.stack] = open_stack(
                directory,
                context,
                shard.id,
                t.stack,
                shard.stacks[t.stack],
                create=t.stack not in created,
                level=level,
                transaction=transaction,
            )
            created.add(t.stack)
        source = t.source
        if isinstance(source, list):
            # Arrays are buffers; numpy's stubs say so from Python 3.12 on.
            joined = b"".join(map(_buffer, source))  # pyright: ignore[reportArgumentType]
            source = np.frombuffer(joined, np.uint8)
        writes.append(
            stores[t.stack][t.row, t.start : t.stop].write(
                source[t.start : t.stop], can_reference_source_data_indefinitely=True
            )
        )
    if last:
        database = open_database(directory, context).with_transaction(transaction)
        writes.append(database.write(INDEX_KEY, index.to_bytes()))
    for write in writes:
        (write.copy if isinstance(write, ts.WriteFutures) else write).result()
    transaction.commit_async().result()
