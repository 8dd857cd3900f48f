"""What the system refuses to tell is an error, never an absent checkpoint."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from managers import numbers_in, run_in, save
from places import PYTHONPATH

import ckpt_jax as ckpt
from ckpt_jax.api.latest import (
    checkpoint_exists,
    checkpoints_iterator,
    get_checkpoint_mtimes,
    problem_with,
    remove_checkpoint,
)
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.presence import is_directory, is_file, is_taken, names_in

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture
def refuse(monkeypatch):
    """A function that lets every call fail that looks at a path, or below it."""
    refused: list[tuple[str, int]] = []

    def failing(name):
        real = getattr(os, name)

        def call(path, *arguments, **options):
            text = os.fspath(path) if not isinstance(path, int) else ""
            for each, number in refused:
                if text == each or text.startswith(f"{each}/"):
                    raise OSError(number, os.strerror(number), text)
            return real(path, *arguments, **options)

        return call

    for name in ("stat", "lstat", "open", "listdir", "scandir"):
        monkeypatch.setattr(os, name, failing(name))
    return lambda path, number: refused.append((str(path), number))


def a_link_to_itself(manifest, refuse):
    os.unlink(manifest)
    os.symlink(manifest, manifest)  # ELOOP, from the system


def broken(number):
    return lambda manifest, refuse: refuse(os.path.dirname(manifest), number)


KINDS = {
    errno.ELOOP: a_link_to_itself,
    errno.EIO: broken(errno.EIO),
    errno.ESTALE: broken(errno.ESTALE),
    errno.EACCES: broken(errno.EACCES),
}

LOOKS = {
    "latest_checkpoint": lambda directory, path: ckpt.latest_checkpoint(directory),
    "checkpoints_iterator": lambda directory, path: next(
        checkpoints_iterator(directory, timeout=0)
    ),
    "restore_or_initialize": lambda directory, path: run_in(directory).restore_or_initialize(),
    "restore a step": lambda directory, path: run_in(directory).restore(2),
    "checkpoint_exists": lambda directory, path: checkpoint_exists(path),
    "problem_with": lambda directory, path: problem_with(path),
    "get_checkpoint_mtimes": lambda directory, path: get_checkpoint_mtimes([path]),
    "remove_checkpoint": lambda directory, path: remove_checkpoint(path),
    "load": lambda directory, path: ckpt.load(path),
    "load_checkpoint": lambda directory, path: ckpt.load_checkpoint(path),
    "restore": lambda directory, path: ckpt.restore(path, {"step": 0}),
    "verify": lambda directory, path: ckpt.verify(path),
    "read_slices": lambda directory, path: ckpt.io.read_slices(path, {}),
    "save over it": lambda directory, path: ckpt.save(path, {"step": 1}, overwrite=True),
    "save beside it": lambda directory, path: save(run_in(directory), 2),
}


@pytest.mark.parametrize("number", KINDS, ids=errno.errorcode.get)
@pytest.mark.parametrize("look", LOOKS)
def test_what_cannot_be_looked_at_is_not_taken_for_absent(tmp_path, refuse, look, number):
    path = save(run_in(tmp_path), 1, 2)
    before = (tmp_path / "checkpoint").read_bytes()
    KINDS[number](os.path.join(path, MANIFEST), refuse)
    with pytest.raises(OSError) as raised:
        LOOKS[look](str(tmp_path), path)
    assert raised.value.errno == number
    assert path in str(raised.value)
    assert not isinstance(raised.value, ckpt.CheckpointError)
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert numbers_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("with_state_file", [True, False])
def test_a_directory_that_cannot_be_looked_at_is_not_taken_for_a_new_one(
    tmp_path, refuse, number, with_state_file
):
    save(run_in(tmp_path), 1, 2)
    if not with_state_file:
        (tmp_path / "checkpoint").unlink()
    refuse(tmp_path, number)
    for look in (
        lambda: ckpt.latest_checkpoint(tmp_path),
        lambda: run_in(tmp_path),
        lambda: ckpt.get_checkpoint_state(tmp_path),
        lambda: list(checkpoints_iterator(tmp_path, timeout=0)),
    ):
        with pytest.raises(OSError) as raised:
            look()
        assert raised.value.errno == number
        assert str(tmp_path) in str(raised.value)


def test_an_error_in_the_data_is_not_taken_for_damage(tmp_path, refuse):
    path = save(run_in(tmp_path), 1, 2)
    (shard,) = Path(path, "shards").iterdir()
    refuse(shard, errno.EIO)
    for look in (ckpt.latest_checkpoint, lambda directory: run_in(directory).restore()):
        with pytest.raises(OSError, match=str(shard)) as raised:
            look(tmp_path)
        assert raised.value.errno == errno.EIO


def test_a_search_looks_only_at_what_may_be_the_latest(tmp_path, refuse):
    """A folder of another user in the directory, like lost+found, is none of its business."""
    path = save(run_in(tmp_path), 1)
    for name in ("lost+found", "other-7"):
        (tmp_path / name).mkdir()
        refuse(tmp_path / name, errno.EACCES)
    (tmp_path / "folder").symlink_to(tmp_path / "folder")
    assert ckpt.latest_checkpoint(tmp_path) == path
    assert run_in(tmp_path).restore_or_initialize() == path
    with pytest.raises(ckpt.CheckpointNotFoundError, match="ckpt-1"):
        ckpt.load(tmp_path / "ckpt-2")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "alice2").mkdir()
    refuse(tmp_path / "new" / "alice2" / "_METADATA", errno.EACCES)
    assert ckpt.latest_checkpoint(tmp_path / "new") is None


def test_a_committed_save_does_not_fail_because_nothing_can_be_removed(tmp_path, refuse, caplog):
    manager = run_in(tmp_path, max_to_keep=1)
    save(manager, 1)
    refuse(tmp_path / "ckpt-1", errno.EIO)
    path = save(manager, 2)
    assert ckpt.latest_checkpoint(tmp_path) == path
    assert manager.steps == (1, 2)  # tried again at the next save
    assert "ckpt-1" in caplog.text and os.strerror(errno.EIO) in caplog.text


def test_only_the_system_says_that_nothing_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for path in ("absent", "file/below", "absent/below", "nowhere"):
        path = str(tmp_path / path)
        assert not is_file(path) and not is_directory(path)
        assert names_in(path) == []
        assert is_taken(path) == path.endswith("nowhere")
    assert names_in(str(tmp_path / "file")) == []
    with pytest.raises(OSError, match="too long"):
        is_file(str(tmp_path / ("x" * 300)))


PROGRAM = """
import os, sys
import ckpt_jax as ckpt
directory, warm = sys.argv[1:]
ckpt.latest_checkpoint(warm)  # imports what another user may not read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def manager(directory):
    return ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory).restore_or_initialize()
for look in (ckpt.latest_checkpoint, manager):
    for name in ("above/run", "run"):
        try:
            look(f"{directory}/{name}")
        except PermissionError as error:
            assert f"{directory}/{name}" in str(error), error
        else:
            raise AssertionError((look, name))
"""


def test_what_another_user_may_not_see_is_not_taken_for_absent():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to other users
        for name in ("above/run", "run", "warm"):
            save(run_in(f"{directory}/{name}"), 1, 2)
        closed = [f"{directory}/above", f"{directory}/run/ckpt-2"]
        os.chmod(directory, 0o755)
        for path in closed:
            os.chmod(path, 0)
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, directory, f"{directory}/warm"],
            env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
        )
        for path in closed:
            os.chmod(path, 0o755)
    assert run.returncode == 0, run.stderr
