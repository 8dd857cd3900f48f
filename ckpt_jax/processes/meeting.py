"""Several processes: how they agree on the outcome of a save.

A *meeting* is one thing that all processes do together, a save for example. Each process opens
it, does its part, and *reports*. Process 0 waits for all reports, acts on them (merges, commits),
and announces the *outcome*, for which all others wait. There are only these two waits, and one
more if a save may be skipped: then the others first wait until process 0 says whether it is.
Processes talk through keys and values of the coordination service that `jax.distributed` starts.
No device takes part, so that a meeting may be held on any thread while the devices compute.

Meetings are numbered in the order in which the program opens them. This order has to be the same
on all processes. The keys of meeting n, below "ckpt_jax/n/":

    reports/k   the report of process k, as JSON; process 0 only says that it is there
    led         an answer that process 0 gives to all before the reports, if a save asks for it
    decision    "commit", from process 0 when all have reported, or an error, from a process that
                failed before that. The first one stays: the service refuses a second.
    outcome     the result of the act of process 0, or an error

A process that fails before the decision makes its error the decision and the outcome, so that the
others fail at once with it. Every wait has a deadline. If it passes without an outcome, the
waiting process also makes an error the decision, which names the processes that have not reported.
In one case it does not know how the save ended: process 0 had decided to commit, and nothing is
heard from it any more. Only the outcome tells of success, and it is written after the commit. A
process in doubt may keep the meeting open and look for the outcome later, so that it can go on
from the same number as the others.

Each report says which meetings the process still has open. Process 0 removes the keys of all older
meetings, so that the service holds the keys of only a few meetings at any time.

The functions that do the work of a save are given a `Meeting`. If there is only one process, it
waits for nobody, and calls the act right away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any

from ckpt_jax.errors import BarrierTimeoutError, CheckpointError, ProcessError
from ckpt_jax.processes.service import Service
from ckpt_jax.store.staging import owner_digits

COMMIT = "commit"
_ROOT = "ckpt_jax"
_POLL_SECONDS = (0.001, 0.05)  # between two looks at the reports: at first, and at most
_PATIENCE_SECONDS = 5.0  # for answers of the service, beyond the wait for other processes
_LONGEST_SECONDS = 1e9  # no wait is longer: every clock accepts this
_MAX_MESSAGE = 4000
_OWNER_DIGITS = 24


@dataclass(eq=False)
class Processes:
    """The processes of a program, as one of them sees them.

    Attributes:
      index: of this process.
      count: of all.
      service: through which they talk to each other; None if there is one process.
    """

    index: int = 0
    count: int = 1
    service: Service | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _next: int = 0
    _open: set[int] = field(default_factory=set, repr=False)
    _swept: int = 0
    _nonce: str = ""
    _agreements: int = 0
    _afterwards: threading.local = field(default_factory=threading.local, repr=False)

    def meeting(self, what: str, timeout_seconds: float) -> Meeting:
        """Opens the next meeting. To be called in the program's order, outside of any `try`.

        Args:
          what: names it in errors: "saving runs/a/ckpt-3".
          timeout_seconds: the longest wait for other processes.

        Raises:
          RuntimeError: another meeting is at its end, and the others may not know this yet.
        """
        ending = getattr(self._afterwards, "what", None)
        if ending is not None:
            raise RuntimeError(
                f"{what} cannot begin at the end of {ending}, before all processes know of it: "
                "if there are several processes, a write callback must not save or collect"
            )
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._open.add(number)
        return Meeting(self, number, what, min(timeout_seconds, _LONGEST_SECONDS))

    def next_agreement(self) -> int:
        """A number for an agreement outside of meetings, in the program's order."""
        with self._lock:
            self._agreements += 1
            return self._agreements

    def _close(self, number: int) -> None:
        with self._lock:
            self._open.discard(number)

    def _oldest_open(self) -> int:
        with self._lock:
            return min(self._open, default=self._next)

    def _sweep(self, oldest_open: int) -> None:
        """Removes the keys of meetings that no process has open."""
        assert self.service is not None
        for number in range(self._swept, oldest_open):
            self.service.delete(f"{_ROOT}/{number}/", _PATIENCE_SECONDS)
            self._swept = number + 1

    def _run_name(self, timeout_seconds: float) -> str:
        """A name for this run of the program, which the others learn from process 0 on first use.

        It consists of the name of process 0 as an owner of staging directories, and random digits.
        """
        if self.service is None:  # a new name each time: this process may have been forked
            return f"{owner_digits()}{secrets.token_hex(16)}"
        if not self._nonce:
            key = f"{_ROOT}/run"
            if self.index == 0:
                name = f"{owner_digits()}{secrets.token_hex(16)}"
                if not self.service.set(key, name, timeout_seconds):
                    name = self.service.get(key, timeout_seconds) or name
            else:
                name = self.service.get(key, timeout_seconds) or ""
            self._nonce = name
        return self._nonce


class State(Enum):
    """The state of a meeting, as one of its processes sees it."""

    OPEN = "this process has not reported yet; its error becomes the outcome"
    REPORTED = "this process has reported, and does not know the outcome yet"
    DECIDED = "all have reported, and process 0 has decided to act"
    SETTLED = "the outcome is known, or is this process's own error"
    DOUBTFUL = "this process has reported and has left without knowing the outcome"


class Meeting:
    """One thing that all processes do together; see the module.

    It is a context manager. If an exception leaves its block before the outcome is known, the other
    processes hear of it. The block may be left twice.

    Attributes:
      index, count: of the processes.
      what: names it in errors.
    """

    def __init__(self, processes: Processes, number: int, what: str, timeout_seconds: float):
        self.index = processes.index
        self.count = processes.count
        self.what = what
        self._processes = processes
        self._number = number
        self._timeout = timeout_seconds
        self._state = State.SETTLED if processes.count == 1 else State.OPEN
        self._is_kept = False  # to be asked for the outcome later

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which acts for all."""
        return self.index == 0

    @property
    def is_in_doubt(self) -> bool:
        """Whether this process has reported, and does not know the outcome."""
        return self._state in (State.REPORTED, State.DOUBTFUL)

    def keep(self) -> None:
        """Keeps the meeting open if its block is left in doubt, for `done_after_all`."""
        self._is_kept = True

    @property
    def token(self) -> str:
        """32 hex digits, the same on all processes, for names of files that process 0 owns."""
        run = self._run_name(self._timeout)
        if not run:
            raise self._late([0])
        digest = hashlib.sha256(f"{run}/{self._number}".encode()).hexdigest()
        return run[:_OWNER_DIGITS] + digest[: 32 - _OWNER_DIGITS]

    def led(self, value: Any) -> Any:
        """Gives the value of process 0 to all processes. To be called at most once.

        Args:
          value: of this process, as JSON allows it.

        Returns:
          The value of process 0.

        Raises:
          BarrierTimeoutError: process 0 did not come here in time.
          ProcessError: process 0 failed before.
        """
        if self.count == 1:
            return value
        if self.leads:
            self._tell("led", json.dumps({"result": value}))
            return value
        said = self._wait_for("led")
        if said is None:
            raise self._late([0])
        return self._result(said)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Forbids this thread to open another meeting while the block runs.

        The block is for the acts of each process at the end of the meeting. Process 0 performs
        them before the others hear the outcome.
        """
        here = self._processes._afterwards
        here.what = self.what if self.count > 1 else None
        try:
            yield
        finally:
            here.what = None

    def conclude(self, report: Any, act: Callable[[list[Any]], Any]) -> Any:
        """Reports, and waits for the outcome.

        Args:
          report: of this process, as JSON allows it.
          act: called on process 0 with the reports of all processes, in their order. Returns a
            value that JSON allows.

        Returns:
          The value that `act` returned, on all processes.

        Raises:
          BarrierTimeoutError: naming the processes that did not report in time.
          ProcessError: another process failed, or does something else.
        """
        if not self.leads:
            return self.report(report)
        result = act(self.gather(report))
        self.announce(result)
        return result

    def done_after_all(self, timeout_seconds: float) -> bool | None:
        """Whether process 0 has acted after all, if the meeting stayed open in doubt.

        Returns:
          None if this does not become known in time.
        """
        if not self.is_in_doubt:
            return False
        try:
            found = self._service.get(self._key("outcome"), min(timeout_seconds, _LONGEST_SECONDS))
        except (TimeoutError, ConnectionError):
            return None
        if found is None:
            return None
        self._state = State.SETTLED
        self._processes._close(self._number)
        return "result" in json.loads(found)

    # --- process 0 -----------------------------------------------------------------------

    def gather(self, own: Any) -> list[Any]:
        """Waits for the reports of all processes; for process 0 only.

        From here on, the others wait for `announce`.

        Args:
          own: the report of process 0.

        Returns:
          The reports of all processes, in their order.

        Raises:
          BarrierTimeoutError: naming the processes that did not report in time.
          ProcessError: another process failed, or does something else.
        """
        if self.count == 1:
            return [own]
        self._tell("reports/0", "")
        deadline = time.monotonic() + self._timeout
        pause, longest = _POLL_SECONDS
        while True:
            # The last look comes at the deadline. The service needs time to answer it.
            found = self._list(max(deadline - time.monotonic(), _PATIENCE_SECONDS))
            if "decision" in found:
                raise self._heard(found["decision"])
            missing = [k for k in range(1, self.count) if f"reports/{k}" not in found]
            if not missing:
                break
            if time.monotonic() >= deadline:
                raise self._late(missing)
            time.sleep(pause)
            pause = min(2 * pause, longest)
        others = [json.loads(found[f"reports/{k}"]) for k in range(1, self.count)]
        self._check_same([{"what": self._kind()}, *others])
        if not self._tell("decision", COMMIT):
            raise self._heard(self._list(self._timeout)["decision"])
        self._state = State.DECIDED
        oldest = min([self._processes._oldest_open(), *(other["open"] for other in others)])
        with contextlib.suppress(TimeoutError, ConnectionError):  # the next meeting removes them
            self._processes._sweep(oldest)
        return [own, *(other["report"] for other in others)]

    def announce(self, result: Any) -> None:
        """Tells the others the outcome, a value that JSON allows; for process 0 only."""
        if self.count > 1:
            self._tell("outcome", json.dumps({"result": result}))
            self._state = State.SETTLED

    def _check_same(self, reports: list[dict[str, Any]]) -> None:
        others = tuple(k for k, r in enumerate(reports) if r["what"] != reports[0]["what"])
        if others:
            lines = "\n".join(f"  process {k}: {r['what']}" for k, r in enumerate(reports))
            raise ProcessError(
                f"{self.what}: the processes do different things at this point:\n{lines}\n"
                "All of them have to save and restore the same, in the same order.",
                others,
            )

    # --- the other processes -------------------------------------------------------------

    def report(self, report: Any) -> Any:
        """Reports, and waits for the outcome; for all processes but process 0.

        Returns:
          The value that process 0 announced.

        Raises:
          BarrierTimeoutError: naming the processes that did not report in time.
          ProcessError: another process failed, or does something else.
        """
        oldest = self._processes._oldest_open()
        said = {"what": self._kind(), "open": oldest, "report": report}
        self._state = State.REPORTED
        self._tell(f"reports/{self.index}", json.dumps(said))
        outcome = self._wait_for("outcome")
        if outcome is None:
            found = self._list(_PATIENCE_SECONDS)
            if "decision" in found and found["decision"] != COMMIT:
                raise self._heard(found["decision"])
            late = [k for k in range(self.count) if f"reports/{k}" not in found]
            raise self._late(late or [0], unknown="decision" in found)
        result = self._result(outcome)
        self._state = State.SETTLED
        return result

    def _result(self, said: str) -> Any:
        content = json.loads(said)
        if "error" in content:
            raise self._heard(said)
        return content["result"]

    # --- failing -------------------------------------------------------------------------

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.tell(kind, error, traceback)
        finally:
            if not (self.is_in_doubt and self._is_kept):
                self._processes._close(self._number)

    def tell(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Tells the other processes of an exception, unless they have heard of one already.

        The end of the block does so, too.

        Raises:
          ProcessError, BarrierTimeoutError: another process had failed before, and the error here
            is about files, which were removed because of that.
        """
        if error is None or self._state in (State.SETTLED, State.DOUBTFUL):
            return
        before = self._state
        self._state = State.DOUBTFUL if before is State.REPORTED else State.SETTLED
        heard = self._announce(error, has_decided=before is State.DECIDED)
        if heard is None:
            return
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise heard from error
        error.add_note(f"Another process had failed before: {heard}")

    def _announce(self, error: BaseException, *, has_decided: bool) -> CheckpointError | None:
        """Tells the others of an error; returns the error of a process that failed before."""
        text = json.dumps({"error": described(error, self.index, self.what)})
        patience = min(self._timeout, _PATIENCE_SECONDS)
        try:
            if self.leads:  # the others may be waiting for one of these
                self._run_name(patience)
                self._tell("led", text, patience)
            if not has_decided and not self._tell("decision", text, patience):
                decision = self._list(patience)["decision"]
                if decision != COMMIT:
                    return self._heard(decision)
                if not self.leads:
                    # Process 0 decides this only with the report of this process. So this process
                    # has reported, and then its wait for the outcome failed.
                    return None
            self._state = State.SETTLED
            self._tell("outcome", text, patience)
        except CheckpointError as unheard:
            error.add_note(f"The other processes could not be told: {unheard}")
        return None

    def _heard(self, text: str) -> CheckpointError:
        self._state = State.SETTLED
        said = json.loads(text)["error"]
        processes = tuple(said["processes"])
        message = f"{self.what}: {said['message']}"
        if said["is_timeout"]:
            return BarrierTimeoutError(message, processes)
        return ProcessError(message, processes)

    def _late(self, processes: list[int], *, unknown: bool = False) -> BarrierTimeoutError:
        names = ", ".join(map(str, processes))
        noun = "process" if len(processes) == 1 else "processes"
        message = f"{noun} {names} of {self.count} did not arrive within {self._timeout:g} s"
        if unknown:
            message += ". All had written their shards; "
            message += "it is not known whether the checkpoint was committed"
        return BarrierTimeoutError(f"{self.what}: {message}", tuple(processes))

    def _unanswered(self, error: OSError) -> CheckpointError:
        if isinstance(error, TimeoutError):
            return BarrierTimeoutError(f"{self.what}: process 0 is late: {error}", (0,))
        return ProcessError(f"{self.what}: {error}", (0,))

    # --- keys ----------------------------------------------------------------------------

    @property
    def _service(self) -> Service:
        service = self._processes.service
        assert service is not None
        return service

    def _kind(self) -> str:
        return self.what.partition(" ")[0]

    def _key(self, name: str) -> str:
        return f"{_ROOT}/{self._number}/{name}"

    def _run_name(self, timeout_seconds: float) -> str:
        try:
            return self._processes._run_name(timeout_seconds)
        except (TimeoutError, ConnectionError) as error:
            raise self._unanswered(error) from error

    def _tell(self, name: str, value: str, timeout_seconds: float | None = None) -> bool:
        try:
            return self._service.set(self._key(name), value, timeout_seconds or self._timeout)
        except (TimeoutError, ConnectionError) as error:
            raise self._unanswered(error) from error

    def _wait_for(self, name: str) -> str | None:
        try:
            return self._service.get(self._key(name), self._timeout)
        except (TimeoutError, ConnectionError) as error:
            raise self._unanswered(error) from error

    def _list(self, timeout_seconds: float) -> dict[str, str]:
        prefix = self._key("")
        try:
            found = self._service.list(prefix, timeout_seconds)
        except (TimeoutError, ConnectionError) as error:
            raise self._unanswered(error) from error
        return {key.removeprefix(prefix): value for key, value in found.items()}


def described(error: BaseException, index: int, what: str) -> dict[str, Any]:
    """An error, as a process tells the others of it: JSON's kinds of values."""
    text = str(error).removeprefix(f"{what}: ")[:_MAX_MESSAGE]
    processes = (index,)
    if isinstance(error, ProcessError):
        message, processes = text, error.processes
    elif isinstance(error, BarrierTimeoutError):
        message, processes = f"process {index} gave up: {text}", error.processes
    else:
        message = f"process {index} failed with {type(error).__name__}: {text}"
    is_timeout = isinstance(error, BarrierTimeoutError)
    return {"message": message, "is_timeout": is_timeout, "processes": processes}
