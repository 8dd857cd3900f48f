"""Checkpoints in other formats, and our own behind the same protocol, `readers.Reader`.

Each other format is a module with a `readers.Format`, which is listed in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckpt_jax.errors import CorruptCheckpointError
from ckpt_jax.readers import Format, Reader, registered_formats
from ckpt_jax.restoring.formats.equinox import EQUINOX
from ckpt_jax.restoring.formats.keras import KERAS
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
from ckpt_jax.store.looks import is_file, looking

FORMATS: tuple[Format, ...] = (
    replace(SAFETENSORS, write=write_safetensors),
    replace(NPZ, write=write_npz),
    replace(ORBAX, write=write_orbax, nests=True),
    replace(TENSORFLOW, write=write_tensorflow),
    *(EQUINOX, NPY, TORCH, TORCH_DISTRIBUTED, KERAS, MSGPACK),
    *REFUSED,  # after all that can be read
)


def formats() -> tuple[Format, ...]:
    """All formats besides our own, in the order in which they are asked."""
    return (*registered_formats(), *FORMATS)


def format_of(path: str) -> Format | None:
    """The format that recognises what is at an absolute path; None if none does."""
    return _format_of(path, formats())


def _format_of(path: str, asked: Sequence[Format]) -> Format | None:
    with looking(path):
        return next((format for format in asked if format.recognises(path)), None)


def foreign_steps(directory: str) -> dict[int, str]:
    """The checkpoints of other formats in a directory, by number; ascending."""
    with looking(directory):
        steps = [each.steps(directory) for each in formats()]
    found = {number: path for each in steps for number, path in each.items()}
    return dict(sorted(found.items()))


def open_foreign(path: str, *, is_own: bool = False) -> Reader | None:
    """Opens what is at an absolute path, if a format recognises it.

    Args:
      path: of the checkpoint.
      is_own: whether it is known to be one of this library. Then only formats that a program has
        registered are asked.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    with looking(path):
        format = _format_of(path, registered_formats() if is_own else formats())
        if format is not None:
            return format.open(path)
        if not is_own:
            _require_no_name(path)
    return None


def _require_no_name(path: str) -> None:
    """Raises CorruptCheckpointError if a file that is not recognised has the name of a format."""
    for format in formats():
        if format.suffixes and path.lower().endswith(format.suffixes) and is_file(path):
            raise CorruptCheckpointError(
                f"{path}: damaged or incomplete: its name is that of a file of {format.name}, but "
                "it does not begin like one",
                file=path,
            )


__all__ = ["FORMATS", "foreign_steps", "format_of", "formats", "open_foreign"]
