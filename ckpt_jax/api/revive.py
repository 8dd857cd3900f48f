"""Objects from a checkpoint alone: saved with what they are, made anew in a program without them.

`save_object` writes an ordinary checkpoint with one more entry, which says of each node of the
object graph what it is made anew as. `load_object` goes through it in four steps.

look up   the registered classes and savers; whatever is missing is named at once
make      objects, dependencies first: a registered class makes its own, anything else becomes a
          plain AutoTrackable, Variable, list, tuple, dict or value
connect   each object with its children, so that sharing and cycles are as they were
restore   the values that objects take in themselves, by an ordinary restore into what was made

Nothing is imported or unpickled: only classes that the program has registered run code, and
only those that the checkpoint names.

A Flax object, or another one from outside of this library, that a registered class makes
itself is kept and restored in place, as nothing in the checkpoint could make it as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage

from ckpt_jax.api.compiling import Functions, checked, checked_platforms, compiled
from ckpt_jax.api.functions import LoadedFunction, functions_of
from ckpt_jax.api.recipes import TYPE_NAME, lasting, recorded
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, RegistrationError
from ckpt_jax.graph.labels import SAVED_OBJECTS_KEY, Label, local_name, plain_keys
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, descendants
from ckpt_jax.graph.saved_objects import (
    CONTAINERS,
    DICT,
    LIST,
    OBJECT,
    VALUE,
    VARIABLE,
    CyclicDependencyError,
    SavedObject,
    encode,
    in_order,
    needs,
    with_plain_parts,
)
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import METER
from ckpt_jax.objects import registry
from ckpt_jax.objects.containers import Wrapper
from ckpt_jax.objects.python_state import PythonState
from ckpt_jax.objects.state import NoDependency
from ckpt_jax.objects.trackable import AutoTrackable, Trackable
from ckpt_jax.objects.variable import Variable
from ckpt_jax.objects.views import View, add_view, view_of
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.run import Demand, plan_matched, require_fit
from ckpt_jax.restoring.shardings import with_shardings
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import refuse_async, save_once
from ckpt_jax.store.paths import as_path
from ckpt_jax.store.seal import seal
from ckpt_jax.values.host import without_gc
from ckpt_jax.values.leaves import decode, struct_of

_DEMAND = Demand(
    "Nothing was restored. A class that changed since can read what it wrote in "
    "_deserialize_from_proto; ckpt.load reads the values without any class.",
    missing=False,
)


def save_object(
    obj: Any,
    path: Path,
    *,
    functions: Functions | None = None,
    platforms: Sequence[str] | None = None,
    options: CheckpointOptions | None = None,
    overwrite: bool = False,
) -> str:
    """Saves an object so that `load_object` can make it anew.

    The result is an ordinary checkpoint too: `ckpt.load`, `ckpt.restore` and `Checkpoint.read`
    take it.

    An object of a class registered with `ckpt.register_serializable` writes a protobuf message
    (`_serialize_to_proto`), and may name objects that have to exist before it can be made anew
    (`_deserialization_dependencies`); see `load_object` for the rest.

    Args:
      obj: a trackable, a pytree, a Flax object, or anything else with a view.
      path: the directory to create.
      functions: functions to run without the program's code, by name: (fn, *arg_specs), for
        `fn(obj, *args)`. The specs are arrays, `jax.ShapeDtypeStruct`s (their sizes may be those of
        `jax.export.symbolic_shape`), or pytrees of them. The arrays of `obj` are arguments of the
        function, which it takes from the checkpoint; numbers and strings in it are constants.
      platforms: that the functions are compiled for, such as ("cpu", "cuda", "tpu"); by default
        the present one.
      options: how. `enable_async` is refused: this verb saves in the foreground.
      overwrite: whether a checkpoint at `path` may be replaced (atomically).

    Returns:
      `path`.

    Raises:
      FileExistsError: `path` exists.
      UnsaveableError: naming every object that cannot be saved or made anew: one with values or
        slots of its own has to be of a registered class. Or naming every function that cannot be
        traced, or that holds arrays of its own. Nothing was written.
      ValueError: `options` has `enable_async`, or a platform is not known.

    Source: `tf.saved_model.save`, what it does for objects.

    Example:
      >>> import ckpt_jax as ckpt, jax.numpy as jnp, tempfile
      >>> model = ckpt.AutoTrackable()
      >>> model.layers = [ckpt.Variable(jnp.arange(2.0)), {"scale": jnp.float32(3)}]
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     anew = load_object(save_object(model, f"{directory}/a"))
      >>> anew.layers[0].value, anew.layers[1]["scale"].item()
      (Array([0., 1.], dtype=float32), 3.0)
    """
    options, wanted = given(options), checked(functions)
    built_for = checked_platforms(platforms)
    refuse_async("ckpt.save_object", options)

    def extra(live: LiveGraph) -> dict[str, bytes]:
        objects = recorded(live)
        records, artifacts = compiled(live, wanted, built_for)
        sealed = {key: seal(artifact) for key, artifact in artifacts.items()}
        return {SAVED_OBJECTS_KEY: seal(encode(live.graph, objects, records)), **sealed}

    request = SaveRequest(
        as_path(path),
        lambda: lasting(live_graph(obj, for_restore=False)),
        options,
        overwrite=overwrite,
        extra=extra,
        verb="ckpt.save_object",
    )
    return save_once(request, current_context())


@without_gc()
def load_object(path: Path, *, sharding: Any = None) -> Any:
    """Makes the object anew that `save_object` saved, with all its values.

    A registered class makes its objects: `_deserialize_from_proto(proto=, dependencies=)`, or
    the class without arguments where it has none (a namedtuple or dataclass is called with its
    fields, a variable with its value). Then `_add_trackable_child(name, value)` gives it its
    children, and its own values are restored.

    Everything else is made of plain parts. Trackables and Flax modules become `AutoTrackable`s,
    boxes `Variable`s. Lists, tuples, dicts, arrays, scalars and typed keys become what they
    were, on the default device; namedtuples, dataclasses and pytrees of other kinds become
    dicts, as `ckpt.load` gives them. The members of enums become members if the program has
    imported their class, and otherwise strings or numbers. Functions and other parts of modules
    that are no state become None, in their places.

    A value that the save has cast (`CheckpointOptions.cast_on_save`) gets its earlier dtype back if
    it goes into an object that a registered class makes. Everywhere else it stays as it is stored.

    If functions were saved with the object, it has them by name in its attribute `functions`. They
    take the values that the object has when they are called. (A child that is called `functions`
    keeps its name, and an array of numpy has no attributes; then `ckpt.load_function` loads them.)

    Args:
      path: of a checkpoint that `save_object` wrote.
      sharding: where arrays are placed: one sharding, a function of (path, struct), or a tree, as
        for `ckpt.load`. By default they lie on the default device, or where the object that a
        registered class makes wants them.

    Raises:
      RegistrationError: naming every class and every saver of the checkpoint that the program
        has not registered. Nothing was made.
      RestoreMismatchError: values without a place in what the registered classes made.
      CheckpointError: the checkpoint was written by `ckpt.save` or a `Checkpoint`.
      CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError.

    Source: `tf.saved_model.load`, what it does for objects.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> from google.protobuf.wrappers_pb2 import StringValue
      >>> with ckpt.registration_scope(), tempfile.TemporaryDirectory() as directory:
      ...     @ckpt.register_serializable()
      ...     class Model(ckpt.AutoTrackable):
      ...         def __init__(self, name): self.name = name
      ...         def _serialize_to_proto(self, **kwargs): return StringValue(value=self.name)
      ...         @classmethod
      ...         def _deserialize_from_proto(cls, proto, **kwargs):
      ...             proto.Unpack(name := StringValue())
      ...             return cls(name.value)
      ...     load_object(save_object(Model("a"), f"{directory}/a")).name
      'a'
    """
    with METER.restoring(lambda: CheckpointReader(path)) as reader:
        graph, objects = reader.object_graph, reader.saved_objects
        if objects is None:
            raise CheckpointError(
                f"{reader.path} does not say how to make its objects anew: it was written by "
                "ckpt.save or a Checkpoint, not by ckpt.save_object. Read its values with "
                "ckpt.load, or restore them into objects with ckpt.restore or Checkpoint.restore."
            )
        _check_registered(graph, objects, reader.path)
        root = _Revival(reader, graph, objects, sharding).run()
        if not reader.saved_functions:
            return root
        root = _WITH_FUNCTIONS.get(type(root), lambda root: root)(root)
        return _with_functions(root, functions_of(reader, root))


def _with_functions(root: Any, functions: dict[str, LoadedFunction]) -> Any:
    """The object, with functions as its attribute, if it can have one."""
    if not hasattr(root, "functions"):
        tracks = issubclass(type(root), AutoTrackable)  # what is assigned to its attributes
        with contextlib.suppress(AttributeError):  # of an array of numpy, a number, a text
            root.functions = NoDependency(functions) if tracks else functions
    return root


class _Dict(dict[Any, Any]):
    """A dict that has functions as an attribute; for JAX, it is a plain one."""


class _List(list[Any]):
    """A list that has functions as an attribute; for JAX, it is a plain one."""


class _Tuple(tuple[Any, ...]):
    """A tuple that has functions as an attribute; for JAX, it is a plain one."""


_WITH_FUNCTIONS: dict[type, Any] = {dict: _Dict, list: _List, tuple: _Tuple}


def _as_plain(kind: type, plain: type) -> None:
    """Lets JAX take apart objects of a kind, and put together plain ones."""

    def parts(obj: Any) -> tuple[list[Any], Any]:
        if plain is not dict:
            return [(jax.tree_util.SequenceKey(i), part) for i, part in enumerate(obj)], None
        keys = tuple(sorted(obj))
        return [(jax.tree_util.DictKey(key), obj[key]) for key in keys], keys

    def whole(keys: Any, parts: Iterable[Any]) -> Any:
        return plain(parts) if plain is not dict else dict(zip(keys, parts, strict=True))

    jax.tree_util.register_pytree_with_keys(kind, parts, whole)
    view = view_of(plain())
    assert view is not None
    add_view(kind, view)


for _plain, _kind in _WITH_FUNCTIONS.items():
    _as_plain(_kind, _plain)


def _check_registered(graph: ObjectGraph, objects: Iterable[SavedObject], path: str) -> None:
    """Names every class and saver that the program lacks."""
    missing: dict[str, list[str]] = {}
    for node, (entry, saved) in enumerate(zip(graph.nodes, objects, strict=True)):
        name = saved.registered_name
        if name and registry.registered_class(name) is None:
            missing.setdefault(f"class {name!r}", []).append(graph.paths[node])
        if entry.saver and not registry.has_saver(entry.saver.name):
            what = f"checkpoint saver {entry.saver.name!r}"
            missing.setdefault(what, []).append(graph.paths[node])
    if missing:
        lines = "\n".join(
            f"  {what}, needed for {paths[0] or '(root)'}"
            + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
            for what, paths in missing.items()
        )
        raise RegistrationError(
            f"{path} cannot be made anew, {len(missing)} registrations cannot be found:\n{lines}\n"
            "Import the modules that register them first, or read the values with ckpt.load. Saved "
            "functions run without them: ckpt.load_function."
        )


class _Revival:
    """One load. `made` is the object of each node as far as there is one."""

    def __init__(
        self,
        reader: CheckpointReader,
        graph: ObjectGraph,
        objects: tuple[SavedObject, ...],
        sharding: Any,
    ):
        self.reader, self.graph, self.objects = reader, graph, objects
        self.options = replace(DEFAULT, shardings=sharding)
        self.made: dict[int, Any] = {}
        self.values: dict[int, Any] = {}  # of nodes that are made with them
        self.adopted: set[int] = set()  # nodes whose object a registered class has made

    def run(self) -> Any:
        nodes, early = self.closure()
        try:
            order = in_order(self.graph, self.objects, sorted(nodes))
        except CyclicDependencyError as error:
            raise self.corrupt(error) from error
        self.read(nodes, early)
        for node in order:
            if self.objects[node].registered_name:
                self.make(node)
                self.adopt(node)
            elif node in early and node not in self.made:
                self.make(node)
        for node in order:
            if node not in self.made:
                self.make(node)
        for node in order:
            if self.objects[node].kind == OBJECT or node in self.adopted:
                self.connect(node)
        return self.restore()

    def closure(self) -> tuple[set[int], set[int]]:
        """All nodes to make, and those of them that a registered class needs beforehand."""
        every: set[int] = set()
        todo = {*descendants(self.graph.nodes)}
        while todo:
            every |= todo
            further = [n for node in todo for _, n in self.objects[node].dependencies]
            todo = {*descendants(self.graph.nodes, further)} - every
        registered = [node for node in every if self.objects[node].registered_name]
        first = [n for node in registered for n in needs(self.graph, self.objects, node)]
        return every, {*descendants(self.graph.nodes, first)}

    # --- make --------------------------------------------------------------------------

    def read(self, nodes: set[int], early: set[int]) -> None:
        """Makes the values, and notes those of the variables that are made with theirs.

        The other variables begin abstract, so that an array that goes into an object which a
        class makes is read once, and placed where that object wants it.
        """
        requests: dict[str, Any] = {}
        wanted: dict[int, Attribute] = {}
        for node in sorted(nodes):
            kind, attributes = self.objects[node].kind, self.graph.nodes[node].attributes
            if kind not in (VALUE, VARIABLE) or not attributes:
                continue
            (attribute,) = attributes
            spec = attribute.spec
            if kind == VARIABLE and spec.is_jax_array and node not in early:
                continue
            wanted[node] = attribute
            requests[attribute.key] = struct_of(spec) if spec.is_placed else None
        requests |= self.placements(wanted)
        data = self.reader.read(requests)
        for node, attribute in wanted.items():
            spec = attribute.spec
            try:
                self.values[node] = decode(data[attribute.key], spec, spec)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise self.corrupt(error, attribute.key) from error

    def placements(self, wanted: Mapping[int, Attribute]) -> dict[str, jax.ShapeDtypeStruct]:
        """The values that a caller wants on devices of their choice, by key."""
        sharding = self.options.shardings
        structs = {
            (node, a.name): struct_of(a.spec) for node, a in wanted.items() if a.spec.is_placed
        }
        if sharding is None or not structs:
            return {}
        found, problems = with_shardings(self.graph, structs, sharding)
        entries = tuple([ReportEntry(where, what=what) for where, what in problems])
        report = RestoreReport(self.reader.path, mismatched=entries)
        require_fit(report, "Nothing was made. Pass a sharding= that fits.")
        return {wanted[node].key: struct for (node, _), struct in found.items()}

    def make(self, node: int) -> None:
        saved, entry = self.objects[node], self.graph.nodes[node]
        if saved.registered_name:
            self.made[node] = self.make_registered(node)
            return
        match saved.kind:
            case "value":
                self.made[node] = self.initial(node)
            case "variable":
                self.made[node] = _box(self.initial(node))
            case "object":
                self.made[node] = AutoTrackable()
            case "none":
                self.made[node] = None
            case _:
                parts = with_plain_parts(saved, self.parts(node).items())
                self.made[node] = _container(saved.kind, dict(parts))
        if saved.kind in (VARIABLE, OBJECT) and not _is_own(entry.type_name, self.made[node]):
            self.made[node].__dict__[TYPE_NAME] = entry.type_name

    def initial(self, node: int) -> Any:
        """The value of a leaf, or what stands for it until it is restored."""
        if node in self.values:
            return self.values[node]
        attributes = self.graph.nodes[node].attributes
        spec = self.objects[node].spec if not attributes else attributes[0].spec
        assert spec is not None
        try:
            struct = struct_of(spec)
        except (TypeError, ValueError) as error:
            raise self.corrupt(error) from error
        if spec.is_jax_array:
            return struct
        return np.broadcast_to(np.zeros((), struct.dtype), spec.shape)  # takes no memory

    def make_registered(self, node: int) -> Any:
        saved, path = self.objects[node], self.graph.paths[node] or "(root)"
        cls = registry.registered_class(saved.registered_name)
        assert cls is not None
        parts = self.parts(node) if saved.kind in CONTAINERS else {}
        with _noting(f"while making {path} anew as {saved.registered_name!r}"):
            from_proto = getattr(cls, "_deserialize_from_proto", None)
            if from_proto is not None:
                dependencies = {name: self.made[n] for name, n in saved.dependencies}
                proto = saved.message if saved.message is not None else AnyMessage()
                obj = from_proto(proto=proto, dependencies=dependencies)
            elif saved.kind == VARIABLE:
                obj = cls(self.initial(node))
            else:
                obj = _construct(cls, parts)
            view = view_of(obj)
            if view is None or obj is None:
                raise RegistrationError(
                    f"{path}: the class {saved.registered_name!r} made {obj!r}, which has no state"
                )
            if saved.kind in CONTAINERS:
                changed = _differing(view, obj, parts)
                obj = view.rebuild(obj, changed) if changed else obj
        self.values.pop(node, None)  # the class may have done anything with its value
        return obj

    def parts(self, node: int) -> dict[Label, Any]:
        return {label: self.made[child] for label, child in self.graph.nodes[node].children}

    def adopt(self, node: int) -> None:
        """Keeps the objects from outside of this library that a registered class has made."""
        todo = [(node, self.made[node])]
        seen = {node}
        while todo:
            parent, obj = todo.pop()
            view = view_of(obj)
            own = dict(view.children(obj)) if view is not None else {}
            for label, child in self.graph.nodes[parent].children:
                mine = own.get(label)
                view = view_of(mine)
                if mine is None or view is None or child in seen or child in self.made:
                    continue
                seen.add(child)
                if self.objects[child].registered_name or isinstance(mine, _OURS):
                    continue
                if view.mutable and not isinstance(mine, Wrapper):  # a list is made with its parts
                    self.made[child] = mine
                    self.adopted.add(child)
                    self.values.pop(child, None)
                todo.append((child, mine))

    # --- connect -----------------------------------------------------------------------

    def connect(self, node: int) -> None:
        obj = self.made[node]
        parts = self.parts(node)
        with _noting(f"while giving {self.graph.paths[node] or '(root)'} its children"):
            if isinstance(obj, Trackable):
                for label, child in parts.items():
                    obj._add_trackable_child(str(label), child)
                return
            view = view_of(obj)
            assert view is not None
            changed = _differing(view, obj, parts)
            if changed and view.rebuild(obj, changed) is not obj:
                raise RegistrationError(
                    f"{type(obj).__qualname__} was mutable when it was saved; now it is not"
                )

    # --- restore -----------------------------------------------------------------------

    def restore(self) -> Any:
        """Restores whatever was not made with its values; returns the root."""
        live = live_graph(self.made[0])
        found = match(self.graph, live.graph)
        placed = {
            node: saved
            for node, saved in found.sources().items()
            if saved in self.values and live.objects[node] is self.made[saved]
        }
        only = frozenset(range(len(live.objects))) - placed.keys()
        saved = Renamed(self.graph)
        planned = plan_matched(
            self.reader, saved, found, live, self.options, only=only, casts_back=True
        )
        done = planned.reads.used | set(placed.values())
        lost = [
            ReportEntry(self.graph.paths[node] or "(root)", found=found_there)
            for node, entry in enumerate(self.graph.nodes)
            if node not in done and (found_there := _values_of(entry))
        ]
        planned.with_unexpected(lost).require(_DEMAND)
        root, _ = planned.execute(self.options)
        self.check_complete(root)
        return root

    def check_complete(self, root: Any) -> None:
        """Raises where a registered saver was to replace an abstract value and did not."""
        if not any(saved.spec for saved in self.objects):
            return
        live = live_graph(root)
        left = [
            live.graph.paths[node] or "(root)"
            for node, obj in enumerate(live.objects)
            if isinstance(obj._value if isinstance(obj, Variable) else obj, jax.ShapeDtypeStruct)
        ]
        if left:
            raise RegistrationError(
                f"restore_fn of a checkpoint saver left these without a value: {', '.join(left)}; "
                "it has to assign one, or to return one by name"
            )

    def corrupt(self, error: Exception, key: str = SAVED_OBJECTS_KEY) -> CorruptCheckpointError:
        path = self.reader.path
        return CorruptCheckpointError(f"{path}: {key}: {error}", file=path, key=key)


_OURS = (Trackable, Variable, PythonState)


def _values_of(node: Node) -> str:
    """The values of a node in words; "" for none."""
    if node.saver is not None:
        return f"saver {node.saver.name}"
    return ", ".join(str(attribute.spec) for attribute in node.attributes)


def _box(value: Any) -> Variable:
    """A variable that holds exactly this value, a Python number included."""
    box = Variable.__new__(Variable)
    box._value = value
    return box


def _container(kind: str, parts: Mapping[Label, Any]) -> Any:
    if kind == DICT:
        # The values are found again by the text of a key, or by the key itself.
        keys = zip(parts, plain_keys(list(parts)), strict=True)
        return {
            plain if local_name(plain) == local_name(label) else label: parts[label]
            for label, plain in keys
        }
    return list(parts.values()) if kind == LIST else tuple(parts.values())


def _construct(cls: type, parts: Mapping[Label, Any]) -> Any:
    """An object of a registered class that does not say how it is made."""
    if hasattr(cls, "_fields") or (parts and dataclasses.is_dataclass(cls)):
        return cls(**{str(label): part for label, part in parts.items()})
    if issubclass(cls, list | tuple):
        return cls(parts.values())
    return cls()


def _differing(view: View, obj: Any, parts: Mapping[Label, Any]) -> dict[Label, Any]:
    """The parts that an object does not have yet."""
    own = dict(view.children(obj))
    nothing = object()
    return {label: part for label, part in parts.items() if own.get(label, nothing) is not part}


def _is_own(type_name: str, obj: Any) -> bool:
    """Whether a saved type name is that of `obj`."""
    return type_name == f"{type(obj).__module__}.{type(obj).__qualname__}"


@contextlib.contextmanager
def _noting(what: str) -> Iterator[None]:
    """Says of an error of a user's class where it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
