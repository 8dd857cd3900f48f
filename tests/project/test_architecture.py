"""The house rules that can be read off the imports: see `house`.

The modules are parsed, not imported, so a violation is named even if it keeps the package from
being imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import combinations

import pytest
from house import (
    LAYERS,
    PACKAGE,
    ROOT,
    Import,
    arrows,
    floors,
    imports,
    layer_of,
    modules,
    rooms,
    within,
)

# What a room must not reach, on top of the layers.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "ckpt_jax.graph": ("jax", "jaxlib"),
    "ckpt_jax.matching": ("jax", "jaxlib"),
    "ckpt_jax.store": ("jax", "jaxlib"),
}

# Who alone may import something.
DOORS: dict[str, tuple[str, ...]] = {
    "ckpt_jax.graph._proto": (
        "ckpt_jax.graph.codec",
        "ckpt_jax.graph.saved_objects",
        "ckpt_jax.restoring.formats.tensorflow",
        "ckpt_jax.store.glance",
        "ckpt_jax.store.index",
        "ckpt_jax.store.manifest",
        "ckpt_jax.store.state_file",
        "ckpt_jax.graph._proto",
    ),
    "flax": ("ckpt_jax.objects.nnx", "ckpt_jax.objects.linen"),
    "h5py": ("ckpt_jax.restoring.formats.keras",),
    "optax": (),
    "tensorstore": ("ckpt_jax.store", "ckpt_jax.restoring.formats"),
    "tensorflow": ("ckpt_jax.restoring.formats",),
    "orbax": ("ckpt_jax.restoring.formats",),
    "jax._src": ("ckpt_jax.values.jax_internals",),
}

ENDINGS = ("s", "es", "e", "ed", "er", "ers", "ing", "ion", "ions", "ation", "or", "ory", "al")


def report(problems: list[str]) -> None:
    assert not problems, "\n".join(["", *problems])


def test_every_room_has_one_place_in_the_layers():
    listed = [room for layer in LAYERS for room in layer]
    assert sorted(listed) == rooms()


def test_a_room_imports_only_rooms_below_it():
    report(
        [
            str(each)
            for (upper, lower), found in arrows().items()
            if layer_of(lower) >= layer_of(upper)
            for each in found
        ]
    )


def test_the_house_is_small_enough_to_be_known():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.name for path in ROOT.glob("*.py")}
    assert len(folders) <= 12
    assert len(files) <= 12  # two of them are only doors that programs know
    assert max(floors().values()) <= 11


def test_every_room_says_what_it_is_for():
    report(
        [
            f"{name}: say in a docstring what the room is for"
            for name, m in modules().items()
            if m.path.name == "__init__.py"
            and not m.is_generated
            and ast.get_docstring(m.tree) is None
        ]
    )


def test_no_two_names_differ_by_an_ending():
    """Neither those of two rooms, nor those of two modules that are in rooms."""
    inside = {m.path.stem for m in modules().values() if not m.is_generated} - {"__init__"}
    for names in (rooms(), sorted(inside)):
        report([f"{a} and {b}" for a, b in combinations(names, 2) if stem(a) == stem(b)])


def stem(name: str) -> str:
    """A name without its ending, if something is left of it.

    >>> stem("restoring") == stem("restoration") == stem("restore")
    True
    """
    endings = sorted(ENDINGS, key=len, reverse=True)
    found = next((e for e in endings if name.endswith(e) and len(name) - len(e) >= 3), "")
    return name.removesuffix(found)


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
def test_a_room_does_not_reach(package: str):
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


def test_importing_the_package_imports_no_library_that_it_may_not_need():
    names = ("flax", "optax", "orbax", "tensorflow", "h5py")
    program = f"import sys, {PACKAGE}\nprint([n for n in {names} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
