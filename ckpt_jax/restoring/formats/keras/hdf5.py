"""HDF5: a tree of groups in a file, whose leaves are datasets, that is arrays.

h5py reads the headers. A dataset that lies in the file in one piece is an extent: its bytes are
read like those of any other format, in parts and on several threads. One that is compressed,
chunked or of a dtype that numpy lacks is read as a whole, through h5py.

A file of unknown origin may name other files (external links, external storage, virtual datasets),
form circles, and describe more than it holds. Nothing outside of the file is opened, each group is
walked once, and no memory is taken for more than the bytes in the file can give. What is not read
is listed with the reason.

h5py gets its bytes from `_Pages`, so that it sees what all formats see: a file that must not
change, a part of a file, or a value in an object store. `_Pages` raises nothing, because an
exception cannot pass through the C library; it notes the error, which is raised afterwards.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ckpt_jax.errors import CheckpointError, UnsupportedFormatError
from ckpt_jax.graph.boxes import whole
from ckpt_jax.graph.dtypes import ANONYMOUS_BYTE, dtype_name
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, Files, Stored
from ckpt_jax.store.looks import head_of
from ckpt_jax.store.objects import is_url

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_STARTS = (0, 512, 1024, 2048, 4096, 8192)  # a program may keep bytes of its own before the file
_HEAD_NBYTES = 64  # of a file, with its size
_PAGE_NBYTES, _REMOTE_PAGE_NBYTES = 64 << 10, 1 << 20
_MAX_PAGES = 64
_MAX_DATASETS = 1 << 20
_MAX_DEPTH = 200
_MAX_EXPANSION = 1032  # of a compressed chunk: no memory is taken for more
# The filters that HDF5 and h5py bring. Others would be looked for as programs on this machine.
_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_FILTERS = (_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF)
_HEAP = b"GCOL"
_NOT_FOLLOWED = "Save the values themselves"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an HDF5 file lies.

    Attributes:
      files: to read with.
      file: path of the file that it is, or is a part of.
      base, nbytes: which part.
      data: its bytes, if they are in memory, because they are compressed in the file.
    """

    files: Files
    file: str
    base: int
    nbytes: int
    data: bytes | None = None

    @classmethod
    def of_file(cls, files: Files, file: str) -> Place:
        """A whole file."""
        if is_url(file) and (size := _size_in_header(files.read(file, 0, _HEAD_NBYTES))):
            files.expect({file: size})  # else it would have to be searched for
        return cls(files, file, 0, files.size(file))

    def read(self, start: int, stop: int) -> bytes:
        if self.data is not None:
            return self.data[start:stop]
        return self.files.read(self.file, self.base + start, stop - start)

    @contextmanager
    def opened(self, key: str | None = None) -> Iterator[Any]:
        """The file as h5py opens it. What h5py says of it is damage.

        Raises:
          CorruptCheckpointError: it is damaged.
          UnsupportedFormatError: h5py is not installed.
        """
        h5py = h5py_for(self.file)
        pages = _Pages(self)
        try:
            # It must be closed before `pages` is gone, which the C library calls.
            with h5py.File(pages, "r") as file:
                yield file
        except CheckpointError:
            raise
        except _FROM_H5PY as error:
            if pages.error is not None:
                raise pages.error from None
            what = str(error).strip("'\"")  # a KeyError quotes it
            raise self.files.damage(self.file, what, key) from error
        finally:
            pages.forget()
        if pages.error is not None:
            raise pages.error


# ValueError, KeyError and others are h5py's names for codes of errors of the C library.
_FROM_H5PY = (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError)


def h5py_for(path: str) -> Any:
    """The library h5py.

    Raises:
      UnsupportedFormatError: it is not installed.
    """
    try:
        import h5py  # optional, and slow to import
    except ImportError as error:
        raise UnsupportedFormatError(
            f"{path}: HDF5 files are read with h5py, which is not installed. Run: "
            "pip install 'ckpt-jax[keras-files]'"
        ) from error
    return h5py


def is_hdf5(path: str) -> bool:
    """Whether a file begins like one of HDF5, maybe after a block of the user's."""
    if head_of(path, len(SIGNATURE)) == SIGNATURE:
        return True
    head = head_of(path, _STARTS[-1] + len(SIGNATURE))
    return any([head.startswith(SIGNATURE, start) for start in _STARTS])


def _size_in_header(head: bytes) -> int | None:
    """The size of a file, as its first bytes say; None if they say it in a rare way."""
    if not head.startswith(SIGNATURE):
        return None
    version = head[8]
    sizes, bases = (9, 12) if version >= 2 else (13, 24)
    if version > 3 or head[sizes] != 8:
        return None
    if version == 1:
        bases += 4
    end = bases + 16
    base, size = (int.from_bytes(head[at : at + 8], "little") for at in (bases, end))
    return size if base == 0 and size < 1 << 62 else None


class _Pages(io.RawIOBase):
    """A place as a file that h5py reads, a page at a time.

    Attributes:
      error: the first error; the bytes that could not be read were replaced by zeros.
    """

    def __init__(self, place: Place):
        self.error: Exception | None = None
        self._place, self._at = place, 0
        self._page_nbytes = _REMOTE_PAGE_NBYTES if is_url(place.file) else _PAGE_NBYTES
        self._page = lru_cache(_MAX_PAGES)(self._read_page)

    def forget(self) -> None:
        """Frees the memory of the pages."""
        self._page.cache_clear()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._place.nbytes)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, with zeros after the end or after an error."""
        view = memoryview(buffer).cast("B")
        data = b""
        try:
            if self.error is None:
                data = self._read(len(view))
        except Exception as error:  # raised by `Place.opened`
            self.error = error
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        self._at += len(view)
        return len(view)

    def _read(self, nbytes: int) -> bytes:
        start, stop = self._at, min(self._at + nbytes, self._place.nbytes)
        if start < 0 or start >= stop:
            return b""
        if stop - start > self._page_nbytes:
            return self._place.read(start, stop)
        first, last = start // self._page_nbytes, (stop - 1) // self._page_nbytes
        data = b"".join(map(self._page, range(first, last + 1)))
        begin = start - first * self._page_nbytes
        data = data[begin : begin + stop - start]
        if data.startswith(_HEAP) and not self._heap_ends(start, data):
            raise self._place.files.damage(self._place.file, "a heap of texts does not end")
        return data

    def _heap_ends(self, start: int, head: bytes) -> bool:
        """Whether one comes to the end of a heap, in which texts lie, by going from object to
        object. The C library would go on for ever if one has no size, or too large a one."""
        nbytes = int.from_bytes(head[8:16], "little")
        if nbytes > self._place.nbytes - start:
            return False
        heap = self._place.read(start, start + nbytes)
        at = 16
        while at + 16 <= nbytes:
            number = int.from_bytes(heap[at : at + 2], "little")
            size = int.from_bytes(heap[at + 8 : at + 16], "little")
            size = 16 + -(-size // 8) * 8 if number else size
            if not 16 <= size <= nbytes - at:
                return False
            at += size
        return True

    def _read_page(self, number: int) -> bytes:
        start = number * self._page_nbytes
        return self._place.read(start, min(start + self._page_nbytes, self._place.nbytes))


@dataclass(frozen=True, slots=True)
class Tree:
    """The contents of a file, as far as they were found.

    Attributes:
      values: by the path in the file, such as "layers/dense/vars/0".
      attributes: for the path of each group, its attributes. Those that are no text are None.
    """

    values: dict[str, Stored] = field(default_factory=dict)
    attributes: dict[str, Mapping[str, str | None]] = field(default_factory=dict)


def tree_of(place: Place) -> Tree:
    """Walks through a file, and reads no value.

    Raises:
      CorruptCheckpointError: it is damaged.
      UnsupportedFormatError: h5py is not installed, or there are too many values.
    """
    with place.opened() as file:
        return _Walk(place, file).tree


class _Walk:
    """One walk through an open file."""

    def __init__(self, place: Place, file: Any):
        self.tree = Tree()
        self._place = place
        self._h5 = h5py_for(place.file)
        seen: dict[int, str] = {}  # by address: a group may have several names, or be in itself
        todo: list[tuple[str, Any]] = [("", file["/"].id)]
        while todo:
            path, group = todo.pop()
            seen[self._address(group)] = path
            self.tree.attributes[path] = self._attributes(group)
            names = []
            group.links.iterate(names.append)
            for name in names:
                child = self._child(group, name)
                below = _joined(path, name)
                if isinstance(child, str):
                    self.tree.values[below] = _refused("link", child)
                elif isinstance(child, self._h5.h5d.DatasetID):
                    self.tree.values[below] = self._stored(child, below)
                elif isinstance(child, self._h5.h5g.GroupID):
                    other = seen.get(self._address(child))
                    if other is not None:
                        why = f"it is another name of the group {other!r}. Ask for that one"
                        self.tree.values[below] = _refused("link", why)
                    elif below.count("/") >= _MAX_DEPTH:
                        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
                    else:
                        seen[self._address(child)] = below
                        todo.append((below, child))
            if len(self.tree.values) + len(seen) > _MAX_DATASETS:
                raise UnsupportedFormatError(
                    f"{place.file}: it has more than {_MAX_DATASETS} groups and datasets"
                )

    def _child(self, group: Any, name: bytes) -> Any:
        """The object that a link leads to, or the reason why the link is not followed."""
        if b"/" in name or name in (b"", b"."):
            raise ValueError(f"{name!r} is no name")  # it would be taken for a path
        link = group.links.get_info(name)
        h5l = self._h5.h5l
        if link.type == h5l.TYPE_HARD:
            return self._h5.h5o.open(group, name)
        kind = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
        found = kind.get(link.type, "a link of an unknown kind")
        return f"it is {found}, which is not followed. {_NOT_FOLLOWED}"

    def _address(self, found: Any) -> int:
        return self._h5.h5o.get_info(found).addr

    def _attributes(self, group: Any) -> dict[str, str | None]:
        """The attributes of a group; texts, and None for all others."""
        h5a, h5t = self._h5.h5a, self._h5.h5t
        found: dict[str, str | None] = {}
        for number in range(h5a.get_num_attrs(group)):
            attribute = h5a.open(group, index=number)
            name = _text(attribute.name)
            found[name] = None
            kind = attribute.get_type()
            if attribute.shape == () and kind.get_class() == h5t.STRING:
                value = np.empty((), kind.dtype)
                attribute.read(value)
                found[name] = _text(value.item())
        return found

    def _stored(self, dataset: Any, path: str) -> Stored:
        """The value of a dataset."""
        h5d, h5s, h5t = self._h5.h5d, self._h5.h5s, self._h5.h5t
        kind = dataset.get_type()
        if dataset.get_space().get_simple_extent_type() == h5s.NULL:
            return _refused("nothing", "it is a dataset without a shape and values")
        shape = tuple(dataset.shape)
        classes = {h5t.STRING: "string", h5t.VLEN: "list", h5t.REFERENCE: "reference"}
        classes[h5t.BITFIELD] = "bits"
        if (name := classes.get(kind.get_class())) is not None:
            return _refused(name, _REFUSED[name], shape)
        try:
            dtype = kind.dtype
            spec = _spec_of(dtype, shape)
        except (ValueError, TypeError):
            return _refused(_type_name(kind), _REFUSED["other"], shape)
        created = dataset.get_create_plist()
        layout = created.get_layout()
        if layout == h5d.VIRTUAL or created.get_external_count():
            why = f"its values lie in another file, which is not opened. {_NOT_FOLLOWED}"
            return _refused(spec.dtype, why, shape)
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return Stored(spec, (Extent(whole(shape), self._place.file, 0),))
        if layout == h5d.CHUNKED:
            why = self._checked_chunks(dataset, created, nbytes, path)
        else:
            stored = count * kind.get_size()
            why = self._checked_place(dataset, layout == h5d.CONTIGUOUS, stored, path)
        if why is not None:
            return _refused(spec.dtype, why, shape)
        offset = dataset.get_offset() if layout == h5d.CONTIGUOUS else None
        is_plain = kind.get_class() == h5t.OPAQUE or kind == h5t.py_create(dtype, logical=True)
        if offset is not None and is_plain:
            return self._extent(spec, offset, nbytes, dtype.isnative)
        fill = _through_h5py(self._place, path, dtype.newbyteorder("="), shape)
        return Stored(spec, (Extent(whole(shape), self._place.file, 0),), nbytes, fill)

    def _extent(self, spec: LeafSpec, offset: int, nbytes: int, is_native: bool) -> Stored:
        place, finish = self._place, None if is_native else _swap
        if place.data is None:
            extents = (Extent(whole(spec.shape), place.file, place.base + offset),)
            return Stored(spec, extents, finish=finish)
        data = memoryview(place.data)[offset : offset + nbytes]

        def fill(buffer: memoryview) -> None:
            buffer[:] = data

        extents = (Extent(whole(spec.shape), place.file, 0),)
        return Stored(spec, extents, nbytes, fill, finish)

    def _checked_place(
        self, dataset: Any, is_contiguous: bool, nbytes: int, path: str
    ) -> str | None:
        """Why a dataset in one piece is not read, if it is not."""
        if not is_contiguous:  # in the header, of at most 64 KiB
            if nbytes > dataset.get_storage_size():
                raise self._damage(path, nbytes, dataset.get_storage_size())
            return None
        offset = dataset.get_offset()
        # After a block of the user's, there is a number even if there is no place.
        if offset is None or dataset.get_space_status() == self._h5.h5d.SPACE_STATUS_NOT_ALLOCATED:
            return _UNWRITTEN
        if offset + nbytes > self._place.nbytes:
            raise self._damage(path, offset + nbytes, self._place.nbytes)
        return None

    def _checked_chunks(self, dataset: Any, created: Any, nbytes: int, path: str) -> str | None:
        """Why a dataset in chunks is not read, if it is not."""
        filters = [created.get_filter(number) for number in range(created.get_nfilters())]
        others = [f"{_text(name)} ({code})" for code, _, _, name in filters if code not in _FILTERS]
        if others:
            return (
                f"it is compressed with {', '.join(others)}, which is not read here. Write it "
                "again with gzip, or without"
            )
        chunk = created.get_chunk()
        grid = zip(dataset.shape, chunk, strict=True)
        expected = math.prod([-(-size // step) for size, step in grid])
        # Every chunk takes at least a byte, so this says enough before they are counted.
        stored = dataset.get_storage_size()
        taken = math.prod(chunk) * dataset.get_type().get_size()
        if stored == 0:
            return _UNWRITTEN
        if stored > self._place.nbytes or max(nbytes, taken) > stored * _MAX_EXPANSION:
            raise self._damage(path, nbytes, stored)
        return _UNWRITTEN if dataset.get_num_chunks() < expected else None

    def _damage(self, path: str, nbytes: int, there: int) -> Exception:
        what = f"it would take {nbytes} bytes, there are {there}"
        return self._place.files.damage(self._place.file, what, path)


_UNWRITTEN = "not all of it was written, so that HDF5 would make up the rest. Write all of it"
_REFUSED = {
    "string": "texts in HDF5 files are not read. Save them beside the arrays",
    "list": "it holds lists of different lengths, which are no array. Save arrays",
    "reference": f"it holds references to other parts of the file. {_NOT_FOLLOWED}",
    "bits": "it holds sets of bits. Save them as integers",
    "other": "arrays of this dtype are not read. Save it as another dtype",
}


def _refused(dtype: str, why: str, shape: tuple[int, ...] = ()) -> Stored:
    return Stored(LeafSpec("unreadable", dtype, shape, note=why))


def _spec_of(dtype: np.dtype, shape: tuple[int, ...]) -> LeafSpec:
    """The spec of an array. numpy's name for a dtype that it lacks is some number of bytes, and
    two of them can only be bfloat16, as in `.npz` files. Of one byte there are many.

    Raises:
      ValueError, TypeError: there is none.
    """
    if dtype.str == ANONYMOUS_BYTE:
        return LeafSpec("unreadable", ANONYMOUS_BYTE, shape)
    return LeafSpec("numpy", "bfloat16" if dtype.str == "|V2" else dtype_name(dtype), shape)


def _type_name(kind: Any) -> str:
    try:
        return str(kind.dtype)
    except (ValueError, TypeError):  # h5py does not know it
        return "unknown"


def _through_h5py(
    place: Place, path: str, dtype: np.dtype, shape: tuple[int, ...]
) -> Callable[[memoryview], None]:
    """Fills a buffer with a dataset."""

    def fill(buffer: memoryview) -> None:
        with place.opened(path) as file:
            every = h5py_for(place.file).h5s.ALL
            array = np.frombuffer(buffer, dtype).reshape(shape)
            file[path].id.read(every, every, array)

    return fill


def _swap(array: np.ndarray) -> None:
    array.byteswap(inplace=True)


def _joined(path: str, name: bytes) -> str:
    return f"{path}/{_text(name)}" if path else _text(name)


def _text(data: Any) -> str:
    return data.decode("utf-8") if isinstance(data, bytes) else str(data)


__all__ = ["SIGNATURE", "Place", "Tree", "h5py_for", "is_hdf5", "tree_of"]
