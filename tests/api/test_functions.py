"""Functions that run without their code: what is stored, what they take, what is refused."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parts import part, replace_part
from places import ROOT

import ckpt_jax as ckpt
from ckpt_jax.graph._proto import saved_object_graph_pb2 as pb
from ckpt_jax.graph.dtypes import LossyConversionError
from ckpt_jax.graph.labels import SAVED_OBJECTS_KEY
from ckpt_jax.store.seal import seal, unseal

SCOPE = jax.export.SymbolicScope()  # so that b is the same size in several arguments


def spec(shape, dtype="float32"):
    if isinstance(shape, str):
        shape = jax.export.symbolic_shape(shape, scope=SCOPE)
    return jax.ShapeDtypeStruct(shape, dtype)


def linear(obj, x):
    return x @ obj["w"] + obj["b"]


TREE = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2), "unused": jnp.ones(1000)}


def saved(path, obj=None, **functions):
    functions = functions or {"predict": (linear, spec("b, 3"))}
    return ckpt.save_object(TREE if obj is None else obj, path, functions=functions)


def message(path):
    return pb.SavedObjectGraph.FromString(unseal(part(path, SAVED_OBJECTS_KEY)))


# --- what runs -------------------------------------------------------------------------


def test_a_function_runs_with_any_size_where_its_shape_is_symbolic(tmp_path):
    predict = ckpt.load_function(saved(tmp_path / "a"), "predict")
    for size in (1, 4):
        x = np.random.default_rng(0).random((size, 3), np.float32)
        np.testing.assert_allclose(predict(x), linear(TREE, x), rtol=1e-6)
    assert predict.signature == "predict(x: float32[b, 3]) -> float32[b, 2]"
    assert {*predict.weights} == {"b", "w"}  # and not what it does not use
    assert predict.platforms == (jax.export.default_export_platform(),)


def test_functions_refer_to_the_values_of_the_checkpoint_and_share_them(tmp_path):
    path = saved(
        tmp_path / "a",
        predict=(linear, spec("b, 3")),
        norm=(lambda obj: jnp.linalg.norm(obj["w"]),),
    )
    graph = ckpt.object_metadata(path)
    functions = message(path).concrete_functions
    paths = {
        name: {graph.paths[node] for node in each.bound_inputs} for name, each in functions.items()
    }
    assert paths == {"predict": {"b", "w"}, "norm": {"w"}}
    assert functions["predict"].exported_by == f"jax {jax.__version__}"
    np.testing.assert_allclose(
        ckpt.load_function(path, "norm")(), np.linalg.norm(TREE["w"]), rtol=1e-6
    )


def test_an_artifact_holds_no_weights(tmp_path):
    big = {"w": jax.random.normal(jax.random.key(0), (300, 300)), "b": jnp.ones(300)}
    path = saved(tmp_path / "a", big, predict=(linear, spec("b, 300")))
    assert len(part(path, "_FUNCTION/predict")) < 10_000 < big["w"].nbytes


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def evaluated(model, x):
    model.eval()
    return model(x)


def test_a_module_runs_although_its_function_changes_it(tmp_path):
    model = Net(nnx.Rngs(0))
    x = np.ones((4, 3), np.float32)
    trained = model(x)  # and so the statistics of the norm are no longer the first ones
    assert trained.shape == (4, 2)
    path = ckpt.save_object(
        model,
        tmp_path / "a",
        functions={
            "predict": (evaluated, spec("b, 3")),
            "train": (lambda model, x: model(x), spec("b, 3")),
        },
    )
    assert model.drop.deterministic is False  # the program's own module is as it was
    predict, train = (ckpt.load_function(path, name) for name in ("predict", "train"))
    assert any("norm/mean" in path for path in predict.weights)
    expected = evaluated(model, x)
    np.testing.assert_allclose(predict(x), expected, rtol=1e-5)
    assert train(x).shape == (4, 2)


def test_objects_of_several_kinds_in_one(tmp_path):
    @struct.dataclass
    class State:
        w: jax.Array
        steps: int = struct.field(pytree_node=False, default=3)

    obj = ckpt.AutoTrackable()
    obj.state = State(jnp.arange(3.0))
    obj.box = ckpt.Variable(jnp.float32(2))
    obj.layers = [ckpt.Variable(jnp.ones(3)), {"m": nnx.Linear(3, 1, rngs=nnx.Rngs(0))}]
    obj.factor = 5  # configuration is a constant

    def fn(obj, x):
        first, rest = obj.layers
        x = x * obj.state.w * obj.box.value + first.value
        return rest["m"](x) * obj.factor * obj.state.steps

    path = ckpt.save_object(obj, tmp_path / "a", functions={"f": (fn, spec((2, 3)))})
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_allclose(ckpt.load_function(path, "f")(x), fn(obj, x), rtol=1e-5)
    np.testing.assert_allclose(ckpt.load_object(path).functions["f"](x), fn(obj, x), rtol=1e-5)


def test_keys_and_tied_arrays_and_arrays_of_numpy_are_weights(tmp_path):
    w = jnp.ones((2, 2))
    obj = {"rng": jax.random.key(3), "a": w, "b": [w], "n": np.arange(2.0)}

    def fn(obj, x):
        noise = jax.random.normal(obj["rng"], (2,))
        return x @ obj["a"] @ obj["b"][0] + noise + obj["n"]

    predict = ckpt.load_function(saved(tmp_path / "a", obj, f=(fn, spec((2,)))), "f")
    assert {*predict.weights} == {"a", "n", "rng"}
    x = jnp.ones(2)
    np.testing.assert_allclose(predict(x), fn(obj, x), rtol=1e-6)


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


@struct.dataclass
class Result:
    loss: jax.Array
    extra: dict


def test_arguments_and_results_are_trees_and_other_classes_are_dicts(tmp_path):
    def fn(obj, batch, scale, options):
        error = (batch.x @ obj["w"] - batch.y) * scale
        return Result(jnp.mean(error**2), {"error": [error, None], "k": options["k"]})

    specs = (Batch(spec("b, 3"), spec("b, 2")), 2.0, {"k": spec((), "int32")})
    path = saved(tmp_path / "a", f=(fn, *specs))
    f = ckpt.load_function(path, "f")
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    for batch in ({"y": y, "x": x}, Batch(x, y)):
        out = f(batch, np.float32(2), {"k": np.int32(7)})
        assert out.keys() == {"loss", "extra"} and out["extra"]["k"] == 7
        assert type(out["extra"]["error"]) is list and out["extra"]["error"][1] is None
        np.testing.assert_allclose(out["loss"], fn(TREE, Batch(x, y), 2, {"k": 7}).loss)
    again = f(batch, options={"k": np.int32(1)}, scale=np.float32(1))
    assert again["extra"]["k"] == 1


# --- weights ---------------------------------------------------------------------------


def test_the_functions_of_an_object_take_the_values_that_it_has(tmp_path):
    obj = ckpt.AutoTrackable()
    obj.w = ckpt.Variable(jnp.ones(3))
    obj.parts = {"b": jnp.zeros(3)}
    fn = (lambda obj, x: obj.w.value * x + obj.parts["b"], spec((3,)))
    anew = ckpt.load_object(ckpt.save_object(obj, tmp_path / "a", functions={"f": fn}))
    f, x = anew.functions["f"], jnp.ones(3)
    assert f(x).tolist() == [1, 1, 1]
    anew.w.assign(jnp.full(3, 5.0))
    anew.parts = {"b": jnp.ones(3)}
    assert f(x).tolist() == [6, 6, 6]
    again = ckpt.load_object(ckpt.save_object(anew, tmp_path / "b"))  # they are no state
    assert again.w.value.tolist() == [5, 5, 5] and not hasattr(again, "functions")


@pytest.mark.parametrize("tree", [{"w": jnp.ones(2)}, [jnp.ones(2)], (jnp.ones(2),)])
def test_containers_have_functions_and_stay_what_they_are_for_jax(tmp_path, tree):
    fn = (lambda tree, x: jax.tree.leaves(tree)[0] * x, spec((2,)))
    anew = ckpt.load_object(ckpt.save_object(tree, tmp_path / "a", functions={"f": fn}))
    assert anew.functions["f"](jnp.ones(2)).tolist() == [1, 1]
    assert jax.tree.leaves(anew)[0].tolist() == [1, 1]
    assert isinstance(anew, type(tree))
    assert type(jax.tree.map(lambda x: x, anew)) is type(tree)
    assert ckpt.load(ckpt.save(tmp_path / "b", anew)).__class__ is type(tree)


def test_newer_weights_of_the_same_object(tmp_path):
    predict = ckpt.load_function(saved(tmp_path / "a"), "predict")
    newer = jax.tree.map(lambda x: x + 1, TREE)
    x = np.ones((2, 3), np.float32)
    expected = linear(newer, x)
    np.testing.assert_allclose(predict.with_weights(newer)(x), expected)
    path = ckpt.save(tmp_path / "b", newer)
    np.testing.assert_allclose(predict.with_weights(path)(x), expected)
    path = ckpt.Checkpoint(model=newer).save(tmp_path / "ckpt")
    moved = predict.with_weights(path, rename=[("model/**", "**")])
    np.testing.assert_allclose(moved(x), expected)
    np.testing.assert_allclose(predict(x), linear(TREE, x))  # that one keeps its own
    path = ckpt.export(newer, tmp_path / "c.safetensors", format="safetensors")
    np.testing.assert_allclose(predict.with_weights(path)(x), expected)


def test_weights_that_were_cast_on_save_are_cast_back(tmp_path):
    tree = {"net": {"w": jnp.arange(6.0).reshape(3, 2) / 7, "b": np.linspace(0, 1, 2)}, "n": 2}
    newer = jax.tree.map(lambda x: x * 3, tree)
    options = ckpt.CheckpointOptions(cast_on_save=[("net/**", jnp.bfloat16)])

    def fn(tree, x):  # which says what dtype it computes with
        assert tree["net"]["w"].dtype == x.dtype == jnp.float32
        return x @ tree["net"]["w"] + tree["net"]["b"]

    def rounded(tree):
        return jax.tree.map(lambda x: np.float32(np.asarray(x, jnp.bfloat16)), tree)

    functions, x = {"f": (fn, spec("b, 3"))}, np.ones((2, 3), np.float32)
    as_it_is = ckpt.save(tmp_path / "new", newer)
    as_cast = ckpt.save(tmp_path / "cast", newer, options=options)
    for name, saved_with in (("a", None), ("b", options)):
        path = ckpt.save_object(tree, tmp_path / name, functions=functions, options=saved_with)
        f = ckpt.load_function(path, "f")
        np.testing.assert_allclose(f(x), fn(rounded(tree) if saved_with else tree, x), rtol=1e-6)
        for source, expected in ((newer, newer), (as_it_is, newer), (as_cast, rounded(newer))):
            fed = f.with_weights(source)
            np.testing.assert_allclose(fed(x), fn(expected, x), rtol=1e-6)
            assert {value.dtype for value in fed._values()} == {np.dtype("float32")}
        anew = ckpt.load_object(path)
        np.testing.assert_allclose(anew.functions["f"](x), f(x), rtol=1e-6)
        np.testing.assert_allclose(f.with_weights(anew)(x), f(x), rtol=1e-6)
    # Of values that nobody has cast, the function has to be told.
    narrow = ckpt.save(tmp_path / "narrow", jax.tree.map(jnp.bfloat16, newer))
    plain = ckpt.load_function(tmp_path / "a", "f")
    with pytest.raises(ckpt.RestoreMismatchError, match=r"(?s)net/w: expected float32.*ckpt\.Cast"):
        plain.with_weights(narrow)
    fed = plain.with_weights(narrow, rename=[("net/**", "net/**", ckpt.Cast())])
    np.testing.assert_allclose(fed(x), fn(rounded(newer), x), rtol=1e-6)


def test_a_weight_at_several_places_has_one_value_or_is_refused(tmp_path):
    w = jnp.eye(3)
    fn = (lambda tree, x: x @ tree["a"] @ tree["b"], spec("n, 3"))
    x = np.ones((1, 3), np.float32)
    path = saved(tmp_path / "a", {"a": w, "b": w}, f=fn)
    f = ckpt.load_function(path, "f")
    assert f.weights == ("a",)
    apart = {"a": w * 2, "b": w * 3}
    alike = {"a": w * 2, "b": np.asarray(w * 2)}  # two arrays, as safetensors has them
    for number, (newer, fits) in enumerate([(alike, True), (apart, False)]):
        for source in (newer, ckpt.save(tmp_path / f"new{number}", newer)):
            if fits:
                assert f.with_weights(source)(x).tolist() == [[4, 4, 4]]
                continue
            with pytest.raises(ckpt.RestoreMismatchError, match="a: one value .* a and b"):
                f.with_weights(source)
    anew = ckpt.load_object(path)
    g = anew.functions["f"]
    assert g(x).tolist() == [[1, 1, 1]]
    anew["b"] = w * 3
    with pytest.raises(ckpt.RestoreMismatchError, match="a: one value .* a and b"):
        g(x)
    anew["a"] = w * 3
    assert g(x).tolist() == [[9, 9, 9]]


def test_what_an_edited_object_lacks_is_named(tmp_path):
    tree = {"deep": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "n": jnp.ones(2)}

    def fn(tree, x):
        return x @ tree["deep"]["w"] + tree["deep"]["b"] + tree["n"]

    anew = ckpt.load_object(saved(tmp_path / "a", tree, f=(fn, spec("b, 3"))))
    f, x = anew.functions["f"], np.ones((1, 3), np.float32)
    anew["deep"] = {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}
    assert f(x).tolist() == [[2, 2]]
    anew["deep"] = {"w": jnp.zeros((3, 4))}
    anew["n"] = "text"
    with pytest.raises(TypeError) as raised:
        f(x)
    text = str(raised.value)
    assert r"deep/w: expected float32[3, 2], got float32[3, 4]" in text
    assert "deep/b: expected float32[2], got no array" in text
    assert "n: expected float32[2], got no array" in text


@pytest.mark.parametrize("root", [np.arange(3.0), jnp.arange(3.0), 2.5, jnp.float32(2)])
def test_roots_that_are_no_containers(tmp_path, root):
    fn = (lambda root, x: x * root, spec((3,)))
    path = ckpt.save_object(root, tmp_path / "a", functions={"f": fn})
    x = np.ones(3, np.float32)
    np.testing.assert_allclose(ckpt.load_function(path, "f")(x), root * x)
    np.testing.assert_allclose(ckpt.load_object(path), root)


def test_integers_that_do_not_fit_are_named_and_never_wrapped(tmp_path):
    tree = {"n": np.array([5, 2**40])}
    path = saved(tmp_path / "a", tree, f=(lambda tree, x: x + tree["n"], spec((2,), "int32")))
    with pytest.raises(LossyConversionError, match="n: 1099511627776 does not fit into int32"):
        ckpt.load_function(path, "f")
    with pytest.raises(LossyConversionError, match="1099511627776 does not fit into int32"):
        ckpt.load_object(path).functions["f"](np.zeros(2, np.int32))


def test_weights_that_do_not_fit_are_named_together(tmp_path):
    predict = ckpt.load_function(saved(tmp_path / "a"), "predict")
    other = {"w": jnp.zeros((4, 2)), "bias": jnp.ones(2)}
    for source in (other, ckpt.save(tmp_path / "b", other)):
        with pytest.raises(ckpt.RestoreMismatchError) as raised:
            predict.with_weights(source)
        text = str(raised.value)
        assert "float32[3, 2]" in text and "float32[4, 2]" in text
        assert [entry.path for entry in raised.value.report.missing] == ["b"]


def test_weights_are_placed_as_asked(tmp_path, mesh8):
    w = jnp.arange(64.0).reshape(8, 8)
    path = saved(tmp_path / "a", {"w": w}, f=(lambda obj, x: x @ obj["w"], spec("b, 8")))
    rows = NamedSharding(mesh8, P("data"))
    for sharding in (rows, lambda path, struct: rows, {"w": rows}):
        f = ckpt.load_function(path, "f", sharding=sharding)
        (placed,) = f._values()
        assert placed.sharding.is_equivalent_to(rows, 2)
        x = np.ones((4, 8), np.float32)
        np.testing.assert_allclose(f(x), x @ w)
    with pytest.raises(ckpt.RestoreMismatchError, match="Pass a sharding"):
        ckpt.load_function(path, "f", sharding={"v": rows})


def test_an_object_is_placed_as_asked(tmp_path, mesh8):
    obj = ckpt.AutoTrackable()
    obj.w = ckpt.Variable(jnp.arange(64.0).reshape(8, 8))
    obj.parts = {"b": jnp.zeros(8), "n": np.zeros(8)}
    rows = NamedSharding(mesh8, P("data"))
    fn = (lambda obj, x: x @ obj.w.value + obj.parts["b"], spec("b, 8"))
    path = ckpt.save_object(obj, tmp_path / "a", functions={"f": fn})
    for sharding in (rows, {"w": rows, "parts": {"b": rows}}):
        anew = ckpt.load_object(path, sharding=sharding)
        for array in (anew.w.value, anew.parts["b"]):
            assert array.sharding.is_equivalent_to(rows, array.ndim)
        x = np.ones((4, 8), np.float32)
        np.testing.assert_allclose(anew.functions["f"](x), x @ obj.w.value)
    with pytest.raises(ckpt.RestoreMismatchError):
        ckpt.load_object(path, sharding=NamedSharding(mesh8, P(None, "data")))


# --- what is refused -------------------------------------------------------------------


def test_arguments_of_another_signature_are_named_together(tmp_path):
    fn = (lambda obj, x, y: x["a"] @ obj["w"] + y[0], {"a": spec("b, 3")}, [spec("b, 2")])
    f = ckpt.load_function(saved(tmp_path / "a", f=fn), "f")
    ok, y = np.ones((2, 3), np.float32), np.ones((2, 2), np.float32)
    for arguments, why in [
        (({"a": ok},), "was called with 1 arguments"),
        (({"a": ok}, [y], y), "was called with 3 arguments"),
        (({"b": ok}, [y]), "x: expected .* got a dict with the keys 'b'"),
        (({"a": ok[:, :2]}, [y]), r"x/a: expected float32\[b, 3\], got float32\[2, 2\]"),
        (({"a": ok.astype(int)}, [y, y]), r"(?s)x/a: expected .*y: expected .* got a list of 2"),
        (({"a": "text"}, [y]), "str is no array"),
    ]:
        with pytest.raises(TypeError, match=why):
            f(*arguments)
    with pytest.raises(TypeError, match="arguments and z"):
        f({"a": ok}, z=[y])
    with pytest.raises(ValueError, match="b"):  # the sizes differ
        f({"a": ok}, [y[:1]])


def test_a_function_for_another_platform_says_which_ones_it_has(tmp_path):
    path = ckpt.save_object(
        TREE,
        tmp_path / "a",
        functions={"f": (linear, spec("b, 3"))},
        platforms=("cuda", "tpu"),
    )
    f = ckpt.load_function(path, "f")
    assert f.platforms == ("cuda", "tpu")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"compiled for cuda, tpu, .* runs on cpu.*'cpu'\)"):
            f(np.ones((1, 3), np.float32))


@pytest.mark.parametrize("platforms", ["cpu", (), ["cpu", "gpu"], ("abacus",), 3, {"cpu": 1}])
def test_platforms_that_jax_does_not_have_are_refused(tmp_path, platforms):
    with pytest.raises((TypeError, ValueError), match="platforms: expected"):
        functions = {"f": (linear, spec("b, 3"))}
        ckpt.save_object(TREE, tmp_path / "a", functions=functions, platforms=platforms)
    assert not (tmp_path / "a").exists()


def test_sizes_that_break_a_constraint_are_said(tmp_path):
    b, t = jax.export.symbolic_shape("b, t", constraints=["t>=2"])
    x = jax.ShapeDtypeStruct((b, t, 3), "float32")
    path = saved(tmp_path / "a", f=(lambda tree, x: (x @ tree["w"])[:, :-1], x))
    f = ckpt.load_function(path, "f")
    assert f(jnp.ones((2, 4, 3))).shape == (2, 3, 2)
    with pytest.raises(ValueError) as raised:
        f(jnp.ones((2, 1, 3)))
    assert any("t, 3]" in note and "float32[2, 1, 3]" in note for note in raised.value.__notes__)


def test_a_function_that_holds_weights_is_refused_with_all_others(tmp_path):
    w, table = jnp.arange(6.0).reshape(3, 2), jnp.ones((1000, 1000))
    obj = {"w": w}
    functions = {
        "captured": (lambda obj, x: x @ w, spec("b, 3")),
        "table": (lambda obj, x: (x @ obj["w"]).sum() * table, spec("b, 3")),
        "broken": (lambda obj, x: obj["nothing"], spec("b, 3")),
        "fine": (lambda obj, x: x @ obj["w"], spec("b, 3")),
        "text": (lambda obj, x: "text", spec("b, 3")),
        "argument": (lambda obj, x: x, "text"),
    }
    with pytest.raises(ckpt.UnsaveableError) as raised:
        ckpt.save_object(obj, tmp_path / "a", functions=functions)
    problems = dict(raised.value.problems)
    assert problems.keys() == functions.keys() - {"fine"}
    assert "holds w (float32[3, 2]) as a constant" in problems["captured"]
    assert "float32[1000, 1000] that is no part of the object" in problems["table"]
    assert "KeyError" in problems["broken"] and "str is no array" in problems["text"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "functions", [[linear], {"f": linear}, {"f": ()}, {1: (linear,)}, {"": (linear,)}]
)
def test_what_are_no_functions_is_refused(tmp_path, functions):
    with pytest.raises(TypeError, match="expected {name: "):
        ckpt.save_object(TREE, tmp_path / "a", functions=functions)


def test_an_unknown_function_names_those_that_there_are(tmp_path):
    path = saved(tmp_path / "a")
    with pytest.raises(KeyError, match=r"no function 'predcit'.*nearest.*predict"):
        ckpt.load_function(path, "predcit")
    with pytest.raises(ckpt.CheckpointError, match="has no functions"):
        ckpt.load_function(ckpt.save(tmp_path / "b", TREE), "predict")
    with pytest.raises(ckpt.CheckpointError, match="has no functions"):
        ckpt.load_function(ckpt.save_object(TREE, tmp_path / "c"), "predict")


def changed(path, change):
    found = message(path)
    change(found)
    found.checksum = 0
    replace_part(path, SAVED_OBJECTS_KEY, seal(found.SerializeToString(deterministic=True)))


def test_a_calling_convention_of_another_jax_says_what_jax_promises(tmp_path):
    path = saved(tmp_path / "a")
    changed(path, lambda m: setattr(m.concrete_functions["predict"], "calling_convention", 99))
    for load in (ckpt.load_function, lambda path, name: ckpt.load_object(path)):
        with pytest.raises(ckpt.UnsupportedFormatError) as raised:
            load(path, "predict")
        text = str(raised.value)
        assert "convention 99" in text and "6 months" in text and jax.__version__ in text


def test_an_artifact_that_jax_cannot_read_says_so_too(tmp_path):
    path = saved(tmp_path / "a")
    replace_part(path, "_FUNCTION/predict", seal(b"no artifact"))
    with pytest.raises(ckpt.UnsupportedFormatError, match="cannot be read.*6 months"):
        ckpt.load_function(path, "predict")


def test_damage_is_found_by_verify_and_named(tmp_path):
    path = saved(tmp_path / "a")
    assert ckpt.verify(path).ok
    replace_part(path, "_FUNCTION/predict", b"damaged")
    assert [problem.key for problem in ckpt.verify(path).problems] == ["_FUNCTION/predict"]
    with pytest.raises(ckpt.CorruptCheckpointError, match="_FUNCTION/predict"):
        ckpt.load_function(path, "predict")


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.bound_inputs.append(99),
        lambda f: f.bound_inputs.append(-1),
        lambda f: f.bound_inputs.append(0),
        lambda f: setattr(f, "artifact", ""),
        lambda f: setattr(f, "artifact", "_FUNCTION/other"),
        lambda f: setattr(f, "canonicalized_input_signature", b"[]"),
        lambda f: setattr(f, "canonicalized_input_signature", b"\xff"),
        lambda f: setattr(f, "output_signature", b'{"signature": ["array", "f", []], "names": []}'),
    ],
)
def test_records_that_contradict_the_checkpoint_are_refused(tmp_path, change):
    path = saved(tmp_path / "a")
    changed(path, lambda m: change(m.concrete_functions["predict"]))
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load_function(path, "predict")


# --- without the code ------------------------------------------------------------------


PROGRAM = """
import sys
import numpy as np
import ckpt_jax as ckpt
path = sys.argv[1]
x = np.ones((2, 3), np.float32)
print(ckpt.load_function(path, "predict")(x).tolist())
try:
    ckpt.load_object(path)
except ckpt.RegistrationError as error:
    print("load_function" in str(error))
print([name for name in ("flax", "optax") if name in sys.modules])
"""


def test_a_fresh_program_without_flax_and_the_class_runs_it(tmp_path):
    with ckpt.registration_scope():

        @ckpt.register_serializable()
        class Model(ckpt.AutoTrackable):
            def __init__(self):
                self.net = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

        model = Model()
        x = np.ones((2, 3), np.float32)
        fn = (lambda model, x: model.net(x), spec("b, 3"))
        path = ckpt.save_object(model, tmp_path / "a", functions={"predict": fn})
        expected = model.net(x).tolist()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    first, said, modules = run.stdout.splitlines()
    np.testing.assert_allclose(eval(first), expected, rtol=1e-6)
    assert (said, modules) == ("True", "[]")


def test_a_copy_and_a_conversion_have_the_functions(tmp_path):
    path = saved(tmp_path / "a")
    x = np.ones((2, 3), np.float32)
    cast = ckpt.CheckpointOptions(compression="zstd", cast_on_save=[("w", jnp.bfloat16)])
    for other in (
        ckpt.copy(path, tmp_path / "copy"),
        ckpt.convert(path, tmp_path / "own"),
        ckpt.convert(path, tmp_path / "small", options=cast),
    ):
        np.testing.assert_allclose(ckpt.load_function(other, "predict")(x), linear(TREE, x))
        np.testing.assert_allclose(ckpt.load_object(other).functions["predict"](x), linear(TREE, x))
        assert ckpt.verify(other).ok
    renamed = ckpt.convert(path, tmp_path / "renamed", rename=[("w", "v")])
    with pytest.raises(ckpt.CheckpointError, match="has no functions"):
        ckpt.load_function(renamed, "predict")


def test_an_optimizer_beside_the_model_is_neither_read_nor_needed(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = {"w": jnp.ones((3, 2))}
    tree = {"params": params, "opt_state": optax.adam(1e-3).init(params)}
    del model
    path = saved(tmp_path / "a", tree, f=(lambda t, x: x @ t["params"]["w"], spec("b, 3")))
    assert ckpt.load_function(path, "f").weights == ("params/w",)


def test_a_signature_is_what_dataclasses_say_too(tmp_path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Point:
        x: jax.Array

    f = ckpt.load_function(
        saved(tmp_path / "a", f=(lambda obj, p: Point(p.x @ obj["w"]), Point(spec("b, 3")))), "f"
    )
    assert f.signature == "f(p: {'x': float32[b, 3]}) -> {'x': float32[b, 2]}"
    assert repr(f) == f"<LoadedFunction {f.signature}>"
