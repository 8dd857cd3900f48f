"""Several processes: how they agree on the outcome of a save.

A *meeting* is one thing that all processes do together, a save for example. Each process opens
it, does its part, and *reports*. Process 0 waits for all reports, acts on them (merges, commits),
and announces the *outcome*, for which all others wait. There are only these two waits, and one
more if a save may be skipped: then the others first wait until process 0 says whether it is.
Processes talk through keys and values of the coordination service that `jax.distributed` starts.
No device takes part, so that a meeting may be held on any thread while the devices compute.

Meetings are numbered in the order in which the program opens them. This order has to be the same
on all processes. The keys of meeting n, below "ckpt_jax/n/":

    reports/k/said  the report of process k, as JSON; process 0 only says that it is there
    led             an answer that process 0 gives to all before the reports, if a save asks for it
    decision        "commit", from process 0 when all have reported, or an error, from a process
                    that failed before that. The first one stays: the service refuses a second.
    outcome         the result of the act of process 0, or an error, or the question what some of
                    the processes do
    failed/why      the error, for those who come when the meeting has failed already
    details/k       the answer of process k to that question
    verdict         the error that follows from the answers
    here/k/at       the moment that process k saves; only after the processes were apart

A process that fails before the decision makes its error the decision and the outcome, so that the
others fail at once with it. Every wait has a deadline. If it passes without an outcome, the
waiting process also makes an error the decision, which names the processes that have not reported.
In one case it does not know how the save ended: process 0 had decided to commit, and nothing is
heard from it any more. Only the outcome tells of success, and it is written after the commit. A
process in doubt may keep the meeting open and look for the outcome later, so that it can go on
from the same number as the others.

Each report has the digest of what its process does: the *mark* (`processes.moment`). If the digests
differ, the processes are *apart*: one of them has skipped a save, for example. Then the meeting
fails on all of them, and they come together again by two rules:

* If a process comes to a meeting that has failed already, and its mark is another than that of the
  process that has failed, it has skipped the call of that meeting. It goes on to the next meeting.
* If a process comes with a mark with which another one was in a failed meeting, and with which it
  was not there itself, it is behind. Its call fails in this process alone and takes no part in the
  meeting, unless the other process is there with the same mark, because it tries again.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any

from ckpt_jax.errors import BarrierTimeoutError, CheckpointError, ProcessError
from ckpt_jax.processes.board import ROOT, Board
from ckpt_jax.processes.moment import (
    Deed,
    Mark,
    Moment,
    difference,
    numbers_in,
    packed,
    ranges,
    unpacked,
)
from ckpt_jax.processes.patience import Patience
from ckpt_jax.processes.roll_call import RollCalls
from ckpt_jax.processes.service import Service
from ckpt_jax.store.staging import owner_digits

COMMIT = "commit"
_RUN = f"{ROOT}/run"
_MOST_GROUPS = 8  # of processes that do different things, which are asked what they do
_POLL_SECONDS = (0.001, 0.05)  # between two looks at a report: at first, and at most
_SWEEP_SECONDS = 5.0  # for the service to remove the keys of a meeting
_MAX_MESSAGE = 4000
_OWNER_DIGITS = 24


@dataclass(eq=False)
class Processes:
    """The processes of a program, as one of them sees them.

    Attributes:
      index: of this process.
      count: of all.
      service: through which they talk to each other; None if there is one process.
      roll_calls: that process 0 holds; None if no process is asked for a sign of life.
      clock: returns seconds, by which waits are measured.
    """

    index: int = 0
    count: int = 1
    service: Service | None = None
    roll_calls: RollCalls | None = field(default=None, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _next: int = 0
    _open: set[int] = field(default_factory=set, repr=False)
    _swept: int = 0
    _nonce: str = ""
    _agreements: int = 0
    # The digests with which processes were in meetings at which they were apart, since they last
    # succeeded together.
    _apart: dict[int, set[str]] = field(default_factory=dict, repr=False)
    _afterwards: threading.local = field(default_factory=threading.local, repr=False)

    def patience(self, seconds: float) -> Patience:
        """Patience for several waits, which share these seconds."""
        return Patience(seconds, self.clock)

    def meeting(self, what: str, patience: float | Patience) -> Meeting:
        """Opens the next meeting. To be called in the program's order, outside of any `try`.

        Args:
          what: names it in errors: "saving runs/a/ckpt-3".
          patience: for other processes, for all waits together: seconds, or what is left of them.

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
        if not isinstance(patience, Patience):
            patience = self.patience(patience)
        return Meeting(self, number, what, patience)

    def next_agreement(self) -> int:
        """A number for an agreement outside of meetings, in the program's order."""
        with self._lock:
            self._agreements += 1
            return self._agreements

    def _close(self, number: int) -> None:
        with self._lock:
            self._open.discard(number)

    def _next_instead(self, number: int) -> int | None:
        """The number of the next meeting, in place of one that has just been opened. None if
        another one has been opened since."""
        with self._lock:
            if self._next != number + 1:
                return None
            self._open.discard(number)
            self._next += 1
            self._open.add(number + 1)
            return number + 1

    def _give_back(self, number: int) -> bool:
        """Takes back that a meeting was opened. Returns False if another one has been opened
        since."""
        with self._lock:
            if self._next != number + 1:
                return False
            self._open.discard(number)
            self._next = number
            return True

    def _oldest_open(self) -> int:
        with self._lock:
            return min(self._open, default=self._next)

    def _sweep(self, oldest_open: int) -> None:
        """Removes the keys of meetings that no process has open."""
        assert self.service is not None
        for number in range(self._swept, oldest_open):
            self.service.delete(f"{ROOT}/{number}/", _SWEEP_SECONDS)
            self._swept = number + 1

    def _run_name(self, board: Board) -> str:
        """A name for this run of the program, which the others learn from process 0 on first use.

        It consists of the name of process 0 as an owner of staging directories, and random digits.
        """
        if self.service is None:  # a new name each time: this process may have been forked
            return f"{owner_digits()}{secrets.token_hex(16)}"
        if not self._nonce:
            name = f"{owner_digits()}{secrets.token_hex(16)}"
            is_new = self.index == 0 and board.set_key(_RUN, name)
            self._nonce = name if is_new else board.wait_for_key(_RUN) or ""
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
      count_of_0: the save counter of process 0, if the meeting has failed because the processes
        were apart; else None.
      has_failed_late: whether process 0 has failed after it had decided to act, so that it alone
        knows what has come of that.
    """

    def __init__(self, processes: Processes, number: int, what: str, patience: Patience):
        self.index = processes.index
        self.count = processes.count
        self.what = what
        self.count_of_0: int | None = None
        self.has_failed_late = False
        self._processes = processes
        self._number = number
        self._board = Board(processes.service, number, what, self.count, patience)
        self._state = State.SETTLED if processes.count == 1 else State.OPEN
        self._is_kept = False  # to be asked for the outcome later
        self._mark: Mark = Deed(what.partition(" ")[0])
        self._digest: str | None = None  # of the mark, once it has been worked out
        self._has_begun = False

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
        self.begin()
        run = self._processes._run_name(self._board)
        if not run:
            raise self._board.late([0])
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
            self._board.set("led", json.dumps({"result": value}))
            return value
        said = self._board.wait_for("led")
        if said is None:
            raise self._board.late([0])
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

    def done_after_all(self, patience: Patience) -> bool | None:
        """Whether process 0 has acted after all, if the meeting stayed open in doubt.

        Args:
          patience: for the answer.

        Returns:
          None if this does not become known in time.
        """
        if not self.is_in_doubt:
            return False
        self._board.patience = patience
        try:
            found = self._board.wait_for("outcome")
        except CheckpointError:
            return None
        if found is None:
            return None
        self._state = State.SETTLED
        self._processes._close(self._number)
        return "result" in json.loads(found)

    # --- the mark ------------------------------------------------------------------------

    def begin(self, mark: Mark | None = None) -> None:
        """Takes part, with the mark of this process. A save does this before it stages anything.

        Args:
          mark: of this process; by default the first word of `what`.

        Raises:
          ProcessError: this process is behind another one; see the module.
        """
        if self.count == 1 or self._has_begun:
            return
        self._has_begun = True
        self._mark = mark or self._mark
        if self.leads:  # the others may be waiting for it
            self._processes._run_name(self._board)
        while self._is_skipped() and self._goes_on():
            pass
        if self._processes._apart:
            self._catch_up()

    def _is_skipped(self) -> bool:
        """Whether the meeting has failed already, and was for another call than this one."""
        why = self._board.value("failed/why")
        if why is None:
            return False
        digest = json.loads(why)["error"]["digest"]
        return digest is not None and digest != self._own_digest()

    def _goes_on(self) -> bool:
        """Takes part in the next meeting instead. Returns False if that is not possible."""
        number = self._processes._next_instead(self._number)
        if number is None:
            return False
        self._number = self._board.number = number
        return True

    def _catch_up(self) -> None:
        """Fails in this process alone, if it is behind another one."""
        own, apart = self._own_digest(), self._processes._apart
        before = apart.get(self.index)
        if before and own not in before:
            ahead = [k for k, digests in apart.items() if own in digests]
            is_alone = bool(ahead) and all(self._digest_here(k) != own for k in ahead)
            if is_alone and self._processes._give_back(self._number):
                self._state = State.SETTLED
                raise ProcessError(
                    f"{self.what}: process {ahead[0]} has tried this save before. It failed, "
                    "because this process was at an earlier one. Nothing was saved; the processes "
                    "meet again at a later save.",
                    (self.index,),
                )
        self._board.set(f"here/{self.index}/at", own)

    def _digest_here(self, process: int) -> str | None:
        """The digest with which a process has come to this meeting; None if it has not come yet."""
        return self._board.value(f"here/{process}/at")

    def _own_digest(self) -> str:
        if self._digest is None:
            self._digest = self._mark.digest
        return self._digest

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
        self.begin()
        own_digest = self._own_digest()
        self._board.set("reports/0/said", "")
        others = [json.loads(text) for text in self._reports()]
        digests = [own_digest, *(other["digest"] for other in others)]
        if len({*digests}) > 1:
            raise self._are_apart(digests)
        if not self._board.set("decision", COMMIT):
            raise self._heard(self._board.values()["decision"])
        self._state = State.DECIDED
        oldest = min([self._processes._oldest_open(), *(other["open"] for other in others)])
        with contextlib.suppress(TimeoutError, ConnectionError):  # the next meeting removes them
            self._processes._sweep(oldest)
        return [own, *(other["report"] for other in others)]

    def _reports(self) -> list[str]:
        """Waits for the reports of the others, in their order. One is looked for at a time, so that
        the service does not send the others again and again."""
        calls = self._processes.roll_calls
        pause, longest = _POLL_SECONDS
        lost_among = calls and calls.during_a_wait(isinstance(self._mark, Moment))
        with self._board.patience.waiting() as left:
            found = self._board.values("reports/")
            for process in range(1, self.count):
                name = f"{process}/said"
                while name not in found:
                    # The last look comes when no patience is left.
                    is_last = left() <= 0
                    found |= self._look(process, is_last)
                    if name in found:
                        break
                    missing = [k for k in range(1, self.count) if f"{k}/said" not in found]
                    if is_last:
                        raise self._board.late(missing)
                    with self._board.answered():
                        lost = lost_among(missing) if lost_among else []
                    if lost:
                        raise self._board.lost(lost)
                    time.sleep(pause)
                    pause = min(2 * pause, longest)
        if calls:
            calls.known |= {*range(1, self.count)}
        return [found[f"{process}/said"] for process in range(1, self.count)]

    def _look(self, process: int, at_all: bool) -> dict[str, str]:
        """Looks for the report of a process, or for all."""
        if (why := self._board.value("failed/why")) is not None:
            raise self._heard(why)
        if at_all:
            return self._board.values("reports/")
        said = self._board.value(f"reports/{process}/said")
        return {} if said is None else {f"{process}/said": said}

    def announce(self, result: Any) -> None:
        """Tells the others the outcome, a value that JSON allows; for process 0 only."""
        if self.count > 1:
            self._board.set("outcome", json.dumps({"result": result}))
            self._has_succeeded()

    def _are_apart(self, digests: Sequence[str]) -> CheckpointError:
        """Asks one process of each kind what it does. Tells all of the error that follows from the
        answers, and returns it."""
        groups: dict[str, list[int]] = {}
        for process, digest in enumerate(digests):
            groups.setdefault(digest, []).append(process)
        asked = [processes[0] for processes in [*groups.values()][1:_MOST_GROUPS]]
        self._board.set("outcome", json.dumps({"asked": asked}))
        own = self._mark.explained()
        explained = [own]
        for process in asked:
            answer = self._board.wait_for(f"details/{process}")
            if answer is None:
                raise self._board.late([process])
            explained.append(unpacked(answer))
        known = [*zip(groups, explained, strict=False)]
        error = {
            "message": difference([(groups[digest], each) for digest, each in known]),
            "is_timeout": False,
            "processes": [k for k, digest in enumerate(digests) if digest != digests[0]],
            "digest": None,
            "apart": {digest: ranges(groups[digest]) for digest, each in known if "call" in each},
            "count": own.get("count"),
        }
        text = json.dumps({"error": error})
        self._board.set("decision", text)
        self._board.set("failed/why", text)
        self._board.set("verdict", text)
        return self._heard(text)

    # --- the other processes -------------------------------------------------------------

    def report(self, report: Any) -> Any:
        """Reports, and waits for the outcome; for all processes but process 0.

        Returns:
          The value that process 0 announced.

        Raises:
          BarrierTimeoutError: naming the processes that did not report in time.
          ProcessError: another process failed, or does something else.
        """
        self.begin()
        oldest = self._processes._oldest_open()
        said = {"digest": self._own_digest(), "open": oldest, "report": report}
        self._state = State.REPORTED
        self._board.set(f"reports/{self.index}/said", json.dumps(said))
        outcome = self._board.wait_for("outcome")
        if outcome is None:
            found = self._board.values()
            if "decision" in found and found["decision"] != COMMIT:
                raise self._heard(found["decision"])
            late = [k for k in range(self.count) if f"reports/{k}/said" not in found]
            raise self._board.late(late or [0], unknown="decision" in found)
        if (asked := json.loads(outcome).get("asked")) is not None:
            raise self._verdict(asked)
        result = self._result(outcome)
        self._has_succeeded()
        return result

    def _verdict(self, asked: Sequence[int]) -> CheckpointError:
        """The error of a meeting at which the processes were apart."""
        self._state = State.SETTLED
        if self.index in asked:
            self._board.set(f"details/{self.index}", packed(self._mark.explained()))
        verdict = self._board.wait_for("verdict")
        return self._board.late([0]) if verdict is None else self._heard(verdict)

    def _result(self, said: str) -> Any:
        content = json.loads(said)
        if "error" in content:
            raise self._heard(said)
        return content["result"]

    def _has_succeeded(self) -> None:
        self._state = State.SETTLED
        self._processes._apart.clear()

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
        said = described(error, self.index, self.what)
        said |= {"digest": self._digest, "is_late": has_decided}
        text = json.dumps({"error": said})
        try:
            if self.leads:  # the others may be waiting for one of these
                self._processes._run_name(self._board)
                self._board.set("led", text)
            if not has_decided and not self._board.set("decision", text):
                decision = self._board.values()["decision"]
                if decision != COMMIT:
                    return self._heard(decision)
                if not self.leads:
                    # Process 0 decides this only with the report of this process. So this process
                    # has reported, and then its wait for the outcome failed.
                    return None
            self._state = State.SETTLED
            self._board.set("outcome", text)
            self._board.set("failed/why", text)
        except CheckpointError as unheard:
            error.add_note(f"The other processes could not be told: {unheard}")
        return None

    def _heard(self, text: str) -> CheckpointError:
        """The error that another process has told of."""
        self._state = State.SETTLED
        said = json.loads(text)["error"]
        processes = tuple(said["processes"])
        for digest, apart in said.get("apart", {}).items():
            for process in numbers_in(apart):
                self._processes._apart.setdefault(process, set()).add(digest)
        self.count_of_0 = said.get("count")
        self.has_failed_late = said.get("is_late", False)
        message = f"{self.what}: {said['message']}"
        if said["is_timeout"]:
            return BarrierTimeoutError(message, processes)
        return ProcessError(message, processes)


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
