"""Managers after accidents: state files that are gone, foreign or odd, saves that were not
recorded, several managers in one directory, and directories of other libraries."""

import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from foreign import FIXTURES
from managers import numbers_in, run_in, save
from owners import ELSEWHERE, digits_of, ended_process

import ckpt_jax as ckpt
from ckpt_jax.api.latest import checkpoints_iterator
from ckpt_jax.store.staging import owner_digits
from ckpt_jax.store.state_file import CheckpointState, update_checkpoint_state

pytestmark = pytest.mark.usefixtures("no_flushing")


# --- state files that are gone or cannot be read ------------------------------------------------


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


SPOILT = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(60)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pipe": make_pipe,
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "a NUL in a path": lambda path: path.write_text('model_checkpoint_path: "a\\000b"\n'),
    "a NUL in a listed path": lambda path: path.write_text(
        'model_checkpoint_path: "ckpt-3"\nall_model_checkpoint_paths: "a\\000b"\n'
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_without_a_state_file_the_checkpoints_are_found_by_name_with_a_word(tmp_path, caplog, how):
    save(run_in(tmp_path), 1, 2, 10)
    SPOILT[how](tmp_path / "checkpoint")
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-10")
    assert str(tmp_path / "checkpoint") in caplog.text
    caplog.clear()
    manager = run_in(tmp_path, max_to_keep=1)
    assert manager.latest_checkpoint == str(tmp_path / "ckpt-10")
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-10")
    assert manager.checkpoint.step == 10
    assert str(tmp_path / "checkpoint") in caplog.text
    save(manager, 11, 12)
    # Nobody knows who wrote the others.
    assert numbers_in(tmp_path) == [1, 2, 10, 12]
    caplog.clear()
    assert run_in(tmp_path).steps == (12,)
    assert not caplog.records


def test_numbers_of_the_save_counter_go_on_after_the_state_file_is_gone(tmp_path):
    manager = run_in(tmp_path)
    for _ in range(3):
        manager.save()
    (tmp_path / "checkpoint").unlink()
    again = run_in(tmp_path)
    again.restore_or_initialize()
    assert again.save() == str(tmp_path / "ckpt-4")


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_program_that_restores_nothing_does_not_overwrite_in_silence(tmp_path, caplog, is_listed):
    run_in(tmp_path).save()
    if not is_listed:
        (tmp_path / "checkpoint").unlink()
    fresh = run_in(tmp_path)
    caplog.clear()
    fresh.save()
    (record,) = caplog.records
    assert str(tmp_path / "ckpt-1") in record.getMessage()
    assert "restore_or_initialize" in record.getMessage()


def test_a_damaged_newest_falls_back_by_name_without_a_state_file(tmp_path):
    path = save(run_in(tmp_path), 1, 2, 3)
    (tmp_path / "checkpoint").unlink()
    os.unlink(os.path.join(path, "manifest.ckpt"))
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert run_in(tmp_path).restore_or_initialize() == str(tmp_path / "ckpt-2")


def test_checkpoints_that_were_saved_by_path_are_found(tmp_path, caplog):
    for step in (9, 100, 20):
        ckpt.save(tmp_path / f"step-{step}", {"step": step})
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "step-100")
    assert "step-100" in caplog.text
    assert list(checkpoints_iterator(tmp_path, timeout=0)) == [str(tmp_path / "step-100")]


def test_checkpoints_without_numbers_are_named(tmp_path, caplog):
    ckpt.save(tmp_path / "final", {"step": 1})
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert "final" in caplog.text


def test_checkpoints_of_another_name_are_named_before_a_run_starts_from_scratch(tmp_path, caplog):
    ckpt.save(tmp_path / "step-100", {"step": 1})
    called = []
    manager = run_in(tmp_path, init_fn=lambda: called.append("init"))
    assert manager.restore_or_initialize() is None
    assert called == ["init"]
    assert "step-100" in caplog.text and "checkpoint_name" in caplog.text


def test_a_run_that_changes_its_name_goes_on(tmp_path):
    save(run_in(tmp_path), 1, 2)
    manager = run_in(tmp_path, checkpoint_name="model")
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-2")
    assert save(manager, 3) == str(tmp_path / "model-3")
    assert run_in(tmp_path, checkpoint_name="model").restore_or_initialize() == str(
        tmp_path / "model-3"
    )


# --- state files from elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("with_times", [False, True])
def test_a_state_file_with_paths_of_another_machine_means_the_checkpoints_beside_it(
    tmp_path, caplog, with_times
):
    save(run_in(tmp_path), 1, 2, 3)
    paths = ("/their/run/ckpt-2", "/their/run/ckpt-3")
    times = (5.0, 6.0) if with_times else ()
    update_checkpoint_state(tmp_path, CheckpointState(paths[-1], paths, times))
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-3")
    assert "/their/run/ckpt-3" in caplog.text
    caplog.clear()
    manager = run_in(tmp_path)
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-3")
    assert manager.checkpoint.step == 3
    assert "/their/run/ckpt-3" in caplog.text
    assert manager.steps == ((2, 3) if with_times else ())
    assert save(manager, 4) == str(tmp_path / "ckpt-4")
    assert "/their" not in (tmp_path / "checkpoint").read_text()


def test_the_place_that_a_state_file_names_counts_as_long_as_something_is_there(tmp_path):
    theirs = save(run_in(tmp_path / "theirs"), 3)
    save(run_in(tmp_path / "mine"), 3)
    update_checkpoint_state(tmp_path / "mine", CheckpointState(theirs))
    assert ckpt.latest_checkpoint(tmp_path / "mine") == theirs
    assert run_in(tmp_path / "mine").restore_or_initialize() == theirs


# --- files of metrics ---------------------------------------------------------------------------


ODD_METRICS = {
    "deep": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "a large integer": lambda path: path.write_text(json.dumps({"ckpt-1": {"a": 10**400}})),
    "a pipe": make_pipe,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a wrong list": lambda path: path.write_text('{"abandoned": {"ckpt-1": 1}}'),
}


@pytest.mark.parametrize("how", [*ODD_METRICS, "missing"])
def test_without_the_file_of_metrics_nothing_is_removed_for_not_being_the_best(
    tmp_path, caplog, how
):
    arguments = {"max_to_keep": 1, "policies": [ckpt.KeepBest("acc")]}
    manager = run_in(tmp_path, **arguments)
    for step, acc in enumerate((0.9, 0.5, 0.4), 1):
        save(manager, step, metrics={"acc": acc})
    path = tmp_path / "checkpoint-metrics.json"
    {**ODD_METRICS, "missing": lambda path: path.unlink()}[how](path)
    manager = run_in(tmp_path, **arguments)
    manager.restore_or_initialize()
    if how == "a folder":
        with pytest.raises(OSError, match=r"checkpoint-metrics\.json"):
            save(manager, 4, metrics={"acc": 0.3})
        path.rmdir()
    for step in (4, 5):
        save(manager, step, metrics={"acc": 0.3})
    assert {1, 3} <= set(numbers_in(tmp_path))
    assert str(path) in caplog.text
    again = run_in(tmp_path, **arguments)
    save(again, 6, metrics={"acc": 0.1})
    assert {1, 3} <= set(numbers_in(tmp_path))


def test_without_the_file_of_metrics_a_manager_that_asks_for_none_goes_on(tmp_path, caplog):
    manager = run_in(tmp_path)
    for step in (1, 2, 3):
        save(manager, step, metrics={"acc": 0.9})
    (tmp_path / "checkpoint-metrics.json").unlink()
    manager = run_in(tmp_path, max_to_keep=2)
    assert manager.metrics(3) == {}
    save(manager, 4)
    assert numbers_in(tmp_path) == [3, 4]
    assert not caplog.records


def test_a_policy_of_ones_own_that_asks_for_metrics_removes_nothing_either(tmp_path):
    class Good:
        def keep(self, records):
            return {r.number for r in records if r.metrics.get("acc", 0) > 0.5}

    for step, acc in enumerate((0.9, 0.8, 0.1), 1):
        save(run_in(tmp_path, max_to_keep=1, policies=[Good()]), step, metrics={"acc": acc})
    (tmp_path / "checkpoint-metrics.json").unlink()
    save(run_in(tmp_path, max_to_keep=1, policies=[Good()]), 4, metrics={"acc": 0.1})
    assert {1, 2} <= set(numbers_in(tmp_path))


# --- committed, but not recorded ----------------------------------------------------------------


def fail():
    raise ConnectionError("upload failed")


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [fail, interrupt])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("by_step", [False, True])
def test_what_was_committed_but_not_recorded_is_adopted_at_the_next_save(
    tmp_path, error, is_async, by_step
):
    manager = run_in(tmp_path, max_to_keep=2)
    steps = itertools.count(10, 7)
    options = ckpt.CheckpointOptions(write_callbacks=[error], enable_async=is_async)
    manager.save(next(steps) if by_step else None)
    for _ in range(4):
        with pytest.raises((ConnectionError, KeyboardInterrupt, ckpt.AsyncSaveError)):
            manager.save(next(steps) if by_step else None, options=options)
            manager.sync()
    assert len(numbers_in(tmp_path)) == 5
    assert len(manager.gc(dry_run=True)) == 3
    assert len(numbers_in(tmp_path)) == 5
    manager.save(next(steps) if by_step else None)
    assert len(numbers_in(tmp_path)) == 2
    assert manager.steps == tuple(numbers_in(tmp_path))
    assert manager.gc() == []
    if not by_step:
        assert manager.checkpoint.save_counter == numbers_in(tmp_path)[-1]


def test_gc_alone_bounds_what_was_not_recorded(tmp_path):
    manager = run_in(tmp_path, max_to_keep=2)
    save(manager, 1)
    for step in (2, 3, 4):
        with pytest.raises(ConnectionError):
            save(manager, step, options=ckpt.CheckpointOptions(write_callbacks=[fail]))
    removed = manager.gc()
    assert sorted(map(os.path.basename, removed)) == ["ckpt-2", "ckpt-3"]
    assert manager.latest_checkpoint == str(tmp_path / "ckpt-1")
    assert numbers_in(tmp_path) == [1, 4]


def test_an_interrupt_just_after_the_commit_leaves_no_number_below_the_disk(tmp_path, monkeypatch):
    manager = run_in(tmp_path, max_to_keep=2)
    manager.save()
    publish = ckpt.store.directory.Staging.publish

    def interrupted(self, **arguments):
        publish(self, **arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_jax.store.directory.Staging.publish", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                manager.save()
    assert numbers_in(tmp_path) == [1, 2, 3]
    assert manager.checkpoint.save_counter == 3
    manager.save()
    assert manager.steps == (3, 4) == tuple(numbers_in(tmp_path))


def test_a_state_file_that_could_not_be_written_leaves_no_checkpoint_for_ever(
    tmp_path, monkeypatch
):
    manager = run_in(tmp_path, max_to_keep=1)
    save(manager, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ckpt_jax.store.state_file.replace_file", full)
        with pytest.raises(OSError, match="No space"):
            save(manager, 2)
    assert manager.steps == (1,)
    save(manager, 3)
    assert numbers_in(tmp_path) == [3]


def test_what_a_killed_program_has_not_recorded_is_named_at_the_restart(tmp_path, caplog):
    manager = run_in(tmp_path, max_to_keep=1)
    save(manager, 1)
    with pytest.raises(ConnectionError):
        save(manager, 7, options=ckpt.CheckpointOptions(write_callbacks=[fail]))
    again = run_in(tmp_path, max_to_keep=1)
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "none of 7." in record.getMessage()
    assert again.restore_or_initialize() == str(tmp_path / "ckpt-1")
    again.restore(7).assert_consumed()
    again.delete(7)
    assert numbers_in(tmp_path) == [1]


# --- several managers in one directory ----------------------------------------------------------


def test_two_managers_of_one_directory_leave_each_others_checkpoints_and_records_alone(tmp_path):
    def make(name, limit):
        return run_in(
            tmp_path, max_to_keep=limit, checkpoint_name=name, policies=[ckpt.KeepBest("x")]
        )

    last, best = make("last", 2), make("best", 1)
    for step in (10, 20, 30):
        save(last, step, metrics={"x": -step})
    save(best, 20, metrics={"x": 1.0})
    assert last.steps == (10, 20, 30) and best.steps == (20,)
    last, best = make("last", 2), make("best", 1)
    assert last.latest_checkpoint == str(tmp_path / "last-30")
    assert best.latest_checkpoint == str(tmp_path / "best-20")
    assert last.restore_or_initialize() == str(tmp_path / "last-30")
    assert last.metrics(10) == {"x": -10.0} and best.metrics(20) == {"x": 1.0}
    for step in (40, 50, 60):
        save(last, step, metrics={"x": -step})
    assert numbers_in(tmp_path, "last") == [10, 50, 60]
    assert numbers_in(tmp_path, "best") == [20]
    assert make("best", 1).steps == (20,)
    save(best, 50, metrics={"x": 2.0})
    assert numbers_in(tmp_path, "best") == [50]
    assert make("last", 2).steps == (10, 50, 60)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "best-50")
    assert best.gc() == last.gc() == []


def test_the_abandoned_branch_of_one_manager_is_none_of_the_others_business(tmp_path):
    a, b = (run_in(tmp_path, checkpoint_name=name) for name in ("a", "b"))
    save(a, 1, 2, 3)
    save(b, 1, 2, 3)
    a.restore(1)
    save(a, 5)
    save(b, 4)
    assert run_in(tmp_path, checkpoint_name="a").steps == (2, 3, 1, 5)
    assert run_in(tmp_path, checkpoint_name="b").steps == (1, 2, 3, 4)


def test_hours_of_one_manager_do_not_make_another_forget_its_checkpoints(tmp_path):
    now = [1e6]

    def make(name, hours=None):
        return run_in(
            tmp_path,
            max_to_keep=2,
            keep_checkpoint_every_n_hours=hours,
            checkpoint_name=name,
            clock=lambda: now[0],
        )

    a, b = make("a", 1), make("b")
    save(b, 1, 2)
    for step in range(6):
        now[0] += 3600
        save(a, step)
    b = make("b")
    assert b.steps == (1, 2)


# --- checkpoints of other libraries -------------------------------------------------------------


def tensorflow(directory):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ckpt-3.index").write_text("")
    (directory / "ckpt-3.data-00000-of-00001").write_text("")


FOREIGN = {
    "TensorFlow": tensorflow,
}


@pytest.mark.parametrize("library", FOREIGN)
def test_a_directory_of_another_library_is_refused_by_name(tmp_path, library):
    FOREIGN[library](tmp_path / "run")
    manager = run_in(tmp_path / "run", init_fn=lambda: pytest.fail("from scratch"))
    for ask in (
        lambda: ckpt.latest_checkpoint(tmp_path / "run"),
        manager.restore_or_initialize,
        manager.restore,
    ):
        with pytest.raises(ckpt.UnsupportedFormatError, match=library.split()[0]) as raised:
            ask()
        assert str(tmp_path / "run") in str(raised.value)


def test_a_state_file_that_names_a_damaged_checkpoint_of_another_library_says_so(tmp_path, caplog):
    tensorflow(tmp_path)
    update_checkpoint_state(tmp_path, CheckpointState("ckpt-3"))
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert "ckpt-3 is not usable" in caplog.text


def test_our_own_checkpoints_beside_those_of_another_library_count(tmp_path):
    shutil.copytree(FIXTURES / "orbax" / "0.12.8_standard", tmp_path / "1000")
    save(run_in(tmp_path), 1001)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1001")
    assert run_in(tmp_path).restore_or_initialize() == str(tmp_path / "ckpt-1001")


def test_other_files_do_not_stop_a_new_run(tmp_path):
    (tmp_path / "vectors.index").write_text("")
    (tmp_path / "events").mkdir()
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert run_in(tmp_path).restore_or_initialize() is None


# --- at the end of a script ---------------------------------------------------------------------


def test_a_script_that_used_nothing_of_a_checkpoint_ends_with_a_word(tmp_path):
    program = f"""
        import jax.numpy as jnp, ckpt_jax as ckpt
        def model(x):
            m = ckpt.AutoTrackable(); m.w = ckpt.Variable(jnp.full(2, x)); return m
        path = ckpt.Checkpoint(model=model(1.)).write({str(tmp_path / "c")!r})
        net = model(0.)
        checkpoint = ckpt.Checkpoint(modle=net)
        checkpoint.read(path)
        fine = ckpt.Checkpoint(model=model(0.))
        fine.read(path).assert_consumed()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.count("were never used") == 1
    assert "model.w" in done.stderr and str(tmp_path / "c") in done.stderr


def test_a_copy_of_the_directory_goes_on_with_everything(tmp_path):
    manager = run_in(tmp_path / "old", max_to_keep=None)
    for step in (1, 2, 3):
        save(manager, step, metrics={"x": np.float32(step)})
    manager.restore(2)
    save(manager, 4, metrics={"x": 4.0})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    again = run_in(tmp_path / "new")
    assert again.steps == manager.steps == (3, 1, 2, 4)
    assert [again.metrics(step)["x"] for step in again.steps] == [3, 1, 2, 4]


# --- notices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [False, True])
def test_a_notice_that_the_loop_never_asks_for_is_told_at_once(tmp_path, asks):
    said: list[str] = []
    came = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
            came.set()

    listener = Listener()
    logging.getLogger("ckpt_jax").addHandler(listener)
    try:
        with ckpt.PreemptionHandler(run_in(tmp_path)) as handler:
            if asks:
                handler.reached(0)
            os.kill(os.getpid(), signal.SIGTERM)
            if not asks:
                assert came.wait(60)
            assert handler.reached(1)
    finally:
        logging.getLogger("ckpt_jax").removeHandler(listener)
    assert handler.saved == str(tmp_path / "ckpt-1")
    assert [("reached(step)" in each) for each in said] == [True] * (not asks)


# --- what dead runs have left -------------------------------------------------------------------


def left_by(owner, path):
    """Staging with something in it."""
    staging = f"{path}.staging-{owner}"
    os.makedirs(f"{staging}/shards")
    return os.path.basename(staging)


def left_in(directory):
    return {name for name in os.listdir(directory) if ".staging-" in name}


def test_the_first_save_of_a_manager_removes_what_dead_runs_of_its_name_have_left(tmp_path):
    save(run_in(tmp_path), 1, 2)
    dead, alive = digits_of(ended_process()), f"{owner_digits()}00000000"
    for number in (1, 2, 7):
        left_by(dead, tmp_path / f"ckpt-{number}")
    kept = {left_by(alive, tmp_path / "ckpt-8"), left_by(ELSEWHERE, tmp_path / "ckpt-9")}
    kept |= {left_by(dead, tmp_path / name) for name in ("ckpt-eval-1", "ckpt-x", "other-1")}
    before = os.listdir(tmp_path)
    manager = run_in(tmp_path)
    manager.restore_or_initialize()
    assert os.listdir(tmp_path) == before  # it may belong to an evaluation
    save(manager, 3)
    assert left_in(tmp_path) == kept
    again = left_by(dead, tmp_path / "ckpt-7")
    save(manager, 4)
    assert left_in(tmp_path) == kept | {again}  # it does not look again at each save


def test_a_directory_without_checkpoints_is_cleaned_as_well(tmp_path):
    left_by(digits_of(ended_process()), tmp_path / "ckpt-5")
    save(run_in(tmp_path), 1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1"]


def test_while_the_latest_is_unusable_what_dead_runs_have_left_stays(tmp_path):
    """It may be the one whole copy that there is."""
    save(run_in(tmp_path), 1, 2)
    left = left_by(digits_of(ended_process()), tmp_path / "ckpt-1")
    os.unlink(tmp_path / "ckpt-2" / "meta" / "index")
    save(run_in(tmp_path), 3)
    assert left_in(tmp_path) == {left}


# --- removal in two phases ----------------------------------------------------------------------


def test_what_is_removed_leaves_the_state_file_before_it_is_deleted(tmp_path, monkeypatch):
    manager = run_in(tmp_path, max_to_keep=2)
    save(manager, 1, 2)
    rmtree, seen = shutil.rmtree, []

    def look(path, **options):
        if "ckpt-1.staging-" in str(path):
            state = ckpt.get_checkpoint_state(tmp_path)
            seen.append(list(map(os.path.basename, state.all_model_checkpoint_paths)))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    save(manager, 3)
    assert seen == [["ckpt-2", "ckpt-3"]]
    assert numbers_in(tmp_path) == [2, 3]


def test_a_run_that_is_killed_while_it_deletes_leaves_it_to_the_next(tmp_path):
    program = """
        import os, shutil, signal, sys
        import ckpt_jax as ckpt

        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), sys.argv[1], max_to_keep=1)
        manager.save(1)
        rmtree = shutil.rmtree

        def die(path, **options):
            if "ckpt-1.staging-" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            rmtree(path, **options)

        shutil.rmtree = die
        manager.save(2)
        """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path])
    assert run.returncode == -signal.SIGKILL
    assert len(left_in(tmp_path)) == 1
    manager = run_in(tmp_path, max_to_keep=1)
    assert manager.steps == (2,)
    save(manager, 3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-3"]
