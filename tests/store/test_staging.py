"""Staging: what an owner at work holds is left alone, what nobody can hold any more goes."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax import io
from ckpt_jax.api.latest import remove_checkpoint
from ckpt_jax.store import directory as store_directory
from ckpt_jax.store import staging as store
from ckpt_jax.store.directory import checkpoints_in
from ckpt_jax.store.staging import (
    Lock,
    claim,
    is_abandoned,
    is_staging,
    joined,
    locked,
    new_directory,
    new_file,
    remove_abandoned,
    remove_leftovers,
    staging_name,
    staging_of,
)

HOLD = """
import sys
from ckpt_jax.store.staging import claim
with claim(sys.argv[1]) as staging:
    open(staging + "/data", "w").close()
    print(staging, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_that_holds_staging_for(path):
    command = [sys.executable, "-W", "error", "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().rstrip("\n")
        finally:
            process.kill()


def left_in(directory):
    return sorted(path.name for path in Path(directory).iterdir() if is_staging(str(path)))


def abandoned(path, owner="0123456789abcdef" * 2):
    """A staging directory of a process of another boot."""
    staging = Path(f"{path}.staging-{owner}")
    (staging / "shards").mkdir(parents=True)
    (staging / "shards" / "data").write_bytes(b"half")
    return str(staging)


# --- owners ----------------------------------------------------------------------------


def test_staging_of_a_process_at_work_stays_until_it_is_gone(tmp_path):
    with another_process_that_holds_staging_for(tmp_path / "a") as (process, staging):
        assert not is_abandoned(staging)
        assert not remove_abandoned(staging)
        ckpt.save(tmp_path / "a", {"x": 1})
        process.send_signal(signal.SIGSTOP)  # whoever does nothing is not gone
        ckpt.save(tmp_path / "a", {"x": 2}, overwrite=True)
        assert left_in(tmp_path) == [os.path.basename(staging)]
        process.kill()
        process.wait()
        assert is_abandoned(staging)
        ckpt.save(tmp_path / "b", {"x": 3})
        assert left_in(tmp_path) == [os.path.basename(staging)]
        ckpt.save(tmp_path / "a", {"x": 3}, overwrite=True)
        assert left_in(tmp_path) == []


def test_a_manager_collects_only_staging_whose_owner_is_gone(tmp_path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path)
    for _ in range(2):
        manager.save()
    with another_process_that_holds_staging_for(tmp_path / "ckpt-1") as (process, staging):
        assert manager.gc(dry_run=True) == manager.gc() == []
        process.kill()
        process.wait()
        assert manager.gc(dry_run=True) == manager.gc() == [staging]
    assert left_in(tmp_path) == []


def test_staging_of_this_process_is_held_until_it_is_done(tmp_path):
    path = str(tmp_path / "a")
    with claim(path) as staging:
        assert staging_of(path) == [staging]
        assert not remove_abandoned(staging)
        assert os.path.isdir(staging)
    assert staging_of(path) == []


def test_staging_is_held_as_long_as_one_of_several_is_at_work_on_it(tmp_path):
    staging = str(tmp_path / f"a.staging-{store.owner_digits()}00000000")
    with joined(staging):
        with joined(staging):
            remove_leftovers(str(tmp_path / "a"))
            assert os.path.isdir(staging)
        shared: list[bool] = []
        store.leave(staging, lambda: shared.append(True))
        assert os.path.isdir(staging)
    store.leave(staging, lambda: shared.append(True))
    assert not os.path.exists(staging) and not shared
    os.mkdir(staging)
    with joined(staging):
        assert not remove_abandoned(staging)
    assert remove_abandoned(staging)


def test_a_save_in_the_background_holds_its_staging_until_it_is_committed(tmp_path, monkeypatch):
    merge_shards, seen = io.merge_shards, []

    def look(prefixes, destination, **options):
        seen.append((threading.current_thread().name, is_abandoned(destination)))
        return merge_shards(prefixes, destination, **options)

    monkeypatch.setattr(io, "merge_shards", look)
    checkpoint = ckpt.Checkpoint(x=1)
    checkpoint.save(tmp_path / "ckpt", ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
    assert seen == [("ckpt-save", False)]
    assert left_in(tmp_path) == []


def test_the_name_tells_the_owner(tmp_path):
    name = staging_name("a")
    assert is_staging(name)
    assert int(name[-32:][8:16], 16) == os.getpid()
    assert name != staging_name("a")


def test_what_is_not_called_like_staging_is_nobody_s(tmp_path):
    for name in ("a", "a.staging-", "a.staging-0123", "a.staging-0123456789abcdeg", ".staging"):
        (tmp_path / name).mkdir()
        assert not is_abandoned(str(tmp_path / name))
        assert not remove_abandoned(str(tmp_path / name))
    link = tmp_path / f"a.staging-{'0' * 32}"
    link.symlink_to(tmp_path / "a")
    assert not remove_abandoned(str(link))
    assert len(list(tmp_path.iterdir())) == 6


def test_a_staging_directory_is_of_one_path_only(tmp_path):
    mine, other = abandoned(tmp_path / "a"), abandoned(tmp_path / "a.b")
    nested = abandoned(mine)
    assert staging_of(str(tmp_path / "a")) == [mine]
    ckpt.save(tmp_path / "a", {"x": 1})
    assert left_in(tmp_path) == sorted(map(os.path.basename, [other, nested]))


def test_leftovers_that_cannot_be_removed_keep_nobody_from_saving(tmp_path, caplog, monkeypatch):
    staging = abandoned(tmp_path / "a")

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", refuse)
        path = ckpt.save(tmp_path / "a", {"x": 1})
    assert ckpt.load(path) == {"x": 1}
    assert staging in caplog.text


# --- locks -----------------------------------------------------------------------------


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    with locked(str(tmp_path)) as first, locked(str(tmp_path)) as second:
        assert (first, second) == (Lock.OURS, Lock.THEIRS)
    with locked(str(tmp_path)) as third:
        assert third is Lock.OURS


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_staging_that_others_reach_before_it_is_locked_is_made_anew(tmp_path, make):
    made = []

    def make_slowly(staging):
        make(staging)
        made.append(staging)
        if len(made) == 1:  # collected at once
            (os.rmdir if make is new_directory else os.unlink)(staging)
        if len(made) == 2:  # about to be collected
            descriptors.append(os.open(staging, os.O_RDONLY))
            fcntl.flock(descriptors[0], fcntl.LOCK_EX)

    descriptors: list[int] = []
    with claim(str(tmp_path / "a"), make_slowly) as staging:
        assert len(set(made)) == 3
        assert staging == made[2]
    os.close(descriptors[0])
    assert left_in(tmp_path) == [os.path.basename(made[1])]


# Shared file systems cannot be mounted in a test; what they answer is put in their place.


def owner_of(process, start=None):
    start = store._start_of(process) if start is None else start
    return str(store.Owner(store._system(), process, start or 0)) + "00000000"


def ended_process():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_on_a_shared_file_system_only_names_of_this_system_prove_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_is_local", lambda path: False)
    assert is_abandoned(abandoned(tmp_path / "a", owner_of(ended_process(), 1)))
    assert not is_abandoned(abandoned(tmp_path / "b"))
    assert not is_abandoned(abandoned(tmp_path / "c", "0123456789abcdef"))
    # A process on another machine may be at work under the name of this one.
    assert not is_abandoned(abandoned(tmp_path / "d", owner_of(os.getpid())))


def test_without_locks_the_process_must_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_lock", lambda descriptor, operation: Lock.NONE)
    own = os.getpid()
    assert not is_abandoned(abandoned(tmp_path / "a", owner_of(own)))
    assert is_abandoned(abandoned(tmp_path / "b", owner_of(own, 1)))  # a later process, same number
    assert is_abandoned(abandoned(tmp_path / "c", owner_of(ended_process(), 1)))
    assert not is_abandoned(abandoned(tmp_path / "d"))
    assert not is_abandoned(abandoned(tmp_path / "e", "0123456789abcdef"))
    with claim(str(tmp_path / "f")) as staging:
        assert not remove_abandoned(staging)


def test_where_the_system_does_not_tell_who_is_who_nothing_is_proven(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_system", lambda: 0)
    monkeypatch.setattr(store, "_is_local", lambda path: False)
    assert not is_abandoned(abandoned(tmp_path / "a", "0" * 32))


# --- on the way out --------------------------------------------------------------------


def test_a_checkpoint_that_is_being_removed_is_held(tmp_path, monkeypatch):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    rmtree, seen = store.shutil.rmtree, []

    def look(aside, **options):
        seen.append(is_abandoned(aside))
        rmtree(aside, **options)

    monkeypatch.setattr("ckpt_jax.api.latest.shutil.rmtree", look)
    remove_checkpoint(path)
    assert seen == [False]
    assert os.listdir(tmp_path) == []


def test_without_an_atomic_exchange_an_overwriting_save_goes_through_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store_directory, "_exchange", lambda one, other: False)
    path = ckpt.save(tmp_path / "a", {"x": 1})
    ckpt.save(path, {"x": 2}, overwrite=True)
    assert ckpt.load(path) == {"x": 2}
    assert os.listdir(tmp_path) == ["a"]


def test_without_an_atomic_exchange_the_old_checkpoint_comes_back_or_stays_in_sight(
    tmp_path, monkeypatch
):
    """It stands aside for a moment; whatever happens then, nobody removes it."""
    monkeypatch.setattr(store_directory, "_exchange", lambda one, other: False)
    path = ckpt.save(tmp_path / "a", {"x": 1})
    rename = os.rename

    def refuse(source, target):
        if is_staging(source) and target == path:
            raise OSError(5, "Input/output error", source)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            ckpt.save(path, {"x": 2}, overwrite=True)
    assert ckpt.load(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a"]

    def die(source, target):
        if source == path or ".replaced-" in source:
            rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        patch.setattr(store, "_remove", lambda staging: None)
        with pytest.raises(KeyboardInterrupt):
            store_directory._swap(str(tmp_path / "new"), path)
    (aside,) = checkpoints_in(str(tmp_path))
    assert aside.startswith("a.replaced-")
    with pytest.raises(ckpt.CheckpointNotFoundError, match=aside):
        ckpt.load(path)
    ckpt.save(path, {"x": 3})
    assert ckpt.load(tmp_path / aside) == {"x": 1}
