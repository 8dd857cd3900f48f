"""What processes do that are not at the same moment: real ones, whose rows carry the step."""

import json
import os
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_processes import outputs_of

import ckpt_jax as ckpt
from ckpt_jax.api.checkpoint import set_save_counter
from ckpt_jax.testing import run_processes

# Each process has rows of its own in `rows`, which hold the step. The steps that a process leaves
# out, and the way it does that, are arguments. Each process prints what came of its saves.
TRAIN = """
import json
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import ckpt_jax as ckpt

directory, steps, evidence, deviation, mode, *deviants = arguments
is_async = mode == "async"
options = ckpt.CheckpointOptions(enable_async=is_async, timeout_seconds=30)
mesh = Mesh(np.array(jax.devices()), ("rows",))

def rows(step):
    return jax.make_array_from_callback(
        (len(jax.devices()), 3), NamedSharding(mesh, P("rows")), lambda box: np.full((1, 3), step)
    )

def replicated(step):
    return jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda box: np.int32(step))

kinds = {"python": int, "variable": ckpt.Variable, "replicated": replicated, "counter": int}
values = {"rows": rows(0)}
if evidence != "counter":
    values["step"] = kinds[evidence](0)
checkpoint = ckpt.Checkpoint(**values)
now = 0
manager = ckpt.CheckpointManager(
    checkpoint, directory, max_to_keep=None,
    step_counter=(lambda: now) if evidence == "counter" else None,
)
said = {}

def attempt(step, save):
    try:
        path = save()
        said[step] = path and os.path.basename(path)
    except ckpt.CheckpointError as error:
        said[step] = [type(error).__name__, str(error)]

for now in range(1, int(steps) + 1):
    checkpoint.rows = rows(now)
    if evidence == "variable":
        checkpoint.step.assign(now)
    elif evidence != "counter":
        checkpoint.step = kinds[evidence](now)
    if str(index) in deviants and now in (3, 4) and not (deviation != "skips-two" and now == 4):
        if deviation in ("skips", "skips-two"):
            continue
        if deviation == "writes":
            attempt(now, lambda: checkpoint.write(f"{directory}/ckpt-{now}", options))
            continue
        if deviation == "renames":
            attempt(now, lambda: checkpoint.save(f"{directory}/other", options))
            continue
        if deviation == "raises":
            try:
                manager.save(options=options, metrics={"loss": "low"})
            except ValueError as error:
                said[now] = ["ValueError", str(error)]
            continue
        if deviation == "saves-twice":
            attempt(f"{now} first", lambda: manager.save(options=options))
    attempt(now, lambda: manager.save(options=options))
try:
    manager.sync()
except ckpt.CheckpointError as error:
    said["sync"] = [type(error).__name__, str(error)]
print("said", json.dumps(said), flush=True)
"""


def train(directory, steps, evidence, deviation, mode="sync", deviants=(1,), count=2):
    """What each process said of its saves, by step."""
    arguments = [directory, steps, evidence, deviation, mode, *deviants]
    outputs = outputs_of(TRAIN, count, 1, *arguments)
    return [json.loads(output.rpartition("said ")[2]) for output in outputs]


def moments_in(directory):
    """The step that each committed checkpoint holds, by name; a test fails if it holds several."""
    found = {}
    for name in sorted(os.listdir(directory)):
        if name == "checkpoint" or name.endswith(".json"):
            continue
        assert ".staging-" not in name, name
        assert ckpt.verify(directory / name).ok
        (step,) = np.unique(ckpt.load(directory / name)["rows"]).tolist()
        found[name] = step
    return found


def test_a_process_that_skips_a_save_never_makes_a_checkpoint_of_two_steps(tmp_path):
    said = train(tmp_path, 6, "python", "skips")
    first, other = said[0]["3"], said[1]["4"]  # where they met
    for kind, message in (first, other):
        assert kind == "ProcessError"
        assert "process 0: CheckpointManager.save of ckpt-3, call 3" in message
        assert "process 1: CheckpointManager.save of ckpt-3, call 3" in message
        assert "step: 3 on process 0, 4 on process 1" in message
    assert moments_in(tmp_path) == {"ckpt-1": 1, "ckpt-2": 2, "ckpt-3": 5, "ckpt-4": 6}
    # Process 0 is told that the save of step 4 has failed already; then they meet again.
    assert "process 1 has tried this save before" in said[0]["4"][1]
    assert [each["5"] for each in said] == ["ckpt-3"] * 2


# Each of these in the foreground and in the background; each evidence, and each place among the
# processes, with each deviation at least once.
DEVIATIONS = [
    ("python", "skips-two", (1,)),
    ("python", "renames", (0,)),
    ("variable", "writes", (1,)),
    ("variable", "saves-twice", (0,)),
    ("replicated", "skips", (0,)),
    ("replicated", "saves-twice", (1, 2)),
    ("counter", "skips", (1, 2)),
    ("counter", "raises", (1,)),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("evidence", "deviation", "deviants"), DEVIATIONS)
def test_whatever_a_process_does_differently_all_meet_again(
    tmp_path, evidence, deviation, deviants, mode
):
    said = train(tmp_path, 10, evidence, deviation, mode, deviants, 3)
    found = moments_in(tmp_path)
    latest = os.path.basename(ckpt.latest_checkpoint(tmp_path))
    assert found[latest] == 10
    assert all(each["10"] == latest for each in said)
    assert all(any(isinstance(each, list) for each in said_by.values()) for said_by in said)


# --- in memory -------------------------------------------------------------------------

SECONDS = 60.0  # what nobody should have to wait for
DEEDS = ["save", "skip", "save twice", "write", "save again if it fails", "fail", "restore"]


class Trainer:
    """What one process does, as one of several that share a directory."""

    def __init__(self, directory, processes, is_async=False):
        self.directory, self.index = directory, processes.index
        self.options = ckpt.CheckpointOptions(enable_async=is_async, timeout_seconds=SECONDS)
        self.checkpoint = ckpt.Checkpoint(own=ckpt.PerProcess(0), step=0)
        self.manager = ckpt.CheckpointManager(self.checkpoint, directory, max_to_keep=None)
        self.said = {}

    def at(self, step):
        self.checkpoint.step = self.checkpoint.own.value = step

    def attempt(self, step, deed):
        try:
            self.said[step] = deed() or "nothing"
        except (ckpt.CheckpointError, ValueError) as error:
            self.said[step] = error
        return isinstance(self.said[step], str)

    def save(self, step, **arguments):
        return self.attempt(step, lambda: self.manager.save(options=self.options, **arguments))

    def do(self, deed, step):
        self.at(step)
        if deed == "write":
            path = f"{self.directory}/w{step}"
            self.attempt(step, lambda: self.checkpoint.write(path, self.options))
        elif deed == "fail":
            self.save(step, metrics={"loss": "low"})
        elif deed == "restore":
            self.attempt(step, lambda: self.manager.restore() and "restored")
        elif deed != "skip":
            has_saved = self.save(step)
            if deed == "save twice" or (deed == "save again if it fails" and not has_saved):
                self.save(step)


def own_steps(path):
    """The step that each process had when it saved."""
    own = ckpt.PerProcess(0, merge=lambda values, index, count: values)
    return [int(step) for step in ckpt.restore(path, {"own": own}, strict=False)["own"].value]


deeds = st.lists(st.sampled_from(DEEDS) | st.just("save"), max_size=5)


@given(st.lists(deeds, min_size=2, max_size=3), st.booleans())
@settings(max_examples=12)
def test_no_order_of_deeds_mixes_steps_or_keeps_the_processes_apart(no_flushing, plans, is_async):
    _check_plans(plans, is_async)


@pytest.mark.exhaustive
@given(st.lists(deeds, min_size=2, max_size=4), st.booleans())
@settings(max_examples=400)
def test_no_order_of_very_many_deeds_does_either(no_flushing, plans, is_async):
    _check_plans(plans, is_async)


def _check_plans(plans, is_async):
    """All processes do what is planned, then save at eight more steps."""
    length = max(map(len, plans))
    last = length + 8

    def program(processes):
        trainer = Trainer(directory, processes, is_async)
        plan = plans[processes.index]
        for step in range(1, last + 1):
            trainer.do(plan[step - 1] if step <= len(plan) else "save", step)
        trainer.attempt("sync", trainer.manager.sync)
        return trainer.said

    with tempfile.TemporaryDirectory() as directory:
        said = run_processes(len(plans), program)
        for name in os.listdir(directory):
            if name.startswith(("ckpt-", "w")):
                steps = own_steps(f"{directory}/{name}")
                assert len({*steps}) == 1 and len(steps) == len(plans), (name, steps)
        latest = ckpt.latest_checkpoint(directory)
        assert [each[last] for each in said] == [latest] * len(plans), said
        assert {*own_steps(latest)} == {last}


def test_who_skipped_a_save_that_the_others_have_given_up_meets_them_at_the_next(tmp_path):
    has_given_up = threading.Event()

    def program(processes):
        trainer = Trainer(tmp_path, processes)
        if processes.index == 0:
            trainer.at(1)
            short = ckpt.CheckpointOptions(timeout_seconds=0.2)
            with pytest.raises(ckpt.BarrierTimeoutError):
                trainer.manager.save(options=short)
            has_given_up.set()
        else:
            assert has_given_up.wait(SECONDS)
        trainer.do("save", 2)
        return trainer.said

    assert run_processes(2, program) == [{2: f"{tmp_path}/ckpt-1"}] * 2
    assert own_steps(tmp_path / "ckpt-1") == [2, 2]


def test_values_that_differ_are_named_by_their_paths(tmp_path):
    def program(processes):
        tree = {
            "model": {"w": np.arange(3) + processes.index, "same": np.ones(3)},
            "name": f"run {processes.index}",
            "lr": 0.1,
            "own": ckpt.PerProcess(processes.index),
            "noise": jax.random.key(
                processes.index
            ),  # a process may have random numbers of its own
        }
        ckpt.save(tmp_path / "a", tree)

    for error in run_processes(2, program):
        assert isinstance(error, ckpt.ProcessError)
        assert error.processes == (1,)
        text = str(error)
        assert "  process 0: ckpt.save of a, call 1\n  process 1: ckpt.save of a, call 1\n" in text
        assert "name: 'run 0' on process 0, 'run 1' on process 1" in text
        assert "model/w: digest" in text
        assert not {"lr:", "own:", "noise:", "model/same:"} & {*text.split()}
    assert os.listdir(tmp_path) == []


def test_all_count_as_process_0_does_after_their_counters_were_apart(tmp_path):
    def program(processes):
        trainer = Trainer(tmp_path, processes)
        trainer.do("save", 1)
        if processes.index == 1:
            set_save_counter(trainer.checkpoint, 7)
        for step in (2, 3):
            trainer.do("save", step)
        return trainer.said, trainer.checkpoint.save_counter

    for said, counter in run_processes(3, program):
        assert "different places: processes 0, 2 ckpt-2, process 1 ckpt-8" in str(said[2])
        assert "save_counter: 2 on processes 0, 2, 8 on process 1" in str(said[2])
        assert said[3] == f"{tmp_path}/ckpt-2"
        assert counter == 2


def test_a_wrong_argument_on_one_process_fails_all_at_once(tmp_path):
    def program(processes):
        trainer = Trainer(tmp_path, processes)
        arguments = {"model": 1} if processes.index == 1 else {}
        try:
            trainer.manager.save(options=trainer.options, **arguments)
        except (TypeError, ckpt.ProcessError) as error:
            trainer.said[1] = error
        trainer.do("save", 2)
        return trainer.said

    first, second = run_processes(2, program)
    assert "process 1 failed with TypeError" in str(first[1])
    assert isinstance(second[1], TypeError)
    assert first[2] == second[2] == f"{tmp_path}/ckpt-1"


def test_a_checkpoint_in_which_nothing_tells_the_step_is_warned_of_once(tmp_path, caplog):
    def program(processes, **named):
        checkpoint = ckpt.Checkpoint(w=jnp.zeros(3), **named)
        for number in range(5):
            checkpoint.w = checkpoint.w + 1
            if "step" in named:
                checkpoint.step = number
            checkpoint.save(tmp_path / "ckpt")

    run_processes(2, lambda processes: program(processes, step=0))
    assert "nothing in this checkpoint tells its step" not in caplog.text
    run_processes(2, program)
    assert caplog.text.count("nothing in this checkpoint tells its step") == 1
