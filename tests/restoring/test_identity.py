"""Which object is the same one as before, and what is known of values, which have no identity."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ckpt_jax as ckpt
from ckpt_jax.restoring.identity import IdentityMap

TX = optax.adam(1e-3)


class Slotted:
    """An object that cannot be referred to weakly."""

    __slots__ = ("x",)


class Thing:
    pass


def test_an_entry_goes_with_its_object(no_gc):
    numbers, thing = IdentityMap(), Thing()
    numbers.set(thing, 1)
    assert numbers.get(thing) == 1
    seen = weakref.ref(thing)
    del thing
    assert seen() is None
    assert numbers._entries == {}


def test_what_cannot_be_referred_to_weakly_goes_with_its_owner(no_gc):
    numbers, owner, slotted = IdentityMap(), Thing(), Slotted()
    numbers.set(slotted, 1, owner)
    slotted.x = Thing()
    inside = weakref.ref(slotted.x)
    assert numbers.get(slotted) == 1
    assert numbers.get(Slotted()) is None
    del slotted
    assert inside() is not None
    del owner
    assert inside() is None


def test_a_map_keeps_no_owner_alive_and_may_go_before_it(no_gc):
    numbers, owner, slotted = IdentityMap(), Thing(), Slotted()
    numbers.set(slotted, 1, owner)
    gone = weakref.ref(numbers)
    del numbers
    assert gone() is None
    del owner  # calls nobody back


# --- optimizers ------------------------------------------------------------------------


def trained(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


def new_state(params):
    return TrainState.create(apply_fn=None, params=params, tx=TX)


def with_copy(name):
    params = {"w": jnp.zeros(3)}
    return {name: params, "policy": new_state(params)}


def two_alike():
    params = {"w": jnp.zeros(3)}
    return {"a": new_state(params), "b": new_state(params)}


def beside(name):
    params = {"w": jnp.zeros(3)}
    opt = ckpt.optax_state(TX.init(params), params)
    return {name: params, "net": {"weights": params, "opt": opt}}


def moments(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) == (3,)]


@pytest.mark.parametrize("name", ["ref_params", "params", "a", "ema", "zz"])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_copy_that_begins_as_the_parameters_does_not_take_the_moments(tmp_path, name, abstract):
    state = with_copy(name)
    state["policy"] = trained(trained(state["policy"]))
    path = ckpt.save(tmp_path / "a", state)
    target = with_copy(name)
    restored = ckpt.restore(path, jax.eval_shape(lambda: target) if abstract else target)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [two_alike, lambda: with_copy("ref"), lambda: beside("target")])
def test_what_was_saved_at_step_0_restores_into_any_target(tmp_path, make):
    path = ckpt.save(tmp_path / "a", make())
    ckpt.restore(path, make())
    ckpt.restore(path, jax.eval_shape(make))


def test_two_states_that_begin_alike_keep_their_own_moments(tmp_path):
    state = two_alike()
    state["b"] = trained(state["b"])
    state["a"] = trained(trained(state["a"]))
    checkpoint = ckpt.Checkpoint(state=two_alike())
    checkpoint.restore(ckpt.Checkpoint(state=state).save(tmp_path / "c")).assert_consumed()
    for a, b in zip(moments(state), moments(checkpoint.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["target", "ema_weights", "params"])
def test_an_optimizers_parameters_are_those_beside_it(tmp_path, name):
    state = beside(name)
    weights = {"w": jnp.ones(3)}
    _, opt = TX.update(weights, state["net"]["opt"].opt_state, weights)
    state["net"] = {"weights": weights, "opt": ckpt.optax_state(opt, weights)}
    restored = ckpt.restore(ckpt.save(tmp_path / "a", state), beside(name))
    np.testing.assert_array_equal(restored["net"]["opt"][0].mu["w"], opt[0].mu["w"])


# --- what appears, or is replaced, after a restore --------------------------------------


def holder(make, x):
    obj = ckpt.AutoTrackable()
    obj.w = make(jnp.full(2, x))
    return obj


KINDS = {
    "Variable": (ckpt.Variable, lambda v: v.value),
    "nnx.Param": (nnx.Param, lambda v: v[...]),
    "jax.Ref": (jax.new_ref, lambda v: v[...]),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_of_two_restores_that_meet_in_an_object_the_later_one_wins(tmp_path, kind):
    make, value = kind
    old, new, program = ckpt.AutoTrackable(), ckpt.AutoTrackable(), ckpt.AutoTrackable()
    old.y, new.x, program.x = holder(make, 1.0), holder(make, 2.0), holder(make, 0.0)
    earlier = ckpt.Checkpoint(m=old).write(tmp_path / "earlier")
    later = ckpt.Checkpoint(m=new).write(tmp_path / "later")
    checkpoint = ckpt.Checkpoint(m=program)
    checkpoint.read(earlier).expect_partial()
    checkpoint.read(later).expect_partial()
    shared = ckpt.AutoTrackable()
    shared.w = program.x.w
    program.y = shared
    assert value(program.x.w).tolist() == [2.0, 2.0]


def test_a_tree_restore_wins_over_an_earlier_one_that_waits(tmp_path, kind):
    make, value = kind
    old, program = ckpt.AutoTrackable(), holder(make, 0.0)
    old.y = holder(make, 1.0)
    ckpt.Checkpoint(m=program).read(ckpt.Checkpoint(m=old).write(tmp_path / "a")).expect_partial()
    ckpt.restore(ckpt.save(tmp_path / "b", holder(make, 2.0)), program)
    shared = ckpt.AutoTrackable()
    shared.w = program.w
    program.y = shared
    assert value(program.w).tolist() == [2.0, 2.0]


def test_an_object_that_replaces_a_restored_one_is_not_called_restored(tmp_path, kind):
    make, _ = kind
    path = ckpt.Checkpoint(m=holder(make, 1.0)).write(tmp_path / "a")
    program = holder(make, 0.0)
    status = ckpt.Checkpoint(m=program).read(path).assert_consumed()
    program.w = make(jnp.zeros(2))
    assert [entry.path for entry in status.report.missing] == ["m/w"]
    assert status.report.restored == ()
    for fails in (status.assert_existing_objects_matched, status.assert_consumed):
        with pytest.raises(AssertionError, match="m.w"):
            fails()


def test_values_that_train_on_stay_restored(tmp_path, kind):
    make, _ = kind
    path = ckpt.Checkpoint(m=holder(make, 1.0), state={"a": jnp.ones(2)}).write(tmp_path / "a")
    program = holder(make, 0.0)
    checkpoint = ckpt.Checkpoint(m=program, state={"a": jnp.zeros(2)})
    status = checkpoint.read(path)
    checkpoint.state = {"a": checkpoint.state["a"] + 1}
    status.assert_consumed()


def test_a_leaf_that_a_new_tree_adds_is_not_called_restored(tmp_path):
    path = ckpt.Checkpoint(state={"a": jnp.ones(2), "b": jnp.full(2, 5.0)}).save(tmp_path / "c")
    checkpoint = ckpt.Checkpoint(state={"a": jnp.zeros(2)})
    status = checkpoint.restore(path)
    checkpoint.state = {**checkpoint.state, "b": jnp.zeros(2)}
    assert [entry.path for entry in status.report.missing] == ["state/b"]
    assert [entry.path for entry in status.report.restored] == ["save_counter", "state/a"]
    with pytest.raises(AssertionError, match="state.b"):
        status.assert_consumed()


def test_a_layer_that_a_module_makes_later_is_not_called_restored(tmp_path):
    class Lazy(nnx.Module):
        def grow(self):
            self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            return self

    path = ckpt.Checkpoint(m=Lazy().grow()).write(tmp_path / "a")
    module = Lazy()
    status = ckpt.Checkpoint(m=module).read(path).expect_partial()
    module.grow()
    assert {entry.path for entry in status.report.missing} == {"m/dense/kernel", "m/dense/bias"}
    with pytest.raises(AssertionError, match="dense.kernel"):
        status.assert_consumed()


def test_what_waits_goes_to_the_copy_of_restored_values(tmp_path):
    """A value is not passed over because it is the array that was restored elsewhere."""
    saved = ckpt.AutoTrackable()
    saved.params, saved.ema = {"w": jnp.ones(2)}, {"w": jnp.full(2, 2.0)}
    path = ckpt.Checkpoint(m=saved).write(tmp_path / "a")
    program = ckpt.AutoTrackable()
    program.params = {"w": jnp.zeros(2)}
    status = ckpt.Checkpoint(m=program).read(path)
    program.ema = program.params
    assert program.ema["w"].tolist() == [2.0, 2.0]
    status.assert_consumed()


def test_a_status_keeps_no_replaced_model_alive(tmp_path, no_gc, kind):
    make, _ = kind
    program = holder(make, 0.0)
    checkpoint = ckpt.Checkpoint(m=program)
    path = ckpt.Checkpoint(m=holder(make, 1.0)).write(tmp_path / "a")
    status = checkpoint.read(path).assert_consumed()
    gone = weakref.ref(program)
    checkpoint.m = holder(make, 0.0)
    del program
    gc.collect()
    assert gone() is None
    with pytest.raises(AssertionError):
        status.assert_consumed()
