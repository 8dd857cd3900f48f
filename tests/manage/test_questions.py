"""What a manager answers about its checkpoints: metadata, and metrics that come after the save."""

import json
import math
import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from managers import numbers_in, run_in, save

import ckpt_jax as ckpt
from ckpt_jax.testing.processes import run_processes

pytestmark = pytest.mark.usefixtures("no_flushing")


# --- metadata ------------------------------------------------------------------------------


def test_metadata_come_back_as_they_were(tmp_path):
    said = {
        "config": {"lr": 1e-3, "layers": [1, 2, {"x": None}], "name": "größe", "big": 1 << 80},
        "position": 7,
        "is_final": False,
    }
    manager = run_in(tmp_path)
    path = save(manager, 3, metadata=said)
    save(manager, 4)
    assert manager.metadata(3) == said
    assert manager.metadata(4) == {}
    with ckpt.load_checkpoint(path) as reader:
        assert reader.metadata == said
        assert reader.bytes_read == 0
    with open(os.path.join(path, "meta", "metadata")) as file:
        assert json.load(file) == said


def test_metadata_of_a_step_that_is_not_there(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 3)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-9.*Pass one of the steps 3"):
        manager.metadata(9)


class Odd:
    pass


def test_what_is_no_json_is_refused_by_name_before_a_byte_is_written(tmp_path):
    directory = tmp_path / "a"
    manager = run_in(directory)
    cycle: dict = {}
    cycle["again"] = cycle
    metadata = {
        "config": {"lr": np.float32(0.1), "shape": (3, 4), "x": Odd()},
        "losses": [0.5, math.inf],
        "by_step": {3: "a"},
        "array": jnp.ones(3),
        "fine": 1,
        "cycle": cycle,
    }
    with pytest.raises(ValueError) as caught:
        manager.save(1, metadata=metadata)
    text = str(caught.value)
    for found in (
        "metadata['config']['lr']: expected None, bool, int, float, str, list or dict, got "
        "numpy.float32",
        "metadata['config']['shape']: ",
        f"metadata['config']['x']: expected None, bool, int, float, str, list or dict, got "
        f"{__name__}.Odd",
        "metadata['losses'][1]: expected a finite number, got inf",
        "metadata['by_step'][3]: expected a str as key, got int",
        "metadata['array']",
        "or a cycle",
    ):
        assert found in text
    assert "fine" not in text
    with pytest.raises(TypeError, match="expected a dict"):
        manager.save(1, metadata=["a"])
    assert not os.path.exists(directory)
    assert manager.checkpoint.save_counter == 0


def test_damaged_metadata_are_found(tmp_path):
    manager = run_in(tmp_path)
    path = save(manager, 3, metadata={"a": 1})
    with open(os.path.join(path, "meta", "metadata"), "r+b") as file:
        file.write(b"[")
    with pytest.raises(ckpt.CorruptCheckpointError, match="metadata"):
        manager.metadata(3)
    report = ckpt.verify(path)
    assert [damage.key for damage in report.problems] == ["_METADATA"]


def test_a_checkpoint_that_replaces_another_has_its_own_metadata_and_metrics(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 3, metadata={"a": 1}, metrics={"loss": 1.0})
    manager.record_metrics(3, accuracy=0.5)
    save(manager, 3, metadata={"b": 2}, metrics={"loss": 2.0}, force=True)
    assert manager.metadata(3) == {"b": 2}
    assert manager.metrics(3) == {"loss": 2.0}
    assert run_in(tmp_path).metrics(3) == {"loss": 2.0}


# --- metrics after the save ------------------------------------------------------------------


def test_metrics_of_an_evaluator_stay_when_the_trainer_goes_on(tmp_path):
    trainer = run_in(tmp_path)
    save(trainer, 1, 2, metrics={"loss": 0.5})
    evaluator = run_in(tmp_path)
    save(trainer, 3, metrics={"loss": 0.25})
    for step in (1, 3):  # one that it knew, and one that came later
        evaluator.record_metrics(step, accuracy=step / 10)
    evaluator.record_metrics(3, accuracy=0.9, f1=0.1)
    assert trainer.metrics(3) == {"loss": 0.25, "accuracy": 0.9, "f1": 0.1}
    assert trainer.best("accuracy", "max").endswith("ckpt-3")
    save(trainer, 4, metrics={"loss": 0.1})
    trainer.delete(2)
    for manager in (trainer, evaluator, run_in(tmp_path)):
        assert manager.steps == (1, 3, 4)
        assert manager.metrics(1) == {"loss": 0.5, "accuracy": 0.1}
        assert manager.metrics(3) == {"loss": 0.25, "accuracy": 0.9, "f1": 0.1}
    assert evaluator.restore(best="accuracy", mode="max").assert_consumed()
    assert evaluator.checkpoint.step == 3


def test_an_evaluator_does_not_take_over(tmp_path):
    trainer, evaluator = run_in(tmp_path), run_in(tmp_path)
    save(trainer, 1)
    evaluator.record_metrics(1, accuracy=0.5)
    save(trainer, 2)
    assert trainer.steps == (1, 2)


def test_checkpoints_wait_for_their_metrics_and_the_best_stay(tmp_path):
    policy = ckpt.KeepBest("accuracy", 1, "max", awaiting=2)
    trainer = run_in(tmp_path, max_to_keep=policy)
    evaluator = run_in(tmp_path)
    save(trainer, 1, 2, metrics={"loss": 0.5})  # another metric is no reason to complain
    evaluator.record_metrics(1, accuracy=0.9)
    save(trainer, 3)
    assert numbers_in(tmp_path) == [1, 2, 3]
    evaluator.record_metrics(2, accuracy=0.1)
    save(trainer, 4)
    assert numbers_in(tmp_path) == [1, 3, 4]  # 2 has a metric, and is not the best
    save(trainer, 5, 6)
    assert numbers_in(tmp_path) == [1, 5, 6]  # 3 and 4 have waited long enough


def test_a_restart_before_the_first_metric_manages_what_waits(tmp_path):
    policy = ckpt.KeepBest("accuracy", 1, "max", awaiting=2)
    save(run_in(tmp_path, max_to_keep=policy), 1, 2)
    again = run_in(tmp_path, max_to_keep=policy)
    again.restore_or_initialize()
    save(again, 3, 4)
    assert numbers_in(tmp_path) == [3, 4]


def test_the_best_of_no_numbers_is_no_checkpoint_and_the_error_says_so(tmp_path):
    manager = run_in(tmp_path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="found none. Save first"):
        manager.restore(best="loss")
    save(manager, 1)
    for metrics in ({}, {"loss": math.nan}):
        save(manager, 2, metrics=metrics, force=True)
        assert manager.best("loss") is None
        with pytest.raises(ckpt.CheckpointNotFoundError, match="metric 'loss', found none for"):
            manager.restore(best="loss")
    save(manager, 3, metrics={"loss": math.inf})
    assert manager.restore(best="loss").assert_consumed() and manager.checkpoint.step == 3


def test_what_is_no_metric_or_has_no_checkpoint_is_refused(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 1, metrics={"loss": 0.5})
    with pytest.raises(ValueError, match="metrics\\['loss'\\]: expected one real number"):
        manager.record_metrics(1, loss="low")
    with pytest.raises(ckpt.CheckpointNotFoundError, match="expected a managed checkpoint ckpt-7"):
        manager.record_metrics(7, loss=0.1)
    assert manager.metrics(1) == {"loss": 0.5}


def test_metrics_are_not_written_over_a_file_that_cannot_be_understood(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 1, metrics={"loss": 0.5})
    (tmp_path / "checkpoint-metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-metrics\.json: expected a file of metrics"):
        manager.record_metrics(1, accuracy=0.1)
    assert (tmp_path / "checkpoint-metrics.json").read_text() == "{"


def test_no_metric_is_lost_between_several_evaluators_and_a_trainer(tmp_path):
    trainer = run_in(tmp_path, max_to_keep=None)
    save(trainer, 1)
    evaluators = [run_in(tmp_path) for _ in range(4)]

    def evaluate(number, manager):
        for n in range(5):
            manager.record_metrics(1, **{f"m{number}_{n}": n})

    threads = [threading.Thread(target=evaluate, args=each) for each in enumerate(evaluators)]
    for thread in threads:
        thread.start()
    save(trainer, 2, 3, 4, metrics={"loss": 1.0})
    for thread in threads:
        thread.join()
    save(trainer, 5)
    assert len(trainer.metrics(1)) == 20
    assert trainer.metrics(3) == {"loss": 1.0}


def test_several_processes_say_and_record_once(tmp_path):
    def program(processes):
        manager = run_in(tmp_path)
        save(manager, 1, metadata={"said": "by all"})
        manager.record_metrics(1, accuracy=0.5 if processes.index == 0 else 0.75)
        save(manager, 2)
        return manager.metadata(1), manager.metrics(1), manager.best("accuracy")

    best = str(tmp_path / "ckpt-1")
    assert run_processes(3, program) == [({"said": "by all"}, {"accuracy": 0.5}, best)] * 3


def test_metadata_that_one_process_cannot_say_fails_on_all(tmp_path):
    def program(processes):
        manager = run_in(tmp_path / "a")
        return save(manager, 1, metadata={"x": Odd() if processes.index == 1 else 1})

    found = run_processes(2, program)
    assert all(isinstance(each, Exception) for each in found)
    assert "metadata['x']" in str(found[0]) and "metadata['x']" in str(found[1])
    assert os.listdir(tmp_path / "a") == []
