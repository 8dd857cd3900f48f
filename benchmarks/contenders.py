"""The libraries that are measured, each behind the same five verbs.

A contender gets its own best case: its save takes the values in the form that it works on
(sharded jax.Arrays, tf.Variables, torch tensors), made outside the timing, and reusable objects
such as Orbax's checkpointer are made once. A save ends when the bytes are on the disk; where a
library does not call fsync on all that it wrote, an fsync of every file and directory is added
inside the timing (`fsync_added`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import workloads
from jax.sharding import Sharding
from workloads import Host


class Contender(ABC):
    """One library. Whatever `source` and `target` make is made outside the timing."""

    name: ClassVar[str]
    note: ClassVar[str]
    fsync_added: ClassVar[bool]
    reshards: ClassVar[bool]  # restores onto any sharding; else into host memory
    in_place: ClassVar[bool]  # restores into buffers that exist already
    background: bool = False  # `begin_save` is there

    @abstractmethod
    def source(self, host: Host, sharding: Sharding) -> Any:
        """The values as this library saves them."""

    @abstractmethod
    def save(self, path: str, source: Any) -> None:
        """Saves at `path`, which does not exist; returns when that is durable."""

    @abstractmethod
    def target(self, host: Host, sharding: Sharding) -> Any:
        """What `restore` is given; buffers in it hold other values than `host`."""

    @abstractmethod
    def restore(self, path: str, target: Any) -> Any:
        """The values at `path`, complete in memory."""

    @abstractmethod
    def check(self, restored: Any, target: Any, host: Host) -> None:
        """Raises AssertionError unless `restored` is `host`, placed as `target` says."""

    def begin_save(self, path: str, source: Any) -> Callable[[], None]:
        """Starts a save in the background; the result waits for it."""
        raise NotImplementedError


class JaxContender(Contender):
    """A library that saves sharded jax.Arrays and restores onto any sharding."""

    reshards = True
    in_place = False
    module: ClassVar[str]  # its name when imported

    def source(self, host: Host, sharding: Sharding) -> Any:
        return workloads.on_devices(host, sharding)

    def target(self, host: Host, sharding: Sharding) -> Any:
        return workloads.abstract(host, sharding)

    def check(self, restored: Any, target: Any, host: Host) -> None:
        jax.tree.map(_check_sharding, restored, target)
        workloads.check_values(workloads.flat(restored), host)


def _check_sharding(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> None:
    assert array.sharding == wanted.sharding, f"{array.sharding} instead of {wanted.sharding}"


class HostContender(Contender):
    """A library that knows no shards: it saves and restores whole arrays in host memory."""

    reshards = False

    def check(self, restored: Any, target: Any, host: Host) -> None:
        workloads.check_values(restored, host)


class CkptJax(JaxContender):
    """This library."""

    name = module = "ckpt_jax"
    note = "defaults: durable, checksums written and verified"
    fsync_added = False

    def __init__(self) -> None:
        import ckpt_jax

        self.ckpt = ckpt_jax
        options = dataclasses.fields(ckpt_jax.CheckpointOptions)
        self.background = any(option.name == "enable_async" for option in options)

    def save(self, path: str, source: Any) -> None:
        self.ckpt.save(path, source, overwrite=True)

    def restore(self, path: str, target: Any) -> Any:
        return jax.block_until_ready(self.ckpt.restore(path, target))

    def begin_save(self, path: str, source: Any) -> Callable[[], None]:
        checkpoint = self.ckpt.Checkpoint(**source)
        checkpoint.write(path, options=self.ckpt.CheckpointOptions(enable_async=True))
        return checkpoint.sync


class Orbax(JaxContender):
    """The library that most users of JAX use today."""

    name, module = "Orbax", "orbax.checkpoint"
    note = "StandardCheckpointer, defaults; no checksums on array data"
    fsync_added = True
    background = True

    def __init__(self) -> None:
        import orbax.checkpoint

        logging.getLogger("absl").setLevel(logging.ERROR)
        self.checkpointer = orbax.checkpoint.StandardCheckpointer()

    def save(self, path: str, source: Any) -> None:
        self.begin_save(path, source)()
        fsync_tree(path)

    def restore(self, path: str, target: Any) -> Any:
        return jax.block_until_ready(self.checkpointer.restore(path, target))

    def begin_save(self, path: str, source: Any) -> Callable[[], None]:
        self.checkpointer.save(path, source)
        return self.checkpointer.wait_until_finished


class TensorFlow(HostContender):
    """The library whose object-based checkpoints ckpt_jax brings to JAX."""

    name = "TensorFlow"
    note = "tf.train.Checkpoint.write/read of tf.Variables"
    fsync_added = True
    in_place = True

    def __init__(self) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow

        self.tf = tensorflow

    def source(self, host: Host, sharding: Sharding) -> Any:
        return self._checkpoint(host.items())

    def target(self, host: Host, sharding: Sharding) -> Any:
        return self._checkpoint((name, np.full_like(value, np.nan)) for name, value in host.items())

    def _checkpoint(self, values: Iterable[tuple[str, np.ndarray]]) -> Any:
        variables = {name: self.tf.Variable(value) for name, value in values}
        return self.tf.train.Checkpoint(variables=variables)

    def save(self, path: str, source: Any) -> None:
        os.mkdir(path)
        source.write(os.path.join(path, "checkpoint"))
        fsync_tree(path)

    def restore(self, path: str, target: Any) -> Any:
        target.read(os.path.join(path, "checkpoint")).assert_consumed()
        return target.variables

    def check(self, restored: Any, target: Any, host: Host) -> None:
        workloads.check_values({name: x.numpy() for name, x in restored.items()}, host)


class TorchDcp(HostContender):
    """PyTorch's distributed checkpoint, in one process."""

    name = "torch DCP"
    note = "FileSystemWriter with 2 threads and sync_files"
    fsync_added = True
    in_place = True

    def __init__(self) -> None:
        import torch
        import torch.distributed.checkpoint

        self.torch = torch
        self.dcp = torch.distributed.checkpoint

    def source(self, host: Host, sharding: Sharding) -> Any:
        return {name: self.torch.from_numpy(value) for name, value in host.items()}

    def target(self, host: Host, sharding: Sharding) -> Any:
        return {
            name: self.torch.from_numpy(np.full_like(value, np.nan)) for name, value in host.items()
        }

    def save(self, path: str, source: Any) -> None:
        writer = self.dcp.FileSystemWriter(path, thread_count=2, sync_files=True)
        with warnings.catch_warnings(action="ignore"):
            self.dcp.save(source, storage_writer=writer, no_dist=True)
        fsync_tree(path)

    def restore(self, path: str, target: Any) -> Any:
        with warnings.catch_warnings(action="ignore"):
            self.dcp.load(target, storage_reader=self.dcp.FileSystemReader(path), no_dist=True)
        return target


class Safetensors(HostContender):
    """One file of raw arrays behind a JSON header."""

    name = "safetensors"
    note = "save_file and load_file of numpy arrays"
    fsync_added = True
    in_place = False

    def __init__(self) -> None:
        import safetensors.numpy

        self.library = safetensors.numpy

    def source(self, host: Host, sharding: Sharding) -> Any:
        return dict(host)

    def target(self, host: Host, sharding: Sharding) -> Any:
        return None

    def save(self, path: str, source: Any) -> None:
        os.mkdir(path)
        self.library.save_file(source, os.path.join(path, "arrays.safetensors"))
        fsync_tree(path)

    def restore(self, path: str, target: Any) -> Any:
        return self.library.load_file(os.path.join(path, "arrays.safetensors"))


CONTENDERS: Mapping[str, type[Contender]] = {
    kind.name: kind for kind in (CkptJax, Orbax, TensorFlow, TorchDcp, Safetensors)
}


def available(names: Iterable[str]) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of these names that are installed, and why the others are not here."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            found.append(CONTENDERS[name]())
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def fsync_tree(path: str) -> None:
    """fsync of every file and directory at and below `path`, and of its parent."""
    for directory, _, files in os.walk(path):
        for name in files:
            fsync(os.path.join(directory, name))
        fsync(directory)
    fsync(os.path.dirname(path))


def fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
