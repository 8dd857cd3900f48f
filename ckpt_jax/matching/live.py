"""The live graph of a program's objects, traced with this library's specs and registered savers."""

from __future__ import annotations

from typing import Any

from ckpt_jax.matching.trace import LiveGraph, trace
from ckpt_jax.objects import registry
from ckpt_jax.objects.views import View
from ckpt_jax.values import host
from ckpt_jax.values.leaves import describe, describe_held, evaluate


@host.without_gc()
def live_graph(
    root: Any,
    root_key: str = "",
    *,
    for_restore: bool = True,
    may_be_abstract: bool = False,
    root_view: View | None = None,
) -> LiveGraph:
    """The object graph of a program's objects, for a save or a restore; see `trace`. For a save,
    abstract and deleted arrays are problems as others are, unless they may be replaced before it.
    """
    return trace(
        root,
        describe if for_restore or may_be_abstract else describe_held,
        registry.saver_of(),
        root_view=root_view,
        root_key=root_key,
        tie_values=not for_restore,
        evaluate=None if for_restore else evaluate,
    )
