"""What Orbax's directories say of themselves: which trees they hold, and where the leaves lie.

An *item* is a directory with one tree, or with one JSON document. A *step directory* has a folder
for each of its items; the tree of a step has the names of the items at its top. If a step has only
one item, under the name that Orbax gives to it if the program gives none, its tree is that item's.

The file `_METADATA` of an item lists the paths of its leaves, with the type of each key and of each
value. An array has its path joined with "." for a name. Strings lie in `_strings.json`. The
implementations of PRNG keys are named in `array_metadatas/*`. Until version 0.4.8 there was also a
file `checkpoint`, the whole tree in msgpack, in which a text stands for each array that lies
elsewhere; version 0.2 had nothing but this file.

Nothing here opens an array.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.labels import Label
from ckpt_jax.readers import Files
from ckpt_jax.restoring.formats.msgpack import tree_in
from ckpt_jax.store.files import read_file

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
AGGREGATE = "checkpoint"
_STEP_METADATA = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_STRINGS = "_strings.json"
_ARRAY_METADATAS = "array_metadatas"
_PROCESS = "ocdbt.process_"
_TEMPORARY = ".orbax-checkpoint-tmp"
_JSON = "metadata"
_METRICS = "metrics"  # folder and file of a manager's metrics, which belong to no program
_UNNAMED = {False: ("default",), True: ("pytree", "state")}  # by whether it is version 1
_PLACEHOLDER = "PLACEHOLDER://"

_MAX_DEPTH = 200  # of a tree
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_EMPTY = {
    "None": "none",
    "NamedTuple": "none",  # Orbax restores it as None, too
    "Dict": "dict",
    "List": "list",
    "Tuple": "tuple",
}

Path = tuple[Label, ...]  # of a leaf: positions are integers, everything else is text


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies.

    Attributes:
      item: its item.
      name: in the item.
      kind: what it was: "jax.Array", "np.ndarray" or "scalar".
      prng_impl: the implementation of the PRNG keys of which it is the data; "" if of none.
    """

    item: Item
    name: str
    kind: str
    prng_impl: str = ""


@dataclass(frozen=True, slots=True)
class Empty:
    """A leaf without a value: None or an empty container; see `graph.nodes.Node.container`."""

    container: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A leaf that is not read, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a tree: a place, an empty or refused one, or a Python value."""

    path: Path
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A directory with a tree.

    Attributes:
      directory: its path.
      database: the directory of the OCDBT database that has the arrays; None if each array has a
        folder of its own.
      is_zarr3: whether the arrays are in version 3 of zarr's format, else in version 2.
      omits_zeros: whether chunks in which all is zero may be missing.
    """

    directory: str
    database: str | None
    is_zarr3: bool
    omits_zeros: bool


# --- recognising -----------------------------------------------------------------------


def is_orbax(path: str) -> bool:
    """Whether there is an item or a step directory of Orbax at a path, finished or not."""
    names = _names_in(path)
    if any(name in names for name in _STEP_METADATA) or _is_item(path, names):
        return True
    if _TEMPORARY in os.path.basename(path):
        return os.path.isdir(path)
    # Step directories had no file of their own before version 0.5.
    folders = [name for name in names if _is_folder(path, name)]
    if any(step_of(name) is not None for name in folders):
        return False  # the directory of a manager
    kinds = [_kind(os.path.join(path, name)) for name in folders]
    return "tree" in kinds and "" not in kinds


def _kind(folder: str) -> str:
    """What kind of item a folder is: "tree", "json" or "metrics"; "" if it is none."""
    names = _names_in(folder)
    if _is_item(folder, names):
        return "tree"
    if os.path.basename(folder) == _METRICS and _METRICS in names:
        return "metrics"
    return "json" if os.path.isfile(os.path.join(folder, _JSON)) else ""


def _is_item(path: str, names: Sequence[str]) -> bool:
    return (
        METADATA in names
        or any(name.startswith(_PROCESS) for name in names)
        or (AGGREGATE in names and _is_aggregate(os.path.join(path, AGGREGATE)))
    )


def _is_aggregate(file: str) -> bool:
    """Whether a file is in msgpack. Programs call text files `checkpoint`, too."""
    try:
        with open(file, "rb") as opened:
            first = opened.read(1)
    except OSError:
        return False
    return first >= b"\x80"


def step_of(name: str) -> int | None:
    """The step in the name of a step directory.

    >>> step_of("12"), step_of("run_0012"), step_of("state"), step_of("3.orbax-checkpoint-tmp-1")
    (12, 12, None, None)
    """
    found = re.fullmatch(r"(?:.+_)?([0-9]{1,18})", name)
    return int(found[1]) if found else None


def steps_in(directory: str) -> dict[int, str]:
    """The finished steps in the directory of a manager: their paths by number."""
    found: dict[int, str] = {}
    for name in sorted(_names_in(directory)):
        path = os.path.join(directory, name)
        if (step := step_of(name)) is not None and is_orbax(path):
            found[step] = path
    return found


def _names_in(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _is_folder(path: str, name: str) -> bool:
    return os.path.isdir(os.path.join(path, name))


# --- items -----------------------------------------------------------------------------


def leaves_of(path: str) -> Iterator[Leaf]:
    """The leaves of what is at a path.

    Raises:
      CorruptCheckpointError: it is damaged, or its save has not finished.
      UnsupportedFormatError: a newer Orbax wrote it.
    """
    names = _names_in(path)
    for name in [os.path.basename(path), *names]:
        if _TEMPORARY in name:
            raise CorruptCheckpointError(
                f"{path}: expected a finished checkpoint of Orbax, found {name}: the save has not "
                "finished. Restore another step, or save again",
                file=path,
            )
    if _is_item(path, names):
        yield from _leaves_of_item(path, names)
        return
    items = [name for name in names if _is_folder(path, name)]
    kinds = {name: _kind(os.path.join(path, name)) for name in items}
    items = [name for name in items if kinds[name] != "metrics"]
    if not items:
        raise CorruptCheckpointError(
            f"{path}: expected a checkpoint of Orbax with a folder for each item, found none",
            file=path,
        )
    is_unnamed = len(items) == 1 and items[0] in _UNNAMED["orbax.checkpoint" in names]
    for name in items:
        for leaf in _leaves_of_folder(os.path.join(path, name), kinds[name]):
            yield leaf if is_unnamed else Leaf((name, *leaf.path), leaf.value)


def _leaves_of_folder(folder: str, kind: str) -> Iterator[Leaf]:
    """The leaves of an item of a step."""
    names = _names_in(folder)
    if kind == "tree":
        yield from _leaves_of_item(folder, names)
    elif kind == "json":
        file = os.path.join(folder, _JSON)
        yield from [Leaf(path, value) for path, value in _flat(_json(file), (), file)]
    else:
        listed = ", ".join(names[:3]) or "nothing"
        reason = (
            f"only the handler that wrote this item (with {listed}) reads it. Restore it with Orbax"
        )
        yield Leaf((), Refused("an item", reason))


def _flat(tree: Any, path: Path, file: str) -> Iterator[tuple[Path, Any]]:
    """The leaves of a tree of plain containers. Keys of dicts become text, as in `_METADATA`."""
    if len(path) > _MAX_DEPTH:
        raise _damaged(file, f"its tree is more than {_MAX_DEPTH} levels deep")
    if tree is None:
        yield path, Empty("none")
    elif not isinstance(tree, dict | list | tuple):
        yield path, tree
    elif not tree:
        yield path, Empty(type(tree).__name__)
    elif isinstance(tree, dict):
        for label, child in tree.items():
            yield from _flat(child, (*path, str(label)), file)
    else:
        for at, child in enumerate(tree):
            yield from _flat(child, (*path, at), file)


def _leaves_of_item(directory: str, names: Sequence[str]) -> Iterator[Leaf]:
    """The leaves of a directory with a tree."""
    file = os.path.join(directory, METADATA)
    aggregate: Mapping[Path, Any] = {}
    if os.path.isfile(os.path.join(directory, AGGREGATE)):
        aggregate_file = os.path.join(directory, AGGREGATE)
        aggregate = dict(_flat(tree_in(Files(aggregate_file), aggregate_file), (), aggregate_file))
    elif METADATA not in names:
        raise _damaged(file, "it is missing, or the save has not finished")
    metadata = _json(file) if METADATA in names else {}
    if not isinstance(metadata, dict):
        raise _damaged(file, "expected an object")
    is_zarr3 = metadata.get("use_zarr3") is True
    stores_all = metadata.get("store_array_data_equal_to_fill_value") is True
    # In version 2 of the format, Orbax has always stored all chunks: there is no fill value.
    database = _database_in(directory, names) if metadata.get("use_ocdbt") is not False else None
    item = Item(directory, database, is_zarr3, omits_zeros=is_zarr3 and not stores_all)
    entries = _entries(metadata, file) if METADATA in names else _implied(aggregate)
    count = Counter([".".join(map(str, entry.path)) for entry in entries if not entry.is_skipped])
    impls = _impls_in(directory)
    strings: Any = None
    for entry in entries:
        name = ".".join(map(str, entry.path))
        value = aggregate.get(entry.path)
        if _is_placeholder(value):
            name = value.removeprefix(_PLACEHOLDER)
        elif value is not None:
            yield Leaf(entry.path, value)
            continue
        if entry.kind in _EMPTY:
            yield Leaf(entry.path, Empty(_EMPTY[entry.kind]))
        elif entry.is_skipped:
            raise _damaged(file, f"{name}: expected its value in the file {AGGREGATE}, found none")
        elif count[name] > 1:
            reason = f"{count[name]} values have the name {name!r}, and Orbax has kept one of them"
            yield Leaf(entry.path, Refused(entry.kind, reason))
        elif entry.kind == "string":
            strings = _json(os.path.join(directory, _STRINGS)) if strings is None else strings
            yield Leaf(entry.path, _string(strings, name, os.path.join(directory, _STRINGS)))
        elif entry.kind in _ARRAYS:
            yield Leaf(entry.path, Place(item, name, entry.kind, impls.get(name, "")))
        else:
            reason = f"a type handler of the program wrote this value of type {entry.kind!r}"
            yield Leaf(entry.path, Refused(entry.kind, reason))


class _Entry(NamedTuple):
    """A leaf as `_METADATA` lists it."""

    path: Path
    kind: str
    is_skipped: bool  # whether it is empty, or its value is in the file `checkpoint`


def _entries(metadata: dict[str, Any], file: str) -> list[_Entry]:
    listed = metadata.get("tree_metadata")
    if not isinstance(listed, dict):
        raise _damaged(file, "expected tree_metadata")
    return [_entry(text, entry, file) for text, entry in listed.items()]


def _entry(text: str, entry: Any, file: str) -> _Entry:
    match entry:
        case {
            "key_metadata": [*keys],
            "value_metadata": {"value_type": str() as kind, "skip_deserialize": bool() as skipped},
        } if len(keys) <= _MAX_DEPTH:
            return _Entry(tuple([_label(text, key, file) for key in keys]), kind, skipped)
    raise _damaged(file, f"{text}: expected the types of a path and of its value")


def _label(text: str, key: Any, file: str) -> Label:
    match key:
        case {"key": str() as name, "key_type": 1} if re.fullmatch(r"[0-9]{1,9}", name):
            return int(name)
        case {"key": str() as name, "key_type": 2}:
            return name
        case {"key": str(), "key_type": int() as kind} if kind > 2:
            raise UnsupportedFormatError(
                f"{file}: {text}: keys of type {kind} are not known here; a newer Orbax wrote them "
                "(install a newer ckpt_jax)"
            )
    raise _damaged(file, f"{text}: expected a key and its type")


def _implied(aggregate: Mapping[Path, Any]) -> list[_Entry]:
    """The entries of a tree that only the file `checkpoint` describes."""
    return [_Entry(path, "jax.Array", False) for path in aggregate]


def _is_placeholder(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith(_PLACEHOLDER)


def _database_in(directory: str, names: Sequence[str]) -> str | None:
    """The directory of the OCDBT database in an item; None if there is none."""
    if MANIFEST in names:
        return directory
    parts = [name for name in names if name.startswith(_PROCESS)]
    if len(parts) > 1:
        raise CorruptCheckpointError(
            f"{directory}: expected {MANIFEST}, found what {len(parts)} processes wrote and no "
            "process has merged: the save has not finished. Restore another step, or save again",
            file=os.path.join(directory, MANIFEST),
        )
    # A single process may leave out the last step.
    return os.path.join(directory, parts[0]) if parts else None


def _impls_in(directory: str) -> dict[str, str]:
    """The implementations of PRNG keys by the name of the array. All processes write the same."""
    folder = os.path.join(directory, _ARRAY_METADATAS)
    files = _names_in(folder)
    if not files:
        return {}
    listed = _json(os.path.join(folder, files[0]))
    found: dict[str, str] = {}
    for entry in listed.get("array_metadatas", ()) if isinstance(listed, dict) else ():
        match entry:
            case {
                "array_metadata": {
                    "param_name": str() as name,
                    "ext_metadata": {"random_key_impl": str() as impl},
                }
            }:
                found[name] = impl
    return found


def _string(strings: Any, name: str, file: str) -> str:
    """A text in `_strings.json`. Its name was used as a JSON pointer."""
    found = strings
    for part in name.split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise _damaged(file, f"{name}: expected a text")
    return found


def _json(file: str) -> Any:
    try:
        text = read_file(file)
        if text is None:
            raise ValueError("there is no such file")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error


def _damaged(file: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file}: damaged or incomplete: {what}", file=file)
