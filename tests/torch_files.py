"""Files as torch.save writes them, made without torch."""

import io
import math
import pickle
import zipfile

import numpy as np

KINDS = {"float32": "FloatStorage", "int32": "IntStorage", "uint8": "ByteStorage"}


class Pickler(pickle._Pickler):
    """Writes globals by their names, without the modules."""

    dispatch = {**pickle._Pickler.dispatch}  # noqa: RUF012

    def persistent_id(self, obj):
        return obj.id if isinstance(obj, Stored) else None

    def save_call(self, obj):
        self.save_name(obj.name)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_name(self, name):
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())

    def save_global_(self, obj):
        self.save_name(obj.name)


class Name:
    def __init__(self, name):
        self.name = name


class Made:
    def __init__(self, name, *args, state=None):
        self.name, self.args, self.state = name, args, state


class Stored:
    def __init__(self, key, kind, numel):
        self.id = ("storage", Name(f"torch.{kind}"), key, "cpu", numel)


Pickler.dispatch[Made] = Pickler.save_call
Pickler.dispatch[Name] = Pickler.save_global_


def pickled(value) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def tensor(key="0", kind="FloatStorage", numel=6, offset=0, size=(2, 3), stride=(3, 1), *more):
    args = (Stored(key, kind, numel), offset, size, stride, False, Made("collections.OrderedDict"))
    return Made("torch._utils._rebuild_tensor_v2", *args, *more)


def torch_file(path, value, storages=(), order=b"little", **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", value if isinstance(value, bytes) else pickled(value))
        archive.writestr("a/byteorder", order)
        for key, data in dict(storages).items():
            archive.writestr(f"a/data/{key}", data)
        for name, data in members.items():
            archive.writestr(f"a/{name}", data)
    return path


def saved(path, arrays):
    """A file with a dict of arrays, each with a storage of its own."""
    tree, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(
            [stride // array.itemsize for stride in np.ascontiguousarray(array).strides]
        )
        kind = KINDS[array.dtype.name]
        size = math.prod(array.shape)
        tree[name] = tensor(str(number), kind, size, 0, array.shape, strides[: array.ndim])
        storages[str(number)] = array.tobytes()
    return torch_file(path, tree, storages)
