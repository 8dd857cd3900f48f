"""What Orbax's directories say of themselves: which trees they hold, and where the arrays lie.

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

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph.metadata import finite
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.readers import Files, Stored
from ckpt_jax.restoring.formats.msgpack import tree_of
from ckpt_jax.restoring.formats.plain_json import parsed
from ckpt_jax.store.looks import (
    fetch_heads,
    head_of,
    is_directory,
    is_file,
    keys_below,
    names_in,
)

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
AGGREGATE = "checkpoint"
STEP_METADATA = "_CHECKPOINT_METADATA"
_VERSION_1 = "orbax.checkpoint"  # an empty file
STRINGS = "_strings.json"
ARRAY_METADATAS = "array_metadatas"
_PROCESS = "ocdbt.process_"
_COMMIT = "commit_success.txt"
_COMMIT_TIME = "commit_timestamp_nsecs"
_RENAMES_NOTHING = "gs://"
_TEMPORARY = ".orbax-checkpoint-tmp"
_JSON = "metadata"
_METRICS = "metrics"  # folder and file of a manager's metrics, which belong to no program
_UNNAMED, _UNNAMED_1 = ("default",), ("pytree", "state")  # in version 1 of the interface
_METADATA_OF_KEY = "_metadata"
_ARRAY = "checkpoint"  # the only leaf of an item that is an array
_PLACEHOLDER = "PLACEHOLDER://"

_SMALL_FILES = {METADATA, MANIFEST, AGGREGATE, STEP_METADATA, STRINGS, _JSON}
_MAX_ITEM_DEPTH = 2  # of such a file below a step: an item of items
_MAX_DEPTH = 128  # of a tree
_MAX_JSON_NBYTES = 256 << 20
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_EMPTY: dict[str, Any] = {
    "None": None,
    "NamedTuple": None,  # Orbax restores it as None, too
    "Dict": {},
    "List": [],
    "Tuple": (),
}


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where an array lies; it stands for the array in a tree.

    Attributes:
      directory: the one that the name is in.
      name: of the array: a folder, or the beginning of its keys in a database.
      is_database: whether `directory` is an OCDBT database.
      is_zarr3: whether the array is in version 3 of zarr's format, else in version 2.
      omits_zeros: whether chunks in which all is zero may be missing. Else a missing chunk is lost.
      kind: what it was: "jax.Array", "np.ndarray" or "scalar".
      prng_impl: the implementation of the PRNG keys of which it is the data; "" if of none.
    """

    directory: str
    name: str
    is_database: bool
    is_zarr3: bool
    omits_zeros: bool
    kind: str
    prng_impl: str = ""


# --- recognising -----------------------------------------------------------------------


def is_orbax(path: str) -> bool:
    """Whether there is an item or a step directory of Orbax at a path, finished or not.

    Raises:
      OSError: it is not known what is there.
    """
    names = names_in(path)
    if STEP_METADATA in names or _VERSION_1 in names or _is_item(path, names):
        return True
    if _TEMPORARY in os.path.basename(path):
        return is_directory(path)
    # Step directories had no file of their own before version 0.5.
    folders = [name for name in names if _is_folder(path, name)]
    if any(step_of(name) is not None for name in folders):
        return False  # the directory of a manager
    kinds = {_kind(os.path.join(path, name)) for name in folders}
    return "tree" in kinds and kinds <= {"tree", "json", "metrics"}


def _kind(folder: str, *, may_have_items: bool = True) -> str:
    """What kind of item a folder is: "tree", "array", "json", "metrics", or "items" if it has one
    folder for each of several; "" if it is none."""
    names = names_in(folder)
    if _is_item(folder, names):
        return "tree"
    if is_file(os.path.join(folder, _ARRAY, ".zarray")):
        return "array"
    if os.path.basename(folder) == _METRICS and _METRICS in names:
        return "metrics"
    if is_file(os.path.join(folder, _JSON)):
        return "json"
    if not may_have_items:
        return ""
    folders = [os.path.join(folder, name) for name in names if _is_folder(folder, name)]
    kinds = {_kind(below, may_have_items=False) for below in folders}
    return "items" if kinds and kinds <= {"tree", "array", "json"} else ""


def _is_item(path: str, names: Sequence[str]) -> bool:
    return (
        METADATA in names
        or any(name.startswith(_PROCESS) for name in names)
        or (AGGREGATE in names and _is_aggregate(os.path.join(path, AGGREGATE)))
    )


def _is_aggregate(file: str) -> bool:
    """Whether a file is in msgpack. Programs call text files `checkpoint`, too."""
    return head_of(file, 1) >= b"\x80"


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
    for name in sorted(names_in(directory)):
        path = os.path.join(directory, name)
        if (step := step_of(name)) is not None and is_orbax(path) and _is_committed(path):
            found[step] = path
    return found


def _is_committed(path: str) -> bool:
    """Whether Orbax has finished a step, or an item of one. Only on Google Cloud Storage it may
    be unfinished, because Orbax renames nothing there."""
    places = (path, os.path.dirname(path)) if path.startswith(_RENAMES_NOTHING) else ()
    return not places or any(map(_says_committed, places))


def _says_committed(directory: str) -> bool:
    """Whether a directory says that Orbax has finished it. On Google Cloud Storage it writes
    `commit_success.txt` last. What older versions finished on a disk, and was copied, has a time
    instead."""
    if is_file(os.path.join(directory, _COMMIT)):
        return True
    if not is_file(os.path.join(directory, STEP_METADATA)):
        return False
    with suppress(CorruptCheckpointError):
        described = _json(directory, STEP_METADATA)
        return isinstance(described, dict) and described.get(_COMMIT_TIME) is not None
    return False


def _is_folder(path: str, name: str) -> bool:
    return is_directory(os.path.join(path, name))


def small_files(path: str) -> list[str]:
    """The files in an object store that say what a step or an item at a path holds."""
    return [
        os.path.join(path, key)
        for key in keys_below(path)
        if os.path.basename(key) in _SMALL_FILES
        and key.count("/") <= _MAX_ITEM_DEPTH
        and _PROCESS not in key
    ]


# --- trees -----------------------------------------------------------------------------


def metadata_in(path: str) -> dict[str, Any]:
    """What a program said about the checkpoint at a path: the `custom_metadata` of the step and of
    its item, if it has one.

    Raises:
      CorruptCheckpointError: a file is damaged.
    """
    items = [path, *[os.path.join(path, name) for name in names_in(path) if _is_folder(path, name)]]
    described = [each for each in items if is_file(os.path.join(each, METADATA))]
    files = [(described[0], METADATA)] if len(described) == 1 else []
    if is_file(os.path.join(path, STEP_METADATA)):
        files.append((path, STEP_METADATA))
    found: dict[str, Any] = {}
    for folder, name in files:
        match _json(folder, name):
            case {"custom_metadata": {**own}}:
                found |= finite(own)
    return found


def tree_in(path: str) -> tuple[Any, list[Place]]:
    """The tree at a path: dicts and lists of plain values, `Stored` ones and places; all places.

    Raises:
      CorruptCheckpointError: it is damaged, or its save has not finished.
      UnsupportedFormatError: a newer Orbax wrote it.
    """
    fetch_heads(small_files(path))
    names = names_in(path)
    for name in [os.path.basename(path), *names]:
        if _TEMPORARY in name:
            raise CorruptCheckpointError(
                f"{path}: expected a finished checkpoint of Orbax, found {name}: the save has not "
                "finished. Restore another step, or save again",
                file=path,
            )
    if not _is_committed(path):
        raise CorruptCheckpointError(
            f"{path}: expected {_COMMIT}, which Orbax writes last on Google Cloud Storage, found "
            "none: the save has not finished. Restore another step, or save again. If it is a copy "
            "of what Orbax had finished on a disk, add an empty file of this name",
            file=path,
        )
    if _is_item(path, names):
        return _tree_of_item(path, names)
    trees, places = _tree_of_items(path, names)
    (first, *others) = trees
    return (trees[first] if not others and _is_unnamed(path, names, first) else trees), places


def _tree_of_items(path: str, names: Sequence[str]) -> tuple[dict[str, Any], list[Place]]:
    """The trees of the folders of a directory, by name."""
    trees: dict[str, Any] = {}
    places: list[Place] = []
    for name in names:
        folder = os.path.join(path, name)
        if _is_folder(path, name) and (kind := _kind(folder)) != "metrics":
            trees[name], more = _tree_of_folder(folder, kind)
            places += more
    if not trees:
        raise CorruptCheckpointError(
            f"{path}: expected a checkpoint of Orbax with a folder for each item, found none",
            file=path,
        )
    return trees, places


def _is_unnamed(path: str, names: Sequence[str], item: str) -> bool:
    """Whether the program gave the only item of a step no name."""
    if item in _UNNAMED:
        return True
    is_version_1 = _VERSION_1 in names
    if STEP_METADATA in names:
        match _json(path, STEP_METADATA):
            case {"item_handlers": {**handlers}}:
                is_version_1 |= ".v1." in str(handlers.get(item))
    return is_version_1 and item in _UNNAMED_1


def _tree_of_folder(folder: str, kind: str) -> tuple[Any, list[Place]]:
    """The tree of an item of a step."""
    names = names_in(folder)
    if kind == "tree":
        return _tree_of_item(folder, names)
    if kind == "json":
        return _json(folder, _JSON), []
    if kind == "array":
        item = _Item(folder, names, {})
        return item.leaf(_ARRAY, "jax.Array"), item.places
    if kind == "items":
        trees, places = _tree_of_items(folder, names)
        first = min(trees, key=len)
        # A random key: its data, and whether it had a type. Both kinds can become each other.
        is_key = [*sorted(trees)] == [first, f"{first}{_METADATA_OF_KEY}"]
        return (trees[first] if is_key else trees), places
    listed = ", ".join(names[:3]) or "nothing"
    note = f"only the handler that wrote this item (with {listed}) reads it. Restore it with Orbax"
    return _refused("an item", note), []


def _refused(what: str, note: str) -> Stored:
    return Stored(LeafSpec("unreadable", what, note=note))


def _tree_of_item(directory: str, names: Sequence[str]) -> tuple[Any, list[Place]]:
    """The tree of a directory that has one."""
    file, aggregate_file = (os.path.join(directory, name) for name in (METADATA, AGGREGATE))
    aggregate: Any = None
    if is_file(aggregate_file):
        aggregate = tree_of(Files(aggregate_file), aggregate_file)
    elif METADATA not in names:
        raise _damaged(file, "it is missing, or the save has not finished")
    metadata = _json(directory, METADATA) if METADATA in names else {}
    if not isinstance(metadata, dict):
        raise _damaged(file, "expected an object")
    item = _Item(directory, names, metadata)
    if METADATA not in names:
        return item.with_places(aggregate), item.places
    entries = _entries(metadata, file)
    count = Counter([entry.name for entry in entries if not entry.is_skipped])
    root = _Branch()  # with the tree under the label ""
    for entry in _without_placeholders(entries):
        value = _at(aggregate, entry.path)
        if value is not None and not _is_placeholder(value):
            leaf = value
        elif entry.kind in _EMPTY:
            leaf = _EMPTY[entry.kind]
        elif entry.is_skipped:
            raise _damaged(file, f"{entry.name}: expected its value in {AGGREGATE}, found none")
        elif count[entry.name] > 1:
            note = f"{count[entry.name]} values have the name {entry.name!r}, and Orbax keeps one"
            leaf = _refused(entry.kind, note)
        else:
            leaf = item.leaf(entry.name, entry.kind)
        try:
            _put(root, ("", *entry.path), leaf)
        except ValueError as error:
            raise _damaged(file, f"{entry.name}: {error}") from error
    tree = _grown(root.get("", {}))
    # An item of one array has a folder for it, outside of a database.
    is_array = metadata.get("use_ocdbt") is False and isinstance(tree, dict) and [*tree] == [_ARRAY]
    return (tree[_ARRAY] if is_array and item.places else tree), item.places


class _Item:
    """A directory with a tree, and the places of the arrays in it that were asked for."""

    def __init__(self, directory: str, names: Sequence[str], metadata: dict[str, Any]):
        self.places: list[Place] = []
        self._directory = directory
        is_database = metadata.get("use_ocdbt") is not False
        self._database = _database_in(directory, names) if is_database else None
        self._is_zarr3 = metadata.get("use_zarr3") is True
        # In version 2 of the format, Orbax stores all chunks: there is no fill value.
        stores_all = metadata.get("store_array_data_equal_to_fill_value") is True
        self._omits_zeros = self._is_zarr3 and not stores_all
        self._impls = _impls_in(directory)
        self._strings: Any = None

    def leaf(self, name: str, kind: str) -> Any:
        """The value of this name and type."""
        if kind in _ARRAYS:
            if not _is_text(name):
                raise _damaged(self._directory, f"{name!r} is no name of an array")
            self.places.append(
                Place(
                    self._database or self._directory,
                    name,
                    is_database=self._database is not None,
                    is_zarr3=self._is_zarr3,
                    omits_zeros=self._omits_zeros,
                    kind=kind,
                    prng_impl=self._impls.get(name, ""),
                )
            )
            return self.places[-1]
        if kind == "string":
            if self._strings is None:
                self._strings = _json(self._directory, STRINGS)
            return _string(self._strings, name, os.path.join(self._directory, STRINGS))
        return _refused(kind, f"a type handler of the program wrote this value of type {kind!r}")

    def with_places(self, tree: Any) -> Any:
        """A tree in msgpack, with places instead of the texts that stand for them."""
        if isinstance(tree, dict):
            return {str(label): self.with_places(child) for label, child in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)([self.with_places(child) for child in tree])
        if _is_placeholder(tree):
            return self.leaf(tree.removeprefix(_PLACEHOLDER), "jax.Array")
        return tree


class _Entry(NamedTuple):
    """A leaf as `_METADATA` lists it. Positions are integers, and all other keys are text."""

    path: tuple[str | int, ...]
    kind: str
    is_skipped: bool  # whether it is empty, or its value is in the file `checkpoint`

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


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


def _label(text: str, key: Any, file: str) -> str | int:
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


def _without_placeholders(entries: Sequence[_Entry]) -> list[_Entry]:
    """The entries without empty containers in which others lie, as partial saves leave them."""
    filled = {entry.path[:stop] for entry in entries for stop in range(len(entry.path))}
    return [e for e in entries if e.kind not in _EMPTY or e.path not in filled]


class _Branch(dict[str | int, Any]):
    """A container of a tree that is growing."""


def _put(tree: _Branch, path: Sequence[str | int], leaf: Any) -> None:
    """Puts a leaf into a growing tree.

    Raises:
      ValueError: there is something else.
    """
    *above, last = path
    for label in above:
        tree = tree.setdefault(label, _Branch())
        if type(tree) is not _Branch:
            raise ValueError("there is a value above it")
    if tree.setdefault(last, leaf) is not leaf:
        raise ValueError("there are two values, or there is another one below it")


def _grown(tree: Any) -> Any:
    """A tree of dicts, and of lists where all labels are positions."""
    if type(tree) is not _Branch:
        return tree
    children = {label: _grown(child) for label, child in tree.items()}
    positions = sorted([label for label in children if isinstance(label, int)])
    if positions == [*range(len(children))]:
        return [children[at] for at in positions]
    return children


def _at(tree: Any, path: Sequence[str | int]) -> Any:
    """What lies at a path in nested containers; None if nothing does."""
    for label in path:
        if isinstance(tree, dict):
            tree = tree.get(str(label))
        elif isinstance(tree, list | tuple) and isinstance(label, int) and label < len(tree):
            tree = tree[label]
        else:
            return None
    return tree


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _is_placeholder(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith(_PLACEHOLDER)


def _database_in(directory: str, names: Sequence[str]) -> str | None:
    """The directory of the OCDBT database in an item; None if there is none."""
    parts = [name for name in names if name.startswith(_PROCESS)]
    if MANIFEST in names:
        database = directory
    elif len(parts) > 1:
        raise CorruptCheckpointError(
            f"{directory}: expected {MANIFEST}, found what {len(parts)} processes wrote and no "
            "process has merged: the save has not finished. Restore another step, or save again",
            file=os.path.join(directory, MANIFEST),
        )
    elif parts:  # a single process may leave out the last step
        database = os.path.join(directory, parts[0])
    else:
        return None
    Files(directory).size(os.path.join(database, MANIFEST))  # raises if it is no regular file
    return database


def _impls_in(directory: str) -> dict[str, str]:
    """The implementations of PRNG keys by the name of the array. All processes write the same."""
    folder = os.path.join(directory, ARRAY_METADATAS)
    files = names_in(folder)
    if not files:
        return {}
    listed = _json(folder, files[0])
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


def _json(folder: str, name: str) -> Any:
    files, file = Files(folder), os.path.join(folder, name)
    files.fetch_whole(file)
    size = files.size(file)
    if size > _MAX_JSON_NBYTES:
        raise _damaged(file, f"it has more than {_MAX_JSON_NBYTES} bytes")
    try:
        return parsed(files.read(file, 0, size))
    except ValueError as error:
        raise _damaged(file, str(error)) from error


def _damaged(file: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file}: damaged or incomplete: {what}", file=file)
