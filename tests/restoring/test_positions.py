"""Optimizer states that a file holds by position, and boxes of nnx: Flax's and Orbax's trees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training import train_state
from foreign import FIXTURES

import ckpt_jax as ckpt

LEGACY = FIXTURES / "flax_legacy" / "checkpoint_3"
CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


class Model(nn.Module):
    names: tuple = (None, None)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name=self.names[0])(nn.relu(nn.Dense(8, name=self.names[1])(x)))


def made(tx=CHAIN, names=(None, None)):
    model = Model(names)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def trained(state, steps=2):
    for n in range(steps):
        grads = jax.tree.map(lambda x, n=n: jnp.full_like(x, n + 1.0), state.params)
        state = state.apply_gradients(grads=grads)
    return state


def check_equal(a, b):
    for path, x in jax.tree.leaves_with_path(a):
        y = dict(jax.tree.leaves_with_path(b))[path]
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def written(tmp_path, tree):
    path = tmp_path / "state.msgpack"
    path.write_bytes(serialization.to_bytes(tree))
    return path


def test_a_train_state_of_flax_comes_back_whole():
    restored = ckpt.restore(LEGACY, made())
    expected = serialization.from_bytes(made(), LEGACY.read_bytes())
    check_equal(expected.params, restored.params)
    check_equal(expected.opt_state, restored.opt_state)
    assert restored.step == 1
    trained(restored)  # it goes on


def test_it_comes_back_onto_abstract_and_sharded_targets(mesh8):
    target = jax.eval_shape(made)
    restored = ckpt.restore(LEGACY, target)
    assert restored.opt_state[1][0].mu["Dense_1"]["kernel"].shape == (4, 8)
    assert isinstance(restored.opt_state[1][0].count, jax.Array)


def test_moments_follow_the_rename_rules_of_their_weights():
    target = made(names=("out", "in"))
    rules = [("params/Dense_0/*", "params/out/*"), ("params/Dense_1/*", "params/in/*")]
    restored = ckpt.restore(LEGACY, target, rename=rules)
    expected = ckpt.load(LEGACY)["opt_state"]["1"]["0"]
    for moment in ("mu", "nu"):
        mine = getattr(restored.opt_state[1][0], moment)
        np.testing.assert_array_equal(mine["out"]["bias"], expected[moment]["Dense_0"]["bias"])
        np.testing.assert_array_equal(mine["in"]["kernel"], expected[moment]["Dense_1"]["kernel"])


def test_moments_follow_weights_that_are_transposed(tmp_path):
    source = trained(made())
    path = written(tmp_path, source)
    target = made()
    turned = jax.tree.map(jnp.transpose, target.params)
    target = train_state.TrainState.create(apply_fn=None, params=turned, tx=CHAIN)
    rule = ("params/*/kernel", "params/*/kernel", ckpt.Transpose())
    restored = ckpt.restore(path, target, rename=[rule])
    np.testing.assert_array_equal(
        restored.opt_state[1][0].mu["Dense_1"]["kernel"],
        source.opt_state[1][0].mu["Dense_1"]["kernel"].T,
    )


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-3), optax.adamw(1e-3), optax.chain(optax.trace(0.9), CHAIN)]
)
def test_moments_survive_if_transforms_come_and_go(tmp_path, tx):
    source = trained(made())
    restored = ckpt.restore(written(tmp_path, source), made(tx), strict=False)
    (adam,) = [
        s
        for s in jax.tree.leaves(restored.opt_state, is_leaf=lambda x: hasattr(x, "nu"))
        if hasattr(s, "nu")
    ]
    check_equal(source.opt_state[1][0].nu, adam.nu)
    assert adam.count == 2


def test_two_states_with_the_same_fields_are_not_guessed(tmp_path):
    twice = optax.chain(optax.scale_by_adam(), optax.scale_by_adam(b1=0.5))
    path = written(tmp_path, trained(made(twice)))
    check_equal(trained(made(twice)).opt_state, ckpt.restore(path, made(twice)).opt_state)
    report = ckpt.plan_restore(path, made(optax.chain(CHAIN, CHAIN, optax.identity())))
    assert len(report.missing) == 18


def test_a_bare_state_keeps_its_positions(tmp_path):
    source = trained(made())
    path = written(tmp_path, {"params": source.params, "opt": source.opt_state})
    target = {"params": made().params, "opt": made().opt_state}
    check_equal(source.opt_state, ckpt.restore(path, target)["opt"])
    target = {"params": made().params, "opt": ckpt.optax_state(made().opt_state, made().params)}
    restored = ckpt.restore(path, target)["opt"].opt_state
    if not isinstance(restored, tuple):
        restored = restored.opt_state
    check_equal(source.opt_state, restored)


def test_a_state_without_its_parameters_is_found(tmp_path):
    source = trained(made())
    path = written(tmp_path, {"opt": source.opt_state})
    state = ckpt.optax_state(made().opt_state, made().params)
    restored = ckpt.restore(path, {"opt": state})["opt"]
    check_equal(source.opt_state, restored.opt_state)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])


def stepped(seed):
    net = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(net, optax.adamw(1e-3), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m.layers[0](m.first(jnp.ones((2, 4)) * seed))))(net)
    optimizer.update(net, grads)
    return net, optimizer


def boxed(state):
    """What Orbax and older Flax make of a state: each variable is a dict with its value."""
    if isinstance(state, nnx.Variable):
        return {"value": np.asarray(state[...])}
    return {str(key): boxed(child) for key, child in state.items()}


@pytest.mark.parametrize("boxes", [True, False])
def test_modules_and_optimizers_of_nnx_take_states_with_boxes(tmp_path, boxes):
    net, optimizer = stepped(1)
    form = boxed if boxes else lambda state: nnx.to_pure_dict(state)
    tree = {"net": form(nnx.state(net)), "optimizer": form(nnx.state(optimizer))}
    path = written(tmp_path, tree)
    other, its = stepped(2)
    ckpt.restore(path, {"net": other, "optimizer": its})
    check_equal(nnx.to_pure_dict(nnx.state(net)), nnx.to_pure_dict(nnx.state(other)))
    check_equal(nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(its)))


def test_what_is_loaded_keeps_its_boxes(tmp_path):
    net, _ = stepped(1)
    path = written(tmp_path, boxed(nnx.state(net)))
    assert list(ckpt.load(path)["first"]["kernel"]) == ["value"]


def test_moments_of_layers_are_stacked_with_them(tmp_path):
    params = {f"layer_{i}": {"w": jnp.full((2, 3), float(i))} for i in range(3)}
    tx = optax.adam(1e-3)
    source = trained(train_state.TrainState.create(apply_fn=None, params=params, tx=tx))
    stacked = {"layers": {"kernel": jnp.zeros((3, 3, 2))}}
    target = train_state.TrainState.create(apply_fn=None, params=stacked, tx=tx)
    rule = ("params/layer_*/w", "params/layers/kernel", ckpt.Transpose(), ckpt.Stack())
    path = written(tmp_path, source)
    restored = ckpt.restore(path, target, rename=[rule])
    for moment in ("mu", "nu"):
        expected = [getattr(source.opt_state[0], moment)[f"layer_{i}"]["w"].T for i in range(3)]
        found = getattr(restored.opt_state[0], moment)["layers"]["kernel"]
        np.testing.assert_array_equal(found, np.stack(expected))
    report = ckpt.plan_restore(path, target, rename=[rule])
    assert report.exact
    assert "opt_state/0/mu/layer_0/w ..." in str(report)


def test_an_optimizer_that_appears_later_takes_its_state(tmp_path):
    net, optimizer = stepped(1)
    tree = {"net": boxed(nnx.state(net)), "optimizer": boxed(nnx.state(optimizer))}
    path = written(tmp_path, tree)
    other, its = stepped(2)
    root = ckpt.Checkpoint(net=other)
    status = root.read(path)
    root.optimizer = its
    status.assert_consumed()
    check_equal(nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(its)))
