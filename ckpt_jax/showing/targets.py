"""Plans for targets that are files: another checkpoint, or a JSON file that describes values.

Both become an object graph without objects. The plan is the one of a restore into a program that
has this graph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ckpt_jax.api.inspect import load_checkpoint
from ckpt_jax.graph.dtypes import BYTES, dtype_name
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.nodes import ObjectGraph
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import View
from ckpt_jax.options import DEFAULT
from ckpt_jax.report import RestoreReport
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.run import plan_whole
from ckpt_jax.store.paths import absolute

_MAX_SPEC_NBYTES = 256 << 20


def planned(path: str, target: str) -> RestoreReport:
    """The report of a restore; no array is read.

    Args:
      path: of the checkpoint.
      target: path of another checkpoint, or of a JSON file.

    Raises:
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.
      ValueError: the file does not describe values.
    """
    with load_checkpoint(path) as reader:
        if reader.object_graph.ordered:
            raise ValueError(
                f"{reader.path} holds values in an order and no names, so only a program can say "
                "what they are: ckpt.plan_restore(path, target)"
            )
        graph = _target(target, reader)
        plan = plan_whole(reader, Renamed(reader.graph_to_restore), _live(graph), DEFAULT)
        plan = plan.without_deferral(lambda entry: False)
        return replace(plan.report, nbytes=plan.nbytes)


def _target(target: str, reader: CheckpointReader) -> ObjectGraph:
    if os.path.isfile(target) and format_of(absolute(target)) is None:
        return _graph_of_spec(target, reader)
    with load_checkpoint(target) as other:
        return other.graph_to_restore


def _live(graph: ObjectGraph) -> LiveGraph:
    """A graph with descriptions of values, and no objects."""
    count = len(graph.nodes)
    values = [
        {a.name: jax.ShapeDtypeStruct(a.spec.shape, np.uint8) for a in node.attributes}
        for node in graph.nodes
    ]
    return LiveGraph(graph, (None,) * count, (View(),) * count, tuple(values))


def _graph_of_spec(file: str, reader: CheckpointReader) -> ObjectGraph:
    """The graph that a JSON file describes: {path: {"shape": [...], "dtype": "..."}}, or what
    `show --json` prints."""
    example = '{"params/w": {"shape": [2, 3], "dtype": "float32"}}'
    with open(file, encoding="utf-8") as stream:
        text = stream.read(_MAX_SPEC_NBYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"{file} is neither a checkpoint nor JSON ({error}). Expected something like"
        raise ValueError(f"{what} {example}") from None
    if isinstance(found, dict) and isinstance(found.get("entries"), list):
        found = {str(each.get("path")): each for each in found["entries"] if isinstance(each, dict)}
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{file} describes no values. Expected something like {example}")
    specs: dict[str, LeafSpec] = {}
    problems: list[str] = []
    for path, description in found.items():
        try:
            specs[path] = _spec(description, _saved(reader, path))
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError(f"{file}: expected something like {example}; " + "; ".join(problems))
    return graph_of(specs, "/")


def _saved(reader: CheckpointReader, path: str) -> LeafSpec | None:
    key = reader.key_of(path)
    return None if key is None else reader.object_graph.by_key.get(key)


def _spec(description: Mapping[str, Any], saved: LeafSpec | None) -> LeafSpec:
    """A described value. Python numbers and the like are what they were saved as, if they fit."""
    if not isinstance(description, Mapping):
        raise TypeError(f"got {description!r}")
    if missing := [name for name in ("shape", "dtype") if name not in description]:
        raise ValueError(f"{' and '.join(missing)} missing")
    shape = tuple(description["shape"])
    if not all([type(length) is int and length >= 0 for length in shape]):
        raise ValueError(f"the shape {description['shape']!r} is none")
    name = str(description["dtype"])
    dtype = name if name == BYTES else dtype_name(np.dtype(name))
    if saved is not None and (saved.dtype, saved.shape) == (dtype, shape):
        return saved
    return LeafSpec(str(description.get("kind") or "array"), dtype, shape)
