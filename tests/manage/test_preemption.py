"""Preemption: real signals to real processes, which are told apart by what they print."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.testing import run_processes


@pytest.fixture
def programs() -> Iterator:
    """Starts Python programs whose lines can be read and that can be sent lines."""
    with ExitStack() as stack:

        def start(text: str, *arguments: object) -> subprocess.Popen[str]:
            child = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def manager_in(directory: Path, **named: object) -> ckpt.CheckpointManager:
    return ckpt.CheckpointManager(ckpt.Checkpoint(**named), directory)


def notify(number: signal.Signals = signal.SIGTERM) -> None:
    """What a scheduler does."""
    os.kill(os.getpid(), number)


# --- at a step boundary ----------------------------------------------------------------


def test_a_signal_saves_at_the_next_step_boundary_and_ends_the_loop(tmp_path: Path, programs):
    child = programs(
        """
        import sys
        import ckpt_jax as ckpt

        checkpoint = ckpt.Checkpoint(step=0)
        manager = ckpt.CheckpointManager(checkpoint, sys.argv[1])
        with ckpt.PreemptionHandler(manager, grace_seconds=600) as handler:
            for step in range(10):
                checkpoint.step = step
                print("at", step, flush=True)
                sys.stdin.readline()
                if handler.reached(step):
                    break
        print(step, handler.noticed, handler.saved, flush=True)
        """,
        tmp_path,
    )
    for step in range(3):
        assert child.stdout.readline() == f"at {step}\n"
        if step == 2:
            child.send_signal(signal.SIGTERM)
        child.stdin.write("on\n")
        child.stdin.flush()
    assert child.stdout.readline() == f"2 True {tmp_path}/ckpt-1\n"
    assert child.wait() == 0
    assert ckpt.load(tmp_path / "ckpt-1")["step"] == 2


def test_a_manager_that_cannot_save_has_no_handler(tmp_path: Path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), tmp_path, read_only=True)
    with pytest.raises(ckpt.CheckpointError, match="read-only and cannot save"):
        ckpt.PreemptionHandler(manager)
    ckpt.PreemptionHandler(manager, save=lambda step: None)  # another one may


def test_without_a_signal_nothing_is_saved(tmp_path: Path):
    manager = manager_in(tmp_path, x=1)
    with ckpt.PreemptionHandler(manager) as handler:
        assert [handler.reached(step) for step in range(3)] == [False] * 3
    assert (handler.noticed, handler.saved) == (False, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [None, ckpt.CheckpointOptions(enable_async=True)])
def test_what_is_reported_as_saved_is_committed(
    tmp_path: Path, options: ckpt.CheckpointOptions | None
):
    manager = manager_in(tmp_path, x=np.ones(100_000))
    with ckpt.PreemptionHandler(
        manager, save=lambda step: manager.save(step, options=options)
    ) as handler:
        notify()
        assert handler.reached(41)
        assert handler.saved == str(tmp_path / "ckpt-41")
        assert ckpt.verify(handler.saved).ok
        assert handler.reached(42)  # it stays true, and saves no more
    assert manager.checkpoints == [str(tmp_path / "ckpt-41")]


def test_an_error_of_an_earlier_save_does_not_prevent_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def fail() -> None:
        raise RuntimeError("no more room")

    manager = manager_in(tmp_path, x=1)
    manager.save(options=ckpt.CheckpointOptions(enable_async=True, write_callbacks=(fail,)))
    with ckpt.PreemptionHandler(manager) as handler:
        notify()
        assert handler.reached(1)
    assert handler.saved is not None and ckpt.verify(handler.saved).ok
    assert "no more room" in caplog.text


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_step_that_is_saved_already_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
):
    monkeypatch.chdir(tmp_path)
    directory = "run" if is_relative else tmp_path / "run"
    manager = ckpt.CheckpointManager(
        ckpt.Checkpoint(x=1), directory, step_counter=5, checkpoint_interval=5
    )
    path = manager.save()
    with ckpt.PreemptionHandler(manager) as handler:
        notify()
        assert handler.reached(5)
    assert handler.saved == path
    assert manager.checkpoints == [path]


def test_a_save_that_fails_raises_where_the_loop_is_and_may_be_tried_again(tmp_path: Path):
    manager = manager_in(tmp_path, w=jnp.ones(2))
    with ckpt.PreemptionHandler(manager) as handler:
        notify()
        manager.checkpoint.w.delete()
        with pytest.raises(ckpt.UnsaveableError):
            handler.reached(1)
        assert handler.saved is None
        manager.checkpoint.w = jnp.ones(2)
        assert handler.reached(2)
    assert handler.saved == str(tmp_path / "ckpt-1")


def test_a_loop_that_ends_before_a_boundary_is_told_that_nothing_was_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with ckpt.PreemptionHandler(manager_in(tmp_path, x=1)) as handler:
        notify()
    assert (handler.noticed, handler.saved) == (True, None)
    assert "nothing was saved" in caplog.text


def test_who_agrees_can_be_given(tmp_path: Path):
    asked: list[tuple[int, bool]] = []

    def agree(step: int, noticed: bool) -> bool:
        asked.append((step, noticed))
        return step == 3

    with ckpt.PreemptionHandler(manager_in(tmp_path, x=1), agree=agree) as handler:
        assert not handler.reached(1)
        notify()
        assert not handler.reached(2)
        assert handler.reached(3)
    assert asked == [(1, False), (2, True), (3, True)]
    assert handler.saved == str(tmp_path / "ckpt-1")


def test_the_interval_of_the_manager_is_not_asked_by_a_save_that_is_given_either(tmp_path: Path):
    checkpoint = ckpt.Checkpoint(step=5)
    manager = ckpt.CheckpointManager(
        checkpoint, tmp_path, step_counter=lambda: checkpoint.step, checkpoint_interval=1000
    )
    manager.save(5)
    with ckpt.PreemptionHandler(manager, save=lambda step: manager.save(step)) as handler:
        notify()
        checkpoint.step = 6
        assert handler.reached(6)
    assert handler.saved == str(tmp_path / "ckpt-6")


def test_what_was_saved_but_not_recorded_is_saved_again(tmp_path: Path):
    def refuse() -> None:
        raise ValueError("not today")

    checkpoint = ckpt.Checkpoint(step=1)
    manager = ckpt.CheckpointManager(
        checkpoint, tmp_path, step_counter=lambda: checkpoint.step, checkpoint_interval=1
    )
    manager.save()
    checkpoint.step = 2
    with pytest.raises(ValueError, match="not today"):
        manager.save(options=ckpt.CheckpointOptions(write_callbacks=[refuse]))
    with ckpt.PreemptionHandler(manager) as handler:
        notify()
        assert handler.reached(2)
    assert handler.saved == manager.latest_checkpoint == str(tmp_path / "ckpt-3")
    assert ckpt.load(handler.saved)["step"] == 2


def test_a_save_that_returns_nothing_is_tried_again_at_the_next_boundary(tmp_path: Path):
    manager = manager_in(tmp_path, x=1)
    manager.save()
    with ckpt.PreemptionHandler(
        manager, save=lambda step: manager.save() if step == 2 else None
    ) as handler:
        notify()
        assert not handler.reached(1)
        assert handler.saved is None
        assert handler.reached(2)
    assert handler.saved == str(tmp_path / "ckpt-2")


# --- at once ---------------------------------------------------------------------------


def test_a_second_signal_saves_in_the_middle_of_a_step(tmp_path: Path, programs):
    child = programs(
        """
        import sys, threading
        import ckpt_jax as ckpt

        manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), sys.argv[1])
        saved = threading.Event()

        def save(step):
            path = manager.save(check_interval=False)
            saved.set()
            return path

        with ckpt.PreemptionHandler(manager, save=save) as handler:
            assert not handler.reached(0)
            print("in a step", flush=True)
            saved.wait()
            sys.stdin.readline()
        print(handler.saved, flush=True)
        """,
        tmp_path,
    )
    assert child.stdout.readline() == "in a step\n"
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)
    # Two signals of one kind may arrive as one; the second of them then is this.
    while child.poll() is None and not (tmp_path / "ckpt-1").exists():
        child.send_signal(signal.SIGTERM)
    child.stdin.write("no more signals\n")
    child.stdin.flush()
    assert child.stdout.readline() == f"{tmp_path}/ckpt-1\n"
    assert child.wait() == 0


def test_the_end_of_the_grace_period_saves_though_the_main_thread_waits_in_c(
    tmp_path: Path, programs
):
    """No Python signal handler can run there, as none can while it waits for a device."""
    child = programs(
        """
        import ctypes, sys
        import ckpt_jax as ckpt

        manager = ckpt.CheckpointManager(ckpt.Checkpoint(x=1), sys.argv[1])
        c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        c.pthread_mutex_lock(mutex)

        def save(step):
            path = manager.save(check_interval=False)
            c.pthread_mutex_unlock(mutex)
            return path

        with ckpt.PreemptionHandler(manager, grace_seconds=0, save=save) as handler:
            assert not handler.reached(0)
            print("in a step", flush=True)
            c.pthread_mutex_lock(mutex)  # no signal interrupts this
        print(handler.noticed, handler.saved, flush=True)
        """,
        tmp_path,
    )
    assert child.stdout.readline() == "in a step\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == f"True {tmp_path}/ckpt-1\n"
    assert child.wait() == 0


def test_a_boundary_after_a_save_in_the_middle_saves_again(tmp_path: Path):
    manager = manager_in(tmp_path, x=1)
    saved = threading.Event()

    def save(step: int | None) -> str | None:
        path = manager.save()
        saved.set()
        return path

    with ckpt.PreemptionHandler(manager, grace_seconds=0, save=save) as handler:
        notify()
        saved.wait()
        manager.checkpoint.x = 2
        assert handler.reached(1)
    assert handler.saved == str(tmp_path / "ckpt-2")
    assert [ckpt.load(path)["x"] for path in manager.checkpoints] == [1, 2]


def test_a_save_in_the_middle_that_fails_is_logged_and_the_boundary_still_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    manager = manager_in(tmp_path, w=jnp.ones(2))
    manager.checkpoint.w.delete()  # as a step does that has donated it
    tried = threading.Event()

    def save(step: int | None) -> str | None:
        try:
            return manager.save()
        finally:
            tried.set()

    with ckpt.PreemptionHandler(manager, grace_seconds=0, save=save) as handler:
        notify()
        tried.wait()
        manager.checkpoint.w = jnp.full(2, 3.0)
        assert handler.reached(7)
    assert "the save in the middle of a step failed" in caplog.text
    assert "deleted or donated" in caplog.text
    np.testing.assert_array_equal(ckpt.load(handler.saved)["w"], np.full(2, 3.0))


def test_a_boundary_after_a_save_in_the_middle_saves_again_though_steps_are_counted_before(
    tmp_path: Path,
):
    checkpoint = ckpt.Checkpoint(step=6, x=5)  # the step has begun by counting itself
    manager = ckpt.CheckpointManager(
        checkpoint, tmp_path, step_counter=lambda: checkpoint.step, checkpoint_interval=1
    )
    saved = threading.Event()

    def save(step: int | None) -> str | None:
        path = manager.save()
        saved.set()
        return path

    with ckpt.PreemptionHandler(manager, grace_seconds=0, save=save) as handler:
        notify()
        saved.wait()
        checkpoint.x = 6
        assert handler.reached(6)
    assert ckpt.load(handler.saved)["x"] == 6


# --- what it takes and gives back ------------------------------------------------------


def test_handlers_and_wakeup_file_are_given_back(tmp_path: Path):
    manager = manager_in(tmp_path, x=1)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno())
    try:
        with ckpt.PreemptionHandler(manager, signals=(signal.SIGUSR1,)) as handler:
            notify(signal.SIGUSR1)
            assert handler.reached(1)
        assert seen == []
        notify(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert ours.recv(10) == bytes([signal.SIGUSR1])  # that of afterwards alone
    finally:
        assert signal.set_wakeup_fd(wakeup) == theirs.fileno()
        signal.signal(signal.SIGUSR1, before)
        ours.close()
        theirs.close()


def test_an_event_loop_still_gets_its_own_signals(tmp_path: Path):
    async def train() -> str | None:
        came = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, came.set)
        with ckpt.PreemptionHandler(manager_in(tmp_path, x=1)) as handler:
            notify(signal.SIGUSR2)
            await came.wait()
            assert not handler.reached(1)
            notify()
            assert handler.reached(2)
        return handler.saved

    assert asyncio.run(train()) == str(tmp_path / "ckpt-1")


def test_a_signal_that_cannot_be_passed_on_is_not_taken_for_the_end_of_the_grace_period(
    tmp_path: Path,
):
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        with pytest.raises(BlockingIOError):
            while True:
                theirs.send(bytes(100_000))
        with ckpt.PreemptionHandler(manager_in(tmp_path, x=1), grace_seconds=600) as handler:
            notify()
            notify(signal.SIGUSR2)
        assert (handler.noticed, handler.saved) == (True, None)
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR2, before)
        ours.close()
        theirs.close()


def test_what_cannot_be_taken_leaves_everything_as_it_was(tmp_path: Path):
    before = signal.getsignal(signal.SIGUSR1)
    handler = ckpt.PreemptionHandler(
        manager_in(tmp_path, x=1), signals=(signal.SIGUSR1, signal.SIGKILL)
    )
    with pytest.raises(OSError), handler:
        pass
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_than_the_main_one_is_refused(tmp_path: Path):
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with ckpt.PreemptionHandler(manager_in(tmp_path, x=1)):
                pass
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_a_negative_grace_period_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="grace_seconds"):
        ckpt.PreemptionHandler(manager_in(tmp_path, x=1), grace_seconds=-1)


# --- several processes -----------------------------------------------------------------

WORKER = """
    import os, signal, sys
    import jax
    import ckpt_jax as ckpt

    directory, port, count, number, how = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory)
    handler = ckpt.PreemptionHandler(manager, signals=(signal.SIGTERM, signal.SIGUSR1))
    with handler:
        print("ready", flush=True)
        step = 0
        while not handler.reached(step):
            step += 1
    print(step, handler.noticed, os.path.basename(handler.saved), flush=True)
    jax.distributed.shutdown()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("count", [1, 2])
def test_with_jaxs_service_all_processes_save_at_one_step(
    tmp_path: Path, programs, count: int, number: signal.Signals
):
    """One of them gets the signal, whichever signal it is."""
    port = free_port()
    children = [programs(WORKER, tmp_path, port, count, i, number) for i in range(count)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    children[-1].send_signal(number)
    lines = [child.stdout.readline().split() for child in children]
    assert [child.wait() for child in children] == [0] * count
    steps = {line[0] for line in lines}
    assert len(steps) == 1
    assert [line[1:] for line in lines] == [["True", "ckpt-1"]] * count
    assert ckpt.verify(tmp_path / "ckpt-1").ok


def test_a_signal_that_the_system_delivers_to_another_thread_than_the_main_one_is_noticed(
    tmp_path: Path, programs
):
    """As it may if the main thread has no processor at that moment. A loop that waits for nothing
    still has to hear of it."""
    child = programs(WORKER, tmp_path, free_port(), 1, 0, signal.SIGUSR1)
    assert child.stdout.readline() == "ready\n"
    threads = [int(name) for name in os.listdir(f"/proc/{child.pid}/task")]
    other = next(thread for thread in threads if thread != child.pid)
    assert ctypes.CDLL(None).tgkill(child.pid, other, signal.SIGUSR1) == 0
    assert child.stdout.readline().split()[1:] == ["True", "ckpt-1"]
    assert child.wait() == 0


def test_an_error_that_one_process_alone_has_does_not_keep_the_others_from_the_last_save(tmp_path):
    def program(processes):
        def refuse():
            raise ValueError("not today")

        checkpoint = ckpt.Checkpoint(step=0)
        manager = ckpt.CheckpointManager(checkpoint, tmp_path)
        callbacks = [refuse] if processes.index == 1 else []
        manager.save(options=ckpt.CheckpointOptions(enable_async=True, write_callbacks=callbacks))
        handler = ckpt.PreemptionHandler(manager, agree=lambda step, noticed: True)
        assert handler.reached(7)
        return os.path.basename(handler.saved)

    assert run_processes(3, program) == ["ckpt-2"] * 3


def test_a_callback_that_fails_in_one_process_alone_leaves_it_with_what_all_have_saved(tmp_path):
    def program(processes):
        def refuse():
            raise ValueError("not today")

        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), tmp_path)
        options = ckpt.CheckpointOptions(write_callbacks=[refuse] if processes.index == 1 else [])
        handler = ckpt.PreemptionHandler(
            manager,
            save=lambda step: manager.save(options=options),
            agree=lambda step, noticed: True,
        )
        if processes.index == 1:
            with pytest.raises(ValueError, match="not today"):
                handler.reached(7)
        assert handler.reached(7)  # and there is nothing to save together any more
        return os.path.basename(handler.saved)

    assert run_processes(3, program) == ["ckpt-1"] * 3


class Once(ckpt.PythonState):
    """Something that cannot be saved at the step 6 of one process."""

    def __init__(self, is_failing: bool):
        self.is_failing = is_failing

    def serialize(self) -> str:
        if self.is_failing:
            raise ValueError("not today")
        return ""

    def deserialize(self, value: str) -> None:
        pass


def test_after_a_last_save_that_failed_all_processes_find_the_same_steps_due(tmp_path):
    def program(processes):
        checkpoint = ckpt.Checkpoint(step=1, once=Once(False))
        manager = ckpt.CheckpointManager(
            checkpoint, tmp_path, step_counter=lambda: checkpoint.step, checkpoint_interval=3
        )
        manager.save()
        options = ckpt.CheckpointOptions(enable_async=True)
        handler = ckpt.PreemptionHandler(
            manager,
            save=lambda step: manager.save(options=options),
            agree=lambda step, noticed: True,
        )
        checkpoint.step, checkpoint.once.is_failing = 6, processes.index == 2
        with pytest.raises(ckpt.CheckpointError, match="not today"):
            handler.reached(6)
        checkpoint.step, checkpoint.once.is_failing = 7, False
        assert manager.save() is not None
        return handler.reached(7), os.path.basename(handler.saved)

    assert run_processes(3, program) == [(True, "ckpt-2")] * 3


def test_a_last_save_that_failed_is_tried_again_with_jaxs_service_too(tmp_path: Path, programs):
    """Which says at one step only that it is the one to save at."""
    text = """
        import os, signal, sys
        import jax
        import ckpt_jax as ckpt

        directory, port, number = sys.argv[1:]
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory)
        tried = []

        def save(step):
            tried.append(step)
            if len(tried) == 1:
                raise OSError("no space")
            return manager.save()

        with ckpt.PreemptionHandler(manager, save=save) as handler:
            if number == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            step = 0
            while not tried:
                try:
                    handler.reached(step)
                except OSError:
                    handler.reached(step + 1)
                step += 1
        print(tried[1:] == [tried[0] + 1], os.path.basename(handler.saved), flush=True)
        jax.distributed.shutdown()
        """
    port = free_port()
    children = [programs(text, tmp_path, port, number) for number in range(2)]
    assert [child.stdout.readline() for child in children] == ["True ckpt-1\n"] * 2
    assert [child.wait() for child in children] == [0] * 2


@pytest.mark.parametrize("first", [0, 2**31])
def test_steps_may_be_any_numbers_that_all_processes_share(tmp_path: Path, programs, first: int):
    """JAX itself agrees only on numbers without gaps below 2**31."""
    text = WORKER.replace("step = 0\n", f"step = {first}\n").replace("step += 1", "step += 2")
    port = free_port()
    children = [programs(text, tmp_path, port, 2, i, signal.SIGTERM) for i in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    children[1].send_signal(signal.SIGTERM)
    lines = [child.stdout.readline().split() for child in children]
    assert [child.wait() for child in children] == [0, 0]
    assert len({line[0] for line in lines}) == 1
    assert [line[1:] for line in lines] == [["True", "ckpt-1"]] * 2


def test_a_process_whose_main_thread_waits_in_c_still_tells_the_others(tmp_path: Path, programs):
    """As it does while it waits for a device: no Python signal handler can run then."""
    text = """
        import ctypes, signal, sys, threading
        import jax
        import ckpt_jax as ckpt

        directory, port, number = sys.argv[1:]
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory)
        c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)

        def go_on_when_told():
            sys.stdin.readline()
            c.pthread_mutex_unlock(mutex)

        def save(step):
            print("saves", flush=True)
            return manager.save()

        signals = [signal.SIGUSR1]
        with ckpt.PreemptionHandler(manager, signals=signals, save=save) as handler:
            step = 0
            while not handler.reached(step):
                step += 1
                if number == "1" and step == 3:
                    threading.Thread(target=go_on_when_told).start()
                    c.pthread_mutex_lock(mutex)
                    print("waits", flush=True)
                    c.pthread_mutex_lock(mutex)
        print(step, flush=True)
        jax.distributed.shutdown()
        """
    port = free_port()
    first, second = (programs(text, tmp_path, port, number) for number in range(2))
    assert second.stdout.readline() == "waits\n"
    second.send_signal(signal.SIGUSR1)
    assert first.stdout.readline() == "saves\n"  # it knows the step, and has come to it
    second.stdin.write("go on\n")
    second.stdin.flush()
    assert second.stdout.readline() == "saves\n"
    assert first.stdout.readline() == second.stdout.readline()
    assert [first.wait(), second.wait()] == [0, 0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_is_dead_or_stopped_holds_nobody(
    tmp_path: Path, programs, how: signal.Signals, number: signal.Signals
):
    text = """
        import functools, os, signal, sys, threading
        import jax
        import ckpt_jax as ckpt
        from ckpt_jax.manage import preemption

        directory, port, number, how = sys.argv[1:]
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
        preemption.CommonStep = functools.partial(preemption.CommonStep, answer_seconds=2)
        manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory)
        signals = (signal.SIGTERM, signal.SIGUSR1)
        with ckpt.PreemptionHandler(manager, signals=signals) as handler:
            print("ready", flush=True)
            if number == "1":
                sys.stdin.readline()
                os.kill(os.getpid(), int(how))
            step = 0
            try:
                while not handler.reached(step):
                    step += 1
            except ckpt.BarrierTimeoutError as error:
                print(error.processes, error, flush=True)
        os._exit(0)
        """
    port = free_port()
    first, second = (programs(text, tmp_path, port, k, int(how)) for k in range(2))
    for child in (first, second):
        assert child.stdout.readline() == "ready\n"
    second.stdin.write("now\n")
    second.stdin.flush()
    options = os.WSTOPPED if how == signal.SIGSTOP else os.WEXITED
    os.waitid(os.P_PID, second.pid, options | os.WNOWAIT)
    first.send_signal(number)
    assert first.stdout.readline().startswith(
        "(1,) agreeing on a step to stop at: processes 1 of 2"
    )
    assert first.wait() == 0
    assert not (tmp_path / "ckpt-1").exists()


WITHOUT_SERVICE = WORKER.replace(
    "    import ckpt_jax as ckpt\n",
    "    import ckpt_jax as ckpt\n    jax.config.update('jax_enable_preemption_service', False)\n",
)


@pytest.mark.skipif(
    not hasattr(jax.config, "jax_enable_preemption_service"),
    reason="This release of JAX has no setting that turns its preemption service off.",
)
@pytest.mark.parametrize("count", [1, 3])
def test_where_the_service_is_off_all_processes_save_at_one_step(
    tmp_path: Path, programs, count: int
):
    port, number = free_port(), signal.SIGTERM
    children = [programs(WITHOUT_SERVICE, tmp_path, port, count, i, number) for i in range(count)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    children[-1].send_signal(number)
    lines = [child.stdout.readline().split() for child in children]
    assert [child.wait() for child in children] == [0] * count
    assert len({line[0] for line in lines}) == 1
    assert [line[1:] for line in lines] == [["True", "ckpt-1"]] * count
    assert ckpt.verify(tmp_path / "ckpt-1").ok
