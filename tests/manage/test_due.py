"""When to save: the policies as values, simulated over years, and in managers."""

import os
import signal
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from managers import numbers_in, run_in, save

import ckpt_jax as ckpt
from ckpt_jax.manage.retention import CheckpointRecord, KeepAny, plan_sweep
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.testing.processes import MemoryService, run_processes

DAY = 24 * 3600.0
YEAR = 365 * DAY

pytestmark = pytest.mark.usefixtures("no_flushing")


class Clock:
    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def simulated(policy, offers, last=(None, None)):
    """The (step, time) of each save, if the program offers to save at these (step, time)."""
    saves = []
    for step, time in offers:
        if policy.due(ckpt.SaveOccasion(step, time, *last)):
            saves.append((step, time))
            last = step, time
    return saves


def steady(years, stride=1, seconds=300.0, first=0):
    """Offers at a steady pace for some years, at every `stride`-th step."""
    count = int(years * YEAR / seconds)
    return [(first + n * stride, n * seconds) for n in range(count)]


# --- values ------------------------------------------------------------------------------------


def test_each_multiple_is_saved_once_for_years_whatever_the_stride():
    for stride, first in ((1, 0), (7, 3), (150, 11)):
        offers = steady(2, stride, first=first)
        saved = [step for step, _ in simulated(ckpt.SaveEveryNSteps(100), offers)]
        last = offers[-1][0]
        expected = {}
        for step, _ in offers:
            expected.setdefault(step // 100, step)
        if first:
            del expected[0]
        assert saved == sorted(expected.values())
        assert len(saved) > last / max(stride, 100) - 2


def test_what_is_saved_every_n_steps_is_what_is_kept_every_n_steps():
    saved = [step for step, _ in simulated(ckpt.SaveEveryNSteps(1000), steady(1, 7, first=5))]
    records = tuple([CheckpointRecord(step) for step in saved])
    assert ckpt.KeepEveryNSteps(1000).keep(records) == {*saved}


def test_saves_by_time_keep_their_distance_for_years():
    saved = [time for _, time in simulated(ckpt.SaveEveryNSeconds(3600), steady(3, seconds=700.0))]
    gaps = {b - a for a, b in pairwise(saved)}
    assert saved[0] == 0 and gaps == {4200.0}  # the first offer after an hour
    assert len(saved) > 3 * YEAR / 4200 - 2


def test_given_steps_are_saved_at_the_first_offer_after_each():
    policy = ckpt.SaveAtSteps([1000, 10, 10, 500_000])
    assert policy == ckpt.SaveAtSteps(iter([10, 1000, 500_000]))
    assert policy.steps == (10, 1000, 500_000)
    saved = [step for step, _ in simulated(policy, steady(5, 3))]
    assert saved == [12, 1002, 500_001]


def test_any_of_several_saves_when_one_of_them_would():
    offers = steady(2, 1)
    policy = ckpt.SaveAny([ckpt.SaveEveryNSteps(100), ckpt.SaveAtSteps([150, 1234])])
    saved = [step for step, _ in simulated(policy, offers)]
    assert saved == sorted({*range(0, offers[-1][0] + 1, 100), 150, 1234})


def test_continuous_saves_follow_the_end_of_each_other():
    """Each save takes 17 minutes, an offer comes every 5."""
    for least, gap in ((0, 20 * 60), (3600, 3600)):
        policy = ckpt.SaveContinuously(least)
        last, until, saved = (None, None), -1.0, []
        for step, time in steady(1):
            occasion = ckpt.SaveOccasion(step, time, *last, is_saving=time < until)
            if policy.due(occasion):
                saved.append(time)
                last, until = (step, time), time + 17 * 60
        assert {b - a for a, b in pairwise(saved)} == {gap}


@given(
    seconds=st.floats(1, 1e5),
    moves=st.lists(st.tuples(st.integers(0, 500), st.floats(-1e6, 1e6)), min_size=1, max_size=60),
)
def test_a_clock_that_jumps_never_stops_the_saves(seconds, moves):
    """Once the clock runs again, a save comes within the interval."""
    policy, step, time, last = ckpt.SaveEveryNSeconds(seconds), 0, 1e9, (None, None)
    for steps, jump in moves:
        step, time = step + steps, time + jump
        if policy.due(ckpt.SaveOccasion(step, time, *last)):
            last = step, time
    assert policy.due(ckpt.SaveOccasion(step, max(time, last[1]) + seconds * 1.001, *last))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ckpt.SaveEveryNSteps(0),
        lambda: ckpt.SaveEveryNSeconds(0),
        lambda: ckpt.SaveEveryNSeconds(float("nan")),
        lambda: ckpt.SaveContinuously(-1),
        lambda: ckpt.SaveAtSteps(()),
        lambda: ckpt.SaveAny(()),
        lambda: ckpt.KeepFor(0),
        lambda: ckpt.KeepBest("loss", awaiting=-1),
    ],
)
def test_policies_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# --- what stays after years --------------------------------------------------------------------


def test_after_years_exactly_what_the_policies_say_is_there():
    """A save every two hours for three years; sweeps see only what earlier ones have left."""
    policy = KeepAny(
        (
            ckpt.KeepLatest(2),
            ckpt.KeepFor(DAY),
            ckpt.KeepEveryNSteps(100_000),
            ckpt.KeepBest("loss", 3, "min"),
        )
    )
    records, saved, most = (), [], 0
    for number in range(int(3 * YEAR / 7200)):
        step, time = number * 1997, number * 7200.0
        loss = (number * 7919 % 10_007) / 10_007 + 1e6 / (1 + step)
        saved.append(CheckpointRecord(step, time, {"loss": loss}))
        records = plan_sweep((*records, saved[-1]), policy, None, 0.0).keep
        most = max(most, len(records))
    kept = [record.number for record in records]
    last = saved[-1].time
    first_after = {}
    for record in saved:
        first_after.setdefault(record.number // 100_000, record.number)
    expected = {n for multiple, n in first_after.items() if multiple or not n}
    expected |= {record.number for record in saved if last - record.time <= DAY}
    best = sorted(saved, key=lambda record: (record.metrics["loss"], -record.number))[:3]
    expected |= {record.number for record in best}
    assert kept == sorted(expected)
    assert most <= len(first_after) + 13 + 3 + 2


def test_a_pause_removes_nothing_by_age():
    policy = ckpt.KeepFor(DAY)
    records = tuple([CheckpointRecord(n, n * 3600.0) for n in range(10)])
    assert policy.keep(records) == {*range(10)}
    later = (*records, CheckpointRecord(10, 30 * DAY))
    assert policy.keep(later) == {10}
    assert policy.keep(()) == frozenset()


# --- managers ----------------------------------------------------------------------------------


def test_a_manager_saves_when_a_policy_says_so(tmp_path):
    manager = run_in(
        tmp_path,
        max_to_keep=None,
        policies=[ckpt.SaveEveryNSteps(10), ckpt.SaveAtSteps([3])],
    )
    paths = [manager.save(step, step=step) for step in range(1, 26)]
    assert [n for n, path in enumerate(paths, 1) if path] == [3, 10, 20] == numbers_in(tmp_path)
    assert manager.save(20) is None  # at the step of the last save
    assert manager.save(27, check_interval=False, step=27) is not None
    assert manager.save(27, force=True, step=27) is not None
    assert manager.save(28) is None and manager.save(30) is not None


def test_one_list_says_when_to_save_and_what_to_keep(tmp_path):
    manager = run_in(
        tmp_path,
        max_to_keep=1,
        policies=[ckpt.SaveEveryNSteps(5), ckpt.KeepEveryNSteps(20)],
    )
    for step in range(1, 36):
        manager.save(step, step=step)
    assert numbers_in(tmp_path) == [20, 35]


def test_a_restart_counts_from_the_restored_step(tmp_path):
    def run():
        return run_in(tmp_path, policies=ckpt.SaveEveryNSteps(10), max_to_keep=None)

    save(run(), *range(1, 15))
    again = run()
    again.restore_or_initialize()
    assert [step for step in range(11, 22) if again.save(step)] == [20]
    again.restore(10)
    assert [step for step in range(11, 22) if again.save(step, step=-step)] == [20]


def test_the_interval_of_seconds_counts_from_saves_and_restores(tmp_path):
    clock = Clock()

    def run():
        return run_in(tmp_path, policies=ckpt.SaveEveryNSeconds(600), clock=clock)

    def offers(manager, first):
        saved = []
        for step in range(first, first + 30):
            clock.now += 60
            if manager.save(step, step=step):
                saved.append(step)
        return saved

    assert offers(run(), 1) == [1, 11, 21]
    clock.now += YEAR
    again = run()
    again.restore_or_initialize()
    assert offers(again, 22) == [31, 41, 51]  # after 10 minutes, not at once


def test_a_save_that_fails_is_due_again(tmp_path):
    manager = run_in(tmp_path, policies=ckpt.SaveEveryNSteps(10))

    def full(path):
        raise OSError("no room")

    assert manager.save(9) is None
    manager.checkpoint.state = Unsaveable()
    with pytest.raises(ckpt.UnsaveableError):
        manager.save(10)
    manager.checkpoint.state = 1
    assert manager.save(11).endswith("ckpt-11")


class Unsaveable(ckpt.PythonState):
    def serialize(self):
        raise RuntimeError("not now")


def test_continuous_saves_do_not_wait_for_each_other(tmp_path):
    go_on = threading.Event()
    options = ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=[lambda: go_on.wait(60) and None]
    )
    manager = run_in(tmp_path, policies=ckpt.SaveContinuously())
    assert manager.save(1, options=options)
    assert [manager.save(step, options=options) for step in (2, 3, 4)] == [None] * 3
    go_on.set()
    manager.sync()
    assert manager.save(5, options=options)
    manager.sync()
    assert numbers_in(tmp_path) == [1, 5]


def test_a_policy_of_the_program_decides(tmp_path):
    class SaveWhenTold:
        told = False

        def due(self, occasion):
            return self.told and occasion.last_step != occasion.step

    policy = SaveWhenTold()
    manager = run_in(tmp_path, policies=policy, step_counter=lambda: manager.checkpoint.step)
    assert manager.save() is None
    policy.told = True
    assert manager.save() is not None and manager.save() is None


def test_a_policy_that_asks_for_a_step_that_nobody_says_is_an_error(tmp_path):
    manager = run_in(tmp_path, policies=ckpt.SaveEveryNSteps(10))
    with pytest.raises(ValueError, match=r"manager\.save\(step\)"):
        manager.save()
    assert run_in(tmp_path, policies=ckpt.SaveEveryNSeconds(10)).save() is not None


class KeepsQuiet:
    def due(self, occasion):
        return False


def test_contradictions_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_interval or policies.*got both"):
        run_in(
            tmp_path,
            checkpoint_interval=5,
            step_counter=lambda: 0,
            policies=[ckpt.SaveEveryNSteps(10)],
        )
    with pytest.raises(TypeError, match=r"no keep\(\) and no due\(\)"):
        run_in(tmp_path, policies=["often"])


def test_processes_with_different_clocks_save_the_same_steps(tmp_path):
    """Process 0 answers for all. One asks only if the answer may differ."""
    service = MemoryService()

    def program(processes: Processes):
        clock = Clock(1e6 * processes.index)
        policy = ckpt.SaveEveryNSeconds(600)
        manager = run_in(tmp_path, policies=policy, clock=clock, max_to_keep=None)
        saved = []
        for step in range(1, 30):
            clock.now += 60 + 45 * processes.index
            if manager.save(step, step=step):
                saved.append(step)
        return saved

    assert run_processes(3, program, service) == [[1, 11, 21]] * 3
    assert numbers_in(tmp_path) == [1, 11, 21]


def test_short_steps_do_not_ask_each_time_and_all_processes_agree(tmp_path):
    service = MemoryService()

    def program(processes: Processes):
        clock = Clock()
        policy = ckpt.SaveEveryNSeconds(6)
        manager = run_in(tmp_path, policies=policy, clock=clock, max_to_keep=None)
        saved = []
        for step in range(640):
            # Steps of 0.1 s, then steps that are long; process 1 measures other times.
            clock.now += (0.1 if step < 600 else 90) * (1 + processes.index)
            if manager.save(step, step=step):
                saved.append(step)
        return saved

    first, second = run_processes(2, program, service)
    assert first == second
    gaps = [b - a for a, b in pairwise(first) if b < 600]
    assert len(gaps) >= 8 and 60 <= min(gaps) and max(gaps) <= 60 + 11
    late = [step for step in first if step >= 621]
    assert late == [*range(621, 640)]  # a save at each of them


@pytest.mark.parametrize(
    "other", [ckpt.SaveEveryNSeconds(1e9), ckpt.SaveOnPreemption(), ckpt.SaveAny((KeepsQuiet(),))]
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_is_never_missed_because_another_policy_is_not_asked_each_time(
    tmp_path, other, count
):
    def program(processes: Processes):
        steps = ckpt.SaveAny((ckpt.SaveAtSteps((5, 6)), ckpt.SaveEveryNSteps(100)))
        manager = run_in(tmp_path, policies=[other, steps], clock=Clock(), max_to_keep=None)
        return [step for step in range(1, 350) if manager.save(step, step=step)]

    first = {1} if isinstance(other, ckpt.SaveEveryNSeconds) else set()
    assert run_processes(count, program) == [sorted({5, 6, 100, 200, 300} | first)] * count


def test_steps_need_no_talk_between_processes(tmp_path):
    service = MemoryService()

    def program(processes: Processes):
        manager = run_in(tmp_path, policies=ckpt.SaveEveryNSteps(1000))
        for step in range(1, 1000):
            assert manager.save(step) is None
        return dict(service.values)

    assert run_processes(2, program, service) == [{}, {}]


def test_an_error_of_a_policy_reaches_all_processes(tmp_path):
    class Broken:
        def due(self, occasion):
            raise RuntimeError("no answer")

    def program(processes):
        return run_in(tmp_path, policies=Broken()).save(1)

    first, second = run_processes(2, program)
    assert isinstance(first, RuntimeError)
    assert isinstance(second, ckpt.ProcessError) and "no answer" in str(second)


@pytest.mark.parametrize("policies", [[], [ckpt.SaveOnPreemption(), ckpt.SaveEveryNSteps(100)]])
def test_a_notice_makes_the_save_of_the_loop_due(tmp_path, policies):
    manager = run_in(tmp_path, policies=policies or [ckpt.SaveEveryNSteps(100)])
    with ckpt.PreemptionHandler(manager) as handler:
        for step in range(1, 50):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            manager.save(step, step=step, metrics={"loss": 1.0})
            if handler.reached(step):
                break
    assert step == 7
    assert numbers_in(tmp_path) == [7]
    # With the policy, it is the save of the loop.
    assert manager.metrics(7) == ({"loss": 1.0} if policies else {})
    assert manager.save(8) is None
