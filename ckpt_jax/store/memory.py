"""Memory for the arrays that a read gives: aligned, so that JAX uses it without a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BLOCK_NBYTES = 16 << 20
_ALIGNMENT = 64


class Memory:
    """Memory for results. Small arrays are cut from blocks that are large enough for huge pages."""

    def __init__(self, expected_nbytes: int):
        self._block_nbytes = min(_BLOCK_NBYTES, expected_nbytes + _ALIGNMENT)
        self._block = np.empty(0, np.uint8)

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An uninitialized array whose memory begins at a multiple of 64 bytes."""
        nbytes = math.prod(shape) * dtype.itemsize
        room = nbytes + -nbytes % _ALIGNMENT
        if room > self._block_nbytes // 2:
            return np.ndarray(shape, dtype, _aligned(nbytes))
        if room > self._block.size:
            self._block = _aligned(self._block_nbytes)
        taken, self._block = self._block[:nbytes], self._block[room:]
        return np.ndarray(shape, dtype, taken)


def _aligned(nbytes: int) -> np.ndarray:
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skip = -buffer.__array_interface__["data"][0] % _ALIGNMENT
    return buffer[skip : skip + nbytes]
