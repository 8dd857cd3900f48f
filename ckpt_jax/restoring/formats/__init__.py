"""Checkpoints in other formats.

A name-based format, a flat mapping from names to arrays, is a module here with a class that
follows the protocol `named.NameBasedReader`, and a line in `FORMATS`. All else follows: the
names become an object graph (`graph.names`), which is matched like any other.
"""

from __future__ import annotations

from ckpt_jax.restoring.formats.named import Format, NamedValues
from ckpt_jax.restoring.formats.npz import NPZ

FORMATS: tuple[Format, ...] = (NPZ,)


def open_foreign(path: str) -> NamedValues | None:
    """Opens what is at `path`, if a format takes it for its own."""
    for format in FORMATS:
        if format.recognises(path):
            return NamedValues(format.open(path))
    return None


__all__ = ["FORMATS", "Format", "NamedValues", "open_foreign"]
