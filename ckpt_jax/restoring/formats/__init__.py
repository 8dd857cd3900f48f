"""Checkpoints in other formats, and our own behind the same protocol, `readers.Reader`.

Each other format is a module with a `readers.Format`, which is listed in `FORMATS`.
"""

from __future__ import annotations

import os

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.readers import Format, Reader, registered_formats
from ckpt_jax.restoring.formats.msgpack import MSGPACK
from ckpt_jax.restoring.formats.npz import NPY, NPZ
from ckpt_jax.restoring.formats.safetensors import SAFETENSORS
from ckpt_jax.restoring.formats.torch import TORCH
from ckpt_jax.restoring.formats.torch_distributed import TORCH_DISTRIBUTED

FORMATS: tuple[Format, ...] = (SAFETENSORS, NPZ, NPY, TORCH, TORCH_DISTRIBUTED, MSGPACK)


def formats() -> tuple[Format, ...]:
    """All formats besides our own, in the order in which they are asked."""
    return (*registered_formats(), *FORMATS)


def open_foreign(path: str) -> Reader | None:
    """Opens what is at an absolute path, if a format recognises it.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    for format in formats():
        if format.recognises(path):
            return format.open(path)
    for format in formats():
        if format.suffixes and path.lower().endswith(format.suffixes) and os.path.isfile(path):
            raise CorruptCheckpointError(
                f"{path}: damaged or incomplete: its name is that of a file of {format.name}, but "
                "it does not begin like one",
                file=path,
            )
    return None


__all__ = ["FORMATS", "formats", "open_foreign"]
