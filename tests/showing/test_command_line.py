"""The command as a process: its start, its streams, its end."""

import json
import os
import pty
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from places import PYTHONPATH, ROOT

import ckpt_jax as ckpt

COMMAND = (sys.executable, "-m", "ckpt_jax")
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "error"}


def run(*argv, **settings):
    settings = {"env": ENVIRONMENT, "capture_output": True, "text": True, **settings}
    return subprocess.run([*COMMAND, *map(str, argv)], timeout=120, **settings)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return ckpt.save(
        tmp_path_factory.mktemp("a") / "ckpt-1", {"w": np.ones((2, 3)), "naïve": np.zeros(2)}
    )


def test_it_prints_plain_text_and_json_into_a_pipe(path):
    done = run("show", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "float64[2, 3]" in done.stdout and "\x1b" not in done.stdout
    done = run("show", path, "--json")
    assert {entry["path"] for entry in json.loads(done.stdout)["entries"]} == {"w", "naïve"}


def test_its_exit_code_is_that_of_what_it_found(path, tmp_path):
    other = ckpt.save(tmp_path / "b", {"w": np.ones((3, 2)), "naïve": np.zeros(2)})
    assert [run("diff", path, each).returncode for each in (path, other)] == [0, 1]
    done = run("show", tmp_path / "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_it_prints_names_that_the_locale_cannot_encode(path):
    done = run("show", path, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "na\\xefve" in done.stdout


@pytest.mark.parametrize(
    ("verb", "closed", "code"), [("show", "1", 0), ("show", "2", 0), ("ls", "1", 2), ("ls", "2", 2)]
)
def test_closed_streams_change_no_exit_code(path, tmp_path, verb, closed, code):
    target = path if verb == "show" else tmp_path / "nowhere"
    command = f'exec "$0" -m ckpt_jax {verb} "$1" {closed}>&-'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, target],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == code and "Error" not in done.stderr


def test_the_console_script_is_the_same_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ckpt_jax": "ckpt_jax.__main__:run"}


PROGRAM = """
import sys
from ckpt_jax import __main__
codes = []
for argv in {argvs!r}:
    sys.argv = ["ckpt_jax", *argv]
    codes.append(__main__.run())
from jax._src import xla_bridge
assert codes == [0] * len(codes), codes
assert not xla_bridge.backends_are_initialized()
assert not {{"flax", "optax", "rich"}} & {{*sys.modules}}
"""


def test_looking_starts_no_device_and_imports_no_library_that_it_does_not_need(path):
    above = os.path.dirname(path)
    argvs = [["ls", above], ["show", path], ["show", path, "--objects"], ["get", path, "w"]]
    argvs += [["stats", path], ["diff", path, path, "--values"], ["verify", above]]
    argvs += [["plan", path, path], ["gc", above, "--dry-run"]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(argvs=argvs)],
        env={**ENVIRONMENT, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    tree = {f"layer_{number}": np.zeros(1) for number in range(5000)}
    path = ckpt.save(tmp_path / "a", tree)
    for flags in ("", "--json"):
        done = subprocess.run(
            f'{" ".join(COMMAND)} show "{path}" {flags} | head -1; exit ${{PIPESTATUS[0]}}',
            shell=True,
            executable="/bin/bash",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == 1


def test_on_a_terminal_tables_are_drawn(path):
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([*COMMAND, "stats", path], stdout=theirs, stderr=theirs,
                               env=environment)  # fmt: skip
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait(60) == 0
    assert b"\x1b[1m" in output and b"float64[2, 3]" in output
    assert b"stats " in output and b"100%" in output  # the progress


def test_ctrl_c_ends_it_at_once_and_quietly(path):
    """While it waits for an answer."""
    process = subprocess.Popen(
        [*COMMAND, "rm", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stderr.read(6) == b"Remove"  # it is asking now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err
    assert os.path.exists(path)
