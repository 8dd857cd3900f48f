"""Unchanged: the check for a training loop that saves the same values again and again.

A pytree is rebuilt by each training step. If the program does not hand the new one to its
`Checkpoint`, every checkpoint holds the values of the first step. This is found by identity: in a
later save, every immutable array is still the very object that was saved before.

Values in mutable objects say nothing, with one exception: if a mutable object (an `nnx.Module`, a
`Variable`) holds parameters, then training happens there, and immutable values beside it may stay
as they are. *Parameters* are arrays of floats with more than one element; a counter is none.

Arrays are remembered by weak references, so that none is kept alive. A numpy array may have been
changed in place: small ones are compared by their contents, large ones count as changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any
from weakref import ref

import jax
import numpy as np

from ckpt_jax.api.per_process import PerProcess
from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import reachable
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.stateful import STATEFUL

_MAX_COMPARED_NBYTES = 1 << 20  # of numpy arrays


class Unchanged:
    """Compares the immutable values of a save with those of the save before."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._values: dict[str, Any] = {}
        self._has_told = False

    def names(self, live: LiveGraph, number: int) -> list[Label]:
        """The names of the pytrees that a checkpoint holds as the one before it held them.

        Args:
          live: what is about to be saved.
          number: of the checkpoint.

        Returns:
          Labels of children of the root. There are none if any value has changed, the number has
          not advanced, or names have been returned before.
        """
        if self._has_told:
            return []
        before, was = self._values, self._number
        self._values = {} if _trains_in_place(live) else dict(_remembered(live))
        self._number = number
        is_same = (
            was is not None
            and number > was
            and bool(before)
            and before.keys() == self._values.keys()
            and all([_is_same(before[path], now) for path, now in self._values.items()])
        )
        names = _names_of_trees(live) if is_same else []
        self._has_told = bool(names)
        return names


def _trains_in_place(live: LiveGraph) -> bool:
    """Whether a mutable object holds parameters, or what only a saver knows."""
    for node, view in enumerate(live.views):
        if view.mutable:
            if live.graph.nodes[node].saver is not None:
                if view is not STATEFUL and not isinstance(live.objects[node], PerProcess):
                    return True  # neither of these holds parameters, but positions in data
                continue
            for value in live.values[node].values():
                if isinstance(value, jax.Array | np.ndarray) and _are_parameters(value):
                    return True
    return False


def _are_parameters(array: Any) -> bool:
    return array.size > 1 and jax.numpy.issubdtype(array.dtype, np.inexact)


def _remembered(live: LiveGraph) -> Iterator[tuple[str, Any]]:
    """By path, how each immutable value is recognised in the next save."""
    nbytes = 0
    for node, view in enumerate(live.views):
        if view.mutable:
            continue
        path = live.graph.object_keys[node]
        if live.graph.nodes[node].saver is not None:
            yield path, _reference(live.objects[node])
            continue
        for value in live.values[node].values():
            if isinstance(value, np.ndarray):
                nbytes += value.nbytes
                is_small = nbytes <= _MAX_COMPARED_NBYTES
                yield path, _contents(value) if is_small else object()
            else:
                yield path, _reference(value) if isinstance(value, jax.Array) else value


def _contents(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, array.dtype.str, zlib.crc32(array.tobytes())


def _reference(obj: Any) -> Any:
    try:
        return ref(obj)
    except TypeError:  # it cannot be referred to weakly: it counts as changed
        return object()


def _is_same(before: Any, now: Any) -> bool:
    if isinstance(before, ref):
        return isinstance(now, ref) and (obj := before()) is not None and obj is now()
    return type(before) is type(now) and before == now


def _names_of_trees(live: LiveGraph) -> list[Label]:
    """The labels of the root's children that are pytrees with arrays."""
    names: list[Label] = []
    for label, child in live.graph.nodes[0].children:
        if not live.views[child].mutable and any(
            isinstance(value, jax.Array | np.ndarray)
            for node in reachable(live.graph, [child])
            for value in live.values[node].values()
        ):
            names.append(label)
    return names
