"""Meetings of processes, and saves that need them, in memory: threads that share a service."""

import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import COMMIT, Processes
from ckpt_jax.saving import pipeline
from ckpt_jax.store import staging
from ckpt_jax.testing import MemoryService, run_processes

SECONDS = 60.0  # what nobody should have to wait for
SHORT = 0.2


def meet(processes, report=None, act=list, what="meeting", seconds=SECONDS):
    with processes.meeting(what, seconds) as meeting:
        return meeting.conclude(report, act)


# --- meetings --------------------------------------------------------------------------


def test_process_0_acts_on_the_reports_of_all_and_all_hear_what_came_of_it():
    acted = []

    def act(reports):
        acted.append(threading.current_thread().name)
        return [sum(reports), reports]

    results = run_processes(3, lambda p: meet(p, 10**p.index, act))
    assert results == [[111, [1, 10, 100]]] * 3
    assert acted == ["p0"]


def test_one_process_meets_nobody():
    assert meet(Processes(), 7, lambda reports: reports) == [7]
    with pytest.raises(ZeroDivisionError), Processes().meeting("meeting", SECONDS):
        _ = 1 / 0


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_who_fails_before_its_report_fails_all_at_once(failing):
    def program(processes):
        with processes.meeting("meeting", SECONDS) as meeting:
            if meeting.index == failing:
                raise ValueError("no space")
            return meeting.conclude(None, list)

    results = run_processes(3, program)
    assert str(results.pop(failing)) == "no space"
    for error in results:
        assert isinstance(error, ckpt.ProcessError)
        assert str(error) == f"meeting: process {failing} failed with ValueError: no space"
        assert error.processes == (failing,)


def test_what_process_0_says_beforehand_is_heard_by_all():
    def program(processes):
        with processes.meeting("meeting", SECONDS) as meeting:
            return meeting.led(processes.index), meeting.conclude(None, len)

    assert run_processes(3, program) == [(0, 3)] * 3


def test_who_waits_for_process_0_to_say_something_hears_of_its_failure_or_names_it():
    def failing(processes):
        with processes.meeting("meeting", SECONDS) as meeting:
            if meeting.leads:
                raise ValueError("no")
            meeting.led(None)

    first, second = run_processes(2, failing)
    assert isinstance(first, ValueError)
    assert isinstance(second, ckpt.ProcessError)
    assert "process 0 failed with ValueError: no" in str(second)

    def late(processes):
        if processes.index:
            with processes.meeting("meeting", 0.1) as meeting:
                meeting.led(None)

    absent, waiting = run_processes(2, late)
    assert absent is None
    assert isinstance(waiting, ckpt.BarrierTimeoutError)
    assert waiting.processes == (0,)


def test_where_process_0_fails_to_act_all_fail():
    results = run_processes(3, lambda p: meet(p, None, lambda reports: 1 / 0))
    assert isinstance(results[0], ZeroDivisionError)
    for error in results[1:]:
        assert isinstance(error, ckpt.ProcessError)
        assert error.processes == (0,)


def test_an_interrupted_process_is_interrupted_and_the_others_hear_of_it():
    def program(processes):
        try:
            with processes.meeting("meeting", SECONDS) as meeting:
                if meeting.index == 1:
                    raise KeyboardInterrupt
                return meeting.conclude(None, list)
        except KeyboardInterrupt:
            return "interrupted"

    error, interrupted = run_processes(2, program)
    assert interrupted == "interrupted"
    assert "process 1 failed with KeyboardInterrupt" in str(error)


@pytest.mark.parametrize("late", [(1,), (2, 3), (0,), (0, 2)])
def test_who_is_late_is_named_by_all_the_others(late):
    over = threading.Barrier(4)

    def program(processes):
        try:
            with processes.meeting("meeting", SHORT) as meeting:
                if meeting.index in late:
                    over.wait()
                    return meeting.conclude(None, list)
                try:
                    return meeting.conclude(None, list)
                finally:
                    over.wait()
        except ckpt.BarrierTimeoutError as error:
            return error

    results = run_processes(4, program)
    for error in results:
        assert isinstance(error, ckpt.BarrierTimeoutError), error
        assert error.processes == late
    names = ", ".join(map(str, late))
    assert any(f" {names} of 4 did not arrive within 0.2 s" in str(error) for error in results)


def test_a_process_that_hears_nothing_after_the_decision_says_that_it_does_not_know():
    heard = threading.Event()

    def program(processes):
        def act(reports):
            heard.wait()
            return "committed"

        try:
            return meet(processes, None, act, seconds=SHORT)
        finally:
            if processes.index == 1:
                heard.set()

    committed, error = run_processes(2, program)
    assert committed == "committed"
    assert isinstance(error, ckpt.BarrierTimeoutError)
    assert error.processes == (0,)
    assert "it is not known whether the checkpoint was committed" in str(error)


def test_processes_that_do_different_things_are_told_so():
    results = run_processes(2, lambda p: meet(p, what="saving x" if p.index else "restoring x"))
    for error in results:
        assert isinstance(error, ckpt.ProcessError)
        assert "process 0: restoring\n" in str(error)
        assert "process 1: saving\n" in str(error)


def test_the_service_does_not_fill_up():
    service = MemoryService()
    sizes = []

    def program(processes):
        for number in range(200):
            meet(processes, number)
            if processes.index == 0:
                sizes.append(len(service.values))

    run_processes(3, program, service)
    assert max(sizes) <= 20


def test_meetings_that_overlap_do_not_lose_each_others_outcome():
    """As saves of two checkpoints in the background do."""

    def program(processes):
        first = processes.meeting("first", SECONDS)
        for number in range(5):
            meet(processes, number)
        with first:
            return first.conclude(processes.index, list)

    assert run_processes(2, program) == [[0, 1], [0, 1]]


def test_tokens_agree_and_differ_from_meeting_to_meeting():
    def program(processes):
        tokens = []
        for _ in range(2):
            with processes.meeting("meeting", SECONDS) as meeting:
                tokens.append(meeting.token)
                meeting.conclude(None, list)
        return tokens

    first, other = run_processes(2, program)
    assert first == other
    assert len({*first}) == 2
    assert all(len(token) == 32 and int(token, 16) >= 0 for token in first)
    assert run_processes(2, program)[0] != first


# --- saving ----------------------------------------------------------------------------


def state_of(index):
    return {
        "w": jnp.arange(12.0).reshape(3, 4),
        "n": np.arange(5),
        "step": 3,
        "data": ckpt.PerProcess({"position": 10 + index, "seen": ["a"] * (index + 1)}),
    }


def blank_state(merge=None):
    return {
        "w": jnp.zeros((3, 4)),
        "n": np.zeros(5, int),
        "step": 0,
        "data": ckpt.PerProcess({"position": 0, "seen": []}, merge),
    }


def test_a_save_waits_twice_at_most(tmp_path):
    service = MemoryService()

    def program(processes):
        for number in range(3):
            ckpt.save(tmp_path / str(number), state_of(processes.index))

    assert run_processes(2, program, service) == [None, None]
    # Process 1 waits for three outcomes, and once for the name of the run.
    assert service.waits == {"p1": 4}


def test_values_of_the_host_are_those_of_process_0_and_others_are_each_ones_own(tmp_path):
    path = tmp_path / "a"

    def program(processes):
        ckpt.save(path, state_of(processes.index))
        target = {
            **blank_state(),
            "data": ckpt.PerProcess({"position": 0, "seen": ["x"] * (processes.index + 1)}),
        }
        return ckpt.restore(path, target)

    for index, restored in enumerate(run_processes(3, program)):
        assert restored["data"].value == {"position": 10 + index, "seen": ["a"] * (index + 1)}
        assert restored["step"] == 3
        assert np.array_equal(restored["w"], np.arange(12.0).reshape(3, 4))
    assert os.listdir(tmp_path) == ["a"]
    assert ckpt.verify(path).ok


def test_another_number_of_processes_is_an_error_unless_they_are_merged(tmp_path):
    path = tmp_path / "a"
    run_processes(3, lambda p: ckpt.save(path, state_of(p.index)))

    def merge(values, index, count):
        return {"positions": [value["position"] for value in values][index::count]}

    with pytest.raises(ckpt.ProcessError, match="data: saved by 3 processes"):
        ckpt.restore(path, blank_state())
    alone = ckpt.restore(path, blank_state(merge))
    assert alone["data"].value == {"positions": [10, 11, 12]}
    two = run_processes(2, lambda p: ckpt.restore(path, blank_state(merge))["data"].value)
    assert two == [{"positions": [10, 12]}, {"positions": [11]}]


def test_what_does_not_fit_the_state_of_a_process_is_reported(tmp_path):
    path = ckpt.save(tmp_path / "a", {"data": ckpt.PerProcess({"position": 1})})
    with pytest.raises(ckpt.RestoreMismatchError, match="data/process-0/place"):
        ckpt.restore(path, {"data": ckpt.PerProcess({"place": 1})})


def test_different_objects_are_no_save_and_leave_nothing(tmp_path):
    def program(processes):
        layers = [{"w": np.zeros(3)}, {"w": np.zeros(3 + (processes.index == 2))}]
        ckpt.save(tmp_path / "a", {"layers": layers, "step": 1})

    for error in run_processes(4, program):
        assert isinstance(error, ckpt.ProcessError)
        assert error.processes == (2,)
        assert "the objects of process 2 are not the same as on process 0" in str(error)
        assert "differ below layers/1. All" in str(error)
    assert os.listdir(tmp_path) == []


def test_different_places_are_no_save(tmp_path):
    def program(processes):
        ckpt.save(tmp_path / f"a-{processes.index}", {"w": np.zeros(3)})

    for error in run_processes(2, program):
        assert "save to different places: process 0 a-0, process 1 a-1" in str(error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("enable_async", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_process_fails_on_all_and_can_be_repeated(
    tmp_path, failing, enable_async
):
    options = CheckpointOptions(enable_async=enable_async, timeout_seconds=SECONDS)

    class Fragile(ckpt.PythonState):
        def serialize(self):
            if self.is_broken:
                raise OSError("iterator lost")
            return "fine"

        def deserialize(self, value):
            self.text = value

    def program(processes):
        fragile = Fragile()
        fragile.is_broken = processes.index == failing
        checkpoint = ckpt.Checkpoint(w=np.arange(3), fragile=fragile)
        errors = []
        try:
            checkpoint.save(tmp_path / "ckpt", options)
            checkpoint.sync()
        except Exception as error:
            errors.append(error)
        fragile.is_broken = False
        path = checkpoint.save(tmp_path / "ckpt", options)
        checkpoint.sync()
        return errors, os.path.basename(path)

    results = run_processes(3, program)
    for index, (errors, name) in enumerate(results):
        (error,) = errors
        assert "iterator lost" in str(error)
        # Some hear of it before their part has gone to the background.
        late = (ckpt.AsyncSaveError,) if enable_async else ()
        other = (ckpt.ProcessError, *late)
        assert isinstance(error, ckpt.UnsaveableError if index == failing else other)
        assert name == "ckpt-1"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1"]


def test_a_failed_background_save_is_raised_on_all_and_the_next_one_works(tmp_path):
    options = CheckpointOptions(enable_async=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        with pytest.raises((FileExistsError, ckpt.AsyncSaveError)):
            checkpoint.write(tmp_path / "taken", options)
            checkpoint.sync()
        checkpoint.write(tmp_path / "free", options)
        checkpoint.sync()
        return True

    assert run_processes(2, program) == [True, True]
    assert ckpt.load(tmp_path / "free")["w"].tolist() == [0, 1, 2]


def test_the_next_save_raises_on_each_process_what_failed_in_the_background(tmp_path):
    options = CheckpointOptions(enable_async=True)

    def refuse():
        raise ValueError("not today")

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        checkpoint.write(
            tmp_path / "a", CheckpointOptions(enable_async=True, write_callbacks=[refuse])
        )
        try:
            checkpoint.write(tmp_path / "b", options)
        except ckpt.AsyncSaveError as error:
            checkpoint.sync()
            return str(error)

    for message in run_processes(3, program):
        assert "not today" in message
    # It has begun all the same: had one of them no error, it would have waited for the others.
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("busy", [0, 1])
def test_process_0_says_for_all_whether_a_save_is_skipped(tmp_path, busy):
    """The callbacks of a save are its end on each process; one of them holds it up."""
    returned = threading.Event()
    options = CheckpointOptions(enable_async=True, when_busy="skip")

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        manager = ckpt.CheckpointManager(checkpoint, tmp_path / "managed")
        held = [lambda: returned.wait()] if processes.index == busy else []
        checkpoint.save(tmp_path / "c", CheckpointOptions(enable_async=True, write_callbacks=held))
        if processes.index != busy:
            checkpoint.sync()
        found = [checkpoint.save(tmp_path / "c", options), checkpoint.save_counter]
        if processes.index == 0:
            returned.set()
        checkpoint.sync()
        if busy == 0:
            assert manager.save(options=options) is not None
            manager.sync()
        return found

    expected = [None, 1] if busy == 0 else [str(tmp_path / "c-2"), 2]
    assert run_processes(3, program) == [expected] * 3
    names = {"c-1", "checkpoint", "managed"} if busy == 0 else {"c-1", "c-2", "checkpoint"}
    assert names <= set(os.listdir(tmp_path)) <= names | {"managed"}


@pytest.mark.parametrize("failing", [0, 1])
def test_where_a_save_may_be_skipped_what_failed_before_is_raised_all_the_same(tmp_path, failing):
    options = CheckpointOptions(when_busy="skip")

    def refuse():
        raise ValueError("not today")

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        refusing = [refuse] if processes.index == failing else []
        checkpoint.write(
            tmp_path / "a", CheckpointOptions(enable_async=True, write_callbacks=refusing)
        )
        checkpoint._runs().background._is_done.wait()
        try:
            checkpoint.write(tmp_path / "b", options)
        except ckpt.AsyncSaveError as error:
            failed = "not today" in str(error)
        else:
            failed = None
        return failed, checkpoint.write(tmp_path / "c", options)

    for index, found in enumerate(run_processes(2, program)):
        # What process 0 calls back belongs to the save, which has then failed for all.
        assert found == (True if failing in (0, index) else None, str(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_files_that_go_with_the_failure_of_another_process_are_not_what_is_raised(tmp_path):
    failed = threading.Event()

    def program(processes):
        try:
            with processes.meeting("meeting", SECONDS) as meeting:
                if meeting.leads:
                    raise ValueError("no space")
                failed.wait()
                (tmp_path / "gone").read_text()
        finally:
            failed.set()

    first, other = run_processes(2, program)
    assert str(first) == "no space"
    assert str(other) == "meeting: process 0 failed with ValueError: no space"
    assert isinstance(other.__cause__, FileNotFoundError)


def test_a_late_process_leaves_nothing_behind(tmp_path):
    over = threading.Event()

    def program(processes):
        class Slow(ckpt.PythonState):
            def serialize(self):
                if processes.index == 1:
                    over.wait()
                return ""

            def deserialize(self, value): ...

        state = {"slow": Slow(), "data": ckpt.PerProcess(1)}
        try:
            ckpt.save(tmp_path / "a", state, options=CheckpointOptions(timeout_seconds=SHORT))
        finally:
            over.set()

    for error in run_processes(2, program):
        assert isinstance(error, ckpt.BarrierTimeoutError)
        assert error.processes == (1,)
    assert os.listdir(tmp_path) == []


ASYNC = CheckpointOptions(enable_async=True, timeout_seconds=SECONDS)


class Fragile(ckpt.PythonState):
    is_broken = False

    def serialize(self):
        if self.is_broken:
            raise OSError("iterator lost")
        return "fine"

    def deserialize(self, value): ...


def attempts(save, count):
    """What each of several calls gave: the name of a checkpoint, or the type of an error."""
    found = []
    for number in range(count):
        try:
            found.append(os.path.basename(save(number)))
        except Exception as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("enable_async", [False, True])
def test_what_fails_after_the_commit_takes_nothing_back_on_any_process(
    tmp_path, failing, enable_async
):
    def program(processes):
        def refuse():
            raise ValueError("not today")

        manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.arange(3)), tmp_path)

        def save(number):
            refuses = number == 1 and processes.index == failing
            callbacks = (refuse,) if refuses else ()
            return manager.save(options=CheckpointOptions(enable_async, write_callbacks=callbacks))

        found = attempts(save, 4)
        manager.sync()
        return found, manager.latest_checkpoint, [os.path.basename(p) for p in manager.checkpoints]

    results = run_processes(3, program)
    for index, (found, latest, known) in enumerate(results):
        expected = ["ckpt-1", "ckpt-2", "ckpt-3", "ckpt-4"]
        # What fails on process 0 keeps the checkpoint from being recorded: all are told.
        if failing in (0, index):
            error = ValueError if index == failing else ckpt.ProcessError
            expected[1 + enable_async] = ckpt.AsyncSaveError if enable_async else error
        assert found == expected
        assert latest == str(tmp_path / "ckpt-4")
        assert known == ["ckpt-1", "ckpt-2", "ckpt-3", "ckpt-4"]  # the next save adopts it


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_background_save_is_raised_once_and_fails_no_other(tmp_path, failing):
    def program(processes):
        fragile = Fragile()
        checkpoint = ckpt.Checkpoint(w=np.arange(3), fragile=fragile)

        def save(number):
            fragile.is_broken = number == 1 and processes.index == failing
            return checkpoint.save(tmp_path / "ckpt", ASYNC)

        found = attempts(save, 6)
        checkpoint.sync()
        return [type(each) is str for each in found], checkpoint.save_counter

    for index, (worked, count) in enumerate(run_processes(3, program)):
        # At once where it failed; some hear of it in time for that, others with the next save.
        assert worked.count(False) == 1
        assert not worked[1] if index == failing else not (worked[1] and worked[2])
        assert count == 5
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-5")


class Table:
    """What a saver takes; `save` is called with the prefix, when the staging is there."""

    def __init__(self, save):
        self.save = save


@pytest.fixture
def tables():
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Table",
            predicate=lambda obj: isinstance(obj, Table),
            save_fn=lambda objects, prefix: [table.save(prefix) for table in objects.values()],
            restore_fn=lambda objects, prefix: None,
        )
        yield


def test_what_a_process_stages_for_its_next_save_is_safe_from_one_that_is_late(tmp_path, tables):
    # Process 1 fails at once in the second save, and has staged the third when process 0 begins
    # with the second.
    is_staged, is_begun = threading.Event(), threading.Event()
    saves, kept = [], []

    class Late(ckpt.PythonState):
        def __init__(self, index):
            self.index, self.saves = index, 0

        def serialize(self):
            self.saves += 1
            if self.saves == 2:
                if self.index == 1:
                    raise OSError("iterator lost")
                assert is_staged.wait(SECONDS)
            return "fine"

        def deserialize(self, value): ...

    def program(processes):
        def save(prefix):
            if processes.index == 1:
                saves.append(prefix)
                if len(saves) == 2:
                    is_staged.set()
                    assert is_begun.wait(SECONDS)
                kept.append(os.path.isdir(os.path.dirname(prefix)))
            elif is_staged.is_set():
                is_begun.set()

        state, table = Late(processes.index), Table(save)
        checkpoint = ckpt.Checkpoint(state=state, table=table)
        found = attempts(lambda number: checkpoint.save(tmp_path / "ckpt", ASYNC), 4)
        checkpoint.sync()
        return found

    results = run_processes(2, program)
    assert kept == [True, True, True]
    # Process 0 hears of the error in the background, and tells with its next save.
    assert results[0] == ["ckpt-1", "ckpt-2", ckpt.AsyncSaveError, "ckpt-3"]
    assert results[1] == ["ckpt-1", ckpt.UnsaveableError, "ckpt-2", "ckpt-3"]
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-3")


@pytest.mark.parametrize("has_locks", [True, False])
def test_who_fails_says_so_before_it_removes_what_others_work_on(
    tmp_path, tables, monkeypatch, has_locks
):
    if not has_locks:
        monkeypatch.setattr(staging, "_lock", lambda *descriptor: staging.Lock.NONE)
    is_written, is_telling, is_reported = (threading.Event() for _ in range(3))

    class Watched(MemoryService):
        def set(self, key, value, timeout_seconds):
            if threading.current_thread().name == "p1":
                is_reported.set()
            elif key.endswith("/decision"):
                is_telling.set()
                assert is_reported.wait(SECONDS)
            return super().set(key, value, timeout_seconds)

    def program(processes):
        def save(prefix):
            if processes.index == 0:
                assert is_written.wait(SECONDS)
                raise OSError("no space")
            shard = ckpt.io.write_shard(prefix, {"table": np.arange(3)})
            is_written.set()
            assert is_telling.wait(SECONDS)
            return shard

        ckpt.save(tmp_path / "a", {"table": Table(save)})

    failed, other = run_processes(2, program, Watched())
    assert str(failed) == "no space"
    assert isinstance(other, ckpt.ProcessError)
    assert "process 0 failed with OSError: no space" in str(other)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("first", [0, 1])
def test_who_leaves_last_removes_what_has_failed(tmp_path, tables, first):
    is_at_work, is_left = threading.Event(), threading.Event()
    kept = []

    def program(processes):
        def save(prefix):
            if processes.index == first:
                assert is_at_work.wait(SECONDS)
                raise OSError("no space")
            shard = ckpt.io.write_shard(prefix, {"table": np.arange(3)})
            is_at_work.set()
            assert is_left.wait(SECONDS)
            kept.append(os.path.isdir(shard))
            return shard

        try:
            ckpt.save(tmp_path / "a", {"table": Table(save)})
        finally:
            if processes.index == first:
                is_left.set()

    results = run_processes(2, program)
    assert [type(error) for error in results] == [
        OSError if index == first else ckpt.ProcessError for index in (0, 1)
    ]
    assert kept == [True]
    assert os.listdir(tmp_path) == []


def test_who_does_not_know_whether_process_0_goes_on_leaves_it_what_it_has_written(
    tmp_path, monkeypatch
):
    is_gone = threading.Event()
    merge = pipeline.assemble

    def merge_slowly(*arguments, **options):
        parts = merge(*arguments, **options)
        assert is_gone.wait(SECONDS)
        return parts

    monkeypatch.setattr(pipeline, "assemble", merge_slowly)

    def program(processes):
        seconds = SHORT if processes.index else SECONDS
        try:
            state = {"data": ckpt.PerProcess(processes.index)}
            ckpt.save(tmp_path / "a", state, options=CheckpointOptions(timeout_seconds=seconds))
        finally:
            if processes.index:
                is_gone.set()

    saved, error = run_processes(2, program)
    assert saved is None
    assert isinstance(error, ckpt.BarrierTimeoutError) and "is not known" in str(error)
    assert ckpt.verify(tmp_path / "a").ok
    restored = run_processes(
        2, lambda p: ckpt.restore(tmp_path / "a", {"data": ckpt.PerProcess(9)})
    )
    assert [found["data"].value for found in restored] == [0, 1]
    assert os.listdir(tmp_path) == ["a"]


def test_process_0_may_fail_before_anybody_knows_the_name_of_the_run(tmp_path):
    def program(processes):
        value = object() if processes.index == 0 else 1
        ckpt.save(tmp_path / "a", {"data": ckpt.PerProcess(0), "value": value}, options=ASYNC)
        ckpt.sync()

    failed, *others = run_processes(3, program)
    assert not isinstance(failed, ckpt.ProcessError)
    for error in others:
        assert isinstance(error, ckpt.AsyncSaveError), error
        assert isinstance(error.__cause__, ckpt.ProcessError), error
        assert error.__cause__.processes == (0,)


def test_a_decision_that_comes_through_after_all_is_taken_back_by_the_outcome():
    class Slow(MemoryService):
        def set(self, key, value, timeout_seconds):
            is_new = super().set(key, value, timeout_seconds)
            if value == COMMIT:
                raise TimeoutError("no answer")
            return is_new

    first, other = run_processes(2, meet, Slow())
    assert isinstance(first, ckpt.BarrierTimeoutError) and "no answer" in str(first)
    assert isinstance(other, ckpt.BarrierTimeoutError) and "process 0 gave up" in str(other)


def test_all_find_the_same_steps_due_whenever_they_hear_of_a_save_that_failed(tmp_path):
    is_passed = threading.Event()  # step 2, by process 0, which does not know yet

    class Late(MemoryService):
        def list(self, prefix, timeout_seconds):
            if prefix == "ckpt_jax/0/" and threading.current_thread().name == "ckpt-save":
                assert is_passed.wait(SECONDS)
            return super().list(prefix, timeout_seconds)

    def program(processes):
        fragile, step = Fragile(), ckpt.Variable(0)
        checkpoint = ckpt.Checkpoint(fragile=fragile, step=step, own=ckpt.PerProcess(0))
        manager = ckpt.CheckpointManager(
            checkpoint, tmp_path, step_counter=step, checkpoint_interval=3
        )

        def save(number):
            step.assign(number)
            checkpoint.own.value = number
            fragile.is_broken = number == 1 and processes.index == 1
            try:
                return manager.save(options=ASYNC) is not None
            except (ckpt.UnsaveableError, ckpt.AsyncSaveError, ckpt.ProcessError):
                return "failed"
            finally:
                if number == 2 and processes.index == 0:
                    is_passed.set()

        found = [save(number) for number in (1, 2, 3)]
        try:
            manager.sync()
        except ckpt.AsyncSaveError:
            found.append("failed")
        return [*found, save(3), save(4), save(6)], manager.sync()

    first, second = run_processes(2, program, Late())
    # The one has its error at once, the other later; after `sync` the same step is due again.
    assert first == ([True, False, False, "failed", True, False, True], None)
    assert second == (["failed", False, False, True, False, True], None)
    for number, step in (("ckpt-1", 3), ("ckpt-2", 6)):
        path, own = tmp_path / number, [ckpt.PerProcess(0), ckpt.PerProcess(0)]
        run_processes(
            2, lambda p, own=own, path=path: ckpt.Checkpoint(own=own[p.index]).restore(path)
        )
        assert [each.value for each in own] == [step, step]


def test_all_find_the_same_steps_due_after_one_did_not_know_of_a_failure(tmp_path, monkeypatch):
    is_gone = threading.Event()
    merge = pipeline.assemble

    def fail_once(*arguments, **options):
        if not is_gone.is_set():
            assert is_gone.wait(SECONDS)
            raise OSError("no space")
        return merge(*arguments, **options)

    monkeypatch.setattr(pipeline, "assemble", fail_once)

    def program(processes):
        step = ckpt.Variable(0)
        manager = ckpt.CheckpointManager(
            ckpt.Checkpoint(step=step), tmp_path, step_counter=step, checkpoint_interval=3
        )
        found = []
        for number in (1, 2, 3, 4, 5):
            step.assign(number)
            seconds = SHORT if processes.index and number == 1 else SECONDS
            try:
                options = CheckpointOptions(timeout_seconds=seconds)
                found.append(manager.save(options=options) is not None)
            except (OSError, ckpt.BarrierTimeoutError):
                found.append("failed")
                if processes.index:
                    is_gone.set()
        return found

    assert run_processes(2, program) == [["failed", True, False, False, True]] * 2


def test_what_cannot_be_metrics_fails_the_save_on_all_processes(tmp_path):
    def program(processes):
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.arange(3)), tmp_path)
        metrics = {"loss": 1} if processes.index else "loss"
        options = CheckpointOptions(timeout_seconds=SECONDS)
        return attempts(lambda number: manager.save(options=options, metrics=metrics), 1)

    assert run_processes(2, program) == [[TypeError], [ckpt.ProcessError]]


def test_a_metric_that_is_none_fails_the_save_on_all_processes(tmp_path):
    def program(processes):
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.arange(3)), tmp_path)
        loss = "low" if processes.index == 1 else 0.5
        return attempts(lambda number: manager.save(metrics={"loss": loss if not number else 1}), 2)

    heard = [ckpt.ProcessError, "ckpt-1"]
    assert run_processes(3, program) == [heard, [ValueError, "ckpt-1"], heard]


def test_a_write_callback_that_saves_is_refused_where_others_would_wait(tmp_path):
    def program(processes):
        checkpoint, other = ckpt.Checkpoint(w=np.arange(3)), ckpt.Checkpoint(v=np.arange(3))
        errors = []

        def save_other():
            try:
                other.save(tmp_path / "other")
            except RuntimeError as error:
                errors.append(str(error))

        checkpoint.save(tmp_path / "ckpt", CheckpointOptions(write_callbacks=[save_other]))
        return errors, os.path.basename(other.save(tmp_path / "other"))

    for errors, name in run_processes(2, program):
        (error,) = errors
        assert "other cannot begin at the end of saving" in error
        assert name == "other-1"


def test_who_does_not_know_whether_its_save_was_committed_goes_on_from_where_the_others_are(
    tmp_path,
):
    heard = threading.Event()

    def program(processes):
        def linger():
            assert heard.wait(SECONDS)

        step = 1
        manager = ckpt.CheckpointManager(
            ckpt.Checkpoint(w=np.arange(3)),
            tmp_path,
            step_counter=lambda: step,
            checkpoint_interval=2,
        )
        options = CheckpointOptions(
            timeout_seconds=SHORT if processes.index else SECONDS,
            write_callbacks=[linger] if not processes.index else [],
        )
        try:
            manager.save(options=options)
        except ckpt.BarrierTimeoutError as error:
            assert "is not known" in str(error)
            assert manager.checkpoint.save_counter == 0
        finally:
            if processes.index:
                heard.set()
        names = []
        while step < 5:
            step += 1
            names += attempts(lambda _: manager.save() or "not due", 1)
        return names, [os.path.basename(path) for path in manager.checkpoints]

    for names, known in run_processes(2, program):
        assert names == ["not due", "ckpt-2", "not due", "ckpt-3"]
        assert known == ["ckpt-1", "ckpt-2", "ckpt-3"]


def test_who_does_not_know_counts_before_it_restores_and_not_after(tmp_path):
    heard = threading.Event()

    def program(processes):
        def linger():
            assert heard.wait(SECONDS)

        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        for _ in range(3):
            first = checkpoint.save(tmp_path / "a")
        options = CheckpointOptions(
            timeout_seconds=SHORT if processes.index else SECONDS,
            write_callbacks=[linger] if not processes.index else [],
        )
        try:
            checkpoint.save(tmp_path / "a", options)
        except ckpt.BarrierTimeoutError:
            heard.set()
        checkpoint.restore(tmp_path / "a-1")
        return os.path.basename(first), os.path.basename(checkpoint.save(tmp_path / "a"))

    assert run_processes(2, program) == [("a-3", "a-2")] * 2


def test_the_service_does_not_fill_up_where_a_write_ended_in_doubt(tmp_path):
    heard = threading.Event()
    service = MemoryService()

    def program(processes):
        def linger():
            assert heard.wait(SECONDS)

        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        options = CheckpointOptions(
            timeout_seconds=SHORT if processes.index else SECONDS,
            write_callbacks=[linger] if not processes.index else [],
        )
        try:
            checkpoint.write(tmp_path / "a", options)
        except ckpt.BarrierTimeoutError:
            heard.set()
        for _ in range(10):
            checkpoint.write(tmp_path / "a")

    assert run_processes(2, program, service) == [None, None]
    assert len(service.values) <= 10


def test_a_save_to_a_directory_that_is_not_shared_says_so(tmp_path):
    def program(processes):
        ckpt.save(tmp_path / str(processes.index) / "a", state_of(processes.index))

    results = run_processes(3, program)
    for error in results:
        assert isinstance(error, ckpt.ProcessError)
        assert error.processes == (1, 2)
        assert "does not find the shards that were written by 1, 2" in str(error)
        assert "ckpt.preflight" in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_with_broadcast_a_process_that_cannot_restore_fails_all_and_none_falls_behind(
    tmp_path, failing
):
    path = ckpt.save(tmp_path / "a", {"w": np.arange(3)})
    options = CheckpointOptions(broadcast=True)

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.zeros(3, int))
        fails = processes.index == failing
        gone = tmp_path / "gone" if fails else path
        other = {"v": np.zeros(3, int)} if fails else {"w": np.zeros(3, int)}
        found = []
        for restore in (
            lambda: checkpoint.read(gone, options),
            lambda: ckpt.restore(path, other, options=options),
        ):
            try:
                restore()
            except ckpt.CheckpointError as error:
                found.append(type(error))
        ckpt.restore(path, {"w": np.zeros(3, int)}, options=options)
        return found, checkpoint.save(tmp_path / "ckpt")

    for index, (found, saved) in enumerate(run_processes(2, program)):
        own = [ckpt.CheckpointNotFoundError, ckpt.RestoreMismatchError]
        assert found == (own if index == failing else [ckpt.ProcessError] * 2)
        assert saved == str(tmp_path / "ckpt-1")


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("restore", ["read", "restore"])
def test_an_error_of_the_background_of_one_process_keeps_none_from_restoring(
    tmp_path, restore, broadcast
):
    def refuse():
        raise ValueError("not today")

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.arange(3))
        path = checkpoint.save(tmp_path / "ckpt")
        refusing = [refuse] if processes.index == 1 else []
        checkpoint.save(
            tmp_path / "ckpt", CheckpointOptions(enable_async=True, write_callbacks=refusing)
        )
        checkpoint.w = np.zeros(3, int)
        error = None
        try:
            options = CheckpointOptions(broadcast=broadcast, timeout_seconds=SECONDS)
            getattr(checkpoint, restore)(path, options)
        except (ckpt.AsyncSaveError, ckpt.ProcessError) as caught:
            error = type(caught)
        return error, checkpoint.w.tolist(), checkpoint.save(tmp_path / "ckpt")

    saved = str(tmp_path / "ckpt-2")
    assert run_processes(2, program) == [
        (None, [0, 1, 2], saved),
        (ckpt.AsyncSaveError, [0, 1, 2], saved),
    ]


# --- managers --------------------------------------------------------------------------


def test_all_managers_know_the_same_checkpoints(tmp_path):
    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.zeros(3), data=ckpt.PerProcess(0))
        manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
        assert manager.restore_or_initialize() is None
        known = []
        for step in range(4):
            checkpoint.w = np.full(3, float(step))
            checkpoint.data.value = 10 * step + processes.index
            manager.save(metrics={"loss": 1 / (step + 1)})
            known.append([os.path.basename(path) for path in manager.checkpoints])
            assert manager.latest_checkpoint == manager.checkpoints[-1]
        assert manager.gc() == []
        fresh = ckpt.Checkpoint(w=np.zeros(3), data=ckpt.PerProcess(0))
        path = ckpt.CheckpointManager(fresh, tmp_path).restore_or_initialize()
        return known, os.path.basename(path), fresh.w.tolist(), fresh.data.value

    for index, result in enumerate(run_processes(3, program)):
        known = [["ckpt-1"], ["ckpt-1", "ckpt-2"], ["ckpt-2", "ckpt-3"], ["ckpt-3", "ckpt-4"]]
        assert result == (known, "ckpt-4", [3.0] * 3, 30 + index)
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint",
        "checkpoint-metrics.json",
        "ckpt-3",
        "ckpt-4",
    ]


def test_what_one_process_cannot_restore_is_restored_by_none(tmp_path, caplog):
    class Picky(ckpt.PythonState):
        def __init__(self, index=0):
            self.index = index

        def serialize(self):
            return ""

        def deserialize(self, value):
            if self.index == 1 and not self.refused:
                self.refused.append(True)
                raise ckpt.CorruptCheckpointError("unreadable here")

    def program(processes):
        picky = Picky(processes.index)
        picky.refused = []
        checkpoint = ckpt.Checkpoint(step=0, picky=picky)
        manager = ckpt.CheckpointManager(checkpoint, tmp_path)
        for step in (1, 2):
            checkpoint.step = step
            manager.save()
        return os.path.basename(manager.restore_or_initialize()), checkpoint.step

    assert run_processes(3, program) == [("ckpt-1", 1)] * 3
    assert "process 1: unreadable here" in caplog.text


# --- preflight -------------------------------------------------------------------------


def test_a_shared_directory_passes_and_stays_empty(tmp_path):
    assert run_processes(3, lambda p: ckpt.preflight(tmp_path / "new")) == [None] * 3
    assert os.listdir(tmp_path / "new") == []


def test_who_cannot_write_is_named(tmp_path):
    (tmp_path / "file").touch()

    def program(processes):
        ckpt.preflight(tmp_path / ("file" if processes.index == 1 else "new"))

    for error in run_processes(3, program):
        assert isinstance(error, ckpt.PreflightError)
        assert [k for k, _ in error.problems] == [1]
        assert "cannot write" in str(error)


def test_a_preflight_that_is_given_up_leaves_no_file(tmp_path):
    over = threading.Event()

    def program(processes):
        try:
            if processes.index == 1:
                over.wait()
            ckpt.preflight(tmp_path, SHORT)
        finally:
            over.set()

    for error in run_processes(2, program):
        assert isinstance(error, ckpt.BarrierTimeoutError)
    assert os.listdir(tmp_path) == []


def test_who_does_not_share_the_directory_is_named(tmp_path):
    results = run_processes(3, lambda p: ckpt.preflight(tmp_path / str(p.index == 2)))
    for error in results:
        assert isinstance(error, ckpt.PreflightError)
        what = dict(error.problems)
        assert "does not see the files of 2 (" in what[0]
        assert "does not see the files of 0 (" in what[2]
        assert ", 1 (" in what[2]
