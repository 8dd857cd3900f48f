"""Several real processes, each with several virtual devices, on one directory."""

import os
from pathlib import Path

import pytest
from processes import outputs_of
from trees import LAYOUTS, differences, placed_tree

import ckpt_jax as ckpt

SAVE = """
import ckpt_jax as ckpt
from trees import LAYOUTS, placed_tree
directory, layout = arguments
path = ckpt.save(f"{directory}/saved", placed_tree(*LAYOUTS[layout]))
state = ckpt.Checkpoint(state=placed_tree(*LAYOUTS[layout]), note="one")
print(os.path.basename(state.save(f"{directory}/ckpt")), state.save_counter)
print(ckpt.latest_checkpoint(directory) == f"{directory}/ckpt-1")
"""

RESTORE = """
import ckpt_jax as ckpt
from trees import LAYOUTS, differences, placed_tree
directory, *layouts = arguments
for layout in layouts:
    target = placed_tree(*LAYOUTS[layout], abstract=True)
    print(layout, differences(ckpt.restore(f"{directory}/saved", target), *LAYOUTS[layout]))
    state = ckpt.Checkpoint(state=placed_tree(*LAYOUTS[layout], abstract=True), note="")
    state.restore(f"{directory}/ckpt-1").assert_consumed()
    print(state.note, differences(state.state, *LAYOUTS[layout]))
"""


def assert_all_restore(directory, count, devices, *layouts):
    expected = "".join(f"{layout} []\none []\n" for layout in layouts)
    for output in outputs_of(RESTORE, count, devices, directory, *layouts):
        assert output.endswith(expected), output


def shards_of(path):
    """Bytes of data files by the process that wrote them."""
    sizes = {}
    for shard in Path(path, "shards").iterdir():
        process = int(shard.name.partition("-")[0])
        nbytes = sum(file.stat().st_size for file in Path(shard, "d").iterdir())
        sizes[process] = sizes.get(process, 0) + nbytes
    return sizes


def test_what_two_processes_save_is_restored_by_two_and_by_one(tmp_path):
    for output in outputs_of(SAVE, 2, 4, tmp_path, "4x2"):
        assert "ckpt-1 1\nTrue\n" in output
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "ckpt-1", "saved"]
    assert ckpt.verify(tmp_path / "saved").ok
    one, other = shards_of(tmp_path / "saved").values()
    assert max(one, other) < 1.3 * min(one, other)
    assert_all_restore(tmp_path, 2, 4, "2x4", "8")
    for layout in LAYOUTS.values():
        target = placed_tree(*layout, abstract=True)
        assert differences(ckpt.restore(tmp_path / "saved", target), *layout) == []


def test_what_one_process_saved_is_restored_by_two(tmp_path):
    tree = placed_tree(*LAYOUTS["8"])
    ckpt.save(tmp_path / "saved", tree)
    ckpt.Checkpoint(state=tree, note="one").save(tmp_path / "ckpt")
    assert_all_restore(tmp_path, 2, 4, "4x2")


@pytest.mark.slow
def test_what_four_processes_save_is_restored_by_any_number(tmp_path):
    outputs_of(SAVE, 4, 2, tmp_path, "2x4")
    assert sorted(shards_of(tmp_path / "saved")) == [0, 1, 2, 3]
    assert ckpt.verify(tmp_path / "saved").ok
    assert_all_restore(tmp_path, 4, 2, "4x2", "8", "2x4")
    assert_all_restore(tmp_path, 2, 4, "4x2")
    for layout in LAYOUTS.values():
        target = placed_tree(*layout, abstract=True)
        assert differences(ckpt.restore(tmp_path / "saved", target), *layout) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_what_fewer_processes_saved_is_restored_by_four(tmp_path, count):
    outputs_of(SAVE, count, 8 // count, tmp_path, "4x2")
    assert_all_restore(tmp_path, 4, 2, "2x4", "8")
