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
from owners import ELSEWHERE, age, digits_of, ended_process, left_by_ended_process
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax import io
from ckpt_jax.api.latest import remove_checkpoint
from ckpt_jax.saving import pipeline
from ckpt_jax.store import staging as store
from ckpt_jax.store.replacing import settle
from ckpt_jax.store.staging import (
    Lock,
    is_abandoned,
    is_staging,
    joined,
    locked,
    new_file,
    remove_abandoned,
    staging_name,
    staging_of,
    why_kept,
)
from ckpt_jax.testing import run_processes

HOLD = """
import sys
from ckpt_jax.store.staging import joined, staging_name
with joined(staging_name(sys.argv[1])) as held:
    open(held.path + "/data", "w").close()
    print(held.path, flush=True)
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


def left(path, owner=None):
    """A staging directory that nobody holds, by default of a process that has ended."""
    staging = Path(left_by_ended_process(path) if owner is None else f"{path}.staging-{owner}")
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
    with joined(staging_name(path)) as held:
        assert staging_of(path) == [held.path]
        assert not remove_abandoned(held.path)
        assert os.path.isdir(held.path)
    assert remove_abandoned(held.path)
    assert staging_of(path) == []


def test_staging_is_held_as_long_as_one_of_several_is_at_work_on_it(tmp_path):
    staging = str(tmp_path / f"a.staging-{store.owner_digits()}00000000")
    with joined(staging):
        with joined(staging):
            settle(str(tmp_path / "a"))
            assert os.path.isdir(staging)
        shared: list[bool] = []
        store.leave(staging, lambda: shared.append(True))
        assert os.path.isdir(staging)
    store.leave(staging, lambda: shared.append(True))
    assert not os.path.exists(staging) and not shared
    os.mkdir(staging)
    with joined(staging):
        assert not remove_abandoned(staging)
    # Another process of this run may be at work on it, on a machine whose locks are not seen.
    assert not remove_abandoned(staging)


def test_a_save_in_the_background_holds_its_staging_until_it_is_committed(tmp_path, monkeypatch):
    commit, seen = pipeline.assemble, []

    def look(shards, tables, destination, *arguments, **options):
        seen.append((threading.current_thread().name, is_abandoned(destination)))
        return commit(shards, tables, destination, *arguments, **options)

    monkeypatch.setattr(pipeline, "assemble", look)
    checkpoint = ckpt.Checkpoint(x=1)
    checkpoint.save(tmp_path / "ckpt", ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
    assert seen == [("ckpt-save", False)]
    assert left_in(tmp_path) == []


def test_the_name_tells_the_owner(tmp_path):
    name = staging_name("a")
    assert is_staging(name)
    assert int(name[-32:][12:18], 16) == os.getpid()
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
    mine, other = left(tmp_path / "a"), left(tmp_path / "a.b")
    nested = left(mine)
    assert staging_of(str(tmp_path / "a")) == [mine]
    ckpt.save(tmp_path / "a", {"x": 1})
    assert left_in(tmp_path) == sorted(map(os.path.basename, [other, nested]))


def test_leftovers_that_cannot_be_removed_keep_nobody_from_saving(tmp_path, caplog, monkeypatch):
    staging = left(tmp_path / "a")

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", refuse)
        path = ckpt.save(tmp_path / "a", {"x": 1})
    assert ckpt.load(path) == {"x": 1}
    assert staging in caplog.text


def test_a_process_that_has_ended_is_gone_before_its_parent_has_asked_how(tmp_path):
    with another_process_that_holds_staging_for(tmp_path / "a") as (process, staging):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_abandoned(staging)


# --- other machines --------------------------------------------------------------------


def test_staging_of_another_machine_stays_until_nothing_in_it_has_changed_for_a_day(
    tmp_path, caplog
):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path)
    manager.save()
    manager.save()
    theirs = left(tmp_path / "ckpt-1", ELSEWHERE)
    old = left(tmp_path / "a", ELSEWHERE)
    age(old, 25)
    ckpt.save(tmp_path / "ckpt-1", {"x": 2}, overwrite=True)
    assert manager.gc(dry_run=True) == manager.gc() == []
    assert Path(theirs, "shards", "data").read_bytes() == b"half"
    assert theirs in caplog.text and "another machine" in caplog.text
    age(theirs, 25)
    os.utime(os.path.join(theirs, "shards", "data"))  # by its writer
    assert manager.gc() == []
    age(theirs, 25)
    assert manager.gc() == [theirs]
    ckpt.save(tmp_path / "a", {"x": 2})
    assert left_in(tmp_path) == []


def test_process_0_leaves_what_others_of_its_run_have_made_where_their_locks_are_not_seen(
    tmp_path, monkeypatch
):
    is_staged = threading.Event()
    lock = store._lock

    def unseen(descriptor, operation):  # on a client of the machine that process 0 is on
        is_client = threading.current_thread().name == "p1"
        return Lock.NONE if is_client else lock(descriptor, operation)

    monkeypatch.setattr(store, "_lock", unseen)

    class Late(ckpt.PythonState):
        def serialize(self):
            if threading.current_thread().name == "p0" and saves:
                assert is_staged.wait(60)
            return ""

        def deserialize(self, value): ...

    def write_shard(*arguments, **options):
        shard = write(*arguments, **options)
        if saves:
            is_staged.set()  # process 0 writes nothing before
        return shard

    write, saves = io.write_shard, []
    monkeypatch.setattr(io, "write_shard", write_shard)

    def program(processes):
        values = {"own": ckpt.PerProcess(processes.index), "late": Late()}
        ckpt.save(tmp_path / "a", values)  # both know the name of the run now
        with processes.meeting("waiting", 60) as meeting:
            meeting.conclude(None, lambda _: saves.append("second"))
        ckpt.save(tmp_path / "a", values, overwrite=True)

    assert run_processes(2, program) == [None, None]
    assert os.listdir(tmp_path) == ["a"]
    assert ckpt.verify(tmp_path / "a").ok


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_save_whose_staging_was_taken_away_fails_and_publishes_nothing(
    tmp_path, monkeypatch, is_made_again
):
    assemble = pipeline.assemble

    def take_away(shards, tables, destination, *arguments, **options):
        parts = assemble(shards, tables, destination, *arguments, **options)
        os.rename(destination, tmp_path / "taken")
        if is_made_again:  # as TensorStore does with directories that are missing
            os.mkdir(destination)
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "assemble", take_away)
        with pytest.raises(ckpt.CheckpointError, match="renamed or removed.*Save again"):
            ckpt.save(tmp_path / "a", {"x": 1})
    assert os.listdir(tmp_path) == ["taken"]
    assert ckpt.load(ckpt.save(tmp_path / "a", {"x": 1})) == {"x": 1}


def test_what_is_removed_has_lost_its_name_before(tmp_path, monkeypatch):
    """So a save that was taken for abandoned cannot publish a part of its checkpoint."""
    staging, rmtree, seen = left(tmp_path / "a"), store.shutil.rmtree, []

    def look(path, **options):
        seen.append((path, os.path.exists(staging)))
        rmtree(path, **options)

    monkeypatch.setattr(store.shutil, "rmtree", look)
    assert remove_abandoned(staging)
    ((path, was_there),) = seen
    assert is_staging(path) and path != staging and not was_there


def test_staging_that_is_published_while_it_is_being_judged_stays(tmp_path, monkeypatch):
    staging = left(tmp_path / "a")
    is_gone = store._is_gone

    def publish(owner):
        os.rename(staging, tmp_path / "a")
        return is_gone(owner)

    monkeypatch.setattr(store, "_is_gone", publish)
    assert not remove_abandoned(staging)
    assert (tmp_path / "a" / "shards" / "data").read_bytes() == b"half"


# --- locks -----------------------------------------------------------------------------


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    with locked(str(tmp_path)) as first, locked(str(tmp_path)) as second:
        assert (first, second) == (Lock.OURS, Lock.THEIRS)
    with locked(str(tmp_path)) as third:
        assert third is Lock.OURS


@pytest.mark.parametrize("is_file", [False, True])
def test_staging_that_others_reach_before_it_is_locked_is_made_anew(tmp_path, monkeypatch, is_file):
    path, lock, made = str(tmp_path / "a"), store._lock, []

    def lock_late(descriptor, operation):
        made.append(os.fstat(descriptor).st_ino)
        if len(made) == 1:  # collected at once
            (os.unlink if is_file else os.rmdir)(*staging_of(path))
        elif len(made) == 2:  # about to be collected
            others.append(os.open(*staging_of(path), os.O_RDONLY))
            fcntl.flock(others[0], fcntl.LOCK_EX)
        elif len(made) == 3:
            os.close(others[0])
        return lock(descriptor, operation)

    others: list[int] = []
    monkeypatch.setattr(store, "_lock", lock_late)
    with new_file(path) if is_file else joined(staging_name(path)) as held:
        assert len(made) == 3
        assert os.lstat(held.path).st_ino == made[-1]


def test_an_unlock_that_fails_takes_nothing_back(tmp_path, monkeypatch):
    flock = fcntl.flock

    def fail(descriptor, operation):
        if operation == fcntl.LOCK_UN:
            raise OSError(5, "Input/output error")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", fail)
    path = ckpt.Checkpoint(x=1).save(tmp_path / "ckpt")
    assert ckpt.latest_checkpoint(tmp_path) == path


def test_a_lock_that_fails_names_its_path(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=r"a\.staging-") as raised:
        ckpt.save(tmp_path / "a", {"x": 1})
    assert raised.value.filename is not None
    assert left_in(tmp_path) == []


# Shared file systems cannot be mounted in a test; what they answer is put in their place.


def test_on_a_shared_file_system_only_names_of_this_system_prove_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_is_local", lambda path: False)
    boot, space = store._system()
    container = str(store.Owner(boot, space ^ 1, 1, 1)) + "00000000"
    assert is_abandoned(left(tmp_path / "a"))
    assert not is_abandoned(left(tmp_path / "b", ELSEWHERE))
    assert not is_abandoned(left(tmp_path / "c", "0123456789abcdef"))
    assert not is_abandoned(left(tmp_path / "d", container))
    assert "is running" in why_kept(left(tmp_path / "e", digits_of(os.getpid(), own_start())))


def test_what_a_container_of_this_system_has_left_on_a_local_file_system_goes(tmp_path):
    boot, space = store._system()
    staging = left(tmp_path / "a", str(store.Owner(boot, space ^ 1, 1, 1)) + "00000000")
    with joined(staging):
        assert not is_abandoned(staging)
    assert is_abandoned(staging)


def own_start():
    return store.Owner.parse(store.owner_digits()).start


def test_without_locks_the_process_must_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_lock", lambda descriptor, operation: Lock.NONE)
    own = os.getpid()
    assert not is_abandoned(left(tmp_path / "a", digits_of(own, own_start())))
    # A later process has the same number.
    assert is_abandoned(left(tmp_path / "b", digits_of(own, own_start() ^ 1)))
    assert is_abandoned(left(tmp_path / "c", digits_of(ended_process())))
    assert not is_abandoned(left(tmp_path / "d", ELSEWHERE))
    assert not is_abandoned(left(tmp_path / "e", "0123456789abcdef"))
    with joined(staging_name(str(tmp_path / "f"))) as held:
        assert not remove_abandoned(held.path)


def test_where_the_system_does_not_tell_who_is_who_nothing_is_proven(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_system", lambda: (0, 0))
    assert not is_abandoned(left(tmp_path / "a", "0" * 32))


# --- on the way out --------------------------------------------------------------------


def test_a_checkpoint_that_is_being_removed_is_held(tmp_path, monkeypatch):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    rmtree, seen = store.shutil.rmtree, []

    def look(aside, **options):
        seen.append(is_abandoned(aside))
        rmtree(aside, **options)

    monkeypatch.setattr("ckpt_jax.store.directory.shutil.rmtree", look)
    remove_checkpoint(path)
    assert seen == [False]
    assert os.listdir(tmp_path) == []
