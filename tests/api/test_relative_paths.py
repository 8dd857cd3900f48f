"""Relative paths mean what they meant when they were given, whatever the program does later."""

import os
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt


@pytest.fixture
def two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The current directory, and another one."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    return here, elsewhere


def test_a_save_in_the_background_ends_where_it_began(two_directories: tuple[Path, Path]):
    here, elsewhere = two_directories
    gone = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=[lambda: gone.wait()])
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    assert checkpoint.save("ckpt", options) == "ckpt-1"
    os.chdir(elsewhere)
    gone.set()
    checkpoint.sync()
    assert ckpt.latest_checkpoint(here) == str(here / "ckpt-1")
    assert not any(elsewhere.iterdir())


def test_a_manager_stays_in_its_directory(two_directories: tuple[Path, Path]):
    here, elsewhere = two_directories
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    manager = ckpt.CheckpointManager(checkpoint, "run", max_to_keep=2)
    assert manager.save(metrics={"loss": 1.0}) == "run/ckpt-1"
    gone = threading.Event()
    manager.save(
        options=ckpt.CheckpointOptions(enable_async=True, write_callbacks=[lambda: gone.wait()])
    )
    os.chdir(elsewhere)
    gone.set()
    manager.sync()
    manager.save()
    assert manager.directory == "run"
    assert manager.checkpoints == ["run/ckpt-2", "run/ckpt-3"]
    assert manager.restore_or_initialize() == "run/ckpt-3" == manager.latest_checkpoint
    assert manager.gc() == []
    assert not any(elsewhere.iterdir())
    names = {entry.name for entry in (here / "run").iterdir()}
    assert names == {"ckpt-2", "ckpt-3", "checkpoint"} | (names & {"checkpoint-metrics.json"})
    again = ckpt.CheckpointManager(checkpoint, here / "run", max_to_keep=2)
    assert again.checkpoints == [str(here / "run" / name) for name in ("ckpt-2", "ckpt-3")]


def test_what_waits_is_restored_from_where_the_checkpoint_is(two_directories: tuple[Path, Path]):
    _, elsewhere = two_directories
    path = ckpt.Checkpoint(x=jnp.ones(2)).save("ckpt")
    fresh = ckpt.Checkpoint()
    status = fresh.restore(path)
    os.chdir(elsewhere)
    fresh.x = jnp.zeros(2)
    assert fresh.x.tolist() == [1, 1]
    status.assert_consumed()


def test_a_directory_may_be_named_by_a_detour_that_does_not_exist(
    two_directories: tuple[Path, Path],
):
    here, _ = two_directories
    checkpoint = ckpt.Checkpoint(x=jnp.ones(2))
    path = checkpoint.save("nowhere/../run/ckpt")
    assert path == "nowhere/../run/ckpt-1"
    manager = ckpt.CheckpointManager(checkpoint, "nowhere/../run", max_to_keep=1)
    assert manager.save() == "nowhere/../run/ckpt-2" == manager.latest_checkpoint
    assert ckpt.latest_checkpoint(here / "run") == str(here / "run" / "ckpt-2")
