"""Casts on save: arrays of floats that are stored with another dtype than the program has.

The dtype is part of the graph before anything is written. The conversion itself comes when a slice
is written, on the host, so that a save compiles nothing and holds no second copy of everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of, family
from ckpt_jax.graph.nodes import Attribute, Node
from ckpt_jax.graph.patterns import Pattern, compile_pattern
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.report import near_miss, nearest
from ckpt_jax.values.host import Cast

Casts = Sequence[tuple[Pattern, np.dtype]]


def with_casts(live: LiveGraph, casts: Casts) -> tuple[LiveGraph, Mapping[str, Cast]]:
    """Applies casts to a traced graph.

    Args:
      live: the objects that are saved.
      casts: patterns of paths with dtypes. For each array of floats, the first one that matches
        counts.

    Returns:
      The graph, which says the dtypes that are stored, and the casts of values by key.

    Raises:
      ValueError: a pattern counts for no array of floats.
    """
    if not casts:
        return live, {}
    graph = live.graph
    compiled = [compile_pattern(pattern) for pattern, _ in casts]
    used: set[int] = set()
    found: dict[str, Cast] = {}
    paths: list[str] = []

    def changed(number: int, attribute: Attribute) -> Attribute:
        spec = attribute.spec
        if not (spec.is_array and spec.dtype and family(dtype_of(spec.dtype)) == "float"):
            return attribute
        path = graph.value_path(number, attribute.name)
        paths.append(path)
        chosen = next((n for n, each in enumerate(compiled) if each.fullmatch(path)), None)
        if chosen is None:
            return attribute
        used.add(chosen)
        dtype = casts[chosen][1]
        if dtype_name(dtype) == spec.dtype:
            return attribute
        found[attribute.key] = Cast(path, dtype)
        original = spec.cast_from or spec.dtype  # a conversion casts what was cast before
        was = "" if original == dtype_name(dtype) else original
        new = replace(spec, dtype=dtype_name(dtype), cast_from=was)
        return replace(attribute, spec=new)

    def changed_node(number: int, node: Node) -> Node:
        attributes = tuple([changed(number, attribute) for attribute in node.attributes])
        return node if attributes == node.attributes else replace(node, attributes=attributes)

    nodes = tuple([changed_node(number, node) for number, node in enumerate(graph.nodes)])
    unused = [casts[n][0] for n in range(len(casts)) if n not in used]
    if unused:
        lines = "\n".join(f"  {_unused(pattern, paths)}" for pattern in unused)
        raise ValueError(
            "CheckpointOptions.cast_on_save: every pattern has to choose arrays of floats. Nothing "
            f"was saved.\n{lines}\nPatterns are of whole paths, as params/**, and the first one "
            "that matches counts."
        )
    return replace(live, graph=replace(graph, nodes=nodes)), found


def _unused(pattern: Pattern, paths: Sequence[str]) -> str:
    if any([compile_pattern(pattern).fullmatch(path) for path in paths]):
        return f"{pattern!r}: an earlier pattern matches all that it does"
    hint = near_miss(nearest(pattern, paths)) if isinstance(pattern, str) else ""
    return f"{pattern!r}: it matches no array of floats{hint}"
