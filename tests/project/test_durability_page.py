"""docs/durability.md names the test of every promise; those tests are there."""

import ast
import re
from pathlib import Path

from places import DOCS, TESTS

PAGE = (DOCS / "durability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    named = NAMED.findall(PAGE)
    assert len(named) > 20
    found = {file.name: functions_in(file) for file in TESTS.rglob("test_*.py")}
    gone = [f"{file}::{name}" for file, name in named if name not in found.get(file, ())]
    assert gone == []


def test_every_promise_has_a_test_and_a_mechanism():
    promises = [line for line in PAGE.splitlines() if re.match(r"\| \[\d+\]", line)]
    assert len(promises) == 16
    for line in promises:
        number, anchor = re.findall(r"\[(\d+)\]\(#([\w-]+)\)", line)[0]
        assert NAMED.search(line), line
        headings = [
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in re.findall(rf"^### ({number}\. .*)$", PAGE, re.MULTILINE)
        ]
        assert headings == [anchor], line


def test_every_test_of_crashes_stands_on_the_page():
    functions = functions_in(TESTS / "guarantees" / "test_crash.py")
    names = {name for name in functions if name.startswith("test_")}
    assert names <= {name for _, name in NAMED.findall(PAGE)}
