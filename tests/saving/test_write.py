"""Shards: a device's slices are divided among the writers, and contents that arrive are awaited."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import shape_of, size_of, tiling_problem, whole
from ckpt_jax.options import PlannedSlice
from ckpt_jax.saving import write
from ckpt_jax.saving.snapshot import snapshot


def slice_of(key, shape, device=0):
    box = whole(shape)
    return PlannedSlice(key, box, shape, "uint8", size_of(box), 0, device)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(write, "_LEAST_NBYTES", 16)


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=12)


@given(shapes=st.lists(SHAPES, min_size=1, max_size=3), count=st.integers(1, 9))
def test_divided_groups_hold_each_element_once_and_never_mix_devices(shapes, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_LEAST_NBYTES", 16)
        groups = [
            [slice_of(f"{device}/{i}", shape, device) for i, shape in enumerate(each)]
            for device, each in enumerate(shapes)
        ]
        found = write.divided(groups, count)
    assert all(len({piece.device for piece in group}) == 1 for group in found)
    boxes = {}
    for piece in (piece for group in found for piece in group):
        assert piece.nbytes == size_of(piece.box)
        boxes.setdefault(piece.key, []).append(piece.box)
    for piece in (piece for group in groups for piece in group):
        assert tiling_problem(boxes[piece.key], shape_of(piece.box)) is None


def test_one_device_with_much_gets_as_many_shards_as_there_are_cores(tiny):
    group = [slice_of(f"{i}", (8, 8)) for i in range(16)]
    found = write.divided([group], 4)
    assert [sum(piece.nbytes for piece in part) for part in found] == [256] * 4


def test_a_slice_larger_than_its_part_is_cut_into_rows(tiny):
    found = write.divided([[slice_of("a", (1, 12, 8))]], 4)
    assert [part[0].box for part in found] == [
        ((0, 1), (0, 3), (0, 8)),
        ((0, 1), (3, 6), (0, 8)),
        ((0, 1), (6, 9), (0, 8)),
        ((0, 1), (9, 12), (0, 8)),
    ]


def test_little_is_not_divided():
    group = [slice_of("a", (8, 8))]
    assert write.divided([group, group], 16) == [group, group]


@pytest.mark.parametrize("in_background", [False, True])
def test_values_that_were_divided_come_back(tmp_path, tiny, monkeypatch, in_background):
    monkeypatch.setattr(write, "cores", lambda: 5)
    tree = {f"{i}": jnp.arange(i * 7, dtype=jnp.int32).reshape(i, 7) for i in range(1, 9)}
    checkpoint = ckpt.Checkpoint(tree=tree)
    options = ckpt.CheckpointOptions(enable_async=in_background)
    path = checkpoint.write(tmp_path / "a", options)
    checkpoint.sync()
    assert len(list((tmp_path / "a" / "shards").iterdir())) > 3
    for key, array in ckpt.load(path)["tree"].items():
        np.testing.assert_array_equal(array, tree[key])


def test_a_snapshot_for_the_background_is_a_copy_of_numpy_arrays():
    array = np.zeros(3)
    for in_background in (False, True):
        taken = snapshot({"a": array}, in_background=in_background, process=0, count=1)
        assert np.shares_memory(taken.contents["a", ((0, 3),)], array) != in_background
