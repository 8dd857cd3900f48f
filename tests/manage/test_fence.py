"""One manager records the checkpoints of a name: one that was replaced is told so."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from google.protobuf import text_format
from managers import numbers_in, run_in, save
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.graph._proto import checkpoint_state_pb2
from ckpt_jax.store.state_file import CheckpointState, update_checkpoint_state, writers_of
from ckpt_jax.testing import run_processes

pytestmark = pytest.mark.usefixtures("no_flushing")


class Broken(ckpt.PythonState):
    def serialize(self):
        raise ValueError("not today")

    def deserialize(self, value): ...


def names(paths):
    return [os.path.basename(path) for path in paths]


def listed_in(directory):
    return names(ckpt.get_checkpoint_state(directory).all_model_checkpoint_paths)


def taken_over(directory, *steps, **arguments):
    """A manager that goes on from what is there."""
    manager = run_in(directory, **arguments)
    manager.restore_or_initialize()
    save(manager, *steps)
    return manager


# --- a manager that was replaced ----------------------------------------------------------------


@pytest.mark.parametrize("has_saved", [True, False])
def test_a_manager_that_was_replaced_moves_the_latest_nowhere(tmp_path, has_saved):
    asleep = run_in(tmp_path)
    if has_saved:
        save(asleep, 1, 2)
    awake = taken_over(tmp_path, 3, 4, 5, 6, 7)
    before, there = (tmp_path / "checkpoint").read_bytes(), numbers_in(tmp_path)
    with pytest.raises(ckpt.SupersededError, match="process .* has taken them over") as raised:
        save(asleep, 3)
    assert str(tmp_path) in str(raised.value) and "create a new manager" in str(raised.value)
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-7")
    assert numbers_in(tmp_path) == there
    assert ckpt.load(tmp_path / "ckpt-3")["step"] == 3
    save(awake, 8)
    assert listed_in(tmp_path) == [f"ckpt-{n}" for n in (4, 5, 6, 7, 8)]


def test_the_first_checkpoint_of_a_manager_that_was_replaced_stays_if_its_path_is_free(tmp_path):
    asleep = run_in(tmp_path)
    save(asleep, 1)
    awake = taken_over(tmp_path, 10, 20)
    listed = listed_in(tmp_path)
    with pytest.raises(ckpt.SupersededError, match="ckpt-2 was saved, but is not recorded"):
        save(asleep, 2)
    assert ckpt.load(tmp_path / "ckpt-2")["step"] == 2
    for step in (3, 4):  # it knows now
        with pytest.raises(ckpt.SupersededError, match="Nothing was saved"):
            save(asleep, step)
    assert numbers_in(tmp_path) == [1, 2, 10, 20]
    assert listed_in(tmp_path) == listed
    assert ckpt.latest_checkpoint(tmp_path) == awake.latest_checkpoint


@pytest.mark.parametrize("verb", ["gc", "delete"])
def test_a_manager_that_was_replaced_removes_nothing(tmp_path, verb):
    asleep = run_in(tmp_path, max_to_keep=1)
    save(asleep, 1)
    taken_over(tmp_path, 2, 3, max_to_keep=None)
    with pytest.raises(ckpt.SupersededError, match="Nothing was changed"):
        asleep.gc() if verb == "gc" else asleep.delete(1)
    assert numbers_in(tmp_path) == [1, 2, 3]


def test_a_save_in_the_background_of_a_manager_that_was_replaced_says_so(tmp_path):
    asleep = run_in(tmp_path)
    save(asleep, 1)
    taken_over(tmp_path, 2)
    with pytest.raises(ckpt.AsyncSaveError) as raised:
        save(asleep, 3, options=ckpt.CheckpointOptions(enable_async=True))
        asleep.sync()
    assert isinstance(raised.value.__cause__, ckpt.SupersededError)
    assert ckpt.load(tmp_path / "ckpt-3")["step"] == 3
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")


def test_all_processes_hear_that_their_manager_was_replaced(tmp_path):
    def program(processes):
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), tmp_path)
        found = [manager.save(1), manager.save(2)]
        if processes.index == 0:
            other = {"host": "b", "name": "ckpt", "number": 99, "process": 7, "run": "0"}
            text = (tmp_path / "checkpoint").read_text()
            (tmp_path / "checkpoint").write_text(f"# ckpt_jax writer {json.dumps(other)}\n{text}")
        for step in (3, 4):
            with pytest.raises(ckpt.CheckpointError, match="process 7 on b") as raised:
                manager.save(step)
            found.append(type(raised.value))
        return found

    saved = [str(tmp_path / "ckpt-1"), str(tmp_path / "ckpt-2")]
    first, other = run_processes(2, program)
    assert first == [*saved, ckpt.SupersededError, ckpt.SupersededError]
    assert other == [*saved, ckpt.ProcessError, ckpt.ProcessError]
    assert ckpt.latest_checkpoint(tmp_path) == saved[1]
    assert numbers_in(tmp_path) == [1, 2, 3]


STOPS = """
import os, signal, sys
import ckpt_jax as ckpt
directory, when = sys.argv[1:]
checkpoint = ckpt.Checkpoint(step=0, run="first")
manager = ckpt.CheckpointManager(checkpoint, directory)
manager.restore_or_initialize()
checkpoint.run = "first"
manager.save(2, step=2)

def stop(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)

options = ckpt.CheckpointOptions()
if when == "while it writes":
    options = ckpt.CheckpointOptions(progress=lambda done, total: done and stop())
elif when == "before it records":
    options = ckpt.CheckpointOptions(write_callbacks=[stop])
else:
    stop()
try:
    manager.save(3, step=3, options=options)
except ckpt.SupersededError as error:
    print("superseded:", error)
"""


@pytest.mark.parametrize("when", ["before it saves", "while it writes", "before it records"])
def test_a_job_that_was_stopped_and_wakes_up_takes_nothing_from_its_successor(tmp_path, when):
    save(run_in(tmp_path), 1)
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, str(tmp_path), when],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as sleeper:
        try:
            os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            successor = taken_over(tmp_path, 3, 4)
            sleeper.send_signal(signal.SIGCONT)
            output, errors = sleeper.communicate()
        finally:
            sleeper.kill()
    assert output.startswith("superseded: "), output + errors
    assert f"process {os.getpid()} on" in output
    save(successor, 5)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-5")
    assert listed_in(tmp_path) == [f"ckpt-{n}" for n in (1, 2, 3, 4, 5)]
    for step in (3, 4, 5):
        assert ckpt.verify(tmp_path / f"ckpt-{step}").ok
        assert "run" not in ckpt.load(tmp_path / f"ckpt-{step}")  # the successor's
    assert not [name for name in os.listdir(tmp_path) if ".staging-" in name]


@pytest.mark.parametrize("order", ["the first records first", "the second records first"])
def test_of_two_managers_that_begin_in_an_empty_directory_one_is_told(tmp_path, order):
    """Nothing that one of them reports is replaced by the other."""
    one, two = run_in(tmp_path), run_in(tmp_path)
    two.checkpoint.step = 22
    outcomes = []

    def second():
        try:
            outcomes.append(two.save(1))
        except ckpt.SupersededError as error:
            outcomes.append(error)

    one.checkpoint.step = 11
    if order == "the first records first":
        one.save(1)
        second()
        assert isinstance(outcomes[0], ckpt.SupersededError)
        assert ckpt.load(tmp_path / "ckpt-1")["step"] == 11
    else:
        with pytest.raises(ckpt.SupersededError, match="has replaced .*ckpt-1 before"):
            one.save(1, options=ckpt.CheckpointOptions(write_callbacks=[second]))
        assert outcomes == [str(tmp_path / "ckpt-1")]
        assert ckpt.load(tmp_path / "ckpt-1")["step"] == 22
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1")


# --- what goes on as before ---------------------------------------------------------------------


def test_each_restart_takes_over_with_a_larger_number(tmp_path):
    numbers = []
    for step in range(1, 5):
        taken_over(tmp_path, step, step + 10)
        writer = writers_of(str(tmp_path))["ckpt"]
        numbers.append(writer.number)
        assert writer.process == os.getpid()
    assert numbers == [1, 2, 3, 4]
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-14")


def test_a_manager_that_only_looks_takes_nothing_over(tmp_path):
    training = run_in(tmp_path)
    save(training, 1, 2)
    looking = run_in(tmp_path)
    looking.restore_or_initialize()
    assert looking.steps == (1, 2)
    save(training, 3)
    looking.restore(3)
    assert run_in(tmp_path, max_to_keep=2).gc() == [str(tmp_path / "ckpt-1")]
    looking.delete(2)
    save(training, 4)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-4")


def test_a_collection_by_another_manager_goes_by_what_is_recorded_now(tmp_path):
    other = run_in(tmp_path, max_to_keep=2)
    training = run_in(tmp_path)
    save(training, 1, 2, 3)
    assert names(other.gc()) == ["ckpt-1"]
    assert listed_in(tmp_path) == ["ckpt-2", "ckpt-3"]


def test_a_save_that_fails_leaves_the_writer_of_the_name(tmp_path):
    save(run_in(tmp_path), 1)
    before = (tmp_path / "checkpoint").read_bytes()
    manager = run_in(tmp_path)
    manager.checkpoint.broken = Broken()
    with pytest.raises(ckpt.UnsaveableError):
        save(manager, 2)
    assert (tmp_path / "checkpoint").read_bytes() == before


def test_going_back_and_deleting_are_no_change_of_the_writer(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 1, 2, 3)
    manager.restore(1)
    save(manager, 2)
    manager.delete(2)
    assert manager.latest_checkpoint == str(tmp_path / "ckpt-1")
    save(manager, 4)
    assert writers_of(str(tmp_path))["ckpt"].number == 1


@pytest.mark.parametrize("how", ["removed", "by another library", "from a copy", "odd"])
def test_a_state_file_that_was_replaced_by_hand_keeps_nobody_from_saving(tmp_path, how):
    manager = taken_over(tmp_path, 1)
    copy = (tmp_path / "checkpoint").read_bytes()
    manager = taken_over(tmp_path, 2)
    if how == "removed":
        (tmp_path / "checkpoint").unlink()
    elif how == "by another library":
        (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt-2"\n')
    elif how == "from a copy":
        (tmp_path / "checkpoint").write_bytes(copy)
    else:
        odd = ['{"name": "ckpt", "number": 1e999}', "{}", "{" * 3000, '{"name": ["ckpt"]}']
        large = "9" * 3000
        odd += [f'{{"name": "ckpt", "number": {large}, "process": 1, "run": "", "host": ""}}']
        text = "".join(f"# ckpt_jax writer {each}\n" for each in odd)
        (tmp_path / "checkpoint").write_text(text + 'model_checkpoint_path: "ckpt-2"\n')
    save(manager, 3)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-3")
    assert writers_of(str(tmp_path))["ckpt"].number == 2


def test_managers_of_different_names_and_plain_saves_leave_each_others_entries(tmp_path):
    last, best = run_in(tmp_path), run_in(tmp_path, checkpoint_name="best")
    plain = ckpt.Checkpoint(x=1)
    for step in (1, 2, 3):
        save(last, step, metrics={"x": 1.0})
        save(best, step * 10, metrics={"y": 2.0})
        path = plain.save(tmp_path / "plain")
        assert ckpt.latest_checkpoint(tmp_path) == path
    assert sorted(listed_in(tmp_path)) == sorted(
        ["ckpt-1", "ckpt-2", "ckpt-3", "best-10", "best-20", "best-30", "plain-3"]
    )
    assert set(writers_of(str(tmp_path))) == {"ckpt", "best"}
    assert run_in(tmp_path).steps == (1, 2, 3)
    assert run_in(tmp_path, checkpoint_name="best").steps == (10, 20, 30)
    update_checkpoint_state(tmp_path, CheckpointState(path))
    assert set(writers_of(str(tmp_path))) == {"ckpt", "best"}


def test_other_readers_of_the_state_file_see_no_writers(tmp_path):
    save(run_in(tmp_path, checkpoint_name='ü "x'), 1)
    text = (tmp_path / "checkpoint").read_text(encoding="ascii")
    assert text.startswith("# ckpt_jax writer ")
    message = checkpoint_state_pb2.CheckpointState()
    text_format.Parse(text, message)
    assert message.model_checkpoint_path == 'ü "x-1'
    assert set(writers_of(str(tmp_path))) == {'ü "x'}


SAVES = """
import sys
import ckpt_jax as ckpt
directory, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), directory, max_to_keep=None,
                                 checkpoint_name=name)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    manager.save(number, metrics={name: number}, options=ckpt.CheckpointOptions(durable=False))
"""


def test_processes_that_record_under_different_names_in_one_instant_lose_nothing(tmp_path):
    count = 12
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", SAVES, str(tmp_path), name, str(count)],
            env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": PYTHONPATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    for program in programs:
        program.communicate()
        assert program.returncode == 0
    expected = [f"{name}-{number}" for name in ("a", "b") for number in range(count)]
    assert sorted(listed_in(tmp_path)) == sorted(expected)
    for name in ("a", "b"):
        manager = run_in(tmp_path, checkpoint_name=name)
        assert [manager.metrics(n)[name] for n in range(count)] == list(np.arange(count))
