"""The manifest and the parts that it names: what is read is what was committed, or an error."""

import hashlib
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import manifest
from parts import write_manifest as rewrite

from ckpt_jax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_jax.graph.labels import OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY
from ckpt_jax.store.manifest import (
    INDEX_KEY,
    MANIFEST,
    META,
    Part,
    part_path,
    read_file,
    read_manifest,
    read_part,
    write_manifest,
    write_parts,
)

VALUES = {INDEX_KEY: b"index" * 100, OBJECT_GRAPH_KEY: b"graph", "empty": b""}


@pytest.fixture
def root(tmp_path):
    return committed(tmp_path / "root", VALUES)


def committed(directory, values):
    os.makedirs(directory)
    write_manifest(
        str(directory), write_parts(str(directory), values, durable=False), durable=False
    )
    return str(directory)


def test_parts_read_back_by_name(root):
    parts = read_manifest(root)
    assert list(parts) == sorted(VALUES)
    assert {name: read_part(root, part) for name, part in parts.items()} == VALUES
    assert sorted(os.listdir(root)) == [MANIFEST, META]
    assert parts["empty"] == Part("empty", 0, hashlib.sha256(b"").digest())


def test_the_files_of_parts_are_called_like_the_parts(tmp_path):
    values = dict.fromkeys([INDEX_KEY, OBJECT_GRAPH_KEY, SAVED_OBJECTS_KEY], b"x")
    root = committed(tmp_path / "root", values)
    names = ["checkpointable_object_graph", "index", "saved_object_graph"]
    assert sorted(os.listdir(os.path.join(root, META))) == names


@settings(max_examples=30)
@given(st.sets(st.text(max_size=8), max_size=6))
def test_every_name_has_a_file_of_its_own(tmp_path_factory, names):
    values = {name: name.encode() for name in names if name.isprintable()}
    values |= {"a b": b"1", "A/B": b"2", "a-b": b"3", "index": b"4", "_INDEX_": b"5"}
    root = committed(tmp_path_factory.mktemp("m") / "root", values)
    parts = read_manifest(root)
    assert len({part.file for part in parts.values()}) == len(values)
    assert {name: read_part(root, part) for name, part in parts.items()} == values


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path):
    write_parts(str(tmp_path), VALUES, durable=False)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / META / "index"):
        with pytest.raises(CheckpointNotFoundError, match=r"manifest\.ckpt is missing"):
            read_manifest(str(path))


def test_what_an_interrupted_commit_has_left_does_not_stop_the_next(tmp_path):
    write_parts(str(tmp_path), {"graph": b"old", "other": b"old"}, durable=False)
    (tmp_path / f"{MANIFEST}.new").write_bytes(b"half")
    write_manifest(
        str(tmp_path), write_parts(str(tmp_path), {"graph": b"new"}, durable=True), durable=True
    )
    (part,) = read_manifest(str(tmp_path)).values()
    assert read_part(str(tmp_path), part) == b"new"
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, META]


def test_every_flipped_bit_and_every_cut_is_found(root):
    for name, part in [(None, None), *read_manifest(root).items()]:
        path = part_path(root, part) if part else os.path.join(root, MANIFEST)
        with open(path, "rb") as file:
            data = file.read()
        damaged = [data[:i] for i in range(len(data))] + [data + b"\0"]
        damaged += [
            data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
            for i in range(len(data))
            for bit in range(8)
        ]
        for contents in damaged[:: 1 + len(damaged) // 500]:
            with open(path, "wb") as file:
                file.write(contents)
            with pytest.raises(CorruptCheckpointError, match=path) as caught:
                read_part(root, read_manifest(root)[name or "empty"])
            assert caught.value.file == path
        with open(path, "wb") as file:
            file.write(data)


def test_a_part_of_another_checkpoint_is_refused(root, tmp_path):
    other = committed(tmp_path / "other", {name: value[::-1] for name, value in VALUES.items()})
    for name, part in read_manifest(root).items():
        os.replace(part_path(other, read_manifest(other)[name]), part_path(root, part))
        if VALUES[name]:
            with pytest.raises(CorruptCheckpointError, match="not the bytes of this checkpoint"):
                read_part(root, part)


def test_a_missing_part_is_damage(root):
    part = read_manifest(root)[OBJECT_GRAPH_KEY]
    os.unlink(part_path(root, part))
    with pytest.raises(CorruptCheckpointError, match=r"object_graph: the file is missing"):
        read_part(root, part)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


IRREGULAR = {
    "a directory": os.mkdir,
    "a pipe": os.mkfifo,
    "a loop": lambda path: os.symlink(path, path),
    "a socket": make_socket,
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    IRREGULAR[kind]("x")
    with pytest.raises(CorruptCheckpointError, match="x: this is not a regular file"):
        read_file("x")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(root):
    for path in (os.path.join(root, MANIFEST), part_path(root, read_manifest(root)["empty"])):
        os.truncate(path, 6 << 30)  # takes no room
    with pytest.raises(CorruptCheckpointError, match=r"6442450944 bytes, at most"):
        read_manifest(root)
    with pytest.raises(CorruptCheckpointError, match=r"6442450944 bytes, at most"):
        read_part(root, Part("empty", 6 << 30, hashlib.sha256(b"").digest()))


HOSTILE = {
    "no version": lambda m: m.ClearField("format_version"),
    "one name twice": lambda m: m.parts.append(m.parts[0]),
    "no file": lambda m: m.parts[0].ClearField("file"),
    "a file elsewhere": lambda m: setattr(m.parts[0], "file", "../../x"),
    "an absolute file": lambda m: setattr(m.parts[0], "file", "/etc/passwd"),
    "a file with a line end": lambda m: setattr(m.parts[0], "file", "index\n"),
    "no digest": lambda m: m.parts[0].ClearField("digest"),
    "a short digest": lambda m: setattr(m.parts[0], "digest", b"x" * 31),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_cannot_be_true_is_refused(root, name):
    message = manifest(root)
    HOSTILE[name](message)
    rewrite(root, message)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.ckpt: manifest is inconsistent"):
        read_manifest(root)


@pytest.mark.parametrize(("version", "advice"), [(1, "first release"), (3, "newer ckpt_jax")])
def test_another_format_is_called_unsupported(root, version, advice):
    message = manifest(root)
    message.format_version = version
    rewrite(root, message)
    expected = rf"manifest\.ckpt: .*format version {version}.*reads version 2.*{advice}"
    with pytest.raises(UnsupportedFormatError, match=expected):
        read_manifest(root)
