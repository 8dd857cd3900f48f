"""The structure of the package, read off its imports: rooms, arrows and floors.

A *room* is a folder or a file at the top of `ckpt_jax/`. An *arrow* leads from a room to another
one that it imports. A room stands one *floor* above the highest room that it imports.

    python tests/project/house.py    # draws the house from the top floor down
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = "ckpt_jax"
ROOT = Path(__file__).parent.parent.parent / PACKAGE  # not from `places`: this file is run too

# From the ground up. A room imports only rooms on the lines before its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "metrics", "progress", "report", "version"),
    ("graph",),
    ("objects", "store"),
    ("options", "readers", "values"),
    ("io", "matching", "processes"),
    ("saving", "restoring"),
    ("api",),
    ("manage",),
    ("showing",),
    ("__init__",),
    ("testing", "__main__", "retention", "state_file"),
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the package, parsed."""

    name: str
    path: Path
    tree: ast.Module
    lines: tuple[str, ...]

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def is_generated(self) -> bool:
        return "._proto" in self.name


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
    """All modules by name. They are parsed, not imported."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(source, path), tuple(source.splitlines()))
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module in modules().values() for found in _imports_of(module))


def room_of(module: str) -> str:
    """The room of a module, by its full name.

    >>> room_of("ckpt_jax.graph.codec"), room_of("ckpt_jax.errors"), room_of("ckpt_jax")
    ('graph', 'errors', '__init__')
    """
    return module.split(".")[1] if "." in module else "__init__"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@cache
def arrows() -> dict[tuple[str, str], tuple[Import, ...]]:
    """The imports from each room to each other one. Those for type checkers alone do not count."""
    found: dict[tuple[str, str], list[Import]] = {}
    for each in imports():
        ends = room_of(each.importer), room_of(each.target)
        if within(each.target, PACKAGE) and ends[0] != ends[1] and not each.typing_only:
            found.setdefault(ends, []).append(each)
    return {ends: tuple(each) for ends, each in found.items()}


def rooms() -> list[str]:
    return sorted({module.room for module in modules().values()})


def floors() -> Mapping[str, int]:
    """The floor of each room, from 1. `graphlib.CycleError` if rooms import each other."""
    below: dict[str, set[str]] = {room: set() for room in rooms()}
    for upper, lower in arrows():
        below[upper].add(lower)
    found: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        found[room] = 1 + max([found[lower] for lower in below[room]], default=0)
    return found


def layer_of(room: str) -> int:
    """The number of a room's line in LAYERS."""
    (layer,) = [number for number, line in enumerate(LAYERS) if room in line]
    return layer


def _imports_of(module: Module) -> Iterator[Import]:
    for node, local, typing_only in _import_statements(module.tree, False, False):
        for target in _targets_of(node):
            yield Import(module.name, target, node.lineno, local, typing_only)


def _import_statements(
    node: ast.AST, local: bool, typing_only: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, local, typing_only
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST):
                yield from _import_statements(
                    child,
                    local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
                    typing_only or (field == "body" and _is_typing_only(node)),
                )


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _targets_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement names: `from a import b` is `a.b` if that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    assert not node.level, "imports are absolute (ruff: TID252)"
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    return sorted({name if name in modules() else base for name in submodules})


def drawing() -> str:
    """The house in words, from the top floor down."""
    lines_of: dict[str, int] = {}
    files_of: dict[str, int] = {}
    for module in modules().values():
        if not module.is_generated:
            lines_of[module.room] = lines_of.get(module.room, 0) + len(module.lines)
            files_of[module.room] = files_of.get(module.room, 0) + 1
    floor_of = floors()
    upward = [ends for ends in arrows() if layer_of(ends[0]) <= layer_of(ends[1])]
    lines = [
        f"{len(rooms())} rooms, {len(arrows())} arrows, {max(floor_of.values())} floors, "
        f"{len(upward)} arrows upward, {sum(files_of.values())} files, "
        f"{sum(lines_of.values())} lines"
    ]
    for room in sorted(rooms(), key=lambda room: (-floor_of[room], room)):
        below = ", ".join(sorted(lower for upper, lower in arrows() if upper == room))
        size = f"{files_of[room]:>3} files {lines_of[room]:>6} lines"
        lines.append(f"floor {floor_of[room]:>2}  {room:<12}{size}  -> {below}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing())
