"""Frozen savers: one fixed graph, traced once, saved and restored by key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trackables import Model

import ckpt_jax as ckpt
from ckpt_jax.matching.trace import _Walk


def program(value=0.0):
    """A checkpoint of mutable and immutable objects, all of them `value`."""
    x = jnp.full(3, float(value))  # one array at two places of params
    model = Model(w=ckpt.Variable(x), layers=[ckpt.Variable(x + 1)])
    return ckpt.Checkpoint(model=model, params={"a": x, "b": (x, 2 * x)}, step=int(value))


def fill(checkpoint, value):
    other = program(value)
    checkpoint.model.w.assign(other.model.w.value)
    checkpoint.model.layers[0].assign(other.model.layers[0].value)
    checkpoint.params, checkpoint.step = other.params, other.step


def assert_holds(checkpoint, value):
    other = program(value)
    np.testing.assert_array_equal(checkpoint.model.w.value, other.model.w.value)
    np.testing.assert_array_equal(checkpoint.model.layers[0].value, other.model.layers[0].value)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, other.params)
    assert checkpoint.step == value


@pytest.mark.behaviour(21)
def test_a_frozen_saver_saves_and_restores_the_values_of_each_moment(tmp_path):
    checkpoint = program()
    saver = checkpoint.freeze()
    paths = []
    for step in range(3):
        fill(checkpoint, step)
        paths.append(saver.save(tmp_path / f"at-{step}"))
    for step in (2, 0, 1):
        saver.restore(paths[step])
        assert_holds(checkpoint, step)
    saver.save(paths[0])  # replaces what is there
    other = program()
    other.restore(paths[0]).assert_consumed()
    assert_holds(other, 1)


def test_a_frozen_graph_is_not_traced_again(tmp_path, monkeypatch):
    checkpoint = program()
    saver = checkpoint.freeze()
    traces = []
    run = _Walk.run
    monkeypatch.setattr(_Walk, "run", lambda walk: (traces.append(walk), run(walk))[1])
    saver.restore(saver.save(tmp_path / "a"))
    assert not traces
    checkpoint.write(tmp_path / "b")
    assert traces


@pytest.mark.behaviour(22)
def test_a_saver_of_an_identical_graph_reads_the_file(tmp_path):
    path = program(5).freeze().save(tmp_path / "a")
    other = program()
    other.freeze().restore(path)
    assert_holds(other, 5)


@pytest.mark.behaviour(23)
def test_the_file_restores_as_a_checkpoint_with_a_variable_that_comes_later(tmp_path):
    checkpoint = ckpt.Checkpoint(
        w=ckpt.Variable(jnp.float32(3)), late=ckpt.Variable(jnp.float32(4))
    )
    for _ in range(12):
        checkpoint.save(tmp_path / "ckpt")
    path = checkpoint.freeze().save(tmp_path / "frozen")
    assert checkpoint.save_counter == 12  # saving does not advance it
    fresh = ckpt.Checkpoint(w=ckpt.Variable(jnp.float32(0)))
    status = fresh.restore(path)
    assert (float(fresh.w.value), fresh.save_counter) == (3, 12)
    fresh.late = ckpt.Variable(jnp.float32(0))
    assert float(fresh.late.value) == 4
    status.assert_consumed()


def test_a_frozen_saver_restores_what_the_checkpoint_wrote(tmp_path):
    checkpoint = program(2)
    saver = checkpoint.freeze()
    path = checkpoint.save(tmp_path / "ckpt")
    fill(checkpoint, 9)
    checkpoint.model.extra = ckpt.Variable(jnp.zeros(2))  # came later: not its business
    saver.restore(path)
    assert_holds(checkpoint, 2)


def test_nnx_modules_and_attached_values_of_a_root_are_saved_as_they_are_now(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    checkpoint = ckpt.Checkpoint(model, epoch=1)
    saver = checkpoint.freeze()
    kernel = np.asarray(model.kernel[...])
    checkpoint.epoch = 2
    path = saver.save(tmp_path / "a")
    model.kernel[...] = jnp.zeros((2, 3))
    checkpoint.epoch = 3
    saver.restore(path)
    np.testing.assert_array_equal(model.kernel[...], kernel)
    assert checkpoint.epoch == 2


def test_slots_are_frozen_with_their_optimizer(tmp_path):
    w = ckpt.Variable(jnp.zeros(2))

    class Optimizer(ckpt.AutoTrackable):
        def __init__(self):
            self.state = ckpt.NoDependency({("m", w): jnp.ones(2)})

        def slots(self):
            return self.state

    optimizer = Optimizer()
    saver = ckpt.Checkpoint(w=w, optimizer=optimizer).freeze()
    optimizer.state["m", w] = jnp.full(2, 7.0)
    path = saver.save(tmp_path / "a")
    np.testing.assert_array_equal(ckpt.load_variable(path, "optimizer/m/w"), [7, 7])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: setattr(c, "params", {"a": c.params["a"]}), "params/b: is gone"),
        (lambda c: setattr(c, "params", {**c.params, "c": 1}), "params: has 3 children, not 2"),
        (lambda c: setattr(c, "params", [1]), "params: is of another type now, ListWrapper"),
        (lambda c: setattr(c.model, "w", ckpt.Variable(jnp.zeros(3))), "w: is another object"),
        (
            lambda c: setattr(c, "params", {**c.params, "b": (c.params["a"], jnp.zeros(4))}),
            r"params/b/1: was float32\[3\], is float32\[4\]",
        ),
        (lambda c: setattr(c, "step", "text"), "step: is of another type|step: was int, is str"),
        (
            lambda c: setattr(c, "params", {**c.params, "a": c.params["a"] + 1}),
            "params/a: is no longer shared",
        ),
    ],
)
def test_objects_that_are_not_what_was_frozen_are_named(tmp_path, change, what):
    checkpoint = program()
    saver = checkpoint.freeze()
    change(checkpoint)
    with pytest.raises(ValueError, match=what):
        saver.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_optimizer_state_without_its_parameters_is_told_what_it_lacks(tmp_path):
    params = {"w": jnp.zeros(2)}
    state = ckpt.optax_state(optax.adam(0.1).init(params), params)
    saver = ckpt.Checkpoint(state=state).freeze()
    with pytest.raises(ValueError, match="state/.*mu: is for parameters that are not among"):
        saver.save(tmp_path / "a")


def test_keys_that_are_missing_or_differ_are_all_named_and_nothing_changes(tmp_path):
    checkpoint = program(1)
    saver = checkpoint.freeze()
    model = Model(w=ckpt.Variable(jnp.zeros(4)))
    path = ckpt.Checkpoint(model=model).write(tmp_path / "a")
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        saver.restore(path)
    report = raised.value.report
    assert [entry.path for entry in report.mismatched] == ["model/w"]
    assert {"model/layers/0", "params/a", "save_counter"} <= {e.path for e in report.missing}
    assert_holds(checkpoint, 1)


def test_an_immutable_root_cannot_be_frozen():
    with pytest.raises(ValueError, match="immutable"):
        ckpt.Checkpoint({"w": jnp.zeros(2)}).freeze()
