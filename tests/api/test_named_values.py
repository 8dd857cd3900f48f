"""`save(prefix, state=state)`, and the warning for loops that forget it."""

import contextlib
import copy
import logging
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ckpt_jax as ckpt


def train_state():
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))


def trained(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "ckpt"


def saved(path, name="state"):
    return ckpt.load(path)[name]


# --- values by name --------------------------------------------------------------------


def test_each_checkpoint_of_a_loop_holds_the_values_that_it_was_given(prefix):
    state = train_state()
    checkpoint = ckpt.Checkpoint(state=state)
    paths = []
    for _ in range(3):
        state = trained(state)
        paths.append(checkpoint.save(prefix, state=state))
    assert [saved(path)["step"] for path in paths] == [1, 2, 3]
    assert checkpoint.state is state


def test_write_takes_values_too(tmp_path):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)}, step=0)
    path = checkpoint.write(tmp_path / "a", state={"w": jnp.ones(2)}, step=7)
    assert saved(path)["w"].tolist() == [1, 1] and checkpoint.step == 7


def test_values_that_are_not_given_stay(prefix):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)}, step=3)
    path = checkpoint.save(prefix, state={"w": jnp.ones(2)})
    assert ckpt.load(path)["step"] == 3


def test_values_may_be_given_together_with_options(prefix):
    checkpoint = ckpt.Checkpoint(step=0)
    path = checkpoint.save(prefix, ckpt.CheckpointOptions(enable_async=True), step=4)
    checkpoint.sync()
    assert ckpt.load(path)["step"] == 4


def test_a_name_that_the_checkpoint_lacks_is_refused_and_the_known_ones_are_named(prefix):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)}, step=3)
    with pytest.raises(TypeError, match=r"stat, but .* are state, step \(nearest: state"):
        checkpoint.save(prefix, stat={"w": jnp.ones(2)}, step=4)
    assert checkpoint.step == 3 and checkpoint.save_counter == 0
    assert not prefix.parent.joinpath("checkpoint").exists()
    with pytest.raises(TypeError, match="the names of this checkpoint are none"):
        ckpt.Checkpoint().save(prefix, state=1)
    with pytest.raises(TypeError, match="save_counter"):
        checkpoint.save(prefix, save_counter=4)


def test_a_value_that_cannot_be_saved_is_refused_before_any_is_replaced(prefix):
    checkpoint = ckpt.Checkpoint(a=1, b=2)
    with pytest.raises(ValueError, match="b=object"):
        checkpoint.save(prefix, a=3, b=object())
    assert checkpoint.a == 1 and checkpoint.save_counter == 0


def test_values_stay_assigned_if_the_save_fails(prefix):
    checkpoint = ckpt.Checkpoint(step=0)

    def fail():
        raise OSError("full")

    (prefix.parent / "file").touch()
    with pytest.raises(OSError):
        checkpoint.save(prefix.parent / "file" / "x", step=1)
    assert checkpoint.step == 1
    with pytest.raises(OSError, match="full"):
        checkpoint.save(prefix, ckpt.CheckpointOptions(write_callbacks=(fail,)), step=2)
    assert checkpoint.step == 2


def test_values_stay_assigned_if_the_save_is_skipped(prefix):
    gate = threading.Event()
    checkpoint = ckpt.Checkpoint(step=0)
    held = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(60),))
    first = checkpoint.save(prefix, held, step=1)
    assert checkpoint.save(prefix, ckpt.CheckpointOptions(when_busy="skip"), step=2) is None
    gate.set()
    checkpoint.sync()
    assert checkpoint.step == 2 and ckpt.load(first)["step"] == 1


def test_each_thread_saves_the_values_that_it_gave(tmp_path):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)})

    def save(number):
        checkpoint.write(tmp_path / str(number), state={"w": jnp.full(2, float(number))})

    threads = [threading.Thread(target=save, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert saved(tmp_path / str(number))["w"].tolist() == [number] * 2


def test_names_beside_a_root_can_be_given(prefix):
    root = ckpt.AutoTrackable()
    root.w = ckpt.Variable(jnp.ones(2))
    checkpoint = ckpt.Checkpoint(root, step=0)
    assert ckpt.load(checkpoint.save(prefix, step=5))["step"] == 5
    with pytest.raises(TypeError, match="w, but the names of this checkpoint are step"):
        checkpoint.save(prefix, w=ckpt.Variable(jnp.ones(2)))


def test_a_manager_takes_values_too(tmp_path):
    state = train_state()
    checkpoint = ckpt.Checkpoint(state=state)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path)
    for step in (10, 20):
        state = trained(state)
        path = manager.save(step, state=state)
        assert saved(path)["step"] == step // 10 and path.endswith(f"-{step}")
    with pytest.raises(TypeError, match="stat, but the names of this checkpoint are state"):
        manager.save(30, stat=state)
    assert [path.rpartition("-")[2] for path in manager.checkpoints] == ["10", "20"]


def test_values_stay_assigned_if_a_manager_finds_that_nothing_is_due(tmp_path):
    step = ckpt.Variable(np.asarray(0))
    checkpoint = ckpt.Checkpoint(value=0, step=step)
    manager = ckpt.CheckpointManager(
        checkpoint, tmp_path, step_counter=step, checkpoint_interval=10
    )
    manager.save(value=1)
    step.assign(np.asarray(5))
    assert manager.save(value=2) is None
    assert checkpoint.value == 2


# --- the warning -----------------------------------------------------------------------


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def said(caplog):
    """A block in which one warning is logged."""

    @contextlib.contextmanager
    def block(pattern):
        caplog.clear()
        yield
        (message,) = warnings_in(caplog)
        assert re.search(pattern, message), message

    return block


@pytest.fixture
def silent(caplog):
    """No warning is logged in the test."""
    yield
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(
    "state",
    [train_state(), {"w": jnp.zeros(2)}, jnp.zeros(2), {"w": np.zeros(2)}],
    ids=["TrainState", "dict", "array", "numpy"],
)
def test_a_loop_that_saves_the_same_values_is_warned_once(said, prefix, state):
    checkpoint = ckpt.Checkpoint(state=state)
    checkpoint.save(prefix)
    with said(r"ckpt-2 holds.*checkpoint\.save\(prefix, state=state\)"):
        checkpoint.save(prefix)
        checkpoint.save(prefix)


@pytest.mark.parametrize(
    "more",
    [
        {"step": ckpt.Variable(jnp.zeros((), int))},
        {"position": ckpt.PerProcess(0)},
        {"rngs": nnx.Rngs(0)},
    ],
    ids=["counter", "PerProcess", "rngs"],
)
def test_counters_beside_the_values_do_not_hide_it(said, prefix, more):
    checkpoint = ckpt.Checkpoint(state=train_state(), **more)
    checkpoint.save(prefix)
    if "step" in more:
        more["step"].assign(jnp.ones((), int))
    with said("state=state"):
        checkpoint.save(prefix)


def test_a_manager_warns_if_its_numbers_advance_and_the_values_do_not(said, tmp_path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(state=train_state()), tmp_path)
    manager.save(5)
    manager.save(5)
    with said(r"ckpt-6.*manager\.save\(step, state=st"):
        manager.save(6)
    manager.save(7)


def test_a_root_that_is_a_value_is_told_to_have_a_name(said, prefix):
    checkpoint = ckpt.Checkpoint(train_state())
    checkpoint.save(prefix)
    with said(r"Checkpoint\(state=state\)"):
        checkpoint.save(prefix)


def module():
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def new_values(checkpoint):
    checkpoint.state = {"w": checkpoint.state["w"] + 1}


def in_place(checkpoint):
    checkpoint.state["w"][0] += 1


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ({"state": {"w": jnp.zeros(2)}}, new_values),
        ({"state": {"w": np.zeros(2)}}, in_place),
        ({"state": {"w": np.zeros(1 << 20)}}, in_place),
        ({"model": module(), "table": {"w": jnp.zeros(2)}}, None),
        ({"v": ckpt.Variable(jnp.zeros(2)), "table": jnp.zeros(2)}, None),
        ({"step": 7, "name": "x"}, None),
        ({"v": ckpt.Variable(jnp.zeros(2))}, None),
    ],
)
def test_there_are_no_false_alarms(silent, prefix, named, change):
    checkpoint = ckpt.Checkpoint(**named)
    for _ in range(3):
        checkpoint.save(prefix)
        if change:
            change(checkpoint)


def test_a_saver_that_may_know_of_changes_is_believed(silent, prefix):
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="mine",
            predicate=lambda obj: isinstance(obj, ckpt.Variable),
            save_fn=lambda trackables, prefix: None,
            restore_fn=lambda trackables, prefix: None,
        )
        checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.zeros(())), table=jnp.zeros(2))
        checkpoint.save(prefix)
        checkpoint.save(prefix)


def test_a_pytree_beside_a_trackable_that_changes_is_no_false_alarm(silent, prefix):
    model = ckpt.AutoTrackable()
    model.w = jnp.zeros(2)
    checkpoint = ckpt.Checkpoint(model=model, table=jnp.ones(2))
    for _ in range(3):
        checkpoint.save(prefix)
        model.w = model.w + 1


def test_write_and_a_save_of_the_same_number_do_not_warn(silent, tmp_path):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)})
    checkpoint.write(tmp_path / "a")
    checkpoint.write(tmp_path / "b")
    first = checkpoint.save(tmp_path / "ckpt")
    checkpoint.restore(first)  # goes back
    checkpoint.save(tmp_path / "ckpt")
    checkpoint.write(tmp_path / "c")


def test_no_array_is_kept_alive(prefix):
    import gc
    import weakref

    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)})
    checkpoint.save(prefix)
    old = weakref.ref(checkpoint.state["w"])
    checkpoint.state = {"w": jnp.ones(2)}
    gc.collect()
    assert old() is None


def test_a_copy_of_a_checkpoint_counts_on_its_own(silent, prefix, tmp_path):
    checkpoint = ckpt.Checkpoint(state={"w": jnp.zeros(2)})
    checkpoint.save(prefix)
    copy.deepcopy(checkpoint).save(tmp_path / "other")
