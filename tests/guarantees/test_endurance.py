"""Saves in bad company: many of them, several at a time, beside readers, on a full disk."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from faults.values import checkpoint_of, step_in, tree_of
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.api import latest
from ckpt_jax.store import fetch

# One device, because these programs only have to start quickly.
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "",
    "PYTHONPATH": PYTHONPATH,
}


def started(program, *arguments, wrap=()):
    return subprocess.Popen(
        [*wrap, sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(program, *arguments, wrap=()):
    with started(program, *arguments, wrap=wrap) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def staging_in(directory):
    return [path for path in Path(directory).rglob("*") if ".staging-" in path.name]


# --- many ------------------------------------------------------------------------------


def test_two_hundred_saves_of_changing_values_each_hold_their_own(tmp_path):
    state = {"a": np.zeros(1000), "b": [np.zeros((3, 5), np.int32)], "step": 0, "name": ""}
    checkpoint = ckpt.Checkpoint(state=state)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    options = ckpt.CheckpointOptions(durable=False, enable_async=True)
    for step in range(1, 201):
        # In place: the values of the save before must not be seen to change.
        state["a"] += 0.5
        state["b"][0] -= 1
        checkpoint.state["step"], checkpoint.state["name"] = step, f"step {step}"
        path = manager.save(options=options)
        state["a"] += 1000  # while it is being written
        manager.sync()
        state["a"] -= 1000
        found = ckpt.load(path)["state"]
        assert (found["a"] == 0.5 * step).all()
        assert (found["b"][0] == -step).all()
        assert (found["step"], found["name"]) == (step, f"step {step}")
    assert [os.path.basename(path) for path in manager.checkpoints] == ["ckpt-199", "ckpt-200"]


MEMORY = """
import resource, sys
import numpy as np
import ckpt_jax as ckpt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

values = {"big": np.zeros(250_000), "small": [np.zeros(10) for _ in range(5)]}
checkpoint = ckpt.Checkpoint(**values, step=0)
manager = ckpt.CheckpointManager(checkpoint, sys.argv[1], max_to_keep=2)
for step in range(200):
    if step == 100:
        before = resident()
    values["big"] += 1
    checkpoint.step = step
    manager.save(options=ckpt.CheckpointOptions(durable=False, enable_async=bool(step % 2)))
manager.sync()
print(resident() - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"),
    reason="This system has no /proc, which says how much memory a process has.",
)
def test_memory_stays_flat_over_two_hundred_saves(tmp_path):
    """The last hundred write 200 MB; what they may add is noise."""
    assert int(output_of(MEMORY, tmp_path)) < 16 << 20


def test_a_clock_that_jumps_decides_neither_what_is_latest_nor_what_stays(tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    checkpoint = ckpt.Checkpoint(x=np.arange(3))

    def clock():
        return chance.uniform(-1e9, 4e9)

    for number in range(1, 21):
        if number % 5 == 1:  # a new manager reads the state file of the one before
            manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=3, clock=clock)
        path = manager.save()
        os.utime(path, (chance.uniform(0, 2e9),) * 2)
        os.utime(tmp_path / "checkpoint", (chance.uniform(0, 2e9),) * 2)
        assert ckpt.latest_checkpoint(tmp_path) == path == manager.checkpoints[-1]
        numbers = [int(p.rpartition("-")[2]) for p in manager.checkpoints]
        assert numbers == sorted(numbers)
        # A new manager may take fewer for its own than there are, and then removes fewer.
        assert set(numbers) <= set(range(1, number + 1))
        there = {int(p.name[5:]) for p in tmp_path.glob("ckpt-*")}
        assert set(range(number, max(0, number - 3), -1)) <= there
    assert ckpt.load(path)["save_counter"] == 20


# --- several at a time -----------------------------------------------------------------

SAVER = """
import sys
import ckpt_jax as ckpt
from faults.values import tree_of
directory, step = sys.argv[1], int(sys.argv[2])
ckpt.save(f"{directory}/warm-{step}", {"x": 1})
print("ready", flush=True)
sys.stdin.readline()
try:
    ckpt.save(directory + "/once", tree_of(step))
    print("saved")
except FileExistsError as error:
    print("refused:", error)
for _ in range(5):
    ckpt.save(directory + "/again", tree_of(step), overwrite=True)
print("saved")
"""


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """Three savers that begin at one moment, and what each has said at its end.

    They save to "once", where nothing may be replaced, then five times to "again".
    """
    directory = tmp_path_factory.mktemp("race")
    processes = [started(SAVER, directory, step) for step in (1, 2, 3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        said.append(output.splitlines())
    return directory, said


def test_of_several_savers_to_one_path_one_wins_and_the_others_are_told(race):
    directory, said = race
    words = [first for first, _ in said]
    assert words.count("saved") == 1
    winner = words.index("saved")
    assert step_in(directory / "once") == winner + 1
    for refused in words[:winner] + words[winner + 1 :]:
        assert refused.startswith(f"refused: {directory / 'once'} exists"), refused


def test_of_several_overwriting_savers_the_last_one_stays_whole(race):
    directory, said = race
    assert [second for _, second in said] == ["saved"] * 3
    assert step_in(directory / "again") in (1, 2, 3)
    assert staging_in(directory) == []


READER = """
import os, sys
import ckpt_jax as ckpt
from faults.values import tree_of
directory = sys.argv[1]
whole, steps = 0, set()
print("ready", flush=True)
while not os.path.exists(directory + "/stop"):
    for path in (directory + "/a", ckpt.latest_checkpoint(directory)):
        try:
            found = ckpt.load(path)
        except ckpt.CheckpointNotFoundError:  # replaced or removed while it was being read
            continue
        expected = tree_of(found["step"])
        assert found["name"] == expected["name"], path
        assert found["big"].tobytes() == expected["big"].tobytes(), path
        assert all((a == b).all() for a, b in zip(found["layers"], expected["layers"]))
        steps.add(found["step"])
        whole += 1
print(whole, len(steps))
"""


def test_a_reader_beside_saves_overwrites_and_removals_sees_whole_checkpoints(tmp_path):
    """Or that one was replaced under its hands; never a mixture, and never "corrupt"."""
    checkpoint = checkpoint_of(1)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    manager.save()
    ckpt.save(tmp_path / "a", tree_of(1))
    with started(READER, tmp_path) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n", reader.communicate()
        for step in range(2, 42):
            for name, value in tree_of(step).items():
                setattr(checkpoint, name, value)
            manager.save()
            ckpt.save(tmp_path / "a", tree_of(step), overwrite=True)
            manager.gc()
        (tmp_path / "stop").touch()
        output, errors = reader.communicate()
    assert reader.returncode == 0, errors
    whole, steps = map(int, output.split())
    assert whole >= steps >= 1
    assert staging_in(tmp_path) == []


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_what_goes_while_it_is_being_read_is_not_called_corrupt(tmp_path, how):
    path = ckpt.save(tmp_path / "a", tree_of(1))
    with (
        pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed while"),
        ckpt.load_checkpoint(path) as reader,
    ):
        if how == "replaced":
            ckpt.save(path, tree_of(2), overwrite=True)
        else:
            shutil.rmtree(path)
        reader.get_tensor("big/.ATTRIBUTES/VARIABLE_VALUE")


READS = {
    "get_tensor": lambda path: ckpt.load_checkpoint(path).get_tensor("big"),
    "load": ckpt.load,
    "restore": lambda path: ckpt.restore(path, tree_of(0)),
    "read": lambda path: checkpoint_of(0).read(path),
    "load_variable": lambda path: ckpt.load_variable(path, "big"),
    "read_slices": lambda path: ckpt.io.read_slices(path, {KEY: None}),
    "verify": ckpt.verify,
}
KEY = "big/.ATTRIBUTES/VARIABLE_VALUE"


def replace_it(path):
    ckpt.save(path, tree_of(2), overwrite=True)


def begin_to_remove_it(path):
    """As `rm -r` does, which may take the manifest last."""
    for shard in Path(path, "shards").iterdir():
        shutil.rmtree(shard)


def begin_to_remove_its_index(path):
    shutil.rmtree(Path(path, "meta"))


@pytest.mark.parametrize(
    ("when", "change"),
    [
        *[("before the values", change) for change in (replace_it, begin_to_remove_it)],
        *[("before the index", change) for change in (replace_it, begin_to_remove_its_index)],
        *[(when, shutil.rmtree) for when in ("before the values", "before the index")],
    ],
)
@pytest.mark.parametrize("read", READS)
def test_replaced_comes_before_damaged_everywhere(tmp_path, monkeypatch, read, change, when):
    path = ckpt.save(tmp_path / "a", tree_of(1))
    changed = []

    def change_once(real):
        def call(*arguments, **options):
            if not changed:
                changed.append(True)
                change(path)
            return real(*arguments, **options)

        return call

    if when == "before the index":
        monkeypatch.setattr(fetch, "read_part", change_once(fetch.read_part))
    else:
        for name in ("read", "damage"):
            real = getattr(fetch.ShardedReader, name)
            monkeypatch.setattr(fetch.ShardedReader, name, change_once(real))
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed while it was"):
        READS[read](path)
    assert changed


def test_damage_that_was_there_before_is_damage(tmp_path):
    path = ckpt.save(tmp_path / "a", tree_of(1))
    begin_to_remove_it(path)
    assert not ckpt.verify(path).ok
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.io.read_slices(path, {KEY: None})


def test_the_latest_is_looked_for_again_where_it_goes_in_this_moment(tmp_path, monkeypatch):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), tmp_path, max_to_keep=1)
    manager.save()
    problem_with, seen = latest.problem_with, []

    def overtaken(path):
        seen.append(os.path.basename(path))
        if len(seen) == 1:
            monkeypatch.setattr(latest, "problem_with", problem_with)
            manager.save()
        return problem_with(path)

    monkeypatch.setattr(latest, "problem_with", overtaken)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert seen == ["ckpt-1"]


# --- refused by the system -------------------------------------------------------------

LIMITED = """
import resource, sys
import ckpt_jax as ckpt
from faults.values import tree_of
path = sys.argv[1]
ckpt.save(path + ".small", {"x": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    ckpt.save(path, tree_of(2), overwrite=True)
except OSError as error:
    print(error.errno, error)
"""


def test_a_limit_on_the_size_of_files_is_an_error_that_names_the_path(tmp_path):
    path = ckpt.save(tmp_path / "a", tree_of(1))
    number, _, text = output_of(LIMITED, path).partition(" ")
    assert int(number) == 27  # EFBIG
    assert path in text
    assert step_in(path) == 1
    assert staging_in(tmp_path) == []


FULL = """
import errno, os, shutil, sys
import ckpt_jax as ckpt
from faults.values import checkpoint_of, step_in, tree_of
directory = sys.argv[1] + "/runs"
checkpoint = checkpoint_of(1)
saved = []
try:
    for step in range(1, 50):
        for name, value in tree_of(step).items():
            setattr(checkpoint, name, value)
        saved.append(checkpoint.save(directory + "/ckpt"))
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert f"{directory}/ckpt-{len(saved) + 1}" in str(error), error
assert 2 <= len(saved) < 49, saved
assert checkpoint.save_counter == len(saved)
assert [step_in(path) for path in saved] == list(range(1, len(saved) + 1))
assert ckpt.latest_checkpoint(directory) == saved[-1]
assert not [name for name in os.listdir(directory) if "staging" in name]
shutil.rmtree(saved[0])
assert step_in(checkpoint.save(directory + "/ckpt")) == len(saved) + 1
"""


def namespace():
    """What runs a command with a tmpfs of 2 MiB on a directory that nobody else sees."""
    if shutil.which("unshare") is None:
        return None
    script = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
    return ("unshare", "--mount", "--map-root-user", "sh", "-c", script)


def can_mount(directory):
    command = namespace()
    if command is None:
        return False
    probe = subprocess.run([*command, directory, "true"], capture_output=True, check=False)
    return probe.returncode == 0


def test_a_full_disk_is_an_error_that_names_the_path_and_takes_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("This system does not let the tests mount a small file system.")
    command = namespace()
    assert command is not None
    output_of(FULL, disk, wrap=[*command, disk])


DENIED = """
import errno, logging, os, sys
import ckpt_jax as ckpt
from faults.values import checkpoint_of, step_in, tree_of
directory, warm = sys.argv[1], sys.argv[2]
ckpt.load(ckpt.save(warm + "/a", tree_of(1)))  # imports what a later user may not read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def refused(save):
    try:
        save()
    except PermissionError as error:
        assert directory in str(error), error
        assert error.filename is not None
    else:
        raise AssertionError("not refused")

os.chdir("/")
refused(lambda: ckpt.save(directory + "/closed/new", tree_of(2)))
refused(lambda: ckpt.save(directory + "/closed/below/new", tree_of(2)))
refused(lambda: ckpt.save(directory + "/closed/a", tree_of(2), overwrite=True))
checkpoint = checkpoint_of(3)
refused(lambda: checkpoint.save(directory + "/closed/ckpt"))
assert checkpoint.save_counter == 0
assert step_in(directory + "/closed/a") == 1
assert sorted(os.listdir(directory + "/closed")) == ["a"]
# What may not be removed is replaced or put away, and the save succeeds.
assert step_in(ckpt.save(directory + "/open/a", tree_of(2), overwrite=True)) == 2
"""


@pytest.fixture
def own_directory():
    """A directory outside of pytest's own, which each start of pytest closes to other users."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_without_permission_nothing_changes_and_the_error_names_the_path(own_directory):
    for name in ("closed", "open"):
        ckpt.save(own_directory / name / "a", tree_of(1))
    (own_directory / "warm").mkdir()
    for directory in (own_directory / "closed", own_directory / "open" / "a"):
        directory.chmod(0o555)
    above = [parent for parent in own_directory.parents if parent.stat().st_uid == os.geteuid()]
    modes = [(parent, parent.stat().st_mode) for parent in [own_directory, *above]]
    try:
        if os.geteuid() == 0:  # another user has to get there
            (own_directory / "open").chmod(0o777)
            for parent, mode in modes:
                if mode & 0o005 != 0o005:
                    parent.chmod(0o755)
        output_of(DENIED, own_directory, own_directory / "warm")
    finally:
        for parent, mode in modes:
            parent.chmod(mode)
        for left in own_directory.glob("*/*"):
            left.chmod(0o755)
        (own_directory / "closed").chmod(0o755)
