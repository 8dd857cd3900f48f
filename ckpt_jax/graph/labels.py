"""Edge labels, and the names that are made of them.

A *label* is what an object calls one of its children: a string (an attribute, a field, a
dict key) or another hashable Python scalar (a position in a list, a dict key that is an
int, a bool, a float, bytes or None). Labels keep their type, so the dict keys 0 and "0" are
two edges. A label's *local name* is its text.

Two strings are made of the labels on a node's first path from the root:

* its *path*, for people, reports and patterns: the local names joined with "/";
* its *checkpoint key*, for the file: the local names escaped as TensorFlow does, so that no
  name can be mistaken for a separator, followed by ".ATTRIBUTES/<attribute>".

Different nodes never have the same path or the same key. The key of a slot variable begins with
the key of its variable. Its path begins with the path of its optimizer (`opt/momentum/model/w`), so
that a pattern for parameters does not select their optimizer state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

Label = str | int | float | bytes | None
LABEL_TYPES = frozenset([str, int, bool, float, bytes, type(None)])

VARIABLE_VALUE = "VARIABLE_VALUE"
PYTHON_STATE = "py_state"
ONLY_VALUE = (VARIABLE_VALUE, PYTHON_STATE)  # what an object with one value calls it
OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
SAVED_OBJECTS_KEY = "_SAVED_OBJECT_GRAPH"
SAVE_COUNTER = "save_counter"

_MISREADABLE = re.compile(r"/|\.[.SETAON]")
_ESCAPED_ONLY = re.compile(r"(?<!\.)(\.\.)*\.[TAON]")  # typed names and markers
_ATTRIBUTES = ".ATTRIBUTES"
_OPTIMIZER_SLOT = ".OPTIMIZER_SLOT"


def local_name(label: Label) -> str:
    """The text of a label.

    >>> [local_name(label) for label in ("kernel", 3, True, b"k", None)]
    ['kernel', '3', 'True', '6b', 'None']
    """
    if isinstance(label, str):
        return label
    return label.hex() if isinstance(label, bytes) else repr(label)


def escape(name: str) -> str:
    """`name` as one segment of a checkpoint key (TensorFlow's escaping, and ".E" for "").

    >>> escape("a/b.c"), escape("")
    ('a.Sb..c', '.E')
    """
    return name.replace(".", "..").replace("/", ".S") if name else ".E"


def unescape(segment: str) -> str:
    """The inverse of `escape`.

    >>> unescape("a.Sb..c")
    'a/b.c'
    """
    if segment == ".E":
        return ""
    return ".".join(part.replace(".S", "/") for part in segment.split(".."))


def readable(name: str) -> str:
    """`name` as one segment of a path: unchanged, or escaped if it could be misread.

    >>> readable("layer.0"), readable("a/b"), readable("")
    ('layer.0', 'a.Sb', '.E')
    """
    return escape(name) if not name or _MISREADABLE.search(name) else name


def escaped_names(labels: Sequence[Label]) -> list[str]:
    """The escaped local names of one object's edges, made distinct.

    If a label that is no string has the same text as another label, its name gets a suffix that
    no escaped name contains.

    >>> escaped_names(["0", 0, "a.b"])
    ['0', '0.Tint', 'a..b']
    """
    names = [escape(local_name(label)) for label in labels]
    count = Counter(names)
    if len(count) == len(names):
        return names
    return [
        name if isinstance(label, str) or count[name] == 1 else f"{name}.T{type(label).__name__}"
        for label, name in zip(labels, names, strict=True)
    ]


def path_of(object_key: str) -> str:
    """The readable path of an object, from its escaped path.

    >>> path_of("a..b/c.Sd"), path_of("w/.OPTIMIZER_SLOT/opt/m")
    ('a.b/c.Sd', 'opt/m/w')
    """
    if "." not in object_key:
        return object_key
    variable, separator, slot = f"/{object_key}".partition(f"/{_OPTIMIZER_SLOT}/")
    if separator:
        object_key = "/".join(filter(None, (slot, variable[1:])))
    return "/".join(
        name if _ESCAPED_ONLY.search(name) else readable(unescape(name))
        for name in object_key.split("/")
    )


def attribute_key(object_key: str, attribute: str) -> str:
    """The checkpoint key of one value of the object that has the escaped path `object_key`.

    >>> attribute_key("model/w", VARIABLE_VALUE)
    'model/w/.ATTRIBUTES/VARIABLE_VALUE'
    """
    return f"{object_key}/{_ATTRIBUTES}/{escape(attribute)}"


def slot_key(variable_key: str, optimizer_key: str, slot_name: str) -> str:
    """The escaped path of a slot variable, from the escaped paths of variable and optimizer."""
    return f"{variable_key}/{_OPTIMIZER_SLOT}/{optimizer_key}/{escape(slot_name)}"


def object_key_of(key: str) -> str:
    """The escaped path of the object that a checkpoint key belongs to."""
    return key.partition(f"/{_ATTRIBUTES}/")[0]
