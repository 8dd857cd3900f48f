"""Saved on one set of devices, restored on another; and which slices go into which shard."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from places import ROOT

import ckpt_jax as ckpt

W = np.random.default_rng(4).normal(size=(16, 8, 4)).astype(np.float32)
QUICK = ckpt.CheckpointOptions(durable=False)


def place(array, mesh, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def bits(array):
    return np.asarray(array).tobytes()


def rows_of(path) -> dict[str, list[tuple[tuple[int, int], ...]]]:
    """The boxes of each key, from the indexes that the shards have of their own."""
    found: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    for shard in sorted(Path(path, "shards").iterdir()):
        for key, boxes in boxes_of_shard(shard).items():
            found.setdefault(key, []).extend(boxes)
    return found


def boxes_of_shard(shard) -> dict[str, list[tuple[tuple[int, int], ...]]]:
    from ckpt_jax.store.fetch import read_index  # the index of one shard has no public reader

    index = read_index(str(shard))
    return {key: index.tiling(index.tiling_number(key)).boxes() for key in index.keys}


def key_of(name):
    return f"{name}/.ATTRIBUTES/VARIABLE_VALUE"


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_64_bit_arrays_are_restored_bit_for_bit_where_jax_has_32(tmp_path, mesh42, dtype):
    assert not jax.config.read("jax_enable_x64")
    data = np.random.default_rng(1).normal(size=(16, 8, 2)) * 1e12
    data = data.astype(np.int64).astype(dtype)
    path = ckpt.save(tmp_path / "a", {"w": data})
    sharding = NamedSharding(mesh42, P("data", "model"))
    with jax.enable_x64(True):
        target = {"w": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)}
    restored = ckpt.restore(path, target)["w"]
    for shard in restored.addressable_shards:
        assert shard.data.dtype == dtype
        assert bits(shard.data) == data[shard.index].tobytes()


# --- another mesh ----------------------------------------------------------------------

SAVED_AS = [("data", "model"), ("model", "data"), (None, "model"), (("data", "model"),), ()]


@pytest.mark.parametrize("saved", SAVED_AS, ids=str)
def test_a_checkpoint_restores_on_any_other_placement(tmp_path, mesh42, mesh24, mesh8, saved):
    path = ckpt.save(tmp_path / "a", {"w": place(W, mesh42, *saved)})
    backwards = Mesh(np.array(jax.devices())[::-1].reshape(2, 4), ("data", "model"))
    half = Mesh(np.array(jax.devices()[4:]), ("data",))
    shardings = [
        NamedSharding(mesh24, P("data", "model")),
        NamedSharding(mesh24, P("model", None, "data")),
        NamedSharding(mesh24, P(None, None, "model")),
        NamedSharding(mesh24, P(None, ("model", "data"))),
        NamedSharding(mesh24, P()),
        NamedSharding(mesh8, P("data")),
        NamedSharding(backwards, P("data", "model")),
        NamedSharding(half, P(None, "data")),
        SingleDeviceSharding(jax.devices()[5]),
    ]
    for sharding in shardings:
        target = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=sharding)
        found = ckpt.restore(path, {"w": target})["w"]
        assert found.sharding == sharding
        assert found.committed
        assert bits(found) == W.tobytes()
        for shard in found.addressable_shards:
            assert bits(shard.data) == W[shard.index].tobytes()


def test_the_sharding_of_a_concrete_target_is_kept(tmp_path, mesh42, mesh24):
    path = ckpt.save(tmp_path / "a", place(W, mesh42, "data", "model"))
    target = place(np.zeros_like(W), mesh24, "model", "data")
    found = ckpt.restore(path, target)
    assert found.sharding == target.sharding
    assert bits(found) == W.tobytes()
    assert not np.asarray(target).any()


def test_without_a_sharding_an_array_is_on_the_default_device(tmp_path, mesh42):
    path = ckpt.save(tmp_path / "a", place(W, mesh42, "data"))
    found = ckpt.restore(path, jax.ShapeDtypeStruct(W.shape, W.dtype))
    assert found.devices() == {jax.devices()[0]}
    assert not found.committed
    assert bits(found) == W.tobytes()


def test_a_numpy_array_restores_onto_a_mesh_and_back(tmp_path, mesh24):
    path = ckpt.save(tmp_path / "a", W)
    sharding = NamedSharding(mesh24, P("data", "model"))
    placed = ckpt.restore(path, jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=sharding))
    assert placed.sharding == sharding
    back = ckpt.restore(ckpt.save(tmp_path / "b", placed), np.zeros_like(W))
    assert isinstance(back, np.ndarray)
    assert bits(back) == W.tobytes()


def test_typed_keys_restore_onto_another_mesh(tmp_path, mesh42, mesh8):
    keys = place(jax.random.split(jax.random.key(1), (8, 2)), mesh42, "data", "model")
    path = ckpt.save(tmp_path / "a", {"keys": keys})
    sharding = NamedSharding(mesh8, P("data"))
    target = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding)
    found = ckpt.restore(path, {"keys": target})["keys"]
    assert found.dtype == keys.dtype
    assert found.sharding.is_equivalent_to(sharding, keys.ndim)
    assert bits(jax.random.key_data(found)) == bits(jax.random.key_data(keys))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "bool"])
def test_dtypes_of_every_size_reshard(tmp_path, mesh42, mesh24, dtype):
    array = jnp.arange(64).reshape(8, 8).astype(dtype)
    path = ckpt.save(tmp_path / "a", place(array, mesh42, "data", "model"))
    sharding = NamedSharding(mesh24, P("model", "data"))
    found = ckpt.restore(path, jax.ShapeDtypeStruct((8, 8), array.dtype, sharding=sharding))
    assert found.dtype == array.dtype
    assert bits(found) == bits(array)


def test_a_zero_size_array_and_a_scalar_have_a_place_on_a_mesh(tmp_path, mesh42, mesh24):
    tree = {"none": place(jnp.ones((0, 4)), mesh42), "one": place(jnp.float32(3), mesh42)}
    path = ckpt.save(tmp_path / "a", tree)
    sharding = NamedSharding(mesh24, P())
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in tree.items()
    }
    found = ckpt.restore(path, target)
    assert found["none"].shape == (0, 4)
    assert found["one"] == 3
    assert found["one"].sharding == sharding


def test_any_slices_make_up_an_array(tmp_path, mesh24):
    array = np.arange(7 * 8, dtype=np.int32).reshape(7, 8)
    sizes = ((0, 1), (1, 4), (4, 7)), ((0, 5), (5, 8))
    pieces = [
        ckpt.io.Slice(array[slice(*rows), slice(*columns)], (rows, columns), array.shape)
        for rows in sizes[0]
        for columns in sizes[1]
    ]
    prefixes = [
        ckpt.io.write_shard(str(tmp_path / f"part-{i}"), {"x": pieces[i::2]}) for i in range(2)
    ]
    path = ckpt.io.merge_shards(prefixes, str(tmp_path / "merged"))
    sharding = NamedSharding(mesh24, P(None, ("model", "data")))
    target = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    found = ckpt.io.read_slices(path, {"x": target})["x"]
    assert found.sharding == sharding
    assert bits(found) == array.tobytes()
    box = ((2, 6), (3, 7))
    np.testing.assert_array_equal(ckpt.io.read_slices(path, {"x": box})["x"], array[2:6, 3:7])


def test_a_mesh_that_does_not_divide_an_axis_is_reported_with_its_path(tmp_path, mesh8, mesh42):
    tree = {"layers": [{"w": jnp.ones((12, 8))}, {"w": jnp.ones((8, 12))}], "b": jnp.ones(6)}
    path = ckpt.save(tmp_path / "a", tree)
    rows = NamedSharding(mesh8, P("data"))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, target)
    report = raised.value.report
    assert sorted(entry.path for entry in report.mismatched) == ["b", "layers/0/w"]
    assert "(12, 8)" in str(raised.value)
    columns = NamedSharding(mesh42, P(None, "model"))
    target["b"] = tree["b"]
    target["layers"][0]["w"] = jax.ShapeDtypeStruct((12, 8), jnp.float32, sharding=columns)
    assert ckpt.restore(path, target)["layers"][0]["w"].sharding == columns


def test_one_device_reads_what_eight_wrote(tmp_path, mesh42):
    tree = {"w": place(W, mesh42, "data", "model"), "step": 3, "key": jax.random.key(2)}
    path = ckpt.save(tmp_path / "a", tree)
    program = f"""
import jax, numpy as np, ckpt_jax as ckpt
assert len(jax.devices()) == 1
expected = np.random.default_rng(4).normal(size=(16, 8, 4)).astype(np.float32)
tree = ckpt.load({path!r})
assert tree["w"].tobytes() == expected.tobytes()
target = {{"w": jax.ShapeDtypeStruct((16, 8, 4), np.float32), "step": 0, "key": jax.random.key(0)}}
found = ckpt.restore({path!r}, target)
assert np.asarray(found["w"]).tobytes() == expected.tobytes()
print(found["step"], tree["step"])
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "3 3\n"), run.stderr


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_what_some_devices_saved_restores_on_fewer_and_on_more(tmp_path, count):
    w = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
    two = Mesh(np.array(jax.devices()[:2]), ("data",))
    path = ckpt.save(tmp_path / "a", {"w": jax.device_put(w, NamedSharding(two, P("data")))})
    mesh = Mesh(np.array(jax.devices()[:count]), ("rows",))
    wanted = NamedSharding(mesh, P("rows"))
    found = ckpt.load(path, sharding=wanted)["w"]
    assert found.sharding == wanted
    np.testing.assert_array_equal(found, w)
    found = ckpt.restore(
        path, {"w": jnp.zeros_like(w)}, options=ckpt.CheckpointOptions(shardings=wanted)
    )["w"]
    assert found.sharding == wanted
    np.testing.assert_array_equal(found, w)


# --- what is written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "count"), [((), 1), (("data",), 4), ((None, "model"), 2), (("data", "model"), 8)]
)
def test_each_distinct_slice_is_written_once(tmp_path, mesh42, spec, count):
    path = ckpt.save(tmp_path / "a", {"w": place(W, mesh42, *spec)})
    boxes = rows_of(path)[key_of("w")]
    assert len(boxes) == len(set(boxes)) == count
    sizes = [np.prod([stop - start for start, stop in box]) for box in boxes]
    assert sizes == [W.size // count] * count
    stored = sum(file.stat().st_size for file in Path(path).glob("shards/*/c/*"))
    assert W.nbytes <= stored < W.nbytes + 100 * count


def test_a_shard_holds_what_its_device_holds(tmp_path, mesh42):
    tree = {"a": place(W, mesh42, "data", "model"), "b": place(W + 1, mesh42, "data", "model")}
    path = ckpt.save(tmp_path / "a", tree)
    shards = sorted(Path(path, "shards").iterdir())
    assert len(shards) == 8
    seen = set()
    for shard in shards:
        boxes = boxes_of_shard(shard)
        assert set(boxes) == {key_of("a"), key_of("b")}
        assert boxes[key_of("a")] == boxes[key_of("b")]
        seen.update(boxes[key_of("a")])
    assert seen == {
        tuple(
            (s.start or 0, n if s.stop is None else s.stop)
            for s, n in zip(shard.index, W.shape, strict=True)
        )
        for shard in tree["a"].addressable_shards
    }


def test_a_restore_reads_each_byte_that_its_devices_need_once(tmp_path, mesh42):
    big = np.random.default_rng(5).normal(size=(512, 512)).astype(np.float32)
    path = ckpt.save(tmp_path / "a", {"w": big, "other": big + 1}, options=QUICK)
    with ckpt.load_checkpoint(path) as reader:
        target = jax.ShapeDtypeStruct(
            big.shape, big.dtype, sharding=NamedSharding(mesh42, P("data"))
        )
        found = reader.read({key_of("w"): target})[key_of("w")]
        assert bits(found) == big.tobytes()
        assert big.nbytes <= reader.bytes_read < 1.1 * big.nbytes


# --- what was restored belongs to the program ------------------------------------------


def test_restored_arrays_can_be_donated(tmp_path, mesh42):
    tree = {"a": place(W, mesh42, "data"), "b": place(W + 1, mesh42), "c": jnp.arange(64.0)}
    path = ckpt.save(tmp_path / "a", tree)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    first, second = ckpt.restore(path, tree), ckpt.restore(path, tree)
    doubled = update(first)
    assert first["a"].is_deleted()
    for name, array in tree.items():
        assert bits(doubled[name]) == bits(array * 2)
        assert bits(second[name]) == bits(array)
        assert bits(ckpt.load(path)[name]) == bits(array)


def test_donating_one_restored_array_does_not_change_another(tmp_path):
    tree = {str(i): jnp.full(100, i, jnp.float32) for i in range(20)}
    found = ckpt.restore(ckpt.save(tmp_path / "a", tree), tree)
    add = jax.jit(lambda x: x + 1000, donate_argnums=0)
    for i in range(0, 20, 2):
        found[str(i)] = add(found[str(i)])
    for i in range(20):
        assert (np.asarray(found[str(i)]) == i + (0 if i % 2 else 1000)).all()


def test_an_array_may_be_donated_once_it_is_saved(tmp_path, mesh42):
    tree = {"a": place(W, mesh42, "data"), "b": jnp.arange(1000.0)}
    path = ckpt.save(tmp_path / "a", tree)
    jax.block_until_ready(
        jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(tree)
    )
    loaded = ckpt.load(path)
    assert bits(loaded["a"]) == W.tobytes()
    assert loaded["b"].tolist() == list(range(1000))


# --- sharding policies -----------------------------------------------------------------


def planned(key, array_shape, dtype="float32", *, box=None, process=0, device=0):
    box = box or tuple((0, n) for n in array_shape)
    nbytes = int(np.prod([b - a for a, b in box])) * np.dtype(dtype).itemsize
    return ckpt.PlannedSlice(key, box, array_shape, dtype, nbytes, process, device)


def boxes_in(groups):
    return [[(piece.key, *piece.box) for piece in group] for group in groups]


def test_by_device_makes_one_shard_for_each_device():
    slices = [
        planned("a", (2,), device=3),
        planned("b", (2,), device=1),
        planned("c", (2,), device=3),
    ]
    groups = ckpt.ShardByDevice()(slices)
    assert boxes_in(groups) == [[("a", (0, 2)), ("c", (0, 2))], [("b", (0, 2))]]


def test_by_process_makes_one_shard(tmp_path, mesh42):
    slices = [planned("a", (2,), device=3), planned("b", (2,), device=1)]
    assert boxes_in(ckpt.ShardByProcess()(slices)) == [[("a", (0, 2)), ("b", (0, 2))]]
    assert list(ckpt.ShardByProcess()([])) == []
    tree = {"w": place(W, mesh42, "data", "model"), "x": 1}
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.ShardByProcess())
    path = ckpt.save(tmp_path / "a", tree, options=options)
    assert len(list(Path(path, "shards").iterdir())) == 1
    assert bits(ckpt.load(path)["w"]) == W.tobytes()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (4, [[("v0", (i, i + 1))] for i in range(4)]
            + [[("v1", (i, i + 1), (0, 1))] for i in range(4)]),
        (8, [[("v0", (0, 2))], [("v0", (2, 4))],
             [("v1", (0, 2), (0, 1))], [("v1", (2, 4), (0, 1))]]),
        (10, [[("v0", (0, 2))], [("v0", (2, 4))],
              [("v1", (0, 2), (0, 1))], [("v1", (2, 4), (0, 1))]]),
        (16, [[("v0", (0, 4))], [("v1", (0, 4), (0, 1))]]),
        (18, [[("v0", (0, 4))], [("v1", (0, 4), (0, 1))]]),
    ],
)  # fmt: skip
def test_max_shard_size_in_one_dimension(limit, expected):
    """TensorFlow's sharding_policies_test, MaxShardSizePolicy 1D."""
    slices = [planned("v0", (4,)), planned("v1", (4, 1), "int32")]
    assert boxes_in(ckpt.MaxShardSize(limit)(slices)) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        *((limit, [[("v0", (i, i + 1), (0, 2))] for i in range(3)]
                  + [[("v1", (i, i + 1), (0, 2), (0, 1))] for i in range(3)])
          for limit in (8, 10)),
        (12, [[("v0", (0, 3), (0, 1))], [("v0", (0, 3), (1, 2))],
              [("v1", (0, 3), (0, 1), (0, 1))], [("v1", (0, 3), (1, 2), (0, 1))]]),
        (16, [[("v0", (0, 2), (0, 2))],
              [("v0", (2, 3), (0, 2)), ("v1", (0, 1), (0, 2), (0, 1))],
              [("v1", (1, 3), (0, 2), (0, 1))]]),
    ],
)  # fmt: skip
def test_max_shard_size_in_two_dimensions(limit, expected):
    """TensorFlow's sharding_policies_test, MaxShardSizePolicy 2D."""
    slices = [planned("v0", (3, 2)), planned("v1", (3, 2, 1), "int32")]
    assert boxes_in(ckpt.MaxShardSize(limit)(slices)) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (8, [[("v", (0, 2), (1, 2))], [("v", (0, 1), (2, 4))], [("v", (1, 2), (2, 4))]]),
        (12, [[("v", (0, 1), (1, 4))], [("v", (1, 2), (1, 4))]]),
    ],
)
def test_max_shard_size_cuts_what_is_a_slice_already(limit, expected):
    """TensorFlow's sharding_policies_test, PreSlicedTensors."""
    slices = [planned("v", (2, 5), box=((0, 2), (1, 4)))]
    assert boxes_in(ckpt.MaxShardSize(limit)(slices)) == expected


def test_an_element_above_the_limit_is_a_shard_of_its_own():
    slices = [planned("a", (), "int8"), planned("b", (), "float64"), planned("c", (), "int8")]
    groups = boxes_in(ckpt.MaxShardSize(4)(slices))
    assert ["b"] in [[piece[0] for piece in group] for group in groups]
    slices = [planned("x", (3, 2), "complex128")]
    groups = ckpt.MaxShardSize(4)(slices)
    assert [len(group) for group in groups] == [1] * 6
    assert {piece.nbytes for group in groups for piece in group} == {16}


@pytest.mark.parametrize("limit", [1, 7, 64, 100, 1000, 10**9])
def test_max_shard_size_keeps_every_element_and_its_limit(limit):
    slices = [planned("a", (5, 7)), planned("b", (0, 3)), planned("c", ()), planned("d", (2, 3, 4))]
    groups = ckpt.MaxShardSize(limit)(slices)
    covered = {piece.key: np.zeros(piece.shape, int) for piece in slices}
    for group in groups:
        total = sum(piece.nbytes for piece in group)
        assert total <= limit or [p.nbytes for p in group if p.nbytes] == [4]
        for piece in group:
            covered[piece.key][tuple(slice(*pair) for pair in piece.box)] += 1
            assert piece.nbytes == 4 * np.prod([b - a for a, b in piece.box])
    assert all((array == 1).all() for array in covered.values())
    assert {piece.key for group in groups for piece in group} == {"a", "b", "c", "d"}


def test_max_shard_size_end_to_end_makes_eight_shards(tmp_path, mesh24):
    """TensorFlow's CheckpointOption test: limit 10 gives 3 + 3 + 1 + 1 files."""
    tree = {
        "v0": jnp.arange(6, dtype=jnp.float32).reshape(3, 2),
        "v1": jnp.arange(6, dtype=jnp.int32).reshape(3, 2, 1),
        "v2": b"ten bytes!",
        "v3": 2.5,
    }
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = ckpt.save(tmp_path / "a", tree, options=options)
    assert len(list(Path(path, "shards").iterdir())) == 8
    target = {**tree, "v2": b"", "v3": 0.0}
    found = ckpt.restore(path, target)
    assert [bits(found[name]) for name in ("v0", "v1")] == [bits(tree[n]) for n in ("v0", "v1")]
    assert (found["v2"], found["v3"]) == (b"ten bytes!", 2.5)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_byte_is_refused(limit):
    with pytest.raises(ValueError, match="at least 1 byte"):
        ckpt.MaxShardSize(limit)


def test_equal_policies_are_equal_and_hash_alike():
    assert ckpt.MaxShardSize(5) == ckpt.MaxShardSize(5) != ckpt.MaxShardSize(6)
    assert hash(ckpt.ShardByDevice()) == hash(ckpt.ShardByDevice())
    assert ckpt.CheckpointOptions() == ckpt.CheckpointOptions()


def halves(piece):
    """A slice cut in two along its first axis."""
    (start, stop), *rest = piece.box
    middle = (start + stop) // 2
    return [
        piece._replace(box=(pair, *rest), nbytes=piece.nbytes // 2)
        for pair in pairwise((start, middle, stop))
    ]


ALTERATIONS = {
    "drops everything": lambda s: [],
    "drops a value": lambda s: [s[1:]],
    "drops a part": lambda s: [[*s[1:], halves(s[0])[0]]],
    "repeats a value": lambda s: [s, s[:1]],
    "repeats a value in one shard": lambda s: [[*s, s[0]]],
    "repeats a part": lambda s: [[*s[1:], *halves(s[0]), halves(s[0])[1]]],
    "repeats what overlaps": lambda s: [[*s, halves(s[0])[0]]],
    "adds a key": lambda s: [[*s, s[0]._replace(key="other")]],
    "renames a key": lambda s: [[s[0]._replace(key="other"), *s[1:]]],
    "changes a shape": lambda s: [[s[0]._replace(shape=(16, 9, 4)), *s[1:]]],
    "changes a dtype": lambda s: [[s[0]._replace(dtype="int32"), *s[1:]]],
    "changes a process": lambda s: [[s[0]._replace(process=1)], s[1:]],
    "mixes processes": lambda s: [[s[0]._replace(process=1), *s[1:]]],
    "moves a box": lambda s: [[s[0]._replace(box=((1, 5), (0, 4), (0, 4))), *s[1:]]],
    "lowers a rank": lambda s: [[s[0]._replace(box=s[0].box[:2]), *s[1:]]],
    "turns a box around": lambda s: [
        [s[0]._replace(box=tuple((b, a) for a, b in s[0].box)), *s[1:]]
    ],
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_a_policy_that_alters_the_values_is_refused_before_anything_is_written(
    tmp_path, mesh42, alteration
):
    def policy(slices):
        ordered = sorted(slices, key=lambda piece: -piece.nbytes)
        assert ordered[0].key == key_of("w")
        return ALTERATIONS[alteration](ordered)

    tree = {"w": place(W, mesh42, "data", "model"), "step": 7}
    options = ckpt.CheckpointOptions(sharding_policy=policy)
    with pytest.raises(ckpt.ShardError, match="nothing written"):
        ckpt.save(tmp_path / "a", tree, options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_ones_own_may_regroup_and_cut(tmp_path, mesh42):
    def policy(slices):
        parts = [p for piece in slices for p in (halves(piece) if len(piece.box) == 3 else [piece])]
        return [parts[i::3] for i in range(3)]

    tree = {"w": place(W, mesh42, "data", "model"), "step": 7}
    options = ckpt.CheckpointOptions(sharding_policy=policy)
    path = ckpt.save(tmp_path / "a", tree, options=options)
    assert len(list(Path(path, "shards").iterdir())) == 3
    assert len(rows_of(path)[key_of("w")]) == 16
    found = ckpt.load(path)
    assert bits(found["w"]) == W.tobytes()
    assert found["step"] == 7


def test_a_policy_is_no_checkpoint_option_unless_it_can_be_called():
    with pytest.raises(ValueError, match="callable"):
        ckpt.CheckpointOptions(sharding_policy="by device")  # type: ignore[arg-type]


def test_keys_on_a_mesh_that_does_not_divide_them_are_reported_with_their_path(tmp_path):
    keys = jax.random.split(jax.random.key(0), 6)
    path = ckpt.save(tmp_path / "a", {"keys": keys})
    mesh8 = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh8, P("data"))
    with pytest.raises(ckpt.RestoreMismatchError, match="keys: "):
        ckpt.restore(path, {"keys": jax.ShapeDtypeStruct((6,), keys.dtype, sharding=rows)})
