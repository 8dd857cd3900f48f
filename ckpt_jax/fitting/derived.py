"""Reading values that rename rules derive from stored ones.

A wanted box of a derived value is traced back to boxes of stored values, those are read, and the
box is made of them: what a device does not need is not read, and nothing is put together that
the program would cut apart again. Values are made in batches, so that the pieces of only a few
of them are in memory next to the values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ckpt_jax.arrays import host
from ckpt_jax.fitting.transforms import Derived
from ckpt_jax.options import DEFAULT, CheckpointOptions
from ckpt_jax.reader import CheckpointReader
from ckpt_jax.store.box import Box, whole
from ckpt_jax.store.index import dtype_of


class DerivedReader:
    """A reader that also knows the values that are derived from those of another one."""

    def __init__(self, reader: CheckpointReader, derived: Mapping[str, Derived]):
        self.path = reader.path
        self._reader = reader
        self._derived = derived

    def read(
        self,
        requests: Mapping[str, Any],
        options: CheckpointOptions = DEFAULT,
        arrived: Callable[[int], object] = lambda nbytes: None,
    ) -> dict[str, Any]:
        """As `CheckpointReader.read`; of derived values, whole ones only."""
        stored = {key: want for key, want in requests.items() if key not in self._derived}
        results = self._reader.read(stored, options, arrived)
        wanted = {key: want for key, want in requests.items() if key in self._derived}
        for batch in self._batches(wanted, options.max_inflight_bytes):
            results.update(self._read_derived(batch, options))
            arrived(sum(map(self.stored_nbytes, batch)))
        return results

    def stored_nbytes(self, key: str) -> int:
        """The size in the checkpoint of what a value is made of."""
        derived = self._derived.get(key)
        if derived is None:
            return self._reader.stored_nbytes(key)
        return math.prod(derived.spec.shape) * dtype_of(derived.stored.dtype).itemsize

    def _batches(
        self, requests: Mapping[str, jax.ShapeDtypeStruct | None], nbytes: int
    ) -> Iterator[dict[str, jax.ShapeDtypeStruct | None]]:
        """Requests in groups of about that many bytes, parts of one stored value together."""
        batch: dict[str, jax.ShapeDtypeStruct | None] = {}
        held = 0
        for key in sorted(requests, key=lambda key: self._derived[key].keys[0]):
            size = self.stored_nbytes(key)
            if batch and held + size > nbytes:
                yield batch
                batch, held = {}, 0
            batch[key] = requests[key]
            held += size
        if batch:
            yield batch

    def _read_derived(
        self, requests: Mapping[str, jax.ShapeDtypeStruct | None], options: CheckpointOptions
    ) -> dict[str, Any]:
        boxes = {key: _boxes(want, self._derived[key]) for key, want in requests.items()}
        needed: dict[str, dict[Box, None]] = {}
        for key, wanted in boxes.items():
            for keys, box in map(self._derived[key].needs, wanted):
                for source in keys:
                    needed.setdefault(source, {})[box] = None
        parts = self._reader.read_boxes({key: [*found] for key, found in needed.items()}, options)
        taken: set[tuple[str, Box]] = set()

        def part(source: str, box: Box) -> np.ndarray:
            """A part, which two results never share."""
            again = (source, box) in taken
            taken.add((source, box))
            return parts[source, box].copy() if again else parts[source, box]

        results: dict[str, Any] = {}
        for key, request in requests.items():
            derived = self._derived[key]
            contents = [
                derived.make([part(source, box) for source in keys])
                for keys, box in map(derived.needs, boxes[key])
            ]
            results[key] = _placed(contents, request, derived.spec.shape)
        return results


def _boxes(request: jax.ShapeDtypeStruct | None, derived: Derived) -> tuple[Box, ...]:
    if request is None or request.sharding is None:
        return (whole(derived.spec.shape),)
    return host.wanted_boxes(request.sharding, derived.spec.shape)


def _placed(
    contents: list[np.ndarray], request: jax.ShapeDtypeStruct | None, shape: tuple[int, ...]
) -> Any:
    if request is None:
        return contents[0]
    dtype = np.dtype(request.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        contents = [part.astype(dtype, copy=False) for part in contents]
    if request.sharding is None:
        return host.put(contents)[0]
    return host.place(shape, dtype, request.sharding, contents)
