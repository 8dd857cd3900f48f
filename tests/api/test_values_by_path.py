"""Values are called by their paths wherever they are called by their keys; reports stay short."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parts import data_files

import ckpt_jax as ckpt
from ckpt_jax.graph import codec


@pytest.fixture
def path(tmp_path):
    params = {"dense": {"w": jnp.arange(6.0).reshape(2, 3)}}
    opt = ckpt.optax_state(optax.adam(0.1).init(params), params)
    tree = {"params": params, "opt": opt, "ema": params, "step": 7, "a/b": "x"}
    return ckpt.save(tmp_path / "a", tree)


def test_the_paths_of_all_values_are_listed(path):
    with ckpt.load_checkpoint(path) as reader:
        assert reader.paths() == [
            "a.Sb",
            "ema/dense/w",
            "opt/ScaleByAdamState.count",
            "opt/ScaleByAdamState.mu/params/dense/w",
            "opt/ScaleByAdamState.nu/params/dense/w",
            "params/dense/w",
            "step",
        ]


def test_the_list_of_variables_has_the_paths_that_reports_patterns_and_rules_use(path):
    listed = dict(ckpt.list_variables(path))
    with ckpt.load_checkpoint(path) as reader:
        assert list(listed) == reader.paths()
        for name, shape in listed.items():
            assert np.shape(ckpt.load_variable(path, name)) == shape
            assert ckpt.load(path, only=name)
    report = ckpt.plan_restore(path, {})
    assert {entry.path for entry in report.unexpected} <= listed.keys()


def test_what_has_no_path_is_listed_under_its_key(tmp_path):
    shard = ckpt.io.write_shard(tmp_path / "s", {"a": np.ones(2), "b/c": np.ones(3)})
    merged = ckpt.io.merge_shards([shard], tmp_path / "m")
    assert ckpt.list_variables(merged) == [("a", (2,)), ("b/c", (3,))]


def test_every_value_is_read_by_its_path_as_by_its_key(path):
    with ckpt.load_checkpoint(path) as reader:
        for entry in reader.paths():
            assert reader.has_tensor(entry)
            ckpt.load_variable(path, entry)
        for key in list(reader.keys()):
            assert reader.has_tensor(key)
        assert reader.get_tensor("step") == 7
        assert reader.get_tensor("a.Sb") == "x"
        assert reader.get_tensor("ema/dense/w", box=((0, 1), (1, 3))).tolist() == [[1, 2]]


def test_a_shared_value_is_read_by_each_of_its_paths(path):
    assert ckpt.load_variable(path, "params/dense/w").shape == (2, 3)
    assert ckpt.load_variable(path, "ema/dense/w").shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("params/dense/v", r"nearest: params/dense/w"),
        ("ema/dense", r"nearest: ema/dense/w"),
        ("opt", r"below it are opt/ScaleByAdamState"),
        ("stepp/.ATTRIBUTES/VARIABLE_VALUE", r"nearest: step/.ATTRIBUTES/VARIABLE_VALUE"),
    ],
)
def test_a_name_that_is_neither_says_what_is_near(path, name, hint):
    with pytest.raises(KeyError, match=hint) as caught:
        ckpt.load_variable(path, name)
    assert repr(name) in str(caught.value) and "paths()" in str(caught.value)


def test_a_merged_checkpoint_without_a_graph_has_keys_only(tmp_path):
    shard = ckpt.io.write_shard(tmp_path / "s", {"a": np.ones(2)})
    merged = ckpt.io.merge_shards([shard], tmp_path / "m")
    with ckpt.load_checkpoint(merged) as reader:
        assert reader.paths() == [] and reader.has_tensor("a")
        with pytest.raises(KeyError, match="'b'"):
            reader.get_tensor("b")


def test_names_of_an_npz_file_are_paths(tmp_path):
    np.savez(tmp_path / "a.npz", **{"dense/w": np.ones(2)})
    assert ckpt.load_variable(tmp_path / "a.npz", "dense/w").tolist() == [1, 1]


def test_object_metadata_gives_the_protobuf(path):
    graph = ckpt.object_metadata(path)
    message = graph.to_proto()
    assert type(message).__name__ == "TrackableObjectGraph"
    assert len(message.nodes) == len(graph.nodes)
    assert codec.decode(message.SerializeToString()) == graph
    children = {child.local_name for child in message.nodes[0].children}
    assert children == {"a/b", "ema", "opt", "params", "step"}


def damaged(path):
    (file,) = data_files(path)
    data = bytearray(file.read_bytes())
    for position in range(len(data) // 4, len(data) // 2, 100):
        data[position] ^= 1
    file.write_bytes(data)


def test_the_text_of_a_verification_has_one_short_line_for_each_file(tmp_path):
    tree = {f"layer_{i}": {"w": np.arange(1000.0) + i, "b": i} for i in range(30)}
    path = ckpt.save(tmp_path / "a", tree)
    damaged(path)
    report = ckpt.verify(path)
    assert len(report.problems) > 5
    text = str(report)
    head, *lines, advice = text.splitlines()
    assert f"{len(report.problems)} problems in 1 file:" in head
    assert len(lines) == 1 and len(lines[0]) < 250
    assert f"{len(report.problems)} values (" in lines[0] and " more)" in lines[0]
    assert ".ATTRIBUTES" not in text and ".problems" in advice


def test_damage_without_values_is_named_by_file(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": np.arange(10)})
    (Path(path) / "manifest.ckpt").write_bytes(b"x")
    head, line, _ = str(ckpt.verify(path)).splitlines()
    assert "1 problem in 1 file" in head and len(line) < 250
