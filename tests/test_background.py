"""Saving in the background: what is written, when errors come, and how a program ends."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt

ASYNC = ckpt.CheckpointOptions(enable_async=True)


class Count(ckpt.PythonState):
    def __init__(self, n: int):
        self.n = n

    def serialize(self) -> str:
        return str(self.n)

    def deserialize(self, value: bytes) -> None:
        self.n = int(value)


def test_what_is_written_is_what_was_there_when_save_returned(tmp_path: Path):
    """The program donates, deletes, overwrites and replaces; the file does not notice."""
    donated, deleted, host = jnp.arange(1000.0), jnp.ones(1000), np.arange(5)
    variable, count = ckpt.Variable(jnp.full(3, 2.0)), Count(3)
    checkpoint = ckpt.Checkpoint(tree=[donated, deleted, host], variable=variable, count=count)
    gate = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(),))
    path = checkpoint.save(tmp_path / "c", options)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(donated))
    deleted.delete()
    host[:] = -1
    variable.assign(jnp.zeros(3))
    count.n = 99
    checkpoint.tree = None
    gate.set()
    checkpoint.sync()
    tree = ckpt.load(path)
    np.testing.assert_array_equal(tree["tree"][0], np.arange(1000.0))
    np.testing.assert_array_equal(tree["tree"][1], np.ones(1000))
    np.testing.assert_array_equal(tree["tree"][2], np.arange(5))
    np.testing.assert_array_equal(tree["variable"], np.full(3, 2.0))
    assert tree["count"] == b"3"


def test_one_counter_counts_saves_of_both_kinds(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    paths = [checkpoint.save(tmp_path / "c", options) for options in (None, ASYNC, None, ASYNC)]
    checkpoint.sync()
    assert [Path(path).name for path in paths] == ["c-1", "c-2", "c-3", "c-4"]
    assert [ckpt.load(path)["save_counter"] for path in paths] == [1, 2, 3, 4]
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-4")


@pytest.mark.behaviour(16)
def test_a_restore_waits_for_the_save_before_it(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=5)
    path = checkpoint.save(tmp_path / "c", ASYNC)
    checkpoint.x = 0
    checkpoint.restore(path).assert_consumed()
    assert checkpoint.x == 5


def test_an_error_is_raised_once_by_whatever_comes_next(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)

    def fail() -> None:
        raise RuntimeError("no more room")

    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,))
    checkpoint.save(tmp_path / "c", options)
    with pytest.raises(ckpt.AsyncSaveError, match="no more room") as raised:
        checkpoint.save(tmp_path / "c")
    assert isinstance(raised.value.__cause__, RuntimeError)
    checkpoint.sync()


def test_a_failed_save_leaves_the_counter_and_the_state_as_they_were(tmp_path: Path):
    (tmp_path / "c-1").write_text("in the way")
    checkpoint = ckpt.Checkpoint(x=1)
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "c", ASYNC)
    assert checkpoint.save_counter == 0
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["c-1"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_normal_exit_waits_and_does_not_swallow_an_error(tmp_path: Path, fails: bool):
    program = f"""
        import numpy as np
        import ckpt_jax as ckpt

        def after():
            if {fails}:
                raise RuntimeError("lost")

        checkpoint = ckpt.Checkpoint(x=np.ones(3_000_000))
        options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(after,))
        checkpoint.save({str(tmp_path / "c")!r}, options)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert ckpt.verify(tmp_path / "c-1").ok
    assert ("lost" in done.stderr) == fails
    assert (ckpt.latest_checkpoint(tmp_path) is None) == fails
