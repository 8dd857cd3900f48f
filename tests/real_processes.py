"""Real processes for tests: started together, joined by `jax.distributed` on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from places import PYTHONPATH

DEADLINE_SECONDS = 120

# What every program begins with. `index` and `count` are its place among the processes.
JOIN = """
import os, sys
index, count, port, *arguments = sys.argv[1:]
index, count = int(index), int(count)
import jax
jax.distributed.initialize(
    f"localhost:{port}", count, index, initialization_timeout=60, shutdown_timeout_seconds=20
)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Run:
    """Processes that run one program."""

    def __init__(self, program: str, count: int, devices: int, arguments: tuple[str, ...]):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": PYTHONPATH,
        }
        port = str(free_port())
        command = [sys.executable, "-W", "error", "-c", JOIN + program]
        self.started = [
            subprocess.Popen(
                [*command, str(index), str(count), port, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]
        self.outputs: list[str] = [""] * count

    def wait_for_signal(self, index: int, code: int) -> None:
        """Waits until a process has been stopped or killed by its own hand."""
        os.waitid(
            os.P_PID,
            self.started[index].pid,
            (os.WSTOPPED if code == signal.SIGSTOP else os.WEXITED) | os.WNOWAIT,
        )

    def finish(self, *indices: int) -> list[str]:
        """Waits for processes, all by default; returns what they said."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        for index in indices or range(len(self.started)):
            process = self.started[index]
            self.outputs[index] += process.communicate(timeout=deadline - time.monotonic())[0]
        return self.outputs


@contextlib.contextmanager
def running(program: str, count: int, devices: int, *arguments: object) -> Iterator[Run]:
    run = Run(program, count, devices, tuple(map(str, arguments)))
    try:
        yield run
    finally:
        for process in run.started:
            process.kill()
        for process in run.started:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def outputs_of(program: str, count: int, devices: int, *arguments: object) -> list[str]:
    """What the processes said, all of which have to end well."""
    with running(program, count, devices, *arguments) as run:
        outputs = run.finish()
        codes = [process.returncode for process in run.started]
    assert codes == [0] * count, "\n".join(outputs)
    return outputs
