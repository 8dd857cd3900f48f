"""Checkpoint: the verbs for objects.

A `Checkpoint` names the objects of a program. With a *root* it saves that object, and the
names it was given are attached to it as further children; without one it is the root itself.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ckpt_jax.api.frozen import FrozenSaver
from ckpt_jax.api.status import LoadStatus
from ckpt_jax.api.unchanged import Unchanged
from ckpt_jax.graph.labels import SAVE_COUNTER, Label, local_name
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import METER
from ckpt_jax.objects.containers import wrap
from ckpt_jax.objects.delegate import delegate_of
from ckpt_jax.objects.registry import saver_name
from ckpt_jax.objects.stateful import why_stateless
from ckpt_jax.objects.trackable import AutoTrackable, replace_children
from ckpt_jax.objects.variable import Variable
from ckpt_jax.objects.views import ForwardingView, View, view_of
from ckpt_jax.options import CheckpointOptions, Path, given
from ckpt_jax.processes.context import Context, current_context
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.report import near_miss, nearest, printable
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import rename as renamed
from ckpt_jax.restoring.rules import Rule
from ckpt_jax.restoring.run import broadcast_meeting
from ckpt_jax.restoring.waiting import Restoration
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import Bookkeeping, SaveRuns, Unrecorded
from ckpt_jax.store.paths import as_path, resolved
from ckpt_jax.store.state_file import record_latest

_log = logging.getLogger("ckpt_jax")


class Checkpoint(AutoTrackable):
    """Names objects, and saves and restores them together.

    Args:
      root: an object to save as the root of the graph (or a weak reference to one); by
        default the checkpoint itself is the root.
      **named: objects by name: trackables, `nnx` modules and optimizers, pytrees, arrays, Python
        scalars, strings, None, and objects of classes that `register_view` has made known.

    Under `jax.distributed` all processes save the same objects in the same order, to a directory
    that they share. A value that lies on no device, or on devices of one process, is saved as
    process 0 has it; state of single processes goes into a `PerProcess`.

    `checkpoint.name` is the present value: the same object where it is mutable, the rebuilt
    pytree where it is not. Assigning `checkpoint.name` replaces it.

    Raises:
      ValueError: a value has no view, or a name that `root` uses for something else; later, that
        such a value is assigned to a name that has state.
      AttributeError: a name that is a method of every Checkpoint.

    Source: `tf.train.Checkpoint`.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Checkpoint(params={"w": jnp.arange(2.0)}, step=7).save(f"{directory}/ckpt")
      ...     fresh = Checkpoint(params={"w": jnp.zeros(2)}, step=0)
      ...     status = fresh.restore(path).assert_consumed()
      ...     fresh.params, fresh.step, fresh.save_counter
      ({'w': Array([0., 1.], dtype=float32)}, 7, 1)
    """

    def __init__(self, root: Any = None, **named: Any):
        METER.constructed()
        private = self.__dict__
        private["_self_rooted"] = root is not None and not _is_empty_container(root)
        private["_self_root"] = wrap(root, whole=True)  # a list of objects notices new ones
        private["_self_counter"] = None
        if private["_self_rooted"] and view_of(self._root_object()) is None:
            raise ValueError(f"root of type {type(root).__qualname__} has no view")
        for name in sorted(named):
            value = named[name]
            if hasattr(Checkpoint, name):
                raise AttributeError(f"{name} is the checkpoint's own; it cannot be given")
            if not self._is_state(value):
                raise ValueError(_unknown(name, value))
            setattr(self, name, value)
        if private["_self_rooted"]:
            _RootedView(self)  # refuses names that the root uses for something else

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Checkpoint, name):
            raise AttributeError(f"{name} is the checkpoint's own; it cannot be assigned")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        names = [str(name) for name in self.trackable_children() if name != SAVE_COUNTER]
        if self.__dict__["_self_rooted"]:
            root = self.__dict__["_self_root"]
            root = root() if isinstance(root, weakref.ref) else root
            view = view_of(root)
            kind = type(root) if view is None else view.type_of(root)
            names.insert(0, f"root {kind.__qualname__}")
        return f"<Checkpoint of {', '.join(map(printable, names)) or 'nothing yet'}>"

    def _root_object(self) -> Any:
        root = self.__dict__["_self_root"]
        if isinstance(root, weakref.ref):
            root = root()
        if root is None and self.__dict__["_self_rooted"]:
            raise AssertionError("the root of this checkpoint was garbage-collected")
        return delegate_of(root)

    _plain_data_is_state = True

    def _is_state(self, value: Any) -> bool:
        return view_of(value) is not None or saver_name(value) is not None

    def _before_dropping(self, name: str, value: Any) -> None:
        # A new name may be given to anything; what was saved so far must not go without a word.
        raise ValueError(_unknown(name, value))

    # --- verbs -------------------------------------------------------------------------

    def write(
        self, path: Path, options: CheckpointOptions | None = None, **values: Any
    ) -> str | None:
        """Saves to exactly `path`, without a number, a counter or the state file.

        Args:
          path: the directory to create.
          options: how, as for `save`.
          **values: new values by name, as for `save`.

        Returns:
          The path of the checkpoint. Pairs with `read`. None if another save was in flight and
          `when_busy="skip"` says not to wait for it.
        """
        options, path = given(options), as_path(path)

        def open_books(meeting: Meeting) -> Unrecorded:
            replace_values(self, values)
            return Unrecorded(request_for(self, path, options, "Checkpoint.write"))

        return self._save(path, options, values, open_books)

    def save(
        self, prefix: Path, options: CheckpointOptions | None = None, **values: Any
    ) -> str | None:
        """Saves to `f"{prefix}-{n}"` with n one above `save_counter`, which it advances.

        The state file `checkpoint` of the directory then names this checkpoint as the latest.
        What is at that path already is replaced, in one step.

        Args:
          prefix: the path without its number.
          options: how; `enable_async=True` returns as soon as the values are safe from changes.
          **values: new values by name: `save(prefix, state=state)` is `checkpoint.state = state`
            followed by `save(prefix)`. Pass what each training step makes anew, such as a
            `TrainState`. They stay assigned if the save fails or is skipped.

        Returns:
          The path of the checkpoint. Pairs with `restore`. None if another save was in flight
          and `when_busy="skip"` says not to wait for it; the counter then stays as it is.

        Raises:
          TypeError: the checkpoint has no value of a name that was given; it names those it has.
          ValueError: nothing is known about how to save a value that was given.
          UnsaveableError: naming every value that cannot be saved; nothing was written.
          AsyncSaveError: an earlier save failed in the background. With one process this one has
            not begun; with several it has, because those that know of no error take part.
          OSError: the file system refused something; the earlier checkpoints are as they were.

        If the pytrees are the very ones of the save before, a training loop probably does not pass
        its new ones. A warning in the log says so, once for each checkpoint.
        """
        options, prefix = given(options), as_path(prefix, "prefix")

        def open_books(meeting: Meeting) -> _Numbered:
            replace_values(self, values)
            return _Numbered(self, prefix, options, meeting)

        return self._save(prefix, options, values, open_books)

    def _save(
        self,
        path: str,
        options: CheckpointOptions,
        values: Mapping[str, Any],
        open_books: Callable[[Meeting], Bookkeeping],
    ) -> str | None:
        context = current_context()
        saved = self._runs().save(
            path,
            options,
            context.processes.patience(options.timeout_seconds),
            context,
            lambda: check_values(self, values),
            open_books,
        )
        if saved is None:  # skipped; a later save without values must not find older ones
            replace_values(self, values)
        return saved

    def read(
        self,
        path: Path | None,
        options: CheckpointOptions | None = None,
        *,
        rename: Iterable[Rule] = (),
    ) -> LoadStatus:
        """Restores what `write` saved, without touching the save counter; see `restore`."""
        options, context = given(options), current_context()
        with self._turn_to_restore(path, options, context) as meeting:
            return self._read(path, options, rename, meeting, context)

    @contextmanager
    def _turn_to_restore(
        self, path: Path | None, options: CheckpointOptions, context: Context
    ) -> Iterator[Meeting | None]:
        processes = context.processes
        is_alone = processes.count == 1  # the others restore, and so does this one
        with (
            broadcast_meeting(path, options, processes) as meeting,
            self._runs().background.turn(is_refused=is_alone),
        ):
            yield meeting

    def _read(
        self,
        path: Path | None,
        options: CheckpointOptions,
        rename: Iterable[Rule],
        meeting: Meeting | None,
        context: Context,
    ) -> LoadStatus:
        if path is None:
            return LoadStatus(None, self._trace_for_restore)
        with context.meter.restoring(lambda: CheckpointReader(path, context.storage_of)) as reader:
            saved = renamed(reader.graph_to_restore, rename)
            restoration = Restoration(reader.path, saved, options, self._trace_for_restore, context)
            root = restoration.run(reader, meeting)
        if self.__dict__["_self_rooted"] and root is not self._root_object():
            self.__dict__["_self_root"] = root
        self._runs().tell_restored(restoration.path)
        return LoadStatus(restoration, self._trace_for_restore)

    def restore(
        self,
        path: Path | None,
        options: CheckpointOptions | None = None,
        *,
        rename: Iterable[Rule] = (),
    ) -> LoadStatus:
        """Restores objects from a checkpoint, matched by the names of the edges between them.

        Mutable objects change in place; pytrees are rebuilt, so read them back from the
        checkpoint's attribute. Values of objects that do not exist yet wait for them.

        Args:
          path: of a checkpoint, as `save` returned it, or of one of another library, whose names
            are matched with the paths of values. None restores nothing.
          options: `cast`, `skip_slot_variables`, `shardings` and `max_inflight_bytes` apply.
          rename: ordered rules (saved pattern, target pattern, *transforms) for values that
            moved; see `ckpt_jax.restore`. They hold for objects that appear later, too.

        Raises:
          CheckpointNotFoundError: nothing is there; the message lists what is near.
          RestoreMismatchError: a shape, dtype or kind differs, or a value that exists only
            abstractly is not in the checkpoint. Nothing was read or changed.
          CorruptCheckpointError: bytes are damaged.
          AsyncSaveError: an earlier save failed in the background. With one process nothing was
            restored; with several all was, because those that know of no error restore.
        """
        options, context = given(options), current_context()
        with self._turn_to_restore(path, options, context) as meeting:
            self._counter()
            self._runs().settle_doubts(context.processes.patience(options.timeout_seconds))
            return self._read(path, options, rename, meeting, context)

    def freeze(self) -> FrozenSaver:
        """A saver of the objects that are here now, which need not be traced again.

        It holds all of them, the save counter included, which it does not advance.

        Raises:
          ValueError: the root is immutable.
        """
        self._counter()
        return FrozenSaver(self._trace(may_be_abstract=True))

    def sync(self) -> None:
        """Waits for a save in the background.

        Raises:
          AsyncSaveError: it failed; the cause is chained.
        """
        self._runs().background.wait()

    def cancel(self) -> bool:
        """Cancels a save in the background. Nothing of it stays, and the next save works.

        It waits until the files of the save are removed, which takes no longer than one file of 64
        MiB takes to write. The save does not count. From the moment on in which the checkpoint
        takes its name, it cannot be cancelled; then its record is waited for.

        If there are several processes, call it on all of them. It returns the same on all. If one
        process alone calls it, the save fails on all: the others get an `AsyncSaveError`.

        Returns:
          Whether a save was cancelled. False if none was under way, or if it was committed: then
          the checkpoint is there, and is the latest.

        Raises:
          AsyncSaveError: an earlier save failed; or this one was committed, and failed then; or, if
            there are several processes, it is not known whether it was committed.

        Example:
          >>> import numpy as np, os, tempfile
          >>> in_background = CheckpointOptions(enable_async=True)
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     checkpoint = Checkpoint(w=np.zeros(10))
          ...     path = checkpoint.save(f"{directory}/ckpt", in_background)
          ...     is_cancelled = checkpoint.cancel()
          ...     is_cancelled != os.path.exists(path)
          True
        """
        return self._runs().cancel()

    def _runs(self) -> SaveRuns:
        return self.__dict__.setdefault("_self_runs", SaveRuns())

    @property
    def save_counter(self) -> int:
        """How many times `save` has been called, this checkpoint's past included."""
        return int(self._counter().value)

    @property
    def root(self) -> Any:
        """The root object, where one was given."""
        return self._root_object()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, saves on its own.
        own = ("_self_runs", "_self_unchanged")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    # --- the graph ---------------------------------------------------------------------

    def _counter(self) -> Variable:
        """The save counter, made on first use; a restored value may wait for it."""
        private = self.__dict__
        if private["_self_counter"] is None:
            root = self._root_object() if private["_self_rooted"] else None
            own = root._counter() if isinstance(root, Checkpoint) else _child(root, SAVE_COUNTER)
            if not isinstance(own, Variable):
                own = self.track(SAVE_COUNTER, _Counter(0))
            private["_self_counter"] = own
        return private["_self_counter"]

    def _trace(self, *, for_restore: bool = False, may_be_abstract: bool = False) -> LiveGraph:
        is_rooted = self.__dict__["_self_rooted"]
        return live_graph(
            self._root_object() if is_rooted else self,
            for_restore=for_restore,
            may_be_abstract=may_be_abstract,
            root_view=_RootedView(self) if is_rooted else None,
        )

    def _trace_for_restore(self) -> LiveGraph:
        return self._trace(for_restore=True)


class _Counter(Variable):
    """The save counter: a Python int in a box."""

    def __init__(self, value: int):
        self._value = value


def _child(obj: Any, label: Label) -> Any:
    view = view_of(obj)
    return dict(view.children(obj)).get(label) if view is not None else None


class _RootedView(ForwardingView):
    """A root object with the names that its Checkpoint attaches to it."""

    identity = True

    def __init__(self, checkpoint: Checkpoint):
        root = checkpoint._root_object()
        view = view_of(root)
        assert view is not None
        self.view = view
        self.container = view.container
        self.mutable = view.mutable
        self.has_program = view.has_program
        own = dict(view.children(root))
        children: dict[Label, Any] = {**checkpoint.trackable_children()}
        for name in own.keys() & children.keys():
            if delegate_of(own[name]) is not delegate_of(children[name]):
                raise ValueError(f"root.{name} already exists, as another object")
        self.own_names = own.keys()
        self.checkpoint = checkpoint

    def shown(self, obj: Any) -> tuple[View, Any]:
        return self.view, obj

    @property
    def attached(self) -> dict[Label, Any]:
        children = self.checkpoint.trackable_children()
        return {name: child for name, child in children.items() if name not in self.own_names}

    def children(self, obj: Any) -> Iterable[tuple[Label, Any]]:
        return [*super().children(obj), *self.attached.items()]

    def rebuild(self, obj: Any, changed: Mapping[Label, Any]) -> Any:
        names = self.attached.keys()
        attached: dict[Label, Any] = {
            label: child for label, child in changed.items() if label in names
        }
        replace_children(self.checkpoint, attached)
        own = {label: child for label, child in changed.items() if label not in attached}
        return super().rebuild(obj, own) if own else obj

    def awaiting(self, obj: Any) -> tuple[Any, ...]:
        return (*super().awaiting(obj), self.checkpoint)


def _unknown(name: str, value: Any) -> str:
    why = why_stateless(value)
    return (
        f"{name}={type(value).__qualname__}: nothing is known about how to save it; "
        f"{why and f'{why}; '}"
        "ckpt.register_view teaches the library new kinds"
    )


def _is_empty_container(root: Any) -> bool:
    return isinstance(root, list | tuple | dict) and not root


# --- bookkeeping -----------------------------------------------------------------------


class _Numbered:
    """A save that the save counter numbers, and that the state file names as the latest."""

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, options: CheckpointOptions, meeting: Meeting
    ):
        self._checkpoint, self._options, self._meeting = checkpoint, options, meeting
        self._number = checkpoint.save_counter + 1
        self._path = f"{prefix}-{self._number}"
        # Of now: the program may have gone elsewhere when it is committed.
        self._directory = resolved(os.path.dirname(self._path))
        self.series = self._directory, os.path.basename(prefix)

    def begin(self) -> SaveRequest:
        set_save_counter(self._checkpoint, self._number)
        return request_for(
            self._checkpoint, self._path, self._options, "Checkpoint.save", self._number
        )

    def record(self, is_overtaken: bool = False) -> None:
        if self._meeting.leads and not is_overtaken:
            latest = os.path.join(self._directory, os.path.basename(self._path))
            record_latest(self._directory, self.series[1], latest)

    def undo(self) -> None:
        take_back_count(self._checkpoint, self._number)

    def follow(self, count: int) -> None:
        set_save_counter(self._checkpoint, count)


def set_save_counter(checkpoint: Checkpoint, number: int) -> None:
    """Sets `save_counter`, whatever kind of variable holds it."""
    counter = checkpoint._counter()
    is_own = isinstance(counter, _Counter)
    counter._value = number if is_own else np.asarray(number, counter.dtype)


def take_back_count(checkpoint: Checkpoint, number: int) -> None:
    """Makes a save that has failed not count, unless another one has been counted since."""
    if checkpoint.save_counter == number:
        set_save_counter(checkpoint, number - 1)


def save_runs_of(checkpoint: Checkpoint) -> SaveRuns:
    """The saves of a checkpoint, for those who number and record them in another way."""
    return checkpoint._runs()


def request_for(
    checkpoint: Checkpoint,
    path: str,
    options: CheckpointOptions,
    verb: str,
    number: int | None = None,
    step: int | None = None,
) -> SaveRequest:
    """The request to save a checkpoint to `path`.

    Args:
      verb: the method that saves.
      number: of the checkpoint, if it has one. Then a warning says if nothing has changed since
        the save of a lower number.
      step: of the program, if it is known.
    """

    def trace() -> LiveGraph:
        live = checkpoint._trace()
        if number is not None:
            _warn_if_unchanged(checkpoint, live, path, number)
        return live

    count = None if number is None else checkpoint.save_counter
    return SaveRequest(path, trace, options, verb=verb, step=step, count=count)


def check_values(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Checks values that a save is given by name, before anything is done.

    Raises:
      TypeError: the checkpoint has no value of such a name.
      ValueError: nothing is known about how to save a value.
    """
    known = [str(name) for name in checkpoint.trackable_children() if name != SAVE_COUNTER]
    if unknown := [name for name in values if name not in known]:
        near = near_miss([found for name in unknown for found in nearest(name, known)])
        raise TypeError(
            f"a value is given for {', '.join(unknown)}, but the names of this checkpoint are "
            f"{', '.join(known) or 'none'}{near}. Give it the name first: "
            f"Checkpoint({unknown[0]}=...), or checkpoint.{unknown[0]} = ..."
        )
    for name, value in values.items():
        if not checkpoint._is_state(value):
            raise ValueError(_unknown(name, value))


def replace_values(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Assigns values that `check_values` has accepted; to be called when it is the save's turn."""
    for name, value in values.items():
        setattr(checkpoint, name, value)


def _warn_if_unchanged(checkpoint: Checkpoint, live: LiveGraph, path: str, number: int) -> None:
    unchanged = checkpoint.__dict__.setdefault("_self_unchanged", Unchanged())
    names = [local_name(label) for label in unchanged.names(live, number)]
    if not names:
        return
    own = {str(name) for name in checkpoint.trackable_children()}
    if replaceable := [name for name in names if name in own]:
        values = ", ".join(f"{name}={name}" for name in replaceable)
        what = (
            f"{path} holds the very arrays that were saved before it: nothing has replaced "
            f"{', '.join(f'checkpoint.{name}' for name in replaceable)} since. If training has "
            f"made new ones, pass them: checkpoint.save(prefix, {values}), or "
            f"manager.save(step, {values})."
        )
    else:
        what = (
            f"{path} holds the very arrays that were saved before it. The root of this checkpoint "
            "cannot be replaced: give the value a name, Checkpoint(state=state), and pass the new "
            "one to each save: checkpoint.save(prefix, state=state)."
        )
    _log.warning("%s This is said once.", what)
