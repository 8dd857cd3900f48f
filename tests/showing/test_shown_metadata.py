"""What a program said about a checkpoint, as the command, notebooks and pages show it."""

import json
from pathlib import Path

import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main

EVIL = "<b>\x1b[2J</script>"
METADATA = {
    "revision": "4f2a",
    "config": {"lr": 0.5, "layers": [64, None], "empty": {}},
    "odd": {EVIL: EVIL},
}


@pytest.fixture
def path(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.ones((2, 3)))
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "run")
    manager.save(1)
    return manager.save(2, metadata=METADATA)


@pytest.fixture
def run(capsys):
    def run(*argv):
        assert main([str(each) for each in argv]) == 0
        return capsys.readouterr().out

    return run


def test_show_prints_it_above_the_values(run, path):
    lines = run("show", path).splitlines()
    found = [line.split(maxsplit=1) for line in lines[1:5]]
    assert found == [
        ["metadata"],
        ["config/empty", "{}"],
        ["config/layers", "[64, null]"],
        ["config/lr", "0.5"],
    ]
    assert lines[6].split() == ["revision", "4f2a"]
    assert lines[7] == "" and lines[8].startswith("path")
    assert json.loads(run("show", path, "--json"))["metadata"] == METADATA
    assert "config/lr" in run("show", path, "--objects")
    assert "revision" not in run("show", path, "w")  # values were asked for
    assert json.loads(run("show", path, "w", "--json"))["metadata"] == METADATA


def test_nothing_is_printed_if_the_program_said_nothing(run, path):
    first = path.removesuffix("2") + "1"
    assert "metadata" not in run("show", first) and "" not in run("show", first).splitlines()
    assert json.loads(run("show", first, "--json"))["metadata"] == {}


def test_what_could_steer_a_terminal_or_a_page_is_escaped(run, path, tmp_path):
    assert "\x1b" not in run("show", path) and "\x1b" not in run("ls", tmp_path / "run")
    run("show", path, "--html", tmp_path / "page.html")
    for text in ((tmp_path / "page.html").read_text(), ckpt.show(path)._repr_html_()):
        assert "<b>\x1b" not in text and "&lt;b&gt;" in text and "config/lr" in text
        assert "\x1b" not in text


def test_long_values_are_cut_for_people_only(run, tmp_path):
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(n=1), tmp_path)
    path = manager.save(metadata={"notes": "x" * 5000})
    assert max(map(len, run("show", path).splitlines()[1:])) < 150
    assert json.loads(run("show", path, "--json"))["metadata"]["notes"] == "x" * 5000


def test_ls_has_columns_for_parts_of_it(run, path, tmp_path):
    found = json.loads(run("ls", tmp_path / "run", "--json"))["checkpoints"]
    assert [each["metadata"] for each in found] == [{}, METADATA]
    assert "4f2a" not in run("ls", tmp_path / "run")
    asked = ("--metadata", "config/lr", "--metadata", "revision", "--metadata", "revision/x")
    heading, *lines = run("ls", tmp_path / "run", *asked).splitlines()[1:]
    assert heading.split()[-2:] == ["config/lr", "revision"]
    assert "0.5        4f2a" in lines[1] and "0.5" not in lines[0]


def test_show_in_a_notebook_and_as_text(path, tmp_path):
    overview = ckpt.show(path)
    assert "config/lr" in str(overview) and "<summary>metadata</summary>" in overview._repr_html_()
    assert overview.contents.metadata == METADATA
    plain = ckpt.show(ckpt.save(tmp_path / "a", {"n": 1}))
    assert "metadata" not in plain._repr_html_() and "metadata" not in str(plain)


def test_ls_and_verify_find_that_it_is_damaged(path, tmp_path, capsys):
    (part,) = [
        file for file in Path(path).glob("*/*") if file.is_file() and b"4f2a" in file.read_bytes()
    ]
    part.write_bytes(part.read_bytes().replace(b"4f2a", b"5f2a"))
    for verb in ("ls", "verify"):
        assert main([verb, str(tmp_path / "run"), "--json"]) == 1
    assert main(["show", path]) == 2 and "ckpt-2" in capsys.readouterr().err


def test_exports_show_it_too(run, path, tmp_path):
    exported = ckpt.export(path, tmp_path / "a.safetensors", format="safetensors")
    assert json.loads(run("show", exported, "--json"))["metadata"] == METADATA
    found = json.loads(run("ls", tmp_path, "--json"))["checkpoints"]
    assert [each["metadata"] for each in found if each["format"] == "safetensors"] == [METADATA]
