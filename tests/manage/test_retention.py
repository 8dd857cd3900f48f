"""Retention policies and sweeps, as functions of records."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    KeepEveryNSteps,
    KeepLatest,
    plan_sweep,
)

# --- laws -------------------------------------------------------------------------------


numbered = st.lists(st.integers(0, 20), unique=True, max_size=8)


scores = st.floats(-1, 1) | st.just(float("nan"))


@st.composite
def record_lists(draw):
    numbers = draw(numbered)
    return tuple(
        CheckpointRecord(
            number, draw(st.floats(0, 9e4)), draw(st.dictionaries(st.just("a"), scores))
        )
        for number in numbers
    )


policies = st.lists(
    st.builds(KeepLatest, st.integers(1, 4))
    | st.builds(KeepEveryNSteps, st.integers(1, 4))
    | st.builds(KeepBest, st.just("a"), st.integers(1, 4), st.sampled_from(["max", "min"])),
    max_size=3,
).map(tuple)


@given(record_lists(), policies)
def test_a_union_keeps_what_each_policy_keeps_and_no_more(some, several):
    kept = KeepAny(several).keep(some)
    assert kept == set().union(*(policy.keep(some) for policy in several))
    assert kept <= {record.number for record in some}


@given(record_lists(), policies, st.none() | st.floats(0.1, 9e4), st.floats(0, 9e4))
def test_a_sweep_puts_each_checkpoint_into_one_group_and_keeps_the_latest(
    some, several, interval, preserved
):
    sweep = plan_sweep(some, KeepAny(several), interval, preserved)
    groups = [record.number for record in (*sweep.keep, *sweep.preserve, *sweep.remove)]
    assert sorted(groups) == sorted(record.number for record in some)
    assert sweep.keep[-1:] == some[-1:]
    assert KeepAny(several).keep(some) <= {record.number for record in sweep.keep}
    times = [preserved, *(record.time for record in sweep.preserve)]
    assert sweep.last_preserved == times[-1]
    assert all(later - (interval or 0) >= earlier for earlier, later in itertools.pairwise(times))
    if interval is None:
        assert not sweep.preserve
    # What was swept once needs no sweeping again, where a policy does not depend on the others.
    again = plan_sweep(sweep.keep, KeepAny(several), interval, sweep.last_preserved)
    assert again.keep == sweep.keep


# --- policies ---------------------------------------------------------------------------


def records(*pairs):
    return tuple(CheckpointRecord(number, 0.0, metrics) for number, metrics in pairs)


def test_every_n_steps_keeps_the_multiples():
    assert KeepEveryNSteps(5).keep(records((0, {}), (4, {}), (5, {}), (10, {}))) == {0, 5, 10}


def test_the_best_are_the_largest_or_smallest_and_the_newest_among_equals():
    some = records((1, {"a": 3.0}), (2, {"a": 1.0}), (3, {"a": 3.0}), (4, {"a": 2.0}))
    assert KeepBest("a").keep(some) == {3}
    assert KeepBest("a", 3).keep(some) == {1, 3, 4}
    assert KeepBest("a", 2, "min").keep(some) == {2, 4}
    assert KeepBest("a", 9).keep(some) == {1, 2, 3, 4}
    same = records((1, {"a": 3.0}), (2, {"a": 3.0}))
    assert KeepBest("a", mode="min").keep(same) == KeepBest("a").keep(same) == {2}


def test_a_checkpoint_without_the_metric_or_with_nan_is_none_of_the_best():
    some = records((1, {"a": float("nan")}), (2, {"b": 9.0}), (3, {}), (4, {"a": -1.0}))
    for mode in ("max", "min"):
        assert KeepBest("a", 3, mode).keep(some) == {4}
    infinite = records((1, {"a": float("inf")}), (2, {"a": 0.0}))
    assert KeepBest("a", mode="max").keep(infinite) == {1}


def test_no_records_are_no_numbers():
    for policy in (KeepLatest(2), KeepEveryNSteps(2), KeepBest("a"), KeepAny(())):
        assert policy.keep(()) == frozenset()


@pytest.mark.parametrize(
    "make", [lambda: KeepLatest(0), lambda: KeepEveryNSteps(0), lambda: KeepBest("a", 0),
             lambda: KeepBest("a", 1, "best")]
)  # fmt: skip
def test_policies_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_policies_are_values():
    assert KeepAny([KeepLatest(1), KeepBest("a")]) == KeepAny((KeepLatest(1), KeepBest("a")))
    assert len({KeepLatest(1), KeepLatest(1), KeepLatest(2)}) == 2
