"""Owners of staging: processes that have ended, and processes of other machines."""

import os
import subprocess
import time
from pathlib import Path

from ckpt_jax.store import staging

# In the name of staging: a process of another machine, or of this one before a reboot.
ELSEWHERE = "0123456789abcdef" * 2


def ended_process():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def digits_of(process, start=0):
    """What tells a process of this system in the name of staging."""
    return str(staging.Owner(*staging._system(), process, start)) + "00000000"


def left_by_ended_process(path):
    """A name of staging for `path` whose owner is gone."""
    return f"{path}.staging-{digits_of(ended_process())}"


def age(directory, hours):
    """Makes everything in a directory look as if it was last changed so long ago."""
    then = time.time() - hours * 3600
    for path in [directory, *Path(directory).rglob("*")]:
        os.utime(path, (then, then))
