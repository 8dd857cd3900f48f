"""The reference of the site has every public name, once."""

import importlib.util

import pytest
from places import DOCS

import ckpt_jax


@pytest.fixture(scope="module")
def reference():
    file = DOCS / "_extensions" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_on_one_page(reference):
    names = [name for found in reference.placed().values() for name in found]
    assert len(names) == len({*names})
    own = {name.partition(".")[2] for name in names if name.count(".") == 1}
    assert own | {"io", "metrics", "readers"} == {*ckpt_jax.__all__}
    assert {f"ckpt_jax.testing.{name}" for name in ckpt_jax.testing.__all__} <= {*names}


def test_a_name_is_on_the_page_of_the_module_that_defines_it(reference):
    assert reference.page_of("manage.retention") == "managers"
    assert reference.page_of("objects.trackable") == "objects"
    assert reference.page_of("objects.registry") == "savers"  # more of it fits
    assert reference.page_of("somewhere.new") == reference.OTHERS


def test_docstrings_become_restructured_text(reference):
    lines = ["A list of `Variable`s, *args:", "", "    code(*args)", "after", "", "* one | two"]
    reference.as_restructured(None, "function", "f", None, None, lines)
    assert lines == [
        "A list of `Variable`\\ s, \\*args::",
        "",
        "    code(*args)",
        "",
        "after",
        "",
        "* one \\| two",
    ]


def test_errors_without_a_text_get_that_of_their_class(reference):
    lines = ["Raises:", "  AsyncSaveError, ValueError.", "  OSError: why."]
    reference.as_restructured(None, "function", "f", None, None, lines)
    assert lines[0] == "Raises:" and lines[3] == "  OSError: why."
    assert lines[1].startswith("  AsyncSaveError: ") and lines[2].startswith("  ValueError: ")
