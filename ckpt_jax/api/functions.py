"""Functions that run without their code: loaded from a checkpoint, and called.

`save_object(..., functions=...)` writes what `jax.export` makes of functions beside the graph, and
for each of them the values that it takes. `load_function` reads one function and its values;
`load_object` gives all functions of the object, which take the values that the object has when they
are called. Neither needs the classes or the functions of the program that saved them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_jax.api.signatures import Parts, array_like, decode, leaves_that_fit, put_together
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.dtypes import LossyConversionError, converted
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.graph.nodes import Attribute, ObjectGraph
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.saved_objects import FunctionRecord
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.match import match
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import METER
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import DEFAULT, Path
from ckpt_jax.report import ReportEntry, RestoreReport, near_miss, nearest
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.restoring.formulas import ANY_DTYPE
from ckpt_jax.restoring.rename import rename as renamed
from ckpt_jax.restoring.rules import Rule
from ckpt_jax.restoring.run import require_fit
from ckpt_jax.restoring.shardings import with_shardings
from ckpt_jax.values.leaves import encode

Seen = dict[int, tuple[Any, Mapping[Any, Any]]]
_GONE = object()  # stands for a value that is not there any more
_WINDOW = (
    "jax.export promises that an artifact can be read for 6 months after the release of JAX that "
    "wrote it, and by releases of JAX that are up to 3 weeks older than that"
)


class Weight(NamedTuple):
    """A value that a function takes.

    Attributes:
      path: of the value in its object.
      spec: what it is in the checkpoint.
      dtype: as the function takes it.
      others: its other paths, if several places of the object have this one value.
    """

    path: str
    spec: LeafSpec
    dtype: Any
    others: tuple[str, ...] = ()

    def can_be(self, found: LeafSpec) -> bool:
        """Whether another value can take its place. One that was cast when it was saved, on either
        side, counts as what it was before, too."""
        own = {self.spec.dtype, self.spec.cast_from or self.spec.dtype}
        has_dtype = found.dtype in {*own, ANY_DTYPE} or found.cast_from in own
        return has_dtype and found.shape == self.spec.shape


class LoadedFunction:
    """A function that was saved with `ckpt.save_object`.

    It is called with the arguments that the saved function takes after the object. Dicts, lists and
    tuples of arrays go in and come out; what was another class is a dict. Arrays with symbolic
    sizes may have any size there.

    Attributes:
      name: under which it was saved.
      signature: what it takes and returns, in words.
      platforms: that it was compiled for.
      weights: the paths of the values that it takes from the object.
      exported_by: the version of JAX that compiled it.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 2"), "float32")
      >>> functions = {"predict": (lambda obj, x: x @ obj["w"], spec)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     tree = {"w": jnp.ones((2, 1))}
      ...     path = ckpt.save_object(tree, f"{directory}/a", functions=functions)
      ...     predict = ckpt.load_function(path, "predict")
      >>> print(predict.signature)
      predict(x: float32[b, 2]) -> float32[b, 1]
      >>> predict(jnp.ones((3, 2))).tolist()
      [[2.0], [2.0], [2.0]]
    """

    def __init__(
        self,
        name: str,
        record: FunctionRecord,
        exported: jax.export.Exported,
        weights: Sequence[Weight],
        values: Callable[[], Sequence[Any]],
    ):
        self.name = name
        self.platforms = record.platforms
        self.exported_by = record.exported_by
        self.weights = tuple([weight.path for weight in weights])
        self._record, self._exported, self._weights = record, exported, tuple(weights)
        self._values = values
        self._arguments, self._names = decode(record.arguments)
        self._outputs, _ = decode(record.outputs)
        self._call = jax.jit(exported.call)

    def __repr__(self) -> str:
        return f"<LoadedFunction {self.signature}>"

    @cached_property
    def signature(self) -> str:
        """The arguments and results of the function, in words."""
        parts = self._arguments.parts if isinstance(self._arguments, Parts) else ()
        given = [f"{n}: {part}" for n, (_, part) in zip(self._names, parts, strict=True)]
        return f"{self.name}({', '.join(given)}) -> {self._outputs}"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Runs the function.

        Raises:
          TypeError: naming all arguments that do not have the signature, or all values that the
            object has now, but that are no such arrays any more.
          ValueError: it was not compiled for the present platform, or symbolic sizes differ.
        """
        leaves = self._checked(arguments, named)
        here = jax.export.default_export_platform()
        if here not in self.platforms:
            raise ValueError(
                f"the function {self.name!r} was compiled for {', '.join(self.platforms)}, and "
                f"this program runs on {here}. Save it again with "
                f"platforms={(*self.platforms, here)}."
            )
        values = [*zip(self._values(), self._weights, strict=True)]
        _require_shapes(self.signature, values)
        weights = [_as(value, weight.dtype) for value, weight in values]
        try:
            results = self._call(*weights, *leaves)
        except ValueError as error:  # of JAX, which need not say which function it is about
            given = ", ".join(map(str, map(array_like, leaves)))
            error.add_note(f"{self.signature} was called with {given}")
            raise
        return put_together(self._outputs, iter(results))

    def with_weights(
        self, source: Any, *, rename: Iterable[Rule] = (), sharding: Any = None
    ) -> LoadedFunction:
        """The same function with other values of the same object, such as newer ones.

        Values that were cast when they were saved (`CheckpointOptions.cast_on_save`) are cast back
        to the dtypes that the function takes, as `load_function` does, too.

        Args:
          source: the path of a checkpoint of any format, or an object or tree.
          rename: rules for a checkpoint with other names: `("model/**", "**")` if it is one of
            `Checkpoint(model=...)`. A `ckpt.Cast(dtype)` in them casts values of other dtypes.
          sharding: as for `load_function`.

        Raises:
          RestoreMismatchError: naming all values that are missing or have another shape or dtype.
        """
        if isinstance(source, str | bytes) or hasattr(source, "__fspath__"):
            with METER.restoring(lambda: CheckpointReader(source)) as reader:
                values = _values_of_checkpoint(reader, self._weights, rename, sharding)
        else:
            values = _values_of_object(source, self._weights)
        return self._with(lambda: values)

    def _with(self, values: Callable[[], Sequence[Any]]) -> LoadedFunction:
        return LoadedFunction(self.name, self._record, self._exported, self._weights, values)

    def _checked(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """The leaves of the arguments."""
        expected = self._arguments.parts if isinstance(self._arguments, Parts) else ()
        given = dict(zip(self._names, arguments, strict=False))
        odd = [name for name in named if name in given or name not in self._names]
        given.update(named)
        if len(arguments) > len(expected) or odd or given.keys() != {*self._names}:
            raise TypeError(
                f"{self.signature} was called with {len(arguments)} arguments"
                + (f" and {', '.join(named)}" if named else "")
            )
        problems: list[str] = []
        leaves = [
            leaf
            for name, (_, part) in zip(self._names, expected, strict=True)
            for leaf in leaves_that_fit(part, given[name], name, problems.append)
        ]
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise TypeError(f"{self.signature} was called with other arguments:\n{lines}")
        return leaves


def load_function(path: Path, name: str, *, sharding: Any = None) -> LoadedFunction:
    """Loads one function that `save_object` saved, with the values that it takes, and no others.

    No class and no function of the program that saved it has to be there.

    Args:
      path: of a checkpoint that `save_object` wrote.
      name: of the function.
      sharding: where its values are placed: one sharding, a function of (path, struct), or a tree,
        as for `ckpt.load`. By default they lie on the default device.

    Raises:
      KeyError: there is no function of that name; the message lists those that there are.
      CheckpointError: the checkpoint has no functions.
      UnsupportedFormatError: this version of JAX cannot read the function; says which can.
      CheckpointNotFoundError, CorruptCheckpointError.

    Source: `tf.saved_model.load(path).signatures[name]`.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> spec = jax.ShapeDtypeStruct((2,), "float32")
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save_object(
      ...         {"w": jnp.arange(2.0)}, f"{directory}/a",
      ...         functions={"scale": (lambda obj, x: obj["w"] * x, spec)})
      ...     scale = load_function(path, "scale")
      >>> scale(jnp.ones(2))
      Array([0., 1.], dtype=float32)
    """
    with METER.restoring(lambda: CheckpointReader(path)) as reader:
        records = reader.saved_functions
        if not records:
            raise CheckpointError(
                f"{reader.path} has no functions. ckpt.save_object(obj, path, functions={{name: "
                "(fn, *arg_specs)}) saves them with an object."
            )
        if name not in records:
            names = ", ".join(map(repr, records))
            hint = near_miss(nearest(name, [*records]))
            raise KeyError(f"{reader.path} has no function {name!r}{hint}. It has {names}.")
        exported = read_exported(reader, name)
        weights = _weights(reader, records[name], exported)
        values = _values_of_checkpoint(reader, weights, (), sharding)
        return LoadedFunction(name, records[name], exported, weights, lambda: values)


def functions_of(reader: CheckpointReader, root: Any) -> dict[str, LoadedFunction]:
    """The functions of an object that was made anew. They take the values that it has when they
    are called.

    Args:
      reader: of the checkpoint.
      root: the object.
    """
    if not reader.saved_functions:
        return {}
    live = live_graph(root)
    matched = match(reader.object_graph, live.graph)
    places: dict[int, list[_Place]] = {}  # of each saved node
    place_of = _places(live)
    for node, saved in sorted(matched.sources().items()):
        places.setdefault(saved, []).append(place_of(node))
    found: dict[str, LoadedFunction] = {}
    for name, record in reader.saved_functions.items():
        if lost := [node for node in record.inputs if node not in places]:
            paths = ", ".join([reader.object_graph.paths[node] for node in lost])
            raise CheckpointError(
                f"{reader.path}: the function {name!r} takes {paths}, which the object that was "
                "made anew does not have; load it with ckpt.load_function"
            )
        inputs = [places[node] for node in record.inputs]
        exported = read_exported(reader, name)
        weights = _weights(reader, record, exported)

        def values(inputs: Sequence[Sequence[_Place]] = inputs) -> list[Any]:
            seen: Seen = {}
            return [_the_value(each, seen) for each in inputs]

        found[name] = LoadedFunction(name, record, exported, weights, values)
    return found


def _the_value(places: Sequence[_Place], seen: Seen) -> Any:
    """The value that an object has at one place, or at several that have to agree."""
    first, *others = [(place.path, place.value(seen)) for place in places]
    if any([value is _GONE or isinstance(value, bytes) for _, value in (first, *others)]):
        return _GONE
    differing = [(path, value) for path, value in others if value is not first[1]]
    _require_equal("the object", [((first[0], path), first[1], value) for path, value in differing])
    return first[1]


def _places(live: LiveGraph) -> Callable[[int], _Place]:
    """A function that gives the place of a node."""
    parents = {
        child: (parent, label)
        for parent, entry in enumerate(live.graph.nodes)
        for label, child in reversed(entry.children)
    }

    def place_of(node: int) -> _Place:
        path, labels = live.graph.paths[node], list[Any]()
        while node and not live.views[node].mutable:
            node, label = parents[node]
            labels.append(label)
        return _Place(path, live.objects[node], labels[::-1])

    return place_of


class _Place:
    """Where an object holds a value: the nearest mutable object, and the labels from there on."""

    def __init__(self, path: str, start: Any, labels: Sequence[Any]):
        self.path, self.start, self.labels = path, start, tuple(labels)

    def value(self, seen: Seen) -> Any:
        """The value that is there now; `_GONE` if there is none.

        Args:
          seen: containers with their children, by identity: several places have them in common.
        """
        obj = self.start
        for label in self.labels:
            if id(obj) not in seen:
                view = view_of(obj)
                seen[id(obj)] = obj, {} if view is None else dict(view.children(obj))
            _, children = seen[id(obj)]
            if label not in children:
                return _GONE
            obj = children[label]
        view = view_of(obj)
        values = {} if view is None else view.values(obj)
        return encode(values[VARIABLE_VALUE]) if VARIABLE_VALUE in values else _GONE


def read_exported(reader: CheckpointReader, name: str) -> jax.export.Exported:
    """What `jax.export` made of a function.

    Raises:
      UnsupportedFormatError: this version of JAX cannot read it.
      CorruptCheckpointError: its record is damaged.
    """
    record = reader.saved_functions[name]
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    about = (
        f"{reader.path}: the function {name!r} was exported by {record.exported_by} (calling "
        f"convention {record.calling_convention})"
    )
    here = f"this is jax {jax.__version__}, which reads {oldest} to {newest}"
    if not oldest <= record.calling_convention <= newest:
        raise UnsupportedFormatError(
            f"{about}; {here}. {_WINDOW}. Export it again, or use a release of JAX in that window."
        )
    artifact = reader.artifact(name)
    try:
        for text in (record.arguments, record.outputs):
            decode(text)
    except ValueError as error:
        what = f"{reader.path}: the function {name!r}: {error}"
        raise CorruptCheckpointError(what, file=reader.path) from error
    try:
        return jax.export.deserialize(bytearray(artifact))
    except Exception as error:  # whatever JAX raises for what it cannot read
        raise UnsupportedFormatError(
            f"{about}, and cannot be read: {error}; {here}. {_WINDOW}. Export it again, or use a "
            "release of JAX in that window."
        ) from error


def _weights(
    reader: CheckpointReader, record: FunctionRecord, exported: jax.export.Exported
) -> list[Weight]:
    """The values that a function takes."""
    graph = reader.object_graph
    paths: dict[int, list[str]] = {node: [] for node in record.inputs}
    for path, (node, _) in _by_path(graph).items():
        if node in paths:
            paths[node].append(path)
    weights: list[Weight] = []
    for node, aval in zip(record.inputs, exported.in_avals, strict=False):
        (attribute, *_) = graph.nodes[node].attributes
        path = graph.value_path(node, attribute.name)
        others = tuple([other for other in paths[node] if other != path])
        weights.append(Weight(path, attribute.spec, aval.dtype, others))
    return weights


def _values_of_checkpoint(
    reader: CheckpointReader, weights: Sequence[Weight], rules: Iterable[Rule], sharding: Any
) -> list[Any]:
    """The values of weights in a checkpoint, placed."""
    saved = renamed(reader.graph_to_restore, rules)
    graph = saved.graph
    places = _by_path(graph)
    require_fit(
        RestoreReport(
            reader.path,
            mismatched=(*saved.problems, *_differences(weights, places)),
            missing=_missing(weights, places),
        ),
        "Nothing was read. Pass a checkpoint of the same object, or rename=[(saved, target), ...] "
        "for values that have other names, and (saved, target, ckpt.Cast(dtype)) for other dtypes.",
    )
    chosen = [places[weight.path] for weight in weights]
    structs = {
        (node, a.name): jax.ShapeDtypeStruct(a.spec.shape, weight.dtype)
        for (node, a), weight in zip(chosen, weights, strict=True)
    }
    placed, problems = (
        with_shardings(graph, structs, sharding) if sharding is not None else ({}, [])
    )
    wrong = tuple([ReportEntry(where, what=what) for where, what in problems])
    require_fit(RestoreReport(reader.path, mismatched=wrong), "Pass a sharding= that fits.")
    requests = {a.key: placed.get((node, a.name), structs[node, a.name]) for node, a in chosen}
    pairs = _pairs(weights, places)
    requests |= {two: requests[one] for _, one, two in pairs}
    derived = DerivedReader(reader, saved.derived)
    try:
        data = derived.read(requests, DEFAULT, lambda nbytes: None)
    except LossyConversionError as error:
        path = next((path for path, (_, a) in places.items() if a.key == error.key), "a weight")
        raise LossyConversionError(f"{reader.path}: {path}: {error}") from error
    _require_equal(reader.path, [(where, data[one], data[two]) for where, one, two in pairs])
    return [data[a.key] for _, a in chosen]


def _pairs(
    weights: Sequence[Weight], places: Mapping[str, tuple[int, Attribute]]
) -> list[tuple[tuple[str, str], str, str]]:
    """The values that are one in the function and two in a source: their paths, and their keys."""
    return [
        ((weight.path, other), one, two)
        for weight in weights
        for other in weight.others
        if other in places
        and (one := places[weight.path][1].key) != (two := places[other][1].key)
        and weight.can_be(places[other][1].spec)
    ]


def _require_equal(source: str, pairs: Iterable[tuple[tuple[str, str], Any, Any]]) -> None:
    """Raises RestoreMismatchError for pairs that differ; a function could take only one of each."""
    wrong = [
        ReportEntry(
            where[0],
            what=f"one value in the function, but two that differ in the source: {where[0]} and "
            f"{where[1]}",
        )
        for where, one, two in pairs
        if not bool(jnp.array_equal(one, two, equal_nan=True))
    ]
    require_fit(
        RestoreReport(source, mismatched=tuple(wrong)),
        "Save the function with an object in which they are arrays of their own.",
    )


def _by_path(graph: ObjectGraph) -> dict[str, tuple[int, Attribute]]:
    """All values by path; a shared one has several."""
    nodes = {a.key: node for node, a in graph.attributes()}
    tree = as_tree(slots_as_children(graph))
    found = {tree.value_path(node, a.name): (nodes[a.key], a) for node, a in tree.attributes()}
    return {
        **found,
        **{graph.value_path(node, a.name): (node, a) for node, a in graph.attributes()},
    }


def _missing(weights: Sequence[Weight], places: Mapping[str, object]) -> tuple[ReportEntry, ...]:
    return tuple(
        [
            ReportEntry(
                weight.path,
                expected=str(weight.spec),
                nearest=tuple(nearest(weight.path, [*places])),
            )
            for weight in weights
            if weight.path not in places
        ]
    )


def _differences(
    weights: Sequence[Weight], places: Mapping[str, tuple[int, Attribute]]
) -> Iterator[ReportEntry]:
    for weight in weights:
        if weight.path in places:
            found = places[weight.path][1].spec
            if not weight.can_be(found):
                spec = weight.spec
                what = f"expected {spec}, got {found}"
                yield ReportEntry(weight.path, str(spec), str(found), what)


def _values_of_object(source: Any, weights: Sequence[Weight]) -> list[Any]:
    """The values of weights in an object."""
    live = live_graph(source, for_restore=False)
    places = _by_path(live.graph)
    require_fit(
        RestoreReport(
            "the given object",
            mismatched=tuple(_differences(weights, places)),
            missing=_missing(weights, places),
        ),
        "Pass an object of the same structure.",
    )

    def value(node: int, attribute: Attribute, weight: Weight) -> Any:
        return _as(encode(live.values[node][attribute.name]), weight.dtype)

    _require_equal(
        "the given object",
        [
            ((weight.path, other), value(*places[weight.path], weight), value(*there, weight))
            for weight in weights
            for other in weight.others
            if (there := places.get(other)) is not None
            and there[0] != places[weight.path][0]
            and weight.can_be(there[1].spec)
        ],
    )
    return [value(*places[weight.path], weight) for weight in weights]


def _require_shapes(signature: str, values: Iterable[tuple[Any, Weight]]) -> None:
    """Raises TypeError for values that an object has got since, and that a function cannot take."""
    lines = [
        f"  {weight.path}: expected {weight.spec}, got {_outline(value)}"
        for value, weight in values
        if value is _GONE or np.shape(value) != weight.spec.shape
    ]
    if lines:
        listed = "\n".join(lines)
        raise TypeError(f"{signature} takes values that the object does not have now:\n{listed}")


def _outline(value: Any) -> str:
    if value is _GONE:
        return "no array"
    return str(array_like(value))


def _as(value: Any, dtype: Any) -> Any:
    """A weight as the artifact takes it."""
    if isinstance(value, jax.Array):
        return value if value.dtype == dtype else value.astype(dtype)
    return jnp.asarray(converted(np.asarray(value), np.dtype(dtype)))
