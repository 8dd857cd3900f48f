"""Options: which values are accepted, which are refused, and what each option applies to."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt


def test_every_option_of_the_contract_is_accepted_with_its_default():
    options = ckpt.CheckpointOptions(
        enable_async=False,
        sharding_policy=ckpt.ShardByDevice(),
        write_callbacks=(),
        skip_slot_variables=False,
        cast=False,
        compression=None,
        durable=True,
        timeout_seconds=600,
        shardings=None,
        progress=None,
        when_busy="wait",
        broadcast=False,
    )
    assert options == ckpt.CheckpointOptions()


@pytest.mark.parametrize(
    "wrong",
    [
        {"compression": "gzip"},
        {"max_inflight_bytes": 0},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"sharding_policy": "by device"},
        {"when_busy": "never"},
        {"progress": "a bar"},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ckpt.CheckpointOptions(**wrong)


def test_callbacks_may_be_any_sequence():
    assert ckpt.CheckpointOptions(write_callbacks=[print]).write_callbacks == (print,)


def test_callbacks_take_the_path_or_nothing_whatever_else_they_could_take(tmp_path: Path):
    found: list[Any] = []
    callbacks = [
        found.append,
        lambda: found.append("nothing"),
        lambda path, more=1: found.append((path, more)),
        lambda *, more=2: found.append(more),
        functools.partial(lambda first, path: found.append((first, path)), 3),
    ]
    path = ckpt.save(
        tmp_path / "a", {"x": 1}, options=ckpt.CheckpointOptions(write_callbacks=callbacks)
    )
    assert found == [path, "nothing", (path, 1), 2, (3, path)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cast": "yes"},
        {"durable": None},
        {"enable_async": 1},
        {"timeout_seconds": -1},
        {"timeout_seconds": "600"},
        {"timeout_seconds": float("nan")},
        {"max_inflight_bytes": "1"},
        {"max_inflight_bytes": 1.5},
        {"write_callbacks": print},
        {"write_callbacks": ["print"]},
        {"write_callbacks": [lambda path, more: None]},
        {"write_callbacks": [lambda *, more: None]},
    ],
)
def test_an_option_of_the_wrong_kind_is_named_where_it_is_given(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        ckpt.CheckpointOptions(**wrong)


def test_options_take_the_numbers_of_numpy():
    options = ckpt.CheckpointOptions(
        max_inflight_bytes=np.int64(1 << 20), timeout_seconds=np.float32(2)
    )
    assert options.max_inflight_bytes == 1 << 20 and options.timeout_seconds == 2


def test_options_of_another_class_are_named(tmp_path: Path):
    wrong: Any = {"cast": True}
    checkpoint = ckpt.Checkpoint(x=1)
    path = checkpoint.save(tmp_path / "ckpt")
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "managed")
    for call in (
        lambda: ckpt.save(tmp_path / "a", {"x": 1}, options=wrong),
        lambda: ckpt.restore(path, {"x": 1}, options=wrong),
        lambda: checkpoint.save(tmp_path / "ckpt", wrong),
        lambda: checkpoint.write(tmp_path / "a", wrong),
        lambda: checkpoint.restore(path, wrong),
        lambda: checkpoint.read(path, wrong),
        lambda: manager.save(options=wrong),
    ):
        with pytest.raises(TypeError, match=r"options must be ckpt\.CheckpointOptions, got \{"):
            call()
    assert checkpoint.save_counter == 1


@pytest.mark.behaviour(19, 155)
def test_options_go_with_saves_and_restores_and_none_of_them_names_a_device(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(3)))
    options = ckpt.CheckpointOptions(durable=False)
    path = checkpoint.save(tmp_path / "ckpt", options)
    checkpoint.v.assign(jnp.float32(0))
    checkpoint.restore(path, options).assert_consumed()
    assert float(checkpoint.v.value) == 3.0
    for name in ("experimental_io_device", "io_device"):
        with pytest.raises(TypeError, match=name):
            ckpt.CheckpointOptions(**{name: "localhost"})


def test_the_docstring_says_of_each_option_whether_saves_or_restores_use_it():
    groups: dict[str, list[str]] = {}
    for line in (ckpt.CheckpointOptions.__doc__ or "").splitlines():
        if heading := re.fullmatch(r" {6}(For \w+):", line):
            groups[heading[1]] = []
        elif entry := re.match(r" {8}(\w+): ", line):
            groups[[*groups][-1]].append(entry[1])
    assert [*groups] == ["For saves", "For restores", "For both"]
    documented = [name for names in groups.values() for name in names]
    assert documented == [field.name for field in dataclasses.fields(ckpt.CheckpointOptions)]
