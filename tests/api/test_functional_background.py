"""`ckpt.save` in the background, and `ckpt.sync`."""

import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt

ASYNC = ckpt.CheckpointOptions(enable_async=True)


def held(gate, **more):
    """Options for a save that does not end before the gate opens."""
    return ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=(lambda: gate.wait(60),), **more
    )


def failing(**more):
    def fail():
        raise OSError("the disk is gone")

    return ckpt.CheckpointOptions(write_callbacks=(fail,), **more)


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()
    ckpt.sync()


def test_save_returns_before_the_checkpoint_is_done(tmp_path, gate):
    ended = threading.Event()
    options = ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=(lambda: gate.wait(60), ended.set)
    )
    assert ckpt.save(tmp_path / "a", {"step": 7}, options=options) == str(tmp_path / "a")
    assert not ended.is_set()
    gate.set()
    ckpt.sync()
    assert ended.is_set()
    assert ckpt.load(tmp_path / "a") == {"step": 7}


def test_what_the_program_changes_meanwhile_is_not_saved(tmp_path, gate):
    values = np.zeros(1000)
    ckpt.save(tmp_path / "a", {"values": values}, options=held(gate))
    values[:] = 1
    gate.set()
    assert not ckpt.load(tmp_path / "a")["values"].any()


def test_saves_to_different_paths_come_one_after_the_other(tmp_path, gate):
    order = []

    def noted(name):
        return ckpt.CheckpointOptions(
            enable_async=True, write_callbacks=(lambda: order.append(name),)
        )

    for name in "abc":
        ckpt.save(tmp_path / name, {"step": 1}, options=noted(name))
    ckpt.sync()
    assert order == ["a", "b", "c"]


def test_an_error_comes_with_sync_once(tmp_path):
    ckpt.save(tmp_path / "a", {"step": 7}, options=failing(enable_async=True))
    with pytest.raises(ckpt.AsyncSaveError, match="the disk is gone") as caught:
        ckpt.sync()
    assert isinstance(caught.value.__cause__, OSError)
    ckpt.sync()


@pytest.mark.parametrize("options", [None, ASYNC])
def test_an_error_comes_with_the_next_save(tmp_path, options):
    ckpt.save(tmp_path / "a", {"step": 7}, options=failing(enable_async=True))
    with pytest.raises(ckpt.AsyncSaveError, match=str(tmp_path / "a")):
        ckpt.save(tmp_path / "b", {"step": 8}, options=options)
    assert not (tmp_path / "b").exists()
    ckpt.save(tmp_path / "b", {"step": 8}, options=options)
    ckpt.sync()


def test_what_cannot_be_saved_is_said_at_once(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="a"):
        ckpt.save(tmp_path / "a", {"a": object()}, options=ASYNC)
    ckpt.save(tmp_path / "b", {"step": 7}, options=ASYNC)
    with pytest.raises(FileExistsError):
        ckpt.save(tmp_path / "b", {"step": 8}, options=ASYNC)
    assert ckpt.load(tmp_path / "b") == {"step": 7}


@pytest.mark.parametrize(
    "read",
    [
        lambda path: ckpt.load(path)["step"],
        lambda path: ckpt.restore(path, {"step": 0})["step"],
        lambda path: int(ckpt.plan_restore(path, {"step": 0}).restored[0].path == "step") * 2,
    ],
)
def test_reading_a_path_waits_for_its_save(tmp_path, read):
    ckpt.save(tmp_path / "a", {"step": 1})
    many = ckpt.CheckpointOptions(enable_async=True)
    ckpt.save(tmp_path / "a", {"step": 2}, options=many, overwrite=True)
    assert read(tmp_path / "a") == 2


def test_reading_another_path_does_not_wait(tmp_path, gate):
    ckpt.save(tmp_path / "a", {"step": 1})
    ckpt.save(tmp_path / "b", {"step": 2}, options=held(gate))
    assert ckpt.load(tmp_path / "a") == {"step": 1}


def test_a_callback_may_read_what_was_written(tmp_path):
    found = []
    path = tmp_path / "a"
    options = ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=(lambda: found.append(ckpt.load(path)),)
    )
    ckpt.save(path, {"step": 7}, options=options)
    ckpt.sync()
    assert found == [{"step": 7}]


def test_a_save_may_be_skipped_while_another_is_in_flight(tmp_path, gate):
    ckpt.save(tmp_path / "a", {"step": 1}, options=held(gate))
    skip = ckpt.CheckpointOptions(when_busy="skip")
    assert ckpt.save(tmp_path / "b", {"step": 2}, options=skip) is None
    assert not (tmp_path / "b").exists()
    gate.set()
    ckpt.sync()
    assert ckpt.save(tmp_path / "b", {"step": 2}, options=skip) == str(tmp_path / "b")


def test_write_callbacks_of_every_verb_are_called(tmp_path):
    called = []
    options = ckpt.CheckpointOptions(write_callbacks=(called.append,))
    checkpoint = ckpt.Checkpoint(step=ckpt.Variable(1))
    paths = [
        ckpt.save(tmp_path / "a", {"step": 1}, options=options),
        ckpt.save_object({"step": 1}, tmp_path / "b", options=options),
        checkpoint.freeze().save(tmp_path / "c", options),
    ]
    assert called == paths


def test_verbs_that_save_in_the_foreground_refuse_the_background_by_name(tmp_path):
    frozen = ckpt.Checkpoint(step=ckpt.Variable(1)).freeze()
    with pytest.raises(ValueError, match=r"ckpt\.save_object always saves in the foreground"):
        ckpt.save_object({"w": jnp.ones(2)}, tmp_path / "a", options=ASYNC)
    with pytest.raises(ValueError, match=r"FrozenSaver\.save always saves in the foreground"):
        frozen.save(tmp_path / "a", ASYNC)
    assert not (tmp_path / "a").exists()


def test_a_program_that_ends_writes_what_is_left_and_logs_what_failed(tmp_path):
    program = """
import sys, ckpt_jax as ckpt
def fail(): raise OSError("the disk is gone")
ckpt.save(sys.argv[1] + "/a", {"step": 1}, options=ckpt.CheckpointOptions(enable_async=True))
ckpt.save(sys.argv[1] + "/b", {"step": 2}, options=ckpt.CheckpointOptions(
    enable_async=True, write_callbacks=(fail,)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ckpt.load(tmp_path / "a") == {"step": 1}
    assert f"saving {tmp_path}/b failed in the background: the disk is gone" in done.stderr
