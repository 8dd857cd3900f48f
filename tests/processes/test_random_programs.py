"""Random programs of several real processes, with one law: a checkpoint holds exactly one step.

A program is a number of runs on one directory, each of another number of processes. In a run, each
process trains and saves at every step, but may leave out a save, save twice, fail before a save,
write something else, be stopped for a while, or be killed at any moment. The next run begins with
what is there. The law, after each run:

* every committed checkpoint is whole, and the rows and the own state of all processes, and the step
  that is saved with them, are of one step;
* every save that any process has reported is there, and holds the step of which it was reported;
* what `latest_checkpoint` names can be restored, and is no older than what was reported last;
* after the last run, the first save of another manager leaves nothing of the dead processes;
* no process hangs, and none is ended by JAX unless process 0 was killed.

A seed says what the processes do and when they are killed, but not at which moment the others are
then. It is printed if a test fails; `ROUNDS` and `SEED` in the environment choose others.
"""

import contextlib
import os
import random
import secrets
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from real_processes import running

import ckpt_jax as ckpt

PROGRAM = """
import random, signal, threading, time
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import ckpt_jax as ckpt
from ckpt_jax.processes import current, roll_call

directory, seed, number, fates, steps = arguments
current.Rhythm.of = lambda count, seconds: roll_call.Rhythm(0.2, 1.5, 3.0, 0.5)
always = random.Random(seed)
common = random.Random(f"{seed}/{number}")
own = random.Random(f"{seed}/{number}/{index}")
mesh = Mesh(np.array(jax.devices()), ("rows",))

def rows(step):
    return jax.make_array_from_callback(
        (12, 2), NamedSharding(mesh, P("rows")), lambda box: np.full((12, 2), step)[box]
    )

def merge(values, index, count):
    assert len({*values}) == 1, values
    return values[0]

state = {"rows": rows(0), "own": ckpt.PerProcess(0, merge)}
if always.random() < 0.5:
    state["step"] = 0
checkpoint = ckpt.Checkpoint(**state)
step = 0
counter = {} if "step" in state else {"step_counter": lambda: step}
manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=None, **counter)
options = ckpt.CheckpointOptions(enable_async=common.random() < 0.5, timeout_seconds=6)
by_step = always.random() < 0.3
lost = 0

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def die():
    say("dies")
    os.kill(os.getpid(), signal.SIGKILL)

def stop():
    say("stops")
    os.kill(os.getpid(), signal.SIGSTOP)

def attempt(save):
    global lost
    try:
        path = save()
        if path is not None and not options.enable_async:
            say("saved", os.path.basename(path), step)
        elif path is not None:
            pending.append((os.path.basename(path), step))
    except ckpt.BarrierTimeoutError as error:
        say("failed", str(error).replace("\\n", " "))
        lost += 1
    except (ckpt.CheckpointError, ValueError) as error:
        say("failed", type(error).__name__, str(error).replace("\\n", " "))
        lost += isinstance(error.__cause__, ckpt.BarrierTimeoutError)

pending = []

def settled():
    \"\"\"A save in the background is reported when the next call does not complain of it.\"\"\"
    global lost
    try:
        manager.sync()
        for name, at in pending:
            say("saved", name, at)
    except ckpt.CheckpointError as error:
        say("failed", type(error).__name__, str(error).replace("\\n", " "))
        lost += isinstance(error.__cause__, ckpt.BarrierTimeoutError)
    pending.clear()

def leave():
    say("leaves", "without farewell" if lost else "")
    if lost:
        os._exit(0)  # a farewell would wait for the dead

try:
    manager.restore_or_initialize()
except ckpt.CheckpointError as error:
    say("failed to restore", type(error).__name__, str(error).replace("\\n", " "))
    lost += 1
    leave()
held = {int(value) for shard in checkpoint.rows.addressable_shards for value in shard.data.ravel()}
held |= {checkpoint.own.value, getattr(checkpoint, "step", checkpoint.own.value)}
if len(held) > 1:
    say("MIXED", held)
step = first = checkpoint.own.value
say("restored", step)
kind, at, _ = fates.split(",")[index].split("-")
act = {"dies": die, "stops": stop}.get(kind)
if act and float(at) < 1:  # at any moment, else before a step
    threading.Timer(float(at), act).start()
while step < first + int(steps) and lost < 2:
    step += 1
    if act and float(at) >= 1 and step == first + int(float(at)):
        act()
    checkpoint.rows, checkpoint.own.value = rows(step), step
    if "step" in state:
        checkpoint.step = step
    deed = own.choices(
        ["save", "skip", "twice", "fail", "write", "again"], [20, 2, 1, 1, 1, 1]
    )[0] if kind != "behaves" else "save"
    save = lambda: manager.save(step if by_step else None, options=options)
    if deed == "skip":
        continue
    if deed == "write":
        attempt(lambda: checkpoint.write(f"{directory}/w-{number}-{step}", options))
    elif deed == "fail":
        attempt(lambda: manager.save(options=options, metrics={"loss": "low"}))
    else:
        before = lost
        attempt(save)
        if deed == "twice" or (deed == "again" and lost > before):
            attempt(save)
    settled()
leave()
"""

LONGEST_SECONDS = 90  # of a run


def fate_of(chance: random.Random) -> str:
    """What happens to a process: how it ends or stops, when, and for how long."""
    kind = chance.choices(["deviates", "behaves", "dies", "stops"], [4, 3, 1, 1])[0]
    at = chance.choice([chance.uniform(0, 0.9), float(chance.randrange(1, 8))])
    return f"{kind}-{at:.3f}-{chance.choice([0.2, 1.0, 5.0])}"


def play(directory: Path, seed: str, number: int, fates: list[str]) -> list[str]:
    """One run. Returns what each process said."""
    arguments = [directory, seed, number, ",".join(fates), 12]
    with running(PROGRAM, len(fates), 1, *arguments) as run:
        for process, fate in zip(run.started, fates, strict=True):
            if fate.startswith("stops"):
                wake = threading.Thread(target=continued, args=[process.pid, float(fate[-3:])])
                wake.daemon = True
                wake.start()
        outputs = []
        for process in run.started:
            try:
                outputs.append(process.communicate(timeout=LONGEST_SECONDS)[0])
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                pytest.fail(f"a process hangs: {process.communicate()[0]}")
        codes = [process.returncode for process in run.started]
    is_calm = not any(fate.startswith(("dies", "stops")) for fate in fates)
    is_calm &= not any("without farewell" in output for output in outputs)
    for output, code, fate in zip(outputs, codes, fates, strict=True):
        assert (
            code == 0
            or (fate.startswith("dies") and code == -signal.SIGKILL)
            or (code == -signal.SIGABRT and not is_calm)
        ), output
        assert "Traceback" not in output and "MIXED" not in output, output
    return outputs


def continued(process: int, seconds: float) -> None:
    """Lets a process go on, some time after it has stopped itself."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, process, os.WSTOPPED)
        threading.Event().wait(seconds)
        os.kill(process, signal.SIGCONT)


def check(directory: Path, reported: dict[str, int]) -> None:
    """The law, as far as files show it."""
    steps = {}
    for name in os.listdir(directory):
        if not name.startswith(("ckpt-", "w-")) or ".staging-" in name:
            continue
        path = directory / name
        assert ckpt.verify(path).ok, name
        own = ckpt.PerProcess(0, merge=lambda values, index, count: values)
        loaded = ckpt.load(path, only=["rows", "step"])
        found = {int(each) for each in np.unique(loaded["rows"])}
        ckpt.restore(path, {"own": own}, strict=False)
        found |= {int(each) for each in np.ravel(own.value)}  # of one process it is no list
        found |= {int(loaded["step"])} if "step" in loaded else set()
        assert len(found) == 1, (name, found)
        steps[name] = found.pop()
    assert reported.items() <= steps.items(), (reported, steps)
    if numbered := [step for name, step in reported.items() if name.startswith("ckpt-")]:
        latest = ckpt.latest_checkpoint(directory)
        assert steps[os.path.basename(latest)] >= max(numbered)


def check_cleaned(directory: Path) -> None:
    """The first save of the next run removes what the others, which are all dead, have left."""
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), directory, max_to_keep=None)
    manager.save(1_000_000)
    left = [name for name in os.listdir(directory) if name.startswith(("ckpt-", "checkpoint"))]
    assert not [name for name in left if ".staging-" in name or ".replaced" in name], left


def try_program(directory: Path, seed: str, runs: int) -> None:
    chance = random.Random(f"{seed}/fates")
    reported: dict[str, int] = {}
    said = []
    try:
        for number in range(runs):
            fates = [fate_of(chance) for _ in range(chance.choice([1, 2, 2, 3]))]
            said.append((fates, play(directory, seed, number, fates)))
            for line in "\n".join(said[-1][1]).splitlines():
                if line.startswith("saved "):
                    _, name, step = line.split()
                    reported[name] = int(step)
            check(directory, reported)
        check_cleaned(directory)
    except BaseException:
        print(f"seed {seed}")
        for fates, outputs in said:
            print(fates, *outputs, sep="\n")
        raise


def test_a_random_program_never_makes_a_checkpoint_of_two_steps(tmp_path):
    try_program(tmp_path, os.environ.get("SEED") or secrets.token_hex(4), 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(int(os.environ.get("ROUNDS", "20"))))
def test_no_random_program_does(tmp_path, number):
    try_program(tmp_path, f"{os.environ.get('SEED', '0')}/{number}", 5)
