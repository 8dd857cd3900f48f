"""Fixtures and settings that all tests share."""

import gc
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from jax.sharding import Mesh

pytest.register_assert_rewrite("damage", "pytrees", "real_processes")

# No deadlines: the first example of a property compiles or opens a database, the rest do not.
settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# In CI the same examples every time: a failure there is a change's, not a seed's.
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def _mesh(rows: int, columns: int) -> Mesh:
    devices = jax.devices()
    assert len(devices) == rows * columns, f"expected 8 virtual CPU devices, got {devices}"
    return Mesh(np.array(devices).reshape(rows, columns), ("data", "model"))


@pytest.fixture(scope="session")
def mesh42() -> Mesh:
    """Eight devices as ("data", "model") = (4, 2)."""
    return _mesh(4, 2)


@pytest.fixture(scope="session")
def mesh24() -> Mesh:
    """The same devices as ("data", "model") = (2, 4)."""
    return _mesh(2, 4)


@pytest.fixture(scope="session")
def mesh8() -> Mesh:
    """The same devices in one row, ("data",) = (8,)."""
    return Mesh(np.array(jax.devices()), ("data",))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "written")


@pytest.fixture
def prefix(tmp_path):
    """What numbered checkpoints are called: `ckpt-1` and so on."""
    return str(tmp_path / "ckpt")


@pytest.fixture
def no_gc():
    """Objects go when nobody refers to them, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def no_flushing():
    """Nobody pulls the plug in these tests, and flushing is most of the time they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
