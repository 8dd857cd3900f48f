"""The cost of tracing and matching grows with the number of nodes and edges, not faster.

Work is counted, never timed: how often a node is looked at, and how many functions are called.
"""

import itertools
import os
from collections import Counter
from typing import ClassVar

import jax.numpy as jnp
import pytest
from calls import calls, calls_of_the_system, lines

import ckpt_jax as ckpt
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import match
from ckpt_jax.store.state_file import CheckpointState, update_checkpoint_state

ZERO = jnp.zeros(())


class Part(ckpt.Trackable):
    """An object that counts how often it is asked."""

    asked: ClassVar[Counter[str]] = Counter()

    def trackable_children(self):
        self.asked["children"] += 1
        return super().trackable_children()

    def serialize_to_arrays(self):
        self.asked["values"] += 1
        return {} if "0" in self.__dict__.get("_self_children", ()) else {"x": ZERO}


def program(count, width):
    """`count` parts as a tree of the given width; each leads back to its first sibling."""
    parts = [Part() for _ in range(count)]
    for number in range(1, count):
        parent = parts[(number - 1) // width]
        parent.track(str((number - 1) % width), parts[number])
        parts[number].track("sibling", parts[(number - 1) // width * width + 1])
    return parts[0]


class Counted(tuple):
    """Nodes that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, node):
        self.looks += 1
        return super().__getitem__(node)

    def __iter__(self):
        self.looks += len(self)
        return super().__iter__()


def counted(graph):
    return ObjectGraph(Counted(graph.nodes), graph.object_keys)


@pytest.mark.parametrize("width", [10, None], ids=["tree", "flat"])
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_node_is_looked_at_a_few_times_however_many_there_are(count, width):
    width = width or count
    root = program(count, width)
    Part.asked.clear()
    graph = live_graph(root).graph
    assert Part.asked == {"children": count, "values": count}
    edges = sum(len(node.children) for node in graph.nodes)
    assert (len(graph.nodes), edges) == (count, 2 * (count - 1))

    saved, live = counted(graph), counted(graph)
    found = match(saved, live)
    assert len(found.bound) == count and not found.frontier and not found.conflicts
    assert saved.nodes.looks <= 2 * edges
    assert live.nodes.looks <= 2 * edges


@pytest.mark.parametrize("width", [1, 10, 10_000], ids=["chain", "tree", "flat"])
def test_four_times_the_nodes_take_four_times_the_calls(width):
    def work(root):
        graph = live_graph(root).graph
        match(graph, graph)

    small, large = program(200, width), program(800, width)
    work(small)  # what is made once for each type is made here
    assert calls(lambda: work(large)) <= 4.2 * calls(lambda: work(small))


def many_variables(count):
    program = ckpt.Trackable()
    for number in range(count):
        program.track(f"v{number}", ckpt.Variable(ZERO))
    return program


def test_four_times_the_values_that_are_attached_late_take_four_times_the_calls(tmp_path):
    def late(count):
        path = ckpt.Checkpoint(program=many_variables(count)).write(tmp_path / str(count))
        program = ckpt.Trackable()
        status = ckpt.Checkpoint(program=program).read(path)

        def attach():
            for label, variable in many_variables(count).trackable_children().items():
                program.track(label, variable)
            assert not status.report.deferred

        return attach

    late(10)()  # what is made once is made here
    assert calls(late(200)) <= 4.2 * calls(late(50))


def test_four_times_the_values_that_are_renamed_take_four_times_the_calls(tmp_path):
    def renamed(count):
        values = dict.fromkeys(map(str, range(count)), 1)
        path = ckpt.save(tmp_path / str(count), {"a": values})
        return lambda: ckpt.plan_restore(path, {"b": values}, rename=[("a/*", "b/*")])

    renamed(10)()
    assert calls(renamed(800)) <= 4.2 * calls(renamed(200))


def test_four_times_the_values_with_a_rule_or_pattern_for_each_take_four_times_the_calls(tmp_path):
    def named_one_by_one(count):
        path = ckpt.save(tmp_path / str(count), {"a": {str(n): {"w": 1} for n in range(count)}})
        target = {"b": {str(n): {"w": 1} for n in range(count)}}
        rules = [(f"a/{n}/*", f"b/{n}/*") for n in range(count)]
        patterns = [f"a/{n}/w" for n in range(count)]

        def work():
            ckpt.plan_restore(path, target, rename=rules)
            ckpt.load(path, only=patterns)

        return work

    named_one_by_one(10)()
    # Python keeps no more than 512 regular expressions, so that some are compiled again.
    assert calls(named_one_by_one(400)) <= 4.6 * calls(named_one_by_one(100))


@pytest.mark.parametrize("leaf", [ZERO, ckpt.Variable(ZERO)], ids=["array", "object"])
@pytest.mark.parametrize("around", [lambda x: {"a": x}, lambda x: [x], lambda x: (x,)])
def test_four_times_the_depth_of_an_attribute_takes_four_times_the_calls(leaf, around):
    def work(depth):
        value = leaf
        for _ in range(depth):
            value = around(value)
        model = ckpt.AutoTrackable()
        model.x = value
        graph = live_graph(model).graph
        match(graph, graph)

    work(20)  # what is made once for each type is made here
    assert calls(lambda: work(400)) <= 4.2 * calls(lambda: work(100))


def save_beside(directory, count):
    """A save of a manager that keeps many checkpoints, of which only the names are there."""
    directory.mkdir()
    paths = [str(directory / f"ckpt-{number}") for number in range(1, count + 1)]
    for path in paths:
        os.mkdir(path)
        open(f"{path}/manifest.ckpt", "x").close()
    times = [1000.0 + number for number in range(count)]
    update_checkpoint_state(directory, CheckpointState(paths[-1], (*paths,), (*times,), 1.0))
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), directory, max_to_keep=None)
    assert len(manager.steps) == count
    numbers = itertools.count(count + 1)
    manager.save(next(numbers))  # what is done once is done here
    return lambda: manager.save(next(numbers))


def test_a_save_asks_the_system_equally_often_however_many_checkpoints_there_are(tmp_path):
    few, many = (save_beside(tmp_path / str(count), count) for count in (5, 1000))
    assert calls_of_the_system(many) == calls_of_the_system(few) > 50


def test_four_times_the_checkpoints_take_at_most_four_times_the_lines(tmp_path):
    few, many = (save_beside(tmp_path / str(count), count) for count in (250, 1000))
    assert lines(many) <= 4.2 * lines(few)


def test_opening_a_manager_of_four_times_the_checkpoints_takes_four_times_the_lines(tmp_path):
    for count in (250, 1000):
        save_beside(tmp_path / str(count), count)

    def opened(count):
        ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path / str(count), max_to_keep=None)

    assert lines(lambda: opened(1000)) <= 4.2 * lines(lambda: opened(250))
