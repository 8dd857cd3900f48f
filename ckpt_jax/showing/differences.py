"""The differences between two checkpoints, of whatever formats.

Values are compared by their paths. A value that is shared is compared at each of its paths.

* added, removed: only the second, or only the first checkpoint has something at the path
* reshaped, retyped: the shape, or else the dtype, differs
* changed: elements differ. This is known only if the values were compared.

NaN equals NaN here. If a relative tolerance is given, numbers a and b are equal if
|a - b| <= tolerance * max(|a|, |b|).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt_jax.graph.boxes import Box
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.showing.contents import Contents, Entry, in_order
from ckpt_jax.showing.portions import portions
from ckpt_jax.showing.statistics import wide

WHATS = ("added", "removed", "reshaped", "retyped", "changed")


@dataclass(frozen=True, slots=True)
class Amount:
    """By how much the elements of two arrays differ.

    Attributes:
      differing, elements: how many differ, and how many there are.
      absolute, relative: the largest difference, and the largest in relation to the larger of the
        two numbers. NaN if one side has NaN where the other has a number. None for strings.
    """

    differing: int = 0
    elements: int = 0
    absolute: float | None = None
    relative: float | None = None

    def merged(self, other: Amount) -> Amount:
        """The amount for the elements of both."""
        return Amount(
            self.differing + other.differing,
            self.elements + other.elements,
            _larger(self.absolute, other.absolute),
            _larger(self.relative, other.relative),
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: what it is (one of `WHATS`), and the value before and after."""

    path: str
    what: str
    before: Entry | None = None
    after: Entry | None = None
    amount: Amount | None = None

    def as_json(self) -> dict[str, Any]:
        """The difference as it stands in JSON."""
        amount = self.amount
        return {
            "path": self.path,
            "change": self.what,
            "before": self.before and _description(self.before),
            "after": self.after and _description(self.after),
            "amount": amount
            and {
                "differing": amount.differing,
                "elements": amount.elements,
                "max_absolute": amount.absolute,
                "max_relative": amount.relative,
            },
        }


def _description(entry: Entry) -> dict[str, Any]:
    return {"dtype": entry.spec.dtype, "shape": list(entry.spec.shape), "kind": entry.spec.kind}


@dataclass(frozen=True, slots=True)
class Differences:
    """The differences between two checkpoints.

    Attributes:
      before, after: what they hold.
      changes: in the order of paths.
      compared: whether values were compared.
      uncompared: the paths of values that cannot be read, so that they could not be compared.
    """

    before: Contents
    after: Contents
    changes: tuple[Change, ...]
    compared: bool = False
    uncompared: tuple[str, ...] = ()


def structural(before: Contents, after: Contents) -> Differences:
    """The differences in what there is, and in shapes and dtypes; no value is read."""
    paths = sorted({*before.by_path, *after.by_path}, key=in_order)
    changes = []
    for path in paths:
        a, b = before.by_path.get(path), after.by_path.get(path)
        what = _what(a, b)
        if what is not None:
            changes.append(Change(path, what, a, b))
    return Differences(before, after, tuple(changes))


def _what(a: Entry | None, b: Entry | None) -> str | None:
    if a is None or b is None:
        return "added" if a is None else "removed"
    if a.spec.shape != b.spec.shape or a.spec.is_bytes != b.spec.is_bytes:
        return "reshaped" if a.spec.is_bytes == b.spec.is_bytes else "retyped"
    return None if a.spec.dtype == b.spec.dtype else "retyped"


def with_values(
    found: Differences,
    before: CheckpointReader,
    after: CheckpointReader,
    rtol: float,
    advance: Callable[[int], object],
) -> Differences:
    """The same differences, and those of the values.

    Args:
      found: the outcome of `structural`.
      before, after: readers of the two checkpoints.
      rtol: the relative tolerance.
      advance: called with numbers of bytes as they are done.

    Raises:
      CorruptCheckpointError: a value is damaged.
    """
    pairs = comparable(found)
    refused = {path for path, pair in pairs.items() if any([e.spec.is_unreadable for e in pair])}
    places: dict[tuple[str, str], list[str]] = {}
    for path, (a, b) in pairs.items():
        if path not in refused:
            places.setdefault((a.key, b.key), []).append(path)
    own = {paths[0]: keys for keys, paths in places.items()}
    amounts = dict.fromkeys(own, Amount())
    specs = [(path, before.stored_spec(keys[0])) for path, keys in own.items()]
    for portion in portions(specs):
        ours = _read(before, [(own[path][0], box) for path, box in portion])
        theirs = _read(after, [(own[path][1], box) for path, box in portion])
        for (path, _), a, b in zip(portion, ours, theirs, strict=True):
            is_text = pairs[path][0].spec.is_bytes
            part = _text_amount(a, b) if is_text else amount_of(a, b, rtol)
            amounts[path] = amounts[path].merged(part)
            advance(a.nbytes)
    known = {path: amounts[paths[0]] for paths in places.values() for path in paths}
    structure = {change.path: change for change in found.changes}
    changes = dict(structure)
    for path, amount in known.items():
        if path in structure:
            changes[path] = replace(structure[path], amount=amount)
        elif amount.differing:
            changes[path] = Change(path, "changed", *pairs[path], amount)
    return replace(
        found,
        changes=tuple([changes[path] for path in sorted(changes, key=in_order)]),
        compared=True,
        uncompared=tuple(sorted(refused, key=in_order)),
    )


def comparable(found: Differences) -> Mapping[str, tuple[Entry, Entry]]:
    """The values whose elements can be compared, by path."""
    pairs = {}
    for path, a in found.before.by_path.items():
        b = found.after.by_path.get(path)
        if b is not None and (a.spec.shape, a.spec.is_bytes) == (b.spec.shape, b.spec.is_bytes):
            pairs[path] = a, b
    return pairs


def _read(reader: CheckpointReader, wanted: Sequence[tuple[str, Box]]) -> list[np.ndarray]:
    requests: dict[str, list[Box]] = {}
    for key, box in wanted:
        if box not in requests.setdefault(key, []):
            requests[key].append(box)
    parts = reader.read_boxes(requests)
    return [parts[each] for each in wanted]


def amount_of(a: np.ndarray, b: np.ndarray, rtol: float = 0.0) -> Amount:
    """By how much two arrays of one shape differ.

    >>> amount_of(np.array([1.0, np.nan, 4.0]), np.array([1.0, np.nan, 5.0]))
    Amount(differing=1, elements=3, absolute=1.0, relative=0.2)
    """
    if a.dtype == b.dtype:
        differs = (a != b) & ~((a != a) & (b != b))
    else:
        a, b = wide(a), wide(b)
        differs = (a != b) & ~((a != a) & (b != b))
    if not differs.any():
        return Amount(0, a.size)
    a, b = wide(a[differs]), wide(b[differs])
    kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a.astype(kind) - b.astype(kind))
        if a.dtype.kind in "iu" and b.dtype.kind in "iu":  # floats would lose the last digits
            exact = np.abs(a.astype(object) - b.astype(object)) if a.size < _EXACT else distance
            distance = exact.astype(np.float64)
        larger = np.maximum(np.abs(a.astype(kind)), np.abs(b.astype(kind)))
        relative = np.divide(
            distance, larger, out=np.full(distance.shape, np.nan), where=larger > 0
        )
        kept = ~(distance <= rtol * larger)
    if not kept.any():
        return Amount(0, differs.size)
    absolute, relative = float(np.max(distance[kept])), float(np.max(relative[kept]))
    return Amount(int(kept.sum()), differs.size, absolute, relative)


_EXACT = 10_000  # elements that are subtracted as Python integers


def _text_amount(a: np.ndarray, b: np.ndarray) -> Amount:
    return Amount(int(a.tobytes() != b.tobytes()), 1)


def _larger(a: float | None, b: float | None) -> float | None:
    """The larger of two numbers, NaN if one is NaN; None is no number."""
    known = [each for each in (a, b) if each is not None]
    return float(np.max(known)) if known else None
