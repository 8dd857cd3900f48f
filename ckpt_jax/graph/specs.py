"""Descriptions of values as plain data, without the values.

A `LeafSpec` says what a value is; a `ShardingSpec` says how an array lay on its devices. Neither
holds an array or a device. The *kind* of a spec says what the value was in the program:

    array                       a jax.Array
    prng_key                    a typed key array; dtype and shape are those of its key data
    numpy, numpy_scalar         an array or a scalar of numpy
    bool, int, float, complex   a Python number
    str, bytes, enum            a string, a byte string, the member of an enum
    date, time, datetime, timedelta, path, dtype    stored as text, see `texts`
    python_state                what `serialize()` of a `PythonState` returned
    unreadable                  a value in a file of another format that cannot be read
    ""                          unknown
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_jax.graph.dtypes import BYTES

_ARRAY_KINDS = frozenset(["array", "numpy", "numpy_scalar", ""])
_NUMBER_KINDS = frozenset(["bool", "int", "float", "complex"])
# The kinds that are stored as a scalar or a byte string, and the dtypes that each may have.
DTYPES_OF_KIND = {
    "int": ("int64", BYTES),  # as text if it does not fit into int64
    "bool": ("bool",),
    "float": ("float64",),
    "complex": ("complex128",),
    "str": (BYTES,),
    "bytes": (BYTES,),
    "enum": (BYTES,),
    "python_state": (BYTES,),
    **dict.fromkeys(("date", "time", "datetime", "timedelta", "path", "dtype"), (BYTES,)),
}


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """The description of a value.

    Attributes:
      kind: what it was in the program, see the module.
      dtype: canonical name of the dtype that it is stored with; "" if it is unknown.
      shape: shape of the whole array; () for everything that is no array.
      weak_type: whether JAX took the dtype from a Python scalar.
      prng_impl: of a PRNG key, the name of its implementation.
      enum_class: of the member of an enum, the module-qualified name of its class; never imported.
      cast_from: of an array that the save has cast, the dtype that it had in the program.
      note: of an unreadable value, why it cannot be read and what to do about it.

    >>> spec = LeafSpec("array", "float32", (4, 3))
    >>> str(spec), spec.is_array, spec.is_placed, spec.is_number
    ('float32[4, 3]', True, True, False)
    """

    kind: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    weak_type: bool = False
    prng_impl: str = ""
    enum_class: str = ""
    cast_from: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.is_key:
            return f"key<{self.prng_impl}>{list(self.shape[:-1])}"
        if self.is_array:
            return f"{self.dtype or '?'}{list(self.shape)}"
        return self.kind

    @property
    def is_array(self) -> bool:
        """Whether it is an array or a scalar of JAX or numpy, or of unknown kind; no PRNG key."""
        return self.kind in _ARRAY_KINDS

    @property
    def is_jax_array(self) -> bool:
        """Whether it is a `jax.Array` other than a PRNG key."""
        return self.kind == "array"

    @property
    def is_numpy_array(self) -> bool:
        return self.kind == "numpy"

    @property
    def is_key(self) -> bool:
        """Whether it is an array of typed PRNG keys."""
        return self.kind == "prng_key"

    @property
    def is_placed(self) -> bool:
        """Whether it lives on devices, and so has a sharding."""
        return self.is_jax_array or self.is_key

    @property
    def is_number(self) -> bool:
        """Whether it is a Python number."""
        return self.kind in _NUMBER_KINDS

    @property
    def is_bytes(self) -> bool:
        """Whether it is stored as a byte string."""
        return self.dtype == BYTES

    @property
    def is_unreadable(self) -> bool:
        return self.kind == "unreadable"

    @property
    def refusal(self) -> str:
        """Of an unreadable value: why it cannot be read, and what to do."""
        note = self.note or (
            f"the dtype {self.dtype} does not say what the array holds. Restore it with a target "
            "that says it"
        )
        return f"{note}, or leave it out (only=...)"


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


OPEN = LeafSpec()  # of a value that a function makes, as long as it has not been called
