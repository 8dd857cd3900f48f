"""Derived values: values that rename rules or adapters make of stored values.

*Rules* make a value box by box. A wanted box is traced back to boxes of stored values. Those are
read, and the wanted box is made of them. So every byte that is read is needed by a device, and
nothing is put together that has to be cut apart again. Values are made in batches, so that memory
holds the stored boxes of only a few values at a time, beside the values themselves.

An *adapter* makes a whole value of the stored values that its callback chose. All other values are
read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.graph.boxes import Box, whole
from ckpt_jax.graph.dtypes import LossyConversionError, converted
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.restoring.adapters import Resharded
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formulas import Derivation, Derived, evaluate, needs
from ckpt_jax.store.batches import batches
from ckpt_jax.values import host

Request = jax.ShapeDtypeStruct | None


class DerivedReader:
    """A checkpoint's reader that also reads derived values.

    Args:
      reader: of the checkpoint.
      derived: by key, how values are made; from `rename` and `adapt`.
    """

    def __init__(self, reader: CheckpointReader, derived: Mapping[str, Derivation]):
        self.path = reader.path
        self._reader = reader
        self._derived = {k: made for k, made in derived.items() if isinstance(made, Derived)}
        self._resharded = {k: made for k, made in derived.items() if isinstance(made, Resharded)}

    def read(
        self,
        requests: Mapping[str, Any],
        options: CheckpointOptions,
        arrived: Callable[[int], object],
    ) -> dict[str, Any]:
        """Reads as `CheckpointReader.read` does, but `arrived` hears of whole derived values."""
        derived = [key for key in requests if key in self._derived]
        resharded = [key for key in requests if key in self._resharded]
        made = {*derived, *resharded}
        stored = {key: request for key, request in requests.items() if key not in made}
        results = self._reader.read(stored, options, arrived)
        derived.sort(key=lambda key: self._derived[key].keys[0])  # parts of one value together
        for batch in batches(derived, self.stored_nbytes, options.max_inflight_bytes):
            results.update(self._derive({key: requests[key] for key in batch}, options))
            arrived(sum(map(self.stored_nbytes, batch)))
        for key in resharded:
            try:
                results[key] = self._reshard(self._resharded[key], requests[key], options)
            except LossyConversionError as error:
                error.key = key
                raise
            arrived(self.stored_nbytes(key))
        return results

    def stored_nbytes(self, key: str) -> int:
        """The size in the checkpoint of the stored values that a value is made of."""
        if key in self._resharded:
            return sum(map(self._reader.stored_nbytes, self._resharded[key].keys))
        if key in self._derived:
            return self._derived[key].stored_nbytes
        return self._reader.stored_nbytes(key)

    def _derive(
        self, requests: Mapping[str, Request], options: CheckpointOptions
    ) -> dict[str, Any]:
        boxes = {key: _boxes(request, self._derived[key]) for key, request in requests.items()}
        needed: dict[str, dict[Box, None]] = {}
        for key, wanted in boxes.items():
            for each in wanted:
                for source, box in needs(self._derived[key].formula, each):
                    needed.setdefault(source, {})[box] = None
        parts = self._reader.read_boxes({key: [*found] for key, found in needed.items()}, options)
        taken: set[tuple[str, Box]] = set()

        def part(source: str, box: Box) -> np.ndarray:
            """A part of a stored value. No two results share one array."""
            again = (source, box) in taken
            taken.add((source, box))
            return parts[source, box].copy() if again else parts[source, box]

        results: dict[str, Any] = {}
        known: dict[int, np.ndarray] = {}  # what functions made of whole values
        for key, request in requests.items():
            derived = self._derived[key]
            try:
                contents = [
                    _contiguous(evaluate(derived.formula, box, part, known)) for box in boxes[key]
                ]
                results[key] = _placed(contents, request, derived.spec.shape)
            except LossyConversionError as error:
                error.key = key
                raise
        return results

    def _reshard(self, made: Resharded, request: Request, options: CheckpointOptions) -> Any:
        parts = zip(made.keys, made.boxes, strict=True)
        values = [self._reader.read({key: box}, options)[key] for key, box in parts]
        return made.make(values, request, cast=options.cast, path=self.path)


def _boxes(request: Request, derived: Derived) -> Sequence[Box]:
    if request is None or request.sharding is None:
        return (whole(derived.spec.shape),)
    return host.wanted_boxes(request.sharding, derived.spec.shape)


def _contiguous(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part) if part.ndim else part


def _placed(contents: list[np.ndarray], request: Request, shape: tuple[int, ...]) -> Any:
    if request is None:
        return contents[0]
    dtype = np.dtype(request.dtype)
    contents = [converted(part, dtype) for part in contents]
    if request.sharding is None:
        return host.put(contents)[0]
    return host.place(shape, dtype, request.sharding, contents)
