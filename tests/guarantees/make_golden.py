"""Writes tests/guarantees/golden/format-2/*: small checkpoints, with leaves and keys of every kind.

    PYTHONPATH=. python tests/guarantees/make_golden.py graph-1|graph-2|zstd [directory]

A golden checkpoint is never written again: it pins what a released format is. A new version of the
format, or of the object graph, gets a directory, and a function below, of its own.
"""

import dataclasses
import enum
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import ckpt_jax as ckpt

GOLDEN = Path(__file__).parent / "golden" / "format-2"
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "datetime64[s]"),
    *("timedelta64[ms]", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Settings:
    rate: float
    name: str


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Cursor(ckpt.PythonState):
    def __init__(self, text: str):
        self.text: str | bytes = text

    def serialize(self) -> str | bytes:
        return self.text

    def deserialize(self, value: bytes) -> None:
        self.text = value


def pattern(dtype: str, count: int) -> np.ndarray:
    """Deterministic elements of a dtype; for floats among them -0, infinities and NaN."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if kind.itemsize == 1 and dtype in ("int4", "uint4", "bool"):
        return (np.arange(count) % (2 if dtype == "bool" else 8)).astype(kind)
    numbers = (np.arange(count * kind.itemsize, dtype=np.uint32) * 2654435761) >> 24
    return np.frombuffer(numbers.astype(np.uint8).tobytes(), kind)


def tree_1() -> dict[Any, Any]:
    """What the golden checkpoint with version 1 of the object graph holds."""
    shared = np.arange(10, dtype=np.int32)
    return {
        "dtypes": {dtype: pattern(dtype, 6) for dtype in DTYPES},
        "floats": np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 0.1]),
        "shapes": [
            np.ones(()),
            np.zeros((0,)),
            np.zeros((2, 0, 3)),
            np.arange(24.0).reshape(2, 3, 4),
        ],
        "big": pattern("float32", 80_000).reshape(400, 200),
        "jax": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
        "key": jax.random.key(42),
        "keys": jax.random.split(jax.random.key(42, impl="rbg"), 3),
        "scalar": np.float32(2.5),
        "python": [True, False, 7, -1, 2**63 - 1, 2**200, -0.0, 0.1, float("inf"), 1 - 2j],
        "text": ["", "ascii", "ünïcödé 🎉", "nul\0", b"", b"\x00\xff"],
        "enum": Color.BLUE,
        "state": Cursor("line 17"),
        "containers": ({}, [], (), None, Point(1, [2]), Settings(0.5, "adam"), {"a": {"b": ()}}),
        "labels": {0: 1, "0": 2, True: 3, None: 4, 0.5: 5, b"k": 6, "": 7, "a/b": 8, "a.b": 9},
        "nested": {"a": {"b": 10}, ".ATTRIBUTES": 11, ".S": 12},
        "tied": [shared, {"again": shared}],
    }


def blank_1() -> dict[Any, Any]:
    """A target for `tree_1`, with other values."""
    shared = np.zeros(10, np.int32)
    tree = tree_1()
    blank = {
        "dtypes": {dtype: np.zeros_like(array) for dtype, array in tree["dtypes"].items()},
        "floats": np.zeros_like(tree["floats"]),
        "shapes": [np.zeros_like(array) for array in tree["shapes"]],
        "big": np.zeros_like(tree["big"]),
        "jax": jax.ShapeDtypeStruct((3, 4), jnp.float32),
        "key": jax.random.key(0),
        "keys": jax.ShapeDtypeStruct((3,), tree["keys"].dtype),
        "scalar": np.float32(0),
        "python": [type(value)() for value in tree["python"]],
        "text": [type(value)() for value in tree["text"]],
        "enum": Color.RED,
        "state": Cursor(""),
        "containers": ({}, [], (), None, Point(0, [0]), Settings(0.0, ""), {"a": {"b": ()}}),
        "labels": dict.fromkeys(tree["labels"], 0),
        "nested": {"a": {"b": 0}, ".ATTRIBUTES": 0, ".S": 0},
        "tied": [shared, {"again": shared}],
    }
    assert list(blank) == list(tree)
    return blank


def write_1(path: Path) -> str:
    """Several shards, so that arrays are cut and the index merges them."""
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(150_000))
    return ckpt.save(path, tree_1(), options=options)


def tree_2() -> dict[Any, Any]:
    """What the one with version 2 of the object graph holds: keys that version 1 lacks."""
    keys = [
        ("a", 1),
        ("a", "1"),
        "('a', 1)",
        Color.RED,
        "RED",
        (Color.RED, (None,)),
        (),
        np.int8(7),
    ]
    return {key: np.full(2, number) for number, key in enumerate(keys)}


def write_2(path: Path) -> str:
    return ckpt.save(path, tree_2())


def write_zstd(path: Path) -> str:
    return ckpt.save(path, tree_1(), options=ckpt.CheckpointOptions(compression="zstd"))


WRITERS = {"graph-1": write_1, "graph-2": write_2, "zstd": write_zstd}

if __name__ == "__main__":
    import make_golden  # so that the classes have the names that they have in the tests

    name, *directory = sys.argv[1:]
    print(make_golden.WRITERS[name](Path(*directory or [str(GOLDEN / name)])))
