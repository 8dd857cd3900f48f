"""Transforms: what they make of specs, boxes and arrays agrees with numpy."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_jax import (
    Cast,
    Concat,
    Dequantize,
    Map,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from ckpt_jax.graph.boxes import slices, whole
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import Derived, Source, evaluate, made, needs
from ckpt_jax.restoring.transforms import Parting


def spec(*shape, dtype="float32", kind="array"):
    return LeafSpec(kind, dtype, shape)


def sources(specs):
    return [Source(str(i), each) for i, each in enumerate(specs)]


def applied(steps, values):
    """The formula that steps make of values; the first step that joins takes all of them."""
    for step in steps:
        joins = isinstance(step, Stack | Concat | Dequantize)
        values = [made(step, *values)] if joins else [made(step, each) for each in values]
    (value,) = values
    return value


def compute(formula, arrays, box=None):
    box = whole(formula.spec.shape) if box is None else box
    return evaluate(formula, box, lambda key, inner: arrays[int(key)][slices(inner)])


def numbered(shape, start=0):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + start


def divided(draw, total):
    """A shape of `total` elements."""
    shape = []
    while total > 1:
        n = draw(st.sampled_from([i for i in range(2, total + 1) if total % i == 0]))
        shape.append(n)
        total //= n
    for _ in range(draw(st.integers(0, 1))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def recipes(draw):
    """Stored arrays, a formula for them, what numpy makes of them, and whether nothing is lost."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = draw(st.integers(1, 4))
    arrays = [numbered(shape, 100 * i) for i in range(count)]
    formulas, values = sources([spec(*shape)] * count), arrays
    exact = True

    def each(step, function):
        nonlocal formulas, values
        formulas, values = [made(step, f) for f in formulas], [function(v) for v in values]

    kinds = ["transpose", "cast", "join", "part", "reshape", "pad", "slice", "map"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=6)):
        shape = values[0].shape
        rank = len(shape)
        if rank and kind in ("join", "part", "slice", "pad"):
            axis = draw(st.integers(-rank, rank - 1))
        if kind == "transpose" and rank:
            axes = tuple(draw(st.permutations(range(rank))))
            each(Transpose(axes), lambda v, axes=axes: v.transpose(axes))
        elif kind == "cast":
            exact = False  # the dtype is another one
            each(Cast("int32"), lambda v: v.astype(np.int32))
        elif kind == "reshape" and values[0].size:
            new = divided(draw, values[0].size)
            each(Reshape(new), lambda v, new=new: v.reshape(new))
            exact = False  # it may need more than its box
        elif kind == "pad" and rank:
            widths = tuple(draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in shape)
            each(Pad(widths, 7), lambda v, w=widths: np.pad(v, w, constant_values=7))
            exact = False
        elif kind == "slice" and rank:
            box = [
                tuple(sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape
            ]
            box = [(a, b) if a < b else (0, n) for (a, b), n in zip(box, shape, strict=True)]
            each(Slice(box), lambda v, box=box: v[slices(box)])
        elif kind == "map":
            elementwise = draw(st.booleans())
            each(Map(lambda v: v * 2, elementwise=elementwise), lambda v: v * 2)
            exact = exact and elementwise
        elif kind == "join" and len(values) > 1:
            if draw(st.booleans()) or not rank:
                axis = draw(st.integers(-rank - 1, rank))
                formulas, values = [made(Stack(axis), *formulas)], [np.stack(values, axis)]
            else:
                formulas = [made(Concat(axis), *formulas)]
                values = [np.concatenate(values, axis)]
        elif kind == "part" and len(values) == 1 and rank:
            n = shape[axis]
            at = draw(st.integers(0, n - 1))
            if draw(st.booleans()):
                step, value = Unstack(axis), np.take(values[0], at, axis)
                pieces = step.pieces(formulas[0].spec, None)
            else:
                sizes = (at, 1, n - at - 1)
                step, value = Split(axis, sizes), np.split(values[0], (at, at + 1), axis)[1]
                pieces, at = step.pieces(formulas[0].spec, None), 1
            formulas, values = [made(pieces[at], formulas[0])], [value]
    if len(values) > 1:
        formulas, values = [made(Stack(0), *formulas)], [np.stack(values)]
    return arrays, formulas[0], values[0], exact


@settings(max_examples=300)
@given(recipes(), st.data())
def test_any_box_of_a_derived_value_is_made_of_just_the_boxes_that_it_needs(recipe, data):
    arrays, formula, expected, exact = recipe
    assert (formula.spec.shape, formula.spec.dtype) == (expected.shape, expected.dtype.name)
    box = tuple(
        tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in expected.shape
    )
    for wanted in (whole(expected.shape), box):
        if any(a == b for a, b in wanted):
            continue
        asked = []

        def part(key, inner, asked=asked):
            asked.append((key, inner))
            return arrays[int(key)][slices(inner)]

        result = evaluate(formula, wanted, part)
        np.testing.assert_array_equal(result, expected[slices(wanted)], strict=True)
        assert {*asked} == {*needs(formula, wanted)}
        if exact:
            read = sum(arrays[int(key)][slices(inner)].size for key, inner in asked)
            assert read == result.size  # and nothing else is read


@settings(max_examples=100)
@given(st.data())
def test_a_step_followed_by_its_inverse_changes_nothing(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    array = numbered(shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = (1, shape[axis] - 1)
    widths = tuple(data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in shape)
    step = data.draw(
        st.sampled_from(
            [
                Transpose(),
                Transpose(tuple(data.draw(st.permutations(range(len(shape)))))),
                Reshape((-1,), saved=shape),
                Pad(widths),
                Unstack(axis),
                Split(axis, sizes),
                Map(lambda x: x + 1, inverse=lambda x: x - 1),
            ]
        )
    )
    (source,) = sources([spec(*shape)])
    if isinstance(step, Parting):
        back = made(
            step.inverse(), *[made(each, source) for each in step.pieces(source.spec, None)]
        )
    else:
        back = made(step.inverse(), made(step, source))
    np.testing.assert_array_equal(compute(back, [array]), array, strict=True)
    if not isinstance(step, Pad):  # what it adds is lost on the way back
        assert step.inverse().inverse() == step


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Concat(0), r"how long the values are"),
        (Reshape((2, 3)), r"Reshape\(shape, saved=...\)"),
        (Slice([(0, 2)]), "is lost"),
        (Map(abs), "inverse=..."),
        (Dequantize(), "loses bits"),
        (Transpose((-1, 0)), "count the axes from the front"),
        (Pad(2), "widths of each axis"),
    ],
)
def test_a_step_without_an_inverse_says_what_it_lacks(step, why):
    with pytest.raises(ValueError, match=why):
        step.inverse()


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
        ([Concat(1)], [spec(2, 3), spec(3, 3)], r"differ along axis 1 alone"),
        ([Concat(0, (1, 4))], [spec(2), spec(3)], r"have lengths \(2, 3\)"),
        ([Concat(2)], [spec(2), spec(3)], "no axis 2"),
        ([Reshape((4, 2))], [spec(2, 3)], "as many elements"),
        ([Reshape((-1, 4))], [spec(2, 3)], "as many elements"),
        ([Reshape((6,), saved=(3, 2))], [spec(2, 3)], "does not have the shape"),
        ([Pad(((0, 1),) * 3)], [spec(2, 3)], "widths for 3 axes"),
        ([Pad(1, 0.5)], [spec(2, dtype="int8")], "does not fit into int8"),
        ([Slice([(0, 4)])], [spec(3)], r"\(0, 4\) does not lie in axis 0"),
        ([Slice([(2, 1)])], [spec(3)], "does not lie in axis 0"),
        ([Slice([(0, 1)] * 2)], [spec(3)], "has 2 axes"),
        ([Map(lambda x: x @ x)], [spec(2, 3)], "cannot be applied to float32"),
        ([Map(lambda x: x[0], elementwise=True)], [spec(2, 3)], "is elementwise"),
        ([Cast(), Map(abs)], [spec(2)], "give Cast a dtype"),
        ([Dequantize()], [spec(4, dtype="int8")], "needs values and scales"),
        ([Dequantize()], [spec(4, 4), spec(3)], "does not fit"),
        ([Dequantize()], [spec(4, 4), spec(3, 4)], "does not fit"),
    ],
)
def test_a_transform_that_does_not_fit_says_why(steps, specs, why):
    with pytest.raises(ValueError, match=why):
        applied(steps, sources(specs))


@pytest.mark.parametrize(
    ("step", "shape", "count", "why"),
    [
        (Split(0), (3,), 2, "equal parts"),
        (Split(0), (3,), None, "how many parts"),
        (Split(0, (1, 1)), (3,), 2, "add up to 2"),
        (Split(0, (1, 2)), (3,), 3, "2 sizes for 3 patterns"),
        (Split(1), (3,), 2, "no axis 1"),
        (Unstack(0), (3,), 2, "does not have 2 positions"),
    ],
)
def test_a_value_that_cannot_be_taken_apart_is_refused(step, shape, count, why):
    with pytest.raises(ValueError, match=why):
        step.pieces(spec(*shape), count)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Pad(((0, -1),)), ValueError),
        (lambda: Pad("ab"), ValueError),
        (lambda: Slice([(0, 4, 2)]), ValueError),
        (lambda: Slice([slice(0, 4, 2)]), ValueError),
        (lambda: Split(0, (1, -1)), ValueError),
        (lambda: Reshape((-1, -1)), ValueError),
        (lambda: Reshape((2.5,)), ValueError),
        (lambda: Map(3), TypeError),
        (lambda: Cast("float99"), TypeError),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_once(make, error):
    with pytest.raises(error):
        make()


def test_values_of_several_dtypes_stack_after_a_cast():
    derived = applied([Cast("float16"), Stack()], sources([spec(2), spec(2, dtype="int8")]))
    assert derived.spec == LeafSpec("array", "float16", (2, 2))


def test_the_data_of_prng_keys_keeps_its_last_axis():
    key = LeafSpec("prng_key", "uint32", (3, 2), prng_impl="threefry2x32")
    assert applied([Stack(-1)], sources([key, key])).spec.shape == (3, 2, 2)
    assert applied([Stack(), Transpose()], sources([key, key])).spec.shape == (3, 2, 2)
    assert applied([Reshape((1, -1))], sources([key])).spec.shape == (1, 3, 2)
    assert applied([Slice([(1, 3)])], sources([key])).spec.shape == (2, 2)
    assert applied([Concat(-1)], sources([key, key])).spec.shape == (6, 2)
    assert Unstack(-1).pieces(key, None)[1].spec([key]).shape == (2,)
    for step in (Cast("uint32"), Pad(1), Map(abs)):
        with pytest.raises(ValueError, match=re.escape(str(step))):
            applied([step], sources([key]))


def test_a_slice_counts_as_python_does():
    (source,) = sources([spec(5, 4)])
    array = numbered((5, 4))
    for box in ([(1, -1)], [None, (-2, None)], [slice(1, 3), (None, 2)]):
        index = tuple(
            slice(*each) if isinstance(each, tuple) else each or slice(None) for each in box
        )
        np.testing.assert_array_equal(compute(made(Slice(box), source), [array]), array[index])


# --- functions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[::-1],
        lambda x: np.fft.fft(x, axis=0).real,  # refuses the abstract arrays of JAX
        lambda x: np.linalg.inv(np.asarray(x)),
        lambda x: jnp.exp(x),
        lambda x: x.sum(),
        lambda x: x.astype(np.float16),
    ],
)
def test_a_function_of_numpy_or_of_jax_is_applied_to_whole_values(fn):
    array = np.random.default_rng(1).random((4, 4))
    formula = made(Map(fn), Source("0", spec(4, 4, dtype="float64")))
    expected = np.asarray(fn(array))
    assert formula.spec.shape == expected.shape
    result = compute(formula, [array])
    assert result.dtype == formula.spec.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_function_runs_once_for_all_parts_of_its_result():
    calls = []

    def fn(x):
        calls.append(type(x))
        return x * 2

    (source,) = sources([spec(6)])
    doubled = made(Map(fn), source)
    pieces = [made(each, doubled) for each in Split(0).pieces(doubled.spec, 3)]
    calls.clear()
    known, array = {}, numbered((6,))
    parts = [
        evaluate(each, ((0, 2),), lambda key, box: array[slices(box)].copy(), known)
        for each in pieces
    ]
    assert calls == [np.ndarray]
    np.testing.assert_array_equal(np.concatenate(parts), array * 2)
    parts[0][:] = 0  # no two parts share memory
    np.testing.assert_array_equal(parts[1], array[2:4] * 2)


def test_a_function_that_changes_its_mind_is_found():
    shapes = iter([(2,), (3,)])
    step = Map(lambda x: np.zeros(next(shapes)))
    formula = made(step, Source("0", spec(4)))
    with pytest.raises(ValueError, match=r"made shape \(3,\), and \(2,\) was planned"):
        compute(formula, [numbered((4,))])


# --- quantized values ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "step"),
    [
        ((), Dequantize()),
        ((4,), Dequantize()),
        ((6,), Dequantize(axis=-1)),
        ((4, 1), Dequantize()),
        ((2, 3), Dequantize()),
        ((2, 2), Dequantize(block=(3, 4))),
    ],
)
@pytest.mark.parametrize("has_zero", [False, True])
def test_scales_of_tensors_channels_and_blocks(scale, step, has_zero):
    rng = np.random.default_rng(0)
    value = rng.integers(-100, 100, (4, 6)).astype(np.int8)
    factor = rng.random(scale).astype(np.float32)
    zero = rng.integers(-5, 5, scale).astype(np.int8)
    arrays = [value, factor, zero] if has_zero else [value, factor]
    formula = made(step, *sources([spec(*a.shape, dtype=a.dtype.name) for a in arrays]))

    def full(part):
        if scale == (4,):
            part = part[:, None]
        if len(scale) == 2:
            block = step.block or [n // m for n, m in zip(value.shape, scale, strict=True)]
            for axis, size in enumerate(block):
                part = part.repeat(size, axis).take(np.arange(value.shape[axis]), axis)
        return part

    expected = value.astype(np.float32)
    if has_zero:
        expected = expected - full(zero).astype(np.float32)
    expected = expected * full(factor)
    np.testing.assert_array_equal(compute(formula, arrays), expected)
    for box in (((1, 3), (2, 6)), ((3, 4), (0, 1))):
        np.testing.assert_array_equal(compute(formula, arrays, box), expected[slices(box)])


def test_small_floats_are_dequantized_to_the_dtype_that_is_wanted():
    value = np.arange(4).astype(ml_dtypes.float8_e4m3fn)
    specs = [spec(4, dtype="float8_e4m3fn"), spec(1, dtype="bfloat16")]
    formula = made(Dequantize(dtype="bfloat16"), *sources(specs))
    result = compute(formula, [value, np.array([0.5], ml_dtypes.bfloat16)])
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result.astype(float), [0, 0.5, 1, 1.5])


# --- slots -----------------------------------------------------------------------------


def test_the_formula_of_slots_is_that_of_the_variables_up_to_values():
    variables = sources([spec(2), spec(2)])
    formula = applied([Cast("float16"), Pad(((1, 1),), 5), Concat(0)], variables)
    slots = {s.key: Source(f"m{s.key}", s.spec) for s in variables}
    derived = Derived(formula).of_slots(slots)
    assert derived.keys == ("m0", "m1") and derived.spec.dtype == ""
    made_of = {"m0": np.float32([1, 2]), "m1": np.float32([3, 4])}
    result = evaluate(
        derived.formula, whole(derived.shape), lambda key, box: made_of[key][slices(box)]
    )
    np.testing.assert_array_equal(result, [0, 1, 2, 0, 0, 3, 4, 0])
    with pytest.raises(ValueError, match="state of optimizers"):
        Derived(made(Map(abs), variables[0])).of_slots(slots)
