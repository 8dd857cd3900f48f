"""How checkpoints that are not kept go: in the background, and by way of the trash."""

import os
import shutil
import threading

import pytest
from managers import numbers_in, run_in, save

import ckpt_jax as ckpt
from ckpt_jax.store.lease import leased

pytestmark = pytest.mark.usefixtures("no_flushing")
TRASH = ckpt.Removal(trash="trash", trash_seconds=100)


class Clock:
    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


def test_no_save_waits_for_removals_in_the_background(tmp_path, monkeypatch):
    go_on, rmtree = threading.Event(), shutil.rmtree

    def slow(path, *arguments, **options):
        if threading.current_thread().name == "ckpt-remove":
            assert go_on.wait(60)
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    manager = run_in(tmp_path, max_to_keep=1, removal=ckpt.Removal(in_background=True))
    save(manager, 1, 2, 3)
    # Gone from their paths, and from all lists, while their files are still there.
    left = [name for name in os.listdir(tmp_path) if ".staging-" in name]
    assert sorted(name.partition(".")[0] for name in left) == ["ckpt-1", "ckpt-2"]
    assert manager.steps == (3,)
    assert not os.path.exists(tmp_path / "ckpt-1")
    assert ckpt.latest_checkpoint(tmp_path).endswith("ckpt-3")
    assert run_in(tmp_path).gc() == []  # no other manager takes them for leftovers
    go_on.set()
    manager.gc()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-3"]


def test_a_removal_in_the_background_that_fails_is_said_and_cleaned_up_later(
    tmp_path, monkeypatch, caplog
):
    rmtree = shutil.rmtree

    def broken(path, *arguments, **options):
        raise OSError(5, "Input/output error")

    manager = run_in(tmp_path, max_to_keep=1, removal=ckpt.Removal(in_background=True))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", broken)
        save(manager, 1, 2)
        manager._collection._remover.wait()
    assert shutil.rmtree is rmtree and "could not be removed as a whole" in caplog.text
    (left,) = manager.gc()
    assert "ckpt-1.staging-" in left
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-2"]


def test_checkpoints_go_through_the_trash(tmp_path):
    clock = Clock()
    manager = run_in(tmp_path, max_to_keep=1, removal=TRASH, clock=clock)
    save(manager, 1, 2)
    clock.now += 60
    save(manager, 1, 3)  # another one of the same name
    assert numbers_in(tmp_path) == [3]
    trash = tmp_path / "trash"
    assert sorted(os.listdir(trash)) == ["ckpt-1.1000000", "ckpt-1.1000060", "ckpt-2.1000060"]
    assert ckpt.load(trash / "ckpt-1.1000000") == {"step": 1, "save_counter": 1}
    assert ckpt.load(trash / "ckpt-1.1000060")["save_counter"] == 3
    clock.now += 40
    (trash / "mine").mkdir()
    save(manager, 4)
    assert sorted(os.listdir(trash)) == [
        "ckpt-1.1000060",
        "ckpt-2.1000060",
        "ckpt-3.1000100",
        "mine",
    ]
    again = run_in(tmp_path, removal=TRASH, clock=clock)
    assert again.restore_or_initialize().endswith("ckpt-4")
    assert manager.steps == (4,)


def test_two_of_one_name_in_one_second_both_stay_in_the_trash(tmp_path):
    clock = Clock()
    manager = run_in(tmp_path, max_to_keep=1, removal=ckpt.Removal(trash="t"), clock=clock)
    for _ in range(2):
        save(manager, 1, 2)
    assert sorted(os.listdir(tmp_path / "t")) == [
        "ckpt-1.1000000",
        "ckpt-1.1000001",
        "ckpt-2.1000000",
    ]


def test_trash_is_emptied_in_the_background_if_both_are_asked_for(tmp_path):
    clock = Clock()
    removal = ckpt.Removal(in_background=True, trash="trash", trash_seconds=10)
    manager = run_in(tmp_path, max_to_keep=1, removal=removal, clock=clock)
    save(manager, 1, 2)
    clock.now += 10
    save(manager, 3)
    manager.gc()
    assert os.listdir(tmp_path / "trash") == ["ckpt-2.1000010"]


def test_what_is_deleted_by_hand_goes_through_the_trash_too(tmp_path):
    manager = run_in(tmp_path, removal=TRASH)
    save(manager, 1, 2, 3)
    manager.delete(2)
    manager.delete(3)  # the latest
    assert manager.steps == (1,) and numbers_in(tmp_path) == [1]
    thrown_away = sorted(os.listdir(tmp_path / "trash"))
    assert [name.partition(".")[0] for name in thrown_away] == ["ckpt-2", "ckpt-3"]
    assert ckpt.load(tmp_path / "trash" / thrown_away[0])["step"] == 2


def test_a_trash_that_is_called_like_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not called like a checkpoint ckpt-N, got 'ckpt-7'"):
        run_in(tmp_path, removal=ckpt.Removal(trash="ckpt-7"))
    run_in(tmp_path, removal=ckpt.Removal(trash="old-7"))
    with pytest.raises(TypeError, match="in_background must be True or False"):
        ckpt.Removal(in_background="trash")


def test_what_is_leased_is_neither_removed_nor_thrown_away(tmp_path):
    for removal in (ckpt.Removal(in_background=True), ckpt.Removal(trash="trash")):
        directory = tmp_path / str(removal.in_background)
        manager = run_in(directory, max_to_keep=1, removal=removal)
        path = save(manager, 1)
        with leased(path):
            save(manager, 2)
            assert numbers_in(directory) == [1, 2]
        assert manager.gc() == [path]
        assert numbers_in(directory) == [2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"trash_seconds": 5},
        {"trash": "t", "trash_seconds": -1},
        {"trash": "."},
        {"trash": ""},
    ],
)
def test_ways_of_removal_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        ckpt.Removal(**arguments)
