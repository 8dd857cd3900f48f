#!/usr/bin/env python
"""Measures restoring checkpoints of other libraries, beside those libraries themselves.

    python benchmarks/foreign.py                   1 GB in 96 arrays, and 1,000 small arrays
    python benchmarks/foreign.py --smoke           small: does it run, not how fast
    python benchmarks/foreign.py --rounds 7 --json out.json

Everything ends with jax.Arrays on a mesh of 8 virtual CPU devices: in row shards, in (4, 2) shards,
in (2, 4) shards, and replicated. A library's own path is its loader and `jax.device_put`; where it
can read slices, also a read of each shard with `jax.make_array_from_callback`. Orbax restores onto
shardings itself; it saved (4, 2) shards, which zstd has packed to 92 %. In each round all
take turns; ratios are computed round by round. Above 1 the other is slower than ckpt_jax. The files
are in the page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_jax as ckpt

LAYOUTS = {
    "rows": ((8,), ("a",)),
    "(4, 2)": ((4, 2), ("a", "b")),
    "(2, 4)": ((2, 4), ("a", "b")),
    "replicated": ((8,), ()),
}
Arrays = dict[str, np.ndarray]


def sharding_of(layout: str) -> NamedSharding:
    shape, axes = LAYOUTS[layout]
    names = ("a", "b")[: len(shape)]
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), names), PartitionSpec(*axes))


def ours(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    target = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for name, array in arrays.items()
    }
    return ckpt.restore(path, target)


def placed(host: Any, sharding: NamedSharding) -> Any:
    return {name: jax.device_put(array, sharding) for name, array in host.items()}


def safetensors_file(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    import safetensors.numpy

    return placed(safetensors.numpy.load_file(path), sharding)


def safetensors_slices(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in arrays}
        return {
            name: jax.make_array_from_callback(
                arrays[name].shape, sharding, lambda index, part=part: part[index]
            )
            for name, part in slices.items()
        }


def torch_file(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    import torch

    state = torch.load(path, mmap=True, weights_only=True)
    return placed({name: tensor.numpy() for name, tensor in state.items()}, sharding)


def numpy_file(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    with np.load(path) as file:
        return placed({name: file[name] for name in file}, sharding)


def flax_file(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    from flax import serialization

    with open(path, "rb") as file:
        return placed(serialization.msgpack_restore(file.read()), sharding)


def orbax_directory(path: str, arrays: Arrays, sharding: NamedSharding) -> Any:
    import orbax.checkpoint

    target = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for name, array in arrays.items()
    }
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def write_orbax(arrays: Arrays, path: str) -> None:
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, placed(arrays, sharding_of("(4, 2)")))


def write_torch(arrays: Arrays, path: str) -> None:
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def write_flax(arrays: Arrays, path: str) -> None:
    from flax import serialization

    with open(path, "wb") as file:
        file.write(serialization.msgpack_serialize(arrays))


Read = Callable[[str, Arrays, NamedSharding], Any]
# name of the file, the package that is needed, how it is written, how others read it
FORMATS: list[tuple[str, str, Callable[[Arrays, str], Any], dict[str, Read]]] = [
    (
        "a.safetensors",
        "safetensors",
        lambda arrays, path: ckpt.export(arrays, path, format="safetensors"),
        {"load_file": safetensors_file, "get_slice": safetensors_slices},
    ),
    ("a.pt", "torch", write_torch, {"torch.load(mmap)": torch_file}),
    (
        "a.npz",
        "numpy",
        lambda arrays, path: ckpt.export(arrays, path, format="npz"),
        {"np.load": numpy_file},
    ),
    ("a.msgpack", "flax", write_flax, {"msgpack_restore": flax_file}),
    ("orbax", "orbax", write_orbax, {"StandardCheckpointer": orbax_directory}),
]


def limit(path: str) -> None:
    """The least that reading takes: every byte into memory that is warm."""
    buffer = np.zeros(4 << 20, np.uint8)
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        for offset in range(0, os.path.getsize(file), buffer.size):
            os.preadv(descriptor, [buffer], offset)
        os.close(descriptor)


def files_of(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [os.path.join(above, name) for above, _, names in os.walk(path) for name in names]


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    taken = time.perf_counter() - start
    del result
    return taken


def check(restored: Any, arrays: Arrays) -> None:
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)


def measure(
    directory: str, arrays: Arrays, what: str, rounds: int, only: list[str] | None
) -> list[dict[str, Any]]:
    rows = []
    for name, package, write, others in FORMATS:
        if only and name not in only:
            continue
        if find_spec(package) is None:
            print(f"{what}: {package} is not installed")
            continue
        path = os.path.join(directory, name)
        write(arrays, path)
        for layout in LAYOUTS:
            sharding = sharding_of(layout)
            contenders: dict[str, Callable[[], Any]] = {
                reader: partial(read, path, arrays, sharding)
                for reader, read in {"ckpt_jax": ours, **others}.items()
            }
            for reader in contenders:
                check(contenders[reader](), arrays)
            contenders["preadv"] = partial(limit, path)
            samples: dict[str, list[float]] = {reader: [] for reader in contenders}
            for _ in range(rounds):
                for reader, work in contenders.items():
                    samples[reader].append(seconds(work))
            size = sum(array.nbytes for array in arrays.values()) / 1e9
            row = {"what": what, "file": name, "layout": layout, "gigabytes": size}
            for reader, times in samples.items():
                ratio = [b / a for a, b in zip(samples["ckpt_jax"], times, strict=True)]
                row[reader] = {
                    "seconds": statistics.median(times),
                    "ratio": statistics.median(ratio),
                    "samples": times,
                }
            rows.append(row)
            print(line(row), flush=True)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return rows


def line(row: dict[str, Any]) -> str:
    size = row["gigabytes"]
    mine = row["ckpt_jax"]["seconds"]
    found = [
        f"{reader} {entry['ratio']:.2f}x"
        for reader, entry in row.items()
        if isinstance(entry, dict) and reader != "ckpt_jax"
    ]
    head = f"{row['what']:>12} {row['file']:<14} {row['layout']:<11}"
    return f"{head} {1e3 * mine:7.0f} ms {size / mine:5.2f} GB/s  " + "  ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of files, as in the first column")
    parser.add_argument("--json")
    options = parser.parse_args()
    count, rows, rounds = (8, 64, 1) if options.smoke else (96, 2048, options.rounds)
    random = np.random.default_rng(0)
    base = random.standard_normal((rows, 1360), np.float32)
    large = {f"w{i}": base + i for i in range(count)}
    small = {f"w{i}": base[:64, :64] + i for i in range(10 * count if options.smoke else 1000)}
    with tempfile.TemporaryDirectory() as directory:
        found = measure(directory, large, f"{count} large", rounds, options.only)
        found += measure(directory, small, f"{len(small)} small", rounds, options.only)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
