"""Agreeing on a step, in memory: threads that share a service."""

import threading

import pytest

import ckpt_jax as ckpt
from ckpt_jax.processes.common_step import CommonStep
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.testing import MemoryService

SECONDS = 60.0  # the longest wait for what comes at once


def agreements(count):
    service = MemoryService()
    return [CommonStep(Processes(k, count, service)) for k in range(count)]


def stop_of(common):
    """The step at which one process stops."""
    step = 1
    while not common.is_passed():
        step += 1
    return step


def test_all_stop_at_a_step_that_nobody_had_passed():
    commons = agreements(3)
    for k, common in enumerate(commons):
        for _ in range(5 * k):
            assert not common.is_passed()
    commons[0].ask()
    stops = [0] * 3
    threads = [
        threading.Thread(target=lambda k=k: stops.__setitem__(k, 5 * k + stop_of(commons[k])))
        for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*stops}) == 1
    assert stops[0] > 10
    # It stays said, to who passes it again.
    assert all(common.is_passed() for common in commons)


def test_nobody_stops_where_nobody_asks():
    commons = agreements(2)
    assert not any(common.is_passed() for _ in range(100) for common in commons)
    for common in commons:
        common.close()


def test_who_gives_no_answer_is_named():
    lonely = CommonStep(Processes(0, 3, MemoryService()), answer_seconds=0.1)
    lonely.ask()
    with pytest.raises(ckpt.BarrierTimeoutError, match="processes 1, 2 of 3") as found:
        stop_of(lonely)
    assert found.value.processes == (1, 2)


def test_agreements_one_after_the_other_do_not_know_of_each_other():
    processes = [Processes(k, 2, service) for service in [MemoryService()] for k in range(2)]
    earlier = [CommonStep(each) for each in processes]
    earlier[0].ask()
    assert [common.close() for common in earlier] == [None, None]
    later = [CommonStep(each) for each in processes]
    assert not any(common.is_passed() for _ in range(100) for common in later)
    for common in later:
        common.close()


def test_who_has_left_its_loop_is_not_waited_for():
    service = MemoryService()
    first, second = [
        CommonStep(Processes(k, 2, service), SECONDS, listen_seconds=0.01) for k in range(2)
    ]
    assert [first.is_passed() for _ in range(3)] == [False] * 3
    first.close()
    assert service.get("ckpt_jax/steps/1/passed/0", SECONDS) == "3"
    second.ask()
    assert service.get("ckpt_jax/steps/1/passed/1", SECONDS) == "0"
    assert [second.is_passed() for _ in range(3)] == [False] * 3  # those that both of them have
    second.close()


class Failing(MemoryService):
    """A service of which one call fails, once."""

    def __init__(self, verb, name, error):
        super().__init__()
        self.failing = verb, name
        self.errors = [error]

    def _fail(self, verb, key):
        if self.errors and verb == self.failing[0] and key.endswith(self.failing[1]):
            raise self.errors.pop()

    def set(self, key, value, timeout_seconds):
        self._fail("set", key)
        return super().set(key, value, timeout_seconds)

    def get(self, key, timeout_seconds):
        self._fail("get", key)
        return super().get(key, timeout_seconds)


@pytest.mark.parametrize("verb", ["get", "set"])
def test_a_service_that_hangs_for_a_while_does_not_prevent_an_agreement(verb):
    service = Failing(verb, "/asked", TimeoutError("it hangs"))
    commons = [CommonStep(Processes(k, 2, service)) for k in range(2)]
    commons[0].ask()
    for k in range(2):
        assert service.get(f"ckpt_jax/steps/1/passed/{k}", SECONDS) == "0"
    assert [stop_of(common) for common in commons] == [1, 1]
    assert service.errors == []


@pytest.mark.parametrize(
    "error, raised",
    [(TimeoutError, ckpt.BarrierTimeoutError), (ConnectionError, ckpt.ProcessError)],
)
def test_who_cannot_hear_the_others_does_not_go_on_by_itself(error, raised):
    service = Failing("get", "/passed/1", error("no service"))
    common = CommonStep(Processes(0, 2, service))
    common.ask()
    with pytest.raises(raised, match="agreeing on a step to stop at: no service") as found:
        stop_of(common)
    assert found.value.processes == (0,)
