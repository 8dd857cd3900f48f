"""The coordination service: keys and values that the processes of a program share.

A key is set only once. That makes the service a place for decisions: if several processes try to
set the same key, the first one decides, and the others read its decision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import jax

from ckpt_jax.store.workers import started


class Service(Protocol):
    """Keys and values that all processes share.

    Every call ends within its timeout. It raises TimeoutError if the service does not answer in
    time, and ConnectionError if the service is gone.
    """

    def set(self, key: str, value: str, timeout_seconds: float) -> bool:
        """Sets a key that has no value yet. Returns False, and changes nothing, if it has one."""
        ...

    def get(self, key: str, timeout_seconds: float) -> str | None:
        """Waits for the value of a key. Returns None if it has none when the timeout is over."""
        ...

    def list(self, prefix: str, timeout_seconds: float) -> dict[str, str]:
        """The keys below a prefix that ends in "/", each with its prefix, and their values."""
        ...

    def delete(self, prefix: str, timeout_seconds: float) -> None:
        """Removes the keys below a prefix that ends in "/"."""
        ...


class CoordinationService:
    """The service of `jax.distributed`.

    JAX's client waits forever if the process with the service is stopped. Each call therefore has
    a thread of its own, which is left behind if the call does not end.

    Args:
      client: JAX's client of the service.
    """

    def __init__(self, client: Any):
        self._client = client

    def set(self, key: str, value: str, timeout_seconds: float) -> bool:
        try:
            self._call(timeout_seconds, self._client.key_value_set, key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise _gone(error) from error
        return True

    def get(self, key: str, timeout_seconds: float) -> str | None:
        milliseconds = max(1, int(timeout_seconds * 1000))
        get = self._client.blocking_key_value_get
        try:
            # The service's own deadline comes first, unless the service hangs.
            return self._call(timeout_seconds + 1.0, get, key, milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise _gone(error) from error

    def list(self, prefix: str, timeout_seconds: float) -> dict[str, str]:
        try:
            return dict(self._call(timeout_seconds, self._client.key_value_dir_get, prefix))
        except jax.errors.JaxRuntimeError as error:
            raise _gone(error) from error

    def delete(self, prefix: str, timeout_seconds: float) -> None:
        try:
            self._call(timeout_seconds, self._client.key_value_delete, prefix)
        except jax.errors.JaxRuntimeError as error:
            raise _gone(error) from error

    def _call(self, timeout_seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        found: list[Any] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                found.append(function(*arguments))
            except BaseException as error:  # raised again in the calling thread
                failed.append(error)

        thread = threading.Thread(target=work, name="ckpt-service", daemon=True)
        if started(thread):
            thread.join(timeout_seconds)
        else:
            work()
        if failed:
            raise failed[0]
        if not found:
            raise TimeoutError(
                f"the coordination service, which is in process 0, gave no answer in "
                f"{timeout_seconds:g} s"
            )
        return found[0]


def _gone(error: Exception) -> ConnectionError:
    return ConnectionError(f"the coordination service, which is in process 0, failed: {error}")
