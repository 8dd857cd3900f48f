#!/usr/bin/env python
"""Measures saves to an object store and restores from it, beside plain requests of the same bytes.

    python benchmarks/stores.py                    with a delay of 0 and of 50 ms for each request
    python benchmarks/stores.py --json out.json

The store is a server on this machine (moto), behind a proxy that delays each request and counts
them. Both take processor time of the same cores, so the throughput says little; the seconds beyond
the plain requests, and the number of requests, say how many round trips follow on each other.

Plain requests are what any program needs for the same bytes: one PUT for each file that the
checkpoint has, and one ranged GET for each, all in parallel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "benchmark"
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/stores"))

import jax
import numpy as np
from fault_proxy import FaultProxy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from store_servers import Moto

import ckpt_jax as ckpt
from ckpt_jax.store import objects
from ckpt_jax.store.workers import Workers

ARRAYS, SHAPE = 96, (8, 8192)  # 24 MiB over 8 devices
REPEAT = 3


@contextlib.contextmanager
def running(server):
    """A server that runs until the block ends."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


def timed(act, proxy):
    """The median of the seconds, and the number of requests of one call."""
    seconds = []
    for _ in range(REPEAT):
        proxy.forget()
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), proxy.count()


def plain(url, sizes):
    """Puts and gets values of these sizes, all in parallel."""
    values = [os.urandom(size) for size in sizes]
    urls = [f"{url}/{number}" for number in range(len(sizes))]

    def run(act, *arguments):
        with Workers(objects.PARALLEL, "plain") as workers:
            list(workers.map(act, *arguments))

    return (
        lambda: run(objects.write, urls, values),
        lambda: run(lambda each: objects.read(each, 0, None), urls),
    )


def measure(delay, proxy, url):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    rng = np.random.default_rng(0)
    tree = {
        f"w{number}": jax.device_put(rng.normal(size=SHAPE).astype(np.float32), sharding)
        for number in range(ARRAYS)
    }
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    number = iter(range(1 << 30))
    rows = {}
    ckpt.save(f"{url}/warm", tree)
    proxy.delay_seconds = delay
    rows["save"] = timed(lambda: ckpt.save(f"{url}/{next(number)}", tree), proxy)
    rows["restore"] = timed(lambda: jax.block_until_ready(ckpt.restore(f"{url}/0", target)), proxy)
    one = {"w0": target["w0"]}
    rows["restore one array"] = timed(
        lambda: ckpt.restore(f"{url}/0", one, allow_unexpected=True), proxy
    )
    put, get = plain(f"{url}/plain", [4 * SHAPE[0] * SHAPE[1] * ARRAYS // 8] * 8)
    rows["plain PUTs"] = timed(put, proxy)
    rows["plain GETs"] = timed(get, proxy)
    proxy.delay_seconds = 0
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delays", type=float, nargs="*", default=[0.0, 0.05])
    parser.add_argument("--json", help="write the rows there")
    arguments = parser.parse_args()
    found = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        running(Moto(Path(directory))) as server,
        FaultProxy(server.url) as proxy,
    ):
        os.environ["AWS_ENDPOINT_URL_S3"], os.environ["AWS_REGION"] = proxy.url, "us-east-1"
        server.make_bucket("bucket-of-benchmarks")
        for delay in arguments.delays:
            rows = measure(delay, proxy, f"s3://bucket-of-benchmarks/{delay}")
            found[str(delay)] = rows
            print(f"\n{1000 * delay:g} ms a request, {ARRAYS} arrays of {SHAPE} on 8 devices")
            for name, (seconds, requests) in rows.items():
                print(f"  {name:20}{seconds:8.3f} s  {requests:4} requests")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
