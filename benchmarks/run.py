#!/usr/bin/env python
"""Measures ckpt_jax beside Orbax, TensorFlow, torch DCP, safetensors and the machine's limits.

    python benchmarks/run.py                       everything, about half an hour on two cores
    python benchmarks/run.py --smoke               everything, small: does it run, not how fast
    python benchmarks/run.py --only wide import    some sections
    python benchmarks/run.py --contenders ckpt_jax Orbax --json out.json --chart out.svg

Contenders that are not installed are skipped with a word (`pip install -e ".[bench]"`).

* wide, many-1k, many-10k: durable save; restore onto the same mesh and onto one with the axes
  swapped; how long a save in the background keeps its caller. 8 virtual CPU devices.
* one-device: the same bytes as wide, all on one device.
* cores: wide on one core, on two, on four ... beside the limits of as many cores.
* memory: peak resident memory of a save and a restore of `wide` above the arrays' own bytes.
* leaves: what one more leaf costs a save, a restore and a restore's plan, for ever more leaves.
* import: what importing adds to `import jax`.

Every restored value is compared with what was saved, outside the timing. The exit status is 1
where a contender failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before JAX is imported, and TensorFlow.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import contenders
import limits
import measure
import report
import workloads
from contenders import Contender, fsync_tree
from jax.sharding import Sharding
from measure import Result, Task
from workloads import Host, Workload

OTHERS = ("cores", "memory", "leaves", "import")
SECTIONS = (*(workload.name for workload in workloads.WORKLOADS), *OTHERS)
PACKAGES = (
    "ckpt-jax", "jax", "jaxlib", "flax", "numpy", "tensorstore", "protobuf",
    "orbax-checkpoint", "tensorflow", "torch", "safetensors",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure.

    Attributes:
      size: factor on the number of arrays of a workload.
      repeats: rounds that count, after one that does not.
      budget_seconds: a contender that took longer for one operation stops after three rounds.
      most_leaves: the largest tree of the section "leaves".
      directory: where files are written.
    """

    size: float
    repeats: int
    budget_seconds: float
    most_leaves: int
    directory: str

    def timed(
        self,
        workload: Workload,
        operation: str,
        tasks: Sequence[Task],
        limits_of: Mapping[str, Sequence[Task]],
        nbytes: int = 0,
    ) -> list[Result]:
        """The seconds of `tasks`, and of the ways to use each resource that they need."""
        resource = {way.who: name for name, ways in limits_of.items() for way in ways}
        every = [*tasks, *(way for ways in limits_of.values() for way in ways)]
        turns = measure.take_turns(every, self.repeats, self.budget_seconds)
        return [
            Result(
                workload.name,
                operation,
                task.who,
                "s",
                samples,
                nbytes=nbytes,
                limit=resource.get(task.who, ""),
                failure=failure,
            )
            for task, samples, failure in turns
        ]


def transfers(
    workload: Workload, libraries: Sequence[Contender], settings: Settings
) -> list[Result]:
    """Save, restore onto both meshes, and the wait for a save in the background."""
    host = workloads.host_values(workload)
    mesh, swapped = workloads.sharding_of(workload), workloads.swapped_sharding()
    folder, nbytes = settings.directory, workload.nbytes
    paths = {x: os.path.join(folder, f"{workload.name}-{x.name}") for x in libraries}
    measure.touch_memory(3 * nbytes)

    limits_of = limits.save_limits(host, mesh, folder)
    tasks = [save_task(x, path, host, mesh) for x, path in paths.items()]
    found = settings.timed(workload, "save", tasks, limits_of, nbytes)

    saved = {x: path for x, path in paths.items() if os.path.exists(path)}
    tasks = [restore_task(x, path, host, mesh) for x, path in saved.items()]
    reading = limits.restore_limits(host, mesh, folder)
    found += settings.timed(workload, "restore", tasks, reading, nbytes)

    if mesh != workloads.one_device():
        tasks = [restore_task(x, path, host, swapped) for x, path in saved.items() if x.reshards]
        reading = limits.restore_limits(host, swapped, folder)
        found += settings.timed(workload, "restore, axes swapped", tasks, reading, nbytes)

    tasks = [begin_task(x, path, host, mesh) for x, path in paths.items() if x.background]
    copying = {"devices": limits_of["devices"]}
    found += settings.timed(workload, "async save returns", tasks, copying)

    for path in paths.values():
        shutil.rmtree(path, ignore_errors=True)
    return found


def save_task(library: Contender, path: str, host: Host, sharding: Sharding) -> Task:
    """A whole save."""
    return Task(
        library.name,
        lambda source: library.save(path, source),
        setup=lambda: source_for(library, path, host, sharding),
    )


def begin_task(library: Contender, path: str, host: Host, sharding: Sharding) -> Task:
    """The start of a save; the rest of it is not on the clock."""

    def wait(source: Any, finish: Callable[[], None]) -> None:
        finish()
        fsync_tree(path)  # so that it is not on the next one's

    return Task(
        library.name,
        lambda source: library.begin_save(path, source),
        setup=lambda: source_for(library, path, host, sharding),
        check=wait,
    )


def source_for(library: Contender, path: str, host: Host, sharding: Sharding) -> Any:
    shutil.rmtree(path, ignore_errors=True)
    return library.source(host, sharding)


def restore_task(library: Contender, path: str, host: Host, sharding: Sharding) -> Task:
    return Task(
        library.name,
        lambda target: library.restore(path, target),
        setup=lambda: library.target(host, sharding),
        check=lambda target, restored: library.check(restored, target, host),
    )


def cores(libraries: Sequence[Contender], settings: Settings) -> list[Result]:
    """Saves and restores of `wide`, and their limits, on ever more cores of this machine."""
    all_cores = sorted(os.sched_getaffinity(0))
    counts = [1 << i for i in range(len(all_cores).bit_length()) if 1 << i < len(all_cores)]
    script = Path(__file__)
    found: list[Result] = []
    for count in [*counts, len(all_cores)]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            names = [x.name for x in libraries if isinstance(x, contenders.JaxContender)]
            arguments = ["--only", "wide", "--contenders", *names, "--json", file.name]
            arguments += ["--size", str(settings.size), "--repeats", str(settings.repeats)]
            run = subprocess.run(
                [sys.executable, script, *arguments, "--directory", settings.directory],
                preexec_fn=lambda count=count: os.sched_setaffinity(0, all_cores[:count]),
                stdout=subprocess.DEVNULL,
                check=False,
            )
            if run.returncode == 0:
                found += [
                    replace(result, workload=f"{count} cores")
                    for result in report.from_json(Path(file.name).read_text())
                    if result.operation != "async save returns"
                ]
    return found


def memory(libraries: Sequence[Contender], settings: Settings) -> list[Result]:
    """Each save and each restore in a process of its own."""
    workload = workloads.WORKLOADS[0].scaled(settings.size)
    found: list[Result] = []
    for operation in ("save", "restore"):
        for library in libraries:
            path = os.path.join(settings.directory, f"memory-{library.name}")
            samples, failure = probe("memory", library.name, operation, str(workload.leaves), path)
            mebibytes = tuple(nbytes / 2**20 for nbytes in samples)
            what = f"{operation}: peak extra memory"
            found.append(
                Result(workload.name, what, library.name, "MiB", mebibytes, failure=failure)
            )
    return found


def leaves(libraries: Sequence[Contender], settings: Settings) -> list[Result]:
    """Microseconds for each leaf, of ckpt_jax alone: trees of 32-byte arrays on one device."""
    found: list[Result] = []
    sharding = workloads.one_device()
    for ours in libraries:
        if not isinstance(ours, contenders.CkptJax):
            continue
        for workload in workloads.leaf_workloads(settings.most_leaves):
            host = workloads.host_values(workload)
            path = os.path.join(settings.directory, workload.name)
            for operation, task in (
                ("save", save_task(ours, path, host, sharding)),
                ("restore", restore_task(ours, path, host, sharding)),
                ("plan of a restore", plan_task(ours, path, host, sharding)),
            ):
                found += settings.timed(workload, operation, [task], {})
    return [per_leaf(result) for result in found]


def plan_task(ours: contenders.CkptJax, path: str, host: Host, sharding: Sharding) -> Task:
    """Trace, match and plan, without reading values."""
    return Task(
        ours.name,
        lambda target: ours.ckpt.plan_restore(path, target),
        setup=lambda: ours.target(host, sharding),
    )


def per_leaf(result: Result) -> Result:
    count = int(result.workload.removeprefix("leaves-"))
    micros = tuple(seconds / count * 1e6 for seconds in result.samples)
    return replace(result, unit="us/leaf", samples=micros)


def imports(libraries: Sequence[Contender], settings: Settings) -> list[Result]:
    """`import ckpt_jax` and, for comparison, `import orbax.checkpoint`, after `import jax`."""
    modules = {x.name: x.module for x in libraries if isinstance(x, contenders.JaxContender)}
    samples: dict[str, list[float]] = {name: [] for name in modules}
    failures = dict.fromkeys(modules, "")
    for _ in range(settings.repeats):
        for name, module in modules.items():
            seconds, failures[name] = probe("import", module)
            samples[name] += seconds
    return [
        Result("import", "beyond import jax", name, "s", tuple(some), failure=failures[name])
        for name, some in samples.items()
    ]


def probe(*arguments: str) -> tuple[tuple[float, ...], str]:
    """The number that probe.py prints, and why there is none."""
    script = Path(__file__).with_name("probe.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    if run.returncode:
        return (), (run.stderr.strip().splitlines() or ["no message"])[-1]
    return (float(run.stdout.split()[-1]),), ""


def environment(directory: str) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "file_system": file_system(directory),
        "versions": versions,
    }


def file_system(path: str) -> str:
    """The type of the file system that holds `path`."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if Path(path).resolve().is_relative_to(mount) and len(mount) > len(best[0]):
            best = (mount, kind)
    return best[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1.0, help="factor on the number of arrays")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument(
        "--budget", type=float, default=120, metavar="SECONDS",
        help="a contender that took longer for one operation stops after three rounds",
    )  # fmt: skip
    parser.add_argument("--most-leaves", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--contenders", nargs="+", choices=contenders.CONTENDERS, default=contenders.CONTENDERS
    )
    parser.add_argument("--directory", help="where to write (default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--chart", metavar="FILE", help="draw the ratios there, as SVG")
    parser.add_argument("--smoke", action="store_true", help="--size 0.01 --repeats 1, few leaves")
    parsed = parser.parse_args()
    if parsed.smoke:
        parsed.size, parsed.repeats, parsed.most_leaves = 0.01, 1, 1_000
    return parsed


def main() -> int:
    parsed = arguments()
    libraries, missing = contenders.available(parsed.contenders)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=parsed.directory) as directory:
        settings = Settings(
            parsed.size, parsed.repeats, parsed.budget, parsed.most_leaves, directory
        )
        about = {
            "environment": environment(directory),
            "settings": {name: x for name, x in asdict(settings).items() if name != "directory"},
            "contenders": {library.name: note(library) for library in libraries},
            "skipped": missing,
        }
        introduce(about)
        for workload in workloads.WORKLOADS:
            if workload.name in parsed.only:
                scaled = workload.scaled(settings.size)
                progress(f"{workload.name}: {scaled}")
                results += transfers(scaled, libraries, settings)
        for name, section in zip(OTHERS, (cores, memory, leaves, imports), strict=True):
            if name in parsed.only:
                progress(name)
                results += section(libraries, settings)
    print(report.table(results))
    print(report.LEGEND)
    if parsed.json:
        Path(parsed.json).write_text(report.as_json(results, about) + "\n")
    if parsed.chart:
        Path(parsed.chart).write_text(report.chart(results))
    return 1 if any(result.failure for result in results) else 0


def note(library: Contender) -> str:
    fsync = "; an fsync of all files is added" if library.fsync_added else ""
    background = "" if library.background else "; async: n/a"
    return library.note + fsync + background


def introduce(about: Mapping[str, Any]) -> None:
    where = about["environment"]
    machine = f"{where['machine']}, {where['cores']} cores, {where['file_system']}"
    print(f"{machine}, Python {where['python']}")
    print(", ".join(f"{package} {number}" for package, number in where["versions"].items()))
    for name, text in about["contenders"].items():
        print(f"  {name}: {text}")
    for name, reason in about["skipped"].items():
        print(f"  {name}: skipped, {reason}")
    if where["file_system"] == "tmpfs":
        print("  note: this file system is memory; a durable save costs nothing here")
    print(flush=True)


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
