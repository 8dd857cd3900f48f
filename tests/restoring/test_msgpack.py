"""Flax's msgpack: what it holds, chunks, directories of steps, and hostile files."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization
from foreign import FIXTURES, check_hostile, outcome
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import slices

TYPES, CHUNKED = FIXTURES / "types.msgpack", FIXTURES / "chunked.msgpack"
LEGACY = FIXTURES / "flax_legacy"


def written(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    return path


def test_all_kinds_of_values_are_what_flax_reads():
    expected = serialization.msgpack_restore(TYPES.read_bytes())
    loaded = ckpt.load(TYPES)
    assert list(loaded) == list(expected)
    for name, value in expected.items():
        assert type(loaded[name]) is type(value), name
        if isinstance(value, np.ndarray):
            assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
            assert loaded[name].tobytes() == value.tobytes(), name
        else:
            assert loaded[name] == value, name


@pytest.mark.parametrize("tree", [{}, {"a": {}}, {"deep": {"er": {"x": np.arange(3)}}}])
def test_small_trees(tmp_path, tree):
    loaded = ckpt.load(written(tmp_path / "checkpoint_0", tree))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=40)
        | st.binary(max_size=300),
        lambda inner: st.dictionaries(st.text(max_size=40), inner, max_size=4),
        max_leaves=8,
    )
)
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.msgpack"
    path.write_bytes(serialization.msgpack_serialize({"tree": tree}))
    loaded = ckpt.load(path)
    assert loaded.get("tree") == tree


def test_only_the_bytes_that_are_asked_for_are_read(tmp_path):
    path = written(tmp_path / "a.msgpack", {"x": np.zeros((1000, 100)), "y": np.ones(3)})
    with ckpt.load_checkpoint(path) as reader:
        assert reader.get_tensor("x", ((5, 6), (0, 100))).shape == (1, 100)
        assert reader.bytes_read == 800


@given(st.data())
def test_chunks_are_one_array(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    array = np.arange(np.prod(shape, dtype=int), dtype="f4").reshape(shape)
    size = data.draw(st.integers(1, array.size))
    flat = array.ravel()
    chunks = {str(n): flat[i : i + size] for n, i in enumerate(range(0, array.size, size))}
    dims = {str(n): length for n, length in enumerate(shape)}
    tree = {"w": {"__msgpack_chunked_array__": True, "shape": dims, "chunks": chunks}}
    path = tmp_path_factory.getbasetemp() / "chunks.msgpack"
    path.write_bytes(msgpack.packb(tree, default=serialization._msgpack_ext_pack))
    with ckpt.load_checkpoint(path) as reader:
        np.testing.assert_array_equal(reader.get_tensor("w"), array)
        box = tuple([tuple(sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape])
        np.testing.assert_array_equal(reader.get_tensor("w", box), array[slices(box)])


def test_the_chunks_of_flax_are_placed_on_devices(mesh42):
    array = np.arange(40, dtype="f4").reshape(5, 8)
    assert ckpt.load(CHUNKED)["x"] == 1
    sharding = NamedSharding(mesh42, PartitionSpec(None, "model"))
    target = {"w": jax.ShapeDtypeStruct((5, 8), "float32", sharding=sharding), "x": 0}
    restored = ckpt.restore(CHUNKED, target)["w"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, array)


def test_names_with_slashes_are_one_label(tmp_path):
    path = written(tmp_path / "a.msgpack", {"mlp/~/linear": {"w": np.arange(3.0)}})
    assert list(ckpt.load(path)) == ["mlp/~/linear"]
    target = {"mlp/~/linear": {"w": jnp.zeros(3)}}
    restored = ckpt.restore(path, target, options=ckpt.CheckpointOptions(cast=True))
    assert restored["mlp/~/linear"]["w"][2] == 2


def test_a_module_of_linen_is_restored(tmp_path):
    params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 4)))
    path = written(tmp_path / "flax_model.msgpack", params)
    restored = ckpt.restore(path, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(restored["params"]["kernel"], params["params"]["kernel"])


# --- directories ---------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    for step in (3, 20, 100):
        written(tmp_path / f"checkpoint_{step}", {"step": step, "w": np.full(2, step, "f4")})
    (tmp_path / "checkpoint_tmp").write_bytes(b"")
    (tmp_path / "events_5").write_bytes(b"no checkpoint")
    return tmp_path


def test_the_latest_checkpoint_of_flax_is_found(runs):
    assert ckpt.latest_checkpoint(runs) == str(runs / "checkpoint_100")
    assert ckpt.latest_checkpoint(LEGACY) == str(LEGACY / "checkpoint_3")
    data = (runs / "checkpoint_100").read_bytes()
    (runs / "checkpoint_100").write_bytes(data[:-1])
    assert ckpt.latest_checkpoint(runs) == str(runs / "checkpoint_20")


def test_new_checkpoints_of_flax_are_evaluated_as_they_appear(runs):
    seen = ckpt.checkpoints_iterator(runs, timeout=0)
    assert next(seen) == str(runs / "checkpoint_100")
    written(runs / "checkpoint_101", {"step": 101})
    assert next(seen) == str(runs / "checkpoint_101")
    assert next(seen, None) is None


def test_a_manager_goes_on_from_the_checkpoints_of_flax(runs):
    checkpoint = ckpt.Checkpoint(step=0, w=jnp.zeros(2))
    manager = ckpt.CheckpointManager(checkpoint, runs)
    assert manager.restore_or_initialize() == str(runs / "checkpoint_100")
    assert checkpoint.step == 100 and checkpoint.w[0] == 100
    assert manager.restore(20) and checkpoint.step == 20
    checkpoint.step = 101
    path = manager.save(101)
    fresh = ckpt.Checkpoint(step=0, w=jnp.zeros(2))
    assert ckpt.CheckpointManager(fresh, runs).restore_or_initialize() == path
    assert fresh.step == 101 and (runs / "checkpoint_100").exists()


# --- damage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x81\xa1a", "expected"),
        (b"\x81\xa1a\xc1", "begins no value"),
        (b"\x82\xa1a\x01\xa1a\x02", "occurs twice"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", "expected"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "expected"),
        (b"\x81\xa1a" + b"\x81\xa1a" * 500 + b"\x01", "levels"),
        (b"\x81\xa1a\xdd\x00\x20\x00\x00" + b"\x01" * (2 << 20), "values"),
        (b"\x81\xa1a\x01\x01", "ends at"),
        (b"\x81\xa1a\xc7\x00\x01", "expected|three values"),
        (b"\x81\xa1a\xc7\x02\x02\x92\x01", "expected|end"),
        (
            msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"1234")))}),
            "does not take 4 bytes",
        ),
        (
            msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((-3,), "float32", b"")))}),
            "shape",
        ),
        (
            msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": 3}}),
            "chunks",
        ),
    ],
)
def test_files_that_lie_are_refused(tmp_path, data, what):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match=what) as raised:
        ckpt.load(path)
    assert raised.value.file == str(path)


def test_what_flax_does_not_write_is_refused_by_name(tmp_path):
    tree = {
        "odd": msgpack.ExtType(9, b"x"),
        "strange": msgpack.ExtType(1, msgpack.packb(((1,), "float128", b"0123456789abcdef"))),
        "far": "//GDAPlaceholder:w",
        "good": 1,
    }
    path = tmp_path / "a.msgpack"
    path.write_bytes(msgpack.packb(tree))
    with pytest.raises(ckpt.UnsupportedFormatError) as raised:
        ckpt.load(path)
    for part in ("odd: it is an extension of type 9", "strange: float128", "far: its array lies"):
        assert part in str(raised.value)
    assert ckpt.load(path, only="good") == {"good": 1}


@pytest.mark.parametrize("path", [TYPES, CHUNKED, LEGACY / "checkpoint_3"])
def test_hostile_files_are_refused_or_harmless(tmp_path, path):
    found = check_hostile(tmp_path / "a.msgpack", path.read_bytes(), 100)
    assert found["refused"] > 30 and not found["none"]


def test_every_truncation_is_found(tmp_path):
    data = TYPES.read_bytes()
    for length in range(0, len(data), 5):
        (tmp_path / "a.msgpack").write_bytes(data[:length])
        assert outcome(tmp_path / "a.msgpack") == "refused", length


def test_a_copy_elsewhere_is_the_same(tmp_path):
    shutil.copy(TYPES, tmp_path / "no_name")
    assert ckpt.load(tmp_path / "no_name")["s"] == "x"
