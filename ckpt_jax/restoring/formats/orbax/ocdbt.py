"""OCDBT: the keys of a database of TensorStore's, and the files in which its values lie.

Whoever reads a value finds out whether its file is whole. This module knows it before, for all
values, because the tree of keys says how long each file has to be.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from ckpt_jax.store import objects
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.stream import new_context


@dataclass(frozen=True, slots=True)
class Database:
    """What a database holds.

    Attributes:
      keys: of all values, sorted.
      files: how many bytes each file needs to have, by its path.
    """

    keys: tuple[str, ...]
    files: dict[str, int]

    def count_below(self, prefix: str) -> int:
        """The number of keys that begin with a text that ends with "/"."""
        after = prefix[:-1] + "0"  # the character after "/"
        return bisect_left(self.keys, after) - bisect_left(self.keys, prefix)


def opened_below(directory: str) -> tuple[dict[str, Any], ts.Context]:
    """TensorStore's description of the files in a directory, and the context to open it in."""
    if is_url(directory):
        return objects.opened_below(directory)
    # A path, not a URL: directories may be called "a?b" or "a%20b".
    return {"driver": "file", "path": f"{directory}/"}, new_context()


def database_in(directory: str) -> Database:
    """What the database in a directory holds; reads no value.

    Raises:
      ValueError: it is damaged.
    """
    files, context = opened_below(directory)
    base = ts.KvStore.open(files, context=context).result()

    def dumped(location: str | None = None) -> ts.Future[Any]:
        return ts.ocdbt.dump(base, location, context=context)

    keys: list[str] = []
    needed: dict[str, int] = {}
    root = dumped().result()["versions"][-1]["root"]
    todo: list[tuple[bytes, str]] = [(b"", root["location"])] if "location" in root else []
    while todo:  # one level of the tree after the other
        asked = [(prefix, dumped(location)) for prefix, location in todo]
        todo = []
        for prefix, entry in [(p, e) for p, node in asked for e in node.result()["entries"]]:
            key = prefix + entry["key"]
            if "location" in entry:  # of another node; its keys lack what they have in common
                todo.append((prefix + entry["subtree_common_prefix"], entry["location"]))
                continue
            keys.append(key.decode("utf-8", "surrogateescape"))
            if "indirect_value" in entry:
                _, above, name, offset, nbytes = entry["indirect_value"].split(":")
                file = os.path.join(directory, unquote(above), unquote(name))
                needed[file] = max(needed.get(file, 0), int(offset) + int(nbytes))
    return Database(tuple(sorted(keys)), needed)
