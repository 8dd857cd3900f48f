"""Teaches the library Flax when a program first shows it an object of Flax's.

Importing Flax takes longer than this whole package, and programs without it should not pay.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ckpt_jax.trackable.view import View, view_of

_done = False


def flax_view(obj: Any) -> View | None:
    global _done
    if _done or "flax" not in sys.modules:
        return None
    if not any(base.__module__.partition(".")[0] == "flax" for base in type(obj).__mro__):
        return None
    _done = True
    importlib.import_module("ckpt_jax.flax")
    return view_of(obj)
