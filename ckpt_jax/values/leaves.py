"""Leaves: how each kind of value becomes an array or a byte string, and how it is restored.

Everything that is saved is an array or a byte string. A Python number becomes a rank-0 array
(an int that does not fit into int64 becomes its hexadecimal text), a string becomes its UTF-8
bytes, a typed PRNG key its key data. The `LeafSpec` remembers what the value was. In a restore, the
*target* (the value that the program has) says which kind, dtype, shape and sharding is wanted.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ckpt_jax.graph.dtypes import ANONYMOUS_BYTE, BYTES, converted, dtype_name, dtype_of, family
from ckpt_jax.graph.labels import enum_class_of, imported_member
from ckpt_jax.graph.specs import OPEN, LeafSpec, ShardingSpec
from ckpt_jax.graph.texts import KINDS, kind_of
from ckpt_jax.objects.python_state import PythonState

_INT64 = range(-(2**63), 2**63)


# --- what a value is -------------------------------------------------------------------


def describe(value: Any) -> tuple[LeafSpec, ShardingSpec | None]:
    """The spec and the sharding of a value; the spec is `OPEN` for a function that makes a value.

    Raises:
      TypeError: saying why the value cannot be saved.
    """
    if isinstance(value, Tracer):
        raise TypeError("a tracer has no value yet: save and restore outside of jit")
    if isinstance(value, jax.Array):
        return _spec_of_array(value), sharding_spec(value.sharding)
    if isinstance(value, jax.ShapeDtypeStruct):
        sharding = value.sharding and sharding_spec(value.sharding)
        return _spec_of_array(value), sharding
    for kind, describe_kind in _DESCRIBE:
        if isinstance(value, kind):
            return describe_kind(value), None
    if (kind := kind_of(value)) is not None:
        return LeafSpec(kind, BYTES), None
    if callable(value):
        return OPEN, None
    kind = type(value)
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not an array or scalar")


def describe_held(value: Any) -> tuple[LeafSpec, ShardingSpec | None]:
    """`describe` for a value that is to be saved now.

    Raises:
      TypeError: saying why it cannot be.
    """
    described = describe(value)
    _require_held(value)
    return described


def _require_held(value: Any) -> None:
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError("a jax.ShapeDtypeStruct describes an array and holds none")
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted():
        raise TypeError("the array has been deleted or donated; pass the one that took its place")


def evaluate(value: Any) -> Any:
    """The value, or, if it is a function that makes a value, what the function returns.

    Raises:
      TypeError: the function returned another function.
    """
    if not callable(value) or isinstance(value, PythonState | enum.Enum):
        return value
    made = value()
    if callable(made) and not isinstance(made, PythonState | enum.Enum):
        raise TypeError(f"the function {value!r} returned another function, {made!r}, not a value")
    return made


def _spec_of_array(value: Any) -> LeafSpec:
    return _array_spec(value.shape, value.dtype, getattr(value, "weak_type", False))


@lru_cache(maxsize=4096)
def _array_spec(shape: tuple[int, ...], dtype: Any, weak_type: bool) -> LeafSpec:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return LeafSpec("prng_key", dtype_name(data.dtype), data.shape, prng_impl=_impl_of(dtype))
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise TypeError(f"arrays of the extended dtype {dtype} are not supported")
    return LeafSpec("array", dtype_name(dtype), tuple(shape), weak_type)


@lru_cache
def _impl_of(key_dtype: Any) -> str:
    """The name that `jax.random.key(impl=...)` takes, for a key dtype."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == key_dtype:
            return name
    raise TypeError(f"PRNG keys of {key_dtype} have an implementation that JAX does not name")


def _numpy_spec(value: np.ndarray | np.generic) -> LeafSpec:
    kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("a masked array: save its data and its mask")
    if value.dtype.hasobject:
        raise TypeError("a numpy array of Python objects has no bytes to save")
    try:
        dtype_of(name := dtype_name(value.dtype))
    except (TypeError, ValueError):
        raise TypeError(f"numpy dtype {value.dtype} is not supported") from None
    return LeafSpec(kind, name, value.shape)


def _int_spec(value: int) -> LeafSpec:
    return _INT if int(value) in _INT64 else _BIG_INT


_INT = LeafSpec("int", "int64")
_BIG_INT = LeafSpec("int", BYTES)
_DESCRIBE: tuple[tuple[type | tuple[type, ...], Callable[[Any], LeafSpec]], ...] = (
    (np.ndarray, _numpy_spec),
    (enum.Enum, lambda value: LeafSpec("enum", BYTES, enum_class=enum_class_of(value))),
    (str, lambda value: LeafSpec("str", BYTES)),  # before np.generic: np.str_ is a string
    (bytes, lambda value: LeafSpec("bytes", BYTES)),
    (np.generic, _numpy_spec),
    (bool, lambda value: LeafSpec("bool", "bool")),
    (int, _int_spec),
    (float, lambda value: LeafSpec("float", "float64")),
    (complex, lambda value: LeafSpec("complex", "complex128")),
    (PythonState, lambda value: LeafSpec("python_state", BYTES)),
)


@lru_cache(maxsize=4096)
def sharding_spec(sharding: jax.sharding.Sharding) -> ShardingSpec:
    """A sharding as plain data."""
    kind = type(sharding).__name__
    memory = sharding.memory_kind or ""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return ShardingSpec(kind, num_devices=sharding.num_devices, memory_kind=memory)
    mesh = sharding.mesh
    partitions = tuple(
        () if part is None else (part,) if isinstance(part, str) else tuple(map(str, part))
        for part in sharding.spec
    )
    return ShardingSpec(
        kind,
        tuple(map(str, mesh.axis_names)),
        tuple(mesh.shape.values()),
        partitions,
        sharding.num_devices,
        memory,
    )


def struct_of(
    spec: LeafSpec, sharding: jax.sharding.Sharding | None = None
) -> jax.ShapeDtypeStruct:
    """The `jax.ShapeDtypeStruct` of a spec.

    Raises:
      ValueError: there is no such dtype.
    """
    return jax.ShapeDtypeStruct(spec.shape, dtype_of(spec.dtype), sharding=sharding)


# --- saving ----------------------------------------------------------------------------


def encode(value: Any) -> jax.Array | np.ndarray | bytes:
    """The array or byte string that is stored for a value."""
    _require_held(value)
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():  # so that the data of a key is no tracer
                return jax.random.key_data(value)
        return value
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, enum.Flag):
        return str(value.value).encode()  # a combination of flags has no name
    if isinstance(value, enum.Enum):
        return value.name.encode()
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    if isinstance(value, PythonState):
        return _state_bytes(value)
    if (kind := kind_of(value)) is not None:
        return KINDS[kind].write(value).encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return np.asarray(value, np.int64) if int(value) in _INT64 else hex(value).encode()
    return np.asarray(value)


def _state_bytes(state: PythonState) -> bytes:
    data = state.serialize()
    if isinstance(data, str):
        return data.encode("utf-8")
    if isinstance(data, bytes):
        return data
    kind, got = type(state).__qualname__, type(data).__name__
    raise TypeError(f"{kind}.serialize() must return str or bytes, got {got}")


def kept(value: Any) -> Any:
    """A value of an object with code of its own, to be given to that code again if need be.

    Raises:
      TypeError: it describes an array and is none, or a function makes it.
    """
    if isinstance(value, PythonState):
        return _state_bytes(value)
    if callable(value) and not isinstance(value, enum.Enum):
        raise TypeError("a function makes the value, and a restore must not call it")
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError("there is no value yet")
    return value.copy() if isinstance(value, np.ndarray) else value


# --- restoring -------------------------------------------------------------------------


def difference(saved: LeafSpec, target: LeafSpec, cast: bool) -> str | None:
    """Why a value of spec `saved` cannot be restored as `target`; None if it can.

    A saved value without a dtype takes the dtype of its target.
    """
    if saved.is_array and not saved.dtype and not target.is_bytes:
        saved = replace(saved, dtype=target.dtype)
    if saved.is_unreadable:
        return _why_unreadable(saved, target)
    if target.kind == "python_state" and saved.kind in ("str", "bytes"):
        return None  # from a file of a format that does not record kinds
    if target.kind == saved.kind and not target.is_array:
        same = (saved.prng_impl, saved.shape) == (target.prng_impl, target.shape)
        return None if same else f"expected {target}, got {saved}"
    if saved.is_key != target.is_key and saved.is_array != target.is_array:
        return _key_difference(saved, target)
    if saved.is_bytes or target.is_bytes or saved.is_key or target.is_key:
        return f"expected {_kind(target)}, got {_kind(saved)}"
    if saved.shape != target.shape:
        return f"expected shape {target.shape}, got {saved.shape}"
    if target.is_array and saved.is_array:
        if saved.dtype == target.dtype or cast:
            return None
        if saved.cast_from:
            was = f"which the save made of {saved.cast_from} (cast_on_save)"
            return f"expected dtype {target.dtype}, got {saved.dtype}, {was}; cast=True converts it"
        return f"expected dtype {target.dtype}, got {saved.dtype} (cast=True would convert it)"
    # A Python number on either side: the family of the number has to be the same.
    if cast or _family(saved) == _family(target):
        return None
    return f"expected {_kind(target)}, got {_kind(saved)}"


def _why_unreadable(saved: LeafSpec, target: LeafSpec) -> str | None:
    """Why a value of a file that does not say what it is cannot be read; None if the target says
    it: anonymous values of one byte are taken for the target's dtype of one byte."""
    found = f"{saved.dtype}{list(saved.shape)}"
    if saved.dtype != ANONYMOUS_BYTE or not target.is_array or target.is_bytes:
        note = f": {saved.note}" if saved.note else ""
        return f"expected {_kind(target)}, got {found}, which is unreadable{note}"
    if saved.shape != target.shape:
        return f"expected shape {target.shape}, got {saved.shape}"
    if target.dtype == "bool" or dtype_of(target.dtype).itemsize != 1:
        return f"expected {target}, got {found}, which is unreadable without a target of one byte"
    return None


def _key_difference(saved: LeafSpec, target: LeafSpec) -> str | None:
    """Why a typed PRNG key and the array of a legacy key cannot stand for each other.

    They can if it is clear which implementation the legacy key is for. Only one has keys of two
    words. JAX's other implementations share their form.
    """
    key, legacy = (saved, target) if saved.is_key else (target, saved)
    problem = f"expected {target}, got {saved}"
    if legacy.is_bytes or (legacy.dtype, legacy.shape) != (key.dtype, key.shape):
        return problem
    config: Any = jax.config
    default = config.jax_default_prng_impl
    is_default = saved.is_key and key.prng_impl == default
    if key.prng_impl == "threefry2x32" or is_default:
        return None
    if saved.is_key:
        return (
            f"{problem}, and legacy keys here are of {default}: restore a typed key, "
            f"jax.random.key(0, impl={key.prng_impl!r}), and take its jax.random.key_data"
        )
    return (
        f"{problem}, which may be a legacy key of several implementations: restore an array, and "
        f"wrap it with jax.random.wrap_key_data(array, impl={key.prng_impl!r})"
    )


def _kind(spec: LeafSpec) -> str:
    return str(spec) if spec.is_array or spec.is_key else f"a Python {spec.kind}"


def _family(spec: LeafSpec) -> str:
    return spec.kind if spec.is_number else family(dtype_of(spec.dtype))


def decode(data: Any, saved: LeafSpec, target: LeafSpec, like: Any = None) -> Any:
    """Turns what was read for a leaf into the kind of value that `target` is.

    Args:
      data: a numpy array or bytes; a jax.Array if the target is one.
      saved, target: the specs of the saved value and of the target.
      like: the target's present value. An enum member is restored as a member of its class. Without
        one, it is a member of the class that was saved if the program has imported it, or else its
        name.

    Raises:
      OverflowError: a Python number does not fit into the dtype of the target.
      ValueError: the text is not that of such a value.
    """
    kind = target.kind
    if target.is_key:
        return jax.random.wrap_key_data(data, impl=target.prng_impl)
    if isinstance(data, bytes):
        text = _decode_bytes(data, saved.kind if target.is_array else kind)
        if kind != "enum":
            return text
        if isinstance(like, enum.Enum):
            return _member(like, text)
        member = imported_member(saved.enum_class, text)
        return text if member is None else member
    if target.is_array:
        if isinstance(data, np.ndarray | np.generic):
            data = converted(np.asarray(data), dtype_of(target.dtype))
        return data[()] if kind == "numpy_scalar" else data
    value = data.item() if hasattr(data, "item") else data
    return _number(kind, value) if target.is_number else value


def _number(kind: str, value: Any) -> Any:
    """A number as a Python number of another kind."""
    if kind != "complex" and isinstance(value, complex):
        if value.imag:
            raise OverflowError(f"{value} does not fit into a Python {kind}")
        value = value.real
    number = _PYTHON[kind](value)
    if kind in ("bool", "int") and number != value:
        raise OverflowError(f"{value} does not fit into a Python {kind}")
    return number


_PYTHON: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
}


def _member(like: enum.Enum, text: str) -> enum.Enum:
    kind = type(like)
    if isinstance(like, enum.Flag):
        return kind(int(text))
    if text not in kind.__members__:
        raise ValueError(f"{kind.__qualname__} has no member {text!r}")
    return kind[text]


def _decode_bytes(data: bytes, kind: str) -> Any:
    if kind == "str" or kind == "enum":
        return data.decode("utf-8", "surrogatepass")
    if kind == "int":
        return int(data, 16)
    if kind in KINDS:
        return KINDS[kind].read(data.decode())
    return data


def as_saved(data: Any, saved: LeafSpec) -> Any:
    """A value that was read without a target: a numpy array, or the Python value that it was."""
    kind = "numpy" if saved.is_placed else saved.kind
    return decode(data, saved, replace(saved, kind=kind))
