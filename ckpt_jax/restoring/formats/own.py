"""The format of this library: the values of a storage, and the object graph among them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph import codec, metadata
from ckpt_jax.graph import saved_objects as objects
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY
from ckpt_jax.graph.metadata import METADATA_KEY
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.readers import Contents
from ckpt_jax.store.seal import unseal
from ckpt_jax.store.storage import Storage

T = TypeVar("T")


class OwnReader:
    """A checkpoint of this library. See `readers.Reader`.

    Args:
      storage: where it lies.
      location: where `path` leads.
      path: as errors name it.
    """

    def __init__(self, storage: Storage, location: str, path: str):
        self.path = path
        self._storage, self._location = storage, location
        self._values = storage.open(location, path)

    @property
    def index(self) -> Contents:
        """What is stored."""
        return self._values.index

    @property
    def bytes_read(self) -> int:
        """Bytes of values that were read so far."""
        return self._values.bytes_read

    @property
    def unchecked(self) -> frozenset[str]:
        """None: all values have checksums."""
        return frozenset()

    def graph(self) -> ObjectGraph | None:
        """The object graph; None in what was merged by hand from shards.

        Raises:
          CorruptCheckpointError: it is damaged.
        """
        return self._decoded(OBJECT_GRAPH_KEY, codec.decode)

    def saved_objects(self, graph: ObjectGraph) -> tuple[objects.SavedObject, ...] | None:
        """How each object of the graph is recreated; None if the checkpoint does not say.

        Raises:
          CorruptCheckpointError: it is damaged, or disagrees with the object graph.
        """
        return self._decoded(SAVED_OBJECTS_KEY, lambda data: objects.decode(data, graph))

    def saved_functions(self, graph: ObjectGraph) -> objects.Functions:
        """The functions that were saved with the objects, by name.

        Raises:
          CorruptCheckpointError: the list is damaged, or disagrees with the object graph.
        """
        return (
            self._decoded(SAVED_OBJECTS_KEY, lambda data: objects.decode_functions(data, graph))
            or {}
        )

    def entry(self, name: str) -> bytes | None:
        """A small entry as it is stored; None if there is none."""
        return self._values.extra(name)

    def artifact(self, key: str) -> bytes:
        """The compiled function under a key that a list of functions names.

        Raises:
          CorruptCheckpointError: it is damaged or not there.
        """
        found = self._decoded(key, lambda data: data)
        if found is None:
            raise CorruptCheckpointError(
                f"{self.path}: there is no entry {key}", file=self.path, key=key
            )
        return found

    def metadata(self) -> dict[str, Any]:
        """What the program said about the checkpoint; empty if it said nothing.

        Raises:
          CorruptCheckpointError: it is damaged.
        """
        return self._decoded(METADATA_KEY, metadata.decode, lambda data: data) or {}

    def _decoded(
        self,
        key: str,
        decode: Callable[[bytes], T],
        opened: Callable[[bytes], bytes] = unseal,
    ) -> T | None:
        data = self._values.extra(key)
        if data is None:
            return None
        try:
            return decode(opened(data))
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(
                f"{self.path}: {key}: {error}", file=self.path, key=key
            ) from error

    def identity(self) -> Hashable | None:
        """A value that changes if another checkpoint takes the place; None if it is gone."""
        return self._storage.generation(self._location)

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Reads boxes of arrays."""
        return self._values.read(requests, max_inflight_bytes=max_inflight_bytes)

    def read_bytes(self, key: str) -> bytes:
        """A byte string."""
        return self._values.read_bytes(key)

    def check_files(self) -> None:
        """Compares the sizes of the files with those that they need."""
        self._values.check_files()

    def damage(
        self,
        keys: Collection[str] | None,
        sample: float,
        read: Callable[[int], object],
    ) -> Iterator[tuple[str, list[str], str]]:
        """The damage to values, without assembling them; see `ShardedReader.damage`."""
        return self._values.damage(keys, sample, read)

    def close(self) -> None:
        """Closes the files; further reads fail."""
        self._values.close()
