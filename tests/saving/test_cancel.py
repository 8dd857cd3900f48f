"""Saves in the background that are given up: nothing of them stays, and the next one works."""

import gc
import os
import threading
import weakref

import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.testing.processes import run_processes

pytestmark = pytest.mark.usefixtures("no_flushing")


class Gate:
    """A progress function that holds a save when it has written so much."""

    def __init__(self, after: float = 0.0):
        self.after = after
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, done, total):
        if done >= self.after * total:
            self.reached.set()
            self.opened.wait(60)


def in_background(**options):
    return ckpt.CheckpointOptions(enable_async=True, **options)


def cancelled(checkpoint, gate):
    """Cancels while the gate holds the save; the gate opens when the cancel has been asked for."""
    assert gate.reached.wait(60)
    run = checkpoint._runs()._in_background

    def open_when_asked():
        run.cancelled.wait(60)
        gate.opened.set()

    opener = threading.Thread(target=open_when_asked)
    opener.start()
    try:
        return checkpoint.cancel()
    finally:
        opener.join()


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_nothing_of_a_cancelled_save_stays_and_the_next_save_works(tmp_path, after):
    checkpoint = ckpt.Checkpoint(w=np.arange(1 << 15), x=np.ones(3))
    first = checkpoint.save(tmp_path / "ckpt")
    state = (tmp_path / "checkpoint").read_bytes()
    gate = Gate(after)
    options = in_background(progress=gate, sharding_policy=ckpt.MaxShardSize(1 << 14))
    path = checkpoint.save(tmp_path / "ckpt", options, w=np.zeros(1 << 15))
    assert cancelled(checkpoint, gate)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1"]
    assert (tmp_path / "checkpoint").read_bytes() == state
    assert checkpoint.save_counter == 1
    checkpoint.sync()  # no error is left
    assert checkpoint.save(tmp_path / "ckpt") == path  # the same number
    assert (ckpt.load(path)["w"] == 0).all() and ckpt.verify(first).ok
    assert ckpt.latest_checkpoint(tmp_path) == path


def test_what_was_at_the_path_stays_if_the_save_that_would_replace_it_is_cancelled(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    path = checkpoint.write(tmp_path / "a")
    gate = Gate()
    checkpoint.write(tmp_path / "a", in_background(progress=gate), w=np.zeros(10))
    assert cancelled(checkpoint, gate)
    assert (ckpt.load(path)["w"] == 1).all()
    assert os.listdir(tmp_path) == ["a"]


def test_without_a_save_under_way_there_is_nothing_to_cancel(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    assert not checkpoint.cancel()
    path = checkpoint.save(tmp_path / "ckpt", in_background())
    checkpoint.sync()
    assert not checkpoint.cancel()
    assert ckpt.verify(path).ok


def test_what_is_committed_cannot_be_cancelled(tmp_path):
    """The checkpoint is there while the callback runs, and is recorded after that."""
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    gate = Gate()
    options = in_background(write_callbacks=[lambda: gate(1, 1)])
    path = checkpoint.save(tmp_path / "ckpt", options)
    assert not cancelled(checkpoint, gate)
    assert ckpt.latest_checkpoint(tmp_path) == path
    assert checkpoint.save_counter == 1


def test_an_error_after_the_commit_is_not_swallowed(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    gate = Gate()

    def fails():
        gate(1, 1)
        raise RuntimeError("the callback failed")

    checkpoint.save(tmp_path / "ckpt", in_background(write_callbacks=[fails]))
    with pytest.raises(ckpt.AsyncSaveError, match="the callback failed"):
        cancelled(checkpoint, gate)
    assert not checkpoint.cancel()


def test_an_error_of_an_earlier_save_is_raised_by_cancel_and_once(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))

    def fails(path):
        raise RuntimeError("no")

    checkpoint.save(tmp_path / "ckpt", in_background(write_callbacks=[fails]))
    checkpoint._runs().background._is_done.wait(60)
    with pytest.raises(ckpt.AsyncSaveError):
        checkpoint.cancel()
    assert not checkpoint.cancel()


def test_a_save_must_not_cancel_itself(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    checkpoint.save(tmp_path / "ckpt", in_background(write_callbacks=[checkpoint.cancel]))
    with pytest.raises(ckpt.AsyncSaveError, match="must not save, restore or sync"):
        checkpoint.sync()


def test_a_cancelled_save_keeps_nothing_alive(tmp_path, no_gc):
    class Payload(ckpt.AutoTrackable):
        pass

    payload = Payload()
    payload.w = np.ones(1000)
    checkpoint = ckpt.Checkpoint(payload=payload)
    gate = Gate()
    checkpoint.save(tmp_path / "ckpt", in_background(progress=gate))
    thread = checkpoint._runs().background._thread
    assert cancelled(checkpoint, gate)
    thread.join()
    del thread
    gone = weakref.ref(payload), weakref.ref(checkpoint)
    del payload, checkpoint
    assert [ref() for ref in gone] == [None, None]
    gc.enable()


def test_the_step_of_a_cancelled_save_of_a_manager_is_due_again(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones(10))
    policies = [ckpt.SaveEveryNSteps(10)]
    manager = ckpt.CheckpointManager(checkpoint, tmp_path, 1, policies=policies)
    manager.save(10)
    gate = Gate()
    manager.save(20, options=in_background(progress=gate), metadata={"a": 1})
    assert cancelled(checkpoint, gate)
    assert not manager.cancel()
    assert (manager.steps, os.listdir(tmp_path / "ckpt-10") != []) == ((10,), True)
    assert manager.save(21) is not None
    assert manager.steps == (21,)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-21"]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_processes_cancel_together_whoever_is_first(tmp_path, late):
    """One of them has written nothing yet, the others wait for it or are held as well."""

    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.ones(10), own=ckpt.PerProcess(processes.index))
        gate = Gate()
        options = in_background(progress=gate if processes.index == late else None)
        checkpoint.save(tmp_path / "ckpt", options)
        found = cancelled(checkpoint, gate) if processes.index == late else checkpoint.cancel()
        left = os.path.exists(tmp_path / "ckpt-1")
        checkpoint.save(tmp_path / "ckpt")
        return found, left, checkpoint.save_counter

    assert run_processes(3, program) == [(True, False, 1)] * 3
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1"]
    assert ckpt.verify(tmp_path / "ckpt-1").ok


def test_what_process_0_has_committed_stays_on_all(tmp_path):
    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.ones(10))
        checkpoint.save(tmp_path / "ckpt", in_background())
        checkpoint._runs().background._is_done.wait(60)
        return checkpoint.cancel(), checkpoint.save_counter

    assert run_processes(2, program) == [(False, 1)] * 2
    assert ckpt.verify(tmp_path / "ckpt-1").ok


def test_if_one_process_alone_cancels_the_others_hear_of_it(tmp_path):
    def program(processes):
        checkpoint = ckpt.Checkpoint(w=np.ones(10))
        gate = Gate()
        options = in_background(progress=gate if processes.index == 1 else None)
        checkpoint.save(tmp_path / "ckpt", options)
        if processes.index == 1:
            return cancelled(checkpoint, gate)
        checkpoint.sync()

    first, second = run_processes(2, program)
    assert isinstance(first, ckpt.AsyncSaveError) and "process 1" in str(first)
    assert "cancel() was called" in str(first)
    assert second is True
    assert os.listdir(tmp_path) == []
