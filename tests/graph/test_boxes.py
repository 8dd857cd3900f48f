"""Boxes: whether some of them share an element, and whether they tile an array."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.boxes import intersect, overlap, tiling_problem


@st.composite
def many_boxes(draw):
    """Up to some hundreds of boxes of one rank, so that they are divided more than once."""
    rank, size = draw(st.integers(0, 4)), draw(st.integers(1, 12))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 300))
    starts = chance.integers(0, size, (count, rank))
    extents = chance.integers(0, draw(st.integers(1, 4)), (count, rank))
    return [
        tuple((int(start), int(start + extent)) for start, extent in zip(*box, strict=True))
        for box in zip(starts, extents, strict=True)
    ]


def share(a, b):
    return intersect(a, b) is not None


@given(many_boxes())
def test_a_pair_is_found_if_there_is_one(boxes):
    pair = overlap(boxes)
    assert (pair is not None) == any(share(a, b) for a, b in combinations(boxes, 2))
    if pair is not None:
        assert share(*pair)
        assert pair[0] != pair[1] or boxes.count(pair[0]) > 1


@given(many_boxes())
def test_no_pair_is_found_among_boxes_that_are_apart(boxes):
    apart = []
    for box in boxes:
        if not any(share(box, other) for other in apart):
            apart.append(box)
    assert overlap(apart) is None


def grid(*counts):
    return [tuple((int(i), int(i) + 1) for i in at) for at in np.ndindex(*counts)]


def stairs(n):
    """All share a part of the first axis, however it is cut."""
    return [((0, 2 * n - i), (i, i + 1)) for i in range(n)]


def rods(n):
    """Three directions: no plane leaves all of them whole."""
    full = (0, 2 * n)
    places = [(2 * i, 2 * j) for i in range(n) for j in range(n)]
    return [
        *[(full, (i, i + 1), (j, j + 1)) for i, j in places],
        *[((i + 1, i + 2), full, (j + 1, j + 2)) for i, j in places],
        *[((i, i + 1), (j + 1, j + 2), full) for i, j in places],
    ]


@pytest.mark.parametrize(
    "boxes",
    [grid(30_000), grid(150, 150), grid(27, 27, 27), stairs(20_000), rods(80)],
    ids=["line", "plane", "space", "stairs", "rods"],
)
def test_ten_thousands_of_boxes_are_compared_without_all_pairs(boxes):
    assert overlap(boxes) is None
    more = boxes[len(boxes) // 3]
    assert overlap([*boxes, more]) == (more, more)


def test_a_hole_and_an_overlap_are_told_apart():
    assert tiling_problem(grid(3, 3), (3, 3)) is None
    assert "hole" in str(tiling_problem(grid(3, 3)[1:], (3, 3)))
    assert "overlap" in str(tiling_problem([*grid(3, 3), ((0, 1), (0, 2))], (3, 3)))
    assert "inside" in str(tiling_problem(grid(3, 3), (3, 2)))
    assert tiling_problem([()], ()) is None
    assert "overlap" in str(tiling_problem([(), ()], ()))
