"""The results as a table, as JSON and as a chart.

All ratios are times of another divided by times of ckpt_jax, round by round: above 1 ckpt_jax is
faster (or smaller), and against a limit the ratio says how much of it is reached.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

from measure import Result

OURS = "ckpt_jax"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median, least and greatest of the rounds' ratios."""

    median: float
    least: float
    most: float


def ratio(other: Result, ours: Result) -> Ratio | None:
    rounds = [b / a for a, b in zip(ours.samples, other.samples, strict=False) if a > 0]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds)) if rounds else None


def groups(results: Iterable[Result]) -> list[tuple[tuple[str, str], list[Result]]]:
    """The results by (workload, operation), in the order in which they were measured."""
    by_what = groupby(results, key=lambda result: (result.workload, result.operation))
    return [(what, list(group)) for what, group in by_what]


def ours_of(group: Sequence[Result]) -> Result | None:
    return next((result for result in group if result.who == OURS and result.samples), None)


def binding_limit(group: Sequence[Result]) -> Result | None:
    """The fastest way of each resource, and of those the slowest."""
    fastest: dict[str, Result] = {}
    for result in group:
        if result.limit and result.samples:
            best = fastest.setdefault(result.limit, result)
            fastest[result.limit] = min(best, result, key=lambda each: each.median)
    return max(fastest.values(), key=lambda each: each.median, default=None)


HEADER = ("workload", "operation", "who", "median", "min - max", "MB/s", "/ ckpt_jax", "min - max")
LEGEND = """
/ ckpt_jax: the figure of that line divided by that of ckpt_jax, round by round. Above 1 ckpt_jax
is better; beside a limit, how much of it ckpt_jax reaches. <- is the limit that binds: of the
fastest ways to use each resource that the operation needs, the slowest."""
TEXTS = 3  # the first columns; the others are numbers


def table(results: Sequence[Result]) -> str:
    """One line for each figure; the limit that binds is marked with an arrow."""
    rows: list[tuple[str, ...]] = [HEADER]
    failures: list[str] = []
    for (workload, operation), group in groups(results):
        ours, limit = ours_of(group), binding_limit(group)
        for result in group:
            mark = " <-" if result is limit else ""
            who = f"limit: {result.who}{mark}" if result.limit else result.who
            rows.append((workload, operation, who, *figures(result, ours)))
            if result.failure:
                failures.append(f"{workload}, {operation}, {who} failed: {result.failure}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join([*(_line(row, widths) for row in rows), *failures])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if i < TEXTS else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def figures(result: Result, ours: Result | None) -> tuple[str, ...]:
    if not result.samples:
        return ("failed", "", "", "", "")
    against = ratio(result, ours) if ours and result is not ours else None
    factor, unit = (1e3, "ms") if result.unit == "s" and result.median < 1 else (1, result.unit)
    return (
        f"{number(result.median * factor)} {unit}",
        f"{number(min(result.samples) * factor)} - {number(max(result.samples) * factor)}",
        number(result.nbytes / result.median / 1e6) if result.nbytes else "",
        number(against.median) if against else "",
        f"{number(against.least)} - {number(against.most)}" if against else "",
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent and at most three after the point.

    >>> number(1234.5), number(12.345), number(0.00123)
    ('1,234', '12.3', '0.001')
    """
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(3, max(0, digits))}f}"


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    return json.dumps({**about, "results": [asdict(result) for result in results]}, indent=2)


def from_json(text: str) -> list[Result]:
    """The results that `as_json` wrote."""
    rows = json.loads(text)["results"]
    return [Result(**{**row, "samples": tuple(row["samples"])}) for row in rows]


# The chart: one row for each operation that was timed, a mark for each contender at its ratio.

COLORS = {
    "Orbax": "#1f6fb4",
    "TensorFlow": "#d9730d",
    "torch DCP": "#b3336b",
    "safetensors": "#2e8b57",
    "limit": "#777777",
}
LEFT, RIGHT, TOP, ROW, WIDTH = 250, 40, 84, 34, 900


def chart(results: Sequence[Result]) -> str:
    """The ratios as an SVG image, on a logarithmic axis."""
    rows: list[tuple[str, dict[str, Ratio]]] = []
    for (workload, operation), group in groups(results):
        ours, limit = ours_of(group), binding_limit(group)
        if ours is None or ours.unit != "s":
            continue
        others = {result.who: result for result in group if not result.limit and result is not ours}
        if limit is not None:
            others["limit"] = limit
        ratios = {who: ratio(result, ours) for who, result in others.items()}
        if marks := {who: found for who, found in ratios.items() if found}:
            rows.append((f"{workload}: {operation}", marks))
    return _svg(rows)


def _svg(rows: Sequence[tuple[str, Mapping[str, Ratio]]]) -> str:
    everything = [value for _, marks in rows for r in marks.values() for value in (r.least, r.most)]
    low = math.floor(math.log10(min([*everything, 0.5])))
    high = math.ceil(math.log10(max([*everything, 2.0])))
    height = TOP + ROW * len(rows) + 50

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)

    bottom = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="16" y="24" font-size="16" font-weight="bold">'
        "Time of others / time of ckpt_jax</text>",
        '<text x="16" y="43" fill="#555555">right of 1: ckpt_jax is faster; '
        "bars span the rounds, marks are medians</text>",
    ]
    parts += _legend(sorted({who for _, marks in rows for who in marks}, key=list(COLORS).index))
    for value in _ticks(low, high):
        strong = value == 1
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}"'
            f' stroke="{"#222222" if strong else "#dddddd"}" stroke-width="{2 if strong else 1}"/>'
            f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
        )
    for i, (label, marks) in enumerate(rows):
        y = TOP + ROW * (i + 0.5)
        parts.append(f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        for who, r in marks.items():
            color = COLORS[who]
            parts.append(
                f'<line x1="{x(r.least):.1f}" x2="{x(r.most):.1f}" y1="{y}" y2="{y}"'
                f' stroke="{color}" stroke-width="3" stroke-opacity="0.45"/>'
                + _mark(who, x(r.median), y)
            )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _ticks(low: int, high: int) -> list[float]:
    return [
        factor * 10.0**power
        for power in range(low, high + 1)
        for factor in (1, 2, 5)
        if power < high or factor == 1
    ]


def _legend(names: Sequence[str]) -> list[str]:
    parts, left = [], 24
    for who in names:
        parts.append(_mark(who, left, 65))
        parts.append(f'<text x="{left + 12}" y="69">{escape(who)}</text>')
        left += 36 + 8 * len(who)
    return parts


def _mark(who: str, x: float, y: float) -> str:
    """A disc for a contender, an upright bar for a limit."""
    title = f"<title>{escape(who)}</title>"
    if who == "limit":
        return (
            f'<rect x="{x - 2:.1f}" y="{y - 10}" width="4" height="20" fill="{COLORS[who]}">'
            f"{title}</rect>"
        )
    return f'<circle cx="{x:.1f}" cy="{y}" r="6" fill="{COLORS[who]}">{title}</circle>'
