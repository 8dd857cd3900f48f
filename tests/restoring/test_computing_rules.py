"""Rules that compute: several values into one, one into several, there and back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import size_of
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.derived import DerivedReader
from ckpt_jax.restoring.rename import rename

RNG = np.random.default_rng(3)


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def abstract(*shape, dtype=np.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def problems(path, target, *rules):
    return [entry.what for entry in ckpt.plan_restore(path, target, rename=rules).mismatched]


@pytest.fixture
def attention(tmp_path):
    """Three layers of an attention with more queries than keys and values."""
    layers = {str(i): {"q": array(8, 6), "k": array(4, 6), "v": array(4, 6)} for i in range(3)}
    return ckpt.save(tmp_path / "attention", {"layers": layers}), layers


QKV = ("layers/*/q", "layers/*/k", "layers/*/v")


def test_several_values_of_each_layer_become_one(attention):
    path, layers = attention
    rule = (QKV, "layers/*/qkv", ckpt.Transpose(), ckpt.Concat(axis=1))
    target = {"layers": {str(i): {"qkv": abstract(6, 16)} for i in range(3)}}
    found = ckpt.restore(path, target, rename=[rule])
    for number, layer in layers.items():
        expected = np.concatenate([layer[name].T for name in "qkv"], 1)
        np.testing.assert_array_equal(found["layers"][number]["qkv"], expected)


def test_one_value_becomes_several(tmp_path):
    w = array(4, 12)
    path = ckpt.save(tmp_path / "a", {"qkv": {"w": w}, "kv": array(10)})
    target = {name: abstract(4, 4) for name in "qkv"}
    rules = [("qkv/w", ("q", "k", "v"), ckpt.Split(axis=1)), ("kv", "kv_*", ckpt.Split(0, (3, 7)))]
    found = ckpt.restore(path, {**target, "kv_0": abstract(3), "kv_1": abstract(7)}, rename=rules)
    for name, part in zip("qkv", np.split(w, 3, 1), strict=True):
        np.testing.assert_array_equal(found[name], part)
    report = ckpt.plan_restore(path, target, rename=rules)
    places = {entry.path: entry.saved_path for entry in report.renamed}
    assert [places[name] for name in ("q", "k", "kv_1")] == [
        "qkv/w[:, 0:4]",
        "qkv/w[:, 4:8]",
        "kv[3:10]",
    ]


def test_members_are_joined_and_layers_stacked_and_both_undone(attention, tmp_path):
    path, layers = attention
    rule = (QKV, "qkv", ckpt.Transpose(), ckpt.Concat(1, sizes=(8, 4, 4)), ckpt.Stack())
    found = ckpt.restore(path, {"qkv": abstract(3, 6, 16)}, rename=[rule])
    expected = [np.concatenate([layers[str(i)][n].T for n in "qkv"], 1) for i in range(3)]
    np.testing.assert_array_equal(found["qkv"], np.stack(expected))
    back = ckpt.save(tmp_path / "back", found)
    target = {"layers": jax.tree.map(jnp.zeros_like, layers)}
    again = ckpt.restore(back, target, rename=ckpt.inverse([rule]))
    jax.tree.map(np.testing.assert_array_equal, again["layers"], layers)


def test_two_stacks_stack_the_members_first(attention):
    path, layers = attention
    rules = [(QKV[1:], "kv", ckpt.Stack(), ckpt.Stack()), (QKV[0], "q", ckpt.Stack())]
    target = {"kv": abstract(3, 2, 4, 6), "q": abstract(3, 8, 6)}
    found = ckpt.restore(path, target, rename=rules)
    expected = np.stack([np.stack([layers[str(i)][n] for n in "kv"]) for i in range(3)])
    np.testing.assert_array_equal(found["kv"], expected)
    (undone, _) = ckpt.inverse(rules)
    assert undone == ("kv", QKV[1:], ckpt.Unstack(), ckpt.Unstack())


def test_shards_that_are_numbered_are_joined(tmp_path):
    shards = [array(n, 2) for n in (3, 1, 2)]
    path = ckpt.save(tmp_path / "a", {f"shard_{i}": shard for i, shard in enumerate(shards)})
    found = ckpt.restore(path, {"w": abstract(6, 2)}, rename=[("shard_*", "w", ckpt.Concat())])
    np.testing.assert_array_equal(found["w"], np.concatenate(shards))


def test_members_that_no_step_joins_keep_their_places(attention):
    path, layers = attention
    rule = (QKV, ("q", "k", "v"), ckpt.Stack(axis=1))
    target = {n: abstract(rows, 3, 6) for n, rows in zip("qkv", (8, 4, 4), strict=True)}
    found = ckpt.restore(path, target, rename=[rule])
    for name in "qkv":
        expected = np.stack([layers[str(i)][name] for i in range(3)], 1)
        np.testing.assert_array_equal(found[name], expected)


def test_a_function_of_several_values(tmp_path):
    tree = {"w": array(3, 2), "scale": array(3), "old": array(2)}
    path = ckpt.save(tmp_path / "a", tree)
    rules = [
        (("w", "scale"), "w", ckpt.Map(lambda w, scale: w * scale[:, None])),
        ("old", "new", ckpt.Map(lambda x: -x, elementwise=True)),
    ]
    found = ckpt.restore(path, {"w": abstract(3, 2), "new": abstract(2)}, rename=rules)
    np.testing.assert_array_equal(found["w"], tree["w"] * tree["scale"][:, None])
    np.testing.assert_array_equal(found["new"], -tree["old"])


def test_a_function_of_a_number(tmp_path):
    path = ckpt.save(tmp_path / "a", {"step": 7, "rate": 0.5, "name": "x"})
    rules = [
        ("step", "count", ckpt.Map(lambda step: step + 1)),
        ("rate", "rates", ckpt.Map(lambda rate: np.full(3, rate))),
    ]
    target = {"count": 0, "rates": np.zeros(3), "name": ""}
    found = ckpt.restore(path, target, rename=rules)
    assert found["count"] == 8 and type(found["count"]) is int
    assert found["rates"].tolist() == [0.5] * 3
    (what,) = problems(path, {**target, "step": 0}, ("name", "n", ckpt.Map(str)))
    assert "needs arrays, and found str" in what


def test_quantized_weights_become_floats(tmp_path):
    tree = {"w": np.int8([[1, 2], [3, -4]]), "w_scale": np.float32([0.5, 2])}
    path = ckpt.save(tmp_path / "a", {"layers": {"0": tree, "1": tree}})
    rule = (("layers/*/w", "layers/*/w_scale"), "w", ckpt.Dequantize(), ckpt.Stack())
    found = ckpt.restore(path, {"w": abstract(2, 2, 2)}, rename=[rule])
    np.testing.assert_array_equal(found["w"], np.stack([[[0.5, 1], [6, -8]]] * 2))


# --- only the bytes that are needed ----------------------------------------------------


class Counting(CheckpointReader):
    """Counts the bytes of the boxes that are asked for."""

    def read_boxes(self, wanted, options):
        sizes = [size_of(box) for boxes in wanted.values() for box in boxes]
        self.asked = getattr(self, "asked", 0) + 4 * sum(sizes)
        return super().read_boxes(wanted, options)


def read(path, target, rules):
    """The values of a restore by path, and how many bytes of the checkpoint are asked for."""
    with Counting(path) as reader:
        saved = rename(reader.object_graph, rules)
        assert not saved.problems
        paths = {a.key: saved.graph.paths[node] for node, a in saved.graph.attributes()}
        requests = {key: target[path] for key, path in paths.items() if path in target}
        derived = DerivedReader(reader, saved.derived)
        values = derived.read(requests, ckpt.CheckpointOptions(), lambda nbytes: None)
        assert sum(map(derived.stored_nbytes, values)) == reader.asked
        return {paths[key]: value for key, value in values.items()}, reader.asked


def test_only_what_a_device_needs_is_read(tmp_path, mesh8):
    w = array(64, 96)
    path = ckpt.save(tmp_path / "a", {"w": w, "k": w, "v": w + 1})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    part = {"w": abstract(64, 12, sharding=one)}
    found, nbytes = read(path, part, [("w", "w", ckpt.Slice([None, (12, 24)]))])
    np.testing.assert_array_equal(found["w"], w[:, 12:24])
    assert nbytes == w[:, 12:24].nbytes
    found, nbytes = read(
        path, {"b": abstract(64, 32, sharding=one)}, [("w", ("a", "b", "c"), ckpt.Split(1))]
    )
    np.testing.assert_array_equal(found["b"], w[:, 32:64])
    assert nbytes == w.nbytes // 3
    # Heads that lie on eight devices: all of them together read each byte once.
    heads = NamedSharding(mesh8, PartitionSpec(None, mesh8.axis_names[0]))
    target = {"kv": abstract(64, 16, 12, sharding=heads)}
    rule = (("k", "v"), "kv", ckpt.Reshape((64, 8, 12)), ckpt.Concat(axis=1))
    found, nbytes = read(path, target, [rule])
    expected = np.concatenate([w.reshape(64, 8, 12), (w + 1).reshape(64, 8, 12)], 1)
    np.testing.assert_array_equal(found["kv"], expected)
    assert nbytes == 2 * w.nbytes


def test_padding_reads_nothing_for_a_device_that_has_nothing_else(tmp_path, mesh8):
    w = array(8, 2)
    path = ckpt.save(tmp_path / "a", {"w": w})
    rows = NamedSharding(mesh8, PartitionSpec(mesh8.axis_names[0]))
    rules = [("w", "w", ckpt.Pad(((0, 56), (0, 0)), value=3))]
    found, nbytes = read(path, {"w": abstract(64, 2, sharding=rows)}, rules)
    np.testing.assert_array_equal(found["w"], np.pad(w, ((0, 56), (0, 0)), constant_values=3))
    assert nbytes == w.nbytes


def test_a_function_is_called_once_for_all_devices(tmp_path, mesh8):
    w, calls = array(16, 4), []

    def flipped(x):
        calls.append(type(x))
        return x[::-1]

    path = ckpt.save(tmp_path / "a", {"w": w})
    rows = NamedSharding(mesh8, PartitionSpec(mesh8.axis_names[0]))
    target = {"w": abstract(16, 4, sharding=rows)}
    found = ckpt.restore(path, target, rename=[("w", "w", ckpt.Map(flipped))])
    np.testing.assert_array_equal(found["w"], w[::-1])
    assert found["w"].sharding.is_equivalent_to(rows, 2)
    assert calls.count(np.ndarray) == 1


# --- there and back --------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_rule_and_its_inverse_give_what_was_saved(tmp_path_factory, data):
    layers, heads, size, width = (data.draw(st.integers(1, 3)) for _ in range(4))
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 3)))]
    tree = {str(i): {n: array(heads * size, width) for n in names} for i in range(layers)}
    steps = []
    if data.draw(st.booleans()):
        steps += [ckpt.Transpose(), ckpt.Reshape((-1, heads, size), saved=(-1, heads * size))]
    if data.draw(st.booleans()):
        steps.append(ckpt.Pad(((1, 2),) * (3 if steps else 2)))
    if data.draw(st.booleans()):
        steps.append(ckpt.Map(lambda x: x * 2, inverse=lambda x: x / 2))
    rank = 3 if any(isinstance(step, ckpt.Reshape) for step in steps) else 2
    shape = (width, heads, size) if rank == 3 else (heads * size, width)
    if any(isinstance(step, ckpt.Pad) for step in steps):
        shape = tuple(n + 3 for n in shape)
    if len(names) > 1:
        axis = data.draw(st.integers(-rank, rank - 1))
        if data.draw(st.booleans()):
            steps.append(ckpt.Concat(axis, sizes=(shape[axis],) * len(names)))
        else:
            steps.append(ckpt.Stack(axis))
            rank += 1
    steps.append(ckpt.Stack(data.draw(st.integers(-rank - 1, rank))))
    saved = tuple(f"layers/*/{name}" for name in names)
    rules = [(saved if len(names) > 1 else saved[0], "all", *steps)]
    directory = tmp_path_factory.mktemp("a")
    path = ckpt.save(directory / "a", {"layers": tree})
    out = ckpt.export(path, directory / "b.npz", format="npz", rename=rules)
    back = ckpt.export(out, directory / "c.npz", format="npz", rename=ckpt.inverse(rules))
    again = ckpt.load(back)["layers"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), again, tree)


def test_rules_without_an_inverse_are_named_together():
    rules = [
        ("a", "b", ckpt.Slice([(0, 1)])),
        (("a", "b"), "c", ckpt.Concat(0)),
        ("a/*", "b"),
        ("fine", "too", ckpt.Transpose(), ckpt.Cast("float16")),
    ]
    with pytest.raises(ValueError) as raised:
        ckpt.inverse(rules)
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 rename rules have no inverse:" and len(lines) == 4
    assert "'a' -> 'b'" in lines[1] and "('a', 'b') -> 'c'" in lines[2] and "'a/*'" in lines[3]
    assert ckpt.inverse(rules[3:]) == [("too", "fine", ckpt.Transpose())]
    with pytest.raises(ValueError, match="regular expression"):
        ckpt.inverse([(re.compile("a"), "b")])


# --- the state of optimizers -----------------------------------------------------------


def test_moments_go_through_the_steps_that_are_about_places(tmp_path):
    params = {"k": jnp.ones((2, 3)), "v": jnp.ones((2, 3))}
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    grads = {"k": jnp.full((2, 3), 2.0), "v": jnp.full((2, 3), 3.0)}
    _, state = optimizer.update(grads, state, params)
    path = ckpt.save(tmp_path / "a", {"p": params, "o": ckpt.optax_state(state, params)})
    new = {"kv": jnp.zeros((3, 5))}
    target = {"p": new, "o": ckpt.optax_state(optimizer.init(new), new)}
    steps = (ckpt.Transpose(), ckpt.Concat(axis=1), ckpt.Pad(((0, 0), (0, 1)), value=9))
    found = ckpt.restore(path, target, rename=[(("p/k", "p/v"), "p/kv", *steps)])
    mu = found["o"][0].mu["kv"]
    np.testing.assert_array_equal(found["p"]["kv"][:, 4], [9, 9, 9])
    np.testing.assert_allclose(mu, [[0.2, 0.2, 0.3, 0.3, 0]] * 3, rtol=1e-6)


def test_moments_are_split_with_their_parameter(tmp_path):
    model = nnx.Linear(2, 6, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    grads = nnx.grad(lambda model: (model(jnp.ones((1, 2))) * jnp.arange(6)).sum())(model)
    optimizer.update(model, grads)

    class Parts(nnx.Module):
        def __init__(self):
            for name in "qkv":
                setattr(self, name, nnx.Param(jnp.zeros((2, 2))))

    parts = Parts()
    its = nnx.Optimizer(parts, optax.adam(1e-3), wrt=nnx.Param)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    rule = ("model/kernel", ("model/q", "model/k", "model/v"), ckpt.Split(axis=1))
    status = ckpt.Checkpoint(model=parts, optimizer=its).read(path, rename=[rule])
    status.assert_consumed()
    np.testing.assert_array_equal(parts.k[...], model.kernel[...][:, 2:4])
    moments = {
        entry.path: entry.found
        for entry in ckpt.plan_restore(
            path, {"model": parts, "optimizer": its}, rename=[rule]
        ).restored
        if ".mu" in entry.path
    }
    assert len(moments) == 3
    mu = jax.tree.leaves(its.opt_state[0].mu["v"])[0]
    np.testing.assert_allclose(mu, [[0.4, 0.5]] * 2, rtol=1e-6)


def test_moments_that_cannot_follow_a_function_are_named(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).write(tmp_path / "a")
    rule = ("model/kernel", "model/kernel", ckpt.Map(jnp.exp))
    report = ckpt.plan_restore(path, {"model": model, "optimizer": optimizer}, rename=[rule])
    assert {entry.path.split("/")[1] for entry in report.missing} == {
        "ScaleByAdamState.mu",
        "ScaleByAdamState.nu",
    }
    assert all("need not hold for the state" in entry.what for entry in report.unexpected)
    assert len(report.unexpected) == 2


# --- problems --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ((("a", "b"), "c"), "no step joins them"),
        (("a", ("b", "c")), "no step makes them"),
        ((("a", "b"), ("c", "d")), "write a rule for each"),
        ((("a/*", "b"), "c", ckpt.Concat()), "same number of wildcards"),
        (("a", "b", ckpt.Dequantize()), "needs a tuple of patterns"),
        ((("a", "b"), "c", ckpt.Dequantize(), ckpt.Dequantize()), "stacks or unstacks twice"),
        ((("a", "b"), "c", ckpt.Transpose()), "no step joins them"),
        ((("a_*", "b_*"), "c", ckpt.Concat()), "no step joins them"),
    ],
)
def test_a_rule_that_does_not_lead_from_one_side_to_the_other_is_refused(attention, rule, why):
    with pytest.raises(ValueError, match=why):
        ckpt.plan_restore(attention[0], {}, rename=[rule])


def test_rules_that_do_not_fit_are_named_before_anything_is_read(attention):
    path, _ = attention
    whats = problems(
        path,
        {},
        ((QKV[0], QKV[1]), "x", ckpt.Concat(axis=1), ckpt.Stack()),
        ((QKV[2], "layers/*/o"), "y", ckpt.Concat(axis=1), ckpt.Stack()),
    )
    assert any("differ along axis 1 alone" in what for what in whats)
    assert any(what.startswith("'layers/*/o' of the rename rule") for what in whats)
    with pytest.raises(ckpt.RestoreMismatchError, match=r"x: cannot be made of layers/0/q \.\.\. "):
        ckpt.restore(
            path, {"x": abstract(1)}, rename=[(QKV[:2], "x", ckpt.Concat(1), ckpt.Stack())]
        )


def test_a_group_that_lacks_a_member_is_named(tmp_path):
    path = ckpt.save(
        tmp_path / "a", {"l": {"0": {"k": array(2), "v": array(2)}, "1": {"k": array(2)}}}
    )
    (what, *_) = problems(path, {}, (("l/*/k", "l/*/v"), "kv/*", ckpt.Concat()))
    assert what.startswith("is made of l/1/v, too, which the checkpoint lacks")
    (what, *_) = problems(path, {}, (("l/*/k", "l/*/v"), "kv", ckpt.Concat(), ckpt.Stack()))
    assert "l/1/v" in what


def test_an_export_needs_to_know_the_dtype(tmp_path):
    tree = {"a": array(2)}
    with pytest.raises(ckpt.RestoreMismatchError, match=r"b: Cast\(\) has no target.*write Cast"):
        ckpt.export(tree, tmp_path / "a.npz", format="npz", rename=[("a", "b", ckpt.Cast())])
    assert not (tmp_path / "a.npz").exists()


def test_the_slice_of_a_rule_and_the_slice_of_a_saver_are_two_things(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": np.arange(6)})
    found = ckpt.restore(path, {"w": np.zeros(2, int)}, rename=[("w", "w", ckpt.Slice([(2, 4)]))])
    np.testing.assert_array_equal(found["w"], [2, 3])
    prefix = str(tmp_path / "shard")
    part = ckpt.io.Slice(np.arange(2), ((2, 4),), (6,))
    ckpt.io.write_shard(prefix, {"w": part})
    assert ckpt.Slice is not ckpt.io.Slice
