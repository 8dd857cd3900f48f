"""Tracing live objects."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trackables import Model, var

import ckpt_jax as ckpt
from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph import codec
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.graph.nodes import SaverRef, Slot, has_values
from ckpt_jax.graph.specs import LeafSpec, ShardingSpec
from ckpt_jax.matching.trace import trace
from ckpt_jax.objects.trackable import Trackable, Variable


class Thing(Trackable):
    """A mutable object with the children and values that a test gives it."""

    def __init__(self, children=(), values=()):
        for name, child in dict(children).items():
            self.track(name, child)
        self.own = dict(values)

    def serialize_to_arrays(self):
        return self.own


class Optimizer(Thing):
    def __init__(self, children=()):
        super().__init__(children)
        self.state = {}

    def slots(self):
        return self.state


def describe(value):
    if isinstance(value, set):
        raise TypeError("sets have no order")
    dtype = {int: "int64", float: "float64", str: "bytes"}.get(type(value), "float32")
    kind = type(value).__name__ if dtype != "float32" else "array"
    return LeafSpec(kind, dtype), None


def traced(root, **kwargs):
    return trace(root, describe, **kwargs)


@st.composite
def things(draw, most=7):
    """Objects with random edges among them: shared, cyclic, some unreachable."""
    count = draw(st.integers(1, most))
    nodes = [Thing(values={"x": i} if draw(st.booleans()) else ()) for i in range(count)]
    for thing in nodes:
        for name, child in draw(
            st.dictionaries(st.sampled_from("abcd"), st.integers(0, count - 1), max_size=3)
        ).items():
            thing.track(name, nodes[child])
    return nodes[0]


def shortest_paths(root):
    """Object id -> first path, in the order of a plain breadth-first search."""
    paths, queue, keep = {id(root): ""}, deque([root]), [root]
    while queue:
        thing = queue.popleft()
        for name, child in thing.trackable_children().items():
            if id(child) not in paths:
                above = paths[id(thing)]
                paths[id(child)] = f"{above}/{name}" if above else name
                queue.append(child)
                keep.append(child)
    return paths


# --- identity and names -----------------------------------------------------------------


@settings(max_examples=50)
@given(things())
def test_every_reachable_object_is_one_node_under_its_first_breadth_first_path(root):
    live = traced(root)
    assert {id(obj): path for obj, path in zip(live.objects, live.graph.paths, strict=True)} == (
        shortest_paths(root)
    )
    assert list(live.graph.paths) == list(shortest_paths(root).values())


@settings(max_examples=50)
@given(things())
def test_edges_lead_to_the_nodes_of_the_children(root):
    live = traced(root)
    for obj, node in zip(live.objects, live.graph.nodes, strict=True):
        children = obj.trackable_children()
        assert [label for label, _ in node.children] == list(children)
        assert all(live.objects[child] is children[label] for label, child in node.children)


@settings(max_examples=50)
@given(things())
def test_a_traced_graph_survives_the_codec(root):
    graph = traced(root).graph
    assert codec.decode(codec.encode(graph)) == graph


def test_a_shared_object_has_one_key_along_its_shortest_path():
    shared = Thing(values={"x": 1})
    root = Thing({"deep": Thing({"er": Thing({"s": shared})}), "near": Thing({"s": shared})})
    graph = traced(root).graph
    assert [attribute.key for _, attribute in graph.attributes()] == ["near/s/.ATTRIBUTES/x"]


def test_among_paths_of_one_length_the_first_listed_names_the_object():
    shared = Thing(values={"x": 1})
    root = Thing({"z": Thing({"s": shared}), "a": Thing({"s": shared})})
    assert "z/s" in traced(root).graph.paths


@pytest.mark.behaviour(49)
def test_mutually_referencing_objects_can_be_traced():
    first, second = Thing(values={"x": 1}), Thing()
    first.track("second", second)
    second.track("first", first)
    graph = traced(first).graph
    assert graph.nodes[1].children == (("first", 0),)
    assert [node.has_values for node in graph.nodes] == [True, True]


@pytest.mark.behaviour(263)
def test_a_tuple_that_contains_its_owner_is_one_child():
    owner = Thing()
    owner.track("parts", (owner,))
    graph = traced(owner).graph
    assert graph.paths == ("", "parts")
    assert graph.nodes[1].children == ((0, 0),)


def test_the_parts_of_an_immutable_container_are_one_node_for_each_place():
    pair = (1, 2)
    graph = traced({"a": pair, "b": pair}).graph
    assert graph.paths == ("", "a", "b", "a/0", "a/1", "b/0", "b/1")


def test_equal_scalars_are_different_values():
    graph = traced({"a": 7, "b": 7}).graph
    assert [attribute.key for _, attribute in graph.attributes()] == [
        "a/.ATTRIBUTES/VARIABLE_VALUE",
        "b/.ATTRIBUTES/VARIABLE_VALUE",
    ]


def test_objects_that_cannot_be_hashed_or_compared_are_told_apart():
    class Odd(Thing):
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError("identity is enough")

    graph = traced(Thing({"a": Odd(), "b": Odd()})).graph
    assert graph.paths == ("", "a", "b")


def test_names_with_separators_stay_one_edge():
    graph = traced(Thing({"a/b": Thing({".c": Variable(1.0)})})).graph
    assert graph.paths == ("", "a.Sb", "a.Sb/.c")
    assert graph.object_keys == ("", "a.Sb", "a.Sb/..c")


def test_labels_keep_their_type():
    graph = traced({0: 1, "0": 2}).graph
    assert graph.nodes[0].children == ((0, 1), ("0", 2))
    assert len(set(graph.object_keys)) == 3


# --- values -----------------------------------------------------------------------------


@pytest.mark.behaviour(88, 89)
def test_named_values_of_the_root_and_of_a_child_have_their_keys():
    graph = traced(Thing({"child": Thing(values={"v1": 3})}, {"v1": 1, "v2": 2})).graph
    assert [(node, a.name, a.key) for node, a in graph.attributes()] == [
        (0, "v1", "/.ATTRIBUTES/v1"),
        (0, "v2", "/.ATTRIBUTES/v2"),
        (1, "v1", "child/.ATTRIBUTES/v1"),
    ]


def test_a_name_of_a_value_is_escaped_once():
    (_, attribute), *_ = traced(Thing(values={"a/b": 1})).graph.attributes()
    assert (attribute.name, attribute.key) == ("a/b", "/.ATTRIBUTES/a.Sb")


def test_values_are_those_of_the_moment_of_the_trace():
    root = {"w": 1}
    live = traced(root)
    root["w"] = 2
    assert live.values[1] == {VARIABLE_VALUE: 1}


def test_what_describe_says_is_what_the_graph_records():
    sharding = ShardingSpec("NamedSharding", ("x",))
    live = trace({"w": 1.5}, lambda value: (LeafSpec("float", "float64"), sharding))
    (_, attribute), *_ = live.graph.attributes()
    assert (attribute.spec, attribute.sharding) == (LeafSpec("float", "float64"), sharding)


@settings(max_examples=50)
@given(things())
def test_a_node_has_values_exactly_if_a_value_can_be_reached_from_it(root):
    graph = traced(root).graph

    def reaches_a_value(node):
        seen, todo = {node}, [node]
        while todo:
            entry = graph.nodes[todo.pop()]
            if entry.attributes:
                return True
            fresh = {child for _, child in entry.children} - seen
            seen |= fresh
            todo += fresh
        return False

    assert [node.has_values for node in graph.nodes] == [
        reaches_a_value(node) for node in range(len(graph.nodes))
    ]


def test_values_count_for_all_ancestors_even_in_a_cycle():
    children = [(("a", 1),), (("b", 2), ("up", 0)), (), (("self", 3),)]
    assert has_values([False, False, True, False], children) == [True, True, True, False]


# --- registered savers ------------------------------------------------------------------


def test_an_object_of_a_registered_saver_has_no_values_of_its_own_but_its_children():
    table = Thing({"child": Variable(1.0)}, {"x": 1})
    live = traced(
        Thing({"a/b": table}), saver_of=lambda obj: "Custom.Table" if obj is table else None
    )
    node = live.graph.nodes[1]
    assert node.saver == SaverRef("Custom.Table", "a.Sb")
    assert node.attributes == () and live.values[1] == {}
    assert node.has_values and live.graph.paths[2] == "a.Sb/child"


# --- slots ------------------------------------------------------------------------------


def test_slot_variables_are_named_after_their_variable_and_come_last():
    opt, w, m = Optimizer(), Variable(1.0), Variable(0.0)
    opt.state["m", w] = m
    live = traced(Thing({"opt": opt, "model": Thing({"w": w})}))
    assert live.graph.object_keys[-1] == "model/w/.OPTIMIZER_SLOT/opt/m"
    assert live.objects[-1] is m
    assert live.graph.nodes[1].slots == (Slot(3, "m", 4),)
    assert live.graph.nodes[1].has_values
    assert live.graph.slot(1, 3, "m") == 4 and live.graph.slot_nodes == {4}


def test_a_slot_is_saved_only_where_its_variable_is():
    opt, w = Optimizer(), Variable(1.0)
    opt.state["m", w] = Variable(0.0)
    assert traced(Thing({"opt": opt})).graph.slot_nodes == frozenset()
    assert len(traced(Thing({"opt": opt, "w": w})).graph.slot_nodes) == 1


def test_two_optimizers_may_have_slots_of_one_name_for_one_variable():
    w, optimizers = Variable(1.0), {"a": Optimizer(), "b": Optimizer()}
    for opt in optimizers.values():
        opt.state["m", w] = Variable(0.0)
    assert traced(Thing({"w": w, **optimizers})).graph.object_keys[-2:] == (
        "w/.OPTIMIZER_SLOT/a/m",
        "w/.OPTIMIZER_SLOT/b/m",
    )


def test_an_optimizer_as_root_has_an_empty_path_in_its_slots_keys():
    opt, w = Optimizer(), Variable(1.0)
    opt.track("w", w)
    opt.state["m", w] = Variable(0.0)
    assert traced(opt).graph.object_keys[-1] == "w/.OPTIMIZER_SLOT//m"


def test_a_slot_variable_that_is_a_child_too_is_refused():
    opt, w, m = Optimizer(), Variable(1.0), Variable(0.0)
    opt.state["m", w] = m
    with pytest.raises(UnsaveableError, match="also an ordinary child"):
        traced(Thing({"opt": opt, "w": w, "m": m}))


def test_an_attribute_that_is_called_slots_is_an_attribute(path):
    """isinstance(obj, SlotOwner) is true of anything with an attribute `slots`."""
    ckpt.Checkpoint(o=Model(slots=var(1.0))).write(path)
    assert ckpt.load(path) == {"o": {"slots": 1.0}}


# --- what cannot be saved ---------------------------------------------------------------


def test_everything_that_cannot_be_saved_is_named_at_once():
    with pytest.raises(UnsaveableError) as caught:
        traced({"f": print, "ok": 1, "deep": [Thing(values={"s": set()})], "g": len})
    assert sorted(path for path, _ in caught.value.problems) == ["deep/0", "f", "g"]
    assert "sets have no order" in str(caught.value)


def test_a_name_that_is_no_unicode_is_refused():
    with pytest.raises(UnsaveableError, match="not valid Unicode"):
        traced({"\ud800": 1})
