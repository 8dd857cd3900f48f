"""Stateful objects: objects of other libraries that give their state and take it back.

Data iterators and loaders do, each in one of these ways:

    get_state() and set_state(state)               grain, numpy's RandomState
    state_dict() and load_state_dict(state)        torch, torchdata
    async save(directory) and load(directory)      Orbax's StatefulCheckpointable
    TensorFlow's protocol of trackables            iterators of tf.data, see `tf_data`

Such an object is taken as it is, if no other view knows its type. It is mutable, and it is one node
of the graph, which a saver writes: see `api.per_process`. Its state is made of plain values, numpy
arrays, and lists, tuples and dicts of them. Tensors of torch are stored as numpy arrays, and come
back as tensors. The files that an object of the third kind writes are byte strings by name.
"""

from __future__ import annotations

import asyncio
import inspect
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ckpt_jax.objects.tf_data import give_iterator_state, is_tf_iterator, state_of_iterator
from ckpt_jax.objects.views import View

_METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
_TENSOR = "__torch_tensor__"


class StatefulView(View):
    """An object without children, and with a state that a saver writes."""

    identity = True
    mutable = True


STATEFUL = StatefulView()


def stateful_view(obj: Any) -> View | None:
    """The view of objects that give their state; None for anything else."""
    return STATEFUL if is_stateful(type(obj)) else None


def is_stateful(kind: type) -> bool:
    """Whether objects of a type give their state and take it back."""
    return _methods(kind) is not None or is_tf_iterator(kind) or _writes_files(kind)


def _methods(kind: type) -> tuple[str, str] | None:
    if issubclass(kind, type):  # a class is no object that has a state
        return None
    return next(
        (pair for pair in _METHODS if all(callable(getattr(kind, name, None)) for name in pair)),
        None,
    )


def _writes_files(kind: type) -> bool:
    return all(inspect.iscoroutinefunction(getattr(kind, name, None)) for name in ("save", "load"))


def why_stateless(obj: Any) -> str:
    """Why an object that has no view is none that gives its state, and what to do; "" if it is
    neither an iterator nor a dataset."""
    if isinstance(obj, Iterator):
        return (
            "it is an iterator that does not give its state. Pass one that has get_state and "
            "set_state; if it only converts what another iterator gives, pass that one (of "
            "tf.data: iter(dataset) or dataset.as_numpy_iterator())"
        )
    if isinstance(obj, Iterable) and not isinstance(obj, Collection | type):
        return "if it is a dataset, pass its iterator, iter(dataset), which has the state"
    return ""


def state_of(obj: Any) -> Any:
    """The state of an object, as plain data and arrays."""
    methods = _methods(type(obj))
    if methods is not None:
        return _packed(getattr(obj, methods[0])())
    return state_of_iterator(obj) if is_tf_iterator(type(obj)) else _files_of(obj)


def give_state(obj: Any, state: Any) -> None:
    """Gives an object a state that `state_of` gave."""
    methods = _methods(type(obj))
    if methods is not None:
        getattr(obj, methods[1])(_unpacked(state))
    elif is_tf_iterator(type(obj)):
        give_iterator_state(obj, state)
    else:
        _give_files(obj, state)


# --- tensors ---------------------------------------------------------------------------


def _packed(state: Any) -> Any:
    """A state without tensors of torch, which lie on its devices and are of its own types."""
    torch = sys.modules.get("torch")  # if it is not imported, there are none
    if torch is not None and isinstance(state, torch.Tensor):
        return {_TENSOR: state.detach().cpu().numpy().copy()}
    return _mapped(state, _packed)


def _unpacked(state: Any) -> Any:
    if isinstance(state, Mapping) and [*state] == [_TENSOR]:
        torch = sys.modules.get("torch")
        if torch is None:
            raise RuntimeError("the state holds tensors of torch; import torch before the restore")
        return torch.from_numpy(np.array(state[_TENSOR]))
    return _mapped(state, _unpacked)


def _mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """A state with its parts changed; a container in which nothing changes is the same one."""
    if isinstance(state, dict):
        new: Any = {key: change(part) for key, part in state.items()}
        is_same = all(new[key] is part for key, part in state.items())
    elif type(state) in (list, tuple):
        new = type(state)([change(part) for part in state])
        is_same = all(a is b for a, b in zip(new, state, strict=True))
    else:
        return state
    return state if is_same else new


# --- files -----------------------------------------------------------------------------


class _Created:
    """A directory that is there already, as Orbax's `PathAwaitingCreation` describes it."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __truediv__(self, other: Any) -> _Created:
        return _Created(self.path / other)

    async def await_creation(self) -> pathlib.Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path


def _files_of(obj: Any) -> dict[str, bytes]:
    """The files that an object writes, by their path in its directory."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        _run(_twice(obj.save(_Created(root))))
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _give_files(obj: Any, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name, data in files.items():
            path = root / name
            if not path.resolve().is_relative_to(root.resolve()):
                raise ValueError(f"a file outside of its directory: {name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        _run(_twice(obj.load(root)))


async def _twice(first: Coroutine[Any, Any, Any]) -> None:
    """Waits for a function, and for what it leaves to the background."""
    rest = await first
    if inspect.isawaitable(rest):
        await rest


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end, also if the caller is in an event loop of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(coroutine)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
