"""The house rules that can be read off the imports.

Imports point downward in LAYERS, there are no cycles, and a few modules are the only doors to
what lies outside. The modules are parsed, not imported, so a violation is named even where it
would keep the package from being imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "ckpt_jax"
ROOT = Path(__file__).parent.parent / PACKAGE

# From the ground up. A module stands in the layer that names it or, failing that, the closest
# package above it; it may import from its own layer and from those before.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "options", "report", "metrics", "progress", "version", "_proto", "jax_internals"),
    ("graph.labels", "graph.model", "store.box", "batches"),
    ("trackable",),
    ("graph",),
    ("store",),
    ("state_file",),
    ("arrays",),
    ("io",),
    ("savers",),
    ("flax",),
    ("readers", "service"),
    ("multihost",),
    ("reader",),
    ("fitting",),
    (
        *("saving", "restoring", "restoration", "latest", "verifying", "background"),
        *("preflighting", "agreeing"),
    ),
    ("status", "checkpoint", "functional", "recording", "revive", "nodes", "frozen", "per_process"),
    ("retention", "ledger"),
    ("manager", "inspect"),
    ("preemption",),
    ("__init__",),
    ("__main__", "testing"),
)

# What a package must not reach, on top of the layers.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "ckpt_jax.graph": ("ckpt_jax.store", "jax", "jaxlib"),
    "ckpt_jax.store": ("ckpt_jax.trackable", "jax", "jaxlib"),
}

# Who alone may import something.
DOORS: dict[str, tuple[str, ...]] = {
    "ckpt_jax._proto": (
        "ckpt_jax.graph.codec",
        "ckpt_jax.graph.objects",
        "ckpt_jax.store.index",
        "ckpt_jax.state_file",
        "ckpt_jax._proto",
    ),
    "flax": ("ckpt_jax.flax",),
    "optax": ("ckpt_jax.flax",),
    "tensorstore": ("ckpt_jax.store", "ckpt_jax.readers"),
    "tensorflow": ("ckpt_jax.readers",),
    "orbax": ("ckpt_jax.readers",),
    "jax._src": ("ckpt_jax.jax_internals",),
}


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the package, parsed."""

    name: str
    path: Path
    tree: ast.Module
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: `importer` (a module's name) imports `target` at `line`."""

    importer: str
    target: str
    line: int
    local: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(source, path), tuple(source.splitlines()))
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module in modules().values() for found in imports_of(module))


def imports_of(module: Module) -> Iterator[Import]:
    for node, local, typing_only in import_statements(module.tree, False, False):
        for target in targets_of(node, module):
            yield Import(module.name, target, node.lineno, local, typing_only)


def import_statements(
    node: ast.AST, local: bool, typing_only: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, local, typing_only
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST):
                yield from import_statements(
                    child,
                    local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
                    typing_only or (field == "body" and is_typing_only(node)),
                )


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def targets_of(node: ast.Import | ast.ImportFrom, module: Module) -> list[str]:
    """The modules that a statement names: `from a import b` is `a.b` where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.name.split(".")
        up = node.level - (module.path.name == "__init__.py")
        base = ".".join([*package[: len(package) - up], *([base] if base else [])])
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    return sorted({name if name in modules() else base for name in submodules})


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(module: str) -> int | None:
    """The index of a module's layer: that of the longest entry which is the module or above it."""
    local = module.removeprefix(PACKAGE).lstrip(".") or "__init__"
    entries = [
        (len(entry), index)
        for index, layer in enumerate(LAYERS)
        for entry in layer
        if within(local, entry)
    ]
    return max(entries)[1] if entries else None


def report(problems: list[str]) -> None:
    assert not problems, "\n".join(["", *problems])


def test_every_module_has_a_layer():
    report([f"{name}: give it a place in LAYERS" for name in modules() if layer_of(name) is None])


def test_imports_point_downward():
    report(
        [
            str(found)
            for found in imports()
            if within(found.target, PACKAGE) and points_upward(found)
        ]
    )


def points_upward(found: Import) -> bool:
    above, below = layer_of(found.importer), layer_of(found.target)
    return above is not None and below is not None and below > above


def test_there_are_no_import_cycles():
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.local or found.typing_only:
            continue
        # Importing a.b.c runs a.b too; the importer's own packages are running already.
        parts = found.target.split(".")
        for stop in range(2, len(parts) + 1):
            loaded = ".".join(parts[:stop])
            if loaded in graph and not within(found.importer, loaded):
                graph[found.importer].add(loaded)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]), pytrace=False)


def test_imports_inside_functions_say_why():
    report(
        [
            f"{found}: say why in a comment on that line or the one before"
            for found in imports()
            if found.local and not is_commented(found)
        ]
    )


def is_commented(found: Import) -> bool:
    lines = modules()[found.importer].lines[max(0, found.line - 2) : found.line]
    return any("#" in line for line in lines)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_reach(package: str):
    report(
        [
            str(found)
            for found in imports()
            if within(found.importer, package)
            and any(within(found.target, forbidden) for forbidden in FORBIDDEN[package])
        ]
    )


@pytest.mark.parametrize("target", DOORS)
def test_only_its_doors_import(target: str):
    report(
        [
            str(found)
            for found in imports()
            if within(found.target, target)
            and not any(within(found.importer, door) for door in DOORS[target])
        ]
    )


def test_importing_the_package_imports_neither_flax_nor_optax():
    program = (
        "import sys, ckpt_jax\n"
        "print([name for name in ('flax', 'optax', 'orbax', 'tensorflow') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
