"""The command: `ckpt_jax VERB ...`.

Each verb is a function of the arguments that returns a `Result`: an exit code, what is printed for
people, and the same as JSON. Exit codes are 0 if all is fine, 1 if differences or damage were
found, 2 if the verb could not run, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckpt_jax.api.checkpoint import Checkpoint
from ckpt_jax.api.copying import copy
from ckpt_jax.api.export import convert, export
from ckpt_jax.api.inspect import load_checkpoint
from ckpt_jax.api.latest import remove_checkpoint, state_in
from ckpt_jax.api.verify import verify
from ckpt_jax.errors import CheckpointError, CheckpointNotFoundError
from ckpt_jax.graph.boxes import Box
from ckpt_jax.manage.manager import CheckpointManager
from ckpt_jax.options import CheckpointOptions
from ckpt_jax.progress import Advance, progress
from ckpt_jax.report import ReportEntry, printable
from ckpt_jax.restoring.formats import formats
from ckpt_jax.showing import findings, pages, rows
from ckpt_jax.showing.completion import SHELLS, script
from ckpt_jax.showing.contents import contents_of
from ckpt_jax.showing.differences import comparable, structural, with_values
from ckpt_jax.showing.listing import listing, unfinished
from ckpt_jax.showing.rows import Part
from ckpt_jax.showing.statistics import gather, has_statistics, wide
from ckpt_jax.showing.targets import planned
from ckpt_jax.showing.terminal import write
from ckpt_jax.store.directory import is_checkpoint, number_of, require_checkpoint
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.paths import absolute
from ckpt_jax.store.presence import is_directory
from ckpt_jax.store.staging import remove_abandoned
from ckpt_jax.version import __version__

FINE, FOUND, FAILED, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Result:
    """What a verb found.

    Attributes:
      data: for `--json`.
      parts: for people.
      code: the exit code.
    """

    data: Any
    parts: Sequence[Part]
    code: int = FINE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What it finds is printed.

    Args:
      argv: the arguments; those of the process by default.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed the help, or what is wrong
        return end.code if isinstance(end.code, int) else FAILED
    try:
        result = args.run(args)
        _print(result, args.json)
        return result.code
    except KeyboardInterrupt:
        sys.stderr.write("\nckpt_jax: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"ckpt_jax: {_in_one_line(error)}\n")
        return FAILED


def _in_one_line(error: Exception) -> str:
    """The text of an error."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    what = " | ".join(map(printable, lines))
    known = CheckpointError | OSError | ValueError | KeyError | TypeError
    if isinstance(error, known) and what:
        return what
    return f"{type(error).__name__}: {what or 'no message'} (--debug shows where)"


def _print(result: Result, as_json: bool) -> None:
    try:
        if as_json:
            sys.stdout.write(json.dumps(_plain(result.data), indent=1, allow_nan=False) + "\n")
            sys.stdout.flush()
        else:
            write(result.parts, sys.stdout)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with suppress(OSError, ValueError):  # and the interpreter must not flush into it either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plain(value: Any) -> Any:
    """A value as JSON has it. Numbers that are not finite are the strings "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, complex):
        return {"real": _plain(value.real), "imag": _plain(value.imag)}
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(wide(np.asarray(value)).tolist() if value.dtype != bool else value.tolist())
    return value


@contextmanager
def _bar(args: argparse.Namespace, total: int) -> Iterator[Advance]:
    """A progress bar on a terminal."""
    with progress(True, args.verb, total) as advance:
        yield advance


# --- looking ---------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> Result:
    found = listing(args.directory, args.max)
    data = {
        "directory": found.directory,
        "checkpoints": [each.as_json() for each in found.checkpoints],
        "unfinished": [each.as_json() for each in found.unfinished],
        "note": found.note or None,
    }
    is_damaged = any([each.is_damaged for each in found.checkpoints])
    parts = findings.listing_parts(found, args.metadata)
    return Result(data, parts, FOUND if is_damaged else FINE)


def _show(args: argparse.Namespace) -> Result:
    with load_checkpoint(args.checkpoint) as reader:
        contents = contents_of(reader)
    whole, contents = contents, contents.selected(args.pattern)
    entries = list(contents.entries)
    is_by_size = args.sort == "size" or args.top is not None
    if is_by_size:
        entries = sorted(entries, key=lambda entry: -entry.nbytes)[: args.top]
    data: dict[str, Any] = {
        "path": contents.path,
        "format": contents.format,
        "values": len(contents.entries),
        "nbytes": contents.nbytes,
        "metadata": contents.metadata,
        "entries": [entry.as_json() for entry in entries],
        "subtrees": [
            {"path": path, "values": values, "nbytes": nbytes}
            for path, (values, nbytes) in contents.subtrees.items()
            if args.depth is None or path.count("/") < args.depth
        ],
    }
    parts: list[Part] = [rows.heading(contents)]
    if args.pattern is None:
        parts += rows.metadata_parts(contents.metadata)
    if args.objects:
        if whole.graph is None:
            raise ValueError(f"{contents.path} has no object graph; leave out --objects")
        data["objects"] = rows.objects_as_json(whole.graph)
        parts += rows.objects(whole.graph)
    elif contents.entries:
        by_size = rows.by_size(contents, args.top) if is_by_size else None
        parts.append(by_size or rows.tree(contents, args.depth))
    if args.html is not None:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(pages.page(contents))
        data["html"] = args.html
        parts = [f"{rows.heading(contents)}", f"written: {printable(args.html)}"]
    return Result(data, parts)


def _get(args: argparse.Namespace) -> Result:
    with load_checkpoint(args.checkpoint) as reader:
        contents = contents_of(reader)
        key = reader.key_of(args.path)
        shape = () if key is None else reader.stored_spec(key).shape
        box = None if args.box is None else parse_box(args.box, shape)
        value = reader.get_tensor(args.path, box)
        entry = next(each for each in contents.entries if each.key == key)
    data = entry.as_json() | {"box": box, "value": value}
    if isinstance(value, np.ndarray):
        text = np.array2string(value, threshold=1000)
    else:
        text = printable(value) if isinstance(value, str) else repr(value)
    return Result(data, [text])


def parse_box(text: str, shape: Sequence[int]) -> Box:
    """A box as numpy's indices have it: `0:2,3` or `[:, -1]`. Axes that are left out are whole.

    Raises:
      ValueError: it is no box, or lies outside of the array.

    >>> parse_box("1:,-1", (4, 3, 2))
    ((1, 4), (2, 3), (0, 2))
    """
    inner = text.strip().removeprefix("[").removesuffix("]")
    parts = [part.strip() for part in inner.split(",")] if inner.strip() else []
    if len(parts) > len(shape):
        raise ValueError(f"the box {text} has {len(parts)} axes, the array has {len(shape)}")
    box = []
    for axis, length in enumerate(shape):
        part = parts[axis] if axis < len(parts) else ":"
        found = re.fullmatch(r"(-?\d+)?\s*(:)?\s*(-?\d+)?", part)
        if found is None or not part or (found[2] is None and found[1] is None):
            raise ValueError(f"expected a box such as 0:2,3 or :,1:, got {text!r}")
        first, last = found[1], found[3]
        start = 0 if first is None else int(first)
        start += length if start < 0 else 0
        if found[2] is None:
            stop = start + 1
        else:
            stop = length if last is None else int(last)
            stop += length if stop < 0 else 0
        if not 0 <= start <= stop <= length:
            raise ValueError(f"the box {text} lies outside of an array of shape {list(shape)}")
        box.append((start, stop))
    return tuple(box)


def _stats(args: argparse.Namespace) -> Result:
    with load_checkpoint(args.checkpoint) as reader:
        contents = contents_of(reader).selected(args.pattern)
        entries = [entry for entry in contents.entries if has_statistics(entry)]
        with _bar(args, sum([entry.nbytes for entry in entries])) as advance:
            found = [*gather(reader, entries, advance)]
    left_out = len(contents.entries) - len(entries)
    data = {
        "path": contents.path,
        "left_out": left_out,
        "arrays": [
            {
                "path": entry.path,
                "dtype": entry.spec.dtype,
                "shape": list(entry.spec.shape),
                "elements": each.elements,
                "min": each.least,
                "max": each.greatest,
                "mean": each.mean,
                "norm": each.norm,
                "nan": each.nans,
                "inf": each.infs,
            }
            for entry, each in found
        ],
    }
    return Result(data, findings.statistics_parts(found, left_out))


def _diff(args: argparse.Namespace) -> Result:
    with load_checkpoint(args.a) as before, load_checkpoint(args.b) as after:
        found = structural(contents_of(before), contents_of(after))
        if args.values or args.rtol is not None:
            total = sum([entry.nbytes for entry, _ in comparable(found).values()])
            with _bar(args, total) as advance:
                found = with_values(found, before, after, args.rtol or 0.0, advance)
    data = {
        "a": found.before.path,
        "b": found.after.path,
        "values_compared": found.compared,
        "changes": [change.as_json() for change in found.changes],
        "uncompared": list(found.uncompared),
    }
    code = FOUND if found.changes else FINE
    return Result(data, findings.difference_parts(found), code)


def _verify(args: argparse.Namespace) -> Result:
    found = [verify(path, progress=True) for path in _checkpoints_at(args.path)]
    data = {
        "ok": all([report.ok for report in found]),
        "checkpoints": [
            {
                "path": report.path,
                "ok": report.ok,
                "values": report.keys,
                "nbytes": report.nbytes,
                "problems": [problem._asdict() for problem in report.problems],
                "unread": list(report.unread),
                "unchecked": list(report.unchecked),
            }
            for report in found
        ],
    }
    parts = [line for report in found for line in map(printable, str(report).splitlines())]
    return Result(data, parts, FINE if data["ok"] else FOUND)


def _checkpoints_at(path: str) -> list[str]:
    """The checkpoint at a path, or those in a directory."""
    if is_checkpoint(path) or not is_directory(path):
        return [path]
    paths = [each.path for each in listing(path).checkpoints]
    found = [absolute(each) if is_url(each) else os.path.normpath(each) for each in paths]
    if not found:
        require_checkpoint(path)  # says what is there instead
    return found


def _plan(args: argparse.Namespace) -> Result:
    report = planned(args.checkpoint, args.target)
    kinds = ("restored", "missing", "unexpected", "mismatched")
    data: dict[str, Any] = {
        "path": report.path,
        "exact": report.exact,
        "nbytes": report.nbytes,
        **{kind: [*map(_entry, getattr(report, kind))] for kind in kinds},
        "suggested_renames": [list(rule) for rule in report.suggested_renames],
    }
    return Result(data, [report.table()], FINE if report.exact else FOUND)


def _entry(entry: ReportEntry) -> dict[str, Any]:
    return {
        "path": entry.path,
        "saved_path": entry.saved_path or entry.path,
        "expected": entry.expected,
        "found": entry.found,
        "what": entry.what,
        "nearest": list(entry.nearest),
    }


# --- changing --------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> Result:
    source = _opened_by(args.source)
    path = export(
        source,
        args.destination,
        format=args.format,
        rename=_rules(args.rename),
        only=args.only,
        cast=args.cast and np.dtype(args.cast),
        progress=True,
    )
    return _written(source, path)


def _convert(args: argparse.Namespace) -> Result:
    source = _opened_by(args.source)
    options = CheckpointOptions(progress=True)
    path = convert(
        source,
        args.destination,
        rename=_rules(args.rename),
        options=options,
        overwrite=args.overwrite,
    )
    return _written(source, path)


def _copy(args: argparse.Namespace) -> Result:
    source = _opened_by(args.source)
    return _written(source, copy(source, args.destination, overwrite=args.overwrite))


def _opened_by(path: str) -> str:
    """The checkpoint that a path means: itself, or the latest of a directory."""
    with load_checkpoint(path) as reader:
        return reader.path


def _rules(given: Sequence[str]) -> list[tuple[str, str]]:
    rules = [text.partition("=") for text in given]
    wrong = [text for text, (_, sign, _) in zip(given, rules, strict=True) if not sign]
    if wrong:
        raise ValueError(f"expected --rename SAVED=TARGET, got {', '.join(wrong)}")
    return [(saved, target) for saved, _, target in rules]


def _written(source: str, path: str) -> Result:
    with load_checkpoint(path) as reader:
        contents = contents_of(reader)
    data = {
        "source": source,
        "destination": path,
        "format": contents.format,
        "values": len(contents.entries),
        "nbytes": contents.nbytes,
    }
    return Result(data, [f"written: {rows.heading(contents)}"])


def _gc(args: argparse.Namespace) -> Result:
    if not is_directory(args.directory):
        raise CheckpointNotFoundError(f"{args.directory}: expected a directory, found none")
    found = unfinished(args.directory)
    gone = [each.path for each in found if each.why_kept is None]
    if not args.dry_run:
        gone = [path for path in gone if remove_abandoned(path)]
    kept = [each for each in found if each.path not in gone]
    verb = "would remove" if args.dry_run else "removed"
    parts: list[Part] = [f"{verb} {printable(path)}" for path in gone] or ["nothing to remove"]
    parts += [f"kept {printable(each.path)}: {each.why_kept or 'in use'}" for each in kept]
    data = {
        "directory": args.directory,
        "dry_run": args.dry_run,
        "removed": gone,
        "kept": [each.as_json() for each in kept],
    }
    return Result(data, parts)


def _rm(args: argparse.Namespace) -> Result:
    require_checkpoint(args.checkpoint)
    if not args.yes:
        sys.stderr.write(f"Remove the checkpoint {printable(args.checkpoint)}? [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip().lower()
        if answer not in ("y", "yes"):
            raise ValueError(f"{args.checkpoint} was not removed; answer y, or pass --yes")
    _remove(args.checkpoint)
    return Result({"removed": args.checkpoint}, [f"removed {printable(args.checkpoint)}"])


def _remove(path: str) -> None:
    """Removes a checkpoint, also from the records of its directory."""
    directory, name = os.path.split(absolute(path))
    number = number_of(name)
    state = state_in(directory)
    recorded = () if state is None else state.all_model_checkpoint_paths
    if number is None or absolute(path) not in map(absolute, recorded):
        remove_checkpoint(path)
        return
    prefix = name.rpartition("-")[0]
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=None, checkpoint_name=prefix)
    manager.delete(number)


# --- arguments -------------------------------------------------------------------------


def _completion(args: argparse.Namespace) -> Result:
    text = script(args.shell, _verbs(_parser()))
    return Result({"shell": args.shell, "script": text}, [text.rstrip("\n")])


def _verbs(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (found,) = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return found


_ABOUT = """\
Looks into checkpoints of JAX, Flax, TensorFlow, torch and others, without an accelerator.

CKPT is a checkpoint of any format that ckpt_jax reads, or a directory whose latest one is meant.
Exit codes: 0 fine, 1 differences or damage were found, 2 it could not run.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ckpt_jax", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ckpt_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], Result], about: str
    ) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=about, description=about)
        found.set_defaults(run=run)
        found.add_argument("--json", action="store_true", help="print JSON")
        found.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
        return found

    def checkpoint(found: argparse.ArgumentParser) -> None:
        found.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of any format")

    def pattern(found: argparse.ArgumentParser) -> None:
        about = "only these paths: * is any text without /, ** any text; a path selects all below"
        found.add_argument("pattern", metavar="PATTERN", nargs="?", help=about)

    def copying(found: argparse.ArgumentParser) -> None:
        found.add_argument("source", metavar="SRC", help="a checkpoint of any format")
        found.add_argument("destination", metavar="DST", help="the path to create")
        about = "a rule for names; may be given several times"
        found.add_argument("--rename", metavar="OLD=NEW", action="append", default=[], help=about)

    ls = verb("ls", _ls, "the checkpoints of a directory")
    ls.add_argument("directory", metavar="DIR")
    ls.add_argument(
        "--max",
        metavar="METRIC",
        action="append",
        default=[],
        help="a metric of which the largest value is the best; of others it is the smallest",
    )

    ls.add_argument(
        "--metadata",
        metavar="PATH",
        action="append",
        default=[],
        help="a column with a part of the metadata, such as revision or config/lr",
    )

    show = verb("show", _show, "the values of a checkpoint, with types, sizes and shardings")
    checkpoint(show)
    pattern(show)
    show.add_argument("--sort", choices=("path", "size"), default="path", help="the order")
    show.add_argument("--top", type=_positive, metavar="N", help="only the N largest values")
    show.add_argument("--depth", type=_positive, metavar="N", help="only N levels of the tree")
    show.add_argument("--objects", action="store_true", help="the object graph with its edges")
    show.add_argument("--html", metavar="FILE", help="write a page to look at and to search in")

    get = verb("get", _get, "one value, or a box of it")
    checkpoint(get)
    get.add_argument("path", metavar="PATH", help="of the value, as `show` has it")
    get.add_argument("box", metavar="BOX", nargs="?", help="as numpy has it: 0:2,3")

    stats = verb("stats", _stats, "minimum, maximum, mean, norm, NaN and Inf of arrays")
    checkpoint(stats)
    pattern(stats)

    diff = verb("diff", _diff, "what differs between two checkpoints")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--values", action="store_true", help="compare the values, too")
    about = "compare values; a difference of up to R times the larger number is none"
    diff.add_argument("--rtol", type=_tolerance, metavar="R", help=about)

    check = verb("verify", _verify, "read everything and compare it with its checksums")
    check.add_argument("path", metavar="CKPT_OR_DIR")

    plan = verb("plan", _plan, "whether a checkpoint fits a target, without reading arrays")
    checkpoint(plan)
    about = 'another checkpoint, or a JSON file {"path": {"shape": [2], "dtype": "float32"}}'
    plan.add_argument("target", metavar="TARGET", help=about)

    out = verb("export", _export, "write a checkpoint in the format of another library")
    copying(out)
    names = ", ".join(sorted([each.name for each in formats() if each.write]))
    out.add_argument("--format", required=True, metavar="F", help=f"one of {names}")
    out.add_argument("--only", metavar="PATTERN", help="only these values")
    out.add_argument("--cast", metavar="DTYPE", help="a dtype for all arrays of floats")

    into = verb("convert", _convert, "save a checkpoint of any format as one of ckpt_jax")
    copying(into)
    into.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")

    copies = verb("copy", _copy, "copy a checkpoint, verified, also to and from object stores")
    copies.add_argument("source", metavar="SRC")
    copies.add_argument("destination", metavar="DST")
    copies.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")

    gc = verb("gc", _gc, "remove what interrupted saves have left")
    gc.add_argument("directory", metavar="DIR")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")

    rm = verb("rm", _rm, "remove a checkpoint")
    checkpoint(rm)
    rm.add_argument("--yes", "-y", action="store_true", help="do not ask")

    completion = verb("completion", _completion, "a script for a shell: eval it, or save it")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _tolerance(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
