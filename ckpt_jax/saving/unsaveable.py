"""Collects what cannot be saved, so that one error names all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_jax.errors import UnsaveableError


class Unsaveable:
    """What code of the program has raised while it was asked for values to save.

    >>> unsaveable = Unsaveable()
    >>> with unsaveable.at("model/w"):
    ...     raise ValueError("too large")
    >>> unsaveable.require_none("values cannot be saved")
    Traceback (most recent call last):
      ...
    ckpt_jax.errors.UnsaveableError: 1 values cannot be saved; nothing was written:
      model/w: ValueError: too large
    """

    def __init__(self) -> None:
        self._problems: list[tuple[str, str]] = []
        self._causes: list[Exception] = []

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Keeps an error for later. Code of the program may raise anything."""
        try:
            yield
        except Exception as error:
            self._problems.append((path, f"{type(error).__name__}: {error}"))
            self._causes.append(error)

    def require_none(self, what: str) -> None:
        """Raises one error for all.

        Raises:
          UnsaveableError: there are some.
        """
        if self._problems:
            lines = "\n".join(f"  {path or '(root)'}: {text}" for path, text in self._problems)
            raise UnsaveableError(
                f"{len(self._problems)} {what}; nothing was written:\n{lines}",
                tuple(self._problems),
            ) from self._causes[0]
