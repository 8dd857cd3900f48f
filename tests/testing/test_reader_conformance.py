"""The conformance suite for readers, run against every reader of this library that has a writer."""

import os
from typing import ClassVar

import equinox as eqx
import numpy as np
import pytest
import torch_files
from flax import serialization

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats import FORMATS
from ckpt_jax.restoring.formats.own import OwnReader
from ckpt_jax.store.storage import POSIX
from ckpt_jax.testing import ReaderTests


class OfFormat(ReaderTests):
    name = ""

    def open(self, path):
        (found,) = [each for each in FORMATS if each.name == self.name]
        assert found.recognises(path)
        return found.open(path)


class TestOurs(ReaderTests):
    def write(self, path, arrays):
        ckpt.save(path, dict(arrays))

    def open(self, path):
        return OwnReader(POSIX, path, path)


class TestSafetensors(OfFormat):
    name = "safetensors"

    def write(self, path, arrays):
        ckpt.export(dict(arrays), path, format="safetensors")


class TestSafetensorsOfSeveralFiles(OfFormat):
    name = "safetensors"

    def write(self, path, arrays):
        ckpt.export(dict(arrays), path, format="safetensors", max_shard_nbytes=1000)


class TestOrbax(OfFormat):
    name = "orbax"
    holds_empty_arrays = False

    def write(self, path, arrays):
        ckpt.export(dict(arrays), path, format="orbax")


class TestNpz(OfFormat):
    name = "npz"

    def write(self, path, arrays):
        ckpt.export(dict(arrays), path, format="npz")


class TestCompressedNpz(OfFormat):
    name = "npz"

    def write(self, path, arrays):
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)


class TestHdf5(OfFormat):
    name = "keras"
    options: ClassVar[dict] = {}

    def write(self, path, arrays):
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                options = self.options if array.size and array.ndim else {}
                file.create_dataset(name, data=array, **options)


class TestCompressedHdf5(TestHdf5):
    options: ClassVar[dict] = {"compression": "gzip", "chunks": True}


class TestMsgpack(OfFormat):
    name = "msgpack"

    def write(self, path, arrays):
        with open(path, "wb") as file:
            file.write(serialization.msgpack_serialize(dict(arrays)))


class TestTorch(OfFormat):
    name = "torch"

    def write(self, path, arrays):
        torch_files.saved(path, arrays)


class TestEquinox(OfFormat):
    name = "equinox"

    def write(self, path, arrays):
        with open(path, "wb") as file:
            eqx.tree_serialise_leaves(file, dict(arrays))
        assert os.path.getsize(path)
