import re

from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.patterns import Heads, compile_pattern, selects

_TEXTS = st.text("ab/*?", max_size=8)
_PATTERNS = _TEXTS | _TEXTS.map(lambda text: re.compile(re.escape(text).replace("a", ".*")))
_PATHS = st.text("ab/", max_size=8)


@given(st.lists(_PATTERNS, max_size=6), _PATHS)
def test_every_pattern_that_matches_a_path_is_among_the_candidates(patterns, path):
    matching = [n for n, each in enumerate(patterns) if compile_pattern(each).fullmatch(path)]
    candidates = Heads(patterns).candidates(path)
    assert candidates == sorted({*candidates}) and {*matching} <= {*candidates}
    assert selects(patterns)(path) == bool(matching)
