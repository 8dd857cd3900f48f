"""TensorFlow's checkpoints: `tf.train.Checkpoint`, SavedModels, and name-based ones (TF 1).

A checkpoint is named by its *prefix* P: `P.index` says what is in `P.data-00000-of-00001`, and
further data files. A SavedModel is a directory, with the prefix `variables/variables`. TensorFlow
is not needed to read them.

An object-based checkpoint holds its object graph as a byte string. Without it, values are called by
the global names of their variables. Files of the first version (V1, before 2017) end with the same
magic number, but are single files; they are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.dtypes import BYTES
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Checksum, Extent, ExtentsReader, Files, Stored
from ckpt_jax.restoring.formats.numbered import numbered_in
from ckpt_jax.restoring.formats.tensorflow import object_graph, strings
from ckpt_jax.restoring.formats.tensorflow.bundle import Bundle, Bytes, Tensor, read_bundle
from ckpt_jax.restoring.formats.tensorflow.checksums import unmask
from ckpt_jax.restoring.formats.tensorflow.table import MAGIC
from ckpt_jax.store.looks import is_directory, is_file, names_in, tail_of
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.objects import is_url
from ckpt_jax.values.host import without_gc

INDEX = ".index"

_DATA = re.compile(r"\.data-\d{5,}-of-\d{5,}\Z")
_NUMBERED = re.compile(r".*-(\d+)\.index", re.DOTALL)
_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt")
_VARIABLES = os.path.join("variables", "variables")


def recognises(path: str) -> bool:
    """Whether TensorFlow wrote what is at a path.

    An index counts if it ends as one, or, since it may be cut off, if there is a data file.
    """
    if is_directory(path):
        if is_file(os.path.join(path, MANIFEST)):  # a checkpoint of this library
            return False
        return is_saved_model(path) or _is_table(path + INDEX)
    if is_file(path):
        return _is_table(path) or bool(_DATA.search(path) and _is_table(_DATA.sub(INDEX, path)))
    return _is_table(path + INDEX) or (is_file(path + INDEX) and _has_data(path))


def _has_data(prefix: str) -> bool:
    directory, name = os.path.split(prefix)
    with suppress(OSError):
        names = [file for file in names_in(directory) if file.startswith(name)]
        found = [file.removeprefix(name) for file in names]
        return any(map(_DATA.fullmatch, found))
    return False


def is_saved_model(path: str) -> bool:
    """Whether a path is the directory of a SavedModel."""
    return any(is_file(os.path.join(path, name)) for name in _SAVED_MODEL)


def _is_table(file: str) -> bool:
    return tail_of(file, len(MAGIC)) == MAGIC


def data_file(prefix: str, shard: int, shards: int) -> str:
    """The name of a data file.

    >>> data_file("ckpt-1", 0, 1)
    'ckpt-1.data-00000-of-00001'
    """
    return f"{prefix}.data-{shard:05d}-of-{shards:05d}"


def steps(directory: str) -> Mapping[int, str]:
    """The checkpoints in a directory by their number: the prefixes `<name>-<number>`."""
    found = numbered_in(directory, _NUMBERED, _is_table)
    return {number: path.removesuffix(INDEX) for number, path in found.items()}


@without_gc()
def open_checkpoint(path: str) -> ExtentsReader:
    """Opens a checkpoint by its prefix, or a SavedModel by its directory.

    Raises:
      CorruptCheckpointError: it is damaged.
      UnsupportedFormatError: it is of version 1, or of a newer version.
    """
    prefix = os.path.join(path, _VARIABLES) if is_saved_model(path) else path
    index = prefix + INDEX
    if not is_file(index):
        raise UnsupportedFormatError(f"{path}: {_why_not(path)}")
    files = Files(path)
    files.fetch_whole(index)
    try:
        bundle = read_bundle(partial(files.read, index), files.size(index))
    except ValueError as error:
        raise files.damage(index, str(error)) from error
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{index}: {error}") from error
    if is_url(prefix):
        files.expect(_ends(prefix, bundle))
    values = {key: _stored(files, prefix, bundle, key) for key in bundle.tensors}
    graph = values.pop(OBJECT_GRAPH_KEY, None)
    reader = ExtentsReader(path, values, lambda: _graph(files, index, reader, graph), files)
    return reader


def _ends(prefix: str, bundle: Bundle) -> dict[str, int]:
    """Where the last value ends in each data file."""
    ends: dict[str, int] = {}
    for tensor in bundle.tensors.values():
        for _, part in tensor.parts:
            file = data_file(prefix, part.shard, bundle.shards)
            ends[file] = max(part.offset + part.nbytes, ends.get(file, 0))
    return ends


def _why_not(path: str) -> str:
    """Why something that looks like a checkpoint of TensorFlow is none that can be opened."""
    if is_saved_model(path):
        return f"expected a SavedModel with {_VARIABLES}{INDEX}, found none. It holds no values"
    prefix = _DATA.sub("", path.removesuffix(INDEX))
    if prefix != path:
        return f"this is a part of a checkpoint of TensorFlow. Pass its prefix: {prefix!r}"
    return (
        "this is a checkpoint of TensorFlow in its first format (V1), which cannot be read here. "
        "Restore it with TensorFlow, and save it with tf.compat.v1.train.Saver(), which writes V2"
    )


def _graph(files: Files, index: str, reader: ExtentsReader, graph: Stored | None) -> ObjectGraph:
    specs = reader.index.specs
    try:
        if graph is None:
            return graph_of(specs, "/")
        if not callable(graph.contents):
            raise ValueError(f"expected a byte string, got {graph.spec}")
        buffer = bytearray(graph.nbytes)
        graph.contents(memoryview(buffer))
        return object_graph.decode(bytes(buffer), specs)
    except ValueError as error:
        key = None if graph is None else OBJECT_GRAPH_KEY
        raise CorruptCheckpointError(
            f"{key or reader.path}: {error}", file=index, key=key
        ) from error


def _stored(files: Files, prefix: str, bundle: Bundle, key: str) -> Stored:
    tensor = bundle.tensors[key]
    if tensor.is_string:
        return _string(files, prefix, bundle, key)
    if not tensor.dtype:
        return Stored(_refused(tensor))
    extents = [
        Extent(
            box,
            data_file(prefix, part.shard, bundle.shards),
            part.offset,
            checksum=Checksum("crc32c", unmask(part.crc)),
        )
        for box, part in tensor.parts
    ]
    spec = LeafSpec("numpy", tensor.dtype, tensor.shape)
    finish = _swap if bundle.is_big_endian else None
    return Stored(spec, tuple(extents), finish=finish, damage=tensor.problem)


def _refused(tensor: Tensor) -> LeafSpec:
    note = (
        f"it holds {tensor.what} of TensorFlow, which no array of numpy or JAX can hold. Make it "
        "again in the program"
    )
    return LeafSpec("unreadable", "object", tensor.shape, note=note)


def _string(files: Files, prefix: str, bundle: Bundle, key: str) -> Stored:
    ((_, where),) = bundle.tensors[key].parts
    file = data_file(prefix, where.shard, bundle.shards)
    length = strings.length_in(where.nbytes)
    if length is None:
        raise files.damage(file, f"{where.nbytes} bytes are no string", key)

    def fill(buffer: memoryview) -> None:
        try:
            buffer[:] = strings.decode(files.read(file, where.offset, where.nbytes), where.crc)
        except ValueError as error:
            raise files.damage(file, str(error), key) from error

    if where.offset + where.nbytes > files.size(file):
        raise files.damage(file, _too_short(files.size(file), where), key)
    return Stored(LeafSpec("bytes", BYTES), (Extent((), file, 0),), length, fill)


def _too_short(size: int, where: Bytes) -> str:
    end = where.offset + where.nbytes
    return f"it has {size} bytes, the value lies at {where.offset} to {end}"


def _swap(array: np.ndarray) -> None:
    """Changes the byte order of an array in place."""
    array.byteswap(inplace=True)
