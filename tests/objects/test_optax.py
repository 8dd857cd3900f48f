"""Optax states: unchanged optimizers exactly, changed ones as far as anything survives."""

from __future__ import annotations

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ckpt_jax as ckpt
from ckpt_jax.objects.optax_states import OptaxState

PARAMS = {
    "enc": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 4))},
}


def by_part(params):
    return {name: jax.tree.map(lambda _, name=name: name, part) for name, part in params.items()}


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


ADAM = optax.adam(0.1)

# What the transforms that optax exports are made with, where it is not a rate or nothing.
ARGUMENTS = {
    "add_noise": (0.1, 0.5, jax.random.key(0)),
    "apply_every": (2,),
    "apply_if_finite": (ADAM, 3),
    "chain": (ADAM, optax.ema(0.9)),
    "conditionally_mask": (ADAM, lambda step: step > 1),
    "conditionally_transform": (ADAM, lambda step: step > 1),
    "flatten": (ADAM,),
    "freeze": (matrices(PARAMS),),
    "lookahead": (ADAM, 5, 0.5),
    "masked": (ADAM, matrices),
    "measure_with_ema": (lambda updates: jnp.ones(()), 0.9),
    "multi_transform": ({"enc": ADAM, "head": optax.sgd(0.1, 0.9)}, by_part),
    "named_chain": (("a", ADAM), ("b", optax.ema(0.9))),
    "noisy_sgd": (0.1, 0.01, 0.55, jax.random.key(0)),
    "partition": ({"enc": ADAM, "head": ADAM}, by_part),
    "scale_by_backtracking_linesearch": (5,),
    "scale_by_schedule": (optax.constant_schedule(0.1),),
    "scale_by_zoom_linesearch": (5,),
    "selective_transform": (ADAM,),
    "stateless": (lambda updates, params: updates,),
    "stateless_with_tree_map": (lambda update, param: update,),
    "with_extra_args_support": (ADAM,),
}
KEYWORDS = {"selective_transform": {"freeze_mask": matrices}}
NOT_TRANSFORMS = {"inject_hyperparams", "inject_stateful_hyperparams", "snapshot"}


def exported():
    """The names of all functions of optax that say that they return a transformation."""
    return [
        name
        for name, make in sorted(vars(optax).items())
        if inspect.isfunction(make)
        and not name.startswith("_")
        and "GradientTransformation" in str(inspect.signature(make).return_annotation)
        and name not in NOT_TRANSFORMS
    ]


def made(name):
    make = getattr(optax, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optax's own deprecations
        if name in ARGUMENTS:
            return make(*ARGUMENTS[name], **KEYWORDS.get(name, {}))
        for arguments in ((0.1,), ()):
            try:
                tx = make(*arguments)
                tx.init(PARAMS)
                return tx
            except (TypeError, AttributeError, ValueError):
                continue
    pytest.skip(f"The arguments that optax.{name} needs are not listed in ARGUMENTS.")


def trained(state):
    """A state in which every number differs from the initial one."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([_other(x, i + 1) for i, x in enumerate(leaves)])


def _other(x, by):
    if _is_key(x):
        return x
    return ~x if x.dtype == bool else x + by


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def same(a, b):
    def bits(x):
        return np.asarray(jax.random.key_data(x) if _is_key(x) else x)

    (left, one), (right, two) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert one == two
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", exported())
def test_an_unchanged_optimizer_comes_back_exactly(name, tmp_path):
    tx = made(name)
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    fresh = tx.init(params)
    state = trained(fresh)
    path = ckpt.save(tmp_path / "a", (params, ckpt.optax_state(state, params)))
    _, found = ckpt.restore(path, (params, ckpt.optax_state(fresh, params)))
    assert same(found.opt_state, state)


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(ADAM, 2),
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 9)),
        optax.chain(optax.chain(optax.clip(1.0), ADAM), optax.contrib.reduce_on_plateau()),
        optax.contrib.schedule_free_sgd(0.1),
    ],
    ids=["MultiSteps", "inject_hyperparams", "chains", "schedule_free"],
)
def test_wrappers_come_back_exactly(tx, tmp_path):
    fresh = tx.init(PARAMS)
    state = trained(fresh)
    path = ckpt.save(tmp_path / "a", {"p": PARAMS, "o": ckpt.optax_state(state, PARAMS)})
    found = ckpt.restore(path, {"p": PARAMS, "o": ckpt.optax_state(fresh, PARAMS)})
    assert same(found["o"].opt_state, state)


# --- changed optimizers -----------------------------------------------------------------


def moved(tmp_path, before, after, params=PARAMS, new_params=None, **kwargs):
    """Trains `before`, restores into `after`; the trained state, the restored one, the report."""
    new_params = params if new_params is None else new_params
    state = trained(before.init(params))
    path = ckpt.save(tmp_path / "a", {"params": params, "opt": ckpt.optax_state(state, params)})
    target = {"params": new_params, "opt": ckpt.optax_state(after.init(new_params), new_params)}
    report = ckpt.plan_restore(path, target, **kwargs)
    found = ckpt.restore(path, target, strict=False, **kwargs)["opt"].opt_state
    return state, found, report


def adam_of(state):
    """The one ScaleByAdamState inside a state."""

    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    return found


CLIP = optax.clip_by_global_norm(1.0)
VARIANTS = {
    "inserted before": optax.chain(CLIP, optax.ema(0.9), ADAM),
    "inserted after": optax.chain(ADAM, optax.ema(0.9)),
    "chain in chain": optax.chain(CLIP, optax.chain(optax.chain(ADAM), optax.ema(0.9))),
    "MultiSteps": optax.MultiSteps(ADAM, 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "schedule": optax.adam(optax.linear_schedule(0.1, 0.0, 9)),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "weight decay": optax.adamw(0.1),
    "masked, all": optax.masked(ADAM, jax.tree.map(lambda _: True, PARAMS)),
    "partition, one": optax.partition({"x": ADAM}, jax.tree.map(lambda _: "x", PARAMS)),
}


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_moments_survive_changes_around_their_transform(variant, way, tmp_path):
    before, after = (ADAM, VARIANTS[variant]) if way == "there" else (VARIANTS[variant], ADAM)
    state, found, report = moved(tmp_path, before, after)
    assert same(adam_of(found), adam_of(state))
    assert not report.mismatched
    paths = [entry.path for entry in (*report.missing, *report.unexpected)]
    assert not any("ScaleByAdamState" in path for path in paths)


def test_reordered_transforms_keep_their_states(tmp_path):
    ema, trace = optax.ema(0.9), optax.trace(0.5)
    state, found, report = moved(tmp_path, optax.chain(ema, trace), optax.chain(trace, ema))
    assert report.exact
    assert same((found[1], found[0]), state)


def test_masking_keeps_the_moments_of_what_is_left(tmp_path):
    state, found, report = moved(tmp_path, ADAM, optax.masked(ADAM, matrices))
    mu = found.inner_state[0].mu
    assert same(mu["enc"]["kernel"], state[0].mu["enc"]["kernel"])
    assert isinstance(mu["enc"]["bias"], optax.MaskedNode)
    assert not report.missing
    assert {entry.path for entry in report.unexpected} == {
        "opt/ScaleByAdamState.mu/params/enc/bias",
        "opt/ScaleByAdamState.nu/params/enc/bias",
    }


def test_unmasking_leaves_new_moments_at_their_initial_value_and_says_so(tmp_path):
    state, found, report = moved(tmp_path, optax.masked(ADAM, matrices), ADAM)
    assert same(found[0].mu["head"], state.inner_state[0].mu["head"])
    assert float(jnp.abs(found[0].mu["enc"]["bias"]).max()) == 0.0
    assert {entry.path for entry in report.missing} == {
        "opt/ScaleByAdamState.mu/params/enc/bias",
        "opt/ScaleByAdamState.nu/params/enc/bias",
    }


def test_partitioning_keeps_each_parameters_moments(tmp_path):
    parts = optax.partition({"enc": ADAM, "head": optax.sgd(0.1, 0.9)}, by_part)
    state, found, report = moved(tmp_path, ADAM, parts)
    mu = found.inner_states["enc"].inner_state[0].mu
    assert same(mu["enc"], state[0].mu["enc"])
    assert {entry.path for entry in report.missing} == {"opt/TraceState.trace/params/head/kernel"}


def test_two_transforms_of_one_class_are_told_apart(tmp_path):
    twice = optax.chain(optax.ema(0.9), optax.clip(1.0), optax.ema(0.5))
    state, found, report = moved(tmp_path, twice, optax.chain(optax.ema(0.9), optax.ema(0.5)))
    assert report.exact
    assert same((found[0], found[1]), (state[0], state[2]))


def test_what_is_gone_is_unexpected_and_what_is_new_is_missing(tmp_path):
    _, found, report = moved(tmp_path, ADAM, optax.sgd(0.1, momentum=0.9))
    assert same(found, optax.sgd(0.1, momentum=0.9).init(PARAMS))
    assert len(report.unexpected) == 1 + 2 * 3 and len(report.missing) == 3
    assert all("ScaleByAdamState" in entry.path for entry in report.unexpected)
    assert all("TraceState.trace" in entry.path for entry in report.missing)


def test_strict_restore_refuses_a_changed_optimizer_with_all_differences(tmp_path):
    path = ckpt.save(tmp_path / "a", (PARAMS, ckpt.optax_state(ADAM.init(PARAMS), PARAMS)))
    sgd = optax.sgd(0.1, 0.9).init(PARAMS)
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, (PARAMS, ckpt.optax_state(sgd, PARAMS)))
    assert len(caught.value.report.unexpected) == 7 and len(caught.value.report.missing) == 3


# --- parameters that move ---------------------------------------------------------------


def test_moments_follow_a_parameter_that_was_renamed(tmp_path):
    renamed = {"encoder": PARAMS["enc"], "head": PARAMS["head"]}
    state, found, report = moved(
        tmp_path, ADAM, ADAM, new_params=renamed, rename=[("params/enc/*", "params/encoder/*")]
    )
    assert report.exact
    assert same(found[0].mu["encoder"], state[0].mu["enc"])


def test_a_whole_optimizer_may_be_renamed(tmp_path):
    state = trained(ADAM.init(PARAMS))
    path = ckpt.save(tmp_path / "a", {"params": PARAMS, "o": ckpt.optax_state(state, PARAMS)})
    target = {"params": PARAMS, "opt": ckpt.optax_state(ADAM.init(PARAMS), PARAMS)}
    found = ckpt.restore(path, target, rename=[("o", "opt")])
    assert same(found["opt"].opt_state, state)


def test_a_lookahead_wrapper_keeps_the_moments_of_the_fast_parameters(tmp_path):
    pair = optax.LookaheadParams.init_synced(PARAMS)
    state, found, report = moved(
        tmp_path,
        ADAM,
        optax.lookahead(ADAM, 5, 0.5),
        new_params=pair,
        rename=[("params/**", "params/fast/**")],
    )
    assert same(adam_of(found), adam_of(state))
    paths = {entry.path.split("/")[1] for entry in report.missing}
    assert paths == {"LookaheadState.steps_since_sync", "slow"} and not report.unexpected


@pytest.mark.parametrize("params", [jnp.ones(3), jnp.ones(()), [jnp.ones(2)], (jnp.ones(2),)])
def test_parameters_may_be_any_tree_even_a_bare_array(params, tmp_path):
    state = trained(ADAM.init(params))
    path = ckpt.save(tmp_path / "a", {"p": params, "o": ckpt.optax_state(state, params)})
    found = ckpt.restore(path, {"p": params, "o": ckpt.optax_state(ADAM.init(params), params)})
    assert same(found["o"].opt_state, state)
    assert ckpt.object_metadata(path).slot_nodes


def test_a_state_whose_parameters_are_not_saved_is_saved_as_a_tree(tmp_path):
    state = trained(ADAM.init(PARAMS))
    path = ckpt.save(tmp_path / "a", {"o": ckpt.optax_state(state, PARAMS)})
    found = ckpt.restore(path, {"o": ckpt.optax_state(ADAM.init(PARAMS), PARAMS)})
    assert same(found["o"].opt_state, state)
    mu = ckpt.load(path)["o"]["ScaleByAdamState.mu"]
    assert same(mu, jax.tree.map(np.asarray, state[0].mu))


def test_two_trees_of_one_structure_are_told_apart_by_which_one_was_given(tmp_path):
    average = jax.tree.map(lambda x: x * 0, PARAMS)
    state = ADAM.init(PARAMS)
    tree = {"average": average, "weights": PARAMS, "o": ckpt.optax_state(state, PARAMS)}
    path = ckpt.save(tmp_path / "a", tree)
    assert "o/ScaleByAdamState.mu/weights/enc/bias" in ckpt.object_metadata(path).paths
    assert same(ckpt.restore(path, tree)["o"].opt_state, state)


@pytest.mark.parametrize("tx", [ADAM, optax.scale_by_adam()], ids=["chain", "single"])
def test_what_is_restored_can_be_updated_like_the_state_that_it_is(tx, tmp_path):
    state = trained(tx.init(PARAMS))
    tree = {"params": PARAMS, "o": ckpt.optax_state(state, PARAMS)}
    found = ckpt.restore(ckpt.save(tmp_path / "a", tree), tree)["o"]
    assert same(tx.update(PARAMS, found, PARAMS), tx.update(PARAMS, state, PARAMS))


def test_an_abstract_target_finds_its_parameters_by_structure(tmp_path):
    """jax.eval_shape takes trees apart: which object the parameters were is lost."""
    state = trained(ADAM.init(PARAMS))
    tree = {"params": PARAMS, "o": ckpt.optax_state(state, PARAMS)}
    path = ckpt.save(tmp_path / "a", tree)
    target = jax.eval_shape(lambda: tree)
    assert isinstance(target["o"], OptaxState)
    assert same(ckpt.restore(path, target)["o"].opt_state, state)


def test_a_checkpoint_restores_an_optax_state_that_is_assigned_later(tmp_path):
    state = trained(ADAM.init(PARAMS))
    path = ckpt.Checkpoint(params=PARAMS, o=ckpt.optax_state(state, PARAMS)).save(tmp_path / "a")
    checkpoint = ckpt.Checkpoint(params=jax.tree.map(jnp.zeros_like, PARAMS))
    status = checkpoint.restore(path)
    checkpoint.o = ckpt.optax_state(ADAM.init(PARAMS), checkpoint.params)
    status.assert_consumed()
    assert same(checkpoint.o.opt_state, state)


def test_saving_a_restored_checkpoint_again_saves_the_same(tmp_path):
    state = trained(ADAM.init(PARAMS))
    first = ckpt.Checkpoint(params=PARAMS, o=ckpt.optax_state(state, PARAMS))
    path = first.write(tmp_path / "a")
    fresh = ckpt.Checkpoint(params=PARAMS, o=ckpt.optax_state(ADAM.init(PARAMS), PARAMS))
    fresh.read(path).assert_consumed()
    again = fresh.write(tmp_path / "b")
    assert ckpt.object_metadata(again).paths == ckpt.object_metadata(path).paths
    assert same(ckpt.load(again), ckpt.load(path))


# --- train states and nnx ---------------------------------------------------------------


def train_state(tx, params=PARAMS):
    return TrainState.create(apply_fn=print, params=params, tx=tx)


def test_a_train_state_keeps_its_moments_when_its_optimizer_changes(tmp_path):
    state = train_state(ADAM).apply_gradients(grads=PARAMS)
    path = ckpt.save(tmp_path / "a", state)
    target = train_state(optax.chain(CLIP, optax.adam(0.3)))
    found = ckpt.restore(path, target)
    assert same(adam_of(found.opt_state), adam_of(state.opt_state))
    assert jax.tree.structure(found) == jax.tree.structure(target)
    assert int(found.step) == 1


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.set_to_zero()])
def test_a_train_state_without_optimizer_state_keeps_its_structure(tmp_path, tx):
    state = train_state(tx)
    found = ckpt.restore(ckpt.save(tmp_path / "a", state), state)
    assert jax.tree.structure(found) == jax.tree.structure(state)


class Net(nnx.Module):
    def __init__(self, rngs, names=("first", "second")):
        for name in names:
            setattr(self, name, nnx.Linear(3, 3, rngs=rngs))
        self.norm = nnx.BatchNorm(3, rngs=rngs)


def nnx_pair(tx, seed=0, names=("first", "second")):
    model = Net(nnx.Rngs(seed), names)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_moments(optimizer):
    return nnx.to_pure_dict(adam_of(nnx.as_pure(optimizer.opt_state)).mu)


def nnx_trained(tx, names=("first", "second")):
    model, optimizer = nnx_pair(tx, names=names)
    grads = nnx.grad(lambda m: sum((x**2).sum() for x in jax.tree.leaves(nnx.state(m, nnx.Param))))
    optimizer.update(model, grads(model))
    return model, optimizer


def test_an_nnx_optimizer_keeps_its_moments_when_its_optimizer_changes(tmp_path):
    model, optimizer = nnx_trained(ADAM)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    new_model, new = nnx_pair(optax.chain(CLIP, optax.adam(0.3)), seed=1)
    ckpt.Checkpoint(model=new_model, optimizer=new).read(path).assert_consumed()
    assert same(nnx_moments(new), nnx_moments(optimizer))
    assert int(new.step.get_value()) == 1


def test_an_nnx_optimizer_follows_its_model_under_another_name(tmp_path):
    model, optimizer = nnx_trained(ADAM)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    new_model, new = nnx_pair(ADAM, seed=1, names=("first", "renamed"))
    tree = {"model": new_model, "optimizer": new}
    ckpt.restore(path, tree, rename=[("model/second", "model/renamed")])
    old, now = nnx_moments(optimizer), nnx_moments(new)
    assert same(now["renamed"], old["second"]) and same(now["first"], old["first"])


def test_an_nnx_optimizer_may_be_attached_after_the_restore(tmp_path):
    model, optimizer = nnx_trained(ADAM)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    new_model, new = nnx_pair(ADAM, seed=1)
    checkpoint = ckpt.Checkpoint(model=new_model)
    status = checkpoint.read(path)
    checkpoint.optimizer = new
    status.assert_consumed()
    assert same(nnx_moments(new), nnx_moments(optimizer))


def test_masked_places_of_an_nnx_optimizer_hold_nothing(tmp_path):
    tx = optax.masked(ADAM, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    model, optimizer = nnx_trained(tx)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    slots = [p for p in ckpt.object_metadata(path).paths if "ScaleByAdamState.mu" in p]
    assert len(slots) == 2 and all(p.endswith("kernel") for p in slots)
    new_model, new = nnx_pair(tx, seed=1)
    ckpt.Checkpoint(model=new_model, optimizer=new).read(path).assert_consumed()


def test_an_nnx_optimizer_without_its_model_is_saved_whole(tmp_path):
    _, optimizer = nnx_trained(ADAM)
    path = ckpt.save(tmp_path / "a", {"optimizer": optimizer})
    _, new = nnx_pair(ADAM, seed=1)
    ckpt.restore(path, {"optimizer": new})
    assert same(nnx_moments(new), nnx_moments(optimizer))
