"""Transforms: what they make of specs, boxes and arrays agrees with numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_jax import Cast, Stack, Transpose, Unstack
from ckpt_jax.graph.boxes import slices, whole
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.transforms import derive


def spec(*shape, dtype="float32", kind="array"):
    return LeafSpec(kind, dtype, shape)


@st.composite
def recipes(draw):
    """Stored arrays, the steps of a rule for them, and what numpy makes of them."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = draw(st.integers(1, 4))
    arrays = [
        np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 100 * i for i in range(count)
    ]
    steps, values = [], arrays
    for kind in draw(st.lists(st.sampled_from(["transpose", "cast", "many"]), max_size=4)):
        rank = values[0].ndim
        if kind == "transpose" and rank:
            axes = tuple(draw(st.permutations(range(rank))))
            steps.append(Transpose(axes))
            values = [value.transpose(axes) for value in values]
        elif kind == "cast":
            steps.append(Cast("int32"))
            values = [value.astype(np.int32) for value in values]
        elif kind == "many" and len(values) > 1:
            axis = draw(st.integers(-rank - 1, rank))
            steps.append(Stack(axis))
            values = [np.stack(values, axis)]
        elif kind == "many" and rank:
            axis = draw(st.integers(-rank, rank - 1))
            at = draw(st.integers(0, values[0].shape[axis] - 1))
            now = derive("k", [spec(*shape)], steps).spec if count == 1 else None
            if now is not None:
                steps.append(Unstack(axis).take(at, now))
                values = [np.take(value, at, axis) for value in values]
    if len(values) > 1:
        steps.append(Stack(0))
        values = [np.stack(values)]
    return arrays, steps, values[0]


@settings(max_examples=200)
@given(recipes(), st.data())
def test_any_box_of_a_derived_value_is_made_of_just_the_boxes_that_it_needs(recipe, data):
    arrays, steps, expected = recipe
    keys = [str(i) for i in range(len(arrays))]
    derived = derive(keys, [spec(*array.shape) for array in arrays], steps)
    assert (derived.spec.shape, derived.spec.dtype) == (expected.shape, expected.dtype.name)
    box = tuple(
        tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in expected.shape
    )
    for wanted in (whole(expected.shape), box):
        if any(a == b for a, b in wanted):
            continue
        used, inner = derived.needs(wanted)
        parts = [arrays[keys.index(key)][slices(inner)] for key in used]
        made = derived.make(parts)
        np.testing.assert_array_equal(made, expected[slices(wanted)], strict=True)
        if not any(isinstance(step, Cast) for step in steps):
            assert sum(part.size for part in parts) == made.size  # and nothing else is read


@pytest.mark.parametrize(
    ("steps", "specs", "why"),
    [
        ([Transpose((0, 0))], [spec(2, 3)], "does not permute"),
        ([Transpose((1, 0))], [spec(2, 3, 4)], "does not permute"),
        ([Stack(3)], [spec(2), spec(2)], "no axis 3"),
        ([Stack()], [spec(2), spec(3)], r"float32\[2\] and float32\[3\]"),
        ([Stack()], [spec(2), spec(2, dtype="int32")], r"float32\[2\] and int32\[2\]"),
        ([Stack()], [LeafSpec("str", "bytes")] * 2, "needs arrays, and found str"),
        ([Transpose()], [LeafSpec("int", "int64")], "needs arrays, and found int"),
        ([Cast("int32")], [LeafSpec("bytes", "bytes")], "needs numbers"),
    ],
)
def test_a_transform_that_does_not_fit_says_why(steps, specs, why):
    with pytest.raises(ValueError, match=why):
        derive([str(i) for i in range(len(specs))], specs, steps)


def test_values_of_several_dtypes_stack_after_a_cast():
    derived = derive("ab", [spec(2), spec(2, dtype="int8")], [Cast("float16"), Stack()])
    assert derived.spec == LeafSpec("array", "float16", (2, 2))


def test_the_data_of_prng_keys_keeps_its_last_axis():
    key = LeafSpec("prng_key", "uint32", (3, 2), prng_impl="threefry2x32")
    assert derive("ab", [key, key], [Stack(-1)]).spec.shape == (3, 2, 2)
    assert derive("ab", [key, key], [Stack(), Transpose()]).spec.shape == (3, 2, 2)
    assert Unstack(-1).take(1, key).specs([key])[0].shape == (2,)
    with pytest.raises(ValueError, match="needs numbers"):
        derive("a", [key], [Cast("uint32")])


def test_a_dtype_that_does_not_exist_is_refused_at_once():
    with pytest.raises(TypeError):
        Cast("float99")
