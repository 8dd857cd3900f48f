"""One save of a manager: it is counted and scheduled, and recorded or taken back at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ckpt_jax.api.checkpoint import Checkpoint, request_for, set_save_counter, take_back_count
from ckpt_jax.manage.collection import Collection
from ckpt_jax.manage.mirror import Mirror
from ckpt_jax.manage.retention import CheckpointRecord
from ckpt_jax.manage.schedule import Schedule
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.saving.pipeline import SaveRequest


class ManagedSave:
    """The bookkeeping of one save of a manager.

    Args:
      checkpoint: the `Checkpoint` to save.
      schedule: learns of the save.
      collection: records it.
      meeting: of the processes that save.
      options: how to save.
      step: the present step; None if there is no interval.
      now: the present step, on which all processes have to agree; None if it is not known.
      new_record: returns the record of the checkpoint, given the save counter.
      parts: small entries that are committed with the checkpoint.
      mirror: gets a copy; None if there is none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        schedule: Schedule,
        collection: Collection,
        meeting: Meeting,
        options: CheckpointOptions,
        step: int | None,
        now: int | None,
        new_record: Callable[[int], CheckpointRecord],
        parts: Mapping[str, bytes],
        mirror: Mirror | None,
    ):
        self._checkpoint, self._schedule, self._collection = checkpoint, schedule, collection
        self._meeting, self._options, self._new_record = meeting, options, new_record
        self._parts, self._mirror = parts, mirror
        self._step, self._now, self._before = step, now, schedule.position
        self._count = checkpoint.save_counter + 1
        self._record: CheckpointRecord | None = None
        self.series = collection.series

    def begin(self) -> SaveRequest:
        set_save_counter(self._checkpoint, self._count)
        record = self._new_record(self._count)
        self._schedule.began(self._step, record.path)
        self._record = record
        request = request_for(
            self._checkpoint,
            record.path,
            self._options,
            "CheckpointManager.save",
            record.number,
            self._now,
        )
        if not self._meeting.leads:
            return request
        self._collection.begin(record)
        return replace(
            request,
            publishing=lambda: self._collection.publishing(record.path),
            extra=lambda live: self._parts,
        )

    def record(self, is_overtaken: bool = False) -> None:
        assert self._record is not None
        if self._meeting.leads:
            self._collection.record(self._record, is_overtaken)
            if self._mirror is not None:
                self._mirror.committed(self._record)
        else:
            self._collection.follow()

    def follow(self, count: int) -> None:
        set_save_counter(self._checkpoint, count)

    def undo(self) -> None:
        record = self._record
        exists = record is not None and self._collection.take_back(record.path)
        if not exists:  # otherwise its number is taken
            take_back_count(self._checkpoint, self._count)
        if record is not None:
            is_async = self._options.enable_async
            self._schedule.undo(self._before, record.path, self._meeting, is_async=is_async)
