"""Several processes in one: threads that share a coordination service in memory.

`run_processes` runs a program on a thread for each process. The library sees each thread as a
process of its own: the threads save and restore together, `ckpt.PerProcess` has a value for each,
and process 0 commits. JAX itself knows nothing of this: `jax.process_index()` is 0 on every thread,
and all threads see the same devices. Tests of arrays that are spread over processes need real ones.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import TypeVar

from ckpt_jax.processes.current import simulated
from ckpt_jax.processes.meeting import Processes
from ckpt_jax.processes.service import Service

T = TypeVar("T")
_SOON = 0.05  # seconds to wait for a value that never comes
_PLENTY = 60.0  # seconds to wait for a value that does come


class MemoryService:
    """A coordination service in memory, for threads that act as processes.

    It has the methods of `ckpt_jax.processes.service.Service`. To test how a program copes with a
    service that fails or is slow, override one of them.

    Attributes:
      values: the keys and values that are set.
      waits: how often each thread has called `get`, by the thread's name.

    Example:
      >>> service = MemoryService()
      >>> service.set("a/winner", "1", 60.0), service.set("a/winner", "2", 60.0)
      (True, False)
      >>> service.get("a/winner", 60.0)
      '1'
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.waits: dict[str, int] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str, timeout_seconds: float) -> bool:
        with self._changed:
            if key in self.values:
                return False
            self.values[key] = value
            self._changed.notify_all()
            return True

    def get(self, key: str, timeout_seconds: float) -> str | None:
        with self._changed:
            name = threading.current_thread().name
            self.waits[name] = self.waits.get(name, 0) + 1
            self._changed.wait_for(lambda: key in self.values, timeout_seconds)
            return self.values.get(key)

    def list(self, prefix: str, timeout_seconds: float) -> dict[str, str]:
        with self._changed:
            return {key: value for key, value in self.values.items() if key.startswith(prefix)}

    def delete(self, prefix: str, timeout_seconds: float) -> None:
        with self._changed:
            for key in [key for key in self.values if key.startswith(prefix)]:
                del self.values[key]


def run_processes(
    count: int, program: Callable[[Processes], T], service: Service | None = None
) -> list[T | Exception]:
    """Runs a program as several processes, each on a thread of its own ("p0", "p1", ...).

    Args:
      count: of processes.
      program: called once for each process, with a `Processes` that says which one it is
        (`.index`) and how many there are (`.count`).
      service: the coordination service of the processes; by default a new `MemoryService`.

    Returns:
      For each process, in their order, what the program returned or the exception that it raised.
      Check it: an exception is not raised again here.

    Example:
      >>> import tempfile
      >>> import ckpt_jax as ckpt
      >>> def program(processes):
      ...     path = ckpt.save(f"{directory}/a", {"own": ckpt.PerProcess(10 * processes.index)})
      ...     return ckpt.restore(path, {"own": ckpt.PerProcess(0)})["own"].value
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     run_processes(3, program)
      [0, 10, 20]
    """
    shared = service or MemoryService()
    results: dict[int, T | Exception] = {}

    def run(index: int) -> None:
        processes = Processes(index, count, shared)
        with simulated(processes):
            try:
                results[index] = program(processes)
            except Exception as error:
                results[index] = error

    threads = [
        threading.Thread(target=run, args=[index], name=f"p{index}") for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(count)]


class ServiceTests:
    """A conformance suite for coordination services. Subclass it and override `make_service`.

    Each test uses keys of its own, so that the tests may share one service.

    Example:
      >>> class TestMemoryService(ServiceTests):
      ...     def make_service(self):
      ...         return MemoryService()
      >>> TestMemoryService().test_a_key_is_set_once()
    """

    def make_service(self) -> Service:
        """The service to test."""
        raise NotImplementedError

    # --- the tests ---------------------------------------------------------------------

    def test_a_key_is_set_once(self) -> None:
        service, place = self._service_and_place()
        assert service.set(f"{place}/a", "first", _PLENTY)
        assert not service.set(f"{place}/a", "second", _PLENTY)
        assert service.get(f"{place}/a", _PLENTY) == "first"

    def test_values_of_any_text_come_back(self) -> None:
        service, place = self._service_and_place()
        texts = ["", "a/b\n\"c\" 'd' \\", "Größe", "x" * 10_000]
        for number, text in enumerate(texts):
            service.set(f"{place}/{number}", text, _PLENTY)
        assert [service.get(f"{place}/{n}", _PLENTY) for n in range(len(texts))] == texts

    def test_if_several_set_one_key_at_a_time_one_succeeds(self) -> None:
        service, place = self._service_and_place()

        def program(processes: Processes) -> bool:
            return service.set(f"{place}/winner", str(processes.index), _PLENTY)

        succeeded = run_processes(4, program)
        assert sorted(map(str, succeeded)) == ["False", "False", "False", "True"], succeeded
        assert service.get(f"{place}/winner", _PLENTY) == str(succeeded.index(True))

    def test_a_get_waits_for_its_value(self) -> None:
        service, place = self._service_and_place()

        def program(processes: Processes) -> list[str | None]:
            heard = []
            for turn in range(20):
                if processes.index == 0:
                    heard.append(service.get(f"{place}/{turn}/asked", _PLENTY))
                    service.set(f"{place}/{turn}/answer", "yes", _PLENTY)
                else:
                    service.set(f"{place}/{turn}/asked", "what", _PLENTY)
                    heard.append(service.get(f"{place}/{turn}/answer", _PLENTY))
            return heard

        assert run_processes(2, program) == [["what"] * 20, ["yes"] * 20]

    def test_the_wait_for_a_value_that_does_not_come_ends(self) -> None:
        service, place = self._service_and_place()
        assert service.get(f"{place}/never", _SOON) is None

    def test_a_list_holds_the_keys_below_a_prefix(self) -> None:
        service, place = self._service_and_place()
        for name in ("a/1", "a/b/2", "ab/3", "c"):
            service.set(f"{place}/{name}", name, _PLENTY)
        found = service.list(f"{place}/a/", _PLENTY)
        assert found == {f"{place}/a/1": "a/1", f"{place}/a/b/2": "a/b/2"}
        assert service.list(f"{place}/none/", _PLENTY) == {}

    def test_deleted_keys_are_gone_and_can_be_set_again(self) -> None:
        service, place = self._service_and_place()
        for name in ("a/1", "a/b/2", "ab/3"):
            service.set(f"{place}/{name}", name, _PLENTY)
        service.delete(f"{place}/a/", _PLENTY)
        service.delete(f"{place}/none/", _PLENTY)
        assert service.list(f"{place}/", _PLENTY) == {f"{place}/ab/3": "ab/3"}
        assert service.set(f"{place}/a/1", "again", _PLENTY)
        assert service.get(f"{place}/a/1", _PLENTY) == "again"

    # -----------------------------------------------------------------------------------

    def _service_and_place(self) -> tuple[Service, str]:
        """The service, and a prefix that no other test uses."""
        return self.make_service(), f"test_service/{secrets.token_hex(16)}"


__all__ = ["MemoryService", "ServiceTests", "run_processes"]
