"""Flax: nnx objects are restored in place, Linen's states are rebuilt."""

import dataclasses
import functools
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader


class Ema(nnx.Variable):
    """A user's kind of variable."""


class Net(nnx.Module):
    def __init__(self, rngs, width=4):
        self.width = width
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.ema = Ema(jax.random.normal(rngs.params(), (width,)))
        self.heads = nnx.Dict(a=nnx.Param(jnp.ones(2)), b=nnx.Linear(width, 3, rngs=rngs))
        self.cache = nnx.Cache({"k": jnp.arange(3), "n": [jnp.zeros(()), jnp.int8(5)]})

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.heads.b(self.dropout(self.norm(x)))


X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def trained(seed):
    """A net with an optimizer after some steps, so that all its state is its own."""
    model = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    for _ in range(2):
        grads = nnx.grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)
    model.ema[...] = model.ema[...] + seed
    return model, optimizer


def leaves(*objects):
    """All values of nnx objects, as (path, bytes, dtype, shape)."""
    found = []
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.state(objects)):
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        found.append((str(path), array.tobytes(), array.dtype, array.shape))
    assert found
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, model, optimizer) of a trained model, saved together."""
    model, optimizer = trained(1)
    path = ckpt.save(
        tmp_path_factory.mktemp("saved") / "a", {"model": model, "optimizer": optimizer}
    )
    return path, model, optimizer


def test_a_module_and_its_optimizer_are_restored_in_place(saved):
    path, expected_model, expected_optimizer = saved
    model, optimizer = trained(2)
    variables = {
        id(v) for _, v in nnx.iter_graph((model, optimizer)) if isinstance(v, nnx.Variable)
    }
    assert leaves(model, optimizer) != leaves(expected_model, expected_optimizer)
    found = ckpt.restore(path, {"model": model, "optimizer": optimizer})
    assert found["model"] is model
    assert found["optimizer"] is optimizer
    assert leaves(model, optimizer) == leaves(expected_model, expected_optimizer)
    assert variables == {
        id(v) for _, v in nnx.iter_graph((model, optimizer)) if isinstance(v, nnx.Variable)
    }


def test_training_goes_on_as_if_never_interrupted(saved):
    path, _, _ = saved

    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)
        return float(loss)

    one, two = trained(1), trained(3)
    ckpt.restore(path, dict(zip(("model", "optimizer"), two, strict=True)))
    for _ in range(3):
        assert step(*one) == step(*two)  # dropout and batch statistics included
    assert leaves(*one) == leaves(*two)


def test_checkpoint_restores_modules_too(tmp_path, saved):
    model, optimizer = trained(1)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "ckpt")
    other, its_optimizer = trained(2)
    status = ckpt.Checkpoint(model=other, optimizer=its_optimizer).restore(path)
    status.assert_consumed()
    assert leaves(other, its_optimizer) == leaves(model, optimizer)


def test_variables_keep_their_kind_and_their_metadata(tmp_path):
    class Holder(nnx.Module):
        def __init__(self, fill):
            self.a = nnx.Param(jnp.full(2, fill), note="kept")
            self.b = Ema(jnp.full(2, fill))
            self.c = nnx.BatchStat(jnp.full(2, fill))

    path = ckpt.save(tmp_path / "a", Holder(3.0))
    holder = ckpt.restore(path, Holder(0.0))
    assert [type(x) for x in (holder.a, holder.b, holder.c)] == [nnx.Param, Ema, nnx.BatchStat]
    assert holder.a.note == "kept"
    assert all((x[...] == 3).all() for x in (holder.a, holder.b, holder.c))


def test_static_attributes_are_the_programs_own(tmp_path):
    path = ckpt.save(tmp_path / "a", Net(nnx.Rngs(0)))
    loaded = ckpt.load(path)
    assert "width" not in loaded
    target = Net(nnx.Rngs(1))
    target.width = 17
    assert ckpt.restore(path, target).width == 17


def test_a_module_loads_as_plain_containers(saved):
    path, model, optimizer = saved
    loaded = ckpt.load(path)
    assert isinstance(loaded["model"]["layers"], list)
    assert isinstance(loaded["model"]["heads"], dict)
    kernel = loaded["model"]["layers"][1]["kernel"]
    assert kernel.tobytes() == np.asarray(model.layers[1].kernel[...]).tobytes()
    assert loaded["model"]["cache"]["value"]["n"][1] == 5
    assert int(loaded["optimizer"]["step"]) == int(optimizer.step[...]) == 2


def test_params_can_be_taken_out_of_a_checkpoint_with_an_optimizer(saved):
    path, model, _ = saved
    target = Net(nnx.Rngs(5))
    found = ckpt.load(path, only="model/layers/**")
    assert set(found) == {"model"}
    assert set(found["model"]) == {"layers"}
    with pytest.raises(ckpt.RestoreMismatchError, match="optimizer"):
        ckpt.restore(path, {"model": target})
    ckpt.restore(path, {"model": target}, strict=False)
    assert leaves(target) == leaves(model)


def test_a_model_of_more_layers_is_refused_and_left_alone(saved):
    path, _, _ = saved
    model, optimizer = trained(2)
    model.layers.append(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    before = leaves(model, optimizer)
    with pytest.raises(ckpt.RestoreMismatchError) as raised:
        ckpt.restore(path, {"model": model, "optimizer": optimizer})
    missing = sorted(entry.path for entry in raised.value.report.missing)
    assert missing == ["model/layers/2/bias", "model/layers/2/kernel"]
    assert leaves(model, optimizer) == before


def test_a_model_of_another_width_is_refused_and_left_alone(tmp_path):
    path = ckpt.save(tmp_path / "a", Net(nnx.Rngs(0), width=4))
    model = Net(nnx.Rngs(1), width=5)
    before = leaves(model)
    with pytest.raises(
        ckpt.RestoreMismatchError, match=r"layers/0/kernel: expected shape \(5, 5\)"
    ):
        ckpt.restore(path, model)
    assert leaves(model) == before


def test_an_abstract_module_becomes_a_real_one(saved, mesh42):
    path, model, _ = saved
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    found = ckpt.restore(path, {"model": abstract}, strict=False)["model"]
    assert found is abstract
    assert leaves(found) == leaves(model)
    assert found(X).shape == (8, 3)


def test_an_abstract_module_with_shardings_is_restored_onto_them(tmp_path, mesh42, mesh24):
    def build():
        return nnx.Linear(8, 16, rngs=nnx.Rngs(0))

    model = build()
    sharding = NamedSharding(mesh42, P("data", "model"))
    model.kernel.set_value(jax.device_put(model.kernel[...], sharding))
    path = ckpt.save(tmp_path / "a", model)
    abstract = nnx.eval_shape(build)
    wanted = {
        "kernel": NamedSharding(mesh24, P("model", "data")),
        "bias": NamedSharding(mesh24, P()),
    }
    for name, place in wanted.items():
        variable = getattr(abstract, name)
        struct = variable.get_raw_value()
        variable.set_raw_value(jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place))
    found = ckpt.restore(path, abstract)
    for name, place in wanted.items():
        assert getattr(found, name)[...].sharding == place
    assert leaves(found) == leaves(model)


def test_nothing_abstract_leaves_a_lenient_restore_of_a_module(tmp_path):
    path = ckpt.save(tmp_path / "a", nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ckpt.RestoreMismatchError, match="bias"):
        ckpt.restore(path, abstract, strict=False)


def test_a_shared_variable_is_saved_once_and_shared_again(tmp_path):
    class Tied(nnx.Module):
        def __init__(self, seed):
            self.embed = nnx.Embed(64, 8, rngs=nnx.Rngs(seed))
            self.table = self.embed.embedding
            self.also = nnx.Dict(embed=self.embed)

    path = ckpt.save(tmp_path / "a", Tied(0))
    with ckpt.load_checkpoint(path) as reader:
        assert len(reader.keys()) == 1
    loaded = ckpt.load(path)
    assert loaded["table"] is loaded["embed"]["embedding"]
    for target in (Tied(1), nnx.eval_shape(lambda: Tied(1))):
        found = ckpt.restore(path, target)
        assert found.table is found.embed.embedding
        assert found.also.embed is found.embed
        assert leaves(found) == leaves(Tied(0))


def test_modules_may_refer_to_each_other(tmp_path):
    class Node(nnx.Module):
        def __init__(self, fill):
            self.value = nnx.Param(jnp.full(3, fill))
            self.other: Any = nnx.data(None)

    def ring(fill):
        one, two = Node(fill), Node(fill + 1)
        one.other, two.other = two, one
        return one

    path = ckpt.save(tmp_path / "a", ring(5.0))
    found = ckpt.restore(path, ring(0.0))
    assert found.other.other is found
    assert (found.value[...] == 5).all()
    assert (found.other.value[...] == 6).all()
    loaded = ckpt.load(path)
    assert (loaded["value"] == 5).all()
    assert (loaded["other"]["value"] == 6).all()


def test_a_modules_data_attributes_are_restored_on_it(tmp_path):
    class Loose(nnx.Module):
        def __init__(self, fill):
            self.array = jnp.full(3, fill)
            self.tree = nnx.data({"a": [jnp.full(2, fill), fill]})

    path = ckpt.save(tmp_path / "a", Loose(2.5))
    target = Loose(0.0)
    assert ckpt.restore(path, target) is target
    assert (target.array == 2.5).all()
    assert (target.tree["a"][0] == 2.5).all()
    assert target.tree["a"][1] == 2.5


def test_rngs_go_on_where_they_were(tmp_path):
    rngs = nnx.Rngs(params=1, dropout=2)
    rngs.params()
    rngs.dropout()
    path = ckpt.save(tmp_path / "a", rngs)
    other = ckpt.restore(path, nnx.Rngs(params=8, dropout=9))
    for name in ("params", "dropout", "params"):
        one, two = (jax.random.key_data(getattr(r, name)()) for r in (rngs, other))
        assert one.tolist() == two.tolist()


def test_an_nnx_state_comes_back(tmp_path):
    model = Net(nnx.Rngs(0))
    state = nnx.state(model)
    path = ckpt.save(tmp_path / "a", {"state": state})
    target = nnx.state(Net(nnx.Rngs(1)))
    found = ckpt.restore(path, {"state": target})["state"]
    assert isinstance(found, nnx.State)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    other = Net(nnx.Rngs(2))
    nnx.update(other, found)
    assert leaves(other) == leaves(model)


def test_a_pure_dict_of_a_state_comes_back(tmp_path):
    pure = nnx.to_pure_dict(nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
    path = ckpt.save(tmp_path / "a", pure)
    blank = jax.tree.map(jnp.zeros_like, pure)
    found = ckpt.restore(path, blank)
    assert jax.tree.structure(found) == jax.tree.structure(pure)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, pure))


def test_metrics_come_back(tmp_path):
    def metrics():
        return nnx.MultiMetric(loss=nnx.metrics.Average("loss"), acc=nnx.metrics.Accuracy())

    one, two = metrics(), metrics()
    one.update(loss=jnp.float32(3), logits=jnp.eye(2), labels=jnp.array([0, 0]))
    ckpt.restore(ckpt.save(tmp_path / "a", one), two)
    assert {k: float(v) for k, v in two.compute().items()} == {"loss": 3.0, "acc": 0.5}


# --- Linen -----------------------------------------------------------------------------


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2, name="out/head.0")(x)


@flax.struct.dataclass
class Extra:
    scale: jax.Array
    label: str = flax.struct.field(pytree_node=False, default="static")


class MyState(TrainState):
    batch_stats: Any = None
    rng: Any = None
    extra: Extra | None = None


@lru_cache
def init(seed):
    model = MLP()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-2)))
    return model, tx, jax.jit(model.init)(jax.random.key(seed), X)


@jax.jit
def step_of(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


def make_state(seed=0, steps=0, step_kind=int):
    model, tx, variables = init(seed)
    state = MyState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        rng=jax.random.key(seed),
        extra=Extra(jnp.float32(seed)),
    )
    for _ in range(steps):
        state = step_of(state)
    return state.replace(step=step_kind(steps))


def same(one, two):
    """Equal structure, static fields included, and equal values."""
    if jax.tree.structure(one) != jax.tree.structure(two):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(
        type(a) is type(b)
        and (a.dtype == b.dtype and bool((a == b).all()) if hasattr(a, "dtype") else a == b)
        for a, b in pairs
    )


def with_functions_of(state, other):
    return state.replace(apply_fn=other.apply_fn, tx=other.tx)


@pytest.mark.parametrize("step_kind", [int, jnp.int32, np.int32])
def test_a_train_state_and_a_users_subclass_come_back(tmp_path, step_kind):
    state = make_state(1, steps=3, step_kind=step_kind)
    path = ckpt.save(tmp_path / "a", state)
    target = make_state(2, step_kind=step_kind)
    found = ckpt.restore(path, target)
    assert type(found) is MyState
    assert same(found, with_functions_of(state, target))
    assert found.tx is target.tx
    assert found.extra.label == "static"
    assert target.step == 0
    assert same(step_of(found), with_functions_of(step_of(state), target))


def test_a_train_state_is_restored_into_an_abstract_one(tmp_path, mesh42):
    state = make_state(1, steps=3, step_kind=jnp.int32)
    path = ckpt.save(tmp_path / "a", state)
    init(0)  # outside of eval_shape, which would put tracers into the cache
    abstract = jax.eval_shape(lambda: make_state(0, step_kind=jnp.int32))
    found = ckpt.restore(path, abstract)
    assert same(found, with_functions_of(state, abstract))
    replicated = NamedSharding(mesh42, P())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract
    )
    found = ckpt.restore(path, placed)
    assert same(found, with_functions_of(state, abstract))
    kernel = found.params["Dense_0"]["kernel"]
    assert kernel.sharding == replicated


@pytest.mark.parametrize(("saved", "target"), [(int, jnp.int32), (jnp.int32, int)])
def test_a_step_as_python_int_and_as_array_are_the_same_step(tmp_path, saved, target):
    path = ckpt.save(tmp_path / "a", make_state(1, steps=3, step_kind=saved))
    found = ckpt.restore(path, make_state(1, step_kind=target))
    assert found.step == 3
    assert isinstance(found.step, int if target is int else jax.Array)


def test_params_can_be_taken_out_of_a_train_state(tmp_path):
    state = make_state(1, steps=2)
    path = ckpt.save(tmp_path / "a", state)
    params = ckpt.load(path, only="params/**")["params"]
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == np.asarray(b)).all(), params, state.params))


def test_a_train_state_loads_as_plain_containers(tmp_path):
    state = make_state(1, steps=2)
    loaded = ckpt.load(ckpt.save(tmp_path / "a", state))
    assert loaded["step"] == 2
    assert set(loaded) == {
        field.name for field in dataclasses.fields(MyState) if field.name not in ("apply_fn", "tx")
    }
    mu = loaded["opt_state"]["ScaleByAdamState.mu"]["params"]["out/head.0"]["kernel"]
    assert mu.tobytes() == np.asarray(state.opt_state[1][0].mu["out/head.0"]["kernel"]).tobytes()


def test_optax_states_keep_their_treedef(tmp_path):
    params = {"w": jnp.ones((2, 3)), "b": None}
    for tx in (
        optax.sgd(0.1),
        optax.adam(0.1),
        optax.lamb(0.1),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    ):
        state = tx.init(params)
        changed = jax.tree.map(lambda x: x + 1, state)
        path = ckpt.save(tmp_path / "a", changed, overwrite=True)
        found = ckpt.restore(path, state)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert same(found, changed)


# --- bound Linen modules ----------------------------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))
        return nn.Dense(2, name="out")(x)


def bound(seed):
    return Normed().bind(Normed().init(jax.random.key(seed), jnp.ones((1, 4))))


def test_a_bound_module_is_seen_as_its_submodules_and_comes_back_bound(tmp_path):
    x = jnp.ones((2, 4))
    path = ckpt.Checkpoint(model=bound(0)).save(tmp_path / "a")
    assert {"model/Dense_0/params/kernel", "model/BatchNorm_0/batch_stats/mean"} <= set(
        ckpt.object_metadata(path).paths
    )
    checkpoint = ckpt.Checkpoint(model=bound(1))
    checkpoint.restore(path).assert_consumed()
    assert isinstance(checkpoint.model, Normed)
    assert (checkpoint.model(x) == bound(0)(x)).all()


def test_a_module_bound_to_abstract_variables_becomes_a_real_one(tmp_path):
    path = ckpt.save(tmp_path / "a", bound(0))
    variables = jax.eval_shape(Normed().init, jax.random.key(0), jnp.ones((1, 4)))
    found = ckpt.restore(path, Normed().bind(variables))
    assert (found(jnp.ones((2, 4))) == bound(0)(jnp.ones((2, 4)))).all()


def test_a_module_that_is_not_bound_has_nothing_to_save(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match=r"m: a Normed that is not bound"):
        ckpt.save(tmp_path / "a", {"m": Normed()})


def test_a_module_can_be_bound_as_the_error_about_an_unbound_one_says(tmp_path: Path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(x)

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ckpt.UnsaveableError, match=r"module\.bind"):
        ckpt.save(tmp_path / "unbound", {"model": model})
    path = ckpt.save(tmp_path / "bound", {"model": model.bind(variables)})
    assert ckpt.load(path)["model"]["Dense_0"]["params"]["kernel"].shape == (3, 2)


# --- from Linen to nnx and back ---------------------------------------------------------


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.logits = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.logits(nnx.tanh(self.hidden(x)))


class LinenTwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="logits")(nn.tanh(nn.Dense(8, name="hidden")(x)))


def linen_state(seed, steps=0):
    net = LinenTwoLayers()
    params = net.init(jax.random.key(seed), jnp.ones((1, 4)))["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(0.1))
    for _ in range(steps):
        state = state.apply_gradients(grads=state.params)
    return state


def nnx_state(seed):
    model = TwoLayers(nnx.Rngs(seed))
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)}


TO_NNX = [("params/**", "model/**"), ("opt_state", "optimizer"), ("step", "optimizer/step")]
TO_LINEN = [("model/**", "params/**"), ("optimizer/step", "step"), ("optimizer/**", "opt_state/**")]


def test_a_train_state_goes_into_nnx_and_back_moments_included(tmp_path):
    x = jnp.ones((3, 4))
    state = linen_state(0, steps=2)
    path = ckpt.save(tmp_path / "linen", state)
    found = ckpt.restore(path, nnx_state(1), rename=TO_NNX)
    model, optimizer = found["model"], found["optimizer"]
    assert (model(x) == state.apply_fn({"params": state.params}, x)).all()
    assert int(optimizer.step[...]) == 2
    mu = nnx.to_pure_dict(nnx.as_pure(optimizer.opt_state)[0].mu)
    assert same(mu, dict(state.opt_state[0].mu))

    path = ckpt.save(tmp_path / "nnx", found)
    back = ckpt.restore(path, linen_state(2), rename=TO_LINEN)
    assert same(back.params, state.params) and same(back.opt_state, state.opt_state)
    assert int(back.step) == 2


# --- boxes and types of JAX -------------------------------------------------------------


def test_a_ref_is_restored_in_place(tmp_path):
    ref = jax.new_ref(jnp.arange(3.0))
    path = ckpt.save(tmp_path / "a", {"ref": ref})
    ref[...] = jnp.zeros(3)
    assert ckpt.restore(path, {"ref": ref})["ref"] is ref
    assert ref[...].tolist() == [0, 1, 2]


def test_a_weak_type_of_the_target_stays_weak(tmp_path):
    path = ckpt.save(tmp_path / "a", {"rate": jnp.asarray(0.5), "strong": jnp.float32(2)})
    found = ckpt.restore(path, {"rate": jnp.asarray(0.0), "strong": jnp.float32(0)})
    assert found["rate"].weak_type and not found["strong"].weak_type
    assert (found["rate"].item(), found["strong"].item()) == (0.5, 2.0)


# --- attributes of modules --------------------------------------------------------------


def test_variables_in_attributes_of_an_nnx_module_are_state(tmp_path: Path):
    class Position(ckpt.PythonState):
        index = 0

        def serialize(self) -> str:
            return str(self.index)

        def deserialize(self, value: bytes) -> None:
            self.index = int(value)

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.scale = ckpt.Variable(jnp.zeros(2))
            self.position = Position()
            self.width = 2

    model = Model()
    model.scale.assign(jnp.ones(2))
    model.position.index = 5
    path = ckpt.save(tmp_path / "a", model)
    assert {entry.path for entry in ckpt.plan_restore(path, Model()).restored} == {
        "linear/kernel",
        "linear/bias",
        "scale",
        "position",
    }
    fresh = ckpt.restore(path, Model())
    assert fresh.scale.value.tolist() == [1, 1] and fresh.position.index == 5


def test_an_nnx_module_is_left_without_foreign_attributes(path):
    """Values wait for ever on an nnx.Module, whose attributes nobody watches."""
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, count):
            for i in range(count):
                setattr(self, f"w{i}", nnx.Param(jnp.zeros(2)))

    ckpt.Checkpoint(m=Layer(2)).write(path)
    m = Layer(1)
    before = nnx.graphdef(m)
    ckpt.Checkpoint(m=m).read(path)
    assert "_self_pending" not in vars(m)
    hash(nnx.graphdef(m))
    assert nnx.graphdef(m) == before


def test_objects_do_not_keep_placeholders_either(tmp_path):
    model = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    path = ckpt.save(tmp_path / "a", {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ckpt.RestoreMismatchError, match="model/bias"):
        ckpt.Checkpoint(model=model).read(path, rename=[("kernel", "model/kernel")])


def test_integer_keys_of_a_module_reach_their_values(tmp_path):
    def blocks(seed):
        rngs = nnx.Rngs(seed)
        return nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    saved, target = blocks(0), blocks(1)
    path = ckpt.save(tmp_path / "a", nnx.state(saved))
    nnx.update(target, ckpt.restore(path, nnx.state(target)))
    np.testing.assert_array_equal(target[1].kernel[...], saved[1].kernel[...])


def test_a_model_with_dropout_goes_on_with_its_random_numbers(tmp_path):
    def net(seed):
        return nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=seed))

    x = jnp.ones((4, 4))
    model, other = net(0), net(1)
    model(x)
    path = ckpt.save(tmp_path / "a", model)
    ckpt.restore(path, other)
    np.testing.assert_array_equal(model(x), other(x))


def test_tied_weights_are_saved_once_and_tied_again(tmp_path):
    def net(value):
        shared = nnx.Param(jnp.full(4, value))
        return {"embed": nnx.Dict(w=shared), "unembed": nnx.Dict(w=shared)}

    path = ckpt.save(tmp_path / "a", net(3.0))
    assert ckpt.list_variables(path) == [("embed/w", (4,)), ("unembed/w", (4,))]
    with ckpt.load_checkpoint(path) as reader:
        assert len(reader.keys()) == 1
    found = ckpt.restore(path, net(0.0))
    assert found["embed"]["w"] is found["unembed"]["w"]
    assert float(found["embed"]["w"][0]) == 3.0


@pytest.mark.behaviour(67)
def test_a_fresh_model_computes_what_the_saved_one_did(tmp_path):
    class Linear(nnx.Module):
        def __init__(self, seed):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            return jax.nn.relu(self.linear(x))

    model, fresh, x = Linear(0), Linear(1), jnp.arange(3.0)
    saved = ckpt.Checkpoint(model).save(tmp_path / "ckpt")
    assert not np.array_equal(fresh(x), model(x))
    ckpt.Checkpoint(fresh).restore(saved).assert_consumed()
    np.testing.assert_array_equal(fresh(x), model(x))


# --- parts of a TrainState --------------------------------------------------------------


RNG = np.random.default_rng(11)


def layer():
    return {"kernel": RNG.normal(size=(16, 8)).astype(np.float32), "bias": np.ones(8, np.float32)}


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, tree
    )


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


# --- static parts ------------------------------------------------------------------------


def test_functions_and_static_elements_of_lists_stay_the_programs(tmp_path):
    def model(seed):
        rngs = nnx.Rngs(seed)
        layers = nnx.Sequential(
            nnx.Linear(2, 2, rngs=rngs),
            nnx.relu,
            functools.partial(nnx.gelu, approximate=True),
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(2, 2, rngs=rngs),
        )
        others = nnx.List([f"name {seed}", seed, jnp.float32, None, nnx.Param(jnp.full(1, seed))])
        return nnx.Dict(layers=layers, others=others)

    path = ckpt.save(tmp_path / "a", model(1))
    target = model(2)
    ckpt.restore(path, target)
    assert (target.layers.layers[4].kernel[...] == model(1).layers.layers[4].kernel[...]).all()
    assert list(target.others)[:4] == ["name 2", 2, jnp.float32, None]
    assert target.others[4][...] == 1
    assert ckpt.load(path, only="others/**")["others"] == {4: jnp.ones(1)}
    ckpt.Checkpoint(model=model(3)).read(
        ckpt.Checkpoint(model=model(4)).write(tmp_path / "b")
    ).assert_consumed()


def test_dicts_whose_keys_are_tuples_are_restored(tmp_path):
    def model(seed):
        rngs = nnx.Rngs(seed)
        return nnx.SpectralNorm(nnx.Linear(2, 2, rngs=rngs), rngs=rngs)

    path = ckpt.Checkpoint(model=model(0)).write(tmp_path / "a")
    fresh = model(1)
    ckpt.Checkpoint(model=fresh).read(path).assert_consumed()
    assert_equal_states(nnx.state(fresh), nnx.state(model(0)))


def assert_equal_states(one, other):
    for (path, a), (_, b) in zip(nnx.to_flat_state(one), nnx.to_flat_state(other), strict=True):
        a, b = a.get_value(), b.get_value()
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_an_abstract_model_of_flax_is_a_target(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def model(value=0.0):
        init = nnx.with_partitioning(nnx.initializers.constant(value), ("d", None))
        return nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0), kernel_init=init), nnx.relu)

    with jax.set_mesh(mesh):
        path = ckpt.save(tmp_path / "a", model(1.0))
        graphdef, state = nnx.get_abstract_model(model, mesh)
    for found in (
        nnx.merge(graphdef, ckpt.restore(path, state)),
        ckpt.restore(path, nnx.merge(graphdef, state)),
    ):
        kernel = found.layers[0].kernel.get_value()
        assert (kernel == 1).all()
        assert kernel.sharding.spec == jax.sharding.PartitionSpec("d", None)
