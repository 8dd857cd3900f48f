"""Progress: what a user's function is told, and what a terminal shows."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax.progress import progress


class Recorder:
    """Remembers the calls, and whether two ever ran at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.overlapped = False
        self._busy = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
            return
        self.calls.append((done, total))
        self._busy.release()

    def check(self, total: int) -> None:
        done = [done for done, _ in self.calls]
        assert {total for _, total in self.calls} == {total}
        assert done == sorted(set(done))  # it grows with every call
        assert (done[0], done[-1]) == (0, total)
        assert not self.overlapped


def tree_on(mesh: Mesh) -> dict:
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "wide": jax.device_put(jnp.arange(4_000_000.0), sharding),
        "small": [jnp.full(10, float(i)) for i in range(50)],
        "host": np.arange(1_000_000, dtype=np.int16),
        "text": "abc",
        "step": 7,
    }


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_and_a_restore_report_from_nothing_to_everything(
    tmp_path: Path, mesh8: Mesh, in_background: bool
):
    tree = tree_on(mesh8)
    total = 16_000_000 + 50 * 40 + 2_000_000 + 3 + 8
    saved, restored = Recorder(), Recorder()
    checkpoint = ckpt.Checkpoint(tree=tree)
    options = ckpt.CheckpointOptions(
        progress=saved, enable_async=in_background, max_inflight_bytes=4 << 20
    )
    path = checkpoint.write(tmp_path / "c", options)
    checkpoint.sync()
    saved.check(total)
    assert len(saved.calls) > 4  # not only the ends
    checkpoint.read(path, ckpt.CheckpointOptions(progress=restored)).assert_consumed()
    restored.check(total)
    assert len(restored.calls) > 4


def test_functions_report_too(tmp_path: Path):
    saved, restored = Recorder(), Recorder()
    tree = {"w": np.zeros(250, np.float32)}
    path = ckpt.save(tmp_path / "c", tree, options=ckpt.CheckpointOptions(progress=saved))
    ckpt.restore(path, tree, options=ckpt.CheckpointOptions(progress=restored))
    saved.check(1000)
    restored.check(1000)


def test_one_value_that_goes_to_two_dtypes_still_ends_at_the_total(tmp_path: Path):
    shared = jnp.arange(4.0)
    path = ckpt.save(tmp_path / "c", [shared, shared])
    restored = Recorder()
    target = [jnp.zeros(4), jnp.zeros(4, jnp.bfloat16)]
    ckpt.restore(path, target, options=ckpt.CheckpointOptions(progress=restored, cast=True))
    restored.check(restored.calls[-1][1])


def test_where_there_is_nothing_to_do_it_is_done_at_once(tmp_path: Path):
    recorder = Recorder()
    ckpt.save(tmp_path / "c", {}, options=ckpt.CheckpointOptions(progress=recorder))
    assert recorder.calls == [(0, 0)]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_function_that_fails_is_logged_once_and_breaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_background: bool
):
    calls: list[int] = []

    def fail(done: int, total: int) -> None:
        calls.append(done)
        raise RuntimeError("no screen")

    checkpoint = ckpt.Checkpoint(w=np.zeros(1000))
    options = ckpt.CheckpointOptions(progress=fail, enable_async=in_background)
    path = checkpoint.save(tmp_path / "c", options)
    checkpoint.sync()
    assert ckpt.verify(path).ok
    assert calls == [0]
    assert caplog.text.count("the progress function failed") == 1


def test_a_save_that_fails_does_not_claim_to_be_done(tmp_path: Path):
    recorder = Recorder()

    def stop(done: int, total: int) -> None:
        recorder(done, total)
        for staging in tmp_path.glob("c.staging-*/shards"):
            staging.rmdir()
            staging.write_text("in the way")

    with pytest.raises(OSError):
        ckpt.save(tmp_path / "c", {"w": np.zeros(9)}, options=ckpt.CheckpointOptions(progress=stop))
    assert recorder.calls == [(0, 72)]


PROGRAM = """
    import numpy as np, sys
    import ckpt_jax as ckpt
    options = ckpt.CheckpointOptions(progress=True)
    path = ckpt.save(sys.argv[1], {"w": np.zeros(1_000_000)}, options=options)
    ckpt.restore(path, {"w": np.zeros(1_000_000)}, options=options)
"""


def on_a_terminal(*command) -> str:
    """What a program draws on a terminal, without what steers the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux says that the other side has closed
            pass
        assert child.wait() == 0
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def lines_of(text: str) -> list[str]:
    """The lines that stay: what is redrawn begins with a return."""
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]


def test_true_draws_a_bar_on_a_terminal(tmp_path: Path):
    text = on_a_terminal(sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path / "c")
    assert re.search(r"saving .*  0%.* 0.0/8.0 MB", text)
    done = [line for line in lines_of(text) if "100%" in line and "8.0/8.0 MB" in line]
    assert [line.split()[0] for line in done[-2:]] == ["saving", "restoring"]


TWO = """
    import sys
    from ckpt_jax.progress import progress
    with progress(True, "one", 10) as first:
        first(3)
        with progress(True, "two [b]", 0):
            first(3)
    with progress(True, "three", 4) as third:
        third(4)
"""


def test_bars_of_work_at_the_same_time_stand_below_each_other():
    text = on_a_terminal(sys.executable, "-c", textwrap.dedent(TWO))
    assert "two [b]" in text  # a name is no markup
    kept = lines_of(text)
    assert len([line for line in kept if line.startswith("three") and "100%" in line]) == 1
    together = [at for at, line in enumerate(kept) if line.startswith("one")]
    assert any(kept[at + 1].startswith("two") for at in together)


def test_in_a_notebook_it_is_a_line(monkeypatch: pytest.MonkeyPatch):
    iostream = pytest.importorskip("ipykernel.iostream")
    written = io.StringIO()
    stream = iostream.OutStream.__new__(iostream.OutStream)  # one that has no kernel
    monkeypatch.setattr(iostream.OutStream, "write", lambda self, text: written.write(text))
    monkeypatch.setattr(iostream.OutStream, "flush", lambda self: None)
    monkeypatch.setattr(iostream.OutStream, "__del__", lambda self: None)
    monkeypatch.setattr(sys, "stdout", stream)
    with progress(True, "saving x", 8_000_000) as advance:
        advance(8_000_000)
    first, last = written.getvalue().strip().split("\r")
    assert first.startswith("saving x [ ") and first.endswith("  0% of 8.0 MB")
    assert last.startswith("saving x [####") and last.endswith("100% of 8.0 MB")


def test_an_export_reports_from_nothing_to_everything(tmp_path: Path):
    recorder = Recorder()
    tree = {"a": np.zeros(100, np.float32), "b": [np.zeros(50)]}
    ckpt.export(tree, tmp_path / "x.npz", format="npz", cast="float16", progress=recorder)
    recorder.check(300)
    assert len(recorder.calls) == 3


def test_true_is_silent_where_there_is_no_terminal(tmp_path: Path):
    program = textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "c"], capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_true_is_silent_where_there_is_no_stderr_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", None)
    options = ckpt.CheckpointOptions(progress=True)
    assert ckpt.load(ckpt.save(tmp_path / "a", {"x": 1}, options=options)) == {"x": 1}
