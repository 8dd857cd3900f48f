"""Spreading slices over processes: each element once, and nobody has much more than others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.boxes import shape_of, size_of, tiling_problem
from ckpt_jax.saving.spread import HeldBox, spread

PART_NBYTES = 64


@st.composite
def held_boxes(draw, count, everywhere=False):
    """Boxes of one-byte elements, somewhere in their arrays, with their holders."""
    start = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    lengths = [draw(st.integers(0, 20)) for _ in start]
    box = tuple((a, a + n) for a, n in zip(start, lengths, strict=True))
    holders = st.sets(st.integers(0, count - 1), min_size=1)
    chosen = range(count) if everywhere else sorted(draw(holders))
    return HeldBox(box, size_of(box), tuple(chosen))


def some_boxes(everywhere=False):
    return st.integers(1, 6).flatmap(
        lambda count: st.tuples(
            st.just(count), st.lists(held_boxes(count, everywhere), max_size=12)
        )
    )


def loads(boxes, parts, count):
    load = [0] * count
    for part in parts:
        load[part.process] += size_of(part.box)
    return load


@given(some_boxes())
def test_the_parts_of_all_processes_are_the_boxes_each_element_once(case):
    count, boxes = case
    parts = spread(boxes, count, PART_NBYTES)
    for number, held in enumerate(boxes):
        own = [part for part in parts if part.source == number]
        assert own
        assert {part.process for part in own} <= {*held.holders}
        origin = [start for start, _ in held.box]
        relative = [
            tuple((a - o, b - o) for (a, b), o in zip(part.box, origin, strict=True))
            for part in own
        ]
        assert tiling_problem(relative, shape_of(held.box)) is None
        assert len(own) == 1 or all(size_of(part.box) > 0 for part in own)


@given(some_boxes(everywhere=True))
def test_where_all_hold_everything_no_process_has_much_more_than_another(case):
    count, boxes = case
    parts = spread(boxes, count, PART_NBYTES)
    load = loads(boxes, parts, count)
    largest = max((size_of(part.box) for part in parts), default=0)
    assert max(load) - min(load) <= largest + uneven(boxes, parts)


def uneven(boxes, parts):
    """By how much the parts of boxes that were cut differ, all in all."""
    total = 0
    for number, _ in enumerate(boxes):
        sizes = [size_of(part.box) for part in parts if part.source == number]
        total += max(sizes) - min(sizes)
    return total


@given(some_boxes())
def test_small_boxes_stay_whole(case):
    count, boxes = case
    parts = spread(boxes, count, PART_NBYTES)
    for number, held in enumerate(boxes):
        own = [part for part in parts if part.source == number]
        if held.nbytes < 2 * PART_NBYTES:
            assert [part.box for part in own] == [held.box]


def test_what_one_process_has_to_write_is_weighed_against_what_it_need_not():
    mine = HeldBox(((0, 100),), 100, (0,))
    shared = [HeldBox(((0, 10),), 10, (0, 1)) for _ in range(10)]
    assert loads([], spread([mine, *shared], 2, 1000), 2) == [100, 100]


def test_a_large_box_is_cut_for_all_its_holders():
    held = HeldBox(((4, 8), (0, 1000)), 4000, (1, 2, 3))
    parts = spread([held], 4, 1000)
    assert [part.process for part in parts] == [1, 2, 3]
    assert [part.box[0] for part in parts] == [(4, 5), (5, 6), (6, 8)]
    cut = np.zeros((4, 1000), int)
    for part in parts:
        (a, b), (c, d) = part.box
        cut[a - 4 : b - 4, c:d] += 1
    assert (cut == 1).all()
