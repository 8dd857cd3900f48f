"""What the verbs of the command found, as parts for people."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ckpt_jax.report import printable
from ckpt_jax.showing.contents import Entry
from ckpt_jax.showing.differences import WHATS, Change, Differences
from ckpt_jax.showing.listing import Listed, Listing
from ckpt_jax.showing.rows import Part, Table, count, metadata_text, size
from ckpt_jax.showing.statistics import Statistics


def listing_parts(found: Listing, metadata: Sequence[str] = ()) -> list[Part]:
    """The output of `ls`, with parts of the metadata in columns of their own."""
    metrics = sorted({name for each in found.checkpoints for name in each.metrics})
    rows = [_listed(each, metrics, metadata, found.maximized) for each in found.checkpoints]
    columns = (
        *("name", "step", "time", "size", *map(printable, metrics)),
        *("format", *map(printable, metadata), ""),
    )
    right = frozenset([1, 3, *range(4, 4 + len(metrics))])
    table = Table(columns, tuple(rows), right).without_empty_columns()
    total = sum([each.nbytes or 0 for each in found.checkpoints])
    head = f"{printable(found.directory)}: {count(len(rows), 'checkpoint')}, {size(total)}"
    parts: list[Part] = [head, *([table] if rows else [])]
    for each in found.checkpoints:
        if each.problem:
            what = "is damaged" if each.is_damaged else "cannot be read"
            parts.append(f"{printable(each.name)} {what}: {printable(each.problem)}")
    for left in found.unfinished:
        why = f" ({left.why_kept})" if left.why_kept else " (abandoned; `ckpt_jax gc` removes it)"
        parts.append(f"unfinished: {printable(left.path)}{why}")
    if found.note:
        parts.append(f"note: {printable(found.note)}")
    return parts


def _listed(
    each: Listed, metrics: Sequence[str], metadata: Sequence[str], maximized: Collection[str]
) -> tuple[str, ...]:
    marks = ["latest"] * each.is_latest + ["DAMAGED"] * each.is_damaged
    marks += ["abandoned branch"] * each.is_abandoned
    marks += [
        f"{'highest' if metric in maximized else 'lowest'} {printable(metric)}"
        for metric in each.best
    ]
    return (
        printable(each.name),
        "" if each.step is None else str(each.step),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)) if each.time else "",
        "" if each.nbytes is None else size(each.nbytes),
        *[number(each.metrics[name]) if name in each.metrics else "" for name in metrics],
        each.format,
        *[_part(each.metadata, path) for path in metadata],
        ", ".join(marks),
    )


def _part(metadata: Mapping[str, Any], path: str) -> str:
    """A part of metadata; "" if there is none."""
    at: Any = metadata
    for name in path.split("/"):
        if not isinstance(at, Mapping) or name not in at:
            return ""
        at = at[name]
    return metadata_text(at)


def statistics_parts(found: Iterable[tuple[Entry, Statistics]], left_out: int) -> list[Part]:
    """The output of `stats`."""
    rows = [
        (
            printable(entry.path) or "(root)",
            entry.kind,
            number(each.least),
            number(each.greatest),
            number(each.mean),
            number(each.norm),
            f"{each.nans:,}" if each.nans else "",
            f"{each.infs:,}" if each.infs else "",
        )
        for entry, each in found
    ]
    columns = ("path", "type", "min", "max", "mean", "norm", "NaN", "Inf")
    table = Table(columns, tuple(rows), frozenset(range(2, 8))).without_empty_columns()
    parts: list[Part] = [table] if rows else ["no arrays of numbers"]
    if left_out:
        parts.append(f"{count(left_out, 'value')} left out: no numbers, or not readable here")
    return parts


def difference_parts(found: Differences) -> list[Part]:
    """The output of `diff`."""
    counts = Counter([change.what for change in found.changes])
    summary = ", ".join([f"{counts[what]} {what}" for what in WHATS if counts[what]])
    same = "no differences" if found.compared else "the same names, shapes and dtypes"
    head = f"{printable(found.before.path)} -> {printable(found.after.path)}: {summary or same}"
    rows = [
        (change.what, printable(change.path) or "(root)", detail(change))
        for change in found.changes
    ]
    parts: list[Part] = [head]
    if rows:
        parts.append(Table(("", "path", ""), tuple(rows)).without_empty_columns())
    if not found.compared:
        parts.append("values were not compared (--values compares them)")
    if found.uncompared:
        names = ", ".join(map(printable, found.uncompared[:5]))
        parts.append(
            f"not compared, because they cannot be read here: {names}"
            + (" ..." if len(found.uncompared) > 5 else "")
        )
    return parts


def detail(change: Change) -> str:
    """What a difference is, in a few words."""
    before, after, amount = change.before, change.after, change.amount
    if before is None or after is None:
        present = before or after
        return present.kind if present is not None else ""
    text = before.kind if before.kind == after.kind else f"{before.kind} -> {after.kind}"
    if amount is None or not amount.differing:
        return text + ("" if amount is None else ", equal values")
    if amount.absolute is None:
        return f"{text}, another text"
    text += f", {amount.differing:,} of {amount.elements:,} differ"
    if math.isnan(amount.absolute):
        return f"{text}, some because one side has NaN"
    text += f", by at most {number(amount.absolute)}"
    return text + ("" if amount.relative is None else f" (relative {number(amount.relative)})")


def number(value: Any) -> str:
    """A number for people; "" for None.

    >>> number(1.5), number(12), number(0.1 + 0.2), number(None)
    ('1.5', '12', '0.3', '')
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}"
