"""Small files beside the checkpoints, and whatever else may have been put in their place."""

import errno
import os
import socket
import subprocess
import sys

import pytest
from managers import numbers_in, run_in, save
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.api.latest import checkpoints_iterator
from ckpt_jax.store import staging
from ckpt_jax.store.files import read_file, replace_file


def bound_socket(path):
    # By a short relative name: names of sockets are short.
    above = os.open(path.parent, os.O_RDONLY)
    before = os.open(".", os.O_RDONLY)
    try:
        os.fchdir(above)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(above)
        os.close(before)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(6 << 30)


def listing(path):
    return lambda file: file.write_text(
        f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "{path}"\n'
        "all_model_checkpoint_timestamps: 5\n"
    )


def empty_lists(count):
    return lambda file: file.write_text(f"[{'[],' * count}0]")


# What is in the place of a file; each is tried for the state file and for the notes.
ODD = {
    "a pipe": os.mkfifo,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path),
    "6 GB": sparse,
    "8 MB of one word": lambda path: path.write_bytes(b"x" * (8 << 20)),
    "a long comment": lambda path: path.write_bytes(b"#" * (7 << 20)),
    "many odd comments": lambda path: path.write_bytes(b"# ckpt_jax writer {{{{\n" * 300_000),
    "deep": lambda path: path.write_text("[" * 1_000_000),
    "deeper": lambda path: path.write_text('{"a":' * 1_000_000),
    "deep messages": lambda path: path.write_text("a{" * 1_000_000),
    "many empty lists": empty_lists(100_000),
    "a large number": lambda path: path.write_text('{"ckpt-3": {"a": %s}}' % ("9" * 5000)),
    "a long string": lambda path: path.write_text('{"ckpt-3": {"a": "%s"}}' % ("x" * 8_000_000)),
    "a NUL": listing("a\\000b"),
    "a number of 5000 digits": listing("ckpt-" + "7" * 5000),
    "a path of 5000 characters": listing("/x" * 2500),
    "no UTF-8": lambda path: path.write_bytes(b'model_checkpoint_path: "\xff"'),
}


@pytest.mark.parametrize("how", ODD)
@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-metrics.json"])
def test_what_is_in_the_place_of_a_small_file_is_ignored_with_a_word(
    tmp_path, no_flushing, caplog, name, how
):
    save(run_in(tmp_path), 1, 2, 3, metrics={"x": 1.0})
    (tmp_path / name).unlink()
    ODD[how](tmp_path / name)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-3")
    assert list(checkpoints_iterator(tmp_path, timeout=0)) == [str(tmp_path / "ckpt-3")]
    manager = run_in(tmp_path, max_to_keep=1, policies=[ckpt.KeepBest("x")])
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-3")
    assert str(tmp_path / name) in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 2000
    ckpt.Checkpoint(x=1).save(tmp_path / "other")
    save(manager, 4, metrics={"x": 2.0})
    assert manager.gc() == []
    assert {1, 2, 3, 4} <= set(numbers_in(tmp_path))  # nobody knows what may go
    assert run_in(tmp_path).steps == (4,)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-4")


def test_odd_small_files_take_little_memory(tmp_path):
    program = """
import resource, sys
import ckpt_jax as ckpt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
ckpt.CheckpointManager(ckpt.Checkpoint(x=1), sys.argv[1] + "/none")
before = peak()
for directory in sys.argv[1:]:
    assert ckpt.latest_checkpoint(directory) is None
    ckpt.CheckpointManager(ckpt.Checkpoint(x=1), directory)
print(peak() - before)
"""
    for number, name in enumerate(("checkpoint", "checkpoint-metrics.json")):
        for way, how in (("sparse", sparse), ("lists", empty_lists(2_500_000))):
            (tmp_path / f"{way}-{number}").mkdir()
            how(tmp_path / f"{way}-{number}" / name)
    listing("ckpt-1")(tmp_path / "lists-1" / "checkpoint")
    run = subprocess.run(
        [sys.executable, "-c", program, *tmp_path.iterdir()],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 400 << 20


def test_what_would_be_too_large_to_be_read_is_not_written(tmp_path):
    replace_file(str(tmp_path / "file"), "old")
    with pytest.raises(OSError, match="Keep fewer checkpoints") as raised:
        replace_file(str(tmp_path / "file"), "x" * (9 << 20))
    assert raised.value.errno == errno.EFBIG
    assert read_file(str(tmp_path / "file")) == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("when", ["before it is locked", "before it is flushed"])
def test_a_link_in_the_place_of_a_new_file_leads_its_bytes_nowhere(tmp_path, monkeypatch, when):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    path, lock, fsync = str(tmp_path / "run" / "file"), staging._lock, os.fsync
    made = []

    def swap():
        for name in os.listdir(tmp_path / "run"):
            os.unlink(tmp_path / "run" / name)
            os.symlink(victim, tmp_path / "run" / name)
            made.append(name)

    def swap_before_the_lock(descriptor, operation):
        if len(made) < 3:  # it is made anew each time
            swap()
        return lock(descriptor, operation)

    def swap_before_the_flush(descriptor):
        swap()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        if when == "before it is locked":
            patch.setattr(staging, "_lock", swap_before_the_lock)
        else:
            patch.setattr(os, "fsync", swap_before_the_flush)
        replace_file(path, "new")
    assert len(made) >= 2
    assert victim.read_text() == "precious"


def test_an_error_while_a_file_is_read_names_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("x")

    fstat = os.fstat

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            raise OSError(errno.EIO, "Input/output error")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", fail)
    with pytest.raises(OSError, match="file") as raised:
        read_file(str(path))
    assert raised.value.filename == str(path)
