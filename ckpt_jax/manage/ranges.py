"""The numbers that a caller gives: their kind and their range, checked where they are given."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def require_whole(least: int, **given: Any) -> None:
    """Checks arguments by name.

    Raises:
      TypeError: one is no whole number.
      ValueError: one is less than `least`.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected a whole number, got {value!r}")
        if int(value) < least:
            bound = f"to be at least {least}" if least else "of 0 or more"
            raise ValueError(f"expected {name} {bound}, got {value}")


def require_real(*, is_positive: bool = False, **given: Any) -> None:
    """Checks arguments by name: numbers of 0 or more, or above 0.

    Raises:
      TypeError: one is no real number.
      ValueError: one is too small, or no number at all (NaN).
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if is_positive and not float(value) > 0:
            raise ValueError(f"expected {name} to be positive, got {value}")
        if not float(value) >= 0:
            raise ValueError(f"expected {name} of 0 or more, got {value}")


def require_kind(kind: type, what: str, **given: Any) -> None:
    """Checks arguments by name.

    Raises:
      TypeError: one is no instance of `kind`, which is called `what`.
    """
    for name, value in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {what}, got {value!r}")
