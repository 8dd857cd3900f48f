"""Out to the formats of other libraries, and in from any of them."""

import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from calls import calls
from flax import nnx
from foreign import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax import readers

W, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
TREE = {"layers": [{"w": W, "b": B}, {"w": W + 1, "b": B}], "step": 7}


def names_of(path):
    with ckpt.load_checkpoint(path) as reader:
        return reader.get_variable_to_shape_map()


def is_empty(directory, *but):
    return sorted(os.listdir(directory)) == sorted(but)


# --- safetensors -----------------------------------------------------------------------


def test_a_tree_becomes_one_file(tmp_path):
    path = ckpt.export(TREE, tmp_path / "a.safetensors", format="safetensors")
    assert path == tmp_path / "a.safetensors" or path == str(tmp_path / "a.safetensors")
    assert names_of(path) == {
        "layers.0.b": (3,),
        "layers.0.w": (2, 3),
        "layers.1.b": (3,),
        "layers.1.w": (2, 3),
        "step": (),
    }
    restored = ckpt.restore(path, jax.tree.map(lambda x: x * 0, TREE))
    assert restored["step"] == 7
    np.testing.assert_array_equal(restored["layers"][1]["w"], W + 1)
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"} and not length % 8
    assert is_empty(tmp_path, "a.safetensors")


def test_a_directory_is_one_of_a_hub(tmp_path):
    path = ckpt.export(TREE, tmp_path / "one", format="safetensors")
    assert os.listdir(path) == ["model.safetensors"]
    path = ckpt.export(TREE, tmp_path / "many", format="safetensors", max_shard_nbytes=40)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80}
    files = sorted(os.listdir(path))
    assert files == [*sorted(set(index["weight_map"].values())), "model.safetensors.index.json"]
    assert len(files) == 4 and files[0] == "model-00001-of-00003.safetensors"
    np.testing.assert_array_equal(ckpt.load(path)["layers"]["1"]["w"], W + 1)


def test_a_checkpoint_with_rules_a_choice_and_casts(tmp_path, mesh42):
    sharded = jax.device_put(W, NamedSharding(mesh42, PartitionSpec(None, None)))
    source = ckpt.save(tmp_path / "own", {"m": {"w": sharded, "b": B}, "opt": {"mu": B}, "n": 3})
    path = ckpt.export(
        source,
        tmp_path / "a.safetensors",
        format="safetensors",
        only="m/**",
        rename=[("m/w", "model/weight", ckpt.Transpose()), ("m/b", "model/bias")],
        cast=[("model/weight", "bfloat16")],
    )
    loaded = ckpt.load(path)["model"]
    np.testing.assert_array_equal(loaded["weight"], W.T.astype(ml_dtypes.bfloat16))
    assert loaded["weight"].dtype == ml_dtypes.bfloat16 and loaded["bias"].dtype == np.float32
    path = ckpt.export(source, tmp_path / "b", format="safetensors", cast="float16")
    with ckpt.load_checkpoint(path) as reader:
        dtypes = reader.get_variable_to_dtype_map()
    assert dtypes == {
        "m.b": np.float16,
        "m.w": np.float16,
        "n": np.int64,
        "opt.mu": np.float16,
    }


def test_layers_are_unstacked_on_the_way_out(tmp_path):
    tree = {"q": {"kernel": np.stack([W + i for i in range(3)])}}
    rule = ("q/kernel", "model/layers/*/q/weight", ckpt.Unstack(), ckpt.Transpose())
    path = ckpt.export(tree, tmp_path / "a", format="safetensors", rename=[rule])
    np.testing.assert_array_equal(ckpt.load(path)["model"]["layers"]["2"]["q"]["weight"], W.T + 2)


def test_modules_and_their_optimizers_have_names(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    root = ckpt.Checkpoint(model=model, optimizer=optimizer)
    for source in (root, root.save(tmp_path / "ckpt")):
        path = ckpt.export(source, tmp_path / f"{id(source)}", format="safetensors")
        assert {"model.kernel", "optimizer.ScaleByAdamState.mu.model.kernel"} <= {*names_of(path)}
        assert "save_counter" not in names_of(path)
        other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
        its = nnx.Optimizer(other, optax.adam(1e-3), wrt=nnx.Param)
        ckpt.restore(path, {"model": other, "optimizer": its})
        np.testing.assert_array_equal(other.kernel[...], model.kernel[...])


def test_what_safetensors_cannot_hold_is_named_before_anything_is_written(tmp_path):
    tree = {"w": W, "text": "abc", "z": np.zeros(2, complex), "when": np.zeros(1, "M8[s]")}
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.export(tree, tmp_path / "a", format="safetensors")
    assert [name for name, _ in raised.value.problems] == ["text", "z", "when"]
    assert is_empty(tmp_path)
    ckpt.export(tree, tmp_path / "a", format="safetensors", only="w")


def test_all_dtypes_go_out_and_come_back(tmp_path):
    source = FIXTURES / "all_dtypes.safetensors"
    names = [name for name in names_of(source) if name != "float4_e2m1fn_x2"]
    path = ckpt.export(source, tmp_path / "a.safetensors", format="safetensors", only=names)
    before, after = ckpt.load(source, only=names), ckpt.load(path)
    for name, array in before.items():
        assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes()
    with pytest.raises(ckpt.UnsupportedFormatError, match="float4_e2m1fn_x2: .*packed"):
        ckpt.export(source, tmp_path / "b", format="safetensors")


# --- npz -------------------------------------------------------------------------------


def test_npz_is_what_numpy_reads(tmp_path):
    tree = {
        "a": {"w": W, "n": 3, "t": "größe", "raw": b"ab\0", "e": b""},
        "f": np.asfortranarray(W),
    }
    path = ckpt.export(tree, tmp_path / "a.npz", format="npz")
    with np.load(path) as file:
        assert sorted(file) == ["a/e", "a/n", "a/raw", "a/t", "a/w", "f"]
        np.testing.assert_array_equal(file["a/w"], W)
        np.testing.assert_array_equal(file["f"], W)
        assert file["a/n"] == 3 and file["a/t"] == "größe"
    loaded = ckpt.load(path)
    assert loaded["a"]["raw"] == b"ab\0" and loaded["a"]["t"] == "größe" and loaded["a"]["e"] == b""
    assert ckpt.verify(path).ok and not ckpt.verify(path).unchecked
    tree["h"] = np.ones(2, ml_dtypes.bfloat16)
    path = ckpt.export(tree, tmp_path / "b.npz", format="npz")
    assert ckpt.load(path)["h"].dtype == ml_dtypes.bfloat16


def test_npz_refuses_what_numpy_would_forget(tmp_path):
    tree = {"w": W, "x": np.ones(2, ml_dtypes.float8_e4m3fn), "i": np.ones(2, ml_dtypes.int4)}
    with pytest.raises(ckpt.UnsaveableError, match=r"(?s)x: numpy has no name.*i: .*cast="):
        ckpt.export(tree, tmp_path / "a.npz", format="npz")
    path = ckpt.export(
        tree, tmp_path / "a.npz", format="npz", cast=[("x", "float16"), ("i", "int8")]
    )
    assert ckpt.load(path)["x"].dtype == np.float16


def test_equal_values_make_equal_files(tmp_path):
    one = ckpt.export(TREE, tmp_path / "a.npz", format="npz")
    two = ckpt.export(TREE, tmp_path / "b.npz", format="npz")
    with open(one, "rb") as a, open(two, "rb") as b:
        assert a.read() == b.read()


# --- any of them -------------------------------------------------------------------------


def test_one_array_is_in_memory_at_a_time(tmp_path):
    tree = {f"w{i}": np.full((256, 1024), i, np.float32) for i in range(24)}  # 1 MiB each
    source = ckpt.save(tmp_path / "own", tree)
    del tree
    for name, form in (("a", "safetensors"), ("a.npz", "npz")):
        tracemalloc.start()
        path = ckpt.export(source, tmp_path / name, format=form)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
        assert ckpt.load(path, only="w23")["w23"][0, 0] == 23


@pytest.mark.parametrize("form", ["safetensors", "npz", "tensorflow"])
def test_small_values_are_read_together(tmp_path, form):
    values = {f"v{i}": np.full(3, i, np.float32) for i in range(200)}
    values["shared"] = values["v7"]
    path = ckpt.save(tmp_path / "own", values)
    with ckpt.load_checkpoint(path) as reader:
        one_by_one = calls(lambda: [reader.get_tensor(name) for name in values])
    name = "a.safetensors" if form == "safetensors" else "a.npz" if form == "npz" else "a"
    assert calls(lambda: ckpt.export(path, tmp_path / name, format=form)) < 0.75 * one_by_one
    found = ckpt.load(tmp_path / name)
    assert {name: value[0] for name, value in found.items()} == {
        name: value[0] for name, value in values.items()
    }


def test_a_destination_that_exists_is_left_alone(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="a exists"):
        ckpt.export(TREE, tmp_path / "a", format="npz")
    assert (tmp_path / "a").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def write(export, path):
        os.mkdir(path)
        export.read("nothing")

    form = readers.Format("broken", lambda path: False, lambda path: None, write=write)
    with ckpt.registration_scope():
        ckpt.register_format(form)
        with pytest.raises(KeyError):
            ckpt.export(TREE, tmp_path / "deep" / "er" / "a", format="broken")
    assert is_empty(tmp_path / "deep" / "er")


def test_a_format_of_ones_own_is_written_and_its_parts_appear_in_order(tmp_path):
    def write(export, path):
        for name, attribute in export.values_by_name("-").items():
            with open(f"{path}.{name}", "wb") as file:
                file.write(export.read(attribute.key).tobytes())
        return [".b", ".a"]

    form = readers.Format("files", lambda path: False, lambda path: None, write=write)
    with ckpt.registration_scope():
        ckpt.register_format(form)
        ckpt.export({"a": np.int8(1), "b": np.int8(2)}, tmp_path / "x", format="files")
        assert is_empty(tmp_path, "x.a", "x.b") and (tmp_path / "x.b").read_bytes() == b"\x02"
        with pytest.raises(FileExistsError, match=r"x\.a exists"):
            (tmp_path / "x.b").unlink()
            ckpt.export({"a": np.int8(1), "b": np.int8(2)}, tmp_path / "x", format="files")
        assert is_empty(tmp_path, "x.a")
    with pytest.raises(ValueError, match="expected one of the formats .*npz, .*safetensors"):
        ckpt.export(TREE, tmp_path / "y", format="files")


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        ({"only": "nothing/*"}, KeyError, "nothing that 'nothing/\\*' selects"),
        ({"rename": [("nothing", "x")]}, ckpt.RestoreMismatchError, "nothing"),
        ({"rename": [("layers/0/w", "x"), ("layers/1/w", "x")]}, ckpt.RestoreMismatchError, "x"),
        ({"cast": [("nothing", "float16")]}, ValueError, "no array has a name"),
        ({"cast": [3]}, TypeError, "pairs"),
        ({"cast": "float128x"}, TypeError, "cast: .*float128x"),
        ({"max_shard_nbytes": 0}, ValueError, "positive"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, arguments, error, what):
    with pytest.raises(error, match=what):
        ckpt.export(TREE, tmp_path / "a", format="safetensors", **arguments)
    assert is_empty(tmp_path)


def test_all_names_that_two_values_would_have_are_named(tmp_path):
    tree = {name: {"b": np.zeros(1)} for name in "xy"} | {f"{n}.b": np.ones(1) for n in "xy"}
    with pytest.raises(ValueError, match=r"'x\.b', 'y\.b'"):
        ckpt.export(tree, tmp_path / "a", format="safetensors")
    with pytest.raises(KeyError, match="holds no values"):
        ckpt.export({}, tmp_path / "a", format="safetensors")
    assert is_empty(tmp_path)


def test_values_that_do_not_fit_the_dtype_are_an_error(tmp_path):
    with pytest.raises(OverflowError, match="w: .*does not fit into float16"):
        ckpt.export({"w": np.float32([1e9])}, tmp_path / "a", format="npz", cast="float16")
    assert is_empty(tmp_path)


def test_values_of_registered_savers_are_not_left_out_in_silence(tmp_path):
    class Table(ckpt.Trackable):
        pass

    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="tables",
            predicate=lambda obj: isinstance(obj, Table),
            save_fn=lambda objects, prefix: None,
            restore_fn=lambda objects, prefix: None,
        )
        source = ckpt.save(tmp_path / "own", {"table": Table(), "w": W})
        with pytest.raises(ckpt.UnsupportedFormatError, match=r"table \(Custom\.tables\)"):
            ckpt.export(source, tmp_path / "a", format="npz")
        ckpt.export(source, tmp_path / "a", format="npz", only="w")


# --- the way in --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "only"),
    [
        ("hub", None),
        ("types.msgpack", None),
        ("chunked.msgpack", None),
        ("flax_legacy/checkpoint_3", None),
        ("old.pt", None),
        ("dcp_adamw", None),
        ("dcp_two_ranks", None),
        ("header_line.eqx", None),
    ],
)
def test_a_checkpoint_of_any_format_becomes_ours(tmp_path, source, only):
    path = ckpt.convert(FIXTURES / source, tmp_path / "own")
    before, after = ckpt.load(FIXTURES / source), ckpt.load(path)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for (where, a), b in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert type(a) is type(b), where
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)
    assert ckpt.verify(path).ok and not ckpt.verify(path).unchecked


def test_a_conversion_follows_rules_and_keeps_the_graph(tmp_path):
    rules = [("a/weight", "dense/kernel", ckpt.Transpose()), ("a/*", "dense/*")]
    path = ckpt.convert(FIXTURES / "hub", tmp_path / "own", rename=rules)
    kernel = ckpt.load(FIXTURES / "hub")["a"]["weight"].T
    np.testing.assert_array_equal(ckpt.load(path)["dense"]["kernel"], kernel)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    source = ckpt.Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "ckpt")
    again = ckpt.convert(source, tmp_path / "again")
    assert ckpt.object_metadata(again) == ckpt.object_metadata(source)
    with pytest.raises(FileExistsError):
        ckpt.convert(source, tmp_path / "again")
    ckpt.convert(FIXTURES / "hub", tmp_path / "again", overwrite=True)
    assert ckpt.load(tmp_path / "again").keys() == ckpt.load(FIXTURES / "hub").keys()


def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ckpt.UnsupportedFormatError, match="(?s)sparse: .*q: .*module: "):
        ckpt.convert(FIXTURES / "odd.pt", tmp_path / "own")
    assert is_empty(tmp_path)


def test_jax_arrays_come_from_their_devices(tmp_path, mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    x = jax.device_put(np.arange(32.0).reshape(8, 4).astype("f4"), sharding)
    path = ckpt.export({"x": x, "k": jax.random.key(0)}, tmp_path / "a", format="safetensors")
    np.testing.assert_array_equal(ckpt.load(path)["x"], x)
    target = {"x": jnp.zeros((8, 4)), "k": jax.random.PRNGKey(1)}
    np.testing.assert_array_equal(ckpt.restore(path, target)["k"], jax.random.PRNGKey(0))
