"""Programs beside training: managers that only read, and evaluation of what appears."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from managers import numbers_in, run_in, save
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax.store.lease import leased, without_lease
from ckpt_jax.testing.processes import run_processes

pytestmark = pytest.mark.usefixtures("no_flushing")


def files_below(directory):
    return {
        os.path.join(above, name): os.stat(os.path.join(above, name)).st_mtime_ns
        for above, folders, names in os.walk(directory)
        for name in [*folders, *names]
    }


# --- read-only managers --------------------------------------------------------------------------


def test_a_read_only_manager_changes_nothing(tmp_path):
    trainer = run_in(tmp_path, max_to_keep=None)
    save(trainer, 1, 2, 3, metrics={"loss": 1.0})
    before = files_below(tmp_path)
    evaluator = run_in(tmp_path, max_to_keep=1, read_only=True)
    for act in (
        lambda: evaluator.save(9),
        lambda: evaluator.save(9, force=True),
        lambda: evaluator.delete(1),
        lambda: evaluator.gc(),
        lambda: evaluator.record_metrics(1, accuracy=1.0),
    ):
        with pytest.raises(ckpt.CheckpointError, match="read-only and cannot .*evaluate_new"):
            act()
    assert evaluator.restore_or_initialize().endswith("ckpt-3")
    assert evaluator.restore(1).assert_consumed() and evaluator.checkpoint.step == 1
    assert evaluator.restore(best="loss").assert_consumed()
    assert evaluator.gc(dry_run=True) == [str(tmp_path / "ckpt-1"), str(tmp_path / "ckpt-2")]
    evaluator.sync()
    assert files_below(tmp_path) == before
    save(trainer, 4)  # and has taken nothing over
    assert trainer.steps == (1, 2, 3, 4)


def test_a_read_only_manager_answers_for_what_is_there_now(tmp_path):
    directory = tmp_path / "later"
    evaluator = run_in(directory, read_only=True)
    assert (evaluator.latest_checkpoint, evaluator.steps) == (None, ())
    assert evaluator.restore_or_initialize() is None
    assert not directory.exists()
    trainer = run_in(directory, max_to_keep=2)
    for step in (1, 2, 3):
        save(trainer, step, metrics={"loss": 1 / step}, metadata={"step": step})
        assert evaluator.latest_checkpoint == str(directory / f"ckpt-{step}")
        assert evaluator.steps == trainer.steps
        assert evaluator.metrics(step) == {"loss": 1 / step}
        assert evaluator.metadata(step) == {"step": step}
        assert evaluator.best("loss") == str(directory / f"ckpt-{step}")
        assert evaluator.restore().assert_consumed()
        assert evaluator.checkpoint.step == step
    trainer.restore(2)
    save(trainer, 5)
    assert evaluator.steps == trainer.steps and evaluator.latest_checkpoint.endswith("ckpt-5")


def test_read_only_processes_restore_together(tmp_path):
    save(run_in(tmp_path), 1, 2)
    before = files_below(tmp_path)

    def program(processes):
        manager = run_in(tmp_path, read_only=True)
        manager.restore_or_initialize()
        return manager.checkpoint.step

    assert run_processes(3, program) == [2, 2, 2]
    assert files_below(tmp_path) == before


# --- leases --------------------------------------------------------------------------------------


def test_a_lease_keeps_a_checkpoint_until_it_ends(tmp_path, caplog):
    trainer = run_in(tmp_path, max_to_keep=1)
    path = save(trainer, 1)
    with leased(path), leased(path):
        save(trainer, 2, 3)
        assert numbers_in(tmp_path) == [1, 3]
        assert trainer.steps == (1, 3)  # still managed
        assert ckpt.load(path) is not None
        with without_lease(path) as is_free:
            assert not is_free
    assert not caplog.records  # nothing is wrong
    assert trainer.gc() == [path]
    assert numbers_in(tmp_path) == [3]


def test_what_is_gone_or_being_removed_cannot_be_leased(tmp_path):
    path = save(run_in(tmp_path), 1)
    with without_lease(path) as is_free:
        assert is_free
        with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-1 was removed"), leased(path):
            pass
    with leased(path):
        pass
    with (
        pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-2 was removed"),
        leased(str(tmp_path / "ckpt-2")),
    ):
        pass


def test_the_lease_of_a_process_that_was_killed_has_ended(tmp_path):
    path = save(run_in(tmp_path), 1)
    program = (
        "import sys; from ckpt_jax.store.lease import leased\n"
        "with leased(sys.argv[1]): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        with without_lease(path) as is_free:
            assert not is_free
        process.kill()
        process.wait()
        with without_lease(path) as is_free:
            assert is_free


# --- evaluation ----------------------------------------------------------------------------------


def test_each_latest_checkpoint_is_evaluated_and_its_metrics_are_recorded(tmp_path):
    trainer = run_in(tmp_path, max_to_keep=ckpt.KeepBest("accuracy", 1, awaiting=1))
    steps = iter([(1,), (2, 3), (4,)])

    def wait(seconds):  # the trainer goes on while the evaluator waits
        for step in next(steps, ()):
            save(trainer, step, metrics={"loss": 0.5})

    def evaluate(path, values):
        assert values == {"step": int(path[-1])}
        return {"accuracy": np.float32(values["step"] % 4)}

    done = ckpt.evaluate_new(
        tmp_path, evaluate, only="step", timeout=9, wait=wait, clock=iter(range(99)).__next__
    )
    assert [os.path.basename(path) for path in done] == ["ckpt-1", "ckpt-3", "ckpt-4"]
    assert trainer.metrics(3) == {"loss": 0.5, "accuracy": 3.0}
    assert trainer.steps == (3, 4)
    save(trainer, 5)
    assert trainer.steps == (3, 5)  # the best, and one that waits


def test_a_slow_evaluator_of_a_fast_trainer_never_loses(tmp_path):
    """The trainer keeps one checkpoint, and saves several times during each evaluation."""
    trainer = run_in(tmp_path, max_to_keep=1)
    trainer.checkpoint.w = np.arange(1000.0)
    save(trainer, 1)
    seen = []

    def evaluate(path, values):
        step = values["step"]
        save(trainer, *range(step + 1, step + 4))
        assert ckpt.verify(path).ok
        assert set(numbers_in(tmp_path)) == {step, step + 3}
        seen.append(step)
        return {"accuracy": 1.0} if len(seen) < 5 else {"accuracy": 0.5}

    class Enough(Exception):
        pass

    def stop(seconds):
        raise Enough

    def evaluate_five(path, values):
        found = evaluate(path, values)
        if len(seen) == 5:
            raise Enough
        return found

    with pytest.raises(Enough):
        ckpt.evaluate_new(tmp_path, evaluate_five, wait=stop)
    assert seen == [1, 4, 7, 10, 13]
    save(trainer, 17)
    assert numbers_in(tmp_path) == [17]  # nothing that was evaluated is left


TRAINER = """
import sys
import numpy as np
import ckpt_jax as ckpt
checkpoint = ckpt.Checkpoint(w=np.zeros(1 << 16), step=0)
policy = ckpt.KeepBest("accuracy", 1, awaiting=1)
manager = ckpt.CheckpointManager(checkpoint, sys.argv[1], max_to_keep=policy)
options = ckpt.CheckpointOptions(durable=False)
step = 0
while not sys.stdin.closed:
    step += 1
    manager.save(step, options=options, step=step, w=np.full(1 << 16, step))
    if step % 20 == 0:
        print(flush=True)
        if not sys.stdin.readline():
            break
"""


def test_an_evaluator_beside_a_trainer_in_another_process(tmp_path):
    """All values that it gets are of one step, whatever the trainer removes meanwhile."""
    seen = []
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:

        def evaluate(path, values):
            step = values["step"]
            assert (values["w"] == step).all() and path.endswith(f"-{step}")
            assert os.path.exists(os.path.join(path, "manifest.ckpt"))
            seen.append(step)
            if len(seen) == 15:
                raise StopIteration
            return {"accuracy": -abs(step - 30)}

        def go_on():
            while trainer.stdout.readline():
                if len(seen) >= 15:
                    break
                with contextlib.suppress(OSError):
                    trainer.stdin.write("\n")
                    trainer.stdin.flush()
            with contextlib.suppress(OSError):
                trainer.stdin.close()

        pacing = threading.Thread(target=go_on)
        pacing.start()
        with pytest.raises(StopIteration):
            ckpt.evaluate_new(tmp_path, evaluate, poll_seconds=0.001, timeout=60)
        pacing.join()
        assert trainer.wait(60) == 0
    assert seen == sorted({*seen})
    best = min(seen[:-1], key=lambda step: abs(step - 30))
    manager = run_in(tmp_path, read_only=True)
    assert best in manager.steps and manager.best("accuracy", "max").endswith(f"-{best}")
    assert len(numbers_in(tmp_path)) <= 4


def test_a_step_that_is_saved_again_is_evaluated_again(tmp_path):
    trainer = run_in(tmp_path)
    save(trainer, 1)
    again = iter([True])

    def wait(seconds):
        if next(again, False):
            trainer.save(1, force=True, step=7)

    done = ckpt.evaluate_new(
        tmp_path,
        lambda path, values: {"seen": values["step"]},
        timeout=5,
        wait=wait,
        clock=iter(range(99)).__next__,
    )
    assert [os.path.basename(path) for path in done] == ["ckpt-1", "ckpt-1"]
    assert trainer.metrics(1) == {"seen": 7.0}


def test_metrics_of_what_was_replaced_meanwhile_are_not_recorded(tmp_path, caplog):
    trainer = run_in(tmp_path)
    save(trainer, 1)

    times = iter([True])

    def evaluate(path, values):
        if next(times, False):
            save(trainer, 1, force=True)
            return {"accuracy": 1.0}
        return {"f1": 0.5}  # of what has replaced it

    assert len(ckpt.evaluate_new(tmp_path, evaluate, timeout=0)) == 2
    assert trainer.metrics(1) == {"f1": 0.5}
    assert "was replaced or removed by hand" in caplog.text


def test_what_was_removed_before_it_was_read_is_passed_over(tmp_path, monkeypatch):
    trainer = run_in(tmp_path, max_to_keep=1)
    save(trainer, 1)
    load, first = ckpt.load, []

    def late(path, only=None):
        if not first:
            first.append(path)
            save(trainer, 2)
            trainer.delete(1) if 1 in trainer.steps else None
        return load(path, only=only)

    monkeypatch.setattr("ckpt_jax.manage.evaluate.load", late)
    done = ckpt.evaluate_new(tmp_path, lambda path, values: None, timeout=0)
    assert [os.path.basename(path) for path in done] == ["ckpt-2"]


def test_errors_of_the_function_and_wrong_metrics_are_raised(tmp_path):
    trainer = run_in(tmp_path, max_to_keep=1)
    save(trainer, 1)

    def fails(path, values):
        raise ckpt.CheckpointNotFoundError("another one")

    with pytest.raises(ckpt.CheckpointNotFoundError, match="another one"):
        ckpt.evaluate_new(tmp_path, fails, timeout=0)
    with pytest.raises(ValueError, match=r"metrics\['accuracy'\]: expected one real number"):
        ckpt.evaluate_new(tmp_path, lambda path, values: {"accuracy": "good"}, timeout=0)
    with pytest.raises(KeyError, match="selects"):
        ckpt.evaluate_new(tmp_path, lambda path, values: None, only="parms/**", timeout=0)
    save(trainer, 2)
    assert numbers_in(tmp_path) == [2]  # no lease is left


def test_a_function_that_measures_nothing_writes_nothing(tmp_path):
    save(run_in(tmp_path), 1)
    before = files_below(tmp_path)
    assert len(ckpt.evaluate_new(tmp_path, lambda path, values: None, timeout=0)) == 1
    assert files_below(tmp_path) == before
