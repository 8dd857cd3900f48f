"""Checkpoints of other libraries that have numbers in a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from ckpt_jax.store.looks import names_in
from ckpt_jax.store.remote import together


def numbered_in(
    directory: str, pattern: re.Pattern[str], recognises: Callable[[str], bool]
) -> dict[int, str]:
    """The paths of the files in a directory by their numbers.

    Args:
      pattern: for a whole name; its first group is the number.
      recognises: whether the file at a path belongs to the format. In an object store all files are
        looked at side by side.
    """
    numbered = {
        os.path.join(directory, name): int(match[1])
        for name in names_in(directory)
        if (match := pattern.fullmatch(name))
    }
    are_own = together(directory, recognises, [*numbered])
    found = zip(numbered.items(), are_own, strict=True)
    return {number: path for (path, number), is_own in found if is_own}
