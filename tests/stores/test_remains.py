"""What interrupted saves leave in stores, what is missing there, and copies of checkpoints."""

import logging
import os
import pathlib
import re
import time

import numpy as np
import pytest
from fault_proxy import HOLD

import ckpt_jax as ckpt
from ckpt_jax.store import attempts, objects
from ckpt_jax.store.staging import GRACE_SECONDS


class Clock:
    """The present, or a later time."""

    later = 0.0

    def __call__(self):
        return time.time() + self.later


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(any_store, clock):
    """A manager of a place."""
    return ckpt.CheckpointManager(
        ckpt.Checkpoint(w=np.zeros(3)), any_store.url, max_to_keep=3, clock=clock
    )


def tokens_below(url):
    return {mark["token"] for key in objects.keys_below(url) for mark in marks_in(key)}


def marks_in(key):
    return attempts._MARK.finditer(key)


def leave_remains(url, step, monkeypatch):
    """A save that writes everything but its manifest, and cannot remove anything."""

    class Died(BaseException):
        pass

    def die(self, **given):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(attempts.Attempt, "publish", die)
        patch.setattr(attempts.Attempt, "_remove_all", lambda self, mark: None)
        with pytest.raises(Died):
            ckpt.save(f"{url}/ckpt-{step}", {"w": np.zeros(3)}, overwrite=True)


def test_remains_are_collected_when_they_are_old(any_store, run, clock, monkeypatch):
    leave_remains(any_store.url, 1, monkeypatch)
    path = run.save()
    assert len(tokens_below(path)) == 2
    assert run.gc() == []
    clock.later = GRACE_SECONDS - 60
    assert run.gc() == []
    clock.later = GRACE_SECONDS + 60
    (found,) = run.gc(dry_run=True)
    assert found.startswith(path) and len(tokens_below(path)) == 2
    assert run.gc() == [found]
    assert len(tokens_below(path)) == 1
    assert ckpt.verify(path).ok
    assert run.gc() == []


def test_nothing_that_a_checkpoint_uses_is_collected_however_old(any_store, run, clock):
    paths = [run.save() for _ in range(3)]
    ckpt.save(f"{any_store.url}/other-1", {"w": np.zeros(3)})
    clock.later = 100 * GRACE_SECONDS
    assert run.gc() == []
    for path in (*paths, f"{any_store.url}/other-1"):
        assert ckpt.verify(path).ok


def test_what_may_still_be_committed_or_is_not_ours_stays(any_store, run, clock, monkeypatch):
    run.save()
    leave_remains(any_store.url, 2, monkeypatch)  # above the latest
    before = objects.keys_below(f"{any_store.url}/ckpt-2")
    objects.write(f"{any_store.url}/other-1/meta/index-00000000-{'0' * 32}", b"")
    objects.write(f"{any_store.url}/ckpt-1/mine-00000000-{'0' * 32}", b"")
    clock.later = 100 * GRACE_SECONDS
    assert run.gc() == []
    assert objects.keys_below(f"{any_store.url}/ckpt-2") == before


def test_if_a_manifest_cannot_be_read_nothing_is_collected_there(
    any_store, run, clock, monkeypatch
):
    leave_remains(any_store.url, 1, monkeypatch)
    path = run.save()
    run.save()
    objects.write(f"{path}/manifest.ckpt", b"damaged")
    before = objects.keys_below(path)
    clock.later = 100 * GRACE_SECONDS
    assert run.gc() == []
    assert objects.keys_below(path) == before


def test_a_commit_in_doubt_is_not_collected(any_server, clock, monkeypatch):
    monkeypatch.setattr(attempts, "_DOUBT_SECONDS", 0.0)
    url = any_server.url
    ckpt.use_storage(f"{url}/ckpt-2/manifest.ckpt", retries=0, request_timeout_seconds=1.0)
    proxy = any_server.through_proxy()
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), url, clock=clock)
    manager.save()
    proxy.fault(HOLD, operation="WRITE", key=r"ckpt-2/manifest.ckpt$")
    with pytest.raises(ckpt.CommitInDoubtError):
        manager.save()
    assert manager.gc() == []
    another = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), url, clock=clock)
    assert another.gc() == []
    proxy.heal()
    proxy.release()
    assert ckpt.verify(f"{url}/ckpt-2").ok
    assert manager.save() == f"{url}/ckpt-3"


# --- missing data ------------------------------------------------------------------------


def test_a_missing_file_is_damage_and_is_named(any_store):
    path = ckpt.save(f"{any_store.url}/a", {"w": np.zeros(3)})
    (key,) = [key for key in objects.keys_below(path) if key.endswith("/c/0")]
    objects.delete(f"{path}/{key}")
    with pytest.raises(ckpt.CorruptCheckpointError, match="is missing") as caught:
        ckpt.load(path)
    assert key in str(caught.value)
    report = ckpt.verify(path)
    assert not report.ok and key in str(report.problems)


@pytest.mark.parametrize("what", ["/c/0$", "shards/.*/index$", "meta/index", "meta/.*graph"])
def test_whatever_is_missing_an_older_checkpoint_is_taken(any_store, run, caplog, what):
    older, path = run.save(), run.save()
    (key,) = [key for key in objects.keys_below(path) if re.search(what, key)]
    objects.delete(f"{path}/{key}")
    with caplog.at_level(logging.WARNING):
        assert ckpt.latest_checkpoint(any_store.url) == older
    assert f"{path}/{key}" in caplog.text
    assert run.restore_or_initialize() == older


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_values_that_have_changed_are_damage(any_store, change):
    path = ckpt.save(f"{any_store.url}/a", {"w": np.arange(300.0)})
    (key,) = [key for key in objects.keys_below(path) if key.endswith("/c/0")]
    data = objects.read(f"{path}/{key}").value
    changed = {"shorter": data[:-9], "other": b"1" + data[1:]}[change]
    objects.write(f"{path}/{key}", changed)
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)


# --- copies ------------------------------------------------------------------------------


def download(url, directory):
    for key in objects.keys_below(url):
        file = pathlib.Path(directory, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(objects.read(f"{url}/{key}").value)


def upload(directory, url):
    for file in pathlib.Path(directory).rglob("*"):
        if file.is_file():
            objects.write(f"{url}/{file.relative_to(directory)}", file.read_bytes())


COMPRESSIONS = pytest.mark.parametrize("compression", [None, "zstd"])


@COMPRESSIONS
def test_what_is_downloaded_opens_on_disk(any_store, run, tmp_path, compression):
    options = ckpt.CheckpointOptions(compression=compression)
    for step in (1, 2):
        run.save(options=options, metrics={"loss": step}, w=np.full(3, float(step)))
    download(any_store.url, tmp_path)
    latest = ckpt.latest_checkpoint(tmp_path)
    assert latest == os.path.join(tmp_path, "ckpt-2") and ckpt.verify(latest).ok
    there = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), tmp_path)
    assert there.restore_or_initialize() == latest
    assert there.checkpoint.w.tolist() == [2, 2, 2] and there.metrics(2) == {"loss": 2}
    assert there.save() == os.path.join(tmp_path, "ckpt-3")


@COMPRESSIONS
def test_what_is_uploaded_opens_in_the_store(any_store, tmp_path, compression):
    options = ckpt.CheckpointOptions(compression=compression)
    here = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), tmp_path)
    for step in (1, 2):
        here.save(options=options, metrics={"loss": step}, w=np.full(3, float(step)))
    upload(tmp_path, any_store.url)
    latest = ckpt.latest_checkpoint(any_store.url)
    assert latest == f"{any_store.url}/ckpt-2" and ckpt.verify(latest).ok
    there = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), any_store.url, max_to_keep=2)
    assert there.restore_or_initialize() == latest
    assert there.checkpoint.w.tolist() == [2, 2, 2] and there.metrics(2) == {"loss": 2}
    assert there.save() == f"{any_store.url}/ckpt-3"
    # What was uploaded can be removed.
    assert objects.keys_below(f"{any_store.url}/ckpt-1") == []
