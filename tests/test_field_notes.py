"""What users of checkpoint libraries run into, and that it does not happen here.

Each section is one complaint of the field about what restoring does; the tests say what happens
instead.
"""

import collections
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.restoring.reader import CheckpointReader

RNG = np.random.default_rng(11)


def layer():
    return {"kernel": RNG.normal(size=(16, 8)).astype(np.float32), "bias": np.ones(8, np.float32)}


def layered(count):
    return {"layers": [layer() for _ in range(count)], "step": 3}


def spoil(path):
    """Inverts every byte of the values: whoever reads one of them fails."""
    for file in Path(path).glob("shards/*/d/*"):
        if file.is_file():
            file.write_bytes(bytes(b ^ 0x5A for b in file.read_bytes()))
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, tree
    )


def leaves_are_arrays(tree):
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


@pytest.fixture
def bytes_read(monkeypatch):
    """The bytes of values that each reader has read when it is closed."""
    counts = []
    close = CheckpointReader.close

    def counting(self):
        counts.append(self.bytes_read)
        close(self)

    monkeypatch.setattr(CheckpointReader, "close", counting)
    return counts


# --- a 12-layer checkpoint loads silently into a 16-layer model --------------------------


def test_twelve_layers_do_not_go_into_sixteen_and_every_missing_value_is_named(tmp_path):
    path = ckpt.save(tmp_path / "a", layered(12))
    spoil(path)
    target = layered(16)
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, target)
    missing = {entry.path for entry in failure.value.report.missing}
    assert missing == {f"layers/{i}/{name}" for i in range(12, 16) for name in ("kernel", "bias")}
    assert all(name in str(failure.value) for name in missing)


def test_sixteen_layers_do_not_go_into_twelve_either(tmp_path):
    path = ckpt.save(tmp_path / "a", layered(16))
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, layered(12))
    assert len(failure.value.report.unexpected) == 8


def test_the_shape_of_a_scanned_layer_is_not_ignored(tmp_path):
    path = ckpt.save(tmp_path / "a", {"layers": jnp.zeros((12, 16, 8)), "pad": np.zeros(1000)})
    spoil(path)
    target = {"layers": jnp.zeros((16, 16, 8)), "pad": np.zeros(1000)}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"shape \(16, 16, 8\), got \(12, 16, 8\)"):
        ckpt.restore(path, target)


def test_integers_keep_every_bit_and_are_cast_only_where_that_is_asked_for(tmp_path):
    count = np.array([2**24 + 1, -(2**31)], np.int32)  # float32 holds neither neighbour exactly
    path = ckpt.save(tmp_path / "a", {"count": jnp.array(count)})
    np.testing.assert_array_equal(ckpt.restore(path, {"count": jnp.zeros(2, int)})["count"], count)
    floats = {"count": jnp.zeros(2, jnp.float32)}
    with pytest.raises(ckpt.RestoreMismatchError, match="expected dtype float32, got int32"):
        ckpt.restore(path, floats)
    rules = [("count", "count", ckpt.Cast())]
    (entry,) = ckpt.plan_restore(path, floats, rename=rules).dtype_changes
    assert (entry.found, entry.expected) == ("int32[2]", "float32[2]")
    assert ckpt.restore(path, floats, rename=rules)["count"].dtype == jnp.float32


# --- cannot restore on fewer or more devices ----------------------------------------------


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


# --- cannot take params out of a TrainState -----------------------------------------------


@pytest.fixture
def train_state():
    params = {"dense": layer(), "head": layer()}
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_params_are_taken_out_of_a_train_state_and_only_their_bytes_are_read(tmp_path, bytes_read):
    params = {"w": RNG.normal(size=(512, 512)).astype(np.float32)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    path = ckpt.save(tmp_path / "a", state)
    for take in (
        lambda: ckpt.load(path, only="params/**")["params"],
        lambda: ckpt.load(path, only=["params/w"])["params"],
        lambda: ckpt.load(path, only=lambda name: name.startswith("params/"))["params"],
        lambda: ckpt.restore(path, {"params": abstract(params)}, strict=False)["params"],
    ):
        equal(take(), params)
        assert nbytes(params) <= bytes_read[-1] < 1.1 * nbytes(params)
    report = ckpt.plan_restore(path, {"params": abstract(params)})
    assert report.nbytes == nbytes(params) < nbytes(state.opt_state)


def test_a_part_of_the_tree_is_refused_where_nothing_says_that_it_is_meant(tmp_path, train_state):
    path = ckpt.save(tmp_path / "a", train_state)
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, {"params": train_state.params})
    unexpected = {entry.path for entry in failure.value.report.unexpected}
    assert (
        "step" in unexpected and "opt_state/ScaleByAdamState.mu/params/dense/kernel" in unexpected
    )


def test_params_become_the_root_by_a_rename_rule(tmp_path, train_state):
    path = ckpt.save(tmp_path / "a", train_state)
    target = abstract(train_state.params)
    found = ckpt.restore(path, target, strict=False, rename=[("params/**", "**")])
    equal(found, train_state.params)


# --- renamed or refactored modules --------------------------------------------------------


def test_a_refactored_model_takes_its_values_by_rules_that_a_dry_run_shows(tmp_path):
    class Old(nnx.Module):
        def __init__(self, rngs):
            self.enc_0, self.enc_1 = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
            self.out = nnx.Linear(4, 2, rngs=rngs)

    class New(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(4, 2, rngs=rngs)

    old, new = Old(nnx.Rngs(0)), New(nnx.Rngs(1))
    path = ckpt.save(tmp_path / "a", old)
    rules = [("enc_*/*", "encoder/*/*"), ("out", "head")]
    report = ckpt.plan_restore(path, new, rename=rules)
    assert report.exact and len(report.renamed) == 6
    assert "encoder/1/kernel" in str(report) and "<- enc_1/kernel" in str(report)
    ckpt.restore(path, new, rename=rules)
    np.testing.assert_array_equal(new.encoder[1].kernel[...], old.enc_1.kernel[...])
    np.testing.assert_array_equal(new.head.bias[...], old.out.bias[...])


def test_rules_that_match_nothing_and_rules_that_collide_are_named_together(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1, "b": 2, "c": 3})
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, {"c": 0}, rename=[("a", "c"), ("d", "e")], strict=False)
    text = str(failure.value)
    assert "'d' -> 'e' matches nothing saved" in text
    assert "two saved values would be called c (one of them is a)" in text


# --- missing weights become zeros, or placeholders that crash later -----------------------


def test_no_abstract_leaf_leaves_a_restore(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3), "pad": np.zeros(1000)})
    spoil(path)
    whole = {"w": jnp.zeros(3), "new": jnp.zeros(2), "newer": jnp.zeros(2), "pad": np.zeros(1000)}
    for strict in (True, False):
        with pytest.raises(ckpt.RestoreMismatchError) as failure:
            ckpt.restore(path, abstract(whole), strict=strict)
        assert {entry.path for entry in failure.value.report.missing} == {"new", "newer"}


def test_what_the_checkpoint_lacks_keeps_its_own_value_and_not_zeros(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(3)})
    target = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "new": jnp.full(2, 7.0)}
    found = ckpt.restore(path, target, strict=False)
    assert leaves_are_arrays(found)
    equal(found, {"w": jnp.ones(3), "new": jnp.full(2, 7.0)})


def test_objects_do_not_keep_placeholders_either(tmp_path):
    model = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    path = ckpt.save(tmp_path / "a", {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ckpt.RestoreMismatchError, match="model/bias"):
        ckpt.Checkpoint(model=model).read(path, rename=[("kernel", "model/kernel")])


# --- integer keys become strings ----------------------------------------------------------


def test_keys_keep_their_type_and_live_side_by_side(tmp_path):
    tree = {0: np.array([1]), "0": np.array([2]), "a/b": {"c.d": np.array([3])}, "": np.array([4])}
    path = ckpt.save(tmp_path / "a", tree)
    found = ckpt.load(path)
    assert set(found) == set(tree) and found[0] == 1 and found["0"] == 2
    zeros = iter(np.zeros((4, 1), int))
    target = {0: next(zeros), "0": next(zeros), "a/b": {"c.d": next(zeros)}, "": next(zeros)}
    found = ckpt.restore(path, target)
    assert (found[0], found["0"], found["a/b"]["c.d"], found[""]) == (1, 2, 3, 4)


def test_integer_keys_of_a_module_reach_their_values(tmp_path):
    def blocks(seed):
        rngs = nnx.Rngs(seed)
        return nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    saved, target = blocks(0), blocks(1)
    path = ckpt.save(tmp_path / "a", nnx.state(saved))
    nnx.update(target, ckpt.restore(path, nnx.state(target)))
    np.testing.assert_array_equal(target[1].kernel[...], saved[1].kernel[...])


# --- nothing restores without the original structure --------------------------------------

Pair = collections.namedtuple("Pair", "left right")


@flax.struct.dataclass
class Settings:
    rate: float
    sizes: tuple


def test_a_checkpoint_loads_where_its_classes_do_not_exist(tmp_path):
    tree = {
        "pair": Pair(np.arange(3), [None, "text"]),
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


# --- optimizer state breaks when the chain changes, or is dropped without a word ----------


def test_moments_survive_another_chain_and_what_is_gone_is_named(tmp_path, train_state):
    state = train_state.apply_gradients(grads=train_state.params)
    path = ckpt.save(tmp_path / "a", state)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.ema(0.9))
    target = TrainState.create(apply_fn=None, params=state.params, tx=tx)
    report = ckpt.plan_restore(path, target)
    found = ckpt.restore(path, target, strict=False)
    equal(found.opt_state[1], state.opt_state[0])
    assert type(found.opt_state[1]) is type(state.opt_state[0])
    assert {entry.path.split("/")[1] for entry in report.missing} == {
        "EmaState.count",
        "EmaState.ema",
    }
    sgd = TrainState.create(apply_fn=None, params=state.params, tx=optax.sgd(0.1))
    dropped = {entry.path for entry in ckpt.plan_restore(path, sgd).unexpected}
    assert "opt_state/ScaleByAdamState.mu/params/dense/kernel" in dropped
    with pytest.raises(ckpt.RestoreMismatchError, match="ScaleByAdamState"):
        ckpt.restore(path, sgd)


# --- typed PRNG keys, models with dropout -------------------------------------------------


def test_a_model_with_dropout_goes_on_with_its_random_numbers(tmp_path):
    def net(seed):
        return nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=seed))

    x = jnp.ones((4, 4))
    model, other = net(0), net(1)
    model(x)
    path = ckpt.save(tmp_path / "a", model)
    ckpt.restore(path, other)
    np.testing.assert_array_equal(model(x), other(x))


def test_another_implementation_of_keys_is_named(tmp_path):
    path = ckpt.save(tmp_path / "a", {"rng": jax.random.key(0)})
    with pytest.raises(ckpt.RestoreMismatchError, match=r"rng: expected key<rbg>.*threefry"):
        ckpt.restore(path, {"rng": jax.random.key(0, impl="rbg")})


# --- zero-size arrays, empty nodes, None, bare scalars; fp8, int4, bf16 --------------------


@pytest.mark.parametrize(
    "tree",
    [
        {"empty": jnp.zeros((0, 3)), "none": None, "dict": {}, "list": [], "tuple": ()},
        7,
        {"fp8": jnp.asarray([0.5, -2], jnp.float8_e4m3fn), "int4": jnp.asarray([7, -8], jnp.int4)},
        {"bf16": jnp.asarray([1e-40, jnp.nan], jnp.bfloat16)},
    ],
    ids=["empty", "scalar", "small", "bfloat16"],
)
def test_any_leaf_and_any_node_comes_back_as_it_was(tmp_path, tree):
    found = ckpt.restore(ckpt.save(tmp_path / "a", tree), tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert type(one) is type(other)
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


# --- "Unsupported data type: object" after minutes of writing ------------------------------


def test_what_cannot_be_saved_is_named_before_a_byte_is_written(tmp_path):
    tree = {"w": np.ones(3), "bad": {"objects": np.array([object()]), "file": sys.stdin}}
    with pytest.raises(ckpt.UnsaveableError, match=r"(?s)bad/objects.*bad/file") as failure:
        ckpt.save(tmp_path / "a", tree)
    assert {path for path, _ in failure.value.problems} == {"bad/objects", "bad/file"}
    assert list(tmp_path.iterdir()) == []


# --- tied weights are untied on reload ----------------------------------------------------


def test_tied_weights_are_saved_once_and_tied_again(tmp_path):
    def net(value):
        shared = nnx.Param(jnp.full(4, value))
        return {"embed": nnx.Dict(w=shared), "unembed": nnx.Dict(w=shared)}

    path = ckpt.save(tmp_path / "a", net(3.0))
    assert len(ckpt.list_variables(path)) == 1
    found = ckpt.restore(path, net(0.0))
    assert found["embed"]["w"] is found["unembed"]["w"]
    assert float(found["embed"]["w"][0]) == 3.0


# --- weights appear only after the first call, and nobody says what is missing -------------


def test_what_waits_is_reported_and_demanded_on_leaving_the_block(tmp_path):
    saved = ckpt.AutoTrackable()
    saved.built_later = ckpt.Variable(jnp.ones(2))
    path = ckpt.Checkpoint(model=saved).save(tmp_path / "a")
    model = ckpt.AutoTrackable()
    with (
        pytest.raises(AssertionError, match="built_later"),
        ckpt.Checkpoint(model=model).restore(path) as status,
    ):
        assert [entry.path for entry in status.report.deferred] == ["model/built_later"]
    with ckpt.Checkpoint(model=model).restore(path):
        model.built_later = ckpt.Variable(jnp.zeros(2))
    assert model.built_later.value.tolist() == [1, 1]
