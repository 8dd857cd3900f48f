"""Random boxes and tilings, for property tests."""

import itertools

from hypothesis import strategies as st


@st.composite
def boxes(draw, shape):
    """A box inside `shape`."""
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in ends)


@st.composite
def tilings(draw, box, depth=3):
    """Boxes that make up `box`."""
    axes = [i for i, (a, b) in enumerate(box) if b - a > 1]
    if not depth or not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    a, b = box[axis]
    cut = draw(st.integers(a + 1, b - 1))
    parts = [(*box[:axis], half, *box[axis + 1 :]) for half in ((a, cut), (cut, b))]
    return [tile for part in parts for tile in draw(tilings(part, depth - 1))]


@st.composite
def grids(draw, shape):
    """Boxes that make up an array of `shape` as a regular grid, cell after cell."""
    found = [()]
    for n in shape:
        cuts = draw(st.sets(st.integers(1, n - 1), max_size=3)) if n > 1 else set()
        bounds = [0, *sorted(cuts), n]
        found = [(*box, pair) for box in found for pair in itertools.pairwise(bounds)]
    return found
