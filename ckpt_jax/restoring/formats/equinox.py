"""Equinox's `.eqx`: arrays in numpy's format, one after the other, in the order of a tree's leaves.

There are no names, so a target is needed that has the leaves in the same order (`ordered`). Without
one, `ckpt.load` gives a list. A line of JSON may come first, in which programs keep what they need
to build the tree; it is skipped. There are no checksums.
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_jax.errors import CheckpointError
from ckpt_jax.readers import ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.names import graph_of_tree
from ckpt_jax.restoring.formats.npz import MAGIC, UNKNOWN, stored_array
from ckpt_jax.store.looks import head_of
from ckpt_jax.store.objects import is_url

_MAX_LINE_NBYTES = 1 << 20
_MAX_ARRAYS = 1 << 20


def open_equinox(path: str) -> ExtentsReader:
    """Opens a file.

    Raises:
      CorruptCheckpointError: it is damaged.
    """
    files = Files(path)
    at = 0
    if files.read_up_to(path, 0, 1) == b"{":
        at = files.read_up_to(path, 0, _MAX_LINE_NBYTES).index(b"\n") + 1
    found: list[Stored] = []
    try:
        while files.read_up_to(path, at, 1):
            if len(found) >= _MAX_ARRAYS:
                raise ValueError(f"it has more than {_MAX_ARRAYS} arrays")
            stored, nbytes = _array(files, path, at)
            found.append(stored)
            at += nbytes
    except ValueError as error:
        raise files.damage(path, f"array {len(found)}, at byte {at}: {error}") from error
    values, graph = graph_of_tree(found)
    return ExtentsReader(path, values, lambda: replace(graph, ordered=True), files)


def _array(files: Files, path: str, at: int) -> tuple[Stored, int]:
    """The array that begins at a byte, and how many bytes it takes."""
    rest = UNKNOWN if is_url(path) else files.size(path) - at

    def head(nbytes: int) -> bytes:
        return files.read_up_to(path, at, min(nbytes, rest))

    stored, header, nbytes = stored_array(path, at, rest, head, exact=False)
    return stored, len(header) + nbytes


def _recognises(path: str) -> bool:
    """Whether a file begins with an array, after which there is more, or with a line of JSON before
    an array."""
    start = head_of(path, len(MAGIC))
    if start == MAGIC:
        try:
            files = Files(path)
            return files.read_up_to(path, _array(files, path, 0)[1], 1) != b""
        except (ValueError, CheckpointError):
            return False
    if start[:1] != b"{":
        return False
    line, _, rest = head_of(path, _MAX_LINE_NBYTES + len(MAGIC)).partition(b"\n")
    return len(line) < _MAX_LINE_NBYTES and rest.startswith(MAGIC)


EQUINOX = Format("equinox", _recognises, open_equinox, suffixes=(".eqx",))
