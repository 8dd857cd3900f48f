"""Export and convert: checkpoints from and to the formats of other libraries.

export    values of a checkpoint or a tree, in the format of another library, one array at a time
convert   a checkpoint of any format, in the format of this library
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ckpt_jax.errors import UnsaveableError, UnsupportedFormatError
from ckpt_jax.graph.as_tree import as_tree
from ckpt_jax.graph.boxes import whole
from ckpt_jax.graph.dtypes import (
    LossyConversionError,
    converted,
    dtype_name,
    dtype_of,
)
from ckpt_jax.graph.labels import attribute_key
from ckpt_jax.graph.metadata import METADATA_KEY
from ckpt_jax.graph.metadata import encode as encode_metadata
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, has_values
from ckpt_jax.graph.patterns import Pattern, Selection, selects
from ckpt_jax.graph.plain_slots import slots_as_children
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.live import live_graph
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.metrics import METER
from ckpt_jax.objects.nested import OfSaver, nested
from ckpt_jax.objects.views import View
from ckpt_jax.options import DEFAULT, CheckpointOptions, Path, given
from ckpt_jax.processes.context import current_context
from ckpt_jax.progress import Advance, Wanted
from ckpt_jax.progress import progress as shown
from ckpt_jax.readers import Export, Extent, ExtentsReader, Format, Stored
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.restoring.formats import formats
from ckpt_jax.restoring.formats.names import graph_of_tree
from ckpt_jax.restoring.formulas import ANY_DTYPE
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.rename import rename as renamed
from ckpt_jax.restoring.rules import Rule
from ckpt_jax.restoring.run import require_fit
from ckpt_jax.saving.pipeline import SaveRequest
from ckpt_jax.saving.run import save_once
from ckpt_jax.store.batches import batches
from ckpt_jax.store.durable import fsync_directory, fsync_file, make_directories
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute, as_path, require_room
from ckpt_jax.store.presence import is_taken
from ckpt_jax.store.replacing import settle
from ckpt_jax.store.staging import discard, joined, staging_name
from ckpt_jax.values.host import transfers_allowed
from ckpt_jax.values.leaves import describe, encode

Cast = Any  # a dtype, or pairs of a pattern and a dtype
_ReadAll = Callable[[Iterable[str]], Iterator[np.ndarray | bytes]]
_TOGETHER_NBYTES = 2 << 20  # of small values that are read together
_RULES = "Nothing was written. Correct the rules; ckpt.load_checkpoint(path).paths() lists names."


@transfers_allowed()
def export(
    source: Any,
    destination: Path,
    *,
    format: str,
    rename: Iterable[Rule] = (),
    only: Selection | None = None,
    cast: Any = None,
    max_shard_nbytes: int = 5 << 30,
    progress: Wanted = None,
) -> str:
    """Writes values in the format of another library.

    One array is in memory at a time, and the destination gets its name when all is written. The
    metadata of a checkpoint go with it to Orbax (as `custom_metadata`) and to safetensors (in the
    header, as texts; of what is no text, the JSON). The other formats have no place for them.

    Args:
      source: the path of a checkpoint of any format, or a tree or object as `ckpt.save` takes it.
      destination: the path to create, in a file system.
      format: "safetensors" writes one file if the destination ends in ".safetensors", and
        otherwise a directory as transformers has it. "npz" writes one file. Names are the local
        joined with "." and "/". "orbax" writes a directory, or, if its name is that of a step
        (`run/300`), the step of a manager. "tensorflow" writes a checkpoint with its object graph,
        for `tf.train.Checkpoint.restore`; the destination is its prefix.
      rename: rules as for `ckpt.restore`, from the names in the source to those in the outcome.
        `ckpt.inverse` makes them of the rules by which such files are restored.
      only: which values of the source are written: a pattern, a list of patterns or a function
        of paths.
      cast: a dtype for all arrays of floats, or pairs (pattern, dtype) for arrays by the names in
        the outcome; the first pattern that matches counts.
      max_shard_nbytes: of one file, if the format has several.
      progress: a function `(done_bytes, total_bytes)`; True for a bar on a terminal.

    Returns:
      `destination`.

    Raises:
      FileExistsError: there is something at the destination.
      UnsaveableError: naming all values that the format cannot hold; nothing was written.
      UnsupportedFormatError: naming all values of the source that cannot be read.
      RestoreMismatchError: naming all rules that cannot be applied.
      ValueError: the format is not known or cannot be written, the destination lies in an object
        store, or two values get one name.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> tree = {"dense": {"kernel": np.arange(6.0).reshape(2, 3)}}
      >>> rules = [("dense/kernel", "dense/weight", ckpt.Transpose())]
      >>> with tempfile.TemporaryDirectory() as d:
      ...     path = export(
      ...         tree, f"{d}/a.safetensors", format="safetensors", rename=rules, cast="float32")
      ...     ckpt.load(path)["dense"]["weight"].dtype, ckpt.list_variables(path)
      (dtype('float32'), [('dense/weight', (3, 2))])
    """
    writer = _writer(format)
    destination = as_path(destination, "destination")
    path = absolute(destination)
    if is_url(path):
        raise ValueError(
            f"destination: expected a path in a file system, got {destination!r}. Export to a "
            "local path, and upload what is there with a tool for files, such as "
            "'gcloud storage cp -r' or 'aws s3 cp --recursive'."
        )
    if is_taken(path):
        raise FileExistsError(f"{destination} exists; export to another path, or remove it first")
    if type(max_shard_nbytes) is not int or max_shard_nbytes <= 0:
        raise ValueError(f"expected a positive max_shard_nbytes, got {max_shard_nbytes!r}")
    require_room(path, staging_name(path)[len(path) :])
    with _opened(source, nests=writer.nests) as reader:
        chosen = _chosen(reader, only)
        saved = _renamed(reader, chosen, rename)
        graph = _cast(_pruned(saved.graph, reader.object_graph, only), cast)
        _check(reader.path, graph)
        read = _reading(reader, saved, graph)
        make_directories(os.path.dirname(path))
        settle(path)
        staging = staging_name(path)
        with joined(staging):
            try:
                assert writer.write is not None  # `_writer` has looked
                inside = os.path.join(staging, os.path.basename(path))
                with shown(progress, f"exporting {destination}", _nbytes(graph)) as advance:
                    told = _telling(read, advance)
                    wanted = _export(path, graph, told, max_shard_nbytes, reader.metadata)
                    endings = writer.write(wanted, inside)
                _publish(inside, path, endings)
            finally:
                discard(staging)
    return destination


def _writer(name: str) -> Format:
    found = {format.name: format for format in reversed(formats()) if format.write}
    if name not in found:
        raise ValueError(f"expected one of the formats {', '.join(sorted(found))}, got {name!r}")
    return found[name]


# --- the source ------------------------------------------------------------------------


@contextmanager
def _opened(source: Any, *, nests: bool) -> Iterator[CheckpointReader]:
    """A reader of a checkpoint or of a tree; for `nests` see `readers.Format`."""
    if isinstance(source, str | bytes | os.PathLike):
        with METER.restoring(lambda: CheckpointReader(source)) as reader:
            yield reader
    else:
        given = _reader_of_tree(source) if nests else _reader_of(source)
        with CheckpointReader.over(given) as reader:
            yield reader


def _reader_of(source: Any) -> ExtentsReader:
    """A reader of values in memory. Arrays on devices are copied when they are asked for."""
    live = live_graph(source, for_restore=False)
    stored: dict[str, Stored] = {}
    remote: list[str] = []
    for node, attribute in live.graph.attributes():
        value = encode(live.values[node][attribute.name])
        if not _is_here(value):
            remote.append(live.graph.value_path(node, attribute.name))
        stored[attribute.key] = _stored(attribute.spec, value)
    _require_here(remote)
    return ExtentsReader("the given tree", stored, lambda: live.graph)


def _reader_of_tree(source: Any) -> ExtentsReader:
    """The same, with a graph of the containers that JAX sees."""
    values: dict[int, Any] = {}

    def stored_of(value: Any) -> Stored:
        if isinstance(value, OfSaver):
            note = f"only its registered saver ({value.name}) can read it"
            return Stored(LeafSpec("unreadable", "an object", note=note))
        spec, _ = describe(value)
        found = _stored(spec, encode(value))
        values[id(found)] = value
        return found

    try:
        stored, graph = graph_of_tree(nested(source), stored_of=stored_of)
    except TypeError as error:
        raise UnsaveableError(f"the tree cannot be exported: {error}") from error
    _require_here([key for key, each in stored.items() if not _is_here(values.get(id(each)))])
    return ExtentsReader("the given tree", stored, lambda: graph)


def _is_here(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def _require_here(remote: Sequence[str]) -> None:
    """Raises UnsaveableError for values of which parts lie on devices of other processes."""
    problems = [(path, "parts of it lie on devices of other processes") for path in remote]
    if problems:
        listed = "\n".join(f"  {path}: {what}" for path, what in problems)
        raise UnsaveableError(
            f"{len(problems)} arrays cannot be exported:\n{listed}\n"
            "Save the tree with ckpt.save on all processes, and export that checkpoint.",
            tuple(problems),
        )


def _stored(spec: LeafSpec, value: Any) -> Stored:
    extent = Extent(whole(spec.shape), "", 0)
    if isinstance(value, bytes):
        return Stored(spec, (extent,), len(value), value)

    def fill(buffer: memoryview) -> None:
        array = np.asarray(value).astype(dtype_of(spec.dtype), copy=False)
        np.frombuffer(buffer, array.dtype).reshape(spec.shape)[...] = array

    return Stored(spec, (extent,), value.nbytes, fill)


def _chosen(reader: CheckpointReader, only: Selection | None) -> ObjectGraph:
    """The graph with the chosen values alone.

    Raises:
      KeyError: there are none.
      UnsupportedFormatError: registered saver wrote some, which only they can read.
    """
    graph = reader.graph_to_restore
    tree = as_tree(slots_as_children(graph))
    chosen = selects(only)
    keys = {a.key for node, a in tree.attributes() if chosen(tree.value_path(node, a.name))}
    if not keys:
        what = "holds no values" if only is None else f"holds nothing that {only!r} selects"
        raise KeyError(f"{reader.path} {what}")
    savers = [
        f"{graph.paths[node]} ({entry.saver.name})"
        for node, entry in enumerate(graph.nodes)
        if entry.saver is not None and chosen(graph.paths[node])
    ]
    if savers:
        raise UnsupportedFormatError(
            f"{reader.path}: only their registered savers can read {', '.join(savers)}. "
            "ckpt.export(only=...) leaves them out; ckpt.copy copies all of a checkpoint."
        )
    nodes = [
        replace(node, attributes=tuple([a for a in node.attributes if a.key in keys]))
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def _renamed(reader: CheckpointReader, graph: ObjectGraph, rules: Iterable[Rule]) -> Renamed:
    """The graph under the names of the outcome.

    Raises:
      RestoreMismatchError: naming all rules that cannot be applied.
    """
    saved = renamed(graph, rules)
    without_dtype = [
        ReportEntry(
            saved.graph.value_path(node, a.name),
            what="Cast() has no target here that has a dtype; write Cast(dtype)",
        )
        for node, a in saved.graph.attributes()
        if a.key in saved.derived and a.spec.dtype == ANY_DTYPE
    ]
    problems = (*saved.problems, *without_dtype)
    require_fit(RestoreReport(reader.path, mismatched=problems), _RULES)
    return saved


def _pruned(graph: ObjectGraph, original: ObjectGraph, only: Selection | None) -> ObjectGraph:
    """The graph without containers of which nothing is left, because their values were not chosen
    or moved elsewhere. Those that were empty before are values in some formats, and stay."""
    chosen = selects(only)
    empty = {
        node
        for node, (entry, path) in enumerate(zip(original.nodes, original.paths, strict=True))
        if not (entry.children or entry.attributes or entry.slots or entry.saver) and chosen(path)
    }
    own = [bool(n.attributes or n.slots) or i in empty for i, n in enumerate(graph.nodes)]
    has = has_values(own, [node.children for node in graph.nodes])
    nodes = [
        replace(node, children=tuple([edge for edge in node.children if has[edge[1]]]))
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


# --- what is written -------------------------------------------------------------------


def _cast(graph: ObjectGraph, cast: Cast) -> ObjectGraph:
    """The graph, with the dtypes that arrays are to have.

    Raises:
      TypeError: `cast` is neither a dtype nor pairs.
      ValueError: there is no such dtype, or a pattern matches no array.
    """
    if cast is None:
        return graph
    is_for_floats = not isinstance(cast, tuple | list)
    wanted = (("**", cast),) if is_for_floats else cast
    pairs = _pairs(wanted)
    matched: set[int] = set()

    def changed(node: int, attribute: Attribute) -> Attribute:
        spec, path = attribute.spec, graph.value_path(node, attribute.name)
        is_float = spec.dtype.startswith(("float", "bfloat"))
        if not spec.is_array or spec.is_bytes or (is_for_floats and not is_float):
            return attribute
        number = next((number for number, (chosen, _) in enumerate(pairs) if chosen(path)), None)
        if number is None:
            return attribute
        matched.add(number)
        return replace(attribute, spec=replace(spec, dtype=pairs[number][1]))

    nodes = [
        replace(entry, attributes=tuple([changed(node, a) for a in entry.attributes]))
        for node, entry in enumerate(graph.nodes)
    ]
    unused = (
        []
        if is_for_floats
        else [cast[number][0] for number in range(len(pairs)) if number not in matched]
    )
    if unused:
        raise ValueError(f"cast: no array has a name that {unused} match")
    return replace(graph, nodes=tuple(nodes))


def _pairs(cast: Iterable[Any]) -> list[tuple[Callable[[str], bool], str]]:
    """For each pair of a pattern and a dtype, a test of paths and the name of the dtype."""
    found = []
    for pair in cast:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"cast: expected a dtype or pairs (pattern, dtype), got {pair!r}")
        pattern: Pattern = pair[0]
        try:
            dtype = dtype_name(np.dtype(pair[1]))
        except TypeError:
            raise TypeError(f"cast: expected a dtype for {pattern!r}, got {pair[1]!r}") from None
        found.append((selects(pattern), dtype))
    return found


def _check(path: str, graph: ObjectGraph) -> None:
    """Raises UnsupportedFormatError for values that the source lists but that cannot be read."""
    refused = [f"{a.key}: {a.spec.refusal}" for _, a in graph.attributes() if a.spec.is_unreadable]
    if refused:
        raise UnsupportedFormatError("\n  ".join([f"{path}: {refused[0]}", *refused[1:]]))


def _reading(reader: CheckpointReader, saved: Renamed, graph: ObjectGraph) -> _ReadAll:
    """A function that reads values by key, one after the other, but small ones together."""
    derived = DerivedReader(reader, saved.derived)
    specs = graph.by_key
    paths = {a.key: graph.value_path(node, a.name) for node, a in graph.attributes()}

    def as_wanted(key: str, value: np.ndarray | bytes) -> np.ndarray | bytes:
        if isinstance(value, bytes):
            return value
        try:
            value = converted(value, dtype_of(specs[key].dtype))
        except LossyConversionError as error:
            what = f"{paths[key]}: {error}. Choose another dtype to cast to"
            raise LossyConversionError(what) from None
        return np.ascontiguousarray(value).reshape(specs[key].shape)

    def read_all(keys: Iterable[str]) -> Iterator[np.ndarray | bytes]:
        for batch in batches(keys, derived.stored_nbytes, _TOGETHER_NBYTES):
            found = derived.read(dict.fromkeys(batch), DEFAULT, lambda nbytes: None)
            left = Counter(batch)  # a shared value is written at each of its places
            for key in batch:
                left[key] -= 1
                yield as_wanted(key, found[key] if left[key] else found.pop(key))

    return read_all


def _nbytes(graph: ObjectGraph) -> int:
    """The size of all arrays."""
    specs = [spec for spec in graph.by_key.values() if spec.dtype and not spec.is_bytes]
    return sum([math.prod(spec.shape) * dtype_of(spec.dtype).itemsize for spec in specs])


def _telling(read_all: _ReadAll, advance: Advance) -> _ReadAll:
    """The same function, which tells how many bytes of arrays it has read."""

    def told(keys: Iterable[str]) -> Iterator[np.ndarray | bytes]:
        for value in read_all(keys):
            if not isinstance(value, bytes):
                advance(value.nbytes)
            yield value

    return told


def _export(
    path: str,
    graph: ObjectGraph,
    read_all: _ReadAll,
    max_shard_nbytes: int,
    metadata: Mapping[str, Any],
) -> Export:
    def read(key: str) -> np.ndarray | bytes:
        return next(read_all([key]))

    return Export(path, graph, read, read_all, max_shard_nbytes, metadata)


def _publish(inside: str, path: str, endings: Iterable[str]) -> None:
    """Gives what was written its name, durably.

    Raises:
      FileExistsError: there is something of a name that it needs.
    """
    endings = tuple(endings)
    for ending in endings:
        for directory, _, files in os.walk(inside + ending):
            for file in files:
                fsync_file(os.path.join(directory, file))
            fsync_directory(directory)
        if os.path.isfile(inside + ending):
            fsync_file(inside + ending)
    for ending in endings:
        if is_taken(path + ending):
            raise FileExistsError(f"{path + ending} exists; nothing was written")
    for ending in endings:
        os.rename(inside + ending, path + ending)
    fsync_directory(os.path.dirname(path))


# --- the way in ------------------------------------------------------------------------


def convert(
    source: Path,
    destination: Path,
    *,
    rename: Iterable[Rule] = (),
    options: CheckpointOptions | None = None,
    overwrite: bool = False,
) -> str:
    """Saves a checkpoint of any format as one of this library.

    The object graph and the metadata are kept, or what the format has of them. Without rules, what
    `save_object` has saved stays that, with its functions. The memory has to hold all values.

    Args:
      source: the path of a checkpoint.
      destination: the directory to create.
      rename: rules as for `ckpt.restore`.
      options: how to save.
      overwrite: whether a checkpoint at `destination` is replaced.

    Returns:
      `destination`.

    Raises:
      FileExistsError: there is something at the destination that may not be replaced.
      UnsupportedFormatError: naming all values of the source that cannot be read.
      RestoreMismatchError: naming all rules that cannot be applied.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     np.savez(f"{directory}/a.npz", **{"dense/kernel": np.ones((2, 3))})
      ...     path = convert(f"{directory}/a.npz", f"{directory}/b", rename=[("dense/*", "*")])
      ...     ckpt.load(path)["kernel"].shape
      (2, 3)
    """
    options, destination, context = given(options), as_path(destination), current_context()
    if not overwrite and context.storage_of(destination).saved_at(destination) is not None:
        raise FileExistsError(
            f"{destination} exists; pass overwrite=True to replace the checkpoint"
        )
    with METER.restoring(lambda: CheckpointReader(source)) as reader:
        saved = _renamed(reader, _chosen(reader, None), rename)
        _check(reader.path, saved.graph)
        derived = DerivedReader(reader, saved.derived)
        keys = dict.fromkeys(saved.graph.by_key)
        live = _live(saved.graph, derived.read(keys, options, lambda nbytes: None))
        parts = {METADATA_KEY: encode_metadata(reader.metadata)} if reader.metadata else {}
        if saved.graph.nodes == reader.object_graph.nodes:  # what is said of them still holds
            parts |= reader.recipes()
    options = replace(options, enable_async=False)
    request = SaveRequest(
        destination, lambda: live, options, overwrite=overwrite, extra=lambda live: parts
    )
    return save_once(request, context)


def _live(graph: ObjectGraph, values: Mapping[str, Any]) -> LiveGraph:
    """A graph with values, under the keys that this library gives them."""
    nodes: list[Node] = []
    found: list[dict[str, Any]] = []
    for node, key in zip(graph.nodes, graph.object_keys, strict=True):
        found.append({a.name: values[a.key] for a in node.attributes})
        own = [replace(a, key=attribute_key(key, a.name), full_name="") for a in node.attributes]
        nodes.append(replace(node, attributes=tuple(own)))
    blank = (None,) * len(nodes)
    views = (View(),) * len(nodes)
    return LiveGraph(ObjectGraph(tuple(nodes), graph.object_keys), blank, views, tuple(found))
