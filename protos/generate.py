"""Turns the `.proto` files beside this script into the modules of `ckpt_jax.graph._proto`.

    python protos/generate.py            writes *_pb2.py, *_pb2.pyi and SOURCES.txt
    python protos/generate.py --check    exits with 1 and names what is stale; no network

The compiler is pinned and lives in a virtual environment of its own, made for the run and
thrown away. It is an old one on purpose: a generated module works under its own version of
the protobuf runtime and every later one of that major version and the next, so code made by
protobuf 6.30 imports under all of 6.30 to 7.x. It has wheels for CPython 3.9 to 3.13.

For the compiler this folder appears as `ckpt_jax/graph/_proto`: `.proto` files import one another
under that path, and the modules under `ckpt_jax.graph._proto`.

SOURCES.txt holds the digests of the sources and of what was made of them, so that staleness
shows without a compiler. `sha256sum -c ckpt_jax/graph/_proto/SOURCES.txt` reads it too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GRPCIO_TOOLS = "1.72.2"  # its generated code asks for protobuf 6.30.0 or newer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "protos"
MODULES = "ckpt_jax/graph/_proto"
RECORD = f"{MODULES}/SOURCES.txt"


def stale(root: Path = ROOT) -> list[str]:
    """Paths whose contents are not what the last run recorded, or that it did not see.

    A changed pin of the compiler counts as well; then the line that states it is listed.
    """
    path = root / RECORD
    recorded = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sorted({line.split("  ")[-1] for line in set(recorded) ^ set(_record(root))})


def generate(root: Path = ROOT) -> list[str]:
    """Writes the modules and the record. Returns the names of the modules' files."""
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        _compile(root / SOURCES, made, Path(temporary, "venv"))
        modules = sorted((made / MODULES).iterdir())
        for old in _modules(root):
            old.unlink()
        for module in modules:
            shutil.copyfile(module, root / MODULES / module.name)
    (root / RECORD).write_text("\n".join(_record(root)) + "\n", encoding="utf-8")
    return [module.name for module in modules]


def _compile(sources: Path, made: Path, environment: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*install, f"grpcio-tools=={GRPCIO_TOOLS}"], check=True)
    compiler = [python, "-m", "grpc_tools.protoc", f"--proto_path={MODULES}={sources}"]
    output = [f"--python_out={made}", f"--pyi_out={made}"]
    names = [f"{MODULES}/{path.name}" for path in sorted(sources.glob("*.proto"))]
    subprocess.run([*compiler, *output, *names], check=True)


def _modules(root: Path) -> list[Path]:
    return sorted((root / MODULES).glob("*_pb2.py*"))


def _record(root: Path) -> list[str]:
    paths = [*sorted((root / SOURCES).glob("*.proto")), *_modules(root)]
    return [
        f"# Written by protos/generate.py with grpcio-tools {GRPCIO_TOOLS}; do not edit.",
        *(f"{_digest(path)}  {path.relative_to(root).as_posix()}" for path in paths),
    ]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if not parser.parse_args().check:
        print("\n".join(generate()))
        return 0
    problems = stale()
    for problem in problems:
        print(f"stale: {problem}")
    if problems:
        print("run: python protos/generate.py")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
