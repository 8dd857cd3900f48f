"""Arrays of floats that are stored with another dtype than the program has."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.graph.dtypes import LossyConversionError
from ckpt_jax.testing.processes import run_processes

pytestmark = pytest.mark.usefixtures("no_flushing")


def cast(*casts, **options):
    return ckpt.CheckpointOptions(cast_on_save=casts, **options)


BF16 = cast(("params/**", jnp.bfloat16))


def state():
    return {
        "params": {
            "w": jnp.arange(12.0).reshape(3, 4) / 7,
            "host": np.linspace(0, 1, 5),
            "count": jnp.int32(3),
            "key": jax.random.key(0),
        },
        "mu": jnp.ones(3) / 3,
        "lr": 0.1,
        "name": "x",
    }


@pytest.mark.parametrize("in_background", [False, True])
def test_arrays_of_floats_are_stored_with_the_dtype_and_others_as_they_are(tmp_path, in_background):
    path = ckpt.save(
        tmp_path / "a",
        state(),
        options=cast(("params/**", jnp.bfloat16), enable_async=in_background),
    )
    ckpt.sync()
    tree = ckpt.load(path)
    assert tree["params"]["w"].dtype == tree["params"]["host"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        tree["params"]["w"], np.asarray(state()["params"]["w"], jnp.bfloat16)
    )
    np.testing.assert_array_equal(
        tree["params"]["host"], state()["params"]["host"].astype(jnp.bfloat16)
    )
    assert tree["params"]["count"].dtype == np.int32 and tree["mu"].dtype == np.float32
    assert (tree["lr"], tree["name"]) == (0.1, "x")
    assert ckpt.verify(path).ok


def test_the_checkpoint_says_what_the_dtypes_were(tmp_path):
    path = ckpt.save(tmp_path / "a", state(), options=BF16)
    specs = ckpt.object_metadata(path).by_key
    found = {key.partition("/.A")[0]: (spec.dtype, spec.cast_from) for key, spec in specs.items()}
    assert found["params/w"] == ("bfloat16", "float32")
    assert found["params/host"] == ("bfloat16", "float64")
    assert found["mu"] == ("float32", "")


def test_a_restore_says_what_happened_and_casts_back_if_it_is_asked_to(tmp_path):
    path = ckpt.save(tmp_path / "a", state(), options=BF16)
    text = re.escape(
        "expected dtype float32, got bfloat16, which the save made of float32 (cast_on_save); "
        "cast=True converts it"
    )
    with pytest.raises(ckpt.RestoreMismatchError, match=text):
        ckpt.restore(path, state())
    options = ckpt.CheckpointOptions(cast=True)
    back = ckpt.restore(path, state(), options=options)
    assert back["params"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(back["params"]["w"], state()["params"]["w"], rtol=0.01)
    report = ckpt.plan_restore(path, state(), options=options)
    assert {entry.path for entry in report.dtype_changes} == {"params/host", "params/w"}
    # A program that has these dtypes itself needs no word.
    params = {**state()["params"], "w": jnp.zeros((3, 4), jnp.bfloat16)}
    params["host"] = np.zeros(5, jnp.bfloat16)
    assert ckpt.restore(path, {**state(), "params": params})["params"]["w"].dtype == jnp.bfloat16


def test_the_first_pattern_that_matches_counts(tmp_path):
    options = cast(
        ("params/w", jnp.float32), (re.compile("params/.*"), jnp.float16), ("*", np.float64)
    )
    tree = ckpt.load(ckpt.save(tmp_path / "a", state(), options=options))
    assert tree["params"]["w"].dtype == np.float32
    assert tree["params"]["host"].dtype == np.float16
    assert tree["mu"].dtype == np.float64


def test_patterns_that_choose_nothing_are_refused_before_a_byte_is_written(tmp_path):
    options = cast(("params/**", jnp.bfloat16), ("parms/w", jnp.float16), ("params/w", jnp.float32))
    with pytest.raises(ValueError) as caught:
        ckpt.save(tmp_path / "a", state(), options=options)
    text = str(caught.value)
    assert "'parms/w': it matches no array of floats" in text and "params/w" in text
    assert "'params/w': an earlier pattern matches all that it does" in text
    with pytest.raises(ValueError, match="'params/count': it matches no array of floats"):
        ckpt.save(tmp_path / "a", state(), options=cast(("params/count", jnp.float16)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_value_that_does_not_fit_is_an_error_and_nothing_is_saved(tmp_path, in_background):
    tree = {"params": {"w": jnp.full(1000, 1e30)}}
    options = cast(("params/**", np.float16), enable_async=in_background)
    checkpoint = ckpt.Checkpoint(**tree)
    kind = ckpt.AsyncSaveError if in_background else LossyConversionError
    with pytest.raises(kind, match="params/w: .*does not fit into float16.*cast_on_save"):
        checkpoint.save(tmp_path / "ckpt", options)
        checkpoint.sync()
    assert os.listdir(tmp_path) == [] and checkpoint.save_counter == 0


def test_the_program_may_change_its_arrays_after_a_save_in_the_background(tmp_path):
    host, device = np.ones(1000), jnp.ones(1000)
    path = ckpt.save(
        tmp_path / "a",
        {"params": [host, device]},
        options=cast(("params/**", np.float16), enable_async=True),
    )
    host[:] = 5
    device.delete()
    ckpt.sync()
    for found in ckpt.load(path)["params"]:
        np.testing.assert_array_equal(found, np.ones(1000, np.float16))


@pytest.mark.parametrize(
    "policy", [ckpt.ShardByDevice(), ckpt.ShardByProcess(), ckpt.MaxShardSize(100)]
)
def test_sharded_arrays_are_cast_slice_by_slice(tmp_path, mesh42, policy):
    value = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    array = jax.device_put(value, NamedSharding(mesh42, P("data", "model")))
    path = ckpt.save(
        tmp_path / "a", {"w": array}, options=cast(("w", jnp.bfloat16), sharding_policy=policy)
    )
    np.testing.assert_array_equal(ckpt.load(path)["w"], value.astype(jnp.bfloat16))
    assert ckpt.verify(path).ok


def test_moments_of_optimizers_can_be_cast_and_managers_restore_them(tmp_path):
    params = {"w": jnp.ones((4, 4))}
    tx = optax.adam(1e-3)
    opt_state = tx.update(jax.tree.map(lambda x: x / 3, params), tx.init(params), params)[1]
    checkpoint = ckpt.Checkpoint(params=params, opt=ckpt.optax_state(opt_state, params))
    manager = ckpt.CheckpointManager(checkpoint, tmp_path)
    path = manager.save(1, options=cast(("opt/**", jnp.bfloat16)))
    dtypes = {spec.dtype for spec in ckpt.object_metadata(path).by_key.values() if spec.shape}
    assert dtypes == {"float32", "bfloat16"}
    assert manager.restore(options=ckpt.CheckpointOptions(cast=True)).assert_consumed()


def test_a_run_that_casts_goes_on_where_it_was(tmp_path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=jnp.arange(4.0) / 7), tmp_path)
    manager.save(3, options=cast(("w", jnp.bfloat16)))
    fresh = ckpt.CheckpointManager(ckpt.Checkpoint(w=jnp.zeros(4)), tmp_path)
    with pytest.raises(ckpt.RestoreMismatchError, match="cast=True converts it"):
        fresh.restore_or_initialize()
    fresh.restore_or_initialize(options=ckpt.CheckpointOptions(cast=True))
    assert fresh.checkpoint.w.dtype == jnp.float32
    np.testing.assert_allclose(fresh.checkpoint.w, jnp.arange(4.0) / 7, rtol=0.01)


def test_objects_of_registered_classes_have_their_own_dtypes_when_they_are_made_anew(tmp_path):
    with ckpt.registration_scope():

        @ckpt.register_serializable()
        class Model(ckpt.AutoTrackable):
            def __init__(self):
                self.net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
                self.half = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float16)

        model = Model()
        path = ckpt.save_object(model, tmp_path / "a", options=cast(("net/*", jnp.bfloat16)))
        anew = ckpt.load_object(path)
        assert anew.net.kernel[...].dtype == jnp.float32
        assert anew.half.kernel[...].dtype == jnp.float16
        np.testing.assert_allclose(anew.net.kernel[...], model.net.kernel[...], rtol=0.01)
        # A dtype that was another one before the cast is a mismatch, as without a cast.
        Model.__init__ = lambda self: setattr(
            self, "net", nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
        )
        with pytest.raises(ckpt.RestoreMismatchError, match="net/kernel"):
            ckpt.load_object(path)


def test_a_conversion_that_casts_says_what_the_program_had(tmp_path):
    path = ckpt.save(tmp_path / "a", state(), options=BF16)
    for dtype, was in ((jnp.float16, "float32"), (jnp.float32, ""), (jnp.bfloat16, "float32")):
        name = np.dtype(dtype).name
        other = ckpt.convert(path, tmp_path / name, options=cast(("params/w", dtype)))
        specs = {key.partition("/.A")[0]: spec for key, spec in specs_of(other).items()}
        assert (specs["params/w"].dtype, specs["params/w"].cast_from) == (name, was)
        assert (specs["params/host"].dtype, specs["params/host"].cast_from) == (
            "bfloat16",
            "float64",
        )


def specs_of(path):
    return ckpt.object_metadata(path).by_key


def test_several_processes_cast_alike(tmp_path):
    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.ones(10), n=1)
        return checkpoint.save(tmp_path / "ckpt", cast(("w", np.float16)))

    path = str(tmp_path / "ckpt-1")
    assert run_processes(2, program) == [path, path]
    assert ckpt.load(path)["w"].dtype == np.float16


@pytest.mark.parametrize(
    ("casts", "error", "match"),
    [
        ("params/**", TypeError, "expected \\(pattern, dtype\\) pairs"),
        (("params/**", np.float16), TypeError, "expected \\(pattern, dtype\\) pairs"),
        ([(3, np.float16)], TypeError, "got the pattern 3"),
        ([("a", np.int32)], ValueError, "a dtype of floats for 'a', got"),
        ([("a", "string")], ValueError, "a dtype of floats"),
        (5, TypeError, "got 5"),
    ],
)
def test_options_that_make_no_sense_are_refused(casts, error, match):
    with pytest.raises(error, match=match):
        ckpt.CheckpointOptions(cast_on_save=casts)
