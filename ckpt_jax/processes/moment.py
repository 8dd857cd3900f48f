"""Moments: what all processes have in common when they save together.

The slices of a checkpoint come from all processes. If one of them has skipped a save, or does
something else at this point of the program, the slices do not belong together. So each process
makes a digest of all that has to be the same: the verb, the name of the checkpoint, the step if it
is known, the object graph, and *evidence*, that is, values that every process has:

* all values that lie on no device: Python's scalars, strings, numpy arrays, `PythonState`;
* signed integers without dimensions on devices, such as steps and counts, if every process can
  read its own copy.

Other arrays on the devices of one process may differ, and so may what a registered saver takes, a
`PerProcess` for example.

Only digests travel with a save. If they differ, one process of each kind explains its moment, and
process 0 says where they differ.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ckpt_jax.graph.dtypes import dtype_name, dtype_of
from ckpt_jax.graph.labels import SAVE_COUNTER, object_key_of
from ckpt_jax.graph.nodes import Attribute, ObjectGraph

_DIGEST = "digest"
Evidence = tuple[str, str, bytes]  # key; its dtype, "bytes" or "digest"; and the bytes
_LONG = 64  # bytes; of a longer value only a digest is kept
_MOST_PARTS = 256  # of a graph, in an explanation
_MOST_VALUES = 20_000  # in an explanation
_MOST_LISTED = 10  # in an error


class Mark(Protocol):
    """What a process does in a meeting. All processes have to do the same."""

    @property
    def digest(self) -> str:
        """The same on all processes that do the same."""
        ...

    def explained(self) -> dict[str, Any]:
        """What the digest is made of, as JSON allows it."""
        ...


@dataclass(frozen=True, slots=True)
class Deed:
    """What a process does in a meeting that is not a save: "restoring", for example."""

    digest: str

    def explained(self) -> dict[str, Any]:
        return {"kind": self.digest}


class Moment:
    """The moment that one process saves.

    Args:
      verb: the method that saves.
      name: of the checkpoint, without its directory, which processes may see at different places.
      graph: of the objects.
      graph_digest: of its encoding.
      evidence: see the module.
      call: how often this process has called the verb; None if that is not counted.
      step: of the program; None if it is not known.
      count: the save counter; None if the verb does not count.
    """

    def __init__(
        self,
        verb: str,
        name: str,
        graph: ObjectGraph,
        graph_digest: str,
        evidence: Sequence[Evidence],
        call: int | None = None,
        step: int | None = None,
        count: int | None = None,
    ):
        self._verb, self._name, self._call, self._step = verb, name, call, step
        self._graph, self._graph_digest = graph, graph_digest
        self._evidence, self._count = evidence, count

    @property
    def digest(self) -> str:
        alike = (self._verb, self._name, self._step, self._graph_digest, self._evidence)
        return hashlib.sha256(repr(alike).encode()).hexdigest()[:16]

    @property
    def is_counted(self) -> bool:
        """Whether a save counter numbers the checkpoint."""
        return self._count is not None

    @property
    def evidence_digest(self) -> str:
        """Digest of what tells this save from others of the same verb, but for the counter."""
        telling = [each for each in self._evidence if object_key_of(each[0]) != SAVE_COUNTER]
        return hashlib.sha256(repr((self._step, telling)).encode()).hexdigest()

    def explained(self) -> dict[str, Any]:
        graph = self._graph
        paths = {each.key: graph.value_path(node, each.name) for node, each in graph.attributes()}
        return {
            "kind": "saving",
            "verb": self._verb,
            "name": self._name,
            "call": self._call,
            "at": self._step,
            "count": self._count,
            "graph": self._graph_digest,
            "parts": _digests_of_parts(self._graph),
            "values": {
                paths[key]: _shown(kind, data) for key, kind, data in self._evidence[:_MOST_VALUES]
            },
        }


def evidence_of(values: Mapping[str, Any]) -> list[Evidence]:
    """The evidence of values as they are stored: byte strings and numpy arrays.

    >>> evidence_of({"name": b"run", "step": np.int8(3)})
    [('name', 'bytes', b'run'), ('step', 'int8', b'\\x03')]
    """
    return [(key, *_kind_and_bytes(value)) for key, value in values.items()]


def _kind_and_bytes(value: Any) -> tuple[str, bytes]:
    if isinstance(value, bytes):
        return ("bytes", value) if len(value) <= _LONG else (_DIGEST, _sha256(value))
    if value.ndim == 0:
        return dtype_name(value.dtype), value.tobytes()
    return _DIGEST, _sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


def _shown(kind: str, data: bytes) -> str:
    if kind == _DIGEST:
        return f"digest {data[:4].hex()}"
    if kind == "bytes":
        return repr(data.decode(errors="replace"))
    return str(np.frombuffer(data, dtype_of(kind))[0])


def packed(explained: Mapping[str, Any]) -> str:
    """An explanation as text, small enough for the coordination service."""
    return base64.b85encode(zlib.compress(json.dumps(explained).encode())).decode()


def unpacked(text: str) -> dict[str, Any]:
    """An explanation that `packed` has made."""
    return json.loads(zlib.decompress(base64.b85decode(text)))


Group = tuple[Sequence[int], Mapping[str, Any]]  # processes that do the same, and what that is


def difference(groups: Sequence[Group]) -> str:
    """Says how the processes differ.

    Args:
      groups: that of process 0 first.
    """
    if len({each["kind"] for _, each in groups}) > 1:
        lines = _lines((processes, each["kind"]) for processes, each in groups)
        return (
            f"the processes do different things at this point:\n{lines}\n"
            "All of them have to save and restore the same, in the same order."
        )
    if len({each["name"] for _, each in groups}) > 1:
        said = ", ".join(f"{_named(processes)} {each['name']}" for processes, each in groups)
        problem = f"the processes save to different places: {said}."
    elif len({each["graph"] for _, each in groups}) > 1:
        problem = _difference_of_objects(groups)
    else:
        problem = (
            "the processes do not save at the same moment. All of them have to save at the same "
            "steps, and values that lie on no device have to be the same on all of them; put state "
            "that each process has for itself into ckpt.PerProcess."
        )
    lines = _lines((processes, _place_of(each)) for processes, each in groups)
    return f"{problem} Nothing was saved.\n{lines}{_differing_values(groups)}"


def _lines(said: Iterable[tuple[Sequence[int], str]]) -> str:
    return "\n".join(f"  {_named(processes)}: {what}" for processes, what in said)


def _named(processes: Sequence[int]) -> str:
    """
    >>> _named((1,)), _named((0, 1, 2, 5))
    ('process 1', 'processes 0-2, 5')
    """
    return f"process{'es' * (len(processes) > 1)} {ranges(processes)}"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text.

    >>> ranges((0, 1, 2, 5))
    '0-2, 5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def numbers_in(text: str) -> list[int]:
    """The numbers that `ranges` has written.

    >>> numbers_in("0-2, 5")
    [0, 1, 2, 5]
    """
    pairs = [part.partition("-") for part in text.split(", ")]
    return [number for a, _, b in pairs for number in range(int(a), int(b or a) + 1)]


def _place_of(explained: Mapping[str, Any]) -> str:
    call, step = explained["call"], explained["at"]
    return ", ".join(
        [
            f"{explained['verb']} of {explained['name']}",
            *([f"call {call}"] if call is not None else []),
            *([f"step {step}"] if step is not None else []),
        ]
    )


def _difference_of_objects(groups: Sequence[Group]) -> str:
    others = [
        process
        for processes, each in groups
        for process in processes
        if each["graph"] != groups[0][1]["graph"]
    ]
    where = _differing([each["parts"] for _, each in groups])
    below = f" below {', '.join(where[:_MOST_LISTED])}" if where else ""
    return (
        f"the objects of {_named(sorted(others))} are not the same as on process 0: names, "
        f"shapes, dtypes or shardings differ{below}. All processes have to save the same object "
        "graph; put state that each process has for itself into ckpt.PerProcess."
    )


def _differing_values(groups: Sequence[Group]) -> str:
    """A line for each value that differs, each after a line break."""
    values = [each["values"] for _, each in groups]
    paths = _differing(values)
    lines = [
        f"\n  {path or '(root)'}: "
        + ", ".join(
            f"{each.get(path, 'nothing')} on {_named(processes)}"
            for (processes, _), each in zip(groups, values, strict=True)
        )
        for path in paths[:_MOST_LISTED]
    ]
    if len(paths) > _MOST_LISTED:
        lines.append(f"\n  and {len(paths) - _MOST_LISTED} others")
    return "".join(lines)


def _differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all tables."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({table.get(key) for table in tables}) > 1]


def _digests_of_parts(graph: ObjectGraph) -> dict[str, str]:
    """Digests of the values by the beginning of their paths; none if a graph has too many parts."""
    for depth in (2, 1):
        parts: dict[str, list[Attribute]] = {}
        for node, attribute in graph.attributes():
            part = "/".join(graph.paths[node].split("/", depth)[:depth])
            parts.setdefault(part, []).append(attribute)
        if len(parts) <= _MOST_PARTS:
            break
    else:
        return {}
    return {part: _digest(attributes) for part, attributes in parts.items()}


def _digest(attributes: Iterable[Attribute]) -> str:
    lines = [f"{each.key} {each.spec!r} {each.sharding!r}" for each in attributes]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()[:8]
