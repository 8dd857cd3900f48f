"""The folders of the tests are the rooms of the package and four more."""

from collections import Counter

from places import PACKAGE, TESTS

# What tests of something other than a room lie in; CONTRIBUTING.md says what is what.
BESIDE_THE_ROOMS = {"public", "guarantees", "project", "stores"}

ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
PUBLIC_FILES = {path.stem for path in PACKAGE.glob("*.py")}
TEST_FILES = sorted(TESTS.rglob("test_*.py"))


def folder_of(path):
    """The folder below tests/ that a file lies in; None for a file directly in tests/."""
    parts = path.relative_to(TESTS).parts
    return parts[0] if len(parts) == 2 else None


def test_every_room_has_a_folder_of_tests():
    assert sorted(ROOMS - {folder_of(path) for path in TEST_FILES}) == []


def test_every_test_file_lies_in_a_known_folder():
    # `testing` is a file or a folder of the package, and has a folder of tests in either case.
    known = ROOMS | BESIDE_THE_ROOMS | ({"testing"} & PUBLIC_FILES)
    lost = [str(path.relative_to(TESTS)) for path in TEST_FILES if folder_of(path) not in known]
    assert lost == []


def test_no_two_test_files_have_one_name():
    """Pytest imports each by its name alone."""
    names = Counter(path.stem for path in TEST_FILES)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_test_of_a_public_file_has_the_name_of_that_file():
    named = {path.stem.removeprefix("test_") for path in (TESTS / "public").glob("test_*.py")}
    assert sorted(named - PUBLIC_FILES) == []
