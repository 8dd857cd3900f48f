"""Options: which values are accepted, which are refused, and what each option applies to."""

import dataclasses
import re

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
