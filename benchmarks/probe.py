"""What has to be measured in a fresh process: peak memory and import time.

    python benchmarks/probe.py memory CONTENDER save|restore LEAVES PATH
    python benchmarks/probe.py import MODULE

Each prints one number. A probe that saves leaves the checkpoint at PATH for one that restores.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def import_seconds(module: str) -> float:
    """How long `import module` takes where jax is imported already."""
    import jax  # noqa: F401

    start = time.perf_counter()
    __import__(module)
    return time.perf_counter() - start


def extra_bytes(contender_name: str, operation: str, leaves: int, path: str) -> int:
    """The peak of resident memory above what stood before, and above the restored arrays."""
    import contenders
    import workloads

    (contender,), _ = contenders.available([contender_name])
    wide = workloads.WORKLOADS[0]
    sharding = workloads.mesh_sharding()
    # Once with one array: libraries that are loaded and threads that are started at first use.
    host = workloads.host_values(workloads.Workload("one", 1, wide.shape))
    first = f"{path}-before-{operation}"
    contender.save(first, contender.source(host, sharding))
    contender.restore(first, contender.target(host, sharding))

    host = workloads.host_values(workloads.Workload("wide", leaves, wide.shape))
    nbytes = sum(value.nbytes for value in host.values())
    if operation == "save":
        source = contender.source(host, sharding)
        del host
        before = start_of_peak()
        contender.save(path, source)
        return peak() - before
    target = contender.target(host, sharding)
    del host
    before = start_of_peak()
    restored = contender.restore(path, target)
    extra = peak() - before - (0 if contender.in_place else nbytes)
    host = workloads.host_values(workloads.Workload("wide", leaves, wide.shape))
    contender.check(restored, target, host)
    return extra


def start_of_peak() -> int:
    """Forgets the peak so far; the resident memory from which it grows anew, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak() -> int:
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main(what: str, *arguments: str) -> None:
    if what == "import":
        print(import_seconds(*arguments))
    else:
        contender, operation, leaves, path = arguments
        print(extra_bytes(contender, operation, int(leaves), path))


if __name__ == "__main__":
    main(*sys.argv[1:])
