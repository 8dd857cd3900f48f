"""Extents: arrays that lie as plain bytes in files.

An *extent* is a box of an array whose elements lie in one file, from an offset on, with a stride
for each axis. Safetensors, npz, msgpack, torch and TensorFlow files differ in how they say where
their arrays lie. Once that is known, `stored.ExtentsReader` reads all of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of, whole
from ckpt_jax.graph.dtypes import BYTES, dtype_name, dtype_of
from ckpt_jax.graph.specs import LeafSpec


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum of the bytes of a whole extent. Parts of an extent cannot be checked.

    Attributes:
      kind: "crc32" as in zip files, or "crc32c".
      value: the checksum.
      start: the checksum of what lies before the extent and is included.
    """

    kind: Literal["crc32", "crc32c"]
    value: int
    start: int = 0

    def extended(self, before: int, data: memoryview) -> int:
        """The checksum of `data` and of what came before, which had the checksum `before`."""
        return _CRC[self.kind](data, before)


def _crc32c(data: memoryview, start: int) -> int:
    import crc32c  # only TensorFlow's files need it

    return crc32c.crc32c(data, start)


_CRC: dict[str, Callable[[memoryview, int], int]] = {"crc32": zlib.crc32, "crc32c": _crc32c}


@dataclass(frozen=True, slots=True)
class Extent:
    """A box of an array that lies in a file.

    Attributes:
      box: which elements of the array.
      file: path of the file.
      offset: of the first element in the file, in bytes.
      strides: for each axis, the distance between neighbours in elements, at least 0. None means
        that the box lies in C order.
      checksum: of all bytes from the first element to the last; None if there is none.
    """

    box: Box
    file: str
    offset: int
    strides: tuple[int, ...] | None = None
    checksum: Checksum | None = None

    @property
    def span(self) -> int:
        """The number of elements from the first to the last, with those in between."""
        if self.strides is None:
            return math.prod(shape_of(self.box))
        return span_of(shape_of(self.box), self.steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, also where the box lies in C order."""
        return c_strides(shape_of(self.box)) if self.strides is None else self.strides


@dataclass(frozen=True, slots=True)
class Stored:
    """One value of a checkpoint, and where it lies.

    Attributes:
      spec: the description of the value. If its kind is "unreadable", its `note` says why.
      extents: where an array lies; the boxes tile the array. A byte string has one extent, which
        has the box ().
      nbytes: the size of a byte string, or of `contents`.
      contents: bytes, or a function that fills a buffer with them, for a value that does not lie in
        a file as it is. The extents are then parts of these bytes instead of a file.
      finish: changes elements of an array in place after they were read, such as their byte order.
      damage: what is wrong with the value, if it is listed but parts of it are lost. To read it is
        an error.
    """

    spec: LeafSpec
    extents: tuple[Extent, ...] = ()
    nbytes: int = 0
    contents: bytes | Callable[[memoryview], object] | None = None
    finish: Callable[[np.ndarray], object] | None = None
    damage: str = ""

    @classmethod
    def of(cls, value: np.ndarray | bytes) -> Stored:
        """A value that is in memory.

        >>> Stored.of(np.zeros((2, 3))).spec.shape
        (2, 3)
        """
        if isinstance(value, bytes):
            extent = Extent((), "", 0)
            return cls(LeafSpec("bytes", BYTES), (extent,), len(value), value)
        extent = Extent(whole(value.shape), "", 0)
        spec = LeafSpec("numpy", dtype_name(value.dtype), value.shape)
        native = value.astype(dtype_of(spec.dtype), copy=False)
        return cls(spec, (extent,), value.nbytes, native.tobytes())


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of an array in C order, in elements.

    >>> c_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def span_of(shape: Sequence[int], steps: Sequence[int]) -> int:
    if not all(shape):
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))


def in_c_order(shape: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether elements lie densely in C order; axes of one element may have any stride."""
    found = [step for n, step in zip(shape, steps, strict=True) if n != 1]
    return found == [*c_strides([n for n in shape if n != 1])]
