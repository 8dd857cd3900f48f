"""The state file. Numbers in comments are those of the reference behaviours of TensorFlow."""

import logging
import math
import os
import re
import stat
from dataclasses import asdict

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from ckpt_jax.graph._proto import checkpoint_state_pb2
from ckpt_jax.store.state_file import (
    CheckpointState,
    get_checkpoint_state,
    parse,
    render,
    stored_form,
    update_checkpoint_state,
)


def written(directory, name="checkpoint"):
    return (directory / name).read_text(encoding="ascii")


def write(directory, text, name="checkpoint"):
    (directory / name).write_text(text, encoding="utf-8")


# --- what a state becomes on disk ---------------------------------------------------------


def test_the_file_has_one_line_per_value_in_field_order(tmp_path):
    state = CheckpointState("ckpt-3", ("ckpt-2", "ckpt-3"), (1235.5, 1236.5), 999.5)
    update_checkpoint_state(tmp_path, state)
    assert written(tmp_path) == (
        'model_checkpoint_path: "ckpt-3"\n'
        'all_model_checkpoint_paths: "ckpt-2"\n'
        'all_model_checkpoint_paths: "ckpt-3"\n'
        "all_model_checkpoint_timestamps: 1235.5\n"
        "all_model_checkpoint_timestamps: 1236.5\n"
        "last_preserved_timestamp: 999.5\n"
    )


def test_times_that_were_not_given_leave_no_line(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("ckpt-1"))
    assert written(tmp_path) == (
        'model_checkpoint_path: "ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n'
    )


@pytest.mark.behaviour(113)
def test_an_absolute_path_is_listed_once_and_comes_back_absolute(tmp_path):
    path = str(tmp_path / "model-0")
    update_checkpoint_state(tmp_path, CheckpointState(path, (path,)))
    assert get_checkpoint_state(tmp_path) == CheckpointState(path, (path,))


@pytest.mark.behaviour(114)
def test_a_path_under_a_relative_directory_loses_the_directory():
    state = stored_form("train", CheckpointState(os.path.join("train", "model-0")))
    assert state == CheckpointState("model-0", ("model-0",))


def test_a_path_beside_a_relative_directory_leads_out_of_it():
    assert stored_form("train", CheckpointState("model-0")).model_checkpoint_path == "../model-0"


@pytest.mark.parametrize("listed", [(), ("a",), ("b", "a"), ("a", "b")])
@pytest.mark.behaviour(115)
def test_the_latest_checkpoint_is_appended_where_it_is_not_the_last(listed):
    paths = stored_form("/dir", CheckpointState("b", listed)).all_model_checkpoint_paths
    assert paths[: len(listed)] == listed
    assert paths[-1] == "b"
    assert len(paths) == len(listed) + (listed[-1:] != ("b",))


@pytest.mark.behaviour(116)
def test_absolute_and_relative_paths_survive_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("train")
    outside = str(tmp_path / "model-0")
    inside = os.path.join("train", "model-2")
    update_checkpoint_state("train", CheckpointState(inside, (outside, inside)))
    assert get_checkpoint_state("train") == CheckpointState(inside, (outside, inside))


@pytest.mark.behaviour(117)
def test_a_directory_may_be_any_path_like(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("ckpt-1"))
    assert get_checkpoint_state(tmp_path) == get_checkpoint_state(str(tmp_path))
    assert isinstance(get_checkpoint_state(tmp_path).model_checkpoint_path, str)


@pytest.mark.behaviour(118)
def test_paths_in_the_directory_are_stored_relative_in_the_given_order(tmp_path):
    paths = tuple(str(tmp_path / name) for name in ("b", "a", "sub/c"))
    update_checkpoint_state(tmp_path, CheckpointState(paths[-1], paths))
    assert re.findall('"(.*)"', written(tmp_path)) == ["sub/c", "b", "a", "sub/c"]


@pytest.mark.behaviour(119)
def test_relative_paths_come_back_joined_to_the_directory(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("b", ("a", "b")))
    state = get_checkpoint_state(tmp_path)
    assert state.model_checkpoint_path == str(tmp_path / "b")
    assert state.all_model_checkpoint_paths == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_moved_directory_still_finds_its_checkpoints(tmp_path):
    (tmp_path / "old").mkdir()
    update_checkpoint_state(tmp_path / "old", CheckpointState(str(tmp_path / "old" / "ckpt-1")))
    (tmp_path / "old").rename(tmp_path / "new")
    path = get_checkpoint_state(tmp_path / "new").model_checkpoint_path
    assert path == str(tmp_path / "new" / "ckpt-1")


def test_a_name_that_starts_with_dots_is_not_outside(tmp_path):
    state = stored_form(tmp_path, CheckpointState(str(tmp_path / "..ckpt")))
    assert state.model_checkpoint_path == "..ckpt"


def test_a_directory_of_a_similar_name_is_outside(tmp_path):
    path = str(tmp_path / "train-2" / "ckpt")
    assert stored_form(tmp_path / "train", CheckpointState(path)).model_checkpoint_path == path


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("times", [(1.0,), (1.0, 2.0, 3.0)])
def test_timestamps_must_be_as_many_as_paths(tmp_path, times):
    with pytest.raises(ValueError, match="one for each of 2 checkpoints, got"):
        update_checkpoint_state(tmp_path, CheckpointState("b", ("a", "b"), times))
    assert not list(tmp_path.iterdir())


def test_timestamps_are_counted_after_the_latest_was_appended(tmp_path):
    with pytest.raises(ValueError, match="2 checkpoints, got 1"):
        update_checkpoint_state(tmp_path, CheckpointState("b", ("a",), (1.0,)))


@pytest.mark.parametrize("state", [CheckpointState(""), CheckpointState("a", ("", "a"))])
def test_an_empty_path_is_not_written(tmp_path, state):
    with pytest.raises(ValueError, match="expected paths"):
        update_checkpoint_state(tmp_path, state)


@pytest.mark.parametrize("path", ["checkpoint", "./checkpoint", "{directory}/checkpoint"])
def test_the_state_file_never_replaces_the_checkpoint(tmp_path, path):
    state = CheckpointState(path.format(directory=tmp_path))
    with pytest.raises(RuntimeError, match="latest_filename"):
        update_checkpoint_state(tmp_path, state)
    update_checkpoint_state(tmp_path, state, latest_filename="latest")
    assert get_checkpoint_state(tmp_path, "latest").model_checkpoint_path.endswith("/checkpoint")


def test_a_path_that_is_no_unicode_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"(?i)utf-8"):
        update_checkpoint_state(tmp_path, CheckpointState(os.fsdecode(b"ckpt-\xff")))
    assert not list(tmp_path.iterdir())


# --- agreement with TensorFlow ------------------------------------------------------------


def test_tensorflow_reads_our_state_file_and_we_read_its(tmp_path):
    pytest.importorskip(
        "tensorflow", reason="TensorFlow is not installed. scripts/interop runs this test with it."
    )
    from tensorflow.python.checkpoint import checkpoint_management as theirs

    paths = (str(tmp_path / 'a "b"-2'), "/elsewhere/ü-1", str(tmp_path / "ckpt-3"))
    state = CheckpointState(paths[-1], paths, (1.5, 2.5, 1e9 + 0.25), 0.125)
    update_checkpoint_state(tmp_path, state)
    read = theirs.get_checkpoint_state(str(tmp_path))
    assert read.model_checkpoint_path == paths[-1]
    assert tuple(read.all_model_checkpoint_paths) == paths
    assert tuple(read.all_model_checkpoint_timestamps) == state.all_model_checkpoint_timestamps
    assert read.last_preserved_timestamp == state.last_preserved_timestamp
    theirs.update_checkpoint_state_internal(
        str(tmp_path),
        paths[-1],
        list(paths),
        save_relative_paths=True,
        all_model_checkpoint_timestamps=list(state.all_model_checkpoint_timestamps),
        last_preserved_timestamp=state.last_preserved_timestamp,
    )
    found = get_checkpoint_state(tmp_path)  # theirs leads to paths elsewhere through ".."
    assert [os.path.normpath(path) for path in found.all_model_checkpoint_paths] == list(paths)
    assert found.model_checkpoint_path == paths[-1]
    assert found.all_model_checkpoint_timestamps == state.all_model_checkpoint_timestamps
    assert found.last_preserved_timestamp == state.last_preserved_timestamp


# --- reading ------------------------------------------------------------------------------


def test_no_state_file_and_no_directory_give_none(tmp_path):
    (tmp_path / "file").touch()
    assert get_checkpoint_state(tmp_path) is None
    assert get_checkpoint_state(tmp_path / "absent") is None
    assert get_checkpoint_state(tmp_path / "file") is None


@pytest.mark.parametrize(
    "text",
    ["", "# only a comment\n", 'all_model_checkpoint_paths: "a"', 'model_checkpoint_path:""'],
)
@pytest.mark.behaviour(120)
def test_a_file_without_latest_checkpoint_is_an_error(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ValueError, match="expected a model_checkpoint_path, found none"):
        get_checkpoint_state(tmp_path)


@pytest.mark.behaviour(121)
def test_relative_paths_are_joined_but_not_normalised(tmp_path):
    write(
        tmp_path,
        'model_checkpoint_path: "./model-2"\n'
        'all_model_checkpoint_paths: "./model-1"\n'
        'all_model_checkpoint_paths: "./model-2"\n',
    )
    one, two = (os.path.join(tmp_path, f"./model-{i}") for i in (1, 2))
    assert get_checkpoint_state(tmp_path) == CheckpointState(two, (one, two))


@pytest.mark.parametrize(
    "text",
    [
        "model_checkpoint_path",
        "model_checkpoint_path: ckpt-1",
        'model_checkpoint_path: "ckpt-1',
        'model_checkpoint_path: "ckpt-1"\nmodel_age: 3\n',
        'model_checkpoint_path: "ckpt-\\377"',
        'model_checkpoint_path: "a" last_preserved_timestamp: "b"',
        "\0",
    ],
)
def test_what_cannot_be_understood_is_logged_and_gives_none(tmp_path, caplog, text):
    write(tmp_path, text)
    assert get_checkpoint_state(tmp_path) is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ckpt_jax", logging.WARNING)
    assert str(tmp_path / "checkpoint") in record.getMessage()


def test_a_file_that_is_no_text_is_logged_and_gives_none(tmp_path, caplog):
    (tmp_path / "checkpoint").write_bytes(b'model_checkpoint_path: "\xff"')
    assert get_checkpoint_state(tmp_path) is None
    assert len(caplog.records) == 1


def test_a_directory_in_the_place_of_the_file_is_logged_and_gives_none(tmp_path, caplog):
    (tmp_path / "checkpoint").mkdir()
    assert get_checkpoint_state(tmp_path) is None
    assert len(caplog.records) == 1


def test_a_directory_may_be_given_in_bytes(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("ckpt-1"))
    assert get_checkpoint_state(os.fsencode(tmp_path)) == get_checkpoint_state(tmp_path)


def test_comments_white_space_and_escapes_are_understood(tmp_path):
    write(
        tmp_path,
        "# mended by hand\n"
        '  model_checkpoint_path  :  "a\\"\\\\\\n\\303\\251é"  # the latest\n\n'
        "all_model_checkpoint_paths: 'b' 'c'\n",
    )
    state = parse((tmp_path / "checkpoint").read_text(encoding="utf-8"))
    assert state == CheckpointState('a"\\\néé', ("bc",))


def test_lists_of_different_length_are_read_as_they_are(tmp_path):
    write(tmp_path, 'model_checkpoint_path: "/a"\nall_model_checkpoint_timestamps: 3\n')
    assert get_checkpoint_state(tmp_path) == CheckpointState("/a", (), (3.0,))


def test_another_name_of_the_state_file_is_another_state(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("a"), latest_filename="best")
    assert get_checkpoint_state(tmp_path) is None
    assert get_checkpoint_state(tmp_path, "best").model_checkpoint_path == str(tmp_path / "a")


# --- replacing the file -------------------------------------------------------------------


def test_a_new_state_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    update_checkpoint_state(tmp_path, CheckpointState("a"))
    update_checkpoint_state(tmp_path, CheckpointState("b"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert get_checkpoint_state(tmp_path).all_model_checkpoint_paths == (str(tmp_path / "b"),)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch, step):
    update_checkpoint_state(tmp_path, CheckpointState("a"))
    before = written(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        update_checkpoint_state(tmp_path, CheckpointState("b"))
    assert written(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_file_then_name_then_directory_are_made_durable(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        events.append("flush directory" if stat.S_ISDIR(mode) else "flush file")
        fsync(descriptor)

    def logged_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target) == str(tmp_path)
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    update_checkpoint_state(tmp_path, CheckpointState("a"))
    assert events == ["flush file", "rename", "flush directory"]


def test_the_working_directory_can_hold_the_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    update_checkpoint_state("", CheckpointState("a"))
    assert get_checkpoint_state("") == CheckpointState("a", ("a",))


def test_the_file_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    update_checkpoint_state(tmp_path, CheckpointState("a"))
    assert (tmp_path / "checkpoint").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_an_absent_directory_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        update_checkpoint_state(tmp_path / "absent", CheckpointState("a"))
    assert not list(tmp_path.iterdir())


# --- laws ---------------------------------------------------------------------------------

text = st.text(max_size=8)
states = st.builds(
    CheckpointState,
    text,
    st.lists(text, max_size=3).map(tuple),
    st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    st.floats(allow_nan=False),
)
names = text.filter(lambda name: name.strip(".") and "/" not in name and "\0" not in name)


@given(states)
def test_parse_inverts_render(state):
    assert parse(render(state)) == state
    assert render(state).isascii()
    assert math.copysign(1, parse(render(state)).last_preserved_timestamp) == math.copysign(
        1, state.last_preserved_timestamp
    )


@given(states)
def test_the_text_is_the_one_that_protobuf_writes_and_reads(state):
    message = checkpoint_state_pb2.CheckpointState(**asdict(state))
    text = text_format.MessageToString(message, as_utf8=False)
    assert render(state) == text
    again = checkpoint_state_pb2.CheckpointState()
    text_format.Merge(f"# a comment\n{text}", again)
    assert again == message
    assert parse(f"# a comment\n{text}") == parse(text) == state


pieces = st.sampled_from(
    ["model_checkpoint_path", "last_preserved_timestamp", ":", '"', "'", "\\", "x", "{", "}",
     "<", "[", "]", ",", ";", "-", "1", "1e999", "0x1", "inf", "\n", " ", "#"]
)  # fmt: skip


@given(st.lists(pieces | text, max_size=12).map("".join))
def test_any_text_is_parsed_or_refused_as_protobuf_does(content):
    message = checkpoint_state_pb2.CheckpointState()
    try:
        text_format.Merge(content, message)
    except text_format.ParseError:
        with pytest.raises(text_format.ParseError):
            parse(content)
        return
    state = parse(content)
    assert repr(message) == repr(checkpoint_state_pb2.CheckpointState(**asdict(state)))


@given(st.lists(names, min_size=1, max_size=3), st.sampled_from(["/runs/a", "runs/a", "/", "."]))
def test_stored_paths_lead_back_to_the_paths_they_came_from(listed, directory):
    paths = tuple(os.path.join(directory, name) for name in listed)
    stored = stored_form(directory, CheckpointState(paths[-1], paths))
    assert list(stored.all_model_checkpoint_paths) == listed
    again = [os.path.join(directory, path) for path in stored.all_model_checkpoint_paths]
    assert again == list(paths)
    assert stored_form(directory, CheckpointState(again[-1], tuple(again))) == stored


@given(st.lists(names, min_size=1, max_size=3))
def test_absolute_paths_outside_of_the_directory_stay(listed):
    paths = tuple(f"/elsewhere/{name}" for name in listed)
    for directory in ("/runs/a", "runs/a"):
        stored = stored_form(directory, CheckpointState(paths[-1], paths))
        assert stored.all_model_checkpoint_paths == paths
