"""Saved objects: how each object of an object graph is recreated; the codec of `SavedObjectGraph`.

The object graph says where the values of a program's objects are stored. A `SavedObject` says
what one node's object is. Either a registered class makes it, from the message that the class
wrote, or it has one of a few kinds that need no class:

    object    an object of a class; a plain AutoTrackable if the class is not registered
    variable  a mutable box for one value
    list, tuple, dict, none
    value     an array, a number or a string; its leaf spec says which

Both graphs have the same nodes and edges. A file in which they differ is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from ckpt_jax.graph import plain
from ckpt_jax.graph._proto import saved_object_graph_pb2 as pb
from ckpt_jax.graph.codec import (
    add_references,
    add_slots,
    check_version,
    decoding,
    references,
    slots_of,
)
from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, is_label
from ckpt_jax.graph.nodes import Node, ObjectGraph
from ckpt_jax.graph.specs import LeafSpec

FORMAT_VERSION = 1

OBJECT, VARIABLE, VALUE, NONE = "object", "variable", "value", "none"
LIST, TUPLE, DICT = "list", "tuple", "dict"
CONTAINERS = (LIST, TUPLE, DICT)  # made after their children

T = TypeVar("T", bound=Hashable)

# The names of DataType's numbers are "DT_" and our name of the dtype in capitals, but for these.
_IRREGULAR = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "HALF", "bytes": "STRING"}
_REGULAR = {number: name.removeprefix("DT_").lower() for name, number in pb.DataType.items()}
_DTYPE_NAMES = {**_REGULAR, **{pb.DataType.Value(f"DT_{v}"): k for k, v in _IRREGULAR.items()}}
_DTYPE_NUMBERS = {name: number for number, name in _DTYPE_NAMES.items() if number}


class PlainPart(NamedTuple):
    """An element of a list or dict that is plain data and no state, so that it is no node.

    Attributes:
      position: among all elements, the nodes included.
      label: of the element.
      value: numbers, strings, None, or lists, tuples and dicts of them.
    """

    position: int
    label: Label
    value: Any


class FunctionRecord(NamedTuple):
    """A function that was saved with the objects.

    Attributes:
      inputs: nodes whose values are given to the function before the caller's arguments.
      arguments: the signature of the caller's arguments, as JSON.
      outputs: the signature of what it returns, as JSON.
      artifact: the entry of the checkpoint that holds the compiled function.
      exported_by: the program that compiled it.
      calling_convention: of `jax.export`.
      platforms: that it was compiled for.
    """

    inputs: tuple[int, ...]
    arguments: str
    outputs: str
    artifact: str
    exported_by: str
    calling_convention: int
    platforms: tuple[str, ...]


Functions = Mapping[str, FunctionRecord]


@dataclass(frozen=True, slots=True)
class SavedObject:
    """How the object of one node is recreated.

    Attributes:
      kind: one of the kinds that the module lists.
      registered_name: the name of its registered class; "" if there is none.
      message: the message that the class wrote; None if it wrote nothing.
      dependencies: (name, node) of each object that has to exist before the class can make this
        one.
      spec: what its value is, if a registered saver holds the value. Otherwise the object graph
        says it, and this is None.
      plain_parts: of a list or dict, in the order of their positions.
    """

    kind: str
    registered_name: str = ""
    message: AnyMessage | None = None
    dependencies: tuple[tuple[str, int], ...] = ()
    spec: LeafSpec | None = None
    plain_parts: tuple[PlainPart, ...] = ()


def packed(message: Any) -> AnyMessage | None:
    """A message that a class wrote, packed for the file.

    Raises:
      TypeError: the class wrote something that is no protobuf message.
    """
    if message is None or isinstance(message, AnyMessage):
        return message
    if not isinstance(message, Message):
        raise TypeError(f"expected a protobuf message or None, got {type(message).__name__}")
    result = AnyMessage()
    result.Pack(message, deterministic=True)
    return result


def with_plain_parts(
    saved: SavedObject, parts: Iterable[tuple[Label, Any]]
) -> list[tuple[Label, Any]]:
    """All elements of a container: its parts that are nodes, and its plain ones in between.

    >>> with_plain_parts(SavedObject(LIST, plain_parts=(PlainPart(0, 0, "x"),)), [(1, "node")])
    [(0, 'x'), (1, 'node')]
    """
    every = [*parts]
    for part in saved.plain_parts:
        every.insert(part.position, (part.label, part.value))
    return every


def has_dtype_number(dtype: str) -> bool:
    """Whether `SavedVariable` has a number for this dtype."""
    return dtype in _DTYPE_NUMBERS


def needs(graph: ObjectGraph, objects: Sequence[SavedObject], node: int) -> list[int]:
    """The nodes that have to be made before `node`: dependencies, and a container's children."""
    saved = objects[node]
    children = graph.nodes[node].children if saved.kind in CONTAINERS else ()
    return [needed for _, needed in (*saved.dependencies, *children)]


def in_order(graph: ObjectGraph, objects: Sequence[SavedObject], nodes: Iterable[int]) -> list[int]:
    """Nodes in an order in which they can be made.

    Raises:
      CyclicDependencyError: there is no such order.
    """
    return order_by_dependency({node: needs(graph, objects, node) for node in nodes})


class CyclicDependencyError(ValueError):
    """Objects depend on each other in a cycle.

    Attributes:
      cycle: the objects of the cycle; the first one is repeated at the end.
    """

    def __init__(self, cycle: tuple[Any, ...]):
        super().__init__(f"dependencies form a cycle: {' -> '.join(map(str, cycle))}")
        self.cycle = cycle


def order_by_dependency(dependencies: Mapping[T, Iterable[T]]) -> list[T]:
    """All keys, each after those that it depends on.

    Args:
      dependencies: for each key, the keys that have to come before it.

    Raises:
      ValueError: a dependency is no key.
      CyclicDependencyError: there is no such order.

    >>> order_by_dependency({"roof": ["walls"], "walls": ["ground"], "ground": []})
    ['ground', 'walls', 'roof']
    """
    known = {key: list(needed) for key, needed in dependencies.items()}
    unknown = {need for needed in known.values() for need in needed} - known.keys()
    if unknown:
        raise ValueError(f"dependencies that are not in the map: {sorted(map(str, unknown))}")
    try:
        return list(TopologicalSorter(known).static_order())
    except CycleError as error:
        raise CyclicDependencyError(tuple(reversed(error.args[1]))) from None


# --- to a message ----------------------------------------------------------------------


def encode(
    graph: ObjectGraph,
    objects: Sequence[SavedObject],
    functions: Functions = MappingProxyType({}),
) -> bytes:
    """The objects and functions of a graph as an unsealed `SavedObjectGraph` message."""
    message = pb.SavedObjectGraph(format_version=FORMAT_VERSION)
    for number, (node, saved) in enumerate(zip(graph.nodes, objects, strict=True)):
        out = message.nodes.add(registered_name=saved.registered_name)
        add_references(out.children, node.children)
        add_references(out.dependencies, saved.dependencies)
        add_slots(out.slot_variables, node.slots)
        if saved.message is not None:
            out.serialized_user_proto.CopyFrom(saved.message)
        if node.saver is not None:
            out.registered_saver = node.saver.name
        if saved.kind == VARIABLE:
            _encode_variable(out.variable, graph.paths[number], saved.spec or _only_spec(node))
        else:
            out.user_object.identifier = saved.kind
            out.user_object.version.producer = FORMAT_VERSION
            out.user_object.version.min_consumer = FORMAT_VERSION
            if saved.spec is not None:
                out.user_object.metadata = _spec_text(saved.spec)
            elif saved.plain_parts:
                parts = [[*part] for part in saved.plain_parts]
                out.user_object.metadata = plain.encode(parts)
    for name, function in functions.items():
        traced = message.concrete_functions[name]
        traced.bound_inputs.extend(function.inputs)
        traced.canonicalized_input_signature = function.arguments.encode()
        traced.output_signature = function.outputs.encode()
        traced.artifact = function.artifact
        traced.exported_by = function.exported_by
        traced.calling_convention = function.calling_convention
        traced.platforms.extend(function.platforms)
    return message.SerializeToString(deterministic=True)


def _only_spec(node: Node) -> LeafSpec:
    (attribute,) = node.attributes
    return attribute.spec


def _encode_variable(out: Any, path: str, spec: LeafSpec) -> None:
    out.name = path
    out.dtype = _DTYPE_NUMBERS.get(spec.dtype, 0)
    out.shape.SetInParent()
    for size in spec.shape:
        out.shape.dim.add(size=size)


def _spec_text(spec: LeafSpec) -> str:
    return ":".join([spec.kind, spec.dtype, ",".join(map(str, spec.shape))])


# --- from a message --------------------------------------------------------------------


def decode(data: bytes, graph: ObjectGraph) -> tuple[SavedObject, ...]:
    """The objects in an unsealed `SavedObjectGraph` message of the checkpoint that has `graph`.

    Raises:
      CorruptCheckpointError: the bytes are no such message, or contradict themselves or `graph`.
      UnsupportedFormatError: they come from a newer format.
    """
    with decoding("list of saved objects"):
        message = _message(data, graph)
        return tuple([_object(n, entry, graph) for n, entry in enumerate(message.nodes)])


def decode_functions(data: bytes, graph: ObjectGraph) -> Functions:
    """The functions in an unsealed `SavedObjectGraph` message of the checkpoint that has `graph`.

    Raises:
      CorruptCheckpointError: the bytes are no such message, or a function takes what is no value.
      UnsupportedFormatError: they come from a newer format.
    """
    with decoding("list of saved functions"):
        message = _message(data, graph)
        return {
            name: _function(name, each, graph) for name, each in message.concrete_functions.items()
        }


def _message(data: bytes, graph: ObjectGraph) -> Any:
    message = pb.SavedObjectGraph.FromString(data)
    check_version(message.format_version, FORMAT_VERSION)
    if len(message.nodes) != len(graph.nodes):
        raise ValueError(f"{len(message.nodes)} objects for {len(graph.nodes)} nodes")
    return message


def _function(name: str, entry: Any, graph: ObjectGraph) -> FunctionRecord:
    for node in entry.bound_inputs:
        names = (
            [a.name for a in graph.nodes[node].attributes] if 0 <= node < len(graph.nodes) else []
        )
        if names != [VARIABLE_VALUE]:
            raise ValueError(f"the function {name!r} takes node {node}, which is no value")
    if not entry.artifact:
        raise ValueError(f"the function {name!r} has no artifact")
    return FunctionRecord(
        tuple(entry.bound_inputs),
        entry.canonicalized_input_signature.decode(),
        entry.output_signature.decode(),
        entry.artifact,
        entry.exported_by,
        entry.calling_convention,
        tuple(entry.platforms),
    )


def _object(number: int, entry: Any, graph: ObjectGraph) -> SavedObject:
    node = graph.nodes[number]
    where = graph.paths[number] or "(root)"
    saver = node.saver.name if node.saver else ""
    edges = references(entry.children), slots_of(entry.slot_variables), entry.registered_saver
    if edges != (node.children, node.slots, saver):
        raise ValueError(f"{where}: its edges or saver differ from those in the object graph")
    dependencies = references(entry.dependencies)
    names = [name for name, _ in dependencies if isinstance(name, str)]
    if len(set(names)) < len(dependencies):
        raise ValueError(f"{where}: two dependencies have one name, or one has none")
    if not all(0 <= child < len(graph.nodes) for _, child in dependencies):
        raise ValueError(f"{where}: depends on a node that does not exist")
    kind = _kind(entry, where)
    saved = SavedObject(
        kind,
        entry.registered_name,
        entry.serialized_user_proto if entry.HasField("serialized_user_proto") else None,
        tuple((name, child) for name, (_, child) in zip(names, dependencies, strict=True)),
        _decode_spec(entry) if saver and kind in (VALUE, VARIABLE) else None,
        _decode_plain_parts(entry, where) if kind in (LIST, DICT) else (),
    )
    if not _FITS[saved.kind](saved, node):
        raise ValueError(f"{where}: its values or edges do not fit the kind {saved.kind}")
    if dependencies and not saved.registered_name:
        raise ValueError(f"{where}: has dependencies, but no class that could use them")
    return saved


def _kind(entry: Any, where: str) -> str:
    which = entry.WhichOneof("kind")
    kind = VARIABLE if which == "variable" else entry.user_object.identifier
    if which not in ("variable", "user_object") or kind not in _FITS:
        raise ValueError(f"{where}: the kind {kind or which!r} is unknown")
    if entry.user_object.version.min_consumer > FORMAT_VERSION:
        raise ValueError(f"{where}: only a newer ckpt_jax can read it")
    return kind


def _decode_spec(entry: Any) -> LeafSpec | None:
    if entry.WhichOneof("kind") == "variable":
        dtype = _DTYPE_NAMES[entry.variable.dtype] if entry.variable.dtype else ""
        return LeafSpec("array", dtype, _shape(dim.size for dim in entry.variable.shape.dim))
    if not entry.user_object.metadata:
        return None
    kind, dtype, shape = entry.user_object.metadata.split(":")
    return LeafSpec(kind, dtype, _shape(int(size) for size in shape.split(",") if size))


def _decode_plain_parts(entry: Any, where: str) -> tuple[PlainPart, ...]:
    text = entry.user_object.metadata
    found = plain.decode(text) if text else []
    is_sound = isinstance(found, list) and all(
        isinstance(part, list)
        and len(part) == len(PlainPart._fields)
        and isinstance(part[0], int)
        and is_label(part[1])
        for part in found
    )
    if not is_sound:
        raise ValueError(f"{where}: plain parts that are no list of [position, label, value]")
    return tuple([PlainPart(at, label, plain.without_labels(value)) for at, label, value in found])


def _shape(sizes: Any) -> tuple[int, ...]:
    shape = tuple(sizes)
    if any(size < 0 for size in shape):
        raise ValueError(f"a shape has no negative sizes: {shape}")
    return shape


def _is_leaf(saved: SavedObject, node: Node) -> bool:
    """Whether it has one value, and the object graph or a registered saver holds that."""
    if node.children or (saved.registered_name and saved.kind == VALUE):
        return False
    if node.saver is not None:
        return not node.attributes and saved.spec is not None
    return [attribute.name for attribute in node.attributes] == [VARIABLE_VALUE]


def _is_sequence(saved: SavedObject, node: Node) -> bool:
    labels = [label for label, _ in with_plain_parts(saved, node.children)]
    return _is_container(saved, node) and labels == list(range(len(labels)))


def _is_container(saved: SavedObject, node: Node) -> bool:
    labels = {label for label, _ in node.children}
    labels |= {part.label for part in saved.plain_parts}
    is_distinct = len(labels) == len(node.children) + len(saved.plain_parts)
    return is_distinct and (bool(saved.registered_name) or not node.attributes)


def _is_object(saved: SavedObject, node: Node) -> bool:
    return _is_container(saved, node) and all(isinstance(label, str) for label, _ in node.children)


def _is_none(saved: SavedObject, node: Node) -> bool:
    return not (node.children or node.attributes or saved.registered_name)


_FITS: dict[str, Callable[[SavedObject, Node], bool]] = {
    OBJECT: _is_object,
    VARIABLE: _is_leaf,
    VALUE: _is_leaf,
    NONE: _is_none,
    LIST: _is_sequence,
    TUPLE: _is_sequence,
    DICT: _is_container,
}
