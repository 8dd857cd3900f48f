"""No broken checkpoint: saves that are killed, that fail, and that lose power, at every call.

A sample of the calls by default, chosen by a seed that is printed; all of them with
`-m exhaustive`. What a save has to leave is the same in all cases:

* every checkpoint that is there is whole: all values are those of one step, and verify finds none
  damaged; the earlier ones are all there unless the save has succeeded,
* latest_checkpoint names a whole one, the new one only if it was recorded,
* the next save works, and nothing is left behind after it.
"""

import contextlib
import errno
import random
import shutil
import signal
from pathlib import Path

import pytest
from faults import KILL, NFS, SSHFS, Faults, compiler
from faults.disk import any_beginning, loaded, nothing, states, stored
from faults.values import checkpoint_of, step_in, tree_of

import ckpt_jax as ckpt
from ckpt_jax.api.latest import checkpoint_exists

pytestmark = pytest.mark.skipif(
    compiler() is None,
    reason="The library that counts calls of the system needs Linux and a C compiler.",
)

SCENARIOS = ("fresh", "below_new_directories", "overwrite", "counted", "managed")
SCENARIOS += ("in_the_background", "in_a_prepared_directory")
NUMBERED = ("counted", "managed", "in_the_background")  # they start with two and save the third
SAMPLE = 4
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = Faults(tmp_path_factory.mktemp("interposer"))
    yield program
    program.close()


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """What each scenario starts with, by its name, and the number of calls that it makes."""
    root = tmp_path_factory.mktemp("templates")
    for scenario in SCENARIOS:
        directory = root / scenario
        directory.mkdir()
        if scenario == "overwrite":
            ckpt.save(directory / "a", tree_of(1))
        if scenario == "in_a_prepared_directory":
            (directory / "a").mkdir()
        if scenario in NUMBERED:
            checkpoint = checkpoint_of(1)
            manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=2)
            for step in (1, 2):
                for name, value in tree_of(step).items():
                    setattr(checkpoint, name, value)
                manager.save(metrics={"loss": step})
    return root


@pytest.fixture(scope="module")
def counts(faults, templates, tmp_path_factory):
    """How many calls each scenario makes."""
    root = tmp_path_factory.mktemp("counts")
    found = {}
    for scenario in SCENARIOS:
        outcome = faults.run(scenario, copied(templates / scenario, root / scenario))
        assert outcome.succeeded, outcome
        found[scenario] = outcome.count
    return found


def copied(template: Path, directory: Path) -> Path:
    shutil.copytree(template, directory)
    return directory


def chosen(count, scenario, exhaustive):
    """The calls that a test tries."""
    if exhaustive:
        return range(1, count + 1)
    seed = random.randrange(2**32)
    print(f"{scenario}: seed {seed}")  # shown if the test fails
    return sorted(random.Random(seed).sample(range(1, count + 1), SAMPLE))


def checkpoints_in(directory):
    return {
        path.name: step_in(path)
        for path in directory.iterdir()
        if path.is_dir() and checkpoint_exists(path)
    }


def assert_sound(scenario, directory, *, succeeded):
    """What holds after any save; returns the steps of the checkpoints that are there.

    Args:
      succeeded: whether the save has; None where it did not come to say so.
    """
    if scenario in NUMBERED:
        return assert_numbered_sound(scenario, directory, succeeded)
    if scenario == "below_new_directories":
        directory = directory / "new" / "er"
    found = checkpoints_in(directory) if directory.exists() else {}
    before = {"a": 1} if scenario == "overwrite" else {}
    if succeeded is None:
        assert found in (before, {"a": 2})
    else:
        assert found == ({"a": 2} if succeeded else before)
    return found


def assert_numbered_sound(scenario, directory, succeeded):
    found = checkpoints_in(directory)
    assert all(name == f"ckpt-{step}" for name, step in found.items())
    latest = ckpt.latest_checkpoint(directory)
    assert latest is not None
    step = step_in(latest)
    assert "ckpt-2" in found
    if succeeded:
        assert step == 3
    elif succeeded is None:
        assert step in (2, 3)
    else:
        assert step == 2
    if step == 2:
        # Nothing goes before the new one is recorded.
        assert "ckpt-1" in found
    return found


def assert_goes_on(scenario, directory):
    """A later save works, and removes what this one has left."""
    if scenario in NUMBERED:
        checkpoint = checkpoint_of(0)
        manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=2)
        assert manager.restore_or_initialize() == manager.latest_checkpoint
        step = checkpoint.save_counter + 1
        for name, value in tree_of(step).items():
            setattr(checkpoint, name, value)
        path = manager.save()
        assert ckpt.latest_checkpoint(directory) == path
        assert step_in(path) == step
        manager.gc()
        assert set(checkpoints_in(directory)) <= {f"ckpt-{n}" for n in (1, 2, 3, 4)}
    else:
        path = directory / "a"
        if scenario == "below_new_directories":
            path = directory / "new" / "er" / "a"
        ckpt.save(path, tree_of(5), overwrite=True)
        assert step_in(path) == 5
    assert [p for p in directory.rglob("*") if ".staging-" in p.name or ".tmp" in p.name] == []


# --- killed ----------------------------------------------------------------------------


@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_killed_at_a_call_leaves_the_old_state_or_the_new(
    faults, templates, counts, tmp_path, scenario, exhaustive
):
    for at in chosen(counts[scenario], scenario, exhaustive):
        directory = copied(templates / scenario, tmp_path / str(at))
        outcome = faults.run(scenario, directory, at=at, action=KILL)
        assert outcome.signal == signal.SIGKILL, (at, outcome)
        assert_sound(scenario, directory, succeeded=None)
        assert_goes_on(scenario, directory)


REPLACING = [("overwrite", NFS), ("overwrite", SSHFS), ("counted", SSHFS), ("managed", SSHFS)]


@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=EXHAUSTIVE)])
@pytest.mark.parametrize(
    "scenario, renames", REPLACING, ids=["overwrite-nfs", "overwrite", "counted", "managed"]
)
def test_where_a_rename_replaces_nothing_a_killed_save_leaves_the_old_state_or_the_new(
    faults, templates, tmp_path, scenario, renames, exhaustive
):
    """NFS cannot exchange two names, and sshfs renames nothing over anything."""
    whole = copied(templates / scenario, tmp_path / "whole")
    outcome = faults.run(scenario, whole, renames=renames)
    assert outcome.succeeded, outcome
    assert_sound(scenario, whole, succeeded=True)
    assert not [path for path in whole.iterdir() if ".replaced" in path.name]
    # The renames are where it differs, and they are few.
    total = faults.run(
        scenario, copied(templates / scenario, tmp_path / "all"), only="rename", renames=renames
    ).count
    calls = [("rename", at) for at in range(1, total + 1)]
    calls += [("", at) for at in chosen(outcome.count, scenario, exhaustive)]
    for only, at in calls:
        directory = copied(templates / scenario, tmp_path / f"{only}{at}")
        outcome = faults.run(scenario, directory, at=at, action=KILL, only=only, renames=renames)
        assert outcome.signal == signal.SIGKILL, (at, outcome)
        if scenario == "overwrite":
            found = {path.name.partition(".")[0]: step_in(path) for path in aside_in(directory)}
            assert found or checkpoints_in(directory)
            with contextlib.suppress(FileExistsError):  # it has been put back, or was never away
                ckpt.save(directory / "a", tree_of(2))
            assert checkpoints_in(directory)["a"] in (1, 2)
        else:
            assert_sound(scenario, directory, succeeded=None)
        assert_goes_on(scenario, directory)
        assert aside_in(directory) == []


def aside_in(directory):
    return [path for path in directory.iterdir() if ".replaced" in path.name]


# --- refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_of_which_a_call_fails_names_the_path_and_leaves_nothing(
    faults, templates, counts, tmp_path, scenario, number, exhaustive
):
    for at in chosen(counts[scenario], scenario, exhaustive):
        directory = copied(templates / scenario, tmp_path / str(at))
        outcome = faults.run(scenario, directory, at=at, action=number)
        assert_failed_well(scenario, directory, at, outcome)
        assert_goes_on(scenario, directory)


def assert_failed_well(scenario, directory, at, outcome):
    assert outcome.signal == 0, (at, outcome)
    assert outcome.count >= at, outcome
    assert_sound(scenario, directory, succeeded=outcome.succeeded)
    if outcome.error is not None:
        _, text, file = outcome.error
        assert str(directory) in text, (at, outcome)
        assert file is not None, (at, outcome)
        left = [path.name for path in directory.iterdir() if ".staging-" in path.name]
        assert left == [], (at, outcome)
        if scenario == "in_a_prepared_directory":
            assert [*(directory / "a").iterdir()] == [], (at, outcome)


@pytest.mark.parametrize("scenario", ["fresh", "below_new_directories", "overwrite", "counted"])
def test_a_flush_that_fails_once_fails_the_save(faults, templates, tmp_path, scenario):
    """It is not tried again, although it would succeed then."""
    whole = faults.run(scenario, copied(templates / scenario, tmp_path / "0"), only="fsync")
    assert whole.succeeded
    assert whole.count > 10
    for at in range(1, whole.count + 1):
        directory = copied(templates / scenario, tmp_path / str(at))
        outcome = faults.run(scenario, directory, at=at, action=errno.EIO, only="fsync")
        assert outcome.error is not None, at
        assert outcome.error[0] == "OSError", outcome
        assert_failed_well(scenario, directory, at, outcome)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_disk_that_fails_for_good_takes_nothing_that_was_there(
    faults, templates, counts, tmp_path, scenario
):
    for at in range(1, counts[scenario] + 1):
        directory = copied(templates / scenario, tmp_path / str(at))
        outcome = faults.run(scenario, directory, at=at, action=-errno.EIO)
        assert outcome.signal == 0, (at, outcome)
        assert_sound(scenario, directory, succeeded=True if outcome.succeeded else None)
        assert_goes_on(scenario, directory)


# --- without power ---------------------------------------------------------------------


@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=EXHAUSTIVE)])
@pytest.mark.parametrize(
    "scenario, renames",
    [*((scenario, 0) for scenario in SCENARIOS), ("managed", SSHFS)],
    ids=[*SCENARIOS, "managed-sshfs"],
)
def test_what_was_reported_survives_a_power_failure_at_any_moment(
    faults, templates, tmp_path, scenario, renames, exhaustive
):
    directory = copied(templates / scenario, tmp_path / "run")
    disk = loaded(directory)
    record = tmp_path / "record"
    assert faults.run(scenario, directory, record=record, renames=renames).succeeded
    seed = random.randrange(2**32)
    print(f"{scenario}: seed {seed}")
    chance = random.Random(seed)
    number, succeeded = 0, None
    for kind, first in states(disk, directory, record):
        if kind == "mark":
            assert first == "success"
            succeeded = True
        # Everything unsynced is gone, or any part of it: after every call, or some of them.
        cases = [nothing, *[any_beginning(chance)] * 3] if exhaustive else []
        if not exhaustive and (kind == "mark" or chance.random() < 0.1):
            cases = [nothing, any_beginning(chance)]
        for steps in cases:
            number += 1
            after = tmp_path / str(number)
            stored(disk, after, steps)
            assert_sound(scenario, after, succeeded=succeeded)
            if number % 5 == 0:
                assert_goes_on(scenario, after)
            shutil.rmtree(after)
    assert succeeded
