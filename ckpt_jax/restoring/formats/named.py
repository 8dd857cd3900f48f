"""Name-based checkpoints: what a format has to offer, and how it is read like any other.

`NameBasedReader` is the protocol: what is there, and one value by its name. `NamedValues`
shows such a reader as `io.read_values` sees a checkpoint of our own, so that boxes, dtypes and
shardings are served by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ckpt_jax.graph.boxes import Box, inside, slices, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.store.tiling import Layout


class NameBasedReader(Protocol):
    """A checkpoint as a flat mapping from names to values.

    Attributes:
      path: of the file.
    """

    path: str

    def specs(self) -> Mapping[str, LeafSpec]:
        """Describes the value under each name, without reading it.

        Kinds are "numpy", "str", "bytes", or "unreadable" with the format's own dtype for what
        `read` will refuse.
        """
        ...

    def read(self, name: str) -> np.ndarray | bytes:
        """One value: a writable array of the dtype and shape of its spec, or a byte string.

        Raises:
          CorruptCheckpointError: its bytes are damaged.
          UnsupportedFormatError: it is unreadable.
        """
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """A file format.

    Attributes:
      recognises: whether a path is of this format, by its name and what is there.
      open: opens it; raises CorruptCheckpointError.
    """

    recognises: Callable[[str], bool]
    open: Callable[[str], NameBasedReader]


class NamedIndex:
    """The index of a name-based checkpoint, with the attributes of `store.index.Index`."""

    def __init__(self, specs: Mapping[str, LeafSpec]):
        self.specs = specs
        self.keys = tuple(sorted(specs))

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def layout_of(self, key: str) -> Layout:
        spec = self.specs[key]
        return Layout(spec.dtype, spec.shape, spec.shape, self.nbytes(key))

    def nbytes(self, key: str) -> int:
        """The size of an array in bytes; 0 where the spec does not say."""
        spec = self.specs[key]
        if spec.is_unreadable or spec.is_bytes:
            return 0
        return math.prod(spec.shape) * dtype_of(spec.dtype).itemsize


class NamedValues:
    """The values of a name-based checkpoint, by name.

    Attributes:
      directory: the path of the file.
      index: what is stored.
      bytes_read: bytes of all values that were read so far.
    """

    def __init__(self, reader: NameBasedReader):
        self.directory = reader.path
        self.bytes_read = 0
        self._reader = reader
        try:
            self.index = NamedIndex(reader.specs())
        except BaseException:
            reader.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def extra(self, name: str) -> bytes | None:
        """None: there is nothing besides the values, and no object graph among them."""
        return None

    def check_files(self) -> None:
        """Nothing to do: opening has read what the file says of itself."""

    def read_bytes(self, key: str) -> bytes:
        """A byte string."""
        value = self._reader.read(key)
        assert isinstance(value, bytes)
        self.bytes_read += len(value)
        return value

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int = 0
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Reads boxes of arrays, one whole array after the other."""
        for number, (key, boxes) in enumerate(requests):
            shape = self.index.specs[key].shape
            for box in boxes:
                if not inside(box, shape):
                    raise ValueError(f"{key}: the box {box} lies outside of shape {shape}")
            array = self._reader.read(key)
            assert isinstance(array, np.ndarray)
            self.bytes_read += array.nbytes
            if tuple(boxes) == (whole(shape),):
                yield number, (np.ascontiguousarray(array).reshape(shape),)
            else:
                yield number, tuple([array[slices(box)].copy(order="C") for box in boxes])
