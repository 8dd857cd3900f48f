"""`ckpt.restore` with values that only one side may have, and with nothing that matches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpt_jax as ckpt


@pytest.fixture
def path(tmp_path):
    tree = {"params": {"w": jnp.ones(3), "b": jnp.ones(2)}, "ema": {"w": jnp.ones(3)}, "step": 7}
    return ckpt.save(tmp_path / "a", tree)


def paths(entries):
    return [entry.path for entry in entries]


@pytest.mark.parametrize(
    "allowed", [True, "ema/**", ["ema/*", "other"], re.compile("ema/.*"), lambda p: p[0] == "e"]
)
def test_what_is_allowed_may_be_unexpected(path, allowed):
    target = {"params": {"w": jnp.zeros(3), "b": jnp.zeros(2)}, "step": 0}
    found = ckpt.restore(path, target, allow_unexpected=allowed)
    assert found["step"] == 7 and found["params"]["w"][0] == 1


@pytest.mark.parametrize("allowed", [True, "head/**", ["head/w", "step"], lambda p: "head" in p])
def test_what_is_allowed_may_be_missing(path, allowed):
    target = {
        "params": {"w": jnp.zeros(3), "b": jnp.zeros(2)},
        "ema": {"w": jnp.zeros(3)},
        "step": 0,
        "head": {"w": jnp.full(2, 5.0)},
    }
    found = ckpt.restore(path, target, allow_missing=allowed)
    assert found["head"]["w"][0] == 5 and found["step"] == 7


def test_everything_else_is_still_an_error_and_named(path):
    target = {"params": {"w": jnp.zeros(3), "c": jnp.zeros(2)}, "head": jnp.zeros(1)}
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, target, allow_missing="head", allow_unexpected="ema/**")
    report = caught.value.report
    assert paths(report.missing) == ["params/c"]
    assert sorted(paths(report.unexpected)) == ["params/b", "step"]
    assert "allow_missing=" in str(caught.value) and "head" not in str(caught.value)


@pytest.mark.parametrize("allowed", [False, (), [], None])
def test_nothing_is_allowed_by_default_and_by_empty_selections(path, allowed):
    with pytest.raises(ckpt.RestoreMismatchError):
        ckpt.restore(path, {"step": 0}, allow_unexpected=allowed)


def test_a_value_that_is_only_abstract_must_not_be_missing(path):
    target = {"step": 0, "new": jax.ShapeDtypeStruct((2,), "float32"), "old": jnp.zeros(1)}
    with pytest.raises(ckpt.RestoreMismatchError, match="no value that could stay") as caught:
        ckpt.restore(path, target, allow_missing=True, allow_unexpected=True)
    assert paths(caught.value.report.missing) == ["new"]


@pytest.mark.parametrize("name", ["allow_missing", "allow_unexpected"])
@pytest.mark.parametrize("value", [3, [4], {"a": object()}.values()])
def test_something_that_selects_no_paths_is_refused_by_name(path, name, value):
    with pytest.raises(TypeError, match=f"{name} is True, a pattern"):
        ckpt.restore(path, {"step": 0}, **{name: value})


def test_a_saved_path_may_be_allowed_under_the_name_that_it_had(path):
    rules = [("ema/**", "average/**")]
    target = {"params": {"w": jnp.zeros(3), "b": jnp.zeros(2)}, "step": 0}
    for allowed in ("ema/w", "average/w"):
        ckpt.restore(path, target, rename=rules, allow_unexpected=allowed)


@pytest.mark.parametrize(
    "how", [{"strict": False}, {"allow_missing": True, "allow_unexpected": True}, {}]
)
def test_a_restore_in_which_nothing_matches_is_always_an_error(path, how):
    target = {"model": {"w": jnp.zeros(3)}}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"Nothing in the checkpoint matches"):
        ckpt.restore(path, target, rename=[("params/**", "modell/**")], **how)
    assert target["model"]["w"][0] == 0


def test_a_module_that_matches_nothing_is_an_error_and_unchanged(path):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    with pytest.raises(ckpt.RestoreMismatchError, match="Nothing in the checkpoint matches"):
        ckpt.restore(path, {"modell": model}, strict=False)
    np.testing.assert_array_equal(model.kernel[...], before)


def test_nothing_at_all_fits_nothing_at_all(tmp_path):
    assert ckpt.restore(ckpt.save(tmp_path / "a", {}), {}) == {}
    assert ckpt.restore(ckpt.save(tmp_path / "b", {"a": None}), {"a": None}, strict=False) == {
        "a": None
    }


def test_an_empty_checkpoint_of_a_program_that_grows_still_waits(path):
    checkpoint = ckpt.Checkpoint()
    status = checkpoint.read(path)
    checkpoint.step = 0
    checkpoint.params = {"w": jnp.zeros(3), "b": jnp.zeros(2)}
    checkpoint.ema = {"w": jnp.zeros(3)}
    assert checkpoint.step == 7
    status.assert_consumed()
