"""Several real processes that save to one place in SeaweedFS, and restore from it."""

import signal

import numpy as np
import pytest
from real_processes import outputs_of, running
from test_several_processes import RESTORE, SAVE, SAVE_AT_RISK
from trees import LAYOUTS, differences, placed_tree

import ckpt_jax as ckpt
from ckpt_jax.store import objects


def writers_of(path):
    """The processes that have written shards of a checkpoint."""
    shards = [key.split("/")[1] for key in objects.keys_below(path) if key.startswith("shards/")]
    return {int(shard.split("-")[2]) for shard in shards}


def test_what_two_processes_save_is_restored_by_two_and_by_one(s3):
    for output in outputs_of(SAVE, 2, 4, s3.url, "4x2"):
        assert "ckpt-1 1\nTrue\n" in output
    assert writers_of(f"{s3.url}/saved") == {0, 1}
    assert ckpt.verify(f"{s3.url}/saved").ok
    for output in outputs_of(RESTORE, 2, 4, s3.url, "2x4"):
        assert output.endswith("2x4 []\none []\n"), output
    for layout in LAYOUTS.values():
        target = placed_tree(*layout, abstract=True)
        assert differences(ckpt.restore(f"{s3.url}/saved", target), *layout) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_what_some_processes_save_is_restored_by_another_number(s3, count):
    outputs_of(SAVE, count, 8 // count, s3.url, "4x2")
    for restored_by in {1, 2, 4} - {count}:
        for output in outputs_of(RESTORE, restored_by, 8 // restored_by, s3.url, "2x4", "8"):
            assert output.endswith("2x4 []\none []\n8 []\none []\n"), output


def at_risk(url, victim, point):
    """What the survivor of two processes says of a save in which the other one is killed."""
    with running(SAVE_AT_RISK, 2, 1, url, victim, point, int(signal.SIGKILL)) as run:
        run.wait_for_signal(victim, signal.SIGKILL)
        (survivor,) = {0, 1} - {victim}
        return run.finish(survivor)[survivor]


def assert_can_be_saved(url):
    path = ckpt.save(f"{url}/a", {"w": np.zeros(3)}, overwrite=True)
    assert ckpt.load(path)["w"].tolist() == [0, 0, 0]


def test_a_process_that_dies_before_it_reports_is_named_and_nothing_is_saved(s3):
    output = at_risk(s3.url, 1, "before report")
    assert "failed BarrierTimeoutError (1,)" in output, output
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{s3.url}/a")
    assert writers_of(f"{s3.url}/a") <= {1}  # who lives removes its own
    assert_can_be_saved(s3.url)


@pytest.mark.parametrize(
    ("point", "is_there"),
    [
        pytest.param("before decision", False, marks=pytest.mark.slow),
        pytest.param("after decision", False, marks=pytest.mark.slow),
        ("before outcome", True),
    ],
)
def test_if_process_0_dies_nothing_is_removed_that_it_may_have_committed(s3, point, is_there):
    """JAX ends the other process with it, which has said that it does not know the outcome, or was
    about to."""
    assert "saved\n" not in at_risk(s3.url, 0, point)
    if is_there:
        assert ckpt.verify(f"{s3.url}/a").ok
        assert ckpt.load(f"{s3.url}/a")["w"].tolist() == list(range(1000))
    else:
        with pytest.raises(ckpt.CheckpointNotFoundError):
            ckpt.load(f"{s3.url}/a")
    assert 1 in writers_of(f"{s3.url}/a")
    assert_can_be_saved(s3.url)
