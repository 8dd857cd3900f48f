"""Errors: everything that this library raises on purpose, as a tree of classes.

    CheckpointError
    ├── CheckpointNotFoundError   (also FileNotFoundError)  there is no checkpoint at that path
    ├── CorruptCheckpointError    bytes differ from what was written, or are missing
    ├── UnsupportedFormatError    written in a newer format than this library reads, or by another
    ├── RestoreMismatchError      (also ValueError)  checkpoint and target disagree; has the report
    ├── UnsaveableError           (also TypeError)  values that cannot be saved; names each path
    ├── ShardError                (also ValueError)  shards that do not make up whole arrays
    ├── RegistrationError         (also ValueError)  a registry refused a name, or does not have it
    ├── AsyncSaveError            a save in the background failed
    ├── SupersededError           another manager has taken over the directory
    ├── CommitInDoubtError        an object store did not say whether the checkpoint was committed
    ├── BarrierTimeoutError       (also TimeoutError)  other processes did not arrive in time
    ├── ProcessError              another process failed, or the processes do different things
    └── PreflightError            (also OSError)  not all processes can write the directory

Every message says what is wrong, where (the path of local names, the file, the key), what was
expected, what was found, and what to do next. Problems are collected and raised together; the
exception also holds them as data.

The assertions of `LoadStatus` raise plain `AssertionError`s, as TensorFlow's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_jax.report import RestoreReport


class CheckpointError(Exception):
    """Root of every error that this library raises on purpose."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at that path; the message lists the checkpoints that are nearby."""


class CorruptCheckpointError(CheckpointError):
    """A checksum failed, or a file is truncated or missing.

    Attributes:
      file: path of the damaged file or shard directory; None if it is unknown.
      key: the checkpoint key of a value in it; None if it is unknown.
    """

    def __init__(self, message: str, *, file: str | None = None, key: str | None = None):
        super().__init__(message)
        self.file = file
        self.key = key


class UnsupportedFormatError(CheckpointError):
    """The checkpoint's format is newer than this library reads, or another library wrote it."""


class RestoreMismatchError(CheckpointError, ValueError):
    """Checkpoint and target disagree; nothing was read and nothing was changed.

    Attributes:
      report: the `RestoreReport` with every difference.
    """

    def __init__(self, message: str, report: RestoreReport):
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:  # otherwise it could not be sent from another process
        return type(self), (*self.args, self.report)


class UnsaveableError(CheckpointError, TypeError):
    """Some objects cannot be saved; this was found before anything was written.

    Attributes:
      problems: tuple of (path of local names, what is wrong).
    """

    def __init__(self, message: str, problems: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.problems = problems


class ShardError(CheckpointError, ValueError):
    """Slices overlap, leave a hole, or disagree on the dtype or shape of one array."""


class RegistrationError(CheckpointError, ValueError):
    """A registry refused a name, or a name that a checkpoint asks for is not registered."""


class AsyncSaveError(CheckpointError):
    """A save that ran in the background failed; the cause is chained."""


class SupersededError(CheckpointError):
    """Another manager has taken over the checkpoints that this one manages.

    This one no longer records, replaces or removes any. A checkpoint that it has just saved stays,
    and the message says so.
    """


class CommitInDoubtError(CheckpointError):
    """An object store did not say whether it has committed the checkpoint, and may still do so.

    Nothing was removed. The next save finds out, and goes on from there. Until then, the checkpoint
    is whole if it is there.
    """


class BarrierTimeoutError(CheckpointError, TimeoutError):
    """Some processes did not reach a barrier before its deadline; the message names them.

    Attributes:
      processes: indices of the processes that did not reach it.
    """

    def __init__(self, message: str, processes: tuple[int, ...] = ()):
        super().__init__(message)
        self.processes = processes


class ProcessError(CheckpointError):
    """Another process failed, or the processes do not save or restore the same objects.

    Attributes:
      processes: indices of the processes that failed, or that differ from process 0.
    """

    def __init__(self, message: str, processes: tuple[int, ...] = ()):
        super().__init__(message)
        self.processes = processes


class PreflightError(CheckpointError, OSError):
    """Not all processes can write a directory, or they do not share it.

    Attributes:
      problems: tuple of (index of the process, what is wrong there).
    """

    def __init__(self, message: str, problems: tuple[tuple[int, str], ...] = ()):
        super().__init__(message)
        self.problems = problems
