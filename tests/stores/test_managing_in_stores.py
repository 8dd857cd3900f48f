"""What managers answer, evaluators, removal and cancelling, in object stores."""

import os
import threading

import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.store.presence import names_in


def manager_of(place, **arguments):
    return ckpt.CheckpointManager(ckpt.Checkpoint(step=0), place.url, **arguments)


def save(manager, *steps, **arguments):
    for step in steps:
        manager.save(step, step=step, **arguments)


def steps_in(place):
    return sorted(int(name[5:]) for name in names_in(place.url) if name.startswith("ckpt-"))


def test_metadata_and_metrics_are_kept_in_stores(any_store):
    trainer = manager_of(any_store)
    save(trainer, 1, 2, metrics={"loss": 0.5}, metadata={"position": 7})
    evaluator = manager_of(any_store)
    evaluator.record_metrics(1, accuracy=0.9)
    save(trainer, 3)
    for manager in (trainer, evaluator, manager_of(any_store, read_only=True)):
        assert manager.metadata(2) == {"position": 7} and manager.metadata(3) == {}
        assert manager.metrics(1) == {"loss": 0.5, "accuracy": 0.9}
        assert manager.best("accuracy", "max") == f"{any_store.url}/ckpt-1"
        assert manager.steps == (1, 2, 3)


def test_an_evaluator_of_a_store_writes_back_what_the_policy_waits_for(any_store):
    policy = ckpt.KeepBest("accuracy", 1, awaiting=1)
    trainer = manager_of(any_store, max_to_keep=policy)
    save(trainer, 1)
    steps = iter([2, 3])

    def wait(seconds):
        save(trainer, *[step for step in [next(steps, None)] if step])

    def evaluate(path, values):
        return {"accuracy": values["step"] % 3}

    times = iter(range(99)).__next__
    done = ckpt.evaluate_new(
        any_store.url, evaluate, only="step", timeout=4, wait=wait, clock=times
    )
    assert [os.path.basename(path) for path in done] == ["ckpt-1", "ckpt-2", "ckpt-3"]
    save(trainer, 4)
    assert trainer.steps == (2, 4) and steps_in(any_store) == [2, 4]


def test_metrics_that_two_record_at_once_are_both_there(any_store):
    trainer = manager_of(any_store, max_to_keep=None)
    save(trainer, 1)
    evaluators = [manager_of(any_store) for _ in range(3)]

    def record(number, manager):
        for n in range(3):
            manager.record_metrics(1, **{f"m{number}{n}": n})

    threads = [threading.Thread(target=record, args=each) for each in enumerate(evaluators)]
    for thread in threads:
        thread.start()
    save(trainer, 2, 3)
    for thread in threads:
        thread.join()
    assert len(trainer.metrics(1)) == 9 and trainer.steps == (1, 2, 3)


def test_what_was_removed_before_it_was_read_is_passed_over(memory, monkeypatch):
    trainer = manager_of(memory, max_to_keep=1)
    save(trainer, 1)
    load, passed = ckpt.load, []

    def late(path, only=None):
        if not passed:
            passed.append(path)
            save(trainer, 2)
        return load(path, only=only)

    monkeypatch.setattr("ckpt_jax.manage.evaluate.load", late)
    done = ckpt.evaluate_new(memory.url, lambda path, values: None, timeout=0)
    assert [os.path.basename(path) for path in done] == ["ckpt-2"]


def test_checkpoints_are_removed_in_the_background(any_store):
    manager = manager_of(any_store, max_to_keep=1, removal=ckpt.Removal(in_background=True))
    save(manager, 1, 2, 3)
    assert manager.steps == (3,)
    assert ckpt.latest_checkpoint(any_store.url) == f"{any_store.url}/ckpt-3"
    manager.gc()
    assert steps_in(any_store) == [3]


def test_there_is_no_trash_in_a_store(memory):
    with pytest.raises(ValueError, match="object store"):
        manager_of(memory, removal=ckpt.Removal(trash="trash"))


def test_a_save_to_a_store_can_be_cancelled(any_store):
    reached, go_on = threading.Event(), threading.Event()

    def hold(done, total):
        reached.set()
        go_on.wait(60)

    checkpoint = ckpt.Checkpoint(w=np.zeros(1000))
    options = ckpt.CheckpointOptions(enable_async=True, progress=hold)
    path = checkpoint.save(f"{any_store.url}/ckpt", options)
    assert reached.wait(60)
    run = checkpoint._runs()._in_background
    opener = threading.Thread(target=lambda: (run.cancelled.wait(60), go_on.set()))
    opener.start()
    assert checkpoint.cancel()
    opener.join()
    assert names_in(any_store.url) == []
    assert checkpoint.save(f"{any_store.url}/ckpt") == path and ckpt.verify(path).ok


def test_arrays_are_cast_on_their_way_to_a_store(any_store):
    options = ckpt.CheckpointOptions(cast_on_save=[("w", np.float16)])
    path = ckpt.save(f"{any_store.url}/a", {"w": np.arange(9.0), "b": np.ones(2)}, options=options)
    tree = ckpt.load(path)
    assert (tree["w"].dtype, tree["b"].dtype) == (np.float16, np.float64)
    assert ckpt.verify(path).ok
