"""Saving in the background: what is written, when errors come, and how a program ends."""

import asyncio
import copy
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trackables import Mirrored

import ckpt_jax as ckpt

ASYNC = ckpt.CheckpointOptions(enable_async=True)
SKIP = ckpt.CheckpointOptions(enable_async=True, when_busy="skip")


class Count(ckpt.PythonState):
    def __init__(self, n: int):
        self.n = n

    def serialize(self) -> str:
        return str(self.n)

    def deserialize(self, value: bytes) -> None:
        self.n = int(value)


class Gate:
    """A progress function that holds a save before its first byte is written."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, done: int, total: int) -> None:
        self.reached.set()
        self.opened.wait()


def test_what_is_written_is_what_was_there_when_save_returned(tmp_path: Path):
    """The program donates, deletes, overwrites and replaces; the file does not notice."""
    donated, deleted, host = jnp.arange(1000.0), jnp.ones(1000), np.arange(5)
    key = jax.random.key(1)
    variable, count = ckpt.Variable(jnp.full(3, 2.0)), Count(3)
    checkpoint = ckpt.Checkpoint(
        tree=[donated, deleted, host, host[::2]], variable=variable, count=count, key=key
    )
    gate = Gate()
    path = checkpoint.save(tmp_path / "c", ckpt.CheckpointOptions(enable_async=True, progress=gate))
    gate.reached.wait()
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(donated))
    deleted.delete()
    key.delete()
    host[:] = -1
    variable.assign(jnp.zeros(3))
    count.n = 99
    checkpoint.tree = None
    checkpoint.late = 1
    gate.opened.set()
    checkpoint.sync()
    tree = ckpt.load(path)
    np.testing.assert_array_equal(tree["tree"][0], np.arange(1000.0))
    np.testing.assert_array_equal(tree["tree"][1], np.ones(1000))
    np.testing.assert_array_equal(tree["tree"][2], np.arange(5))
    np.testing.assert_array_equal(tree["tree"][3], [0, 2, 4])
    np.testing.assert_array_equal(tree["variable"], np.full(3, 2.0))
    np.testing.assert_array_equal(tree["key"], jax.random.key_data(jax.random.key(1)))
    assert tree["count"] == b"3"
    assert "late" not in tree


def test_one_counter_counts_saves_of_both_kinds(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    paths = [checkpoint.save(tmp_path / "c", options) for options in (None, ASYNC, None, ASYNC)]
    checkpoint.sync()
    assert [Path(path).name for path in paths] == ["c-1", "c-2", "c-3", "c-4"]
    assert [ckpt.load(path)["save_counter"] for path in paths] == [1, 2, 3, 4]
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-4")


@pytest.mark.behaviour(16)
def test_a_restore_waits_for_the_save_before_it(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=5)
    path = checkpoint.save(tmp_path / "c", ASYNC)
    checkpoint.x = 0
    checkpoint.restore(path).assert_consumed()
    assert checkpoint.x == 5


def test_an_error_is_raised_once_by_whatever_comes_next(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)

    def fail() -> None:
        raise RuntimeError("no more room")

    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,))
    checkpoint.save(tmp_path / "c", options)
    with pytest.raises(ckpt.AsyncSaveError, match="no more room") as raised:
        checkpoint.save(tmp_path / "c")
    assert isinstance(raised.value.__cause__, RuntimeError)
    checkpoint.sync()


def test_a_failed_save_leaves_the_counter_and_the_state_as_they_were(tmp_path: Path):
    (tmp_path / "c-1").write_text("in the way")
    checkpoint = ckpt.Checkpoint(x=1)
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "c", ASYNC)
    assert checkpoint.save_counter == 0
    assert ckpt.latest_checkpoint(tmp_path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["c-1"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_normal_exit_waits_and_does_not_swallow_an_error(tmp_path: Path, fails: bool):
    program = f"""
        import numpy as np
        import ckpt_jax as ckpt

        def after():
            if {fails}:
                raise RuntimeError("lost")

        checkpoint = ckpt.Checkpoint(x=np.ones(3_000_000))
        options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(after,))
        checkpoint.save({str(tmp_path / "c")!r}, options)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert ckpt.verify(tmp_path / "c-1").ok
    assert ("lost" in done.stderr) == fails
    assert (ckpt.get_checkpoint_state(tmp_path) is None) == fails


def test_a_write_callback_finds_the_checkpoint_committed(tmp_path: Path):
    found: list[bool] = []
    options = ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=(lambda path: found.append(ckpt.verify(path).ok),)
    )
    checkpoint = ckpt.Checkpoint(x=np.ones(1000))
    checkpoint.save(tmp_path / "c", options)
    checkpoint.sync()
    assert found == [True]


def test_a_write_callback_that_saves_again_is_told_that_it_would_wait_for_itself(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    options = ckpt.CheckpointOptions(
        enable_async=True, write_callbacks=(lambda: checkpoint.save(tmp_path / "again"),)
    )
    checkpoint.save(tmp_path / "c", options)
    with pytest.raises(ckpt.AsyncSaveError, match="cannot wait for itself"):
        checkpoint.sync()


def test_a_write_callback_that_skips_is_skipped(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    returned: list[object] = []
    options = ckpt.CheckpointOptions(
        enable_async=True,
        write_callbacks=(lambda: returned.append(checkpoint.save(tmp_path / "again", SKIP)),),
    )
    checkpoint.save(tmp_path / "c", options)
    checkpoint.sync()
    assert returned == [None]


# --- several at once -------------------------------------------------------------------


def together(*work) -> None:
    """Runs functions on threads that begin at the same time; raises what one of them raises."""
    barrier = threading.Barrier(len(work))

    def begin(function) -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(begin, function) for function in work]:
            done.result()


def test_threads_that_save_one_checkpoint_get_a_number_each(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=np.arange(1000), state=Count(1))
    paths: list[str] = []

    def save() -> None:
        for options in (ASYNC, None, ASYNC):
            paths.append(checkpoint.save(tmp_path / "c", options))

    together(*[save] * 4)
    checkpoint.sync()
    assert sorted(Path(path).name for path in paths) == sorted(f"c-{n}" for n in range(1, 13))
    assert [ckpt.load(tmp_path / f"c-{n}")["save_counter"] for n in range(1, 13)] == [*range(1, 13)]
    assert checkpoint.save_counter == 12
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-12")
    assert all(ckpt.verify(path).ok for path in paths)


def test_threads_that_save_through_one_manager_lose_no_record(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=np.arange(1000))
    manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=3)
    together(*[lambda: [manager.save(options=ASYNC) for _ in range(3)]] * 3)
    manager.sync()
    assert [Path(path).name for path in manager.checkpoints] == ["ckpt-7", "ckpt-8", "ckpt-9"]
    assert sorted(path.name for path in tmp_path.glob("ckpt-*")) == ["ckpt-7", "ckpt-8", "ckpt-9"]


def test_threads_that_are_due_at_one_step_save_it_once(tmp_path: Path):
    manager = ckpt.CheckpointManager(
        ckpt.Checkpoint(x=1), tmp_path, step_counter=10, checkpoint_interval=5
    )
    paths: list[str | None] = []
    together(*[lambda: paths.append(manager.save())] * 3)
    assert sorted(paths, key=str) == [str(tmp_path / "ckpt-1"), None, None]


def test_a_restore_and_a_save_on_two_threads_do_not_mix(tmp_path: Path):
    """Every save holds the values of one moment, though restores change all of them."""
    checkpoint = ckpt.Checkpoint(tree=[np.full(10, 1), np.full(10, 1)])
    ones = checkpoint.write(tmp_path / "ones")
    twos = ckpt.Checkpoint(tree=[np.full(10, 2), np.full(10, 2)]).write(tmp_path / "twos")
    saved: list[str] = []

    def restore() -> None:
        for _ in range(5):
            checkpoint.read(ones).assert_consumed()
            checkpoint.read(twos).assert_consumed()

    def save() -> None:
        for number in range(5):
            saved.append(checkpoint.write(tmp_path / f"c{number}", ASYNC))

    together(restore, save)
    checkpoint.sync()
    for path in saved:
        first, second = ckpt.load(path)["tree"]
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("prefixes", [("a", "b"), ("c", "c")], ids=["beside", "over"])
def test_two_checkpoints_that_write_into_one_directory_leave_it_whole(
    tmp_path: Path, prefixes: tuple[str, str]
):
    """Under one name the last to commit wins, as a whole."""
    checkpoints = [ckpt.Checkpoint(pair=[np.full(1000, i)] * 2, i=i) for i in range(2)]

    def save(checkpoint: ckpt.Checkpoint, prefix: str) -> None:
        for options in (ASYNC, None, ASYNC):
            checkpoint.save(tmp_path / prefix, options)
        checkpoint.sync()

    together(*[lambda i=i: save(checkpoints[i], prefixes[i]) for i in range(2)])
    names = {f"{prefix}-{n}" for prefix in prefixes for n in (1, 2, 3)}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoint"}
    for name in names:
        tree = ckpt.load(tmp_path / name)
        assert ckpt.verify(tmp_path / name).ok
        np.testing.assert_array_equal(tree["pair"], np.full((2, 1000), tree["i"]))
    assert ckpt.latest_checkpoint(tmp_path) in {str(tmp_path / f"{p}-3") for p in prefixes}


def test_two_processes_that_write_into_one_directory_leave_it_whole(tmp_path: Path):
    program = textwrap.dedent("""
        import sys
        import numpy as np
        import ckpt_jax as ckpt

        checkpoint = ckpt.Checkpoint(x=np.arange(1000))
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(3):
            checkpoint.save(sys.argv[1], ckpt.CheckpointOptions(enable_async=True))
    """)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "c"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        child.communicate("go\n")
    assert [child.returncode for child in children] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"c-1", "c-2", "c-3", "checkpoint"}
    assert all(ckpt.verify(tmp_path / f"c-{n}").ok for n in (1, 2, 3))
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-3")


def test_it_works_inside_a_running_event_loop(tmp_path: Path):
    async def train() -> str:
        checkpoint = ckpt.Checkpoint(x=np.arange(10))
        path = checkpoint.save(tmp_path / "c", ASYNC)
        await asyncio.to_thread(checkpoint.sync)
        checkpoint.save(tmp_path / "c")
        checkpoint.restore(path).assert_consumed()
        return path

    assert ckpt.verify(asyncio.run(train())).ok


def test_a_copied_checkpoint_does_not_wait_for_the_original(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    gate = Gate()
    checkpoint.save(tmp_path / "c", ckpt.CheckpointOptions(enable_async=True, progress=gate))
    gate.reached.wait()
    other = copy.deepcopy(checkpoint)
    assert ckpt.verify(other.save(tmp_path / "other")).ok
    gate.opened.set()
    checkpoint.sync()


# --- busy ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SKIP, ckpt.CheckpointOptions(when_busy="skip")])
def test_a_save_that_skips_returns_none_while_one_is_in_flight(
    tmp_path: Path, options: ckpt.CheckpointOptions
):
    checkpoint = ckpt.Checkpoint(x=1)
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "managed")
    gate = Gate()
    first = checkpoint.save(
        tmp_path / "c", ckpt.CheckpointOptions(enable_async=True, progress=gate)
    )
    gate.reached.wait()
    assert checkpoint.save(tmp_path / "c", options) is None
    assert checkpoint.write(tmp_path / "w", options) is None
    assert manager.save(options=options) is None
    assert checkpoint.save_counter == 1
    gate.opened.set()
    checkpoint.sync()
    assert checkpoint.save(tmp_path / "c", options) == str(tmp_path / "c-2")
    checkpoint.sync()
    assert {path.name for path in tmp_path.iterdir()} == {"c-1", "c-2", "checkpoint"}
    assert ckpt.verify(first).ok


def test_a_save_that_skips_does_not_wait_for_another_thread_either(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(x=1)
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(checkpoint.save, tmp_path / "c", ckpt.CheckpointOptions(progress=gate))
        gate.reached.wait()
        assert checkpoint.save(tmp_path / "c", SKIP) is None
        gate.opened.set()
        assert done.result() == str(tmp_path / "c-1")
    assert checkpoint.save_counter == 1


def test_a_save_that_skips_still_raises_what_failed_before(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError("no more room")

    checkpoint = ckpt.Checkpoint(x=1)
    checkpoint.save(
        tmp_path / "c", ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,))
    )
    thread = checkpoint._runs().background._thread
    assert thread is not None
    thread.join()
    with pytest.raises(ckpt.AsyncSaveError, match="no more room"):
        checkpoint.save(tmp_path / "c", SKIP)
    assert checkpoint.save(tmp_path / "c", SKIP) == str(tmp_path / "c-2")
    checkpoint.sync()


# --- exit ------------------------------------------------------------------------------


def run_program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_error_outlives_its_checkpoint_and_is_told_at_exit(tmp_path: Path):
    done = run_program(
        """
        import gc, sys
        import ckpt_jax as ckpt

        def fail():
            raise RuntimeError("nobody asked")

        checkpoint = ckpt.Checkpoint(x=1)
        checkpoint.save(
            sys.argv[1], ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,))
        )
        checkpoint._runs().background._thread.join()
        del checkpoint
        gc.collect()
        """,
        tmp_path / "c",
    )
    assert done.returncode == 0
    assert done.stderr.count("AsyncSaveError") == 0
    assert done.stderr.count("failed in the background: nobody asked") == 1


def test_an_error_that_was_raised_is_not_told_again_at_exit(tmp_path: Path):
    done = run_program(
        """
        import sys
        import ckpt_jax as ckpt

        def fail():
            raise RuntimeError("nobody asked")

        checkpoint = ckpt.Checkpoint(x=1)
        checkpoint.save(
            sys.argv[1], ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,))
        )
        try:
            checkpoint.sync()
        except ckpt.AsyncSaveError:
            pass
        """,
        tmp_path / "c",
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("enable_async", [False, True])
@pytest.mark.parametrize(
    "when",
    [
        "atexit.register(save)",
        "threading.Thread(target=lambda: (over.wait(), save())).start()",
    ],
)
def test_a_save_that_begins_while_the_program_ends_is_there(
    tmp_path: Path, when: str, enable_async: bool
):
    """In an exit handler, and on a thread that goes on when the main one has ended."""
    done = run_program(
        f"""
        import atexit, sys, threading
        import numpy as np
        import ckpt_jax as ckpt

        over = threading.Event()
        # What is registered first is called last: then no pool takes work any more.
        threading._threading_atexits.insert(0, over.set)
        checkpoint = ckpt.Checkpoint(w=np.arange(300_000), x=1)

        def save():
            checkpoint.save(sys.argv[1], ckpt.CheckpointOptions(enable_async={enable_async}))

        {when}
        """,
        tmp_path / "c",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-1")
    assert ckpt.verify(tmp_path / "c-1").ok


def test_a_save_in_flight_at_the_end_of_the_program_needs_no_more_threads(tmp_path: Path):
    done = run_program(
        """
        import sys, threading
        import numpy as np
        import ckpt_jax as ckpt

        def wait_for_the_end(done, total):
            threading.main_thread().join(0.5)

        options = ckpt.CheckpointOptions(enable_async=True, progress=wait_for_the_end)
        ckpt.Checkpoint(w=np.arange(300_000), x=1).save(sys.argv[1], options)
        """,
        tmp_path / "c",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ckpt.verify(tmp_path / "c-1").ok


def test_an_exit_does_not_wait_beyond_the_deadline(tmp_path: Path):
    """A callback that never ends cannot hold the program; what was committed is there."""
    done = run_program(
        """
        import sys, threading
        import ckpt_jax as ckpt

        committed = threading.Event()

        def hang():
            committed.set()
            threading.Event().wait()

        options = ckpt.CheckpointOptions(
            enable_async=True, write_callbacks=(hang,), timeout_seconds=0.01
        )
        ckpt.Checkpoint(x=1).save(sys.argv[1], options)
        committed.wait()
        """,
        tmp_path / "c",
    )
    assert done.returncode == 0
    assert "did not end within 0.01 s" in done.stderr and str(tmp_path / "c-1") in done.stderr
    assert ckpt.verify(tmp_path / "c-1").ok


def test_a_save_to_a_relative_path_is_recorded_where_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: moved.wait(60),))
    checkpoint = ckpt.Checkpoint(step=7)
    path = checkpoint.save("ckpt", options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved.set()
    checkpoint.sync()
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / path)
    assert not any((tmp_path / "elsewhere").iterdir())


# --- Ctrl-C ----------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    # Where the tests run in the background of a shell, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_main_thread():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_after_an_interrupted_wait_a_save_is_still_known_to_be_running(tmp_path):
    checkpoint = ckpt.Checkpoint(x=np.arange(3))
    waiting, opened = threading.Event(), threading.Event()

    def interrupt_and_hold():
        waiting.wait()
        interrupt_main_thread()
        opened.wait()

    path = checkpoint.save(
        tmp_path / "c",
        ckpt.CheckpointOptions(enable_async=True, write_callbacks=[interrupt_and_hold]),
    )
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        checkpoint.sync()
    assert checkpoint.save(tmp_path / "c", SKIP) is None
    opened.set()
    checkpoint.sync()
    assert ckpt.latest_checkpoint(tmp_path) == path
    assert ckpt.verify(path).ok


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_save_gives_up_what_it_has_not_written(tmp_path):
    values = {f"v{i}": np.zeros(1 << 18) for i in range(32)}
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if len(seen) == 2:
            interrupt_main_thread()

    options = ckpt.CheckpointOptions(progress=interrupt, max_inflight_bytes=1 << 18, durable=False)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(tmp_path / "c", values, options=options)
    done, total = seen[-1]
    assert done < total / 2
    assert not any(tmp_path.iterdir())


# --- objects ----------------------------------------------------------------------------


@pytest.mark.behaviour(13)
def test_one_value_for_two_variables_is_saved_in_the_background(tmp_path):
    checkpoint = ckpt.Checkpoint(m=Mirrored(2.0))
    path = checkpoint.save(tmp_path / "ckpt", ASYNC)
    checkpoint.m.assign(9.0)
    checkpoint.sync()
    for _ in range(2):
        checkpoint.m.assign(5.0)
        checkpoint.restore(path).assert_consumed()
        assert [float(v.value) for v in checkpoint.m.copies] == [2.0, 2.0]


@pytest.mark.behaviour(16)
def test_a_status_outlives_a_checkpoint_that_was_saved_in_the_background(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.ones(2)))
    status = checkpoint.restore(checkpoint.save(tmp_path / "ckpt", ASYNC))
    del checkpoint
    status.assert_consumed()


@pytest.mark.behaviour(25)
def test_a_write_in_the_background_returns_exactly_its_path(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(0)))
    for step in (0, 2, 4, 6, 8):
        checkpoint.v.assign(jnp.float32(step))
        path = f"{tmp_path}/written-{step}"
        assert checkpoint.write(path, ASYNC) == path
    checkpoint.sync()
    assert [ckpt.load(f"{tmp_path}/written-{step}")["v"] for step in (0, 4, 8)] == [0.0, 4.0, 8.0]


@pytest.mark.behaviour(66)
def test_another_checkpoint_sees_the_file_once_its_writer_has_waited(tmp_path):
    gate = threading.Event()
    options = ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(),))
    writer = ckpt.Checkpoint(l=[ckpt.Variable(jnp.float32(1))], d={"a": ckpt.Variable(jnp.ones(2))})
    path = writer.save(tmp_path / "ckpt", options)
    assert ckpt.latest_checkpoint(tmp_path) is None
    gate.set()
    writer.sync()
    assert ckpt.latest_checkpoint(tmp_path) == path
    fresh = ckpt.Checkpoint(l=[ckpt.Variable(jnp.float32(0))], d={"a": ckpt.Variable(jnp.zeros(2))})
    fresh.restore(path).assert_consumed()
    assert (float(fresh.l[0].value), fresh.d["a"].value.tolist()) == (1.0, [1.0, 1.0])
