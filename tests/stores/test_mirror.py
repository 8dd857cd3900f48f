"""Managers that copy their checkpoints to another storage, in the background."""

import logging
import os
import shutil
import threading

import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.manage import mirror as mirror_module


def manager_of(directory, mirror, **arguments):
    checkpoint = ckpt.Checkpoint(w=np.zeros(3))
    return ckpt.CheckpointManager(checkpoint, directory, mirror=mirror, **arguments)


def save(manager, *steps):
    for step in steps:
        manager.save(step, w=np.full(3, float(step)), metrics={"loss": 1 / step})
        manager.sync()


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_every_nth_checkpoint_is_copied_with_its_metrics_and_kept_as_policies_say(
    any_store, tmp_path
):
    manager = manager_of(tmp_path, any_store.url, mirror_every=2, max_to_keep=2)
    save(manager, 1, 2, 3, 4, 5, 6)
    there = manager_of(any_store.url, None, max_to_keep=2)
    assert names(manager.checkpoints) == ["ckpt-5", "ckpt-6"]
    assert names(there.checkpoints) == ["ckpt-4", "ckpt-6"]
    assert there.metrics(4) == {"loss": 0.25}
    assert ckpt.latest_checkpoint(any_store.url) == f"{any_store.url}/ckpt-6"
    assert ckpt.verify(f"{any_store.url}/ckpt-6").ok


def test_a_program_on_a_new_machine_goes_on_from_the_mirror(any_store, tmp_path):
    save(manager_of(tmp_path / "old", any_store.url), 1, 2)
    shutil.rmtree(tmp_path / "old")
    fresh = manager_of(tmp_path / "new", any_store.url)
    assert fresh.restore_or_initialize() == f"{any_store.url}/ckpt-2"
    assert fresh.checkpoint.w.tolist() == [2.0] * 3
    save(fresh, 3)
    assert names(manager_of(any_store.url, None).checkpoints) == ["ckpt-1", "ckpt-2", "ckpt-3"]


def test_the_newest_usable_checkpoint_of_both_places_is_restored(memory, tmp_path):
    save(manager_of(tmp_path, memory.url, mirror_every=2), 1, 2, 3)
    assert manager_of(tmp_path, memory.url).restore_or_initialize() == f"{tmp_path}/ckpt-3"
    shutil.rmtree(tmp_path / "ckpt-3")
    shutil.rmtree(tmp_path / "ckpt-2")
    assert manager_of(tmp_path, memory.url).restore_or_initialize() == f"{memory.url}/ckpt-2"


def test_training_does_not_wait_and_what_is_overtaken_is_left_out(memory, tmp_path, monkeypatch):
    begun, released = threading.Event(), threading.Event()
    copy = mirror_module.copy

    def slow_copy(*arguments, **options):
        begun.set()
        assert released.wait(60)
        return copy(*arguments, **options)

    monkeypatch.setattr(mirror_module, "copy", slow_copy)
    manager = manager_of(tmp_path, memory.url)
    for step in (1, 2, 3, 4):
        manager.save(step, w=np.full(3, float(step)))
        assert begun.wait(60)
    released.set()
    manager.sync()
    assert names(manager_of(memory.url, None).checkpoints) == ["ckpt-1", "ckpt-4"]


def test_a_store_that_fails_is_logged_and_the_next_checkpoint_is_copied(moto, tmp_path, caplog):
    proxy = moto.through_proxy()
    ckpt.use_storage(moto.url, retries=0)
    manager = manager_of(tmp_path, moto.url)
    save(manager, 1)
    proxy.dies_at(1, acted=False)
    with caplog.at_level(logging.WARNING, "ckpt_jax"):
        save(manager, 2)
    assert "ckpt-2 was not copied to" in caplog.text
    assert manager_of(tmp_path, moto.url).restore_or_initialize() == f"{tmp_path}/ckpt-2"
    proxy.heal()
    save(manager, 3)
    assert names(manager_of(moto.url, None).checkpoints) == ["ckpt-1", "ckpt-3"]
    proxy.dies_at(1, acted=False)
    with pytest.raises(OSError):  # there may be a checkpoint: it does not begin anew
        manager_of(tmp_path / "new", moto.url).restore_or_initialize()


def test_wrong_arguments_of_a_mirror_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mirror_every: expected 1 or more, got 0"):
        manager_of(tmp_path, tmp_path / "mirror", mirror_every=0)
    with pytest.raises(ValueError, match="^mirror: expected a path"):
        manager_of(tmp_path, "hdfs://host/a")
