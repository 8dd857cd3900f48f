"""What a restore did, or would do, as data and as a table.

Every value of the checkpoint and of the program appears exactly once among `restored`,
`missing`, `unexpected`, `mismatched` and `deferred`; `renamed` says which of them were found
under another name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One value.

    Attributes:
      path: its local names joined with "/", as `only=` and `rename=` patterns match them.
      expected: what the program has there ("" where it has nothing).
      found: what the checkpoint has there ("" where it has nothing).
      what: what is wrong, in words, where something is.
      saved_path: its path in the checkpoint, where that is another one.
      nearest: the paths of the other side that look most like this one, for what is missing.
    """

    path: str
    expected: str = ""
    found: str = ""
    what: str = ""
    saved_path: str = ""
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.path or '(root)'}: {self.what or self.expected or self.found}"
        if self.nearest:
            text += f" (nearest: {', '.join(self.nearest)})"
        return text


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """The outcome of matching a checkpoint with a program.

    Attributes:
      path: of the checkpoint.
      restored: values that the program takes from the checkpoint.
      missing: values of the program that the checkpoint lacks.
      unexpected: values of the checkpoint that the program has no place for.
      mismatched: values that differ in kind, dtype or shape, or in what is shared.
      deferred: values that wait for their object to appear.
      renamed: entries of the others whose `saved_path` differs from their `path`.
      nbytes: bytes that this process has to read for the restored values.
    """

    path: str
    restored: tuple[ReportEntry, ...] = ()
    missing: tuple[ReportEntry, ...] = ()
    unexpected: tuple[ReportEntry, ...] = ()
    mismatched: tuple[ReportEntry, ...] = ()
    deferred: tuple[ReportEntry, ...] = ()
    renamed: tuple[ReportEntry, ...] = ()
    nbytes: int = 0

    @property
    def exact(self) -> bool:
        """Whether checkpoint and program agree on every value."""
        return not (self.missing or self.unexpected or self.mismatched or self.deferred)

    def __str__(self) -> str:
        return self.table()

    def table(self, limit: int | None = None) -> str:
        """An aligned table, the problems first.

        Args:
          limit: the most rows to show of each kind; all by default.
        """
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in _KINDS)
        rows: list[tuple[str, str, str]] = []
        for kind in _KINDS:
            entries = getattr(self, kind)
            shown = entries[:limit]
            rows += [(kind, entry.path or "(root)", _remark(entry)) for entry in shown]
            if len(shown) < len(entries):
                rows.append((kind, f"... and {len(entries) - len(shown)} more", ""))
        width = max((len(path) for _, path, _ in rows), default=0)
        lines = [f"  {kind:<10}  {path:<{width}}  {what}".rstrip() for kind, path, what in rows]
        return "\n".join([f"{self.path}: {counts}", *lines])


_KINDS = ("mismatched", "missing", "unexpected", "deferred", "restored")


def _remark(entry: ReportEntry) -> str:
    text = entry.what or entry.expected or entry.found
    if entry.saved_path and entry.saved_path != entry.path:
        text += f" <- {entry.saved_path}"
    return f"{text}  nearest: {', '.join(entry.nearest)}" if entry.nearest else text


def nearest(path: str, candidates: Iterable[str], count: int = 2) -> tuple[str, ...]:
    """The candidates that look most like `path`."""
    return tuple(difflib.get_close_matches(path, candidates, count, cutoff=0.6))


def describe_problems(report: RestoreReport, source: str, advice: str) -> str:
    """The text of an error: every problem of a report at once."""
    lines = []
    for kind in ("mismatched", "missing", "unexpected"):
        entries = getattr(report, kind)
        if entries:
            lines.append(f"  {kind} ({len(entries)}):")
            lines += [f"    {entry}" for entry in entries]
    return "\n".join([f"{source} does not fit the target:", *lines, advice])
