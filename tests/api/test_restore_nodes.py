"""Restoring single nodes of a checkpoint, without matching graphs."""

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt


class Values(ckpt.AutoTrackable):
    """An object that owns values and may have a child."""

    def __init__(self, child=None, **values):
        self.__dict__["values"] = values
        if child is not None:
            self.child = child

    def serialize_to_arrays(self):
        return {name: jnp.float32(value) for name, value in self.values.items()}

    def restore_from_arrays(self, arrays):
        self.values.update({name: float(value) for name, value in arrays.items()})


@pytest.fixture
def path(tmp_path):
    """Node 0 is a root with the value a=1, node 1 its child with the value b=2."""
    return ckpt.Checkpoint(Values(Values(b=2.0), a=1.0)).write(tmp_path / "a")


@pytest.mark.behaviour(95)
def test_what_is_no_dict_is_refused(path):
    with pytest.raises(ValueError, match="expected a dict"):
        ckpt.restore_nodes(path, ["child"])


def test_no_path_is_refused():
    with pytest.raises(ValueError, match="path"):
        ckpt.restore_nodes(None, {0: Values(a=0.0)})


@pytest.mark.behaviour(96)
@pytest.mark.parametrize("node", [-1, 9])
def test_a_node_that_the_checkpoint_lacks_is_refused(path, node):
    with pytest.raises(ValueError, match="does not exist in the checkpoint"):
        ckpt.restore_nodes(path, {node: Values(a=0.0)})


@pytest.mark.behaviour(97)
@pytest.mark.parametrize("obj", [None, jnp.zeros(2), {"w": 1}, object()])
def test_an_object_that_cannot_be_restored_in_place_is_refused(path, obj):
    with pytest.raises(ValueError, match="pass a valid Trackable"):
        ckpt.restore_nodes(path, {0: obj})


@pytest.mark.behaviour(98)
def test_an_object_with_values_needs_a_node_with_values(tmp_path):
    path = ckpt.Checkpoint(Values(Values(b=2.0))).write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"node 0 \(\(root\)\) has no values"):
        ckpt.restore_nodes(path, {0: Values(a=0.0)})


def test_a_node_with_values_needs_an_object_with_values(path):
    with pytest.raises(ValueError, match=r"node 1 \(child\) has 1 values, but the Values takes no"):
        ckpt.restore_nodes(path, {1: Values()})


@pytest.mark.behaviour(99)
def test_restoring_the_root_leaves_its_child_as_it_is(path):
    root = Values(Values(b=0.0), a=0.0)
    ckpt.restore_nodes(path, {0: root})
    assert (root.values, root.child.values) == ({"a": 1.0}, {"b": 0.0})


@pytest.mark.behaviour(100)
def test_restoring_the_child_leaves_the_root_as_it_is(path):
    root = Values(Values(b=0.0), a=0.0)
    ckpt.restore_nodes(path, {1: root.child})
    assert (root.values, root.child.values) == ({"a": 0.0}, {"b": 2.0})


@pytest.mark.behaviour(101, 102)
@pytest.mark.parametrize(
    ("saved", "live"), [({"a": 1}, {"a": 0, "b": 0}), ({"a": 1, "b": 2}, {"a": 0})]
)
def test_an_object_and_its_node_have_equally_many_values(tmp_path, saved, live):
    path = ckpt.Checkpoint(Values(**saved)).write(tmp_path / "a")
    with pytest.raises(ValueError, match="number of values differs"):
        ckpt.restore_nodes(path, {0: Values(**live)})


def test_all_problems_are_reported_at_once_and_nothing_is_restored(path):
    good, bad = Values(a=0.0), Values(a=0.0, b=0.0)
    with pytest.raises(ValueError) as raised:
        ckpt.restore_nodes(path, {0: good, 1: bad, 7: good, "x": good})
    text = str(raised.value)
    assert "node 1 (child)" in text and "node 7" in text and "'x'" in text
    assert good.values == {"a": 0.0}


def test_values_of_other_names_or_shapes_are_mismatches(tmp_path, path):
    with pytest.raises(ckpt.RestoreMismatchError, match="other"):
        ckpt.restore_nodes(path, {0: Values(other=0.0)})
    path = ckpt.save(tmp_path / "w", {"w": jnp.ones(2)})
    w, first = ckpt.Variable(jnp.zeros(3)), Values()
    with pytest.raises(ckpt.RestoreMismatchError, match="w: expected shape"):
        ckpt.restore_nodes(path, {1: w, 0: first})
    np.testing.assert_array_equal(w.value, [0, 0, 0])


def test_what_was_restored_is_newer_than_what_still_waits(tmp_path):
    """A value that waits from an earlier restore does not overwrite it."""
    old = ckpt.Checkpoint(w=ckpt.Variable(jnp.float32(1))).write(tmp_path / "old")
    new = ckpt.Checkpoint(w=ckpt.Variable(jnp.float32(2))).write(tmp_path / "new")
    root = ckpt.Checkpoint()
    status = root.read(old)
    w = ckpt.Variable(jnp.float32(0))
    ckpt.restore_nodes(new, {ckpt.object_metadata(new).paths.index("w"): w})
    root.w = w
    assert float(w.value) == 2
    status.assert_consumed()


def test_a_dump_of_names_has_nodes_too(tmp_path):
    np.savez(tmp_path / "a.npz", **{"m/w": np.ones(2, np.float32)})
    path = tmp_path / "a.npz"
    w = ckpt.Variable(jnp.zeros(2))
    ckpt.restore_nodes(path, {ckpt.object_metadata(path).paths.index("m/w"): w})
    np.testing.assert_array_equal(w.value, [1, 1])
