"""Several at a time: savers, managers and readers of one place."""

import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.api.latest import remove_checkpoint
from ckpt_jax.store import attempts, objects
from ckpt_jax.store.files import read_file, replace_file
from ckpt_jax.store.guard import changing
from ckpt_jax.store.state_file import Writer, writers_in, writers_of

TOKEN = re.compile("[0-9a-f]{32}")


def tree(step):
    return {name: np.full((20, 5), step) for name in "abc"}


def step_of(found):
    """The step of a tree, which must not be a mixture."""
    (step,) = {int(each) for name in "abc" for each in np.unique(found[name])}
    return step


def at_once(*programs):
    """What functions return, or raise, on threads of their own."""
    results = [None] * len(programs)
    start = threading.Barrier(len(programs))

    def run(number):
        start.wait()
        try:
            results[number] = programs[number]()
        except (OSError, ckpt.CheckpointError) as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=[number]) for number in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- savers ------------------------------------------------------------------------------


def test_of_several_savers_of_one_path_one_wins_and_the_others_are_told(any_store):
    path = f"{any_store.url}/a"
    results = at_once(*[lambda step=step: ckpt.save(path, tree(step)) for step in range(6)])
    (winner,) = [step for step, result in enumerate(results) if result == path]
    assert step_of(ckpt.load(path)) == winner
    assert ckpt.verify(path).ok
    for error in results[:winner] + results[winner + 1 :]:
        assert isinstance(error, FileExistsError) and path in str(error)
    # What the others have written is gone.
    tokens = {each for key in objects.keys_below(path) for each in TOKEN.findall(key)}
    assert len(tokens) == 1


def test_of_several_overwriting_savers_what_stays_was_reported(any_store):
    path = ckpt.save(f"{any_store.url}/a", tree(9))
    results = at_once(
        *[lambda step=step: ckpt.save(path, tree(step), overwrite=True) for step in range(6)]
    )
    winners = [step for step, result in enumerate(results) if result == path]
    assert step_of(ckpt.load(path)) in winners
    assert ckpt.verify(path).ok
    for error in results:
        assert error == path or "another save has committed" in str(error)


# --- small files -------------------------------------------------------------------------


def test_a_change_that_was_overtaken_begins_again(any_store):
    path = f"{any_store.url}/file"
    replace_file(path, "a")
    calls = []

    def change():
        text = read_file(path)
        calls.append(text)
        if len(calls) == 1:
            objects.write(path, b"b")  # another program
        assert read_file(path) == text  # what it decides is about one file
        replace_file(path, text + "c")

    changing(any_store.url, change)
    assert calls == ["a", "b"]
    assert read_file(path) == "bc"


def test_a_file_that_appears_during_a_change_is_not_replaced(any_store):
    path = f"{any_store.url}/file"
    calls = []

    def change():
        text = read_file(path)
        calls.append(text)
        if len(calls) == 1:
            objects.write(path, b"b")
        replace_file(path, (text or "") + "c")

    changing(any_store.url, change)
    assert calls == [None, "b"] and read_file(path) == "bc"


def test_another_thread_that_reads_in_the_middle_of_a_change_does_not_matter(any_store):
    """It sees a file that the change has not seen, and which may not be replaced therefore."""
    path = f"{any_store.url}/file"
    replace_file(path, "a")
    calls = []

    def change():
        text = read_file(path)
        calls.append(text)
        if len(calls) == 1:
            objects.write(path, b"b")
            seen = []
            thread = threading.Thread(target=lambda: seen.append(read_file(path)))
            thread.start()
            thread.join()
            assert seen == ["b"]
        replace_file(path, text + "c")

    changing(any_store.url, change)
    assert calls == ["a", "b"] and read_file(path) == "bc"


def before_the_next_write(monkeypatch, ending, act):
    """Calls a function, which acts as another program, before a file is written next."""
    write = objects.write

    def overtaken(url, value, if_generation=None):
        if url.endswith(ending):
            monkeypatch.setattr(objects, "write", write)
            act(url)
        return write(url, value, if_generation)

    monkeypatch.setattr(objects, "write", overtaken)


def test_a_claim_keeps_that_of_another_program_that_was_faster(any_store, monkeypatch):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), any_store.url)
    manager.save()
    other = {"name": "other", "number": 7, "run": "5c9d", "process": 1, "host": "node"}

    def claim(url):
        text = objects.read(url).value.decode()
        line = f"# ckpt_jax writer {json.dumps(other)}\n"
        objects.write(url, (line + text).encode())

    successor = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), any_store.url)
    before_the_next_write(monkeypatch, "/checkpoint", claim)
    successor.save(2)
    writers = writers_of(any_store.url)
    assert writers["other"] == Writer(7, "5c9d", 1, "node")
    assert writers["ckpt"].number == 2


@pytest.mark.parametrize("moment", [1, 2], ids=["the claim", "the record"])
def test_what_another_manager_records_in_the_middle_of_a_save_stays(any_store, monkeypatch, moment):
    ckpt.CheckpointManager(ckpt.Checkpoint(step=0), any_store.url, checkpoint_name="b").save()
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), any_store.url, checkpoint_name="a")

    def record(url):
        if moment == 2:
            before_the_next_write(monkeypatch, "/checkpoint", other)
        else:
            other(url)

    def other(url):
        text = objects.read(url).value.decode()
        ckpt.save(f"{any_store.url}/b-2", {"step": 2})
        listed = 'all_model_checkpoint_paths: "b-1"\n'
        stamp = "all_model_checkpoint_timestamps"
        text = text.replace(listed, listed + listed.replace("b-1", "b-2"))
        text = text.replace(f"{stamp}:", f"{stamp}: 12\n{stamp}:", 1)
        objects.write(url, text.encode())

    before_the_next_write(monkeypatch, "/checkpoint", record)
    path = manager.save()
    state = ckpt.get_checkpoint_state(any_store.url)
    assert state.model_checkpoint_path == path
    assert {os.path.basename(each) for each in state.all_model_checkpoint_paths} == {
        *("a-1", "b-1", "b-2")
    }
    assert set(writers_in(read_file(f"{any_store.url}/checkpoint"))) == {"a", "b"}


# --- managers ----------------------------------------------------------------------------


def managers_of(url):
    return ckpt.CheckpointManager(ckpt.Checkpoint(**tree(0)), url, max_to_keep=2)


def test_a_manager_that_was_replaced_records_and_removes_nothing(any_store):
    old, new = managers_of(any_store.url), managers_of(any_store.url)
    old.save(1, **tree(1))
    old.save(2, **tree(2))
    new = managers_of(any_store.url)
    latest = new.save(3, **tree(3))
    with pytest.raises(ckpt.SupersededError, match="Nothing was saved"):
        old.save(3, **tree(4))
    with pytest.raises(ckpt.SupersededError):
        old.save(4, **tree(4))
    with pytest.raises(ckpt.SupersededError):
        old.gc()
    assert ckpt.latest_checkpoint(any_store.url) == latest
    assert step_of(ckpt.load(latest)) == 3
    assert new.steps == (2, 3)


def test_a_manager_that_is_overtaken_between_its_claim_and_its_commit_takes_nothing_away(
    any_store, monkeypatch
):
    old = managers_of(any_store.url)
    publish = attempts.Attempt.publish

    def overtaken(self, **given):
        monkeypatch.setattr(attempts.Attempt, "publish", publish)
        managers_of(any_store.url).save(1, **tree(2))
        publish(self, **given)

    monkeypatch.setattr(attempts.Attempt, "publish", overtaken)
    with pytest.raises(FileExistsError, match="another save has committed"):
        old.save(1, **tree(1))
    latest = ckpt.latest_checkpoint(any_store.url)
    assert latest == f"{any_store.url}/ckpt-1" and step_of(ckpt.load(latest)) == 2
    with pytest.raises(ckpt.SupersededError):
        old.save(2, **tree(1))
    assert ckpt.latest_checkpoint(any_store.url) == latest


# --- readers -----------------------------------------------------------------------------


def test_a_reader_beside_overwrites_and_removals_gets_one_checkpoint_or_none(any_store):
    path = ckpt.save(f"{any_store.url}/a", tree(0))
    is_done = threading.Event()

    def write():
        try:
            for step in range(1, 9):
                if step % 4 == 0:
                    remove_checkpoint(path)
                ckpt.save(path, tree(step), overwrite=True)
        finally:
            is_done.set()

    def read():
        seen = 0
        while not is_done.is_set():
            try:
                seen += 1 + step_of(ckpt.load(path))
            except ckpt.CheckpointNotFoundError:
                continue
        return seen

    written, *read = at_once(write, read, read)
    assert written is None
    assert all(isinstance(each, int) for each in read), read
    assert step_of(ckpt.load(path)) == 8


def test_a_reader_of_what_was_replaced_says_so(any_store):
    path = ckpt.save(f"{any_store.url}/a", tree(0))
    for replace in (
        lambda: ckpt.save(path, tree(1), overwrite=True),
        lambda: remove_checkpoint(path),
    ):
        with ckpt.load_checkpoint(path) as reader:
            replace()
            with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed"):
                reader.get_tensor("a")


def test_a_reader_of_the_latest_beside_collection_gets_a_whole_one(any_store):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(**tree(1)), any_store.url, max_to_keep=1)
    manager.save(1)
    is_done = threading.Event()

    def save():
        try:
            for step in range(2, 8):
                manager.save(step, **tree(step))
        finally:
            is_done.set()

    def read():
        steps = []
        while not is_done.is_set():
            try:
                steps.append(step_of(ckpt.load(ckpt.latest_checkpoint(any_store.url))))
            except ckpt.CheckpointNotFoundError:
                continue
        return steps

    saved, steps = at_once(save, read)
    assert saved is None
    assert isinstance(steps, list) and steps == sorted(steps)


# --- processes ---------------------------------------------------------------------------

PROGRAM = """
import sys
import numpy as np
import ckpt_jax as ckpt
url, number = sys.argv[1], int(sys.argv[2])
tree = lambda step: {name: np.full((20, 5), step) for name in "abc"}
manager = ckpt.CheckpointManager(
    ckpt.Checkpoint(**tree(number)), url, max_to_keep=2, checkpoint_name=f"m{number}"
)
print("ready", flush=True)
sys.stdin.readline()
try:
    ckpt.save(f"{url}/once", tree(number))
    print("once")
except FileExistsError as error:
    assert "another save has committed" in str(error) or "exists" in str(error)
for turn in range(4):
    manager.save(metrics={"loss": turn})
    try:
        ckpt.save(f"{url}/again", tree(10 * number + turn), overwrite=True)
        print("again", 10 * number + turn)
    except FileExistsError as error:
        assert "another save has committed" in str(error), error
"""


def test_processes_that_save_at_once_lose_nothing(s3):
    count = 3
    programs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, s3.url, str(number)],
            env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": PYTHONPATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for program in programs:
        assert program.stdout.readline() == "ready\n", program.stderr.read()
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    said = [program.communicate(timeout=120) for program in programs]
    assert [program.returncode for program in programs] == [0] * count, said
    (winner,) = [number for number, (out, _) in enumerate(said) if "once" in out]
    assert step_of(ckpt.load(f"{s3.url}/once")) == winner
    again = [int(line[6:]) for out, _ in said for line in out.splitlines() if "again" in line]
    assert step_of(ckpt.load(f"{s3.url}/again")) in again
    state = ckpt.get_checkpoint_state(s3.url)
    kept = {f"m{number}-{turn}" for number in range(count) for turn in (3, 4)}
    assert {os.path.basename(each) for each in state.all_model_checkpoint_paths} == kept
    assert set(writers_of(s3.url)) == {f"m{number}" for number in range(count)}
    for number in range(count):
        manager = ckpt.CheckpointManager(
            ckpt.Checkpoint(**tree(9)), s3.url, max_to_keep=2, checkpoint_name=f"m{number}"
        )
        assert manager.steps == (3, 4)
        assert manager.metrics(4) == {"loss": 3.0}
        manager.restore().assert_consumed()
        assert step_of({name: getattr(manager.checkpoint, name) for name in "abc"}) == number
