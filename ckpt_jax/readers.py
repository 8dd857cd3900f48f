"""Readers: the protocol that makes a checkpoint of any format readable.

Restoring, loading, inspecting and verifying ask a `Reader` for the values of a checkpoint and for
its object graph. The reader of this library's own format is one; there is one for each other format
that is read. To teach this library a format of your own, write a function that opens it, and
register it:

    import ckpt_jax as ckpt
    from ckpt_jax import readers

    ckpt.register_format(readers.Format("mine", recognises, open))

**Values.** Each value has a *key*. `index` describes all values by key without reading any: dtype,
shape, size. `read` reads boxes of them. Whatever is asked for beyond this, such as shardings,
conversions and rename rules, is done by the callers of a reader.

**The graph** says how the values belong to objects, and which name each value has. Three strengths
occur. TensorFlow's checkpoints hold a real graph. Others hold a tree of names; `graph_of` makes a
graph of it. If there is only an order of values, the graph is a list and says that it is `ordered`.

**Places.** A path may be the URL of an object store. `Files` reads from there, too, and `head_of`,
`is_file`, `is_directory` and `names_in` say what is there. They remember what they have found out
while a checkpoint is recognised and opened, so that it is not asked for again. Where requests cost
time, `Files.fetch` and `Files.expect` let many be under way at once.

**Arrays as plain bytes.** In most formats an array lies in a file as plain bytes. Then it is enough
to say where: see `Stored`, `Extent` and `ExtentsReader`, which does all reading, on several threads
and within bounded memory. `ckpt_jax.testing.ReaderTests` tests any reader.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ckpt_jax.errors import RegistrationError
from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.global_names import graph_of
from ckpt_jax.graph.labels import SAVE_COUNTER
from ckpt_jax.graph.nodes import Attribute, ObjectGraph, local_names
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.objects.registry import undone_with_registrations
from ckpt_jax.store.extents import Checksum, Extent, Stored
from ckpt_jax.store.looks import head_of, is_directory, is_file, names_in
from ckpt_jax.store.stored import ExtentsReader
from ckpt_jax.store.watched import Files


class Layout(Protocol):
    """What an index says of a value; a `LeafSpec` is one."""

    @property
    def dtype(self) -> str:
        """The canonical name of the dtype; "bytes" for byte strings."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array; () for a byte string."""
        ...

    @property
    def is_bytes(self) -> bool:
        """Whether it is a byte string."""
        ...


class Contents(Protocol):
    """The table of contents of a checkpoint."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, sorted."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def layout_of(self, key: str) -> Layout:
        """The dtype and shape of a value. KeyError if there is none."""
        ...

    def nbytes(self, key: str) -> int:
        """The size of a value; 0 if it is not known."""
        ...


class Reader(Protocol):
    """An open checkpoint. Opening has read its headers, and no value."""

    @property
    def path(self) -> str:
        """The path, as errors name it."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes of values that were read so far."""
        ...

    @property
    def index(self) -> Contents:
        """What is stored."""
        ...

    @property
    def unchecked(self) -> frozenset[str]:
        """The keys of values that have no checksum, so that damage of them cannot be found."""
        ...

    def graph(self) -> ObjectGraph | None:
        """The object graph; None if the checkpoint has none and its values are called by keys.

        Raises:
          CorruptCheckpointError: it is damaged.
        """
        ...

    def identity(self) -> Hashable | None:
        """A value that changes if another checkpoint takes the place of this one.

        It looks at the files as they are now, for example at their times. None if there is none
        any more.
        """
        ...

    def read(
        self, requests: Sequence[tuple[str, Sequence[Box]]], *, max_inflight_bytes: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Reads boxes of arrays.

        Args:
          requests: keys, and the boxes wanted of each. The only box of a byte string is `()`; it is
            read as an array of uint8.
          max_inflight_bytes: how many bytes may be read ahead of what the caller has taken.

        Returns:
          An iterator over (position in `requests`, one array for each box), in any order. Arrays
          are writable, C-contiguous and share no memory.

        Raises:
          KeyError: there is no such value.
          RuntimeError: the reader is closed.
          ValueError: a box does not lie inside its array.
          CorruptCheckpointError: from the iterator; names the file and the key.
          UnsupportedFormatError: a value is listed but cannot be read; says why.
        """
        ...

    def read_bytes(self, key: str) -> bytes:
        """A byte string."""
        ...

    def check_files(self) -> None:
        """Compares the sizes of the files with what is stored; reads no value.

        Raises:
          CorruptCheckpointError: a file is truncated or missing.
        """
        ...

    def close(self) -> None:
        """Closes the checkpoint; further reads are refused."""
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """A reader of a format that can hold metadata: what the program said about the checkpoint.

    `ckpt_jax show` prints them, and `ckpt.convert` and `ckpt.export` carry them. A `Reader` need
    not be one.
    """

    def metadata(self) -> Mapping[str, Any]:
        """A dict of None, booleans, finite numbers, strings, and lists and dicts of them.

        Raises:
          CorruptCheckpointError: they are damaged.
        """
        ...


def no_steps(directory: str) -> Mapping[int, str]:
    """The steps of a format that does not number its checkpoints: none."""
    return {}


@dataclass(frozen=True, slots=True)
class Export:
    """What a format's `write` is given.

    Attributes:
      destination: the path that the checkpoint will have.
      graph: the object graph, with the names and dtypes that the values are to have. Optimizers
        have slots; `values_by_name` makes names of everything.
      read: reads one value, by the key of its attribute in the graph: a C-contiguous array of the
        dtype and shape of its spec, or a byte string. It is read when it is asked for; to keep
        memory bounded, ask for one at a time.
      read_all: reads the values of some keys, one after the other. It is quicker with small values,
        because it reads a few of them together.
      max_shard_nbytes: of one file, if the format has several.
      metadata: what the program said about the checkpoint, as JSON; for formats that can hold it.
    """

    destination: str
    graph: ObjectGraph
    read: Callable[[str], np.ndarray | bytes]
    read_all: Callable[[Iterable[str]], Iterator[np.ndarray | bytes]]
    max_shard_nbytes: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def values_by_name(self, separator: str) -> dict[str, Attribute]:
        """The values by the local names on the way to them, joined with a separator.

        Slot variables are called after the optimizer, the slot and the variable. A value that is
        shared has several names. The save counter of a `Checkpoint` is left out.

        Raises:
          ValueError: naming all names that two values would have.
        """
        tree = as_tree(slots_as_children(self.graph))
        names = local_names(tree.nodes, separator)
        found: dict[str, Attribute] = {}
        twice: dict[str, None] = {}
        for node, attribute in tree.attributes():
            entry, name = tree.nodes[node], names[node]
            if name == SAVE_COUNTER and tree.nodes[0].container in ("", "dict"):
                continue
            if not entry.has_only(attribute.name):
                name = separator.join([*filter(None, [name]), attribute.name])
            if name in found:
                twice[name] = None
            found[name] = attribute
        if twice:
            names = ", ".join(map(repr, twice))
            raise ValueError(f"two values would be called {names}; give one another name (rename=)")
        return found


@dataclass(frozen=True, slots=True)
class Format:
    """A format of checkpoints.

    Attributes:
      name: for people, and for `ckpt.export(format=...)`.
      recognises: whether what lies at a path or URL is of this format, by its content. It is called
        with every path that is opened, so it has to be quick, and must not raise if nothing is
        there.
      open: opens it.
      steps: the checkpoints of this format that a directory holds, by number, as far as their names
        have numbers. `latest_checkpoint` and managers ask for them.
      write: writes a checkpoint for `ckpt.export`; None if that is not possible. It is called with
        a path at which nothing is, makes a file or a directory there, or several whose names begin
        with the path, and returns the endings of these names ("" for the path itself). They are
        renamed to the destination in this order, so the last one should be the one by which the
        checkpoint is recognised. It raises UnsaveableError, before it writes, if the format cannot
        hold a value.
      nests: whether objects of a program are exported as JAX takes them apart: with states of
        optimizers as trees and not as slots, and with boxes around values.
      suffixes: how the names of such files usually end. A file of such a name that no format
        recognises is reported as damaged.
    """

    name: str
    recognises: Callable[[str], bool]
    open: Callable[[str], Reader]
    steps: Callable[[str], Mapping[int, str]] = no_steps
    write: Callable[[Export, str], Sequence[str]] | None = None
    nests: bool = False
    suffixes: tuple[str, ...] = ()


_registered: list[Format] = []


def register_format(format: Format) -> None:
    """Registers a format, so that its checkpoints open wherever a path is taken.

    The formats that were registered last are asked first, and before those of this library.

    Args:
      format: says how checkpoints of the format are recognised and opened; see
        `ckpt_jax.readers`.

    Raises:
      RegistrationError: there is a format of that name.
      TypeError: it is no `readers.Format`.

    Example: text files with a number in each line.
      >>> import os, tempfile
      >>> import ckpt_jax as ckpt
      >>> from ckpt_jax import readers
      >>> def numbers(path):
      ...     array = np.loadtxt(path)
      ...     return readers.ExtentsReader(path, {"numbers": readers.Stored.of(array)})
      >>> with ckpt.registration_scope(), tempfile.TemporaryDirectory() as directory:
      ...     register_format(readers.Format("numbers", lambda p: p.endswith(".txt"), numbers))
      ...     with open(path := os.path.join(directory, "a.txt"), "w") as file:
      ...         _ = file.write("1.5 2.5")
      ...     ckpt.load(path)
      {'numbers': array([1.5, 2.5])}
    """
    if not isinstance(format, Format):
        raise TypeError(f"expected a ckpt_jax.readers.Format, got {format!r}")
    if format.name in [other.name for other in _registered]:
        raise RegistrationError(f"a format named {format.name!r} is already registered")
    _registered.append(format)


def registered_formats() -> tuple[Format, ...]:
    """The formats that were registered, the newest first."""
    return tuple(reversed(_registered))


undone_with_registrations(_registered)

__all__ = [
    "Checksum",
    "Contents",
    "Export",
    "Extent",
    "ExtentsReader",
    "Files",
    "Format",
    "HasMetadata",
    "Layout",
    "LeafSpec",
    "Reader",
    "Stored",
    "graph_of",
    "head_of",
    "is_directory",
    "is_file",
    "names_in",
    "register_format",
    "registered_formats",
]
