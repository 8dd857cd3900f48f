"""Saving: from live objects to a committed checkpoint directory.

trace      finds the object graph, and every value in it
encode     makes an array or a byte string of each value; values that cannot be saved are named here
snapshot   copies values to host buffers: from here on the program may change its objects
write      writes shards into a staging directory; registered savers come first
commit     writes the graph and the index, then renames the staging directory
finish     calls write callbacks and records the save, then tells the other processes

If there are several processes, each does this for its own slices, up to the commit. Process 0
commits for all processes when it has their reports (`processes.meeting`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import astuple, dataclass, replace
from types import TracebackType
from typing import Any

import jax

from ckpt_jax.errors import CheckpointError, ProcessError, ShardError
from ckpt_jax.graph import codec
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, path_of
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import SaveWatch
from ckpt_jax.objects.registry import get_saver
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.meeting import Meeting, described
from ckpt_jax.processes.moment import Moment, evidence_of
from ckpt_jax.progress import progress
from ckpt_jax.saving.casts import with_casts
from ckpt_jax.saving.snapshot import counts, snapshot
from ckpt_jax.saving.unsaveable import Unsaveable
from ckpt_jax.saving.write import plan_write, write
from ckpt_jax.store.index import Shard, Table, decode_entry, encode_entry
from ckpt_jax.store.merge import SHARDS, assemble, read_shard
from ckpt_jax.store.paths import as_path, below, relative, resolved
from ckpt_jax.store.presence import is_directory
from ckpt_jax.store.seal import seal
from ckpt_jax.store.storage import Storage
from ckpt_jax.values.host import without_gc
from ckpt_jax.values.leaves import encode


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """The objects to save, the path, and the options.

    Attributes:
      path: of the checkpoint, the same on all processes.
      trace: gives the objects as they are now.
      options: how to save.
      overwrite: whether a checkpoint at `path` may be replaced.
      publishing: entered on process 0 while the checkpoint takes its name. Its value says whether
        a checkpoint at `path` may be replaced after all.
      extra: makes small entries from the traced objects, which are committed with their graph.
      verb: the method that saves.
      call: how often this process has called it, with this call; None if that is not counted.
      step: of the program; None if it is not known.
      count: the save counter; None if the verb does not count.
    """

    path: str
    trace: Callable[[], LiveGraph]
    options: CheckpointOptions
    overwrite: bool = True
    publishing: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True)
    extra: Callable[[LiveGraph], Mapping[str, bytes]] = lambda live: {}
    verb: str = "save"
    call: int | None = None
    step: int | None = None
    count: int | None = None


CANCELLED = "Checkpoint.cancel() was called"  # what other processes hear, too


class Cancelled(CheckpointError):
    """A save was cancelled."""


class StagedSave:
    """A save that has its own copy of the values, before it is committed.

    The constructor is the part of a save that has to see the objects as they are now. The stages
    follow, each once and in this order, on any thread, inside a `with` block:

        with staged:
            staged.commit(staged.write())
            staged.finish(act)

    If the save is cancelled, the next stage raises `Cancelled`, or the present one as soon as it
    can, until the checkpoint takes its name.

    If the block raises an error, the other processes hear of it before files are removed. Then
    everything is as it was before the save, unless the error comes from `finish`.

    Args:
      request: what to save.
      storage: where the path lies.
      meeting: with the other processes. The caller enters it, and leaves it after the block.
      watch: measures the save.
      cancelled: set, on any thread, if the save is to be given up.

    Attributes:
      moment: what all processes have in common; None if there is one process.
    """

    @without_gc()
    def __init__(
        self,
        request: SaveRequest,
        storage: Storage,
        meeting: Meeting,
        watch: SaveWatch,
        cancelled: threading.Event | None = None,
    ):
        options = request.options
        self._request, self._meeting, self._watch = request, meeting, watch
        live, casts = with_casts(request.trace(), options.cast_on_save)
        values = encoded_values(live)
        taken = snapshot(
            values,
            in_background=options.enable_async,
            process=meeting.index,
            count=meeting.count,
            casts=casts,
        )
        self._nbytes = taken.nbytes
        self._plan = plan_write(taken, options.sharding_policy)
        graph = seal(codec.encode(live.graph))
        self._small = {**request.extra(live), OBJECT_GRAPH_KEY: graph}
        self.moment: Moment | None = None
        if meeting.count > 1:  # one process has nobody to agree with
            self.moment = _moment_of(request, live, graph, values, meeting.count)
            meeting.begin(self.moment)
        self._staging = storage.stage(request.path, meeting.token)
        self._shards = os.path.join(self._staging.directory, SHARDS)
        self._tables: dict[bytes, Table] = {}  # of the shards of process 0, by digest
        self._failure: str | None = None  # of process 0, after the commit
        self._cancelled = cancelled or threading.Event()
        with ExitStack() as stack:
            stack.enter_context(self._held_staging())
            stack.push(meeting.tell)  # the others hear of an error before files are removed
            if not self._staging.mark:
                os.makedirs(self._shards, exist_ok=True)
            mine = self._own_names() if meeting.count > 1 or self._staging.mark else ""
            self._registered = _registered_shards(live, os.path.join(self._shards, mine))
            self._held = stack.pop_all()

    @property
    def path(self) -> str:
        """The path of the checkpoint."""
        return self._request.path

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"{CANCELLED}: nothing was saved")

    def _held_staging(self) -> AbstractContextManager[None]:
        """Holds the staging directory. At the end, the files of a failed save are removed."""
        request, meeting = self._request, self._meeting
        durable = request.options.durable
        if meeting.leads:
            return self._staging.claimed(overwrite=request.overwrite, durable=durable)
        return self._staging.joined(
            self._shards,
            self._own_names(),
            durable=durable,
            is_lost=lambda: not (meeting.is_in_doubt or self._may_appear),
        )

    @property
    def _may_appear(self) -> bool:
        """Whether process 0 has failed in an object store, and may have asked for the commit. It
        removes the shards of all if it has not."""
        return bool(self._staging.mark) and self._meeting.has_failed_late

    def _own_names(self) -> str:
        """The beginning of the names of this process's shards."""
        mark = f"{self._staging.mark}-" if self._staging.mark else ""
        return f"{mark}{self._meeting.index:05d}-"

    def __enter__(self) -> StagedSave:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, traceback)

    def write(self) -> _Report:
        """Writes the shards of this process; returns its report to process 0."""
        options = self._request.options
        self._go_on()
        with progress(options.progress, f"saving {self._request.path}", self._nbytes) as advance:

            def wrote(nbytes: int) -> None:
                self._go_on()
                self._watch.wrote(nbytes)
                advance(nbytes)

            prefix = os.path.join(self._shards, self._own_names())
            written = write(self._plan, prefix, options, wrote)
        registered = [read_shard(directory) for directory in self._registered]
        self._watch.wrote(sum([int(table.nbytes.sum()) for _, table in registered]))
        self._go_on()
        self._staging.check()  # that all of it went to one directory
        return _Report(tuple(self._entries([*registered, *written])))

    def _entries(self, shards: Sequence[tuple[Shard, Table]]) -> Iterator[str]:
        """The entries of shards for the report to process 0, which needs the tables no more."""
        for shard, table in shards:
            if self._meeting.leads:
                self._tables[table.digest] = table
            directory = relative(shard.directory, self._staging.directory)
            entry = encode_entry(replace(shard, directory=directory), table.digest)
            yield b64encode(entry).decode()

    def commit(self, report: _Report) -> None:
        """Makes a checkpoint of the shards of all processes, at the path of the save.

        Process 0 does this when it has the reports of all. The others wait until it has finished.
        """
        if self._meeting.leads:
            reports = [_Report(*said) for said in self._meeting.gather(astuple(report))]
            self._publish(reports)
            self._held.close()
        else:
            self._failure = self._meeting.report(astuple(report))
        self._watch.committed(self._request.path)

    def is_committed(self) -> bool:
        """Whether a commit that was in doubt has come to pass; see `Stage.is_committed`."""
        return self._staging.is_committed()

    def _publish(self, reports: Sequence[_Report]) -> None:
        staging, request = self._staging, self._request
        self._go_on()
        shards = [
            [_below(staging.directory, *decode_entry(b64decode(entry))) for entry in report.shards]
            for report in reports
        ]
        if not staging.mark:  # an object store is the same for all
            _check_shared(shards, staging.directory, self._meeting.what)
        entries = [entry for of_process in shards for entry in of_process]
        durable = request.options.durable
        parts = assemble(
            entries,
            self._tables,
            staging.directory,
            self._small,
            durable=durable,
            mark=staging.mark,
        )
        staging.complete(parts, durable=durable)
        self._go_on()
        with request.publishing() as may_replace:
            staging.publish(overwrite=request.overwrite and may_replace, durable=durable)

    def finish(self, act: Callable[[], None]) -> None:
        """Calls `act` after the commit: on process 0 before the others know of the checkpoint.

        An error of `act` leaves the checkpoint in place. If `act` fails on process 0, the other
        processes do not call it, and raise the error of process 0.
        """
        meeting = self._meeting
        if self._failure is not None:
            what = f"{meeting.what}: the checkpoint was committed, but then {self._failure}"
            raise ProcessError(what, (0,))
        try:
            with meeting.ending():
                act()
        except BaseException as error:
            if meeting.leads:
                meeting.announce(described(error, meeting.index, meeting.what)["message"])
            raise
        if meeting.leads:
            meeting.announce(None)


@dataclass(frozen=True, slots=True)
class _Report:
    """The report of a process whose shards are written.

    Attributes:
      shards: their entries, in base 64; the directories are relative to the staging directory.
    """

    shards: tuple[str, ...]


def _moment_of(
    request: SaveRequest, live: LiveGraph, graph: bytes, values: Mapping[str, Any], processes: int
) -> Moment:
    """What all processes have to have in common.

    Args:
      request: what to save.
      live: the traced objects.
      graph: their graph, encoded.
      values: their values, as `encoded_values` gives them.
      processes: how many there are.
    """
    on_host = {key: value for key, value in values.items() if not isinstance(value, jax.Array)}
    return Moment(
        request.verb,
        os.path.basename(resolved(request.path)),
        live.graph,
        hashlib.sha256(graph).hexdigest(),
        evidence_of({**on_host, **counts(values, processes)}),
        request.call,
        request.step,
        request.count,
    )


def _below(staging: str, shard: Shard, table: bytes) -> tuple[Shard, bytes]:
    """The entry of a shard, whose directory is given relative to `staging`."""
    return replace(shard, directory=below(staging, shard.directory)), table


def _check_shared(shards: Sequence[Sequence[tuple[Shard, bytes]]], staging: str, what: str) -> None:
    """Checks that process 0 finds the directories that the others have written."""
    unseen = tuple(
        k
        for k, of_process in enumerate(shards)
        if not all(is_directory(shard.directory) for shard, _ in of_process)
    )
    if unseen:
        raise ProcessError(
            f"{what}: process 0 does not find the shards that were written by "
            f"{', '.join(map(str, unseen))}. All processes have to share the directory "
            f"{os.path.dirname(staging)}; ckpt.preflight checks whether they do.",
            unseen,
        )


def encoded_values(live: LiveGraph) -> dict[str, Any]:
    """Every value of the default saver by key, as an array or a byte string."""
    values: dict[str, Any] = {}
    unsaveable = Unsaveable()
    for node, attribute in live.graph.attributes():
        with unsaveable.at(path_of(live.graph.object_keys[node])):
            values[attribute.key] = encode(live.values[node][attribute.name])
    unsaveable.require_none("values cannot be saved")
    return values


def _registered_shards(live: LiveGraph, prefix: str) -> list[str]:
    """Calls each registered saver once, with all objects that it takes; returns its shards."""
    objects: dict[str, dict[str, Any]] = {}
    for node, obj in zip(live.graph.nodes, live.objects, strict=True):
        if node.saver is not None:
            objects.setdefault(node.saver.name, {})[node.saver.object_name] = obj
    prefixes: list[str] = []
    for name, by_name in objects.items():
        result = get_saver(name).save_fn(by_name, prefix + name)
        prefixes += _prefixes(name, result)
    return prefixes


def _prefixes(saver: str, result: Any) -> list[str]:
    if result is None:
        return []
    if isinstance(result, str | os.PathLike):
        return [as_path(result, f"what save_fn of {saver!r} returned")]
    if isinstance(result, list | tuple):
        return [prefix for part in result for prefix in _prefixes(saver, part)]
    raise ShardError(
        f"save_fn of the checkpoint saver {saver!r} must return None, a shard prefix or a list of "
        f"them, got {type(result).__name__}"
    )
