"""Forked processes: TensorStore's threads do not survive a fork, so a child is told what to do."""

import subprocess
import sys

import pytest
from places import ROOT

PROGRAM = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore", "os.fork")
import numpy as np
import ckpt_jax as ckpt

directory, parent, work = sys.argv[1:]
path = os.path.join(directory, "a")
values = {"a": np.arange(3.0)}
checkpoint = ckpt.Checkpoint(a=np.arange(3.0))
reader = None
if parent == "saves":
    ckpt.save(path, values)
elif parent == "saves in the background":
    checkpoint.write(path, ckpt.CheckpointOptions(enable_async=True))
elif parent == "reads":
    reader = ckpt.load_checkpoint(path)

def save(): return ckpt.save(os.path.join(directory, "b"), values)
def save_in_the_background():
    checkpoint.write(os.path.join(directory, "b"), ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
def load(): return ckpt.load(path)
def restore(): return ckpt.restore(path, values)
def restore_objects(): return checkpoint.read(path)
def read_on(): return reader.get_tensor("a/.ATTRIBUTES/VARIABLE_VALUE")
def graph(): return reader.object_graph
def verify(): return ckpt.verify(path)
def latest(): return ckpt.latest_checkpoint(directory)
def manager():
    manager = ckpt.CheckpointManager(checkpoint, directory)
    return manager.restore_or_initialize()
def sync(): return checkpoint.sync()

pid = os.fork()
if pid == 0:
    signal.alarm(60)  # instead of waiting forever
    try:
        globals()[work]()
        said = "done"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(said, flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
checkpoint.sync()
print("status", status, flush=True)
if parent:
    assert ckpt.load(path)["a"].tolist() == [0, 1, 2]
"""


def outcome(directory, parent, work):
    """What the child says, when the parent has done its part."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), parent, work],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said, status = done.stdout.splitlines()
    assert status == "status 0", done.stderr
    assert done.returncode == 0, done.stderr
    return said


@pytest.mark.parametrize(
    ("parent", "work"),
    [
        ("saves", "save"),
        ("saves", "save_in_the_background"),
        ("saves", "load"),
        ("saves", "restore"),
        ("saves", "restore_objects"),
        ("saves", "verify"),
        ("saves in the background", "save"),
        ("saves in the background", "load"),
    ],
)
def test_the_child_of_a_process_that_has_saved_is_told_what_to_do(tmp_path, parent, work):
    said = outcome(tmp_path, parent, work)
    assert said.startswith("RuntimeError: process ")
    assert 'multiprocessing.get_context("spawn")' in said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    code = (
        "import sys, numpy as np, ckpt_jax as ckpt\n"
        "ckpt.save(sys.argv[1] + '/a', {'a': np.arange(3.0)})\n"
        "ckpt.Checkpoint(a=np.arange(3.0)).save(sys.argv[1] + '/ckpt')"
    )
    subprocess.run([sys.executable, "-c", code, directory], cwd=ROOT, check=True)
    return directory


@pytest.mark.parametrize("work", ["read_on", "graph", "load", "latest", "manager"])
def test_the_child_of_a_process_that_has_read_is_told_what_to_do(saved, work):
    said = outcome(saved, "reads", work)
    # Not that there is no usable checkpoint, and training begins from nothing.
    assert said.startswith("RuntimeError: process ")
    assert "forked" in said


@pytest.mark.parametrize("parent", ["saves", "saves in the background"])
def test_a_child_has_no_save_of_its_parent_to_wait_for(tmp_path, parent):
    assert outcome(tmp_path, parent, "sync") == "done"


@pytest.mark.parametrize("work", ["save", "load", "latest", "manager"])
def test_the_child_of_a_process_that_has_done_neither_may_do_both(saved, tmp_path, work):
    directory = tmp_path if work == "save" else saved
    assert outcome(directory, "", work) == "done"
