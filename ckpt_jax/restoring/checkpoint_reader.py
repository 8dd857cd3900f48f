"""CheckpointReader: the values of a checkpoint by key, and its object graph.

Opening a reader reads the index. The object graph is read when it is first asked for. Neither reads
a byte of an array or uses a device. A file of another format has no object graph; the reader makes
one from the names in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ckpt_jax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_jax.graph.as_tree import as_tree, is_tree
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.dtypes import ANONYMOUS_BYTE, dtype_of
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.saved_objects import Functions, SavedObject
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.io import read_values
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path
from ckpt_jax.readers import HasMetadata, Reader
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.restoring.formats import foreign_steps, open_foreign
from ckpt_jax.restoring.formats.own import OwnReader
from ckpt_jax.restoring.formats.tensorflow.optimizers import with_slots
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, as_path
from ckpt_jax.store.storage import Pinned, Storage, storage_of
from ckpt_jax.values.host import without_gc
from ckpt_jax.values.leaves import as_saved


class CheckpointReader:
    """Reads values without any of the objects that they belong to.

    A value is called by its checkpoint key or by its path: the local names joined with "/", as
    patterns and reports have it. If one text is both, the key counts.

    Use it as a context manager, or `close` it, so that its files are closed.

    Args:
      path: of a checkpoint: a directory of ours, or what another format recognises as its own.
      storage_of: gives the storage in which a path lies.

    Attributes:
      path: as it was given.
      location: where the path led when the reader was opened. The reader goes on reading there,
        even if a link is moved on, or if the program changes its working directory.
      generation: distinguishes the checkpoint from others that may take its place.

    Raises:
      CheckpointNotFoundError: there is no checkpoint. Also raised by later reads, with `with` and
        without, if the checkpoint was replaced or removed after it was opened.
      CorruptCheckpointError: it is damaged.
      UnsupportedFormatError: its format is not known here.
      RuntimeError: this process was forked after its parent had read or written checkpoints.

    Source: `tf.train.load_checkpoint`, `tf.train.CheckpointReader`.
    """

    def __init__(self, path: Path, storage_of: Callable[[str], Storage] = storage_of):
        self.path = as_path(path)
        self._own: OwnReader | None = None
        storage = storage_of(self.path)
        location = storage.located(self.path)
        pinned = Pinned.of(self.path, location, storage) if is_url(location) else None
        is_own = pinned is not None and pinned.generation is not None
        foreign = open_foreign(absolute(self.path), is_own=is_own)
        if foreign is not None:
            self._read_from(foreign)
            return
        self._pin(pinned or Pinned.of(self.path, location, storage))
        with self._pinned.unless_replaced():
            self._source = self._own = _opened(storage, location, self.path)

    @classmethod
    def over(cls, source: Reader) -> CheckpointReader:
        """A reader of what another one has opened."""
        reader = cls.__new__(cls)
        reader.path, reader._own = source.path, None
        reader._read_from(source)
        return reader

    def _read_from(self, source: Reader) -> None:
        self._pin(Pinned(self.path, source.path, source.identity))
        self._source: Reader = source

    def _pin(self, pinned: Pinned) -> None:
        self._pinned = pinned
        self.location, self.generation = pinned.location, pinned.generation

    def __repr__(self) -> str:
        return f"CheckpointReader({self.path!r})"

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close()
        if isinstance(error, CorruptCheckpointError):
            self.check_not_replaced(error)

    def check_not_replaced(self, error: Exception | None = None) -> None:
        """Checks that the checkpoint is still the one that was opened; see `Pinned.check`."""
        self._pinned.check(error)

    def close(self) -> None:
        """Closes the files; further reads fail."""
        self._source.close()

    @cached_property
    def object_graph(self) -> ObjectGraph:
        """The saved object graph.

        Raises:
          CorruptCheckpointError: there is none, it is damaged, or it disagrees with the index.
        """
        with self._pinned.unless_replaced():
            for key, what in self.disagreements():
                raise CorruptCheckpointError(f"{self.path}: {key}: {what}", file=self.path, key=key)
            return self._graph

    @cached_property
    def graph_to_restore(self) -> ObjectGraph:
        """The object graph, in which optimizers of TensorFlow and Keras have slots.

        Raises:
          CorruptCheckpointError: as for `object_graph`.
        """
        return with_slots(self.object_graph)

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """(key, problem) for each value on which the object graph and the index disagree."""
        layout_of = self._source.index.layout_of
        for _, attribute in self._graph.attributes():
            key, spec = attribute.key, attribute.spec
            if key not in self._source.index:
                yield key, "the object graph names a value that is not stored"
                continue
            stored = layout_of(key)
            if (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
                found = f"{stored.dtype}{list(stored.shape)}"
                yield (
                    key,
                    f"the object graph says {spec.dtype}{list(spec.shape)}, the index {found}",
                )

    @property
    def _graph(self) -> ObjectGraph:
        if self._graph_or_none is None:
            raise CorruptCheckpointError(
                f"{self.path} has no object graph, as after a merge of shards by hand. "
                "ckpt.load_checkpoint(path) reads its values by key",
                file=self.path,
                key=OBJECT_GRAPH_KEY,
            )
        return self._graph_or_none

    @cached_property
    @without_gc()
    def _graph_or_none(self) -> ObjectGraph | None:
        """The graph; None if there is none. One that was merged by hand, from shards, has none."""
        with self._pinned.unless_replaced():
            graph = self._source.graph()
        self.check_not_replaced()  # another checkpoint has values of these names, too
        return graph

    @cached_property
    def saved_objects(self) -> tuple[SavedObject, ...] | None:
        """How each object of the graph is recreated; None if the checkpoint does not say.

        Raises:
          CorruptCheckpointError: it is damaged, or disagrees with the object graph.
        """
        if self._own is None:
            return None
        with self._pinned.unless_replaced():
            found = self._own.saved_objects(self._graph)
        self.check_not_replaced()
        return found

    @cached_property
    def saved_functions(self) -> Functions:
        """The functions that were saved with the objects, by name.

        Raises:
          CorruptCheckpointError: the list is damaged, or disagrees with the object graph.
        """
        if self._own is None:
            return {}
        with self._pinned.unless_replaced():
            found = self._own.saved_functions(self._graph)
        self.check_not_replaced()
        return found

    def artifact(self, function: str) -> bytes:
        """What `jax.export` made of a saved function.

        Raises:
          CorruptCheckpointError: it is damaged.
        """
        assert self._own is not None  # it has listed the function
        with self._pinned.unless_replaced():
            return self._own.artifact(self.saved_functions[function].artifact)

    def recipes(self) -> dict[str, bytes]:
        """The entries that say how objects are recreated, and the functions, as they are stored."""
        if self._own is None or self.saved_objects is None:
            return {}
        names = [SAVED_OBJECTS_KEY, *[each.artifact for each in self.saved_functions.values()]]
        with self._pinned.unless_replaced():
            found = {name: self._own.entry(name) for name in names}
        return {name: data for name, data in found.items() if data is not None}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the program said about the checkpoint (`CheckpointManager.save(metadata=...)`).

        It is empty if the program said nothing. Of other formats, those of Orbax
        (`custom_metadata`), safetensors and Keras (its configuration) can hold it.

        Raises:
          CorruptCheckpointError: it is damaged.
        """
        if not isinstance(self._source, HasMetadata):
            return {}
        with self._pinned.unless_replaced():
            found = dict(self._source.metadata())
        self.check_not_replaced()
        return found

    def keys(self) -> list[str]:
        """All checkpoint keys, sorted."""
        return list(self._source.index.keys)

    def paths(self) -> list[str]:
        """The paths of all values, sorted. A value that several objects share has several."""
        return sorted(self._key_of_path.keys() | self._key_of_other_path.keys())

    def has_tensor(self, key: str) -> bool:
        """Whether there is a value under `key`, a key or a path."""
        return self.key_of(key) is not None

    def has_key(self, key: str) -> bool:
        """Whether there is a value under a key; a path is none."""
        return key in self._source.index

    def key_of(self, name: str) -> str | None:
        """The key that a key or a path stands for; None if there is no such value."""
        if self.has_key(name):
            return name
        return self._key_of_path.get(name) or self._key_of_other_path.get(name)

    @cached_property
    def _key_of_path(self) -> dict[str, str]:
        return _keys_by_path(self.object_graph) if self.has_graph else {}

    @cached_property
    def _key_of_other_path(self) -> dict[str, str]:
        """Values by each of their paths, if they are shared."""
        if not self.has_graph or is_tree(self.object_graph):
            return {}
        return _keys_by_path(as_tree(slots_as_children(self.object_graph)))

    def get_variable_to_shape_map(self) -> dict[str, tuple[int, ...]]:
        """The shape of each value; () for scalars and byte strings."""
        return {key: self._source.index.layout_of(key).shape for key in self.keys()}

    def get_variable_to_dtype_map(self) -> dict[str, np.dtype]:
        """The dtype of each value; `object` for byte strings and for unknown dtypes."""
        return {key: _dtype(self._source.index.layout_of(key).dtype) for key in self.keys()}

    def get_tensor(self, key: str, box: Box | None = None) -> Any:
        """The value under `key`.

        Args:
          key: a checkpoint key, or a path.
          box: one (start, stop) pair per axis; the whole array by default.

        Returns:
          A numpy array, or the Python scalar or string that was saved.

        Raises:
          KeyError: there is no such value; the message names the nearest.
        """
        key = self._known_key(key)
        self._check_readable(key, self._specs.get(key))
        data = self.read({key: box})[key]
        if box is not None:
            return data
        # A value that a registered saver stored belongs to no attribute of the graph.
        return self.as_saved(key, data, self._specs.get(key) or self.stored_spec(key))

    def _known_key(self, name: str) -> str:
        key = self.key_of(name)
        if key is not None:
            return key
        keys, paths = self.keys(), self.paths()
        near = [k for k in keys if k.startswith(f"{name}/.ATTRIBUTES/")] or [
            *nearest(name, paths if paths and "/.ATTRIBUTES/" not in name else keys)
        ]
        below = [path for path in paths if path.startswith(f"{name}/")]
        if below and not near:
            more = f" and {len(below) - 2} more" if len(below) > 2 else ""
            hint = f"; below it are {', '.join(below[:2])}{more}"
        else:
            hint = near_miss(near)
        raise KeyError(
            f"{self.path} holds nothing under the key or path {name!r}{hint}. "
            "CheckpointReader.paths() lists all values."
        )

    def read(
        self,
        requests: Mapping[str, Any],
        options: CheckpointOptions = DEFAULT,
        arrived: Callable[[int], object] = lambda nbytes: None,
    ) -> dict[str, Any]:
        """Reads several values at once; see `ckpt.io.read_slices`.

        `arrived` is called with the number of bytes each time that some have been read.
        """
        with self._pinned.unless_replaced():
            return read_values(self._source, requests, options, arrived)

    def read_boxes(
        self, requests: Mapping[str, Sequence[Box]], options: CheckpointOptions = DEFAULT
    ) -> dict[tuple[str, Box], np.ndarray]:
        """Reads several boxes of several arrays at once; returns them by key and box."""
        keys = list(requests)
        with self._pinned.unless_replaced():
            found = self._source.read(
                [(key, tuple(requests[key])) for key in keys],
                max_inflight_bytes=options.max_inflight_bytes,
            )
            return {
                (keys[number], box): part
                for number, parts in found
                for box, part in zip(requests[keys[number]], parts, strict=True)
            }

    def as_saved(self, key: str, data: Any, spec: LeafSpec) -> Any:
        """Turns data that was read without a target into the saved value. Arrays stay the same."""
        self._check_readable(key, spec)
        with self._pinned.unless_replaced():
            try:
                return as_saved(data, spec)
            except ValueError as error:
                raise CorruptCheckpointError(
                    f"{self.path}: {key}: no {spec.kind}: {error}", file=self.path, key=key
                ) from error

    def _check_readable(self, key: str, spec: LeafSpec | None) -> None:
        if spec is not None and spec.is_unreadable:
            raise UnsupportedFormatError(f"{self.path}: {key}: {spec.refusal}")

    def stored_spec(self, key: str) -> LeafSpec:
        """The dtype and shape that a value is stored with."""
        layout = self._source.index.layout_of(key)
        return LeafSpec("", layout.dtype, layout.shape)

    def stored_nbytes(self, key: str) -> int:
        """The size of a value in bytes."""
        return self._source.index.nbytes(key)

    def refusals(self) -> dict[str, str]:
        """Why a value is listed but cannot be read, by key; empty for most checkpoints."""
        return {
            attribute.key: attribute.spec.refusal
            for _, attribute in (self._graph.attributes() if self.has_graph else ())
            if attribute.spec.is_unreadable and attribute.spec.dtype != ANONYMOUS_BYTE
        }

    @property
    def unchecked(self) -> frozenset[str]:
        """The keys of values that have no checksum in the checkpoint."""
        return self._source.unchecked

    def damage(
        self,
        keys: Collection[str] | None = None,
        sample: float = 1.0,
        read: Callable[[int], object] = lambda nbytes: None,
    ) -> Iterator[tuple[str, list[str], str]] | None:
        """The damage to values, in bounded memory; None if the format has no blocks with checksums.

        Args:
          keys: of the values; all by default.
          sample: the part of their blocks that is read, chosen by chance.
          read: called with numbers of bytes while blocks are read.

        Returns:
          (file, keys in it that are concerned, what is wrong) for each damaged block.
        """
        return None if self._own is None else self._own.damage(keys, sample, read)

    def check_files(self) -> None:
        """Compares the sizes of all files with the sizes that they need; reads no value.

        Raises:
          CorruptCheckpointError: a file is truncated or missing.
        """
        with self._pinned.unless_replaced():
            self._source.check_files()
        self.check_not_replaced()

    @cached_property
    def _specs(self) -> dict[str, LeafSpec]:
        return self.object_graph.by_key if self.has_graph else {}

    @property
    def has_graph(self) -> bool:
        """Whether there is an object graph. What was merged by hand from shards has none."""
        return self._graph_or_none is not None

    @property
    def bytes_read(self) -> int:
        """The number of bytes of values that were read so far."""
        return self._source.bytes_read


def _opened(storage: Storage, location: str, path: str) -> OwnReader:
    try:
        return OwnReader(storage, location, path)
    except CheckpointNotFoundError as error:
        if names := _foreign_names(absolute(path)):
            raise CheckpointNotFoundError(
                f"{path} is a directory with checkpoints of another library: {names}. Give the "
                "path of one of them, or of ckpt.latest_checkpoint(directory)"
            ) from error
        if names := _foreign_names(os.path.dirname(absolute(path))):
            what = f"{error}. Checkpoints of another library there: {names}"
            raise CheckpointNotFoundError(what) from error
        raise


def _foreign_names(directory: str) -> str:
    """The names of the last checkpoints of other formats in a directory."""
    names = [os.path.basename(step) for step in foreign_steps(directory).values()]
    return ", ".join(names[-20:])


def _keys_by_path(graph: ObjectGraph) -> dict[str, str]:
    return {
        graph.value_path(node, attribute.name): attribute.key
        for node, attribute in graph.attributes()
    }


def _dtype(name: str) -> np.dtype:
    try:
        return dtype_of(name)
    except ValueError:
        return np.dtype(object)
