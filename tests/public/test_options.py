"""Options: what is accepted, what is refused, and what is not built yet."""

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
        verify=True,
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
