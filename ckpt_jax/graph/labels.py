"""Edge labels, and the names that are made of them.

A *label* is what an object calls one of its children: a string (an attribute, a field, a
dict key), a position in a list, or a dict key that is another Python scalar, a scalar of numpy, the
member of an enum, or a tuple of labels. Labels keep their type, so the dict keys 0 and "0" are
two edges. A label's *local name* is its text.

Labels that Python takes for equal keys are one label: 3 and `np.int64(3)`, "a" and a member of a
`StrEnum` that is "a". So `canonical` makes plain Python scalars of them. It makes an `EnumKey` of
the member of any other enum, because a file does not hold classes. A label from a file says what it
was: `EnumScalar` stands for a member that is a scalar, too.

Two strings are made of the labels on a node's first path from the root:

* its *path*, for people, reports and patterns: the local names joined with "/";
* its *checkpoint key*, for the file: the local names escaped as TensorFlow does, so that no
  name can be mistaken for a separator, followed by ".ATTRIBUTES/<attribute>".

Different nodes never have the same path or the same key. The key of a slot variable begins with
the key of its variable. Its path begins with the path of its optimizer (`opt/momentum/model/w`), so
that a pattern for parameters does not select their optimizer state.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class EnumKey:
    """The member of an enum as a label.

    Attributes:
      name: of the member; the number of a combination of flags that has no name.
      enum_class: module-qualified name of the enum, to tell it from others; never imported.
    """

    name: str
    enum_class: str

    def __str__(self) -> str:
        return f"{_last(self.enum_class)}.{self.name}"


@dataclass(frozen=True, slots=True)
class EnumScalar:
    """The member of an enum that is also a scalar or a tuple (an `IntEnum`), as a label in a file.

    Attributes:
      value: the scalar or tuple.
      enum_class: module-qualified name of the enum; never imported.
    """

    value: Any
    enum_class: str


Label = (
    str
    | int
    | float
    | bytes
    | None
    | EnumKey
    | EnumScalar
    | enum.Enum
    | np.generic
    | tuple[Any, ...]
)
PLAIN_LABELS = frozenset([str, int, bool, float, bytes, type(None)])

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


def canonical(label: Label) -> Label:
    """The label as a file holds it: a plain Python scalar, an `EnumKey`, or a tuple of such.

    Raises:
      TypeError: it is no label.

    >>> canonical(np.int8(3)), canonical((np.str_("a"), None))
    (3, ('a', None))
    """
    if type(label) in PLAIN_LABELS:
        return label
    match label:
        case EnumKey():
            return label
        case EnumScalar():
            return label.value
        case tuple():
            return tuple([canonical(part) for part in label])
        case str():
            return str.__str__(label)
        case int():
            return int(label)
        case float():
            return float(label)
        case bytes():
            return bytes(label)
        case enum.Enum():
            name = label.value if label.name is None else label.name
            return EnumKey(str(name), enum_class_of(label))
        case np.bool_() | np.integer() | np.floating():
            value = label.item()
            if type(value) in PLAIN_LABELS:
                return value
    raise TypeError(f"{label!r} is of type {type(label).__qualname__}")


def enum_class_of(member: enum.Enum) -> str:
    """The module-qualified name of the class of an enum's member."""
    kind = type(member)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_label(label: Any) -> bool:
    """Whether `label` can be the label of an edge."""
    if type(label) in PLAIN_LABELS:
        return True
    try:
        canonical(label)
    except TypeError:
        return False
    return True


def local_name(label: Label) -> str:
    """The text of a label.

    >>> [local_name(label) for label in ("kernel", 3, True, b"k", None, ("a", 3))]
    ['kernel', '3', 'True', '6b', 'None', "('a', 3)"]
    """
    if type(label) is str:
        return label
    if type(label) not in PLAIN_LABELS and is_label(label):
        label = canonical(label)
    if isinstance(label, EnumKey):
        return label.name
    if isinstance(label, tuple):
        return _text_of_tuple(label)
    if isinstance(label, str):
        return label
    return label.hex() if isinstance(label, bytes) else repr(label)


def _text_of_tuple(parts: tuple[Any, ...]) -> str:
    texts = [
        _text_of_tuple(part)
        if isinstance(part, tuple)
        else str(part)
        if isinstance(part, EnumKey)
        else repr(part)
        for part in parts
    ]
    return f"({', '.join(texts)}{',' if len(parts) == 1 else ''})"


def plain_keys(labels: Sequence[Label]) -> list[Any]:
    """Labels as the keys of a dict, for a reader who has no target that says what they are.

    The member of an enum is that member if the program has imported its class. (Nothing is imported
    because a file says so.) Otherwise it becomes the scalar that it is, or its name, or
    "m.Color.RED" if another label is called like it.

    >>> plain_keys([("a", EnumKey("RED", "m.Color")), EnumScalar(3, "m.Level")])
    [('a', 'RED'), 3]
    """
    if all(type(label) in PLAIN_LABELS for label in labels):
        return list(labels)
    keys = [without_enums(label) for label in labels]
    count = Counter(keys)
    return [
        key
        if count[key] == 1
        else without_enums(label, lambda member: f"{member.enum_class}.{member.name}")
        for key, label in zip(keys, labels, strict=True)
    ]


def without_enums(label: Any, text: Callable[[EnumKey], str] = lambda key: key.name) -> Any:
    """A label with the members of enums, or with what stands for them if they are not imported."""
    match label:
        case tuple():
            return tuple([without_enums(part, text) for part in label])
        case EnumKey():
            member = imported_member(label.enum_class, label.name)
            return text(label) if member is None else member
        case EnumScalar():
            member = _member_of_value(_imported_enum(label.enum_class), label.value)
            return without_enums(label.value, text) if member is None else member
    return label


def imported_member(enum_class: str, name: str) -> enum.Enum | None:
    """The member of an enum, if its class is in a module that the program has imported.

    Args:
      enum_class: module-qualified name of the class.
      name: of the member. Of a combination of flags, names or a number: "READ|WRITE", "3".
    """
    kind = _imported_enum(enum_class)
    if kind is None:
        return None
    members: dict[str, enum.Enum] = kind.__dict__["_member_map_"]
    if name in members or not issubclass(kind, enum.Flag):
        return members.get(name)
    parts = [members.get(part) for part in name.split("|")]
    if None not in parts:
        return functools.reduce(operator.or_, parts)
    return _member_of_value(kind, int(name)) if name.lstrip("-").isdecimal() else None


def _member_of_value(kind: type[enum.Enum] | None, value: Any) -> enum.Enum | None:
    if kind is None:
        return None
    found = [member for member in kind.__dict__["_member_map_"].values() if member == value]
    if found or not issubclass(kind, enum.Flag):
        return found[0] if found else None
    with contextlib.suppress(ValueError, TypeError):  # no combination of its flags
        return kind(value)
    return None


def _imported_enum(enum_class: str) -> type[enum.Enum] | None:
    steps = enum_class.split(".")
    for count in range(len(steps) - 1, 0, -1):
        here: Any = sys.modules.get(".".join(steps[:count]))
        for step in steps[count:]:
            here = getattr(here, "__dict__", {}).get(step)
        if isinstance(here, type) and issubclass(here, enum.Enum):
            return here
    return None


def _last(qualified_name: str) -> str:
    return qualified_name.rpartition(".")[2]


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
    no escaped name contains. If two enums are called alike, they are counted, too.

    >>> escaped_names(["0", 0, "a.b"])
    ['0', '0.Tint', 'a..b']
    """
    names = [escape(local_name(label)) for label in labels]
    count = Counter(names)
    if len(count) == len(names):
        return names
    kinds = [_kind(label) for label in labels]
    names = [
        name if kind == "str" or count[name] == 1 else f"{name}.T{kind}"
        for kind, name in zip(kinds, names, strict=True)
    ]
    count = Counter(names)
    if len(count) == len(names):
        return names
    seen: Counter[str] = Counter()
    for number, (label, name) in enumerate(zip(labels, names, strict=True)):
        if count[name] > 1 and type(label) not in PLAIN_LABELS:
            names[number] = f"{name}.T{seen[name]}"
            seen[name] += 1
    return names


def _kind(label: Label) -> str:
    """The name of a label's type, as one segment of a checkpoint key."""
    if is_label(label):
        label = canonical(label)
    return escape(_last(label.enum_class)) if isinstance(label, EnumKey) else type(label).__name__


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
        [
            name if name and "." not in name else _readable_again(name)
            for name in object_key.split("/")
        ]
    )


def _readable_again(segment: str) -> str:
    return segment if _ESCAPED_ONLY.search(segment) else readable(unescape(segment))


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
