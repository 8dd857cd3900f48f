"""Nodes of an object graph: their paths."""

from trackables import Model, Optimizer, var

import ckpt_jax as ckpt
from ckpt_jax.graph.nodes import Node, ObjectGraph, object_keys


def test_a_slot_and_a_child_of_a_bad_name_have_different_paths():
    """labels.py: both are injective. "..OPTIMIZER_SLOT" is shown as ".OPTIMIZER_SLOT"."""
    v = Model()
    v.track(".OPTIMIZER_SLOT", Model(opt=Model(m=var(1.0))))
    checkpoint = ckpt.Checkpoint(opt=Optimizer(0.1, v), v=v)
    graph = checkpoint._trace().graph
    assert len(set(graph.paths)) == len(graph.paths)


def test_a_node_that_nothing_leads_to_has_a_path_of_its_own():
    nodes = (Node(children=((".N2", 1),)), Node(), Node())
    graph = ObjectGraph(nodes, object_keys(nodes))
    assert len(set(graph.paths)) == 3
