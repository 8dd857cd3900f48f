"""Every storage passes the suite, and a store that cannot hold checkpoints safely is refused."""

import pytest

import ckpt_jax as ckpt
from ckpt_jax.testing import StorageConformance


class TestPosix(StorageConformance):
    def make_directory(self, tmp_path):
        return str(tmp_path)


class TestObjectStore(StorageConformance):
    @pytest.fixture(autouse=True)
    def place(self, any_store):
        self.url = any_store.url

    def make_directory(self, tmp_path):
        return self.url


def test_a_store_that_ignores_conditions_is_refused(gcs, gcs_server):
    gcs_server.ignores_conditions = True
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=0), gcs.url)
    for act in (lambda: ckpt.preflight(gcs.url), manager.restore_or_initialize):
        with pytest.raises(ckpt.PreflightError, match="the store ignores conditions"):
            act()
    assert gcs.kvstore().list().result() == []


def test_the_suite_finds_a_store_that_ignores_conditions(gcs, gcs_server, tmp_path):
    class Place(StorageConformance):
        def make_directory(self, tmp_path):
            return gcs.url

    gcs_server.ignores_conditions = True
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Place().test_of_two_saves_that_meet_the_first_one_wins(tmp_path)
