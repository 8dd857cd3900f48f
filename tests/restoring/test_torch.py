"""Files of torch.save, zip and older, and directories of torch.distributed.checkpoint."""

import pickle
import pickletools
import shutil
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import FIXTURES, check_hostile, mutations, outcome
from jax.sharding import NamedSharding, PartitionSpec
from torch_files import Made, Name, pickled, tensor, torch_file

import ckpt_jax as ckpt
from ckpt_jax.graph.dtypes import dtype_of
from ckpt_jax.readers import Files
from ckpt_jax.restoring.formats import pickled as pickled_as_data
from ckpt_jax.restoring.formats.cursor import Cursor
from ckpt_jax.restoring.formats.pickled import Call, Global, read_pickle

NEW, OLD, ODD = (FIXTURES / name for name in ("new.pt", "old.pt", "odd.pt"))
ADAMW, RANKS = FIXTURES / "dcp_adamw", FIXTURES / "dcp_two_ranks"
PACKED = "float4_e2m1fn_x2"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def readable(path):
    return PACKED not in path


# --- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [NEW, OLD], ids=["zip", "old"])
def test_views_of_a_storage_are_what_they_were(path):
    views = ckpt.load(path, only="views/*")["views"]
    np.testing.assert_array_equal(views["whole"], BASE)
    np.testing.assert_array_equal(views["t"], BASE.T)
    np.testing.assert_array_equal(views["slice"], BASE[1:3, 2:5])
    np.testing.assert_array_equal(views["expand"], np.ones(3, np.float32))
    with ckpt.load_checkpoint(path) as reader:
        np.testing.assert_array_equal(
            reader.get_tensor("views/t", ((1, 4), (2, 3))), BASE.T[1:4, 2:3]
        )


@pytest.mark.parametrize("path", [NEW, OLD], ids=["zip", "old"])
def test_containers_and_plain_values_are_kept(path):
    loaded = ckpt.load(path, only=readable)
    assert (loaded["epoch"], loaded["name"], loaded["f"]) == (3, "x", 1.5)
    assert isinstance(loaded["list"], list) and loaded["list"][1] == 2
    assert loaded["scalar"].shape == () and loaded["scalar"] == 2
    (group,) = loaded["optim"]["param_groups"]
    assert group["betas"] == (0.9, 0.999) and group["params"] == [0, 1, 2, 3, 4, 5]
    assert set(loaded["optim"]["state"]) == {0, 1, 2, 3, 4, 5}
    assert loaded["model"]["1"]["num_batches_tracked"] == 1
    assert ckpt.load(path.parent / OLD.name)["none"] is None


@pytest.mark.parametrize("path", [NEW, OLD], ids=["zip", "old"])
def test_a_conjugated_tensor_is_not_its_bytes(path):
    assert ckpt.load(path, only="conj")["conj"].tolist() == [1 - 2j]


def test_all_dtypes_are_exact():
    loaded = ckpt.load(NEW, only=lambda p: p.startswith("dtypes/") and readable(p))["dtypes"]
    assert len(loaded) == 20
    for name, array in loaded.items():
        expected = np.arange(6, dtype=np.float32).reshape(2, 3)
        expected = (expected != 0 if name == "bool" else expected).astype(dtype_of(name))
        skip = int(name == "float8_e8m0fnu")  # which has no zero
        assert array.tobytes()[skip:] == expected.tobytes()[skip:], name


def test_names_are_split_at_points():
    with ckpt.load_checkpoint(NEW) as reader:
        assert reader.has_tensor("model/0/weight") and reader.has_tensor("model.0.weight")
        assert "optim.state.0.exp_avg" in reader.keys()  # noqa: SIM118


def test_a_linear_layer_of_torch_becomes_one_of_flax(mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    target = {"dense": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32", sharding=sharding)}}
    rename = [("model/0/weight", "dense/kernel", ckpt.Transpose())]
    restored = ckpt.restore(NEW, target, rename=rename, allow_unexpected=True)
    weight = ckpt.load(NEW, only="model/0/weight")["model"]["0"]["weight"]
    np.testing.assert_array_equal(restored["dense"]["kernel"], weight.T)
    assert restored["dense"]["kernel"].sharding == sharding


def test_what_would_run_code_is_listed_and_refused_by_name():
    assert [key for key, _ in ckpt.list_variables(ODD)] == ["module", "q", "sparse"]
    with pytest.raises(ckpt.UnsupportedFormatError) as raised:
        ckpt.load(ODD)
    for part in ("sparse: it is a sparse tensor", "q: it is a quantised", "Sequential", "only="):
        assert part in str(raised.value)
    report = ckpt.verify(ODD)
    assert report.ok and report.unread == ("sparse", "q", "module")
    report = ckpt.plan_restore(ODD, {"q": jnp.zeros(3)})
    assert "quantised" in report.mismatched[0].what


# --- files that this test makes ------------------------------------------------------------


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_files_of_the_other_byte_order(tmp_path):
    value = {"x": tensor(), "n": tensor("0", "FloatStorage", 6, 0, (6,), (1,), {"neg": True})}
    path = torch_file(tmp_path / "a", value, {"0": X.astype(">f4").tobytes()}, b"big")
    loaded = ckpt.load(path)
    np.testing.assert_array_equal(loaded["x"], X)
    np.testing.assert_array_equal(loaded["n"], -X.ravel())


def test_arrays_and_scalars_of_numpy_are_read_without_it(tmp_path):
    dtype = Made("numpy.dtype", "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    data = Made("_codecs.encode", np.float64(1.5).tobytes().decode("latin1"), "latin1")
    array = Made(
        "numpy._core.multiarray._reconstruct",
        Name("numpy.ndarray"),
        (0,),
        b"b",
        state=(1, (2, 2), dtype, True, np.arange(4.0).tobytes()),
    )
    value = {
        "loss": Made("numpy.core.multiarray.scalar", dtype, data),
        "array": array,
        "size": Made("torch.Size", (2, 3)),
        "z": Made("builtins.complex", 1.0, 2.0),
        "raw": data,
    }
    loaded = ckpt.load(torch_file(tmp_path / "a", value))
    assert loaded["loss"] == 1.5 and isinstance(loaded["loss"], np.float64)
    np.testing.assert_array_equal(loaded["array"], [[0, 2], [1, 3]])
    assert loaded["size"] == (2, 3) and loaded["z"] == 1 + 2j
    assert loaded["raw"] == np.float64(1.5).tobytes()


def test_parameters_are_tensors(tmp_path):
    parameter = Made("torch._utils._rebuild_parameter", tensor(), True, OrderedDict())
    typed = Made(
        "torch._tensor._rebuild_from_type_v2",
        Name("torch._utils._rebuild_tensor_v2"),
        Name("torch.nn.parameter.Parameter"),
        tensor().args,
        {},
    )
    path = torch_file(tmp_path / "a", {"p": parameter, "t": typed}, {"0": X.tobytes()})
    for array in ckpt.load(path).values():
        np.testing.assert_array_equal(array, X)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"x": tensor(size=(2, 4))}, "exceeds its storage"),
        ({"x": tensor(offset=1)}, "exceeds its storage"),
        ({"x": tensor(offset=-1)}, "offset"),
        ({"x": tensor(stride=(-3, 1))}, "no shape"),
        ({"x": tensor(stride=(3,))}, "strides"),
        ({"x": tensor(size=(1 << 62, 1 << 62))}, "exceeds its storage"),
        ({"x": tensor(size=2)}, "no shape"),
        ({"x": tensor(key="9")}, "storage 9 of a tensor is missing"),
        ({"x": tensor(kind="os.system")}, "no storage"),
        ({"a.b": 1, "a": {"b": 2}}, "two values have one name"),
        ({Name("os.system"): 1}, "key of a dict"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path, value, what):
    path = torch_file(tmp_path / "a", value, {"0": X.tobytes()})
    with pytest.raises(ckpt.CorruptCheckpointError, match=what) as raised:
        ckpt.load(path)
    assert raised.value.file == str(path)


def test_a_tensor_that_repeats_its_elements_takes_no_memory(tmp_path):
    path = torch_file(
        tmp_path / "a", {"x": tensor(size=(1 << 40,), stride=(0,))}, {"0": X.tobytes()}
    )
    with pytest.raises(ckpt.UnsupportedFormatError, match="repeats 24 bytes.*contiguous"):
        ckpt.load(path)


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    marker = tmp_path / "called"
    evil = {"x": Made("os.system", f"touch {marker}"), "y": Made("builtins.eval", "1/0")}
    path = torch_file(tmp_path / "a", evil)
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"x: it is an object of os\.system"):
        ckpt.load(path)
    assert not marker.exists()


def test_programs_are_refused(tmp_path):
    path = torch_file(tmp_path / "a", {"x": 1}, **{"constants.pkl": b""})
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"TorchScript.*torch\.jit\.load"):
        ckpt.load(path)


def test_other_pickles_are_refused_with_a_word(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": X}))
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"a pickle\. .*ckpt\.save"):
        ckpt.load(tmp_path / "a.pkl")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ckpt.UnsupportedFormatError, match="a GGUF file.*safetensors"):
        ckpt.load(tmp_path / "a.gguf")


# --- the pickle itself ---------------------------------------------------------------------


def read(tmp_path, data):
    path = tmp_path / "pickle"
    path.write_bytes(data)
    return read_pickle(Cursor(Files(str(path)), str(path)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_pickle_reads(tmp_path, protocol):
    value = {
        "a": [1, -1, 255, 256, 65536, -(2**31), 2**31, 2**80, -(2**80)],
        "b": (1.5, True, False, None, "", "ü" * 300, b"x" * 300, b""),
        ("t", 1): [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
    }
    assert read(tmp_path, pickle.dumps(value, protocol)) == value or protocol == 2
    shared = [1]
    found = read(tmp_path, pickle.dumps([shared, shared], protocol))
    assert found[0] is found[1]


def test_every_code_of_the_pickles_that_are_read_is_known(tmp_path):
    names = {"PERSID", "STRING", "UNICODE", "INT", "LONG", "FLOAT", "PUT", "GET", "INST", "OBJ"}
    names |= {"EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}
    known = {*pickled_as_data._STEPS, ord(".")}
    assert {code.name for code in pickletools.opcodes if ord(code.code) not in known} == names


def test_what_would_be_done_is_described(tmp_path):
    found = read(tmp_path, pickled(Made("os.system", "ls", state={"a": 1})))
    assert isinstance(found, Call)
    assert (found.function, found.args, found.state) == (Global("os.system"), ("ls",), {"a": 1})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x09.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x020.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02X\xff\xff\xff\xff",
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02\x8d" + b"\xff" * 8,
        b"\x80\x02}]]s.",
        b"\x80\x02}" + b"(" + b")" * 5,
        b"\x80\x02cos" + b"x" * 5000,
        b"\x80\x02}(" + b")\x85" * 200 + b"Nu.",  # a key that takes long to hash
        b"I1\n.",
    ],
)
def test_damaged_pickles_are_errors(tmp_path, data):
    with pytest.raises(ValueError):
        read(tmp_path, data)


def test_nesting_and_sharing_are_bounded(tmp_path):
    deep = torch_file(tmp_path / "a", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    with pytest.raises(ckpt.CorruptCheckpointError, match="levels"):
        ckpt.load(deep)
    laughs = b"\x80\x02]q\x00" + b"".join(
        [b"]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(90)]
    )
    with pytest.raises(ckpt.CorruptCheckpointError, match="values"):
        ckpt.load(torch_file(tmp_path / "b", laughs + b"."))
    itself = b"\x80\x02]q\x00h\x00a."
    with pytest.raises(ckpt.CorruptCheckpointError, match="levels"):
        ckpt.load(torch_file(tmp_path / "c", itself))
    deep_tuple = b"\x80\x02)" + b"\x85" * 300_000 + b"."
    with pytest.raises(ckpt.CorruptCheckpointError, match="levels"):
        ckpt.load(torch_file(tmp_path / "d", deep_tuple))


def test_keys_that_are_nested_deeply_are_not_hashed(tmp_path):
    key = b")" + b"\x85" * 300_000
    pairs = b"](]" + key + b"aK\x01ae"  # [[key, 1]]
    data = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."
    with pytest.raises(ckpt.CorruptCheckpointError, match="a tuple is no key"):
        ckpt.load(torch_file(tmp_path / "a", data))


def test_ordered_dicts_of_older_pickles(tmp_path):
    value = Made("collections.OrderedDict", [["b", 1], ["a", 2]])
    assert list(ckpt.load(torch_file(tmp_path / "a", {"x": value}))["x"]) == ["b", "a"]


def test_a_view_without_elements_may_begin_anywhere(tmp_path):
    value = {"x": tensor(numel=0, offset=5, size=(0, 3)), "y": tensor()}
    path = torch_file(tmp_path / "a", value, {"0": X.tobytes()})
    assert ckpt.load(path)["x"].shape == (0, 3)


@pytest.mark.parametrize("path", [NEW, OLD, ODD], ids=["zip", "old", "odd"])
@pytest.mark.parametrize("seed", range(2))
def test_hostile_files_are_refused_or_harmless(tmp_path, path, seed):
    found = check_hostile(tmp_path / "a.pt", path.read_bytes(), 60, seed)
    assert found["refused"] > 10


@pytest.mark.parametrize("seed", range(2))
def test_hostile_pickles_are_refused_or_harmless(tmp_path, seed):
    with zipfile.ZipFile(NEW) as archive:
        data = {name: archive.read(name) for name in archive.namelist()}
    for changed in mutations(data["new/data.pkl"], 60, seed):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in data.items():
                archive.writestr(name, changed if name.endswith("data.pkl") else contents)
        outcome(path)


# --- directories of torch.distributed.checkpoint ---------------------------------------------


def test_an_array_is_put_together_from_the_chunks_of_all_ranks(mesh42):
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    loaded = ckpt.load(RANKS)
    for name in ("rows", "cols", "rep"):
        np.testing.assert_array_equal(loaded[name], array)
        with ckpt.load_checkpoint(RANKS) as reader:
            part = reader.get_tensor(name, ((1, 5), (2, 6)))
            np.testing.assert_array_equal(part, array[1:5, 2:6])
    np.testing.assert_array_equal(loaded["plain"], array[:2])
    assert loaded["n"] == 3


def test_a_model_and_its_optimizer_are_read():
    loaded = ckpt.load(ADAMW)
    np.testing.assert_array_equal(loaded["base"], BASE)
    np.testing.assert_array_equal(loaded["t"], BASE.T)
    assert loaded["bf"].dtype == jnp.bfloat16 and loaded["epoch"] == 3
    assert loaded["optim"]["param_groups"]["0"]["betas"] == (0.9, 0.999)
    same = ckpt.load(NEW, only="model/**")["model"]
    np.testing.assert_array_equal(loaded["model"]["0"]["weight"], same["0"]["weight"])
    assert ckpt.verify(ADAMW).ok
    target = {"base": jax.ShapeDtypeStruct((4, 6), "float32")}
    assert ckpt.restore(ADAMW, target, allow_unexpected=True)["base"].shape == (4, 6)


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(RANKS, tmp_path / "dcp", copy_function=shutil.copy)


def test_missing_and_truncated_files_are_named(copied):
    (copied / "__1_0.distcp").rename(copied / "elsewhere")
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"1 files .* missing: __1_0\.distcp"):
        ckpt.load(copied)
    data = (copied / "elsewhere").read_bytes()
    (copied / "__1_0.distcp").write_bytes(data[:-100])
    with pytest.raises(ckpt.CorruptCheckpointError, match="__1_0.distcp"):
        ckpt.load(copied)


def test_names_of_files_do_not_lead_out_of_the_directory(copied):
    metadata = copied / ".metadata"
    data = metadata.read_bytes()
    assert b"__0_0.distcp" in data
    metadata.write_bytes(data.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(ckpt.CorruptCheckpointError, match="leads elsewhere"):
        ckpt.load(copied)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_hostile_directories_are_refused_or_harmless(copied, name):
    data = (copied / name).read_bytes()
    found = {"fine": 0, "refused": 0, "none": 0}
    for changed in mutations(data, 60):
        (copied / name).write_bytes(changed)
        found[outcome(copied)] += 1
    assert found["refused"] > 10
