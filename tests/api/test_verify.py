"""verify: all damage is listed, and nothing that is not damage."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from parts import data_files

import ckpt_jax as ckpt


@pytest.fixture
def path(tmp_path: Path) -> str:
    tree = {"a": np.arange(400_000), "b": jnp.ones((512, 512)), "small": 7, "text": "abc"}
    return ckpt.save(tmp_path / "c", tree)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_a_sound_checkpoint_has_no_problems(path: str):
    report = ckpt.verify(path)
    assert report.ok
    assert report.keys == 4
    assert report.nbytes >= 400_000 * 8 + 512 * 512 * 4
    assert "no damage" in str(report)


def test_every_damaged_value_is_listed_with_its_key(path: str):
    largest = max(data_files(path), key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    flip(largest, size // 10)
    flip(largest, size - size // 10)
    report = ckpt.verify(path)
    assert not report.ok
    # The small values lie in the same block as the end of b.
    assert {problem.key.partition("/")[0] for problem in report.problems} == {
        "a",
        "b",
        "small",
        "text",
    }
    assert all(str(Path(path)) in problem.file for problem in report.problems)


def test_a_missing_data_file_is_a_problem_of_the_values_in_it(path: str):
    max(data_files(path), key=lambda file: file.stat().st_size).unlink()
    report = ckpt.verify(path)
    assert {"a/.ATTRIBUTES/VARIABLE_VALUE", "b/.ATTRIBUTES/VARIABLE_VALUE"} <= {
        problem.key for problem in report.problems
    }


def test_a_damaged_root_is_one_problem_and_no_exception(path: str):
    flip(Path(path) / "manifest.ckpt", 40)
    report = ckpt.verify(path)
    assert not report.ok
    assert len(report.problems) == 1


def test_where_there_is_no_checkpoint_there_is_nothing_to_verify(tmp_path: Path):
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.verify(tmp_path / "nothing")


def test_a_problem_that_verify_finds_is_file_key_and_what(tmp_path: Path):
    path = ckpt.save(tmp_path / "a", {"w": np.arange(1000)})
    largest = max(Path(path).rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    problems = ckpt.verify(path).problems
    assert problems
    for problem in problems:
        file, key, what = problem
        assert (file, key, what) == (problem.file, problem.key, problem.what)
        assert file.startswith(path) and what


def test_a_part_or_a_sample_is_verified_with_progress(path: str):
    done: list[tuple[int, int]] = []
    report = ckpt.verify(path, only="b", progress=lambda *each: done.append(each))
    assert (report.ok, report.keys) == (True, 1)
    assert 512 * 512 * 4 <= report.nbytes < 3 << 20
    assert done[0][0] == 0 and done[-1][0] == done[-1][1]
    assert 0 < ckpt.verify(path, sample=0.5).nbytes < ckpt.verify(path).nbytes
    with pytest.raises(KeyError, match="selects"):
        ckpt.verify(path, only="c")
    with pytest.raises(ValueError, match="sample"):
        ckpt.verify(path, sample=0)


def test_damage_elsewhere_does_not_concern_a_part(path: str):
    flip(data_files(path)[0], 100)
    assert ckpt.verify(path, only=["b", "small"]).ok
    assert [problem.key for problem in ckpt.verify(path, only="a").problems] == [
        "a/.ATTRIBUTES/VARIABLE_VALUE"
    ]


def test_the_end_of_a_file_is_verified_too(path: str):
    file = data_files(path)[0]
    flip(file, file.stat().st_size - 30)
    assert ckpt.load(path)["small"] == 7
    (problem,) = ckpt.verify(path).problems
    assert problem.file == str(file)
