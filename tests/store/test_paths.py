"""Paths: what is refused by name, what comes back, and where a save may write."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax import io
from ckpt_jax.api.frozen import FrozenSaver
from ckpt_jax.api.latest import checkpoint_exists, get_checkpoint_mtimes, remove_checkpoint
from ckpt_jax.api.restore_nodes import restore_nodes
from ckpt_jax.store.manifest import MANIFEST
from ckpt_jax.store.paths import as_path
from ckpt_jax.store.state_file import update_checkpoint_state
from ckpt_jax.testing import run_processes

ROOT = Path(__file__).parent.parent
KEY = "a/.ATTRIBUTES/VARIABLE_VALUE"


class Url(os.PathLike):
    """As the path classes of libraries for object stores are."""

    def __init__(self, text):
        self.text = text

    def __fspath__(self):
        return self.text


def _checkpoint():
    return ckpt.Checkpoint(a=1)


# Every public door, and the name of its parameter.
DOORS = {
    "save": (lambda path: ckpt.save(path, {"a": 1}), "path"),
    "restore": (lambda path: ckpt.restore(path, {"a": 1}), "path"),
    "load": (ckpt.load, "path"),
    "plan_restore": (lambda path: ckpt.plan_restore(path, {"a": 1}), "path"),
    "Checkpoint.save": (lambda path: _checkpoint().save(path), "prefix"),
    "Checkpoint.write": (lambda path: _checkpoint().write(path), "path"),
    "Checkpoint.restore": (lambda path: _checkpoint().restore(path), "path"),
    "Checkpoint.read": (lambda path: _checkpoint().read(path), "path"),
    "CheckpointManager": (lambda path: ckpt.CheckpointManager(_checkpoint(), path), "directory"),
    "latest_checkpoint": (ckpt.latest_checkpoint, "directory"),
    "checkpoints_iterator": (ckpt.checkpoints_iterator, "directory"),
    "checkpoint_exists": (checkpoint_exists, "path"),
    "get_checkpoint_mtimes": (lambda path: get_checkpoint_mtimes([path]), "path"),
    "get_checkpoint_state": (ckpt.get_checkpoint_state, "directory"),
    "update_checkpoint_state": (
        lambda path: update_checkpoint_state(path, ckpt.CheckpointState("ckpt-1")),
        "directory",
    ),
    "remove_checkpoint": (remove_checkpoint, "path"),
    "load_checkpoint": (ckpt.load_checkpoint, "path"),
    "CheckpointReader": (ckpt.CheckpointReader, "path"),
    "list_variables": (ckpt.list_variables, "path"),
    "object_metadata": (ckpt.object_metadata, "path"),
    "verify": (ckpt.verify, "path"),
    "preflight": (ckpt.preflight, "directory"),
    "save_object": (lambda path: ckpt.save_object({"a": 1}, path), "path"),
    "load_object": (ckpt.load_object, "path"),
    "restore_nodes": (lambda path: restore_nodes(path, {}), "path"),
    "FrozenSaver.save": (lambda path: _frozen().save(path), "path"),
    "FrozenSaver.restore": (lambda path: _frozen().restore(path), "path"),
    "write_shard": (lambda path: io.write_shard(path, {"a": np.ones(2)}), "prefix"),
    "read_slices": (lambda path: io.read_slices(path, {"a": None}), "prefix"),
    "merge_shards": (lambda path: io.merge_shards([], path), "destination"),
    "merge_shards of": (lambda path: io.merge_shards([path], "merged"), "prefixes"),
}


def _frozen() -> FrozenSaver:
    return _checkpoint().freeze()


@pytest.fixture(params=DOORS)
def door(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DOORS[request.param]


@pytest.mark.parametrize(
    "url",
    [
        "https://host/run/ckpt",
        "file:///somewhere/ckpt",
        "S3://bucket/run/ckpt",
        "s3:///run/ckpt",
        "memory://run/../ckpt",
        "hdfs+x.y-1://host/ckpt",
        b"hdfs://host/run/ckpt",
        Url("hdfs://host/run/ckpt"),
        pathlib.PurePosixPath("gs://bucket/run/ckpt"),
        "~",
        "~/runs/ckpt",
        "~root/ckpt",
        "a\0b",
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_url_a_home_directory_and_a_null_character_are_refused_at_every_door(door, url):
    use, argument = door
    with pytest.raises(ValueError, match=f"^{argument}: expected a path"):
        use(url)
    assert os.listdir() == []


def test_an_error_of_a_url_says_what_to_pass_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hdfs://.* are not supported.*mounted directory"):
        ckpt.save("hdfs://host/a", {"a": 1})
    with pytest.raises(ValueError, match="Pass 's3://bucket/a' as a string"):
        ckpt.save(pathlib.PurePosixPath("s3://bucket/a"), {"a": 1})
    with pytest.raises(ValueError, match="Pass the path alone: '/somewhere/a'"):
        ckpt.save("file:///somewhere/a", {"a": 1})
    with pytest.raises(ValueError, match=r"os.path.expanduser\('~/a'\)"):
        ckpt.save("~/a", {"a": 1})


@pytest.mark.parametrize(
    "value", [3, 0.5, {"a": 1}, object(), ["a"]], ids=lambda value: type(value).__name__
)
def test_what_is_no_path_is_a_type_error_that_names_the_parameter(door, value):
    use, argument = door
    with pytest.raises(TypeError, match=f"^{argument}: expected a path .*, got"):
        use(value)


def test_none_is_explained(tmp_path):
    with pytest.raises(TypeError, match="latest_checkpoint returns None if there is no checkpoint"):
        ckpt.restore(ckpt.latest_checkpoint(tmp_path), {"a": 1})
    with pytest.raises(TypeError, match="^directory: expected a path .* got None"):
        ckpt.latest_checkpoint(None)
    _checkpoint().restore(None)  # nothing to restore


def test_an_empty_path_is_refused_but_an_empty_directory_is_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for use in (lambda path: ckpt.save(path, {"a": 1}), ckpt.load, ckpt.verify):
        with pytest.raises(ValueError, match="empty string"):
            use("")
    _checkpoint().save("ckpt")
    assert ckpt.latest_checkpoint(os.path.dirname("ckpt")) == "ckpt-1"


@pytest.mark.parametrize(
    "name",
    [
        "a:b",
        "C:",
        "x:/y",
        "~a",
        "a~",
        "a?b",
        "a%20b",
        "#",
        "a|b",
        "a b",
        "\n",
        "é",
        "://a",
        "1a://b",
    ],
)
def test_other_names_are_paths_and_come_back_as_they_were_given(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:").mkdir()
    assert ckpt.save(name, {"a": 1}) == name
    assert ckpt.load(name) == {"a": 1}
    assert ckpt.verify(name).path == name
    assert ckpt.save(name.encode(), {"a": 2}, overwrite=True) == name
    assert ckpt.load(Path(name)) == {"a": 2}
    assert _checkpoint().save(name) == f"{name}-1"


def test_two_slashes_at_the_beginning_are_one(tmp_path):
    path = f"/{tmp_path}/a"
    assert path.startswith("//")
    assert ckpt.save(path, {"a": np.arange(3)}) == path
    assert ckpt.load(tmp_path / "a")["a"].tolist() == [0, 1, 2]


def test_a_path_may_come_as_bytes_or_as_any_path_object():
    assert as_path(b"a") == as_path(Url("a")) == as_path(Path("a")) == as_path(Url(b"a")) == "a"


def test_a_path_that_is_not_utf8_is_refused_by_name_before_anything_is_written(tmp_path):
    path = os.fsencode(tmp_path) + b"/new/\xff\xfe"
    for use in (
        lambda: ckpt.save(path, {"a": np.arange(3)}),
        lambda: _checkpoint().save(path),
        lambda: io.write_shard(path, {"a": np.arange(3)}),
    ):
        with pytest.raises(ckpt.CheckpointError, match=r"\\xff\\xfe.*in UTF-8"):
            use()
        shutil.rmtree(path, ignore_errors=True)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(path)


def test_a_relative_path_in_a_directory_that_tensorstore_cannot_name_is_refused(
    tmp_path, monkeypatch
):
    for name in (b"a\\b", b"\xff"):
        directory = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        os.mkdir(directory)
        monkeypatch.chdir(directory)
        with pytest.raises(ckpt.CheckpointError, match="UTF-8|backslash"):
            ckpt.save("new/a", {"a": np.arange(3)})
        assert os.listdir() == []


def test_in_a_working_directory_that_is_gone_relative_paths_are_refused(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    for use in (
        lambda: ckpt.save("a", {"a": 1}),
        lambda: ckpt.load("a"),
        lambda: ckpt.CheckpointManager(_checkpoint(), "a"),
        lambda: remove_checkpoint("a"),
    ):
        with pytest.raises(FileNotFoundError, match="working directory.* removed"):
            use()
    assert ckpt.load(ckpt.save(tmp_path / "b", {"a": 1})) == {"a": 1}


# --- long names ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [200, 214, 215, 230, 255, 256, 300])
def test_a_long_name_works_or_is_refused_before_anything_is_written(tmp_path, length):
    for above in (tmp_path / "new", tmp_path):
        path = above / ("x" * length)
        try:
            ckpt.save(path, {"a": np.arange(3)})
        except OSError as error:
            assert length > 214, error
            assert "Use a shorter name" in str(error)
            assert str(path) in str(error)
            assert os.listdir(tmp_path) == []
        else:
            assert ckpt.load(path)["a"].tolist() == [0, 1, 2]


def test_a_prepared_directory_may_have_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 255)
    path.mkdir()
    ckpt.save(path, {"a": 1})
    assert ckpt.load(path) == {"a": 1}
    with pytest.raises(OSError, match="of which a save needs 41"):
        ckpt.save(path, {"a": 2}, overwrite=True)
    with pytest.raises(OSError, match="Use a shorter name"):
        remove_checkpoint(path)
    assert ckpt.load(path) == {"a": 1}


def test_a_long_name_above_and_a_long_path_are_refused_before_anything_is_written(tmp_path):
    for path in (
        tmp_path / "new" / ("x" * 256) / "a",
        tmp_path / "new" / "/".join(["x" * 99] * 40),
    ):
        with pytest.raises(OSError, match="Use a shorter (name|path)"):
            ckpt.save(path, {"a": 1})
        assert os.listdir(tmp_path) == []


def test_a_number_that_makes_a_name_too_long_leaves_the_counter_as_it_was(tmp_path):
    checkpoint = _checkpoint()
    with pytest.raises(OSError, match="of which a save needs 41 for its staging"):
        checkpoint.save(tmp_path / ("x" * 213))
    assert checkpoint.save_counter == 0
    assert os.listdir(tmp_path) == []
    assert checkpoint.save(tmp_path / ("x" * 212)) is not None


# --- directories that are there --------------------------------------------------------


def test_the_working_directory_can_become_a_checkpoint_and_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ckpt.save(".", {"a": 1}) == "."
    assert os.getcwd() == str(tmp_path)
    assert ckpt.load(".") == ckpt.load(tmp_path) == {"a": 1}
    assert sorted(os.listdir()) == [MANIFEST, "meta", "shards"]
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        ckpt.save(".", {"a": 2})


def test_a_checkpoint_in_which_the_program_runs_is_not_replaced(tmp_path, monkeypatch):
    ckpt.save(tmp_path / "a", {"a": np.arange(3)})
    for place, path in ((tmp_path / "a", "."), (tmp_path / "a" / "shards", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(FileExistsError, match="working directory"):
            ckpt.save(path, {"a": 2}, overwrite=True)
        with pytest.raises(FileExistsError, match="nothing was written"):
            ckpt.Checkpoint(a=2).write(tmp_path / "a")
    assert ckpt.load(tmp_path / "a")["a"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("mode", [0o2775, 0o700, 0o1777, 0o755])
def test_a_prepared_directory_keeps_its_mode_also_when_its_checkpoint_is_replaced(tmp_path, mode):
    directory = tmp_path / "a"
    directory.mkdir()
    directory.chmod(mode)
    before = directory.stat()
    ckpt.save(directory, {"a": 1})
    after = directory.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    ckpt.save(directory, {"a": 2}, overwrite=True)
    assert stat.S_IMODE(directory.stat().st_mode) == mode
    assert ckpt.load(directory) == {"a": 2}
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_prepared_directory_keeps_its_owner(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    os.chown(directory, 1234, 2345)
    for overwrite in (False, True):
        ckpt.save(directory, {"a": 1}, overwrite=overwrite)
        status = directory.stat()
        assert (status.st_uid, status.st_gid) == (1234, 2345)


def test_saves_in_the_background_and_of_every_kind_fill_prepared_directories(tmp_path):
    for name in ("write", "numbered-1", "object", "frozen"):
        (tmp_path / name).mkdir(mode=0o700)
    checkpoint = ckpt.Checkpoint(a=jnp.arange(3))
    checkpoint.write(tmp_path / "write", ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
    checkpoint.save(tmp_path / "numbered")
    ckpt.save_object({"a": np.arange(3)}, tmp_path / "object")
    checkpoint.freeze().save(tmp_path / "frozen")
    for name in ("write", "numbered-1", "object", "frozen"):
        assert ckpt.load(tmp_path / name)["a"].tolist() == [0, 1, 2]
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
        assert sorted(os.listdir(tmp_path / name)) == [MANIFEST, "meta", "shards"]
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "numbered-1")


def test_a_prepared_directory_behind_a_link_is_filled_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink("real", tmp_path / "link")
    ckpt.save(tmp_path / "link", {"a": 1})
    assert os.readlink(tmp_path / "link") == "real"
    assert ckpt.load(tmp_path / "real") == {"a": 1}


def test_a_save_into_a_prepared_directory_that_fails_leaves_it_empty(tmp_path):
    class Bad:
        def __call__(self, slices):
            raise ZeroDivisionError

    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError):
        ckpt.save(
            tmp_path / "a",
            {"a": np.arange(3)},
            options=ckpt.CheckpointOptions(sharding_policy=Bad()),
        )
    assert os.listdir(tmp_path / "a") == []


def test_of_two_saves_into_one_prepared_directory_one_wins_and_the_other_is_told(tmp_path):
    (tmp_path / "a").mkdir()
    barrier, results = threading.Barrier(2), []

    class Meet:
        """Both have begun before one of them ends. (Saves of `ckpt.save` would take turns.)"""

        def __call__(self, slices):
            barrier.wait(60)
            return [slices]

    def save(number):
        options = ckpt.CheckpointOptions(sharding_policy=Meet())
        try:
            ckpt.Checkpoint(a=np.full(3, number)).write(tmp_path / "a", options=options)
            results.append(number)
        except FileExistsError as error:
            results.append(error)

    threads = [threading.Thread(target=save, args=[number]) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [result for result in results if isinstance(result, int)]
    assert ckpt.load(tmp_path / "a")["a"].tolist() == [winner] * 3
    assert sorted(os.listdir(tmp_path / "a")) == [MANIFEST, "meta", "shards"]


def test_several_processes_fill_a_prepared_directory(tmp_path):
    (tmp_path / "a").mkdir(mode=0o700)

    def program(processes):
        values = {"a": np.arange(3), "own": ckpt.PerProcess(processes.index)}
        return ckpt.save(tmp_path / "a", values)

    assert run_processes(3, program) == [str(tmp_path / "a")] * 3
    assert ckpt.load(tmp_path / "a")["a"].tolist() == [0, 1, 2]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert sorted(os.listdir(tmp_path / "a")) == [MANIFEST, "meta", "shards"]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_of_several_processes_fails_a_prepared_directory_stays_empty(tmp_path, failing):
    (tmp_path / "a").mkdir()

    def program(processes):
        def fail(slices):
            assert processes.index != failing, "this process fails"
            return [slices] if slices else []

        options = ckpt.CheckpointOptions(sharding_policy=fail)
        return ckpt.save(tmp_path / "a", {"a": np.arange(3)}, options=options)

    results = run_processes(2, program)
    assert all(isinstance(error, Exception) for error in results), results
    assert os.listdir(tmp_path / "a") == []


def test_what_is_not_empty_is_not_filled(tmp_path):
    (tmp_path / "a" / "shards").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not a checkpoint"):
        ckpt.save(tmp_path / "a", {"a": 1}, overwrite=True)
    assert os.listdir(tmp_path / "a") == ["shards"]


MOUNTED = """
import os, sys
import ckpt_jax as ckpt
volume = sys.argv[1]
assert os.path.ismount(volume) == (sys.argv[2] == "tmpfs"), "a bind mount looks like a directory"
ckpt.save(volume, {"a": 1})
assert ckpt.load(volume) == {"a": 1}
try:
    ckpt.save(volume, {"a": 2}, overwrite=True)
except FileExistsError as error:
    assert "is a mount point" in str(error), error
else:
    raise AssertionError("a mount point was replaced")
assert ckpt.load(volume) == {"a": 1}
manager = ckpt.CheckpointManager(ckpt.Checkpoint(a=1), volume + "/managed")
assert manager.save()
print("done")
"""


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_can_become_a_checkpoint(tmp_path, kind):
    if shutil.which("unshare") is None:
        pytest.skip("there is no `unshare`, which makes mounts that only one process sees")
    (tmp_path / "a b").mkdir()
    (tmp_path / "other").mkdir()
    mount = (
        'mount -t tmpfs none "$0"' if kind == "tmpfs" else f'mount --bind "{tmp_path}/other" "$0"'
    )
    private = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    shell = [*private, "sh", "-c"]
    try_out = subprocess.run([*shell, mount, tmp_path / "a b"], capture_output=True, text=True)
    if try_out.returncode:
        pytest.skip(f"nothing can be mounted here: {try_out.stderr.strip()}")
    done = subprocess.run(
        [
            *(*shell, f'{mount} && exec "$@"', tmp_path / "a b"),
            *(sys.executable, "-c", MOUNTED, tmp_path / "a b", kind),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "done\n", done.stderr


# --- readers ---------------------------------------------------------------------------


def tree(number):
    return {"a": np.full((300, 1000), float(number)), "b": np.arange(number), "c": "text"}


def replaced(path):
    ckpt.save(path, tree(4), overwrite=True)


def replaced_by_the_same_structure(path):
    """With other values: equal ones are told from each other by no reader."""
    old = tree(3)
    ckpt.save(path, {"a": old["a"] + 1, "b": old["b"] + 1, "c": "txet"}, overwrite=True)


CHANGES = [replaced, replaced_by_the_same_structure, shutil.rmtree, remove_checkpoint]
READS = {
    "get_tensor": lambda reader: reader.get_tensor(KEY),
    "a box": lambda reader: reader.get_tensor(KEY, ((0, 1), (0, 1))),
    "read": lambda reader: reader.read({KEY: None}),
    "read_boxes": lambda reader: reader.read_boxes({KEY: [((0, 1), (0, 1))]}),
    "object_graph": lambda reader: reader.object_graph,
    "check_files": lambda reader: reader.check_files(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", READS)
def test_a_reader_without_with_says_that_its_checkpoint_was_replaced_or_removed(
    tmp_path, read, change
):
    path = ckpt.save(tmp_path / "a", tree(3))
    reader = ckpt.load_checkpoint(path)
    change(path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed"):
        READS[read](reader)
    reader.close()


def test_what_was_read_before_does_not_hide_that_a_checkpoint_was_removed(tmp_path):
    path = ckpt.save(tmp_path / "a", tree(3))
    with ckpt.load_checkpoint(path) as reader:
        assert reader.get_tensor(KEY).shape == (300, 1000)
        shutil.rmtree(path)
        with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed"):
            reader.get_tensor(KEY)


def test_damage_is_still_called_damage(tmp_path):
    path = ckpt.save(tmp_path / "a", tree(3))
    reader = ckpt.load_checkpoint(path)
    for file in Path(path).glob("shards/*/c/*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(ckpt.CorruptCheckpointError):
        reader.get_tensor(KEY)


def test_a_link_that_is_moved_on_leaves_a_reader_where_it_is(tmp_path):
    for number in (3, 4):
        ckpt.save(tmp_path / f"s{number}", tree(number))
    link = tmp_path / "latest"
    os.symlink("s3", link)
    reader = ckpt.load_checkpoint(link)
    os.unlink(link)
    os.symlink("s4", link)
    assert reader.path == str(link)
    assert reader.get_tensor(KEY)[0, 0] == 3
    assert reader.object_graph.nodes
    shutil.rmtree(tmp_path / "s3")
    with pytest.raises(ckpt.CheckpointNotFoundError, match=r"latest \(which led to .*s3\) was rep"):
        reader.get_tensor(KEY)
    assert ckpt.load(link)["a"][0, 0] == 4


def test_a_link_above_that_is_moved_on_leaves_a_reader_where_it_is(tmp_path):
    for number in (3, 4):
        ckpt.save(tmp_path / f"run{number}" / "a", tree(number))
    link = tmp_path / "run"
    os.symlink("run3", link)
    reader = ckpt.load_checkpoint(link / "a")
    os.unlink(link)
    os.symlink("run4", link)
    assert reader.get_tensor(KEY)[0, 0] == 3


def test_a_reader_of_a_relative_path_reads_on_when_the_program_goes_elsewhere(
    tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    reader = ckpt.load_checkpoint(ckpt.save("a", tree(3)))
    monkeypatch.chdir("elsewhere")
    assert reader.path == "a"
    assert reader.get_tensor(KEY)[0, 0] == 3
    assert reader.object_graph.nodes


def test_values_that_wait_come_from_where_a_link_led(tmp_path):
    for number in (3, 4):
        ckpt.Checkpoint(model=ckpt.Checkpoint(a=number)).write(tmp_path / f"s{number}")
    link = tmp_path / "latest"
    os.symlink("s3", link)
    fresh = ckpt.Checkpoint()
    fresh.restore(link)
    os.unlink(link)
    os.symlink("s4", link)
    fresh.model = ckpt.Checkpoint(a=0)
    assert fresh.model.a == 3


def test_an_npz_file_that_is_replaced_under_a_reader_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0))
    reader = ckpt.load_checkpoint(path)
    path.write_bytes(b"another file")
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced or removed"):
        reader.get_tensor("a")
    reader.close()


def test_a_restore_of_an_abstract_target_takes_a_path_object(tmp_path):
    path = ckpt.save(Url(str(tmp_path / "a")), {"w": jnp.arange(3.0)})
    restored = ckpt.restore(Url(path), {"w": jax.ShapeDtypeStruct((3,), "float32")})
    assert restored["w"].tolist() == [0, 1, 2]
