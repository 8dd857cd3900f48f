"""Output: tables that are drawn on a terminal, and plain text everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from ckpt_jax.showing.rows import Part, Table, plain

_DRAWN = 2000  # rows; more would take seconds


def write(parts: Sequence[Part], stream: TextIO) -> None:
    """Writes an output."""
    rows = sum([len(part.rows) for part in parts if isinstance(part, Table)])
    if stream.isatty() and rows <= _DRAWN:
        # Only a terminal needs it, and the import takes a while.
        from ckpt_jax.showing.drawing import draw

        draw(parts, stream)
    else:
        stream.write(plain(parts) + "\n")
    stream.flush()
