"""Reports: what a restore did, or would do, as data and as a table.

Every value of the checkpoint and of the program appears exactly once among `restored`,
`missing`, `unexpected`, `mismatched` and `deferred`. In addition, `renamed` lists values that were
found under another name, and `reshaped` and `dtype_changes` list values that are restored with
another shape or dtype than they were saved with.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One value.

    Attributes:
      path: its local names joined with "/", as `only=` and `rename=` patterns match them.
      expected: what the program has there; "" if it has nothing.
      found: what the checkpoint has there; "" if it has nothing.
      what: what is wrong, in words; "" if nothing is.
      saved_path: its path in the checkpoint, if that differs.
      nearest: for a missing value, the paths in the checkpoint that are most similar.
    """

    path: str
    expected: str = ""
    found: str = ""
    what: str = ""
    saved_path: str = ""
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.path or '(root)'}: {self.what or self.expected or self.found}"
        if self.saved_path not in ("", self.path):
            text += f" <- {self.saved_path}"
        return printable(text + near_miss(self.nearest))


@dataclass(frozen=True, slots=True, repr=False)
class RestoreReport:
    """The outcome of matching a checkpoint with a program.

    Attributes:
      path: path of the checkpoint.
      restored: values that the program takes from the checkpoint.
      missing: values of the program that the checkpoint lacks.
      unexpected: values of the checkpoint that the program has no place for.
      mismatched: values that differ in kind, dtype or shape, or in what they are shared with.
      deferred: values that are restored later, when their object appears.
      renamed: entries of the other tuples whose `saved_path` differs from their `path`.
      reshaped: entries of `restored` that a rename rule stacks, unstacks or transposes.
      dtype_changes: entries of `restored` that are converted to another dtype.
      nbytes: bytes that this process has to read for the restored values.
      suggested_renames: rules for `rename=` with which most missing values would be restored from
        unexpected or deferred ones; there may be none.
    """

    path: str
    restored: tuple[ReportEntry, ...] = ()
    missing: tuple[ReportEntry, ...] = ()
    unexpected: tuple[ReportEntry, ...] = ()
    mismatched: tuple[ReportEntry, ...] = ()
    deferred: tuple[ReportEntry, ...] = ()
    renamed: tuple[ReportEntry, ...] = ()
    reshaped: tuple[ReportEntry, ...] = ()
    dtype_changes: tuple[ReportEntry, ...] = ()
    nbytes: int = 0
    suggested_renames: tuple[tuple[str, str], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether checkpoint and program agree on every value."""
        return not (self.missing or self.unexpected or self.mismatched or self.deferred)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<RestoreReport {self.table(limit=_SHOWN)}>"

    def table(self, limit: int | None = None) -> str:
        """An aligned table with the problems first.

        Of many values, those that differ only in the numbers in their paths share a row.

        Args:
          limit: the largest number of rows to show of each kind; all by default.
        """
        rows: list[tuple[str, str, str]] = []
        for kind in _KINDS:
            groups, more = _shortened(getattr(self, kind), limit)
            rows += [
                (kind, printable(entry.path) or "(root)", printable(_remark(entry)))
                for entry in groups
            ]
            if more:
                rows.append((kind, f"... and {more} more", ""))
        width = min(max((len(path) for _, path, _ in rows), default=0), _MAX_WIDTH)
        lines = [f"  {kind:<10}  {path:<{width}}  {what}".rstrip() for kind, path, what in rows]
        hints = [f"  {hint}" for hint in rename_hints(self)]
        return "\n".join([f"{printable(self.path)}: {self._summary()}", *lines, *hints])

    def _summary(self) -> str:
        """The number of entries of each kind, the number of changes, and the size."""
        counts = [f"{len(getattr(self, kind))} {kind}" for kind in _KINDS]
        counts += [f"{len(found)} {what}" for what, found in self._changes() if found]
        return ", ".join([*counts, *([_size(self.nbytes)] if self.nbytes else [])])

    def _changes(self) -> list[tuple[str, tuple[ReportEntry, ...]]]:
        return [
            ("renamed", self.renamed),
            ("reshaped", self.reshaped),
            ("of another dtype", self.dtype_changes),
        ]

    def _repr_html_(self) -> str:
        """The table for notebooks: problems come first and are open; long lists are folded.

        As in the text, values that differ only in the numbers in their paths share a row.
        """
        parts = [
            f"<b>{html.escape(self.path)}</b><br>{html.escape(self._summary())}",
            *[_html_section(kind, getattr(self, kind)) for kind in _KINDS if getattr(self, kind)],
            *[f"<div>{html.escape(hint)}</div>" for hint in rename_hints(self)],
        ]
        return f'<div style="line-height:1.5">{"".join(parts)}</div>'


_KINDS = ("mismatched", "missing", "unexpected", "deferred", "restored")
# Of medium lightness, so that they are readable on white and on black.
_COLORS = {
    "mismatched": "#d9485f",
    "missing": "#c97a12",
    "unexpected": "#9a6bd6",
    "deferred": "#3f8fd2",
    "restored": "#2f9e62",
}
_SHOWN = 20  # rows of a kind that HTML does not fold, and that a `repr` shows
_LISTED = 50  # rows of a kind that the text of an error has
_MAX_WIDTH = 200  # of the column of paths; longer paths move what stands beside them
_COMPARED = 200  # paths that are compared letter by letter with one that is not found
_FLAT = 20  # values of a kind that have a row each
_NUMBER = re.compile(r"\d+")


def _shortened(entries: Sequence[ReportEntry], limit: int | None) -> tuple[list[ReportEntry], int]:
    """The first rows for some entries, and how many entries are not in them."""
    groups = _groups(entries)
    return [*map(_row, groups[:limit])], 0 if limit is None else sum(map(len, groups[limit:]))


def _groups(entries: Sequence[ReportEntry]) -> list[list[ReportEntry]]:
    """Entries that share a row."""
    if len(entries) <= _FLAT:
        return [[entry] for entry in entries]
    alike: dict[ReportEntry, list[ReportEntry]] = {}
    for entry in entries:
        alike.setdefault(_without_numbers(entry), []).append(entry)
    return [*alike.values()]


def _without_numbers(entry: ReportEntry) -> ReportEntry:
    path, saved_path = (_NUMBER.sub("*", path) for path in (entry.path, entry.saved_path))
    return replace(entry, path=path, saved_path=saved_path, nearest=())


def _row(group: Sequence[ReportEntry]) -> ReportEntry:
    """One entry for a group: the numbers that differ are wildcards, and the values are counted."""
    first = group[0]
    if len(group) == 1:
        return first
    return replace(
        first,
        path=f"{_common_pattern([entry.path for entry in group])} x {len(group)}",
        saved_path=_common_pattern([entry.saved_path for entry in group])
        if first.saved_path != first.path
        else "",
        nearest=tuple(dict.fromkeys([_NUMBER.sub("*", path) for path in first.nearest])),
    )


def _common_pattern(paths: Sequence[str]) -> str:
    """The pattern of paths that differ only in numbers.

    >>> _common_pattern(["v1/block_0/w", "v1/block_1/w"])
    'v1/block_*/w'
    """
    numbers = zip(*[_NUMBER.findall(path) for path in paths], strict=True)
    parts = iter([found[0] if len({*found}) == 1 else "*" for found in numbers])
    return _NUMBER.sub(lambda _: next(parts), paths[0])


def _remark(entry: ReportEntry) -> str:
    text = entry.what or entry.expected or entry.found
    if not entry.what and entry.expected and entry.found not in ("", entry.expected):
        text = f"{entry.found} -> {entry.expected}"
    if entry.saved_path and entry.saved_path != entry.path:
        text += f" <- {entry.saved_path}"
    return f"{text}  nearest: {', '.join(entry.nearest)}" if entry.nearest else text


def _size(nbytes: int) -> str:
    """A number of bytes for people.

    >>> _size(512), _size(3 << 20)
    ('512 bytes', '3.0 MiB')
    """
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _html_section(kind: str, entries: Sequence[ReportEntry]) -> str:
    """The entries of one kind, under a heading that folds them."""
    groups = _groups(entries)
    body = _html_rows(groups[:_SHOWN])
    if more := sum(map(len, groups[_SHOWN:])):
        rest = _html_rows(groups[_SHOWN:])
        body += f"<details><summary>{more} more</summary>{rest}</details>"
    color = _COLORS[kind]
    heading = f'<b style="color:{color}">{kind}</b> ({len(entries)})'
    is_open = "" if kind == "restored" else " open"
    return (
        f'<details{is_open} style="border-left:3px solid {color};padding-left:8px;margin:4px 0">'
        f"<summary>{heading}</summary>{body}</details>"
    )


def _html_rows(groups: Sequence[Sequence[ReportEntry]]) -> str:
    cell = '<td style="text-align:left;padding:0 12px 0 0">'
    rows = [
        f"<tr>{cell}<code>{html.escape(entry.path or '(root)')}</code></td>"
        f"{cell}{html.escape(_remark(entry))}</td></tr>"
        for entry in map(_row, groups)
    ]
    return f"<table>{''.join(rows)}</table>"


def printable(text: str) -> str:
    """A text from a file without what could steer a terminal, or look like another line.

    >>> printable("a\\x1b[2J\\n")
    'a\\\\x1b[2J\\\\n'
    """
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


def nearest(path: str, candidates: Iterable[str], count: int = 2) -> tuple[str, ...]:
    """The candidates that are most similar to `path`.

    >>> nearest("dense/kernl", ["dense/kernel", "step"])
    ('dense/kernel',)
    """
    candidates = [*candidates]
    if len(candidates) > _COMPARED:  # comparing letters takes long
        segments = {*path.split("/")}
        common = [len(segments.intersection(other.split("/"))) for other in candidates]
        order = sorted(range(len(candidates)), key=lambda i: -common[i])
        candidates = [candidates[i] for i in order[:_COMPARED]]
    return tuple(difflib.get_close_matches(path, candidates, count, cutoff=0.6))


def near_miss(paths: Sequence[str]) -> str:
    """The end of an error message that names the paths that may have been meant, if any.

    >>> near_miss(["a", "b"])
    ' (nearest: a, b)'
    """
    return f" (nearest: {', '.join(paths)})" if paths else ""


def rename_hints(report: RestoreReport) -> list[str]:
    """Sentences about the rules that may have been forgotten.

    >>> rename_hints(RestoreReport("a", suggested_renames=(("state/**", "**"),)))
    ['Values may have moved: try rename=[("state/**", "**")].']
    """
    if not report.suggested_renames:
        return []
    rules = ", ".join(f'("{saved}", "{target}")' for saved, target in report.suggested_renames)
    return [f"Values may have moved: try rename=[{rules}]."]


def describe_problems(report: RestoreReport, advice: str) -> str:
    """The text of an error that names the problems of a report, up to a limit for each kind."""
    lines = []
    for kind in ("mismatched", "missing", "unexpected"):
        entries = getattr(report, kind)
        if entries:
            lines.append(f"  {kind} ({len(entries)}):")
            groups, more = _shortened(entries, _LISTED)
            lines += [f"    {entry}" for entry in groups]
            if more:
                lines.append(f"    ... and {more} more, in the error's .report")
    lines += rename_hints(report)
    return "\n".join([f"{report.path} does not fit the target:", *lines, advice])
