"""Labels, keys and paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph.labels import (
    VARIABLE_VALUE,
    attribute_key,
    escape,
    escaped_names,
    local_name,
    object_key_of,
    path_of,
    readable,
    slot_key,
    unescape,
)

# Mostly the characters that escaping and its markers are made of.
NASTY = st.text(st.sampled_from("./STEAON0a"), max_size=5)
NAMES = st.one_of(NASTY, st.text(max_size=4), st.sampled_from([".ATTRIBUTES", ".OPTIMIZER_SLOT"]))
LABELS = st.one_of(
    NAMES,
    st.integers(-20, 20),
    st.booleans(),
    st.floats(allow_nan=False),
    st.binary(max_size=2),
    st.none(),
)


def siblings():
    """Labels that one dict could have as its keys."""
    return st.lists(LABELS, max_size=6, unique=True)


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        pytest.param("a/b/c", "a.Sb.Sc", marks=pytest.mark.behaviour(32)),
        pytest.param("b", "b", marks=pytest.mark.behaviour(33)),
        pytest.param("c/", "c.S", marks=pytest.mark.behaviour(34)),
        pytest.param("d/.S", "d.S..S", marks=pytest.mark.behaviour(35)),
        pytest.param("d/.ATTRIBUTES/f", "d.S..ATTRIBUTES.Sf", marks=pytest.mark.behaviour(36)),
        pytest.param(".ATTRIBUTES", "..ATTRIBUTES", marks=pytest.mark.behaviour(39)),
    ],
)
def test_names_are_escaped_as_tensorflow_does(name, segment):
    assert escape(name) == segment
    assert unescape(segment) == name


@pytest.mark.behaviour(38)
def test_the_key_of_a_nested_value_is_its_path_and_its_attribute():
    assert attribute_key("leaf/v", VARIABLE_VALUE) == "leaf/v/.ATTRIBUTES/VARIABLE_VALUE"


@pytest.mark.behaviour(88)
def test_the_key_of_a_value_of_the_root_keeps_its_leading_slash():
    assert attribute_key("", "v1") == "/.ATTRIBUTES/v1"


def test_the_path_of_a_slot_variable_goes_through_its_variable():
    assert slot_key("model/w", "opt", "m/1") == "model/w/.OPTIMIZER_SLOT/opt/m.S1"
    assert slot_key("w", "", "m") == "w/.OPTIMIZER_SLOT//m"


@pytest.mark.behaviour(94)
def test_the_object_of_a_key_is_what_stands_before_the_marker():
    """A segment that is literally ATTRIBUTES is no marker."""
    assert object_key_of("a/ATTRIBUTES/b/.ATTRIBUTES/VARIABLE_VALUE") == "a/ATTRIBUTES/b"
    assert object_key_of("/.ATTRIBUTES/v1") == ""


@given(NAMES)
def test_unescape_is_the_inverse_of_escape(name):
    assert unescape(escape(name)) == name


@given(NAMES)
def test_an_escaped_name_is_one_segment_and_never_a_marker(name):
    segment = escape(name)
    assert segment and "/" not in segment
    assert segment not in (".ATTRIBUTES", ".OPTIMIZER_SLOT")


@given(st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=3))
def test_different_names_make_different_keys_and_different_paths(one, other):
    keys = ["/".join(map(escape, names)) for names in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert (path_of(keys[0]) == path_of(keys[1])) == (one == other)


@given(
    st.tuples(st.lists(NAMES, max_size=2), NAMES),
    st.tuples(st.lists(NAMES, max_size=2), NAMES),
)
def test_different_values_have_different_keys(one, other):
    keys = [attribute_key("/".join(map(escape, path)), name) for path, name in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


@given(siblings())
def test_siblings_have_different_keys_and_different_paths(labels):
    names = escaped_names(labels)
    assert len(set(names)) == len(labels)
    assert len({path_of(name) for name in names}) == len(labels)
    assert all(name and "/" not in name for name in names)


@given(siblings())
def test_a_string_keeps_its_plain_name_whatever_its_siblings_are(labels):
    for label, name in zip(labels, escaped_names(labels), strict=True):
        if isinstance(label, str):
            assert name == escape(label)


@given(siblings(), siblings())
def test_typed_siblings_are_not_mistaken_for_names_of_other_objects(one, other):
    """The suffix of a typed label cannot be spelled by any name, in keys or in paths."""
    names = {name for name in escaped_names(one) if ".T" in name.replace("..", "")}
    plain = {escape(label) for label in other if isinstance(label, str)}
    assert not names & plain
    assert not {path_of(name) for name in names} & {path_of(name) for name in plain}


def test_labels_of_one_text_give_way_to_the_string():
    assert escaped_names(["1", 1, b"\x10", 10, "x"]) == ["1", "1.Tint", "10.Tbytes", "10.Tint", "x"]


def test_labels_that_differ_in_text_need_no_suffix():
    assert escaped_names([0, "1", None, True]) == ["0", "1", "None", "True"]


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("a/b", "a/b"),
        (-3, "-3"),
        (False, "False"),
        (1e16, "1e+16"),
        (b"\x0f", "0f"),
        (None, "None"),
    ],
)
def test_a_local_name_is_the_text_that_the_wire_format_specifies(label, text):
    assert local_name(label) == text


def test_plain_names_are_shown_as_they_are():
    assert [readable(name) for name in ("kernel", "layer.0", ".hidden", "ü")] == [
        "kernel",
        "layer.0",
        ".hidden",
        "ü",
    ]


@given(NAMES, NAMES)
def test_different_names_look_different(one, other):
    assert (readable(one) == readable(other)) == (one == other)
    assert "/" not in readable(one)
