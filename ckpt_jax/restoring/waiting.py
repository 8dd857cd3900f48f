"""Restoration: one restore into mutable objects, finished or waiting.

It lives on while saved values wait for their objects. `attach` runs the stages of a restore
(`restoring.run`) for an object that appeared later. A restoration keeps no object of the program
alive.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ckpt_jax.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_jax.graph.labels import Label, canonical, escape, local_name
from ckpt_jax.graph.nodes import ObjectGraph, pretty_name, reachable
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import Match, extend, match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.delegate import delegate_of
from ckpt_jax.objects.pending import await_child
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.processes.context import Context
from ckpt_jax.processes.meeting import Meeting
from ckpt_jax.restoring.adapters import Matcher, ReshardCallback, adapt
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.identity import Bindings, Place, Places
from ckpt_jax.restoring.precedence import Rank
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.run import Demand, broadcast_meeting, plan_matched
from ckpt_jax.values import host

_log = logging.getLogger("ckpt_jax")
_MAX_LOGGED = 10


def log_conflicts(saved: ObjectGraph, found: Match) -> None:
    """Logs that a checkpoint and a program share objects in different ways."""
    if found.conflicts:
        first = found.conflicts[0]
        name = pretty_name(saved, first.saved)
        if first.bound_saved is not None:
            name = f"{pretty_name(saved, first.bound_saved)} and {name}, one object in the program"
        _log.warning(
            "Inconsistent references: the program shares objects in another way than the "
            "checkpoint (%d places, the first is %s); the first binding counts",
            len(found.conflicts),
            name,
        )


# Missing objects may appear later, and objects are shared as the program shares them.
_GROWING = Demand(
    "Nothing was read or changed. Pass objects that fit, rename=[(saved, target), ...] for values "
    "that moved (or to a path that the program lacks, for values that it should not take), or "
    "options=CheckpointOptions(cast=True) to convert dtypes.",
    missing=False,
    unexpected=False,
    conflicts=False,
)


class _LeftOver:
    """The values of a checkpoint that no object has taken yet.

    They are logged, as one record, when nothing is left that could take them or ask for them. So
    this object must not refer to the restoration.
    """

    def __init__(self, path: str, renamed: Renamed):
        self.path = path
        self.saved = renamed.graph
        self.nodes = {node for node, _ in self.saved.attributes()} - renamed.consumed
        self.is_expected = False

    def log(self) -> None:
        if self.nodes and not self.is_expected:
            names = [pretty_name(self.saved, node) for node in sorted(self.nodes)[:_MAX_LOGGED]]
            more = len(self.nodes) - len(names)
            _log.warning(
                "%d values of %s were never used: %s%s. If you expect this, call "
                "expect_partial() on the status that restore() returns.",
                len(self.nodes),
                self.path,
                ", ".join(names),
                f" and {more} more" if more else "",
            )


class Restoration:
    """One restore of a checkpoint into mutable objects, finished or waiting.

    Attributes:
      path: of the checkpoint.
      renamed: its object graph, under the names of the program.
      options: how to restore.
      nbytes: how many bytes it has read so far.
      left_over: the values that no object has taken yet.
    """

    def __init__(
        self,
        path: str,
        renamed: Renamed,
        options: CheckpointOptions,
        trace: Callable[[], LiveGraph],
        context: Context,
    ):
        """`trace` is a method of the object that is restored; it is not kept alive."""
        self.path = path
        self._location = path
        self.renamed = renamed
        self.options = options
        self._context = context
        self.nbytes = 0
        self.left_over = _LeftOver(path, renamed)
        weakref.finalize(self, self.left_over.log)  # at the interpreter's exit, too
        self._rank = Rank()
        self._bindings = Bindings()
        self._callbacks: Mapping[int, ReshardCallback] = {}  # by saved node
        self._reader: CheckpointReader | None = None  # for objects that appear later
        self._generation: Hashable = None  # of the checkpoint
        self._trace = weakref.WeakMethod(trace)
        self._open_slots = [
            slot for slot in renamed.graph.slots() if not options.skip_slot_variables
        ]

    @property
    def saved(self) -> ObjectGraph:
        """The saved object graph."""
        return self.renamed.graph

    def run(self, reader: CheckpointReader, meeting: Meeting | None = None) -> Any:
        """Restores into the objects that exist, and lets the rest wait; returns the root."""
        self._location, self._generation = reader.location, reader.generation
        try:
            live = self._traced()
            assert live is not None
            return self._bind(Places(live, self._root_place()), match, reader, meeting)
        except BaseException:
            self.left_over.is_expected = True  # the error says enough
            raise

    def attach(self, child: Any, saved: int, place: Place) -> Any:
        """Restores into an object that appeared, and for which the node `saved` has waited.

        Args:
          child: the object.
          saved: the saved node.
          place: of the object, if it is a value.

        Returns:
          The object to use: `child`, or a value that takes its place.
        """
        live = live_graph(child, self.saved.object_keys[saved])
        before = Match(self._bound_near(live, saved), {})

        def matcher(graph: ObjectGraph, live: ObjectGraph) -> Match:
            return extend(before, graph, live, [(saved, 0)])

        with self._reopened() as (reader, meeting):
            root = self._bind(Places(live, place), matcher, reader, meeting)
        return child if root is delegate_of(child) else root

    def attached(self) -> None:
        """Restores the slot variables whose optimizer and variable have both been met by now.

        One of the two has just appeared. Only a walk from the root finds the other one.
        """
        met = self._bindings.met
        ends = [slot for slot in self._open_slots if slot[0] in met and slot[1].variable in met]
        live = self._traced() if ends else None
        if live is None:
            return
        slots = [slot.node for _, slot in ends]

        def below(found: Match) -> list[int]:
            return [found.bound[node] for node in slots if node in found.bound]

        with self._reopened() as (reader, meeting):
            self._bind(Places(live, self._root_place()), match, reader, meeting, below)

    def appeared(self, parent: Any, label: Label) -> None:
        """Restores into a child whose name has a separator, from a file of global names. They are
        cut anew, as the objects of the program are named now."""
        live = self._traced() if self.saved.named else None
        if live is None:
            return
        nodes = [
            child
            for obj, node in zip(live.objects, live.graph.nodes, strict=True)
            if obj is parent
            for own, child in node.children
            if canonical(own) == label
        ]
        with self._reopened() as (reader, meeting):
            places = Places(live, self._root_place())
            self._bind(places, match, reader, meeting, lambda found: nodes)

    def _traced(self) -> LiveGraph | None:
        """The objects of the program, with the slot variables that its optimizers had to create;
        None if the root is gone."""
        trace = self._trace()
        if trace is None:
            return None
        live = trace()
        return trace() if self._create_slots(live) else live

    @contextmanager
    def _reopened(self) -> Iterator[tuple[CheckpointReader, Meeting | None]]:
        """Opens the checkpoint again, if it still is the one that the restore began with."""
        with (
            broadcast_meeting(self.path, self.options, self._context.processes) as meeting,
            self._unchanged_reader() as reader,
        ):
            yield reader, meeting

    @contextmanager
    def _unchanged_reader(self) -> Iterator[CheckpointReader]:
        """A reader of the checkpoint, which holds no open files between reads."""
        try:
            reader = self._reader or CheckpointReader(self._location, self._context.storage_of)
            reader.check_not_replaced()
            if reader.generation != self._generation:
                raise CheckpointNotFoundError(f"there is another checkpoint at {self._location}")
        except CheckpointNotFoundError as error:
            self._reader = None
            raise CheckpointNotFoundError(
                f"{self.path} was replaced or removed since it was restored; values of it that "
                "still wait are lost. Restore a checkpoint that is there, or keep this one until "
                "all objects exist."
            ) from error
        self._reader = reader
        try:
            yield reader
        except CorruptCheckpointError as error:
            reader.check_not_replaced(error)
            raise

    def _create_slots(self, live: LiveGraph) -> bool:
        """Asks optimizers that can make slot variables for those that they lack."""
        objects = zip(live.objects, live.views, strict=True)
        if not self._open_slots or not any(
            view.mutable and hasattr(obj, "create_slot") for obj, view in objects
        ):
            return False
        bound = match(self.saved, live.graph).bound
        created = False
        for optimizer, slot in self._open_slots:
            if slot.node in bound or not {optimizer, slot.variable} <= bound.keys():
                continue
            create = getattr(live.objects[bound[optimizer]], "create_slot", None)
            if create is not None:
                variable = live.objects[bound[slot.variable]]
                created = create(slot.name, variable) is not None or created
        return created

    def _bound_near(self, live: LiveGraph, root: int) -> dict[int, int]:
        """The bindings so far of the saved nodes below `root` and of the objects in `live`.

        They map to node ids of `live`; -1 stands for an object outside of it. No other bindings
        are looked at. Otherwise a program that appears part by part would take quadratic time.
        """
        bindings = self._bindings
        node_of = {id(obj): i for i, obj in enumerate(live.objects)}
        near = reachable(self.saved, [root])
        near.update([n for obj in live.objects if (n := bindings.node_of(obj)) is not None])
        return {
            saved: node_of.get(id(obj), -1)
            for saved in sorted(near)
            if (obj := bindings.first(saved)) is not None
        }

    @host.without_gc()
    def _bind(
        self,
        places: Places,
        matcher: Matcher,
        reader: CheckpointReader,
        meeting: Meeting | None,
        below: Callable[[Match], Sequence[int]] | None = None,
    ) -> Any:
        """Matches objects, restores into them, and lets the other values below them wait.

        Args:
          places: of the objects.
          matcher: matches the saved graph with the objects.
          reader: of the checkpoint.
          meeting: of `broadcast_meeting`.
          below: the live nodes to restore into, with all that is below them; by default the root.

        Returns:
          The root of the objects.
        """
        live = places.live
        adapted = adapt(self.renamed, live, matcher, reader, self._callbacks)
        saved, found = adapted.saved, adapted.found
        chosen = frozenset(range(len(places)))
        if below is not None:
            chosen = frozenset(reachable(live.graph, [*below(found)]))
        todo = chosen - self._rank.settled(places)
        planned = plan_matched(reader, saved, found, live, self.options, only=todo)
        planned.require(_GROWING)
        root, given = planned.execute(self.options, meeting, rank=self._rank, places=places)
        self.nbytes += planned.nbytes
        self.renamed, self._callbacks = saved, adapted.callbacks
        sources = found.sources()
        self.left_over.nodes -= planned.reads.used & {sources[node] for node in given}
        if below is None:
            log_conflicts(saved.graph, found)
        self._remember(places, found, chosen)
        return root

    def _remember(self, places: Places, found: Match, chosen: frozenset[int]) -> None:
        """Remembers the bindings of the chosen live nodes, and lets what they lack wait."""
        live, met = places.live, self._bindings.met
        met.update(found.bound)
        self._open_slots = [slot for slot in self._open_slots if slot[1].node not in met]
        for saved, node in [*found.bound.items(), *found.shared]:
            if node in chosen and live.views[node].mutable:
                self._bindings.bind(saved, live.objects[node], places.referable_above(node))
        for (parent, label), saved in found.frontier.items():
            if parent in chosen and self.saved.carries_values(saved):
                owner, path = places.of(parent)
                for trackable in live.awaiting(parent):
                    other = None if owner is trackable else owner
                    waiting = _Waiting(self, saved, other, path)
                    await_child(trackable, label, waiting)
                    self._rank.wait()
        if self._open_slots:
            self._rank.wait()

    def given_nodes(self, live: LiveGraph) -> frozenset[int]:
        """The nodes of the program's objects that have values of this restore or a later one."""
        return self._rank.settled(Places(live, self._root_place()))

    def _root_place(self) -> Place:
        """The place of the root, if it is a value: its `Checkpoint` owns it."""
        trace = self._trace()
        return getattr(trace, "__self__", None), ""


class _Waiting:
    """A saved node that waits for its object; see `objects.pending.Pending`.

    A copy of the parent waits, too. A pickle does not, because the restore belongs to this process.
    """

    def __init__(self, restoration: Restoration, saved: int, owner: Any, path: str):
        """`owner` and `path` are the place of the parent; the owner is None if it is the parent."""
        self.restoration = restoration
        self.saved = saved
        self._owner = None if owner is None else weakref.ref(owner)
        self._path = path

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        owner = parent if self._owner is None else self._owner()
        path = "/".join(filter(None, (self._path, escape(local_name(label)))))
        return self.restoration.attach(child, self.saved, (owner, path))

    def attached(self) -> None:
        self.restoration.attached()

    @property
    def appeared(self) -> Callable[[Any, Label], None]:
        return self.restoration.appeared

    def initial_value(self) -> LeafSpec | None:
        node = self.restoration.saved.nodes[self.saved]
        if len(node.attributes) == 1 and not node.children:
            return node.attributes[0].spec
        return None

    def __copy__(self) -> _Waiting:
        return self

    def __deepcopy__(self, memo: object) -> _Waiting:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pickled, (self.restoration.path,)


def _nothing(parent: Any, label: Label) -> None:
    pass


class _Pickled:
    """Takes the place of a `_Waiting` in a pickle of its parent."""

    def __init__(self, path: str):
        self.path = path

    def attach(self, parent: Any, label: Label, child: Any) -> Any:
        _log.warning(
            "%s.%s waited for values of %s when the object was pickled. The pickle does not have "
            "them: restore the checkpoint again.",
            *(type(parent).__qualname__, label, self.path),
        )
        return child

    def attached(self) -> None:
        pass

    @property
    def appeared(self) -> Callable[[Any, Label], None]:
        return _nothing

    def initial_value(self) -> None:
        return None
