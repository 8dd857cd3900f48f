"""Checkpoints in other formats, and our own behind the same protocol, `readers.Reader`.

Each other format is a module with a `readers.Format`, which is listed in `FORMATS`.
"""

from __future__ import annotations

import os
from dataclasses import replace

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.readers import Format, Reader, registered_formats
from ckpt_jax.restoring.formats.equinox import EQUINOX
from ckpt_jax.restoring.formats.msgpack import MSGPACK
from ckpt_jax.restoring.formats.npz import NPY, NPZ
from ckpt_jax.restoring.formats.orbax import ORBAX
from ckpt_jax.restoring.formats.orbax.writing_orbax import write_orbax
from ckpt_jax.restoring.formats.refused import REFUSED
from ckpt_jax.restoring.formats.safetensors import SAFETENSORS
from ckpt_jax.restoring.formats.tensorflow import TENSORFLOW
from ckpt_jax.restoring.formats.tensorflow.writing_tensorflow import write_tensorflow
from ckpt_jax.restoring.formats.torch import TORCH
from ckpt_jax.restoring.formats.torch_distributed import TORCH_DISTRIBUTED
from ckpt_jax.restoring.formats.writing_npz import write_npz
from ckpt_jax.restoring.formats.writing_safetensors import write_safetensors
from ckpt_jax.store.objects import is_url

FORMATS: tuple[Format, ...] = (
    replace(SAFETENSORS, write=write_safetensors),
    replace(NPZ, write=write_npz),
    replace(ORBAX, write=write_orbax, nests=True),
    replace(TENSORFLOW, write=write_tensorflow),
    *(EQUINOX, NPY, TORCH, TORCH_DISTRIBUTED, MSGPACK),
    *REFUSED,  # after all that can be read
)


def formats() -> tuple[Format, ...]:
    """All formats besides our own, in the order in which they are asked."""
    return (*registered_formats(), *FORMATS)


def format_of(path: str) -> Format | None:
    """The format that recognises what is at an absolute path; None if none does. Of what lies in an
    object store, only formats that a program has registered are asked."""
    asked = registered_formats() if is_url(path) else formats()
    return next((format for format in asked if format.recognises(path)), None)


def foreign_steps(directory: str) -> dict[int, str]:
    """The checkpoints of other formats in a directory, by number; ascending."""
    if is_url(directory):
        return {}
    found = {number: path for each in formats() for number, path in each.steps(directory).items()}
    return dict(sorted(found.items()))


def open_foreign(path: str) -> Reader | None:
    """Opens what is at an absolute path, if a format recognises it.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    format = format_of(path)
    if format is not None:
        return format.open(path)
    for format in () if is_url(path) else formats():
        if format.suffixes and path.lower().endswith(format.suffixes) and os.path.isfile(path):
            raise CorruptCheckpointError(
                f"{path}: damaged or incomplete: its name is that of a file of {format.name}, but "
                "it does not begin like one",
                file=path,
            )
    return None


__all__ = ["FORMATS", "foreign_steps", "format_of", "formats", "open_foreign"]
