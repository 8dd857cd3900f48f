"""Files of Keras, and other HDF5 files. Those in `tests/foreign` were written by Keras 2 and 3."""

import io
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx
from foreign import FIXTURES
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.restoring.formats.keras import opening

h5py = pytest.importorskip("h5py")

WEIGHTS, MODEL, KERAS2 = [
    FIXTURES / name for name in ("keras3.weights.h5", "keras3.keras", "keras2.h5")
]
X = np.arange(96, dtype=np.float32).reshape(8, 12)


def arrays_in(file):
    """All datasets of a file, as h5py reads them."""
    found = {}
    with h5py.File(file) as opened:
        opened.visititems(
            lambda name, each: (
                found.update({name: each[()]}) if isinstance(each, h5py.Dataset) else None
            )
        )
    return found


def weights_in(path):
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read("model.weights.h5"))


def written(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def values(path):
    with ckpt.load_checkpoint(path) as reader:
        return reader.read(dict.fromkeys(reader.keys()))


# --- what Keras writes ------------------------------------------------------------------


def test_every_value_of_keras_3_is_called_as_in_the_file():
    assert_equal(values(WEIGHTS), arrays_in(WEIGHTS))
    assert_equal(values(MODEL), arrays_in(weights_in(MODEL)))
    tree = ckpt.load(WEIGHTS)
    assert set(tree) == {"layers", "optimizer"} and len(tree["optimizer"]["vars"]) == 14


def test_values_of_keras_2_are_called_by_layer_and_variable(tmp_path):
    found = values(KERAS2)
    assert sorted(found) == [
        *("bn/beta", "bn/gamma", "bn/moving_mean", "bn/moving_variance"),
        *("enc/bias", "enc/kernel", "head/bias", "head/kernel"),
    ]
    stored = arrays_in(KERAS2)
    for name, value in found.items():
        np.testing.assert_array_equal(value, stored[f"{name.partition('/')[0]}/{name}:0"])
    # A whole model has the same weights in a group of their own.
    with h5py.File(tmp_path / "model.h5", "w") as file, h5py.File(KERAS2) as weights:
        weights.copy("/", file, "model_weights")
        file.attrs["model_config"] = '{"class_name": "Sequential", "config": {"rate": NaN}}'
        file["optimizer_weights/Adam/enc/kernel/m:0"] = X
        file["optimizer_weights"].attrs["weight_names"] = [b"Adam/enc/kernel/m:0"]
    assert_equal(values(tmp_path / "model.h5"), {**found, "optimizer_weights/Adam/enc/kernel/m": X})
    with ckpt.load_checkpoint(tmp_path / "model.h5") as reader:
        assert reader.metadata == {
            "backend": "tensorflow",
            "keras_version": "2.21.0",
            "model_config": {"class_name": "Sequential", "config": {"rate": "nan"}},
        }


def test_names_that_would_be_one_stay_the_paths_of_the_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["enc/enc/kernel:0"], file["enc/other/enc/kernel:0"] = X, X
        file["enc"].attrs["weight_names"] = [b"enc/kernel:0", b"other/enc/kernel:0"]
    assert sorted(values(tmp_path / "a.h5")) == ["enc/enc/kernel:0", "enc/other/enc/kernel:0"]


def test_the_configuration_is_metadata_and_nothing_in_it_is_built(tmp_path):
    with ckpt.load_checkpoint(MODEL) as reader:
        found = reader.metadata
    assert (found["keras_version"], found["config"]["class_name"]) == ("3.15.1", "Functional")
    assert found["names"]["layers/dense_1"] == "head"
    with ckpt.load_checkpoint(WEIGHTS) as reader:
        assert reader.metadata == {"names": found["names"]}
    config = {"class_name": "Lambda", "config": {"function": "__import__('os')._exit(3)"}}
    path = keras_file(tmp_path, config=json.dumps(config).encode())
    with ckpt.load_checkpoint(path) as reader:
        assert reader.metadata["config"] == config
    own = ckpt.convert(path, tmp_path / "own")
    with ckpt.load_checkpoint(own) as reader:
        assert reader.metadata["config"] == config


def keras_file(tmp_path, config=b"{}", compression=zipfile.ZIP_STORED, names=None):
    path = tmp_path / "other.keras"
    members = {"metadata.json": b"{}", "config.json": config}
    members["model.weights.h5"] = weights_in(MODEL).getvalue()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names or members:
            archive.writestr(name, members.get(name, b""))
    return path


@pytest.mark.parametrize("first", ["metadata.json", "assets/a.txt", "model.weights.h5"])
def test_a_compressed_file_and_its_members_in_any_order(tmp_path, first):
    names = dict.fromkeys([first, "config.json", "model.weights.h5"])
    path = keras_file(tmp_path, compression=zipfile.ZIP_DEFLATED, names=names)
    assert_equal(values(path), arrays_in(weights_in(MODEL)))
    with ckpt.load_checkpoint(path) as reader:
        part = reader.get_tensor("layers/dense/vars/0", ((1, 3), (2, 4)))
        np.testing.assert_array_equal(part, values(WEIGHTS)["layers/dense/vars/0"][1:3, 2:4])


def test_a_compressed_file_that_is_large_is_to_be_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_MAX_COMPRESSED_NBYTES", 1000)
    path = keras_file(tmp_path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ckpt.UnsupportedFormatError, match="Unpack the file, and pass the direc"):
        ckpt.load(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "model")
    assert_equal(values(tmp_path / "model"), arrays_in(weights_in(MODEL)))


def test_a_model_without_weights_or_with_pickled_ones(tmp_path):
    path = keras_file(tmp_path, names=["metadata.json", "config.json"])
    with pytest.raises(ckpt.CorruptCheckpointError, match="it has no model.weights.h5"):
        ckpt.load(path)
    path = keras_file(tmp_path, names=["metadata.json", "config.json", "model.weights.npz"])
    with pytest.raises(ckpt.UnsupportedFormatError, match="a pickle. Load it with Keras"):
        ckpt.load(path)


# --- several files ----------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two files of weights, and their index."""
    datasets = {"layers/dense/vars/0": X, "layers/dense/vars/1": X[0], "vars/0": X[1]}
    written(tmp_path / "m_00000.weights.h5", **dict([*datasets.items()][:1]))
    written(tmp_path / "m_00001.weights.h5", **dict([*datasets.items()][1:]))
    names = ["m_00000.weights.h5", "m_00001.weights.h5"]
    index = {"metadata": {}, "weight_map": {"/layers/dense/vars": names, "/vars": names[1]}}
    (tmp_path / "m.weights.json").write_text(json.dumps(index))
    return tmp_path, datasets, index


def test_an_index_and_its_files_are_one_checkpoint(shards):
    directory, datasets, _ = shards
    assert_equal(values(directory / "m.weights.json"), datasets)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d, index: (d / "m_00001.weights.h5").unlink(), "1 of 2 files are missing.*00001"),
        (lambda d, index: index["weight_map"].update({"/b": "m_00000.weights.h5"}), "lacks .*b"),
        (lambda d, index: index["weight_map"].update({"/a": "../m_0.weights.h5"}), "elsewhere"),
        (lambda d, index: index.update(weight_map=["m_0.weights.h5"]), "it is no index"),
        (
            lambda d, index: written(
                d / "m_00001.weights.h5", **{"layers/dense/vars/0": X, "vars/0": X}
            ),
            "in another file, too",
        ),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_is_damage(shards, change, what):
    directory, _, index = shards
    change(directory, index)
    (directory / "m.weights.json").write_text(json.dumps(index))
    with pytest.raises(ckpt.CorruptCheckpointError, match=what):
        ckpt.load(directory / "m.weights.json")


# --- all that is done with any checkpoint -----------------------------------------------

RULES = [
    ("layers/dense/vars/0", "enc/kernel"),
    ("layers/dense/vars/1", "enc/bias"),
    ("layers/batch_normalization/vars/0", "bn/scale"),
    ("layers/batch_normalization/vars/1", "bn/bias"),
    ("layers/batch_normalization/vars/2", "bn/mean"),
    ("layers/batch_normalization/vars/3", "bn/var"),
    ("layers/dense_1/vars/0", "head/kernel"),
    ("layers/dense_1/vars/1", "head/bias"),
]


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.enc = nnx.Linear(8, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.99, epsilon=1e-3, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.bn(self.enc(x), use_running_average=True))


def answer_of(x, w):
    """What the Keras model computes."""
    enc = x @ w["layers/dense/vars/0"] + w["layers/dense/vars/1"]
    gamma, beta, mean, variance = [w[f"layers/batch_normalization/vars/{i}"] for i in range(4)]
    normed = (enc - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    return normed @ w["layers/dense_1/vars/0"] + w["layers/dense_1/vars/1"]


@pytest.mark.parametrize("path", [WEIGHTS, MODEL])
def test_a_model_of_keras_goes_on_in_nnx(path):
    model = Net()
    assert ckpt.plan_restore(path, model, rename=RULES).missing == ()
    ckpt.restore(path, model, rename=RULES, allow_unexpected="optimizer/**")
    x = np.ones((3, 8), np.float32)
    np.testing.assert_allclose(model(x), answer_of(x, values(path)), rtol=1e-5)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4, name="enc")(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
        return linen.Dense(2, name="head")(x)


def test_a_model_of_keras_goes_on_in_linen():
    x = np.ones((3, 8), np.float32)
    target = jax.eval_shape(LinenNet().init, jax.random.key(0), x)
    statistics = ("bn/mean", "bn/var")
    rules = [
        (there, f"{'batch_stats' if here in statistics else 'params'}/{here}")
        for there, here in RULES
    ]
    variables = ckpt.restore(MODEL, target, rename=rules, allow_unexpected="optimizer/**")
    np.testing.assert_allclose(
        LinenNet().apply(variables, x), answer_of(x, values(MODEL)), rtol=1e-5
    )


def test_moments_of_adam_follow_rules_into_optax():
    w = values(WEIGHTS)
    params = {name: jnp.zeros(w[f"layers/{name}/vars/0"].shape) for name in ("dense", "dense_1")}
    tx = optax.adam(0.01)
    target = jax.eval_shape(tx.init, params)
    # iteration and learning rate come first, then momentum and velocity of each variable
    rules = [("optimizer/vars/0", "0/count")]
    rules += [
        (f"optimizer/vars/{n}", f"0/mu/{name}") for n, name in ((2, "dense"), (10, "dense_1"))
    ]
    rules += [
        (f"optimizer/vars/{n}", f"0/nu/{name}") for n, name in ((3, "dense"), (11, "dense_1"))
    ]
    options = ckpt.CheckpointOptions(cast=True)
    state = ckpt.restore(WEIGHTS, target, options=options, rename=rules, allow_unexpected="**")
    assert state[0].count == w["optimizer/vars/0"] and state[0].count.dtype == jnp.int32
    np.testing.assert_array_equal(state[0].mu["dense"], w["optimizer/vars/2"])
    np.testing.assert_array_equal(state[0].nu["dense_1"], w["optimizer/vars/11"])


def test_only_the_bytes_of_a_part_are_read(tmp_path, mesh42):
    path = written(tmp_path / "a.h5", x=np.arange(800 * 12, dtype="f4").reshape(800, 12), y=X)
    with ckpt.load_checkpoint(path) as reader:
        reader.get_tensor("x", ((10, 12), (0, 12)))
        assert reader.bytes_read == 2 * 12 * 4
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    target = {"x": jax.ShapeDtypeStruct((800, 12), jnp.bfloat16, sharding=sharding)}
    options = ckpt.CheckpointOptions(cast=True)
    found = ckpt.restore(path, target, options=options, allow_unexpected="y")
    assert found["x"].sharding == sharding
    np.testing.assert_array_equal(found["x"], arrays_in(path)["x"].astype(ml_dtypes.bfloat16))


def test_conversion_and_export(tmp_path):
    own = ckpt.convert(MODEL, tmp_path / "own", rename=RULES)
    assert ckpt.load(own)["head"]["kernel"].shape == (4, 2)
    path = ckpt.export(MODEL, tmp_path / "a.safetensors", format="safetensors", only="layers/**")
    assert_equal(
        values(path), {k.replace("/", "."): v for k, v in values(MODEL).items() if "layers" in k}
    )
    report = ckpt.verify(MODEL)
    assert report.ok and "22 of them without a checksum" in str(report)


# --- all that HDF5 can hold -------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 512, 4096])
def test_all_layouts_and_dtypes_are_read(tmp_path, before):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=before) as file:
        file["f4"], file["big"], file["empty"] = X, X.astype(">i4"), X[:0]
        file["bool"], file["c8"] = X > 5, X.astype("c8")
        file["scalar"], file["u8"], file["f2"] = 3.5, np.uint64(1 << 63), X.astype("f2")
        file["bf16"] = X.astype(ml_dtypes.bfloat16)
        file["same"] = file["f4"]
        file.create_dataset("chunks", data=X, chunks=(3, 5))
        file.create_dataset("lzf", data=X, chunks=(3, 5), compression="lzf", shuffle=True)
        file.create_dataset(
            "gzip", data=X.astype(">f8"), chunks=(8, 5), compression="gzip", fletcher32=True
        )
        enum = h5py.enum_dtype({"A": 1, "B": 2}, "i4")
        file.create_dataset("enum", data=np.asarray([1, 2], "i4"), dtype=enum)
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(X.shape)
        for name, kind, layout in (
            (b"compact", h5py.h5t.NATIVE_FLOAT, plist),
            (b"brain", brain_float(), None),
        ):
            dataset = h5py.h5d.create(file.id, name, kind, space, layout)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, X)
        file["named type"] = np.dtype("f4")
    # h5py lists one of several names, and does not know bfloat16.
    stored = arrays_in(path) | {"f4": X, "same": X, "bf16": X.astype(ml_dtypes.bfloat16)}
    found = values(path)
    assert_equal(found, {k: v.astype(v.dtype.newbyteorder("=")) for k, v in stored.items()})
    with ckpt.load_checkpoint(path) as reader:
        for name in ("f4", "big", "gzip", "brain", "bf16"):
            part = reader.get_tensor(name, ((2, 5), (3, 9)))
            np.testing.assert_array_equal(part, found[name][2:5, 3:9])
    assert ckpt.verify(path).ok


def brain_float():
    """bfloat16 as a number of HDF5, which h5py reads as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


def test_a_dtype_of_one_byte_needs_a_target(tmp_path):
    x = np.asarray([1.5, -2], ml_dtypes.float8_e4m3fn)
    path = written(tmp_path / "a.h5", x=x)
    with pytest.raises(ckpt.UnsupportedFormatError, match="Restore it with a target"):
        ckpt.load(path)
    restored = ckpt.restore(path, {"x": jnp.zeros(2, jnp.float8_e4m3fn)})
    assert np.asarray(restored["x"]).tobytes() == x.tobytes()


def hostile(path):
    """A file with all that is not read."""
    secret = path.with_name("secret.h5")
    written(secret, x=X)
    (raw := path.with_name("raw")).write_bytes(bytes(16))
    with h5py.File(path, "w") as file:
        file["fine/x"] = X
        file["text"], file["fixed"] = "hello", np.bytes_(b"abc")
        file["record"] = np.zeros(2, [("x", "f4"), ("y", "i4")])
        file["long"] = np.ones(2, np.longdouble)
        file["objects"] = np.array([file["fine"].ref], dtype=h5py.ref_dtype)
        file["empty"] = h5py.Empty("f4")
        file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype("i4"))
        file.create_dataset("pairs", (2,), dtype=np.dtype(("f4", (3,))))
        file.create_dataset("unwritten", (5,), "f4")
        file.create_dataset("half", (100,), "f4", chunks=(10,))[:20] = 1
        file.create_dataset("offset", data=np.arange(99), chunks=(9,), scaleoffset=True)
        file.create_dataset("external", (4,), "f4", external=[(str(raw), 0, 16)])
        layout = h5py.VirtualLayout((8, 12), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "x", (8, 12))
        file.create_virtual_dataset("virtual", layout)
        file["soft"], file["other"] = h5py.SoftLink("/fine"), h5py.ExternalLink(str(secret), "/x")
        file["fine/loop"], file["fine/up"] = file["fine"], file["/"]


REASONS = {
    "text": "texts in HDF5 files",
    "fixed": "texts in HDF5 files",
    "record": "another dtype",
    "long": "another dtype",
    "pairs": "another dtype",
    "objects": "references",
    "empty": "without a shape",
    "lists": "different lengths",
    "unwritten": "not all of it was written",
    "half": "not all of it was written",
    "offset": "scaleoffset",
    "external": "in another file, which is not opened",
    "virtual": "in another file, which is not opened",
    "soft": "a soft link, which is not followed",
    "other": "a link to another file, which is not followed",
    "fine/loop": "another name of the group 'fine'",
    "fine/up": "another name of the group ''",
}


def test_what_is_not_read_is_listed_with_the_reason(tmp_path):
    path = tmp_path / "a.h5"
    hostile(path)
    with ckpt.load_checkpoint(path) as reader:
        refused = reader.refusals()
    assert refused.keys() == REASONS.keys()
    assert [name for name, why in REASONS.items() if why not in refused[name]] == []
    with pytest.raises(ckpt.UnsupportedFormatError, match="(?s)half: .*text: "):
        ckpt.load(path)
    np.testing.assert_array_equal(ckpt.load(path, only="fine/x")["fine"]["x"], X)


def test_groups_with_very_many_names_are_walked_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file
        for _ in range(60):  # 2 ** 60 paths lead to the last one
            below = group.create_group("a")
            group["b"] = below
            group = below
        group["x"] = X
    with ckpt.load_checkpoint(tmp_path / "a.h5") as reader:
        assert len(reader.keys()) == 61 and len(reader.refusals()) == 60


def test_groups_that_are_nested_too_deeply_are_refused(tmp_path):
    written(tmp_path / "a.h5", **{"/".join("a" * 1000): X})
    with pytest.raises(ckpt.CorruptCheckpointError, match="more than 200 levels"):
        ckpt.load(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "a.h5: damaged or incomplete: "),  # the C library says so itself
        (
            {"compression": "gzip", "chunks": (99,)},
            "x: .* it would take 8[0-9]{9} bytes, there are",
        ),
    ],
)
def test_no_memory_is_taken_for_more_than_the_file_can_hold(tmp_path, options, what):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.zeros(99), **options)
    data = path.read_bytes()
    # Where the header of the dataset says how many elements there are, and how many could be.
    shape = (99).to_bytes(8, "little")
    assert data.count(shape * 2) == 1
    path.write_bytes(data.replace(shape * 2, (1 << 30).to_bytes(8, "little") * 2))
    with pytest.raises(ckpt.CorruptCheckpointError, match=what):
        ckpt.list_variables(path)


@pytest.mark.parametrize("size", [0, (1 << 64) - 16])
def test_a_heap_that_does_not_end_is_damage(tmp_path, size):
    data = bytearray(WEIGHTS.read_bytes())
    at = data.index(b"GCOL") + 16
    while data[at : at + 2] != b"\0\0":  # the names of the layers, and then what is free
        at += 16 + -(-int.from_bytes(data[at + 8 : at + 16], "little") // 8) * 8
    data[at + 8 : at + 16] = size.to_bytes(8, "little")
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match="a heap of texts does not end"):
        ckpt.load(tmp_path / "a.h5")


@pytest.mark.parametrize("path", [WEIGHTS, MODEL, KERAS2])
@pytest.mark.parametrize("kept", [0.01, 0.4, 0.99])
def test_a_file_that_is_cut_off_is_damaged(tmp_path, path, kept):
    data = path.read_bytes()
    (tmp_path / path.name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ckpt.CorruptCheckpointError, match=str(tmp_path / path.name)):
        ckpt.load(tmp_path / path.name)


def test_a_file_of_another_kind_with_the_name_of_one(tmp_path):
    for name in ("a.weights.h5", "a.keras", "a.hdf5"):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(
            ckpt.CorruptCheckpointError, match="its name is that of a file of keras"
        ):
            ckpt.load(tmp_path / name)


FUZZ = """
import sys
from pathlib import Path
from foreign import check_hostile
for source in map(Path, sys.argv[2:]):
    path = Path(sys.argv[1]) / source.name
    found = check_hostile(path, source.read_bytes(), 60, seed=3)
    assert found["fine"] + found["refused"] == 60, (source, found)
"""


def test_damaged_bytes_end_in_an_answer(tmp_path):
    """In a process of its own, because a C library reads them."""
    hostile(tmp_path / "hostile.h5")
    (tmp_path / "damaged").mkdir()
    sources = [WEIGHTS, MODEL, KERAS2, tmp_path / "hostile.h5"]
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FUZZ, tmp_path / "damaged", *sources],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_without_h5py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # which lets an import of it fail
    for path in (WEIGHTS, MODEL, KERAS2):
        found = format_of(str(path))
        assert found is not None and found.name == "keras"
        with pytest.raises(ckpt.UnsupportedFormatError, match=r"pip install 'ckpt-jax\[keras-fil"):
            ckpt.load(path)


# --- with Keras itself ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model with statistics and the state of an optimizer, and another model in it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("KERAS_BACKEND", "jax")
        keras = pytest.importorskip("keras")
        inner = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4, name="deep"), keras.layers.Dropout(0.1)],
            name="inner",
        )
        inputs = keras.Input((8,))
        x = keras.layers.Dense(4, name="enc", dtype="bfloat16")(inputs)
        x = inner(keras.layers.BatchNormalization(name="bn")(x))
        x = keras.layers.Reshape((2, 2))(x)
        x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
        outputs = keras.layers.Dense(2, name="head")(x)
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        data = np.random.default_rng(0).normal(size=(16, 8)).astype("f4")
        model.fit(data, np.ones((16, 2, 2), "f4"), verbose=0)
    return model


@pytest.mark.parametrize("form", ["a.weights.h5", "a.keras", "a.weights.json", "directory"])
def test_every_value_that_keras_3_saves_is_read(trained, tmp_path, form):
    path = tmp_path / form
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "directory":
            trained.save(path, zipped=False)
        elif form == "a.weights.json":
            trained.save_weights(path, max_shard_size=3e-7)
        elif form == "a.keras":
            trained.save(path)
        else:
            trained.save_weights(path)
    if form == "a.weights.json":
        assert len([*tmp_path.glob("*.weights.h5")]) > 1
    found = values(path)
    for layer in ("dense", "dense_1"):
        owner = trained.get_layer({"dense": "enc", "dense_1": "head"}[layer])
        for number, variable in enumerate(owner.variables):
            value = found[f"layers/{layer}/vars/{number}"]
            np.testing.assert_array_equal(value, np.asarray(variable.value))
            assert value.dtype == variable.dtype
    for number, variable in enumerate(trained.get_layer("bn").variables):
        np.testing.assert_array_equal(
            found[f"layers/batch_normalization/vars/{number}"], np.asarray(variable.value)
        )
    for number, variable in enumerate(trained.optimizer.variables):
        value = found[f"optimizer/vars/{number}"]
        np.testing.assert_array_equal(value, np.asarray(variable.value))
    deep = trained.get_layer("inner").get_layer("deep")
    np.testing.assert_array_equal(
        found["layers/sequential/layers/dense/vars/0"], np.asarray(deep.kernel.value)
    )
    # All others are there once, too.
    # There is nothing else, and nothing is left out, besides a state that Keras does not save.
    expected = {each.path: np.asarray(each.value) for each in trained.variables}
    expected |= {each.path: np.asarray(each.value) for each in trained.optimizer.variables}
    left = [x.tobytes() for x in found.values()]
    lost = []
    for name, value in expected.items():
        if value.tobytes() in left:
            left.remove(value.tobytes())
        else:
            lost.append(name)
    assert left == [] and not [name for name in lost if "seed_generator" not in name]


def test_every_value_of_the_older_format_is_called_as_keras_calls_it(trained, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save(tmp_path / "a.h5")
    found = values(tmp_path / "a.h5")
    expected = {each.path: np.asarray(each.value) for each in trained.variables}
    expected |= {
        f"optimizer_weights/{each.path}": np.asarray(each.value)
        for each in trained.optimizer.variables
    }
    lost = expected.keys() - found.keys()
    assert not [name for name in lost if "seed_generator" not in name]  # which Keras does not save
    assert_equal(found, {name: value for name, value in expected.items() if name not in lost})
    with ckpt.load_checkpoint(tmp_path / "a.h5") as reader:
        assert reader.metadata["model_config"]["class_name"] == "Functional"
