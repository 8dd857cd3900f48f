"""State that is not arrays: objects that give their state, and boxes of other libraries."""

import asyncio
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt
from ckpt_jax.testing.processes import run_processes


class Iterator:
    """As grain has them."""

    def __init__(self, position=0):
        self.position = position
        self.buffer = np.zeros(2)

    def __next__(self):
        self.position += 1
        self.buffer = self.buffer + 1
        return self.position

    def get_state(self):
        state = {"position": self.position, "buffer": self.buffer, "seed": None, "raw": b"\0a"}
        return {**state, "workers": [(0, {"i": 1.5}), ()], "name": "a"}

    def set_state(self, state):
        assert [type(part) for part in state["workers"]] == [tuple, tuple]
        assert (state["seed"], state["raw"], state["name"]) == (None, b"\0a", "a")
        assert state["workers"][0] == (0, {"i": 1.5})
        self.position, self.buffer = state["position"], state["buffer"]


class Loader:
    """As torch has them."""

    def __init__(self, position=0):
        self.position = position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("kind", [Iterator, Loader])
def test_an_object_that_gives_its_state_is_restored_as_it_is(tmp_path, kind):
    it = kind(7)
    path = ckpt.Checkpoint(data=it, step=3).save(tmp_path / "ckpt")
    it.position = 99
    ckpt.Checkpoint(data=it, step=0).restore(path).assert_consumed()
    assert it.position == 7
    other = kind()
    restored = ckpt.restore(path, {"data": other, "step": 0})
    assert restored["data"] is other and other.position == 7 and restored["step"] == 3
    assert [entry.path for entry in ckpt.plan_restore(path, {"step": 0}).unexpected] == ["data"]


def test_what_it_saved_is_what_it_was_when_save_returned(tmp_path):
    it = Iterator(1)
    next(it)
    options = ckpt.CheckpointOptions(enable_async=True)
    checkpoint = ckpt.Checkpoint(data=it)
    path = checkpoint.save(tmp_path / "ckpt", options)
    next(it)
    checkpoint.sync()
    ckpt.restore(path, {"data": (other := Iterator())}, allow_unexpected="save_counter")
    assert (other.position, other.buffer.tolist()) == (2, [1, 1])


def test_an_attribute_of_a_trackable_and_a_manager_save_it(tmp_path):
    class Trainer(ckpt.AutoTrackable):
        def __init__(self):
            self.data = Iterator()
            self.w = ckpt.Variable(jnp.zeros(2))

    trainer = Trainer()
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(trainer), tmp_path)
    for step in range(1, 3):
        next(trainer.data)
        trainer.w.assign(trainer.w.value + 1)
        manager.save(step)
    fresh = Trainer()
    ckpt.CheckpointManager(ckpt.Checkpoint(fresh), tmp_path).restore_or_initialize()
    assert next(fresh.data) == 3


def test_each_process_has_its_own_state(tmp_path):
    def program(processes):
        it = Iterator(10 * processes.index)
        path = ckpt.save(tmp_path / "a", {"data": it})
        it.position = -1
        ckpt.restore(path, {"data": it})
        return it.position

    assert run_processes(3, program) == [0, 10, 20]
    # A restore on another number of processes asks for a merge function.
    with pytest.raises(ckpt.ProcessError, match=r"(?s)data: saved by 3.*may be an iterator itself"):
        ckpt.restore(tmp_path / "a", {"data": Iterator()})
    seen = []

    def merge(states, index, count):
        seen.append(([state["position"] for state in states], index, count))
        return {**states[0], "position": max(state["position"] for state in states)}

    it = Iterator()
    ckpt.restore(tmp_path / "a", {"data": ckpt.PerProcess(it, merge=merge)})
    assert it.position == 20 and seen == [([0, 10, 20], 0, 1)]


def test_a_state_that_cannot_be_saved_is_named(tmp_path):
    class Odd(Loader):
        def state_dict(self):
            return {"position": {"fn": print, "ok": 1, "odd": object()}}

    with pytest.raises(ckpt.UnsaveableError, match="position/odd"):
        ckpt.save(tmp_path / "a", {"data": Odd()})
    assert not os.listdir(tmp_path)


def test_objects_that_fail_to_give_their_state_are_named_together(tmp_path):
    class Odd(Loader):
        def state_dict(self):
            raise RuntimeError(f"no state at {self.position}")

        def load_state_dict(self, state):
            raise RuntimeError("no such state")

    path = ckpt.save(tmp_path / "a", {"x": [Loader(1), Loader(2)]})
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.save(tmp_path / "b", {"x.y": [Odd(1), Loader()], "box": ckpt.PerProcess(Odd(2))})
    assert dict(raised.value.problems) == {
        "x.y/0": "RuntimeError: no state at 1",
        "box": "RuntimeError: no state at 2",
    }
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(RuntimeError, match="no such state") as refused:
        ckpt.restore(path, {"x": [Loader(), Odd()]})
    assert f"x/1 refused the state from {path}" in refused.value.__notes__


@pytest.mark.parametrize("odd", [(i for i in range(3)), iter([1]), map(str, [1]), {}.values()])
def test_iterators_without_state_and_datasets_are_refused_with_advice(tmp_path, odd):
    def refusals():
        with pytest.raises(ckpt.UnsaveableError) as raised:
            ckpt.save(tmp_path / "a", {"data": [odd]})
        yield dict(raised.value.problems)["data/0"]
        with pytest.raises(ckpt.UnsaveableError) as raised:
            ckpt.save(tmp_path / "a", {"data": ckpt.PerProcess(odd)})
        yield str(raised.value)
        with pytest.raises(ValueError, match="data=") as refused:
            ckpt.Checkpoint(data=odd)
        yield str(refused.value)
        with pytest.raises(TypeError, match="cannot track 'data'") as untracked:
            ckpt.AutoTrackable().track("data", odd)
        yield str(untracked.value)

    is_iterator = hasattr(odd, "__next__")
    for text in refusals():
        assert ("does not give its state. Pass one that has get_state" in text) == is_iterator


class Held:
    """Its state is whatever it holds."""

    def __init__(self, value):
        self.value = value

    def get_state(self):
        return self.value

    def set_state(self, state):
        self.value = state


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        (),
        {"a": {}, "b": [None, ()]},
        {"": 1, "a/b": 2, 3: "x", (1, 2): b"\0"},
        np.zeros((0, 2), np.int8),
        np.random.default_rng(0).bit_generator.state,
        {"w": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(3), "host": np.ones(2)},
        [jax.random.PRNGKey(3), jnp.int32(7), 2**80, np.float32(1)],
    ],
    ids=lambda state: type(state).__name__,
)
def test_a_state_comes_back_as_it_was(tmp_path, state):
    path = ckpt.save(tmp_path / "a", {"x": Held(state)})
    ckpt.restore(path, {"x": (fresh := Held("before"))})

    def check(found, expected):
        assert type(found) is type(expected)
        if isinstance(expected, jax.Array | np.ndarray | np.generic):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert (found == expected).all()
        elif isinstance(expected, dict):
            assert found.keys() == expected.keys()
            for key in expected:
                check(found[key], expected[key])
        elif isinstance(expected, list | tuple):
            for one, other in zip(found, expected, strict=True):
                check(one, other)
        else:
            assert found == expected

    check(fresh.value, state)


def test_another_value_in_the_place_of_a_state_is_a_mismatch_before_anything_changes(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x.y": [jnp.ones(2)], "z": Held(1)})
    with pytest.raises(ckpt.RestoreMismatchError, match="x.y/0: expected the state") as raised:
        ckpt.restore(path, {"x.y": [Held(2)], "z": (other := Held(3))})
    assert other.value == 3
    assert not any(note.startswith("Changed") for note in raised.value.__notes__)


def test_objects_of_two_kinds_of_methods_and_one_object_at_two_places(tmp_path):
    class Both(Iterator, Loader):
        def state_dict(self):
            raise AssertionError("get_state comes first")

    one = Both(3)
    path = ckpt.save(tmp_path / "a", {"x": one, "deep": [(one, Loader(4))]})
    again, loader = Both(), Loader()
    ckpt.restore(path, {"x": again, "deep": [(again, loader)]})
    assert (again.position, loader.position) == (3, 4)


@pytest.mark.parametrize("format", ["orbax", "safetensors", "npz", "tensorflow"])
def test_no_other_format_loses_a_state_silently(tmp_path, format):
    for odd in (Iterator(3), ckpt.PerProcess({"position": 3})):
        tree = {"w": np.ones(2, np.float32), "data": [odd]}
        with pytest.raises(ckpt.UnsupportedFormatError, match="data/0.*PerProcess"):
            ckpt.export(tree, tmp_path / "a", format=format)
        path = ckpt.export(tree, tmp_path / "b", format=format, only="w")
        assert ckpt.load(path)["w"].tolist() == [1, 1]
        for name in os.listdir(tmp_path):
            (shutil.rmtree if (tmp_path / name).is_dir() else os.remove)(tmp_path / name)


class Seeded(Loader):
    pass


def test_an_object_that_gives_its_state_is_made_anew_if_its_class_is_registered(tmp_path):
    tree = {"data": Seeded(7), "w": jnp.ones(2)}
    with pytest.raises(ckpt.UnsaveableError, match="data: .*Seeded keeps its state in its own way"):
        ckpt.save_object(tree, tmp_path / "a")
    with ckpt.registration_scope():
        ckpt.register_serializable()(Seeded)
        anew = ckpt.load_object(ckpt.save_object(tree, tmp_path / "a"))
        assert type(anew["data"]) is Seeded and anew["data"].position == 7


def test_numpys_random_state(tmp_path):
    rng = np.random.RandomState(3)
    rng.random(5)
    path = ckpt.save(tmp_path / "a", {"rng": rng})
    expected = rng.random(3)
    other = np.random.RandomState(0)
    ckpt.restore(path, {"rng": other})
    np.testing.assert_array_equal(other.random(3), expected)


def test_classes_and_modules_with_views_of_their_own_stay_what_they_are(tmp_path):
    class Model(ckpt.AutoTrackable):
        def __init__(self):
            self.w = ckpt.Variable(jnp.ones(2))

        def get_state(self):
            raise AssertionError("it is a trackable")

        set_state = get_state

    path = ckpt.save(tmp_path / "a", Model())
    assert ckpt.load(path)["w"].tolist() == [1, 1]
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.save(tmp_path / "b", {"cls": Iterator})  # a class has no state


# --- Orbax -----------------------------------------------------------------------------


class Files:
    """A StatefulCheckpointable of Orbax."""

    def __init__(self, text=""):
        self.text = text

    async def save(self, directory):
        text = self.text

        async def write():
            path = await directory.await_creation()
            (path / "deep").mkdir()
            (path / "deep" / "text").write_text(text)
            (path / "raw").write_bytes(b"\0\1")

        return write()

    async def load(self, directory):
        async def read():
            assert (directory / "raw").read_bytes() == b"\0\1"
            self.text = (directory / "deep" / "text").read_text()

        return read()


def test_an_object_that_writes_files_as_orbax_asks_it(tmp_path):
    types = pytest.importorskip("orbax.checkpoint.experimental.v1").handlers
    assert hasattr(types, "CheckpointableHandler")
    path = ckpt.save(tmp_path / "a", {"files": Files("größe")})
    other = Files()
    ckpt.restore(path, {"files": other})
    assert other.text == "größe"

    async def inside():  # of an event loop of the program
        again = Files()
        ckpt.restore(path, {"files": again})
        return again.text

    assert asyncio.run(inside()) == "größe"


# --- the real libraries ----------------------------------------------------------------


def import_or_skip(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def test_iterators_of_grain_go_on_where_they_were(tmp_path):
    grain = import_or_skip("grain")

    def dataset():
        data = grain.MapDataset.range(20).shuffle(seed=1).map(lambda x: x * 2).repeat().batch(3)
        return iter(data.to_iter_dataset())

    def loader():
        source = grain.sources.RangeDataSource(0, 20, 1)
        sampler = grain.samplers.IndexSampler(20, shuffle=True, seed=1, num_epochs=1)
        return iter(grain.DataLoader(data_source=source, sampler=sampler, worker_count=0))

    first = {"dataset": dataset(), "loader": loader()}
    for _ in range(4):
        for it in first.values():
            next(it)
    path = ckpt.save(tmp_path / "a", first)
    expected = {name: np.asarray(next(it)) for name, it in first.items()}
    fresh = {"dataset": dataset(), "loader": loader()}
    ckpt.restore(path, fresh)
    for name, it in fresh.items():
        np.testing.assert_array_equal(np.asarray(next(it)), expected[name])


def test_a_loader_of_torchdata_goes_on_where_it_was(tmp_path):
    import_or_skip("torch")
    dataloader = import_or_skip("torchdata.stateful_dataloader")

    def loader():
        import torch  # after the test whether it is there

        generator = torch.Generator().manual_seed(3)
        return dataloader.StatefulDataLoader(
            list(range(12)), batch_size=2, shuffle=True, num_workers=0, generator=generator
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchdata itself
        first = loader()
        it = iter(first)
        next(it), next(it)
        path = ckpt.Checkpoint(data=first).save(tmp_path / "ckpt")
        expected = [batch.tolist() for batch in it]
        fresh = loader()
        ckpt.Checkpoint(data=fresh).restore(path).assert_consumed()
        assert [batch.tolist() for batch in fresh] == expected and len(expected) == 4


def test_a_module_and_an_optimizer_of_torch(tmp_path):
    torch = import_or_skip("torch")
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = ckpt.save(tmp_path / "a", {"model": model, "optimizer": optimizer})
    other = torch.nn.Linear(2, 3)
    its = torch.optim.Adam(other.parameters())
    ckpt.restore(path, {"model": other, "optimizer": its})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], its.state[b]["exp_avg"])


def test_variables_of_keras(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = import_or_skip("keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w, b = (keras.Variable(np.full(shape, 2.0, "float32")) for shape in ((2, 3), ()))
    path = ckpt.save(tmp_path / "a", {"w": w, "b": b})
    assert ckpt.load(path)["w"].tolist() == [[2.0] * 3] * 2
    w.assign(np.zeros((2, 3)))
    ckpt.restore(path, {"w": w, "b": b})
    np.testing.assert_array_equal(w.value, np.full((2, 3), 2.0))


def test_variables_of_penzai(tmp_path):
    import_or_skip("penzai")
    pz = import_or_skip("penzai.pz")
    w = pz.Parameter(value=jnp.arange(3.0), label="w")
    named = pz.Parameter(value=pz.nx.wrap(jnp.ones((2, 3))).tag("a", "b"), label="n")
    state = pz.StateVariable(value=jnp.int32(4), label="s")
    path = ckpt.save(tmp_path / "a", {"w": w, "named": [named], "s": state})
    blank = {
        "w": pz.Parameter(value=jnp.zeros(3), label="w"),
        "named": [pz.Parameter(value=pz.nx.wrap(jnp.zeros((2, 3))).tag("a", "b"), label="n")],
        "s": pz.StateVariable(value=jnp.int32(0), label="s"),
    }
    ckpt.restore(path, blank)
    assert blank["w"].value.tolist() == [0, 1, 2] and blank["s"].value == 4
    np.testing.assert_array_equal(blank["named"][0].value.unwrap("a", "b"), np.ones((2, 3)))


def test_states_of_haiku_and_numpyro(tmp_path):
    hk, numpyro = import_or_skip("haiku"), import_or_skip("numpyro")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))
        params, state = network.init(jax.random.key(0), jnp.ones((2, 3)))
        _, state = network.apply(params, state, None, jnp.ones((2, 3)))

        def model(x):
            mean = numpyro.sample("mean", numpyro.distributions.Normal(0, 1))
            numpyro.sample("x", numpyro.distributions.Normal(mean, 1), obs=x)

        guide = numpyro.infer.autoguide.AutoNormal(model)
        loss = numpyro.infer.Trace_ELBO()
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-2), loss)
        x = jnp.ones(5)
        fitted, _ = svi.update(svi.init(jax.random.key(0), x), x)
        path = ckpt.save(tmp_path / "a", {"haiku": (params, state), "svi": fitted})
        blank = (jax.tree.map(jnp.zeros_like, (params, state)), svi.init(jax.random.key(1), x))
        found = ckpt.restore(path, {"haiku": blank[0], "svi": blank[1]})
        jax.tree.map(np.testing.assert_array_equal, found["haiku"], (params, state))
        assert svi.get_params(found["svi"]) == svi.get_params(fitted)
        svi.update(found["svi"], x)  # the optimizer's state is whole


def test_none_of_these_libraries_is_imported_by_this_one(tmp_path):
    import subprocess
    import sys

    program = (
        "import sys, numpy, ckpt_jax as ckpt\n"
        f"ckpt.save({str(tmp_path / 'a')!r}, {{'rng': numpy.random.RandomState(0)}})\n"
        "names = ['torch', 'keras', 'penzai', 'grain', 'haiku', 'numpyro', 'asyncio', 'flax']\n"
        "print([name for name in names if name in sys.modules and name != 'asyncio'])\n"
    )
    from places import ROOT

    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# --- tf.data ---------------------------------------------------------------------------

# `scripts/interop` has TensorFlow, and runs these tests with it.


@pytest.fixture
def tensorflow(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    return import_or_skip("tensorflow")


def pipeline(tf, seed=1):
    data = tf.data.Dataset.range(500).shuffle(200, seed=seed, reshuffle_each_iteration=True)
    data = data.map(lambda x: {"x": x * 2, "text": tf.strings.as_string(x)})
    return data.repeat().batch(3).prefetch(2)


def batches(it, count):
    return [np.asarray(next(it)["x"]).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", [iter, lambda data: data.as_numpy_iterator()])
def test_iterators_of_tensorflow_go_on_where_they_were(tensorflow, tmp_path, kind):
    first = kind(pipeline(tensorflow))
    batches(first, 170)  # into the second epoch
    checkpoint = ckpt.Checkpoint(data=first, step=jnp.int32(3))
    path = checkpoint.save(tmp_path / "ckpt", ckpt.CheckpointOptions(enable_async=True))
    expected = batches(first, 200)  # the state is that of the call
    checkpoint.sync()
    fresh = kind(pipeline(tensorflow))
    ckpt.Checkpoint(data=fresh, step=jnp.int32(0)).restore(path).assert_consumed()
    assert batches(fresh, 200) == expected
    ckpt.restore(path, {"data": fresh, "step": jnp.int32(0)}, allow_unexpected="save_counter")
    assert batches(fresh, 200) == expected  # one that is under way goes back
    assert ckpt.verify(path).ok and ckpt.load(path, only="step")["step"] == 3


def test_an_iterator_of_tensorflow_at_its_end_stays_there(tensorflow, tmp_path):
    data = tensorflow.data.Dataset.range(2)
    ended = iter(data)
    assert len([*ended]) == 2
    path = ckpt.save(tmp_path / "a", {"data": ended})
    ckpt.restore(path, {"data": (fresh := iter(data))})
    assert [*fresh] == []


def test_an_iterator_of_tensorflow_is_state_of_a_trackable_and_of_each_process(
    tensorflow, tmp_path
):
    class Trainer(ckpt.AutoTrackable):
        def __init__(self):
            self.data = iter(pipeline(tensorflow))

    def program(processes):
        trainer = Trainer()
        batches(trainer.data, 1 + processes.index)
        path = ckpt.Checkpoint(trainer).write(tmp_path / "a")
        expected = batches(trainer.data, 2)
        fresh = Trainer()
        ckpt.Checkpoint(fresh).read(path).assert_consumed()
        return batches(fresh.data, 2) == expected, expected

    found = run_processes(2, program)
    assert [is_same for is_same, _ in found] == [True, True] and found[0][1] != found[1][1]
    with pytest.raises(ckpt.ProcessError, match="data: saved by 2 processes"):
        ckpt.Checkpoint(Trainer()).read(tmp_path / "a")
    data = iter(pipeline(tensorflow))
    fresh = ckpt.PerProcess(data, merge=lambda states, index, count: states[1])
    ckpt.restore(tmp_path / "a", {"data": fresh}, allow_unexpected=True)
    assert batches(fresh.value, 2) == found[1][1]


def test_what_tensorflow_cannot_save_or_restore_is_named(tensorflow, tmp_path):
    tf = tensorflow
    stateful = tf.data.Dataset.range(5).map(lambda x: tf.random.uniform([]))
    odd = tf.data.Dataset.from_generator(lambda: iter(range(5)), tf.int64)
    tree = {"a": {"x": iter(stateful)}, "b": [iter(pipeline(tf)), odd.as_numpy_iterator()]}
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.save(tmp_path / "a", tree)
    assert [path for path, _ in raised.value.problems] == ["a/x", "b/1"]
    assert "RandomUniform is stateful" in str(raised.value)
    assert "experimental_external_state_policy" in str(raised.value)
    assert not os.listdir(tmp_path)
    allowed = tf.data.Options()
    allowed.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    ckpt.save(tmp_path / "a", {"data": iter(stateful.with_options(allowed))})
    path = ckpt.save(tmp_path / "b", {"data": iter(pipeline(tf))})
    for other in (tf.data.Dataset.range(5), stateful.with_options(allowed)):
        with pytest.raises(ValueError, match="cannot restore this pipeline") as refused:
            ckpt.restore(path, {"data": iter(other)})
        assert any("data refused the state from" in note for note in refused.value.__notes__)
    with pytest.raises(ValueError, match="expected the state of an iterator of tf.data"):
        saved = ckpt.save(tmp_path / "c", {"data": Iterator()})
        ckpt.restore(saved, {"data": iter(pipeline(tf))})


def test_datasets_and_what_wraps_an_iterator_of_tensorflow_are_refused_with_advice(
    tensorflow, tmp_path
):
    data = pipeline(tensorflow)
    wrapped = (batch["x"].numpy() for batch in data)  # as tfds.as_numpy gives it
    for odd, why in ((data, r"pass its iterator, iter\(dataset\)"), (wrapped, "as_numpy_iterator")):
        with pytest.raises(ckpt.UnsaveableError, match=f"data: .*{why}"):
            ckpt.save(tmp_path / "a", {"data": odd})
