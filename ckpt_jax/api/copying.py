"""Copies of checkpoints, from one storage to any other."""

from __future__ import annotations

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.progress import progress
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.store.copying import copy_checkpoint
from ckpt_jax.store.paths import absolute, as_path
from ckpt_jax.store.storage import Pinned, storage_of


def copy(
    source: Path,
    destination: Path,
    *,
    overwrite: bool = False,
    options: CheckpointOptions | None = None,
) -> str:
    """Copies a checkpoint between any two storages: file systems and object stores.

    All bytes are compared with their checksums before they are written. The copy appears at its
    path in one step, whole. If a copy is interrupted, or a storage fails, another call goes on from
    what was copied. One process does this; it does not meet others.

    Args:
      source: the path or URL of a checkpoint of this library.
      destination: the path or URL of the copy.
      overwrite: whether a checkpoint at `destination` is replaced.
      options: `durable`, `max_inflight_bytes` and `progress` apply.

    Returns:
      `destination`.

    Raises:
      CheckpointNotFoundError: there is no checkpoint at `source`, or it was removed meanwhile.
      CorruptCheckpointError: the source is damaged; there is no copy.
      FileExistsError: there is something at `destination` that may not be replaced.
      UnsupportedFormatError: another library wrote `source`.
      OSError: a storage refused.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"x": 1})
      ...     ckpt.load(ckpt.copy(path, "memory://copies/a"))
      {'x': 1}
    """
    options, path = given(options), as_path(source, "source")
    destination = as_path(destination, "destination")
    if (other := format_of(absolute(path))) is not None:
        raise UnsupportedFormatError(
            f"{path}: expected a checkpoint of ckpt_jax, found one of {other.name}. Copy its files "
            "with a tool for files, or ckpt.convert it."
        )
    storage = storage_of(path)
    location = storage.located(path)
    storage.open(location, path).close()  # says what is there if it is no checkpoint
    pinned = Pinned.of(path, location, storage)
    with pinned.unless_replaced():
        copy_checkpoint(
            pinned,
            destination,
            storage_of(destination),
            overwrite=overwrite,
            durable=options.durable,
            max_inflight_bytes=options.max_inflight_bytes,
            progress=lambda nbytes: progress(options.progress, f"copying {path}", nbytes),
        )
    return destination
