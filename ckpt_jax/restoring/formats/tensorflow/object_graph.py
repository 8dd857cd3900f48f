"""TensorFlow's object graph as one of ours.

The message is the same, without the fields that this library adds. So it does not say which Python
container an object was. What follows from the edges is filled in: an object whose children are
called 0, 1, 2, ... is a list. If it has the same children by other names, too, it is a named tuple.
And it does not say what a value is; the index does.

A graph and an index need not agree. A variable that had no value yet has a key, and nothing is
stored under it. The key of a lookup table is only how the keys of its tensors begin. And there may
be values that the graph does not name at all. Each stored value gets a place here: it belongs to
the object whose key it continues, or else to the root.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError

from ckpt_jax.graph._proto import trackable_object_graph_pb2 as pb
from ckpt_jax.graph.labels import PYTHON_STATE, Label
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, SaverRef, Slot, object_keys
from ckpt_jax.graph.specs import LeafSpec

Entry = pb.TrackableObjectGraph.TrackableObject
Specs = Mapping[str, LeafSpec]
Keys = list[str]


def decode(data: bytes, specs: Mapping[str, LeafSpec]) -> ObjectGraph:
    """The object graph of a checkpoint that TensorFlow wrote.

    Args:
      data: a `TrackableObjectGraph`.
      specs: of all stored values, by key.

    Raises:
      ValueError: it cannot be parsed, or contradicts itself.
    """
    try:
        message = pb.TrackableObjectGraph.FromString(data)
    except DecodeError as error:
        raise ValueError(f"the object graph cannot be parsed: {error}") from error
    if not message.nodes:
        raise ValueError("the object graph has no nodes")
    unnamed = specs.keys() - {
        value.checkpoint_key for node in message.nodes for value in node.attributes
    }
    spare = sorted(unnamed)
    nodes = [_node(number, message.nodes, specs, spare) for number in range(len(message.nodes))]
    if not any(node.saver for node in nodes):  # a saver's values belong to it alone
        lost = [_attribute(key, key, specs) for key in spare]
        nodes[0] = replace(nodes[0], attributes=(*nodes[0].attributes, *lost))
    return ObjectGraph(tuple(nodes), object_keys(nodes))


def _node(number: int, entries: Sequence[Entry], specs: Specs, spare: Keys) -> Node:
    entry = entries[number]
    slots = tuple(
        [
            Slot(slot.original_variable_node_id, slot.slot_name, slot.slot_variable_node_id)
            for slot in entry.slot_variables
        ]
    )
    edges = [(child.local_name, child.node_id) for child in entry.children]
    ids = [child for _, child in edges] + [i for slot in slots for i in (slot.variable, slot.node)]
    if ids and not (0 <= min(ids) and max(ids) < len(entries)):
        raise ValueError(f"node {number} of the object graph refers to a node that is not there")
    if len({name for name, _ in edges}) < len(edges):
        raise ValueError(f"node {number} of the object graph has two children of one name")
    container, children = _container(edges)
    saver = entry.registered_saver
    return Node(
        container,
        "",
        children,
        tuple([found for value in entry.attributes for found in _stored(value, specs, spare)]),
        slots,
        SaverRef(saver.name, saver.object_name) if entry.HasField("registered_saver") else None,
        entry.has_checkpoint_values.value if entry.HasField("has_checkpoint_values") else None,
    )


def _container(edges: Sequence[tuple[str, int]]) -> tuple[str, tuple[tuple[Label, int], ...]]:
    """The kind of container that an object was, and its edges in order."""
    by_name = dict(edges)
    items: list[int] = []
    while (child := by_name.pop(str(len(items)), None)) is not None:
        items.append(child)
    if items and not by_name:
        return "list", tuple(enumerate(items))
    if items and [*by_name.values()] == items:
        return "namedtuple", tuple(by_name.items())
    return "", tuple(edges)


def _stored(value: Entry.SerializedTensor, specs: Specs, spare: Keys) -> list[Attribute]:
    """The stored values of an attribute: one, or none, or several whose keys begin with its key.

    The latter are taken out of the spare keys.
    """
    key = value.checkpoint_key
    if key in specs:
        return [_attribute(value.name, key, specs, value.full_name)]
    first = last = bisect_left(spare, key)
    while key and last < len(spare) and spare[last].startswith(key):
        last += 1
    taken = spare[first:last]
    if taken:
        del spare[first:last]
    return [_attribute(value.name + other.removeprefix(key), other, specs) for other in taken]


def _attribute(name: str, key: str, specs: Specs, full_name: str = "") -> Attribute:
    spec = specs[key]
    if name == PYTHON_STATE and spec.is_bytes:
        spec = LeafSpec("python_state", spec.dtype)
    return Attribute(name, key, spec, full_name=full_name)
