"""Device to host and back: pinned memory, what arrays keep, and JAX's transfer guard.

CPU devices have pinned host memory as well, as a memory of its own: copies to it run here as
they do on an accelerator, from buffers that are not on the host as far as the code can tell.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.values import host

DTYPES = [
    *("bool", "int4", "uint2", "int8", "uint16", "int32", "int64", "float8_e4m3fn", "bfloat16"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
LARGE = (300, 1000)  # above the size from which pinned memory is used, in every dtype
QUICK = ckpt.CheckpointOptions(durable=False)


def values_of(dtype, shape):
    data = np.random.default_rng(3).integers(0, 7, size=shape)
    return data.astype(jnp.dtype(dtype))


def on_device(data):
    with jax.enable_x64(True):
        return jax.device_put(data, jax.devices()[1])


@pytest.mark.parametrize("shape", [LARGE, (3,), (), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_hold_every_bit_of_every_dtype(dtype, shape):
    assert not jax.config.read("jax_enable_x64")
    data = values_of(dtype, shape)
    (copied,) = host.copies([on_device(data)])
    assert (copied.dtype, copied.shape) == (data.dtype, shape)
    assert copied.tobytes() == data.tobytes()


def test_large_copies_go_to_pinned_memory_on_the_device_that_holds_them(monkeypatch):
    put = []

    def device_put(arrays, shardings):
        put.extend(zip(arrays, shardings, strict=True))
        return original(arrays, shardings)

    original = jax.device_put
    arrays = [on_device(values_of("float32", shape)) for shape in [LARGE, (3,), LARGE]]
    four_bits = on_device(values_of("int4", LARGE))
    monkeypatch.setattr(jax, "device_put", device_put)
    host.copies([*arrays, four_bits])
    assert [array is mine for (array, _), mine in zip(put, arrays[::2], strict=True)] == [True] * 2
    assert {sharding.memory_kind for _, sharding in put} == {"pinned_host"}
    assert {device for _, sharding in put for device in sharding.device_set} == {jax.devices()[1]}


def test_copies_are_their_own_memory():
    """They must outlive a donation, and must not be kept by the arrays that they are of."""
    arrays = [on_device(values_of(dtype, LARGE)) for dtype in ("float32", "int4")]
    expected = [values_of(dtype, LARGE) for dtype in ("float32", "int4")]
    copied = host.copies(arrays)
    assert not np.shares_memory(copied[0], np.asarray(arrays[0]))
    assert arrays[1]._npy_value is None  # what JAX keeps of an array that it had to convert
    for array in arrays:
        array.delete()
    assert [c.tobytes() for c in copied] == [e.tobytes() for e in expected]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_where_pinned_memory_is_full_copies_go_through_ordinary_memory(monkeypatch, caplog, when):
    class Failing:
        """An array whose copy fails while it is under way."""

        sharding = None

        def __array__(self, *_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    def device_put(arrays, shardings):
        if when == "at once":
            Failing().__array__()
        return [Failing() for _ in arrays]

    data = [values_of("float32", LARGE) + k for k in range(3)]
    arrays = list(map(on_device, data))
    monkeypatch.setattr(jax, "device_put", device_put)
    assert [c.tobytes() for c in host.copies(arrays)] == [d.tobytes() for d in data]
    assert "ordinary host memory" in caplog.text
    assert "Out of host memory" in caplog.text


def test_what_is_beyond_the_bound_on_pinned_memory_takes_the_other_way(monkeypatch):
    data = [values_of("float32", LARGE) + k for k in range(3)]
    arrays = list(map(on_device, data))
    monkeypatch.setattr(host, "_PINNED_AT_MOST", 2 * arrays[0].nbytes)
    assert list(host._for_pinned(arrays)) == [0, 1]
    assert [c.tobytes() for c in host.copies(arrays)] == [d.tobytes() for d in data]


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_arrays_that_were_offloaded_to_the_host_are_saved_and_restored_there(
    tmp_path, mesh42, kind
):
    sharding = NamedSharding(mesh42, P("data", "model"), memory_kind=kind)
    data = values_of("bfloat16", (16, 64))
    tree = {"moment": jax.device_put(data, sharding), "near": jnp.ones(3)}
    path = ckpt.save(tmp_path / "c", tree, options=QUICK)
    restored = ckpt.restore(path, jax.tree.map(jnp.zeros_like, tree) | {"moment": tree["moment"]})
    assert restored["moment"].sharding == sharding
    assert np.asarray(restored["moment"]).tobytes() == data.tobytes()


@pytest.mark.parametrize("guard", ["disallow", "disallow_explicit"])
def test_a_transfer_guard_does_not_stop_saves_and_restores(tmp_path, mesh42, guard):
    """They are what the program asked for; the guard is there for what it did not."""
    sharding = NamedSharding(mesh42, P("data"))
    tree = {
        "w": jax.device_put(np.arange(16.0, dtype=np.float32), sharding),
        "key": jax.random.key(3),
        "weak": jnp.asarray(2.5),
        "host": np.arange(3),
        "step": 7,
    }
    target = jax.tree.map(lambda x: x, tree) | {"w": jnp.zeros(16, device=sharding)}
    stacked = {"both": jnp.zeros((2, 3))}
    parts = {"h_0": np.ones(3, np.float32), "h_1": jnp.zeros(3)}
    with jax.transfer_guard(guard):
        path = ckpt.save(tmp_path / "c", tree, options=QUICK)
        restored = ckpt.restore(path, target)
        pair = ckpt.save(tmp_path / "pair", parts, options=QUICK)
        stacked = ckpt.restore(pair, stacked, rename=[("h_*", "both", ckpt.Stack())])
        placed = ckpt.load(path, only=["w", "key"], sharding={"w": sharding})
        with ckpt.load_checkpoint(path) as reader:
            struct = jax.ShapeDtypeStruct((16,), "float32", sharding=sharding)
            read = reader.read({reader.key_of("w"): struct})
        loaded = ckpt.load_object(ckpt.save_object(tree, tmp_path / "object"))
        out = ckpt.load(ckpt.export(tree, tmp_path / "e.npz", format="npz", only=["w", "key"]))
    for w in (placed["w"], *read.values(), loaded["w"], out["w"]):
        assert np.asarray(w).tolist() == list(range(16))
    assert np.asarray(restored["w"]).tolist() == list(range(16))
    assert restored["weak"].weak_type
    assert (
        jax.random.key_data(restored["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    )
    assert (restored["step"], stacked["both"].tolist()) == (7, [[1.0] * 3, [0.0] * 3])


def test_an_array_in_memory_of_the_host_is_saved(tmp_path):
    path = ckpt.save(
        tmp_path / "a",
        {
            "x": jax.device_put(
                jnp.ones(8),
                jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host"),
            )
        },
    )
    assert ckpt.load(path)["x"].sum() == 8


@pytest.mark.parametrize("dtype", ["float32", "int64", "bfloat16"])
def test_copies_that_are_only_started_arrive_though_the_arrays_are_donated(dtype):
    """Large ones are still on their way, small ones are there."""
    data = [values_of(dtype, LARGE), values_of(dtype, (3, 5))]
    arrays = list(map(on_device, data))
    large, small = host.copies(arrays, wait=False)
    for array in arrays:
        array.delete()
    assert isinstance(large, host.Arriving)
    assert isinstance(small, np.ndarray)
    assert large.nbytes == data[0].nbytes
    assert [large.wait().tobytes(), small.tobytes()] == [d.tobytes() for d in data]
