"""Saves that are killed, fail or are recorded at a chosen call, each in a process of its own.

`interposer.c` stands between the program and the C library and counts the calls that change a
directory. `program.py` runs under it: it imports once, and forks for every save that it is asked
for. TensorStore's calls are counted like Python's.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from places import PYTHONPATH, ROOT

SOURCE = Path(__file__).parent / "interposer.c"
KILL = 0
NFS, SSHFS = 1, 2


@dataclass(frozen=True)
class Outcome:
    """How a save ended.

    Attributes:
      signal: what ended its process; 0 if it ended by itself.
      count: how many calls there were; 0 where it was killed.
      error: the class and the text of what was raised, and the name of its file; None if the
        save reported success.
    """

    signal: int
    count: int
    error: tuple[str, str, str | None] | None
    log: str

    @property
    def succeeded(self) -> bool:
        return not self.signal and self.error is None


def compiler() -> str | None:
    """What builds the interposer here; None where it cannot be used."""
    if not sys.platform.startswith("linux"):
        return None
    return shutil.which("gcc") or shutil.which("cc")


class Faults:
    """A program that saves on demand, with a fault at a call."""

    def __init__(self, directory: Path):
        library = directory / "interposer.so"
        build = [compiler() or "cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*build, "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "XLA_FLAGS": "",  # one device: a save starts in a tenth of the time
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": PYTHONPATH,
        }
        self._program = subprocess.Popen(
            [sys.executable, "-m", "faults.program"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        scenario: str,
        directory: Path,
        at: int = 0,
        action: int = KILL,
        record: Path | None = None,
        only: str = "",
        renames: int = 0,
    ) -> Outcome:
        """Runs a scenario of `program.py` on a directory.

        Args:
          at: the call at which it happens; 0 for none.
          action: KILL, or the error number of that call; negative for all calls from there on.
          record: a file for what was done.
          only: the kind of the calls that are counted; by default, all.
          renames: NFS or SSHFS, for what their renames can do; by default, all.
        """
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        request = [scenario, str(directory), str(record or ""), at, action, only, renames]
        print(json.dumps(request), file=self._program.stdin, flush=True)
        answer = self._program.stdout.readline()
        assert answer, "the program that saves has ended"
        signal, count, error, log = json.loads(answer)
        return Outcome(signal, count, tuple(error) if error else None, log)

    def close(self) -> None:
        self._program.communicate()
