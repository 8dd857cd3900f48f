"""Orbax's checkpoints, of version 0.2 to today, without Orbax.

`tree` reads what a directory says of itself, `zarr` reads the arrays. The typed paths of the leaves
become an object graph. Lost in the format are whether a sequence was a list or a tuple, classes of
named tuples, and integer keys of dicts; matching with the objects of a program allows for that.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.dtypes import dtype_name
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.graph.typed_paths import described, graph_of_paths
from ckpt_jax.readers import ExtentsReader, Format, Stored
from ckpt_jax.restoring.formats.orbax.tree import (
    Empty,
    Place,
    Refused,
    is_orbax,
    leaves_of,
    steps_in,
)
from ckpt_jax.restoring.formats.orbax.zarr import ZarrArrays, ZarrPlace
from ckpt_jax.store.stored import StoredValues
from ckpt_jax.values.leaves import describe, encode

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
        self._before = _identity(path)
        leaves = [*leaves_of(path)]
        try:
            graph, keys = graph_of_paths(
                (leaf.path, leaf.value.container if isinstance(leaf.value, Empty) else "leaf")
                for leaf in leaves
            )
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: {error}", file=path) from error
        places: dict[str, Place] = {}
        values: dict[str, Stored] = {}
        for key, leaf in zip(keys, leaves, strict=True):
            if isinstance(leaf.value, Place):
                places[key] = leaf.value
            elif not isinstance(leaf.value, Empty):
                values[key] = _stored(leaf.value)
        self._arrays = ZarrArrays({key: _zarr_place(place) for key, place in places.items()})
        arrays = {key: Stored(self._spec(key, place)) for key, place in places.items()}
        unreadable = {key: stored for key, stored in arrays.items() if stored.spec.is_unreadable}
        self._values = ExtentsReader(path, {**values, **unreadable})
        self.index = StoredValues({**values, **arrays})
        self._graph = described(graph, self.index.specs)

    def _spec(self, key: str, place: Place) -> LeafSpec:
        shape, dtype = self._arrays.shape(key), self._arrays.dtype(key)
        try:
            name = dtype_name(dtype) if dtype is not None else ""
        except ValueError:
            name = ""
        if not name:
            return LeafSpec("unreadable", str(dtype), shape, note="the dtype is not known here")
        if place.prng_impl:
            return LeafSpec("prng_key", name, shape, prng_impl=place.prng_impl)
        if place.kind == "scalar" and shape == ():
            return LeafSpec(_NUMBERS.get(name, "numpy_scalar"), name)
        return LeafSpec("array" if place.kind == "jax.Array" else "numpy", name, shape)

    @property
    def bytes_read(self) -> int:
        """Bytes of values that were read so far; all of a chunk counts."""
        return self._arrays.bytes_read + self._values.bytes_read

    def graph(self) -> ObjectGraph:
        """The tree of the step or item."""
        return self._graph

    def identity(self) -> Hashable | None:
        """A value that changes if another checkpoint takes the place; None if it is gone."""
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


def _stored(value: object) -> Stored:
    """A value that the description of a tree holds."""
    if isinstance(value, Refused):
        return Stored(LeafSpec("unreadable", value.what, note=value.reason))
    if isinstance(value, Stored):
        return value
    encoded = encode(value)
    assert isinstance(encoded, np.ndarray | bytes)
    return replace(Stored.of(encoded), spec=describe(value)[0])


def _zarr_place(place: Place) -> ZarrPlace:
    item = place.item
    return ZarrPlace(
        item.database or item.directory,
        place.name,
        is_database=item.database is not None,
        is_zarr3=item.is_zarr3,
        omits_zeros=item.omits_zeros,
    )


def _identity(path: str) -> Hashable | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


ORBAX = Format("orbax", is_orbax, OrbaxReader, steps_in)
