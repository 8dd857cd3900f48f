"""What a program says about a checkpoint goes with it, as far as the destination can hold it."""

import json
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats.safetensors import as_texts

METADATA = {
    "revision": "4f2a\n\u00fc",
    "config": {"lr": 0.5, "layers": [64, None, {"deep": True}], "empty": {}},
    "seed": 3,
    "number": "3",
    "format": "mine",  # names that safetensors and its writer here use themselves
    "ckpt_jax": ["x"],
}


def said(path):
    with ckpt.load_checkpoint(path) as reader:
        return reader.metadata


@pytest.fixture
def managed(tmp_path):
    checkpoint = ckpt.Checkpoint(w=np.arange(6, dtype=np.float32), deep={"b": np.ones(3)})
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "run")
    return manager.save(7, metadata=METADATA, metrics={"loss": 0.5})


def test_copies_and_conversions_carry_it(tmp_path, managed):
    assert said(ckpt.copy(managed, tmp_path / "copy")) == METADATA
    assert said(ckpt.copy(managed, f"memory://{tmp_path.name}/copy")) == METADATA
    renamed = ckpt.convert(managed, tmp_path / "own", rename=[("w", "v")])
    assert said(renamed) == METADATA and ckpt.verify(renamed).ok
    plain = ckpt.convert(ckpt.save(tmp_path / "a", {"w": 1}), tmp_path / "b")
    assert said(plain) == {} and "_METADATA" not in ckpt.load(plain)


@pytest.mark.parametrize(
    ("format", "name", "options"),
    [
        ("safetensors", "a.safetensors", {}),
        ("safetensors", "a", {}),
        ("safetensors", "a", {"max_shard_nbytes": 1}),
        ("safetensors", "a.safetensors", {"only": "w"}),
        ("orbax", "a", {}),
        ("orbax", "run/300", {}),
    ],
)
def test_exports_carry_it_there_and_back(tmp_path, managed, format, name, options):
    path = ckpt.export(managed, tmp_path / name, format=format, **options)
    assert said(path) == METADATA
    assert said(ckpt.convert(path, tmp_path / "back")) == METADATA
    assert said(ckpt.export(path, tmp_path / "b.safetensors", format="safetensors")) == METADATA


@pytest.mark.parametrize("format", ["npz", "tensorflow"])
def test_formats_without_a_place_for_it_are_written_without_it(tmp_path, managed, format):
    assert said(ckpt.export(managed, tmp_path / f"a.{format}", format=format)) == {}


def header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def test_safetensors_hold_texts_that_others_can_read(tmp_path, managed):
    found = header(ckpt.export(managed, tmp_path / "a.safetensors", format="safetensors"))
    assert found["format"] == "pt"  # or transformers would refuse the file
    assert (found["revision"], found["number"]) == (METADATA["revision"], "3")
    assert json.loads(found["config"]) == METADATA["config"]
    assert all(isinstance(text, str) for text in found.values())
    tree = ckpt.export({"w": np.ones(2)}, tmp_path / "b.safetensors", format="safetensors")
    assert header(tree) == {"format": "pt"} and said(tree) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=8,
).filter(lambda value: "Infinity" not in json.dumps(value))


@given(metadata=st.dictionaries(st.text() | st.sampled_from(["format", "ckpt_jax"]), JSON))
def test_any_metadata_is_the_same_after_safetensors(tmp_path_factory, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    if path.exists():
        path.unlink()
    text = json.dumps({"__metadata__": {"format": "pt", **as_texts(metadata)}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert said(path) == metadata


@pytest.mark.parametrize(
    "odd",
    [
        {"ckpt_jax": "no JSON"},
        {"ckpt_jax": "[]"},
        {"ckpt_jax": '{"json": ["x"]}'},
        {"ckpt_jax": '{"json": ["y"]}', "y": "{"},
        {"ckpt_jax": '{"json": 5}'},
        {"ckpt_jax": '{"own": 5}'},
        {"title": "a", "author": "b"},
    ],
)
def test_texts_of_other_programs_stay_what_they_are(tmp_path, odd):
    text = json.dumps({"__metadata__": {"format": "pt", **odd}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert said(path) == odd


def test_what_managers_and_checkpointers_of_orbax_were_told(tmp_path):
    tree = {"w": np.arange(3.0)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = ocp.args.StandardSave(tree)
        manager.save(3, args=args, custom_metadata={"lr": 0.5, "bad": float("nan")})
    step = ckpt.latest_checkpoint(tmp_path / "run")
    assert said(step) == {"lr": 0.5, "bad": "nan"}
    assert said(ckpt.convert(step, tmp_path / "own")) == {"lr": 0.5, "bad": "nan"}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "item", args=ocp.args.PyTreeSave(tree, custom_metadata={"of": "item"})
        )
    assert said(tmp_path / "item") == {"of": "item"}


def test_orbax_reads_what_was_exported(tmp_path, managed):
    ckpt.export(managed, tmp_path / "run" / "300", format="orbax")
    with ocp.CheckpointManager(
        tmp_path / "run", item_handlers=ocp.StandardCheckpointHandler()
    ) as m:
        assert m.metadata(300).custom_metadata == METADATA


def test_damage_of_it_is_found(tmp_path, managed):
    path = ckpt.export(managed, tmp_path / "a", format="orbax")
    with open(os.path.join(path, "_CHECKPOINT_METADATA"), "w") as file:
        file.write("{")
    with pytest.raises(ckpt.CorruptCheckpointError, match="_CHECKPOINT_METADATA"):
        said(path)
    assert not ckpt.verify(path).ok
