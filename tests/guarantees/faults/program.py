"""What runs under the interposer: one fork for each request, on an import that is made once."""

import ctypes
import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import ckpt_jax as ckpt
from ckpt_jax.api.checkpoint import set_save_counter
from faults.values import checkpoint_of, tree_of

C = ctypes.CDLL(None)


def mark(text):
    C.interpose_mark(text.encode())


def fresh(directory):
    ckpt.save(directory / "a", tree_of(2))


def below_new_directories(directory):
    ckpt.save(directory / "new" / "er" / "a", tree_of(2))


def overwrite(directory):
    ckpt.save(directory / "a", tree_of(2), overwrite=True)


def in_a_prepared_directory(directory):
    fresh(directory)


def counted(directory):
    """A save that goes on from the latest."""
    checkpoint = checkpoint_of(3)
    set_save_counter(checkpoint, 2)
    checkpoint.save(directory / "ckpt")


def managed(directory, options=None):
    """A save after which the manager removes the oldest."""
    checkpoint = checkpoint_of(3)
    set_save_counter(checkpoint, 2)
    manager = ckpt.CheckpointManager(checkpoint, directory, max_to_keep=2)
    manager.save(metrics={"loss": 3.0}, options=options)
    manager.sync()


def in_the_background(directory):
    managed(directory, ckpt.CheckpointOptions(enable_async=True))


SCENARIOS = {
    function.__name__: function
    for function in (
        *(fresh, below_new_directories, overwrite, in_a_prepared_directory),
        *(counted, managed, in_the_background),
    )
}


def child(answer, scenario, directory, record, at, action, only, renames):
    log = io.StringIO()
    logging.getLogger("ckpt_jax").addHandler(logging.StreamHandler(log))
    C.interpose_arm(os.fsencode(directory), os.fsencode(record), ctypes.c_long(at), action)
    C.interpose_only(only.encode())
    C.interpose_renames(renames)
    error = None
    try:
        SCENARIOS[scenario](Path(directory))
        mark("success")
    except Exception as raised:
        cause = raised.__cause__ if isinstance(raised, ckpt.AsyncSaveError) else raised
        error = [type(cause).__name__, str(raised), getattr(cause, "filename", None)]
    count = C.interpose_count()
    with os.fdopen(answer, "w") as file:
        json.dump([count, error, log.getvalue()], file)
    os._exit(0)


def main():
    C.interpose_count.restype = ctypes.c_long
    # jax warns of forking after its threads have started; none have.
    warnings.filterwarnings("ignore", "os.fork")
    for line in sys.stdin:
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            child(write, *json.loads(line))
        os.close(write)
        with os.fdopen(read) as file:
            answer = file.read()
        _, status = os.waitpid(process, 0)
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps([ended, *json.loads(answer or '[0, null, ""]')]), flush=True)


if __name__ == "__main__":
    main()
