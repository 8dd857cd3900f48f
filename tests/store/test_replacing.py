"""Replacing where a file system can neither exchange names nor rename over anything.

Such file systems are played by `os.rename`; `test_crash.py` has one below the C library.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from owners import ELSEWHERE, age, digits_of, ended_process
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax.store import files, replacing, staging
from ckpt_jax.store.directory import checkpoints_in, number_of
from ckpt_jax.store.replacing import exchange, replace, settle, settle_in

RENAME, REPLACE = os.rename, os.replace


def refused(path):
    return OSError(errno.EPERM, os.strerror(errno.EPERM), path)


@pytest.fixture
def nfs(monkeypatch):
    """Two names cannot be exchanged."""
    monkeypatch.setattr(replacing, "_exchange", lambda one, other: False)


@pytest.fixture
def sshfs(monkeypatch, nfs):
    """Nor is anything renamed over another thing."""

    def rename(source, target):
        if os.path.lexists(target):
            raise refused(target)
        RENAME(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)


def names(directory):
    return sorted(os.listdir(directory))


def saved(path, value):
    return ckpt.save(path, {"x": value}, overwrite=True)


def set_aside(path, owner):
    """What a save leaves that was killed between two renames."""
    aside = Path(f"{path}.replaced-{owner}")
    RENAME(path, aside)
    return aside


@pytest.fixture
def dead():
    return digits_of(ended_process())


# --- what works ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nfs", "sshfs"])
def test_an_overwriting_save_goes_through_and_leaves_nothing(tmp_path, request, kind):
    request.getfixturevalue(kind)
    saved(tmp_path / "a", 1)
    saved(tmp_path / "a", 2)
    assert ckpt.load(tmp_path / "a") == {"x": 2}
    assert names(tmp_path) == ["a"]


def test_without_overwrite_nothing_is_replaced_there_either(tmp_path, sshfs):
    saved(tmp_path / "a", 1)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        ckpt.save(tmp_path / "a", {"x": 2})
    assert ckpt.load(tmp_path / "a") == {"x": 1}
    assert names(tmp_path) == ["a"]


def test_managers_keep_their_files_and_collect_there(tmp_path, sshfs):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path, max_to_keep=2)
    for loss in (3.0, 2.0, 1.0):
        manager.save(metrics={"loss": loss})
    manager.save(3)
    assert names(tmp_path) == ["checkpoint", "checkpoint-metrics.json", "ckpt-2", "ckpt-3"]
    again = ckpt.CheckpointManager(ckpt.Checkpoint(x=0), tmp_path)
    assert again.restore_or_initialize() == str(tmp_path / "ckpt-3")
    assert again.metrics(2) == {"loss": 2.0}


def test_a_refusal_that_is_about_something_else_is_raised_as_it_is(tmp_path, monkeypatch):
    """A directory that is closed to this user, or immutable: nothing there can be renamed."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "new").write_text("new")

    def refuse(source, target):
        raise refused(source)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError) as raised:
        replace(str(tmp_path / "new"), str(tmp_path / "old"))
    assert raised.value.filename == str(tmp_path / "new")
    assert (tmp_path / "old").read_text() == "old"


# --- what fails in between ---------------------------------------------------------------------


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_if_a_rename_fails_the_old_checkpoint_is_there_again(tmp_path, monkeypatch, nfs, failing):
    path, renames = saved(tmp_path / "a", 1), []

    def refuse(source, target):
        # The first rename finds that the path is taken; the others replace.
        renames.append(source)
        if len(renames) == 1 + failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), source)
        RENAME(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            saved(path, 2)
    assert ckpt.load(path) == {"x": 1}
    assert names(tmp_path) == ["a"]


def test_what_is_put_back_in_between_is_set_aside_again(tmp_path, monkeypatch, nfs):
    """As by a manager that takes this process for dead, because it does not see its lock."""
    path = saved(tmp_path / "a", 1)
    new = saved(tmp_path / "b", 2)
    monkeypatch.setattr(staging, "_lock", lambda descriptor, operation: staging.Lock.NONE)
    meddled = []

    def rename(source, target):
        if source == new and len(meddled) < 3:
            meddled.append(source)
            settle(path)
            assert ckpt.load(path) == {"x": 1}
        RENAME(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        exchange(new, path)
    assert len(meddled) == 3
    assert (ckpt.load(path), ckpt.load(new)) == ({"x": 2}, {"x": 1})
    assert names(tmp_path) == ["a", "b"]


# --- what a killed process has left ------------------------------------------------------------


def test_the_next_save_finds_the_checkpoint_that_was_set_aside(tmp_path, dead, caplog):
    path = saved(tmp_path / "a", 1)
    aside = set_aside(path, dead)
    with pytest.raises(ckpt.CheckpointNotFoundError, match=f"{aside.name}; the next save"):
        ckpt.load(path)
    assert ckpt.load(aside) == {"x": 1}
    with pytest.raises(FileExistsError):
        ckpt.save(path, {"x": 2})
    assert "is there again" in caplog.text
    assert ckpt.load(path) == {"x": 1}
    assert names(tmp_path) == ["a"]


def replaced_number(tmp_path, owner):
    """Checkpoints 1 and 2, of which the latest was being replaced."""
    checkpoint = ckpt.Checkpoint(x=1)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path)
    for number in (1, 2):
        checkpoint.x = number
        manager.save()
    return set_aside(tmp_path / "ckpt-2", owner)


@pytest.mark.parametrize("owner", ["of this machine", ELSEWHERE, ELSEWHERE[:16]])
def test_a_new_manager_goes_on_from_the_checkpoint_that_was_set_aside(tmp_path, dead, owner):
    """Wherever the process ran: putting it back takes nothing away."""
    replaced_number(tmp_path, dead if owner == "of this machine" else owner)
    checkpoint = ckpt.Checkpoint(x=0)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path)
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-2")
    assert checkpoint.x == 2
    assert manager.steps == (1, 2)


def test_a_manager_that_only_looks_changes_nothing(tmp_path, dead):
    aside = replaced_number(tmp_path, dead)
    before = names(tmp_path)
    ckpt.CheckpointManager(ckpt.Checkpoint(x=0), tmp_path, read_only=True)
    assert aside.exists() and names(tmp_path) == before


@pytest.mark.parametrize("has_state", [True, False])
def test_the_latest_checkpoint_is_the_one_that_was_set_aside(tmp_path, dead, has_state):
    replaced_number(tmp_path, dead)
    if not has_state:
        (tmp_path / "checkpoint").unlink()
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert checkpoints_in(str(tmp_path)) == ["ckpt-1", "ckpt-2"]


HOLD = """
import sys
from ckpt_jax.store.staging import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_a_process_at_work_has_set_aside_stays_there(tmp_path):
    path = saved(tmp_path / "a", 1)
    command = [sys.executable, "-W", "error", "-c", HOLD, path]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            aside = set_aside(path, digits_of(process.pid))
            settle_in(str(tmp_path), lambda name: True)
            assert names(tmp_path) == [aside.name]
            process.send_signal(signal.SIGKILL)
            process.wait()
            settle_in(str(tmp_path), lambda name: name != "a")
            assert names(tmp_path) == [aside.name]
            settle_in(str(tmp_path), lambda name: name == "a")
            assert names(tmp_path) == ["a"]
        finally:
            process.kill()


def test_what_has_a_successor_goes_when_its_owner_is_gone(tmp_path, dead):
    path = saved(tmp_path / "a", 1)
    alive = f"{staging.owner_digits()}00000000"
    gone, elsewhere, at_work = (f"a.replaced-{owner}" for owner in (dead, ELSEWHERE, alive))
    for name in (gone, elsewhere, at_work):
        shutil.copytree(path, tmp_path / name)
    settle(path)
    assert names(tmp_path) == sorted(["a", elsewhere, at_work])
    age(tmp_path / elsewhere, 25)
    saved(path, 3)
    assert names(tmp_path) == sorted(["a", at_work])
    assert ckpt.load(path) == {"x": 3}


@pytest.mark.parametrize("look", [settle, lambda path: settle_in(os.path.dirname(path), bool)])
def test_of_several_that_were_set_aside_the_newest_is_put_back(tmp_path, dead, look):
    path = str(tmp_path / "a")
    for number in (1, 2, 3):
        aside = set_aside(saved(tmp_path / f"b{number}", number), f"{dead[:31]}{number}")
        RENAME(aside, f"{path}.replaced-{dead[:31]}{number}")
        os.utime(f"{path}.replaced-{dead[:31]}{number}", (number % 3, number % 3))
    look(path)
    assert ckpt.load(path) == {"x": 2}


def test_gc_removes_what_has_a_successor(tmp_path, dead):
    aside = replaced_number(tmp_path, dead)
    checkpoint = ckpt.Checkpoint(x=2)
    saved(tmp_path / "b", 2)
    RENAME(tmp_path / "b", tmp_path / "ckpt-2")
    manager = ckpt.CheckpointManager(checkpoint, tmp_path)
    assert manager.gc(dry_run=True) == manager.gc() == [str(aside)]
    assert not aside.exists()


def test_digits_of_an_owner_are_no_number_of_a_checkpoint():
    assert number_of(f"ckpt-3.replaced-{'1' * 32}") is None
    assert number_of(f"ckpt-3.replaced-{'1' * 31}") == int("1" * 31)


# --- small files -------------------------------------------------------------------------------


def test_a_small_file_is_read_while_it_is_set_aside(tmp_path, monkeypatch, sshfs):
    path = str(tmp_path / "checkpoint")
    files.replace_file(path, "1")
    rename, seen = os.rename, []

    def look(source, target):
        rename(source, target)
        seen.append(files.read_file(path))

    monkeypatch.setattr(os, "rename", look)
    files.replace_file(path, "2")
    assert seen == ["1", "2"]
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("kind", ["sshfs", "nfs"])
def test_a_small_file_that_was_set_aside_is_read_until_it_is_replaced(tmp_path, request, kind):
    request.getfixturevalue(kind)
    path = str(tmp_path / "checkpoint")
    files.replace_file(path, "1")
    RENAME(path, f"{path}.replaced")
    assert files.read_file(path) == "1"
    files.replace_file(path, "2")
    assert files.read_file(path) == "2"
    assert names(tmp_path) == ["checkpoint"]
