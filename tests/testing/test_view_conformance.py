"""The conformance suite of views, run against objects of many kinds, and against broken views."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_jax as ckpt
from ckpt_jax.testing import ViewTests


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- classes of a user's own -----------------------------------------------------------


class Point:
    """An immutable object: restoring makes another one."""

    def __init__(self, xy, weight, tags):
        self.xy, self.weight, self.tags = xy, weight, tags


class TestPoint(ViewTests):
    def register(self):
        ckpt.register_view(
            Point,
            children=lambda point: vars(point),
            rebuild=lambda point, new: Point(**new),
        )

    def make_object(self, seed):
        return Point(jnp.asarray(numbers(seed, 2)), float(seed), [seed, f"tag {seed}"])

    def make_empty(self):
        return Point(jnp.zeros(2), -1.0, [-1, ""])

    def make_abstract(self):
        return Point(jax.ShapeDtypeStruct((2,), jnp.float32), 0.0, [0, ""])

    def assert_same(self, a, b):
        assert_trees_equal(vars(a), vars(b))


class Counter:
    """A mutable object: it is restored in place."""

    def __init__(self, counts, inner=None):
        self.counts, self.inner = counts, inner


class TestCounter(ViewTests):
    is_restored_in_place = True

    def register(self):
        def rebuild(counter, new):
            counter.counts, counter.inner = new["counts"], new["inner"]
            return counter

        ckpt.register_view(
            Counter,
            children=lambda counter: {"counts": counter.counts, "inner": counter.inner},
            rebuild=rebuild,
        )

    def make_object(self, seed):
        return Counter(numbers(seed, 3), Counter({"n": seed}))

    def make_empty(self):
        return Counter(np.zeros(3, np.float32), Counter({"n": -1}))

    def assert_same(self, a, b):
        np.testing.assert_array_equal(a.counts, b.counts)
        assert a.inner.counts == b.inner.counts


class Layer(ckpt.AutoTrackable):
    """A trackable that may get its variable late, when it first sees an input."""

    def __init__(self, bias):
        self.bias = ckpt.Variable(bias)

    def build(self, kernel):
        self.kernel = ckpt.Variable(kernel)
        return self


class TestLayer(ViewTests):
    is_restored_in_place = True

    def make_object(self, seed):
        return Layer(float(seed)).build(numbers(seed, 2, 3))

    def make_empty(self):
        return Layer(-1.0).build(np.zeros((2, 3), np.float32))

    def make_unfinished(self):
        return Layer(-1.0)

    def finish(self, unfinished):
        unfinished.build(np.zeros((2, 3), np.float32))

    def assert_same(self, a, b):
        np.testing.assert_array_equal(a.kernel.value, b.kernel.value)
        assert float(a.bias.value) == float(b.bias.value)


# --- Flax and Equinox ------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)


class TestNnxModule(ViewTests):
    is_restored_in_place = True

    def make_object(self, seed):
        network = Network(nnx.Rngs(seed))
        network.norm.mean[...] = jnp.full(3, float(seed))
        return network

    def make_empty(self):
        return jax.tree.map(lambda x: x * 0 + 9, self.make_object(0))

    def make_abstract(self):
        return nnx.eval_shape(lambda: Network(nnx.Rngs(0)))

    def assert_same(self, a, b):
        assert_trees_equal(nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b)))


class TestNnxOptimizer(ViewTests):
    is_restored_in_place = True

    def make_object(self, seed):
        optimizer = self.make_empty()
        state = nnx.state(optimizer)
        nnx.update(optimizer, jax.tree.map(lambda x: x + seed + 1, state))
        return optimizer

    def make_empty(self):
        return nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)

    def make_abstract(self):
        return nnx.eval_shape(self.make_empty)

    def assert_same(self, a, b):
        assert_trees_equal(nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b)))


class Perceptron(eqx.Module):
    layers: list[Any]
    activation: Any = eqx.field(static=True, default=jnp.tanh)


class TestEquinoxModule(ViewTests):
    def make_object(self, seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        return Perceptron([eqx.nn.Linear(2, 2, key=key) for key in keys])

    def make_empty(self):
        return jax.tree.map(jnp.zeros_like, self.make_object(0))

    def make_abstract(self):
        return eqx.filter_eval_shape(self.make_object, 0)

    def assert_same(self, a, b):
        assert_trees_equal(a, b)


class TestBoundLinenModule(ViewTests):
    def make_object(self, seed):
        module = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
        variables = module.init(jax.random.key(seed), jnp.ones((1, 2)))
        statistics = jax.tree.map(lambda x: x + seed, variables["batch_stats"])
        return module.bind({**variables, "batch_stats": statistics})

    def make_empty(self):
        module, variables = self.make_object(0).unbind()
        return module.bind(jax.tree.map(lambda x: x * 0 - 1, variables))

    def make_abstract(self):
        module, variables = self.make_object(0).unbind()
        return module.bind(jax.eval_shape(lambda: variables))

    def assert_same(self, a, b):
        assert_trees_equal(a.variables, b.variables)


# --- plain trees -----------------------------------------------------------------------


class Sample(NamedTuple):
    inputs: Any
    label: int


class TestNamedTuple(ViewTests):
    def make_object(self, seed):
        return Sample({"image": numbers(seed, 2, 2)}, seed)

    def make_empty(self):
        return Sample({"image": np.zeros((2, 2), np.float32)}, -1)

    def make_abstract(self):
        return Sample({"image": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, 0)

    def assert_same(self, a, b):
        assert isinstance(a, Sample)
        assert_trees_equal(a, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Moments:
    mean: Any
    variance: Any
    count: int = 0


class TestDataclass(ViewTests):
    def make_object(self, seed):
        return Moments(jnp.asarray(numbers(seed, 4)), [numbers(seed, 4)], seed)

    def make_empty(self):
        return Moments(jnp.zeros(4), [np.zeros(4, np.float32)], -1)

    def make_abstract(self):
        vector = jax.ShapeDtypeStruct((4,), jnp.float32)
        return Moments(vector, [vector], 0)

    def assert_same(self, a, b):
        assert_trees_equal(a, b)


# --- broken views ----------------------------------------------------------------------


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


class PairTests(ViewTests):
    """The suite with a view that is right; those below get one part of it wrong."""

    def register(self):
        ckpt.register_view(Pair, children=self.children, rebuild=self.rebuild)

    def children(self, pair):
        return {"first": pair.first, "second": pair.second}

    def rebuild(self, pair, new):
        return Pair(new["first"], new["second"])

    def make_object(self, seed):
        return Pair(numbers(seed, 3), [seed, seed + 1])

    def make_empty(self):
        return Pair(np.zeros(3, np.float32), [-1, -2])

    def assert_same(self, a, b):
        np.testing.assert_array_equal(a.first, b.first)
        assert a.second == b.second


class TestPair(PairTests):
    """Without which the tests below would show nothing."""


class Forgetful(PairTests):
    """A child is not shown."""

    def children(self, pair):
        return {"first": pair.first}

    def rebuild(self, pair, new):
        return Pair(new["first"], pair.second)


class Unchanging(PairTests):
    """New children are not taken over."""

    def rebuild(self, pair, new):
        return Pair(pair.first, pair.second)


class Swapping(PairTests):
    """New children end up in each other's place."""

    def rebuild(self, pair, new):
        return Pair(new["second"], new["first"])


class Mutating(PairTests):
    """The target is changed, although another object is returned."""

    def rebuild(self, pair, new):
        pair.second = new["second"]
        return Pair(new["first"], new["second"])


class SecretlyInPlace(PairTests):
    """The target itself is changed and returned, which is not what the author says."""

    def rebuild(self, pair, new):
        pair.first, pair.second = new["first"], new["second"]
        return pair


class NotInPlace(PairTests):
    """Another object is returned, which is not what the author says."""

    is_restored_in_place = True


class ChangingWhenSeen(PairTests):
    """Whoever looks at the object changes it."""

    def children(self, pair):
        pair.second.append(0)
        return super().children(pair)


class ChangingItsLabels(PairTests):
    """Labels are positions among all labels that were ever given."""

    count = 0

    def children(self, pair):
        self.count += 2
        return {str(self.count): pair.first, str(self.count + 1): pair.second}

    def rebuild(self, pair, new):
        return Pair(*list(new.values())[-2:])


class MakingItsChildren(PairTests):
    """A child with an identity is another object each time."""

    def children(self, pair):
        return {"first": ckpt.Variable(pair.first), "second": pair.second}

    def rebuild(self, pair, new):
        return Pair(new["first"].value, new["second"])


class WithLabelsOfAnotherKind(PairTests):
    """Labels are sets."""

    def children(self, pair):
        return {frozenset(["first"]): pair.first, frozenset(["second"]): pair.second}

    def rebuild(self, pair, new):
        return Pair(new[frozenset(["first"])], new[frozenset(["second"])])


class SayingThatAllIsSame(PairTests):
    """The comparison accepts everything, so that no test could fail."""

    def assert_same(self, a, b):
        pass


class LateButDeaf(ViewTests):
    """Children that come later are not waited for: the object is no trackable."""

    is_restored_in_place = True

    def register(self):
        def rebuild(pair, new):
            vars(pair).update(new)
            return pair

        ckpt.register_view(Pair, children=lambda pair: dict(vars(pair)), rebuild=rebuild)

    make_object, make_empty = PairTests.make_object, PairTests.make_empty
    assert_same = PairTests.assert_same

    def make_unfinished(self):
        pair = self.make_empty()
        del pair.second
        return pair

    def finish(self, unfinished):
        unfinished.second = [-1, -2]


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        (Forgetful, "test_an_object_comes_back"),
        (Unchanging, "test_rebuilding_takes_over_children_one_by_one"),
        (Unchanging, "test_an_object_in_a_checkpoint_comes_back"),
        (Swapping, "test_rebuilding_takes_over_children_one_by_one"),
        (Mutating, "test_an_object_comes_back"),
        (Mutating, "test_an_object_in_two_places_comes_back_in_both"),
        (SecretlyInPlace, "test_objects_inside_other_objects_come_back"),
        (NotInPlace, "test_an_object_in_a_checkpoint_comes_back"),
        (ChangingWhenSeen, "test_looking_at_an_object_does_not_change_it"),
        (ChangingWhenSeen, "test_saving_does_not_change_the_object"),
        (ChangingItsLabels, "test_the_labels_of_the_children_are_always_the_same"),
        (MakingItsChildren, "test_children_that_are_objects_of_their_own_are_always_the_same_ones"),
        (WithLabelsOfAnotherKind, "test_the_labels_of_the_children_are_distinct"),
        (SayingThatAllIsSame, "test_objects_of_different_seeds_and_empty_ones_differ"),
        (LateButDeaf, "test_children_that_come_later_are_restored_then"),
    ],
)
def test_the_suite_notices_a_view_that_is_wrong(suite, expected, tmp_path):
    test = getattr(suite(), expected)
    arguments = [tmp_path] if "tmp_path" in inspect.signature(test).parameters else []
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(*arguments)
