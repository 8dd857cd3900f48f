"""Metrics: what saves and restores say about themselves, to monitoring, program and log."""

import logging
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

import ckpt_jax as ckpt
from ckpt_jax.metrics import METER, Meter, RestoreMetrics, SaveMetrics

SCALARS = ("/ckpt_jax/write/bytes", "/ckpt_jax/read/bytes")


class Clock:
    """A clock that shows what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Events(dict[str, list[float]]):
    """The values of our events by name, in the order in which they came."""

    def __call__(self, name: str, value: float, **_: object) -> None:
        if name.startswith("/ckpt_jax/"):
            self.setdefault(name, []).append(value)


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    monitoring.register_event_duration_secs_listener(events)
    monitoring.register_scalar_listener(events)
    yield events
    monitoring.unregister_event_duration_listener(events)
    monitoring.unregister_scalar_listener(events)


def save_at(meter: Meter, clock: Clock, start: float, end: float, path: str = "c") -> None:
    clock.now = start
    watch = meter.saving()
    clock.now = end
    watch.committed(path)


@pytest.mark.behaviour(151)
def test_every_write_is_one_sample_and_adds_to_the_time_saved(tmp_path: Path, events: Events):
    checkpoint = ckpt.Checkpoint(w=jnp.zeros(250), host=np.zeros(3, np.int16), text="four")
    before = ckpt.metrics.training_seconds_saved()
    for number in range(3):
        checkpoint.write(tmp_path / str(number))
    assert events["/ckpt_jax/write/bytes"] == [1000 + 6 + 4] * 3
    assert len(events["/ckpt_jax/write/duration"]) == 3
    assert len(events["/ckpt_jax/write/blocked"]) == 3
    assert "/ckpt_jax/read/duration" not in events
    gained = events["/ckpt_jax/training_time_saved"]
    assert len(gained) == 3 and min(gained) > 0
    assert ckpt.metrics.training_seconds_saved() == pytest.approx(before + sum(gained))


@pytest.mark.behaviour(152)
def test_a_restore_is_one_sample_and_saves_no_training_time(tmp_path: Path, events: Events):
    checkpoint = ckpt.Checkpoint(w=jnp.zeros(250), nested=[jnp.ones(2), {"x": 1}])
    path = checkpoint.write(tmp_path / "c")
    events.clear()
    before = ckpt.metrics.training_seconds_saved()
    checkpoint.read(path).assert_consumed()
    assert len(events["/ckpt_jax/read/duration"]) == 1
    assert events["/ckpt_jax/read/bytes"][0] >= 1000
    assert sorted(events) == ["/ckpt_jax/read/bytes", "/ckpt_jax/read/duration"]
    assert ckpt.metrics.training_seconds_saved() == before


def test_time_saved_runs_from_the_first_construction_and_then_from_write_to_write():
    meter, clock = Meter(clock := Clock()), clock
    clock.now = 10
    meter.constructed()
    clock.now = 20
    meter.constructed()  # a second checkpoint does not move the mark
    save_at(meter, clock, 30, 35)
    assert meter.training_seconds_saved() == 25
    with meter.restoring(lambda: nullcontext(SimpleNamespace(path="c", bytes_read=1))):
        clock.now = 40
    assert meter.training_seconds_saved() == 25
    save_at(meter, clock, 50, 55)
    assert meter.training_seconds_saved() == 45


def test_without_a_checkpoint_object_the_first_save_has_nothing_to_count_from():
    meter = Meter(clock := Clock())
    save_at(meter, clock, 5, 7)
    assert meter.training_seconds_saved() == 0
    save_at(meter, clock, 8, 9)
    assert meter.training_seconds_saved() == 2


def test_a_clock_that_goes_backwards_makes_no_negative_times():
    meter = Meter(clock := Clock())
    clock.now = 100
    meter.constructed()
    save_at(meter, clock, 50, 40)
    assert meter.training_seconds_saved() == 0
    assert meter.last_save() == SaveMetrics("c", 0, 0.0, 0.0)
    assert meter.last_save().bytes_per_second == 0
    with meter.restoring(lambda: nullcontext(SimpleNamespace(path="c", bytes_read=8))):
        clock.now = 0
    assert meter.last_restore() == RestoreMetrics("c", 8, 0.0)


def test_blocked_ends_where_the_program_goes_on_and_durable_at_the_commit():
    meter = Meter(clock := Clock())
    watch = meter.saving()
    clock.now = 0.25
    watch.unblocked()
    watch.wrote(60)
    clock.now = 2
    watch.wrote(40)
    watch.committed("c")
    assert meter.last_save() == SaveMetrics("c", 100, 0.25, 2.0)
    assert meter.last_save().bytes_per_second == 50


@pytest.mark.parametrize("kind", ["save", "write", "manager", "function"])
@pytest.mark.parametrize("in_background", [False, True])
def test_every_way_to_save_gives_one_value_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, in_background: bool
):
    options = ckpt.CheckpointOptions(enable_async=in_background)
    checkpoint = ckpt.Checkpoint(w=jnp.zeros(250))
    with caplog.at_level(logging.INFO, "ckpt_jax"):
        if kind == "save":
            path = checkpoint.save(tmp_path / "c", options)
        elif kind == "write":
            path = checkpoint.write(tmp_path / "c", options)
        elif kind == "manager":
            path = ckpt.CheckpointManager(checkpoint, tmp_path).save(options=options)
        else:
            path = ckpt.save(tmp_path / "c", {"w": jnp.zeros(250)}, options=options)
        checkpoint.sync()
        ckpt.sync()
    done = ckpt.metrics.last_save()
    assert done is not None
    assert done.path == path
    assert done.nbytes - 1000 in (0, 8)  # the save counter is a value, too
    assert 0 < done.blocked_seconds <= done.durable_seconds
    (record,) = [record for record in caplog.records if record.name == "ckpt_jax"]
    text = record.getMessage()
    assert record.levelno == logging.INFO
    assert path in text and "blocked" in text and "durable" in text and "MB/s" in text


def test_a_program_in_the_foreground_is_blocked_until_the_commit(tmp_path: Path):
    ckpt.save(tmp_path / "c", {"w": 1})
    done = ckpt.metrics.last_save()
    assert done is not None and done.blocked_seconds == done.durable_seconds


def test_a_program_is_blocked_by_the_save_before_but_not_by_its_own(tmp_path: Path):
    """The second save waits for the callback of the first; what it writes it does not wait for."""
    checkpoint = ckpt.Checkpoint(w=jnp.zeros(250))
    gate = threading.Event()
    checkpoint.save(
        tmp_path / "c",
        ckpt.CheckpointOptions(enable_async=True, write_callbacks=(lambda: gate.wait(),)),
    )
    first = METER.last_save()
    threading.Timer(0, gate.set).start()
    checkpoint.save(tmp_path / "c", ckpt.CheckpointOptions(enable_async=True))
    checkpoint.sync()
    second = METER.last_save()
    assert first != second
    assert second is not None and second.blocked_seconds < second.durable_seconds


def test_bytes_are_counted_as_written_not_by_the_name_of_the_path(tmp_path: Path, events: Events):
    """c-1 and c-10 share a prefix; registered savers' shards count, replicas count once."""

    class Table:
        rows = np.zeros(100, np.float64)

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="Table",
            predicate=lambda obj: isinstance(obj, Table),
            save_fn=lambda objects, prefix: ckpt.io.write_shard(
                prefix, {f"{name}/rows": table.rows for name, table in objects.items()}
            ),
            restore_fn=lambda objects, prefix: None,
        )
        ckpt.register_view(Table, children=lambda t: {}, rebuild=lambda t, _: t)
        ckpt.save(tmp_path / "c-10", {"w": np.zeros(1000)})
        ckpt.save(tmp_path / "c-1", {"w": np.zeros(10), "table": Table()})
    assert events["/ckpt_jax/write/bytes"] == [8000, 80 + 800]


def test_large_and_packed_values_are_counted_without_padding(tmp_path: Path):
    tree = {"large": np.zeros(3_000_001, np.uint8), "a": np.zeros(3, np.uint8), "b": np.zeros(1)}
    ckpt.save(tmp_path / "c", tree)
    done = ckpt.metrics.last_save()
    assert done is not None and done.nbytes == 3_000_001 + 3 + 8


def test_a_save_that_fails_is_not_measured(tmp_path: Path, events: Events):
    (tmp_path / "c").write_text("in the way")
    with pytest.raises(FileExistsError):
        ckpt.save(tmp_path / "c", {"w": 1})
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(tmp_path / "nowhere")
    assert events == {}


def test_functions_that_restore_are_measured_and_dry_runs_are_not(tmp_path: Path, events: Events):
    path = ckpt.save(tmp_path / "c", {"w": np.zeros(250, np.float32)})
    ckpt.plan_restore(path, {"w": np.zeros(250, np.float32)})
    assert "/ckpt_jax/read/duration" not in events
    ckpt.load(path)
    ckpt.restore(path, {"w": np.zeros(250, np.float32)})
    assert len(events["/ckpt_jax/read/duration"]) == 2
    done = ckpt.metrics.last_restore()
    assert done is not None and done.path == path and done.nbytes >= 1000 and done.seconds > 0


def test_a_listener_that_fails_does_not_break_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def listener(name: str, seconds: float, **_: object) -> None:
        if name.startswith("/ckpt_jax/"):
            raise RuntimeError("the collector is down")

    monitoring.register_event_duration_secs_listener(listener)
    try:
        checkpoint = ckpt.Checkpoint(w=1)
        path = checkpoint.save(tmp_path / "c")
    finally:
        monitoring.unregister_event_duration_listener(listener)
    assert checkpoint.save_counter == 1
    assert ckpt.verify(path).ok
    assert "a listener of jax.monitoring failed" in caplog.text
