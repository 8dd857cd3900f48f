"""A save and a restore on thousands of processes, simulated: the real code without array bytes.

    python benchmarks/scale.py [--processes N ...] [--arrays M]

Every process of a program is stood in for by its index. What one process works out is measured on
one of them, what process 0 works out is measured on all reports. The devices are simulated; the
planning, the tables, the reports, the merge, the index, and the plan of a restore are the
library's own.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of
from ckpt_jax.saving.spread import Holding, OwnSlice, own_slices
from ckpt_jax.store.gather import Pieces, geometry_of, runs_of
from ckpt_jax.store.index import Index, Shard, Table, decode_entry, encode_entry, merge_indexes
from ckpt_jax.store.shard import Slice, plan_shard

GOALS = {"root index": "64 MB", "merge": "5 s", "open and plan": "1 s", "reports": "10 MB"}
DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Kind:
    """Arrays of one shape and sharding.

    Attributes:
      shape: of the array.
      grid: the number of parts along each axis; () if every process has a copy of the array.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]

    def boxes(self, processes: int) -> list[tuple[Box, list[tuple[int, int]]]]:
        """Each box with the (process, device) that hold it."""
        if not self.grid:
            everyone = [(process, process) for process in range(processes)]
            return [(tuple((0, size) for size in self.shape), everyone)]
        return [(self.box(process), [(process, process)]) for process in range(processes)]

    def box(self, process: int) -> Box:
        """The box that a process holds."""
        if not self.grid:
            return tuple((0, size) for size in self.shape)
        cell = np.unravel_index(process, self.grid)
        sizes = [size // parts for size, parts in zip(self.shape, self.grid, strict=True)]
        return tuple((int(c) * n, int(c + 1) * n) for c, n in zip(cell, sizes, strict=True))


@dataclass(frozen=True)
class Stand:
    """Stands in for the contents of a slice."""

    shape: tuple[int, ...]
    dtype: np.dtype = DTYPE

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def kinds_of(processes: int, replicated: bool) -> list[Kind]:
    """Shapes as in a large language model, sharded over all processes along one axis or two."""
    tall = max(1, processes // 8)
    sharded = [
        kind
        for i in range(8)
        for kind in (
            Kind((processes * 2, 1024 + 64 * i), (processes, 1)),
            Kind((tall * 16, (processes // tall) * (128 + 8 * i)), (tall, processes // tall)),
        )
    ]
    return sharded + ([Kind((4096,), ())] if replicated else [])


def simulate(processes: int, arrays: int, *, replicated: bool) -> Mapping[str, float]:
    """Runs a save and a restore; returns seconds and bytes by step."""
    kinds = kinds_of(processes, replicated)
    of_key = {key_of(number): kinds[number % len(kinds)] for number in range(arrays)}
    keys = sorted(of_key)
    found: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = act()
        found[name] = time.perf_counter() - start
        return result

    me = processes // 2
    holdings = timed(
        "first save only: who holds what",
        lambda: {kind: Holding.of(kind.boxes(processes), me, processes) for kind in kinds},
    )
    own = timed(
        "one process: its slices",
        lambda: own_slices(
            [(holdings[of_key[key]], DTYPE.itemsize) for key in keys], me, [0] * processes
        ),
    )
    shards = timed("one process: its shards", lambda: planned(own, keys, of_key))
    entries = {
        process: entries_of(process, processes, shards, keys, of_key)
        for process in range(processes)
    }
    reports = [encode_entry(*entry) for each in entries.values() for entry in each]
    found["reports of all processes (bytes)"] = sum(map(len, reports))
    tables = {table.digest: table for table in all_tables(shards, keys, of_key, processes)}
    decoded = timed("process 0: reads the reports", lambda: [*map(decode_entry, reports)])
    merged = timed(
        "process 0: merges",
        lambda: merge_indexes([(shard, tables[digest]) for shard, digest in decoded]),
    )
    data = timed("process 0: makes the root index", merged.to_bytes)
    found["root index (bytes)"] = len(data)
    index = timed("one process: opens", lambda: Index.from_bytes(data))
    timed("one process: plans its restore", lambda: plan(index, of_key, me))
    return found


def key_of(number: int) -> str:
    return f"params/layers/{number:05d}/attention/kernel/.ATTRIBUTES/VARIABLE_VALUE"


def planned(
    own: Sequence[OwnSlice], keys: Sequence[str], of_key: Mapping[str, Kind]
) -> list[tuple[Shard, Table]]:
    """The shards of a process: what it alone holds, and its part of what all hold."""
    shards = []
    for is_shared in (False, True):
        slices = {
            keys[each.source]: Slice(
                Stand(shape_of(each.box)), each.box, of_key[keys[each.source]].shape
            )
            for each in own
            if each.is_shared == is_shared
        }
        if slices:
            shard, table, *_ = plan_shard(slices, "", 1 << 30)
            shards.append((shard, table))
    return shards


def entries_of(
    process: int,
    processes: int,
    shards: Sequence[tuple[Shard, Table]],
    keys: Sequence[str],
    of_key: Mapping[str, Kind],
) -> list[tuple[Shard, bytes]]:
    """The entries of any process: those of the measured one, with the boxes of this one."""
    shard, table = shards[0]
    rows = zip(table.layout.tolist(), table.key.tolist(), strict=True)
    kind_of_layout = {number: of_key[table.keys[key]] for number, key in rows}
    starts = [
        start
        for number in range(len(table.layouts))
        for start, _ in kind_of_layout[number].box(process)
    ]
    digest = hashlib.sha256(str(process).encode()).digest()
    directory = f"shards/{process:05d}-00000"
    found = [
        (replace(shard, directory=directory, starts=tuple(starts), digest=digest), table.digest)
    ]
    if copies := copied_by(process, processes, keys, of_key):
        extra, extra_table = copies
        directory = f"shards/{process:05d}-00001"
        found.append((replace(extra, directory=directory, digest=digest), extra_table.digest))
    return found


def copied_by(
    process: int, processes: int, keys: Sequence[str], of_key: Mapping[str, Kind]
) -> tuple[Shard, Table] | None:
    """The shard with the arrays of which all have a copy that this process writes."""
    shared = [key for key in keys if not of_key[key].grid][process::processes]
    if not shared:
        return None
    slices = {}
    for key in shared:
        shape = of_key[key].shape
        slices[key] = Slice(Stand(shape), tuple((0, n) for n in shape), shape)
    shard, table, *_ = plan_shard(slices, "", 1 << 30)
    return shard, table


def all_tables(
    shards: Sequence[tuple[Shard, Table]],
    keys: Sequence[str],
    of_key: Mapping[str, Kind],
    processes: int,
) -> list[Table]:
    copies = [copied_by(process, processes, keys, of_key) for process in range(processes)]
    return [shards[0][1], *[each[1] for each in copies if each]]


def plan(index: Index, of_key: Mapping[str, Kind], me: int) -> int:
    """Plans to read what a process needs; returns the number of reads."""
    requests = [(key, (of_key[key].box(me),)) for key in index.keys]
    geometries = {}
    chosen = []
    for key, wanted in requests:
        what = (index.tiling_number(key), wanted)
        if what not in geometries:
            geometries[what] = geometry_of(index.tiling(what[0]), wanted, views=True)
        chosen.append(geometries[what])
    return len(runs_of(Pieces.of(index, requests, chosen), index))


def main() -> None:
    parser = argparse.ArgumentParser(description="A save and a restore, simulated.")
    parser.add_argument("--processes", type=int, nargs="+", default=[64, 512, 2048, 8192])
    parser.add_argument("--arrays", type=int, default=10_000)
    parser.add_argument("--replicated", action="store_true", help="one array in 17 has no parts")
    arguments = parser.parse_args()
    columns = {
        n: simulate(n, arguments.arrays, replicated=arguments.replicated)
        for n in arguments.processes
    }
    print(f"{arguments.arrays} arrays, simulated".ljust(40), *[f"{n:>9}" for n in columns])
    for name in next(iter(columns.values())):
        cells = [column[name] for column in columns.values()]
        shown = [f"{c / 1e6:>6.2f} MB" if "bytes" in name else f"{c:>7.3f} s" for c in cells]
        print(name.ljust(40), *shown)
    print("goals for 8,192 processes:", ", ".join(f"{k} at most {v}" for k, v in GOALS.items()))


if __name__ == "__main__":
    main()
