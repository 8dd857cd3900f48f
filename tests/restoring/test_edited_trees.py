"""What `ckpt.load` returns can be edited, saved, and restored into the program it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ckpt_jax as ckpt

PARAMS = {"d": {"w": jnp.ones((2, 3)), "b.c": jnp.zeros(3)}, "s": jnp.ones(())}


def fresh(tx=None, params=PARAMS):
    return TrainState.create(apply_fn=None, params=params, tx=tx or optax.adam(0.1))


def trained(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.chain(optax.clip(1.0), optax.adamw(0.1)),
        optax.chain(optax.trace(0.9), optax.trace(0.5)),
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.sgd(0.1),
    ],
    ids=["adam", "chain", "twice", "hyperparams", "sgd"],
)
def test_a_train_state_is_loaded_edited_saved_and_restored(tmp_path, tx):
    state = trained(fresh(tx))
    tree = ckpt.load(ckpt.save(tmp_path / "a", state))
    tree["params"]["d"]["w"] *= 2
    path = ckpt.save(tmp_path / "b", tree)
    found = ckpt.restore(path, fresh(tx))
    np.testing.assert_array_equal(found.params["d"]["w"], 2 * state.params["d"]["w"])
    assert_equal(found.opt_state, state.opt_state)
    assert int(found.step) == 1


def test_moments_can_be_edited_too(tmp_path):
    tree = ckpt.load(ckpt.save(tmp_path / "a", trained(fresh())))
    tree["opt_state"]["ScaleByAdamState.mu"]["params"]["d"]["w"][:] = 5
    found = ckpt.restore(ckpt.save(tmp_path / "b", tree), fresh())
    assert found.opt_state[0].mu["d"]["w"].tolist() == [[5] * 3] * 2


def test_a_loaded_tree_and_its_checkpoint_fit_each_other_both_ways(tmp_path):
    a = ckpt.save(tmp_path / "a", trained(fresh()))
    tree = ckpt.load(a)
    b = ckpt.save(tmp_path / "b", tree)
    for one, other in [(a, tree), (b, tree), (a, ckpt.load(b)), (b, ckpt.load(a)), (b, fresh())]:
        assert ckpt.plan_restore(one, other).exact
    assert_equal(ckpt.restore(a, ckpt.load(b)), tree)


def test_the_state_moves_with_parameters_that_are_renamed(tmp_path):
    state = trained(fresh())
    path = ckpt.save(tmp_path / "b", ckpt.load(ckpt.save(tmp_path / "a", state)))
    target = fresh(params={"e": PARAMS["d"], "s": PARAMS["s"]})
    found = ckpt.restore(path, target, rename=[("params/d/**", "params/e/**")])
    assert_equal(found.opt_state[0].mu["e"], state.opt_state[0].mu["d"])


def test_a_checkpoint_object_takes_an_edited_tree(tmp_path):
    state = trained(fresh())
    tree = ckpt.load(ckpt.Checkpoint(state=state).save(tmp_path / "a"))
    checkpoint = ckpt.Checkpoint(state=fresh())
    checkpoint.restore(ckpt.save(tmp_path / "b", tree)).assert_consumed()
    assert_equal(checkpoint.state.opt_state, state.opt_state)


def test_an_nnx_optimizer_takes_an_edited_tree(tmp_path):
    def program(seed):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        return {"m": model, "o": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)}

    first = program(0)
    path = ckpt.save(tmp_path / "b", ckpt.load(ckpt.save(tmp_path / "a", first)))
    found = ckpt.restore(path, program(1))
    assert_equal(nnx.state(found["m"]), nnx.state(first["m"]))
    assert_equal(nnx.state(found["o"]), nnx.state(first["o"]))


def test_moments_of_a_parameter_that_is_gone_are_an_error(tmp_path):
    tree = ckpt.load(ckpt.save(tmp_path / "a", fresh()))
    del tree["params"]["s"]
    path = ckpt.save(tmp_path / "b", tree)
    with pytest.raises(ckpt.RestoreMismatchError, match="params/s"):
        ckpt.restore(path, fresh())
