"""Loading without a target: what is selected, what is read, and what classes it comes back as."""

import collections
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import save_unreadable
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pytrees import assert_exactly

import ckpt_jax as ckpt


@pytest.fixture
def train_state(tmp_path):
    """(path, tree): parameters of 4 MB and an optimizer state of 8 MB."""
    w = np.random.default_rng(1).normal(size=(1024, 1024)).astype(np.float32)
    tree = {
        "params": {"dense": {"kernel": w, "bias": w[0]}},
        "opt_state": [(w + 1, w + 2), None, {}],
        "step": 9,
    }
    return ckpt.save(tmp_path / "a", tree), tree


def test_only_reads_nothing_else(train_state):
    path, tree = train_state
    assert_exactly(ckpt.load(path, only="params/**"), {"params": tree["params"]})
    for file in sorted(Path(path).glob("shards/*/c/*"), key=lambda file: -file.stat().st_size):
        assert file.stat().st_size  # what only= reads can be told from what it leaves
    assert ckpt.load(path, only="step") == {"step": 9}
    assert_exactly(
        ckpt.load(path, only=["step", "**/bias"]),
        {"params": {"dense": {"bias": tree["params"]["dense"]["bias"]}}, "step": 9},
    )
    assert_exactly(
        ckpt.load(path, only=lambda name: name.endswith("0/1")),
        {"opt_state": {0: {1: tree["opt_state"][0][1]}}},
    )
    assert ckpt.load(path, only=re.compile("st.p")) == {"step": 9}


def test_reading_one_value_costs_its_bytes(train_state):
    path, tree = train_state
    with ckpt.load_checkpoint(path) as reader:
        graph = reader.object_graph
        assert reader.get_variable_to_shape_map()
        assert reader.bytes_read == 0
        key = "params/dense/kernel/.ATTRIBUTES/VARIABLE_VALUE"
        assert key in graph.by_key
        assert_exactly(reader.get_tensor(key), tree["params"]["dense"]["kernel"])
        nbytes = tree["params"]["dense"]["kernel"].nbytes
        assert nbytes <= reader.bytes_read < 1.1 * nbytes


def test_only_that_selects_nothing_raises(train_state):
    path, _ = train_state
    with pytest.raises(KeyError, match=r"prams.*It has opt_state, params, step"):
        ckpt.load(path, only="prams/**")


def test_sharding_places_what_is_loaded(tmp_path, mesh42):
    tree = {"w": np.arange(16.0, dtype=np.float32).reshape(8, 2), "b": np.ones(4), "step": 3}
    path = ckpt.save(tmp_path / "a", tree)
    replicated = NamedSharding(mesh42, PartitionSpec())
    rows = NamedSharding(mesh42, PartitionSpec("data"))
    found = ckpt.load(path, only=["w", "step"], sharding=rows)
    assert found["w"].sharding == rows
    assert_exactly(np.asarray(found["w"]), tree["w"])
    assert_exactly(found["step"], 3)
    asked = {}

    def choose(name, struct):
        asked[name] = struct.shape, struct.dtype
        return {"w": rows}.get(name)

    found = ckpt.load(path, sharding=choose)
    assert asked == {"w": ((8, 2), np.float32), "b": ((4,), np.float64)}
    assert found["w"].sharding == rows
    assert_exactly(found["b"], tree["b"])
    assert ckpt.load(path, only="w", sharding=replicated)["w"].sharding == replicated


def test_a_sharding_that_does_not_divide_is_reported_with_the_path(tmp_path, mesh8: Mesh):
    path = save_unreadable(tmp_path / "a", {"layers": [np.ones(12, np.float32)]})
    rows = NamedSharding(mesh8, PartitionSpec("data"))
    with pytest.raises(ckpt.RestoreMismatchError, match="layers/0"):
        ckpt.load(path, sharding=rows)


@pytest.mark.parametrize(
    "only, hint",
    [
        ("params", r"say 'params/\*\*'"),
        (["params/", "nothing"], r"say 'params/\*\*'"),
        ("params/kernl", "nearest: params/kernel"),
    ],
)
def test_a_selection_of_nothing_says_what_may_have_been_meant(tmp_path: Path, only: Any, hint: str):
    path = ckpt.save(tmp_path / "a", {"params": {"kernel": jnp.ones(2)}})
    with pytest.raises(KeyError, match=hint):
        ckpt.load(path, only=only)


@pytest.mark.parametrize("only", [3, [3], ["params/**", None]])
def test_a_selection_that_is_no_pattern_is_refused(tmp_path: Path, only: Any):
    path = ckpt.save(tmp_path / "a", {"params": {"kernel": jnp.ones(2)}})
    with pytest.raises(TypeError, match="only= is a pattern"):
        ckpt.load(path, only=only)


def test_a_selection_finds_what_is_shared_at_each_of_its_places_and_nothing_else(tmp_path: Path):
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    state = {"ema": params, "params": params, "tied": [params["dense"]["bias"], jnp.ones(1)]}
    path = ckpt.save(tmp_path / "a", state)
    for name in ("ema", "params"):
        found = ckpt.load(path, only=f"{name}/**")
        assert jax.tree.map(np.shape, found) == {name: {"dense": {"kernel": (2, 3), "bias": (3,)}}}
    assert jax.tree.map(np.shape, ckpt.load(path, only="tied/0")) == {"tied": {0: (3,)}}
    assert list(ckpt.load(path, only=["ema/**/bias", "params/**/bias"])) == ["ema", "params"]


def test_a_selection_finds_the_slots_of_an_optimizer_beside_what_is_shared(tmp_path: Path):
    params = {"w": jnp.ones(2)}
    opt_state = optax.adam(0.1).init(params)
    checkpoint = ckpt.Checkpoint(
        ema=params, params=params, opt=ckpt.optax_state(opt_state, params), n=3
    )
    path = checkpoint.save(tmp_path / "ckpt")
    (mu,) = ckpt.load(path, only="opt/ScaleByAdamState.mu/**").values()
    assert [leaf.tolist() for leaf in jax.tree.leaves(mu)] == [[0, 0]]
    assert jax.tree.map(np.shape, ckpt.load(path, only="params/**")) == {"params": {"w": (2,)}}


def test_a_selection_ends_where_objects_refer_to_each_other(tmp_path: Path):
    parent, child = ckpt.AutoTrackable(), ckpt.AutoTrackable()
    parent.child, child.parent = child, parent
    child.w = ckpt.Variable(jnp.ones(2))
    parent.again = child
    path = ckpt.Checkpoint(parent).write(tmp_path / "a")
    for name in ("child", "again"):
        (found,) = ckpt.load(path, only=f"{name}/w").values()
        assert found["w"].tolist() == [1, 1]


def test_one_element_of_a_tuple_is_loaded(tmp_path):
    path = ckpt.save(tmp_path / "a", (1, None, {}))
    assert ckpt.load(path, only="0") in ({0: 1}, (1,))


def test_an_element_inside_a_list_is_loaded_by_its_positions(tmp_path):
    path = ckpt.save(tmp_path / "a", [np.arange(3), [1, 2]])
    assert ckpt.load(path, only="1/1") == {1: {1: 2}}


Sides = collections.namedtuple("Sides", "left right")


@flax.struct.dataclass
class Settings:
    rate: float
    sizes: tuple


def test_a_checkpoint_loads_where_its_classes_do_not_exist(tmp_path):
    tree = {
        "pair": Sides(np.arange(3), [None, "text"]),
        "settings": Settings(0.5, (1, 2)),
        "model": nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
    }
    path = ckpt.save(tmp_path / "a", tree)
    program = f"""
        import sys
        import numpy as np
        import ckpt_jax as ckpt

        found = ckpt.load({path!r})
        assert found["pair"]["left"].tolist() == [0, 1, 2], found
        assert found["pair"]["right"] == [None, "text"], found
        assert found["settings"] == {{"rate": 0.5, "sizes": (1, 2)}}, found
        assert found["model"]["kernel"].shape == (1, 1), found
        assert "flax" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
