"""Commits in doubt: lost replies, and requests that arrive after everybody has given up."""

import signal
import threading

import numpy as np
import pytest
from fault_proxy import CUT_AFTER, CUT_BEFORE, HOLD, answer

import ckpt_jax as ckpt
from ckpt_jax.store import attempts, objects
from ckpt_jax.store.directory import checkpoints_in
from ckpt_jax.testing import run_processes

MANIFEST = "manifest.ckpt$"
STATE = "/checkpoint$"
NOTES = "checkpoint-metrics.json$"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(attempts, "_DOUBT_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(objects, "_WAITS", {"initial_delay": "5ms", "max_delay": "20ms"})


@pytest.fixture
def proxy(a_server):
    ckpt.use_storage(a_server.url, retries=1, request_timeout_seconds=60)
    return a_server.through_proxy()


@pytest.fixture
def beside(a_server):
    """The same place, past the proxy."""

    def keys(path=""):
        there = a_server.endpoint
        a_server.point_at(a_server.server.url)
        found = a_server.kvstore(path).list().result()
        a_server.point_at(there)
        return {key.decode() for key in found}

    return keys


def hasty(place, name):
    """Lets a request for the manifest of a checkpoint time out soon, as it does if it is held."""
    ckpt.use_storage(f"{place.url}/{name}/manifest.ckpt", retries=0, request_timeout_seconds=1.0)


def values(step):
    return {"w": np.arange(3.0) + step}


class Numbered:
    def __init__(self, directory):
        self.directory, self.checkpoint = directory, ckpt.Checkpoint(**values(0))

    def save(self, step):
        return self.checkpoint.save(f"{self.directory}/ckpt", **values(step))


class Managed(Numbered):
    def __init__(self, directory):
        super().__init__(directory)
        self.manager = ckpt.CheckpointManager(self.checkpoint, directory, max_to_keep=3)

    def save(self, step):
        return self.manager.save(metrics={"loss": step}, **values(step))


@pytest.fixture(params=[Numbered, Managed])
def program(request, a_server):
    return request.param(a_server.url)


def assert_holds(path, step):
    assert ckpt.verify(path).ok
    np.testing.assert_array_equal(ckpt.load(path)["w"], values(step)["w"])


# --- lost replies -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", [CUT_AFTER, answer(500, acts=True)], ids=["cut", "error"])
@pytest.mark.parametrize("key", [MANIFEST, STATE, NOTES])
def test_a_lost_reply_is_no_failure(program, a_server, proxy, key, fault):
    program.save(1)
    proxy.fault(fault, operation="WRITE", key=key, times=1)
    path = program.save(2)
    assert ckpt.latest_checkpoint(a_server.url) == path
    assert_holds(path, 2)
    assert checkpoints_in(a_server.url) == ["ckpt-1", "ckpt-2"]


def test_a_lost_reply_and_a_store_that_does_not_answer_after_it_remove_nothing(
    a_server, proxy, monkeypatch
):
    publish = attempts.Attempt.publish

    def dying(self, **given):
        proxy.fault(CUT_AFTER, operation="WRITE", key=MANIFEST, times=1)
        proxy.fault(CUT_BEFORE, operation="READ", key=MANIFEST)
        publish(self, **given)

    monkeypatch.setattr(attempts.Attempt, "publish", dying)
    with pytest.raises(ckpt.CommitInDoubtError, match="did not say whether"):
        ckpt.save(f"{a_server.url}/a", values(1))
    proxy.heal()
    assert proxy.count("DELETE") == 0
    assert_holds(f"{a_server.url}/a", 1)


def test_a_state_file_of_which_every_reply_is_lost_fails_the_record_and_not_the_checkpoint(
    program, a_server, proxy
):
    first = program.save(1)
    proxy.fault(CUT_AFTER, operation="WRITE", key=STATE, first=1)
    with pytest.raises(OSError, match="try again later"):
        program.save(2)
    proxy.heal()
    assert_holds(f"{a_server.url}/ckpt-2", 2)
    assert ckpt.latest_checkpoint(a_server.url) in (first, f"{a_server.url}/ckpt-2")
    path = program.save(3)
    assert ckpt.latest_checkpoint(a_server.url) == path
    assert_holds(path, 3)


# --- late arrivals ----------------------------------------------------------------------


@pytest.fixture
def held(program, a_server, proxy, beside):
    """A second save, whose manifest is held back until it has given up."""
    program.save(1)
    hasty(a_server, "ckpt-2")
    proxy.fault(HOLD, operation="WRITE", key=r"ckpt-2/manifest.ckpt$", times=1)
    with pytest.raises(ckpt.CommitInDoubtError) as caught:
        program.save(2)
    assert "Nothing was removed" in str(caught.value)
    assert "ckpt-2" in str(caught.value)
    proxy.heal()
    assert proxy.count("DELETE") == 0 and beside("ckpt-2/")
    assert ckpt.latest_checkpoint(a_server.url) == f"{a_server.url}/ckpt-1"
    assert program.checkpoint.save_counter == 1
    return proxy


def test_a_commit_that_arrives_late_is_counted_by_the_next_save(held, program, a_server):
    held.release()
    path = program.save(3)
    assert path == f"{a_server.url}/ckpt-3" == ckpt.latest_checkpoint(a_server.url)
    for step in (1, 2, 3):
        assert_holds(f"{a_server.url}/ckpt-{step}", step)
    if isinstance(program, Managed):
        assert program.manager.steps == (1, 2, 3)


def test_after_a_commit_that_never_arrives_the_next_save_takes_its_number(held, program, a_server):
    path = program.save(3)
    assert path == f"{a_server.url}/ckpt-2" == ckpt.latest_checkpoint(a_server.url)
    assert_holds(path, 3)
    # Now it is refused.
    held.release()
    assert_holds(path, 3)
    assert_holds(program.save(4), 4)


def test_a_commit_that_arrives_in_the_middle_of_the_next_save_fails_that_one(
    held, program, a_server, monkeypatch
):
    publish = attempts.Attempt.publish

    def arrived(self, **given):
        held.release()
        publish(self, **given)

    monkeypatch.setattr(attempts.Attempt, "publish", arrived)
    with pytest.raises(FileExistsError, match="another save has committed"):
        program.save(3)
    assert_holds(f"{a_server.url}/ckpt-2", 2)
    path = program.save(4)
    assert path == ckpt.latest_checkpoint(a_server.url)
    assert_holds(path, 4)


def test_a_program_that_is_started_again_goes_on_after_a_commit_in_doubt(held, program, a_server):
    again = type(program)(a_server.url)
    again.checkpoint.restore(ckpt.latest_checkpoint(a_server.url))
    held.release()
    path = again.save(3)
    assert path == f"{a_server.url}/ckpt-2" == ckpt.latest_checkpoint(a_server.url)
    assert_holds(path, 3)


def test_an_interrupt_does_not_call_a_commit_back(a_server, proxy):
    proxy.fault(HOLD, operation="WRITE", key=MANIFEST)

    def interrupt():
        proxy.wait_until_held()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(f"{a_server.url}/a", values(1))
    thread.join()
    assert proxy.count("DELETE") == 0
    proxy.heal()
    proxy.release()
    assert_holds(f"{a_server.url}/a", 1)


def test_if_process_0_is_in_doubt_the_others_remove_nothing(a_server, proxy, beside):
    hasty(a_server, "a")
    proxy.fault(HOLD, operation="WRITE", key=MANIFEST)

    def program(processes):
        own = ckpt.PerProcess(np.arange(4.0) + processes.index)
        return ckpt.save(f"{a_server.url}/a", {"own": own})

    errors = run_processes(3, program)
    assert isinstance(errors[0], ckpt.CommitInDoubtError)
    for error in errors[1:]:
        assert isinstance(error, ckpt.ProcessError) and "CommitInDoubtError" in str(error)
    assert proxy.count("DELETE") == 0
    proxy.heal()
    proxy.release()
    assert ckpt.verify(f"{a_server.url}/a").ok


def test_if_process_0_fails_before_its_commit_nothing_stays_of_any_process(a_server, proxy, beside):
    proxy.fault(answer(403), operation="WRITE", key="/meta/")

    def program(processes):
        own = ckpt.PerProcess(np.arange(4.0) + processes.index)
        return ckpt.save(f"{a_server.url}/a", {"own": own})

    errors = run_processes(3, program)
    assert isinstance(errors[0], PermissionError)
    assert [type(error) for error in errors[1:]] == [ckpt.ProcessError] * 2
    assert beside() == set()


def test_a_commit_that_the_store_refuses_is_an_error_of_its_kind(a_server, proxy):
    proxy.fault(answer(403), operation="WRITE", key=MANIFEST)
    with pytest.raises(PermissionError, match="refuses"):
        ckpt.save(f"{a_server.url}/a", values(1))
    proxy.heal()
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{a_server.url}/a")
    assert_holds(ckpt.save(f"{a_server.url}/a", values(2)), 2)


def test_in_the_background_a_commit_in_doubt_is_the_cause_of_the_error(a_server, proxy):
    checkpoint = ckpt.Checkpoint(**values(1))
    options = ckpt.CheckpointOptions(enable_async=True)
    hasty(a_server, "ckpt-1")
    proxy.fault(HOLD, operation="WRITE", key=MANIFEST)
    checkpoint.save(f"{a_server.url}/ckpt", options)
    with pytest.raises(ckpt.AsyncSaveError) as caught:
        checkpoint.sync()
    assert isinstance(caught.value.__cause__, ckpt.CommitInDoubtError)
    proxy.heal()
    proxy.release()
    path = checkpoint.save(f"{a_server.url}/ckpt", **values(2))
    assert path == f"{a_server.url}/ckpt-2"
    assert_holds(f"{a_server.url}/ckpt-1", 1)
    assert_holds(path, 2)
