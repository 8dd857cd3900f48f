"""The order in which objects come after what they depend on."""

import pytest

from ckpt_jax.graph.saved_objects import CyclicDependencyError, order_by_dependency


@pytest.mark.behaviour(280)
def test_dependencies_come_before_what_depends_on_them():
    needed = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": [], "extra": ["c"]}
    order = order_by_dependency(needed)
    assert sorted(order) == sorted(needed)
    for key, before in needed.items():
        assert all(order.index(other) < order.index(key) for other in before)


@pytest.mark.behaviour(281)
def test_without_dependencies_all_keys_are_there():
    assert sorted(order_by_dependency({3: [], 1: [], 2: []})) == [1, 2, 3]


@pytest.mark.behaviour(282)
def test_a_dependency_that_is_no_key_is_named():
    with pytest.raises(ValueError, match="not in the map: .'c', 'd'."):
        order_by_dependency({"a": ["c"], "b": ["a", "d"]})


def test_a_cycle_of_dependencies_is_named():
    with pytest.raises(CyclicDependencyError, match="cycle") as caught:
        order_by_dependency({"a": ["b"], "b": ["c"], "c": ["a"], "d": []})
    cycle = caught.value.cycle
    assert cycle[0] == cycle[-1] and sorted(cycle[1:]) == ["a", "b", "c"]
