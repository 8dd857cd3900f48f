"""Writing checkpoints that `tf.train.Checkpoint.restore` and `tf.train.load_checkpoint` read.

Keys, labels and the object graph are those of TensorFlow. Arrays go one after the other into data
files, and the index is written last.

Moments of optax become the slots that optimizers of TensorFlow have for the same numbers, so that
`tf.compat.v1.train` and `tf.keras.optimizers.legacy` go on with them. Newer optimizers of Keras
find their state by the order in which they met their variables. This order is not known here, so
nothing is written for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph._proto import tensor_bundle_pb2 as pb
from ckpt_jax.graph._proto import trackable_object_graph_pb2 as graph_pb
from ckpt_jax.graph._proto.saved_object_graph_pb2 import DT_STRING, DataType
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, attribute_key, local_name
from ckpt_jax.graph.nodes import (
    Attribute,
    ObjectGraph,
    Slot,
    has_values,
    object_keys,
    reachable,
)
from ckpt_jax.readers import Export
from ckpt_jax.restoring.formats.tensorflow import strings
from ckpt_jax.restoring.formats.tensorflow.bundle import DTYPES, VERSION
from ckpt_jax.restoring.formats.tensorflow.checksums import crc_of, mask
from ckpt_jax.restoring.formats.tensorflow.opening import INDEX, data_file
from ckpt_jax.restoring.formats.tensorflow.optimizers import as_tensorflow
from ckpt_jax.restoring.formats.tensorflow.table import table

_TYPES = {name: DataType.Name(number) for number, name in DTYPES.items()}


def write_tensorflow(export: Export, path: str) -> Sequence[str]:
    """Writes `<path>.index` and data files beside it.

    Raises:
      UnsaveableError: naming all values and all names that TensorFlow cannot hold.
    """
    translated = as_tensorflow(_pruned(export.graph))
    graph = translated.graph
    _check(graph)
    values = _values(graph)
    files = _files(values, export.max_shard_nbytes)
    entries: dict[bytes, pb.BundleEntryProto] = {}
    for shard, part in enumerate(files):
        at = 0
        with open(data_file(path, shard, len(files)), "xb") as file:
            contents = export.read_all([value.attribute.key for value in part])
            for value, content in zip(part, contents, strict=True):
                if value.attribute.key in translated.negated:
                    content = -np.asarray(content)
                entry, data = _stored(content, value.attribute)
                entry.shard_id, entry.offset = shard, at
                entries[value.key.encode()] = entry
                at += file.write(data)
            if part is files[-1]:
                data, crc = strings.encode(_message(graph))
                entries[OBJECT_GRAPH_KEY.encode()] = pb.BundleEntryProto(
                    dtype=DT_STRING, shape={}, shard_id=shard, offset=at, size=len(data), crc32c=crc
                )
                file.write(data)
    header = pb.BundleHeaderProto(num_shards=len(files), version={"producer": VERSION})
    with open(path + INDEX, "xb") as file:
        rows = [(key, entry.SerializeToString()) for key, entry in sorted(entries.items())]
        for block in table([(b"", header.SerializeToString()), *rows]):
            file.write(block)
    names = [data_file("", shard, len(files)) for shard in range(len(files))]
    return (*names, INDEX)


def _pruned(graph: ObjectGraph) -> ObjectGraph:
    """The graph without nodes that nothing leads to."""
    kept = sorted(reachable(graph, [0]))
    ids = {node: i for i, node in enumerate(kept)}
    nodes = [
        replace(
            graph.nodes[node],
            children=tuple([(label, ids[child]) for label, child in graph.nodes[node].children]),
            slots=tuple(
                [
                    Slot(ids[slot.variable], slot.name, ids[slot.node])
                    for slot in graph.nodes[node].slots
                ]
            ),
        )
        for node in kept
    ]
    return ObjectGraph(tuple(nodes), object_keys(nodes))


def _check(graph: ObjectGraph) -> None:
    problems = [
        (graph.value_path(node, a.name), f"TensorFlow cannot hold {a.spec}")
        for node, a in graph.attributes()
        if not a.spec.is_bytes and a.spec.dtype not in _TYPES
    ]
    for node, entry in enumerate(graph.nodes):
        count = Counter([local_name(label) for label, _ in entry.children])
        problems += [
            (graph.paths[node], f"it has several keys that TensorFlow calls {name!r}")
            for name, times in count.items()
            if times > 1
        ]
    if problems:
        listed = "\n".join(f"  {path}: {what}" for path, what in problems)
        raise UnsaveableError(
            f"{len(problems)} values cannot be written; nothing was written:\n{listed}\n"
            "Leave them out (only=...), convert them (cast=...), or rename them (rename=...).",
            tuple(problems),
        )


@dataclass(frozen=True, slots=True)
class _Value:
    """A value, and the key that it gets."""

    key: str
    attribute: Attribute

    @property
    def nbytes(self) -> int:
        """The size of an array. That of a string is not known, and is small."""
        spec = self.attribute.spec
        return 0 if spec.is_bytes else math.prod(spec.shape) * dtype_of(spec.dtype).itemsize


def _values(graph: ObjectGraph) -> list[_Value]:
    return [
        _Value(attribute_key(key, attribute.name), attribute)
        for key, node in zip(graph.object_keys, graph.nodes, strict=True)
        for attribute in node.attributes
    ]


def _files(values: Sequence[_Value], limit: int) -> list[list[_Value]]:
    """The values of each data file. A value that is larger than the limit has one of its own."""
    files: list[list[_Value]] = [[]]
    held = 0
    for value in values:
        if files[-1] and held + value.nbytes > limit:
            files.append([])
            held = 0
        files[-1].append(value)
        held += value.nbytes
    return files


def _stored(
    content: np.ndarray | bytes, attribute: Attribute
) -> tuple[pb.BundleEntryProto, bytes | memoryview]:
    """The entry of a value, without its place, and its bytes in a data file."""
    if isinstance(content, bytes):
        data, crc = strings.encode(content)
        return pb.BundleEntryProto(dtype=DT_STRING, shape={}, size=len(data), crc32c=crc), data
    spec = attribute.spec
    array = np.ascontiguousarray(content, dtype_of(spec.dtype))
    data = array.reshape(-1).view(np.uint8).data
    dims = [{"size": n} for n in spec.shape]
    crc = mask(crc_of(data))
    return pb.BundleEntryProto(
        dtype=_TYPES[spec.dtype], shape={"dim": dims}, size=len(data), crc32c=crc
    ), data


def _message(graph: ObjectGraph) -> bytes:
    """The object graph as TensorFlow writes it."""
    message = graph_pb.TrackableObjectGraph()
    own = [bool(node.attributes or node.slots) for node in graph.nodes]
    has = has_values(own, [node.children for node in graph.nodes])
    for number, (node, key) in enumerate(zip(graph.nodes, graph.object_keys, strict=True)):
        out = message.nodes.add()
        for label, child in node.children:
            out.children.add(node_id=child, local_name=local_name(label))
        for attribute in node.attributes:
            out.attributes.add(
                name=attribute.name,
                full_name=attribute.full_name,
                checkpoint_key=attribute_key(key, attribute.name),
            )
        for slot in node.slots:
            out.slot_variables.add(
                original_variable_node_id=slot.variable,
                slot_name=slot.name,
                slot_variable_node_id=slot.node,
            )
        out.has_checkpoint_values.value = has[number]
    return message.SerializeToString(deterministic=True)
