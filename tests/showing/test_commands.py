"""The command, in this process: verbs, exit codes, JSON, errors."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main


@pytest.fixture
def run(capsys):
    """Runs the command; returns the exit code, stdout and stderr."""

    def run(*argv):
        code = main([str(each) for each in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_json(run):
    def run_json(*argv):
        code, out, _ = run(*argv, "--json")
        return code, json.loads(out, parse_constant=lambda name: pytest.fail(name))

    return run_json


@pytest.fixture
def managed(tmp_path):
    """A directory with three checkpoints that have metrics."""
    checkpoint = ckpt.Checkpoint(w=jnp.arange(6.0).reshape(2, 3))
    manager = ckpt.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=None)
    for loss, accuracy in ((0.5, 0.7), (0.25, 0.9), (0.75, 0.8)):
        manager.save(metrics={"loss": loss, "accuracy": accuracy})
    return str(tmp_path / "run")


def truncate_an_array_file(path):
    for directory, _, files in os.walk(os.path.join(path, "shards")):
        for file in files:
            if os.path.basename(directory) == "c":
                os.truncate(os.path.join(directory, file), 3)


# --- ls ---------------------------------------------------------------------------------


def test_ls_says_what_is_latest_and_best(run_json, managed):
    code, found = run_json("ls", managed, "--max", "accuracy")
    assert code == 0
    assert [each["step"] for each in found["checkpoints"]] == [1, 2, 3]
    assert [each["latest"] for each in found["checkpoints"]] == [False, False, True]
    assert [each["best"] for each in found["checkpoints"]] == [[], ["accuracy", "loss"], []]
    assert found["checkpoints"][0]["metrics"] == {"loss": 0.5, "accuracy": 0.7}
    assert found["checkpoints"][0]["nbytes"] == 2 * 3 * 4 + 8  # and the save counter


def test_ls_takes_the_smallest_value_for_the_best_unless_it_is_told(run, managed):
    code, out, _ = run("ls", managed)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert "lowest accuracy" in lines["ckpt-1"]
    assert "lowest loss" in lines["ckpt-2"]
    assert "highest accuracy" in run("ls", managed, "--max", "accuracy")[1]


@pytest.mark.parametrize("part", ["manifest", "index", "graph", "array", "shard"])
def test_ls_finds_damage_without_reading_arrays(run, run_json, managed, part):
    path = f"{managed}/ckpt-3"
    if part == "manifest":
        with open(f"{path}/manifest.ckpt", "r+b") as file:
            file.write(b"damage")
    elif part == "index":
        with open(f"{path}/meta/index", "r+b") as file:
            file.write(b"damage")
    elif part == "graph":
        (name,) = set(os.listdir(f"{path}/meta")) - {"index"}
        os.truncate(f"{path}/meta/{name}", 5)
    elif part == "array":
        truncate_an_array_file(path)
    else:
        shutil.rmtree(f"{path}/shards")
    code, found = run_json("ls", managed)
    assert code == 1
    assert [each["damaged"] for each in found["checkpoints"]] == [False, False, True]
    assert [each["latest"] for each in found["checkpoints"]] == [False, True, False]
    code, out, _ = run("ls", managed)
    assert code == 1 and "DAMAGED" in out and "ckpt-3 is damaged: " in out


def test_ls_lists_what_is_unfinished(run, run_json, managed):
    os.mkdir(f"{managed}/ckpt-4.staging-{'0' * 32}")
    code, found = run_json("ls", managed)
    assert code == 0 and len(found["checkpoints"]) == 3
    assert [os.path.basename(each["path"]) for each in found["unfinished"]] == [
        f"ckpt-4.staging-{'0' * 32}"
    ]
    assert "unfinished: " in run("ls", managed)[1]


def test_ls_shows_a_checkpoint_of_a_newer_format_as_unreadable_and_not_as_damaged(
    run_json, managed, monkeypatch
):
    monkeypatch.setattr("ckpt_jax.store.index.FORMAT_VERSION", 999)
    code, found = run_json("ls", managed)
    assert code == 0
    assert not any(each["ok"] or each["damaged"] for each in found["checkpoints"])


def test_ls_lists_checkpoints_of_other_libraries_beside_ours(run_json, managed):
    ckpt.export(f"{managed}/ckpt-1", f"{managed}/w.safetensors", format="safetensors")
    with open(f"{managed}/notes.pkl", "wb") as file:
        file.write(b"\x80\x04N.")
    code, found = run_json("ls", managed)
    formats = {each["name"]: each["format"] for each in found["checkpoints"]}
    assert code == 0
    assert formats == {
        "ckpt-1": "ckpt_jax",
        "ckpt-2": "ckpt_jax",
        "ckpt-3": "ckpt_jax",
        "w.safetensors": "safetensors",
    }


def test_ls_of_a_directory_with_a_broken_state_file_lists_it_all_the_same(run_json, managed):
    with open(f"{managed}/checkpoint", "w") as file:
        file.write("?")
    with open(f"{managed}/checkpoint-metrics.json", "w") as file:
        file.write("?")
    code, found = run_json("ls", managed)
    assert code == 0 and len(found["checkpoints"]) == 3
    assert "metrics are not known" in found["note"]


# --- show -------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, mesh42):
    """A checkpoint with a sharded array, a shared one, and Python values."""
    kernel = jax.device_put(
        jnp.zeros((8, 4)), NamedSharding(mesh42, PartitionSpec("data", "model"))
    )
    shared = ckpt.Variable(jnp.ones(3))
    root = ckpt.AutoTrackable()
    root.a, root.b = shared, shared
    path = str(tmp_path / "tree")
    values = {"layers": [{"w": kernel}, *[{"w": jnp.ones(2)} for _ in range(10)]]}
    return ckpt.Checkpoint(params=values, objects=root, step=7, name="run").write(path)


def test_show_has_everything_in_json(run_json, tree):
    code, found = run_json("show", tree)
    entries = {entry["path"]: entry for entry in found["entries"]}
    assert code == 0 and found["format"] == "ckpt_jax"
    kernel = entries["params/layers/0/w"]
    assert (kernel["dtype"], kernel["shape"], kernel["nbytes"]) == ("float32", [8, 4], 128)
    assert kernel["sharding"]["partitions"] == [["data"], ["model"]]
    assert kernel["sharding"]["mesh"] == {"data": 4, "model": 2}
    assert entries["objects/a"]["shared"] == ["objects/b"]
    assert entries["step"]["kind"] == "int" and entries["name"]["kind"] == "str"
    totals = {each["path"]: (each["values"], each["nbytes"]) for each in found["subtrees"]}
    assert totals["objects"] == (1, 12)
    assert totals["params/layers"] == (11, 128 + 10 * 8)
    assert found["nbytes"] == sum(entry["nbytes"] for entry in found["entries"])


def test_show_draws_a_tree_in_which_numbers_are_in_order(run, tree):
    code, out, _ = run("show", tree)
    assert code == 0
    assert out.index("\n    2/") < out.index("\n    10/")
    assert "(data, model) of data=4, model=2" in out
    assert "shared with objects/a" in out


def test_show_of_an_optimizer_names_slots(run_json, tmp_path):
    import optax

    params = {"w": jnp.ones(2)}
    state = optax.adam(1e-3).init(params)
    checkpoint = ckpt.Checkpoint(params=params, opt=ckpt.optax_state(state, params))
    _, found = run_json("show", checkpoint.write(tmp_path / "a"))
    slots = [entry["slot"] for entry in found["entries"] if entry["slot"]]
    assert {slot["variable"] for slot in slots} == {"params/w"} and len(slots) == 2
    assert {slot["optimizer"] for slot in slots} == {"opt"}


def test_show_sorts_cuts_and_selects(run, run_json, tree):
    _, found = run_json("show", tree, "--sort", "size", "--top", "2")
    sizes = [entry["nbytes"] for entry in found["entries"]]
    assert len(sizes) == 2 and sizes == sorted(sizes, reverse=True)
    _, out, _ = run("show", tree, "--depth", "1")
    assert "params/" in out and "layers" not in out
    for pattern in ("params/layers/0/w", "params/layers/0", "*/layers/0/*"):
        _, found = run_json("show", tree, pattern)
        assert [entry["path"] for entry in found["entries"]] == ["params/layers/0/w"]
    _, found = run_json("show", tree, "objects/b")  # another path of a shared value
    assert [entry["path"] for entry in found["entries"]] == ["objects/b"]


def test_show_objects_has_the_edges(run, run_json, tree):
    _, found = run_json("show", tree, "--objects")
    (root, *_), objects = found["objects"], {each["path"]: each for each in found["objects"]}
    assert {edge["name"] for edge in root["children"]} >= {"params", "objects", "step"}
    edges = {edge["name"]: edge["id"] for edge in objects["objects"]["children"]}
    assert edges["a"] == edges["b"]
    assert "(shared)" in run("show", tree, "--objects")[1]


def test_names_in_a_checkpoint_cannot_steer_the_terminal(run, tmp_path):
    path = ckpt.save(tmp_path / "a", {"\x1b[2Jevil\nname": np.ones(2)})
    verbs = ["show"], ["stats"], ["show", "--objects"], ["plan", path], ["verify"], ["diff", path]
    for verb in [[verb, path, *rest] for verb, *rest in verbs]:
        code, out, _ = run(*verb)
        assert code == 0 and "\x1b" not in out and "evil\nname" not in out


def test_a_directory_stands_for_its_latest_checkpoint(run_json, managed):
    assert run_json("show", managed)[1]["path"] == f"{managed}/ckpt-3"


def test_what_was_merged_by_hand_is_shown_by_its_keys(run, run_json, tmp_path):
    shard = ckpt.io.write_shard(str(tmp_path / "shard"), {"a": np.ones(3, np.int8)})
    path = ckpt.io.merge_shards([shard], str(tmp_path / "merged"))
    assert [entry["path"] for entry in run_json("show", path)[1]["entries"]] == ["a"]
    code, _, err = run("show", path, "--objects")
    assert code == 2 and "no object graph" in err


# --- get --------------------------------------------------------------------------------


def test_get_prints_a_value_or_a_box_of_it(run, run_json, managed):
    assert run("get", managed, "w")[1] == "[[0. 1. 2.]\n [3. 4. 5.]]\n"
    _, found = run_json("get", managed, "w", "1,-2:")
    assert found["value"] == [[4.0, 5.0]] and found["box"] == [[1, 2], [1, 3]]
    assert run_json("get", managed, "save_counter")[1]["value"] == 3


def test_json_has_no_numbers_that_json_does_not_have(run_json, tmp_path):
    tree = {
        "f": np.array([np.nan, np.inf, -np.inf, 1]),
        "b": np.array([1.5], ml_dtypes.bfloat16),
        "c": np.array([1 + 2j]),
        "i": np.array([3], ml_dtypes.int4),
        "bytes": b"\x00\xff",
        "flag": np.array([True]),
    }
    path = ckpt.save(tmp_path / "a", tree)
    values = {name: run_json("get", path, name)[1]["value"] for name in tree}
    assert values == {
        "f": ["nan", "inf", "-inf", 1.0],
        "b": [1.5],
        "c": [{"real": 1.0, "imag": 2.0}],
        "i": [3],
        "bytes": {"base64": "AP8="},
        "flag": [True],
    }


@pytest.mark.parametrize("box", ["a", "0:9", "0,0,0", "1:0", ":,", "1:2:1"])
def test_a_wrong_box_is_an_error(run, managed, box):
    code, out, err = run("get", managed, "w", box)
    assert code == 2 and not out and err


def test_a_wrong_path_names_the_nearest(run, tree):
    code, _, err = run("get", tree, "params/layers/0/v")
    assert code == 2 and "params/layers/0/w" in err and err.count("\n") == 1
    code, _, err = run("show", tree, "parms/layers/0/w")
    assert code == 2 and "params/layers/0/w" in err and err.count("\n") == 1


# --- stats ------------------------------------------------------------------------------


def test_stats_are_those_of_numpy(run_json, tmp_path):
    rng = np.random.default_rng(0)
    large = rng.standard_normal((3000, 1000)).astype(np.float32)  # more than one portion
    tree = {
        "large": large,
        "odd": np.array([1.0, np.nan, np.inf, -np.inf, 3.0]),
        "none": np.array([np.nan]),
        "empty": np.zeros((0, 3)),
        "huge": np.array([1e308, -1e308, 1e308]),
        "int": np.array([2**62 + 1, -5]),
        "text": "text",
    }
    code, found = run_json("stats", ckpt.save(tmp_path / "a", tree))
    assert code == 0 and found["left_out"] == 1
    arrays = {each["path"]: each for each in found["arrays"]}
    assert arrays["large"]["min"] == large.min() and arrays["large"]["max"] == large.max()
    np.testing.assert_allclose(arrays["large"]["mean"], large.astype(float).mean())
    np.testing.assert_allclose(arrays["large"]["norm"], np.linalg.norm(large.astype(float)))
    odd = arrays["odd"]
    assert (odd["min"], odd["max"], odd["mean"], odd["nan"], odd["inf"]) == (1, 3, 2, 1, 2)
    assert (arrays["none"]["min"], arrays["none"]["nan"]) == (None, 1)
    assert (arrays["empty"]["elements"], arrays["empty"]["mean"]) == (0, None)
    np.testing.assert_allclose(arrays["huge"]["mean"], 1e308 / 3)
    np.testing.assert_allclose(arrays["huge"]["norm"], 3**0.5 * 1e308)
    assert (arrays["int"]["max"], arrays["int"]["min"]) == (2**62 + 1, -5)


# --- diff -------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    same = np.arange(4.0, dtype=np.float32)
    a = {"same": same, "gone": same, "shape": same, "dtype": same, "value": same, "text": "a"}
    b = {
        "same": same,
        "new": same,
        "shape": same[:2],
        "dtype": same.astype(np.float64),
        "value": same + np.float32([0, 0, 0, 1]),
        "text": "b",
    }
    return ckpt.save(tmp_path / "a", a), ckpt.save(tmp_path / "b", b)


def test_diff_finds_every_kind_of_difference(run, run_json, pair):
    code, found = run_json("diff", *pair)
    assert code == 1 and not found["values_compared"]
    kinds = {each["path"]: each["change"] for each in found["changes"]}
    structure = {"gone": "removed", "new": "added", "shape": "reshaped", "dtype": "retyped"}
    assert kinds == structure
    code, found = run_json("diff", *pair, "--values")
    changes = {each["path"]: each for each in found["changes"]}
    kinds = {path: each["change"] for path, each in changes.items()}
    assert code == 1 and kinds == structure | {"value": "changed", "text": "changed"}
    amount = {"differing": 1, "elements": 4, "max_absolute": 1.0, "max_relative": 0.25}
    assert changes["value"]["amount"] == amount
    assert changes["dtype"]["amount"]["differing"] == 0
    assert "1 of 4 differ, by at most 1 (relative 0.25)" in run("diff", *pair, "--values")[1]


@pytest.mark.parametrize(("rtol", "code"), [("0.3", 0), ("0.1", 1)])
def test_a_tolerance_hides_small_differences(run, tmp_path, rtol, code):
    a = ckpt.save(tmp_path / "a", {"x": np.array([4.0, np.nan, np.inf])})
    b = ckpt.save(tmp_path / "b", {"x": np.array([5.0, np.nan, np.inf])})
    assert run("diff", a, b, "--rtol", rtol)[0] == code


def test_nan_is_another_value_than_a_number(run_json, tmp_path):
    a = ckpt.save(tmp_path / "a", {"x": np.array([4.0, 1.0])})
    b = ckpt.save(tmp_path / "b", {"x": np.array([np.nan, 1.0])})
    code, found = run_json("diff", a, b, "--rtol", "1e9")
    assert code == 1 and found["changes"][0]["amount"]["max_absolute"] == "nan"


def test_integers_are_compared_exactly(run_json, tmp_path):
    a = ckpt.save(tmp_path / "a", {"x": np.array([2**62])})
    b = ckpt.save(tmp_path / "b", {"x": np.array([2**62 + 1])})
    code, found = run_json("diff", a, b, "--values")
    assert code == 1 and found["changes"][0]["amount"]["max_absolute"] == 1.0


def test_diff_works_across_formats_and_counts_a_shared_value_at_each_place(run, tmp_path):
    shared = jnp.arange(3.0)
    tree = {"a": {"w": shared}, "b": {"w": shared}}
    path = ckpt.save(tmp_path / "a", tree)
    assert len(ckpt.load_checkpoint(path).keys()) == 1  # it is shared
    for format, ending in (("npz", ".npz"), ("safetensors", ".safetensors")):
        other = ckpt.export(path, tmp_path / f"x{ending}", format=format)
        code, out, _ = run("diff", path, other, "--values")
        assert code == 0, out


# --- verify, plan -----------------------------------------------------------------------


def test_verify_reads_one_checkpoint_or_all_of_a_directory(run, run_json, managed):
    code, found = run_json("verify", f"{managed}/ckpt-1")
    assert code == 0 and found["ok"] and len(found["checkpoints"]) == 1
    truncate_an_array_file(f"{managed}/ckpt-2")
    code, found = run_json("verify", managed)
    assert code == 1 and not found["ok"]
    assert [each["ok"] for each in found["checkpoints"]] == [True, False, True]
    assert found["checkpoints"][1]["problems"]
    assert run("verify", managed)[0] == 1


def test_plan_compares_with_a_checkpoint_or_a_file(run, run_json, tmp_path):
    tree = {"layers": [{"w": np.ones((2, 3), np.float32)}], "step": 7}
    path = ckpt.save(tmp_path / "a", tree)
    assert run("plan", path, path)[0] == 0
    spec = {
        "layers/0/w": {"shape": [2, 3], "dtype": "float32"},
        "step": {"shape": [], "dtype": "int64"},
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    assert run("plan", path, file)[0] == 0
    spec["layers/0/w"]["shape"] = [3, 2]
    spec["head/w"] = {"shape": [1], "dtype": "bfloat16"}
    del spec["step"]
    file.write_text(json.dumps(spec))
    code, found = run_json("plan", path, file)
    assert code == 1 and not found["exact"]
    paths = {kind: [e["path"] for e in found[kind]] for kind in ("missing", "unexpected")}
    assert paths == {"missing": ["head/w"], "unexpected": ["step"]}
    assert [entry["path"] for entry in found["mismatched"]] == ["layers/0/w"]
    file.write_text(run("show", path, "--json")[1])  # what `show` prints is a spec as well
    assert run("plan", path, file)[0] == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"a": 1}', '{"a": {"shape": [-1], "dtype": "float32"}}',
             '{"a": {"shape": [1], "dtype": "no"}}', '{"a": {"shape": [1]}}'],
)  # fmt: skip
def test_a_wrong_spec_is_an_error_that_shows_a_right_one(run, tmp_path, managed, text):
    (tmp_path / "spec.json").write_text(text)
    code, _, err = run("plan", managed, tmp_path / "spec.json")
    assert code == 2 and '{"params/w"' in err and err.count("\n") == 1


# --- export, convert, gc, rm ------------------------------------------------------------


def test_export_and_convert_go_there_and_back(run, run_json, tmp_path, managed):
    file = tmp_path / "w.safetensors"
    code, found = run_json("export", managed, file, "--format", "safetensors", "--rename", "w=x")
    assert code == 0 and found["format"] == "safetensors"
    code, _, _ = run("convert", file, tmp_path / "back", "--rename", "x=w")
    assert code == 0
    np.testing.assert_array_equal(
        ckpt.load(tmp_path / "back")["w"], np.arange(6, dtype=np.float32).reshape(2, 3)
    )
    code, _, err = run("export", managed, tmp_path / "y", "--format", "nope")
    assert code == 2 and "safetensors" in err
    assert run("convert", managed, tmp_path / "z", "--rename", "w")[0] == 2
    assert run("convert", managed, tmp_path / "back")[0] == 2
    assert run("convert", managed, tmp_path / "back", "--overwrite")[0] == 0
    assert "save_counter" in ckpt.load(tmp_path / "back")


def test_a_checkpoint_is_copied_into_a_store_and_looked_at_there(run, run_json, managed):
    directory = "memory://test-of-the-command/run"
    for _ in range(2):
        code, found = run_json("copy", managed, f"{directory}/ckpt-9", "--overwrite")
        assert code == 0 and found["destination"] == f"{directory}/ckpt-9"
    assert run("copy", managed, f"{directory}/ckpt-9")[0] == 2
    code, found = run_json("ls", directory)
    (listed,) = found["checkpoints"]
    assert code == 0 and listed["name"] == "ckpt-9" and listed["ok"] and listed["latest"]
    for verb in ("show", "stats", "verify"):
        assert run(verb, f"{directory}/ckpt-9")[0] == 0
    assert run("diff", managed, f"{directory}/ckpt-9", "--values")[0] == 0
    assert run("rm", f"{directory}/ckpt-9", "--yes")[0] == 0
    assert run("ls", directory)[0] == 2


def test_gc_removes_what_is_provably_abandoned(run_json, managed):
    staging = f"{managed}/ckpt-9.staging-{'0' * 32}"
    os.mkdir(staging)
    os.utime(staging, (0, 0))
    code, found = run_json("gc", managed, "--dry-run")
    assert (code, found["removed"], os.path.exists(staging)) == (0, [staging], True)
    code, found = run_json("gc", managed)
    assert (code, found["removed"], os.path.exists(staging)) == (0, [staging], False)
    assert len(run_json("ls", managed)[1]["checkpoints"]) == 3


def test_rm_asks(run, managed, monkeypatch):
    path = f"{managed}/ckpt-1"
    for answer in ("", "n\n", "yes please\n"):
        monkeypatch.setattr("sys.stdin", _Answer(answer))
        code, _, err = run("rm", path)
        assert code == 2 and "Remove" in err and os.path.exists(path)
    monkeypatch.setattr("sys.stdin", _Answer("y\n"))
    assert run("rm", path)[0] == 0 and not os.path.exists(path)
    code, _, err = run("rm", path, "--yes")
    assert code == 2 and "there is no checkpoint" in err


class _Answer:
    def __init__(self, text):
        self.text = text

    def readline(self):
        return self.text


def test_rm_of_the_latest_makes_the_one_before_it_the_latest(run, run_json, managed):
    assert run("rm", f"{managed}/ckpt-3", "--yes")[0] == 0
    assert ckpt.latest_checkpoint(managed) == f"{managed}/ckpt-2"
    found = run_json("ls", managed)[1]["checkpoints"]
    assert [(each["step"], each["latest"]) for each in found] == [(1, False), (2, True)]
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(w=jnp.ones(1)), managed, max_to_keep=None)
    assert manager.steps == (1, 2) and manager.metrics(2) == {"loss": 0.25, "accuracy": 0.9}


def test_rm_takes_nothing_but_checkpoints_of_this_library(run, tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, a=np.ones(1))
    assert run("rm", file, "--yes")[0] == 2 and file.exists()
    assert run("rm", tmp_path, "--yes")[0] == 2 and file.exists()


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["ls", "nowhere"], ["show", "nowhere"], ["get", "nowhere", "a"], ["stats", "nowhere"],
        ["diff", "nowhere", "nowhere"], ["verify", "nowhere"], ["plan", "nowhere", "nowhere"],
        ["export", "nowhere", "x", "--format", "npz"], ["convert", "nowhere", "x"],
        ["gc", "nowhere"], ["rm", "nowhere", "--yes"], ["show", ""], ["show", "a\0b"],
    ],
)  # fmt: skip
def test_what_cannot_run_ends_with_2_and_one_line(run, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    assert code == 2 and not out
    assert err.startswith("ckpt_jax: ") and err.count("\n") == 1


@pytest.mark.parametrize("verb", ["ls", "gc", "show", "verify"])
@pytest.mark.parametrize(
    ("path", "what"), [("", "empty"), ("file:///tmp", "file system"), ("~/x", "expanduser")]
)
def test_a_path_that_cannot_be_one_is_told_from_one_that_is_not_there(run, verb, path, what):
    code, _, err = run(verb, path)
    assert code == 2 and what in err


@pytest.mark.parametrize("argv", [[], ["nope"], ["show"], ["show", "a", "--top", "0"],
                                  ["diff", "a", "b", "--rtol", "-1"],
                                  ["diff", "a", "b", "--rtol", "x"]])  # fmt: skip
def test_wrong_arguments_end_with_2(run, argv):
    code, _, err = run(*argv)
    assert code == 2 and " _" not in err  # no name of a function


def test_debug_shows_the_traceback(run):
    code, _, err = run("show", "nowhere", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize("verb", ["show", "stats", "get"])
def test_damage_on_the_way_is_an_error(run, managed, verb):
    truncate_an_array_file(f"{managed}/ckpt-3")
    with open(f"{managed}/ckpt-3/meta/index", "r+b") as file:
        file.write(b"damage")
    argv = [verb, f"{managed}/ckpt-3"] + ["w"] * (verb == "get")
    code, _, err = run(*argv)
    assert code == 2 and err.count("\n") == 1


# --- other formats, completion ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["new.pt", "hub", "all_dtypes.safetensors", "types.msgpack", "dcp_adamw", "mlp_adam.eqx",
     "keras2.h5", "keras3.keras",
     "tensorflow/keras3", "tensorflow/dtypes", "tensorflow/strings", "tensorflow/saved_model"],
)  # fmt: skip
def test_every_format_is_shown_measured_and_equal_to_itself(run_json, name):
    path = FIXTURES / name
    code, found = run_json("show", path)
    assert code == 0 and found["entries"] and found["format"] != "ckpt_jax"
    assert run_json("stats", path)[0] == 0
    code, found = run_json("diff", path, path, "--values")
    assert code == 0 and not found["changes"]
    assert run_json("verify", path)[0] == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_verbs_and_options(run, shell):
    code, out, _ = run("completion", shell)
    assert code == 0
    verbs = [
        "ls",
        "show",
        "get",
        "stats",
        "diff",
        "verify",
        "plan",
        "export",
        "convert",
        "copy",
        "gc",
        "rm",
    ]
    assert all(verb in out for verb in verbs)
    assert ("--rtol" in out or "-l rtol" in out) and "debug" not in out
