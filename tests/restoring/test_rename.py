"""Rename rules: values that moved, and changed their shape on the way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.rename import slot_groups

RNG = np.random.default_rng(7)
LAYERS = [RNG.normal(size=(4, 6)).astype(np.float32) for _ in range(12)]


def abstract(*shape, dtype=np.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.fixture
def layered(tmp_path):
    """Twelve layers by name, so that their names sort otherwise than their numbers."""
    tree = {f"layers_{i}": {"kernel": jnp.array(w), "bias": w[0]} for i, w in enumerate(LAYERS)}
    return ckpt.save(tmp_path / "layered", {"model": tree, "step": 3})


@pytest.fixture
def scanned(tmp_path):
    stacked = np.stack(LAYERS)
    tree = {"layers": {"kernel": jnp.array(stacked), "bias": jnp.array(stacked[:, 0])}}
    return ckpt.save(tmp_path / "scanned", {"model": tree, "step": 3})


def problems(path, target, rules):
    return [entry.what for entry in ckpt.plan_restore(path, target, rename=rules).mismatched]


# --- stack and unstack -----------------------------------------------------------------


def test_layers_by_number_become_one_scanned_layer(layered):
    target = {"model": {"layers": {"kernel": abstract(12, 4, 6), "bias": np.zeros((12, 6), "f4")}}}
    rules = [("model/layers_*/*", "model/layers/*", ckpt.Stack())]
    found = ckpt.restore(layered, {**target, "step": 0}, rename=rules)
    layers = found["model"]["layers"]
    np.testing.assert_array_equal(layers["kernel"], np.stack(LAYERS), strict=True)
    np.testing.assert_array_equal(layers["bias"], np.stack(LAYERS)[:, 0], strict=True)
    assert isinstance(layers["kernel"], jax.Array) and isinstance(layers["bias"], np.ndarray)
    assert found["step"] == 3


def test_one_scanned_layer_becomes_layers_by_number(scanned):
    target = {f"layers_{i}": {"kernel": abstract(4, 6), "bias": abstract(6)} for i in range(12)}
    rules = [("model/layers/*", "model/layers_*/*", ckpt.Unstack())]
    found = ckpt.restore(scanned, {"model": target, "step": 0}, rename=rules)["model"]
    for i, w in enumerate(LAYERS):
        np.testing.assert_array_equal(found[f"layers_{i}"]["kernel"], w)
        np.testing.assert_array_equal(found[f"layers_{i}"]["bias"], w[0])


def test_stacking_and_unstacking_undo_each_other_along_any_axis(layered, tmp_path):
    for axis in (-1, 0, 1, 2):
        stacked = np.stack(LAYERS, axis)
        target = {"w": abstract(*stacked.shape)}
        rule = ("model/layers_*/kernel", "w", ckpt.Stack(axis))
        found = ckpt.restore(layered, target, rename=[rule], strict=False)
        np.testing.assert_array_equal(found["w"], stacked)
        path = ckpt.save(tmp_path / f"axis{axis}", found)
        target = [abstract(4, 6) for _ in LAYERS]
        again = ckpt.restore(path, target, rename=[("w", "*", ckpt.Unstack(axis))])
        np.testing.assert_array_equal(again, LAYERS)


def test_a_target_with_fewer_layers_leaves_the_rest_unexpected(scanned):
    target = {f"layers_{i}": abstract(4, 6) for i in range(10)}
    rules = [("model/layers/kernel", "layers_*", ckpt.Unstack()), ("model/layers/bias", "bias")]
    report = ckpt.plan_restore(scanned, {**target, "step": 0}, rename=rules)
    assert {e.path for e in report.unexpected} == {"layers_10", "layers_11", "bias"}
    assert {e.saved_path for e in report.unexpected} >= {"model/layers/kernel[10]"}
    assert not report.missing and not report.mismatched


def test_gaps_and_repeated_numbers_are_refused_all_at_once(tmp_path):
    zeros = np.zeros(2)
    path = ckpt.save(
        tmp_path / "a",
        {**{f"a_{i}": zeros for i in (0, 1, 4)}, **{f"b_{i}": zeros for i in ("0", "1", "01")}},
    )
    rules = [("a_*", "a", ckpt.Stack()), ("b_*", "b", ckpt.Stack())]
    first, second = problems(path, {"a": zeros, "b": zeros}, rules)
    assert "2 to 3 is missing between 0 and 4" in first
    assert "1 appears twice" in second


def test_layers_may_count_from_one(tmp_path):
    path = ckpt.save(tmp_path / "a", {f"h{i}": np.array(i) for i in range(1, 12)})
    found = ckpt.restore(path, {"h": np.zeros(11, int)}, rename=[("h*", "h", ckpt.Stack())])
    assert found["h"].tolist() == [*range(1, 12)]


def test_layers_of_different_shapes_cannot_be_stacked(tmp_path):
    path = ckpt.save(tmp_path / "a", {"h0": np.zeros(2), "h1": np.zeros(3)})
    (what, *_) = problems(path, {"h": np.zeros((2, 2))}, [("h*", "h", ckpt.Stack())])
    assert "float64[2] and float64[3]" in what and "h0 ... h1" in what


def test_which_wildcard_counts_is_found_by_the_target_pattern(tmp_path):
    tree = {f"block_{b}": {f"h_{i}": np.array(10 * b + i) for i in range(3)} for b in range(2)}
    path = ckpt.save(tmp_path / "a", tree)
    inner = [("block_*/h_*", "block_*/h", ckpt.Stack())]
    target = {f"block_{b}": {"h": np.zeros(3, int)} for b in range(2)}
    found = ckpt.restore(path, target, rename=inner)
    assert [found[f"block_{b}"]["h"].tolist() for b in range(2)] == [[0, 1, 2], [10, 11, 12]]
    outer = [("block_*/h_*", "block/h_*", ckpt.Stack())]
    found = ckpt.restore(
        path, {"block": {f"h_{i}": np.zeros(2, int) for i in range(3)}}, rename=outer
    )
    assert found["block"]["h_2"].tolist() == [2, 12]


def test_a_wildcard_that_could_be_either_has_to_be_named(tmp_path):
    tree = {f"a_{a}": {f"b_{b}": np.array(10 * a + b) for b in range(3)} for a in range(2)}
    path = ckpt.save(tmp_path / "a", tree)
    unclear = problems(path, {}, [("a_*/b_*", "c_*", ckpt.Stack())])
    assert unclear == [
        "several wildcards could number the values; choose one with Stack(index=...) "
        "(rule 'a_*/b_*' -> 'c_*')"
    ]
    target = {f"c_{b}": np.zeros(2, int) for b in range(3)}
    found = ckpt.restore(path, target, rename=[("a_*/b_*", "c_*", ckpt.Stack(index=0))])
    assert found["c_1"].tolist() == [1, 11]


def test_regular_expressions_stack_by_the_group_that_the_target_does_not_use(layered):
    rule = (
        re.compile(r"model/layers_(?P<number>\d+)/(?P<name>\w+)"),
        r"\g<name>",
        ckpt.Stack(axis=-1),
    )
    target = {"kernel": abstract(4, 6, 12), "bias": abstract(6, 12), "step": 0}
    found = ckpt.restore(layered, target, rename=[rule])
    np.testing.assert_array_equal(found["kernel"], np.stack(LAYERS, -1))


def test_stacked_prng_keys_are_keys(tmp_path):
    keys = {f"k{i}": jax.random.key(i) for i in range(3)}
    path = ckpt.save(tmp_path / "a", keys)
    target = {"k": jax.random.split(jax.random.key(9), 3)}
    found = ckpt.restore(path, target, rename=[("k*", "k", ckpt.Stack())])["k"]
    assert jnp.array_equal(jax.random.key_data(found[2]), jax.random.key_data(keys["k2"]))
    path = ckpt.save(tmp_path / "b", {"k": found})
    again = ckpt.restore(path, keys, rename=[("k", "k*", ckpt.Unstack())])
    assert jnp.array_equal(jax.random.key_data(again["k1"]), jax.random.key_data(keys["k1"]))


# --- transpose and cast ----------------------------------------------------------------


def test_transforms_apply_in_order(layered):
    rules = [
        ("model/layers_*/kernel", "w", ckpt.Transpose((1, 0)), ckpt.Cast("bfloat16"), ckpt.Stack())
    ]
    target = {"w": abstract(12, 6, 4, dtype=jnp.bfloat16)}
    found = ckpt.restore(layered, target, strict=False, rename=rules)["w"]
    expected = np.stack([w.T for w in LAYERS]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, expected, strict=True)
    report = ckpt.plan_restore(layered, target, rename=rules)
    (entry,) = report.restored
    assert entry.found == "12 x float32[4, 6]" and entry.expected == "bfloat16[12, 6, 4]"
    assert entry.saved_path == "model/layers_0/kernel ... model/layers_11/kernel"
    assert report.reshaped == report.dtype_changes == report.renamed == (entry,)


def test_a_cast_by_name_leaves_other_dtypes_checked(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": np.float64(1.5), "b": np.float64(2.5)})
    target = {"a": np.float32(0), "b": np.float32(0)}
    with pytest.raises(ckpt.RestoreMismatchError, match="b: expected dtype float32") as failure:
        ckpt.restore(path, target, rename=[("a", "a", ckpt.Cast())])
    assert "a:" not in [line.strip()[:2] for line in str(failure.value).splitlines()]
    found = ckpt.restore(path, target, rename=[("?", "?", ckpt.Cast())])
    assert found == {"a": np.float32(1.5), "b": np.float32(2.5)}


def test_a_cast_to_another_dtype_than_the_target_has_is_a_mismatch(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": np.zeros(2)})
    (what,) = problems(path, {"a": np.zeros(2, "f4")}, [("a", "a", ckpt.Cast("float16"))])
    assert "expected dtype float32, got float16" in what


def test_numbers_of_python_can_be_cast(tmp_path):
    path = ckpt.save(tmp_path / "a", {"step": 7, "rate": 0.5})
    rules = [("step", "step", ckpt.Cast()), ("rate", "rate", ckpt.Cast("float16"))]
    target = {"step": jnp.zeros((), jnp.float32), "rate": np.float16(0)}
    found = ckpt.restore(path, target, rename=rules)
    assert found["step"] == 7.0 and found["step"].dtype == jnp.float32
    assert found["rate"] == 0.5 and found["rate"].dtype == np.float16


def test_two_places_that_derive_from_one_value_do_not_share_memory(tmp_path):
    shared = np.arange(6.0)
    path = ckpt.save(tmp_path / "a", {"a": shared, "b": shared})
    target = {"a": np.zeros(6), "b": np.zeros(6)}
    rules = [("a", "a", ckpt.Cast("float64")), ("b", "b", ckpt.Transpose())]
    found = ckpt.restore(path, target, rename=rules)
    found["a"][:] = 0
    np.testing.assert_array_equal(found["b"], shared)


def test_tied_values_stay_tied_when_they_are_transposed(tmp_path):
    class Tied(nnx.Module):
        def __init__(self, value):
            self.embed = nnx.Param(jnp.asarray(value))
            self.head = self.embed

    weight = RNG.normal(size=(3, 2)).astype(np.float32)
    path = ckpt.save(tmp_path / "a", Tied(weight))
    target = Tied(np.zeros((2, 3), np.float32))
    ckpt.restore(path, target, rename=[("*", "*", ckpt.Transpose())])
    assert target.head is target.embed
    np.testing.assert_array_equal(target.embed[...], weight.T)


def test_a_rule_may_put_everything_below_a_name_or_take_it_from_there(tmp_path):
    tree = {"a": {"b": np.arange(3)}, "c": np.arange(2)}
    path = ckpt.save(tmp_path / "a", tree)
    found = ckpt.restore(path, {"model": tree}, rename=[("**", "model/**")])
    jax.tree.map(np.testing.assert_array_equal, found, {"model": tree})
    path = ckpt.save(tmp_path / "b", found)
    found = ckpt.restore(path, tree, rename=[("model/**", "**")])
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_the_save_counter_is_not_missed_where_a_rule_moved_everything(tmp_path):
    path = ckpt.Checkpoint(w=jnp.arange(2.0)).save(tmp_path / "a")
    found = ckpt.restore(path, {"model": {"w": jnp.zeros(2)}}, rename=[("**", "model/**")])
    np.testing.assert_array_equal(found["model"]["w"], [0, 1])


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


# --- problems --------------------------------------------------------------------------


def test_a_rule_that_names_a_container_of_values_says_how_to_reach_them(layered):
    (what, *_) = problems(layered, {}, [("model/layers_*", "layers", ckpt.Stack())])
    assert what.endswith("to rename those in model/layers_0 write model/layers_*/**")


def test_a_rule_with_a_typo_names_what_is_near(layered):
    (what,) = problems(layered, {}, [("model/layers_0/kernle", "w")])
    assert "nearest: model/layers_0/kernel" in what


def test_shapes_are_checked_before_a_byte_is_read(layered):
    target = {"w": abstract(11, 4, 6)}
    rules = [("model/layers_*/kernel", "w", ckpt.Stack())]
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(layered, target, strict=False, rename=rules)
    assert "w: expected shape (11, 4, 6), got (12, 4, 6)" in str(failure.value)
    assert "model/layers_0/kernel ... model/layers_11/kernel" in str(failure.value)


def test_a_derived_value_that_lands_on_another_is_refused(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": np.zeros(2), "b": np.zeros(2)})
    (what, *_) = problems(path, {}, [("a", "b", ckpt.Transpose())])
    assert what == "two saved values would be called b (one of them is a)"


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("ab", "a rename rule is"),
        (("a",), "a rename rule is"),
        (("a", 1), "are strings"),
        (("a", "b", "transpose"), "no transform"),
        (("a", "b", ckpt.Cast), "no transform"),
    ],
)
def test_what_is_no_rule_is_refused(tmp_path, rule, why):
    path = ckpt.save(tmp_path / "a", {"a": 1})
    with pytest.raises(TypeError, match=why):
        ckpt.restore(path, {"a": 1}, rename=[rule])


def test_a_rule_cannot_stack_twice(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1})
    with pytest.raises(ValueError, match="stacks or unstacks twice"):
        ckpt.restore(path, {}, rename=[("a", "b", ckpt.Stack(), ckpt.Unstack())])


def test_rules_that_match_nothing_and_rules_that_collide_are_named_together(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": 1, "b": 2, "c": 3})
    with pytest.raises(ckpt.RestoreMismatchError) as failure:
        ckpt.restore(path, {"c": 0}, rename=[("a", "c"), ("d", "e")], strict=False)
    text = str(failure.value)
    assert "'d' -> 'e' matches nothing saved" in text
    assert "two saved values would be called c (one of them is a)" in text


# --- shardings and bytes ---------------------------------------------------------------


def test_one_rule_stacks_parameters_and_the_moments_of_optax(tmp_path):
    params = {f"layers_{i}": {"kernel": jnp.array(w)} for i, w in enumerate(LAYERS)}
    optimizer = optax.adam(1e-3)
    grads = jax.tree.map(lambda w: w + 1, params)
    _, moments = optimizer.update(grads, optimizer.init(params))
    path = ckpt.save(tmp_path / "a", {"params": params, "opt": moments})
    scanned = {"layers": {"kernel": jnp.zeros((12, 4, 6))}}
    target = {"params": scanned, "opt": optimizer.init(scanned)}
    found = ckpt.restore(path, target, rename=[("**/layers_*/*", "**/layers/*", ckpt.Stack())])
    np.testing.assert_array_equal(found["params"]["layers"]["kernel"], np.stack(LAYERS))
    mu = found["opt"][0].mu["layers"]["kernel"]
    assert mu.shape == (12, 4, 6)
    np.testing.assert_array_equal(mu[7], moments[0].mu["layers_7"]["kernel"])


@pytest.mark.parametrize("spec", [("data",), (None, "model"), ("data", None, "model")])
def test_a_stacked_value_lands_on_the_sharding_of_the_target(layered, mesh42, spec):
    sharding = NamedSharding(mesh42, PartitionSpec(*spec))
    target = {"w": abstract(12, 4, 6, sharding=sharding)}
    rules = [("model/layers_*/kernel", "w", ckpt.Stack())]
    found = ckpt.restore(layered, target, strict=False, rename=rules)["w"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, np.stack(LAYERS))


def test_values_are_made_in_batches_as_small_as_asked_for(layered, scanned):
    small = ckpt.CheckpointOptions(max_inflight_bytes=1)
    rules = [("model/layers_*/*", "model/layers/*", ckpt.Stack())]
    target = {"model": {"layers": {"kernel": abstract(12, 4, 6), "bias": abstract(12, 6)}}}
    found = ckpt.restore(layered, target, strict=False, rename=rules, options=small)
    np.testing.assert_array_equal(found["model"]["layers"]["bias"], np.stack(LAYERS)[:, 0])
    rules = [("model/layers/*", "*_*", ckpt.Unstack(index=1))]
    target = {f"kernel_{i}": abstract(4, 6) for i in range(12)}
    found = ckpt.restore(scanned, target, strict=False, rename=rules, options=small)
    for i, w in enumerate(LAYERS):
        np.testing.assert_array_equal(found[f"kernel_{i}"], w)


def test_compressed_values_are_stacked(tmp_path):
    zstd = ckpt.CheckpointOptions(compression="zstd")
    path = ckpt.save(tmp_path / "a", {f"h{i}": w for i, w in enumerate(LAYERS)}, options=zstd)
    found = ckpt.restore(path, {"h": abstract(12, 4, 6)}, rename=[("h*", "h", ckpt.Stack())])
    np.testing.assert_array_equal(found["h"], np.stack(LAYERS))


def test_unstacking_reads_only_the_rows_that_the_target_has(tmp_path, monkeypatch):
    rows = RNG.normal(size=(8, 512, 512)).astype(np.float32)
    path = ckpt.save(tmp_path / "a", {"w": rows, "rest": np.zeros(3)})
    counted = []
    close = CheckpointReader.close
    monkeypatch.setattr(
        CheckpointReader, "close", lambda self: (counted.append(self.bytes_read), close(self))
    )
    target = {"w_2": np.zeros((512, 512), "f4")}
    rules = [("w", "w_*", ckpt.Unstack())]
    found = ckpt.restore(path, target, strict=False, rename=rules)
    np.testing.assert_array_equal(found["w_2"], rows[2])
    assert rows[2].nbytes <= counted[-1] < rows.nbytes / 2
    assert ckpt.plan_restore(path, target, rename=rules).nbytes == rows[2].nbytes


# --- objects ---------------------------------------------------------------------------


class Optimizer(ckpt.AutoTrackable):
    """One moment for each variable."""

    slot_name = "m"

    def __init__(self, variables):
        moments = {v: ckpt.Variable(jnp.zeros_like(v.value)) for v in variables}
        self._moments = ckpt.NoDependency(moments)
        self.rate = ckpt.Variable(0.0)

    def slots(self):
        return {(self.slot_name, v): moment for v, moment in self._moments.items()}

    def set(self, variable, value):
        self._moments[variable].assign(value)

    def get(self, variable):
        return self._moments[variable].value


class Net(ckpt.AutoTrackable):
    pass


class Momentum(Optimizer):
    """The same under another name, and at another place."""

    slot_name = "momentum"


def net(cls=Optimizer, **values):
    """A net of variables, their optimizer, and a checkpoint of both."""
    model = Net()
    variables = {name: ckpt.Variable(jnp.asarray(value)) for name, value in values.items()}
    for name, variable in variables.items():
        setattr(model, name, variable)
    optimizer = cls(variables.values())
    for variable in variables.values():
        optimizer.set(variable, variable.value * 10)
    return variables, optimizer, ckpt.Checkpoint(model=model, optimizer=optimizer)


def test_slots_follow_a_variable_that_was_renamed(tmp_path):
    _, _, saved = net(w=jnp.arange(3.0))
    path = saved.write(tmp_path / "a")
    variables, optimizer, checkpoint = net(kernel=jnp.zeros(3))
    checkpoint.read(path, rename=[("model/w", "model/kernel")]).assert_consumed()
    np.testing.assert_array_equal(variables["kernel"].value, [0, 1, 2])
    np.testing.assert_array_equal(optimizer.get(variables["kernel"]), [0, 10, 20])


def test_slots_are_stacked_with_their_variables_and_taken_apart_again(tmp_path):
    values = {f"h_{i}": jnp.arange(2.0) + i for i in range(11)}
    _, _, saved = net(**values)
    path = saved.write(tmp_path / "a")
    variables, optimizer, scanned = net(h=jnp.zeros((11, 2)))
    status = scanned.read(path, rename=[("model/h_*", "model/h", ckpt.Stack())])
    status.assert_consumed()
    expected = np.stack([*values.values()])
    np.testing.assert_array_equal(variables["h"].value, expected)
    np.testing.assert_array_equal(optimizer.get(variables["h"]), expected * 10)
    assert {entry.path for entry in status.report.reshaped} == {
        "model/h",
        "optimizer/m/model/h",
    }
    path = scanned.write(tmp_path / "b")
    variables, optimizer, again = net(**dict.fromkeys(values, jnp.zeros(2)))
    again.read(path, rename=[("model/h", "model/h_*", ckpt.Unstack())]).assert_consumed()
    for name, value in values.items():
        np.testing.assert_array_equal(variables[name].value, value)
        np.testing.assert_array_equal(optimizer.get(variables[name]), value * 10)


def test_slots_of_some_of_the_stacked_variables_are_left_over(tmp_path):
    values = {f"h_{i}": jnp.zeros(2) for i in range(3)}
    variables, optimizer, saved = net(**values)
    del optimizer._moments[variables["h_1"]]
    path = saved.write(tmp_path / "a")
    _, _, scanned = net(h=jnp.zeros((3, 2)))
    status = scanned.read(path, rename=[("model/h_*", "model/h", ckpt.Stack())])
    assert {entry.path for entry in status.expect_partial().report.unexpected} == {
        f"optimizer/m/model/h_{i}" for i in (0, 2)
    }
    with pytest.raises(AssertionError):
        status.assert_consumed()


@pytest.mark.parametrize("end", ["", "/**"])
@pytest.mark.parametrize("wildcard", ["optimizer", "*"])
def test_slots_of_one_name_get_another(tmp_path, end, wildcard):
    _, _, saved = net(w=jnp.arange(3.0), b=jnp.ones(1))
    path = saved.write(tmp_path / "a")
    variables, optimizer, checkpoint = net(Momentum, w=jnp.zeros(3), b=jnp.zeros(1))
    rules = [(f"{wildcard}/m{end}", f"{wildcard}/momentum{end}")]
    status = checkpoint.read(path, rename=rules)
    status.assert_consumed()
    np.testing.assert_array_equal(optimizer.get(variables["w"]), [0, 10, 20])
    renamed = {entry.path: entry.saved_path for entry in status.report.renamed}
    assert renamed["optimizer/momentum/model/w"] == "optimizer/m/model/w"


def test_slots_get_another_name_where_their_optimizer_and_variables_move_and_change(tmp_path):
    _, _, saved = net(w=jnp.arange(6.0).reshape(2, 3), b=jnp.ones(1))
    path = saved.write(tmp_path / "a")
    variables, optimizer, checkpoint = net(Momentum, w=jnp.zeros((3, 2)), b=jnp.zeros(1))
    checkpoint.opt = checkpoint.optimizer
    del checkpoint.optimizer
    rules = [
        ("model/w", "model/w", ckpt.Transpose()),
        ("optimizer/m", "opt/momentum"),
        ("optimizer/**", "opt/**"),
    ]
    checkpoint.read(path, rename=rules).assert_consumed()
    np.testing.assert_array_equal(variables["w"].value, np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(optimizer.get(variables["w"]), variables["w"].value * 10)
    np.testing.assert_array_equal(optimizer.get(variables["b"]), [10])


def test_slots_of_one_name_are_transformed(tmp_path):
    _, _, saved = net(w=jnp.arange(6).reshape(2, 3), u=jnp.arange(4).reshape(2, 2))
    path = saved.write(tmp_path / "a")
    variables, optimizer, checkpoint = net(
        Momentum, w=jnp.zeros((2, 3), int), u=jnp.zeros((2, 2), int)
    )
    for variable in variables.values():
        moment = ckpt.Variable(jnp.zeros(variable.value.T.shape, jnp.float16))
        optimizer._moments[variable] = moment
    rules = [("optimizer/m", "optimizer/momentum", ckpt.Transpose(), ckpt.Cast())]
    checkpoint.read(path, rename=rules).assert_consumed()
    for variable in variables.values():
        np.testing.assert_array_equal(optimizer.get(variable), variable.value.T * 10)
        assert optimizer.get(variable).dtype == jnp.float16


def test_slots_stay_with_their_optimizer(tmp_path):
    _, _, saved = net(w=jnp.zeros(3))
    path = saved.write(tmp_path / "a")
    _, _, checkpoint = net(w=jnp.zeros(3))
    with pytest.raises(ckpt.RestoreMismatchError, match="has to name a slot of 'optimizer'"):
        checkpoint.read(path, rename=[("optimizer/m", "elsewhere/m")])
    with pytest.raises(ckpt.RestoreMismatchError, match=r"matches nothing .*optimizer/m\b"):
        checkpoint.read(path, rename=[("optimizer/n", "optimizer/m")])


def test_a_rule_for_many_values_names_no_slots(tmp_path):
    _, _, saved = net(m=jnp.arange(3.0))  # a variable of the name of a slot
    path = saved.write(tmp_path / "a")
    variables, optimizer, checkpoint = net(m=jnp.zeros(3))
    rules = [("model/*", "model/*", ckpt.Cast()), ("optimizer/*", "optimizer/*", ckpt.Cast())]
    checkpoint.read(path, rename=rules).assert_consumed()
    np.testing.assert_array_equal(optimizer.get(variables["m"]), [0, 10, 20])


def test_slots_are_grouped_by_optimizer_and_name(tmp_path):
    _, _, saved = net(a=jnp.zeros(1), b=jnp.zeros(1))
    with CheckpointReader(saved.write(tmp_path / "a")) as reader:
        graph = reader.object_graph
    a, b = (graph.paths.index(f"model/{name}") for name in "ab")
    optimizer = graph.paths.index("optimizer")
    slots = {v: graph.slot(optimizer, v, "m") for v in (a, b)}
    assert [*slot_groups(graph, (b, a))] == [(optimizer, "m", (slots[b], slots[a]))]


def test_rules_hold_for_objects_that_appear_later(tmp_path):
    path = ckpt.Checkpoint(old=ckpt.AutoTrackable(), x=1).write(tmp_path / "empty")
    saved = Net()
    saved.h_0, saved.h_1 = ckpt.Variable(jnp.zeros(2)), ckpt.Variable(jnp.ones(2))
    path = ckpt.Checkpoint(old=saved).write(tmp_path / "a")
    checkpoint = ckpt.Checkpoint()
    rules = [("old/h_*", "new/h", ckpt.Stack(), ckpt.Transpose())]
    status = checkpoint.read(path, rename=rules)
    assert [entry.path for entry in status.report.deferred] == ["new/h"]
    late = Net()
    late.h = ckpt.Variable(jnp.zeros((2, 2)))
    checkpoint.new = late
    np.testing.assert_array_equal(late.h.value, [[0, 1], [0, 1]])
    status.assert_consumed()
    (entry,) = status.report.renamed
    assert (entry.path, entry.saved_path) == ("new/h", "old/h_0 ... old/h_1")


def test_a_value_that_was_renamed_wins_over_an_initializer(tmp_path):
    saved = Net()
    saved.w = ckpt.Variable(jnp.arange(2.0))
    path = ckpt.Checkpoint(model=saved).write(tmp_path / "a")
    late = ckpt.Trackable()
    checkpoint = ckpt.Checkpoint(model=late)
    checkpoint.read(path, rename=[("model/w", "model/kernel", ckpt.Cast())])
    np.testing.assert_array_equal(late.add_variable("kernel", (2,)).value, [0, 1])


def test_problems_of_rules_stop_the_restore_of_objects(tmp_path):
    _, _, saved = net(w=jnp.arange(3.0))
    path = saved.write(tmp_path / "a")
    variables, _, checkpoint = net(w=jnp.zeros(3))
    with pytest.raises(ckpt.RestoreMismatchError, match="typo.*matches nothing"):
        checkpoint.restore(path, rename=[("typo", "w")])
    np.testing.assert_array_equal(variables["w"].value, [0, 0, 0])


def test_a_value_may_take_the_place_of_the_container_that_it_was_in(tmp_path):
    rows = [np.full(2, i, np.float32) for i in range(3)]
    path = ckpt.save(tmp_path / "a", {"layers": rows, "head": {"kernel": rows[1]}})
    target = {"layers": np.zeros((3, 2), np.float32), "head": np.zeros(2, np.float32)}
    rules = [("layers/*", "layers", ckpt.Stack()), ("head/kernel", "head")]
    found = ckpt.restore(path, target, rename=rules)
    np.testing.assert_array_equal(found["layers"], np.stack(rows))
    np.testing.assert_array_equal(found["head"], rows[1])
    rules = [("head/kernel", "layers")]
    with pytest.raises(ckpt.RestoreMismatchError, match="two saved values would be called layers"):
        ckpt.restore(path, target, rename=rules)


def test_a_rule_that_stands_behind_a_wider_one_is_told_so(tmp_path):
    path = ckpt.save(tmp_path / "a", {"a": {"x": 1}})
    rules = [("a/*", "b/*"), ("a/x", "b/y")]
    report = ckpt.plan_restore(path, {"b": {"x": 0}}, rename=rules)
    assert [entry.path for entry in report.mismatched] == ["a/x"]
    assert "matches nothing saved that no earlier rule matches" in str(report)


def test_modules_of_nnx_restore_from_renamed_and_transposed_weights(tmp_path):
    weight = RNG.normal(size=(3, 2)).astype(np.float32)
    path = ckpt.save(tmp_path / "a", {"fc": {"weight": weight, "bias": weight[:, 0]}})
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    rules = [("fc/weight", "kernel", ckpt.Transpose()), ("fc/*", "*")]
    assert ckpt.restore(path, model, rename=rules) is model
    np.testing.assert_array_equal(model.kernel[...], weight.T)
    np.testing.assert_array_equal(model.bias[...], weight[:, 0])


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


# --- names ------------------------------------------------------------------------------


def test_elements_of_a_list_become_values_of_integer_keys(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": [1, 2]})
    assert ckpt.restore(path, {"v": {0: 0, 1: 0}}, rename=[("w", "v")]) == {"v": {0: 1, 1: 2}}


def test_an_array_that_is_shared_may_be_renamed_at_one_of_its_places(tmp_path):
    t = np.arange(3)
    path = ckpt.save(tmp_path / "a", {"a": t, "b": t})
    z = np.zeros(3, int)
    f = ckpt.restore(path, {"c": z, "b": z}, rename=[("a", "c")])
    assert f["c"].tolist() == [0, 1, 2] and f["c"] is f["b"]


# --- shared objects --------------------------------------------------------------------


class Shared(nnx.Module):
    """One block under two names, and its kernel under a third."""

    def __init__(self, value):
        self.first = block = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.second = block
        block.kernel[...] = value
        self.layers = nnx.List([block.kernel])


def test_a_rule_may_name_any_path_of_a_shared_object(tmp_path):
    path = ckpt.save(tmp_path / "a", Shared(jnp.arange(6.0).reshape(2, 3)))
    for where in ("first", "second"):
        rules = [(f"{where}/kernel", "dense/w"), (f"{where}/bias", "dense/b")]
        target = {"dense": {"w": abstract(2, 3), "b": abstract(3)}}
        found = ckpt.restore(path, target, rename=rules)
        np.testing.assert_array_equal(found["dense"]["w"], np.arange(6.0).reshape(2, 3))
    found = ckpt.restore(path, {"w": abstract(2, 3)}, rename=[("layers/0", "w")], strict=False)
    np.testing.assert_array_equal(found["w"], np.arange(6.0).reshape(2, 3))


def test_a_value_that_a_rule_has_used_needs_no_place_at_its_other_paths(tmp_path):
    path = ckpt.save(tmp_path / "a", Shared(jnp.arange(6.0).reshape(2, 3)))
    rules = [("first/kernel", "w", ckpt.Transpose()), ("first/bias", "b")]
    found = ckpt.restore(path, {"w": abstract(3, 2), "b": abstract(3)}, rename=rules)
    np.testing.assert_array_equal(found["w"], np.arange(6.0).reshape(2, 3).T)
    # Another path still leads to the value, if the program asks for it.
    target = {"w": abstract(3, 2), "b": abstract(3), "layers": [abstract(2, 3)]}
    found = ckpt.restore(path, target, rename=rules)
    np.testing.assert_array_equal(found["layers"][0], found["w"].T)
    # A derived value without a place is still reported.
    with pytest.raises(ckpt.RestoreMismatchError, match="unexpected"):
        ckpt.restore(path, {"b": abstract(3)}, rename=rules)


def test_objects_are_not_told_of_values_that_a_rule_has_used(tmp_path, caplog):
    path = ckpt.Checkpoint(net=Shared(jnp.ones((2, 3)))).write(tmp_path / "a")
    mine = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    mine.bias = nnx.Param(jnp.zeros(3))
    checkpoint = ckpt.Checkpoint(mine=mine)
    rules = [("net/first/kernel", "mine/kernel", ckpt.Transpose()), ("net/first/bias", "mine/bias")]
    checkpoint.read(path, rename=rules).assert_consumed()
    del checkpoint
    assert "never used" not in caplog.text
