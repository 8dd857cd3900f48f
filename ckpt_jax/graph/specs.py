"""What values are, as plain data: a `LeafSpec` is what a value is, a `ShardingSpec` is how an
array lay on its devices. Neither holds an array or a device.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """What a value is, without the value.

    `kind` says what it was in the program: "array" (a jax.Array), "numpy", "numpy_scalar",
    "prng_key" (a typed key array; dtype and shape are those of its key data), "int", "float",
    "complex", "bool", "str", "bytes", "python_state"; "" where it is unknown; "unreadable" for what
    a file of another format holds but cannot be read.
    """

    kind: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    weak_type: bool = False
    prng_impl: str = ""

    def __str__(self) -> str:
        if self.kind == "prng_key":
            return f"key<{self.prng_impl}>{list(self.shape[:-1])}"
        if self.kind in ("array", "numpy", "numpy_scalar", ""):
            return f"{self.dtype or '?'}{list(self.shape)}"
        return self.kind


@dataclass(frozen=True, slots=True)
class ShardingSpec:
    """How a jax.Array lay on its devices when it was saved: advice, never needed to restore."""

    kind: str
    axis_names: tuple[str, ...] = ()
    mesh_shape: tuple[int, ...] = ()
    partitions: tuple[tuple[str, ...], ...] = ()
    num_devices: int = 1
    memory_kind: str = ""
    text: str = ""


OPEN = LeafSpec()  # of a value that a function makes, while it has not been called
