"""Agreeing on a step, in memory: threads that share a dict."""

import threading

import pytest
from test_multihost import Dictionary

import ckpt_jax as ckpt
from ckpt_jax.agreeing import CommonStep
from ckpt_jax.multihost import Processes


def agreements(count):
    service = Dictionary()
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
    lonely = CommonStep(Processes(0, 3, Dictionary()), answer_seconds=0.1)
    lonely.ask()
    with pytest.raises(ckpt.BarrierTimeoutError, match="processes 1, 2 of 3") as found:
        stop_of(lonely)
    assert found.value.processes == (1, 2)


def test_agreements_one_after_the_other_do_not_know_of_each_other():
    processes = [Processes(k, 2, service) for service in [Dictionary()] for k in range(2)]
    earlier = [CommonStep(each) for each in processes]
    earlier[0].ask()
    assert [common.close() for common in earlier] == [None, None]
    later = [CommonStep(each) for each in processes]
    assert not any(common.is_passed() for _ in range(100) for common in later)
    for common in later:
        common.close()
