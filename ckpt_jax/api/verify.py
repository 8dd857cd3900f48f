"""Verifying: reading every byte of a checkpoint against its checksum."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY, object_key_of, path_of
from ckpt_jax.graph.metadata import METADATA_KEY
from ckpt_jax.graph.patterns import Selection, selects
from ckpt_jax.options import Path
from ckpt_jax.progress import Wanted
from ckpt_jax.progress import progress as shown
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.store.batches import batches
from ckpt_jax.store.paths import as_path

_BATCH_NBYTES = 64 << 20
_MAX_FILES = 10  # that the text of a report names
_MAX_NAMES = 3  # of values, for each file
_MAX_CAUSE = 100  # characters


class Damage(NamedTuple):
    """One thing that is wrong with a checkpoint.

    Attributes:
      file: the damaged file or shard directory, as far as it is known.
      key: the checkpoint key concerned.
      what: what is wrong.
    """

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.key or '(checkpoint)'}: {self.what} [{self.file}]"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of `verify`.

    Attributes:
      path: of the checkpoint.
      problems: all damage, not only the first.
      keys: how many values were read.
      nbytes: how many bytes of values were read.
      unread: keys of values that another format lists, and that cannot be read here.
      unchecked: keys of values that were read, but have no checksum, as in most other formats.
    """

    path: str
    problems: tuple[Damage, ...]
    keys: int = 0
    nbytes: int = 0
    unread: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.path}: {self.keys} values, {self.nbytes} bytes read, "
        if self.unread:
            head += f"{len(self.unread)} of kinds that cannot be read here, "
        if self.unchecked:
            head += f"{len(self.unchecked)} of them without a checksum, "
        if self.ok:
            return head + "no damage"
        files: dict[str, list[Damage]] = {}
        for problem in self.problems:
            files.setdefault(problem.file, []).append(problem)
        count = f"{len(self.problems)} problem{'s'[: len(self.problems) != 1]} in {len(files)} "
        lines = [self._line(file, problems) for file, problems in files.items()]
        return "\n".join(
            [
                f"{head}{count}file{'s'[: len(files) != 1]}:",
                *lines[:_MAX_FILES],
                *[f"  ... and {len(lines) - _MAX_FILES} more files"] * (len(lines) > _MAX_FILES),
                "Restore another checkpoint, or copy this one again; .problems has the details.",
            ]
        )

    def _line(self, file: str, problems: Sequence[Damage]) -> str:
        """All damage in one file, in one line."""
        names = [path_of(object_key_of(problem.key)) for problem in problems if problem.key]
        more = len(names) - _MAX_NAMES
        listed = ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
        values = f"{len(names)} value{'s'[: len(names) != 1]} ({listed}): " if names else ""
        shown = os.path.relpath(file, self.path) if _is_within(file, self.path) else file
        return f"  {shown}: {values}{_cause(problems[0])}"


def _is_within(file: str, directory: str) -> bool:
    """Whether a file lies in a directory."""
    return file.startswith(directory.rstrip("/") + "/")


def _cause(problem: Damage) -> str:
    """The cause of a problem in a few words, without the names that stand beside it."""
    text = " ".join(problem.what.split())
    for known in (f"{problem.key}: ", f"{problem.file}: ", f"{problem.file} ", "is "):
        text = text.removeprefix(known)
    if len(text) <= _MAX_CAUSE:
        return text
    first = text.partition(": ")[0]
    return first if len(first) <= _MAX_CAUSE else f"{text[: _MAX_CAUSE - 4]} ..."


def verify(
    path: Path,
    *,
    only: Selection | None = None,
    sample: float = 1.0,
    progress: Wanted = None,
) -> VerifyReport:
    """Reads a whole checkpoint and checks every checksum, as far as its format has some.

    Little memory is taken, however large the arrays of a checkpoint of this library are.

    Args:
      path: of a checkpoint.
      only: a pattern, a list of patterns, or a predicate on paths: which values are read. So a
        long check can be done in parts.
      sample: the part of the bytes that is read, chosen by chance: 0.1 for a tenth.
      progress: a function `(done_bytes, total_bytes)`; True for a line on a terminal.

    Returns:
      A report with all damage: `.ok`, `.problems`. A damaged checkpoint is no exception here.

    Raises:
      CheckpointNotFoundError: there is no checkpoint at `path`, or it was replaced or removed while
        it was being read.
      KeyError: `only` selects nothing.
      ValueError: `sample` is not above 0 and at most 1.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"params": [1, 2], "step": 7})
      ...     verify(path).ok, verify(path, only="params/**").keys
      (True, 2)
    """
    if not 0 < sample <= 1:
        raise ValueError(f"sample is the part of the bytes, above 0 and at most 1, got {sample}")
    path = as_path(path)
    try:
        with CheckpointReader(path) as reader:
            problems = [*_graph(reader)]
            unread = {} if problems else reader.refusals()
            keys = [key for key in reader.keys() if key not in unread]  # noqa: SIM118
            if only is not None:
                keys = _selected(reader, keys, only)
            total = round(sample * sum(map(reader.stored_nbytes, keys)))
            with shown(progress, f"verifying {path}", total) as advance:
                problems += _values(reader, keys, only is None, sample, advance)
            if problems:  # or it looks like that because another checkpoint takes its place
                reader.check_not_replaced(CorruptCheckpointError(str(problems[0])))
            nbytes = reader.bytes_read
            unchecked = tuple(sorted((reader.unchecked - unread.keys()).intersection(keys)))
            return VerifyReport(path, tuple(problems), len(keys), nbytes, (*unread,), unchecked)
    except (CorruptCheckpointError, UnsupportedFormatError) as error:
        return VerifyReport(path, (_damage(path, error),))


def _selected(reader: CheckpointReader, keys: Sequence[str], only: Selection) -> list[str]:
    chosen = selects(only)
    wanted = {reader.key_of(path) for path in reader.paths() if chosen(path)}
    found = [key for key in keys if key in wanted]
    if not found:
        raise KeyError(f"{reader.path} holds nothing that {only!r} selects")
    return found


def _damage(path: str, error: Exception, key: str = "") -> Damage:
    file = getattr(error, "file", None) or path
    return Damage(file, key or getattr(error, "key", None) or "", str(error))


def _graph(reader: CheckpointReader) -> Iterator[Damage]:
    """Damage to the object graph, and where it disagrees with the index."""
    try:
        for key, what in reader.disagreements():
            yield Damage(reader.path, key, what)
    except (CorruptCheckpointError, UnsupportedFormatError) as error:
        yield _damage(reader.path, error, OBJECT_GRAPH_KEY)
        return
    try:
        _ = reader.saved_objects
        functions = reader.saved_functions
    except (CorruptCheckpointError, UnsupportedFormatError) as error:
        yield _damage(reader.path, error, SAVED_OBJECTS_KEY)
        functions = {}
    for name in functions:
        try:
            _ = reader.artifact(name)
        except CorruptCheckpointError as error:
            yield _damage(reader.path, error, functions[name].artifact)
    try:
        _ = reader.metadata
    except CorruptCheckpointError as error:
        yield _damage(reader.path, error, METADATA_KEY)


def _values(
    reader: CheckpointReader,
    keys: Sequence[str],
    are_all: bool,
    sample: float,
    advance: Callable[[int], None],
) -> list[Damage]:
    """Damage to the values under some keys."""
    found = reader.damage(None if are_all else {*keys}, sample, advance)
    if found is not None:
        return [Damage(file, key, what) for file, damaged, what in found for key in damaged or [""]]
    if sample < 1:
        keys = random.sample(keys, max(1, round(sample * len(keys))))
    problems: list[Damage] = []
    for batch in batches(keys, reader.stored_nbytes, _BATCH_NBYTES):
        problems += _read(reader, batch)
        advance(sum(map(reader.stored_nbytes, batch)))
    return problems


def _read(reader: CheckpointReader, keys: Sequence[str]) -> list[Damage]:
    """Damage to some values: all at once, and one by one only where that fails."""
    try:
        reader.read(dict.fromkeys(keys))
        return []
    except (CorruptCheckpointError, UnsupportedFormatError) as error:
        if len(keys) == 1:
            return [_damage(reader.path, error, keys[0])]
    middle = len(keys) // 2
    return [*_read(reader, keys[:middle]), *_read(reader, keys[middle:])]
