"""Looking into checkpoints and programs, without restoring anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ckpt_jax.api.latest import latest_checkpoint
from ckpt_jax.graph.labels import Label
from ckpt_jax.graph.nodes import ObjectGraph, descendants
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import match
from ckpt_jax.matching.trace import trace
from ckpt_jax.objects.registry import saver_of
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import Path
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.restoring.waiting import log_conflicts
from ckpt_jax.store.directory import is_checkpoint
from ckpt_jax.store.looks import looking
from ckpt_jax.store.paths import absolute, as_path
from ckpt_jax.store.presence import is_directory
from ckpt_jax.values.leaves import describe


def load_checkpoint(path: Path) -> CheckpointReader:
    """Opens a checkpoint for reading values by their paths or keys.

    Args:
      path: of a checkpoint, or of a directory whose latest checkpoint is meant.

    Raises:
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.

    Source: `tf.train.load_checkpoint`.

    Example:
      >>> import ckpt_jax as ckpt, numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.arange(3)})
      ...     with load_checkpoint(path) as reader:
      ...         reader.paths(), reader.keys(), reader.get_tensor("w")
      (['w'], ['w/.ATTRIBUTES/VARIABLE_VALUE'], array([0, 1, 2]))
    """
    path = as_path(path)
    with looking(absolute(path)):
        is_one = is_checkpoint(path) or format_of(absolute(path)) is not None
        if not is_one and is_directory(path):
            path = latest_checkpoint(path) or path
        return CheckpointReader(path)


def list_variables(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """(path, shape) of every value in a checkpoint, sorted by path.

    Paths are what reports show, what `only=` and `rename=` match, and what `load_variable` takes. A
    value that several objects share is listed under each of its paths. What a registered saver has
    stored has no path; it is listed under its key. `load_checkpoint(path).keys()` lists all keys.

    Args:
      path: of a checkpoint, or of a directory whose latest checkpoint is meant.

    Source: `tf.train.list_variables`, which lists keys.

    Example:
      >>> import ckpt_jax as ckpt, numpy as np, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"params": {"w": np.zeros((2, 3))}, "step": 7})
      ...     list_variables(path)
      [('params/w', (2, 3)), ('step', ())]
    """
    with load_checkpoint(path) as reader:
        shapes = reader.get_variable_to_shape_map()
        keys = {name: reader.key_of(name) for name in reader.paths()}
        keys |= {key: key for key in shapes.keys() - keys.values()}
        return sorted([(name, shapes[key]) for name, key in keys.items() if key is not None])


def load_variable(path: Path, name: str) -> Any:
    """One value of a checkpoint.

    Args:
      path: of the checkpoint.
      name: the value's path (`params/w`, as `list_variables` has it) or its checkpoint key.

    Raises:
      KeyError: there is no such value; the message names the nearest.

    Source: `tf.train.load_variable`.
    """
    with load_checkpoint(path) as reader:
        return reader.get_tensor(name)


def object_metadata(path: Path) -> ObjectGraph:
    """The object graph of a checkpoint: plain data, which needs no device.

    `.nodes` and `.paths` run parallel. `.to_proto()` is the graph as a `TrackableObjectGraph`
    message, as TensorFlow's function of this name returns it.

    Source: TensorFlow's `object_metadata`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     graph = object_metadata(ckpt.save(f"{directory}/a", {"step": 7}))
      >>> graph.paths, graph.to_proto().nodes[0].children[0].local_name
      (('', 'step'), 'step')
    """
    with load_checkpoint(path) as reader:
        return reader.object_graph


def list_objects(root: Any) -> list[Any]:
    """Every object reachable from `root`, breadth first, then slot variables.

    Source: TensorFlow's `list_objects`.
    """
    return list(trace(root, describe, saver_of()).objects)


class TrackableView:
    """A program's object graph, seen from a root that it does not keep alive.

    Args:
      root: an object with a view, or a weak reference to one. What cannot be referred to weakly,
        such as a dict, is kept.

    Source: `tf.train.TrackableView`.
    """

    def __init__(self, root: Any):
        self._root: Callable[[], Any]
        if isinstance(root, weakref.ref):
            self._root = root
        elif type(root).__weakrefoffset__:
            self._root = weakref.ref(root)
        else:
            self._root = lambda: root

    @property
    def root(self) -> Any:
        """The root object.

        Raises:
          ReferenceError: it is gone.
        """
        root = self._root()
        if root is None:
            raise ReferenceError("the root of this view was garbage-collected")
        return root

    @classmethod
    def children(cls, obj: Any) -> dict[Label, Any]:
        """The children of an object by label."""
        view = view_of(obj)
        if view is None:
            raise ValueError(f"{type(obj).__qualname__} has no view")
        return dict(view.children(obj))

    def descendants(self) -> list[Any]:
        """The root and everything below it, breadth first."""
        return list_objects(self.root)


class CheckpointView:
    """A checkpoint's object graph, and how a program's objects match it.

    Args:
      path: of a checkpoint, or of a directory whose latest checkpoint is meant.

    Source: `tf.train.CheckpointView`.
    """

    def __init__(self, path: Path):
        self.object_graph = object_metadata(path)

    def children(self, node_id: int) -> dict[Label, int]:
        """The children of a node by label."""
        return dict(self.object_graph.nodes[node_id].children)

    def descendants(self) -> list[int]:
        """The ids of all nodes reachable from the root, breadth first."""
        return descendants(self.object_graph.nodes)

    def match(self, obj: Any) -> dict[int, Any]:
        """The object that each node would be restored into; nodes without one are left out."""
        live = live_graph(obj)
        found = match(self.object_graph, live.graph)
        log_conflicts(self.object_graph, found)
        return {saved: live.objects[node] for saved, node in found.bound.items()}

    def diff(self, obj: Any) -> tuple[dict[int, Any], list[int], list[Any]]:
        """(`match(obj)`, nodes that only the checkpoint has, objects that only the program has)."""
        live = live_graph(obj)
        found = match(self.object_graph, live.graph)
        matched = {saved: live.objects[node] for saved, node in found.bound.items()}
        only_saved = [node for node in self.descendants() if node not in matched]
        bound = set(found.bound.values())
        only_live = [x for node, x in enumerate(live.objects) if node not in bound]
        return matched, only_saved, only_live
