"""Files in object stores that are read in parts."""

import random
import threading

import numpy as np
import pytest

from ckpt_jax.store import objects
from ckpt_jax.store.remote import (
    HEAD_NBYTES,
    AbsentError,
    Ahead,
    ChangedError,
    Part,
    RemoteFile,
    expect,
    fetch,
    together,
)

SIZES = [0, 1, HEAD_NBYTES - 1, HEAD_NBYTES, HEAD_NBYTES + 1, 3 * HEAD_NBYTES + 5, 5_000_000]


@pytest.fixture(params=SIZES)
def written(any_store, request):
    data = np.random.default_rng(request.param).bytes(request.param)
    objects.write(f"{any_store.url}/a", data)
    return RemoteFile(f"{any_store.url}/a"), data


def test_the_size_is_found(written):
    file, data = written
    assert file.length == file.known_length == len(data)


@pytest.mark.parametrize("wrong", [0, -1, 1, 70_000, -70_000])
def test_the_size_is_known_if_it_is_the_expected_one(written, wrong):
    file, data = written
    expect({file: max(0, len(data) + wrong)})
    assert file.known_length == (len(data) if max(0, len(data) + wrong) == len(data) else None)
    assert file.length == len(data)


def test_beginnings_and_ends(written):
    file, data = written
    for nbytes in (1, 100, 70_000, HEAD_NBYTES, HEAD_NBYTES + 10, 2 * len(data) + 1):
        assert file.head(nbytes) == data[:nbytes]
    for nbytes in (1, 100, 60_000):
        other = RemoteFile(file.url)
        assert file.tail(nbytes) == other.tail(nbytes) == data[-nbytes:]
    file.forget()
    file.read_whole()
    assert file.length == len(data) and file.read(0, len(data)) == data


def test_parts_in_any_order(written):
    file, data = written
    choice = random.Random(len(data))
    for _ in range(20):
        start = choice.randint(0, len(data))
        stop = min(len(data), start + choice.choice([0, 1, 500, 100_000]))
        if choice.random() < 0.3:
            fetch([Part(file, start, stop + 1000), Part(file, stop, stop + 10)])
        assert file.read(start, stop) == data[start:stop]
    for start, stop in ((len(data) - 1, len(data) + 1), (len(data) + 9, len(data) + 10)):
        with pytest.raises(EOFError):
            RemoteFile(file.url).read(max(start, 0), stop)


def test_reading_ahead(written):
    file, data = written
    wanted = [(at, min(at + 90_000, len(data))) for at in range(0, len(data), 130_000)]
    ahead = Ahead([Part(file, *ends) for ends in wanted])
    for number, (start, stop) in enumerate(wanted):
        if number % 4 == 3:  # left out
            continue
        buffer = bytearray(stop - start)
        ahead.read_into(file, memoryview(buffer), start)
        assert buffer == data[start:stop]


def test_an_error_while_reading_ahead_is_raised_for_each_part(memory):
    url = f"{memory.url}/a"
    objects.write(url, bytes(100))
    file = RemoteFile(url)
    ahead = Ahead([Part(file, 0, 50), Part(file, 60, 110), Part(file, 1_000_000, 1_000_010)])
    for start in (0, 60):
        with pytest.raises(EOFError):
            ahead.read_into(file, memoryview(bytearray(10)), start)


def test_what_is_not_there(any_store):
    file = RemoteFile(f"{any_store.url}/nothing")
    assert not file.is_there
    for act in (lambda: file.length, lambda: file.tail(8), lambda: file.read(0, 1)):
        with pytest.raises(AbsentError):
            act()
    fetch([Part(file, 0, 10)])  # it is left out
    assert not RemoteFile(f"{any_store.scheme.replace('gcs', 'gs')}://").is_there


def test_a_value_that_is_replaced_or_removed(any_store):
    url = f"{any_store.url}/a"
    for after in (b"b" * 1_000_000, None):
        objects.write(url, b"a" * 1_000_000)
        file = RemoteFile(url)
        assert file.head(1) == b"a"
        if after is None:
            objects.delete(url)
        else:
            objects.write(url, after)
        with pytest.raises(ChangedError):
            file.read(500_000, 600_000)


def test_functions_are_called_together(memory):
    """Each waits until all have begun."""
    barrier = threading.Barrier(8, timeout=30)
    assert together(memory.url, lambda n: n + 0 * barrier.wait(), [*range(8)]) == [*range(8)]
