"""Tilings: whether slices make up their array, each element once, however they are cut."""

import ast

import numpy as np
import pytest
from boxes import boxes, grids, tilings
from calls import calls
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.boxes import inside, intersect, shape_of, size_of, slices, whole
from ckpt_jax.store import tiling as tiling_module
from ckpt_jax.store.tiling import Layout, Tiling, clashes

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)


def tiling_of(shape, found, dtype="int8"):
    """The tiling of an array of bytes, sorted as tilings are; each slice is in its own shard."""
    found = sorted(found)
    layouts = {}
    for box in found:
        layouts.setdefault(Layout(dtype, shape, shape_of(box), size_of(box)), len(layouts))
    numbers = [layouts[Layout(dtype, shape, shape_of(box), size_of(box))] for box in found]
    bounds = np.array(found, np.int64).reshape(len(found), len(shape), 2)
    order = np.arange(len(found))
    return Tiling(
        tuple(layouts), np.array(numbers), bounds[:, :, 0], bounds[:, :, 1], order, 0 * order
    )


def problems(shape, found, **options):
    return list(clashes(tiling_of(shape, found), whole=options.get("whole", True)))


@st.composite
def cut_arrays(draw):
    """A shape and boxes in it, which may make it up, leave holes, or overlap."""
    shape = draw(SHAPES)
    found = draw(st.one_of(tilings(whole(shape), 4), grids(shape)))
    for change in draw(st.lists(st.sampled_from(["drop", "double", "move"]), max_size=2)):
        at = draw(st.integers(0, len(found) - 1))
        if change == "double":
            found = [*found, found[at]]
        elif change == "move":
            found = [*found[:at], draw(boxes(shape)), *found[at + 1 :]]
        elif len(found) > 1:
            found = found[:at] + found[at + 1 :]
    return shape, found


def counts(shape, found):
    """How often each element is held."""
    held = np.zeros(shape, int)
    for box in found:
        held[slices(box)] += 1
    return held


@given(cut_arrays())
def test_slices_are_accepted_exactly_if_they_hold_each_element_once(case):
    shape, found = case
    held = counts(shape, found)
    empty = [box for box in found if not size_of(box)]
    sound = (held == 1).all() and len(set(empty)) == len(empty)
    clash = problems(shape, found)
    assert bool(clash) == (not sound)
    for each in clash:
        if "hole" in each.text:
            place = ast.literal_eval(each.text.partition("element ")[2])
            assert held[place] == 0
        else:
            a, b = [sorted(found)[i] for i in each.slices]
            assert str(a) in each.text
            assert a == b if "twice" in each.text else intersect(a, b)


@given(cut_arrays())
def test_a_shard_may_leave_holes_but_hold_nothing_twice(case):
    shape, found = case
    empty = [box for box in found if not size_of(box)]
    sound = (counts(shape, found) <= 1).all() and len(set(empty)) == len(empty)
    assert bool(problems(shape, found, whole=False)) == (not sound)


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), grids(shape))), st.data())
def test_a_grid_is_refused_if_a_cell_is_missing_or_doubled(case, data):
    shape, cells = case
    assert not problems(shape, cells)
    at = data.draw(st.integers(0, len(cells) - 1))
    (clash,) = problems(shape, [*cells, cells[at]])
    assert "is stored twice" in clash.text and str(cells[at]) in clash.text
    if len(cells) > 1:
        (clash,) = problems(shape, cells[:at] + cells[at + 1 :])
        assert "hole at element" in clash.text
    if len(cells) > 2:
        (clash,) = problems(shape, [*cells[:at], *cells[at + 1 :], cells[at - 1]])
        assert "twice" in clash.text or "hole" in clash.text


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), grids(shape))))
def test_a_grid_is_looked_at_in_whole_columns_only(case):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_first_gap", "_first_overlap"):
            patch.setattr(tiling_module, name, None)
        assert not problems(*case)


@given(cut_arrays(), st.data())
def test_touching_finds_what_intersects(case, data):
    shape, found = case
    tiling = tiling_of(shape, found)
    assert [tiling.box(i) for i in range(tiling.count)] == tiling.boxes() == sorted(found)
    assert all(inside(box, shape) for box in tiling.boxes())
    wanted = data.draw(boxes(shape))
    touched = tiling.touching(wanted)
    assert {i for i, box in enumerate(tiling.boxes()) if intersect(box, wanted)} <= {*touched}
    assert tiling.nbytes == sum(map(size_of, found))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0, 2)])
def test_an_array_without_elements_has_one_empty_slice(shape):
    assert not problems(shape, [whole(shape)])
    (clash,) = problems(shape, [whole(shape)] * 2)
    assert "is stored twice" in clash.text


def test_slices_that_disagree_on_dtype_or_shape_are_named():
    halves = [tiling_of((4,), [((0, 2),)]), tiling_of((5,), [((2, 4),)], "int16")]
    columns = [
        np.concatenate([t.starts for t in halves]),
        np.concatenate([t.stops for t in halves]),
    ]
    layouts = halves[0].layouts + halves[1].layouts
    mixed = Tiling(layouts, np.array([0, 1]), *columns, np.arange(2), np.zeros(2, int))
    (clash,) = clashes(mixed, whole=True)
    assert clash.text == "int16[5] disagrees with int8[4]" and clash.slices == (0, 1)


def stairs(count):
    """Disjoint boxes whose ranges along the longest axis all overlap each other."""
    return (2 * count, count), [((i, count + i), (i, i + 1)) for i in range(count)]


def test_irregular_slices_are_not_compared_pair_by_pair():
    small, large = (tiling_of(*stairs(count)) for count in (100, 10_000))

    def work(tiling):
        (clash,) = clashes(tiling, whole=True)
        assert "hole at element (0, 1)" in clash.text

    work(small)  # what is made once is made here
    assert calls(lambda: work(large)) < 2 * calls(lambda: work(small))


def test_too_many_slices_cut_along_too_many_axes_are_refused_before_memory_is_taken():
    chance = np.random.default_rng(0)
    shape = (9,) * 12
    starts = chance.integers(0, 8, (2000, 12)).tolist()
    found = [tuple((a, a + 1) for a in row) for row in starts]
    (clash,) = problems(shape, found)
    assert "too many" in clash.text
