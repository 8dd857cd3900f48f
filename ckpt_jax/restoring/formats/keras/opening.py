"""Keras: `.weights.h5`, `.keras` and the `.h5` of Keras 2.

Keras 3 keeps the variables of each layer as `layers/dense/vars/0`, in an HDF5 file, in several with
an index `*.weights.json`, in a zip file with the configuration (`.keras`), or in a directory. The
file does not say how a layer calls its variables, so the path in the file is the name of a value,
in all of these forms alike.

Keras 2 says it: a group for each layer has the attribute `weight_names`. Such a value is called by
layer and variable, `dense/kernel`, whether the file holds weights or a whole model.

The configuration is metadata. It is read as JSON, and nothing in it is built or run. Any other HDF5
file is read as the tree of arrays that it is.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.graph.metadata import encode, finite
from ckpt_jax.readers import ExtentsReader, Files, Format, Stored
from ckpt_jax.restoring.formats.keras.hdf5 import Place, Tree, is_hdf5, tree_of
from ckpt_jax.restoring.formats.names import graph_of_names
from ckpt_jax.restoring.formats.plain_json import parsed
from ckpt_jax.restoring.formats.zips import Archive, first_member
from ckpt_jax.store.looks import head_of, is_directory, names_in, size_of, tail_of
from ckpt_jax.store.remote import HEAD_NBYTES

_WEIGHTS, _INDEX, _PICKLED = "model.weights.h5", "model.weights.json", "model.weights.npz"
_CONFIG, _METADATA = "config.json", "metadata.json"
_ASSETS = "assets/"
_MAX_JSON_NBYTES = 64 << 20
_MAX_COMPRESSED_NBYTES = 1 << 30  # of weights that have to be held in memory
_TAIL_NBYTES = 64 << 10
_OF_ATTRIBUTES = ("keras_version", "backend", "model_config", "training_config")
_WHOLE_MODEL = "model_weights"  # the group of the weights in a file that holds a model
_WEIGHT_NAMES = "weight_names"  # the attribute of a layer in Keras 2; followed by a number if long
_NUMBER = re.compile(r":\d+$")  # what TensorFlow appends to the name of a variable


def open_keras(path: str) -> ExtentsReader:
    """Opens a file, an index, or a directory.

    Raises:
      CorruptCheckpointError: a header is damaged, or a file is missing.
      UnsupportedFormatError: h5py is not installed, or the weights are pickled.
    """
    files = Files(path)
    if is_directory(path):
        tree, metadata = _of_directory(files, path)
    elif first_member(path) is not None:
        tree, metadata = _of_archive(files, path)
    elif is_hdf5(path):
        tree, metadata = tree_of(Place.of_file(files, path)), {}
    else:
        tree, metadata = _of_index(files, path), {}
    values = _by_name(tree)
    metadata |= _in_attributes(tree)
    return ExtentsReader(path, values, graph_of_names(path, values, "/"), files, metadata)


def _of_directory(files: Files, directory: str) -> tuple[Tree, dict[str, Any]]:
    names = names_in(directory)
    metadata: dict[str, Any] = {}
    for name in (_METADATA, _CONFIG):
        if name in names:
            file = os.path.join(directory, name)
            metadata |= _in_json(name, _parsed(files, file))
    if _WEIGHTS in names:
        return tree_of(Place.of_file(files, os.path.join(directory, _WEIGHTS))), metadata
    return _of_index(files, os.path.join(directory, _INDEX)), metadata


def _of_archive(files: Files, path: str) -> tuple[Tree, dict[str, Any]]:
    archive = Archive(files, path)
    weights = archive.members.get(_WEIGHTS)
    if weights is None:
        if _PICKLED in archive.members:
            raise UnsupportedFormatError(
                f"{path}: its weights are in {_PICKLED}, which is a pickle. Load it with Keras, "
                "and save the model again"
            )
        raise files.damage(path, f"it has no {_WEIGHTS}")
    metadata: dict[str, Any] = {}
    for name in (_METADATA, _CONFIG):
        if name in archive.members:
            _check_size(files, path, name, archive.members[name].nbytes)
            metadata |= _in_json(name, _value_of(files, path, archive.read(name), name))
    if weights.offset is not None:
        return tree_of(Place(files, path, weights.offset, weights.nbytes)), metadata
    if weights.nbytes > _MAX_COMPRESSED_NBYTES:
        raise UnsupportedFormatError(
            f"{path}: {_WEIGHTS} is compressed, so that it cannot be read in parts, and has "
            f"{weights.nbytes} bytes. Unpack the file, and pass the directory"
        )
    return tree_of(Place(files, path, 0, weights.nbytes, archive.read(_WEIGHTS))), metadata


def _of_index(files: Files, file: str) -> Tree:
    """The values of the files that an index lists."""
    index = _parsed(files, file)
    try:
        shards: dict[str, list[str]] = {}
        for group, names in index["weight_map"].items():
            for name in names if isinstance(names, list) else [names]:
                if os.path.basename(name) != name or name in ("", ".", ".."):
                    raise ValueError(f"the name {name!r} leads elsewhere")
                shards.setdefault(name, []).append(group.strip("/"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise files.damage(file, f"it is no index: {error}") from error
    directory = os.path.dirname(file)
    absent = [name for name in sorted(shards) if not files.has(os.path.join(directory, name))]
    if absent:
        raise files.damage(file, f"{len(absent)} of {len(shards)} files are missing: {absent[:8]}")
    found = Tree()
    for name, groups in sorted(shards.items()):
        here = os.path.join(directory, name)
        tree = tree_of(Place.of_file(files, here))
        lost = [group for group in groups if group not in tree.attributes]
        twice = sorted(tree.values.keys() & found.values.keys())
        if lost or twice:
            what = f"it lacks {lost[:8]}" if lost else f"{twice[:8]} are in another file, too"
            raise files.damage(here, what)
        found.values.update(tree.values)
        for group, attributes in tree.attributes.items():
            found.attributes[group] = {**found.attributes.get(group, {}), **attributes}
    return found


# --- names ------------------------------------------------------------------------------


def _by_name(tree: Tree) -> dict[str, Stored]:
    """The values by the names that they have: in files of Keras 2 those of layer and variable."""
    layers = {
        path
        for path, attributes in tree.attributes.items()
        if any([name.startswith(_WEIGHT_NAMES) for name in attributes])
    }
    names = {path: _name_of(path, layers) for path in tree.values}
    if len({*names.values()}) < len(names):  # two would be one
        names = {path: path for path in names}
    return {name: tree.values[path] for path, name in sorted(names.items())}


def _name_of(path: str, layers: set[str]) -> str:
    """The name of one value.

    >>> _name_of("model_weights/enc/enc/kernel:0", {"model_weights/enc"})
    'enc/kernel'
    >>> _name_of("bert/tf_bert_model/bert/encoder/kernel:0", {"bert"})
    'bert/encoder/kernel'
    >>> _name_of("layers/dense/vars/0", set())
    'layers/dense/vars/0'
    """
    steps = path.split("/")
    for stop in range(len(steps) - 1, 0, -1):
        if "/".join(steps[:stop]) not in layers:
            continue
        layer, own = steps[:stop], steps[stop:]
        if layer[0] == _WHOLE_MODEL and len(layer) > 1:
            layer = layer[1:]
        # The variable's own name begins with the models and layers that it is in.
        for start in range(len(own) - len(layer)):
            if own[start : start + len(layer)] == layer:
                own = own[start + len(layer) :]
                break
        return _NUMBER.sub("", "/".join([*layer, *own]))
    return path


# --- metadata ---------------------------------------------------------------------------


def _in_attributes(tree: Tree) -> dict[str, Any]:
    """The configuration of the model in the attributes of a file, and the names of its layers."""
    found: dict[str, Any] = {}
    for group in ("", _WHOLE_MODEL):
        for name in _OF_ATTRIBUTES:
            text = tree.attributes.get(group, {}).get(name)
            if text is not None:
                found.setdefault(name, _from_text(text) if name.endswith("config") else text)
    names = {
        group.removesuffix("/vars"): attributes["name"]
        for group, attributes in sorted(tree.attributes.items())
        if group.endswith("/vars") and attributes.get("name") is not None
    }
    return {**found, "names": names} if names else found


def _in_json(name: str, value: Any) -> dict[str, Any]:
    """What `config.json` or `metadata.json` say."""
    if name == _CONFIG or not isinstance(value, dict):
        return {name.removesuffix(".json"): value}
    return value


def _from_text(text: str) -> Any:
    """A configuration, as far as metadata can hold it; else the text."""
    try:
        value = finite(parsed(text.encode()))
        encode({"": value})
    except (ValueError, RecursionError):
        return text
    return value


def _parsed(files: Files, file: str) -> Any:
    _check_size(files, file, os.path.basename(file), files.size(file))
    return _value_of(files, file, files.read(file, 0, files.size(file)), os.path.basename(file))


def _value_of(files: Files, file: str, data: bytes, name: str) -> Any:
    try:
        return _from_text(data.decode("utf-8"))
    except ValueError as error:
        raise files.damage(file, f"{name} is no text: {error}") from error


def _check_size(files: Files, file: str, name: str, nbytes: int) -> None:
    if nbytes > _MAX_JSON_NBYTES:
        raise files.damage(file, f"{name} has {nbytes} bytes")


# --- recognising ------------------------------------------------------------------------


def _recognises(path: str) -> bool:
    if is_directory(path):
        return not {_WEIGHTS, _INDEX}.isdisjoint(names_in(path))
    first = first_member(path)
    if first is not None:
        return first in (_CONFIG, _METADATA, _WEIGHTS) or _names_weights(path)
    return is_hdf5(path) or is_index(path)


def _names_weights(path: str) -> bool:
    """Whether the list of members at the end of a zip file has the weights."""
    size = size_of(path) or _TAIL_NBYTES
    return _WEIGHTS.encode() in tail_of(path, min(size, _TAIL_NBYTES))


def is_index(path: str) -> bool:
    """Whether a file is the index of several files of weights."""
    if head_of(path, 1) != b"{" or (size := size_of(path) or HEAD_NBYTES) > _MAX_JSON_NBYTES:
        return False
    head = head_of(path, size)
    return b'"weight_map"' in head and b'.weights.h5"' in head


KERAS = Format("keras", _recognises, open_keras, suffixes=(".keras", ".h5", ".hdf5"))
