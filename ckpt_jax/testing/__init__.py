"""For tests of programs that use this library: conformance suites, and processes in memory.

A *conformance suite* is a class of tests that the author of a plug-in subclasses. The subclass
says how to make the objects, and pytest runs every promise of the interface against them:

    SaverTests          savers that are registered with `ckpt.register_checkpoint_saver`
    ViewTests           views that are registered with `ckpt.register_view`, and any other object
    ReaderTests         readers of checkpoints, for formats that `ckpt.register_format` is given
    ServiceTests        coordination services
    StorageConformance  places for checkpoints: file systems and object stores

`run_processes` runs a program as several processes, which are threads that share a
`MemoryService`.

SaverTests, ViewTests, ReaderTests and StorageConformance need pytest and import it when they are
first asked for. The others need nothing that the library itself does not.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ckpt_jax.testing.processes import MemoryService, ServiceTests, run_processes

if TYPE_CHECKING:
    from ckpt_jax.testing.readers import ReaderTests
    from ckpt_jax.testing.savers import SaverTests
    from ckpt_jax.testing.storage_suite import StorageConformance
    from ckpt_jax.testing.views import ViewTests

_NEED_PYTEST = {
    "ReaderTests": "ckpt_jax.testing.readers",
    "SaverTests": "ckpt_jax.testing.savers",
    "StorageConformance": "ckpt_jax.testing.storage_suite",
    "ViewTests": "ckpt_jax.testing.views",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_PYTEST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _NEED_PYTEST[name]
    try:
        # Here, so that programs without pytest can use the rest of this package.
        import pytest
    except ImportError as error:
        raise ImportError(
            f"{__name__}.{name} needs pytest, which is not installed: pip install pytest"
        ) from error
    if module not in sys.modules:
        pytest.register_assert_rewrite(module)  # a failing assert then shows its values
    return getattr(importlib.import_module(module), name)


__all__ = [
    "MemoryService",
    "ReaderTests",
    "SaverTests",
    "ServiceTests",
    "StorageConformance",
    "ViewTests",
    "run_processes",
]
