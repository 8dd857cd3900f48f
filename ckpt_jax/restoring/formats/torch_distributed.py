"""Directories of torch.distributed.checkpoint (DCP): arrays in chunks, over the files of all ranks.

The file `.metadata` is a pickle, which is read as data (`pickled`). It says of which chunks each
array consists, and where each chunk lies: a part of a file `*.distcp` that is a file of
`torch.save` of its own. Names are split at ".".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.errors import CheckpointError, UnsupportedFormatError
from ckpt_jax.graph.boxes import Box, shape_of, whole
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.cursor import Cursor
from ckpt_jax.restoring.formats.names import graph_of_tree
from ckpt_jax.restoring.formats.pickled import Call, Global, read_pickle
from ckpt_jax.restoring.formats.torch import read_archive, sizes_of, tensor_of, tree_of
from ckpt_jax.restoring.formats.zips import Archive
from ckpt_jax.store.looks import head_of, is_file
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.remote import together

_METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_MAX_LISTED = 8


def open_distributed(path: str) -> ExtentsReader:
    """Opens a directory.

    Raises:
      CorruptCheckpointError: it is damaged, or files are missing.
    """
    files = Files(path)
    file = os.path.join(path, _METADATA)
    files.fetch_whole(file)
    try:
        cursor = Cursor(files, file)
        metadata = read_pickle(cursor)
        if not isinstance(metadata, Call) or metadata.name != f"{_MODULE}.Metadata":
            raise ValueError("it does not describe a checkpoint")
        places = _places(metadata.state["storage_data"])
        names = sorted({name for name, _, _ in places.values()})
        missing = [name for name in names if not is_file(os.path.join(path, name))]
        if missing:
            listed = ", ".join(missing[:_MAX_LISTED])
            raise ValueError(f"{len(missing)} files that it names are missing: {listed}")
        if is_url(path):
            files.expect(_ends(path, places))
        described = metadata.state["state_dict_metadata"].items()
        found = together(
            path, lambda item: _value(files, path, item[0], item[1], places), [*described]
        )
        parts = {name: value for (name, _), value in zip(described, found, strict=True)}
        values, graph = graph_of_tree(parts, ".")
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise files.damage(file, str(error)) from error
    return ExtentsReader(path, values, lambda: graph, files)


Place = tuple[str, int, int]  # of a chunk: name of the file, offset, size in bytes


def _places(entries: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], Place]:
    """Where the chunk of a name that begins at an offset lies. Other values have the offset ()."""
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for index, info in entries.items():
        name, offset = index.state["fqn"], index.state.get("offset")
        file, start, nbytes = (info.state[key] for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str):
            raise ValueError(f"a {type(name).__name__} is the name of a value")
        if info.state.get("transform_descriptors"):
            raise UnsupportedFormatError(
                f"{name}: its bytes were transformed, for example compressed. Save it without "
                "extensions."
            )
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise ValueError("the name of a file leads elsewhere")
        if type(start) is not int or type(nbytes) is not int or min(start, nbytes) < 0:
            raise ValueError(f"{name}: its place in {file} is wrong")
        places[name, () if offset is None else sizes_of(offset)] = file, start, nbytes
    return places


def _ends(directory: str, places: Mapping[tuple[str, tuple[int, ...]], Place]) -> dict[str, int]:
    """Where the last chunk of each file ends."""
    ends: dict[str, int] = {}
    for name, start, nbytes in places.values():
        file = os.path.join(directory, name)
        ends[file] = max(start + nbytes, ends.get(file, 0))
    return ends


def _value(
    files: Files,
    directory: str,
    name: str,
    entry: Any,
    places: Mapping[tuple[str, tuple[int, ...]], Place],
) -> Any:
    """The tensor of that name, or nested containers of plain values."""

    def archive(offset: tuple[int, ...]) -> Archive:
        if (name, offset) not in places:
            raise ValueError(f"{name}: it is not said where its part at {offset} lies")
        file, start, nbytes = places[name, offset]
        file = os.path.join(directory, file)
        if start + nbytes > files.size(file):
            raise files.damage(file, f"it has {files.size(file)} bytes", name)
        return Archive(files, file, start, nbytes)

    if not isinstance(name, str) or not isinstance(entry, Call):
        raise ValueError(f"a value is described by a {type(entry).__name__}")
    if entry.name == f"{_MODULE}.BytesStorageMetadata":
        return tree_of(*read_archive(archive(())))
    if entry.name != f"{_MODULE}.TensorStorageMetadata":
        raise ValueError(f"{name}: it is described by {entry.name[:80]}")
    shape = sizes_of(entry.state["size"])
    extents: list[Extent] = []
    stored: Stored | None = None
    for chunk in entry.state["chunks"]:
        offsets, sizes = sizes_of(chunk.state["offsets"]), sizes_of(chunk.state["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"{name}: a chunk at {offsets} of an array of shape {shape}")
        box = tuple([(start, start + n) for start, n in zip(offsets, sizes, strict=True)])
        part = tensor_of(*read_archive(archive(offsets)))
        if part.spec.is_unreadable:
            return Stored(replace(part.spec, shape=shape))
        _check_chunk(name, part.spec, box, entry.state["properties"])
        extents.append(replace(part.extents[0], box=box))
        stored = part
    if stored is None:
        raise ValueError(f"{name}: it has no chunks")
    if 0 in shape:
        extents = [replace(extents[0], box=whole(shape))]
    return replace(stored, spec=replace(stored.spec, shape=shape), extents=tuple(extents))


def _check_chunk(name: str, spec: LeafSpec, box: Box, properties: Any) -> None:
    """Checks that a chunk is what the description of the array says."""
    dtype = properties.state
    dtype = dtype[0] if isinstance(dtype, tuple) else dtype.get("dtype")
    declared = dtype.name.rpartition(".")[2] if isinstance(dtype, Global) else None
    if spec.shape != shape_of(box) or spec.dtype != declared:
        raise ValueError(
            f"{name}: the part at {box} should be {declared}{list(shape_of(box))}, and is {spec}"
        )


def _recognises(path: str) -> bool:
    return _MODULE.encode() in head_of(os.path.join(path, _METADATA), 256)


TORCH_DISTRIBUTED = Format("torch.distributed", _recognises, open_distributed)
