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

from ckpt_jax.api.signatures import Parts, array_like, decode, leaves_that_fit, put_together
from ckpt_jax.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.as_tree import as_tree
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
    """

    path: str
    spec: LeafSpec
    dtype: Any

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
          TypeError: naming all arguments that do not have the signature.
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
        weights = [
            _as(value, weight.dtype)
            for value, weight in zip(self._values(), self._weights, strict=True)
        ]
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
    bound = match(reader.object_graph, live.graph).bound
    found: dict[str, LoadedFunction] = {}
    for name, record in reader.saved_functions.items():
        if lost := [node for node in record.inputs if bound.get(node, -1) < 0]:
            paths = ", ".join([reader.object_graph.paths[node] for node in lost])
            raise CheckpointError(
                f"{reader.path}: the function {name!r} takes {paths}, which the object that was "
                "made anew does not have; load it with ckpt.load_function"
            )
        places = [_Place.of(live, bound[node]) for node in record.inputs]
        exported = read_exported(reader, name)
        weights = _weights(reader, record, exported)

        def values(places: Sequence[_Place] = places) -> list[Any]:
            return [place.value() for place in places]

        found[name] = LoadedFunction(name, record, exported, weights, values)
    return found


class _Place:
    """Where an object holds a value: the nearest mutable object, and the labels from there on."""

    def __init__(self, start: Any, labels: Sequence[Any]):
        self.start, self.labels = start, tuple(labels)

    @staticmethod
    def of(live: LiveGraph, node: int) -> _Place:
        parents = {
            child: (parent, label)
            for parent, entry in enumerate(live.graph.nodes)
            for label, child in reversed(entry.children)
        }
        labels: list[Any] = []
        while node and not live.views[node].mutable:
            node, label = parents[node]
            labels.append(label)
        return _Place(live.objects[node], labels[::-1])

    def value(self) -> Any:
        """The value that is there now."""
        obj = self.start
        for label in self.labels:
            view = view_of(obj)
            assert view is not None
            obj = dict(view.children(obj))[label]
        view = view_of(obj)
        return encode(obj if view is None else view.values(obj)[VARIABLE_VALUE])


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
    found = [(node, graph.nodes[node].attributes[0]) for node in record.inputs]
    return [
        Weight(graph.value_path(node, a.name), a.spec, aval.dtype)
        for (node, a), aval in zip(found, exported.in_avals, strict=False)
    ]


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
    derived = DerivedReader(reader, saved.derived)
    data = derived.read(requests, DEFAULT, lambda nbytes: None)
    return [data[a.key] for _, a in chosen]


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
    found: list[Any] = []
    for weight in weights:
        node, attribute = places[weight.path]
        found.append(_as(encode(live.values[node][attribute.name]), weight.dtype))
    return found


def _as(value: Any, dtype: Any) -> Any:
    """A weight as the artifact takes it."""
    if isinstance(value, jax.Array) and value.dtype == dtype:
        return value
    return jnp.asarray(value, dtype)
