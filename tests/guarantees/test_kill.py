"""Writers that are killed: what was there stays, what was not finished never counts."""

import inspect
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

import ckpt_jax as ckpt


def tree_of(step):
    """The values of a step, small ones and large ones; children have this function too."""
    chance = np.random.default_rng(step)
    return {
        "big": chance.normal(size=(300, 1000)),
        "layers": [chance.normal(size=(20, 20)).astype(np.float32) for _ in range(20)],
        "step": step,
        "name": f"step {step}",
    }


VALUES = f"import numpy as np\n{inspect.getsource(tree_of)}"


def assert_holds_its_step(path):
    """A checkpoint has exactly the values of the step that its name says."""
    step = int(path.rpartition("-")[2])
    expected = tree_of(step)
    found = ckpt.load(path)
    assert found.pop("save_counter") == step
    assert found["big"].tobytes() == expected["big"].tobytes()
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert one.tobytes() == other.tobytes()
    assert (found["step"], found["name"]) == (step, f"step {step}")
    return step


def checkpoints_below(directory):
    return [
        str(path)
        for path in sorted(Path(directory).iterdir())
        if path.is_dir() and ".staging-" not in path.name
    ]


def assert_goes_on(directory):
    """All checkpoints are whole, the latest is one of the last two, and the next save works."""
    steps = [assert_holds_its_step(path) for path in checkpoints_below(directory)]
    latest = ckpt.latest_checkpoint(directory)
    blank = {"big": np.zeros((300, 1000)), "layers": [np.zeros((20, 20), np.float32)] * 20}
    blank["layers"] = [layer.copy() for layer in blank["layers"]]
    checkpoint = ckpt.Checkpoint(**blank, step=0, name="")
    if latest is not None:
        # The rename comes before the state file: one checkpoint may be newer than it says.
        assert assert_holds_its_step(latest) in (max(steps), max(steps) - 1)
        checkpoint.restore(latest).assert_consumed()
    else:
        assert max(steps, default=1) == 1
    number = checkpoint.save_counter + 1
    for name, value in tree_of(number).items():
        setattr(checkpoint, name, value)
    path = checkpoint.save(Path(directory, "ckpt"))
    assert assert_holds_its_step(path) == number
    assert ckpt.latest_checkpoint(directory) == path
    return number


SAVE_FOR_EVER = f"""
import sys, ckpt_jax as ckpt
{VALUES}
directory = sys.argv[1]
checkpoint = ckpt.Checkpoint(**tree_of(0))
latest = ckpt.latest_checkpoint(directory)
if latest:
    checkpoint.restore(latest).assert_consumed()
print("ready", flush=True)
while True:
    for name, value in tree_of(checkpoint.save_counter + 1).items():
        setattr(checkpoint, name, value)
    checkpoint.save(directory + "/ckpt")
    print(checkpoint.save_counter, flush=True)
"""


def child(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)  # shown if the test fails
    chance = random.Random(seed)
    for _ in range(6):
        with child(SAVE_FOR_EVER, tmp_path) as writer:
            assert writer.stdout is not None
            assert writer.stderr is not None
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
            # So many whole saves, and a part of one more.
            for _ in range(chance.randrange(3)):
                writer.stdout.readline()
            # Not a wait for anything: the random moment that the test is about.
            select.select([], [], [], chance.random() * 0.1)
            writer.kill()
            writer.wait()
        assert writer.returncode == -signal.SIGKILL
        assert_goes_on(tmp_path)
    assert len(checkpoints_below(tmp_path)) >= 6


# At the N-th call of one kind the process ends as if killed: no `finally`, no flush, no atexit.
SAVE_ONCE = f"""
import os, signal, sys, ckpt_jax as ckpt
{VALUES}
directory, event, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = ckpt.Checkpoint(**tree_of(0))
checkpoint.restore(ckpt.latest_checkpoint(directory)).assert_consumed()
for name, value in tree_of(checkpoint.save_counter + 1).items():
    setattr(checkpoint, name, value)
seen = 0
def hook(name, arguments):
    global seen
    if name == event and str(arguments[0]).startswith(directory):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
checkpoint.save(directory + "/ckpt")
"""


@pytest.fixture(scope="module")
def with_two(tmp_path_factory):
    """A function that makes a directory with two checkpoints."""
    template = tmp_path_factory.mktemp("two")
    checkpoint = ckpt.Checkpoint(**tree_of(0))
    for step in (1, 2):
        for name, value in tree_of(step).items():
            setattr(checkpoint, name, value)
        checkpoint.save(template / "ckpt")

    def make(directory):
        shutil.copytree(template, directory)
        state = directory / "checkpoint"
        assert str(template) not in state.read_text()
        return directory

    return make


POINTS = [
    ("os.mkdir", 1),  # the staging directory
    ("os.mkdir", 2),  # its shards
    ("os.mkdir", 3),  # a shard
    ("os.mkdir", 4),  # the parts
    ("os.rename", 1),  # the manifest takes its name
    ("os.rename", 2),  # the checkpoint takes its name
    ("os.rename", 3),  # the state file takes its name
    ("open", 1),  # the staging directory is locked
    ("open", 2),  # the first file that is flushed
    ("open", 5),
]


@pytest.mark.parametrize(("event", "count"), POINTS)
def test_a_writer_killed_at_a_chosen_call_leaves_whole_checkpoints(
    tmp_path, with_two, event, count
):
    directory = with_two(tmp_path / "run")
    with child(SAVE_ONCE, directory, event, count) as writer:
        output, errors = writer.communicate()
    assert writer.returncode == -signal.SIGKILL, output + errors
    assert {str(directory / f"ckpt-{n}") for n in (1, 2)} <= set(checkpoints_below(directory))
    finished = (event, count) == ("os.rename", 3)
    assert (len(checkpoints_below(directory)) == 3) == finished
    assert assert_goes_on(directory) == 3


def test_an_overwriting_save_that_is_killed_leaves_the_old_or_the_new(tmp_path):
    program = """
import os, signal, sys, numpy as np, ckpt_jax as ckpt
path, event, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
def hook(name, arguments):
    global seen
    seen += name == event
    if seen == count and name == event:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
ckpt.save(path, {"x": np.ones(100_000)}, overwrite=True)
"""
    for event, outcome in (("os.mkdir", 0), ("os.rename", 0), ("shutil.rmtree", 1)):
        path = ckpt.save(tmp_path / event, {"x": np.zeros(100_000)})
        with child(program, path, event, 1) as writer:
            output, errors = writer.communicate()
        assert writer.returncode == -signal.SIGKILL, output + errors
        assert (ckpt.load(path)["x"] == outcome).all()


def test_what_a_killed_writer_leaves_is_no_checkpoint(tmp_path, with_two):
    directory = with_two(tmp_path / "run")
    with child(SAVE_ONCE, directory, "os.rename", 2) as writer:
        writer.communicate()
    (staging,) = directory.glob("*.staging-*")
    with pytest.raises(ckpt.CheckpointNotFoundError, match=r"staging.*ckpt-1, ckpt-2"):
        ckpt.load(staging)
    with pytest.raises(ckpt.CheckpointNotFoundError, match=r"ckpt-1, ckpt-2$"):
        ckpt.load(directory / "ckpt-3")
    assert ckpt.latest_checkpoint(directory) == os.path.join(directory, "ckpt-2")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None,
    reason="strace, which kills the writer in a call, is not installed.",
)
@pytest.mark.parametrize(
    ("call", "count"),
    [
        ("write", 1),
        ("write", 2),
        ("rename", 1),
        ("rename", 2),
        ("fsync", 1),
        ("fsync", 2),
        ("fsync", 3),
    ],
)
def test_a_writer_killed_in_a_system_call_leaves_whole_checkpoints(tmp_path, with_two, call, count):
    """Inside of TensorStore too, where no Python is running; counted for each thread."""
    directory = with_two(tmp_path / "run")
    inject = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"]
    inject += ["-e", f"inject={call}:signal=KILL:when={count}"]
    program = [sys.executable, "-c", SAVE_ONCE, str(directory), "no event", "0"]
    run = subprocess.run([*inject, *program], cwd=ROOT, capture_output=True, check=False)
    if b"ptrace" in run.stderr:
        pytest.skip("This system does not let strace trace processes.")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert assert_goes_on(directory) == 3
