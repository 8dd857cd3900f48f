"""Preemption: a last save when the machine is about to be taken away.

The notice is a signal, SIGTERM by default. The place to save is the next *step boundary*, where
the objects are whole; the training loop says when it is there. Who decides at which boundary:

* One process on its own saves at the first boundary after the signal. If none comes before the
  grace period is over, or a second signal says that there is less time than thought, a thread
  saves at once, whatever the objects are like in the middle of a step: such a checkpoint may
  hold parameters of one step and optimizer state of another, and a save may fail because a
  step has donated its arrays. It is for programs whose steps are longer than the notice; the
  next boundary, if there is one, saves again.
* Where there are several processes, JAX's preemption service spreads SIGTERM to all of them and
  agrees on a step that all will reach. JAX has a handler of its own for SIGTERM then, which
  stays; other signals are passed on to it. Where that service is off, the handler here takes
  SIGTERM, too, and `agreeing` does the same. Nobody saves in the middle of a step there, because
  processes have to save together.

Python runs signal handlers on the main thread, between two of its instructions, which may be long
after the signal where that thread waits for a device. The thread that watches the clock is
therefore told by the interpreter's wakeup file, to which the signal itself writes.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import FrameType

import jax
from jax.experimental import multihost_utils

from ckpt_jax.errors import AsyncSaveError
from ckpt_jax.manage.manager import CheckpointManager, schedule_of
from ckpt_jax.processes.common_step import CommonStep
from ckpt_jax.processes.current import current

Save = Callable[[int | None], str | None]
Agree = Callable[[int, bool], bool]

_log = logging.getLogger("ckpt_jax")


class PreemptionHandler:
    """Saves when the program is told to end, at a step boundary if there is time for one.

    Use it as a context manager around the training loop, on the main thread. A signal then
    does not end the program by itself; the loop does, when `reached` says so.

    Args:
      manager: saves the checkpoint; its `checkpoint_interval` is not asked.
      grace_seconds: how long after the first signal a step boundary is awaited before the
        objects are saved as they are; keep it as much shorter than the real notice as a save
        takes. None waits for a boundary however long. Without effect where steps are agreed
        on between processes.
      signals: what announces the end.
      save: how to save, given the step that was reached last: a function of it that returns
        the path, or None where it has saved nothing: then the next step boundary tries again. By
        default `manager.save(check_interval=False)`, numbered by the save counter;
        `lambda step: manager.save(step)` numbers by step.
      agree: whether to save at a step, given the step and whether this process has had a
        signal. It is asked at every step until it says yes, and has to give the same answer in
        all processes.
        By default as the module describes; JAX's service is used where it is on.

    Raises:
      ValueError: a negative time; on entering, where another thread than the main one does so.

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
        if grace_seconds is not None and grace_seconds < 0:
            raise ValueError(f"expected grace_seconds of 0 or more, or None, got {grace_seconds}")
        self._manager = manager
        self._grace_seconds = grace_seconds
        self._signals = tuple(signals)
        self._save = save or (lambda step: manager.save(check_interval=False))
        self._given_agree = agree
        self._agree: Agree = agree or _on_my_own
        self._ask: Callable[[], None] = lambda: None  # the other processes to stop
        self._forwards = False  # to JAX, which has its own handler of SIGTERM
        self._noticed = False
        self._step: int | None = None
        self._saved: str | None = None
        self._is_agreed = False
        self._is_done = False
        self._saving = threading.Lock()
        self._deadline: float | None = None
        self._undo = ExitStack()

    @property
    def noticed(self) -> bool:
        """Whether this process has had a signal, or the processes have agreed to save."""
        return self._noticed

    @property
    def saved(self) -> str | None:
        """The path of the checkpoint that was saved because of a signal; None where there is none.

        It is committed: a save in the background has been waited for.
        """
        return self._saved

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a PreemptionHandler is entered on the main thread, where signals go")
        with ExitStack() as undo:
            self._install(undo)
            self._undo = undo.pop_all()
        return self

    def _install(self, undo: ExitStack) -> None:
        """Takes the signals; `undo` gives them back."""
        signals = self._signals
        if self._given_agree is None:
            # Releases of JAX without this setting have the service always.
            has_service = getattr(jax.config, "jax_enable_preemption_service", True)
            if jax.distributed.is_initialized() and has_service:
                self._agree, self._forwards = _agreed_by_jax, True
                signals = tuple([number for number in signals if number != signal.SIGTERM])
            elif (processes := current()).count > 1:
                common = CommonStep(processes)
                undo.callback(common.close)
                self._agree, self._ask = lambda step, noticed: common.is_passed(), common.ask
            else:
                self._start_watching(undo)
        for number in signals:
            previous = signal.signal(number, self._notice)
            # A handler that no Python code installed cannot be put back.
            undo.callback(signal.signal, number, previous or signal.SIG_DFL)

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        if self._noticed and self._saved is None:
            _log.warning(
                "a preemption notice came, but the loop has ended without a step boundary since "
                "at which a save succeeded: nothing was saved"
            )

    def reached(self, step: int) -> bool:
        """Says that a step is over; saves here if it is time.

        Args:
          step: its number, one more with every call; the same in all processes.

        Returns:
          Whether a checkpoint has been saved because of a signal: the loop should end.

        Raises:
          Whatever saving raises; an error of an earlier save in the background is logged.
        """
        self._step = step
        if not self._is_done and (self._is_agreed or self._agree(step, self._noticed)):
            # JAX says so once; after a save that failed, all processes try again.
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
        self._ask()
        if self._forwards:
            os.kill(os.getpid(), signal.SIGTERM)

    def _start_watching(self, undo: ExitStack) -> None:
        """Starts the thread that saves at once, and says how to end it."""
        notices, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        previous = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(
            target=self._watch, args=[notices, previous], name="ckpt-preempt", daemon=True
        )
        undo.callback(notices.close)
        undo.callback(watcher.join)
        undo.callback(wakeup.close)  # which ends what the watcher reads
        undo.callback(signal.set_wakeup_fd, previous)
        watcher.start()

    def _watch(self, notices: socket.socket, previous_fd: int) -> None:
        """Waits for a second signal or the end of the grace period, and then saves at once."""
        numbers = self._numbers(notices, previous_fd)
        if next(numbers, None) is None:
            return
        self._noticed = True
        if self._step is None:
            _log.warning(
                "a preemption notice came, but reached(step) has never been called, which saves: "
                "call it at the end of each training step. Nothing is saved until then%s.",
                "" if self._grace_seconds is None else f" or for {self._grace_seconds} s",
            )
        if self._grace_seconds is not None and math.isfinite(self._grace_seconds):
            self._deadline = time.monotonic() + self._grace_seconds
        try:
            second = next(numbers, None)
        except (TimeoutError, BlockingIOError):
            self._save_at_once(f"no step boundary came within {self._grace_seconds} s of a signal")
        else:
            if second is not None:
                self._save_at_once(f"a second signal came ({signal.Signals(second).name})")
        self._deadline = None
        for _ in self._numbers(notices, previous_fd):
            pass  # others may still wait for theirs

    def _save_at_once(self, why: str) -> None:
        with self._saving:
            if self._is_done:
                return
            _log.warning("%s: saving in the middle of a step", why)
            try:
                self._save_now(self._step)
                schedule_of(self._manager).make_due()  # again, when the step is over
            except Exception:  # there is nobody else to tell, and a boundary may yet come
                _log.exception("the save in the middle of a step failed")

    def _numbers(self, notices: socket.socket, previous_fd: int) -> Iterator[int]:
        """Our signals as they come; others go to whoever had the wakeup file before.

        Raises:
          TimeoutError, BlockingIOError: the deadline is over.
        """
        while True:
            deadline = self._deadline
            notices.settimeout(deadline and max(0.0, deadline - time.monotonic()))
            found = notices.recv(1)
            if not found:
                return
            if found[0] in self._signals:
                yield found[0]
            elif previous_fd != -1:
                with contextlib.suppress(OSError):  # it is full or gone, as the interpreter ignores
                    os.write(previous_fd, found)

    def _save_now(self, step: int | None) -> None:
        try:
            self._manager.sync()
        except AsyncSaveError as error:  # of an earlier save, which must not prevent this one
            _log.error("%s", error, exc_info=error.__cause__)
        before = self._manager.latest_checkpoint
        # A manager does not save one step twice: then what is there is what is wanted.
        is_there = schedule_of(self._manager).has_saved(self._manager.latest_checkpoint)
        if not is_there:
            schedule_of(self._manager).make_due()
        try:
            try:
                path = self._save(step)
            finally:  # all processes wait, whichever of them has failed already
                self._manager.sync()
        except Exception:  # maybe of a callback in this process alone, after the commit for all
            self._saved = self._later_than(before)
            raise
        self._saved = path or (before if is_there else self._later_than(before))

    def _later_than(self, before: str | None) -> str | None:
        latest = self._manager.latest_checkpoint
        return latest if latest != before else None


def _on_my_own(step: int, noticed: bool) -> bool:
    return noticed


def _agreed_by_jax(step: int, noticed: bool) -> bool:
    return multihost_utils.reached_preemption_sync_point(step)
