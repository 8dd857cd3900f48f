"""Processes in memory need no pytest; the suites that need it say so if it is missing."""

import subprocess
import sys

import pytest

import ckpt_jax.testing

WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None  # importing it fails, as if it were not installed
"""


def output_of(program: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST + program], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_processes_in_memory_run_without_pytest():
    program = """
from ckpt_jax.testing import MemoryService, ServiceTests, run_processes
import ckpt_jax.testing.processes
print(run_processes(2, lambda processes: processes.index))
"""
    assert output_of(program) == "[0, 1]"


@pytest.mark.parametrize("name", ["SaverTests", "ViewTests", "ReaderTests", "StorageConformance"])
def test_a_suite_that_needs_pytest_says_so(name: str):
    program = f"""
import ckpt_jax.testing
try:
    ckpt_jax.testing.{name}
except ImportError as error:
    print(error)
"""
    expected = f"ckpt_jax.testing.{name} needs pytest, which is not installed: pip install pytest"
    assert output_of(program) == expected


def test_every_name_is_there_and_no_other():
    for name in ckpt_jax.testing.__all__:
        assert getattr(ckpt_jax.testing, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        ckpt_jax.testing.nonsense  # noqa: B018


def test_what_a_program_raises_is_returned_in_its_place():
    def program(processes):
        return 1 // processes.index

    failed, result = ckpt_jax.testing.run_processes(2, program)
    assert isinstance(failed, ZeroDivisionError)
    assert result == 1
