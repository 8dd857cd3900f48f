"""docs/behaviours.md and the tests say the same of each behaviour of the reference."""

import ast
import re

import pytest
from places import DOCS, TESTS

PAGE = (DOCS / "behaviours.md").read_text(encoding="utf-8")
NUMBERS = range(1, 322)
ROW = re.compile(r"^\| (\d+)(?:-(\d+))? \| (.+) \| (.+) \|$", re.MULTILINE)


def rows():
    """Every number on the page with its status, in the order of the page."""
    for first, last, _, status in ROW.findall(PAGE):
        for number in range(int(first), int(last or first) + 1):
            yield number, status


STATUS = dict(rows())


def statuses(kind):
    """The numbers of a kind."""
    return {n for n, status in STATUS.items() if status.split(":")[0] == kind}


def differences():
    """The section on differences, without its heading."""
    return PAGE.split("\n## Deliberate differences\n")[1].split("\n## ")[0]


def trees():
    for path in sorted(TESTS.rglob("test_*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def marked():
    """Where each number is used as an argument of pytest.mark.behaviour."""
    found: dict[int, list[str]] = {}
    for path, tree in trees():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.behaviour":
                for argument in call.args:
                    number = ast.literal_eval(argument)
                    found.setdefault(number, []).append(f"{path.name}:{call.lineno}")
    return found


MARKED = marked()


def test_each_number_is_on_the_page_once_and_in_order():
    assert [number for number, _ in rows()] == list(NUMBERS)


def test_each_row_holds_or_differs_or_does_not_apply_and_says_why():
    for number, status in STATUS.items():
        kind, _, reason = status.partition(": ")
        assert kind in ("holds", "differs", "does not apply"), (number, status)
        assert bool(reason) == (kind != "holds"), (number, status)


def test_what_holds_is_shown_by_a_test():
    assert sorted(statuses("holds") - MARKED.keys()) == []


def test_what_differs_is_shown_by_a_test_unless_it_is_not_offered():
    unseen = {n for n in statuses("differs") - MARKED.keys() if "not offered" not in STATUS[n]}
    assert sorted(unseen) == []


def test_no_test_is_marked_with_what_does_not_apply_or_is_not_on_the_page():
    wrong = statuses("does not apply") | (MARKED.keys() - set(NUMBERS))
    assert {number: MARKED[number] for number in wrong & MARKED.keys()} == {}


def test_the_section_on_differences_has_every_number_that_differs_and_no_other():
    listed = [
        int(number)
        for numbers in re.findall(r"^\* \*\*([\d, ]+)\.\*\*", differences(), re.MULTILINE)
        for number in numbers.split(",")
    ]
    assert sorted(listed) == sorted(statuses("differs"))


def test_the_tests_that_the_page_names_exist():
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert len(names) > 20
    assert sorted(names - defined) == []


def test_every_difference_without_a_number_names_a_test():
    section = differences().split("What follows has no number.")[1]
    for bullet in section.split("\n* ")[1:]:
        assert "[`test_" in bullet, bullet


@pytest.mark.parametrize("number", [12, 70], ids=["on a test", "on a parameter"])
def test_markers_are_found_wherever_they_are(number):
    assert any(place.startswith("test_checkpoint.py:") for place in MARKED[number])
