"""Writing safetensors: one file, or a directory as transformers and the hubs have it.

A directory holds `model.safetensors`, or, if that would be too large, several files and
`model.safetensors.index.json`. All are written from front to back, one array at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.nodes import Attribute
from ckpt_jax.readers import Export
from ckpt_jax.restoring.formats.safetensors import (
    DTYPES,
    FORMAT,
    INDEX_SUFFIX,
    SUFFIX,
    as_texts,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT = {FORMAT: "pt"}  # transformers refuses files that do not say so
_ALIGNMENT = 8
_MODEL = "model"


def write_safetensors(export: Export, path: str) -> Sequence[str]:
    """Writes a file if the destination ends in ".safetensors", and a directory otherwise.

    Raises:
      UnsaveableError: naming all values that are no arrays of a dtype of safetensors.
    """
    values = export.values_by_name(".")
    _check(values)
    if export.destination.endswith(SUFFIX):
        _write_file(export, path, values)
        return ("",)
    os.mkdir(path)
    parts = _parts(values, export.max_shard_nbytes)
    if len(parts) == 1:
        _write_file(export, os.path.join(path, _MODEL + SUFFIX), values)
        return ("",)
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{_MODEL}-{number:05d}-of-{len(parts):05d}{SUFFIX}"
        _write_file(export, os.path.join(path, name), part)
        where.update(dict.fromkeys(part, name))
    total = sum(map(_nbytes, values.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    with open(os.path.join(path, _MODEL + INDEX_SUFFIX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
        file.write("\n")
    return ("",)


def _check(values: Mapping[str, Attribute]) -> None:
    problems = [
        (name, f"safetensors cannot hold {attribute.spec}")
        for name, attribute in values.items()
        if attribute.spec.dtype not in _NAMES
    ]
    if problems:
        listed = "\n".join(f"  {name}: {what}" for name, what in problems)
        raise UnsaveableError(
            f"{len(problems)} values cannot be written; nothing was written:\n{listed}\n"
            "Leave them out (only=...), or convert them (cast=...).",
            tuple(problems),
        )


def _parts(values: Mapping[str, Attribute], limit: int) -> list[dict[str, Attribute]]:
    """The values of each file. A value that is larger than the limit has a file of its own."""
    parts: list[dict[str, Attribute]] = [{}]
    held = 0
    for name, attribute in values.items():
        nbytes = _nbytes(attribute)
        if parts[-1] and held + nbytes > limit:
            parts.append({})
            held = 0
        parts[-1][name] = attribute
        held += nbytes
    return parts


def _nbytes(attribute: Attribute) -> int:
    return math.prod(attribute.spec.shape) * dtype_of(attribute.spec.dtype).itemsize


def _write_file(export: Export, path: str, values: Mapping[str, Attribute]) -> None:
    # Large elements first, so that all are aligned, as safetensors does.
    ordered = sorted(
        values.items(), key=lambda item: (-dtype_of(item[1].spec.dtype).itemsize, item[0])
    )
    header: dict[str, object] = {"__metadata__": {**_FORMAT, **as_texts(export.metadata)}}
    at = 0
    for name, attribute in ordered:
        nbytes = _nbytes(attribute)
        header[name] = {
            "dtype": _NAMES[attribute.spec.dtype],
            "shape": attribute.spec.shape,
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for value in export.read_all([attribute.key for _, attribute in ordered]):
            write_array(file, value)


def write_array(file: BinaryIO, value: np.ndarray | bytes) -> None:
    """Writes the elements of an array, in C order and little-endian."""
    array = np.asarray(value)
    file.write(array.reshape(-1).view(np.uint8).data)
