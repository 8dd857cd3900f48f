"""Durable files: the disk begins to write them early, and their last flush reports every error."""

import errno
import os
import sys

import pytest

from ckpt_jax.store import durable

PART = b"x" * 1000


@pytest.fixture
def calls(monkeypatch):
    """What the system is asked for, in order."""
    made = []
    monkeypatch.setattr(durable, "_FLUSH_NBYTES", 2500)
    monkeypatch.setattr(durable, "_sync_file_range", lambda _, *range: made.append(range[:2]))
    monkeypatch.setattr(os, "fsync", lambda descriptor: made.append(os.fstat(descriptor).st_size))
    return made


def test_flushes_begin_while_parts_are_still_made_and_the_last_follows_all(tmp_path, calls):
    def parts():
        for number in range(7):
            assert calls == [(0, 3000), (3000, 3000)][: number // 3]
            yield PART

    durable.write_in_parts(str(tmp_path / "file"), parts(), durable=True)
    assert calls == [(0, 3000), (3000, 3000), 7000]
    assert (tmp_path / "file").read_bytes() == 7 * PART


def test_the_range_whose_flush_begins_is_in_the_file(tmp_path, calls, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        durable, "_sync_file_range", lambda file, *range: sizes.append(os.fstat(file).st_size)
    )
    durable.write_in_parts(str(tmp_path / "file"), [PART] * 7, durable=True)
    assert sizes == [3000, 6000]


def test_what_need_not_be_durable_is_not_flushed(tmp_path, calls):
    durable.write_in_parts(str(tmp_path / "file"), [PART] * 7, durable=False)
    assert calls == []
    assert (tmp_path / "file").read_bytes() == 7 * PART


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux has the call.")
def test_linux_begins_the_flush_of_a_file(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(PART)
        file.flush()
        assert durable._sync_file_range(file.fileno(), 0, 1000, 2) == 0
    read, write = os.pipe()
    assert durable._sync_file_range(write, 0, 1000, 2) == -1  # so the arguments arrive
    os.close(read), os.close(write)


@pytest.mark.parametrize("call", [None, lambda *arguments: -1], ids=["absent", "failing"])
def test_without_an_early_flush_the_last_one_does_it(tmp_path, calls, monkeypatch, call):
    monkeypatch.setattr(durable, "_sync_file_range", call)
    durable.write_in_parts(str(tmp_path / "file"), [PART] * 7, durable=True)
    assert calls == [7000]


def test_the_error_of_the_last_flush_is_raised_and_names_the_file(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="file") as caught:
        durable.write_in_parts(str(tmp_path / "file"), [PART], durable=True)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "file"))


def test_a_file_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        durable.write_in_parts(str(tmp_path / "file"), [PART], durable=True)
    assert (tmp_path / "file").read_bytes() == b"mine"
