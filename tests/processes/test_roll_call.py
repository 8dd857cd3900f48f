"""Who is alive: roll calls in memory, and real processes that die or are stopped."""

import os
import signal

import numpy as np
import pytest
from real_processes import running

import ckpt_jax as ckpt
from ckpt_jax.processes import roll_call
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.processes.patience import Patience
from ckpt_jax.processes.roll_call import Rhythm, RollCalls
from ckpt_jax.testing import MemoryService, run_processes

SECONDS = 60.0  # what nobody should have to wait for
RHYTHM = Rhythm(listen_seconds=1.0, answer_seconds=6.0, unknown_seconds=50.0)
FAST = Rhythm(listen_seconds=0.001, answer_seconds=0.5, unknown_seconds=1.0, ask_seconds=0.0)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def held(service=None, known=(), is_save=True):
    clock = Clock()
    calls = RollCalls(service or MemoryService(), RHYTHM, clock, {*known})
    return clock, calls, calls.during_a_wait(is_save)


def answered(service, number, *processes):
    for process in processes:
        service.set(f"ckpt_jax/roll/here/{number}/{process}", "", 1.0)


def test_who_is_known_and_gives_no_sign_of_life_is_lost():
    service = MemoryService()
    clock, _, lost = held(service, known=(1, 2, 3))
    assert lost([1, 2, 3]) == []
    assert service.values == {}  # nobody is asked at once
    clock.now += RHYTHM.ask_seconds
    assert lost([1, 2, 3]) == []
    assert service.values == {"ckpt_jax/roll/asked/0/who": "1-3"}
    answered(service, 0, 1, 3)
    clock.now += RHYTHM.answer_seconds
    assert lost([1, 2, 3]) == [2]
    assert service.values == {}


def test_who_lives_may_take_its_time():
    service = MemoryService()
    clock, _, lost = held(service, known=(1,))
    for number in range(50):
        clock.now += RHYTHM.ask_seconds
        assert lost([1]) == []
        answered(service, number, 1)
        clock.now += RHYTHM.answer_seconds
        assert lost([1]) == []
    assert service.values == {}


@pytest.mark.parametrize("is_save", [True, False])
def test_of_whom_nothing_was_ever_heard_may_be_late_at_first(is_save):
    clock, _, lost = held(is_save=is_save)
    found = []
    while not found and clock.now < 10 * RHYTHM.unknown_seconds:
        clock.now += 1.0
        found = lost([1])
    if is_save:
        assert found == [1]
        period = RHYTHM.ask_seconds + RHYTHM.answer_seconds
        assert RHYTHM.unknown_seconds <= clock.now <= RHYTHM.unknown_seconds + period + 1
    else:
        assert found == []


def test_a_process_answers_while_its_main_thread_waits():
    service = MemoryService()
    threads = [roll_call.answer(service, index, FAST) for index in (1, 2)]
    try:
        calls = RollCalls(service, FAST, known={1, 2, 3})
        lost = calls.during_a_wait(is_save=True)
        while not (found := lost([1, 2, 3])):
            pass
        assert found == [3]
    finally:
        for thread in threads:
            thread.close()


def test_a_meeting_names_who_is_lost_long_before_its_patience_is_over():
    service, clock = MemoryService(), Clock()

    class Waiting(MemoryService):
        """Time passes when process 0 looks for reports."""

        def list(self, prefix, timeout_seconds):
            clock.now += 1.0
            return service.list(prefix, timeout_seconds)

        def set(self, key, value, timeout_seconds):
            return service.set(key, value, timeout_seconds)

    waiting = Waiting()
    calls = RollCalls(waiting, RHYTHM, clock, {1})
    first = Processes(0, 2, waiting, calls, clock)
    with (
        pytest.raises(ckpt.BarrierTimeoutError, match="gave no sign of life") as found,
        first.meeting("meeting", 600.0) as meeting,
    ):
        meeting.conclude(None, list)
    assert found.value.processes == (1,)
    assert clock.now < 30


# --- one patience for all waits --------------------------------------------------------


def test_patience_counts_waits_and_nothing_else():
    clock = Clock()
    patience = Patience(10.0, clock)
    for expected in (7.0, 4.0):
        with patience.waiting() as left:
            clock.now += 3.0
            assert left() == expected
        clock.now += 100.0
    assert patience.left == 4.0
    with patience.waiting() as left:
        clock.now += 5.0
        assert left() == 0.0
    assert patience.left == 0.0


@pytest.mark.parametrize("seconds", [2.0, 20.0, 600.0])
def test_a_service_that_hangs_takes_no_more_than_the_patience_of_one_save(tmp_path, seconds):
    """As it does if process 0 is stopped."""
    clock = Clock()

    class Hanging(MemoryService):
        def set(self, key, value, timeout_seconds):
            clock.now += timeout_seconds
            raise TimeoutError("no answer")

        def get(self, key, timeout_seconds):
            return self.set(key, "", timeout_seconds)

        def list(self, prefix, timeout_seconds):
            return self.set(prefix, "", timeout_seconds)

    second = Processes(1, 2, Hanging(), clock=clock)
    with (
        pytest.raises(ckpt.BarrierTimeoutError, match="process 0"),
        second.meeting("saving a", seconds) as meeting,
    ):
        assert meeting.token
    assert clock.now <= min(seconds, 15.0) + 1.0  # a second more to tell the others, in vain


def test_all_waits_of_a_save_together_take_no_more_than_its_patience():
    """Process 0 comes with each of its answers when most of the patience is over."""
    clock = Clock()

    class Slow(MemoryService):
        def get(self, key, timeout_seconds):
            if key in self.values and clock.now < 10:
                clock.now += 9.0
                return self.values[key]
            clock.now += timeout_seconds
            return None

    service = Slow()
    service.set("ckpt_jax/run", "0" * 56, 1.0)
    service.set("ckpt_jax/0/led", '{"result": 7}', 1.0)
    second = Processes(1, 2, service, clock=clock)
    with (
        pytest.raises(ckpt.BarrierTimeoutError, match="within 20 s"),
        second.meeting("saving a", 20.0) as meeting,
    ):
        assert meeting.token
        assert meeting.led(None) == 7
        meeting.conclude(None, list)
    assert clock.now <= 20.0


def test_what_a_process_does_itself_costs_no_patience(tmp_path):
    """Writing may take longer than the wait for others."""
    clock = Clock()

    class Slow(ckpt.PythonState):
        def serialize(self):
            clock.now += 1000.0
            return ""

        def deserialize(self, value): ...

    def program(processes):
        if processes.index == 1:
            processes.clock = clock
        options = ckpt.CheckpointOptions(timeout_seconds=SECONDS)
        return ckpt.save(tmp_path / "a", {"slow": Slow(), "w": np.arange(3)}, options=options)

    assert run_processes(2, program) == [str(tmp_path / "a")] * 2
    assert clock.now > SECONDS


# --- real processes --------------------------------------------------------------------

LOSE = """
import numpy as np
import ckpt_jax as ckpt
from ckpt_jax.processes import current, roll_call

directory, victim, how, is_known, rhythm = arguments
if rhythm == "fast":
    current.Rhythm.of = lambda count, seconds: roll_call.Rhythm(0.05, 2.0, 3.0, 0.05)
if is_known == "True":
    ckpt.save(f"{directory}/first", {"w": np.arange(3)})
if index == int(victim):
    os.kill(os.getpid(), int(how))
try:
    ckpt.save(f"{directory}/second", {"w": np.arange(3)})
    print("saved", flush=True)
except ckpt.BarrierTimeoutError as error:
    print("failed", error.processes, error, flush=True)
os._exit(0)
"""


def lose(directory, victim, how, is_known, rhythm):
    """What the survivor of two processes says after the default options of a save."""
    (survivor,) = {0, 1} - {victim}
    arguments = [directory, victim, int(how), is_known, rhythm]
    with running(LOSE, 2, 1, *arguments) as run:
        run.wait_for_signal(victim, how)
        output = run.finish(survivor)[survivor]
        assert run.started[survivor].returncode == 0, output  # it was not aborted
    return output


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_is_named_before_jax_ends_the_others(tmp_path, how):
    output = lose(tmp_path, 1, how, True, "fast")
    assert "failed (1,)" in output and "gave no sign of life" in output, output
    assert os.listdir(tmp_path) == ["first"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("is_known", [True, False])
def test_the_default_rhythm_comes_before_the_abort(tmp_path, how, is_known):
    output = lose(tmp_path, 1, how, is_known, "default")
    assert "failed (1,)" in output and "gave no sign of life" in output, output


@pytest.mark.slow
def test_a_stopped_process_0_is_named_before_the_abort(tmp_path):
    output = lose(tmp_path, 0, signal.SIGSTOP, True, "default")
    assert "failed (0,)" in output, output
