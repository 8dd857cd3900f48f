"""The conformance suite of coordination services, run against the one in memory and JAX's."""

import pytest
from real_processes import outputs_of

from ckpt_jax.testing import MemoryService, ServiceTests


class TestMemoryService(ServiceTests):
    def make_service(self):
        return MemoryService()


TESTS = [name for name in vars(ServiceTests) if name.startswith("test_")]

JAX_SERVICE = """
from ckpt_jax.processes.service import CoordinationService
from ckpt_jax.testing import ServiceTests
from ckpt_jax.values.jax_internals import service_client

class Suite(ServiceTests):
    def make_service(self):
        return CoordinationService(service_client())

for name in arguments:
    getattr(Suite(), name)()
    print(name)
"""


def test_the_service_of_jax_passes_the_same_tests():
    """In a process of its own, which the service ends if it fails."""
    (output,) = outputs_of(JAX_SERVICE, 1, 1, *TESTS)
    assert output.split() == TESTS


class Overwriting(MemoryService):
    """A key can be set again."""

    def set(self, key, value, timeout_seconds):
        self.values.pop(key, None)
        return super().set(key, value, timeout_seconds)


class Impatient(MemoryService):
    """Nobody waits for a value."""

    def get(self, key, timeout_seconds):
        return self.values.get(key)


class Sloppy(MemoryService):
    """A prefix takes in what merely begins with the same letters."""

    def list(self, prefix, timeout_seconds):
        return super().list(prefix.removesuffix("/"), timeout_seconds)

    def delete(self, prefix, timeout_seconds):
        super().delete(prefix.removesuffix("/"), timeout_seconds)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Overwriting, "test_a_key_is_set_once"),
        (Overwriting, "test_if_several_set_one_key_at_a_time_one_succeeds"),
        (Impatient, "test_a_get_waits_for_its_value"),
        (Sloppy, "test_a_list_holds_the_keys_below_a_prefix"),
        (Sloppy, "test_deleted_keys_are_gone_and_can_be_set_again"),
    ],
)
def test_the_suite_notices_a_service_that_is_wrong(kind, expected):
    class Suite(ServiceTests):
        def make_service(self):
            return kind()

    with pytest.raises(AssertionError):
        getattr(Suite(), expected)()
