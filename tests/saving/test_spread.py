"""Spreading slices over processes: each element once, and nobody has much more than others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.boxes import shape_of, size_of, tiling_problem
from ckpt_jax.saving.spread import HeldBox, spread

SHARE_NBYTES = 64


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


def loads(boxes, shares, count):
    load = [0] * count
    for share in shares:
        load[share.process] += size_of(share.box)
    return load


@given(some_boxes())
def test_the_shares_of_all_processes_are_the_boxes_each_element_once(case):
    count, boxes = case
    shares = spread(boxes, [0] * count, SHARE_NBYTES)
    for number, held in enumerate(boxes):
        own = [share for share in shares if share.source == number]
        assert own
        assert {share.process for share in own} <= {*held.holders}
        origin = [start for start, _ in held.box]
        relative = [
            tuple((a - o, b - o) for (a, b), o in zip(share.box, origin, strict=True))
            for share in own
        ]
        assert tiling_problem(relative, shape_of(held.box)) is None
        assert len(own) == 1 or all(size_of(share.box) > 0 for share in own)


@given(some_boxes(everywhere=True))
def test_where_all_hold_everything_no_process_has_much_more_than_another(case):
    count, boxes = case
    shares = spread(boxes, [0] * count, SHARE_NBYTES)
    load = loads(boxes, shares, count)
    largest = max((size_of(share.box) for share in shares), default=0)
    assert max(load) - min(load) <= largest + uneven(boxes, shares)


def uneven(boxes, shares):
    """By how much the shares of boxes that were cut differ, all in all."""
    total = 0
    for number, _ in enumerate(boxes):
        sizes = [size_of(share.box) for share in shares if share.source == number]
        total += max(sizes) - min(sizes)
    return total


@given(some_boxes())
def test_small_boxes_stay_whole(case):
    count, boxes = case
    shares = spread(boxes, [0] * count, SHARE_NBYTES)
    for number, held in enumerate(boxes):
        own = [share for share in shares if share.source == number]
        if held.nbytes < 2 * SHARE_NBYTES:
            assert [share.box for share in own] == [held.box]


def test_what_one_process_has_to_write_is_weighed_against_what_it_need_not():
    shared = [HeldBox(((0, 10),), 10, (0, 1)) for _ in range(10)]
    assert loads([], spread(shared, [100, 0], 1000), 2) == [0, 100]


def test_a_large_box_is_cut_for_all_its_holders():
    held = HeldBox(((4, 8), (0, 1000)), 4000, (1, 2, 3))
    shares = spread([held], [0] * 4, 1000)
    assert [share.process for share in shares] == [1, 2, 3]
    assert [share.box[0] for share in shares] == [(4, 5), (5, 6), (6, 8)]
    cut = np.zeros((4, 1000), int)
    for share in shares:
        (a, b), (c, d) = share.box
        cut[a - 4 : b - 4, c:d] += 1
    assert (cut == 1).all()
