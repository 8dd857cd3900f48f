"""Writing a tree as Orbax does: `_METADATA`, one OCDBT database, version 2 of zarr's format.

Every version of Orbax since 0.6 reads this, with StandardCheckpointer or PyTreeCheckpointer. If the
destination is called like a step of a manager (`300`, `run_300`), it becomes one: the tree is then
the item `default` in it.

All arrays are said to be of numpy, so that Orbax looks for no shardings. Arrays are written in
batches, because each transaction with the database writes its tree of keys again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.labels import SAVE_COUNTER, Label, local_name
from ckpt_jax.graph.nodes import Attribute, ObjectGraph
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Export
from ckpt_jax.restoring.formats.orbax.tree import (
    ARRAY_METADATAS,
    METADATA,
    STEP_METADATA,
    STRINGS,
    step_of,
)
from ckpt_jax.store.stream import new_context

_BATCH_NBYTES = 256 << 20
_CHUNK_NBYTES = 16 << 20
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_EMPTY = {"none": "None", "list": "List", "tuple": "List", "namedtuple": "None"}  # else "Dict"
_COMPRESSOR = {"id": "zstd", "level": 1}
_CONFIG = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,  # one node for all keys
    "manifest_kind": "single",
}

Path = tuple[Label, ...]


def write_orbax(export: Export, path: str) -> Sequence[str]:
    """Writes the directory of an item, or of a step.

    Raises:
      UnsaveableError: naming all values that Orbax has no type for.
    """
    leaves = [*_leaves(export.graph)]
    _check(leaves)
    is_step = step_of(os.path.basename(export.destination)) is not None
    directory = os.path.join(path, "default") if is_step else path
    os.makedirs(directory)
    began = time.time_ns()
    _write_values(export, directory, leaves)
    tree = {str(tuple(map(str, path))): _described(path, leaf) for path, leaf in leaves}
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    _write_json(directory, METADATA, metadata)
    step = {
        "item_handlers": {"default": _HANDLER} if is_step else _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": began,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": dict(export.metadata),
    }
    _write_json(path, STEP_METADATA, step)
    return ("",)


def _leaves(graph: ObjectGraph) -> list[tuple[Path, Attribute | str]]:
    """The leaves of a tree with their paths: values, and the types of empty containers.

    They are in depth-first order, because older versions append to lists as they go.
    """
    tree = as_tree(slots_as_children(graph))
    leaves: list[tuple[Path, Attribute | str]] = []
    todo: list[tuple[Path, int]] = [((), 0)]
    while todo:
        path, node = todo.pop()
        entry = tree.nodes[node]
        if path == (SAVE_COUNTER,) and tree.nodes[0].container in ("", "dict"):
            continue  # of a Checkpoint, and not the program's
        for attribute in entry.attributes:
            is_only = entry.has_only(attribute.name) and not entry.children
            leaves.append((path if is_only else (*path, attribute.name), attribute))
        if not (entry.children or entry.attributes):
            leaves.append((path, _EMPTY.get(entry.container, "Dict")))
        labels = [label for label, _ in entry.children]
        is_sequence = entry.container in ("list", "tuple") and labels == [*range(len(labels))]
        for label, child in reversed(entry.children):
            todo.append(((*path, label if is_sequence else local_name(label)), child))
    return leaves


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _check(leaves: Sequence[tuple[Path, Attribute | str]]) -> None:
    count = Counter([_name(path) for path, leaf in leaves if isinstance(leaf, Attribute)])
    problems: list[tuple[str, str]] = []
    for path, leaf in leaves:
        name = _name(path)
        if isinstance(leaf, str):
            continue
        if not path:
            problems.append(("(root)", "Orbax saves trees; put the value into a dict"))
        elif count[name] > 1:
            problems.append((name, f"{count[name]} values would have this name in Orbax"))
        elif what := _why_not(leaf.spec, name):
            problems.append((name, what))
    if problems:
        listed = "\n".join(f"  {name}: {what}" for name, what in problems)
        raise UnsaveableError(
            f"{len(problems)} values cannot be written; nothing was written:\n{listed}\n"
            "Leave them out (only=...), or give them other names (rename=...).",
            tuple(problems),
        )


def _why_not(spec: LeafSpec, name: str) -> str | None:
    """Why Orbax cannot hold a value; None if it can."""
    if spec.kind == "str":
        return "Orbax cannot save a text of this name" if {"~", "/"} & {*name} else None
    if spec.is_bytes:
        return f"Orbax has no type for a value of kind {spec.kind or 'bytes'}"
    if 0 in spec.shape:
        return "Orbax cannot save an array without elements"
    try:
        ts.dtype(dtype_of(spec.dtype))
    except (TypeError, ValueError):
        return f"Orbax cannot save the dtype {spec.dtype}"
    return None


def _described(path: Path, leaf: Attribute | str) -> dict[str, Any]:
    """The entry of a leaf in `_METADATA`."""
    keys = [{"key": str(label), "key_type": 1 if type(label) is int else 2} for label in path]
    kind = leaf if isinstance(leaf, str) else _type_of(leaf.spec)
    value = {"value_type": kind, "skip_deserialize": isinstance(leaf, str)}
    return {"key_metadata": keys, "value_metadata": value}


def _type_of(spec: LeafSpec) -> str:
    if spec.kind == "str":
        return "string"
    if spec.is_key:
        return "jax.Array"  # only these have a note on their implementation
    return "scalar" if spec.is_number else "np.ndarray"


def _write_values(
    export: Export, directory: str, leaves: Sequence[tuple[Path, Attribute | str]]
) -> None:
    texts: dict[str, str] = {}
    keys: list[dict[str, Any]] = []
    with _Database(directory) as database:
        stored = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Attribute)]
        found = export.read_all([leaf.key for _, leaf in stored])
        for (path, leaf), value in zip(stored, found, strict=True):
            name = _name(path)
            if isinstance(value, bytes):
                texts[name] = value.decode("utf-8", "surrogatepass")
                continue
            database.write(name, value)
            if leaf.spec.is_key:
                keys.append(_noted_key(name, leaf.spec))
    if texts:
        _write_json(directory, STRINGS, texts)
    if keys:
        os.mkdir(os.path.join(directory, ARRAY_METADATAS))
        noted = {"array_metadatas": [{"array_metadata": key} for key in keys]}
        _write_json(os.path.join(directory, ARRAY_METADATAS), "process_0", noted)


def _noted_key(name: str, spec: LeafSpec) -> dict[str, Any]:
    shape = list(spec.shape)
    impl = {"random_key_impl": spec.prng_impl}
    return {"param_name": name, "write_shape": shape, "chunk_shape": shape, "ext_metadata": impl}


class _Database:
    """An OCDBT database that is being written, in transactions of bounded size."""

    def __init__(self, directory: str):
        files = {"driver": "file", "path": f"{directory}/"}
        self._kvstore = {"driver": "ocdbt", "base": files, "config": _CONFIG}
        self._context = new_context()
        self._transaction = ts.Transaction()
        self._held = 0
        self._writes: list[ts.WriteFutures] = []

    def __enter__(self) -> _Database:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._commit()
        else:
            self._transaction.abort()

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes an array, in parts if it is large."""
        chunks = _chunks(array.shape, array.dtype.itemsize)
        spec = {
            "driver": "zarr",
            "kvstore": {**self._kvstore, "path": f"{name}/"},
            "dtype": ts.dtype(array.dtype).name,
            "metadata": {"shape": array.shape, "chunks": chunks, "compressor": _COMPRESSOR},
            "store_data_equal_to_fill_value": True,
        }
        store: ts.TensorStore | None = None
        for part in _parts(array.shape, chunks, array.dtype.itemsize):
            nbytes = array[part].nbytes
            if self._held and self._held + nbytes > _BATCH_NBYTES:
                self._commit()
                store = None
            if store is None:
                store = ts.open(
                    spec,
                    create=True,
                    open=True,
                    context=self._context,
                    transaction=self._transaction,
                ).result()
            self._writes.append(store[part].write(array[part]))
            self._held += nbytes

    def _commit(self) -> None:
        for write in self._writes:
            write.result()
        self._transaction.commit_sync()
        self._transaction, self._writes, self._held = ts.Transaction(), [], 0


def _chunks(shape: Sequence[int], itemsize: int) -> list[int]:
    """The shape of chunks: the array's, halved along its longest axes until they are small.

    >>> _chunks((4096, 8192), 4)
    [2048, 2048]
    """
    chunk = [max(n, 1) for n in shape]
    while math.prod(chunk) * itemsize > _CHUNK_NBYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return chunk


def _parts(
    shape: Sequence[int], chunks: Sequence[int], itemsize: int
) -> Iterator[tuple[slice, ...]]:
    """Bands of whole chunks along the first axis, each as large as a batch at most if it can be."""
    if not shape:
        yield ()
        return
    band = math.prod([chunks[0], *shape[1:]]) * itemsize
    rows = chunks[0] * max(1, _BATCH_NBYTES // max(band, 1))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)


def _write_json(directory: str, name: str, value: Any) -> None:
    with open(os.path.join(directory, name), "x", encoding="utf-8") as file:
        json.dump(value, file)
