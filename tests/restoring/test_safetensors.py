"""safetensors: single files, several files with an index, directories of a hub."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from foreign import FIXTURES, check_hostile, outcome
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.graph.dtypes import dtype_of

ALL = FIXTURES / "all_dtypes.safetensors"
HUB = FIXTURES / "hub"
PACKED = "float4_e2m1fn_x2"
NAMES = {np.dtype("f4"): "F32", np.dtype("i4"): "I32", np.dtype(ml_dtypes.bfloat16): "BF16"}


def encoded(entries, body=b"", metadata=None) -> bytes:
    """A file with this header, whatever it says."""
    header = json.dumps({**({"__metadata__": metadata} if metadata else {}), **entries}).encode()
    return len(header).to_bytes(8, "little") + header + body


def safetensors(path, arrays, metadata=None):
    at, entries = 0, {}
    for name, array in arrays.items():
        offsets = [at, at + array.nbytes]
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": offsets,
        }
        at += array.nbytes
    body = b"".join([np.ascontiguousarray(array).tobytes() for array in arrays.values()])
    path.write_bytes(encoded(entries, body, metadata))
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


W, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)


# --- what is in them -------------------------------------------------------------------


def test_all_dtypes_of_torch_are_exact():
    names = [name for name in dict(ckpt.list_variables(ALL)) if name != PACKED]
    assert len(names) == 21
    loaded = ckpt.load(ALL, only=names)
    assert loaded.pop("scalar").tolist() == 3.0
    empty = loaded.pop("empty")
    assert (empty.dtype, empty.shape) == (np.float32, (0, 4))
    for name, array in loaded.items():
        expected = np.arange(6, dtype=np.float32).reshape(2, 3)
        if name == "bool":
            expected = expected != 0
        expected = expected.astype(dtype_of(name))
        assert array.dtype == expected.dtype
        # It has no zero: torch writes its smallest number, numpy's casts give no number.
        skip = int(name == "float8_e8m0fnu")
        assert array.tobytes()[skip:] == expected.tobytes()[skip:], name


def test_packed_elements_are_listed_and_refused_with_what_to_do():
    assert PACKED in dict(ckpt.list_variables(ALL))
    with pytest.raises(ckpt.UnsupportedFormatError, match=f"{PACKED}: .*F4.*Convert.*only="):
        ckpt.load(ALL)
    report = ckpt.plan_restore(ALL, {PACKED: jnp.zeros((2, 3))})
    assert "unreadable: arrays of dtype F4" in report.mismatched[0].what


def test_names_are_split_at_points_and_at_nothing_else(tmp_path):
    path = safetensors(tmp_path / "a", {"model.layers.0/1.w": W, "model.b": B})
    loaded = ckpt.load(path)
    assert list(loaded) == ["model"]
    np.testing.assert_array_equal(loaded["model"]["layers"]["0/1"]["w"], W)
    with ckpt.load_checkpoint(path) as reader:
        assert reader.keys() == ["model.b", "model.layers.0/1.w"]
        assert reader.has_tensor("model/b") and reader.has_tensor("model.b")
    assert ckpt.list_variables(path) == [("model/b", (3,)), ("model/layers/0.S1/w", (2, 3))]


def test_restoring_reads_only_the_shards_of_a_target(tmp_path, mesh42):
    array = np.arange(4096 * 64, dtype=np.float32).reshape(4096, 64)
    path = safetensors(tmp_path / "a.safetensors", {"m.x": array, "m.unused": B})
    for spec in (("data", "model"), ("data",), (None, "model"), ()):
        sharding = NamedSharding(mesh42, PartitionSpec(*spec))
        target = {"m": {"x": jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)}}
        restored = ckpt.restore(path, target, allow_unexpected="m/unused")["m"]["x"]
        assert restored.sharding == sharding
        np.testing.assert_array_equal(restored, array)


def test_a_rule_makes_a_stacked_transposed_kernel_of_layers(tmp_path):
    layers = {f"model.layers.{i}.q.weight": W + i for i in range(12)}
    path = safetensors(tmp_path / "a.safetensors", layers)
    rename = [("model/layers/*/q/weight", "blocks/q/kernel", ckpt.Transpose(), ckpt.Stack(axis=0))]
    target = {"blocks": {"q": {"kernel": jnp.zeros((12, 3, 2))}}}
    restored = ckpt.restore(path, target, rename=rename)["blocks"]["q"]["kernel"]
    np.testing.assert_array_equal(restored, np.stack([W.T + i for i in range(12)]))


def test_a_module_is_restored_in_place_and_cast(tmp_path):
    path = safetensors(tmp_path / "a", {"kernel": W.astype(ml_dtypes.bfloat16), "bias": B})
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ckpt.RestoreMismatchError, match="expected dtype float32, got bfloat16"):
        ckpt.restore(path, model)
    ckpt.restore(path, model, options=ckpt.CheckpointOptions(cast=True))
    np.testing.assert_array_equal(model.kernel[...], W)


def test_objects_wait_for_their_values(tmp_path):
    path = safetensors(tmp_path / "a", {"model.w": W, "model.b": B})
    root = ckpt.AutoTrackable()
    status = ckpt.Checkpoint(model=root).read(path)
    root.w = ckpt.Variable(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(root.w.value, W)
    root.b = ckpt.Variable(jnp.zeros(3))
    status.assert_consumed()


def test_a_file_that_was_replaced_gives_no_values_to_objects_that_wait(tmp_path):
    path = safetensors(tmp_path / "a", {"model.w": W})
    root = ckpt.AutoTrackable()
    ckpt.Checkpoint(model=root).read(path).expect_partial()
    safetensors(tmp_path / "b", {"model.w": W + 1})
    os.replace(tmp_path / "b", path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="replaced"):
        root.w = ckpt.Variable(jnp.zeros((2, 3)))


def test_a_dry_run_names_what_is_near(tmp_path):
    path = safetensors(tmp_path / "a", {"model.wieght": W})
    report = ckpt.plan_restore(path, {"model": {"weight": jnp.zeros((2, 3))}})
    assert [entry.path for entry in report.missing] == ["model/weight"]
    assert "wieght" in str(report)


def test_verifying_reads_everything_and_skips_what_is_refused(tmp_path):
    report = ckpt.verify(HUB)
    assert report.ok and report.keys == 3 and report.nbytes == 32780
    assert ckpt.verify(safetensors(tmp_path / "a", {"w": W})).ok


# --- several files ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    shutil.copytree(HUB, tmp_path / "hub", copy_function=shutil.copy)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_a_directory_and_its_index_are_the_same_checkpoint(name):
    loaded = ckpt.load(HUB / name)
    assert loaded["a"]["bias"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(loaded["b"]["weight"], loaded["a"]["weight"].T)


def test_a_hub_may_keep_its_files_elsewhere(hub, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(hub.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(blobs / str(number))
    for path in (hub, hub / "model.safetensors.index.json"):
        assert ckpt.load(path)["a"]["bias"].tolist() == [1, 1, 1]
    assert list(ckpt.load(hub / "model-00002-of-00002.safetensors")) == ["b"]


def test_missing_files_are_all_named(hub):
    for file in hub.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ckpt.CorruptCheckpointError, match="2 of 2 files are missing.*00001.*00002"):
        ckpt.load(hub)


def test_an_index_that_leads_out_of_its_directory_is_refused(hub):
    index = hub / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "..", "", "a\0b", 7):
        index.write_text(json.dumps({"weight_map": {"a.weight": name}}))
        with pytest.raises(ckpt.CorruptCheckpointError, match="it is no index"):
            ckpt.load(hub)


def test_values_that_are_not_where_the_index_says_are_named(hub):
    index = hub / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["a.scale"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"a.scale in model-00002"):
        ckpt.load(hub)


def test_a_part_without_its_index_is_no_model(hub):
    (hub / "model.safetensors.index.json").unlink()
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"its index model\.safetensors\.index"):
        ckpt.load(hub)


def test_which_model_of_a_directory_is_meant_has_to_be_clear(tmp_path):
    safetensors(tmp_path / "one.safetensors", {"w": W})
    assert list(ckpt.load(tmp_path)) == ["w"]
    safetensors(tmp_path / "two.safetensors", {"w": W})
    with pytest.raises(ckpt.UnsupportedFormatError, match="expected one model, found one.*two"):
        ckpt.load(tmp_path)
    safetensors(tmp_path / "model.safetensors", {"b": B})
    assert list(ckpt.load(tmp_path)) == ["b"]


def test_files_with_parts_of_arrays_are_refused(tmp_path):
    path = safetensors(tmp_path / "a", {"w": W}, {"DCP_SHARDING_INFO": "{}"})
    with pytest.raises(ckpt.UnsupportedFormatError, match="parts of arrays.*consolidate"):
        ckpt.load(path)


# --- damage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (encoded({"a": entry()}, bytes(7)), "the arrays take 8 bytes, the file has 7"),
        (encoded({"a": entry()}, bytes(9)), "the arrays take 8 bytes, the file has 9"),
        (encoded({"a": entry(offsets=(4, 12))}, bytes(12)), "'a'.* leaves a hole"),
        (encoded({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b'.* overlaps"),
        (encoded({"a": entry(shape=(3,))}, bytes(8)), r"float32\[3\] takes 12 bytes"),
        (encoded({"a": entry(shape=(1 << 70, 1 << 70))}, bytes(8)), "takes .* bytes"),
        (encoded({"a": entry(shape=(-2, -1))}, bytes(8)), "no sizes"),
        (encoded({"a": entry(shape=(True, 2))}, bytes(8)), "no sizes"),
        (encoded({"a": entry(offsets=(8, 0))}, bytes(8)), "takes 8 bytes"),
        (encoded({"a": entry("F4", offsets=(8, 0))}, bytes(8)), "leaves a hole|overlaps"),
        (encoded({"a": [1]}), "describes no array"),
        (encoded({"a": {"dtype": "F32"}}), "describes no array"),
        (encoded({"a": entry() | {"shape": "x"}}, bytes(8)), "describes no array"),
        (b"\x02" + bytes(7) + b"{]", "its header is wrong"),
        ((5 << 20).to_bytes(8, "little") + b'{"a":' * (1 << 20), "nested too deeply"),
        ((11).to_bytes(8, "little") + b'{"a":1,"a":', "its header is wrong"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "does not begin like"),
        (b"", "does not begin like"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data, what):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match=what) as raised:
        ckpt.load(path)
    assert raised.value.file == str(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    header = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ckpt.CorruptCheckpointError, match="'a' occurs twice"):
        ckpt.load(path)


def test_directories_and_other_files_are_not_taken_for_one(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    path = ckpt.save(tmp_path / "x.safetensors" / "own", {"w": W})
    np.testing.assert_array_equal(ckpt.load(path)["w"], W)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(tmp_path / "x.safetensors" / "nothing")


@pytest.mark.parametrize("seed", range(3))
def test_hostile_files_are_refused_or_harmless(tmp_path, seed):
    data = ALL.read_bytes()
    found = check_hostile(tmp_path / "a.safetensors", data, 150, seed)
    assert found["refused"] > 50 and not found["none"]


def test_every_truncation_is_found(tmp_path):
    data = ALL.read_bytes()
    path = tmp_path / "a.safetensors"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        assert outcome(path) == "refused", length
