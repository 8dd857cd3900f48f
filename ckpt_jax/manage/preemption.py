"""Preemption: a last save when the machine is about to be taken away.

The notice is a signal, SIGTERM by default. The save happens at a *step boundary*, when no object is
half updated. The training loop says when it is at one. The boundary is chosen like this:

* A single process saves at the first boundary after the signal. If none comes before the grace
  period is over, or if a second signal says that there is less time than expected, a thread
  saves at once, even in the middle of a step: such a checkpoint may hold parameters of one step
  and optimizer state of another, and the save may fail because the step has donated its arrays.
  This is for programs with steps that are longer than the notice. If a boundary still comes, it
  saves again.
* If there are several processes, `processes.common_step` finds a boundary to which all of them
  come: it counts how often `reached` is called. They never save in the middle of a step, because
  they have to save together.

Python runs signal handlers on the main thread, between two of its instructions. While that thread
waits for a device, or does not give up the GIL, this may be long after the signal. Another thread,
the *watcher*, is therefore told through the interpreter's wakeup file, to which the signal itself
writes.

If JAX's preemption service is on, JAX has a handler of its own for SIGTERM, which stays. The notice
is then a key of the coordination service, whichever process had the signal, and process 0 looks for
it. JAX's own way of agreeing on a step is not used. It compares numbers of steps, which must have
no gaps, and it holds all processes for as long as its heartbeats allow if one of them has died.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import FrameType

import jax

from ckpt_jax.errors import AsyncSaveError
from ckpt_jax.manage.manager import (
    CheckpointManager,
    has_saved_step,
    hear_notices,
    make_due,
    require_writable,
    save_step,
)
from ckpt_jax.manage.ranges import require_kind, require_real
from ckpt_jax.processes.common_step import CommonStep
from ckpt_jax.processes.current import current
from ckpt_jax.processes.service import CoordinationService
from ckpt_jax.processes.threads import LONGEST_CALL_SECONDS, ServiceThread
from ckpt_jax.values.jax_internals import PREEMPTION_NOTICE, service_client

Save = Callable[[int | None], str | None]
Agree = Callable[[int, bool], bool]

_log = logging.getLogger("ckpt_jax")


class PreemptionHandler:
    """Saves when the program is told to end, at a step boundary if there is time for one.

    Use it as a context manager around the training loop, on the main thread. A signal then
    does not end the program by itself; the loop ends when `reached` says so.

    Args:
      manager: saves the checkpoint. Its `checkpoint_interval` is ignored.
      grace_seconds: how long to wait for a step boundary after the first signal before the
        objects are saved as they are. The real notice has to be longer, by the time that a save
        takes. None waits for a boundary however long it takes. It has no effect if processes
        agree on a step.
      signals: the signals that announce the end.
      save: a function that saves. It is given the step that was reached last, and returns the
        path, or None if it has saved nothing; then the next step boundary tries again. By
        default it is `manager.save(check_interval=False)`, which numbers by the save counter;
        `lambda step: manager.save(step)` numbers by step. If the manager has policies that say
        when to save, and no step counter, the default numbers by step as well.
      agree: a function that decides whether to save at a step, given the step and whether this
        process has had a signal. It is called at every step until it returns true, and has to
        return the same in all processes. By default, a single process decides alone, and several
        processes save at the first call of `reached` to which all of them come.

    Raises:
      ValueError: `grace_seconds` is negative; or, on entering, this is not the main thread.
      CheckpointError: the manager is read-only.

    Source: `tf.distribute.experimental.PreemptionCheckpointHandler`, which wraps the step.

    Example:
      >>> import os, tempfile
      >>> from ckpt_jax.api.checkpoint import Checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     manager = CheckpointManager(Checkpoint(step=0), directory)
      ...     with PreemptionHandler(manager) as handler:
      ...         for step in range(1000):
      ...             if step == 3:
      ...                 os.kill(os.getpid(), signal.SIGTERM)  # what a scheduler does
      ...             if handler.reached(step):
      ...                 break
      ...     step, os.path.basename(handler.saved)
      (3, 'ckpt-1')
    """

    def __init__(
        self,
        manager: CheckpointManager,
        grace_seconds: float | None = None,
        signals: Iterable[signal.Signals] = (signal.SIGTERM,),
        save: Save | None = None,
        agree: Agree | None = None,
    ):
        if grace_seconds is not None:
            require_real(grace_seconds=grace_seconds)
        if save is None:
            require_kind(CheckpointManager, "a CheckpointManager", manager=manager)
            require_writable(manager, "save")
        self._manager = manager
        self._grace_seconds = grace_seconds
        self._signals = tuple(signals)
        self._save = save or partial(save_step, manager)
        self._given_agree = agree
        self._agree: Agree = agree or _alone
        self._pass_on: Callable[[], None] = lambda: None  # the notice, to the other processes
        self._noticed = False
        self._step: int | None = None
        self._saved: str | None = None
        self._is_agreed = False
        self._is_done = False
        self._saving = threading.Lock()  # held by the thread that saves
        self._undo = ExitStack()

    @property
    def noticed(self) -> bool:
        """Whether this process has had a signal, or the processes have agreed to save."""
        return self._noticed

    @property
    def saved(self) -> str | None:
        """The path of the checkpoint that was saved because of a signal; None if there is none.

        It is committed, even if it was saved in the background.
        """
        return self._saved

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "enter a PreemptionHandler on the main thread, where Python handles signals"
            )
        with ExitStack() as undo:
            self._install(undo)
            self._undo = undo.pop_all()
        return self

    def _install(self, undo: ExitStack) -> None:
        """Installs the handlers of signals and the watcher; `undo` removes them."""
        undo.callback(hear_notices(self._manager, lambda: self._noticed))
        of_jax = {signal.SIGTERM} if self._given_agree is None and _has_jaxs_handler() else set()
        common = None
        if self._given_agree is None and (processes := current()).count > 1:
            common = CommonStep(processes)
            undo.callback(common.close)
            self._agree, self._pass_on = lambda step, noticed: common.is_passed(), common.ask
        is_alone = self._given_agree is None and common is None
        watcher = _Watcher(
            self._signals,
            self._grace_seconds if is_alone else None,
            self._announce,
            self._save_at_once if is_alone else None,
        )
        watcher.start(undo)
        for number in self._signals:
            if number not in of_jax:
                previous = signal.signal(number, self._notice)
                # A handler that no Python code installed cannot be put back.
                undo.callback(signal.signal, number, previous or signal.SIG_DFL)
        if of_jax & {*self._signals} and current().index == 0:
            undo.callback(_when_jax_has_notice(lambda: watcher.came(signal.SIGTERM)).close)

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        if self._noticed and self._saved is None:
            _log.warning(
                "a preemption notice came, but the loop ended before a save at a step boundary "
                "succeeded: nothing was saved"
            )

    def reached(self, step: int) -> bool:
        """Says that a step is over; saves here if it is time.

        Args:
          step: its number. All processes have to call this equally often, with the same numbers.

        Returns:
          Whether a checkpoint has been saved because of a signal: the loop should end.

        Raises:
          BarrierTimeoutError: there was a signal, but a process has died or is stopped, so that the
            processes cannot save together.
          Any error of this save. An error of an earlier save in the background is only logged.
        """
        self._step = step
        if not self._is_done and (self._is_agreed or self._agree(step, self._noticed)):
            # After a failed save, all processes try again.
            self._noticed = self._is_agreed = True
            with self._saving:
                before, self._saved = self._saved, None
                try:
                    self._save_now(step)
                finally:
                    self._is_done = self._saved is not None
                    self._saved = self._saved or before
        return self._is_done

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def _announce(self) -> None:
        """Notes the first signal, on the thread of the watcher."""
        self._noticed = True
        self._pass_on()
        if self._step is None:
            _log.warning(
                "a preemption notice came, but reached(step), which saves, has never been called. "
                "Call it at the end of each training step. Nothing is saved until then%s.",
                "" if self._grace_seconds is None else f" or for {self._grace_seconds} s",
            )

    def _save_at_once(self, why: str) -> None:
        with self._saving:
            if self._is_done:
                return
            _log.warning("%s: saving in the middle of a step", why)
            try:
                self._save_now(self._step)
                make_due(self._manager)  # so that the boundary after this step saves again
            except Exception:  # this thread has no caller, and a boundary may yet come
                _log.exception("the save in the middle of a step failed")

    def _save_now(self, step: int | None) -> None:
        try:
            self._manager.sync()
        except AsyncSaveError as error:  # of an earlier save, which must not prevent this one
            _log.error("%s", error, exc_info=error.__cause__)
        before = self._manager.latest_checkpoint
        # A manager saves a step only once: if this step has been saved, that checkpoint counts.
        is_there = has_saved_step(self._manager, step)
        if not is_there:
            make_due(self._manager)
        try:
            try:
                path = self._save(step)
            finally:  # all processes wait, even one that has failed already
                self._manager.sync()
        except Exception:  # perhaps a callback failed in this process alone, after the commit
            self._saved = self._later_than(before)
            raise
        self._saved = path or (before if is_there else self._later_than(before))

    def _later_than(self, before: str | None) -> str | None:
        latest = self._manager.latest_checkpoint
        return latest if latest != before else None


class _Watcher:
    """The thread that hears of signals at once. It also calls `save_at_once` at a second signal, or
    when the grace period is over.

    Args:
      signals: the signals that count. Others go to the wakeup file that was there before.
      grace_seconds: counted from the first signal; None for no end.
      notice: called at the first signal.
      save_at_once: called with the reason, at most once; None if there is no such save.
      clock: returns seconds, by which the grace period is measured.
    """

    def __init__(
        self,
        signals: tuple[signal.Signals, ...],
        grace_seconds: float | None,
        notice: Callable[[], None],
        save_at_once: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._notice = notice
        self._save_at_once = save_at_once
        self._clock = clock
        self._notices, self._wakeup = socket.socketpair()

    def start(self, undo: ExitStack) -> None:
        """Starts the thread; `undo` ends it and gives the wakeup file back."""
        self._wakeup.setblocking(False)
        previous_fd = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(
            target=self._watch, args=[self._notices, previous_fd], name="ckpt-preempt", daemon=True
        )
        undo.callback(self._notices.close)
        undo.callback(watcher.join)
        undo.callback(self._wakeup.close)  # the thread then reads the end of the file, and ends
        undo.callback(signal.set_wakeup_fd, previous_fd)
        watcher.start()

    def came(self, number: signal.Signals) -> None:
        """Says that a signal came to a handler that is not Python's; on any thread."""
        with contextlib.suppress(OSError):  # the thread has ended
            self._wakeup.send(bytes([number]))

    def _watch(self, notices: socket.socket, previous_fd: int) -> None:
        if self._next_signal(notices, previous_fd, None) is None:
            return
        self._notice()
        if self._save_at_once is not None:
            self._wait_for_the_end(notices, previous_fd, self._save_at_once)
        while self._next_signal(notices, previous_fd, None) is not None:
            pass  # the owner of the previous wakeup file may still wait for other signals

    def _wait_for_the_end(
        self, notices: socket.socket, previous_fd: int, save_at_once: Callable[[str], None]
    ) -> None:
        deadline = None
        if self._grace_seconds is not None and math.isfinite(self._grace_seconds):
            deadline = self._clock() + self._grace_seconds
        try:
            second = self._next_signal(notices, previous_fd, deadline)
        except (TimeoutError, BlockingIOError):
            save_at_once(f"no step boundary came within {self._grace_seconds} s of a signal")
        else:
            if second is not None:
                save_at_once(f"a second signal came ({signal.Signals(second).name})")

    def _next_signal(
        self, notices: socket.socket, previous_fd: int, deadline: float | None
    ) -> int | None:
        """Waits for one of the signals that count, and passes others on.

        Returns:
          The signal; None if the file was closed.

        Raises:
          TimeoutError, BlockingIOError: the deadline has passed.
        """
        while True:
            left = None if deadline is None else max(0.0, deadline - self._clock())
            notices.settimeout(left)
            found = notices.recv(1)
            if not found:
                return None
            if found[0] in self._signals:
                return found[0]
            if previous_fd != -1:
                # The file may be full or gone; the interpreter ignores that, too.
                with contextlib.suppress(OSError):
                    os.write(previous_fd, found)


def _has_jaxs_handler() -> bool:
    """Whether JAX's preemption service is on, which handles SIGTERM."""
    # Releases of JAX without this setting always have the service.
    is_enabled = getattr(jax.config, "jax_enable_preemption_service", True)
    return jax.distributed.is_initialized() and is_enabled


def _when_jax_has_notice(notice: Callable[[], None]) -> ServiceThread:
    """Starts a thread that calls `notice` when a process has told JAX's service of a SIGTERM."""
    service = CoordinationService(service_client())

    def listen(is_closed: threading.Event) -> None:
        while not is_closed.is_set():
            try:
                if service.get(PREEMPTION_NOTICE, LONGEST_CALL_SECONDS) is not None:
                    notice()
                    return
            except TimeoutError:  # the service hangs; it may come back
                continue
            except ConnectionError as error:
                if not is_closed.is_set():
                    _log.error("cannot hear any more of preemption notices: %s", error)
                return

    return ServiceThread(listen, "ckpt-notice")


def _alone(step: int, noticed: bool) -> bool:
    """How a single process decides."""
    return noticed
