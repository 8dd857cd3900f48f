"""Guards: one process, and one of its threads, changes the small files of a directory at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from places import PYTHONPATH

from ckpt_jax.store import guard, staging
from ckpt_jax.store.guard import LOCK_FILE, guarded
from ckpt_jax.store.staging import Lock

ADD = """
import sys
from ckpt_jax.store.guard import guarded
directory, count = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(count):
    with guarded(directory):
        with open(directory + "/count") as file:
            number = int(file.read())
        with open(directory + "/count", "w") as file:
            file.write(str(number + 1))
"""


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_no_change_of_several_processes_and_threads_is_lost(tmp_path):
    (tmp_path / "count").write_text("0")
    programs = [started(ADD, tmp_path, 100) for _ in range(2)]

    def add():
        for _ in range(50):
            with guarded(str(tmp_path)):
                number = int((tmp_path / "count").read_text())
                (tmp_path / "count").write_text(str(number + 1))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for program in programs:
        program.communicate()
    assert (tmp_path / "count").read_text() == "300"
    assert os.listdir(tmp_path) == ["count"]


def test_who_waits_too_long_is_told_for_whom(tmp_path):
    hold = "import sys; from ckpt_jax.store.guard import guarded\n"
    hold += "with guarded(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    with started(hold, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(TimeoutError, match=f"process {holder.pid} has it") as raised,
            guarded(str(tmp_path), 0.05),
        ):
            pass
        assert raised.value.filename == str(tmp_path)
        holder.communicate()
    with guarded(str(tmp_path), 0.05):
        pass


def test_a_signal_handler_may_enter_what_it_interrupts(tmp_path):
    entered = []

    def handler(*arguments):
        with guarded(str(tmp_path), 1):
            entered.append(True)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with guarded(str(tmp_path)):
            os.kill(os.getpid(), signal.SIGUSR1)
            with guarded(str(tmp_path), 1):
                entered.append(True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert entered == [True, True]


def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks(tmp_path):
    program = """
import os, sys, threading
from ckpt_jax.store.guard import guarded
held, end = threading.Event(), threading.Event()
def hold():
    with guarded(sys.argv[1]):
        held.set()
        end.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    try:
        with guarded(sys.argv[1], 0.05):
            pass
    except TimeoutError:  # of the parent's lock, in time
        os._exit(3)
    os._exit(4)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
end.set()
thread.join()
with guarded(sys.argv[1], 1):
    print("free")
"""
    with started(program, tmp_path) as parent:
        assert parent.communicate()[0] == "3\nfree\n"


def test_where_directories_cannot_be_locked_a_file_is(tmp_path, monkeypatch):
    lock = staging._lock

    def only_files(descriptor, operation):
        is_directory = not os.readlink(f"/proc/self/fd/{descriptor}").endswith(LOCK_FILE)
        return Lock.NONE if is_directory else lock(descriptor, operation)

    monkeypatch.setattr(staging, "_lock", only_files)
    with guarded(str(tmp_path)):
        assert os.listdir(tmp_path) == [LOCK_FILE]
        with open(tmp_path / LOCK_FILE) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / LOCK_FILE) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(TimeoutError), guarded(str(tmp_path), 0.01):
            pass
    monkeypatch.setattr(staging, "_lock", lambda *arguments: Lock.NONE)
    with guarded(str(tmp_path), 0.01):  # nothing can be locked here
        pass


def test_a_directory_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with guarded(str(tmp_path / "link")):
        assert guard._guards[str(tmp_path / "real")].depth == 1
    with pytest.raises(FileNotFoundError), guarded(str(tmp_path / "absent")):
        pass
