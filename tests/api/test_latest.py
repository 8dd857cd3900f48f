"""The checkpoints of a directory as files. Numbers refer to the reference's own tests."""

import glob
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.api.latest import (
    checkpoint_exists,
    checkpoints_iterator,
    get_checkpoint_mtimes,
    latest_checkpoint,
    older_checkpoints,
    problem_with,
    remove_checkpoint,
)
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.state_file import CheckpointState, update_checkpoint_state

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture
def checkpoint():
    return ckpt.Checkpoint(v=ckpt.Variable(jnp.zeros(())))


def damage(path):
    os.unlink(os.path.join(path, "manifest.ckpt"))


# --- latest ---------------------------------------------------------------------------------


@pytest.mark.behaviour(112)
def test_three_steps_under_a_relative_prefix_come_back_with_the_last_value(
    tmp_path, monkeypatch, checkpoint
):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        checkpoint.v.assign(jnp.asarray(float(step)))
        checkpoint.save("train/ckpt")
    fresh = ckpt.Checkpoint(v=ckpt.Variable(jnp.zeros(())))
    fresh.restore(latest_checkpoint("train")).assert_consumed()
    assert fresh.v.value == 3
    monkeypatch.chdir(tmp_path / "train")
    assert latest_checkpoint(".") == "./ckpt-3"


@pytest.mark.behaviour(147)
def test_the_directory_may_be_any_path_like(tmp_path, checkpoint):
    path = checkpoint.save(tmp_path / "ckpt")
    assert latest_checkpoint(tmp_path) == latest_checkpoint(str(tmp_path)) == path


def test_a_directory_without_checkpoints_or_without_anything_has_no_latest(tmp_path, checkpoint):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_names_with_wildcards_are_names(tmp_path, checkpoint):
    path = checkpoint.save(tmp_path / "run [1]*" / "ckpt*")
    assert latest_checkpoint(tmp_path / "run [1]*") == path
    assert checkpoint_exists(path)


def test_a_damaged_latest_falls_back_to_the_next_lower_number_with_a_warning(
    tmp_path, checkpoint, caplog
):
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(11)]
    damage(paths[10])
    assert latest_checkpoint(tmp_path) == paths[9]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert paths[10] in caplog.text
    assert f"falling back to {paths[9]}" in caplog.text


def test_a_truncated_or_missing_file_of_arrays_makes_a_checkpoint_unusable(tmp_path, checkpoint):
    checkpoint.big = ckpt.Variable(jnp.ones(10_000))
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(3)]
    (data,) = glob.glob(f"{paths[2]}/shards/*/c/*")
    os.truncate(data, os.path.getsize(data) // 2)
    (data,) = glob.glob(f"{paths[1]}/shards/*/c/*")
    os.unlink(data)
    assert latest_checkpoint(tmp_path) == paths[0]


def test_the_fall_back_goes_by_number_and_never_by_time(tmp_path, checkpoint):
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(3)]
    os.utime(paths[0])
    os.utime(os.path.join(paths[0], "manifest.ckpt"))
    damage(paths[2])
    assert latest_checkpoint(tmp_path) == paths[1]


def test_the_fall_back_takes_no_checkpoint_of_another_name(tmp_path, checkpoint):
    path = checkpoint.save(tmp_path / "ckpt")
    for name in ("ckpt-eval-0", "other-0", "final", "ckpt-2"):
        checkpoint.write(tmp_path / name)
    damage(path)
    assert latest_checkpoint(tmp_path) is None
    assert older_checkpoints(tmp_path, str(tmp_path / "ckpt-eval-7")) == [
        str(tmp_path / "ckpt-eval-0")
    ]
    assert older_checkpoints(tmp_path, str(tmp_path / "final")) == []


def test_numbers_with_leading_zeros_are_numbers(tmp_path, checkpoint):
    for name in ("ckpt-9", "ckpt-008", "ckpt-010"):
        checkpoint.write(tmp_path / name)
    assert older_checkpoints(tmp_path, str(tmp_path / "ckpt-010")) == [
        str(tmp_path / "ckpt-9"),
        str(tmp_path / "ckpt-008"),
    ]


def test_a_directory_of_checkpoints_can_be_moved(tmp_path, checkpoint):
    checkpoint.save(tmp_path / "old" / "ckpt")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    path = latest_checkpoint(tmp_path / "new")
    assert path == str(tmp_path / "new" / "ckpt-1")
    assert problem_with(path) is None


LARGE = np.random.default_rng(6).normal(size=100_000).astype(np.float32)


def files_below(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in Path(directory).rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("damage", ["half of the state file", "no state file"])
def test_latest_checkpoint_does_without_what_is_damaged(tmp_path, damage):
    checkpoint = ckpt.Checkpoint(x=1)
    for _ in range(2):
        checkpoint.save(tmp_path / "ckpt")
    state = tmp_path / "checkpoint"
    if damage == "no state file":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    before = files_below(tmp_path)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert files_below(tmp_path) == before


def test_latest_checkpoint_falls_back_loudly_to_the_newest_that_is_whole(tmp_path, caplog):
    checkpoint = ckpt.Checkpoint(x=1)
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(11)]
    assert ckpt.latest_checkpoint(tmp_path) == paths[10]
    os.truncate(Path(paths[10], MANIFEST), 10)
    shutil.rmtree(paths[9])
    assert ckpt.latest_checkpoint(tmp_path) == paths[8]
    assert any("ckpt-11" in record.message for record in caplog.records)
    assert any("ckpt-9" in record.message for record in caplog.records)


def test_a_checkpoint_with_a_truncated_shard_is_not_the_latest(tmp_path):
    checkpoint = ckpt.Checkpoint(x=LARGE)
    first = checkpoint.save(tmp_path / "ckpt")
    second = checkpoint.save(tmp_path / "ckpt", x=LARGE + 1)
    largest = max(Path(second).glob("shards/*/c/*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert ckpt.latest_checkpoint(tmp_path) == first


# --- exists, times, removal -----------------------------------------------------------------


@pytest.mark.behaviour(122)
def test_a_checkpoint_exists_after_it_was_saved_and_not_before(tmp_path, checkpoint):
    assert not checkpoint_exists(tmp_path / "ckpt-1")
    path = checkpoint.save(tmp_path / "ckpt")
    assert checkpoint_exists(path)
    assert checkpoint_exists(tmp_path / "ckpt-1")
    assert checkpoint_exists(latest_checkpoint(tmp_path))
    assert not checkpoint_exists(tmp_path)


@pytest.mark.behaviour(123)
def test_times_are_those_of_the_commits_and_the_absent_have_none(tmp_path, checkpoint):
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(2)]
    first, second = get_checkpoint_mtimes(paths)
    assert first <= second
    assert get_checkpoint_mtimes([tmp_path / "absent", paths[1], tmp_path]) == [second]


@pytest.mark.behaviour(124)
def test_a_removed_checkpoint_does_not_exist_and_leaves_nothing(tmp_path, checkpoint):
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(2)]
    remove_checkpoint(paths[0])
    assert not checkpoint_exists(paths[0])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-2"]


def test_removing_what_is_not_there_is_no_error(tmp_path):
    remove_checkpoint(tmp_path / "ckpt-1")
    remove_checkpoint(tmp_path / "absent" / "ckpt-1")


def test_what_is_no_checkpoint_is_not_removed(tmp_path, checkpoint):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft").touch()
    (tmp_path / "file-1").touch()
    staging = tmp_path / "ckpt-1.staging-0123456789abcdef"
    os.rename(checkpoint.write(tmp_path / "ckpt-1"), staging)
    for name in ("thesis", "file-1", staging.name):
        with pytest.raises(ckpt.CheckpointNotFoundError, match=name):
            remove_checkpoint(tmp_path / name)
    assert (tmp_path / "thesis" / "draft").exists()
    assert len(os.listdir(tmp_path)) == 3


def test_of_a_symbolic_link_only_the_link_is_removed(tmp_path, checkpoint):
    path = checkpoint.save(tmp_path / "ckpt")
    os.symlink(path, tmp_path / "best")
    remove_checkpoint(tmp_path / "best")
    assert not os.path.lexists(tmp_path / "best")
    assert problem_with(path) is None


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path, checkpoint, monkeypatch):
    path = checkpoint.save(tmp_path / "ckpt")

    def cut_short(tree):
        raise OSError(5, "Input/output error", tree)

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(OSError, match="Input/output error"):
        remove_checkpoint(path)
    (left,) = set(os.listdir(tmp_path)) - {"checkpoint"}
    assert left.startswith("ckpt-1.staging-")
    assert os.path.exists(tmp_path / left / "manifest.ckpt")
    assert not checkpoint_exists(path) and not checkpoint_exists(tmp_path / left)


# --- iterator -------------------------------------------------------------------------------


class Evaluation:
    """An iterator over checkpoints whose clock only moves while it waits."""

    def __init__(self, directory, *, while_waiting=lambda now: None, **arguments):
        self.now = 0.0
        self.while_waiting = while_waiting
        self.paths = checkpoints_iterator(
            directory, wait=self.wait, clock=lambda: self.now, **arguments
        )

    def wait(self, seconds):
        assert seconds > 0
        self.now += seconds
        self.while_waiting(self.now)


def test_each_checkpoint_is_yielded_once_when_it_appears(tmp_path, checkpoint):
    def training(now):
        if now in (2.0, 5.0):
            checkpoint.save(tmp_path / "ckpt")

    evaluation = Evaluation(tmp_path, while_waiting=training, timeout=10)
    found = [(evaluation.now, os.path.basename(path)) for path in evaluation.paths]
    assert found == [(2.0, "ckpt-1"), (5.0, "ckpt-2")]
    assert evaluation.now == 15.0  # ten seconds after the last one


def test_checkpoints_that_were_overtaken_are_skipped(tmp_path, checkpoint):
    names = []
    checkpoint.save(tmp_path / "ckpt")
    for path in Evaluation(tmp_path, timeout=0).paths:
        names.append(os.path.basename(path))
        if len(names) == 1:
            checkpoint.save(tmp_path / "ckpt")
            checkpoint.save(tmp_path / "ckpt")
    assert names == ["ckpt-1", "ckpt-3"]


def test_without_timeout_it_waits_as_long_as_it_takes(tmp_path, checkpoint):
    def training(now):
        if now == 10_000:
            checkpoint.save(tmp_path / "ckpt")

    evaluation = Evaluation(tmp_path / ".", while_waiting=training, poll_seconds=100)
    assert os.path.basename(next(evaluation.paths)) == "ckpt-1"
    assert evaluation.now == 10_000


def test_a_timeout_shorter_than_the_poll_is_kept(tmp_path):
    evaluation = Evaluation(tmp_path, timeout=0.25, poll_seconds=60)
    assert list(evaluation.paths) == []
    assert evaluation.now == 0.25


def test_a_checkpoint_that_appears_in_the_last_moment_is_yielded(tmp_path, checkpoint):
    def training(now):
        if now == 3.0:
            checkpoint.save(tmp_path / "ckpt")

    assert len(list(Evaluation(tmp_path, while_waiting=training, timeout=3).paths)) == 1


def test_the_timeout_function_decides_whether_to_go_on(tmp_path):
    answers = iter([False, False, True])
    evaluation = Evaluation(tmp_path, timeout=5, timeout_fn=lambda: next(answers))
    assert list(evaluation.paths) == []
    assert evaluation.now == 15.0
    assert list(answers) == []


def test_the_least_interval_counts_the_time_that_the_caller_takes(tmp_path, checkpoint):
    evaluation = Evaluation(tmp_path, timeout=0, min_interval_seconds=10)
    checkpoint.save(tmp_path / "ckpt")
    times = []
    for _ in evaluation.paths:
        times.append(evaluation.now)
        evaluation.now += 4 if len(times) == 1 else 40
        if len(times) < 3:
            checkpoint.save(tmp_path / "ckpt")
    assert times == [0, 10, 50]


def test_a_latest_that_is_not_usable_yet_is_awaited_with_one_warning(tmp_path, checkpoint, caplog):
    checkpoint.save(tmp_path / "ckpt")
    checkpoint.save(tmp_path / "ckpt")
    os.rename(tmp_path / "ckpt-2", tmp_path / "elsewhere")

    def copying(now):
        if now == 7.0:
            os.rename(tmp_path / "elsewhere", tmp_path / "ckpt-2")

    evaluation = Evaluation(tmp_path, while_waiting=copying, timeout=60)
    assert os.path.basename(next(evaluation.paths)) == "ckpt-2"
    assert evaluation.now == 7.0
    assert len(caplog.records) == 1


def test_after_the_latest_is_gone_no_older_one_is_yielded_in_its_place(tmp_path, checkpoint):
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(2)]
    evaluation = Evaluation(tmp_path, timeout=5)
    assert next(evaluation.paths) == paths[1]
    remove_checkpoint(paths[1])
    assert list(evaluation.paths) == []


def test_a_state_file_that_names_no_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoint").touch()
    with pytest.raises(ValueError, match="model_checkpoint_path"):
        next(Evaluation(tmp_path).paths)
    update_checkpoint_state(tmp_path, CheckpointState(str(tmp_path / "ckpt-1")))
    assert list(Evaluation(tmp_path, timeout=1).paths) == []
