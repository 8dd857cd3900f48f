"""Every kind of value, bit for bit: what it is on its way out, and what it is when it is back."""

import enum
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import define_prng_impl

import ckpt_jax as ckpt
from ckpt_jax.graph.labels import EnumKey, canonical
from ckpt_jax.values.leaves import as_saved, decode, describe, difference, encode

ML_DTYPES = sorted(
    (
        np.dtype(kind)
        for name in dir(ml_dtypes)
        if isinstance(kind := getattr(ml_dtypes, name), type) and issubclass(kind, np.generic)
    ),
    key=str,
)
NUMPY_DTYPES = [np.dtype(code) for code in "?bBhHiIlLefdFD"]
TIME_DTYPES = [np.dtype(name) for name in ("M8[s]", "M8[D]", "M8[25ns]", "m8[ms]", "M8", "m8")]
ALL_DTYPES = [*NUMPY_DTYPES, *TIME_DTYPES, *ML_DTYPES]


def every_pattern(dtype: np.dtype) -> np.ndarray:
    """All bit patterns of a small dtype, many of a large one: NaNs with payloads, -0, subnormals.

    Types of less than a byte have one pattern for each value, in the low bits or sign-extended.
    """
    if dtype == np.bool_:
        return np.array([False, True])
    if dtype.itemsize == 1:
        patterns = np.arange(256, dtype=np.uint8).view(dtype)
        # Only what the type itself writes: a pattern that it would not is no value of it.
        return patterns if bits_of(dtype) == 8 else patterns.astype(np.float32).astype(dtype)
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype)
    return np.frombuffer(np.random.default_rng(3).bytes(dtype.itemsize * 4096), dtype)


def bits_of(dtype: np.dtype) -> int:
    try:
        return ml_dtypes.iinfo(dtype).bits
    except ValueError:
        return ml_dtypes.finfo(dtype).bits


def in_jax(dtype: np.dtype) -> bool:
    if dtype.kind in "Mm" or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return False
    try:
        return jnp.asarray(every_pattern(dtype)).dtype == dtype
    except (TypeError, jax.errors.JaxRuntimeError):
        return False


JAX_DTYPES = [dtype for dtype in [*NUMPY_DTYPES, *ML_DTYPES] if in_jax(dtype)]


def assert_bits(found, expected):
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_the_dtypes_tested_include_the_difficult_ones():
    names = {str(dtype) for dtype in JAX_DTYPES}
    assert {"bfloat16", "int4", "uint4", "float8_e4m3fn", "float8_e5m2", "complex64"} <= names


def test_numpy_arrays_of_every_dtype_keep_every_bit(tmp_path):
    tree = {str(dtype): every_pattern(dtype) for dtype in ALL_DTYPES}
    path = ckpt.save(tmp_path / "a", tree)
    loaded = ckpt.load(path)
    restored = ckpt.restore(path, {name: np.zeros_like(x) for name, x in tree.items()})
    for name, array in tree.items():
        assert_bits(loaded[name], array)
        assert_bits(restored[name], array)


def test_jax_arrays_of_every_dtype_keep_every_bit(tmp_path):
    numpy = {str(dtype): every_pattern(dtype) for dtype in JAX_DTYPES}
    tree = {name: jnp.asarray(array) for name, array in numpy.items()}
    path = ckpt.save(tmp_path / "a", tree)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.items()}
    restored = ckpt.restore(path, abstract)
    loaded = ckpt.load(path)
    for name, array in tree.items():
        assert_bits(restored[name], array)
        assert_bits(loaded[name], np.asarray(array))


def test_64_bit_jax_arrays_keep_every_bit(tmp_path):
    with jax.enable_x64(True):
        tree = {
            name: jnp.asarray(every_pattern(np.dtype(name)))
            for name in ("float64", "int64", "uint64", "complex128")
        }
        assert {str(x.dtype) for x in tree.values()} == set(tree)
        path = ckpt.save(tmp_path / "a", tree)
        restored = ckpt.restore(path, jax.tree.map(jnp.zeros_like, tree))
        for name, array in tree.items():
            assert_bits(restored[name], array)


def test_a_64_bit_checkpoint_loads_with_every_bit_where_jax_has_32(tmp_path):
    array = every_pattern(np.dtype("float64"))
    with jax.enable_x64(True):
        path = ckpt.save(tmp_path / "a", jnp.asarray(array))
    assert_bits(ckpt.load(path), array)
    with pytest.raises(ckpt.RestoreMismatchError, match="float64"):
        ckpt.restore(path, jnp.zeros(array.shape, jnp.float32))


def test_numpy_scalars_of_every_dtype_stay_numpy_scalars(tmp_path):
    tree = {str(dtype): every_pattern(dtype)[-1] for dtype in ALL_DTYPES}
    path = ckpt.save(tmp_path / "a", tree)
    loaded = ckpt.load(path)
    restored = ckpt.restore(path, {name: every_pattern(x.dtype)[0] for name, x in tree.items()})
    for name, scalar in tree.items():
        assert_bits(loaded[name], scalar)
        assert_bits(restored[name], scalar)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (2, 3, 4, 5)])
def test_arrays_of_every_shape_come_back(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = ckpt.save(tmp_path / "a", {"numpy": array, "jax": jnp.asarray(array)})
    loaded = ckpt.load(path)
    restored = ckpt.restore(
        path, {"numpy": np.zeros_like(array), "jax": jax.ShapeDtypeStruct(shape, jnp.int16)}
    )
    assert_bits(loaded["numpy"], array)
    assert_bits(loaded["jax"], array)
    assert_bits(restored["numpy"], array)
    assert_bits(restored["jax"], jnp.asarray(array))


def test_arrays_of_any_memory_layout_come_back_with_their_values(tmp_path):
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    tree = {
        "fortran": np.asfortranarray(base),
        "transposed": base.T,
        "strided": base[::2, ::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "read_only": np.frombuffer(base.tobytes(), np.int32),
        "big_endian": base.astype(">i4"),
    }
    loaded = ckpt.load(ckpt.save(tmp_path / "a", tree))
    for name, array in tree.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == np.int32


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0)])
def test_typed_keys_come_back_with_their_implementation(tmp_path, impl, shape):
    def keys(seed):
        one = jax.random.key(seed, impl=impl)
        return jax.random.split(one, shape) if shape else one

    key = keys(7)
    path = ckpt.save(tmp_path / "a", {"key": key})
    for target in (keys(0), jax.ShapeDtypeStruct(shape, key.dtype)):
        restored = ckpt.restore(path, {"key": target})["key"]
        assert restored.dtype == key.dtype
        assert restored.shape == key.shape
        assert_bits(jax.random.key_data(restored), jax.random.key_data(key))
    assert_bits(ckpt.load(path)["key"], np.asarray(jax.random.key_data(key)))


def test_a_restored_key_draws_the_same_numbers(tmp_path):
    key = jax.random.key(11)
    path = ckpt.save(tmp_path / "a", key)
    restored = ckpt.restore(path, jax.random.key(0))
    assert_bits(jax.random.normal(restored, (5,)), jax.random.normal(key, (5,)))


def test_a_key_of_another_implementation_is_refused(tmp_path):
    path = ckpt.save(tmp_path / "a", {"key": jax.random.key(0, impl="rbg")})
    with pytest.raises(ckpt.RestoreMismatchError, match="key: .*unsafe_rbg.*rbg"):
        ckpt.restore(path, {"key": jax.random.key(0, impl="unsafe_rbg")})


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_typed_and_legacy_keys_restore_into_each_other(tmp_path, array, shape):
    key = jax.random.split(jax.random.key(7), shape) if shape else jax.random.key(7)
    legacy = array(jax.random.key_data(key))
    found = ckpt.restore(ckpt.save(tmp_path / "typed", key), array(np.zeros_like(legacy)))
    assert type(found) is type(array(0))
    np.testing.assert_array_equal(found, legacy)
    blank = jax.eval_shape(lambda: jax.random.wrap_key_data(jnp.asarray(legacy)))
    found = ckpt.restore(ckpt.save(tmp_path / "legacy", legacy), blank)
    assert (found == key).all()


def test_a_legacy_key_of_several_implementations_comes_with_advice_that_works(tmp_path):
    key = jax.random.key(7, impl="rbg")
    data = jax.random.key_data(key)
    typed, legacy = ckpt.save(tmp_path / "typed", key), ckpt.save(tmp_path / "legacy", data)
    with pytest.raises(ckpt.RestoreMismatchError, match=r"wrap_key_data\(array, impl='rbg'\)"):
        ckpt.restore(legacy, key)
    array = ckpt.restore(legacy, jnp.zeros_like(data))
    assert jax.random.wrap_key_data(array, impl="rbg") == key
    with pytest.raises(ckpt.RestoreMismatchError, match=r"jax.random.key\(0, impl='rbg'\)"):
        ckpt.restore(typed, data)
    found = ckpt.restore(typed, jax.random.key(0, impl="rbg"))
    np.testing.assert_array_equal(jax.random.key_data(found), data)


def test_a_key_is_no_array_of_another_shape_or_dtype(tmp_path):
    typed = ckpt.save(tmp_path / "typed", jax.random.key(0))
    raw = ckpt.save(tmp_path / "raw", jnp.zeros(2, jnp.int32))
    for path, target in [(typed, jnp.zeros(2)), (typed, jnp.zeros(4, jnp.uint32))]:
        with pytest.raises(ckpt.RestoreMismatchError):
            ckpt.restore(path, target)
    with pytest.raises(ckpt.RestoreMismatchError):
        ckpt.restore(raw, jax.random.key(0))


def test_a_string_of_numpy_is_a_string(tmp_path):
    path = ckpt.save(tmp_path / "a", {"s": np.str_("ü"), "b": np.bytes_(b"x")})
    assert ckpt.load(path) == {"s": "ü", "b": b"x"}
    assert ckpt.restore(path, {"s": np.str_(), "b": b""}) == {"s": "ü", "b": b"x"}


class Color(enum.Enum):
    RED = 1
    GRÜN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mode(enum.StrEnum):
    TRAIN = "train"
    EVAL = "eval"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2


SCALARS = [
    *(0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64, 10**400, -(10**400)),
    *(True, False, 0.0, -0.0, 0.1, 5e-324, float("inf"), float("-inf"), float("nan")),
    *(1j, complex(-0.0, float("inf")), complex(0.1, 5e-324)),
    *("", "text", "ünïcödé 🎉", "nul\0byte", "line\nbreak", "\ud800 lone surrogate"),
    *(b"", b"\0\xff\x80", b"x" * 100_000),
    *(Color.RED, Color.GRÜN, Level.HIGH, Mode.EVAL),
]


def same_scalar(one, other) -> bool:
    if isinstance(one, float | complex) and not isinstance(one, enum.Enum):
        return np.array(one).tobytes() == np.array(other).tobytes()
    return one == other


def another(value):
    """A value of the same kind that is not the same."""
    match value:
        case enum.Enum():
            return next(member for member in type(value) if member is not value)
        case bool():
            return not value
        case int() | float() | complex():
            return type(value)(17)
        case str():
            return "another"
        case bytes():
            return b"another"


def test_python_values_come_back_as_they_were(tmp_path):
    path = ckpt.save(tmp_path / "a", SCALARS)
    restored = ckpt.restore(path, [another(value) for value in SCALARS])
    for found, expected in zip(restored, SCALARS, strict=True):
        assert type(found) is type(expected)
        assert same_scalar(found, expected)


MEMBERS = [*Color, *Level, *Mode, Access.READ, Access.READ | Access.WRITE, Access(0), Bits(3)]


def test_python_values_load_without_a_target(tmp_path):
    loaded = ckpt.load(ckpt.save(tmp_path / "a", SCALARS + MEMBERS))
    for found, expected in zip(loaded, SCALARS + MEMBERS, strict=True):
        assert type(found) is type(expected)
        assert same_scalar(found, expected)


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_dict_keys_that_are_members_of_enums_load_as_such(tmp_path, member):
    tree = {"d": {member: {(member, 1): 2}}}
    found = ckpt.load(ckpt.save(tmp_path / "a", tree))
    ((key, inner),) = found["d"].items()
    ((pair, _),) = inner.items()
    assert key is member and pair[0] is member and found == tree
    ckpt.restore(ckpt.save(tmp_path / "b", found), tree)  # what was loaded fits
    numbers = {"d": {canonical(member): {(canonical(member), 1): 0}}}
    if not isinstance(canonical(member), EnumKey):  # Python takes it for its number or string
        assert ckpt.restore(tmp_path / "a", numbers) == numbers | {"d": tree["d"]}


def test_members_of_enums_that_are_not_imported_load_as_their_names_and_numbers(tmp_path):
    program = """
import enum, sys, ckpt_jax as ckpt

class Color(enum.Enum):
    RED = 1

class Level(enum.IntEnum):
    LOW = 3

ckpt.save(sys.argv[1], {"v": [Color.RED, Level.LOW], "d": {Level.LOW: 1, Color.RED: 2}})
"""
    path = str(tmp_path / "a")
    subprocess.run([sys.executable, "-c", program, path], check=True)
    assert ckpt.load(path) == {"v": ["RED", "LOW"], "d": {3: 1, "RED": 2}}
    assert type(next(iter(ckpt.load(path)["d"]))) is int


@given(
    st.one_of(
        st.integers(),
        st.booleans(),
        st.floats(allow_nan=True),
        st.complex_numbers(),
        st.text(),
        st.binary(),
    )
)
def test_what_is_encoded_decodes_to_the_same_value(value):
    spec, sharding = describe(value)
    stored = encode(value)
    found = as_saved(stored, spec)
    assert sharding is None
    assert type(found) is type(value)
    assert same_scalar(found, value) or value != value


@given(st.integers())
def test_any_python_int_takes_the_place_of_any_other(value):
    spec, _ = describe(value)
    for present in (0, 10**30):
        target, _ = describe(present)
        assert difference(spec, target, cast=False) is None
        assert decode(encode(value), spec, target, present) == value


def spec_of(value):
    return describe(value)[0]


def convert(saved, target, *, cast=False):
    """What a saved value becomes in the place of a target, or why it cannot."""
    problem = difference(spec_of(saved), spec_of(target), cast)
    if problem:
        return problem
    return decode(np.asarray(encode(saved)), spec_of(saved), spec_of(target), target)


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (np.int64(7), 0),
        (np.int8(7), 0),
        (np.array(7, np.uint16), 0),
        (np.array(0.5, np.float32), 0.0),
        (np.array(0.5, ml_dtypes.bfloat16), 0.0),
        (np.array(1 + 2j, np.complex64), 0j),
        (np.array(True), False),
    ],
)
def test_a_rank_0_array_becomes_a_python_number_of_its_family(saved, target):
    found = convert(saved, target)
    assert type(found) is type(target)
    assert found == saved.item()


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (7, np.int32(0)),
        (7, np.zeros((), np.uint8)),
        (0.5, np.float32(0)),
        (1 + 2j, np.zeros((), np.complex64)),
        (True, np.zeros((), np.bool_)),
    ],
)
def test_a_python_number_becomes_a_rank_0_array_of_its_family(saved, target):
    found = convert(saved, target)
    assert found.dtype == target.dtype
    assert found.shape == ()
    assert found.item() == saved


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (7, 0.5),
        (0.5, 7),
        (True, 7),
        (7, True),
        (0.5, 1j),
        ("7", 7),
        (7, "7"),
        (b"7", "7"),
        ("RED", Color.RED),
        (Color.RED, "RED"),
        (7, np.float32(0)),
        (True, np.int32(0)),
        (np.float32(7), 7),
        (2**70, np.int64(0)),
        ("text", np.zeros(4, np.uint8)),
        (np.zeros(4, np.uint8), b"text"),
        (7, np.zeros((1,), np.int64)),
        (np.zeros((1,), np.int64), 7),
        (np.zeros(3, np.float32), np.zeros(3, np.float64)),
        (np.zeros(3, np.float64), np.zeros(3, np.float32)),
        (np.zeros(3, np.int32), np.zeros(3, np.uint32)),
        (np.zeros(3, np.float16), np.zeros(3, ml_dtypes.bfloat16)),
        (np.zeros((2, 3), np.int8), np.zeros((3, 2), np.int8)),
        (np.zeros((2, 3), np.int8), np.zeros(6, np.int8)),
        (np.zeros((), np.int8), np.zeros(1, np.int8)),
    ],
)
def test_values_that_differ_in_kind_dtype_or_shape_do_not_fit(saved, target):
    problem = difference(spec_of(saved), spec_of(target), False)
    assert problem is not None
    assert problem.startswith("expected ")


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (np.zeros(3, np.float32), np.zeros(4, np.float32)),
        ("text", np.zeros(4, np.uint8)),
        (b"text", "text"),
        (np.zeros(4, np.uint8), 4),
        (jax.random.key(0), np.zeros(3, np.uint32)),
    ],
)
def test_a_cast_changes_no_shape_and_no_kind(saved, target):
    assert difference(spec_of(saved), spec_of(target), True) is not None


def test_a_cast_rounds_floats_as_numpy_does():
    saved = np.array([1.75, -2.5, 3e38, np.nan], np.float32)
    found = convert(saved, np.zeros(4, ml_dtypes.bfloat16), cast=True)
    assert_bits(found, saved.astype(ml_dtypes.bfloat16))
    assert convert(np.float32(2), 0, cast=True) == 2


def test_a_difference_says_what_was_expected_and_what_was_found():
    one, other = np.zeros((2, 3), np.int8), np.zeros((3, 2), np.int8)
    assert difference(spec_of(one), spec_of(other), False) == "expected shape (3, 2), got (2, 3)"
    text = difference(spec_of(one), spec_of(one.astype(np.float32)), False)
    assert text is not None
    assert text.startswith("expected dtype float32, got int8")
    assert "cast=True" in text


@pytest.mark.parametrize("value", [300, -1, 2**40])
def test_a_python_int_that_does_not_fit_the_targets_dtype_raises(tmp_path, value):
    path = ckpt.save(tmp_path / "a", {"step": value})
    target = {"step": np.zeros((), np.uint8)}
    with pytest.raises(ckpt.RestoreMismatchError, match="does not fit into uint8"):
        ckpt.restore(path, target)
    assert target["step"] == 0


def test_a_cast_between_arrays_is_asked_for_by_name(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.arange(4, dtype=jnp.int32)})
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    with pytest.raises(ckpt.RestoreMismatchError, match="w: expected dtype bfloat16, got int32"):
        ckpt.restore(path, target)
    found = ckpt.restore(path, target, options=ckpt.CheckpointOptions(cast=True))["w"]
    assert_bits(found, jnp.arange(4, dtype=jnp.bfloat16))


class Steps(int):
    """A number of a class of its own."""


@pytest.mark.parametrize("number", [7, 2**70])
def test_a_number_of_another_class_is_saved_as_fast_as_any(tmp_path, number):
    path = ckpt.save(tmp_path / "a", {"steps": Steps(number)})  # a search would not come to an end
    assert ckpt.load(path) == {"steps": number}
    assert ckpt.restore(path, {"steps": Steps(0)}) == {"steps": number}


@pytest.mark.parametrize("target", [np.zeros(1, np.float16), jnp.zeros(1, jnp.float16)])
def test_a_cast_keeps_infinities_and_does_not_warn(tmp_path, target):
    path = ckpt.save(tmp_path / "a", np.array([np.inf], np.float32))
    found = ckpt.restore(path, target, options=ckpt.CheckpointOptions(cast=True))
    assert np.asarray(found).tolist() == [np.inf]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        (np.array([2**40]), np.int32),
        (np.array([-1]), np.uint8),
        (np.array([1.5], np.float32), np.int32),
        (np.array([np.nan], np.float32), np.int32),
        (np.array([1e6], np.float32), np.float16),
        (np.array([1e6], np.float32), ml_dtypes.float8_e4m3fn),
        (np.array([2**31]), ml_dtypes.int4),
        (np.array([1j], np.complex64), np.float32),
    ],
)
def test_a_cast_that_would_change_a_value_is_an_error(tmp_path, array, saved, dtype):
    path = ckpt.save(tmp_path / "a", {"x": saved, "y": np.ones(1)})
    target = {"x": array(np.zeros(saved.shape, dtype)), "y": np.zeros(1)}
    with pytest.raises(ckpt.RestoreMismatchError, match="x: .* does not fit into"):
        ckpt.restore(path, target, options=ckpt.CheckpointOptions(cast=True))
    with pytest.raises(ckpt.RestoreMismatchError, match="does not fit into"):
        ckpt.restore(path, target, rename=[("x", "x", ckpt.Cast())])
    assert target["y"] == 0


@pytest.mark.parametrize(("saved", "target"), [(2.5, 0), (3, False), (1j, 0.0)])
def test_a_cast_of_a_python_number_loses_nothing(tmp_path, saved, target):
    path = ckpt.save(tmp_path / "a", saved)
    with pytest.raises(ckpt.RestoreMismatchError, match="does not fit into a Python"):
        ckpt.restore(path, target, options=ckpt.CheckpointOptions(cast=True))


def test_large_integers_are_not_cast_through_floats(tmp_path):
    array = np.array([2**24 + 1, 2**31 - 1, -(2**31)], np.int32)
    path = ckpt.save(tmp_path / "a", array)
    cast = ckpt.CheckpointOptions(cast=True)
    assert ckpt.restore(path, np.zeros(3, np.int64), options=cast).tolist() == array.tolist()
    assert ckpt.load(path).tolist() == array.tolist()


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("x", "f4")]),
        np.zeros(2, jax.dtypes.float0),
        np.longdouble(1),
        object(),
        {1, 2},
        lambda: None,
        (1).__add__,
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "dtype", "")),
)
def test_what_has_no_bytes_is_named_with_its_path(tmp_path, value):
    tree = {"good": np.ones(3), "layers": [0, {"bad/one": value}]}
    with pytest.raises(ckpt.UnsaveableError, match=re.escape("layers/1/bad.Sone")) as raised:
        ckpt.save(tmp_path / "a", tree)
    assert [path for path, _ in raised.value.problems] == ["layers/1/bad.Sone"]
    assert isinstance(raised.value, TypeError)
    assert list(tmp_path.iterdir()) == []


class Cursor(ckpt.PythonState):
    def __init__(self, text):
        self.text = text

    def serialize(self):
        return self.text

    def deserialize(self, value):
        self.text = value


def test_python_state_is_stored_as_bytes(tmp_path):
    path = ckpt.save(tmp_path / "a", {"cursor": Cursor("zeile 7 ü")})
    assert ckpt.load(path) == {"cursor": "zeile 7 ü".encode()}
    target = {"cursor": Cursor("")}
    assert ckpt.restore(path, target)["cursor"] is target["cursor"]
    assert target["cursor"].text == "zeile 7 ü".encode()


def test_a_serialize_that_fails_is_named_with_its_path(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match=r"cursor: .*must return str or bytes"):
        ckpt.save(tmp_path / "a", {"cursor": Cursor(17)})
    assert list(tmp_path.iterdir()) == []


# --- values that are seldom seen ----------------------------------------------------------


def test_an_int_of_thousands_of_digits_comes_back(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": 10**5000})
    assert ckpt.load(path)["n"] == 10**5000


class Permission(enum.Flag):
    R = 1
    W = 2


def test_a_combination_of_flags_comes_back_and_so_does_none(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": Permission.R | Permission.W, "z": Permission(0)})
    assert ckpt.restore(path, {"n": Permission.R, "z": Permission.R}) == {
        "n": Permission.R | Permission.W,
        "z": Permission(0),
    }


def test_a_combination_of_flags_restores_into_one_of_them(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": Permission.R | Permission.W})
    assert ckpt.restore(path, {"n": Permission.R}) == {"n": Permission.R | Permission.W}


class Known(enum.Enum):
    A = 1


class Other(enum.Enum):
    B = 1


def test_a_member_that_an_enum_lacks_is_refused(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": Known.A})
    with pytest.raises(ckpt.CheckpointError, match="n"):
        ckpt.restore(path, {"n": Other.B})


@pytest.mark.parametrize("value", [np.datetime64(5, "s"), np.timedelta64(5, "ms")])
@pytest.mark.parametrize("target", [0, 0.0])
def test_a_time_does_not_become_a_python_number(tmp_path, value, target):
    path = ckpt.save(tmp_path / "a", {"n": value})
    with pytest.raises(ckpt.RestoreMismatchError, match="n"):
        ckpt.restore(path, {"n": target})


def test_a_masked_array_is_refused_or_keeps_its_mask(tmp_path):
    m = np.ma.masked_array([1, 2, 3], [0, 1, 0])
    try:
        path = ckpt.save(tmp_path / "a", {"n": m})
    except ckpt.UnsaveableError:
        return
    assert ckpt.load(path)["n"].tolist() == m.tolist()


def test_a_deleted_array_is_named(tmp_path):
    x = jnp.arange(3)
    x.delete()
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        ckpt.save(tmp_path / "a", {"bad": x})
    assert list(tmp_path.iterdir()) == []


def test_a_tracer_is_named(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        jax.jit(lambda x: ckpt.save(tmp_path / "a", {"bad": x}))(jnp.arange(3))
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_a_users_own_implementation_is_named(tmp_path):
    implementation = define_prng_impl(
        key_shape=(1,),
        seed=lambda seed: jnp.asarray(seed, jnp.uint32).reshape(1),
        split=lambda key, shape: jnp.broadcast_to(key, (*shape, 1)),
        random_bits=lambda key, width, shape: jnp.zeros(shape, jnp.uint32),
        fold_in=lambda key, data: key,
        name="users_own",
    )
    with pytest.raises(ckpt.UnsaveableError, match="bad: PRNG keys of .* that JAX does not name"):
        ckpt.save(tmp_path / "a", {"bad": jax.random.key(3, impl=implementation)})
    assert list(tmp_path.iterdir()) == []


def test_an_abstract_array_is_named(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        ckpt.save(tmp_path / "a", {"bad": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_float_above_what_float32_holds_is_refused(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1e300})
    with pytest.raises((OverflowError, ckpt.CheckpointError)):
        ckpt.restore(path, {"x": jnp.float32(0)})


def test_a_numpy_array_of_64_bits_fills_an_abstract_array_of_64_bits(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.arange(3.0)})
    f = ckpt.restore(path, {"x": jax.ShapeDtypeStruct((3,), np.float64)})["x"]
    assert f.dtype == np.float64


def test_a_jax_array_of_64_bits_comes_back_where_jax_has_32(tmp_path):
    with jax.enable_x64(True):
        p = ckpt.save(tmp_path / "a", {"x": jnp.arange(3)})
        t = jax.ShapeDtypeStruct((3,), np.int64)
    f = ckpt.restore(p, {"x": t})["x"]
    assert f.dtype == np.int64


def test_loaded_arrays_can_be_written_to(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.zeros(()), "b": np.zeros(500000)})
    f = ckpt.load(path)
    f["x"] += 1
    f["b"] += 1
    assert f["x"] == 1


def test_another_implementation_of_keys_is_named(tmp_path):
    path = ckpt.save(tmp_path / "a", {"rng": jax.random.key(0)})
    with pytest.raises(ckpt.RestoreMismatchError, match=r"rng: expected key<rbg>.*threefry"):
        ckpt.restore(path, {"rng": jax.random.key(0, impl="rbg")})
