"""Reading: the values of a checkpoint as renaming and adapting want them.

A *derived* value is made box by box. A wanted box is traced back to boxes of stored values, those
are read, and the box is made of them: what a device does not need is not read, and nothing is put
together that the program would cut apart again. Values are made in batches, so that the pieces of
only a few of them are in memory next to the values themselves.

A *resharded* value is made whole, by the callback of an adapter, of what the callback asked for.
All other values are read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckpt_jax.errors import RestoreMismatchError
from ckpt_jax.graph.boxes import Box, whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.labels import object_key_of, path_of
from ckpt_jax.options import DEFAULT, CheckpointOptions
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.adapters import Inputs
from ckpt_jax.restoring.reader import CheckpointReader
from ckpt_jax.restoring.transforms import Derived
from ckpt_jax.store.batches import batches
from ckpt_jax.values import host
from ckpt_jax.values.leaves import struct_of

Request = jax.ShapeDtypeStruct | None


class FittedReader:
    """A checkpoint's reader that also knows values which are made of stored ones.

    Args:
      reader: of the checkpoint.
      derived, inputs: by key, how values are made, as `rename` and `settle` found it.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        derived: Mapping[str, Derived],
        inputs: Mapping[str, Inputs],
    ):
        self.path = reader.path
        self._reader = reader
        self._derived = derived
        self._inputs = inputs

    def read(
        self,
        requests: Mapping[str, Any],
        options: CheckpointOptions = DEFAULT,
        arrived: Callable[[int], object] = lambda nbytes: None,
    ) -> dict[str, Any]:
        """As `CheckpointReader.read`; of what is made, whole values only."""
        resharded = [key for key in requests if key in self._inputs]
        derived = [key for key in requests if key in self._derived and key not in self._inputs]
        made = {*resharded, *derived}
        stored = {key: request for key, request in requests.items() if key not in made}
        results = self._reader.read(stored, options, arrived)
        derived.sort(key=lambda key: self._derived[key].keys[0])  # parts of one value together
        for batch in batches(derived, self.stored_nbytes, options.max_inflight_bytes):
            results.update(self._derive({key: requests[key] for key in batch}, options))
            arrived(sum(map(self.stored_nbytes, batch)))
        for key in resharded:
            results[key] = self._reshard(self._inputs[key], requests[key], options)
            arrived(self.stored_nbytes(key))
        return results

    def stored_nbytes(self, key: str) -> int:
        """The size in the checkpoint of what a value is made of."""
        if key in self._inputs:
            return sum(map(self._reader.stored_nbytes, self._inputs[key].keys))
        if key in self._derived:
            derived = self._derived[key]
            return math.prod(derived.spec.shape) * dtype_of(derived.stored.dtype).itemsize
        return self._reader.stored_nbytes(key)

    def _derive(
        self, requests: Mapping[str, Request], options: CheckpointOptions
    ) -> dict[str, Any]:
        boxes = {key: _boxes(request, self._derived[key]) for key, request in requests.items()}
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

    def _reshard(self, inputs: Inputs, request: Request, options: CheckpointOptions) -> Any:
        parts = zip(inputs.keys, inputs.boxes, strict=True)
        values = [self._reader.read({key: box}, options)[key] for key, box in parts]
        struct = request or struct_of(inputs.target)
        result = np.asarray(inputs.callback.reshard(values, struct))
        if options.cast:
            result = result.astype(struct.dtype)
        if (result.shape, result.dtype) != (struct.shape, struct.dtype):
            what = (
                f"expected {struct.dtype}{list(struct.shape)} from "
                f"{type(inputs.callback).__qualname__}.reshard, got "
                f"{result.dtype}{list(result.shape)}"
            )
            path = path_of(object_key_of(inputs.keys[0]))
            report = RestoreReport(self.path, mismatched=(ReportEntry(path, what=what),))
            raise RestoreMismatchError(f"{path}: {what}. Nothing was changed", report)
        return result if request is None else host.put([result], request.sharding)[0]


def _boxes(request: Request, derived: Derived) -> Sequence[Box]:
    if request is None or request.sharding is None:
        return (whole(derived.spec.shape),)
    return host.wanted_boxes(request.sharding, derived.spec.shape)


def _placed(contents: list[np.ndarray], request: Request, shape: tuple[int, ...]) -> Any:
    if request is None:
        return contents[0]
    dtype = np.dtype(request.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        contents = [part.astype(dtype, copy=False) for part in contents]
    if request.sharding is None:
        return host.put(contents)[0]
    return host.place(shape, dtype, request.sharding, contents)
