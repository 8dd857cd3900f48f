"""Codec: an object graph as the bytes of a `TrackableObjectGraph`, and back.

Bytes from a file are data from outside: whatever they say is checked (ids, labels, the format
version) before a graph is made of it. Paths are not stored; they follow from the edges.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from ckpt_jax._proto import trackable_object_graph_pb2 as pb
from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph import labels
from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.model import (
    FORMAT_VERSION,
    Attribute,
    LeafSpec,
    Node,
    ObjectGraph,
    SaverRef,
    ShardingSpec,
    Slot,
)
from ckpt_jax.version import __version__

T = TypeVar("T", bound=Hashable)
_Reference = pb.TrackableObjectGraph.TrackableObject.ObjectReference
_KINDS: dict[type, int] = {
    str: _Reference.STRING,
    int: _Reference.INT,
    bool: _Reference.BOOL,
    float: _Reference.FLOAT,
    bytes: _Reference.BYTES,
    type(None): _Reference.NONE,
}
_FROM_TEXT: dict[int, Callable[[str], Label]] = {
    _Reference.STRING: str,
    _Reference.INT: int,
    _Reference.BOOL: lambda text: {"True": True, "False": False}[text],
    _Reference.FLOAT: float,
    _Reference.BYTES: bytes.fromhex,
    _Reference.NONE: lambda text: None,
}


class _Table:
    """Distinct values, numbered from 1 in the order of first use; 0 means none."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def number(self, value: Hashable | None) -> int:
        if value is None:
            return 0
        return self.numbers.setdefault(value, len(self.numbers) + 1)


def encode(graph: ObjectGraph) -> bytes:
    """The graph as an unsealed `TrackableObjectGraph` message."""
    message = pb.TrackableObjectGraph(format_version=FORMAT_VERSION)
    specs, shardings = _Table(), _Table()
    add = message.nodes.add
    for node in graph.nodes:
        out = add(container=node.container, type_name=node.type_name)
        for label, child in node.children:
            text, kind = label_text(label)
            out.children.add(node_id=child, local_name=text, key_kind=kind)
        for attribute in node.attributes:
            out.attributes.add(
                name=attribute.name,
                full_name=attribute.full_name,
                checkpoint_key=attribute.key,
                leaf_spec=specs.number(attribute.spec),
                sharding=shardings.number(attribute.sharding),
            )
        for slot in node.slots:
            out.slot_variables.add(
                original_variable_node_id=slot.variable,
                slot_name=slot.name,
                slot_variable_node_id=slot.node,
            )
        if node.saver is not None:
            out.registered_saver.name = node.saver.name
            out.registered_saver.object_name = node.saver.object_name
        if node.has_values is not None:
            out.has_checkpoint_values.value = node.has_values
    for spec in specs.numbers:
        message.leaf_specs.add(
            kind=spec.kind,
            dtype=spec.dtype,
            shape=spec.shape,
            weak_type=spec.weak_type,
            prng_impl=spec.prng_impl,
        )
    for sharding in shardings.numbers:
        out = message.shardings.add(
            kind=sharding.kind,
            axis_names=sharding.axis_names,
            mesh_shape=sharding.mesh_shape,
            num_devices=sharding.num_devices,
            memory_kind=sharding.memory_kind,
            text=sharding.text,
        )
        for names in sharding.partitions:
            out.partitions.add(axis_names=names)
    return message.SerializeToString(deterministic=True)


def decode(data: bytes, *, foreign: bool = False) -> ObjectGraph:
    """The graph in an unsealed `TrackableObjectGraph` message.

    Args:
      data: the message.
      foreign: whether it may come from TensorFlow, which writes no format version.

    Raises:
      CorruptCheckpointError: the bytes are no such message or contradict themselves.
      UnsupportedFormatError: they come from a newer format.
    """
    message = pb.TrackableObjectGraph()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise CorruptCheckpointError(f"the object graph cannot be parsed: {error}") from error
    if message.format_version > FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"written by format {message.format_version}, this is ckpt_jax {__version__} "
            f"which reads up to {FORMAT_VERSION}; install a newer ckpt_jax"
        )
    if not (message.format_version or foreign):
        raise CorruptCheckpointError("the object graph has no format version")
    try:
        return _decode(message)
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptCheckpointError(f"the object graph contradicts itself: {error}") from error


def _decode(message: pb.TrackableObjectGraph) -> ObjectGraph:
    count = len(message.nodes)
    if not count:
        raise ValueError("it has no nodes")
    specs = [LeafSpec(), *map(_spec, message.leaf_specs)]
    shardings: list[ShardingSpec | None] = [None]
    shardings += [
        ShardingSpec(
            sharding.kind,
            tuple(sharding.axis_names),
            tuple(sharding.mesh_shape),
            tuple(tuple(part.axis_names) for part in sharding.partitions),
            sharding.num_devices,
            sharding.memory_kind,
            sharding.text,
        )
        for sharding in message.shardings
    ]
    nodes = []
    for entry in message.nodes:
        slots = tuple(
            [
                Slot(s.original_variable_node_id, s.slot_name, s.slot_variable_node_id)
                for s in entry.slot_variables
            ]
        )
        children = tuple([(label_of(child), child.node_id) for child in entry.children])
        if len({(child.key_kind, child.local_name) for child in entry.children}) < len(children):
            raise ValueError(f"node {len(nodes)} has two edges of one label")
        ids = [child for _, child in children]
        ids += [node for slot in slots for node in (slot.variable, slot.node)]
        if ids and not (0 <= min(ids) and max(ids) < count):
            raise ValueError(f"node {len(nodes)} refers to a node outside 0..{count - 1}")
        saver = entry.registered_saver
        nodes.append(
            Node(
                entry.container,
                entry.type_name,
                children,
                tuple(
                    [
                        Attribute(
                            value.name,
                            value.checkpoint_key,
                            specs[value.leaf_spec],
                            shardings[value.sharding],
                            value.full_name,
                        )
                        for value in entry.attributes
                    ]
                ),
                slots,
                SaverRef(saver.name, saver.object_name)
                if entry.HasField("registered_saver")
                else None,
                entry.has_checkpoint_values.value
                if entry.HasField("has_checkpoint_values")
                else None,
            )
        )
    return ObjectGraph(tuple(nodes), object_keys(nodes))


_DTYPES = {  # of the kinds that are stored in one way only
    "int": ("int64", "bytes"),
    "bool": ("bool",),
    "float": ("float64",),
    "complex": ("complex128",),
    "str": ("bytes",),
    "bytes": ("bytes",),
    "enum": ("bytes",),
    "python_state": ("bytes",),
}
_ARRAYS = ("", "array", "numpy", "numpy_scalar", "prng_key")


def _spec(message: pb.LeafSpec) -> LeafSpec:
    kind, dtype, shape = message.kind, message.dtype, tuple(message.shape)
    if kind in _ARRAYS:
        sound = dtype != "bytes" and (kind != "numpy_scalar" or not shape)
    else:
        sound = dtype in _DTYPES[kind] and not shape
    if not sound:
        raise ValueError(f"a value of kind {kind!r} cannot be {dtype}{list(shape)}")
    return LeafSpec(kind, dtype, shape, message.weak_type, message.prng_impl)


def label_text(label: Label) -> tuple[str, int]:
    """The text and the `key_kind` of a label."""
    return labels.local_name(label), _KINDS[type(label)]


def label_of(reference: Any) -> Label:
    """The label of an `ObjectReference`, whose text has to be the label's own."""
    label = _FROM_TEXT[reference.key_kind](reference.local_name)
    if labels.local_name(label) != reference.local_name:
        raise ValueError(f"{reference.local_name!r} is not how the label {label!r} is written")
    return label


def object_keys(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The escaped path of each node, along its first breadth-first discovery.

    A node that cannot be reached has the path of its id, which no escaped name equals.
    """
    keys: dict[int, str] = {0: ""}

    def walk(queue: list[int]) -> None:
        for node in queue:  # grows while it is walked
            children = nodes[node].children
            prefix = f"{keys[node]}/" if keys[node] else ""
            names = labels.escaped_names([label for label, _ in children])
            for name, (_, child) in zip(names, children, strict=True):
                if child not in keys:
                    keys[child] = prefix + name
                    queue.append(child)

    walk([0])
    slots: list[int] = []
    for optimizer, node in enumerate(nodes):
        for slot in node.slots:
            if slot.node not in keys and slot.variable in keys and optimizer in keys:
                keys[slot.node] = labels.slot_key(keys[slot.variable], keys[optimizer], slot.name)
                slots.append(slot.node)
    walk(slots)
    return tuple([keys.get(node, f".N{node}") for node in range(len(nodes))])
