"""Dtypes and conversions between them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ckpt_jax as ckpt
from ckpt_jax.graph.dtypes import LossyConversionError, converted

INTEGERS = ["int8", "uint8", "int32", "uint32", "int64", "uint64", "int4", "uint2"]
FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float4_e2m1fn"]
NUMBERS = st.one_of(
    arrays.arrays(np.int64, 3), arrays.arrays(np.uint64, 3), arrays.arrays(np.float64, 3)
)


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


@given(NUMBERS, st.sampled_from(INTEGERS))
def test_a_conversion_to_integers_keeps_every_value_or_is_refused(data, name):
    range_ = ml_dtypes.iinfo(dtype(name))
    wanted = [x.item() for x in data]
    fits = all(np.isfinite(x) and x == int(x) and range_.min <= x <= range_.max for x in wanted)
    if fits:
        assert [int(x) for x in converted(data, dtype(name))] == wanted
    else:
        with pytest.raises(LossyConversionError, match=f"does not fit into {name}"):
            converted(data, dtype(name))


@given(NUMBERS, st.sampled_from(FLOATS))
def test_a_conversion_to_floats_makes_nothing_infinite_and_no_nan(data, name):
    try:
        found = converted(data, dtype(name)).astype(np.float64)
    except LossyConversionError:
        wide = data.astype(np.float64)
        largest = float(ml_dtypes.finfo(dtype(name)).max)
        assert any(abs(x) > largest or not np.isfinite(x) for x in wide)
    else:
        assert (np.isfinite(found) == np.isfinite(data)).all()
        assert (np.isnan(found) == np.isnan(data)).all()


@pytest.mark.parametrize("name", ["complex32", "bcomplex32", "complex64", "complex128"])
def test_a_complex_number_and_a_complex_array_of_any_size_stand_for_each_other(tmp_path, name):
    array = np.array(1.5 - 2j, dtype(name))
    path = ckpt.save(tmp_path / "a", {"x": array, "y": 1.5 - 2j})
    found = ckpt.restore(path, {"x": 0j, "y": np.zeros((), dtype(name))})
    assert found["x"] == 1.5 - 2j and type(found["x"]) is complex
    assert found["y"].dtype == array.dtype and complex(found["y"]) == 1.5 - 2j
    with pytest.raises(ckpt.RestoreMismatchError, match="expected a Python float"):
        ckpt.restore(path, {"x": 0.0, "y": 0j})


def test_anonymous_bytes_are_taken_for_the_dtype():
    array = np.array([[1.5], [-2]], ml_dtypes.float8_e4m3fn)
    assert converted(array.view("V1"), array.dtype).tolist() == array.tolist()
