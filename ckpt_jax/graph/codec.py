"""Codec: turns an object graph into the bytes of a `TrackableObjectGraph`, and back.

Bytes from a file may contain anything. So ids, labels, specs and the format version are checked
before a graph is made of them. Paths are not stored; they follow from the edges.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph import labels
from ckpt_jax.graph._proto import trackable_object_graph_pb2 as pb
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import (
    FORMAT_VERSION,
    Attribute,
    Node,
    ObjectGraph,
    SaverRef,
    Slot,
    object_keys,
)
from ckpt_jax.graph.specs import DTYPES_OF_KIND, LeafSpec, ShardingSpec
from ckpt_jax.version import __version__

_WITHOUT_NEW_KINDS = 1  # the version of a graph that has labels of the older kinds alone

_Reference = pb.TrackableObjectGraph.TrackableObject.ObjectReference
_KINDS: dict[type, int] = {
    str: _Reference.STRING,
    int: _Reference.INT,
    bool: _Reference.BOOL,
    float: _Reference.FLOAT,
    bytes: _Reference.BYTES,
    type(None): _Reference.NONE,
    tuple: _Reference.TUPLE,
    labels.EnumKey: _Reference.ENUM,
}
_NUMBERS = (_Reference.INT, _Reference.BOOL, _Reference.FLOAT)
_NEW_KINDS = (_Reference.TUPLE, _Reference.ENUM)  # that version 1 lacks
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
    """The graph as the bytes of an unsealed `TrackableObjectGraph` message."""
    return to_message(graph).SerializeToString(deterministic=True)


def to_message(graph: ObjectGraph) -> pb.TrackableObjectGraph:
    """The graph as a `TrackableObjectGraph` message."""
    message = pb.TrackableObjectGraph()
    has_new_kinds = False
    specs, shardings = _Table(), _Table()
    add = message.nodes.add
    for node in graph.nodes:
        out = add(container=node.container, type_name=node.type_name)
        if node.children:
            has_new_kinds |= add_references(out.children, node.children)
        for attribute in node.attributes:
            out.attributes.add(
                name=attribute.name,
                full_name=attribute.full_name,
                checkpoint_key=attribute.key,
                leaf_spec=specs.number(attribute.spec),
                sharding=shardings.number(attribute.sharding),
            )
        if node.slots:
            add_slots(out.slot_variables, node.slots)
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
            enum_class=spec.enum_class,
            cast_from=spec.cast_from,
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
    message.format_version = FORMAT_VERSION if has_new_kinds else _WITHOUT_NEW_KINDS
    return message


def decode(data: bytes) -> ObjectGraph:
    """The graph in an unsealed `TrackableObjectGraph` message.

    Raises:
      CorruptCheckpointError: the bytes are no such message or contradict themselves. A graph
        that TensorFlow wrote is refused, too: it has no format version.
      UnsupportedFormatError: they come from a newer format.
    """
    with decoding("object graph"):
        message = pb.TrackableObjectGraph.FromString(data)
        check_version(message.format_version, FORMAT_VERSION)
        return _decode(message)


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Raises errors of the block as a CorruptCheckpointError that says that `what` is damaged."""
    try:
        yield
    except DecodeError as error:
        raise CorruptCheckpointError(f"the {what} cannot be parsed: {error}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptCheckpointError(f"the {what} contradicts itself: {error}") from error


def check_version(found: int, known: int) -> None:
    """Checks that this library reads the format version of a message."""
    if not found:
        raise CorruptCheckpointError("there is no format version")
    if found > known:
        raise UnsupportedFormatError(
            f"written in format {found}, but this is ckpt_jax {__version__}, which reads formats "
            f"up to {known}; install a newer ckpt_jax"
        )


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
        slots = slots_of(entry.slot_variables)
        children = references(entry.children)
        if len({_identity(child) for child in entry.children}) < len(children):
            raise ValueError(f"node {len(nodes)} has two edges with the same label")
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


def _spec(message: pb.LeafSpec) -> LeafSpec:
    spec = LeafSpec(
        message.kind,
        message.dtype,
        tuple(message.shape),
        message.weak_type,
        message.prng_impl,
        message.enum_class,
        message.cast_from,
    )
    if spec.is_array or spec.is_key:
        sound = not spec.is_bytes and (spec.kind != "numpy_scalar" or not spec.shape)
    else:
        sound = spec.dtype in DTYPES_OF_KIND.get(spec.kind, ()) and not spec.shape
    if spec.cast_from and not spec.is_array:
        raise ValueError(f"a value of kind {spec.kind!r} cannot have been cast")
    if not sound:
        raise ValueError(f"a value of kind {spec.kind!r} cannot be {spec.dtype}{list(spec.shape)}")
    return spec


# --- edges -----------------------------------------------------------------------------


def add_references(out: Any, edges: Iterable[tuple[Label, int]]) -> bool:
    """Adds an `ObjectReference` for each edge. Returns whether version 1 lacks a label's kind."""
    has_new_kinds = False
    for label, child in edges:
        if type(label) in labels.PLAIN_LABELS:
            name = labels.local_name(label)
            out.add(node_id=child, local_name=name, key_kind=_KINDS[type(label)])
            continue
        plain = labels.canonical(label)
        kind, name = _KINDS[type(plain)], labels.local_name(plain)
        reference = out.add(node_id=child, local_name=name, key_kind=kind, **_details(label))
        _add_parts(reference.key_parts, label, plain)
        has_new_kinds |= kind in _NEW_KINDS
    return has_new_kinds


def _add_parts(out: Any, label: Label, plain: Label) -> None:
    """Adds the parts of a label, if it is a tuple; `plain` is its canonical form."""
    if not isinstance(plain, tuple):
        return
    for part in label if isinstance(label, tuple) else plain:
        simple = labels.canonical(part)
        kind, text = _KINDS[type(simple)], labels.local_name(simple)
        _add_parts(out.add(text=text, kind=kind, **_details(part)).parts, part, simple)


def _details(label: Label) -> dict[str, str]:
    """The fields of a label that its text and kind do not say."""
    match label:
        case np.bool_() | np.number():
            return {"numpy_type": label.dtype.name}
        case enum.Enum():
            return {"enum_class": labels.enum_class_of(label)}
        case labels.EnumKey() | labels.EnumScalar():
            return {"enum_class": label.enum_class}
    return {}


def references(entries: Any) -> tuple[tuple[Label, int], ...]:
    """The inverse of `add_references`."""
    return tuple([(_label(entry), entry.node_id) for entry in entries])


def _label(reference: Any) -> Label:
    """The label of an `ObjectReference`. Its text has to be how that label is written."""
    kind, text = reference.key_kind, reference.local_name
    return _checked_label(kind, text, reference.key_parts, reference)


def _checked_label(kind: int, text: str, parts: Any, details: Any) -> Label:
    label: Label
    if kind == _Reference.TUPLE:
        label = tuple([_checked_label(part.kind, part.text, part.parts, part) for part in parts])
    elif kind == _Reference.ENUM:
        label = labels.EnumKey(text, details.enum_class)
    else:
        label = _FROM_TEXT[kind](text)
        if details.numpy_type and kind in _NUMBERS:
            label = _numpy_scalar(label, details.numpy_type)
    if details.enum_class and kind != _Reference.ENUM:
        label = labels.EnumScalar(label, details.enum_class)
    if labels.local_name(label) != text:
        raise ValueError(f"{text!r} is not how the label {label!r} is written")
    return label


def _numpy_scalar(value: Any, name: str) -> Label:
    try:
        scalar = dtype_of(name).type(value)
    except OverflowError as error:
        raise ValueError(f"{value!r} is no {name}") from error
    if not labels.is_label(scalar):
        raise ValueError(f"{value!r} is no label as {name}")
    return scalar


def _identity(reference: Any) -> tuple[Any, ...]:
    """A key that differs if the labels of two `ObjectReference`s differ."""
    kind = reference.key_kind
    return kind, reference.local_name, _label(reference) if kind in _NEW_KINDS else None


def add_slots(out: Any, slots: Iterable[Slot]) -> None:
    """Adds a `SlotVariableReference` for each slot."""
    for slot in slots:
        out.add(
            original_variable_node_id=slot.variable,
            slot_name=slot.name,
            slot_variable_node_id=slot.node,
        )


def slots_of(entries: Any) -> tuple[Slot, ...]:
    """The inverse of `add_slots`."""
    return tuple(
        [
            Slot(entry.original_variable_node_id, entry.slot_name, entry.slot_variable_node_id)
            for entry in entries
        ]
    )
