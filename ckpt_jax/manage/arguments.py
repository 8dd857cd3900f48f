"""The arguments of a manager as plain values: numbers, limits and metrics."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.manage.due import SaveAny, SavePolicy
from ckpt_jax.manage.retention import KeepLatest, RetentionPolicy
from ckpt_jax.objects.views import view_of


def as_integer(value: Any) -> int:
    """The integer that a number, a variable, or a function that returns one of these stands for.

    Raises:
      TypeError: there is none.

    >>> from ckpt_jax.objects.trackable import Variable
    >>> as_integer(np.int64(3)), as_integer(Variable(4)), as_integer(lambda: 5)
    (3, 4, 5)
    """
    view = view_of(value)
    if view is not None and view.mutable:
        value = view.values(value).get(VARIABLE_VALUE, value)
    elif callable(value):
        return as_integer(value())
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            "expected an integer, a variable that holds one, or a function that returns one, "
            f"got {value!r}"
        ) from None


def as_limit(max_to_keep: Any) -> RetentionPolicy | None:
    """The policy that `max_to_keep` stands for; None if it keeps all."""
    if max_to_keep is None:
        return None
    if isinstance(max_to_keep, RetentionPolicy):
        return max_to_keep
    if as_integer(max_to_keep) <= 0:
        raise ValueError(f"expected a positive max_to_keep or None, got {max_to_keep}")
    return KeepLatest(as_integer(max_to_keep))


def as_policies(policies: Any) -> tuple[tuple[RetentionPolicy, ...], SaveAny | None]:
    """The policies that say what to keep, and one for those that say when to save.

    Raises:
      TypeError: one of them says neither.
    """
    is_one = isinstance(policies, RetentionPolicy | SavePolicy)
    is_several = isinstance(policies, Iterable) and not is_one
    given: tuple[Any, ...] = tuple(policies) if is_several else (policies,)
    for policy in given:
        if not isinstance(policy, RetentionPolicy | SavePolicy):
            raise TypeError(
                f"expected policies that say what to keep or when to save, got {policy!r}; it has "
                "no keep() and no due()"
            )
    when = tuple([policy for policy in given if isinstance(policy, SavePolicy)])
    kept = tuple([policy for policy in given if isinstance(policy, RetentionPolicy)])
    return kept, SaveAny(when) if when else None


def as_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be numbers by name, got {metrics!r}")
    return {name: _as_number(name, value) for name, value in (metrics or {}).items()}


def _as_number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if not isinstance(name, str) or array.shape != () or array.dtype.kind in "cOSUMm":
        raise ValueError(f"metrics[{name!r}]: expected one real number by name, got {value!r}")
    return float(array)
