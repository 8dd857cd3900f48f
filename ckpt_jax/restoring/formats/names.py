"""Graphs of checkpoints that only have names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.readers import Stored


def graph_of_names(
    path: str, values: Mapping[str, Stored], separator: str
) -> Callable[[], ObjectGraph]:
    """Makes the graph of names that are split at a separator, when it is asked for."""

    def graph() -> ObjectGraph:
        try:
            return graph_of({name: stored.spec for name, stored in values.items()}, separator)
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: {error}", file=path) from error

    return graph
