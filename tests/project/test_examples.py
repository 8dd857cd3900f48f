"""Every example runs as a program of its own, and says what it promises to show."""

import os
import re
import signal
import subprocess
import sys

import pytest
from places import EXAMPLES, ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs an example; returns its exit code and its output. A warning in it is an error.

    The compiler takes most of the time of an example. An example that trains for many steps is
    `optimized`, and its processes share what they have compiled; the others are compiled quickly.
    """
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def start(name, *arguments, optimized=False):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        faster = compiled if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, **faster},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout

    return start


def rows(output):
    """The rows of the table, by phase: (mesh, first step, last step)."""
    pattern = r"^(\w+) +(\d x \d) +(\d+)-(\d+) "
    found = re.findall(pattern, output, flags=re.MULTILINE)
    return {phase: (mesh, int(first), int(last)) for phase, mesh, first, last in found}


def test_every_example_is_tested():
    tested = {
        "convert_llama.py",
        "custom_sharded_saver.py",
        "from_tensorflow.py",
        "linen_train_state.py",
        "multi_process.py",
        "quantized_saver.py",
        "resume_on_another_mesh.py",
        "serve_without_code.py",
        "transfer_learning.py",
    }
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


@pytest.mark.slow  # scripts/demo runs it, too
def test_a_killed_run_resumes_on_another_mesh_and_finishes_on_one_device(run, tmp_path):
    arguments = ("--steps", 36, "--directory", tmp_path)
    code, output = run("resume_on_another_mesh.py", *arguments, optimized=True)
    assert code == 0, output
    assert "FAILED" not in output
    assert "ok     both restored states are bit-equal to the saved ones" in output
    assert "ok     their leaves lie as the new layouts say" in output
    assert "ok     the losses are those of the uninterrupted run" in output
    table = rows(output)
    killed_after = table["first"][2]
    resumed_after = table["second"][1] - 1
    assert table["first"][:2] == ("4 x 2", 1)
    assert 12 <= killed_after < 36, output
    assert killed_after - 3 <= resumed_after <= killed_after, output
    assert resumed_after % 3 == 0, output
    assert table["second"] == ("2 x 4", resumed_after + 1, 27)
    assert table["third"] == ("1 x 1", 28, 36)
    assert table["uninterrupted"] == ("4 x 2", 1, 36)


def test_the_resumed_run_does_not_mix_with_an_earlier_one(run, tmp_path):
    (tmp_path / "interrupted").mkdir()
    code, output = run("resume_on_another_mesh.py", "--directory", tmp_path)
    assert code == 2
    assert "holds an earlier run" in output


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_its_processes_in_one_line(tmp_path):
    arguments = ["resume_on_another_mesh.py", "--steps", "36", "--directory", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as demo:
        assert any(line.endswith("saved\n") for line in iter(demo.stdout.readline, ""))
        os.killpg(demo.pid, signal.SIGINT)
        rest = demo.stdout.read()  # ends when no process is left that could write
    assert demo.returncode == 130
    assert rest.endswith("\nInterrupted.\n")
    assert "Traceback" not in rest


def test_a_train_state_continues_on_another_mesh(run):
    code, output = run("linen_train_state.py", "--steps", 20)
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 4
    assert re.search(r"^resumed +2 x 4 +20 ", output, flags=re.MULTILINE), output


def test_a_partitioned_embedding_restores_onto_other_buckets_and_as_a_plain_array(run):
    code, output = run("custom_sharded_saver.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 7
    assert re.search(r"^saved +13 +8 ", output, flags=re.MULTILINE), output
    assert re.search(r"^restored +5 +3 ", output, flags=re.MULTILINE), output
    assert "9 shards, 8 of them runs of the table's rows" in output


def test_moments_are_saved_in_8_bits(run):
    code, output = run("quantized_saver.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 5
    sizes = re.findall(r"^(?:default saver|8 bits) +(\d+) KiB", output, flags=re.MULTILINE)
    default, small = map(int, sizes)
    assert small < 0.8 * default, output


def test_four_processes_save_and_two_go_on(run):
    code, output = run("multi_process.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 5
    pattern = r"^(\w+) +(\d) x (\d) +(\d+) +(\d+) "
    found = re.findall(pattern, output, flags=re.MULTILINE)
    assert found == [("first", "4", "2", "1", "6"), ("second", "2", "4", "7", "10")], output


def test_a_llama_of_the_hub_becomes_a_scanned_model_and_goes_back(run):
    code, output = run("convert_llama.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 2
    assert "10 arrays of Flax on 8 devices" in output


def test_a_model_is_served_without_its_code_and_with_newer_weights(run):
    code, output = run("serve_without_code.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 3


def test_an_encoder_and_its_moments_go_into_another_model(run):
    code, output = run("transfer_learning.py")
    assert code == 0, output
    assert "6 missing, 6 unexpected" in output
    assert output.endswith("the encoder and its moments came along; the head is new\n")


def test_a_keras_model_goes_on_training_in_flax(run):
    code, output = run("from_tensorflow.py")
    assert code == 0, output
    assert "FAILED" not in output
    assert output.count("ok     ") == 4
    assert "1 unexpected" in output
    steps, theirs, ours = re.findall(r"^(?:step|Keras|Flax) +(\S+) +(\S+) +(\S+)$", output, re.M)
    assert steps == ("60", "70", "80")
    assert theirs == ours
