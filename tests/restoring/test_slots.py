"""Optimizer slots: found through their variable, whatever comes first."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from trackables import value, var

import ckpt_jax as ckpt


class Model(ckpt.AutoTrackable):
    pass


class Adam(ckpt.Trackable):
    """Makes its slots when it first needs them, as most optimizers do."""

    def __init__(self, *variables, value=0.0):
        self.rate = self.track("rate", var(value))
        self.state = {("m", v): var(value) for v in variables}

    def slots(self):
        return self.state

    def create_slot(self, name, variable):
        return self.state.setdefault((name, variable), var(0.0))


class ArraySlots(ckpt.Trackable):
    """Keeps its slots as arrays, which have to be replaced."""

    def __init__(self, variable, value):
        self.variable, self.momentum = variable, jnp.asarray(value)

    def slots(self):
        return {("m", self.variable): self.momentum}


class Replaceable(ArraySlots):
    def set_slot(self, name, variable, value):
        assert (name, variable) == ("m", self.variable)
        self.momentum = value


@pytest.fixture
def saved(tmp_path):
    w = var(1.0)
    return ckpt.Checkpoint(model=Model.__new__(Model), w=w, opt=Adam(w, value=7.0)).write(
        tmp_path / "saved"
    )


@pytest.mark.behaviour(308)
@pytest.mark.parametrize("late", [(), ("w",), ("opt",), ("w", "opt"), ("opt", "w")])
@pytest.mark.parametrize("has_slot", [True, False])
def test_a_slot_is_restored_whichever_of_variable_and_optimizer_comes_first(saved, late, has_slot):
    w = var(0.0)
    parts = {"w": w, "opt": Adam(w) if has_slot else Adam()}
    checkpoint = ckpt.Checkpoint(**{k: v for k, v in parts.items() if k not in late})
    status = checkpoint.read(saved)
    for name in late:
        with pytest.raises(AssertionError):
            status.assert_consumed()
        setattr(checkpoint, name, parts[name])
    status.assert_consumed()
    assert value(w) == 1.0
    assert value(parts["opt"].state["m", w]) == 7.0
    assert len(parts["opt"].state) == 1


@pytest.mark.behaviour(306)
def test_of_two_restores_the_later_wins_and_slots_that_only_the_older_has_still_come(
    saved, tmp_path
):
    slotless = ckpt.Checkpoint(w=var(2.0)).write(tmp_path / "slotless")
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(saved)
    checkpoint.read(slotless).expect_partial()
    checkpoint.w = w = var(0.0)
    checkpoint.opt = opt = Adam()
    assert (value(w), value(opt.state["m", w])) == (2.0, 7.0)


@pytest.mark.behaviour(307)
def test_what_exists_is_matched_while_the_optimizer_is_awaited(saved):
    checkpoint = ckpt.Checkpoint(w=var(0.0))
    status = checkpoint.read(saved)
    status.assert_existing_objects_matched()
    with pytest.raises(AssertionError, match=r"\(root\)\.opt\.rate"):
        status.assert_consumed()
    with pytest.raises(AssertionError, match=r"\(root\)\.opt's state 'm' for \(root\)\.w"):
        status.assert_consumed()
    assert {entry.path for entry in status.report.deferred} == {"opt/rate", "opt/m/w"}
    checkpoint.opt = Adam()
    status.assert_consumed()


@pytest.mark.behaviour(309)
def test_the_keys_of_a_checkpoint_with_an_optimizer(tmp_path):
    w = var(1.0)
    path = ckpt.Checkpoint(v=w, opt=Adam(w)).save(tmp_path / "a")
    with ckpt.load_checkpoint(path) as reader:
        keys = set(reader.keys())
    assert keys == {
        "opt/rate/.ATTRIBUTES/VARIABLE_VALUE",
        "save_counter/.ATTRIBUTES/VARIABLE_VALUE",
        "v/.ATTRIBUTES/VARIABLE_VALUE",
        "v/.OPTIMIZER_SLOT/opt/m/.ATTRIBUTES/VARIABLE_VALUE",
    }


@pytest.mark.behaviour(310, 311)
@pytest.mark.parametrize(("skip", "expected"), [(True, 0.0), (False, 7.0)])
def test_slots_may_be_skipped(saved, skip, expected):
    w = var(0.0)
    checkpoint = ckpt.Checkpoint(w=w, opt=(opt := Adam(w)))
    options = ckpt.CheckpointOptions(skip_slot_variables=skip)
    checkpoint.read(saved, options).assert_consumed()
    assert (value(w), value(opt.state["m", w])) == (1.0, expected)


def test_slots_that_are_skipped_are_not_created(saved):
    checkpoint = ckpt.Checkpoint(w=var(0.0), opt=(opt := Adam()))
    checkpoint.read(saved, ckpt.CheckpointOptions(skip_slot_variables=True)).assert_consumed()
    assert opt.state == {}


def test_training_between_attachments_is_not_undone(saved):
    """The walk that finds the slots of a late optimizer restores nothing else again."""
    checkpoint = ckpt.Checkpoint(w=(w := var(0.0)))
    checkpoint.read(saved)
    w.assign(5.0)
    checkpoint.opt = opt = Adam()
    assert (value(w), value(opt.state["m", w])) == (5.0, 7.0)


def test_an_optimizer_without_its_variable_saves_no_slot_and_reports_one_that_is_missing(saved):
    w = var(0.0)
    checkpoint = ckpt.Checkpoint(opt=(opt := Adam(w)))
    status = checkpoint.read(saved)
    assert value(opt.state["m", w]) == 0.0
    with pytest.raises(AssertionError, match="state 'm'"):
        status.assert_consumed()


def test_a_variable_without_its_optimizer_is_restored_and_the_slot_reported(saved):
    checkpoint = ckpt.Checkpoint(w=(w := var(0.0)))
    status = checkpoint.read(saved).expect_partial()
    assert value(w) == 1.0
    assert "opt/m/w" in {entry.path for entry in status.report.deferred}


def test_slots_that_are_arrays_are_put_back_with_set_slot(tmp_path):
    w = var(1.0)
    path = ckpt.Checkpoint(w=w, opt=ArraySlots(w, 7.0)).write(tmp_path / "a")
    opt = Replaceable(w, 0.0)
    ckpt.Checkpoint(w=w, opt=opt).read(path).assert_consumed()
    assert float(opt.momentum) == 7.0


def test_slots_that_cannot_be_put_back_are_refused_before_anything_changes(tmp_path):
    w = var(1.0)
    path = ckpt.Checkpoint(w=w, opt=ArraySlots(w, 7.0)).write(tmp_path / "a")
    w.assign(3.0)
    with pytest.raises(ckpt.RestoreMismatchError, match=r"opt/m/w.*set_slot"):
        ckpt.Checkpoint(w=w, opt=ArraySlots(w, 0.0)).read(path)
    assert value(w) == 3.0


def test_load_shows_slots_below_their_optimizer(saved):
    loaded = ckpt.load(saved)
    assert loaded["opt"] == {"rate": 7.0, "m": {"w": 7.0}}
    assert ckpt.load(saved, only="opt/**") == {"opt": {"rate": 7.0, "m": {"w": 7.0}}}
    assert ckpt.load(saved, only="w") == {"w": 1.0}
