"""Teaches the library Flax when a program first shows it an object of Flax's.

Importing Flax takes longer than this whole package, and programs without it should not pay.
"""

from __future__ import annotations

import importlib

_VIEWS = {"flax.nnx": "ckpt_jax.objects.nnx", "flax.linen": "ckpt_jax.objects.linen"}


def load_flax_views(kind: type) -> bool:
    """Whether there were views of a type of Flax's that had not been loaded yet."""
    packages = {".".join(base.__module__.split(".")[:2]) for base in kind.__mro__}
    todo = [_VIEWS.pop(package) for package in tuple(_VIEWS) if package in packages]
    for module in todo:
        importlib.import_module(module)
    return bool(todo)
