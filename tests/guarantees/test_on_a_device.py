"""What holds on any device. The suite runs this on a CPU, `scripts/devices` on an accelerator.

Every test puts its arrays on the first device that JAX has.
"""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import ckpt_jax as ckpt
from ckpt_jax.values import host

pytestmark = pytest.mark.device

QUICK = ckpt.CheckpointOptions(durable=False)
IN_BACKGROUND = ckpt.CheckpointOptions(durable=False, enable_async=True)
DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 "
    "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz float8_e4m3fnuz "
    "float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn int4 uint4 int2 uint2"
)
LARGE = (512, 1024)  # copied through pinned memory where there is such memory


def device():
    return jax.devices()[0]


def assert_same(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_dtype_comes_back_to_the_device(tmp_path, dtype):
    data = np.random.default_rng(0).integers(0, 2, LARGE).astype(jnp.dtype(dtype))
    with jax.enable_x64(True):
        try:
            tree = {"large": jax.device_put(data, device()), "one": jax.device_put(data[3, 5])}
            jax.block_until_ready(tree)
        except (jax.errors.JaxRuntimeError, NotImplementedError, TypeError) as error:
            pytest.skip(f"This device has no {dtype}: {error}")
        ckpt.save(tmp_path / "a", tree, options=QUICK)
        restored = ckpt.restore(tmp_path / "a", tree)
        assert restored["large"].sharding == tree["large"].sharding
        assert_same(restored["large"], data)
        assert_same(restored["one"], data[3, 5])


def test_keys_come_back_to_the_device(tmp_path):
    keys = jax.random.split(jax.device_put(jax.random.key(3), device()), 5)
    ckpt.save(tmp_path / "a", {"keys": keys}, options=QUICK)
    target = {"keys": jax.random.split(jax.random.key(0), 5)}
    restored = ckpt.restore(tmp_path / "a", target)["keys"]
    assert restored.dtype == keys.dtype
    assert_same(jax.random.key_data(restored), jax.random.key_data(keys))


@pytest.mark.parametrize("pinned_nbytes", [None, 0, 3 << 20], ids=["all", "none", "some"])
def test_a_program_may_donate_its_arrays_as_soon_as_save_has_returned(
    tmp_path, monkeypatch, pinned_nbytes
):
    """Whatever part of the copies fits into pinned memory."""
    if pinned_nbytes is not None:
        monkeypatch.setattr(host, "_PINNED_AT_MOST", pinned_nbytes)
    step = jax.jit(lambda tree: [x * 2 + 1 for x in tree], donate_argnums=0)
    data = [np.full(LARGE, k, np.float32) for k in range(8)]
    tree = jax.block_until_ready([jax.device_put(each, device()) for each in data])
    checkpoint = ckpt.Checkpoint(tree=tree)
    saved = []
    for _ in range(3):
        checkpoint.tree = tree
        saved.append((checkpoint.save(tmp_path / "c", IN_BACKGROUND), data))
        checkpoint.tree = None
        for _ in range(3):
            tree = step(tree)
            data = [each * 2 + 1 for each in data]
    checkpoint.sync()
    for path, expected in saved:
        for found, each in zip(ckpt.load(path)["tree"], expected, strict=True):
            assert_same(found, each)


def test_memory_kinds_come_back(tmp_path):
    tree = {
        kind: jax.device_put(jnp.arange(1 << 16), SingleDeviceSharding(device(), memory_kind=kind))
        for kind in sorted({memory.kind for memory in device().addressable_memories()})
    }
    ckpt.save(tmp_path / "a", tree, options=QUICK)
    restored = ckpt.restore(tmp_path / "a", tree)
    for kind, array in restored.items():
        assert array.sharding.memory_kind == kind
        assert_same(array, np.arange(1 << 16, dtype=np.int32))


def test_arrays_move_between_the_device_and_the_cpu(tmp_path):
    cpu, data = jax.devices("cpu")[-1], np.random.default_rng(0).random(LARGE, np.float32)
    for number, (source, target) in enumerate([(device(), cpu), (cpu, device())]):
        path = ckpt.save(tmp_path / str(number), {"w": jax.device_put(data, source)}, options=QUICK)
        struct = jax.ShapeDtypeStruct(LARGE, "float32", sharding=SingleDeviceSharding(target))
        restored = ckpt.restore(path, {"w": struct})["w"]
        assert restored.devices() == {target}
        assert_same(restored, data)


@pytest.mark.parametrize("options", [QUICK, IN_BACKGROUND], ids=["at once", "in background"])
def test_a_save_and_a_restore_compile_nothing(tmp_path, options):
    """Shapes that no other test has, so that nothing was compiled for them before."""
    tree = {
        f"w{k}": jax.device_put(np.full((k, 257, 13), k, np.float32), device())
        for k in range(1, 40, 7)
    }
    jax.block_until_ready(tree)
    compiled = []

    def listen(event, seconds, **_):
        if "compile" in event:
            compiled.append(event)

    checkpoint = ckpt.Checkpoint(tree=tree)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        path = checkpoint.save(tmp_path / "c", options)
        checkpoint.sync()
        restored = ckpt.restore(path, {"tree": tree})
        assert compiled == []
        jax.jit(lambda x: x + 1)(restored["tree"]["w1"])
        assert compiled  # so the events are still called that
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_saves_and_restores_leave_no_memory_on_the_device(tmp_path):
    if not device().memory_stats():
        pytest.skip("This device does not tell how much memory is in use.")
    tree = {"w": jax.block_until_ready(jax.device_put(np.ones((4096, 1024), np.float32), device()))}
    before = device().memory_stats()["bytes_in_use"]
    path = ckpt.save(tmp_path / "a", tree, options=QUICK)
    assert device().memory_stats()["bytes_in_use"] == before
    restored = jax.block_until_ready(ckpt.restore(path, tree))
    assert device().memory_stats()["bytes_in_use"] <= before + tree["w"].nbytes
    del restored
    assert device().memory_stats()["bytes_in_use"] == before


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    def build(seed):
        model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(seed)), nnx.relu)
        return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    with jax.default_device(device()):
        xs = jax.random.normal(jax.random.key(0), (6, 16, 8))
        model, optimizer = build(0)
        for x in xs[:3]:
            step(model, optimizer, x)
        path = ckpt.save(tmp_path / "a", {"m": model, "o": optimizer}, options=QUICK)
        other_model, other_optimizer = build(1)
        ckpt.restore(path, {"m": other_model, "o": other_optimizer})
        for x in xs[3:]:
            step(model, optimizer, x)
            step(other_model, other_optimizer, x)
    states = [jax.tree.leaves(nnx.state(each)) for each in (model, other_model)]
    for found, expected in zip(*states, strict=True):
        assert_same(found, expected)
