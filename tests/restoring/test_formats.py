"""Name-based checkpoints: `.npz` files, matched by the global names of objects."""

import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from descriptors import open_files
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from trackables import Model

import ckpt_jax as ckpt
from ckpt_jax.graph.global_names import graph_of, labels_of
from ckpt_jax.graph.labels import readable
from ckpt_jax.graph.specs import LeafSpec


class Pair(ckpt.Trackable):
    """Two named values in one object."""

    def __init__(self):
        self.v1 = self.v2 = jnp.zeros(2)

    def serialize_to_arrays(self):
        return {"v1": self.v1, "v2": self.v2}

    def restore_from_arrays(self, arrays):
        self.v1, self.v2 = arrays["v1"], arrays["v2"]


class Position(ckpt.PythonState):
    index = 0

    def serialize(self):
        return str(self.index)

    def deserialize(self, value):
        self.index = int(value)


def npz(tmp_path, /, **arrays) -> str:
    return named(tmp_path, arrays)


def named(tmp_path, arrays) -> str:
    path = str(tmp_path / "dump.npz")
    np.savez(path, **arrays)
    return path


W, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)


# --- functions -------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["/", "."])
def test_a_pytree_is_restored_by_its_paths(tmp_path, separator):
    path = named(tmp_path, {f"layers{separator}0{separator}w": W, f"layers{separator}1": B})
    target = {"layers": [{"w": jnp.zeros((2, 3))}, jnp.zeros(3)]}
    restored = ckpt.restore(path, target)
    np.testing.assert_array_equal(restored["layers"][0]["w"], W)
    np.testing.assert_array_equal(restored["layers"][1], B)


def test_a_dot_separates_nothing_where_there_are_slashes(tmp_path):
    path = named(tmp_path, {"a.b/w": W, "c.d": B})
    restored = ckpt.restore(path, {"a.b": {"w": np.zeros_like(W)}, "c.d": np.zeros_like(B)})
    np.testing.assert_array_equal(restored["a.b"]["w"], W)
    np.testing.assert_array_equal(restored["c.d"], B)


def test_restoring_places_arrays_on_the_shardings_of_the_target(tmp_path, mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    target = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
    restored = ckpt.restore(npz(tmp_path, x=x), target)["x"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, x)


def test_every_difference_is_reported_before_anything_is_read(tmp_path):
    path = named(tmp_path, {"m/w": W, "m/old": B})
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, {"m": {"w": jnp.zeros((3, 2)), "new": jnp.zeros(3)}})
    report = raised.value.report
    assert [entry.path for entry in report.mismatched] == ["m/w"]
    assert [entry.path for entry in report.missing] == ["m/new"]
    assert [entry.path for entry in report.unexpected] == ["m/old"]


def test_rename_rules_apply_to_global_names(tmp_path):
    path = named(tmp_path, {"encoder/0/w": W, "encoder/0/b": B})
    target = {"layers": [{"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}]}
    rename = [("encoder/*/*", "layers/*/*")]
    report = ckpt.plan_restore(path, target, rename=rename)
    assert report.exact
    assert report.nbytes == W.nbytes + B.nbytes
    assert {entry.saved_path for entry in report.renamed} == {"encoder/0/w", "encoder/0/b"}
    restored = ckpt.restore(path, target, rename=rename)
    np.testing.assert_array_equal(restored["layers"][0]["w"], W)


def test_an_nnx_module_is_restored_by_the_paths_of_its_variables(tmp_path):
    path = named(tmp_path, {"kernel": W, "bias": B})
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    ckpt.restore(path, model)
    np.testing.assert_array_equal(model.kernel[...], W)
    np.testing.assert_array_equal(model.bias[...], B)


def test_loading_gives_nested_dicts_and_reads_only_what_is_asked_for(tmp_path):
    path = named(
        tmp_path, {"m/w": W, "m/b": np.ones(9999), "note": "größe", "raw": b"ab\0", "n": 3}
    )
    loaded = ckpt.load(path)
    np.testing.assert_array_equal(loaded["m"]["w"], W)
    assert (loaded["note"], loaded["raw"], int(loaded["n"])) == ("größe", b"ab\0", 3)
    loaded["m"]["w"][0] = 7  # the arrays are the caller's
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("m/b.npy")
    damage(path, info.header_offset + info.file_size)
    assert list(ckpt.load(path, only="m/w")["m"]) == ["w"]
    with pytest.raises(ckpt.CorruptCheckpointError, match="m/b"):
        ckpt.load(path, only="m/b")


def test_python_values_take_rank_0_arrays_and_states_take_strings(tmp_path):
    path = npz(tmp_path, step=7, rate=0.5, name="adam", position="12")
    target = {"step": 0, "rate": 0.0, "name": "", "position": Position()}
    restored = ckpt.restore(path, target)
    assert (restored["step"], restored["rate"], restored["name"]) == (7, 0.5, "adam")
    assert type(restored["step"]) is int
    assert restored["position"].index == 12


def attach_dict(root, name):
    setattr(root, name, {"w": np.zeros((2, 3), np.float32)})
    return getattr(root, name)["w"]


def attach_object(root, name):
    child = ckpt.AutoTrackable()
    child.w = ckpt.Variable(np.zeros((2, 3), np.float32))
    setattr(root, name, child)
    return child.w.value


def attach_element(root, name):
    setattr(root, name.partition("/")[0], child := ckpt.Trackable())
    child.track(f"{name.partition('/')[2]}/w", variable := ckpt.Variable(np.zeros((2, 3), "f4")))
    return variable.value


@pytest.mark.parametrize("attach", [attach_dict, attach_object, attach_element])
@pytest.mark.parametrize("name", ["mlp/~/linear_0", "mlp/linear_1"])
def test_an_object_whose_own_name_has_a_slash_gets_its_values_when_it_is_attached(
    tmp_path, attach, name
):
    path = named(tmp_path, {f"{name}/w": W, "mlp/other/w": W + 1, "rest.of/it": B})
    checkpoint = ckpt.Checkpoint()
    status = checkpoint.read(path)
    np.testing.assert_array_equal(attach(checkpoint, name), W)
    assert len(status.expect_partial().report.restored) == 1
    if attach is not attach_element:
        np.testing.assert_array_equal(attach(checkpoint, "mlp/other"), W + 1)


def test_an_object_with_a_slash_in_its_name_that_does_not_fit_is_an_error(tmp_path):
    path = named(tmp_path, {"mlp/linear_0/w": B})
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(path).expect_partial()
    with pytest.raises(ckpt.RestoreMismatchError, match=r"expected shape \(2, 3\), got \(3,\)"):
        attach_dict(checkpoint, "mlp/linear_0")


def test_names_with_slashes_in_other_checkpoints_are_names(tmp_path):
    path = ckpt.Checkpoint(mlp={"linear_0": {"w": W}}).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint()
    checkpoint.read(path).expect_partial()
    assert not attach_dict(checkpoint, "mlp/linear_0").any()


def test_looking_into_one_works_as_into_any_checkpoint(tmp_path):
    path = named(tmp_path, {"m/w": W, "m/b": B})
    assert ckpt.list_variables(path) == [("m/b", (3,)), ("m/w", (2, 3))]
    np.testing.assert_array_equal(ckpt.load_variable(path, "m/w"), W)
    with ckpt.load_checkpoint(path) as reader:
        assert reader.has_tensor("m/w") and not reader.has_tensor("m")
        assert reader.get_variable_to_dtype_map()["m/w"] == np.float32
        np.testing.assert_array_equal(reader.get_tensor("m/w", ((0, 1), (1, 3))), W[:1, 1:])
        assert reader.bytes_read == 8  # of the box alone
        with pytest.raises(KeyError, match="nothing"):
            reader.get_tensor("nothing")
    assert set(ckpt.object_metadata(path).paths) == {"", "m", "m/w", "m/b"}
    assert ckpt.verify(path).ok


def test_a_closed_reader_refuses_to_read_and_holds_no_file(tmp_path):
    path = npz(tmp_path, w=W)
    reader = ckpt.load_checkpoint(path)
    reader.close()
    assert not open_files(str(tmp_path))
    with pytest.raises(RuntimeError, match="closed"):
        reader.get_tensor("w")


# --- dtypes ----------------------------------------------------------------------------


def test_bfloat16_comes_back_although_numpy_forgets_its_name(tmp_path):
    x = np.asarray([1.5, -2, np.nan], ml_dtypes.bfloat16)
    restored = ckpt.restore(npz(tmp_path, x=x), {"x": jnp.zeros(3, jnp.bfloat16)})["x"]
    np.testing.assert_array_equal(np.asarray(restored).view(np.uint16), x.view(np.uint16))


def test_other_byte_and_memory_orders_are_read_as_they_are_meant(tmp_path):
    path = npz(tmp_path, big=W.astype(">f4"), fortran=np.asfortranarray(W))
    loaded = ckpt.load(path)
    for array in loaded.values():
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, W)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, ml_dtypes.float8_e4m3fn),  # one anonymous byte each
        np.array(["a", "b"]),
        np.zeros(2, [("a", "i1"), ("b", "i1")]),
        np.array([object(), None], object),
    ],
    ids=["float8", "strings", "records", "objects"],
)
def test_what_cannot_be_read_is_listed_and_refused_by_name(tmp_path, array):
    path = npz(tmp_path, w=W, x=array)
    assert dict(ckpt.list_variables(path)) == {"w": (2, 3), "x": (2,)}
    np.testing.assert_array_equal(ckpt.load(path, only="w")["w"], W)
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"dump.npz: x: .*only="):
        ckpt.load(path)
    target = {"w": jnp.zeros((2, 3)), "x": jnp.zeros(2)}
    report = ckpt.plan_restore(path, target, options=ckpt.CheckpointOptions(cast=True))
    assert [entry.path for entry in report.mismatched] == ["x"]
    assert "unreadable" in report.mismatched[0].what


# --- damage ----------------------------------------------------------------------------


def damage(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_a_missing_file_is_no_checkpoint(tmp_path):
    with pytest.raises(ckpt.CheckpointNotFoundError, match="no checkpoint"):
        ckpt.load(tmp_path / "none.npz")


def test_what_is_no_zip_file_is_damaged(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"a\.npz"):
        ckpt.load(path)


def test_a_header_that_does_not_fit_the_size_is_damage_found_on_opening(tmp_path):
    path = str(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "w") as file:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}\n"
        file.writestr("x.npy", b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header + b"1234")
    with pytest.raises(ckpt.CorruptCheckpointError, match="x: .*damaged"):
        ckpt.load_checkpoint(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_damaged_byte_changes_a_value_in_silence(tmp_path, compressed):
    path = str(tmp_path / "a.npz")
    (np.savez_compressed if compressed else np.savez)(path, w=W)
    whole = (tmp_path / "a.npz").read_bytes()
    for offset in range(0, len(whole), 3):
        (tmp_path / "a.npz").write_bytes(whole)
        damage(path, offset)
        try:
            loaded = ckpt.load(path)
        except (ckpt.CorruptCheckpointError, ckpt.UnsupportedFormatError):
            continue
        for name, array in loaded.items():  # a byte that means nothing, or the name's
            if isinstance(array, np.ndarray):
                assert array.tobytes() == W.tobytes(), (name, offset)


def test_two_names_for_one_path_are_refused():
    with pytest.raises(ValueError, match="mean one value"):
        graph_of({"a//b": LeafSpec("numpy"), "a/.E/b": LeafSpec("numpy")})


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_the_labels_of_a_path_are_those_it_was_made_of(labels):
    assert labels_of("/".join(map(readable, labels))) == tuple(labels)


# --- objects ---------------------------------------------------------------------------


def test_a_checkpoint_of_objects_is_restored_by_global_names(tmp_path):
    path = named(tmp_path, {"model/w": W, "model/layers/0": B})
    model = Model(w=ckpt.Variable(jnp.zeros((2, 3))), layers=[ckpt.Variable(jnp.zeros(3))])
    status = ckpt.Checkpoint(model=model).restore(path)
    np.testing.assert_array_equal(model.w.value, W)
    np.testing.assert_array_equal(model.layers[0].value, B)
    # The save counter is not in the file, and is exempt.
    assert status.assert_consumed() is status
    status.assert_existing_objects_matched().assert_nontrivial_match()


def test_the_three_assertions_all_ask_for_every_object_of_the_program(tmp_path):
    path = npz(tmp_path, w=W, unused=B)
    root = ckpt.Checkpoint(w=ckpt.Variable(jnp.zeros((2, 3))))
    status = root.restore(path)
    status.assert_consumed().assert_existing_objects_matched().assert_nontrivial_match()
    root.extra = ckpt.Variable(jnp.zeros(1))
    for assertion in (
        status.assert_consumed,
        status.assert_existing_objects_matched,
        status.assert_nontrivial_match,
    ):
        with pytest.raises(AssertionError, match="extra"):
            assertion()
    assert status.expect_partial() is status


def test_values_arrive_at_objects_that_appear_later(tmp_path):
    path = named(tmp_path, {"model/w": W, "model/pair/v1": [1, 2.0], "model/pair/v2": [3, 4.0]})
    root = ckpt.Checkpoint()
    status = root.restore(path, ckpt.CheckpointOptions(cast=True))
    root.model = Model()
    called = []
    variable = root.model.add_variable("w", (2, 3), initializer=lambda *a: called.append(a))
    np.testing.assert_array_equal(variable.value, W)
    assert not called
    root.model.pair = Pair()
    np.testing.assert_array_equal(root.model.pair.v2, [3, 4])
    status.assert_consumed()


def test_the_values_that_an_object_owns_are_named_below_it(tmp_path):
    path = named(tmp_path, {"pair/v1": B[:2], "pair/v2": 2 * B[:2], "pair/v3": B})
    pair = Pair()
    root = ckpt.Checkpoint(pair=pair)
    status = root.restore(path)
    np.testing.assert_array_equal(pair.v1, [1, 1])
    np.testing.assert_array_equal(pair.v2, [2, 2])
    status.assert_consumed()
    assert [entry.path for entry in status.report.unexpected] == []
    assert [entry.path for entry in status.report.deferred] == ["pair/v3"]


def test_the_paths_of_a_report_are_global_names(tmp_path):
    """What one checkpoint's report calls its values restores them from a dump of the same names."""
    tree = {"a/b": W, "": B, "x.y": [W, {"0": B}], "deep": {"er": {"": W}}}
    paths = [e.path for e in ckpt.plan_restore(ckpt.save(tmp_path / "a", tree), tree).restored]
    leaves = [tree["a/b"], tree[""], W, B, W]
    assert sorted(paths) == sorted(["a.Sb", ".E", "x.y/0", "x.y/1/0", "deep/er/.E"])
    by_path = {"a.Sb": leaves[0], ".E": leaves[1], "x.y/0": W, "x.y/1/0": B, "deep/er/.E": W}
    zeros = jax.tree.map(np.zeros_like, tree)
    restored = ckpt.restore(named(tmp_path, by_path), zeros)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_an_object_of_a_registered_saver_has_no_global_name(tmp_path):
    path = named(tmp_path, {"pair/v1": B, "w": W})
    with ckpt.registration_scope():
        ckpt.register_checkpoint_saver(
            name="pairs",
            predicate=lambda obj: isinstance(obj, Pair),
            save_fn=lambda objects, prefix: None,
            restore_fn=lambda objects, prefix: pytest.fail("there is nothing for it"),
        )
        target = {"pair": Pair(), "w": np.zeros_like(W)}
        report = ckpt.plan_restore(path, target)
        assert [entry.path for entry in report.missing] == ["pair"]
        np.testing.assert_array_equal(ckpt.restore(path, target, strict=False)["w"], W)


def test_what_stays_unused_is_logged_unless_it_is_expected(tmp_path, caplog):
    path = npz(tmp_path, w=W, unused=B)
    root = ckpt.Checkpoint(w=ckpt.Variable(jnp.zeros((2, 3))))
    root.restore(path).expect_partial()
    del root
    assert not caplog.records
    ckpt.Checkpoint(w=ckpt.Variable(jnp.zeros((2, 3)))).restore(path)
    assert "unused" in caplog.text and "(root).w" not in caplog.text


# --- the protocol ----------------------------------------------------------------------


def test_a_format_is_recognised_by_its_content_and_not_by_its_name(tmp_path):
    path = ckpt.save(tmp_path / "own.npz", {"w": W})
    np.testing.assert_array_equal(ckpt.load(path)["w"], W)
    renamed = tmp_path / "weights.bin"
    (tmp_path / "elsewhere").mkdir()
    pathlib.Path(npz(tmp_path / "elsewhere", w=W)).rename(renamed)
    np.testing.assert_array_equal(ckpt.load(renamed)["w"], W)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(tmp_path / "a.npz")


def test_values_without_an_object_graph_can_be_read_by_key(tmp_path):
    """docs/format.md: 'holds values without objects: they can be read by key'."""
    prefix = ckpt.io.write_shard(str(tmp_path / "part"), {"x": np.arange(3)})
    path = ckpt.io.merge_shards([prefix], str(tmp_path / "a"))
    with ckpt.load_checkpoint(path) as reader:
        assert reader.keys() == ["x"]
        assert reader.get_tensor("x").tolist() == [0, 1, 2]


# --- names with separators, and dtypes that a target says ----------------------------------


HAIKU = {"mlp/~/linear_0": {"w": 1.0, "b": 2.0}, "mlp/~/linear_1": {"w": 3.0}}


def test_names_may_have_separators_in_the_keys_of_the_program(tmp_path):
    flat = {f"{module}/{name}": x for module, own in HAIKU.items() for name, x in own.items()}
    path = npz(tmp_path, **{name: np.float32(x) for name, x in flat.items()})
    target = jax.tree.map(lambda x: np.float32(0), HAIKU)
    assert ckpt.restore(path, target) == HAIKU
    model = ckpt.AutoTrackable()
    status = ckpt.Checkpoint(model).read(
        npz(tmp_path, **{f"params/{name}": np.full(1, x) for name, x in flat.items()})
    )
    model.params = jax.tree.map(lambda x: np.zeros(1), HAIKU)
    status.assert_consumed()
    assert model.params == HAIKU


@pytest.mark.parametrize("sep", ["/", "."])
@pytest.mark.parametrize(
    "target",
    [
        {"a": {"b": {"w": 1.0}, "c": 2.0}, "z": 3.0},
        {"a/b/w": 1.0, "a/c": 2.0, "z": 3.0},
        {"a.b.w": 1.0, "a.c": 2.0, "z": 3.0},
        {"a": {"b.w": 1.0, "c": 2.0}, "z": 3.0},
        {"a.b": {"w": 1.0}, "a": {"c": 2.0}, "z": 3.0},
    ],
)
def test_flattened_names_fit_however_the_program_nests_them(tmp_path, sep, target):
    names = {sep.join(["a", "b", "w"]): 1.0, sep.join(["a", "c"]): 2.0, "z": 3.0}
    path = npz(tmp_path, **{name: np.float64(x) for name, x in names.items()})
    assert ckpt.restore(path, jax.tree.map(lambda x: 0.0, target)) == target


def test_names_that_could_mean_several_values_are_reported(tmp_path):
    one = npz(tmp_path, **{"a.b/w": W, "z": W})
    target = {"a": {"b": {"w": W * 0}}, "a/b": {"w": W * 0}, "z": W * 0}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"a.b/w: ambiguous: the file has"):
        ckpt.restore(one, target, strict=False)
    two = npz(tmp_path, **{"a.b/w": W, "a/b/w": W + 1})
    found = ckpt.restore(two, {"a": {"b": {"w": W * 0}}, "a.b": {"w": W * 0}})
    np.testing.assert_array_equal(found["a.b"]["w"], W)
    np.testing.assert_array_equal(found["a"]["b"]["w"], W + 1)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn"])
def test_the_dtype_of_the_target_says_what_anonymous_bytes_are(tmp_path, name):
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, name)))
    path = npz(tmp_path, x=array, s=array[1, 1])
    blank = np.zeros((2, 3), array.dtype)
    for target in (blank, jnp.asarray(blank), jax.ShapeDtypeStruct(blank.shape, blank.dtype)):
        found = ckpt.restore(path, {"x": target, "s": array.dtype.type(0)})
        assert found["x"].dtype == array.dtype
        assert np.asarray(found["x"]).tolist() == array.tolist()
        assert found["s"] == array[1, 1]
    with pytest.raises(ckpt.RestoreMismatchError, match="x: expected"):
        ckpt.restore(path, {"x": np.zeros((2, 3), np.float32), "s": array.dtype.type(0)})
