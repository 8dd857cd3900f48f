"""Sharding policies: the groups they make, and what is refused of a user's own."""

import itertools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import shape_of, tiling_problem


def planned(key, shape, box=None, itemsize=4, process=0, device=0):
    """A slice of an array of 4-byte elements; all of it by default."""
    box = box or tuple((0, n) for n in shape)
    nbytes = math.prod(shape_of(box)) * itemsize
    return ckpt.PlannedSlice(key, box, shape, "float32", nbytes, process, device)


def boxes(groups):
    """Key and box of every slice, by group."""
    return [[(piece.key, piece.box) for piece in group] for group in groups]


def data_files(path):
    return list(Path(path).glob("shards/*/c/*"))


# --- the two that group without cutting ------------------------------------------------


@pytest.mark.behaviour(179)
def test_by_device_and_by_process():
    slices = [planned("a", (2,), device=d) for d in (3, 1, 3)] + [planned("b", (), device=1)]
    by_device = ckpt.ShardByDevice()(slices)
    assert [[piece.device for piece in group] for group in by_device] == [[3, 3], [1, 1]]
    assert ckpt.ShardByProcess()(slices) == [slices]
    assert list(ckpt.ShardByDevice()([])) == list(ckpt.ShardByProcess()([])) == []


@pytest.mark.behaviour(178)
def test_policies_are_values():
    assert ckpt.MaxShardSize(3) == ckpt.MaxShardSize(3) != ckpt.MaxShardSize(4)
    assert hash(ckpt.MaxShardSize(3)) == hash(ckpt.MaxShardSize(3))
    assert hash(ckpt.ShardByDevice()) == hash(ckpt.ShardByDevice())
    assert ckpt.ShardByDevice() != ckpt.ShardByProcess()


@pytest.mark.parametrize(
    ("policy", "shards"), [(ckpt.ShardByDevice(), 8), (ckpt.ShardByProcess(), 1)]
)
@pytest.mark.behaviour(158)
def test_a_sharded_array_is_written_in_shards_of_the_policy(tmp_path, mesh8, policy, shards):
    array = jax.device_put(np.arange(16.0), NamedSharding(mesh8, P("data")))
    options = ckpt.CheckpointOptions(sharding_policy=policy)
    path = ckpt.save(tmp_path / "a", {"x": array, "step": 3}, options=options)
    assert len(os.listdir(os.path.join(path, "shards"))) == shards
    restored = ckpt.load(path)
    assert restored["x"].tolist() == list(range(16))
    assert restored["step"] == 3


# --- MaxShardSize: the reference's numbers ----------------------------------------------

V0, V1 = planned("v0", (4,)), planned("v1", (4, 1))
ROW = (0, 1)


def parts_of_1d(*cuts):
    """The groups of v0 and then v1, each cut at the same places."""
    bounds = list(itertools.pairwise(cuts))
    return [[("v0", (b,))] for b in bounds] + [[("v1", (b, ROW))] for b in bounds]


@pytest.mark.parametrize(
    ("nbytes", "cuts"),
    [
        (4, (0, 1, 2, 3, 4)),
        (8, (0, 2, 4)),
        (10, (0, 2, 4)),
        (16, (0, 4)),
        (18, (0, 4)),
    ],
)
@pytest.mark.behaviour(162, 163, 164, 165, 166, 167)
def test_vectors_of_16_bytes_are_cut_into_rows_that_fit(nbytes, cuts):
    assert boxes(ckpt.MaxShardSize(nbytes)([V0, V1])) == parts_of_1d(*cuts)


M0, M1 = planned("v0", (3, 2)), planned("v1", (3, 2, 1))


@pytest.mark.parametrize("nbytes", [8, 10])
@pytest.mark.behaviour(168, 169)
def test_matrices_are_cut_along_the_rows(nbytes):
    rows = [((i, i + 1), (0, 2)) for i in range(3)]
    assert boxes(ckpt.MaxShardSize(nbytes)([M0, M1])) == [[("v0", box)] for box in rows] + [
        [("v1", (*box, ROW))] for box in rows
    ]


@pytest.mark.behaviour(170)
def test_matrices_are_cut_along_the_axis_with_the_fewest_parts():
    columns = [((0, 3), (0, 1)), ((0, 3), (1, 2))]
    assert boxes(ckpt.MaxShardSize(12)([M0, M1])) == [[("v0", box)] for box in columns] + [
        [("v1", (*box, ROW))] for box in columns
    ]


@pytest.mark.behaviour(171)
def test_a_shard_may_hold_the_end_of_one_array_and_the_start_of_the_next():
    assert boxes(ckpt.MaxShardSize(16)([M0, M1])) == [
        [("v0", ((0, 2), (0, 2)))],
        [("v0", ((2, 3), (0, 2))), ("v1", ((0, 1), (0, 2), ROW))],
        [("v1", ((1, 3), (0, 2), ROW))],
    ]


@pytest.mark.behaviour(175, 176)
def test_a_part_of_an_array_is_cut_with_boxes_of_the_whole():
    part = planned("v0", (2, 5), ((0, 2), (1, 4)))
    # A column fits; of the two columns that are left, a row does.
    assert boxes(ckpt.MaxShardSize(8)([part])) == [
        [("v0", ((0, 2), (1, 2)))],
        [("v0", ((0, 1), (2, 4)))],
        [("v0", ((1, 2), (2, 4)))],
    ]
    rows = [[("v0", ((i, i + 1), (1, 4)))] for i in range(2)]
    assert boxes(ckpt.MaxShardSize(12)([part])) == rows
    inner = planned("v0", (9, 9), ((4, 6), (5, 8)))
    assert boxes(ckpt.MaxShardSize(12)([inner])) == [
        [("v0", ((4, 5), (5, 8)))],
        [("v0", ((5, 6), (5, 8)))],
    ]


@pytest.mark.behaviour(173)
def test_a_scalar_larger_than_the_limit_is_a_shard_of_its_own():
    scalar = planned("s", (), itemsize=8)
    small = planned("a", (1,))
    assert boxes(ckpt.MaxShardSize(4)([scalar, small])) == [[("s", ())], [("a", (ROW,))]]
    assert boxes(ckpt.MaxShardSize(4)([small, scalar, small])) == [
        [("a", (ROW,))],
        [("s", ())],
        [("a", (ROW,))],
    ]


def test_a_limit_below_one_element_ends_with_a_shard_for_each():
    assert len(ckpt.MaxShardSize(1)([V0, M0])) == 4 + 6


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_limit_is_at_least_one_byte(nbytes):
    with pytest.raises(ValueError, match="at least 1 byte"):
        ckpt.MaxShardSize(nbytes)


@pytest.mark.behaviour(174)
def test_a_limit_makes_as_many_data_files_as_shards_and_everything_comes_back(tmp_path):
    tree = {
        "v0": jnp.arange(6.0).reshape(3, 2),
        "v1": jnp.arange(6.0).reshape(3, 2, 1),
        "v2": jnp.float32(7),
        "v3": jnp.float32(8),
    }
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = ckpt.save(tmp_path / "a", tree, options=options)
    # The two scalars share the last shard: 8 bytes of 10.
    assert len(os.listdir(os.path.join(path, "shards"))) == len(data_files(path)) == 3 + 3 + 1
    restored = ckpt.restore(path, jax.tree.map(jnp.zeros_like, tree))
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_string_larger_than_the_limit_is_written_whole(tmp_path):
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(8))
    tree = {"name": "0123456789", "bytes": b"", "step": 3}
    assert ckpt.load(ckpt.save(tmp_path / "a", tree, options=options)) == tree


@pytest.mark.parametrize("nbytes", [1, 8, 1 << 20])
def test_arrays_without_elements_are_kept(tmp_path, nbytes):
    tree = {"a": np.zeros((0,)), "b": np.arange(3.0), "c": np.zeros((3, 0, 2), np.int32)}
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(nbytes))
    restored = ckpt.restore(ckpt.save(tmp_path / "a", tree, options=options), tree)
    assert restored["a"].shape == (0,)
    assert restored["b"].tolist() == [0, 1, 2]
    assert restored["c"].shape == (3, 0, 2)


# --- MaxShardSize: the laws ---------------------------------------------------------------


@st.composite
def plans(draw):
    """Slices to write: of each array one box, or the two that a cut leaves."""
    found = []
    for number in range(draw(st.integers(0, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        itemsize = draw(st.sampled_from([1, 4, 16]))
        parts = [tuple((0, n) for n in shape)]
        if shape and shape[0] > 1 and draw(st.booleans()):
            at = draw(st.integers(1, shape[0] - 1))
            parts = [((0, at), *parts[0][1:]), ((at, shape[0]), *parts[0][1:])]
        found += [planned(f"v{number}", shape, box, itemsize) for box in parts]
    return found


@given(plans(), st.integers(1, 200))
def test_any_limit_ends_in_groups_that_hold_every_element_once(slices, limit):
    groups = ckpt.MaxShardSize(limit)(slices)
    assert all(groups)
    pieces = [piece for group in groups for piece in group]
    assert {piece.key for piece in pieces} == {piece.key for piece in slices}
    for key, shape in {piece.key: piece.shape for piece in slices}.items():
        assert tiling_problem([piece.box for piece in pieces if piece.key == key], shape) is None
    itemsize = {
        piece.key: piece.nbytes // math.prod(shape_of(piece.box))
        for piece in slices
        if piece.nbytes
    }
    for group in groups:
        total = sum(piece.nbytes for piece in group)
        assert total == sum(
            math.prod(shape_of(piece.box)) * itemsize.get(piece.key, 0) for piece in group
        )
        full = [piece for piece in group if piece.nbytes]
        assert total <= limit or (len(full) == 1 and math.prod(shape_of(full[0].box)) == 1)


@given(plans(), st.integers(1, 200))
def test_a_cut_of_slices_keeps_what_they_are(slices, limit):
    kinds = {(piece.key, piece.shape, piece.dtype, piece.process, piece.device) for piece in slices}
    for group in ckpt.MaxShardSize(limit)(slices):
        for piece in group:
            assert (piece.key, piece.shape, piece.dtype, piece.process, piece.device) in kinds


# --- policies of one's own ----------------------------------------------------------------


def save(directory, policy):
    tree = {"x": np.arange(6.0).reshape(3, 2), "y": np.ones(4, np.float32), "name": "text"}
    options = ckpt.CheckpointOptions(sharding_policy=policy)
    return ckpt.save(directory / "a", tree, options=options)


def halves(slices):
    """Each slice with rows in two parts, a shard for each."""
    groups = []
    for piece in slices:
        if not piece.box or piece.nbytes == 0:
            groups.append([piece])
            continue
        (start, stop), *rest = piece.box
        middle = (start + stop) // 2
        groups += [
            [piece._replace(box=(rows, *rest))] for rows in ((start, middle), (middle, stop))
        ]
    return groups


@pytest.mark.parametrize(
    "policy",
    [
        lambda slices: [[piece] for piece in slices],
        lambda slices: [list(reversed(slices)), []],
        lambda slices: ([piece] for piece in slices),
        lambda slices: (iter([piece]) for piece in slices),
        lambda slices: tuple((piece,) for piece in slices),
        halves,
    ],
)
def test_a_policy_that_keeps_every_value_is_followed(tmp_path, policy):
    found = ckpt.load(save(tmp_path, policy))
    assert found["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found["y"].tolist() == [1, 1, 1, 1]
    assert found["name"] == "text"


def changed(key, **fields):
    """A policy that alters the slices of one key."""
    return lambda slices: [
        [piece._replace(**fields) if piece.key.startswith(key) else piece for piece in slices]
    ]


REFUSED = {
    "dropped": lambda slices: [slices[:-1]],
    "all dropped": lambda slices: [],
    "repeated": lambda slices: [slices, slices[:1]],
    "repeated in one shard": lambda slices: [[*slices, slices[0]]],
    "a string repeated": lambda slices: [slices, [p for p in slices if p.dtype == "bytes"]],
    "added": lambda slices: [[*slices, slices[0]._replace(key="new")]],
    "shape": changed("x", shape=(3, 3)),
    "dtype": changed("y", dtype="float64"),
    "process": changed("y", process=1),
    "box outside": changed("x", box=((0, 4), (0, 2))),
    "box of another rank": changed("x", box=((0, 6),)),
    "box of negative length": changed("x", box=((3, 0), (0, 2))),
    "a part dropped": changed("x", box=((0, 2), (0, 2))),
    "parts that overlap": lambda slices: [
        *([p] for p in slices if p.key[0] != "x"),
        *(
            [p._replace(box=(rows, (0, 2)))]
            for p in slices
            if p.key[0] == "x"
            for rows in ((0, 2), (1, 3))
        ),
    ],
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_policy_that_does_not_keep_the_values_is_refused_before_anything_is_written(
    tmp_path, how
):
    with pytest.raises(ckpt.ShardError, match="the sharding policy did not keep the values") as e:
        save(tmp_path, REFUSED[how])
    assert "nothing written" in str(e.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("dropped", "was dropped"),
        ("repeated", "overlap"),
        ("added", "new: added"),
        ("shape", "changed its shape"),
        ("dtype", "changed its dtype"),
        ("process", "shard 0 mixes processes [0, 1]"),
        ("a part dropped", "hole"),
    ],
)
@pytest.mark.behaviour(180, 181, 182, 183, 184, 185, 186)
def test_the_refusal_says_what_happened_to_which_key(tmp_path, how, what):
    with pytest.raises(ckpt.ShardError) as caught:
        save(tmp_path, REFUSED[how])
    assert what in str(caught.value)


def test_all_that_a_policy_did_is_listed_at_once(tmp_path):
    def policy(slices):
        one, _, three = slices
        return [[one._replace(dtype="int8"), one], [three]]

    with pytest.raises(ckpt.ShardError) as caught:
        save(tmp_path, policy)
    for what in ("changed its dtype", "overlap", "was dropped"):
        assert what in str(caught.value)


def test_a_policy_that_fails_leaves_nothing(tmp_path):
    def policy(slices):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(tmp_path, policy)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("policy", [None, 3, "by device"])
def test_a_policy_can_be_called(policy):
    with pytest.raises(ValueError, match="sharding_policy must be callable"):
        ckpt.CheckpointOptions(sharding_policy=policy)


@pytest.mark.parametrize("result", [None, 3, [None], [[3]]])
def test_a_policy_that_returns_no_groups_of_slices_is_refused(tmp_path, result):
    with pytest.raises(ckpt.ShardError, match="groups of slices"):
        save(tmp_path, lambda slices: result)
    assert os.listdir(tmp_path) == []


# --- shards on disk ---------------------------------------------------------------------


def shards(path):
    return sorted(os.listdir(os.path.join(path, "shards")))


@pytest.mark.behaviour(154)
def test_one_value_makes_one_shard_in_a_directory(tmp_path):
    checkpoint = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(3)))
    path = checkpoint.write(tmp_path / "written")
    assert sorted(os.listdir(path)) == ["manifest.ckpt", "meta", "shards"]
    assert len(shards(path)) == 1
    checkpoint.v.assign(jnp.float32(0))
    other = ckpt.Checkpoint(v=ckpt.Variable(jnp.float32(1)))
    for each in (checkpoint, other):
        each.read(path).assert_consumed()
        assert float(each.v.value) == 3.0


@pytest.mark.behaviour(158, 179)
def test_arrays_on_several_devices_share_a_shard_where_the_policy_is_by_process(tmp_path):
    trees = {f"v{i}": jax.device_put(jnp.float32(i), jax.devices()[i]) for i in range(3)}
    by_device = ckpt.Checkpoint(**trees).write(tmp_path / "device")
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.ShardByProcess())
    by_process = ckpt.Checkpoint(**trees).write(tmp_path / "process", options)
    assert (len(shards(by_device)), len(shards(by_process))) == (3, 1)
    for path in (by_device, by_process):
        fresh = ckpt.Checkpoint(**{name: jnp.zeros_like(x) for name, x in trees.items()})
        fresh.read(path).assert_consumed()
        assert [float(fresh.v0), float(fresh.v1), float(fresh.v2)] == [0.0, 1.0, 2.0]


@pytest.mark.behaviour(163, 174)
def test_a_limit_of_ten_bytes_cuts_two_matrices_and_leaves_a_string_alone(tmp_path):
    checkpoint = ckpt.Checkpoint(
        v0=jnp.arange(6).reshape(3, 2), v1=jnp.arange(6.0).reshape(3, 2, 1), v2="test string"
    )
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = checkpoint.write(tmp_path / "written", options)
    assert len(shards(path)) == 3 + 3 + 1
    fresh = ckpt.Checkpoint(v0=jnp.zeros((3, 2), jnp.int32), v1=jnp.zeros((3, 2, 1)), v2="nothing")
    fresh.read(path).assert_consumed()
    np.testing.assert_array_equal(fresh.v0, checkpoint.v0)
    np.testing.assert_array_equal(fresh.v1, checkpoint.v1)
    assert fresh.v2 == "test string"


@pytest.mark.behaviour(172)
def test_strings_are_values_of_their_own_and_none_shares_a_full_shard(tmp_path):
    strings = [f"string {i:03}" for i in range(4)]
    options = ckpt.CheckpointOptions(sharding_policy=ckpt.MaxShardSize(10))
    path = ckpt.save(tmp_path / "a", {"v0": strings}, options=options)
    assert len(shards(path)) == 4
    assert ckpt.load(path) == {"v0": strings}
    with pytest.raises(ckpt.UnsaveableError, match="v0"):
        ckpt.save(tmp_path / "b", {"v0": np.array(strings)}, options=options)


@pytest.mark.behaviour(184)
def test_a_policy_may_not_give_slices_to_another_process(tmp_path):
    def elsewhere(slices):
        return [[piece._replace(process=1) for piece in slices]]

    options = ckpt.CheckpointOptions(sharding_policy=elsewhere)
    with pytest.raises(ckpt.ShardError, match="process"):
        ckpt.save(tmp_path / "a", {"x": np.ones(3), "y": np.ones(2)}, options=options)
    assert os.listdir(tmp_path) == []
