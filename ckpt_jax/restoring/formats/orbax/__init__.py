"""Orbax's checkpoints, of version 0.2 to today, without Orbax.

`tree` reads what a directory says of itself, `zarr` reads the arrays, `ocdbt` looks into a
database, and `writing_orbax` writes. The typed paths of the leaves become an object graph. Lost in
the format are whether a sequence was a list or a tuple, classes of named tuples, and integer keys
of dicts; matching with the objects of a program allows for that.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.dtypes import dtype_name
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import ExtentsReader, Format, Stored
from ckpt_jax.restoring.formats.names import graph_of_tree, stored_value
from ckpt_jax.restoring.formats.orbax.tree import (
    Place,
    is_orbax,
    metadata_in,
    small_files,
    steps_in,
    tree_in,
)
from ckpt_jax.restoring.formats.orbax.zarr import ZarrArray, ZarrReader, open_arrays
from ckpt_jax.store.objects import generations_of, is_url
from ckpt_jax.store.paths import require_addressable
from ckpt_jax.store.stored import StoredValues

_NUMBERS = {"int64": "int", "float64": "float", "bool": "bool", "complex128": "complex"}


class OrbaxReader:
    """An item or a step of Orbax. See `readers.Reader`.

    Args:
      path: of the directory.

    Raises:
      CorruptCheckpointError: it is damaged, or its save has not finished.
      UnsupportedFormatError: a newer Orbax wrote it.
    """

    def __init__(self, path: str):
        self.path = path
        require_addressable(path)
        tree, places = tree_in(path)
        self._marks = small_files(path)
        # Chunks outside of a database have the same names in any other checkpoint.
        self._has_plain_names = not all([place.is_database for place in places])
        self._identity = self.identity()
        arrays = dict(zip(places, open_arrays(places), strict=True))
        described = {place: Stored(_spec(array)) for place, array in arrays.items()}

        def stored_of(value: Any) -> Stored:
            return described[value] if isinstance(value, Place) else stored_value(value)

        values, self._graph = graph_of_tree(tree, stored_of=stored_of)
        array_of = {id(described[place]): array for place, array in arrays.items()}
        readable = {
            key: array_of[id(stored)]
            for key, stored in values.items()
            if id(stored) in array_of and not stored.spec.is_unreadable
        }
        self.index = StoredValues(values)
        self._arrays = ZarrReader(readable)
        self._values = ExtentsReader(
            path, {key: stored for key, stored in values.items() if key not in readable}
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of values that were read so far; all of a chunk counts."""
        return self._arrays.bytes_read + self._values.bytes_read

    @property
    def unchecked(self) -> frozenset[str]:
        """All keys: only the tree of a database has checksums."""
        return frozenset(self.index.keys)

    def graph(self) -> ObjectGraph:
        """The tree of the step or item."""
        return self._graph

    def metadata(self) -> dict[str, Any]:
        """The `custom_metadata` of the step or item.

        Raises:
          CorruptCheckpointError: a file is damaged.
        """
        return metadata_in(self.path)

    def identity(self) -> Hashable | None:
        """A value that changes if another checkpoint takes the place; None if it is gone."""
        if is_url(self.path):
            generations = generations_of(self._marks)
            return None if None in generations else tuple(generations)
        return _identity(self.path)

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Reads boxes of arrays."""
        is_array = [key in self._arrays for key, _ in requests]
        for reader, kind in ((self._values, False), (self._arrays, True)):
            numbers = [number for number, found in enumerate(is_array) if found is kind]
            asked = [requests[number] for number in numbers]
            for at, arrays in reader.read(asked, max_inflight_bytes=max_inflight_bytes):
                yield numbers[at], arrays
        if self._has_plain_names and self.identity() != self._identity:
            raise CorruptCheckpointError(
                f"{self.path}: another checkpoint has taken its place", file=self.path
            )

    def read_bytes(self, key: str) -> bytes:
        """A byte string."""
        return self._values.read_bytes(key)

    def check_files(self) -> None:
        """Looks for chunks that are missing, and for files that are too short."""
        self._arrays.check_files()

    def close(self) -> None:
        """Refuses further reads."""
        self._values.close()
        self._arrays.close()


def _spec(array: ZarrArray) -> LeafSpec:
    place, shape = array.place, array.shape
    try:
        dtype = dtype_name(array.dtype)
    except ValueError:
        return LeafSpec("unreadable", str(array.dtype), shape, note="its dtype is not known here")
    if place.prng_impl:
        return LeafSpec("prng_key", dtype, shape, prng_impl=place.prng_impl)
    if place.kind == "scalar" and shape == ():
        return LeafSpec(_NUMBERS.get(dtype, "numpy_scalar"), dtype)
    return LeafSpec("array" if place.kind == "jax.Array" else "numpy", dtype, shape)


def _identity(path: str) -> Hashable | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


ORBAX = Format("orbax", is_orbax, OrbaxReader, steps_in)
