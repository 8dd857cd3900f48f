"""The conformance suite, run against the savers of the examples and against a trivial one."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from places import EXAMPLES

import ckpt_jax as ckpt
from ckpt_jax.testing import SaverTests


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sharded = example("custom_sharded_saver")
quantized = example("quantized_saver")


class TestPartitionedEmbedding(SaverTests):
    SHAPE = (50, 3)

    def register(self):
        sharded.register()

    def make_object(self, seed):
        table = np.random.default_rng(seed).normal(size=self.SHAPE).astype(np.float32)
        obj = sharded.PartitionedEmbedding(table, 5, jax.devices()[:4])
        obj.scale.assign(jnp.float32(seed))
        return obj

    def make_empty(self):
        abstract = jax.ShapeDtypeStruct(self.SHAPE, np.float32)
        return sharded.PartitionedEmbedding(abstract, 5, jax.devices()[:4])

    def make_resharded(self):
        abstract = jax.ShapeDtypeStruct(self.SHAPE, np.float32)
        return sharded.PartitionedEmbedding(abstract, 60, jax.devices())

    def assert_same(self, a, b):
        np.testing.assert_array_equal(self.table(a), self.table(b))
        assert float(a.scale.value) == float(b.scale.value)

    def table(self, embedding):
        table = np.full(self.SHAPE, np.nan)
        for rows, bucket in zip(embedding.rows, embedding.buckets or (), strict=False):
            table[rows] = bucket
        return table


class TestQuantizedMoment(SaverTests):
    SHAPE = (8, 300)

    def register(self):
        quantized.register()

    def sharding(self, *spec):
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
        return NamedSharding(mesh, P(*spec))

    def make_object(self, seed):
        value = np.random.default_rng(seed).normal(size=self.SHAPE).astype(np.float32)
        return quantized.Approximate(jax.device_put(value, self.sharding("x", "y")))

    def make_empty(self):
        return quantized.Approximate(jnp.zeros(self.SHAPE))

    def make_resharded(self):
        abstract = jax.ShapeDtypeStruct(self.SHAPE, np.float32, sharding=self.sharding("y", "x"))
        return quantized.Approximate(abstract)

    def assert_same(self, a, b):
        assert a.value.shape == b.value.shape
        error = np.abs(np.asarray(a.value) - np.asarray(b.value)).max()
        assert error <= np.abs(np.asarray(a.value)).max() / 253


class Counter:
    """A mutable object of plain Python."""

    def __init__(self, value=None):
        self.value = value


class TestCounter(SaverTests):
    def register(self):
        ckpt.register_view(Counter, children=lambda obj: {}, rebuild=lambda obj, children: obj)

        def save(counters, file_prefix):
            values = {name: counter.value for name, counter in counters.items()}
            return ckpt.io.write_shard(file_prefix, values)

        def restore(counters, merged_prefix):
            found = ckpt.io.read_slices(merged_prefix, dict.fromkeys(counters))
            for name, counter in counters.items():
                counter.value = int(found[name])

        ckpt.register_checkpoint_saver(
            name="Counter",
            predicate=lambda obj: isinstance(obj, Counter),
            save_fn=save,
            restore_fn=restore,
        )

    def make_object(self, seed):
        return Counter(seed)

    def make_empty(self):
        return Counter()

    def assert_same(self, a, b):
        assert a.value == b.value
