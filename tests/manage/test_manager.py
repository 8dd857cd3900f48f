"""Numbered checkpoints in a directory. Numbers refer to the reference's own tests."""

import glob
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from owners import digits_of, ended_process

import ckpt_jax as ckpt
from ckpt_jax.api.latest import (
    checkpoint_exists,
    latest_checkpoint,
    problem_with,
    remove_checkpoint,
)
from ckpt_jax.manage.manager import CheckpointManager, as_integer
from ckpt_jax.manage.retention import (
    KeepBest,
    KeepEveryNSteps,
    KeepLatest,
)
from ckpt_jax.store.state_file import get_checkpoint_state

HOUR = 3600.0
ENDED = digits_of(ended_process())  # tells a process that is gone, in the name of staging


class Clock:
    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture
def checkpoint():
    return new_checkpoint()


def new_checkpoint(value=0.0):
    # The larger value lies in the shard's data file, not in the root database.
    return ckpt.Checkpoint(v=ckpt.Variable(jnp.asarray(value)), w=ckpt.Variable(jnp.ones(100)))


class Unsaveable(ckpt.PythonState):
    def serialize(self):
        raise RuntimeError("no disk quota")


def names(paths):
    return [os.path.basename(path) for path in paths]


def on_disk(directory):
    return sorted(set(os.listdir(directory)) - {"checkpoint", "checkpoint-metrics.json"})


def save_all(manager, numbers, **arguments):
    return [manager.save(number, **arguments) for number in numbers]


def truncate(path):
    (data,) = glob.glob(f"{path}/shards/*/c/*")
    os.truncate(data, 0)


def staging(path):
    return f"{path}.staging-{ENDED}"


# --- construction ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_to_keep": 0}, "positive max_to_keep"),
        ({"max_to_keep": -1}, "positive max_to_keep"),
        ({"checkpoint_interval": 2}, "needs a step_counter"),
        ({"checkpoint_name": "a/b"}, "without directories"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        CheckpointManager(checkpoint, tmp_path, **arguments)


def test_what_is_no_policy_is_refused(tmp_path, checkpoint):
    with pytest.raises(TypeError, match="has no keep"):
        CheckpointManager(checkpoint, tmp_path, policies=[3])


def test_a_new_manager_makes_no_directory_before_the_first_save(tmp_path, checkpoint):
    manager = CheckpointManager(
        checkpoint, tmp_path / "a", step_counter=lambda: 0, checkpoint_interval=3
    )
    assert not os.path.exists(tmp_path / "a")
    assert (manager.latest_checkpoint, manager.checkpoints) == (None, [])
    assert manager.checkpoint is checkpoint
    assert manager.directory == str(tmp_path / "a")
    assert manager.checkpoint_interval == 3
    assert manager.gc() == []
    manager.sync()
    manager.save()
    assert on_disk(tmp_path / "a") == ["ckpt-1"]


def test_five_checkpoints_are_kept_by_default(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path)
    for _ in range(7):
        manager.save()
    assert names(manager.checkpoints) == on_disk(tmp_path) == [f"ckpt-{n}" for n in range(3, 8)]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"checkpoint": {"x": 1}}, r"a manager saves a ckpt\.Checkpoint, got dict"),
        ({"max_to_keep": 1.5}, "expected an integer"),
        ({"max_to_keep": "3"}, "expected an integer"),
        ({"step_counter": 5, "checkpoint_interval": -2}, "checkpoint_interval of 0 or more"),
        ({"keep_checkpoint_every_n_hours": -1}, "keep_checkpoint_every_n_hours of 0 or more"),
        ({"init_fn": 3}, "init_fn must be a function"),
        ({"read_only": 3}, "read_only: expected True or False, got 3"),
        ({"keep_checkpoint_every_n_hours": "x"}, "every_n_hours: expected a number, got 'x'"),
        ({"keep_checkpoint_every_n_hours": float("nan")}, "every_n_hours of 0 or more, got nan"),
    ],
)
def test_a_manager_refuses_what_it_could_not_work_with(
    tmp_path: Path, wrong: dict[str, Any], message: str
):
    given = {"checkpoint": ckpt.Checkpoint(x=1), "directory": tmp_path, **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        ckpt.CheckpointManager(**given)


def test_a_manager_is_no_mirror_of_itself(tmp_path: Path):
    with pytest.raises(ValueError, match="mirror: expected another directory"):
        ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path, mirror=f"{tmp_path}/")


@pytest.mark.parametrize(
    "policy, arguments",
    [
        (ckpt.KeepLatest, ["x"]),
        (ckpt.KeepLatest, [1.5]),
        (ckpt.KeepLatest, [True]),
        (ckpt.KeepEveryNSteps, [None]),
        (ckpt.KeepFor, ["x"]),
        (ckpt.KeepBest, [3]),
        (ckpt.KeepBest, ["loss", "2"]),
        (ckpt.SaveEveryNSteps, ["x"]),
        (ckpt.SaveAtSteps, [["x"]]),
        (ckpt.SaveEveryNSeconds, ["x"]),
        (ckpt.SaveContinuously, ["x"]),
    ],
)
def test_what_a_policy_is_given_has_to_be_of_its_kind(policy: Any, arguments: list[Any]):
    with pytest.raises(TypeError, match=r": expected (a|the) .*, got "):
        policy(*arguments)


@pytest.mark.parametrize("arguments", [{"manager": "x"}, {"grace_seconds": "x"}])
def test_what_a_handler_of_preemption_is_given_has_to_be_of_its_kind(tmp_path, arguments):
    given = {"manager": ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path), **arguments}
    with pytest.raises(TypeError, match=f"{next(iter(arguments))}: expected a .*, got 'x'"):
        ckpt.PreemptionHandler(**given)


# --- keeping the latest ---------------------------------------------------------------------


@pytest.mark.behaviour(125)
def test_four_saves_with_three_to_keep_delete_only_the_first(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=3)
    paths = [manager.save() for _ in range(4)]
    assert not checkpoint_exists(paths[0])
    assert all(problem_with(path) is None for path in paths[1:])
    assert manager.checkpoints == paths[1:]


@pytest.mark.behaviour(126, 127, 128, 129)
def test_none_keeps_all_and_later_managers_go_on_with_the_same_list(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)  # 126
    paths = [manager.save() for _ in range(3)]
    assert manager.checkpoints == paths
    assert manager.latest_checkpoint == latest_checkpoint(tmp_path) == paths[-1]

    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)  # 127
    paths.append(manager.save())
    assert manager.checkpoints == paths
    assert manager.latest_checkpoint == paths[-1]

    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=3)  # 128
    assert manager.checkpoints == paths
    assert on_disk(tmp_path) == names(paths)

    paths.append(manager.save())  # 129
    assert manager.checkpoints == paths[2:]
    assert on_disk(tmp_path) == names(paths[2:])


def test_without_limit_not_even_hours_and_policies_remove_anything(tmp_path, checkpoint):
    manager = CheckpointManager(
        checkpoint, tmp_path, None, keep_checkpoint_every_n_hours=1, policies=[KeepLatest(1)]
    )
    paths = [manager.save() for _ in range(3)]
    assert manager.checkpoints == paths
    assert manager.gc() == []


def test_the_value_of_each_save_is_that_of_its_moment(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    for number in range(4):
        checkpoint.v.assign(jnp.asarray(float(number)))
        manager.save()
    for number, path in enumerate(manager.checkpoints):
        fresh = new_checkpoint(-1.0)
        fresh.restore(path).assert_consumed()
        assert (fresh.v.value, fresh.save_counter) == (number, number + 1)


# --- keeping one every few hours ------------------------------------------------------------


@pytest.mark.behaviour(130, 131, 132, 133, 134, 135)
def test_one_every_few_hours_is_kept_for_ever_across_managers(tmp_path, checkpoint):
    clock = Clock(3.0)
    first = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, clock=clock)
    clock.now = 10_000.0
    paths = [first.save()]
    clock.now += HOUR
    paths.append(first.save())
    state = get_checkpoint_state(tmp_path)  # 130
    assert state.all_model_checkpoint_timestamps == (10_000.0, 13_600.0)
    assert state.all_model_checkpoint_paths == tuple(paths)
    assert state.model_checkpoint_path == first.latest_checkpoint == paths[1]
    assert state.last_preserved_timestamp == 2.0

    second = CheckpointManager(checkpoint, tmp_path, 2, 1.5, clock=clock)  # 131
    assert second.checkpoints == paths
    assert second.latest_checkpoint == paths[1]

    clock.now += 0.2 * HOUR
    paths.append(second.save())  # 132
    assert checkpoint_exists(paths[0])
    assert second.checkpoints == paths[1:]
    assert get_checkpoint_state(tmp_path).last_preserved_timestamp == 10_000.0

    clock.now += HOUR
    paths.append(second.save())  # 133
    assert not checkpoint_exists(paths[1])
    assert second.checkpoints == paths[2:]
    assert get_checkpoint_state(tmp_path).last_preserved_timestamp == 10_000.0  # 134

    third = CheckpointManager(checkpoint, tmp_path, 2, 1.5, clock=clock)  # 135
    assert third.checkpoints == paths[2:]
    clock.now += HOUR
    paths.append(third.save())  # the third, 1.2 hours after the first, goes
    clock.now += HOUR
    paths.append(third.save())  # the fourth, 2.2 hours after it, stays
    assert third.checkpoints == paths[4:]
    assert on_disk(tmp_path) == ["ckpt-1", "ckpt-4", "ckpt-5", "ckpt-6"]
    state = get_checkpoint_state(tmp_path)
    assert state.last_preserved_timestamp == 10_000.0 + 2.2 * HOUR
    assert state.all_model_checkpoint_paths == tuple(paths[4:])


def test_zero_hours_mean_none(tmp_path, checkpoint):
    clock = Clock()
    manager = CheckpointManager(checkpoint, tmp_path, 1, 0, clock=clock)
    for _ in range(3):
        clock.now += 100 * HOUR
        manager.save()
    assert on_disk(tmp_path) == ["ckpt-3"]


@pytest.mark.behaviour(138, 139, 140)
def test_after_the_clock_was_set_back_nothing_old_is_removed(tmp_path, checkpoint, caplog):
    clock = Clock(10_000.0)
    manager = CheckpointManager(checkpoint, tmp_path, 1, 1.0, clock=clock)
    paths = [manager.save()]
    for _ in range(2):
        clock.now += HOUR
        paths.append(manager.save())
    assert on_disk(tmp_path) == ["ckpt-2", "ckpt-3"]  # 138
    assert manager.checkpoints == paths[2:]
    assert get_checkpoint_state(tmp_path).last_preserved_timestamp == 13_600.0
    assert not caplog.records

    clock.now = 5_000.0
    manager = CheckpointManager(checkpoint, tmp_path, 1, clock=clock)
    assert "behind the last preserved checkpoint timestamp" in caplog.text  # 139
    assert manager.latest_checkpoint == paths[2]
    assert manager.checkpoints == []

    for _ in range(2):
        clock.now += 10
        paths.append(manager.save())
        assert manager.latest_checkpoint == paths[-1]
        assert manager.checkpoints == paths[-1:]
    assert on_disk(tmp_path) == ["ckpt-2", "ckpt-3", "ckpt-5"]  # 140
    state = get_checkpoint_state(tmp_path)
    assert state.last_preserved_timestamp == 5_000.0
    assert state.all_model_checkpoint_timestamps == (5_020.0,)


def test_a_clock_that_goes_back_during_a_run_changes_neither_order_nor_number(tmp_path, checkpoint):
    clock = Clock()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, clock=clock)
    for _ in range(4):
        clock.now -= HOUR
        manager.save()
    assert names(manager.checkpoints) == on_disk(tmp_path) == ["ckpt-3", "ckpt-4"]


# --- checkpoints of others ------------------------------------------------------------------


@pytest.mark.behaviour(136, 137)
def test_plainly_saved_checkpoints_are_continued_but_never_deleted(tmp_path, checkpoint):
    plain = [checkpoint.save(tmp_path / "ckpt") for _ in range(2)]
    fresh = new_checkpoint()
    fresh.restore(latest_checkpoint(tmp_path)).assert_consumed()
    assert fresh.save_counter == 2  # 136
    manager = CheckpointManager(fresh, tmp_path, max_to_keep=2)
    assert manager.checkpoints == []
    assert manager.latest_checkpoint == plain[1]
    own = [manager.save() for _ in range(3)]
    assert manager.checkpoints == own[1:]
    assert on_disk(tmp_path) == names([*plain, *own[1:]])  # 137


def test_a_plain_save_makes_the_next_manager_forget_what_it_managed(tmp_path, checkpoint):
    managed = CheckpointManager(checkpoint, tmp_path, max_to_keep=3)
    for _ in range(3):
        managed.save(metrics={"loss": 1.0})
    checkpoint.save(tmp_path / "ckpt")
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert manager.checkpoints == []
    manager.save()
    assert on_disk(tmp_path) == [f"ckpt-{n}" for n in range(1, 6)]


def test_of_the_state_of_another_directory_nothing_is_deleted(tmp_path, checkpoint):
    other = CheckpointManager(checkpoint, tmp_path / "other", max_to_keep=None)
    theirs = [other.save() for _ in range(2)]
    state = (tmp_path / "other" / "checkpoint").read_text()
    (tmp_path / "mine").mkdir()
    text = state.replace('"ckpt', f'"{tmp_path}/other/ckpt')
    (tmp_path / "mine" / "checkpoint").write_text(text)
    manager = CheckpointManager(checkpoint, tmp_path / "mine", max_to_keep=1)
    assert manager.latest_checkpoint == theirs[1]
    assert manager.checkpoints == []
    manager.save()
    manager.save()
    assert all(checkpoint_exists(path) for path in theirs)
    assert on_disk(tmp_path / "mine") == ["ckpt-4"]


def test_a_hand_written_path_is_one_with_the_path_that_it_means(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    paths = save_all(manager, [1, 2])
    state = (tmp_path / "checkpoint").read_text()
    (tmp_path / "checkpoint").write_text(state.replace('"ckpt', '"./ckpt'))
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert manager.checkpoints == paths
    assert manager.latest_checkpoint == paths[1]
    assert manager.save(2) == paths[1]
    assert manager.checkpoints == paths[1:]
    assert on_disk(tmp_path) == ["ckpt-2"]


# --- deleting safely ------------------------------------------------------------------------


def test_a_successor_is_committed_and_recorded_before_anything_is_deleted(
    tmp_path, checkpoint, monkeypatch
):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    rmtree, seen = shutil.rmtree, []

    def watched(path, *arguments, **options):
        if os.path.exists(path):
            state = names([get_checkpoint_state(tmp_path).model_checkpoint_path])[0]
            seen.append((os.path.basename(path).split(".")[0], state))
            assert problem_with(str(tmp_path / state)) is None
        rmtree(path, *arguments, **options)

    manager.save()
    monkeypatch.setattr(shutil, "rmtree", watched)
    manager.save()
    manager.save()
    assert seen == [("ckpt-1", "ckpt-2"), ("ckpt-2", "ckpt-3")]


def test_checkpoints_that_are_gone_already_are_tolerated(tmp_path, checkpoint, caplog):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    paths = [manager.save() for _ in range(2)]
    shutil.rmtree(paths[0])
    paths.append(manager.save())
    assert manager.checkpoints == paths[1:]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and paths[0] in record.getMessage()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    shutil.rmtree(paths[1])
    assert manager.gc() == []
    assert manager.checkpoints == paths[2:]


def test_a_listed_path_that_became_something_else_is_left_alone(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    path = manager.save()
    shutil.rmtree(path)
    os.mkdir(path)
    (tmp_path / "ckpt-1" / "notes").touch()
    manager.save()
    assert names(manager.checkpoints) == ["ckpt-2"]
    assert (tmp_path / "ckpt-1" / "notes").exists()


def test_a_deletion_that_fails_does_not_fail_the_save_and_is_tried_again(
    tmp_path, checkpoint, monkeypatch, caplog
):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    paths = [manager.save()]

    def busy(*arguments):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_jax.manage.collection.storage_of", busy)
        paths.append(manager.save())
    assert "could not be removed" in caplog.text
    assert manager.checkpoints == paths
    assert CheckpointManager(checkpoint, tmp_path).checkpoints == paths
    assert manager.gc() == paths[:1]
    assert manager.checkpoints == paths[1:]


def test_a_new_checkpoint_that_cannot_be_opened_lets_the_old_ones_live(
    tmp_path, checkpoint, caplog
):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    manager.save()
    options = ckpt.CheckpointOptions(write_callbacks=(truncate,))
    manager.save(options=options)
    assert on_disk(tmp_path) == ["ckpt-1", "ckpt-2"]
    assert "nothing is removed" in caplog.text
    manager.save()
    assert on_disk(tmp_path) == ["ckpt-3"]


def test_a_half_deleted_checkpoint_is_no_checkpoint(tmp_path, checkpoint, monkeypatch):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    first = manager.save()
    rmtree = shutil.rmtree

    def cut_short(path, *arguments, **options):
        if not os.path.exists(path):
            return
        os.unlink(glob.glob(f"{path}/shards/*/c/*")[0])
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        manager.save()
    assert shutil.rmtree is rmtree
    assert names(manager.checkpoints) == ["ckpt-2"]
    assert not checkpoint_exists(first)
    (left,) = set(on_disk(tmp_path)) - {"ckpt-2"}
    assert left.startswith("ckpt-1.staging-")
    assert names(manager.gc()) == [left]
    assert on_disk(tmp_path) == ["ckpt-2"]


# --- collecting garbage ---------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_removed_and_removes_nothing(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    paths = [manager.save() for _ in range(4)]
    shutil.copytree(paths[1], staging(paths[1]))
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    before = (tmp_path / "checkpoint").read_bytes()
    expected = [paths[0], paths[1], staging(paths[1])]
    assert manager.gc(dry_run=True) == expected
    assert manager.checkpoints == paths
    assert len(on_disk(tmp_path)) == 5
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert manager.gc() == expected
    assert manager.gc() == []
    assert manager.checkpoints == paths[2:]
    assert on_disk(tmp_path) == names(paths[2:])
    assert get_checkpoint_state(tmp_path).all_model_checkpoint_paths == tuple(paths[2:])


def test_only_staging_that_a_later_save_made_pointless_is_collected(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path)
    save_all(manager, [3, 5])
    keep = [staging("ckpt-6"), staging("other-1"), staging("ckpt-1") + ".bak", "ckpt-x", "ckpt-1",
            "ckpt-1.staging-0123", staging("ckpt-eval-1")]  # fmt: skip
    for name in [*keep, staging("ckpt-4")]:
        (tmp_path / name).mkdir()
    assert names(manager.gc()) == [staging("ckpt-4")]
    assert on_disk(tmp_path) == sorted([*keep, "ckpt-3", "ckpt-5"])


def test_while_the_latest_is_unusable_nothing_is_collected(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    paths = [manager.save() for _ in range(3)]
    os.mkdir(staging(paths[0]))
    truncate(paths[2])
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert manager.gc(dry_run=True) == manager.gc() == []
    remove_checkpoint(paths[2])
    assert manager.gc() == []
    assert on_disk(tmp_path) == ["ckpt-1", staging("ckpt-1"), "ckpt-2"]


def test_collecting_keeps_the_latest_where_it_is_not_managed(tmp_path, checkpoint):
    clock = Clock()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None, clock=clock)
    paths = [manager.save() for _ in range(2)]
    # The latest was copied in by hand, from elsewhere.
    shutil.copytree(paths[1], tmp_path / "elsewhere-9")
    text = (tmp_path / "checkpoint").read_text()
    text = text.replace(
        'model_checkpoint_path: "ckpt-2"', 'model_checkpoint_path: "elsewhere-9"', 1
    )
    (tmp_path / "checkpoint").write_text(text)
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1, clock=clock)
    assert manager.gc() == paths[:1]
    for _ in range(2):
        manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1, clock=clock)
        assert names([manager.latest_checkpoint]) == ["elsewhere-9"]
        assert manager.checkpoints == paths[1:]
    manager.save()
    assert on_disk(tmp_path) == ["ckpt-3", "elsewhere-9"]


# --- names and numbers ----------------------------------------------------------------------


@pytest.mark.behaviour(141)
def test_a_variable_as_number_names_the_file_and_is_not_advanced(tmp_path, checkpoint):
    step = ckpt.Variable(0)
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    for number in range(0, 10, 2):
        step.assign(number)
        assert names([manager.save(checkpoint_number=step)]) == [f"ckpt-{number}"]
        assert step.value == number
    assert checkpoint.save_counter == 5
    assert names(manager.checkpoints) == ["ckpt-6", "ckpt-8"]


@pytest.mark.behaviour(142)
def test_a_plain_integer_as_number_names_the_file(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    paths = save_all(manager, [0, 2, np.int64(4), 6, jnp.asarray(8)])
    assert names(paths) == ["ckpt-0", "ckpt-2", "ckpt-4", "ckpt-6", "ckpt-8"]
    assert manager.latest_checkpoint == latest_checkpoint(tmp_path) == paths[-1]
    state = get_checkpoint_state(tmp_path)
    assert state.all_model_checkpoint_paths == tuple(paths[-2:])
    fresh = new_checkpoint()
    fresh.restore(paths[-1]).assert_consumed()
    assert fresh.save_counter == 5


@pytest.mark.behaviour(143)
def test_a_name_replaces_the_default(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, checkpoint_name="epoch")
    assert manager.save() == str(tmp_path / "epoch-1")
    assert CheckpointManager(checkpoint, tmp_path).save() == str(tmp_path / "ckpt-2")


def test_order_is_by_number_and_not_by_text_or_time(tmp_path, checkpoint):
    clock = Clock()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=3, clock=clock)
    for number in (8, 9, 10, 99, 100):
        clock.now += HOUR
        manager.save(number)
    assert names(manager.checkpoints) == ["ckpt-10", "ckpt-99", "ckpt-100"]
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=3, clock=clock)
    assert names(manager.checkpoints) == ["ckpt-10", "ckpt-99", "ckpt-100"]


def test_after_going_back_to_an_earlier_step_the_newly_saved_one_is_the_latest(
    tmp_path, checkpoint
):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    save_all(manager, [300])
    for number in (100, 150):
        manager.save(number)
        assert names([manager.latest_checkpoint]) == on_disk(tmp_path) == [f"ckpt-{number}"]
        again = CheckpointManager(new_checkpoint(), tmp_path)
        assert names([again.restore_or_initialize()]) == [f"ckpt-{number}"]


def test_saving_under_a_number_again_replaces_that_checkpoint(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    paths = save_all(manager, [1, 2])
    checkpoint.v.assign(jnp.asarray(5.0))
    assert manager.save(2, metrics={"loss": 1.0}) == paths[1]
    assert manager.save(2) == paths[1]
    assert manager.checkpoints == paths
    assert not json.loads((tmp_path / "checkpoint-metrics.json").read_text())
    fresh = new_checkpoint()
    fresh.restore(paths[1]).assert_consumed()
    assert fresh.v.value == 5


@pytest.mark.parametrize("number", [1.5, "3", None, jnp.zeros(2, int), ckpt.Variable(0.5)])
def test_a_number_that_is_no_integer_is_refused(tmp_path, checkpoint, number):
    manager = CheckpointManager(checkpoint, tmp_path)
    with pytest.raises(TypeError, match="expected an integer"):
        manager.save(lambda: number)
    assert checkpoint.save_counter == 0
    assert not os.listdir(tmp_path)


def test_a_negative_number_is_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="0 or more"):
        CheckpointManager(checkpoint, tmp_path).save(-1)
    assert checkpoint.save_counter == 0


@pytest.mark.parametrize(
    "holder",
    [3, np.int64(3), np.asarray(3), jnp.asarray(3), ckpt.Variable(3), ckpt.Variable(np.int64(3)),
     nnx.Variable(jnp.asarray(3)), nnx.Variable(3), lambda: 3, lambda: ckpt.Variable(3)],
)  # fmt: skip
def test_a_counter_may_be_anything_that_holds_an_integer(holder):
    assert as_integer(holder) == 3


# --- restoring ------------------------------------------------------------------------------


@pytest.mark.behaviour(144)
def test_without_checkpoints_the_initialisation_runs(tmp_path, checkpoint):
    calls = []
    manager = CheckpointManager(checkpoint, tmp_path, init_fn=lambda: calls.append("init"))
    assert manager.restore_or_initialize() is None
    assert calls == ["init"]
    assert CheckpointManager(checkpoint, tmp_path).restore_or_initialize() is None


@pytest.mark.behaviour(145)
def test_after_a_save_its_path_is_returned_and_its_values_are_back(tmp_path):
    calls = []
    saved = CheckpointManager(new_checkpoint(7.0), tmp_path).save()
    fresh = new_checkpoint()
    manager = CheckpointManager(fresh, tmp_path, init_fn=lambda: calls.append("init"))
    assert manager.restore_or_initialize() == saved
    assert (fresh.v.value, fresh.save_counter, calls) == (7, 1, [])


@pytest.mark.behaviour(146)
def test_the_directory_may_be_any_path_like_and_paths_are_strings_in_it(tmp_path):
    for directory in (tmp_path / "a", str(tmp_path / "b"), os.fsencode(tmp_path / "c")):
        manager = CheckpointManager(new_checkpoint(), directory)
        path = manager.save()
        assert path == os.path.join(os.fsdecode(directory), "ckpt-1")
        assert manager.restore_or_initialize() == path


def test_a_relative_directory_stays_relative(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    manager = CheckpointManager(checkpoint, "runs/a/", max_to_keep=1)
    assert [manager.save(), manager.save()] == ["runs/a/ckpt-1", "runs/a/ckpt-2"]
    again = CheckpointManager(checkpoint, "runs/a", max_to_keep=1)
    assert again.checkpoints == ["runs/a/ckpt-2"]
    assert again.save() == "runs/a/ckpt-3"
    assert on_disk("runs/a") == ["ckpt-3"]


def test_a_moved_directory_is_still_managed(tmp_path, checkpoint):
    CheckpointManager(checkpoint, tmp_path / "old").save(metrics={"loss": 1.0})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    manager = CheckpointManager(checkpoint, tmp_path / "new", max_to_keep=1)
    assert manager.checkpoints == [str(tmp_path / "new" / "ckpt-1")]
    manager.save()
    assert on_disk(tmp_path / "new") == ["ckpt-2"]
    assert on_disk(tmp_path / "old") == ["ckpt-1"]


def test_where_the_latest_is_damaged_the_newest_sound_one_is_restored_loudly(tmp_path, caplog):
    checkpoint = new_checkpoint()
    manager = CheckpointManager(checkpoint, tmp_path)
    paths = []
    for value in range(4):
        checkpoint.v.assign(jnp.asarray(float(value)))
        paths.append(manager.save())
    shutil.rmtree(paths[3])
    truncate(paths[2])
    fresh = new_checkpoint()
    assert CheckpointManager(fresh, tmp_path).restore_or_initialize() == paths[1]
    assert (fresh.v.value, fresh.save_counter) == (1, 2)
    assert paths[3] in caplog.text and paths[2] in caplog.text
    assert f"fell back to {paths[1]}" in caplog.text


def test_where_no_checkpoint_is_left_the_error_is_that_of_the_latest(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, init_fn=lambda: pytest.fail("lost all"))
    paths = [manager.save() for _ in range(2)]
    truncate(paths[0])
    shutil.rmtree(paths[1])
    with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-2"):
        manager.restore_or_initialize()


def test_a_program_that_does_not_fit_its_checkpoint_does_not_get_an_older_one(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path)
    manager.save()
    checkpoint.v = ckpt.Variable(jnp.zeros(3))
    manager.save()
    with pytest.raises(ckpt.RestoreMismatchError):
        CheckpointManager(new_checkpoint(), tmp_path).restore_or_initialize()


# --- intervals ------------------------------------------------------------------------------


@pytest.mark.behaviour(148)
def test_saves_between_two_intervals_are_skipped(tmp_path, checkpoint):
    step = ckpt.Variable(0)
    manager = CheckpointManager(checkpoint, tmp_path, step_counter=step, checkpoint_interval=2)
    saved = []
    for number, check in [(0, True), (1, True), (2, True), (2, True), (2, False), (3, True),
                          (3, False)]:  # fmt: skip
        step.assign(number)
        path = manager.save(check_interval=check)
        saved.append(path and os.path.basename(path))
    assert saved == ["ckpt-1", None, "ckpt-2", None, None, None, "ckpt-3"]
    assert checkpoint.save_counter == 3


def test_a_step_that_went_backwards_is_not_due(tmp_path, checkpoint):
    step = ckpt.Variable(8)
    manager = CheckpointManager(checkpoint, tmp_path, step_counter=step, checkpoint_interval=2)
    assert manager.save()
    step.assign(5)
    assert manager.save() is None
    assert manager.save(check_interval=False)


@pytest.mark.behaviour(149)
def test_the_interval_counts_from_the_given_last_step(tmp_path, checkpoint):
    step = nnx.Variable(jnp.asarray(0))
    manager = CheckpointManager(
        checkpoint, tmp_path, step_counter=step, checkpoint_interval=2, last_checkpoint_step=1
    )
    saved = []
    for number in (1, 2, 3):
        step[...] = number
        saved.append(manager.save() is not None)
    assert saved == [False, False, True]


@pytest.mark.behaviour(150)
def test_after_a_restore_the_same_step_is_not_saved_again(tmp_path):
    def new_manager(step):
        checkpoint = ckpt.Checkpoint(step=step)
        return checkpoint, CheckpointManager(
            checkpoint, tmp_path, step_counter=lambda: checkpoint.step, checkpoint_interval=2
        )

    _, manager = new_manager(4)
    path = manager.save()
    checkpoint, manager = new_manager(0)
    assert manager.restore_or_initialize() == path
    assert checkpoint.step == 4
    assert manager.save() is None
    checkpoint.step = 5
    assert manager.save() is None
    checkpoint.step = 6
    assert manager.save() is not None


# --- saves that fail ------------------------------------------------------------------------


def test_a_save_that_fails_leaves_everything_as_it_was_and_can_be_repeated(tmp_path, checkpoint):
    step = ckpt.Variable(0)
    manager = CheckpointManager(checkpoint, tmp_path, 1, step_counter=step, checkpoint_interval=2)
    path = manager.save()
    before = (tmp_path / "checkpoint").read_bytes()
    step.assign(2)
    checkpoint.state = Unsaveable()
    with pytest.raises(ckpt.UnsaveableError, match="no disk quota"):
        manager.save()
    assert checkpoint.save_counter == 1
    assert manager.checkpoints == [path] and manager.latest_checkpoint == path
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert on_disk(tmp_path) == ["ckpt-1"]
    del checkpoint.state
    assert names([manager.save()]) == ["ckpt-2"]


def test_write_callbacks_see_the_old_state_and_the_new_checkpoint(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    first = manager.save()
    seen = []

    def look(path):
        assert problem_with(path) is None
        seen.append((path, latest_checkpoint(tmp_path), manager.latest_checkpoint))

    options = ckpt.CheckpointOptions(write_callbacks=(look,))
    second = manager.save(options=options)
    assert seen == [(second, first, first)]
    assert options.write_callbacks == (look,)


def test_a_write_callback_that_fails_leaves_the_state_and_the_old_checkpoints(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    first = manager.save()

    def fail():
        raise RuntimeError("cannot notify")

    with pytest.raises(RuntimeError, match="cannot notify"):
        manager.save(options=ckpt.CheckpointOptions(write_callbacks=(fail,)))
    assert manager.latest_checkpoint == latest_checkpoint(tmp_path) == first
    assert manager.checkpoints == [first]
    assert on_disk(tmp_path) == ["ckpt-1", "ckpt-2"]
    assert checkpoint.save_counter == 2


def test_the_last_save_is_found_even_if_the_process_ended_before_the_sweep(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    manager.save()
    failing = CheckpointManager(checkpoint, tmp_path, 1, policies=[Failing()])
    with pytest.raises(ZeroDivisionError):
        failing.save()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert names(manager.checkpoints) == ["ckpt-1", "ckpt-2"]
    assert names(manager.gc()) == ["ckpt-1"]


class Failing:
    def keep(self, records):
        raise ZeroDivisionError


# --- saves in the background ----------------------------------------------------------------


def test_a_save_in_the_background_is_recorded_when_it_has_finished(tmp_path, checkpoint):
    step = ckpt.Variable(0)
    manager = CheckpointManager(
        checkpoint, tmp_path, max_to_keep=1, step_counter=step, checkpoint_interval=1
    )
    first = manager.save()
    go_on = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: go_on.wait(60),))
    step.assign(1)
    second = manager.save(options=options, metrics={"loss": 1.0})
    assert names([second]) == ["ckpt-2"]
    assert manager.checkpoints == [first]
    assert latest_checkpoint(tmp_path) == first
    assert manager.save() is None  # at the same step, it does not even wait
    go_on.set()
    manager.sync()
    assert manager.checkpoints == [second]
    assert latest_checkpoint(tmp_path) == manager.latest_checkpoint == second
    assert on_disk(tmp_path) == ["ckpt-2"]
    fresh = new_checkpoint()
    fresh.restore(second).assert_consumed()
    assert fresh.save_counter == 2


def test_a_save_that_fails_in_the_background_is_raised_and_can_be_repeated(
    tmp_path, checkpoint, monkeypatch
):
    step = ckpt.Variable(0)
    manager = CheckpointManager(
        checkpoint, tmp_path, max_to_keep=1, step_counter=step, checkpoint_interval=2
    )
    first = manager.save()
    step.assign(2)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_jax.saving.pipeline.assemble", full)
        assert manager.save(options=ckpt.CheckpointOptions(enable_async=True))
        with pytest.raises(ckpt.AsyncSaveError, match="No space left"):
            manager.sync()
    assert manager.checkpoints == [first]
    assert checkpoint.save_counter == 1
    assert names([manager.save()]) == on_disk(tmp_path) == ["ckpt-2"]


# --- policies -------------------------------------------------------------------------------


def test_each_policy_keeps_its_own_beyond_the_latest(tmp_path, checkpoint):
    manager = CheckpointManager(
        checkpoint, tmp_path, 2, policies=[KeepEveryNSteps(4), KeepBest("loss", 1, "min")]
    )
    for number, loss in enumerate([9.0, 1.0, 5.0, 5.0, 5.0, 0.5, 5.0, 5.0, 5.0], 1):
        manager.save(metrics={"loss": loss})
        if number == 5:
            assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4", "ckpt-5"]
    assert on_disk(tmp_path) == ["ckpt-4", "ckpt-6", "ckpt-8", "ckpt-9"]
    assert names(manager.checkpoints) == on_disk(tmp_path)


def test_a_restarted_manager_knows_the_metrics_of_all(tmp_path, checkpoint):
    for accuracy in [0.1, jnp.asarray(0.9), np.float32(0.3), float("nan"), 0.2, 0.8, True]:
        manager = CheckpointManager(checkpoint, tmp_path, 1, policies=[KeepBest("accuracy", 2)])
        manager.save(metrics={"accuracy": accuracy, "step": 1})
    assert on_disk(tmp_path) == ["ckpt-2", "ckpt-7"]
    assert names(manager.checkpoints) == ["ckpt-2", "ckpt-7"]
    content = json.loads((tmp_path / "checkpoint-metrics.json").read_text())
    assert content == {
        "ckpt-2": {"accuracy": float(np.float32(0.9)), "step": 1.0},
        "ckpt-7": {"accuracy": 1.0, "step": 1.0},
    }


def test_what_is_not_finite_survives_a_restart_in_standard_json(tmp_path, checkpoint):
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    for value in (float("inf"), -float("inf"), float("nan")):
        manager.save(metrics={"a": value})

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "checkpoint-metrics.json").read_text(), parse_constant=refuse)
    manager = CheckpointManager(checkpoint, tmp_path, 1, policies=[KeepBest("a")])
    assert names(manager.gc()) == ["ckpt-2"]


def test_without_metrics_there_is_no_file_of_metrics(tmp_path, checkpoint):
    CheckpointManager(checkpoint, tmp_path).save()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1"]


@pytest.mark.parametrize(
    "metrics", [{"a": "0.5"}, {"a": None}, {"a": 1j}, {"a": jnp.zeros(2)}, {3: 1.0}]
)
def test_a_metric_that_is_no_number_is_refused_before_anything_is_written(
    tmp_path, checkpoint, metrics
):
    with pytest.raises(ValueError, match="expected one real number"):
        CheckpointManager(checkpoint, tmp_path).save(metrics=metrics)
    assert not os.listdir(tmp_path)
    assert checkpoint.save_counter == 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ckpt-1": 3}', '{"ckpt-1": {"a": "x"}}', "\xff"])
def test_while_the_metrics_cannot_be_read_nothing_is_removed(tmp_path, checkpoint, caplog, text):
    manager = CheckpointManager(checkpoint, tmp_path, 1, policies=[KeepBest("a")])
    manager.save(metrics={"a": 1.0})
    (tmp_path / "checkpoint-metrics.json").write_bytes(text.encode("latin-1"))
    manager = CheckpointManager(checkpoint, tmp_path, 1, policies=[KeepBest("a")])
    assert "not a file of metrics" in caplog.text
    assert manager.checkpoints == []
    manager.save()
    manager.save()
    assert on_disk(tmp_path) == ["ckpt-1", "ckpt-3"]
    assert names(CheckpointManager(checkpoint, tmp_path).checkpoints) == ["ckpt-3"]


def test_what_a_policy_kept_past_a_preserved_one_is_still_managed_after_a_restart(
    tmp_path, checkpoint
):
    clock = Clock()

    def new_manager():
        policies = [KeepBest("a")]
        return CheckpointManager(checkpoint, tmp_path, 1, 1.0, policies=policies, clock=clock)

    for score in (5.0, 1.0, 1.0):
        clock.now += HOUR
        new_manager().save(metrics={"a": score})
    assert on_disk(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3"]  # best, preserved, latest
    assert names(new_manager().checkpoints) == ["ckpt-1", "ckpt-3"]
    new_manager().save(metrics={"a": 6.0})
    assert on_disk(tmp_path) == ["ckpt-2", "ckpt-3", "ckpt-4"]


def test_metrics_without_names_are_refused(tmp_path: Path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path)
    wrong: Any = 0.5
    with pytest.raises(TypeError, match=r"metrics must be numbers by name, got 0\.5"):
        manager.save(metrics=wrong)
    assert manager.checkpoints == []
