"""Evaluation beside training: each new checkpoint is read, and its metrics are written back."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from ckpt_jax.api.latest import checkpoints_iterator
from ckpt_jax.api.tree import load
from ckpt_jax.errors import CheckpointNotFoundError
from ckpt_jax.graph.patterns import Selection
from ckpt_jax.manage.arguments import as_metrics
from ckpt_jax.options import Path
from ckpt_jax.store.directory import is_checkpoint
from ckpt_jax.store.guard import changing
from ckpt_jax.store.lease import leased
from ckpt_jax.store.notes import add_metrics
from ckpt_jax.store.paths import as_path
from ckpt_jax.store.storage import generation_at

_log = logging.getLogger("ckpt_jax")

Evaluate = Callable[[str, Any], Mapping[str, Any] | None]


def evaluate_new(
    directory: Path,
    fn: Evaluate,
    *,
    only: Selection | None = None,
    timeout: float | None = None,
    poll_seconds: float = 1.0,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Evaluates the checkpoints of a directory as they appear, in a process beside training.

    It waits for the latest checkpoint, reads values from it, calls `fn`, and records the metrics
    that `fn` returns; then it waits for the next one. Checkpoints that were overtaken meanwhile are
    skipped. While `fn` is at work, no manager removes the checkpoint (a lock on it says so), so
    that the best one is still there when its metrics come. If nothing can be locked, as in an
    object store, and the checkpoint is removed before it was read, the next one is taken.

    The manager that saves takes the metrics into account at its next save. Its policy should let
    checkpoints wait for them: `KeepBest("accuracy", 3, awaiting=2)`.

    Nothing else in the directory is changed, and the manager that saves is not replaced.

    Args:
      directory: where another program saves; it need not exist yet.
      fn: given the path of the checkpoint and its values, as `ckpt.load` gives them; returns
        metrics by name, or None. An error that it raises ends the evaluation.
      only: what to read: a pattern, a list of patterns, or a predicate on paths; see `ckpt.load`.
      timeout: seconds to wait for each new checkpoint; None waits forever.
      poll_seconds: the time between two looks at the directory.
      wait: a function that waits for a number of seconds.
      clock: returns the time in seconds, from any origin.

    Returns:
      The paths of the checkpoints that were evaluated, after no new one has come for `timeout`.

    Raises:
      KeyError: `only` selects nothing.
      ValueError: a metric is not one number.
      CorruptCheckpointError: values of the checkpoint are damaged.

    Example:
      >>> import ckpt_jax as ckpt, numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     checkpoint = ckpt.Checkpoint(params={"w": np.arange(4.0)}, step=100)
      ...     manager = ckpt.CheckpointManager(checkpoint, directory)
      ...     path = manager.save(100)
      ...     def evaluate(path, values):  # in another process
      ...         return {"accuracy": values["params"]["w"].mean()}
      ...     paths = evaluate_new(directory, evaluate, only="params/**", timeout=0)
      ...     manager.metrics(100)
      {'accuracy': 1.5}
    """
    given = as_path(directory, "directory", is_directory=True)
    done: list[str] = []
    for path in checkpoints_iterator(
        given, timeout, poll_seconds=poll_seconds, wait=wait, clock=clock
    ):
        with ExitStack() as exits:
            try:
                if is_checkpoint(path):  # those of other libraries have no leases
                    exits.enter_context(leased(path))
                generation = generation_at(path)
                values = load(path, only=only)
            except CheckpointNotFoundError as error:
                _log.info("%s; the next checkpoint is evaluated instead", error)
                continue
            metrics = fn(path, values)
            del values  # the next ones need the memory
            if metrics is not None:
                _record(given, path, as_metrics(metrics), generation)
        done.append(path)
    return done


def _record(directory: str, path: str, metrics: Mapping[str, float], generation: object) -> None:
    def change() -> bool:
        is_same = generation_at(path) == generation
        if is_same:
            add_metrics(directory, os.path.basename(path), metrics)
        return is_same

    if not changing(directory, change):
        _log.warning(
            "%s was replaced or removed by hand while it was evaluated. Its metrics are not "
            "recorded.",
            path,
        )
