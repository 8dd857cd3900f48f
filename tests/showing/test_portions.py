"""Portions, and the statistics that are merged from them, as laws."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ckpt_jax.graph.boxes import size_of, slices, tiling_problem
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.showing.differences import Amount, amount_of
from ckpt_jax.showing.portions import MAX_ELEMENTS, boxes_of, portions
from ckpt_jax.showing.statistics import Statistics, statistics_of

shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
floats = st.floats(width=64) | st.sampled_from([1e308, -1e308, 5e-324])


@given(shapes, st.integers(1, 40))
def test_boxes_tile_the_array_and_are_small(shape, limit):
    boxes = [*boxes_of(shape, limit)]
    assert tiling_problem(boxes, shape) is None
    assert all(size_of(box) <= limit for box in boxes)


@given(st.lists(st.integers(0, MAX_ELEMENTS), max_size=8))
def test_portions_are_bounded_and_leave_nothing_out(lengths):
    specs = [(str(at), LeafSpec("", "int8", (length,))) for at, length in enumerate(lengths)]
    found = [*portions(specs)]
    assert all(sum(size_of(box) for _, box in each) <= MAX_ELEMENTS for each in found)
    assert [name for each in found for name, _ in each] == [name for name, _ in specs]


@given(arrays(np.float64, shapes, elements=floats), st.integers(1, 20))
def test_merged_statistics_are_those_of_the_whole(array, limit):
    merged = Statistics()
    for box in boxes_of(array.shape, limit):
        merged = merged.merged(statistics_of(array[slices(box)]))
    finite = array[np.isfinite(array)]
    assert (merged.elements, merged.finite) == (array.size, finite.size)
    assert merged.nans == np.isnan(array).sum()
    if finite.size:
        assert (merged.least, merged.greatest) == (finite.min(), finite.max())
        exact = np.mean(finite.astype(np.longdouble))
        scale = float(np.abs(finite).max())
        assert abs(merged.mean - float(exact)) <= 1e-300 + 1e-9 * scale
        norm = np.sqrt(np.sum(np.square(finite.astype(np.longdouble))))
        if norm < 1e308:
            np.testing.assert_allclose(merged.norm, float(norm), rtol=1e-9, atol=1e-300)
    else:
        assert (merged.least, merged.mean, merged.norm) == (None, None, 0)


@given(arrays(np.float64, 6, elements=floats), arrays(np.float64, 6, elements=floats))
def test_amounts_of_parts_merge_to_the_amount_of_the_whole(a, b):
    whole = amount_of(a, b)
    parts = amount_of(a[:2], b[:2]).merged(amount_of(a[2:], b[2:]))
    assert repr(whole) == repr(parts)
    assert amount_of(a, a) == Amount(0, 6)
    assert (whole.differing == 0) == np.array_equal(a, b, equal_nan=True)
