"""Which parts of an optax state belong to parameters, and parameters that fit nothing."""

import dataclasses
from collections import namedtuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import ckpt_jax as ckpt

PARAMS = {"enc": {"a": jnp.ones(2), "b": jnp.ones(3)}, "head": {"w": jnp.ones(4)}}
PREFIX = {"enc": "x", "head": "y"}
WHOLE = {"enc": {"a": "x", "b": "x"}, "head": {"w": "y"}}


def transformation(labels):
    return optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(0.2, momentum=0.9)}, labels)


def paths(tree, directory):
    with ckpt.load_checkpoint(ckpt.save(directory, tree)) as reader:
        return reader.paths()


@pytest.mark.parametrize("labels", [PREFIX, lambda params: PREFIX], ids=["tree", "function"])
def test_labels_that_are_a_prefix_give_the_same_slots_as_whole_ones(tmp_path, labels):
    def tree(labels):
        return {
            "params": PARAMS,
            "opt": ckpt.optax_state(transformation(labels).init(PARAMS), PARAMS),
        }

    found = paths(tree(labels), tmp_path / "a")
    assert found == paths(tree(WHOLE), tmp_path / "b")
    assert "opt/ScaleByAdamState.mu/params/enc/a" in found
    assert "opt/TraceState.trace/params/head/w" in found
    assert ckpt.plan_restore(tmp_path / "b", tree(labels)).exact


def test_moments_under_prefix_labels_follow_renamed_parameters(tmp_path):
    tx = transformation(PREFIX)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state = tx.update(grads, tx.init(PARAMS), PARAMS)[1]
    path = ckpt.save(tmp_path / "a", {"p": PARAMS, "opt": ckpt.optax_state(state, PARAMS)})
    renamed = {"encoder": PARAMS["enc"], "head": PARAMS["head"]}
    fresh = transformation({"encoder": "x", "head": "y"}).init(renamed)
    target = {"p": renamed, "opt": ckpt.optax_state(fresh, renamed)}
    found = ckpt.restore(path, target, rename=[("p/enc/**", "p/encoder/**")])
    moments = found["opt"].opt_state.inner_states["x"].inner_state[0].mu
    np.testing.assert_array_equal(
        moments["encoder"]["a"], state.inner_states["x"].inner_state[0].mu["enc"]["a"]
    )


@pytest.mark.parametrize("mask", [{"enc": True, "head": False}, {"enc": False, "head": False}])
def test_masks_may_be_a_prefix_too(tmp_path, mask):
    state = optax.masked(optax.adam(0.1), mask).init(PARAMS)
    tree = {"params": PARAMS, "opt": ckpt.optax_state(state, PARAMS)}
    found = paths(tree, tmp_path / "a")
    assert ("opt/ScaleByAdamState.mu/params/enc/a" in found) == mask["enc"]
    assert not any("head" in path for path in found if path.startswith("opt"))


@pytest.mark.parametrize(
    "wrong",
    [{"v": jnp.ones(2)}, {"state": PARAMS}, jnp.ones(5), {}],
    ids=["w", "in", "array", "no"],
)
@pytest.mark.parametrize("tx", [optax.adam(0.1), transformation(PREFIX)], ids=["adam", "multi"])
def test_parameters_that_fit_nothing_are_refused_at_the_call(tx, wrong):
    with pytest.raises(ValueError, match=r"nothing in the state has their structure \(\w+\.mu"):
        ckpt.optax_state(tx.init(PARAMS), wrong)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.chain(optax.clip(1.0), optax.scale_by_schedule(lambda step: 0.1)),
        optax.inject_hyperparams(optax.sgd)(0.1),
        optax.flatten(optax.adam(0.1)),
        optax.lbfgs(),
        optax.adafactor(0.1),
        optax.masked(optax.adam(0.1), {"enc": False, "head": False}),
    ],
)
def test_states_without_moments_of_single_parameters_are_accepted(tx):
    ckpt.optax_state(tx.init(PARAMS), PARAMS)
    ckpt.optax_state(jax.eval_shape(tx.init, PARAMS), PARAMS)


# --- moments that are not recognised --------------------------------------------------------------


def as_namedtuple():
    return namedtuple("State", ["params", "opt_state"])


def as_dataclass():
    return dataclasses.make_dataclass("State", ["params", "opt_state"])


def as_flax():
    return flax.struct.dataclass(
        type("State", (), {"__annotations__": {"params": object, "opt_state": object}})
    )


def as_train_state():
    class State(TrainState):
        pass

    return lambda params, opt_state: State(0, None, params, optax.adam(0.1), opt_state)


@pytest.mark.parametrize("kind", [as_namedtuple, as_dataclass, as_flax])
def test_a_class_that_is_almost_a_train_state_is_told_once_that_positions_count(
    tmp_path, caplog, kind
):
    make = kind()
    for number in range(2):
        path = ckpt.save(tmp_path / f"{number}", make(PARAMS, optax.adam(0.1).init(PARAMS)))
        ckpt.restore(path, make(PARAMS, optax.adam(0.1).init(PARAMS)))
    (record,) = caplog.records
    assert "State" in record.getMessage() and "by their position" in record.getMessage()
    assert "ckpt.optax_state(opt_state, params)" in record.getMessage()


def test_a_train_state_whose_moments_fit_no_parameters_is_told_once(tmp_path, caplog):
    make = as_train_state()
    for number in range(2):
        state = make({"params": PARAMS}, optax.adam(0.1).init(PARAMS))
        ckpt.restore(ckpt.save(tmp_path / f"{number}", state), state)
    (record,) = caplog.records
    assert "ScaleByAdamState.mu.enc.a" in record.getMessage()
    assert "tx.init(params)" in record.getMessage()


@pytest.mark.parametrize("kind", [as_namedtuple, as_dataclass, as_flax, as_train_state])
@pytest.mark.parametrize("has_moments", [False, True])
def test_nothing_is_said_if_there_are_no_moments_or_they_are_recognised(
    tmp_path, caplog, kind, has_moments
):
    make = kind()
    state = optax.adam(0.1).init(PARAMS) if has_moments else optax.sgd(0.1).init(PARAMS)
    if has_moments and kind is not as_train_state:
        state = ckpt.optax_state(state, PARAMS)
    ckpt.save(tmp_path / "a", make(PARAMS, state))
    assert not caplog.records
