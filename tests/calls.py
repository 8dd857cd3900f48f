"""Counts the work of a function: the functions that it calls, the lines that it runs."""

import sys


def calls(work):
    """How many functions, of Python and of C, `work` calls."""
    return _counted(work, lambda event, argument: event in ("call", "c_call"))


def calls_of_the_system(work):
    """How many functions of `os` that ask the system `work` calls."""

    def asks(event, argument):
        if event != "c_call" or getattr(argument, "__module__", None) != "posix":
            return False
        return argument.__name__ != "fspath" and not argument.__name__.startswith("_")

    return _counted(work, asks)


def _counted(work, is_counted):
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += is_counted(event, argument)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return number


def lines(work):
    """How many lines of Python `work` runs, each turn of a loop or comprehension included."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return number
