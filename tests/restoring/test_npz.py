"""`.npz` and `.npy` files as places: what is read of them, and what is refused.

`test_formats.py` has what they share with every checkpoint that has names alone.
"""

import io
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import check_hostile
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt

X = np.arange(96, dtype=np.float32).reshape(8, 12)


def saved(tmp_path, compressed=False, **arrays):
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def member(data: bytes, name="x.npy", **more) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data, **more)
    return file.getvalue()


def npy(header: bytes, body=b"", version=b"\x01\x00") -> bytes:
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + header + body


def npy_bytes(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["f4", ">f4", "c8", ">c16", "m8[s]", "bool"])
def test_boxes_are_read_in_any_order_of_bytes_and_axes(tmp_path, order, compressed, dtype):
    x = np.asarray(X.astype("i4").astype(dtype), order=order)
    path = saved(tmp_path, compressed, x=x)
    with ckpt.load_checkpoint(path) as reader:
        for box in (((0, 8), (0, 12)), ((2, 5), (0, 12)), ((1, 8), (3, 4)), ((2, 2), (0, 1))):
            part = reader.get_tensor("x", box)
            np.testing.assert_array_equal(part, x[box[0][0] : box[0][1], box[1][0] : box[1][1]])
            assert part.dtype.isnative
        np.testing.assert_array_equal(reader.get_tensor("x"), x)


def test_a_part_of_a_member_takes_a_part_of_the_bytes(tmp_path):
    path = saved(tmp_path, x=np.zeros((1000, 1000)))
    with ckpt.load_checkpoint(path) as reader:
        reader.get_tensor("x", ((10, 12), (0, 1000)))
        assert reader.bytes_read == 16_000


def test_a_member_that_is_read_as_a_whole_is_checked(tmp_path, mesh42):
    path = saved(tmp_path, x=X)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x.npy")
    data = bytearray(path.read_bytes())
    data[data.index(X.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError, match="x: .*its crc32 is"):
        ckpt.load(path)
    with ckpt.load_checkpoint(path) as reader:  # a part cannot be checked
        assert reader.get_tensor("x", ((0, 1), (0, 4))).shape == (1, 4)
    # All shards together are the whole.
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    with pytest.raises(ckpt.CorruptCheckpointError, match="crc32"):
        ckpt.restore(path, {"x": jax.ShapeDtypeStruct(X.shape, jnp.float32, sharding=sharding)})
    assert not ckpt.verify(path).ok
    assert info.CRC


@given(st.data())
def test_one_array_alone_is_the_root(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "one.npy"
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    x = np.arange(np.prod(shape, dtype=int), dtype="f4").reshape(shape)
    np.save(path, x, allow_pickle=False)
    np.testing.assert_array_equal(ckpt.load(path), x)
    np.testing.assert_array_equal(ckpt.restore(path, jnp.zeros(shape)), x)
    assert ckpt.list_variables(path) == [("", shape)]


def test_bfloat16_alone_and_bytes_of_any_meaning(tmp_path):
    x = np.asarray([1.5, -2], ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    assert ckpt.load(tmp_path / "x.npy").dtype == ml_dtypes.bfloat16
    x = np.asarray([[1.5, -2]], ml_dtypes.float8_e5m2)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    assert ckpt.load(tmp_path / "x.npy").tobytes() == x.tobytes()
    x = np.asarray([1.5, -2], ml_dtypes.float8_e4m3fn)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ckpt.UnsupportedFormatError, match="Restore it with a target"):
        ckpt.load(tmp_path / "x.npy")
    restored = ckpt.restore(tmp_path / "x.npy", jnp.zeros(2, jnp.float8_e4m3fn))
    assert np.asarray(restored).tobytes() == x.tobytes()


def test_names_say_nothing(tmp_path):
    (tmp_path / "x.npz").mkdir()
    assert ckpt.load_checkpoint(saved(tmp_path / "x.npz", x=X)).keys() != []
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(tmp_path / "x.npz")
    np.savez(tmp_path / "empty.npz")
    assert ckpt.load(tmp_path / "empty.npz") == {}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"), "does not take 0 bytes"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "its shape is"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}"), "shape"),
        (npy(b"{'descr': '<f1', 'fortran_order': False, 'shape': 3}"), "header|shape"),
        (npy(b"{'descr': '<f1', 'shape': (3,)}"), "header|damaged"),
        (npy(b"{" * 5000), "damaged"),
        (npy(b"(" * 9000), "damaged"),
        (npy(b"1+" * 4000 + b"1"), "damaged"),
        (npy(b"x" * 60000, version=b"\x02\x00"), "its header has"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "its header has"),
        (b"\x93NUMPY\x01\x00", "does not begin"),
        (b"x" * 100, "does not begin"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data, what):
    for path, contents in ((tmp_path / "a.npz", member(data)), (tmp_path / "a.npy", data)):
        path.write_bytes(contents)
        with pytest.raises(ckpt.CorruptCheckpointError, match=what):
            ckpt.load(path)


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}" % (1 << 40)
    data = bytearray(member(npy(header), compress_type=zipfile.ZIP_DEFLATED))
    directory = data.index(b"PK\x01\x02")
    size = (10 + len(header) + (1 << 40)).to_bytes(8, "little")[:4]
    data[directory + 24 : directory + 28] = size
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)


def test_encrypted_and_unusual_members_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path.write_bytes(member(npy_bytes(X), compress_type=method))
        np.testing.assert_array_equal(ckpt.load(path)["x"], X)
    data = bytearray(member(npy_bytes(X)))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ckpt.UnsupportedFormatError, match="encrypted"):
        ckpt.load(path)
    data = bytearray(member(npy_bytes(X)))
    data[data.index(b"PK\x01\x02") + 10] = 97
    path.write_bytes(data)
    with pytest.raises(ckpt.CheckpointError):
        ckpt.load(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_hostile_files_are_refused_or_harmless(tmp_path, compressed):
    data = saved(tmp_path, compressed, x=X, text="abc", raw=b"abc", f=np.asfortranarray(X))
    found = check_hostile(tmp_path / "b.npz", data.read_bytes(), 300)
    assert found["refused"] > 50 and not found["none"]
