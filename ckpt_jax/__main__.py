"""The command `ckpt_jax`, also called as `python -m ckpt_jax`; see `ckpt_jax.showing.commands`."""

from __future__ import annotations

import os
import sys

import jax

from ckpt_jax.showing.commands import main


def run() -> int:
    """Runs the command as a process of its own, which leaves accelerators to others."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # jax may have read the environment already
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - closed before the start
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    return main()


if __name__ == "__main__":
    sys.exit(run())
