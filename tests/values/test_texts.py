"""Configuration comes back as it was: enums, dates, paths and dtypes, or it is refused by name."""

import dataclasses
import datetime
import enum
import pathlib
import zoneinfo

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt


class Mode(enum.Enum):
    TRAIN = 1
    EVAL = 2


CONFIG = {
    "mode": Mode.TRAIN,
    "day": datetime.date(2026, 1, 31),
    "at": datetime.datetime(2026, 1, 31, 12, 30, 1, 5),
    "utc": datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC),
    "hour": datetime.time(7, 30),
    "every": datetime.timedelta(days=-3, microseconds=7),
    "where": pathlib.Path("runs") / "größe",
    "dtypes": [np.dtype("int8"), jnp.dtype("bfloat16"), np.dtype(ml_dtypes.float8_e5m2)],
    "plain": {"a": [1, 2.5, None, True, "x", (3, "y")], "b": b"\0"},
}


def test_configuration_comes_back_as_it_was(tmp_path):
    path = ckpt.save(tmp_path / "a", CONFIG)
    assert repr(ckpt.load(path)) == repr(CONFIG)
    blank = {
        **CONFIG,
        "mode": Mode.EVAL,
        "day": datetime.date.min,
        "where": pathlib.Path("."),
        "dtypes": [np.dtype("bool")] * 3,
    }
    assert repr(ckpt.restore(path, blank)) == repr(CONFIG)
    anew = ckpt.load_object(ckpt.save_object(CONFIG, tmp_path / "b"))
    assert repr(anew) == repr(CONFIG)


def test_a_dataclass_of_configuration_beside_arrays(tmp_path):
    @dataclasses.dataclass
    class Config:
        w: object
        since: datetime.date
        out: pathlib.Path

    saved = Config(jnp.ones(2), datetime.date(2025, 2, 3), pathlib.Path("/tmp/x"))
    path = ckpt.save(tmp_path / "a", {"config": saved})
    blank = Config(jnp.zeros(2), datetime.date.min, pathlib.Path())
    found = ckpt.restore(path, {"config": blank})["config"]
    assert (found.since, found.out, found.w.tolist()) == (saved.since, saved.out, [1, 1])


def test_a_target_of_another_kind_is_a_mismatch(tmp_path):
    path = ckpt.save(tmp_path / "a", {"day": datetime.date(2026, 1, 1), "where": pathlib.Path("a")})
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, {"day": "2026-01-01", "where": datetime.date.min})
    text = str(raised.value)
    assert "expected a Python str, got a Python date" in text
    assert "expected a Python date, got a Python path" in text


class Stamp(datetime.datetime):
    """A type that would come back as another one."""


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Stamp(2026, 1, 1), "Stamp"),
        (pathlib.PureWindowsPath("a"), "PureWindowsPath"),
        (datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")), "fixed offset"),
        (np.dtype([("a", "i4")]), "not supported"),
        (np.dtype("O"), "not supported"),
        (np.float32, "type"),
        ({1, 2}, "set"),
    ],
)
def test_what_could_not_come_back_is_refused_by_name(tmp_path, value, why):
    with pytest.raises(ckpt.UnsaveableError, match=rf"(?s)config/odd.*{why}"):
        ckpt.save(tmp_path / "a", {"config": {"odd": value}})


def test_a_type_that_is_registered_is_taken(tmp_path):
    class Version:
        def __init__(self, text):
            self.text = text

    with ckpt.registration_scope():
        ckpt.register_view(
            Version,
            children=lambda v: {"text": v.text},
            rebuild=lambda v, new: Version(new["text"]),
        )
        path = ckpt.save(tmp_path / "a", {"version": Version("1.2")})
        assert ckpt.restore(path, {"version": Version("")})["version"].text == "1.2"


def test_as_attributes_of_a_trackable_they_are_configuration_as_before(tmp_path):
    model = ckpt.AutoTrackable()
    model.w, model.day = ckpt.Variable(jnp.ones(1)), datetime.date(2026, 1, 1)
    path = ckpt.save(tmp_path / "a", model)
    assert ckpt.load(path).keys() == {"w"}


@given(st.datetimes(), st.timedeltas(), st.times())
def test_every_moment_comes_back(moment, duration, time):
    from ckpt_jax.graph.texts import KINDS, kind_of

    for value in (moment, duration, time, moment.date()):
        kind = KINDS[kind_of(value)]
        assert kind.read(kind.write(value)) == value
