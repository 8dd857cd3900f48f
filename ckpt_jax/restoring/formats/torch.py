"""torch: `.pt`, `.pth` and `.bin` files of `torch.save`, also of before 1.6, when they were no zip.

A file holds a pickle, and the bytes of storages. The pickle is read as data (`pickled`); nothing in
it is looked up or called, whatever it says. A tensor is a view of a storage: an offset, a size and
strides. So it is an extent. A tensor may also be marked as conjugated or negated, which its bytes
do not show.

Dicts and lists stay what they are, and keys of dicts are split at ".", as in "layers.0.weight".
What is no tensor, container or plain value is listed and refused: sparse and quantised tensors,
modules, and objects of any other class, because to read them means to run code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.graph.boxes import whole
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Extent, ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.cursor import Cursor
from ckpt_jax.restoring.formats.names import graph_of_tree
from ckpt_jax.restoring.formats.pickled import Call, Global, Persistent, key_of, read_pickle
from ckpt_jax.restoring.formats.pickled_arrays import array_of, scalar_of
from ckpt_jax.restoring.formats.zips import Archive, first_member
from ckpt_jax.store.looks import head_of

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
_PICKLE = "data.pkl"
_MAX_PICKLE_NBYTES = 256 << 20
_MAX_DEPTH = 100
_MAX_PARTS = 1 << 20
_MAX_EXPANSION = 1024  # of a tensor that repeats its elements
_LEAST_LIMIT_NBYTES = 64 << 20

_OF_STORAGE = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}
_SAME_NAME = (
    *("float64", "float32", "float16", "bfloat16", "bool", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_OF_DTYPE = {
    **{name: name for name in _SAME_NAME},
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
}
_CONVERT = "Convert it to a dense tensor of a plain dtype and save its state dict with torch"
_REFUSED = {
    "torch._utils._rebuild_sparse_tensor": f"a sparse tensor. {_CONVERT}",
    "torch._utils._rebuild_sparse_csr_tensor": f"a sparse tensor. {_CONVERT}",
    "torch._utils._rebuild_qtensor": f"a quantised tensor. {_CONVERT}",
    "torch._utils._rebuild_nested_tensor": f"a nested tensor. {_CONVERT}",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (on the meta device)",
}
_PLAIN_DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}

Place = tuple[str, int, int]  # of a storage: file, offset, size in bytes


class Storages:
    """Where the storages of a file lie.

    Args:
      place_of: gives the place of a storage by its key; KeyError if it is not there.
      finish: changes the order of bytes of what was read, if it is not that of this machine.
    """

    def __init__(
        self, place_of: Callable[[str], Place], finish: Callable[[np.ndarray], object] | None
    ):
        self.place_of = place_of
        self.finish = finish


def open_torch(path: str) -> ExtentsReader:
    """Opens a file of `torch.save`.

    Raises:
      CorruptCheckpointError: it is damaged.
      UnsupportedFormatError: it holds a program (TorchScript).
    """
    files = Files(path)
    try:
        if first_member(path) is None:
            value, storages = _read_old(files, path)
        else:
            value, storages = read_archive(Archive(files, path))
        values, graph = graph_of_tree(tree_of(value, storages), ".")
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise files.damage(path, str(error)) from error
    return ExtentsReader(path, values, lambda: graph, files)


def read_archive(archive: Archive) -> tuple[Any, Storages]:
    """What the pickle in a zip file says, and the storages beside it.

    Raises:
      ValueError: it is damaged.
    """
    names = archive.members
    pickles = [name for name in names if name.rpartition("/")[2] == _PICKLE]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} members called {_PICKLE}")
    root = pickles[0].removesuffix(_PICKLE)
    if f"{root}constants.pkl" in names:
        raise UnsupportedFormatError(
            f"{archive.file} is a program of TorchScript. Load it with torch.jit.load, and save "
            "its state dict with torch.save."
        )
    member = names[pickles[0]]
    if member.offset is None or member.nbytes > _MAX_PICKLE_NBYTES:
        raise ValueError(f"{member.name} is compressed, or has {member.nbytes} bytes")
    cursor = archive.cursor(member.name)
    value = read_pickle(cursor)
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"

    def place_of(key: str) -> Place:
        storage = names[f"{root}data/{key}"]
        if storage.offset is None:
            raise ValueError(f"the storage {key} is compressed")
        return archive.file, storage.offset, storage.nbytes

    return value, Storages(place_of, _swap if order == b"big" else None)


def _swap(array: np.ndarray) -> None:
    array.byteswap(inplace=True)


def _read_old(files: Files, path: str) -> tuple[Any, Storages]:
    """The same for a file of before torch 1.6: several pickles, then the storages."""
    cursor = Cursor(files, path)
    magic, _, _ = read_pickle(cursor), read_pickle(cursor), read_pickle(cursor)
    if magic != _MAGIC:
        raise ValueError("it does not begin as files of torch do")
    value, keys = read_pickle(cursor), read_pickle(cursor)
    sizes: dict[str, int] = {}
    for part in _parts(value):
        if isinstance(part, Persistent):
            sizes[_text(part.id[2])] = dtype_of(_storage_dtype(part)).itemsize
    places: dict[str, Place] = {}
    for key in keys:
        nbytes = cursor.uint(8) * sizes[_text(key)]
        places[_text(key)] = path, cursor.skip(nbytes), nbytes
    return value, Storages(lambda key: places[key], None)


def _parts(value: Any) -> list[Any]:
    """Everything that a value consists of, each once."""
    todo, seen = [value], {id(value)}
    for part in todo:  # grows while it is walked
        if isinstance(part, dict):
            inner = [*part.values()]
        elif isinstance(part, list | tuple):
            inner = [*part]
        elif isinstance(part, Call):
            inner = [part.args, part.state, part.items, part.more]
        else:
            continue
        for one in inner:
            if id(one) not in seen:
                seen.add(id(one))
                todo.append(one)
    return todo


def _text(key: Any) -> str:
    """The key of a storage."""
    if not isinstance(key, str | int):
        raise ValueError(f"a {type(key).__name__} is no key of a storage")
    return str(key)


def _storage_dtype(storage: Persistent) -> str:
    kind = storage.id[1]
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if storage.id[0] != "storage" or name not in _OF_STORAGE:
        raise ValueError(f"{name or type(kind).__name__} is no storage")
    return _OF_STORAGE[name]


# --- from what would be called to values ------------------------------------------------


def tree_of(value: Any, storages: Storages) -> Any:
    """Nested dicts and lists of `Stored` and plain values.

    Raises:
      ValueError: it is nested too deeply, or has too many parts; or a tensor does not lie inside
        its storage.
    """
    return _Tree(storages).of(value, 0)


class _Tree:
    def __init__(self, storages: Storages):
        self.storages = storages
        self.parts = 0

    def of(self, value: Any, depth: int) -> Any:
        self.parts += 1
        if depth > _MAX_DEPTH or self.parts > _MAX_PARTS:
            raise ValueError(f"more than {_MAX_DEPTH} levels or {_MAX_PARTS} values")
        match value:
            case Call() if value.name in _PLAIN_DICTS:
                return self.of(_dict_of(value), depth)
            case Call(function=Global("torch.Size"), args=(size,)):
                return self.of(tuple(size), depth)
            case dict():
                return {_label(key): self.of(part, depth + 1) for key, part in value.items()}
            case list() | tuple():
                return type(value)([self.of(part, depth + 1) for part in value])
            case None | bool() | int() | float() | str() | bytes():
                return value
        return tensor_of(value, self.storages)


def _dict_of(value: Call) -> dict[Any, Any]:
    """The items of an ordered dict and the like, which may also be an argument."""
    match value.args:
        case (dict(items),):
            return {**items, **value.items}
        case (list(pairs),):
            return {**{key_of(key): part for key, part in pairs}, **value.items}
    return value.items


def _label(key: Any) -> Any:
    """The key of a dict as a label."""
    if isinstance(key, Call | Global):
        raise ValueError(f"a {_name_of(key)} is the key of a dict")
    return key


def tensor_of(value: Any, storages: Storages) -> Stored:
    """A tensor or an array; unreadable, with the reason, if it is none.

    Raises:
      ValueError: it does not lie inside its storage.
    """
    match value:
        case Call(function=Global("torch._utils._rebuild_parameter"), args=(inner, *_)):
            return tensor_of(inner, storages)
        case Call(function=Global("torch._utils._rebuild_parameter_with_state"), args=(inner, *_)):
            return tensor_of(inner, storages)
        case Call(
            function=Global("torch._tensor._rebuild_from_type_v2"),
            args=(function, Global("torch.Tensor" | "torch.nn.parameter.Parameter"), args, _),
        ):
            return tensor_of(Call(function, args), storages)
        case Call(
            function=Global("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"),
            args=(Persistent() as storage, offset, size, strides, *rest),
        ):
            marks = rest[2] if len(rest) > 2 else None
            return _view(storage, _storage_dtype(storage), offset, size, strides, marks, storages)
        case Call(
            function=Global("torch._utils._rebuild_tensor_v3"),
            args=(Persistent() as storage, offset, size, strides, _, _, Global(dtype), *rest),
        ):
            name = dtype.rpartition(".")[2]
            if name not in _OF_DTYPE:
                shape = sizes_of(size)
                return _refused(dtype, f"a tensor of dtype {name}. {_CONVERT}", shape)
            marks = rest[0] if rest else None
            return _view(storage, _OF_DTYPE[name], offset, size, strides, marks, storages)
    found = array_of(value)
    found = scalar_of(value) if found is None else found
    if found is not None:
        return found
    name = _name_of(value)
    made = (
        f"an object of {name}, which only code could make, and no code in a file is run. Save the "
        "state dict of the model instead"
    )
    return _refused(name, _REFUSED.get(name, made))


def _name_of(value: Any) -> str:
    match value:
        case Call() if value.name == "copyreg._reconstructor" and value.args:
            return _name_of(value.args[0])
        case Call():
            return _name_of(value.function)
        case Global(name):
            return name[:200]
        case Persistent():
            return "torch.storage"
    return type(value).__name__


def _refused(name: str, what: str, shape: tuple[int, ...] = ()) -> Stored:
    return Stored(LeafSpec("unreadable", name, shape, note=f"it is {what}"))


def _view(
    storage: Persistent,
    dtype: str,
    offset: int,
    size: Any,
    strides: Any,
    marks: Any,
    storages: Storages,
) -> Stored:
    """A tensor that is a view of a storage.

    Args:
      storage: its id is ("storage", class, key, device, number of elements, view).
      dtype: of the tensor.
      offset, size, strides: in elements.
      marks: what the bytes do not show.
      storages: where the storages lie.
    """
    shape, steps = sizes_of(size), sizes_of(strides)
    if len(shape) != len(steps) or type(offset) is not int or offset < 0:
        raise ValueError(f"the offset or the strides {steps} do not fit a tensor of shape {shape}")
    marks = marks.items if isinstance(marks, Call) else marks or {}
    if not isinstance(marks, Mapping) or not marks.keys() <= {"conj", "neg"}:
        return _refused(
            "torch.Tensor", f"a tensor with marks that are not known. {_CONVERT}", shape
        )
    match storage.id:
        case (_, _, _, _, _, (_, int(further), _)):  # of before 0.4: a view of another storage
            offset += max(further, 0)
    key = _text(storage.id[2])
    try:
        file, start, nbytes = storages.place_of(key)
    except KeyError:
        raise ValueError(f"the storage {key} of a tensor is missing") from None
    spec, itemsize = LeafSpec("numpy", dtype, shape), dtype_of(dtype).itemsize
    if not math.prod(shape):
        return Stored(spec, (Extent(whole(shape), file, 0),))
    extent = Extent(whole(shape), file, start + offset * itemsize, steps)
    if (offset + extent.span) * itemsize > nbytes:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage {key} of {nbytes} bytes")
    if math.prod(shape) * itemsize > max(nbytes * _MAX_EXPANSION, _LEAST_LIMIT_NBYTES):
        what = f"a tensor that repeats {nbytes} bytes. Call contiguous() before it is saved"
        return _refused("torch.Tensor", what, shape)
    return Stored(spec, (extent,), finish=_finish(marks, storages.finish))


def _finish(
    marks: Mapping[Any, Any], swap: Callable[[np.ndarray], object] | None
) -> Callable[[np.ndarray], object] | None:
    """What has to be done to the elements after they were read; None if nothing."""
    steps: list[Callable[[np.ndarray], object]] = [] if swap is None else [swap]
    if marks.get("conj"):
        steps.append(lambda array: np.conjugate(array, out=array))
    if marks.get("neg"):
        steps.append(lambda array: np.negative(array, out=array))
    if not steps:
        return None

    def finish(array: np.ndarray) -> None:
        for step in steps:
            step(array)

    return finish


def sizes_of(value: Any) -> tuple[int, ...]:
    """A shape or strides."""
    if isinstance(value, Call) and value.name == "torch.Size":
        (value,) = value.args
    if not isinstance(value, tuple | list) or any(type(n) is not int or n < 0 for n in value):
        raise ValueError(f"a {type(value).__name__} is no shape")
    if len(value) > 64:
        raise ValueError(f"a tensor has {len(value)} axes")
    return tuple(value)


def _recognises(path: str) -> bool:
    name = first_member(path)
    if name is not None:
        return name.rpartition("/")[2] == _PICKLE
    return _MAGIC_BYTES in head_of(path, 32)


TORCH = Format("torch", _recognises, open_torch, suffixes=(".pt", ".pth"))
