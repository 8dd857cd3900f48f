"""Optimizers of TensorFlow and Keras go on as optax states.

Each checkpoint in `optimizers/` was saved after three of five steps. A program that goes on from it
with the same gradients has to arrive where TensorFlow arrived.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from places import TESTS

import ckpt_jax as ckpt

FILES = TESTS / "foreign" / "tensorflow"
ARRIVED = json.loads((FILES / "optimizers.json").read_text())
EPS = 1e-7  # Keras's default

SAME = {
    "adam": optax.adam(0.1, eps=EPS),
    "adamw": optax.adamw(0.1, eps=EPS, weight_decay=0.01),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.1, decay=0.9, eps=EPS),
    "rmsprop_centered": optax.rmsprop(0.1, decay=0.9, eps=EPS, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1, eps=EPS),
    "adadelta": optax.adadelta(0.1, rho=0.95, eps=EPS),
    "adamax": optax.adamax(0.1, eps=EPS),
    "lion": optax.lion(0.1, weight_decay=0.0),
    "lamb": optax.lamb(0.1, eps=EPS),
}
RENAMED = [("model/_kernel", "model/kernel")]  # what Keras 3 calls it
COUNTS = {"optimizer/step", "optimizer/ScaleByAdamState.count"}
RATES = {"decay", "learning_rate", "_learning_rate", "_current_learning_rate"}
HYPERPARAMETERS = {"beta_1", "beta_2", "momentum", "rho", *RATES}


class Dense(nnx.Module):
    def __init__(self):
        self.kernel, self.bias = nnx.Param(jnp.zeros((3, 2))), nnx.Param(jnp.zeros(2))


def gradients(step):
    kernel = np.cos(np.arange(6, dtype=np.float32) + step).reshape(3, 2)
    return {"kernel": kernel, "bias": np.sin(np.arange(2, dtype=np.float32) - step)}


def kind_of(name):
    return name.partition("_")[2]


def rules(name):
    return RENAMED if name.startswith("keras3") else []


def restored(name, tx, more=()):
    model = Dense()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    status = checkpoint.read(FILES / "optimizers" / name, rename=[*rules(name), *more])
    return model, optimizer, status.expect_partial().report


def distance_after_two_more_steps(name, model, optimizer):
    for step in (3, 4):
        grads = {key: nnx.Param(jnp.asarray(value)) for key, value in gradients(step).items()}
        optimizer.update(model, nnx.State(grads))
    parts = zip((model.kernel, model.bias), ARRIVED[name], strict=True)
    return max(np.abs(np.asarray(part[...]) - np.array(there)).max() for part, there in parts)


def missing(report):
    return {entry.path for entry in report.missing} - {"save_counter"}


@pytest.mark.parametrize("name", [name for name in ARRIVED if kind_of(name) in SAME])
def test_training_goes_on_as_if_it_had_not_changed_libraries(name):
    is_first = name.startswith("v1")  # without a counter
    model, optimizer, report = restored(name, SAME[kind_of(name)])
    if name == "v1_adam":
        optimizer.opt_state[0].count[...] = jnp.int32(3)  # as the report says
        assert "set the count yourself" in str(report)
    assert distance_after_two_more_steps(name, model, optimizer) < (1e-4 if is_first else 1e-6)
    assert missing(report) <= (COUNTS if is_first else set())
    spare = {entry.path.rpartition("/")[2] for entry in report.unexpected}
    if kind_of(name) != "sgd":  # that of Keras 2 saves momentums even if it has none
        assert spare <= HYPERPARAMETERS | {"beta1_power", "beta2_power"}
    if not is_first:
        assert optimizer.step[...] == 5


def test_the_same_without_a_change_of_the_learning_rate_is_wrong():
    """That is, the momentum is really converted."""
    name = "keras3_momentum"
    _, optimizer, _ = restored(name, SAME["momentum"])
    with ckpt.load_checkpoint(FILES / "optimizers" / name) as reader:
        raw = reader.get_tensor("optimizer/momentums/0")
    np.testing.assert_allclose(optimizer.opt_state[0].trace["kernel"][...], raw / -0.1, rtol=1e-6)
    assert np.abs(raw).min() > 0


@pytest.mark.parametrize("name", ["keras3_schedule", "keras2_schedule", "legacy_decay"])
def test_a_momentum_of_unknown_learning_rates_is_not_guessed(name):
    _, _, report = restored(name, optax.sgd(0.1, 0.9))
    assert missing(report) == {
        "optimizer/TraceState.trace/model/kernel",
        "optimizer/TraceState.trace/model/bias",
    }
    notes = [entry.what for entry in report.unexpected if "momentum" in entry.what]
    assert len(notes) == 2
    assert "divides it by -learning_rate" in notes[0]


@pytest.mark.parametrize("name", ["keras3_schedule", "legacy_decay"])
def test_a_rule_takes_the_numbers_as_they_are(name):
    """In the oldest generation there is a hyperparameter of the name of the slot, too."""
    rule = ("optimizer/momentum/**", "optimizer/TraceState.trace/**")
    _, optimizer, report = restored(name, optax.sgd(0.1, 0.9), [rule])
    assert not missing(report)
    with ckpt.load_checkpoint(FILES / "optimizers" / name) as reader:
        path = {"keras3_schedule": "momentums/0", "legacy_decay": "momentum/model/kernel"}[name]
        raw = reader.get_tensor(f"optimizer/{path}")
    np.testing.assert_array_equal(optimizer.opt_state[0].trace["kernel"][...], raw)


@pytest.mark.parametrize("name", [name for name in ARRIVED if kind_of(name) == "nadam"])
def test_moments_of_nadam_come_along_and_its_schedule_is_reported(name):
    _, optimizer, report = restored(name, optax.nadam(0.1))
    assert not missing(report)
    assert "has a schedule" in str(report)
    with ckpt.load_checkpoint(FILES / "optimizers" / name) as reader:
        values = [reader.get_tensor(key) for key in reader.keys()]  # noqa: SIM118
    for moment in (optimizer.opt_state[0].mu, optimizer.opt_state[0].nu):
        assert any(np.array_equal(moment["kernel"][...], value) for value in values)


@pytest.mark.parametrize("name", [name for name in ARRIVED if kind_of(name) == "amsgrad"])
def test_the_maximum_of_amsgrad_means_something_else_and_is_left_out(name):
    _, _, report = restored(name, optax.amsgrad(0.1))
    assert {path.split("/")[1] for path in missing(report)} == {"ScaleByAmsgradState.nu_max"}
    assert "before" in "".join(entry.what for entry in report.unexpected)


@pytest.mark.parametrize("name", [name for name in ARRIVED if kind_of(name) == "ftrl"])
def test_state_without_a_counterpart_is_left_out(name):
    _, _, report = restored(name, optax.adagrad(0.1))
    assert {path.split("/")[1] for path in missing(report)} == {"ScaleByRssState.sum_of_squares"}


def test_the_state_of_another_optimizer_is_not_taken():
    """RMSprop and Adam of Keras have lists of the same names."""
    _, _, report = restored("keras3_rmsprop_centered", optax.adam(0.1))
    assert {path.split("/")[1] for path in missing(report)} == {
        "ScaleByAdamState.mu",
        "ScaleByAdamState.nu",
    }


def test_a_learning_rate_that_is_state_is_restored():
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1.0, eps=EPS)
    _, optimizer, report = restored("keras3_adam", tx)
    np.testing.assert_allclose(optimizer.opt_state.hyperparams["learning_rate"][...], 0.1)
    assert optimizer.opt_state.count[...] == 3
    assert "optimizer/_learning_rate" not in {entry.path for entry in report.unexpected}


@pytest.mark.parametrize("name", ["keras3_adam", "keras2_adam", "legacy_adam"])
def test_moments_follow_the_rules_of_their_weights(name):
    class Transposed(nnx.Module):
        def __init__(self):
            self.weight, self.bias = nnx.Param(jnp.zeros((2, 3))), nnx.Param(jnp.zeros(2))

    kernel = "model/_kernel" if name.startswith("keras3") else "model/kernel"
    model = Transposed()
    optimizer = nnx.Optimizer(model, SAME["adam"], wrt=nnx.Param)
    checkpoint = ckpt.Checkpoint(net=model, optimizer=optimizer)
    status = checkpoint.read(
        FILES / "optimizers" / name,
        rename=[(kernel, "net/weight", ckpt.Transpose()), ("model/bias", "net/bias")],
    )
    plain, theirs, _ = restored(name, SAME["adam"])
    np.testing.assert_array_equal(model.weight[...], plain.kernel[...].T)
    for ours, other in zip(optimizer.opt_state[0][1:], theirs.opt_state[0][1:], strict=True):
        np.testing.assert_array_equal(ours["weight"][...], other["kernel"][...].T)
        assert np.abs(ours["weight"][...]).min() > 0
    report = status.expect_partial().report
    assert {entry.path.rpartition("/")[2] for entry in report.unexpected} <= HYPERPARAMETERS


@pytest.mark.parametrize("name", ["keras3_adam", "keras2_adam", "legacy_adam"])
def test_a_train_state_goes_on(name):
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=SAME["adam"])
    kernel = "model/_kernel" if name.startswith("keras3") else "model/kernel"
    state = ckpt.restore(
        FILES / "optimizers" / name,
        jax.eval_shape(lambda: state),
        rename=[
            (kernel, "params/kernel"),
            ("model/bias", "params/bias"),
            ("optimizer/**", "opt_state/**"),
        ],
        allow_unexpected=True,
    )
    assert state.step == state.opt_state[0].count == 3
    for step in (3, 4):
        state = state.apply_gradients(grads=gradients(step))
    np.testing.assert_allclose(state.params["kernel"], ARRIVED[name][0], rtol=1e-5)


def test_slots_can_be_left_out():
    model = Dense()
    optimizer = nnx.Optimizer(model, SAME["adam"], wrt=nnx.Param)
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    options = ckpt.CheckpointOptions(skip_slot_variables=True)
    checkpoint.read(FILES / "optimizers" / "legacy_adam", options).expect_partial()
    assert np.abs(model.kernel[...]).min() > 0
    assert not optimizer.opt_state[0].mu["kernel"][...].any()


def test_slots_wait_for_an_optimizer_that_appears_later():
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(FILES / "optimizers" / "keras3_momentum", rename=RENAMED).expect_partial()
    checkpoint.model = model = Dense()
    checkpoint.optimizer = nnx.Optimizer(model, SAME["momentum"], wrt=nnx.Param)
    distance = distance_after_two_more_steps("keras3_momentum", model, checkpoint.optimizer)
    assert distance < 1e-6


def test_a_slot_and_a_hyperparameter_may_have_one_name():
    """The momentum of the oldest SGD is a number, and a slot of each variable."""
    found = ckpt.load(FILES / "optimizers" / "legacy_momentum")["optimizer"]["momentum"]
    np.testing.assert_allclose(found["VARIABLE_VALUE"], 0.9)
    assert found["model"]["kernel"].shape == (3, 2)
    with ckpt.load_checkpoint(FILES / "optimizers" / "legacy_momentum") as reader:
        assert {"optimizer/momentum", "optimizer/momentum/model/kernel"} <= {*reader.paths()}
