"""Retention policies, by the name under which programs import them; see `manage`."""

from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    KeepEveryNSteps,
    KeepFor,
    KeepLatest,
    RetentionPolicy,
)

__all__ = [
    "CheckpointRecord",
    "KeepAny",
    "KeepBest",
    "KeepEveryNSteps",
    "KeepFor",
    "KeepLatest",
    "RetentionPolicy",
]
