"""`show`: a checkpoint, or the differences between two, as a value that prints and unfolds."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_jax.api.inspect import load_checkpoint
from ckpt_jax.options import Path
from ckpt_jax.showing import notebook, rows
from ckpt_jax.showing.contents import Contents, contents_of
from ckpt_jax.showing.differences import Differences, structural, with_values
from ckpt_jax.showing.findings import difference_parts


@dataclass(frozen=True, repr=False)
class Overview:
    """What `show` returns. It prints as a table, and is a tree that unfolds in a notebook.

    Attributes:
      contents: the values of the checkpoint.
      differences: the differences to the other one, if one was given.
    """

    contents: Contents
    differences: Differences | None = None

    def __str__(self) -> str:
        if self.differences is not None:
            return rows.plain(difference_parts(self.differences))
        contents = self.contents
        parts = [rows.heading(contents), *rows.metadata_parts(contents.metadata)]
        return rows.plain([*parts, rows.tree(contents)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        if self.differences is not None:
            return notebook.differences(self.differences)
        return notebook.tree(self.contents)


def show(path: Path, other: Path | None = None) -> Overview:
    """Shows what a checkpoint holds, or how another one differs from it.

    No device is used. Values are read only if there are two checkpoints, and then in portions.

    Args:
      path: of a checkpoint of any format, or of a directory whose latest checkpoint is meant.
      other: of the other checkpoint.

    Returns:
      A value to print, or to show in a notebook: a tree with types, sizes and shardings, or a table
      of what was added, removed, reshaped, retyped and changed.

    Raises:
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.

    Example:
      >>> import ckpt_jax as ckpt, numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"dense": {"w": np.ones((2, 3))}, "step": 7})
      ...     print(str(show(path)).replace(directory, "runs"))
      runs/a: 2 values, 56 B, format ckpt_jax
      path    type           size
      dense/                 48 B  1 value
        w     float64[2, 3]  48 B
      step    int             8 B
    """
    with load_checkpoint(path) as reader:
        contents = contents_of(reader)
        if other is None:
            return Overview(contents)
        with load_checkpoint(other) as second:
            found = structural(contents, contents_of(second))
            return Overview(contents, with_values(found, reader, second, 0.0, lambda nbytes: None))
