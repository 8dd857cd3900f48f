"""Several real processes, each with several virtual devices, on one directory."""

import os
import re
import signal
from pathlib import Path

import pytest
from real_processes import outputs_of, running
from trees import LAYOUTS, differences, placed_tree

import ckpt_jax as ckpt
from ckpt_jax.store import stream
from ckpt_jax.store.fetch import read_index

SAVE = """
import ckpt_jax as ckpt
from trees import LAYOUTS, placed_tree
directory, layout = arguments
path = ckpt.save(f"{directory}/saved", placed_tree(*LAYOUTS[layout]))
options = ckpt.CheckpointOptions(sharding_policy=ckpt.ShardByProcess())
ckpt.save(f"{directory}/by-process", placed_tree(*LAYOUTS[layout]), options=options)
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
        nbytes = sum(file.stat().st_size for file in Path(shard).glob("c/*"))
        sizes[process] = sizes.get(process, 0) + nbytes
    return sizes


@pytest.mark.behaviour(157, 160, 161)
def test_what_two_processes_save_is_restored_by_two_and_by_one(tmp_path):
    for output in outputs_of(SAVE, 2, 4, tmp_path, "4x2"):
        assert "ckpt-1 1\nTrue\n" in output
    assert sorted(os.listdir(tmp_path)) == ["by-process", "checkpoint", "ckpt-1", "saved"]
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


SAVER = """
import numpy as np
import ckpt_jax as ckpt
from trees import LAYOUTS, contents, placed_tree

class Table:
    rows = None

def save_fn(tables, prefix):
    values = {name: table.rows for name, table in tables.items()}
    if index == 0:
        values |= {f"{name}/names": np.arange(3) for name in tables}
    return ckpt.io.write_shard(prefix, values)

def restore_fn(tables, prefix):
    for name, table in tables.items():
        table.rows = ckpt.io.read_slices(prefix, {name: table.wanted})[name]

ckpt.register_view(Table, children=lambda table: {}, rebuild=lambda table, new: table)
ckpt.register_checkpoint_saver(
    name="Table",
    predicate=lambda obj: isinstance(obj, Table),
    save_fn=save_fn,
    restore_fn=restore_fn,
)
(directory,) = arguments
table, other = Table(), Table()
table.rows = placed_tree(*LAYOUTS["4x2"])["arrays"]["both"]
path = ckpt.save(f"{directory}/a", {"table": table})
other.wanted = placed_tree(*LAYOUTS["2x4"], abstract=True)["arrays"]["both"]
ckpt.restore(path, {"table": other})
data = contents()["both"]
print(all(np.array_equal(part.data, data[part.index]) for part in other.rows.addressable_shards))
"""


def test_a_registered_saver_writes_the_slices_of_each_process(tmp_path):
    assert outputs_of(SAVER, 2, 4, tmp_path) == ["True\n"] * 2
    assert sorted(os.listdir(tmp_path / "a" / "shards")) == [
        "00000-Custom.Table",
        "00001-Custom.Table",
    ]
    assert ckpt.load_variable(tmp_path / "a", "table/names").tolist() == [0, 1, 2]


PARTS_OF_THE_WORLD = """
import numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import ckpt_jax as ckpt

(directory,) = arguments
data = np.arange(48.0, dtype=np.float32).reshape(8, 6)

def on(devices):
    return NamedSharding(Mesh(np.array(devices), ("a",)), P("a"))

def placed(sharding):
    parts = [
        jax.device_put(data[box], device)
        for device, box in sharding.addressable_devices_indices_map(data.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(data.shape, sharding, parts, dtype=data.dtype)

def holds(array):
    return all(np.array_equal(part.data, data[part.index]) for part in array.addressable_shards)

of_0, of_1_and_2 = on(jax.devices()[:2]), on(jax.devices()[2:])
tree = {"first": placed(of_0), "others": placed(of_1_and_2), "own": jnp.full(3, float(index))}
path = ckpt.save(f"{directory}/a", tree)
target = {
    "first": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=of_1_and_2),
    "others": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=of_0),
    "own": jnp.zeros(3),
}
found = ckpt.restore(path, target)
print(holds(found["first"]), holds(found["others"]), found["own"])
print(len(found["first"].addressable_shards), len(found["others"].addressable_shards))
try:
    ckpt.save(f"{directory}/b", {"w": placed(on(jax.devices()[2:4]))})
except ckpt.UnsaveableError as error:
    print("unsaveable", error.problems)
except ckpt.ProcessError as error:
    print("other", error.processes)
"""


def test_arrays_may_lie_on_the_devices_of_some_processes(tmp_path):
    outputs = outputs_of(PARTS_OF_THE_WORLD, 3, 2, tmp_path)
    for index, output in enumerate(outputs):
        held, counts, refused = output.splitlines()
        assert held == "True True [0. 0. 0.]"
        assert counts == ("0 2" if index == 0 else "2 0")
        # Process 1 takes the array for its own; the others see that they cannot reach it.
        assert refused.startswith("other" if index == 1 else "unsaveable (('w', 'lies on"), output
    assert os.listdir(tmp_path) == ["a"]
    assert ckpt.load(tmp_path / "a")["first"].tolist() == [
        [6.0 * row + column for column in range(6)] for row in range(8)
    ]


RESTORE_ONCE = """
import ckpt_jax as ckpt
from trees import LAYOUTS, differences, placed_tree

directory, layout = arguments
target = placed_tree(*LAYOUTS[layout], abstract=True)
found, counts = [], []
for broadcast in (False, True):
    options = ckpt.CheckpointOptions(broadcast=broadcast, timeout_seconds=60)
    state = ckpt.restore(f"{directory}/saved", target, options=options)
    found += differences(state, *LAYOUTS[layout])
    counts.append(ckpt.metrics.last_restore().nbytes)
other = {"w": target["arrays"]["large" if index else "large2"]}
try:
    ckpt.restore(f"{directory}/w{index}", other, options=options)
except ckpt.ProcessError as error:
    # In one piece, because the library that connects the devices writes there, too.
    print(f"found {found} read {counts} refused {error.processes}")
"""


def test_with_broadcast_large_replicated_arrays_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_NBYTES", 64 << 10)  # an array has many blocks
    tree = placed_tree(*LAYOUTS["8"])
    ckpt.save(tmp_path / "saved", tree)
    ckpt.save(tmp_path / "w0", {"w": tree["arrays"]["large2"]})
    ckpt.save(tmp_path / "w1", {"w": tree["arrays"]["large"]})
    start, stop, chunk = place_of(tmp_path / "saved", "arrays/large")
    middle = (start + stop) // 2
    outputs = outputs_of(RESTORE_ONCE, 2, 4, tmp_path, "4x2")
    for output, unread in zip(outputs, [(middle, stop), (start, middle)], strict=True):
        said = re.search(r"found \[\] read \[(\d+), (\d+)\] refused \(1,\)", output)
        assert said, output
        without, with_broadcast = map(int, said.groups())
        # Chunks are read as a whole. Of the other large array only the columns can be parted.
        chunks = unread[1] // chunk - -(-unread[0] // chunk)
        assert chunks > 2
        assert without - with_broadcast == chunks * chunk


def place_of(path, name):
    """The range of a value in the stream that it is stored in, and the size of the chunks there."""
    index = read_index(str(path))
    ((key, shard, table),) = [
        (key, shard, index.tables[number])
        for shard, number in zip(index.shards, index.table, strict=True)
        for key in index.tables[number].keys
        if key.startswith(f"{name}/.ATTRIBUTES/")
    ]
    start = int(table.offset[table.first[table.keys.index(key)]])
    return start, start + index.nbytes(key), shard.block_nbytes


@pytest.mark.slow
@pytest.mark.behaviour(157, 160, 161)
def test_what_four_processes_save_is_restored_by_any_number(tmp_path):
    outputs_of(SAVE, 4, 2, tmp_path, "2x4")
    shards = sorted(os.listdir(tmp_path / "by-process" / "shards"))
    assert shards == [f"{process:05d}-00000" for process in range(4)]
    assert ckpt.verify(tmp_path / "by-process").ok
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


# A save in which one process is killed or stopped by its own hand, at a chosen call of the
# coordination service. The others say how it ended for them, and leave without a farewell, which
# would wait for the dead.
SAVE_AT_RISK = """
import signal
import numpy as np
import ckpt_jax as ckpt
from ckpt_jax.processes import current

directory, victim, point, code = arguments

def reached(place):
    if index == int(victim) and place == point:
        print("reached", flush=True)
        os.kill(os.getpid(), int(code))

class Watched(current.CoordinationService):
    def set(self, key, value, timeout_seconds):
        name = key.rpartition("/")[2] if "reports" not in key else "report"
        reached(f"before {name}")
        result = super().set(key, value, timeout_seconds)
        reached(f"after {name}")
        return result

    def get(self, key, timeout_seconds):
        result = super().get(key, timeout_seconds)
        if key.endswith("/outcome"):
            reached("after outcome")
        return result

current.CoordinationService = Watched
options = ckpt.CheckpointOptions(timeout_seconds=4)
tree = {"w": np.arange(1000.0), "own": ckpt.PerProcess(index)}
try:
    ckpt.save(f"{directory}/a", tree, options=options)
    print("saved", flush=True)
except (ckpt.BarrierTimeoutError, ckpt.ProcessError) as error:
    print("failed", type(error).__name__, error.processes, error, flush=True)
os._exit(0)
"""


def assert_all_or_nothing(directory, outputs):
    """Who says that it was saved is right, and what is there is whole."""
    if any("saved\n" in output for output in outputs):
        assert "a" in os.listdir(directory)
    if "a" in os.listdir(directory):
        assert ckpt.verify(directory / "a").ok
        assert ckpt.load(directory / "a")["w"].tolist() == list(range(1000))


def save_at_risk(directory, victim, point, code):
    """What two processes say of a save in which one is killed, or stopped for a while."""
    with running(SAVE_AT_RISK, 2, 1, directory, victim, point, int(code)) as run:
        run.wait_for_signal(victim, code)
        (survivor,) = {0, 1} - {victim}
        outputs = run.finish(survivor)
        if code == signal.SIGSTOP:
            run.started[victim].send_signal(signal.SIGCONT)
        outputs = run.finish(victim)
    assert "reached\n" in outputs[victim]
    assert_all_or_nothing(directory, outputs)
    return outputs[survivor]


SIGNALS = [signal.SIGKILL, signal.SIGSTOP]


@pytest.mark.parametrize(
    "code", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_process_lost_before_it_reports_is_named_and_nothing_is_saved(tmp_path, code):
    output = save_at_risk(tmp_path, 1, "before report", code)
    assert "failed BarrierTimeoutError (1,)" in output, output
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("code", SIGNALS)
@pytest.mark.parametrize("point", ["after report", "after outcome"])
def test_a_process_lost_after_it_reported_does_not_keep_the_others(tmp_path, point, code):
    output = save_at_risk(tmp_path, 1, point, code)
    assert "saved\n" in output, output
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("point", "code"),
    [
        ("after decision", signal.SIGKILL),
        *[
            pytest.param(point, code, marks=pytest.mark.slow)
            for point in ("before decision", "after decision", "before outcome")
            for code in SIGNALS
            if (point, code) != ("after decision", signal.SIGKILL)
        ],
    ],
)
def test_while_process_0_is_lost_nobody_believes_in_success(tmp_path, point, code):
    output = save_at_risk(tmp_path, 0, point, code)
    assert "saved\n" not in output, output
    if code == signal.SIGSTOP:
        assert "failed BarrierTimeoutError (0,)" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("code", SIGNALS)
def test_process_0_may_be_lost_when_all_have_heard(tmp_path, code):
    save_at_risk(tmp_path, 0, "after outcome", code)
    assert os.listdir(tmp_path) == ["a"]
