"""safetensors: one file, several files with an index, or the directory that a hub hands out.

A file begins with the length of its header and the header, which is JSON and says of each array its
dtype, shape and place. Arrays lie one after the other, without holes. Several files have an index
`*.safetensors.index.json`, which says for each name in which file it is.

Names are split at ".". There are no checksums.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.boxes import whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.names import graph_of_names
from ckpt_jax.restoring.formats.plain_json import parsed
from ckpt_jax.store.looks import head_of, is_directory, names_in, size_of
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.remote import HEAD_NBYTES, together

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_FIRST = "model"  # what directories of a hub call the weights, among other files
_PART = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
_MAX_HEADER_NBYTES = 100_000_000  # the limit of safetensors itself
_METADATA = "__metadata__"
_OF_PARTS = "DCP_SHARDING_INFO"  # each file holds parts of arrays
FORMAT, _NOTES = "format", "ckpt_jax"  # the library that a file is for; what `as_texts` notes
_RESERVED = (FORMAT, _NOTES)

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def open_safetensors(path: str) -> ExtentsReader:
    """Opens a file, an index, or a directory.

    Raises:
      CorruptCheckpointError: a header is damaged, or a file is missing.
      UnsupportedFormatError: it is not clear which files of a directory are meant, or the files
        hold parts of arrays.
    """
    files = Files(path)
    chosen = _chosen(path) if is_directory(path) else path
    if _starts_as_file(chosen):
        values, metadata = _values_of(files, chosen)
    elif chosen.endswith(SUFFIX):
        raise files.damage(chosen, "it does not begin like a file of safetensors")
    else:
        values, metadata = _values_of_index(files, chosen)
    return ExtentsReader(path, values, graph_of_names(path, values, "."), files, metadata)


def _values_of(files: Files, file: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The values of one file, and its metadata."""
    length = int.from_bytes(files.read(file, 0, 8), "little")
    start = 8 + length
    if length > _MAX_HEADER_NBYTES or (not is_url(file) and start > files.size(file)):
        what = f"it has {files.size(file)} bytes, its header would have {length}"
        raise files.damage(file, what)
    try:
        header = parsed(files.read(file, 8, length))
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        metadata = _metadata(header.pop(_METADATA, None) or {})
        places = {name: _place(entry) for name, entry in header.items()}
        files.expect({file: start + max([end for _, _, end in places.values()], default=0)})
        _check_dense(places, files.size(file) - start)
    except ValueError as error:
        raise files.damage(file, f"its header is wrong: {error}") from error
    if _OF_PARTS in metadata:
        raise UnsupportedFormatError(
            f"{file} holds parts of arrays, as torch.distributed.checkpoint writes them. Join the "
            "parts with its consolidate_safetensors_files, and open the outcome."
        )
    values = {
        name: Stored(spec, (Extent(whole(spec.shape), file, start + begin),))
        if not spec.is_unreadable
        else Stored(spec)
        for name, (spec, begin, _) in places.items()
    }
    return values, metadata


def as_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as texts, which is all that a header holds: of what is no text, the JSON.

    >>> as_texts({"revision": "4f2a", "config": {"lr": 0.5}})
    {'revision': '4f2a', 'config': '{"lr": 0.5}', 'ckpt_jax': '{"json": ["config"]}'}
    """
    own = {name: value for name, value in metadata.items() if name in _RESERVED}
    others = {name: value for name, value in metadata.items() if name not in own}
    as_json = [name for name, value in others.items() if not isinstance(value, str)]
    texts = {name: json.dumps(others[name]) if name in as_json else others[name] for name in others}
    notes = {"json": as_json, "own": own}
    noted = {name: note for name, note in notes.items() if note}
    return {**texts, _NOTES: json.dumps(noted)} if noted else texts


def _metadata(texts: Any) -> dict[str, Any]:
    """The inverse of `as_texts`. Texts that other libraries have written stay what they are."""
    if not isinstance(texts, dict):
        raise ValueError(f"its {_METADATA} is no object")
    found = {name: value for name, value in texts.items() if name != FORMAT}
    try:
        notes = parsed(str(found[_NOTES]).encode())
        as_json = {name: parsed(found[name].encode()) for name in notes.get("json", ())}
        own = {**notes.get("own", {})}
    except (AttributeError, KeyError, TypeError, ValueError):  # no notes, or not our own
        return found
    del found[_NOTES]
    return found | as_json | own


def _place(entry: Any) -> tuple[LeafSpec, int, int]:
    """What a header says of one array: its spec, and where it begins and ends."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
        case _:
            raise ValueError(f"{str(entry)[:80]} describes no array")
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{str(numbers)[:80]} are no sizes and offsets")
    if dtype not in DTYPES:
        note = (
            f"arrays of dtype {dtype} are packed, or newer than this version of ckpt_jax. Convert "
            "it with the library that wrote it"
        )
        return LeafSpec("unreadable", dtype, tuple(shape), note=note), begin, end
    spec = LeafSpec("numpy", DTYPES[dtype], tuple(shape))
    expected = math.prod(shape) * dtype_of(spec.dtype).itemsize
    if end - begin != expected:
        raise ValueError(f"{spec} takes {expected} bytes, not {begin} to {end}")
    return spec, begin, end


def _check_dense(places: Mapping[str, tuple[LeafSpec, int, int]], size: int) -> None:
    """Checks that arrays lie one after the other, from the beginning to the end."""
    at = 0
    for name, (_, begin, end) in sorted(places.items(), key=lambda item: item[1][1:]):
        if begin != at or end < begin:
            what = "overlaps what is before it" if begin < at else "leaves a hole before it"
            raise ValueError(f"{name!r}, at {begin} to {end}, {what}")
        at = end
    if at != size:
        raise ValueError(f"the arrays take {at} bytes, the file has {size}")


def _values_of_index(files: Files, file: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The values and the metadata of several files. Values that the index does not list are there
    as well."""
    files.fetch_whole(file)
    try:
        index = parsed(files.read(file, 0, files.size(file)))
        names = index["weight_map"]
        if not all(isinstance(shard, str) and _is_base_name(shard) for shard in names.values()):
            raise ValueError("a name of a file leads elsewhere")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise files.damage(file, f"it is no index: {error}") from error
    directory = os.path.dirname(file)
    shards = sorted(set(names.values()))
    places = [os.path.join(directory, shard) for shard in shards]
    are_there = together(file, files.has, places)
    absent = [shard for shard, is_there in zip(shards, are_there, strict=True) if not is_there]
    if absent:
        raise files.damage(file, f"{len(absent)} of {len(shards)} files are missing: {absent[:8]}")
    values: dict[str, Stored] = {}
    metadata: dict[str, Any] = {}
    found: set[tuple[str, str]] = set()
    in_shards = together(file, partial(_values_of, files), places)
    for shard, (here, own) in zip(shards, in_shards, strict=True):
        metadata |= own
        found.update([(name, shard) for name in here])
        values.update({n: stored for n, stored in here.items() if names.get(n, shard) == shard})
    lost = sorted(names.items() - found)
    if lost:
        listed = ", ".join([f"{name} in {shard}" for name, shard in lost[:8]])
        raise files.damage(file, f"{len(lost)} values are not where the index says: {listed}")
    return values, metadata


def _is_base_name(name: str) -> bool:
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _chosen(directory: str) -> str:
    """The file or index in a directory that is meant."""
    names = names_in(directory)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    parts = {match[1]: match for name in names if (match := _PART.fullmatch(name))}
    singles = [n for n in names if n.endswith(SUFFIX) and not _PART.fullmatch(n)]
    found = indexes or singles or [match[0] for match in parts.values()]
    preferred = [name for name in found if name in (_FIRST + INDEX_SUFFIX, _FIRST + SUFFIX)]
    if len(preferred or found) > 1:
        raise UnsupportedFormatError(
            f"{directory}: expected one model, found {', '.join(found)}. Pass the path of the file "
            "that you mean."
        )
    (name,) = preferred or found
    if name in (*indexes, *singles):
        return os.path.join(directory, name)
    raise CorruptCheckpointError(
        f"{directory}: {name} is a part of a model, and its index {parts.popitem()[0]}"
        f"{INDEX_SUFFIX} is missing. Get the index, or open the parts one by one.",
        file=directory,
    )


def _starts_as_file(path: str) -> bool:
    start = head_of(path, 9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        return False
    size = size_of(path)
    return 2 <= length <= min(_MAX_HEADER_NBYTES if size is None else size, _MAX_HEADER_NBYTES)


def _is_index(path: str) -> bool:
    if head_of(path, 1) != b"{" or (size := size_of(path) or HEAD_NBYTES) > _MAX_HEADER_NBYTES:
        return False
    head = head_of(path, size)
    return b'"weight_map"' in head and b'.weights.h5"' not in head  # which is one of Keras


def _recognises(path: str) -> bool:
    if is_directory(path):
        return any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names_in(path))
    return _starts_as_file(path) or _is_index(path)


SAFETENSORS = Format("safetensors", _recognises, open_safetensors, suffixes=(SUFFIX, INDEX_SUFFIX))
