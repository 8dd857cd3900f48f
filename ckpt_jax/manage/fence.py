"""The fence: of several managers of the same directory and name, one records.

A job may be stopped, replaced by another one, and wake up again. Its manager would then make an old
checkpoint the latest, and drop the newer ones from the state file. So the state file names the
*writer* of each name: the manager that records its checkpoints, with a number that only grows.

A manager *claims* its name when its first checkpoint is about to take its place, or is recorded if
there is no state file before: it writes itself into the state file, with a larger number than the
one there. A manager is *behind* if another one has claimed the name since, or, if this one has not
claimed it, since this one was made. A manager that is behind neither records nor removes nor
replaces anything. A new manager is never behind.

The act that depends on a look at the writer happens under the same guard (`store.guard`), so no
other manager comes between them.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping

from ckpt_jax.errors import SupersededError
from ckpt_jax.store.guard import changing
from ckpt_jax.store.state_file import Writer, replace_writers, writers_of


class Fence:
    """What one manager knows of the writer of its name.

    Args:
      directory: of the state file; it need not exist yet.
      name: of the checkpoints.

    Attributes:
      is_claimed: whether this manager has claimed the name.
      is_known: whether this manager has said that it is behind.
    """

    def __init__(self, directory: str, name: str):
        self._directory, self._name = directory, name
        self._last = self._present()  # as far as this manager knows
        self.is_claimed = False
        self.is_known = False

    def is_behind(self) -> bool:
        """Whether another manager has claimed the name since."""
        return self._is_overtaken_by(self._present())

    def claim(self) -> None:
        """Claims the name, if there is a state file. Otherwise it is claimed by `renewed`."""

        def change() -> Writer | None:
            writers = writers_of(self._directory)
            own = self._successor(writers.get(self._name))
            return own if replace_writers(self._directory, {**writers, self._name: own}) else None

        own = changing(self._directory, change)
        if own is not None:
            self._last, self.is_claimed = own, True

    def renewed(self, *, claims: bool) -> Mapping[str, Writer]:
        """The writers of all names, for the state file that is about to be written.

        Args:
          claims: whether the name is claimed if it is not yet. Otherwise its writer stays.

        Raises:
          SupersededError: this manager is behind, and wants to be the writer.
        """
        writers = writers_of(self._directory)
        present = writers.get(self._name)
        if not (claims or self.is_claimed):
            return writers
        if self._is_overtaken_by(present):
            raise self.error()
        if not self.is_claimed:
            self._last, self.is_claimed = self._successor(present), True
        assert self._last is not None
        return {**writers, self._name: self._last}

    def error(self, outcome: str = "Nothing was changed.") -> SupersededError:
        """The error of a manager that is behind; `outcome` says what has become of its save."""
        self.is_known = True
        present = self._present()
        return SupersededError(
            f"{self._directory}: expected no other manager of the checkpoints {self._name}-N since "
            f"this one, but {present or 'another one'} has taken them over. {outcome} If this "
            "program is left over from an earlier run, end it. To go on from the latest "
            "checkpoint, create a new manager and restore."
        )

    def _present(self) -> Writer | None:
        return writers_of(self._directory).get(self._name)

    def _is_overtaken_by(self, present: Writer | None) -> bool:
        if present is None or present == self._last:
            return False
        return self._last is None or present.number >= self._last.number

    def _successor(self, present: Writer | None) -> Writer:
        known = [each.number for each in (present, self._last) if each is not None]
        number = max(known, default=0) + 1
        return Writer(number, secrets.token_hex(8), os.getpid(), socket.gethostname())
